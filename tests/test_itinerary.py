"""Which keys visit which groups: all pairs that see each other meet, and nobody is sent keys in vain."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_dp._call.spans import UNLIMITED, spans
from ulysses_dp._itinerary import Itinerary, Trip, itinerary
from ulysses_dp._ranks.orders import ORDERS, rows_of_groups, rows_of_ranks

pytestmark = pytest.mark.single

orders, windows = st.sampled_from(ORDERS), st.sampled_from([UNLIMITED, (3, 0), (5, 2)])


def mask_of(*, causal, window_size=UNLIMITED):
    return ("causal", causal), ("window_size", window_size), ("cu_seqlens_q", None)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 5), orders, orders, st.booleans(), windows)
def test_every_pair_is_counted_once(seq_q, seq_k, ring, order_q, order_k, causal, window):
    """Those of the table of spans, whichever way they are counted."""
    if "striped" in (order_q, order_k):  # rows and keys have the same step
        order_k = order_q
    rows, keys = (
        rows_of_groups(rows_of_ranks(seq, 2 * ring, ring, order), ring) for seq, order in ((seq_q, order_q), (seq_k, order_k))
    )
    travels = Itinerary(rows, keys, mask_of(causal=causal, window_size=window), False)
    counted = sum(travels.pairs(group, owner) for group in range(ring) for owner in range(ring))
    table = spans(seq_q, seq_k, causal=causal, window_size=window)
    assert counted == np.diff(table[:, :2]).sum()


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "mask", [mask_of(causal=False), mask_of(causal=True), mask_of(causal=True, window_size=(4, 0))], ids=str
)
@pytest.mark.parametrize("ring", [1, 2, 3, 5])
def test_keys_are_with_those_who_see_them_and_their_gradients_come_home(ring, order, mask, gathers):
    rows = rows_of_groups(rows_of_ranks(31, 2 * ring, ring, order), ring)
    travels = Itinerary(rows, rows, mask, gathers)
    groups = range(ring)
    there = {(group, group) for group in groups}  # who has whose keys
    for hop in groups:
        for group in groups:
            trip = travels.keys_sent(group, hop)
            if trip is not None:
                assert (group, trip.owner) in there
                there.add(((group + trip.distance) % ring, trip.owner))
    for group in groups:
        met = {travels.owner(group, hop) for hop in groups if travels.are_here(group, hop)}
        assert met == {owner for g, owner in there if g == group}
        assert met >= {owner for owner in groups if travels.sees(group, owner)}
        if gathers:
            assert met == {group} | {owner for owner in groups if travels.sees(group, owner)}
    home = {}
    for group in groups:
        for hop in groups:
            trip = travels.sums_sent(group, hop)
            if trip is not None and trip.distance < 0:
                assert (group + trip.distance) % ring == trip.owner
                home[trip.owner] = home.get(trip.owner, 0) + 1
    assert home == {
        owner: sum(travels.sees(g, owner) for g in groups if g != owner) if gathers else 1
        for owner in groups
        if any(g != owner for g, of in there if of == owner)
    }


@pytest.mark.parametrize("order", ["zigzag", "zigzag_ranks"])
@pytest.mark.parametrize("ring", [2, 3, 4])
def test_in_every_hop_a_causal_mask_loads_all_groups_alike(ring, order):
    """To the pair, of equal chunks; contiguous rows load them so without a mask."""
    for of, mask in ((order, mask_of(causal=True)), ("contiguous", mask_of(causal=False))):
        rows = rows_of_groups(rows_of_ranks(48, 2 * ring, ring, of), ring)
        travels = Itinerary(rows, rows, mask, False)
        for hop in range(ring):
            assert len({travels.pairs(group, travels.owner(group, hop)) for group in range(ring)}) == 1


def test_one_group_with_all_rows_in_their_order_needs_none():
    contiguous, striped = (rows_of_ranks(12, 4, 1, order) for order in ("contiguous", "zigzag_ranks"))
    assert itinerary(contiguous, contiguous, 1, mask_of(causal=True), gathers=False) is None
    assert itinerary(striped, striped, 1, mask_of(causal=True), gathers=False) is not None
    assert itinerary(contiguous, contiguous, 2, mask_of(causal=True), gathers=False).keys_sent(0, 0) == Trip(0, 1)
