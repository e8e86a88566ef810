"""Arrays of any supported kind, to USM and back; and the device memory that calls use again and again."""

from __future__ import annotations

import enum
import math
import sys
from threading import local
from typing import Any

import dpnp
import numpy as np

try:
    import dpnp.tensor as tensor  # since dpnp 0.20
except ImportError:
    import dpctl.tensor as tensor

from .device import default_queue

POOLED_BYTES = 16 * 2**20
POOLED_RESULTS = 8


class Kind(enum.Enum):
    """What the user's arrays are; the result is of the same kind."""

    DPNP = "dpnp.ndarray"
    USM = "usm_ndarray"
    NUMPY = "numpy.ndarray"


def kind_of(x: Any) -> Kind | None:
    """The kind of an array, or None where it is none that we know."""
    if isinstance(x, dpnp.ndarray):
        return Kind.DPNP
    if isinstance(x, tensor.usm_ndarray):
        return Kind.USM
    if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray):
        return Kind.NUMPY
    return None


def to_usm(x: Any, kind: Kind) -> Any:
    """The array as a `usm_ndarray`: a view, or for NumPy a copy on this rank's device."""
    if kind is Kind.DPNP:
        return x.get_array()
    if kind is Kind.NUMPY:
        return tensor.asarray(x, sycl_queue=default_queue())
    return x


def from_usm(x: Any, kind: Kind) -> Any:
    """The array as the user's kind: a view, or for NumPy a copy on the host."""
    if kind is Kind.DPNP:
        return dpnp.asarray(x)
    if kind is Kind.NUMPY:
        return tensor.asnumpy(x)
    return x


def permute(x: Any, axes: tuple[int, ...]) -> Any:
    """A view with the axes in another order. What is no array with these axes comes back as it is, for the checks to name."""
    kind = kind_of(x)
    if kind is None or x.ndim != len(axes):
        return x
    return tensor.permute_dims(x, axes) if kind is Kind.USM else x.transpose(axes)


def _references(entry: tuple[Any, Any]) -> int:
    """How many references there are to the memory of an entry of the pool, as Python counts them."""
    memory = entry[1]
    return sys.getrefcount(memory)


# Measured, because versions of Python differ in whether a local variable and an argument count.
_REFERENCES_OF_POOL = _references((None, object()))


def empty_like(x: Any, shape: tuple[int, ...]) -> Any:
    """A new, uninitialised USM array with the dtype, queue and kind of USM memory of x.

    A small one may get memory that an earlier result gave back: fresh memory is mapped page by page on first use, which took
    two fifths of the time of a short call. Memory is given back when nothing but the pool refers to it any more. Work of the
    queue that still reads it is no danger: it is waited for before anything is launched.
    """
    nbytes = math.prod(shape) * x.dtype.itemsize
    key = (x.sycl_queue, x.usm_type, nbytes)
    pool = _workspace.results
    for place, entry in enumerate(pool):
        if entry[0] == key and _references(entry) == _REFERENCES_OF_POOL:
            pool.append(pool.pop(place))  # the least recently used one is dropped first
            return tensor.usm_ndarray(shape, dtype=x.dtype, buffer=entry[1])
    result = tensor.usm_ndarray(shape, dtype=x.dtype, buffer=x.usm_type, buffer_ctor_kwargs={"queue": x.sycl_queue})
    if 0 < nbytes <= POOLED_BYTES:
        pool.append((key, result.usm_data))
        del pool[:-POOLED_RESULTS]
    return result


def view(x: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """A view of the whole allocation of a USM array, from an element offset, with any shape and strides."""
    return tensor.usm_ndarray(shape, dtype=x.dtype, buffer=x.usm_data, strides=strides, offset=offset)


class _Workspace(local):
    def __init__(self) -> None:
        self.memories: dict[tuple[Any, str], Any] = {}  # scratch, by queue and slot
        self.results: list[tuple[Any, Any]] = []  # of results, in use or given back, with what they are good for


_workspace = _Workspace()


def scratch(queue: Any, slot: str, shape: tuple[int, ...], dtype: Any, usm_type: str = "device") -> Any:
    """An uninitialised USM array that is this thread's until it asks for the same slot of the same queue again.

    MPI libraries cache what they learn about a buffer, and fresh device memory has to be mapped page by page: using the same
    memory in every call saves both.
    """
    memories = _workspace.memories
    nbytes = max(math.prod(shape), 1) * dtype.itemsize
    key = (queue, slot)
    if key not in memories or memories[key].nbytes < nbytes:
        memories.pop(key, None)  # free the old one first
        memories[key] = tensor.empty(nbytes, dtype="u1", usm_type=usm_type, sycl_queue=queue).usm_data
    return tensor.usm_ndarray(shape, dtype=dtype, buffer=memories[key])


def free_workspace() -> None:
    """Give back the device memory that this thread keeps for later calls.

    Not collective. `ulysses_attention` keeps its communication buffers from call to call, as large as the largest call so
    far needed, and the memory of up to eight small results (16 MiB) to use it again after they are gone. The next call
    allocates anew.

    Examples
    --------
    >>> import ulysses_dp
    >>> ulysses_dp.free_workspace()
    """
    _workspace.memories.clear()
    _workspace.results.clear()
