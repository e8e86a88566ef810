"""Dot products of the rows of two USM arrays (see row_product.py and row_product_gpu.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import row_product, row_product_gpu
from .arguments import strides_by_head, strides_of
from .launch import launch

if TYPE_CHECKING:
    from types import ModuleType


def form_for(device: Any, rows: int) -> ModuleType:
    """The module of the kernel that a device gets."""
    return row_product_gpu if row_product_gpu.serves(device, rows) else row_product


def dot_rows(x: Any, y: Any, out: Any, *, form: ModuleType | None = None) -> None:
    """Sum x * y over the last axis, in which these (batch, seq, heads, head_dim) arrays are dense, into (batch, heads, seq).

    Where y is 0, x does not matter. `form` is the module of the kernel, by default that of `form_for`.
    """
    batch, seq, heads, head_dim = x.shape
    if out.size == 0:
        return
    rows = batch * seq * heads
    form = form or form_for(x.sycl_queue.sycl_device, rows)
    launch(
        x.sycl_queue,
        form.name(x.dtype.itemsize),
        [a.usm_data for a in (x, y, out)],
        (*strides_of(x), *strides_of(y), *strides_by_head(out), seq, heads, rows, head_dim, 0.0),
        groups=-(-rows // form.ROWS),
        lanes=form.LANES,
    )


def reference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What the kernel computes, in float64 NumPy."""
    x, y = (a.astype(np.float64) for a in (x, y))
    return np.einsum("bihd,bihd->bhi", np.where(y != 0, x, 0), y)
