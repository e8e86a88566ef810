"""The redistributions against index equations on the whole array, bit by bit."""

import itertools

import numpy as np
import pytest
from checks import outcomes
from helpers import KINDS, LAYOUTS, SPLITS, as_numpy, as_view, assert_like, needs_ranks, numbered, part, random_qkv, split
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from ulysses_dp import (
    all_to_all_4d,
    gather_heads,
    order_ranks,
    scatter_heads,
    trace,
    ulysses_attention,
    ulysses_attention_backward,
)
from ulysses_dp._ranks import mpi
from ulysses_dp._ranks.redistribution import Redistribution

# whole arrays: batch, seq, heads, head_dim
SHAPES = [(1, 12, 12, 4), (2, 13, 5, 3), (3, 7, 1, 16), (1, 2, 3, 1), (2, 24, 12, 64), (1, 0, 4, 2), (0, 6, 4, 2), (2, 5, 0, 3)]


def check_scatter(comm, shape, rows, *, dtype="float32", kind="numpy", layout="C", exchange="auto"):
    """Every rank has its rows and gets its heads."""
    x = numbered(shape, dtype)
    mine = as_view(part(x, rows, comm.rank), kind, layout)
    result = scatter_heads(mine, comm=comm, exchange=exchange)
    expected = part(x, split(shape[2], comm.size), comm.rank, axis=2)
    assert_like(result, mine, expected.shape, c_contiguous=False)
    np.testing.assert_array_equal(as_numpy(result), expected)


def check_gather(comm, shape, rows, heads, *, dtype="float32", kind="numpy", layout="C", exchange="auto", default=False):
    """Every rank has its heads and gets its rows."""
    x = numbered(shape, dtype)
    mine = as_view(part(x, heads, comm.rank, axis=2), kind, layout)
    result = gather_heads(mine, comm=comm, exchange=exchange, seq_local=None if default else rows[comm.rank])
    expected = part(x, rows, comm.rank)
    assert_like(result, mine, expected.shape, c_contiguous=comm.size > 1)  # one rank gets back what it gave
    np.testing.assert_array_equal(as_numpy(result), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", SPLITS)
def test_shapes_and_splits(comm, shape, how):
    rows, heads = split(shape[1], comm.size, how), split(shape[2], comm.size, how)
    check_scatter(comm, shape, rows)
    check_gather(comm, shape, rows, heads)
    check_gather(comm, shape, split(shape[1], comm.size), heads, default=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("exchange", ["device", "host"])
@pytest.mark.parametrize("how", ["even", "uneven"])
def test_kinds_layouts_routes(comm, kind, layout, dtype, exchange, how):
    shape = 2, 12, 12, 6
    rows, heads = split(12, comm.size, how), split(12, comm.size, how)
    options = {"dtype": dtype, "kind": kind, "layout": layout, "exchange": exchange}
    check_scatter(comm, shape, rows, **options)
    check_gather(comm, shape, rows, heads, **options)


@settings(max_examples=100)
@given(data=st.data())
def test_any_shape(comm, data):
    counts = st.lists(st.integers(0, 6), min_size=comm.size, max_size=comm.size).map(tuple)
    rows, heads = data.draw(counts), data.draw(counts)
    shape = data.draw(st.integers(1, 3)), sum(rows), sum(heads), data.draw(st.integers(1, 20))
    options = {
        "dtype": data.draw(st.sampled_from(["float32", "float64"])),
        "kind": data.draw(st.sampled_from(KINDS)),
        "layout": data.draw(st.sampled_from(LAYOUTS)),
        "exchange": data.draw(st.sampled_from(["auto", "device", "host"])),
    }
    check_scatter(comm, shape, rows, **options)
    check_gather(comm, shape, rows, heads, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", SPLITS)
def test_round_trips(comm, kind, how):
    x = numbered((2, 11, 5, 6))
    rows = split(11, comm.size, how)
    by_rows = as_view(part(x, rows, comm.rank), kind)
    there_and_back = gather_heads(scatter_heads(by_rows), seq_local=rows[comm.rank])
    np.testing.assert_array_equal(as_numpy(there_and_back), as_numpy(by_rows))
    by_heads = as_view(part(x, split(5, comm.size), comm.rank, axis=2), kind)
    there_and_back = scatter_heads(gather_heads(by_heads, seq_local=rows[comm.rank]))
    np.testing.assert_array_equal(as_numpy(there_and_back), as_numpy(by_heads))


@pytest.mark.parametrize("kind", KINDS)
def test_result_survives_the_next_call_and_input_stays(comm, kind):
    x = numbered((2, 8, 4, 3))
    mine = as_view(part(x, split(8, comm.size), comm.rank), kind)
    first = scatter_heads(mine)
    back = gather_heads(first)
    scatter_heads(mine * 0)
    gather_heads(first * 0)
    np.testing.assert_array_equal(as_numpy(mine), part(x, split(8, comm.size), comm.rank))
    np.testing.assert_array_equal(as_numpy(first), part(x, split(4, comm.size), comm.rank, axis=2))
    np.testing.assert_array_equal(as_numpy(back), as_numpy(mine))


def test_bits_survive(comm):
    """nan keeps its payload and zero its sign."""
    bits = np.random.default_rng(0).integers(0, 2**32, (1, 4 * comm.size, comm.size, 8), dtype=np.uint32)
    bits[..., 0], bits[..., 1] = 0x7FC12345, 0x80000000
    rows = split(4 * comm.size, comm.size)
    result = scatter_heads(np.ascontiguousarray(part(bits, rows, comm.rank)).view(np.float32))
    expected = part(bits, split(comm.size, comm.size), comm.rank, axis=2)
    np.testing.assert_array_equal(np.ascontiguousarray(result).view(np.uint32), expected)


@pytest.mark.parametrize(("scatter_idx", "gather_idx"), list(itertools.permutations(range(4), 2)))
@pytest.mark.parametrize("how", ["even", "uneven", "last"])
def test_all_to_all_4d(comm, scatter_idx, gather_idx, how):
    x = numbered((6, 5, 8, 7))
    joined = split(x.shape[gather_idx], comm.size, how)
    divided = split(x.shape[scatter_idx], comm.size)
    expected = part(x, divided, comm.rank, axis=scatter_idx)
    for kind in KINDS:
        mine = as_view(part(x, joined, comm.rank, axis=gather_idx), kind, "padded")
        result = all_to_all_4d(mine, scatter_idx, gather_idx - 4, comm=comm)
        assert_like(result, mine, expected.shape, c_contiguous=False)
        np.testing.assert_array_equal(as_numpy(result), expected)
    if how == "even":
        np.testing.assert_array_equal(as_numpy(all_to_all_4d(result, gather_idx, scatter_idx)), as_numpy(mine))


def test_all_to_all_4d_by_default_scatters_heads(comm):
    mine = part(numbered((2, 9, 6, 4)), split(9, comm.size), comm.rank)
    np.testing.assert_array_equal(all_to_all_4d(mine, use_sync=True), scatter_heads(mine))


def divisors(n):
    return [size for size in range(1, n + 1) if n % size == 0]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("exchange", ["device", "host"])
@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("heads", [1, 5, 12])
def test_two_steps_are_exact(comm, how, heads, exchange):
    """Within nodes, then between nodes: the same numbers as directly, there and back, for any size of the nodes."""
    rows = split(23, comm.size, how)
    x = part(numbered((2, 23, heads, 3)), rows, comm.rank)
    direct = scatter_heads(x)
    for node_size in [*divisors(comm.size), "auto"]:
        options = {"exchange": exchange, "node_size": node_size}
        y = scatter_heads(x, **options)
        np.testing.assert_array_equal(y, direct)
        np.testing.assert_array_equal(gather_heads(y, seq_local=rows[comm.rank], **options), x)


@pytest.mark.parametrize("kv_heads", [1, 3, 12])
def test_attention_and_gradients_in_two_steps(comm, kv_heads):
    rows = split(23, comm.size, "uneven")
    mine = [part(x, rows, comm.rank) for x in random_qkv(5, 2, 23, 12, kv_heads, 8)]

    def both(**options):
        out, lse = ulysses_attention(*mine, causal=True, return_lse=True, **options)
        return out, lse, *ulysses_attention_backward(out, *mine, out, lse, causal=True, **options)

    direct = both()
    for node_size in divisors(comm.size):
        for overlap in (1, 2):
            for x, y in zip(both(node_size=node_size, overlap=overlap), direct, strict=True):
                np.testing.assert_array_equal(x, y)


def test_messages_of_two_steps(comm):
    """As many as the formula says, and every number twice but those for the ranks of one's own node or number."""
    ranks, x = comm.size, np.ones((1, 4, 3 * comm.size, 8), np.float32)
    for node_size in divisors(ranks):
        with trace() as record:
            scatter_heads(x, node_size=node_size)
        sent = [stage for stage in record.stages if stage.name == "scatter"]
        direct = node_size in (1, ranks)
        assert sum(stage.messages for stage in sent) == (ranks - 1 if direct else node_size + ranks // node_size - 2)
        block = 4 * 3 * 8 * 4  # bytes from one rank to another
        nodes = ranks // node_size
        within, between = (node_size - 1) * nodes, (nodes - 1) * node_size
        assert record.bytes_sent() == block * (ranks - 1 if direct else within + between)


@needs_ranks
def test_node_size_is_checked(comm):
    x = np.ones((1, 4, 3, 8), np.float32)
    for node_size, error in ((comm.size + 1, ValueError), (0, ValueError), ("node", ValueError), (2.0, TypeError)):
        results = outcomes(comm, lambda node_size=node_size: scatter_heads(x, node_size=node_size))
        assert len(set(results)) == 1
        assert results[0][0] is error
        assert "node_size" in results[0][1]
    results = outcomes(comm, lambda: scatter_heads(x, node_size=1 if comm.rank else comm.size))
    assert {message.split(" must be")[0] for _, message in results} == {"scatter_heads: node_size"}


@needs_ranks
def test_a_failure_between_two_steps(comm, monkeypatch):
    """The other ranks wait for this one in the second step."""
    if len(divisors(comm.size)) < 3:
        pytest.skip("a prime number of ranks has no two steps")
    x = np.ones((1, 4, comm.size, 8), np.float32)

    def fail(*arguments, **options):
        raise ZeroDivisionError("broken")

    with monkeypatch.context() as patch:
        if comm.rank == 1:
            patch.setattr(Redistribution, "_turn", fail)
        results = outcomes(comm, lambda: scatter_heads(x, node_size=2))
    assert results == [(RuntimeError, "scatter_heads: rank 1: ZeroDivisionError: broken")] * comm.size
    np.testing.assert_array_equal(scatter_heads(x, node_size=2), np.ones((1, 4 * comm.size, 1, 8)))


def test_order_of_ranks(comm):
    """A communicator in another order gets the order of the machine, in which neighbours on a node are neighbours."""
    mixed = comm.Split(0, -comm.rank)
    ordered = order_ranks(mixed)
    assert (ordered.rank, ordered.size) == (comm.rank, comm.size)  # one node, whose launcher numbers its ranks in order
    x = part(numbered((1, 9, 4, 2)), split(9, comm.size), comm.rank)
    np.testing.assert_array_equal(scatter_heads(x, comm=ordered), scatter_heads(x, comm=comm))
    ordered.Free()
    mixed.Free()


def test_cartesian_communicators(comm):
    """Every row of a grid of ranks has a sequence of its own."""
    rows = 2 if comm.size % 2 == 0 else 1
    grid = comm.Create_cart([rows, comm.size // rows])
    line = grid.Sub([False, True])
    whole = numbered((1, 9, 4, 2)) + grid.coords[0]
    mine = part(whole, split(9, line.size), line.rank)
    expected = part(whole, split(4, line.size), line.rank, axis=2)
    np.testing.assert_array_equal(scatter_heads(mine, comm=line), expected)
    line.Free()
    grid.Free()


@needs_ranks
@pytest.mark.parametrize("node_size", [1, 2])
def test_more_numbers_than_the_library_counts(comm, monkeypatch, node_size):
    """Before MPI 4, counts and displacements are ints: all ranks refuse what one of them could not say."""
    if comm.size % node_size:
        pytest.skip("no such nodes")
    monkeypatch.setattr(mpi, "most_elements", lambda: 1000)
    small, large = np.ones((1, 2, 2, 8), np.float32), np.ones((1, 200 if comm.rank == 0 else 2, 2, 8), np.float32)
    for _ in range(2):
        assert outcomes(comm, lambda: scatter_heads(small, node_size=node_size)) == [None] * comm.size
        for call in (
            lambda: scatter_heads(large, node_size=node_size),
            lambda: ulysses_attention(large, large, large, node_size=node_size),
        ):
            results = outcomes(comm, call)
            assert len(set(results)) == 1
            assert results[0][0] is NotImplementedError
            assert "the MPI library counts to 1000" in results[0][1]


def test_state_goes_with_its_communicator(comm):
    """What a communicator keeps is one object, made by the first call on it."""
    piece = comm.Dup()
    ranks = mpi.resolve_comm("test", piece)
    scatter_heads(np.ones((1, 2, 2, 8), np.float32), comm=piece, node_size="auto")
    assert mpi.resolve_comm("test", piece) is ranks
    assert mpi.resolve_comm("test", comm) is not ranks
    piece.Free()
    assert ranks.comm == MPI.COMM_NULL
