"""The kernel that walks over all scores again: for their maximum, or for the gradient of what is added to them.

It finds what the kernels for attention and its gradient do not leave: of every query the largest score and the sum of
exp(score - maximum), or with ds = p (dp - delta) of every query and key, in the words of flash_backward.py, sums of ds over
those of the axes batch, heads, queries and keys over which a bias is broadcast, or of ds times what a slope is multiplied with.

Rows lie in the lanes, one in each; they are queries, or `into_keys` keys. Their numbers come from panels in which the rows of
a head follow each other, [batch][head][head_dim][row], so that a load serves all lanes. Columns are read as they are, and one
number of a column serves all lanes. Every sum has one order. No sub-groups, no local memory: it runs on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arguments import Place, Sizes
from .score import OPTION_ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LANES = 16
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
    *(("cols_a_at", Place), ("cols_b_at", Place), ("sizes", Sizes), ("walk", Walk)),
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
            yield name(dtype, kind), {"pointer": dtype, "real": dtype}, {"dtype": dtype, "kind": kind, "lanes": LANES}


def kernel(*, dtype: str, kind: str, lanes: int) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one dtype and kind."""
    from .intrinsics import element, exp, group_index, inlined, lane_index, mad
    from .score import stages

    stage = stages(dtype)
    changed, in_span, probability, philox, kept = (
        getattr(stage, x) for x in ("changed", "in_span", "probability", "philox", "kept")
    )
    real = np.dtype(dtype).type
    one, minus_infinity = real(1), real(-np.inf)
    differentiates, into_keys = kind != "softmax", kind == "keys"

    @inlined
    def products(rows_a, rows_b, cols_a, cols_b, of_row, of_a, of_b, row_count, size, zero):
        """The dot products of a row and a column."""
        dot = zero
        dp = zero
        for d in range(size):
            dot = mad(rows_a[of_row + d * row_count], cols_a[of_a + d], dot)
            if differentiates:
                dp = mad(rows_b[of_row + d * row_count], cols_b[of_b + d], dp)
        return dot, dp

    @inlined
    def keep_of(query, key, h, b, options):
        """By what dropout multiplies the weight of a pair; see `tile.option_operations`."""
        number = options.first_key + options.step * key
        w0, w1, w2, w3 = philox(number >> 2, options.first_row + options.step * query, h + options.first_head, b, options.seed)
        even, odd = w2 if number & 2 else w0, w3 if number & 2 else w1
        return kept(one, odd if number & 1 else even, options.threshold, options.keep_scale)

    @inlined
    def dropped(dp, query, key, h, b, options):
        """dp after dropout."""
        return dp * keep_of(query, key, h, b, options) if options.threshold > 0 else dp

    def walk_over_scores(
        item, no_array, rows_a, rows_b, cols_a, cols_b, result, of_queries, spans, per_head, bias, padding,
        cols_a_at, cols_b_at, sizes, walk, scale, zero, options,
    ):  # fmt: skip
        if into_keys:
            row_heads, row_count, columns = sizes.kv_heads, sizes.seq_k, sizes.seq_q
        else:
            row_heads, row_count, columns = sizes.heads, sizes.seq_q, sizes.seq_k
        index = group_index()
        lane = lane_index()
        panel = index // sizes.row_blocks  # of the result: (batch, query head), of those that are not added up
        first = (index - panel * sizes.row_blocks) * lanes
        heads_of_result = 1 if walk.sum_heads != 0 else sizes.heads
        b_of_result = panel // heads_of_result
        h_of_result = panel - b_of_result * heads_of_result
        b_begin, b_end = b_of_result, b_of_result + 1
        h_begin, h_end = h_of_result, h_of_result + 1
        if walk.sum_batch != 0:
            b_begin, b_end = 0, walk.batch
        if walk.sum_heads != 0:
            h_begin, h_end = 0, sizes.heads
        row = min(first + lane, row_count - 1)
        earliest, last, centre = spans[0], spans[1], spans[2]
        begin, end = 0, columns
        if not into_keys:
            earliest, last, centre = spans[3 * row], spans[3 * row + 1] - 1, spans[3 * row + 2]
            begin, end = columns, 0
            for other in range(first, min(first + lanes, row_count)):
                begin, end = min(begin, spans[3 * other]), max(end, spans[3 * other + 1])

        sum_of_row = zero
        maximum = minus_infinity + zero
        normaliser = zero
        for column in range(begin, end):
            if into_keys:
                earliest, last, centre = spans[3 * column], spans[3 * column + 1] - 1, spans[3 * column + 2]
                if last < first or earliest >= first + lanes:
                    continue
            query, key = (column, row) if into_keys else (row, column)
            distance = centre - options.first_key - options.step * key
            total = zero
            for b in range(b_begin, b_end):
                for h in range(h_begin, h_end):
                    kv = (h + sizes.head_shift) // sizes.group
                    row_head, col_head = (kv, h) if into_keys else (h, kv)
                    of_row = (b * row_heads + row_head) * sizes.head_dim * row_count + row
                    of_a = element(cols_a_at, b, col_head, column)
                    of_b = element(cols_b_at, b, col_head, column)
                    dot, dp = products(rows_a, rows_b, cols_a, cols_b, of_row, of_a, of_b, row_count, sizes.head_dim, zero)
                    score = changed(dot * scale, per_head, bias, padding, b, h, query, key, distance, options)
                    score = in_span(score, key, earliest, last)
                    if differentiates:
                        number = 3 * ((b * sizes.heads + h) * sizes.seq_q + query)
                        p = probability(score, of_queries[number]) * of_queries[number + 1]
                        dp = dropped(dp, query, key, h, b, options)
                        ds = p * (dp - of_queries[number + 2])
                        # no weight, no gradient, even where dp or delta is nan
                        ds = zero if p == zero else ds
                        total += ds * real(-abs(distance)) if walk.by_slope != 0 else ds
                    else:
                        highest = max(maximum, score)
                        shift = highest if highest > minus_infinity else zero
                        normaliser = mad(normaliser, exp(maximum - shift), exp(score - shift))
                        maximum = highest
            sum_of_row += total
            if differentiates and walk.sum_columns == 0 and first + lane < row_count:
                result[(panel * columns + column) * row_count + row] = total
        if first + lane < row_count:
            if differentiates and walk.sum_columns != 0:
                result[panel * row_count + row] = sum_of_row
            if not differentiates:
                result[2 * panel * row_count + row] = maximum
                result[(2 * panel + 1) * row_count + row] = normaliser

    return walk_over_scores
