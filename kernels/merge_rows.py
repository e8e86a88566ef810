"""Join attention over different keys where it lies (see row_merge.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import strides_by_head, strides_of
from .launch import launch
from .row_merge import LANES, name


def merge(out: Any, lse: Any, part: Any, part_lse: Any, merged_lse: Any) -> None:
    """Merge `part` into `out`, (batch, seq, heads, head_dim) arrays that are dense in the last axis, and write the merged lse.

    The others are (batch, heads, seq); `merged_lse` is not `lse`. Rows of `part` whose lse is -inf have seen no key.
    """
    batch, seq, heads, head_dim = out.shape
    if lse.size == 0:
        return
    launch(
        out.sycl_queue,
        name(out.dtype.itemsize),
        [x.usm_data for x in (out, lse, part, part_lse, merged_lse)],
        (
            *(*strides_of(out), *strides_by_head(lse)),
            *(*strides_of(part), *strides_by_head(part_lse), *strides_by_head(merged_lse)),
            *(seq, heads, head_dim, 0.0),
        ),
        groups=batch * seq * heads,
        lanes=LANES,
    )


def reference(out: np.ndarray, lse: np.ndarray, part: np.ndarray, part_lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes, in float64 NumPy: out and lse of both."""
    out, lse, part, part_lse = (x.astype(np.float64) for x in (out, lse, part, part_lse))
    merged = np.logaddexp(lse, part_lse)
    with np.errstate(invalid="ignore"):
        weights = (np.where(np.isneginf(x), 0, np.exp(x - merged)).swapaxes(1, 2)[..., None] for x in (lse, part_lse))
        return sum(np.where(w == 0, 0, w * x) for w, x in zip(weights, (out, part), strict=True)), merged
