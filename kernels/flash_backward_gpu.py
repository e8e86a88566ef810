"""Attention backward for Intel GPUs: the algorithm of flash_backward.py with another tile, made for registers.

The tile, per sub-group: 16 rows, one in each lane, as in flash_forward_gpu.py. Rows are queries in the kernel for dq, and keys
in those for dk and dv.

    rows     two panels (head_dim, 16 rows), read again in every step: of q and dout, or of k and v
    totals   head_dim registers for each gradient of the kernel
    columns  of k and v, or of q and dout; one of 16 numbers at a time in one register, broadcast lane by lane

A step takes `columns` columns: their dot products with both rows, their weights and slopes, and their parts of the totals.
Where dk and dv together have no room in 256 registers, each has a kernel of its own, which costs a fifth product.

Keys see queries as queries see keys if both are counted from the last one to the first: row r sees the columns up to
r + diagonal. So the kernels for keys get reversed views, and all kernels have one loop over the columns that all 16 rows
see, and one over the few after these, where columns are hidden or missing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import flash_forward_gpu
from .flash_backward import place_of_rows
from .flash_forward_gpu import pack_rows
from .launch import launch, place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POINTERS = (
    ("rows", "pointer"), ("cols_a", "pointer"), ("cols_b", "pointer"), ("grad_a", "pointer"), ("grad_b", "pointer"),
    ("lse", "pointer"), ("delta", "pointer"),
)  # fmt: skip
PLACES = tuple(
    (f"{array}_{part}", "int64")
    for array in ("cols_a", "cols_b", "grad_a", "grad_b", "lse", "delta")
    for part in ("offset", "batch", "seq", "head")
)
SCALARS = (
    ("rows_offset", "int64"), ("row_heads", "int64"), ("q_heads", "int64"), ("group", "int64"), ("head_shift", "int64"),
    ("row_count", "int64"), ("col_count", "int64"), ("diagonal", "int64"), ("row_blocks", "int64"), ("still", "int64"),
    ("dot_scale", "real"), ("scale", "real"), ("zero", "real"),
)  # fmt: skip
ARGUMENTS = POINTERS + PLACES + SCALARS

# Columns of a step by head_dim. More make a longer loop: 16 for head_dim 64 would raise the share of multiply-adds by 0.03 and
# the loop from 40 to 75 KB. For 128 the registers hold no more.
COLUMNS = {32: 16, 64: 8, 80: 8, 96: 8, 128: 4}
TOGETHER = 64  # the largest head_dim for which the registers hold dk and dv
SUB_GROUP = flash_forward_gpu.SUB_GROUP
BUILD_OPTIONS = flash_forward_gpu.BUILD_OPTIONS


def name(gradients: str, head_dim: int) -> str:
    """Name of the compiled kernel."""
    return f"flash_backward_gpu_{gradients}_float32_d{head_dim}"


def kernels_of(head_dim: int) -> tuple[str, ...]:
    """The gradients that each kernel of a head_dim computes."""
    return ("dq", "dk_dv") if head_dim <= TOGETHER else ("dq", "dk", "dv")


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for head_dim, columns in COLUMNS.items():
        for gradients in kernels_of(head_dim):
            constants = {"gradients": gradients, "head_dim": head_dim, "columns": columns}
            yield name(gradients, head_dim), {"pointer": "float32", "real": "float32"}, constants


def kernel(*, gradients: str, head_dim: int, columns: int) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one of `kernels_of(head_dim)`."""
    from .intrinsics import group_index
    from .subgroup import divide, gradient_operations, lane_index, tile_operations

    into_keys = gradients != "dq"
    with_a, with_b = gradients != "dv", gradients in ("dk_dv", "dv")
    fill, _, dot, _, _, store = tile_operations(head_dim, columns, q_in_registers=False, key_registers=1)
    weigh, differentiate, accumulate = gradient_operations(head_dim, columns, by_column=into_keys)
    real = np.float32
    infinity, one, log2e = real(np.inf), real(1), real(math.log2(math.e))
    panel = SUB_GROUP * head_dim

    def flash_backward(
        item, no_array, rows, cols_a, cols_b, grad_a, grad_b, lse, delta,
        cols_a_offset, cols_a_batch, cols_a_seq, cols_a_head, cols_b_offset, cols_b_batch, cols_b_seq, cols_b_head,
        grad_a_offset, grad_a_batch, grad_a_seq, grad_a_head, grad_b_offset, grad_b_batch, grad_b_seq, grad_b_head,
        lse_offset, lse_batch, lse_seq, lse_head, delta_offset, delta_batch, delta_seq, delta_head,
        rows_offset, row_heads, q_heads, group, head_shift, row_count, col_count, diagonal, row_blocks, still,
        dot_scale, scale, zero,
    ):  # fmt: skip
        index = group_index()  # a work-group is one sub-group
        lane = lane_index()
        pair = divide(index, row_blocks)  # (batch, head of the rows)
        # the rows with the most columns under a causal mask first
        block = row_blocks - 1 - (index - pair * row_blocks)
        b = divide(pair, row_heads)
        row_head = pair - b * row_heads
        first = block * SUB_GROUP
        row = first + lane
        rows_start = rows_offset + (pair * row_blocks + block) * 2 * panel
        if into_keys:
            # the query heads of this rank that read this kv head
            head_begin, head_end = max(row_head * group - head_shift, 0), min((row_head + 1) * group - head_shift, q_heads)
        else:
            head_begin, head_end = row_head, row_head + 1

        last = min(row + diagonal + 1, col_count)  # columns that the row sees
        end, inner_end = min(first + SUB_GROUP + diagonal, col_count), min(first + diagonal + 1, col_count)
        edge = max(inner_end // columns, 0) * columns  # where the columns end that all rows see, in whole steps

        # numba puts the code of this function where it is called; constants for the last two leave nothing to hide
        def step(total_a, total_b, h, start, available, visible):
            head, col_head = (h, h) if into_keys else (row_head, divide(row_head + head_shift, group))
            place_a = cols_a_offset + b * cols_a_batch + col_head * cols_a_head + start * cols_a_seq
            place_b = cols_b_offset + b * cols_b_batch + col_head * cols_b_head + start * cols_b_seq
            # `still` is 0, but the compiler does not know: it would load the panels once, before the loop, and spill
            rows_a = rows_start + start * still
            query = min(start + lane, col_count - 1) if into_keys else min(row, row_count - 1)
            of_lse = lse[lse_offset + b * lse_batch + head * lse_head + query * lse_seq] * log2e
            of_lse = infinity if of_lse == -infinity else of_lse  # a query that sees nothing has no weights
            weights = weigh(dot(rows, rows_a, cols_a, place_a, cols_a_seq, available), dot_scale, of_lse, visible)
            if with_a:
                of_delta = delta[delta_offset + b * delta_batch + head * delta_head + query * delta_seq]
                slopes = dot(rows, rows_a + panel, cols_b, place_b, cols_b_seq, available)
                slopes = differentiate(weights, slopes, of_delta, visible)
                total_a = accumulate(total_a, slopes, cols_a, place_a, cols_a_seq, available, visible)
            if with_b:
                total_b = accumulate(total_b, weights, cols_b, place_b, cols_b_seq, available, visible)
            return total_a, total_b

        total_a, total_b = fill(zero), fill(zero)
        # A `for` loop has an exit before its first turn too, and the values that meet there spill. Heads and columns share a
        # loop, because the CPU runtime, which runs the tests, cannot compile the sub-group operations in nested ones.
        h, start = head_begin if edge > 0 else head_end, 0
        while True:
            if h >= head_end:
                break
            total_a, total_b = step(total_a, total_b, h, start, columns, columns)
            start += columns
            h, start = (h, start) if start < edge else (h + 1, 0)
        h, start = head_begin if edge < end else head_end, edge
        while True:
            if h >= head_end:
                break
            total_a, total_b = step(total_a, total_b, h, start, end - start, last - start)
            start += columns
            h, start = (h, start) if start < end else (h + 1, edge)

        if row < row_count:
            if with_a:
                store(grad_a, grad_a_offset + b * grad_a_batch + row_head * grad_a_head + row * grad_a_seq, total_a, scale)
            if with_b:
                store(grad_b, grad_b_offset + b * grad_b_batch + row_head * grad_b_head + row * grad_b_seq, total_b, one)

    return flash_backward


def flash_backward_gpu(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    lse: Any,
    delta: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    scratch: Callable[..., Any],
    *,
    scale: float,
    diagonal: int,
    group: int,
    head_shift: int = 0,
) -> None:
    """`flash_backward` by this schedule; `scratch(name, shape)` gives USM memory for the panels of the rows."""
    head_dim = q.shape[3]
    reversed_arrays = [tuple(x[:, ::-1] for x in pair) for pair in ((k, v), (q, dout), (dk, dv))]
    reversed_numbers = tuple(x[:, :, ::-1] for x in (lse, delta))
    of_queries, *of_keys = kernels_of(head_dim)
    for kernels, rows, cols, grads, numbers, row_diagonal in (
        ([of_queries], (q, dout), (k, v), (dq, dq), (lse, delta), diagonal),
        (of_keys, *reversed_arrays, reversed_numbers, diagonal + q.shape[1] - k.shape[1]),
    ):
        batch, row_count, row_heads, _ = rows[0].shape
        if grads[0].size == 0:
            continue
        row_blocks = -(-row_count // SUB_GROUP)
        panels = scratch("panels of rows", (batch * row_heads * row_blocks * 2 * SUB_GROUP * head_dim,))
        pack_rows(rows, panels)
        scalars = (
            *(number for x in (*cols, *grads) for number in place(x)[:4]),
            *(number for x in numbers for number in place_of_rows(x)),
            *(place(panels)[0], row_heads, q.shape[2], group, head_shift),
            *(row_count, cols[0].shape[1], row_diagonal, row_blocks, 0),
            *(scale * math.log2(math.e), scale, 0.0),
        )
        for gradients in kernels:
            launch(
                q.sycl_queue,
                name(gradients, head_dim),
                [x.usm_data for x in (panels, *cols, *grads, *numbers)],
                scalars,
                groups=batch * row_heads * row_blocks,
                lanes=SUB_GROUP,
            )
