"""Which rank owns which rows and heads, and where they lie in the exchange buffers: pure integers, no MPI, no device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


def split(n: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` blocks of `n` items; the first ``n % parts`` blocks have one more."""
    return tuple(n // parts + (part < n % parts) for part in range(parts))


def starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each of the consecutive blocks starts."""
    return (0, *accumulate(sizes))[: len(sizes)]


def group_size(heads: int, kv_heads: int) -> int:
    """Query heads that read one kv head; 1 where there are no heads at all."""
    return max(heads // kv_heads, 1) if kv_heads else 1


class Heads(NamedTuple):
    """The heads of one rank: its query heads, and the kv heads that these read."""

    q_start: int
    q_count: int
    kv_start: int
    kv_count: int
    shift: int  # local query head h reads local kv head (h + shift) // group


class HeadMap(NamedTuple):
    """What the heads of some arrays are: query head h reads kv head ``(h + shift) // group``, and is ``h + first`` of all."""

    group: int
    shift: int = 0
    first: int = 0

    def kv_heads(self, heads: int) -> list[int]:
        """Which kv head each of so many query heads reads."""
        return [(head + self.shift) // self.group for head in range(heads)]

    def uniform(self, heads: int, kv_heads: int) -> bool:
        """Whether every kv head has as many query heads here, as if these were all there are."""
        return heads % kv_heads == 0 and self.kv_heads(heads) == [head * kv_heads // heads for head in range(heads)]


@lru_cache(maxsize=256)
def share_heads(heads: int, kv_heads: int, ranks: int) -> tuple[Heads, ...]:
    """The heads of every rank. A kv head goes to every rank that has one of its query heads, and to no other."""
    group = group_size(heads, kv_heads)
    shares = []
    counts = split(heads, ranks)
    for start, count in zip(starts(counts), counts, strict=True):
        kv_start = start // group
        kv_count = -(-(start + count) // group) - kv_start if count else 0
        shares.append(Heads(start, count, kv_start, kv_count, start - kv_start * group))
    return tuple(shares)


def kv_heads_are_shared(heads: tuple[Heads, ...]) -> bool:
    """Whether several ranks read one kv head."""
    return any(h.shift > 0 for h in heads if h.kv_count)


def part_heads(heads: tuple[Heads, ...], group: int, parts: int) -> list[tuple[Heads, ...]]:
    """The heads of every rank in at most so many parts. All query heads of a rank that read one kv head are in one part."""
    parts = min(parts, max(h.kv_count for h in heads))
    return [tuple(_part(h, group, number, parts) for h in heads) for number in range(parts)] if parts > 1 else [heads]


def _part(heads: Heads, group: int, number: int, parts: int) -> Heads:
    counts = split(heads.kv_count, parts)
    kv_start, kv_count = heads.kv_start + starts(counts)[number], counts[number]
    q_start = max(heads.q_start, kv_start * group)
    q_count = max(min(heads.q_start + heads.q_count, (kv_start + kv_count) * group) - q_start, 0)
    return Heads(q_start, q_count, kv_start, kv_count, q_start - kv_start * group)


Share = tuple[tuple[int, int], ...]  # of every rank: its first head and the number of its heads


def query_shares(heads: tuple[Heads, ...]) -> Share:
    """The query heads of every rank."""
    return tuple((h.q_start, h.q_count) for h in heads)


def kv_shares(heads: tuple[Heads, ...]) -> Share:
    """The kv heads that every rank reads; they may overlap."""
    return tuple((h.kv_start, h.kv_count) for h in heads)


@dataclass(frozen=True)
class Trade:
    """One exchange between the two splits of arrays: by rows (the *local* side) and by heads (the *gathered* side).

    A row holds numbers for every rank: those of the rank's heads, of all arrays. On the local side a rank has its rows and the
    numbers of all others, as one block per peer, each `(rows, batch, numbers of the peer)`. On the gathered side it has all
    rows and its numbers, `(all rows, batch, numbers)`: the blocks of the peers in rank order, so nothing is unpacked there.
    What a rank has for itself goes directly from its place on one side to that on the other.
    """

    rank: int
    rows: tuple[int, ...]  # of every rank
    sizes: tuple[int, ...]  # numbers of every rank in a row
    batch: int

    @cached_property
    def local_counts(self) -> tuple[int, ...]:
        """Elements of the block for or from every peer on the local side; none for this rank, whose block does not travel."""
        rows = self.rows[self.rank] * self.batch
        return tuple(rows * size * (peer != self.rank) for peer, size in enumerate(self.sizes))

    @cached_property
    def gathered_counts(self) -> tuple[int, ...]:
        """Elements of the block for or from every peer on the gathered side, where this rank has one, too."""
        return tuple(rows * self.batch * self.sizes[self.rank] for rows in self.rows)

    @property
    def local_size(self) -> int:
        """Elements of all blocks on the local side."""
        return self.rows[self.rank] * self.batch * (sum(self.sizes) - self.sizes[self.rank])

    @property
    def gathered_size(self) -> int:
        """Elements of all blocks on the gathered side."""
        return sum(self.rows) * self.batch * self.sizes[self.rank]

    @cached_property
    def local(self) -> Counts:
        """What travels of the local side."""
        return _side([[count] for count in self.local_counts], self.rank)

    @cached_property
    def gathered(self) -> Counts:
        """What travels of the gathered side: all but the block of this rank."""
        return _side([[count] for count in self.gathered_counts], self.rank)


class Levels:
    """A trade in two steps: within groups of consecutive ranks, and between ranks with the same number in their groups.

    Towards the gathered side, this rank, number l of group g, first gets from every member k of its group what k has for number
    l of any group h: the block (k, h). Then it sends what it got for group h to its member there, in the order of the members,
    in which the rows arrive. What is for a member of the group itself is already there, and what this rank has itself needs no
    first step. Towards the local side, everything goes the same way back.

    The buffers, in the order of blocks:

        local     (k, h): what goes to member k of the own group, for it and for those with its number elsewhere
        members   (k, h) without k = l: what came from them
        groups    (h, k) without h = g: what goes to them
        gathered  (h, k)
    """

    def __init__(self, trade: Trade, group: int) -> None:
        groups = len(trade.rows) // group
        g, number = divmod(trade.rank, group)
        self.group, self._own = g, number
        local = [[trade.local_counts[h * group + k] for h in range(groups)] for k in range(group)]
        self.widths = tuple(trade.batch * trade.sizes[h * group + number] for h in range(groups))
        self.rows = tuple(trade.rows[g * group + k] for k in range(group))
        block = [[rows * width for width in self.widths] for rows in self.rows]
        block[number][g] = 0
        members = [blocks if k != number else [0] * groups for k, blocks in enumerate(block)]
        between = [[block[k][h] if h != g else 0 for k in range(group)] for h in range(groups)]

        in_local = starts(_flat(local))
        self.local_places = tuple(in_local[k * groups + h] for h in range(groups) for k in range(group))
        self.local = _side(local, number)
        self.members = _side(members, number)
        self.groups = _side(between, g)
        gathered = [[trade.gathered_counts[h * group + k] for k in range(group)] for h in range(groups)]
        self.gathered = _side(gathered, g)

        in_members, in_groups = starts(_flat(members)), starts(_flat(between))
        in_gathered = starts(trade.gathered_counts)
        # where block (k, h) is in local or members, and where it is in groups or gathered
        self.blocks = tuple(
            (
                (k, h),
                self.local_places[h * group + k] if k == number else in_members[k * groups + h],
                in_gathered[h * group + k] if h == g else in_groups[h * group + k],
            )
            for k in range(group)
            for h in range(groups)
            if (k, h) != (number, g)
        )

    def is_own(self, member: int, group: int) -> tuple[bool, bool]:
        """Whether a block is in local, not in members; and whether it is in gathered, not in groups."""
        return member == self._own, group == self.group


class Counts(NamedTuple):
    """The blocks of a buffer, as they travel."""

    counts: tuple[int, ...]  # for every rank of the step; 0 for this one
    places: tuple[int, ...]
    own: slice  # what does not travel
    size: int  # of the buffer


def _flat(blocks: list[list[int]]) -> tuple[int, ...]:
    return tuple(chain.from_iterable(blocks))


def _side(blocks: list[list[int]], own: int) -> Counts:
    sums = tuple(map(sum, blocks))
    places = starts(sums)
    counts = tuple(count * (n != own) for n, count in enumerate(sums))
    return Counts(counts, places, slice(places[own], places[own] + sums[own]), sum(sums))


@lru_cache(maxsize=256)
def levels_of(trade: Trade, group: int) -> Levels:
    """The two steps of a trade."""
    return Levels(trade, group)


@lru_cache(maxsize=256)
def trade_of(rank: int, rows: tuple[int, ...], shares: tuple[Share, ...], widths: tuple[int, ...], batch: int) -> Trade:
    """The exchange of arrays of which every rank gets these heads, of these widths."""
    pairs = list(zip(shares, widths, strict=True))
    sizes = tuple(sum(share[peer][1] * width for share, width in pairs) for peer in range(len(rows)))
    return Trade(rank, rows, sizes, batch)


def column(table: Sequence[tuple[int, ...]], index: int) -> tuple[int, ...]:
    """One column of a table of integers."""
    return tuple(row[index] for row in table)


def blocks_of(counts: tuple[int, ...]) -> Share:
    """The heads of every rank if the ranks have consecutive blocks of them."""
    return tuple(zip(starts(counts), counts, strict=True))
