"""Which rank owns which rows and heads, and where they lie in the exchange buffers: pure integers, no MPI, no device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from mmap import PAGESIZE
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ulysses_dp.kernels.panel_wire import SCALE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

CACHE_LINE = 64
BYTES = np.dtype(np.uint8)


def split(n: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` blocks of `n` items; the first ``n % parts`` blocks have one more."""
    each, rest = divmod(n, parts)
    return tuple(each + 1 if part < rest else each for part in range(parts))


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


class Item(NamedTuple):
    """An array of a call, as it travels between the two splits.

    By rows, a rank has its rows of all heads; by heads, it has all rows of its heads.
    """

    name: str
    heads: Share  # of every rank by heads; they may overlap
    rows: tuple[int, ...]  # of every rank by rows
    width: int | None  # numbers of a head; None: a single one, in arrays (batch, heads, seq) as lse is
    dtype: np.dtype
    wire: str | None = None  # as what its numbers travel, with a scale for each row and head; None: as they are

    @property
    def numbers(self) -> int:
        """How many numbers a head has."""
        return 1 if self.width is None else self.width

    def columns(self, dtype: np.dtype) -> int:
        """How many numbers of the dtype of its message a head has there: one of 32 bits is two of 16."""
        if self.wire is not None:
            return self.numbers + SCALE_BYTES
        return self.numbers * self.dtype.itemsize // dtype.itemsize


@lru_cache(maxsize=256)
def trips(items: tuple[Item, ...]) -> tuple[tuple[Item, ...], ...]:
    """The items by their rows: those that are split alike travel in one message."""
    by_rows: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        by_rows.setdefault(item.rows, []).append(item)
    return tuple(map(tuple, by_rows.values()))


def dtype_of_message(items: tuple[Item, ...]) -> np.dtype:
    """The dtype in which items travel together: the narrowest."""
    if any(item.wire for item in items):
        return BYTES
    return min((item.dtype for item in items), key=lambda dtype: dtype.itemsize)


@lru_cache(maxsize=256)
def transfer_of(rank: int, items: tuple[Item, ...], batch: int) -> Transfer:
    """The exchange of items of the same rows."""
    rows, dtype = items[0].rows, dtype_of_message(items)
    columns = [(item.heads, item.columns(dtype)) for item in items]
    sizes = tuple(sum(heads[peer][1] * width for heads, width in columns) for peer in range(len(rows)))
    return Transfer(rank, rows, sizes, batch)


@dataclass(frozen=True)
class Transfer:
    """One exchange between the two splits of some arrays, by rows and by heads.

    A row holds numbers for every rank: those of the rank's heads, of all arrays. By rows, a rank has its rows and the numbers
    of all others, as one block per peer, each `(rows, batch, numbers of the peer)`. By heads, it has all rows and its numbers,
    `(all rows, batch, numbers)`: the blocks of the peers in rank order, so nothing is unpacked there. What a rank has for
    itself goes directly from its place in one split to that in the other.
    """

    rank: int
    rows: tuple[int, ...]  # of every rank
    sizes: tuple[int, ...]  # numbers of every rank in a row
    batch: int

    @cached_property
    def counts_by_rows(self) -> tuple[int, ...]:
        """Elements of the block for or from every peer by rows; none for this rank, whose block does not travel."""
        rows = self.rows[self.rank] * self.batch
        return tuple(0 if peer == self.rank else rows * size for peer, size in enumerate(self.sizes))

    @cached_property
    def counts_by_heads(self) -> tuple[int, ...]:
        """Elements of the block for or from every peer by heads, where this rank has one, too."""
        return tuple(rows * self.batch * self.sizes[self.rank] for rows in self.rows)

    @property
    def size_by_rows(self) -> int:
        """Elements of all blocks by rows."""
        return self.rows[self.rank] * self.batch * (sum(self.sizes) - self.sizes[self.rank])

    @property
    def size_by_heads(self) -> int:
        """Elements of all blocks by heads."""
        return sum(self.rows) * self.batch * self.sizes[self.rank]

    @cached_property
    def by_rows(self) -> Blocks:
        """What travels of the buffer by rows."""
        return _blocks([[count] for count in self.counts_by_rows], self.rank)

    @cached_property
    def by_heads(self) -> Blocks:
        """What travels of the buffer by heads: all but the block of this rank."""
        return _blocks([[count] for count in self.counts_by_heads], self.rank)


class Window(NamedTuple):
    """Memory that all ranks of a call share: of every rank a segment, in which are its buffers by heads of all messages."""

    starts: tuple[tuple[int, ...], ...]  # of every message: where its buffers start, in bytes, by rank
    bounds: tuple[int, ...]  # of the segments, in bytes


@lru_cache(maxsize=256)
def window_of(messages: tuple[tuple[Item, ...], ...], batch: int) -> Window:
    """The window for these messages, each with its items. A page belongs to one rank, a line of the cache to one buffer."""
    starts_of: list[list[int]] = [[] for _ in messages]
    bounds = [0]
    for rank in range(len(messages[0][0].rows)):
        end = bounds[-1]
        for items, of_message in zip(messages, starts_of, strict=True):
            of_message.append(end)
            end += _up(transfer_of(rank, items, batch).size_by_heads * dtype_of_message(items).itemsize, CACHE_LINE)
        bounds.append(_up(max(end, 1), PAGESIZE))  # there is no empty file in memory
    return Window(tuple(map(tuple, starts_of)), tuple(bounds))


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


class TwoStep:
    """A transfer in two steps: within groups of consecutive ranks, and between ranks with the same number in their groups.

    To heads, this rank, number l of group g, first gets from every member k of its group what k has for number l of any group
    h: the block (k, h). Then it sends what it got for group h to its member there, in the order of the members, in which the
    rows arrive. What is for a member of the group itself is already there, and what this rank has itself needs no first step.
    To rows, everything goes the same way back.

    The buffers, in the order of blocks:

        by rows   (k, h): what goes to member k of the own group, for it and for those with its number elsewhere
        members   (k, h) without k = l: what came from them
        groups    (h, k) without h = g: what goes to them
        by heads  (h, k)
    """

    def __init__(self, transfer: Transfer, group: int) -> None:
        groups = len(transfer.rows) // group
        g, number = divmod(transfer.rank, group)
        to_members = [[transfer.counts_by_rows[h * group + k] for h in range(groups)] for k in range(group)]
        self.widths = tuple(transfer.batch * transfer.sizes[h * group + number] for h in range(groups))
        self.rows = tuple(transfer.rows[g * group + k] for k in range(group))
        block = [[rows * width for width in self.widths] for rows in self.rows]
        block[number][g] = 0
        members = [blocks if k != number else [0] * groups for k, blocks in enumerate(block)]
        between = [[block[k][h] if h != g else 0 for k in range(group)] for h in range(groups)]

        in_rows = starts(_flat(to_members))
        self.starts_by_rows = tuple(in_rows[k * groups + h] for h in range(groups) for k in range(group))
        self.by_rows = _blocks(to_members, number)
        self.members = _blocks(members, number)
        self.groups = _blocks(between, g)
        gathered = [[transfer.counts_by_heads[h * group + k] for k in range(group)] for h in range(groups)]
        self.by_heads = _blocks(gathered, g)

        in_members, in_groups = starts(_flat(members)), starts(_flat(between))
        in_heads = starts(transfer.counts_by_heads)
        # Of every block (k, h) the buffer and the start, before and after the turn between the steps. The buffers are numbered:
        # 0 are members and groups, 1 are those by rows and by heads, which hold what skips a step.
        self.blocks = tuple(
            (
                (k, h),
                (1, self.starts_by_rows[h * group + k]) if k == number else (0, in_members[k * groups + h]),
                (1, in_heads[h * group + k]) if h == g else (0, in_groups[h * group + k]),
            )
            for k in range(group)
            for h in range(groups)
            if (k, h) != (number, g)
        )


class Blocks(NamedTuple):
    """The blocks of a buffer, as they travel."""

    counts: tuple[int, ...]  # for every rank of the step; 0 for this one
    displacements: tuple[int, ...]
    own: slice  # what does not travel
    size: int  # of the buffer


def _flat(blocks: list[list[int]]) -> tuple[int, ...]:
    return tuple(chain.from_iterable(blocks))


def _blocks(blocks: list[list[int]], own: int) -> Blocks:
    sums = tuple(map(sum, blocks))
    displacements = starts(sums)
    counts = tuple(0 if n == own else count for n, count in enumerate(sums))
    return Blocks(counts, displacements, slice(displacements[own], displacements[own] + sums[own]), sum(sums))


def column(table: Sequence[tuple[int, ...]], index: int) -> tuple[int, ...]:
    """One column of a table of integers."""
    return tuple(row[index] for row in table)


def blocks_of(counts: tuple[int, ...]) -> Share:
    """The heads of every rank if the ranks have consecutive blocks of them."""
    return tuple(zip(starts(counts), counts, strict=True))
