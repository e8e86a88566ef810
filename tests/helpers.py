"""Arrays and their parts: the global inputs that every rank draws alike, and what this rank passes of them."""

import sys
from itertools import cycle

import dpctl
import dpnp
import numpy as np
import pytest
from mpi4py import MPI

from ulysses_dp import AttnType
from ulysses_dp._device.arrays import tensor

WORLD = MPI.COMM_WORLD
KINDS = ("numpy", "dpnp", "usm")
LAYOUTS = ("C", "swapped", "padded", "reversed", "strided")
COMPLETE = (AttnType.INTEL_SYCL, AttnType.NUMPY)  # the backends that have all options
SPLITS = ("even", "uneven", "gaps", "first", "last")

needs_ranks = pytest.mark.skipif(WORLD.size == 1, reason="one rank has nobody to disagree with")


def split(n, ranks, how="even"):
    """How many of n items every rank has: as equal as possible, growing, only odd ranks, or all on one rank."""
    weights = {
        "even": [1] * ranks,
        "uneven": range(1, ranks + 1),
        "gaps": [rank % 2 for rank in range(ranks)] if ranks > 1 else [1],
        "first": [rank == 0 for rank in range(ranks)],
        "last": [rank == ranks - 1 for rank in range(ranks)],
    }[how]
    turns = cycle([rank for rank, weight in enumerate(weights) for _ in range(weight)])
    owners = [rank for _, rank in zip(range(n), turns, strict=False)]
    return tuple(owners.count(rank) for rank in range(ranks))


def part(x, counts, rank, axis=1):
    """The block of this rank along an axis that is split into consecutive blocks."""
    first = sum(counts[:rank])
    return x[(slice(None),) * axis + (slice(first, first + counts[rank]),)]


def random_qkv(seed, batch, seq, heads, kv_heads, head_dim, dtype="float32", seq_k=None):
    """Whole q, k and v, the same on every rank."""
    rng = np.random.default_rng(seed)
    kv_shape = (batch, seq if seq_k is None else seq_k, kv_heads, head_dim)
    shapes = (batch, seq, heads, head_dim), kv_shape, kv_shape
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def numbered(shape, dtype="float32"):
    """Every element is a different integer, which float32 holds exactly."""
    return np.arange(1, 1 + np.prod(shape)).reshape(shape).astype(dtype)


def as_kind(x, kind, queue=None):
    """A NumPy array as an array of another kind."""
    if kind == "numpy":
        return x
    if kind in ("torch", "array_api_strict"):
        return pytest.importorskip(kind).asarray(x)
    return {"dpnp": dpnp, "usm": tensor}[kind].asarray(x, sycl_queue=queue)


def as_view(x, kind="numpy", layout="C", queue=None):
    """The numbers of a 4-D NumPy array as an array of a kind, seen through other strides; nan lies between and around them."""
    if layout == "swapped":
        base, view = x.swapaxes(1, 2), lambda y: tensor.permute_dims(y, (0, 2, 1, 3)) if kind == "usm" else y.swapaxes(1, 2)
    elif layout == "padded":
        base, view = np.pad(x, 1, constant_values=np.nan), lambda y: y[1:-1, 1:-1, 1:-1, 1:-1]
    elif layout == "reversed":
        base, view = x[:, ::-1, ::-1], lambda y: y[:, ::-1, ::-1]
    elif layout == "strided":
        base, view = np.full((*x.shape[:3], 2 * x.shape[3] + 1), np.nan, x.dtype), lambda y: y[..., 1::2]
        base[..., 1::2] = x
    else:
        base, view = x, lambda y: y
    return view(as_kind(np.ascontiguousarray(base), kind, queue))


def as_numpy(x):
    """An array of any kind on the host."""
    if isinstance(x, dpnp.ndarray):
        return dpnp.asnumpy(x)
    if isinstance(x, getattr(sys.modules.get("torch"), "Tensor", ())):
        x = x.detach()
        return x.float().numpy() if "bfloat16" in str(x.dtype) else x.numpy()
    if hasattr(x, "__array_namespace__") and not isinstance(x, np.ndarray | tensor.usm_ndarray):
        return np.from_dlpack(x)
    return tensor.asnumpy(x) if isinstance(x, tensor.usm_ndarray) else x


def assert_like(result, given, shape, c_contiguous=True):
    """The result has the kind, dtype and queue or device of what was given, and this shape."""
    assert type(result) is type(given)
    assert result.dtype == given.dtype
    assert tuple(result.shape) == tuple(shape)
    for place in ("sycl_queue", "device"):
        assert getattr(result, place, None) == getattr(given, place, None)
    if c_contiguous and hasattr(result, "flags"):
        assert result.flags["C_CONTIGUOUS"]
    if c_contiguous and hasattr(result, "is_contiguous"):
        assert result.is_contiguous()


def new_queue():
    """A queue that equals no other."""
    return dpctl.SyclQueue()


def outcomes(comm, call):
    """What a collective call raised on every rank: (exception type, message) or None."""
    try:
        call()
    except Exception as error:  # whatever it is, the other ranks have to compare it
        return comm.allgather((type(error), str(error)))
    return comm.allgather(None)
