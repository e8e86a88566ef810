"""Which rank owns which rows and heads, and where they lie in the exchange buffers: pure integers, no MPI, no device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
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
    def own(self) -> slice:
        """Where the block of this rank is on the gathered side."""
        start = sum(self.gathered_counts[: self.rank])
        return slice(start, start + self.gathered_counts[self.rank])


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
