"""Which rows every rank holds: each exactly once, in the orders that others define, equally loaded under a causal mask."""

from itertools import chain

import numpy as np
import pytest
from helpers import KINDS, as_kind, as_numpy, outcomes
from hypothesis import given
from hypothesis import strategies as st

from ulysses_dp import row_positions, shard_rows, unshard_rows
from ulysses_dp._ranks.orders import ORDERS, positions, rows_of_ranks


def held(*arguments, **options):
    return [positions(rows).tolist() for rows in rows_of_ranks(*arguments, **options)]


@given(seq=st.integers(0, 60), groups=st.integers(1, 4), size=st.integers(1, 4), order=st.sampled_from(ORDERS), data=st.data())
def test_every_row_is_held_once(seq, groups, size, order, data):
    cut = data.draw(st.lists(st.integers(0, seq), max_size=4))
    packed = data.draw(st.sampled_from([None, (0, *sorted(cut), seq)]))
    rows = held(seq, groups * size, groups, order, packed)
    assert len(rows) == groups * size
    assert sorted(chain.from_iterable(rows)) == list(range(seq))


def test_given_counts():
    assert held(5, 3, 1, "contiguous", counts=(0, 4, 1)) == [[], [0, 1, 2, 3], [4]]


def test_the_zigzag_of_yunchang():
    # extract_local of yunchang: chunks r and 2 R - 1 - r of the ring position, then the part of the Ulysses rank
    x, ring, ulysses = np.arange(32), 2, 2
    chunks = np.split(x, 2 * ring)
    expected = [
        np.split(np.concatenate([chunks[r], chunks[2 * ring - 1 - r]]), ulysses)[u].tolist()
        for r in range(ring)
        for u in range(ulysses)
    ]
    assert held(32, 4, ring, "zigzag") == expected


def test_the_zigzag_of_transformer_engine():
    chunks = np.split(np.arange(32), 8)
    assert held(32, 4, 2, "zigzag_ranks") == [np.concatenate([chunks[i], chunks[7 - i]]).tolist() for i in range(4)]


def test_striped():
    assert held(10, 4, 2, "striped") == [[0, 2, 4], [6, 8], [1, 3, 5], [7, 9]]


def test_packed_sequences_are_shared_out_one_by_one():
    assert held(12, 2, 2, "zigzag", (0, 4, 12)) == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]


@pytest.mark.parametrize(("order", "spread"), [("zigzag", 0), ("zigzag_ranks", 0), ("striped", None)])
@pytest.mark.parametrize("ring", [2, 4])
def test_a_causal_mask_loads_all_groups_alike(order, spread, ring):
    seq, ranks = 96, 4
    rows = held(seq, ranks, ring, order)
    size = ranks // ring
    pairs = [sum(row + 1 for rank in rows[r * size : (r + 1) * size] for row in rank) for r in range(ring)]
    # striped rows differ by one key for each row and place in the ring
    assert max(pairs) - min(pairs) <= (seq // ring * (ring - 1) if spread is None else spread)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_there_and_back(comm, order, kind, axis):
    x = np.arange(2 * 13 * 13, dtype=np.float32).reshape(13, 2, 13) if axis != 1 else np.ones((2, 13, 3), np.float32).cumsum(1)
    for ring in (1, comm.size):
        mine = shard_rows(as_kind(x, kind), comm, order=order, ring=ring, axis=axis)
        rows = row_positions(13, comm, order=order, ring=ring)
        np.testing.assert_array_equal(as_numpy(mine), np.take(x, rows, axis))
        whole = unshard_rows(mine, comm, order=order, ring=ring, axis=axis)
        assert type(whole) is type(mine)
        np.testing.assert_array_equal(as_numpy(whole), x)


def test_any_contiguous_rows_are_joined(comm):
    mine = np.full((1, comm.rank, 2), comm.rank)
    whole = unshard_rows(mine.astype(np.float32), comm)
    assert whole[0, :, 0].tolist() == [rank for rank in range(comm.size) for _ in range(rank)]


def test_packed_rows(comm):
    ends = (0, 3, 3, 20)
    x = np.arange(20, dtype=np.float64)
    mine = shard_rows(x, comm, order="zigzag", ring=comm.size, axis=0, cu_seqlens=ends)
    assert mine.tolist() == row_positions(20, comm, order="zigzag", ring=comm.size, cu_seqlens=ends).tolist()
    np.testing.assert_array_equal(unshard_rows(mine, comm, order="zigzag", ring=comm.size, axis=0, cu_seqlens=ends), x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"order": "spiral"}, ValueError, "order must be one of"),
        ({"ring": 1000}, ValueError, "ring must divide"),
        ({"axis": 3}, ValueError, "axis must be one of the 3 axes"),
        ({"axis": "rows"}, TypeError, "axis must be an integer"),
        ({"cu_seqlens": (0, 99)}, ValueError, "cu_seqlens must end with"),
    ],
)
def test_bad_arguments(comm, change, error, message):
    x = np.ones((2, 12, 3), np.float32)
    with pytest.raises(error, match=message):
        shard_rows(x, comm, **change)
    if change.get("cu_seqlens") is None:
        for kind, text in outcomes(comm, lambda: unshard_rows(x, comm, **change)):
            assert kind is error
            assert message in text
