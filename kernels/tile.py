"""The tile of the CPU kernels: products and weighted sums of rows in registers, and the score stages of a block. Build time.

The tile, per work-group of `lanes` work-items (one vector of the CPU):

                      block columns
                 ┌──── keys ────┬─ ─ ─          each work-item owns `rows` rows: row r of lane i is
     rows ×      │ rows × keys  │               first + r * lanes + i, so that a load of rows is the only gather
     lanes       │ dot products │               and every column is one broadcast from memory; the same shape
     rows        │ in registers │               serves the weighted sums: rows × dims sums in registers
                 └──────────────┴─ ─ ─

Rows are queries and columns are keys, or `into_keys` the other way round. Private arrays are flat: [rows][…] each. They must
stay in vector layout, one register per element: a loop that sets constants would become a memset and one that copies a memcpy,
which force them out of it. So zeros are `zero`, an argument of the kernel that the compiler does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

# the kernels for any head_dim by the largest one: private arrays have constant sizes
WIDTHS = {"any": 256, "large": 576}
MAX_HEAD_DIM = max(WIDTHS.values())


class Tile(NamedTuple):
    """Sizes of the register and block tiles; all are compile-time constants of a kernel."""

    rows: int  # rows of one work-item
    keys: int  # columns whose dot products are held in registers at once
    dims: int  # head_dim elements whose sums are held in registers at once
    block: int  # columns between two updates of the running maximum
    lanes: int  # work-items of a work-group


def general(head_dim: int) -> str:
    """Which of the kernels for any head_dim serves this one."""
    return next(name for name, width in WIDTHS.items() if head_dim <= width)


def tile_operations(
    tile: Tile, *, width: int, any_head_dim: bool, hides: Callable[..., bool]
) -> tuple[Callable[..., Any], ...]:
    """The operations of a tile for one head_dim, or any up to `width`: ``multiply, accumulate, common_columns``.

    ``hides(weight, column, last)`` says whether a weight belongs to a column that the row does not see.
    """
    from .intrinsics import inlined, mad

    rows, keys, dims, block, lanes = tile

    @inlined
    def multiply(dot, vectors, x, origin, stride, column, columns, size, zero):
        """Dot products of the rows with the next `keys` columns of x; after the last of all columns it is repeated."""
        for t in range(rows * keys):
            dot[t] = zero
        for d in range(size):
            for t in range(keys):
                value = x[origin + min(column + t, columns - 1) * stride + d]
                for r in range(rows):
                    dot[r * keys + t] = mad(vectors[r * width + d], value, dot[r * keys + t])

    @inlined
    def add_seen(part, weight, value, t, j, column, last, zero):
        """Add one weighted number to the sum of every row that sees its column: 0 · nan is nan."""
        for r in range(rows):
            factor = weight[r * block + j]
            seen = zero if hides(factor, column, last[r]) else value
            part[r * dims + t] = mad(factor, seen, part[r * dims + t])

    @inlined
    def add(part, weight, value, t, j):
        for r in range(rows):
            part[r * dims + t] = mad(weight[r * block + j], value, part[r * dims + t])

    @inlined
    def sum_block(part, weight, x, origin, stride, start, count, d, size, edge, last, zero):
        """The weighted sums of `count` columns for the next `dims` elements of head_dim."""
        for t in range(rows * dims):
            part[t] = zero
        for j in range(count):
            source = origin + (start + j) * stride
            for t in range(dims):
                value = x[source + (min(d + t, size - 1) if any_head_dim else d + t)]
                if edge:
                    add_seen(part, weight, value, t, j, start + j, last, zero)
                else:
                    add(part, weight, value, t, j)

    @inlined
    def accumulate(total, rescale, part, weight, x, origin, stride, start, count, size, edge, last, zero):
        """total · rescale + weights · columns. The sums of a block start from zero: the rounding errors of many columns then
        grow with the number of blocks."""
        for d in range(0, size, dims):
            sum_block(part, weight, x, origin, stride, start, count, d, size, edge, last, zero)
            for r in range(rows):
                for t in range(dims):
                    total[r * width + d + t] = mad(total[r * width + d + t], rescale[r], part[r * dims + t])

    @inlined
    def common_columns(spans, first, row_count, column_count):
        """The columns that some row of the group sees, and those that all of its rows see: (begin, end) of both."""
        begin, end, inner_begin, inner_end = column_count, 0, 0, column_count
        for row in range(first, min(first + rows * lanes, row_count)):
            begin, inner_begin = min(begin, spans[3 * row]), max(inner_begin, spans[3 * row])
            end, inner_end = max(end, spans[3 * row + 1]), min(inner_end, spans[3 * row + 1])
        # one draw of random numbers serves four keys; see `draw`
        return begin - begin % 4, end, inner_begin, inner_end

    return multiply, accumulate, common_columns


def softmax_operations(tile: Tile, dtype: str, *, both_ends: bool, marks: bool) -> tuple[Callable[..., Any], ...]:
    """The online softmax of a block: ``hide, softmax``.

    `both_ends`: rows have a first column, too. `marks`: what is hidden gets a weight of -1, which no other weight has.
    """
    from .intrinsics import exp, inlined, mad
    from .score import stages

    rows, _, _, block, _ = tile
    real = np.dtype(dtype).type
    minus_infinity, one = real(-np.inf), real(1)
    in_span = stages(dtype).in_span

    @inlined
    def hide(score, highest, maximum, start, earliest, last):
        """Give what is outside of the spans a score of -inf, and find the highest scores again."""
        for r in range(rows):
            highest[r] = maximum[r]
            for j in range(block):
                first = earliest[r] if both_ends else start
                score[r * block + j] = in_span(score[r * block + j], start + j, first, last[r])
                highest[r] = max(highest[r], score[r * block + j])

    @inlined
    def softmax(score, normaliser, maximum, highest, shift, rescale, block_sum, edge, zero):
        """Make weights of the scores, and bring the running numbers to the new maximum."""
        for r in range(rows):
            # a row that has seen no key yet has maximum -inf, and -inf - -inf would be nan
            shift[r] = highest[r] if highest[r] > minus_infinity else zero
            rescale[r] = exp(maximum[r] - shift[r])
            maximum[r] = highest[r]
            block_sum[r] = zero
        for j in range(block):
            for r in range(rows):
                weight = exp(score[r * block + j] - shift[r])
                block_sum[r] += weight
                hidden = marks and edge and score[r * block + j] == minus_infinity
                score[r * block + j] = -one if hidden else weight
        for r in range(rows):
            normaliser[r] = mad(normaliser[r], rescale[r], block_sum[r])

    return hide, softmax


def option_operations(tile: Tile, dtype: str, *, into_keys: bool) -> tuple[Callable[..., Any], ...]:
    """The stages of score.py for the scores of a block: ``change, change_and_differentiate, may_change, may_hide, draw``.

    `rows_at` holds the number of every row, `centre` the key on its diagonal, or `into_keys` that of every column lies in the
    third column of `centres`.
    """
    from .intrinsics import inlined
    from .score import stages

    rows, _, _, block, _ = tile
    stage = stages(dtype)
    real = np.dtype(dtype).type
    none, one = real(0), real(1)
    capped, cap_derivative, sloped, biased, padded, philox, kept = (
        getattr(stage, name) for name in ("capped", "cap_derivative", "sloped", "biased", "padded", "philox", "kept")
    )

    @inlined
    def cap(score, options):
        for t in range(rows * block):
            score[t] = capped(score[t], options.softcap, options.per_softcap)

    @inlined
    def differentiate_cap(derivative, score, options):
        """Fill in the derivatives of the capped scores."""
        for t in range(rows * block):
            derivative[t] = cap_derivative(score[t], options.per_softcap)

    @inlined
    def add_slopes(score, slope, rows_at, centre, centres, options, start, columns):
        for j in range(block):
            column = min(start + j, columns - 1)
            for r in range(rows):
                diagonal, key = (centres[3 * column + 2], rows_at[r]) if into_keys else (centre[r], column)
                distance = diagonal - options.first_key - options.step * key
                score[r * block + j] = sloped(score[r * block + j], slope, distance)

    @inlined
    def add_bias(score, bias, origin, rows_at, options, start, columns):
        for j in range(block):
            column = min(start + j, columns - 1)
            for r in range(rows):
                query, key = (column, rows_at[r]) if into_keys else (rows_at[r], column)
                value = bias[origin + query * options.bias_seq + key * options.bias_key]
                score[r * block + j] = biased(score[r * block + j], value)

    @inlined
    def hide_padding(score, padding, origin, rows_at, start, columns):
        for j in range(block):
            column = min(start + j, columns - 1)
            for r in range(rows):
                key = rows_at[r] if into_keys else column
                score[r * block + j] = padded(score[r * block + j], padding[origin + key])

    @inlined
    def keep_key(keep, t, word, options):
        keep[t] = kept(one, word, options.threshold, options.keep_scale)

    @inlined
    def keep_of_row(keep, r, row, key, head, b, options):
        """From a key on whose number is a multiple of 4: four neighbouring keys share a draw."""
        for j in range(0, block, 4):
            w0, w1, w2, w3 = philox((key + j) >> 2, row, head, b, options.seed)
            t = r * block + j
            keep_key(keep, t, w0, options)
            keep_key(keep, t + 1, w1, options)
            keep_key(keep, t + 2, w2, options)
            keep_key(keep, t + 3, w3, options)

    @inlined
    def keep_of_pairs(keep, r, row, start, head, b, options):
        """The same draws, one for each pair of query and key. No % or //: lanes would differ in the branch for a divisor of 0,
        and the kernel for keys would take ten times as long."""
        for j in range(block):
            query, key = (start + j, row) if into_keys else (row, start + j)
            number = options.first_key + options.step * key
            w0, w1, w2, w3 = philox(number >> 2, options.first_row + options.step * query, head, b, options.seed)
            even, odd = w2 if number & 2 else w0, w3 if number & 2 else w1
            keep_key(keep, r * block + j, odd if number & 1 else even, options)

    @inlined
    def draw(keep, rows_at, start, h, b, options):
        """By what dropout multiplies the weights of the block."""
        head, key = h + options.first_head, options.first_key + start
        together = not into_keys and options.step == 1 and key & 3 == 0
        for r in range(rows):
            if together:
                keep_of_row(keep, r, options.first_row + rows_at[r], key, head, b, options)
            else:
                keep_of_pairs(keep, r, rows_at[r], start, head, b, options)

    @inlined
    def change_capped(score, per_head, bias, padding, rows_at, centre, centres, b, h, start, columns, options):
        """All that changes a score after the soft cap; its derivative is 1."""
        if options.use_slopes != 0:
            slope = per_head[b * options.per_head_batch + 2 * h]
            add_slopes(score, slope, rows_at, centre, centres, options, start, columns)
        if options.use_bias != 0:
            origin = options.bias_offset + b * options.bias_batch + h * options.bias_head
            add_bias(score, bias, origin, rows_at, options, start, columns)
        if options.use_padding != 0:
            hide_padding(score, padding, b * options.padding_batch, rows_at, start, columns)

    @inlined
    def change(score, per_head, bias, padding, rows_at, centre, centres, b, h, start, columns, options):
        """From dot products to scores."""
        if options.softcap > none:
            cap(score, options)
        change_capped(score, per_head, bias, padding, rows_at, centre, centres, b, h, start, columns, options)

    @inlined
    def change_and_differentiate(
        score, derivative, per_head, bias, padding, rows_at, centre, centres, b, h, start, columns, options
    ):
        """The same, and their derivatives by the dot products."""
        for t in range(rows * block):
            derivative[t] = one
        if options.softcap > none:
            cap(score, options)
            differentiate_cap(derivative, score, options)
        change_capped(score, per_head, bias, padding, rows_at, centre, centres, b, h, start, columns, options)

    @inlined
    def may_hide(options):
        """Whether these options may hide a key inside of the spans."""
        return options.use_bias + options.use_padding != 0

    @inlined
    def may_change(options):
        """Whether they change scores in any other way."""
        return options.use_slopes != 0 or options.softcap > none

    return change, change_and_differentiate, may_change, may_hide, draw
