"""The redistributions against index equations on the whole array, bit by bit."""

import itertools

import numpy as np
import pytest
from helpers import KINDS, LAYOUTS, SPLITS, as_numpy, as_view, assert_like, numbered, part, split
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_dp import all_to_all_4d, gather_heads, scatter_heads

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
