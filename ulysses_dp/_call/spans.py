"""Which keys every query row sees: causal masks, windows and packed sequences as one table. Pure integers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .._device.workspace import freed_with_workspace
from .._ranks.orders import Rows, Segment, slices

UNLIMITED = (-1, -1)  # a window without limits


@freed_with_workspace
@lru_cache(maxsize=8)
def spans(
    seq_q: int,
    seq_k: int,
    *,
    causal: bool,
    window_size: tuple[int, int],
    cu_seqlens_q: tuple[int, ...] | None = None,
    cu_seqlens_k: tuple[int, ...] | None = None,
    seqused_q: tuple[int, ...] | None = None,
    seqused_k: tuple[int, ...] | None = None,
    key_ranges: bytes | None = None,
) -> np.ndarray:
    """For every query row the first key that it sees, the end of its keys, and the key on its diagonal; (seq_q, 3), int64.

    The diagonal joins the last query and the last key of a sequence that count; a row and a key on it have distance 0. The
    ranges of keys are the bytes of (seq_q, 2) numbers of int64.
    """
    starts_q = np.array((0, seq_q) if cu_seqlens_q is None else cu_seqlens_q)
    starts_k = np.array((0, seq_k) if cu_seqlens_k is None else cu_seqlens_k)
    lengths_q = np.diff(starts_q)
    ends_q = starts_q[1:] if seqused_q is None else starts_q[:-1] + np.array(seqused_q, int)
    ends_k = starts_k[1:] if seqused_k is None else starts_k[:-1] + np.array(seqused_k, int)
    start, end = (np.repeat(x, lengths_q) for x in (starts_k[:-1], ends_k))
    row = np.arange(seq_q)
    centre = row + np.repeat(ends_k - ends_q, lengths_q)
    left, right = (min(n, seq_q + seq_k) for n in window_size)
    if causal:
        right = 0
    first = start if left < 0 else np.clip(centre - left, start, end)
    end = end if right < 0 else np.clip(centre + right + 1, first, end)
    if key_ranges is not None:
        of_rows = np.frombuffer(key_ranges, np.int64).reshape(seq_q, 2)
        first, end = np.maximum(first, of_rows[:, 0]), np.minimum(end, of_rows[:, 1])
    if seqused_q is not None:
        end = np.where(row < np.repeat(ends_q, lengths_q), end, first)
    if key_ranges is not None or seqused_q is not None:  # rows without keys keep the order of the others
        none, reached = first >= end, np.maximum.accumulate(np.where(first < end, end, 0))
        first, end = (np.where(none, reached, x) for x in (first, end))
    table = np.stack([first, end, centre], axis=-1).astype(np.int64).reshape(seq_q, 3)
    table.flags.writeable = False  # it is shared between calls
    return table


@dataclass(frozen=True)
class Block:
    """Some rows and keys of a call, with their numbers in the whole sequences. Both have the same step."""

    rows: Segment
    keys: Segment
    seq_q: int  # rows of the whole
    seq_k: int

    @classmethod
    def whole(cls, seq_q: int, seq_k: int) -> Block:
        """All rows and keys."""
        return cls(Segment(0, seq_q), Segment(0, seq_k), seq_q, seq_k)

    def diagonal(self, *, causal: bool) -> int:
        """Row i of the block sees the keys j <= i + this."""
        if not causal:
            return self.keys.length
        return (self.rows.start + self.seq_k - self.seq_q - self.keys.start) // self.rows.step

    def causal_pairs(self, *, causal: bool) -> int:
        """How many pairs of row and key see each other if there is no mask but that."""
        before, rows, keys = self.diagonal(causal=causal), self.rows.length, self.keys.length
        # row i sees i + before + 1 keys, if that is positive, and at most all
        in_reach = _triangle(rows + before) - _triangle(before)
        return in_reach - _triangle(rows + before - keys) + _triangle(before - keys)

    def spans(self, table: np.ndarray) -> np.ndarray:
        """The spans of the whole for these rows, in keys of the block; the last column keeps its numbers in the whole."""
        if self == Block.whole(self.seq_q, self.seq_k):
            return table
        of_rows = table[self.rows.slice].copy()
        # the first key of the block at or after a key of the whole
        of_rows[:, :2] = np.clip(-((self.keys.start - of_rows[:, :2]) // self.keys.step), 0, self.keys.length)
        return of_rows


def _triangle(n: int) -> int:
    """1 + 2 + … + n."""
    return n * (n + 1) // 2 if n > 0 else 0


@lru_cache(maxsize=4096)
def meetings(
    rows: Rows, keys: Rows, seq_q: int, seq_k: int, mask: tuple[tuple[str, Any], ...]
) -> tuple[tuple[slice, slice, Block, int], ...]:
    """What some rows and some keys see of each other: where the segments lie, and how many pairs of row and key there are."""
    found, given = [], dict(mask)
    causal = given.pop("causal")
    plain = all(value in (None, UNLIMITED) for value in given.values())
    for rows_at, of_rows in slices(rows):
        for keys_at, of_keys in slices(keys):
            block = Block(of_rows, of_keys, seq_q, seq_k)
            if plain:
                pairs = block.causal_pairs(causal=causal)
            else:
                pairs = int(np.diff(block.spans(spans(seq_q, seq_k, **dict(mask)))[:, :2]).sum())
            if pairs:
                found.append((rows_at, keys_at, block, pairs))
    return tuple(found)


def trim(table: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The spans without the keys before the first and after the last that is visible to anyone."""
    (keys,) = np.nonzero(visible)
    begin, end = (keys[0], keys[-1] + 1) if keys.size else (0, 0)
    trimmed = table.copy()
    trimmed[:, :2] = np.clip(table[:, :2], begin, end)
    return trimmed
