"""Who owns which rows and heads, against the definitions by brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_dp._ranks.partition import HeadMap, Transfer, kv_heads_are_shared, part_heads, share_heads, split, starts

pytestmark = pytest.mark.single

ranks = st.integers(1, 12)
sizes = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple)


@given(n=st.integers(0, 200), ranks=ranks)
def test_split(n, ranks):
    counts = split(n, ranks)
    assert len(counts) == ranks
    assert sum(counts) == n
    assert max(counts) - min(counts) <= 1
    assert list(counts) == sorted(counts, reverse=True)


@given(sizes=sizes)
def test_starts(sizes):
    assert starts(sizes) == tuple(sum(sizes[:block]) for block in range(len(sizes)))


# includes more ranks than heads, and fewer kv heads than ranks
@given(kv_heads=st.integers(1, 12), group=st.integers(1, 6), ranks=ranks)
def test_share_heads(kv_heads, group, ranks):
    heads = kv_heads * group
    shares = share_heads(heads, kv_heads, ranks)
    assert [h for share in shares for h in range(share.q_start, share.q_start + share.q_count)] == list(range(heads))
    assert tuple(share.q_count for share in shares) == split(heads, ranks)
    for share in shares:
        read = {(share.q_start + h) // group for h in range(share.q_count)}
        assert read == set(range(share.kv_start, share.kv_start + share.kv_count))
        assert 0 <= share.shift < group
        heads_map = HeadMap(group, share.shift, share.q_start)
        local = heads_map.kv_heads(share.q_count)
        assert [share.kv_start + kv for kv in local] == [(share.q_start + h) // group for h in range(share.q_count)]
        if share.q_count:
            counts = {local.count(kv) for kv in range(share.kv_count)}
            assert heads_map.uniform(share.q_count, share.kv_count) == (len(counts) == 1)
        for h in range(share.q_count):
            assert share.kv_start + (h + share.shift) // group == (share.q_start + h) // group


def test_share_heads_without_heads():
    assert [share.q_count + share.kv_count for share in share_heads(0, 0, 3)] == [0, 0, 0]


@given(rows=sizes, row_sizes=sizes, batch=st.integers(0, 3))
def test_transfer(rows, row_sizes, batch):
    ranks = min(len(rows), len(row_sizes))
    rows, row_sizes = rows[:ranks], row_sizes[:ranks]
    transfers = [Transfer(rank, rows, row_sizes, batch) for rank in range(ranks)]
    for rank, transfer in enumerate(transfers):
        assert transfer.size_by_heads == sum(transfer.counts_by_heads) == sum(rows) * batch * row_sizes[rank]
        assert transfer.size_by_rows == sum(transfer.counts_by_rows)
        start, own = transfer.by_heads.own.start, transfer.by_heads.own.stop - transfer.by_heads.own.start
        assert (own, start) == (transfer.counts_by_heads[rank], starts(transfer.counts_by_heads)[rank])
        assert sum(transfer.counts_by_rows) + own == rows[rank] * batch * sum(row_sizes)
        for peer, other in enumerate(transfers):
            assert transfer.counts_by_rows[peer] == (other.counts_by_heads[rank] if peer != rank else 0)


@given(heads=st.integers(0, 12), group=st.integers(1, 4), ranks=st.integers(1, 6), parts=st.integers(1, 5))
def test_part_heads(heads, group, ranks, parts):
    """The parts of a rank are all of its heads, once and in order; their query heads read their kv heads."""
    whole = share_heads(heads * group, heads, ranks)
    shares = part_heads(whole, group, parts)
    assert 1 <= len(shares) <= parts
    for rank, mine in enumerate(whole):
        there = [share[rank] for share in shares]
        assert [h for part in there for h in range(part.q_start, part.q_start + part.q_count)] == list(
            range(mine.q_start, mine.q_start + mine.q_count)
        )
        assert sum(part.kv_count for part in there) == mine.kv_count
        for part in there:
            read = {(part.q_start + h) // group for h in range(part.q_count)}
            assert read == set(range(part.kv_start, part.kv_start + part.kv_count))
            assert part.shift == part.q_start - part.kv_start * group


@given(heads=st.integers(1, 12), group=st.integers(1, 4), ranks=st.integers(1, 6))
def test_shared_kv_heads(heads, group, ranks):
    whole = share_heads(heads * group, heads, ranks)
    assert kv_heads_are_shared(whole) == (sum(h.kv_count for h in whole) > heads)
