"""The kernel that walks over all scores again: for their maximum, or for the gradient of what is added to them.

It finds what the kernels for attention and its gradient do not leave: of every query the largest score and the sum of
exp(score - maximum), or with ds = p (dp - delta) of every query and key, in the words of flash_backward.py, sums of ds over
those of the axes batch, heads, queries and keys over which a bias is broadcast, or of ds times what a slope is multiplied with.

The tile is that of tile.py, without weighted sums. Its rows are queries, or `into_keys` keys. Their numbers come from panels
in which the rows of a head follow each other, [batch][head][head_dim][row], up to a multiple of the rows of a group: a load
serves all lanes, whatever the head_dim. Columns are read as they are, and one number of a column serves all lanes. Every sum
has one order. No sub-groups, no local memory: it runs on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arguments import Sizes, Strides
from .flash_forward import TILES
from .score import OPTION_ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .tile import Tile

TILE = TILES["narrow"]
GROUP_ROWS = TILE.rows * TILE.lanes
DTYPES = {4: "float32", 8: "float64"}  # by itemsize
KINDS = ("softmax", "queries", "keys")  # what is found, or what the rows are for the gradient


class Walk(NamedTuple):
    """What is walked over, and what is added up."""

    batch: int
    sum_batch: int  # 1 if batches are added up
    sum_heads: int
    sum_columns: int
    by_slope: int  # 1 for the derivative by a slope, which is minus a distance


_ARRAYS = ("rows_a", "rows_b", "cols_a", "cols_b", "result", "of_queries")
ARGUMENTS = (
    *((name, "pointer") for name in _ARRAYS),
    ("spans", "table"),
    *OPTION_ARGUMENTS[:-1],
    *(("cols_a_at", Strides), ("cols_b_at", Strides), ("sizes", Sizes), ("walk", Walk)),
    *(("scale", "real"), ("zero", "real")),
    OPTION_ARGUMENTS[-1],
)


def name(dtype: str, kind: str) -> str:
    """Name of the compiled kernel."""
    return f"score_walk_{kind}_{dtype}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for dtype in DTYPES.values():
        for kind in KINDS:
            yield name(dtype, kind), {"pointer": dtype, "real": dtype}, {"dtype": dtype, "kind": kind, "tile": TILE}


def kernel(*, dtype: str, kind: str, tile: Tile) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one dtype and kind."""
    from numba_dpex.kernel_api import PrivateArray

    from .intrinsics import element, group_index, inlined, lane_index, mad
    from .score import stages
    from .tile import option_operations, softmax_operations, tile_operations

    rows, keys, _, block, lanes = tile
    real = np.dtype(dtype).type
    one, minus_infinity = real(1), real(-np.inf)
    differentiates, into_keys = kind != "softmax", kind == "keys"
    # private arrays are flat, [rows][…] each, and of constant size
    scores_size, dots_size = rows * block, rows * keys
    factors_size = scores_size if differentiates else 1
    in_span, probability = (getattr(stages(dtype), x) for x in ("in_span", "probability"))

    *_, common_columns = tile_operations(tile, width=0, any_head_dim=True, hides=lambda *_: False)
    hide, softmax = softmax_operations(tile, dtype, both_ends=True, marks=False)
    change, _, _, may_hide, draw = option_operations(tile, dtype, into_keys=into_keys)

    @inlined
    def multiply(products, dot, panels, of_rows, pitch, x, origin, stride, start, columns, size, scale, zero):
        """Dot products of the rows and the next `block` columns of x, times scale; after the last of all it is repeated."""
        for j in range(0, block, keys):
            for t in range(rows * keys):
                dot[t] = zero
            for d in range(size):
                for t in range(keys):
                    value = x[origin + min(start + j + t, columns - 1) * stride + d]
                    for r in range(rows):
                        dot[r * keys + t] = mad(panels[of_rows + d * pitch + r * lanes], value, dot[r * keys + t])
            for r in range(rows):
                for t in range(keys):
                    products[r * block + j + t] = dot[r * keys + t] * scale

    @inlined
    def rows_of_columns(spans, start, columns, first, row_count):
        """Whether some row of the group is among those of some column of a block, and whether all are among those of all."""
        end_of_rows = min(first + rows * lanes, row_count)
        some, every = 0, 1 if start + block <= columns else 0
        for column in range(start, min(start + block, columns)):
            begin, end = spans[3 * column], spans[3 * column + 1]
            some = 1 if begin < end_of_rows and end > first else some
            every = every if begin <= first and end >= end_of_rows else 0
        return some, every

    @inlined
    def hide_outside(score, spans, rows_at, earliest, last, start, columns):
        """What is not seen may be anything, nan too: a score of -inf stands for it."""
        for j in range(block):
            at = 3 * min(start + j, columns - 1)
            end = spans[at + 1] - 1 if start + j < columns else -1
            for r in range(rows):
                if into_keys:
                    score[r * block + j] = in_span(score[r * block + j], rows_at[r], spans[at], end)
                else:
                    score[r * block + j] = in_span(score[r * block + j], start + j, earliest[r], last[r])

    @inlined
    def find_highest(score, highest, maximum):
        for r in range(rows):
            highest[r] = maximum[r]
            for j in range(block):
                highest[r] = max(highest[r], score[r * block + j])

    @inlined
    def take_up(
        score, maximum, normaliser, highest, shift, rescale, block_sum, start, earliest, last, options, edge, zero
    ):  # fmt: skip
        """The running maximum and sum of the softmax, with one block more."""
        find_highest(score, highest, maximum)
        if edge or may_hide(options):
            hide(score, highest, maximum, start, earliest, last)
        softmax(score, normaliser, maximum, highest, shift, rescale, block_sum, edge, zero)

    @inlined
    def find_keep(keep, rows_at, start, h, b, options):
        """By what dropout multiplies the weights of a block."""
        for t in range(scores_size):
            keep[t] = one
        if options.threshold > 0:
            draw(keep, rows_at, start, h, b, options)

    @inlined
    def differentiate(score, dp, keep, of_queries, origin, rows_at, start, columns, zero):
        """From dp to the gradient of the scores of a block."""
        for j in range(block):
            for r in range(rows):
                t = r * block + j
                number = 3 * (origin + (min(start + j, columns - 1) if into_keys else rows_at[r]))
                p = probability(score[t], of_queries[number]) * of_queries[number + 1]
                ds = p * (dp[t] * keep[t] - of_queries[number + 2])
                # no weight, no gradient, even where dp or delta is nan
                dp[t] = zero if p == zero else ds

    @inlined
    def by_slopes(ds, rows_at, spans, centre, start, columns, options):
        """From the gradient of scores to that of slopes."""
        for j in range(block):
            column = min(start + j, columns - 1)
            for r in range(rows):
                diagonal, key = (spans[3 * column + 2], rows_at[r]) if into_keys else (centre[r], column)
                ds[r * block + j] *= real(-abs(diagonal - options.first_key - options.step * key))

    @inlined
    def add_up(sum_of_row, total, zero):
        """The sums of a block start from zero: the rounding errors of many columns then grow with the number of blocks."""
        for r in range(rows):
            sum_of_block = zero
            for j in range(block):
                sum_of_block += total[r * block + j]
            sum_of_row[r] += sum_of_block

    @inlined
    def write_pairs(result, total, panel, first, lane, row_count, start, columns):
        for j in range(min(block, columns - start)):
            for r in range(rows):
                row = first + r * lanes + lane
                if row < row_count:
                    result[(panel * columns + start + j) * row_count + row] = total[r * block + j]

    def walk_over_scores(
        item, no_array, rows_a, rows_b, cols_a, cols_b, result, of_queries, spans, per_head, bias, padding,
        cols_a_at, cols_b_at, sizes, walk, scale, zero, options,
    ):  # fmt: skip
        size = sizes.head_dim
        if into_keys:
            row_heads, row_count, columns = sizes.kv_heads, sizes.seq_k, sizes.seq_q
        else:
            row_heads, row_count, columns = sizes.heads, sizes.seq_q, sizes.seq_k
        index = group_index()
        lane = lane_index()
        panel = index // sizes.row_blocks  # of the result: (batch, query head), of those that are not added up
        first = (index - panel * sizes.row_blocks) * rows * lanes
        pitch = sizes.row_blocks * rows * lanes
        heads_of_result = 1 if walk.sum_heads != 0 else sizes.heads
        b_of_result = panel // heads_of_result
        h_of_result = panel - b_of_result * heads_of_result
        b_begin, b_end = b_of_result, b_of_result + 1
        h_begin, h_end = h_of_result, h_of_result + 1
        if walk.sum_batch != 0:
            b_begin, b_end = 0, walk.batch
        if walk.sum_heads != 0:
            h_begin, h_end = 0, sizes.heads

        score = PrivateArray(scores_size, real)  # then the weights
        dot = PrivateArray(dots_size, real)
        dp = PrivateArray(factors_size, real)  # then ds
        keep = PrivateArray(factors_size, real)
        total = PrivateArray(factors_size, real)
        rows_at = PrivateArray(rows, np.int64)
        earliest = PrivateArray(rows, np.int64)
        last = PrivateArray(rows, np.int64)
        centre = PrivateArray(rows, np.int64)
        sum_of_row = PrivateArray(rows, real)
        maximum = PrivateArray(rows, real)
        highest = PrivateArray(rows, real)
        shift = PrivateArray(rows, real)
        rescale = PrivateArray(rows, real)
        normaliser = PrivateArray(rows, real)
        block_sum = PrivateArray(rows, real)

        for r in range(rows):
            row = min(first + r * lanes + lane, row_count - 1)
            rows_at[r] = row
            sum_of_row[r], maximum[r], normaliser[r] = zero, minus_infinity + zero, zero
            if not into_keys:
                earliest[r], last[r], centre[r] = spans[3 * row], spans[3 * row + 1] - 1, spans[3 * row + 2]
        if into_keys:
            begin, end, inner_begin, inner_end = 0, columns, 0, columns
        else:
            begin, end, inner_begin, inner_end = common_columns(spans, first, row_count, columns)

        for start in range(begin, end, block):
            edge = start < inner_begin or start + block > inner_end
            if into_keys:
                some, every = rows_of_columns(spans, start, columns, first, row_count)
                edge = every == 0
                if some == 0:
                    continue
            if differentiates:
                for t in range(scores_size):
                    total[t] = zero
            for b in range(b_begin, b_end):
                for h in range(h_begin, h_end):
                    kv = (h + sizes.head_shift) // sizes.group
                    row_head, col_head = (kv, h) if into_keys else (h, kv)
                    of_rows = (b * row_heads + row_head) * size * pitch + first + lane
                    of_a = element(cols_a_at, b, col_head, 0)
                    multiply(score, dot, rows_a, of_rows, pitch, cols_a, of_a, cols_a_at.seq, start, columns, size, scale, zero)
                    change(score, per_head, bias, padding, rows_at, centre, spans, b, h, start, columns, options)
                    if not differentiates:
                        take_up(
                            score, maximum, normaliser, highest, shift, rescale, block_sum, start, earliest, last, options,
                            edge, zero,
                        )  # fmt: skip
                        continue
                    if edge:
                        hide_outside(score, spans, rows_at, earliest, last, start, columns)
                    of_b = element(cols_b_at, b, col_head, 0)
                    multiply(dp, dot, rows_b, of_rows, pitch, cols_b, of_b, cols_b_at.seq, start, columns, size, one, zero)
                    find_keep(keep, rows_at, start, h, b, options)
                    differentiate(
                        score, dp, keep, of_queries, (b * sizes.heads + h) * sizes.seq_q, rows_at, start, columns, zero
                    )
                    if walk.by_slope != 0:
                        by_slopes(dp, rows_at, spans, centre, start, columns, options)
                    for t in range(scores_size):
                        total[t] += dp[t]
            if differentiates and walk.sum_columns != 0:
                add_up(sum_of_row, total, zero)
            elif differentiates:
                write_pairs(result, total, panel, first, lane, row_count, start, columns)

        for r in range(rows):
            row = first + r * lanes + lane
            if row < row_count:
                if differentiates and walk.sum_columns != 0:
                    result[panel * row_count + row] = sum_of_row[r]
                if not differentiates:
                    result[2 * panel * row_count + row] = maximum[r]
                    result[(2 * panel + 1) * row_count + row] = normaliser[r]

    return walk_over_scores
