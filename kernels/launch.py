"""Run time: load the compiled kernels and launch them on a queue, through the C interface of dpctl.

`SyclQueue.submit_async` converts every argument again in every call, about 1 µs each. The C function under it takes arrays of
addresses, of which all but the pointers to USM memory are made once: a launch costs 20 to 30 µs instead of 60 to 140. A step
that does nothing but launch kernels can be recorded and run again with other memory.
"""

from __future__ import annotations

import ctypes
import re
import threading
import warnings
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import dpctl
from dpctl import SyclQueue
from dpctl.memory import MemoryUSMDevice

try:  # what dpctl deprecates from 0.23 on
    from dpctl.compiler import create_kernel_bundle_from_spirv
except ImportError:
    from dpctl.program import create_program_from_spirv as create_kernel_bundle_from_spirv

from . import manifest
from .build_log import build_log
from .constants import specialise, sub_group_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

    from .constants import Constants

_SCALARS = {"int64": ctypes.c_int64, "float32": ctypes.c_float, "float64": ctypes.c_double}
REPLAYED = 256  # steps that a `Replay` knows
KEPT_BYTES = 65536  # hashing more takes longer than sending it again
# of DPCTLKernelArgType in dpctl_sycl_enum_types.h
_TYPE_IDS = {"int64": 6, "float32": 8, "float64": 9, "pointer": 10}
_TYPE_NAMES = {6: "DPCTL_INT64_T", 8: "DPCTL_FLOAT32_T", 9: "DPCTL_FLOAT64_T", 10: "DPCTL_VOID_PTR"}
# the parameters of DPCTLQueue_SubmitNDRange in dpctl_sycl_queue_interface.h
_PARAMETERS = ["KRef", "QRef", "Args", "ArgTypes", "NArgs", "gRange", "lRange", "NDims", "DepEvents", "NDepEvents"]


def check_headers(folder: Path) -> None:
    """Compare the headers of dpctl in a folder with what launches pass to its C interface: what differs would crash.

    Nothing is compared where a distribution leaves the headers out.
    """
    try:
        types = (folder / "syclinterface/dpctl_sycl_enum_types.h").read_text()
        queues = (folder / "syclinterface/dpctl_sycl_queue_interface.h").read_text()
    except FileNotFoundError:
        return
    listed = re.search(r"enum\s*\{([^}]*)\}\s*DPCTLKernelArgType", re.sub("//.*", "", types))
    names = re.findall(r"\w+", listed[1]) if listed else []
    function = re.search(r"DPCTLQueue_SubmitNDRange\(([^)]*)\)", queues)
    parameters = re.findall(r"(\w+)(?:\[3\])?\s*(?:,|$)", function[1]) if function else []
    if parameters != _PARAMETERS or any(names[n : n + 1] != [name] for n, name in _TYPE_NAMES.items()):
        raise RuntimeError(
            f"dpctl {dpctl.__version__} has another C interface than this version of ulysses_dp knows: DPCTLQueue_SubmitNDRange"
            f"({', '.join(parameters)}), argument types {names}. Install an earlier dpctl, or a later ulysses_dp."
        )


def _interface() -> Any:
    """The functions of dpctl's C interface that a launch needs. PyDLL: a launch is too short to let go of the interpreter."""
    check_headers(Path(dpctl.get_include()))
    folder = Path(dpctl.__file__).parent
    path = next(path for path in folder.iterdir() if "DPCTLSyclInterface" in path.name and path.suffix in (".so", ".dll"))
    library, waiting = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
    library.DPCTLQueue_SubmitNDRange.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p),  # kernel, queue
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),  # arguments, their types, their number
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),  # global range, local range, dimensions
        *(ctypes.c_void_p, ctypes.c_size_t),  # events to wait for, their number
    ]
    library.DPCTLQueue_SubmitNDRange.restype = ctypes.c_void_p
    waiting.DPCTLEvent_Wait.argtypes = library.DPCTLEvent_Delete.argtypes = [ctypes.c_void_p]
    waiting.DPCTLEvent_Wait.restype = library.DPCTLEvent_Delete.restype = None
    return library.DPCTLQueue_SubmitNDRange, waiting.DPCTLEvent_Wait, library.DPCTLEvent_Delete


_submit, _wait, _delete = _interface()


class BuildError(RuntimeError):
    """The driver's compiler cannot build a kernel."""


@cache
def _kernel(context: Any, device: Any, name: str, constants: Constants = ()) -> Any:
    """The kernel, compiled by the driver for this context, device and constants on first use."""
    entry = manifest.read()[name]
    spirv = (manifest.FOLDER / f"{name}.spv").read_bytes()
    warn_of_kernel_for_cpus(device, name, spirv)
    if constants:
        spirv = specialise(spirv, constants)
    options = entry["build_options"].get(device.backend.name, "") if device.is_gpu else ""
    # a program is built through a queue, but belongs to its context and device alone
    try:
        program = create_kernel_bundle_from_spirv(SyclQueue(context, device), spirv, options)
    except Exception as error:  # of a class that differs between versions of dpctl, and without a text
        text = build_log(device, spirv, options) or str(error) or "neither dpctl nor the driver says why"
        raise BuildError(
            f"kernel {name} with the constants {dict(constants)} and the options {options!r} cannot be built for "
            f"{device.backend.name}:{device.device_type.name} {device.name.strip()}: {text}"
        ) from error
    kernel = program.get_sycl_kernel(entry["entry"])
    expected = len(entry["arguments"])
    if kernel.num_args != expected:
        raise RuntimeError(f"kernel {name} takes {kernel.num_args} arguments, its manifest lists {expected}")
    return kernel


def warn_of_kernel_for_cpus(device: Any, name: str, spirv: bytes) -> None:
    """Warn of a kernel that was not made for the GPU that has to take it: those that were are made of sub-groups."""
    if device.is_gpu and sub_group_size(spirv) is None:
        what = f"{device.name.strip()} computes with the kernel {name}, which is made for CPUs and slow on GPUs"
        warnings.warn(f"{what}: no kernel for GPUs serves this call", RuntimeWarning, stacklevel=2)


class Launch:
    """A kernel with its queue, its index space and all of its arguments but the pointers; see `launch`."""

    def __init__(
        self, queue: Any, name: str, scalars: tuple[float, ...], groups: int, lanes: int, constants: Constants = ()
    ) -> None:
        if lanes > queue.sycl_device.max_work_group_size:
            # dpctl can return normally from such a launch, with the output untouched
            raise RuntimeError(f"kernel {name} needs work-groups of {lanes}, {queue.sycl_device.name} allows fewer")
        kinds = [kind for _, kind in manifest.read()[name]["arguments"]]
        values = [_SCALARS[kind](value) for kind, value in zip(kinds[len(kinds) - len(scalars) :], scalars, strict=True)]
        self.name, self._memories, count = name, len(kinds) - len(scalars), len(kinds)
        self._what = f"kernel {name} over {groups} groups of {lanes}"
        self._queue, self._kernel, self._scalars = (
            queue,
            _kernel(queue.sycl_context, queue.sycl_device, name, constants),
            values,
        )
        self._arguments = ctypes.c_void_p * count
        self._addresses = bytes(self._arguments(*[None] * self._memories, *map(ctypes.addressof, values)))
        self._first = self._kernel.addressof_ref(), queue.addressof_ref()
        index_space = (ctypes.c_size_t * 1)(groups * lanes), (ctypes.c_size_t * 1)(lanes), 1
        self._last = (ctypes.c_int * count)(*map(_TYPE_IDS.__getitem__, kinds)), count, *index_space, None, 0

    def run(self, memories: Sequence[Any]) -> None:
        """Run it with these pointers, after all earlier work of the queue, and wait for it."""
        if len(memories) != self._memories:
            raise RuntimeError(f"{self._what} takes {self._memories} pointers before its scalars, not {len(memories)}")
        record(self, memories)
        addresses = self._arguments.from_buffer_copy(self._addresses)
        addresses[: self._memories] = [memory._pointer for memory in memories]
        self._queue.wait()
        event = _submit(*self._first, addresses, *self._last)
        if not event:
            raise RuntimeError(f"the device refused to run {self._what}")
        _wait(event)
        _delete(event)


class Runs(Protocol):
    """A `Launch`, or what does the work of one."""

    def run(self, memories: Sequence[Any]) -> None: ...


class _Recording(threading.local):
    launches: list[tuple[Runs, Sequence[Any]]] | None = None


_recording = _Recording()


def record(launch: Runs, memories: Sequence[Any]) -> None:
    """Let a `Replay` that records know what is run with which memories."""
    if _recording.launches is not None:
        _recording.launches.append((launch, tuple(memories)))


@contextmanager
def _recorded() -> Iterator[list[tuple[Runs, Sequence[Any]]]]:
    """The launches that this thread makes in the block, and the memories of each."""
    _recording.launches = launches = []
    try:
        yield launches
    finally:
        _recording.launches = None


class Replay:
    """Steps that launch kernels, run again without what leads to the launches."""

    def __init__(self) -> None:
        self._known: dict[Any, list[tuple[Runs, list[int]]] | None] = {}

    def run(self, key: Any, arrays: Sequence[Any], step: Callable[[], object]) -> None:
        """Do a step for these USM arrays, or launch what it launched when there was this key before.

        All that the step does to the arrays are launches, which follow from the key, but for the memory of the arrays. A step
        that also launches kernels on other memory is done every time.
        """
        memories = [x.usm_data for x in arrays]
        numbers = {id(memory): n for n, memory in enumerate(memories)}
        key = key, *[numbers[id(memory)] for memory in memories]  # arrays may share memory
        if key not in self._known:
            with _recorded() as launches:
                step()
            if len(self._known) >= REPLAYED:  # of lengths that never come again, for instance
                self._known.clear()
            only_these = all(id(memory) in numbers for _, used in launches for memory in used)
            self._known[key] = [(x, [numbers[id(memory)] for memory in used]) for x, used in launches] if only_these else None
        elif (known := self._known[key]) is None:
            step()
        else:
            for launch, used in known:
                launch.run([memories[n] for n in used])


# A launch is made once: the next call like this one finds it again.
ready = lru_cache(maxsize=1024)(Launch)


def upload(queue: Any, x: np.ndarray) -> Any:
    """Device memory with the numbers of a C-contiguous array, to be read only; small ones are kept for later calls."""
    return (_uploaded if x.nbytes <= KEPT_BYTES else _uploaded.__wrapped__)(queue, x.tobytes())


def free_uploads() -> None:
    """Give back what `upload` keeps."""
    _uploaded.cache_clear()


@lru_cache(maxsize=64)
def _uploaded(queue: Any, content: bytes) -> Any:
    memory = MemoryUSMDevice(max(len(content), 1), queue=queue)
    memory.copy_from_host(content or b"\0")
    return memory


def offset_and_strides(x: Any) -> tuple[int, ...]:
    """Where a USM array lies in its allocation, in elements: offset, and strides of all axes."""
    return x._element_offset, *x.strides


def launch(
    queue: Any,
    name: str,
    memories: Sequence[Any],
    scalars: tuple[float, ...],
    *,
    groups: int,
    lanes: int,
    constants: Constants = (),
) -> None:
    """Run kernel `name` over `groups` work-groups of `lanes` work-items, after all earlier work of the queue, and wait for it.

    Queues are out of order, and what was submitted before may be dpnp's or the user's own: so the queue is waited for first.
    Waiting afterwards keeps the arguments alive for as long as the kernel needs them.

    Parameters
    ----------
    queue : dpctl.SyclQueue
        Where to run.
    name : str
        A kernel of the manifest.
    memories : sequence of dpctl.memory objects
        The pointer arguments, first in the kernel's argument list.
    scalars : tuple of int or float
        All the other arguments, in order.
    groups, lanes : int
        The one-dimensional index space.
    constants : tuple of (int, int)
        Numbers and values of the kernel's specialisation constants that are not 0.
    """
    ready(queue, name, scalars, groups, lanes, constants).run(memories)
