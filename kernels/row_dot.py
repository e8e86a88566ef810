"""Dot products of the rows of two arrays: the sum of dout * out over head_dim, which every backward pass needs first.

One work-item takes one row (batch, seq, head); both arrays are read once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .launch import launch, place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LANES = 16
DTYPES = {4: "float32", 8: "float64"}  # by itemsize
POINTERS = (("x", "pointer"), ("y", "pointer"), ("out", "pointer"))
SCALARS = (
    ("x_offset", "int64"), ("x_batch", "int64"), ("x_seq", "int64"), ("x_head", "int64"),
    ("y_offset", "int64"), ("y_batch", "int64"), ("y_seq", "int64"), ("y_head", "int64"),
    ("out_offset", "int64"), ("out_batch", "int64"), ("out_seq", "int64"), ("out_head", "int64"),
    ("seq", "int64"), ("heads", "int64"), ("rows", "int64"), ("head_dim", "int64"), ("zero", "real"),
)  # fmt: skip
ARGUMENTS = POINTERS + SCALARS


def name(itemsize: int) -> str:
    """Name of the compiled kernel."""
    return f"row_dot_{DTYPES[itemsize]}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for itemsize, dtype in DTYPES.items():
        yield name(itemsize), {"pointer": dtype, "real": dtype}, {"lanes": LANES}


def kernel(*, lanes: int) -> Callable[..., None]:
    """Make the numba-dpex kernel function; the element type is that of its pointers."""
    from .intrinsics import group_index, lane_index, mad

    def row_dot(
        item, no_array, x, y, out, x_offset, x_batch, x_seq, x_head, y_offset, y_batch, y_seq, y_head,
        out_offset, out_batch, out_seq, out_head, seq, heads, rows, head_dim, zero,
    ):  # fmt: skip
        index = group_index() * lanes + lane_index()
        if index < rows:
            h = index % heads
            i = index // heads % seq
            b = index // heads // seq
            x_start = x_offset + b * x_batch + i * x_seq + h * x_head
            y_start = y_offset + b * y_batch + i * y_seq + h * y_head
            total = zero
            for d in range(head_dim):
                value = y[y_start + d]
                # a row of zeros has seen nothing: nothing can change it, whatever x is
                total = mad(x[x_start + d], value, total) if value != zero else total
            out[out_offset + b * out_batch + i * out_seq + h * out_head] = total

    return row_dot


def row_dot(x: Any, y: Any, out: Any) -> None:
    """Sum x * y over the last axis, in which these (batch, seq, heads, head_dim) arrays are dense, into (batch, heads, seq).

    Where y is 0, x does not matter.
    """
    batch, seq, heads, head_dim = x.shape
    if out.size == 0:
        return
    out_offset, out_batch, out_head, out_seq = place(out)
    rows = batch * seq * heads
    launch(
        x.sycl_queue,
        name(x.dtype.itemsize),
        [a.usm_data for a in (x, y, out)],
        (*place(x)[:4], *place(y)[:4], out_offset, out_batch, out_seq, out_head, seq, heads, rows, head_dim, 0.0),
        groups=-(-rows // LANES),
        lanes=LANES,
    )


def reference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What the kernel computes, in float64 NumPy."""
    x, y = (a.astype(np.float64) for a in (x, y))
    return np.einsum("bihd,bihd->bhi", np.where(y != 0, x, 0), y)
