"""The memory that calls keep: whose it is, how much, and when it goes."""

import numpy as np
import pytest
from checks import outcomes
from helpers import as_kind, new_queue, part, random_qkv, split
from ulysses_dp.kernels import relayout

from ulysses_dp import attention, free_workspace, trace, ulysses_attention
from ulysses_dp._device import workspace
from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.copies import copy_arrays
from ulysses_dp._device.workspace import empty_like, scratch
from ulysses_dp._ranks.mpi import resolve_comm

BYTES = np.dtype("u1")


def kept():
    return sum(memory.nbytes for memory in workspace._store().memories.values())


@pytest.fixture(autouse=True)
def _fresh():
    free_workspace()
    yield
    free_workspace()


@pytest.mark.single
def test_slots_are_used_again_and_grow():
    queue = new_queue()
    first = scratch(queue, "a", (100,), BYTES)
    assert scratch(queue, "a", (50,), BYTES)._pointer == first._pointer
    assert scratch(queue, "b", (100,), BYTES)._pointer != first._pointer
    assert scratch(queue, "a", (100,), BYTES, owner=1)._pointer != first._pointer
    assert scratch(queue, "a", (105,), BYTES).shape == (105,)
    assert kept() == 104 + 104 + 112


@pytest.mark.single
def test_a_slot_of_another_dtype():
    """Memory for 7 float32 numbers does not hold a whole number of float64 ones."""
    queue = new_queue()
    scratch(queue, "a", (7,), np.dtype("f4"))
    x = scratch(queue, "a", (2,), np.dtype("f8"))
    x[...] = 3
    np.testing.assert_array_equal(tensor.asnumpy(x), [3, 3])


@pytest.mark.single
@pytest.mark.parametrize("kind", ["dpnp", "usm"])
def test_memory_goes_with_its_queue(kind):
    """With the last array, not before: so many queues with memory of their own do not fill the device."""
    whole = random_qkv(0, 1, 2048, 1, 1, 64)  # long enough for copies of k and v
    for _ in range(3):
        arrays = [as_kind(x, kind, new_queue()) for x in whole[:1]] * 3
        out = attention(*arrays)
        last = queues()
    assert len(last) == 2  # when `attention` ran, the last but one result was still there
    others = [as_kind(x, kind, new_queue()) for x in whole[:1]] * 3
    attention(*others)
    assert queues() == {arrays[0].sycl_queue, others[0].sycl_queue}
    del out
    attention(*arrays)
    assert queues() == {arrays[0].sycl_queue, others[0].sycl_queue}


def queues():
    """The queues for which memory is kept."""
    store = workspace._store()
    return {queue for _, queue, _ in store.memories} | {queue for (queue, _, _), _ in store.results}


@pytest.mark.single
def test_tables_are_freed():
    x = tensor.asarray(np.ones((1, 3, 2, 4), np.float32), sycl_queue=new_queue())
    copy_arrays([x[..., ::2]], [empty_like(x, (1, 3, 2, 2))])
    assert relayout._relayout.cache_info().currsize
    free_workspace()
    assert not relayout._relayout.cache_info().currsize


@pytest.mark.single
def test_limit(monkeypatch):
    """What was not used for the longest time goes first; what a call still holds stays usable."""
    monkeypatch.setenv(workspace.LIMIT, "260")
    queue = new_queue()
    a = scratch(queue, "a", (100,), BYTES)
    a[...] = 7
    scratch(queue, "b", (100,), BYTES)
    scratch(queue, "a", (100,), BYTES)
    scratch(queue, "c", (100,), BYTES)
    assert [slot for _, _, slot in workspace._store().memories] == ["a", "c"]
    scratch(queue, "d", (1000,), BYTES)  # more than the limit by itself, but the call needs it
    assert [slot for _, _, slot in workspace._store().memories] == ["d"]
    assert int(a[99]) == 7
    results = [empty_like(a, (n,)) for n in (20, 30, 40)]  # a quarter of the limit may be of results
    assert sum(size for (_, _, size), _ in workspace._store().results) <= 65
    assert [x.size for x in results] == [20, 30, 40]


@pytest.mark.parametrize("limit", ["1", "1000000"])
def test_calls_are_right_with_any_limit(comm, monkeypatch, limit):
    monkeypatch.setenv(workspace.LIMIT, limit)
    mine = [part(x, split(26, comm.size), comm.rank) for x in random_qkv(3, 2, 26, 8, 4, 16)]
    results = [ulysses_attention(*mine, overlap=parts) for parts in (1, 3, 1)]
    monkeypatch.delenv(workspace.LIMIT)
    left = workspace.prepared((resolve_comm("test", comm).handle, "ulysses_attention"))
    assert (left is None) == (comm.size == 1 or limit == "1")
    for result in results:
        np.testing.assert_array_equal(result, ulysses_attention(*mine))


def test_bad_limit(comm, monkeypatch):
    monkeypatch.setenv(workspace.LIMIT, "1 GB")
    q = np.ones((1, 4, 4, 8), np.float32)
    results = outcomes(comm, lambda: ulysses_attention(q, q, q))
    assert len(set(results)) == 1
    assert results[0][0] is ValueError
    assert "ULYSSES_DP_WORKSPACE must be a number of bytes, not '1 GB'" in results[0][1]
    monkeypatch.delenv(workspace.LIMIT)
    assert outcomes(comm, lambda: ulysses_attention(q, q, q)) == [None] * comm.size


def test_memory_goes_with_its_communicator(comm):
    pieces = [comm.Dup(), comm.Dup()]
    mine = [as_kind(part(x, split(26, comm.size), comm.rank), "dpnp") for x in random_qkv(3, 2, 26, 8, 4, 16)]
    for piece in pieces:
        ulysses_attention(*mine, comm=piece)
    handles = [resolve_comm("test", piece).handle for piece in pieces]

    def owners():
        return {owner for owner, _, _ in workspace._store().memories} - {0}

    assert owners() == (set(handles) if comm.size > 1 else set())
    pieces[0].Free()
    assert owners() == ({handles[1]} if comm.size > 1 else set())
    with trace() as record:
        ulysses_attention(*mine, comm=pieces[1])
    assert record.calls[0].allocations == 0
    free_workspace()
    assert kept() == 0
    pieces[1].Free()
