"""Join attention over different keys where it lies (see row_merge.py and row_merge_gpu.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import row_merge, row_merge_gpu
from .arguments import strides_by_head, strides_of
from .launch import launch

if TYPE_CHECKING:
    from types import ModuleType


def form_for(device: Any, rows: int) -> ModuleType:
    """The module of the kernel that a device gets."""
    return row_merge_gpu if row_merge_gpu.serves(device, rows) else row_merge


def merge(out: Any, lse: Any, part: Any, part_lse: Any, merged_lse: Any, *, form: ModuleType | None = None) -> None:
    """Merge `part` into `out`, (batch, seq, heads, head_dim) arrays that are dense in the last axis, and write the merged lse.

    The others are (batch, heads, seq); `merged_lse` is not `lse`. Rows of `part` whose lse is -inf have seen no key.
    `form` is the module of the kernel, by default that of `form_for`.
    """
    batch, seq, heads, head_dim = out.shape
    if lse.size == 0:
        return
    rows = batch * seq * heads
    form = form or form_for(out.sycl_queue.sycl_device, rows)
    launch(
        out.sycl_queue,
        form.name(out.dtype.itemsize),
        [x.usm_data for x in (out, lse, part, part_lse, merged_lse)],
        (
            *(*strides_of(out), *strides_by_head(lse)),
            *(*strides_of(part), *strides_by_head(part_lse), *strides_by_head(merged_lse)),
            *(seq, heads, head_dim, 0.0),
            *((rows,) if form is row_merge_gpu else ()),
        ),
        groups=-(-rows // form.ROWS),
        lanes=form.LANES,
    )


def reference(out: np.ndarray, lse: np.ndarray, part: np.ndarray, part_lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes, in float64 NumPy: out and lse of both."""
    out, lse, part, part_lse = (x.astype(np.float64) for x in (out, lse, part, part_lse))
    merged = np.logaddexp(lse, part_lse)
    with np.errstate(invalid="ignore"):
        weights = (np.where(np.isneginf(x), 0, np.exp(x - merged)).swapaxes(1, 2)[..., None] for x in (lse, part_lse))
        return sum(np.where(w == 0, 0, w * x) for w, x in zip(weights, (out, part), strict=True)), merged
