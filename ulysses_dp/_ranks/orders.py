"""Which rows of a sequence every rank holds: pure integers, no MPI, no device.

The ranks are a mesh: consecutive ranks form a Ulysses group, whose ranks share the heads. The groups form a ring and share the
rows. `ring` is the number of groups; the position of a rank in its ring is the number of its group.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from .partition import split, starts

if TYPE_CHECKING:
    from collections.abc import Iterable

Order = Literal["contiguous", "zigzag", "zigzag_ranks", "striped"]
ORDERS: tuple[str, ...] = get_args(Order)


class Segment(NamedTuple):
    """Rows at equal distances."""

    start: int
    length: int
    step: int = 1

    @property
    def slice(self) -> slice:
        """The same rows, to index with."""
        return slice(self.start, self.start + self.length * self.step, self.step)

    def cut(self, first: int, end: int) -> Segment:
        """The rows from number `first` of these to before number `end`."""
        first, end = (min(max(n, 0), self.length) for n in (first, end))
        return Segment(self.start + first * self.step, max(end - first, 0), self.step)


Rows = tuple[Segment, ...]  # what one rank holds, in the order in which it lies there
Place = Literal["start", "end"]  # of tokens that every rank has whole, before or after the rows of the ranks
PLACES: tuple[str, ...] = get_args(Place)


@lru_cache(maxsize=256)
def rows_of_ranks(
    seq: int,
    ranks: int,
    ring: int,
    order: Order,
    cu_seqlens: tuple[int, ...] | None = None,
    counts: tuple[int, ...] | None = None,
) -> tuple[Rows, ...]:
    """The rows of every rank.

    Parameters
    ----------
    seq : int
        Rows of all ranks.
    ranks, ring : int
        Ranks, and groups of them; `ring` divides `ranks`.
    order : {"contiguous", "zigzag", "zigzag_ranks", "striped"}
        What each rank holds, as `row_positions` tells.
    cu_seqlens : tuple of int, optional
        Where packed sequences start and end: each is shared out by itself, so that each is balanced.
    counts : tuple of int, optional
        With "contiguous" and one sequence: how many rows every rank has. By default as equal as possible.
    """
    ends = (0, seq) if cu_seqlens is None else cu_seqlens
    shared = [_one_sequence(end - start, ranks, ring, order, counts) for start, end in pairwise(ends)]
    return tuple(
        _joined(
            Segment(start + s.start, s.length, s.step) for start, rows in zip(ends, shared, strict=False) for s in rows[rank]
        )
        for rank in range(ranks)
    )


def _one_sequence(seq: int, ranks: int, ring: int, order: Order, counts: tuple[int, ...] | None) -> list[Rows]:
    group = ranks // ring
    if order == "contiguous":
        counts = counts or split(seq, ranks)
        return [(Segment(start, size),) for start, size in zip(starts(counts), counts, strict=True)]
    if order == "striped":
        stripes: list[Rows] = [(Segment(r, len(range(r, seq, ring)), ring),) for r in range(ring)]
        return [part for rows in stripes for part in _cut(rows, group)]
    chunks = 2 * (ranks if order == "zigzag_ranks" else ring)
    sizes = split(seq, chunks)
    pieces = [Segment(start, size) for start, size in zip(starts(sizes), sizes, strict=True)]
    pairs = [_joined((pieces[n], pieces[chunks - 1 - n])) for n in range(chunks // 2)]
    return pairs if order == "zigzag_ranks" else [part for pair in pairs for part in _cut(pair, group)]


def _cut(rows: Rows, parts: int) -> list[Rows]:
    """Rows in so many consecutive parts, as equal as possible."""
    sizes = split(count(rows), parts)
    firsts = starts(tuple(s.length for s in rows))
    return [
        _joined(s.cut(begin - first, begin + size - first) for s, first in zip(rows, firsts, strict=True))
        for begin, size in zip(starts(sizes), sizes, strict=True)
    ]


def _joined(segments: Iterable[Segment]) -> Rows:
    """The segments that are not empty, as few as they can be."""
    rows: list[Segment] = []
    for s in segments:
        last = rows[-1] if rows else None
        if last and s.length and last.step == s.step and last.start + last.length * last.step == s.start:
            rows[-1] = last._replace(length=last.length + s.length)
        elif s.length:
            rows.append(s)
    return tuple(rows)


def rows_of_groups(rows: tuple[Rows, ...], ring: int) -> tuple[Rows, ...]:
    """The rows of every group, from those of its ranks."""
    size = len(rows) // ring
    return tuple(_joined(s for rank in rows[g * size : (g + 1) * size] for s in rank) for g in range(ring))


@lru_cache(maxsize=256)
def shares_of_replicated(
    tokens: int, ranks: int, ring: int, order: Order, place: Place, cu_seqlens: tuple[int, ...] | None = None
) -> tuple[Rows, ...]:
    """Of tokens that every rank has whole, those that each brings into a call, for each to count once.

    The groups share them in the order of the rows. In a group it is one rank that brings them, next to which they are: in
    contiguous order without a ring, nothing but the numbers of rows changes.
    """
    size = ranks // ring
    of_groups = rows_of_ranks(tokens, ring, ring, order, cu_seqlens)
    bringing = 0 if place == "start" else size - 1
    return tuple(of_groups[rank // size] if rank % size == bringing else () for rank in range(ranks))


def with_shares(rows: tuple[Rows, ...], shares: tuple[Rows, ...], place: Place) -> tuple[Rows, ...]:
    """The rows of every rank and its share of replicated tokens, by their numbers in the whole of both."""
    first, then = (shares, rows) if place == "start" else (rows, shares)
    before = sum(map(count, first))
    return tuple(_joined((*a, *(s._replace(start=s.start + before) for s in b))) for a, b in zip(first, then, strict=True))


def ends_within(cu_seqlens: tuple[int, ...] | None, first: int, size: int) -> tuple[int, ...] | None:
    """Where packed sequences start and end in so many of their rows, from number `first` on."""
    return None if cu_seqlens is None else tuple(min(max(end - first, 0), size) for end in cu_seqlens)


def count(rows: Rows) -> int:
    """How many rows these are."""
    return sum(s.length for s in rows)


def slices(rows: Rows) -> list[tuple[slice, Segment]]:
    """The segments, and where each lies among these rows."""
    firsts = starts(tuple(s.length for s in rows))
    return [(slice(first, first + s.length), s) for first, s in zip(firsts, rows, strict=True)]


def positions(rows: Rows) -> np.ndarray:
    """The numbers of these rows in the sequence, in the order in which they lie; int64."""
    return np.concatenate([np.arange(s.start, s.start + s.length * s.step, s.step) for s in rows] or [np.empty(0, np.int64)])
