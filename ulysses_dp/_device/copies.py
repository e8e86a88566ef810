"""Copies of whole USM arrays on their device: other layouts and dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ulysses_dp.kernels.relayout import Panel, copy_panels, source_of, target_of

from .arrays import view
from .trace import note
from .workspace import empty_like, scratch

if TYPE_CHECKING:
    from collections.abc import Sequence


def copy_arrays(sources: Sequence[Any], targets: Sequence[Any], *, add: bool = False, wire: str | None = None) -> None:
    """Copy arrays in one launch, and convert them; of one batch and as many rows, the targets dense in the last axis.

    With `add` they are added to what the targets hold: all are float32, or all float64. With `wire`, either all sources or all
    targets are the codes of such a way to travel.
    """
    batch, seq, _, _ = sources[0].shape
    pairs = enumerate(zip(sources, targets, strict=True))
    panels = [  # codes have their scale besides
        Panel(*source_of(n, x), *target_of(n, y), x.shape[2], min(x.shape[3], y.shape[3]), add=int(add)) for n, (x, y) in pairs
    ]
    copy_panels(sources, targets, panels, rows=seq, batch=batch, wire=wire)
    note(passes=1)


def readable(arrays: tuple[Any, ...], slot: str, dtype: Any, *, by_head: bool) -> Sequence[Any]:
    """Arrays of one batch and as many rows as the kernels read them: themselves, or copies in the scratch memory of this name.

    They have this dtype and are dense in the last axis; `by_head`, the rows of a head follow each other.
    """
    apart = by_head and any(x.strides[1] != x.shape[3] and x.size for x in arrays)
    if arrays[0].dtype != dtype or apart:
        return _head_major(arrays, slot, dtype)
    return [_dense_last_axis(x) for x in arrays]


def _head_major(arrays: tuple[Any, ...], slot: str, dtype: Any) -> list[Any]:
    """Copies of arrays in scratch memory, in which the rows of a head follow each other."""
    memory = scratch(arrays[0].sycl_queue, slot, (sum(x.size for x in arrays),), dtype)
    copies, start = [], 0
    for x in arrays:
        _, seq, heads, width = x.shape
        copies.append(view(memory, start, x.shape, (heads * seq * width, width, seq * width, 1)))
        start += x.size
    copy_arrays(arrays, copies)
    return copies


def _dense_last_axis(x: Any) -> Any:
    """The array itself, or a copy if its last axis is strided, which the kernels do not read."""
    if x.strides[3] == 1 or x.shape[3] == 1 or x.size == 0:
        return x
    copy = empty_like(x, x.shape)
    copy_arrays((x,), (copy,))
    return copy
