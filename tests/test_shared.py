"""exchange="shared": the same bits as through messages, whatever the memory held before, and errors on all ranks."""

import numpy as np
import pytest
from helpers import as_kind, as_numpy, as_view, needs_ranks, numbered, outcomes, part, random_qkv, split

from ulysses_dp import (
    AttnType,
    free_workspace,
    gather_heads,
    scatter_heads,
    trace,
    ulysses_attention,
    ulysses_attention_backward,
)
from ulysses_dp._device import workspace
from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue
from ulysses_dp._ranks import mpi, partition
from ulysses_dp._ranks.partition import Item

pytestmark = needs_ranks


def poison(comm):
    """Fill the memory that all ranks share with nan."""
    memory = workspace.shared(default_queue(), mpi.resolve_comm("test", comm).handle)
    if comm.rank == 0 and memory is not None:
        tensor.usm_ndarray((memory.nbytes,), dtype="u1", buffer=memory)[...] = 255
        default_queue().wait()
    comm.Barrier()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["numpy", "dpnp"])
@pytest.mark.parametrize("how", ["uneven", "gaps", "last"])
@pytest.mark.parametrize("shape", [(2, 13, 7, 6), (1, 5, 3, 1), (3, 0, 4, 5)])
def test_redistribution(comm, kind, how, shape):
    x = numbered(shape)
    rows, heads = split(shape[1], comm.size, how), split(shape[2], comm.size)
    mine = as_view(part(x, rows, comm.rank), kind, "padded")
    results = []
    for _ in range(2):
        results.append(scatter_heads(mine, comm=comm, exchange="shared"))
        poison(comm)
        results.append(gather_heads(results[-1], comm=comm, seq_local=rows[comm.rank], exchange="shared"))
        poison(comm)
    for there, back in (results[:2], results[2:]):
        np.testing.assert_array_equal(as_numpy(there), part(x, heads, comm.rank, axis=2))
        np.testing.assert_array_equal(as_numpy(back), part(x, rows, comm.rank))


def forward_and_gradient(comm, arrays, exchange, **options):
    """All results of a call and of its gradient, with a context and without."""
    out, lse, ctx = ulysses_attention(*arrays, comm=comm, exchange=exchange, return_lse=True, return_ctx=True, **options)
    poison(comm)
    dout = out + arrays[0]
    without = ulysses_attention_backward(dout, *arrays, out, lse, comm=comm, exchange=exchange, **options)
    poison(comm)
    kept = ulysses_attention_backward(dout, *arrays, out, lse, comm=comm, exchange=exchange, ctx=ctx)
    return [out, lse, *without, *kept]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("kv_heads", [1, 6])
@pytest.mark.parametrize("overlap", [1, 2])
def test_attention_and_gradient(comm, dtype, kv_heads, overlap):
    whole = random_qkv(0, 2, 13, 6, kv_heads, 16, dtype, 11)
    arrays = [part(x, split(x.shape[1], comm.size, "uneven"), comm.rank) for x in whole]
    options = {"causal": True, "overlap": overlap}
    expected = forward_and_gradient(comm, arrays, "device", **options)
    for _ in range(2):
        for x, y in zip(forward_and_gradient(comm, arrays, "shared", **options), expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("attn_type", [AttnType.NUMPY, AttnType.INTEL_ONEDNN, AttnType.TORCH])
def test_other_backends(comm, attn_type):
    arrays = [as_kind(part(x, split(12, comm.size), comm.rank), "dpnp") for x in random_qkv(1, 1, 12, 4, 2, 8)]
    try:
        expected = ulysses_attention(*arrays, comm=comm, exchange="device", attn_type=attn_type)
    except ImportError as error:
        pytest.skip(str(error))
    result = ulysses_attention(*arrays, comm=comm, exchange="shared", attn_type=attn_type)
    np.testing.assert_array_equal(as_numpy(result), as_numpy(expected))


def test_ring(comm):
    """The groups of a mesh share memory, each its own."""
    if comm.size % 2:
        pytest.skip("needs two groups")
    arrays = [part(x, split(16, comm.size), comm.rank) for x in random_qkv(2, 1, 16, 4, 2, 8)]
    results = [
        ulysses_attention(*arrays, comm=comm, exchange=exchange, ring=2, causal=True) for exchange in ("device", "shared")
    ]
    np.testing.assert_array_equal(*results)


def test_no_messages_and_no_allocations(comm):
    arrays = [part(x, split(16, comm.size), comm.rank) for x in random_qkv(3, 1, 16, 4, 4, 8)]
    records = {}
    for exchange in ("device", "shared"):
        ulysses_attention(*arrays, comm=comm, exchange=exchange)
        with trace() as records[exchange]:
            ulysses_attention(*arrays, comm=comm, exchange=exchange)
    stages = [stage for stage in records["shared"].stages if stage.exchange]
    assert [(stage.name, stage.messages, stage.route) for stage in stages] == [
        ("scatter", 0, "shared"),
        ("gather", 0, "shared"),
    ]
    assert records["shared"].bytes_sent() == records["device"].bytes_sent()
    assert [call.passes for call in records["shared"].calls] == [call.passes for call in records["device"].calls]


@pytest.mark.parametrize("rank", [0, -1])
def test_no_memory_on_one_rank(comm, rank, monkeypatch):
    """All ranks raise the same, and the next call has memory, also if all had some before."""
    small, large = (np.ones((1, rows, 4, 8), np.float32) for rows in (2, 200))
    free_workspace()
    scatter_heads(small, comm=comm, exchange="shared")

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        if comm.rank == rank % comm.size:
            patch.setattr(mpi, "create" if rank == 0 else "attach", fail)
        raised = outcomes(comm, lambda: scatter_heads(large, comm=comm, exchange="shared"))
    assert len(set(raised)) == 1
    assert raised[0][0] is OSError
    assert f"rank {rank % comm.size} cannot share" in raised[0][1]
    for x in (small, large):
        assert scatter_heads(x, comm=comm, exchange="shared").shape[1] == comm.size * x.shape[1]


def test_one_rank_lets_go(comm):
    x = np.full((1, 3, comm.size, 8), comm.rank, np.float32)
    for rank in range(comm.size):
        scatter_heads(x, comm=comm, exchange="shared")
        if comm.rank == rank:
            free_workspace()
        result = scatter_heads(x, comm=comm, exchange="shared")
        np.testing.assert_array_equal(result[0, :, 0, 0], np.repeat(range(comm.size), 3))


def test_a_step_that_fails(comm, monkeypatch):
    arrays = [part(x, split(16, comm.size), comm.rank) for x in random_qkv(4, 1, 16, 4, 4, 8)]
    expected = ulysses_attention(*arrays, comm=comm, exchange="shared")

    def fail(*_):
        raise ValueError("by intention")

    with monkeypatch.context() as patch:
        if comm.rank == comm.size - 1:
            patch.setattr("ulysses_dp._ranks.redistribution.Redistribution.pack", fail)
        raised = outcomes(comm, lambda: ulysses_attention(*arrays, comm=comm, exchange="shared"))
    assert len(set(raised)) == 1
    assert "by intention" in raised[0][1]
    np.testing.assert_array_equal(ulysses_attention(*arrays, comm=comm, exchange="shared"), expected)


def test_refused(comm):
    x = np.ones((1, 2, 4, 8), np.float32)
    raised = outcomes(comm, lambda: scatter_heads(x, comm=comm, exchange="shared" if comm.rank else "device"))
    assert len(set(raised)) == 1
    assert "exchange must be the same on all ranks, not messages on rank 0" in raised[0][1]
    if comm.size == 4:
        raised = outcomes(comm, lambda: scatter_heads(x, comm=comm, exchange="shared", node_size=2))
        assert len(set(raised)) == 1
        assert "node_size must be 1" in raised[0][1]


def test_window_of():
    """Segments start with a page, buffers with a line of the cache, and none overlap."""
    f4, f2 = np.dtype("f4"), np.dtype("f2")
    messages = (
        (Item("a", ((0, 2), (2, 1)), (3, 5), 7, f4),),
        (Item("b", ((0, 1), (1, 0)), (2, 0), 3, f2),),
    )
    window = partition.window_of(messages, 2)
    assert window.starts == ((0, partition.PAGESIZE), (896 + 0, partition.PAGESIZE + 448))
    assert window.bounds == (0, partition.PAGESIZE, 2 * partition.PAGESIZE)
