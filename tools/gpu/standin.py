"""The launchers of the kernels without SYCL: on another machine that can run the translated SPIR-V, with NumPy alone.

`install(machine)` makes `ulysses_dp.kernels` importable where neither dpctl nor the rest of the package is, with this module in
the place of `launch`. The launchers see `Array` for usm_ndarray: a strided view of the memory of a machine.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
KEPT_BYTES = 0  # of `upload`
SCALARS = {"int64": ctypes.c_int64, "float32": ctypes.c_float, "float64": ctypes.c_double}


@dataclass(frozen=True)
class Gpu:
    """What the launchers ask of a device."""

    name: str = "a GPU"
    is_gpu: bool = True
    is_cpu: bool = False
    sub_group_sizes: tuple[int, ...] = (16, 32)
    max_work_group_size: int = 1024


class Machine(Protocol):
    """What runs kernels. The launchers take it for a queue."""

    sycl_device: Gpu

    def allocate(self, nbytes: int) -> Any:
        """Uninitialised memory."""

    def write(self, handle: Any, numbers: np.ndarray) -> None:
        """Fill memory from its beginning."""

    def read(self, handle: Any, nbytes: int) -> bytes:
        """All of the memory."""

    def run(self, name: str, arguments: list[Any], groups: int, lanes: int, constants: dict[int, int]) -> None:
        """Run a kernel of the manifest to its end; arguments are handles of memory and ctypes scalars."""


class Memory:
    """Memory of a machine."""

    def __init__(self, machine: Machine, nbytes: int):
        self.machine, self.nbytes = machine, max(nbytes, 1)
        self.handle = machine.allocate(self.nbytes)

    @property
    def _pointer(self) -> int:
        """An address that is as well aligned as that of the memory: an allocation of its own."""
        return 0

    def write(self, x: np.ndarray) -> Memory:
        """Fill it."""
        if x.size:
            self.machine.write(self.handle, np.ascontiguousarray(x))
        return self


class Array:
    """A strided view, in elements, of memory: usm_ndarray in the parts that the launchers use."""

    def __init__(self, memory: Memory, dtype: Any, shape: Sequence[int], strides: Sequence[int], offset: int = 0):
        self.usm_data, self.dtype, self.shape = memory, np.dtype(dtype), tuple(shape)
        self.strides, self._element_offset = tuple(strides), offset
        self.sycl_queue: Any = memory.machine
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape))
        self.itemsize = self.dtype.itemsize
        self.nbytes = self.size * self.itemsize

    def __getitem__(self, index: Any) -> Array:
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (self.ndim - len(index))
        shape, strides, offset = [], [], self._element_offset
        for n, stride, i in zip(self.shape, self.strides, index, strict=True):
            if isinstance(i, slice):
                start, stop, step = i.indices(n)
                count = len(range(start, stop, step))
                shape.append(count)
                strides.append(stride * step)
                offset += start * stride if count else 0
            else:
                offset += range(n)[i] * stride
        return Array(self.usm_data, self.dtype, shape, strides, offset)

    def permute(self, axes: Sequence[int]) -> Array:
        """The same with its axes in another order."""
        return Array(
            self.usm_data, self.dtype, [self.shape[a] for a in axes], [self.strides[a] for a in axes], self._element_offset
        )


def empty(machine: Machine, shape: Sequence[int], dtype: Any) -> Array:
    """An uninitialised C-contiguous array."""
    strides = np.cumprod([1, *[max(n, 1) for n in shape[:0:-1]]])[::-1].tolist() if shape else []
    return Array(Memory(machine, int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype, shape, strides)


def asarray(machine: Machine, x: np.ndarray) -> Array:
    """A C-contiguous copy of x."""
    result = empty(machine, x.shape, x.dtype)
    result.usm_data.write(x)
    return result


def asnumpy(x: Array) -> np.ndarray:
    """The numbers of x."""
    if x.size == 0:
        return np.empty(x.shape, x.dtype)
    memory = x.usm_data
    whole = np.frombuffer(memory.machine.read(memory.handle, memory.nbytes), dtype=x.dtype)
    strides = [s * x.dtype.itemsize for s in x.strides]
    return np.lib.stride_tricks.as_strided(whole[x._element_offset :], x.shape, strides).copy()


# --- the functions of kernels/launch.py ---------------------------------------------------------------------------------------


def upload(machine: Machine, x: np.ndarray) -> Memory:
    """Memory with the numbers of an array."""
    return Memory(machine, x.nbytes).write(x)


def free_uploads() -> None:
    """Nothing is kept."""


def record(launch: Any, memories: Sequence[Memory]) -> None:
    """Nothing is run again."""


def offset_and_strides(x: Array) -> tuple[int, ...]:
    """Offset and strides."""
    return x._element_offset, *x.strides


def launch(
    machine: Machine,
    name: str,
    memories: Sequence[Memory],
    scalars: Sequence[float],
    *,
    groups: int,
    lanes: int,
    constants: Sequence[tuple[int, int]] = (),
) -> None:
    """Run a kernel, its arguments as the manifest lists them, with these values of specialisation constants by number."""
    kinds = [kind for _, kind in manifest().read()[name]["arguments"]]
    pointers = [memory.handle for memory in memories]
    if any(kind != "pointer" for kind in kinds[: len(pointers)]):
        raise RuntimeError(f"kernel {name} takes fewer pointers than {len(pointers)}")
    numbers = [SCALARS[kind](value) for kind, value in zip(kinds[len(pointers) :], scalars, strict=True)]
    machine.run(name, pointers + numbers, groups, lanes, dict(constants))


def ready(
    machine: Machine, name: str, scalars: Sequence[float], groups: int, lanes: int, constants: Sequence[tuple[int, int]] = ()
) -> SimpleNamespace:
    """A launch without its memories, which `run` takes."""

    def run(memories: Sequence[Memory]) -> None:
        launch(machine, name, memories, scalars, groups=groups, lanes=lanes, constants=constants)

    return SimpleNamespace(run=run)


def manifest() -> Any:
    """The module of that name."""
    return import_module("ulysses_dp.kernels.manifest")


def install(spirv: Path | None = None) -> None:
    """Make `ulysses_dp.kernels` that of this repository, launched by this module; its manifest may lie in another folder."""
    if "ulysses_dp" in sys.modules:
        raise RuntimeError("ulysses_dp is already imported")
    for name, path in (("ulysses_dp", []), ("ulysses_dp.kernels", [str(KERNELS)])):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = path
    sys.modules["ulysses_dp.kernels.launch"] = sys.modules[__name__]
    if spirv is not None:
        manifest().FOLDER = spirv
