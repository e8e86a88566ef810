"""Which rank owns which rows and heads, and where they lie in the exchange buffers: pure integers, no MPI, no device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple


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


Share = list[tuple[int, int]]  # of every rank: its first head and the number of its heads


def query_shares(heads: tuple[Heads, ...]) -> Share:
    """The query heads of every rank."""
    return [(h.q_start, h.q_count) for h in heads]


def kv_shares(heads: tuple[Heads, ...]) -> Share:
    """The kv heads that every rank reads; they may overlap."""
    return [(h.kv_start, h.kv_count) for h in heads]


@dataclass(frozen=True)
class Trade:
    """One exchange between the two splits of arrays: by rows (the *local* side) and by heads (the *gathered* side).

    A row holds numbers for every rank: those of the rank's heads, of all arrays. On the local side a rank has its rows and all
    numbers, as one block per peer, each `(rows, batch, numbers of the peer)`. On the gathered side it has all rows and its
    numbers, `(all rows, batch, numbers)`: the blocks of the peers in rank order, which is why nothing is unpacked there.
    """

    rank: int
    rows: tuple[int, ...]  # of every rank
    sizes: tuple[int, ...]  # numbers of every rank in a row
    batch: int

    @property
    def local_counts(self) -> tuple[int, ...]:
        """Elements of the block for or from every peer on the local side."""
        return tuple(self.rows[self.rank] * self.batch * size for size in self.sizes)

    @property
    def gathered_counts(self) -> tuple[int, ...]:
        """Elements of the block for or from every peer on the gathered side."""
        return tuple(rows * self.batch * self.sizes[self.rank] for rows in self.rows)

    @property
    def even(self) -> bool:
        """Whether every block on every rank has the same size; all ranks agree on the answer."""
        return len(set(self.rows)) == 1 and len(set(self.sizes)) == 1
