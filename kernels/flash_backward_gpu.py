"""Attention backward for Intel GPUs: the algorithm of flash_backward.py with the tile of register_tile.py, made for registers.

A work-group is one sub-group, with 16 rows, one in each lane: queries in the kernel for dq, keys in that for dk and dv.

    rows     two panels (head_dim, 16 rows), read again in every step: of q and dout, or of k and v
    totals   `width` numbers for each gradient; where there are more, sub-groups share them, and each computes p and ds
    columns  of k and v, or of q and dout; 16 numbers of a column at a time in one register, broadcast lane by lane

A step takes `columns` columns: their dot products with both rows, the stages of score.py, p and ds, and their parts of the
totals. Where dk and dv together have no room in 256 registers, each has a kernel of its own, which costs a fifth product.
Specialisation constants leave out the options that a call does not use.

With options, of a query whose lse has lost the number of keys in rounding, flash_forward_gpu.py finds peak and rate first, as
the first walk of flash_backward.py does: p = exp(score - peak) · rate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arguments import Sizes, Strides
from .flash_forward_gpu import BUILD_OPTIONS as BUILD_OPTIONS
from .flash_forward_gpu import CONSTANTS, OPTIONS, SUB_GROUP
from .score import OPTION_ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ARRAYS = ("cols_a", "cols_b", "grad_a", "grad_b", "lse", "delta")
ARGUMENTS = (
    *((name, "pointer") for name in ("rows", *_ARRAYS)),
    *(("spans", "table"), ("centres", "table")),
    *OPTION_ARGUMENTS[:-1],
    *((f"{name}_at", Strides) for name in _ARRAYS),
    *(("rows_offset", "int64"), ("sizes", Sizes), ("still", "int64"), ("scale", "real"), ("zero", "real")),
    OPTION_ARGUMENTS[-1],
)


class Tile(NamedTuple):
    """The compile-time constants of a kernel."""

    columns: int  # of one step
    parts: int  # sub-groups that share a head_dim
    together: bool  # whether the registers hold dk and dv


# By dtype and the largest head_dim that they serve. More columns make less of what is done once for a step, and a longer loop.
# A number of float64 takes two registers.
GPU_TILES = {
    "float32": {
        16: Tile(columns=16, parts=1, together=True),
        32: Tile(columns=16, parts=1, together=True),
        64: Tile(columns=16, parts=1, together=True),
        96: Tile(columns=8, parts=1, together=False),
        128: Tile(columns=16, parts=1, together=False),
        256: Tile(columns=8, parts=2, together=False),
    },
    "float64": {
        16: Tile(columns=4, parts=1, together=True),
        64: Tile(columns=4, parts=1, together=False),
        128: Tile(columns=4, parts=2, together=False),
        256: Tile(columns=4, parts=4, together=False),
    },
}


def tile_for(dtype: str, head_dim: int) -> int:
    """The head_dim of the tile that serves this one."""
    return min(size for size in GPU_TILES[dtype] if size >= head_dim)


def kernels_of(tile: Tile) -> tuple[str, ...]:
    """The gradients that each kernel of a tile computes."""
    return ("dq", "dk_dv") if tile.together else ("dq", "dk", "dv")


def name(gradients: str, dtype: str, head_dim: int) -> str:
    """Name of the compiled kernel."""
    return f"flash_backward_gpu_{gradients}_{dtype}_d{tile_for(dtype, head_dim)}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for dtype, tiles in GPU_TILES.items():
        for head_dim, tile in tiles.items():
            for gradients in kernels_of(tile):
                constants = {"gradients": gradients, "dtype": dtype, "head_dim": head_dim, "tile": tile}
                yield name(gradients, dtype, head_dim), {"pointer": dtype, "real": dtype}, constants


def kernel(*, gradients: str, dtype: str, head_dim: int, tile: Tile) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one of `kernels_of(tile)`."""
    from numba.core import types

    from .intrinsics import element, group_index, mad
    from .register_stages import register_stages
    from .register_tile import each_column, exp2, specialisation, tile_operations
    from .score import stages
    from .subgroup import any_lane, divide, highest_lane, lane_index, lowest_lane

    into_keys = gradients != "dq"
    with_a, with_b = gradients != "dv", gradients in ("dk_dv", "dv")
    columns, parts, _ = tile
    width = head_dim // parts
    real, number = np.dtype(dtype).type, getattr(types, dtype)
    infinity, nothing, one, log2e = real(np.inf), real(0), real(1), real(math.log2(math.e))
    panel = SUB_GROUP * head_dim
    has_spans, has_softcap, has_slopes, has_bias, has_padding, has_dropout = (specialisation(CONSTANTS[x]) for x in OPTIONS)
    of_tile, stage = (
        tile_operations(dtype, head_dim, width, columns, CONSTANTS),
        register_stages(dtype, columns, into_keys=into_keys),
    )
    fill, fill_scores, dot, lowest, accumulate, accumulate_seen, store = (
        *(of_tile.fill, of_tile.fill_scores, of_tile.dot_panel, of_tile.lowest),
        *(of_tile.accumulate, of_tile.accumulate_nonzero, of_tile.store),
    )
    scale_all, cap_all, slope_all, bias_all, pad_all, drop_fours, drop_each = (
        *(stage.scale, stage.cap, stage.slope, stage.bias, stage.pad, stage.drop_fours, stage.drop_each),
    )
    cap_derivative = stages(dtype).cap_derivative

    def weigh_dot(dot, t, lse, scale):
        return exp2(mad(dot, scale, -lse) * log2e)

    def weigh_score(score, t, peak, rate):
        weight = exp2((score - peak) * log2e) * rate  # before the choice: the compiler makes no branch then
        return nothing if score == -infinity else weight  # even if the peak is nan

    def hide_weight(weight, t, first, last):
        return weight if t >= first and t <= last else nothing

    def differentiate_cap(score, t, per_softcap):
        return cap_derivative(score, per_softcap)

    def differentiate(dp, t, delta, p):
        return p * (dp - delta)

    def clear(ds, t, p):
        """No weight, no gradient, even where dp or delta is nan."""
        return nothing if p == nothing else ds

    def multiply(x, t, factor):
        return x * factor

    # of a column, what belongs to a query comes in a register with those of all columns
    scores, across = types.UniTuple(number, columns), int(into_keys)
    weigh_dots = each_column(dtype, columns, weigh_dot, number, number, across=across)
    weigh_scores = each_column(dtype, columns, weigh_score, number, number, across=2 * across)
    hide_all = each_column(dtype, columns, hide_weight, types.int32, types.int32)
    derivatives = each_column(dtype, columns, differentiate_cap, number)
    differentiate_all = each_column(dtype, columns, differentiate, number, scores, across=across)
    clear_all = each_column(dtype, columns, clear, scores)
    multiply_all = each_column(dtype, columns, multiply, scores)

    def backward_registers(
        item, no_array, rows, cols_a, cols_b, grad_a, grad_b, lse, delta, spans, centres, per_head, bias, padding,
        cols_a_at, cols_b_at, grad_a_at, grad_b_at, lse_at, delta_at, rows_offset, sizes, still, scale, zero, options,
    ):  # fmt: skip
        if into_keys:
            row_heads, row_count, col_count = sizes.kv_heads, sizes.seq_k, sizes.seq_q
        else:
            row_heads, row_count, col_count = sizes.heads, sizes.seq_q, sizes.seq_k
        index = group_index()  # a work-group is one sub-group
        lane = lane_index()
        tile_number = divide(index, parts)
        part = index - tile_number * parts
        pair = divide(tile_number, sizes.row_blocks)  # (batch, head of the rows)
        turn = tile_number - pair * sizes.row_blocks
        # the rows with the most columns under a causal mask first: the last queries, the first keys
        block = turn if into_keys else sizes.row_blocks - 1 - turn
        b = divide(pair, row_heads)
        row_head = pair - b * row_heads
        row = block * SUB_GROUP + lane
        mine = min(row, row_count - 1)
        size = sizes.head_dim - part * width
        rows_start = rows_offset + (pair * sizes.row_blocks + block) * 2 * panel
        if into_keys:
            # the query heads of this rank that read this kv head
            head_begin = max(row_head * sizes.group - sizes.head_shift, 0)
            head_end = min((row_head + 1) * sizes.group - sizes.head_shift, sizes.heads)
        else:
            head_begin, head_end = row_head, row_head + 1

        centre = 0
        if has_spans() != 0:
            earliest, end_col, centre = spans[3 * mine], spans[3 * mine + 1], spans[3 * mine + 2]
        elif into_keys:
            earliest, end_col = max(mine - sizes.diagonal, 0), col_count
        else:
            earliest, end_col = 0, min(mine + sizes.diagonal + 1, col_count)
        # The columns that meet some row, in whole steps; one draw of random numbers serves four keys. The steps of columns that
        # meet all rows come first, without a mask, then those before and after them.
        begin, end = lowest_lane(earliest) & -4, highest_lane(end_col)
        inner_begin = begin + divide(highest_lane(earliest) - begin + columns - 1, columns) * columns
        inner_end = inner_begin + divide(max(lowest_lane(end_col) - inner_begin, 0), columns) * columns
        first_edge = begin if begin < inner_begin else inner_end

        # numba puts the code of these functions where they are called, and the compiler drops what a constant leaves out
        def columns_of(h):
            """The head of these columns, and where they begin in memory."""
            head, col_head = (h, h) if into_keys else (row_head, divide(row_head + sizes.head_shift, sizes.group))
            return head, element(cols_a_at, b, col_head, 0), element(cols_b_at, b, col_head, 0)

        def weigh(h, start, edge):
            """p, the derivative of the soft cap, and whether an option hides a key of the step inside of the spans."""
            head, a_start, _ = columns_of(h)
            query = min(start + lane, col_count - 1) if into_keys else mine
            of_lse = element(lse_at, b, head, query)
            peak, rate = lse[of_lse], lse[of_lse + 1] if has_spans() != 0 else one
            peak = infinity if peak == -infinity else peak  # a query that sees nothing has no weights
            # `still` is 0, but the compiler does not know: it would load the panels once, before the loop, and spill
            p = dot(rows, rows_start + (start & still), cols_a, a_start, cols_a_at.seq, col_count, sizes.head_dim, start)
            hides, derivative = False, p
            if has_spans() == 0:
                p = weigh_dots(p, (peak, scale))
            else:
                p = scale_all(p, (scale,))
                if has_softcap() != 0:
                    p = cap_all(p, (options.softcap, options.per_softcap))
                    derivative = derivatives(p, (options.per_softcap,))
                if has_slopes() != 0:
                    slope = per_head[b * options.per_head_batch + 2 * head]
                    if into_keys:
                        # both numbers from that of the first key of the tile on, so that they are small
                        from_here = options.first_key + options.step * block * SUB_GROUP
                        diagonal = real(centres[3 * query + 2] - from_here)
                        p = slope_all(p, (diagonal, real(options.step * lane), zero, slope))
                    else:
                        diagonal = real(centre - options.first_key - options.step * start)
                        p = slope_all(p, (diagonal, zero, real(options.step), slope))
                if has_bias() != 0:
                    of_row, of_col = (options.bias_key, options.bias_seq) if into_keys else (options.bias_seq, options.bias_key)
                    origin = options.bias_offset + b * options.bias_batch + head * options.bias_head + mine * of_row
                    p = bias_all(p, bias, origin, of_col, col_count, start, still)
                if has_padding() != 0:
                    key = mine if into_keys else min(start + lane, col_count - 1)
                    p = pad_all(p, (padding[b * options.padding_batch + key],))
                if has_bias() + has_padding() != 0:
                    hides = any_lane(lowest(p) == -infinity)
                p = weigh_scores(p, (peak, rate))
            if edge:
                p = hide_all(p, (np.int32(earliest - start), np.int32(end_col - 1 - start)))
            return p, derivative, hides

        def add(total_a, total_b, h, start, p, derivative, hides):
            head, a_start, b_start = columns_of(h)
            own_a, own_b = a_start + part * width, b_start + part * width  # what is for the totals of this sub-group
            query = min(start + lane, col_count - 1) if into_keys else mine
            keep = p
            if has_dropout() != 0:
                # not `mine`: lanes that share a draw have keys that follow each other
                key_here, query_here = (row, start) if into_keys else (start, row)
                first_key = options.first_key + options.step * key_here
                of_query = options.first_row + options.step * query_here
                draw = (head + options.first_head, b, options.seed, options.threshold, options.keep_scale)
                keep = fill_scores(one)
                if has_dropout() == 1:
                    first, own = (of_query, first_key) if into_keys else (first_key, of_query)
                    keep = drop_fours(keep, first, still, (own, *draw))
                else:
                    key_step, query_step = (0, options.step) if into_keys else (options.step, 0)
                    keep = drop_each(keep, (first_key, key_step, of_query, query_step, *draw))
            if with_a:
                rows_b = rows_start + (start & still) + panel
                ds = dot(rows, rows_b, cols_b, b_start, cols_b_at.seq, col_count, sizes.head_dim, start)
                if has_dropout() != 0:
                    ds = multiply_all(ds, (keep,))
                ds = differentiate_all(ds, (delta[element(delta_at, b, head, query)], p))
                if has_softcap() != 0:
                    ds = multiply_all(ds, (derivative,))
                if hides:
                    ds = clear_all(ds, (p,))
                    total_a = accumulate_seen(total_a, ds, cols_a, own_a, cols_a_at.seq, col_count, size, start)
                else:
                    total_a = accumulate(total_a, ds, cols_a, own_a, cols_a_at.seq, col_count, size, start)
            if with_b:
                if has_dropout() != 0:
                    p = multiply_all(p, (keep,))
                if hides:
                    total_b = accumulate_seen(total_b, p, cols_b, own_b, cols_b_at.seq, col_count, size, start)
                else:
                    total_b = accumulate(total_b, p, cols_b, own_b, cols_b_at.seq, col_count, size, start)
            return total_a, total_b

        total_a, total_b = fill(zero), fill(zero)
        # A `for` loop has an exit before its first turn too, and the values that meet there spill. Heads and columns share a
        # loop, because the CPU runtime, which runs the tests, cannot compile the sub-group operations in nested ones.
        h, start = head_begin if inner_begin < inner_end else head_end, inner_begin
        while True:
            if h >= head_end:
                break
            p, derivative, hides = weigh(h, start, False)
            # the first step in which bias or padding hide a key, and all after it, are left to the other loop
            if hides:
                break
            total_a, total_b = add(total_a, total_b, h, start, p, derivative, False)
            start += columns
            h, start = (h, start) if start < inner_end else (h + 1, inner_begin)
        left_head, left_start = h, start

        def after_first_edge(h):
            """Where the columns go on that the first loop has left."""
            return inner_end if h < left_head else (left_start if h == left_head else inner_begin)

        h = head_begin if first_edge < end else left_head
        start = begin if begin < inner_begin else after_first_edge(h)
        while True:
            if h >= head_end:
                break
            p, derivative, _ = weigh(h, start, True)
            total_a, total_b = add(total_a, total_b, h, start, p, derivative, True)
            start += columns
            start = after_first_edge(h) if start == inner_begin else start
            if start >= end:
                h += 1
                start = begin if begin < inner_begin else after_first_edge(h)

        if row < row_count:
            if with_a:
                store(grad_a, element(grad_a_at, b, row_head, row) + part * width, size, total_a, scale)
            if with_b:
                store(grad_b, element(grad_b_at, b, row_head, row) + part * width, size, total_b, one)

    return backward_registers
