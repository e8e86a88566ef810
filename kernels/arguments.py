"""The groups of numbers in the argument lists of the kernels: one name each in Python, a flat list in the compiled kernel.

A field that is annotated `int` is an int64, one that is annotated `float` a floating-point number of the kernel's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .score import ScoreOptions


class Strides(NamedTuple):
    """Offset and strides of an array (batch, seq, heads, …) in its memory, in elements."""

    offset: int
    batch: int
    seq: int
    head: int


class Sizes(NamedTuple):
    """The sizes of a call. Query head h reads kv head ``(h + head_shift) // group``."""

    heads: int
    kv_heads: int
    group: int
    head_shift: int
    seq_q: int
    seq_k: int
    diagonal: int  # query row i sees the keys j <= i + diagonal, if there are no spans
    row_blocks: int  # tiles of rows of a head
    head_dim: int


def strides_of(x: Any) -> Strides:
    """Those of a USM array (batch, seq, heads, …)."""
    return Strides(x._element_offset, *x.strides[:3])


def strides_by_head(x: Any) -> Strides:
    """Those of a USM array (batch, heads, seq)."""
    batch, head, seq = x.strides
    return Strides(x._element_offset, batch, seq, head)


@dataclass(frozen=True)
class Problem:
    """What a call of attention is, besides its arrays; the launchers make the numbers of it."""

    scale: float
    diagonal: int  # query row i sees the keys j <= i + diagonal; not used with `options`, whose spans say which
    group: int  # query head h reads kv head (h + head_shift) // group
    head_shift: int = 0
    options: ScoreOptions | None = None
