"""Attention backward for Intel GPUs: the algorithm of flash_backward.py with another tile, made for registers.

The tile, per sub-group: 16 rows, one in each lane, as in flash_forward_gpu.py. Rows are queries in the kernel for dq, and keys
in those for dk and dv.

    rows     two panels (head_dim, 16 rows), read again in every step: of q and dout, or of k and v
    totals   head_dim registers for each gradient of the kernel
    columns  of k and v, or of q and dout; one of 16 numbers at a time in one register, broadcast lane by lane

A step takes `columns` columns: their dot products with both rows, p and ds, and their parts of the totals.
Where dk and dv together have no room in 256 registers, each has a kernel of its own, which costs a fifth product.

Keys see queries as queries see keys if both are counted from the last one to the first: row r sees the columns up to
r + diagonal. So the kernels for keys get reversed views, and all kernels have one loop over the columns that all 16 rows
see, and one over the few after these, where columns are hidden or missing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import Place, Sizes
from .flash_forward_gpu import BUILD_OPTIONS as BUILD_OPTIONS
from .flash_forward_gpu import SUB_GROUP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ARRAYS = ("cols_a", "cols_b", "grad_a", "grad_b", "lse", "delta")
ARGUMENTS = (
    *((name, "pointer") for name in ("rows", *_ARRAYS)),
    *((f"{name}_at", Place) for name in _ARRAYS),
    *(("rows_offset", "int64"), ("sizes", Sizes), ("still", "int64"), ("scale", "real"), ("zero", "real")),
)

# Columns of a step by head_dim. More make a longer loop: 16 for head_dim 64 would raise the share of multiply-adds by 0.03 and
# the loop from 40 to 75 KB. For 128 the registers hold no more.
COLUMNS = {32: 16, 64: 8, 80: 8, 96: 8, 128: 4}
TOGETHER = 64  # the largest head_dim for which the registers hold dk and dv


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
    from .intrinsics import element, group_index
    from .subgroup import divide, gradient_operations, lane_index, tile_operations

    into_keys = gradients != "dq"
    with_a, with_b = gradients != "dv", gradients in ("dk_dv", "dv")
    fill, dot, store = tile_operations(head_dim, columns)
    weigh, differentiate, accumulate = gradient_operations(head_dim, columns, by_column=into_keys)
    real = np.float32
    infinity, one, log2e = real(np.inf), real(1), real(math.log2(math.e))
    panel = SUB_GROUP * head_dim

    def backward_registers(
        item, no_array, rows, cols_a, cols_b, grad_a, grad_b, lse, delta,
        cols_a_at, cols_b_at, grad_a_at, grad_b_at, lse_at, delta_at, rows_offset, sizes, still, scale, zero,
    ):  # fmt: skip
        if into_keys:
            row_heads, row_count, col_count = sizes.kv_heads, sizes.seq_k, sizes.seq_q
            # counted from the last row and column
            diagonal = sizes.diagonal + sizes.seq_q - sizes.seq_k
        else:
            row_heads, row_count, col_count = sizes.heads, sizes.seq_q, sizes.seq_k
            diagonal = sizes.diagonal
        to_log2 = scale * log2e  # the hardware has exp2
        index = group_index()  # a work-group is one sub-group
        lane = lane_index()
        pair = divide(index, sizes.row_blocks)  # (batch, head of the rows)
        # the rows with the most columns under a causal mask first
        block = sizes.row_blocks - 1 - (index - pair * sizes.row_blocks)
        b = divide(pair, row_heads)
        row_head = pair - b * row_heads
        first = block * SUB_GROUP
        row = first + lane
        rows_start = rows_offset + (pair * sizes.row_blocks + block) * 2 * panel
        if into_keys:
            # the query heads of this rank that read this kv head
            head_begin = max(row_head * sizes.group - sizes.head_shift, 0)
            head_end = min((row_head + 1) * sizes.group - sizes.head_shift, sizes.heads)
        else:
            head_begin, head_end = row_head, row_head + 1

        last = min(row + diagonal + 1, col_count)  # columns that the row sees
        end, inner_end = min(first + SUB_GROUP + diagonal, col_count), min(first + diagonal + 1, col_count)
        edge = max(inner_end // columns, 0) * columns  # where the columns end that all rows see, in whole steps

        # numba puts the code of this function where it is called; constants for the last two leave nothing to hide
        def step(total_a, total_b, h, start, available, visible):
            head, col_head = (h, h) if into_keys else (row_head, divide(row_head + sizes.head_shift, sizes.group))
            place_a = element(cols_a_at, b, col_head, start)
            place_b = element(cols_b_at, b, col_head, start)
            # `still` is 0, but the compiler does not know: it would load the panels once, before the loop, and spill
            rows_a = rows_start + start * still
            query = min(start + lane, col_count - 1) if into_keys else min(row, row_count - 1)
            of_lse = lse[element(lse_at, b, head, query)] * log2e
            of_lse = infinity if of_lse == -infinity else of_lse  # a query that sees nothing has no weights
            p = weigh(dot(rows, rows_a, cols_a, place_a, cols_a_at.seq, available), to_log2, of_lse, visible)
            if with_a:
                of_delta = delta[element(delta_at, b, head, query)]
                dp = dot(rows, rows_a + panel, cols_b, place_b, cols_b_at.seq, available)
                ds = differentiate(p, dp, of_delta, visible)
                total_a = accumulate(total_a, ds, cols_a, place_a, cols_a_at.seq, available, visible)
            if with_b:
                total_b = accumulate(total_b, p, cols_b, place_b, cols_b_at.seq, available, visible)
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
                store(grad_a, element(grad_a_at, b, row_head, row), total_a, scale)
            if with_b:
                store(grad_b, element(grad_b_at, b, row_head, row), total_b, one)

    return backward_registers
