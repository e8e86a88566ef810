"""Argument checks, and the agreement of all ranks on them.

Every check of a call runs before anything is sent. In a collective call the ranks then exchange one small record each
(`agree`): whether the checks passed, a digest of what must be the same everywhere, and the rows of this rank. So a bad
argument on one rank raises the same exception on every rank, and the communicator stays usable.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ulysses_dp.kernels import manifest
from ulysses_dp.kernels.flash_forward import MAX_HEAD_DIM

from . import _exchange
from ._arrays import Kind, kind_of
from ._partition import group_size
from .backend import AttnType
from .device import default_queue
from .schedule import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
MAX_SCALE = 1e30  # beyond, the scale itself would overflow float32
EXCHANGES = ("auto", "device", "host")


@dataclass(frozen=True)
class Options:
    """The options of attention that change its result; every rank must pass the same."""

    softmax_scale: float
    causal: bool
    return_lse: bool
    attn_type: AttnType


@dataclass(frozen=True)
class Geometry:
    """What the arrays of all ranks have in common."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

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


def check_attention(q: Any, k: Any, v: Any, names: Names = NAMES, **options: Any) -> tuple[Kind, Geometry, Options]:
    """Check all arguments of a call of attention."""
    kind, geometry = check_inputs(q, k, v, names)
    choose(device_of(q, kind), q.dtype, geometry.head_dim, q.shape[1])  # a bad environment variable of this rank
    return kind, geometry, check_options(geometry.head_dim, names, **options)


def check_options(
    head_dim: int,
    names: Names,
    *,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    return_lse: Any,
    attn_type: Any,
    sinks: Any = None,
    dropout_p: Any = 0.0,
) -> Options:
    """Check the options; the default of the scale is filled in."""
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(head_dim)
    if not isinstance(softmax_scale, numbers.Real) or isinstance(softmax_scale, bool):
        raise TypeError(f"softmax_scale must be a real number or None, not {type(softmax_scale).__name__}")
    size: Any = abs(softmax_scale)
    if not size < math.inf:
        raise ValueError(f"softmax_scale must be finite, not {softmax_scale}")
    if size > MAX_SCALE:
        raise ValueError(f"softmax_scale must be at most {MAX_SCALE:g} in size, not {softmax_scale}")
    for name, flag in (("causal", causal), (names.return_lse, return_lse)):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name} must be a bool, not {type(flag).__name__}")
    if not isinstance(attn_type, AttnType):
        raise TypeError(f"attn_type must be a member of AttnType, not {attn_type!r}")
    check_unsupported(window_size=(window_size, (-1, -1)), softcap=(softcap, 0.0))
    check_unsupported(alibi_slopes=(alibi_slopes, None), sinks=(sinks, None), dropout_p=(dropout_p, 0.0))
    return Options(float(softmax_scale), bool(causal), bool(return_lse), attn_type)


def check_unsupported(**options: tuple[Any, Any]) -> None:
    """Refuse options that are part of a signature but not built yet, given as ``name=(value, neutral value)``."""
    for name, (value, neutral) in options.items():
        if isinstance(neutral, tuple):
            unused = isinstance(value, (tuple, list, np.ndarray)) and tuple(value) == neutral
        elif neutral is None:
            unused = value is None
        else:
            unused = isinstance(value, numbers.Real) and value == neutral
        if not unused:
            raise NotImplementedError(f"{name} is not supported yet; leave it at {neutral}")


def check_array(name: str, x: Any) -> Kind:
    """Check the kind, the number of axes and the dtype of one array."""
    kind = kind_of(x)
    if kind is None:
        expected = ", ".join(k.value for k in Kind)
        raise TypeError(f"{name} must be an array ({expected}), not {type(x).__module__}.{type(x).__qualname__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must have the 4 axes (batch, seq, heads, head_dim), not shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; supported are float32 and float64 in native byte order")
    return kind


def device_of(x: Any, kind: Kind) -> Any:
    """The device on which an array is, or for NumPy will be."""
    return (default_queue() if kind is Kind.NUMPY else x.sycl_queue).sycl_device


def check_device(x: Any, kind: Kind) -> None:
    """Check that there is a device for the array, with kernels for its dtype: before the other ranks rely on this one."""
    device = device_of(x, kind)
    if x.dtype == np.float64 and not device.has_aspect_fp64:
        raise TypeError(f"float64 is not supported by the device {device.name.strip()}")
    manifest.read()


def check_inputs(q: Any, k: Any, v: Any, names: Names) -> tuple[Kind, Geometry]:
    """Check q, k and v against each other."""
    kinds = (check_array(names.q, q), check_array(names.k, k), check_array(names.v, v))
    geometry = _check_shapes(names, kinds, (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype))
    kind = kinds[0]
    if kind is not Kind.NUMPY and not q.sycl_queue == k.sycl_queue == v.sycl_queue:
        queues = _each(names, (_describe(x.sycl_queue) for x in (q, k, v)))
        raise ValueError(f"{names.q}, {names.k} and {names.v} must be on one queue, not {queues}")
    check_device(q, kind)
    return kind, geometry


@lru_cache(maxsize=1024)
def _check_shapes(
    names: Names, kinds: tuple[Kind, ...], shapes: tuple[tuple[int, ...], ...], dtypes: tuple[Any, ...]
) -> Geometry:
    """The checks of `check_inputs` that calls with the same shapes need not repeat."""
    q, k, v = names[:3]
    if len(set(kinds)) > 1:
        given = _each(names, (kind.value for kind in kinds))
        raise TypeError(f"{q}, {k} and {v} must be arrays of one kind, not {given}")
    if len(set(dtypes)) > 1:
        raise TypeError(f"{q}, {k} and {v} must have one dtype, not {_each(names, dtypes)}")
    given = _each(names, shapes)
    (batch, _, heads, head_dim), (k_batch, _, kv_heads, k_head_dim), _ = shapes
    if shapes[1] != shapes[2]:
        raise ValueError(f"{k} and {v} must have the same shape, not {given}")
    if k_batch != batch:
        raise ValueError(f"{q}, {k} and {v} must have the same batch, not {given}")
    if k_head_dim != head_dim:
        raise ValueError(f"{q}, {k} and {v} must have the same head_dim, not {given}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be from 1 to {MAX_HEAD_DIM}, not {head_dim}")
    if (heads % kv_heads) if kv_heads else heads:
        raise ValueError(f"the heads of {q} must be a multiple of those of {k} and {v}, not {heads} and {kv_heads}")
    return Geometry(batch, heads, kv_heads, head_dim, str(dtypes[0]))


def check_exchange(exchange: Any) -> None:
    """Check the wish for a route through MPI."""
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(map(repr, EXCHANGES))}, not {exchange!r}")


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


def check_count(name: str, n: Any) -> int:
    """Check a number of rows."""
    check_integer(name, n)
    if n < 0:
        raise ValueError(f"{name} must not be negative, not {n}")
    return int(n)


def check_integer(name: str, n: Any) -> None:
    """Check that it is an integer, of Python or NumPy, and no bool."""
    if not isinstance(n, numbers.Integral) or isinstance(n, bool):
        raise TypeError(f"{name} must be an integer, not {type(n).__name__}")


# what a check may raise; anything else arrives as a RuntimeError, since its constructor may want more than a message
_EXCEPTIONS = {e.__name__: e for e in (TypeError, ValueError, NotImplementedError, MemoryError)}
_T = TypeVar("_T")
_SIZES = 2  # the most sizes that a call needs: the record of a rank has a fixed length


def agree(
    comm: Any, function: str, check: Callable[[], tuple[tuple[int, ...], dict[str, Any], _T]]
) -> tuple[list[tuple[int, ...]], _T]:
    """Run the checks of this rank and let all ranks agree on the outcome. Collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks of the call.
    function : str
        Name of the public function, for messages; ranks that call different functions disagree.
    check : callable
        Runs the checks of this rank. Returns the sizes that may differ between ranks (at most two), what must be the same
        on all ranks by name, and anything else for this rank.

    Returns
    -------
    list of tuple of int
        The sizes of every rank.
    object
        What `check` returned for this rank.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        On every rank the same: what `check` raised on the lowest rank where it did, or what the ranks disagree on.
    """
    error: Exception | None = None
    try:
        sizes, common, result = check()
    except Exception as caught:  # whatever it is, the other ranks must hear of it
        error, sizes, common = caught, (), {}
    if comm.size == 1:
        if error is not None:
            raise _EXCEPTIONS.get(type(error).__name__, RuntimeError)(f"{function}: {error}") from error
        return [sizes], result
    common = {"function": function} | {name: str(value) for name, value in common.items()}
    digest = int.from_bytes(blake2b(repr(common).encode(), digest_size=7).digest(), "little")
    records = _exchange.share_record(comm, (error is not None, digest, *sizes, *(_SIZES - len(sizes)) * (0,)))
    if records[:, 0].any() or (records[:, 1] != records[0, 1]).any():
        _raise_everywhere(comm, function, error, common)
    return [tuple(map(int, record[2 : 2 + len(sizes)])) for record in records], result


def _raise_everywhere(comm: Any, function: str, error: Exception | None, common: dict[str, str]) -> None:
    """Raise the error of the lowest rank that has one, or say what differs; the same on every rank."""
    verdicts = _exchange.share_object(comm, (type(error).__name__, str(error), common) if error else (None, "", common))
    for rank, (name, message, _) in enumerate(verdicts):
        if name is not None:
            raise _EXCEPTIONS.get(name, RuntimeError)(f"{function}: rank {rank}: {message}") from error
    for name in dict.fromkeys(name for _, _, theirs in verdicts for name in theirs):
        values: dict[str, list[int]] = {}
        for rank, (_, _, theirs) in enumerate(verdicts):
            values.setdefault(theirs.get(name, "nothing"), []).append(rank)
        if len(values) > 1:
            given = ", ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in values.items())
            raise ValueError(f"{function}: {name} must be the same on all ranks, not {given}")


def _each(names: Names, values: Iterable[Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in zip(names[:3], values, strict=True))


def _describe(queue: Any) -> str:
    return f"{queue.sycl_device.filter_string} (queue {queue.addressof_ref():#x})"
