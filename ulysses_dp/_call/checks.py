"""Argument checks of one rank. Every check of a call runs before anything is sent; `agree` makes them collective."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ulysses_dp.kernels import manifest
from ulysses_dp.kernels.tile import MAX_HEAD_DIM

from .._device.arrays import LIBRARIES, Array, Library, describe, library_of
from .._device.dtypes import BITS, DTYPES, held_by, names
from .._device.queue import default_queue
from .._ranks.partition import group_size
from .layout import LAYOUTS, PACKED, Layout, bshd_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

EXCHANGES = ("auto", "device", "host", "shared")


@dataclass(frozen=True)
class Geometry:
    """What the arrays of all ranks have in common."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int  # of v and out
    dtype: str

    @property
    def compute_dtype(self) -> str:
        """In which dtype attention computes, and gives lse."""
        return DTYPES[self.dtype].compute

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return group_size(self.heads, self.kv_heads)


class Names(NamedTuple):
    """What a public function calls its arguments, for messages."""

    q: str = "q"
    k: str = "k"
    v: str = "v"
    comm: str = "comm"
    return_lse: str = "return_lse"


NAMES = Names()


def check_array(name: str, x: Any) -> Array:
    """Check that it is an array that we know, and that it can be used; returns what it is."""
    library = library_of(x)
    if library is None:
        expected = ", ".join(library.name for library in LIBRARIES)
        raise TypeError(f"{name} must be an array ({expected}), not {type(x).__module__}.{type(x).__qualname__}")
    if (refused := library.obstacle(x)) is not None:
        error, message = refused
        raise error(f"{name} {message}")
    return describe(x, library)


def check_axis_count(name: str, x: Array, layout: Layout = "bshd") -> None:
    """Check the number of axes of an array."""
    axes = "(total, heads, head_dim)" if layout == PACKED else "(batch, seq, heads, head_dim)"
    count = axes.count(",") + 1
    if len(x.shape) != count:
        raise ValueError(f"{name} must have the {count} axes {axes}, not shape {x.shape}")


def check_dtype(name: str, x: Array, dtype: str | None) -> str:
    """Check the dtype of an array, which of bit patterns the user says; returns its name."""
    if dtype is not None and BITS.get(dtype) == x.dtype:
        return dtype
    if x.dtype not in DTYPES:
        held = held_by(x.dtype)
        hint = "" if held == x.dtype else f"; for {held} in {x.dtype} arrays give dtype={held!r}"
        raise TypeError(f"{name} has dtype {x.dtype}; supported are {names()} in native byte order{hint}")
    if dtype is not None and dtype != x.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, but dtype is {dtype!r}")
    return x.dtype


def check_layout(layout: Any) -> Layout:
    """Check the layout; returns it, with plain integers if it says which axes are which."""
    if isinstance(layout, tuple):
        for axis in layout:
            check_integer("layout", axis)
        if sorted(layout) == [0, 1, 2, 3]:
            return tuple(map(int, layout))
    elif not isinstance(layout, str):
        raise TypeError(f"layout must be a string, not {type(layout).__name__}; or a tuple of 4 numbers of axes")
    elif layout == PACKED or layout in LAYOUTS:
        return layout
    raise ValueError(f"layout must be one of {', '.join(sorted([*LAYOUTS, PACKED]))}, not {shown(layout)}")


def check_dtype_name(dtype: Any) -> None:
    """Check what the user says of the dtype."""
    if not isinstance(dtype, str | None):
        raise TypeError(f"dtype must be a string, not {type(dtype).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {names()}, not {shown(dtype)}")


def device_of(x: Array) -> Any:
    """The device on which an array is, or from the host will be."""
    return (default_queue() if x.on_host else x.queue()).sycl_device


def check_device(x: Array) -> None:
    """Check that there is a device for the array, with kernels for its dtype: before the other ranks rely on this one."""
    device = device_of(x)
    if x.dtype == "float64" and not device.has_aspect_fp64:  # float16 is storage here: the kernels compute in float32
        raise TypeError(f"{x.dtype} is not supported by the device {device.name.strip()}")
    manifest.read()


def check_same_device(names: Sequence[str], arrays: Sequence[Array]) -> None:
    """Check that arrays of one library are on one queue, or one device."""
    devices = [x.device for x in arrays]
    if devices.count(devices[0]) < len(devices):
        if arrays[0].library.device_is == "queue":
            raise ValueError(f"{_join(names)} must be on one queue, not {_each(names, map(_describe, devices))}")
        raise ValueError(f"{_join(names)} must be on one device, not {_each(names, devices)}")


def check_inputs(q: Any, k: Any, v: Any, names: Names, layout: Layout, dtype: Any) -> tuple[tuple[Array, ...], Geometry]:
    """Check q, k and v against each other; returns what they are."""
    check_dtype_name(dtype)
    arrays = tuple(check_array(name, x) for name, x in zip(names[:3], (q, k, v), strict=True))
    geometry = _check_together(names, layout, dtype, tuple([x[1:] for x in arrays]))
    check_device(arrays[0])
    return arrays, geometry


@lru_cache(maxsize=1024)
def _check_together(names: Names, layout: Layout, dtype: str | None, kinds: tuple[tuple[Any, ...], ...]) -> Geometry:
    """The checks of `check_inputs` that calls with arrays of the same kinds need not repeat: all but data and device."""
    arrays, dtypes = [Array(None, *kind) for kind in kinds], []
    for name, x in zip(names[:3], arrays, strict=True):
        check_axis_count(name, x, layout)
        dtypes.append(check_dtype(name, x, dtype))
    shapes = tuple(bshd_shape(x.shape, layout) for x in arrays)
    geometry = _check_shapes(names, tuple(x.library for x in arrays), shapes, tuple(dtypes))
    check_same_device(names[:3], arrays)
    return geometry


def _check_shapes(
    names: Names, libraries: tuple[Library, ...], shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
) -> Geometry:
    q, k, v = names[:3]
    if len(set(libraries)) > 1:
        given = _each(names[:3], (library.name for library in libraries))
        raise TypeError(f"{q}, {k} and {v} must be arrays of one kind, not {given}")
    if len(set(dtypes)) > 1:
        raise TypeError(f"{q}, {k} and {v} must have one dtype, not {_each(names[:3], dtypes)}")
    given = _each(names[:3], shapes)
    (batch, _, heads, head_dim), (k_batch, _, kv_heads, k_head_dim), (*_, head_dim_v) = shapes
    if shapes[1][:3] != shapes[2][:3]:
        raise ValueError(f"{k} and {v} must have the same shape, but for head_dim, not {given}")
    if k_batch != batch:
        raise ValueError(f"{q}, {k} and {v} must have the same batch, not {given}")
    if k_head_dim != head_dim:
        raise ValueError(f"{q} and {k} must have the same head_dim, not {given}")
    for name, width in (("head_dim", head_dim), (f"head_dim of {v}", head_dim_v)):
        if not 1 <= width <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must be from 1 to {MAX_HEAD_DIM}, not {width}")
    if (heads % kv_heads) if kv_heads else heads:
        raise ValueError(f"the heads of {q} must be a multiple of those of {k} and {v}, not {heads} and {kv_heads}")
    return Geometry(batch, heads, kv_heads, head_dim, head_dim_v, dtypes[0])


def check_exchange(exchange: Any) -> str:
    """Check the wish for a route; returns it."""
    if not isinstance(exchange, str) or exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(map(repr, EXCHANGES))}, not {shown(exchange)}")
    return exchange


def shared_or_not(exchange: str) -> str:
    """What of the wish for a route must be the same on all ranks."""
    return "'shared'" if exchange == "shared" else "messages"


def check_overlap(overlap: Any) -> int:
    """Check the wish for parts that overlap; returns their number."""
    if isinstance(overlap, str) and overlap == "auto":
        return 1
    if isinstance(overlap, str):
        raise ValueError(f"overlap must be an integer or 'auto', not {overlap!r}")
    check_integer("overlap", overlap)
    if overlap < 1:
        raise ValueError(f"overlap must be at least 1, not {overlap}")
    return int(overlap)


def check_node_size(node_size: Any, ranks: int) -> Any:
    """Check the wish for an exchange in two steps; returns it."""
    if isinstance(node_size, str) and node_size == "auto":
        return node_size
    if isinstance(node_size, str):
        raise ValueError(f"node_size must be an integer or 'auto', not {node_size!r}")
    check_integer("node_size", node_size)
    if node_size < 1 or ranks % node_size:
        raise ValueError(f"node_size must divide the {ranks} ranks, which {node_size} does not")
    return int(node_size)


def check_axes(**axes: Any) -> list[int]:
    """Check axis numbers of a 4-D array, which must differ; negative ones count from the end."""
    for name, axis in axes.items():
        check_integer(name, axis)
        if not -4 <= axis < 4:
            raise ValueError(f"{name} must be an axis of a 4-D array, not {axis}")
    numbers = [int(axis) % 4 for axis in axes.values()]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{' and '.join(axes)} must be different axes, not {' and '.join(map(str, axes.values()))}")
    return numbers


def check_flag(name: str, flag: Any) -> None:
    """Check a yes or no."""
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, not {type(flag).__name__}")


def check_count(name: str, n: Any) -> int:
    """Check a number of rows."""
    check_integer(name, n)
    if n < 0:
        raise ValueError(f"{name} must not be negative, not {n}")
    if n >= 2**63:  # the ranks tell each other their numbers in 64 bits
        raise ValueError(f"{name} must be less than 2**63, not {n}")
    return int(n)


def check_integer(name: str, n: Any) -> None:
    """Check that it is an integer, of Python or NumPy, and no bool."""
    if not isinstance(n, numbers.Integral) or isinstance(n, bool):
        raise TypeError(f"{name} must be an integer, not {type(n).__name__}")


def shown(x: Any) -> str:
    """A value in a message: short, and whatever it is."""
    try:
        text = str(x) if isinstance(x, numbers.Number) else repr(x)
    except Exception:  # the user's class may raise anything
        return f"a {type(x).__qualname__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


def _join(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _each(names: Sequence[str], values: Iterable[Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))


def _describe(queue: Any) -> str:
    return f"{queue.sycl_device.filter_string} (queue {queue.addressof_ref():#x})"
