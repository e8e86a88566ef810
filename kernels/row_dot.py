"""Dot products of the rows of two USM arrays (see row_product.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import strides_by_head, strides_of
from .launch import launch
from .row_product import LANES, name


def dot_rows(x: Any, y: Any, out: Any) -> None:
    """Sum x * y over the last axis, in which these (batch, seq, heads, head_dim) arrays are dense, into (batch, heads, seq).

    Where y is 0, x does not matter.
    """
    batch, seq, heads, head_dim = x.shape
    if out.size == 0:
        return
    rows = batch * seq * heads
    launch(
        x.sycl_queue,
        name(x.dtype.itemsize),
        [a.usm_data for a in (x, y, out)],
        (*strides_of(x), *strides_of(y), *strides_by_head(out), seq, heads, rows, head_dim, 0.0),
        groups=-(-rows // LANES),
        lanes=LANES,
    )


def reference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What the kernel computes, in float64 NumPy."""
    x, y = (a.astype(np.float64) for a in (x, y))
    return np.einsum("bihd,bihd->bhi", np.where(y != 0, x, 0), y)
