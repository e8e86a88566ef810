"""Gradient of attention on one device, by recomputation from lse: no seq_q × seq_k matrix is kept.

With p = exp(score - lse), delta = sum(dout * out) of every query row, and both factors of a dot product called a and b:

    dv = pᵀ dout        dp = dout vᵀ        ds = p (dp - delta)        dq = scale · ds k        dk = scale · dsᵀ q

(Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2). Two kernels of one source, each without atomic additions, so that every
sum has one order. The one for queries keeps rows of q and dout in its lanes and walks over keys. The one `into_keys` keeps
rows of k and v and walks over the queries of all heads that read its kv head.

              block of columns                           queries            into_keys
           ┌──── keys ────┬─ ─ ─           rows a, b:    q, dout            k, v
    rows × │ a·aᵀ and b·bᵀ │               columns a, b: k, v               q, dout
    lanes  │ in registers  │               sums:         dq += ds k         dk += ds q, dv += p dout
           └──────────────┴─ ─ ─

The tile is that of tile.py, the options are those of score.py. With options, an lse may be so large that it has lost the
logarithm of the number of keys in rounding: all keys of a row may have a bias of -1e9. For such rows the kernel for queries
finds the maximum of the scores and the sum of exp(score - maximum) again, in a walk of its own. It leaves two numbers for
every query, `peak` and `rate`, so that p = exp(score - peak) · rate; of all other rows these are lse and 1.
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import Sizes, Strides
from .flash_forward import LARGE_TILE, OPTIONS_TILE, TILES
from .score import OPTION_ARGUMENTS
from .tile import WIDTHS, Tile, general

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEAD_DIMS = {"float32": (32, 64, 80, 128), "float64": ()}  # with kernels of their own
TILES_OF = {"float32": ("wide", "narrow"), "float64": ("short",)}

_ARRAYS = ("rows_a", "rows_b", "cols_a", "cols_b", "grad_a", "grad_b", "lse", "delta")
ARGUMENTS = (
    *((name, "pointer") for name in (*_ARRAYS, "peaks")),
    *(("spans", "table"), ("centres", "table")),
    *OPTION_ARGUMENTS[:-1],
    *((f"{name}_at", Strides) for name in _ARRAYS),
    *(("sizes", Sizes), ("scale", "real"), ("zero", "real")),
    OPTION_ARGUMENTS[-1],
)


def name(dtype: str, head_dim: int, tile: str, *, into_keys: bool, options: bool) -> str:
    """Name of the compiled kernel that serves this dtype and head_dim by this tile."""
    size = f"d{head_dim}" if head_dim in HEAD_DIMS[dtype] else general(head_dim)
    return f"flash_backward_{'keys' if into_keys else 'queries'}_{dtype}_{size}_{tile}{'_options' * options}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for dtype in TILES_OF:
        tiles = [*((tile, False) for tile in TILES_OF[dtype]), (OPTIONS_TILE[dtype], True)]
        sizes = [(head_dim, head_dim, tiles) for head_dim in HEAD_DIMS[dtype]]
        sizes += [(None, WIDTHS["any"], tiles), (None, WIDTHS["large"], [(LARGE_TILE, False), (LARGE_TILE, True)])]
        for head_dim, width, tiles_of in sizes:
            for into_keys, (tile, options) in product((False, True), tiles_of):
                flags = {"into_keys": into_keys, "options": options}
                constants = {"dtype": dtype, "head_dim": head_dim, "width": width, "tile": TILES[tile], **flags}
                yield name(dtype, width, tile, **flags), {"pointer": dtype, "real": dtype}, constants


def kernel(*, dtype: str, head_dim: int | None, width: int, tile: Tile, into_keys: bool, options: bool) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one dtype, head_dim (None: any up to `width`) and tile."""
    from numba_dpex.kernel_api import PrivateArray

    from .intrinsics import element, group_index, inlined, lane_index
    from .score import stages
    from .tile import option_operations, softmax_operations, tile_operations

    rows, keys, dims, block, lanes = tile
    real = np.dtype(dtype).type
    any_head_dim = head_dim is None
    minus_infinity, one = real(-np.inf), real(1)
    with_options = options
    # the walk that finds peak and rate comes before the one that makes gradients
    finds_peaks = options and not into_keys
    # private arrays are flat, [rows][…] each, and of constant size
    vectors_size, scores_size, dots_size, sums_size = rows * width, rows * block, rows * keys, rows * dims
    total_b_size = vectors_size if into_keys else 1
    factors_size = scores_size if options else 1
    in_span, probability, is_large, share = (
        getattr(stages(dtype), name) for name in ("in_span", "probability", "is_large", "share")
    )

    multiply, accumulate, common_columns = tile_operations(
        tile, width=width, any_head_dim=any_head_dim, hides=inlined(lambda weight, _, __: weight == 0)
    )
    hide, softmax = softmax_operations(tile, dtype, both_ends=True, marks=False)
    _, change_and_differentiate, _, may_hide, draw = option_operations(tile, dtype, into_keys=into_keys)

    @inlined
    def multiply_block(products, dot, vectors, x, origin, stride, start, columns, size, zero):
        """Dot products of the rows with the next `block` columns."""
        for j in range(0, block, keys):
            multiply(dot, vectors, x, origin, stride, start + j, columns, size, zero)
            for r in range(rows):
                for t in range(keys):
                    products[r * block + j + t] = dot[r * keys + t] + zero

    @inlined
    def hide_outside(score, start, earliest, last):
        """What is not seen may be anything, nan too: a score of -inf stands for it."""
        for r in range(rows):
            for j in range(block):
                score[r * block + j] = in_span(score[r * block + j], start + j, earliest[r], last[r])

    @inlined
    def find_keep(keep, rows_at, start, h, b, options):
        for t in range(scores_size):
            keep[t] = one
        if options.threshold > 0:
            draw(keep, rows_at, start, h, b, options)

    @inlined
    def differentiate(p, ds, derivative, keep, t, peak, rate, of_delta):
        """From score and dp to p and ds."""
        if with_options:
            p[t] = probability(p[t], peak) * rate
            ds[t] = p[t] * (ds[t] * keep[t] - of_delta) * derivative[t]
        else:
            p[t] = probability(p[t], peak)
            ds[t] = p[t] * (ds[t] - of_delta)

    @inlined
    def differentiate_keys(p, ds, derivative, keep, start, columns, lse, lse_at, delta, delta_at, peaks, b, h, heads):
        """`differentiate` the block, where the queries are its columns."""
        of_lse = element(lse_at, b, h, 0)
        of_delta = element(delta_at, b, h, 0)
        for j in range(block):
            query = min(start + j, columns - 1)
            number = 2 * ((b * heads + h) * columns + query)
            peak = peaks[number] if with_options else lse[of_lse + query * lse_at.seq]
            rate = peaks[number + 1] if with_options else one
            column_delta = delta[of_delta + query * delta_at.seq]
            for r in range(rows):
                differentiate(p, ds, derivative, keep, r * block + j, peak, rate, column_delta)

    @inlined
    def differentiate_queries(p, ds, derivative, keep, peak, rate, row_delta):
        """The same where they are its rows."""
        for j in range(block):
            for r in range(rows):
                differentiate(p, ds, derivative, keep, r * block + j, peak[r], rate[r], row_delta[r])

    @inlined
    def clear_hidden(p, ds, zero):
        """No weight, no gradient, even where dp or delta is nan."""
        for t in range(scores_size):
            ds[t] = zero if p[t] == zero else ds[t]

    @inlined
    def drop(p, keep, options):
        if options.threshold > 0:
            for t in range(scores_size):
                p[t] *= keep[t]

    @inlined
    def some_is_large(lse, origin, stride, first, row_count):
        """1 if the lse of some row of the group is."""
        some = 0
        for row in range(first, min(first + rows * lanes, row_count)):
            some = 1 if is_large(lse[origin + row * stride]) else some
        return some

    @inlined
    def adopt(peak, rate, maximum, normaliser, zero):
        """Take maximum and sum for lse, for rows that see something. lse may be that of more keys than these.

        Where the sum is nan, lse is, too: it stays, since a rate of nan would reach what is hidden.
        """
        for r in range(rows):
            part = share(maximum[r] + math.log(normaliser[r]), peak[r])
            known = maximum[r] > minus_infinity and normaliser[r] > zero
            peak[r] = maximum[r] if known else peak[r]
            rate[r] = part / normaliser[r] if known else rate[r]

    def backward_tile(
        item, no_array, rows_a, rows_b, cols_a, cols_b, grad_a, grad_b, lse, delta, peaks, spans, centres,
        per_head, bias, padding, rows_a_at, rows_b_at, cols_a_at, cols_b_at, grad_a_at, grad_b_at, lse_at, delta_at,
        sizes, scale, zero, options,
    ):  # fmt: skip
        size = sizes.head_dim if any_head_dim else width
        if into_keys:
            row_heads, row_count, columns = sizes.kv_heads, sizes.seq_k, sizes.seq_q
        else:
            row_heads, row_count, columns = sizes.heads, sizes.seq_q, sizes.seq_k
        index = group_index()
        lane = lane_index()
        panel = index // sizes.row_blocks  # (batch, head of the rows)
        step = index - panel * sizes.row_blocks
        # the rows with the most columns under a causal mask first: the last queries, the first keys
        first = (step if into_keys else sizes.row_blocks - 1 - step) * rows * lanes
        b = panel // row_heads
        row_head = panel - b * row_heads
        if into_keys:
            # the query heads of this rank that read this kv head
            head_begin = max(row_head * sizes.group - sizes.head_shift, 0)
            head_end = min((row_head + 1) * sizes.group - sizes.head_shift, sizes.heads)
        else:
            head_begin, head_end = row_head, row_head + 1
        lse_start = element(lse_at, b, row_head, 0)
        delta_start = element(delta_at, b, row_head, 0)

        vector_a = PrivateArray(vectors_size, real)
        vector_b = PrivateArray(vectors_size, real)
        total_a = PrivateArray(vectors_size, real)
        total_b = PrivateArray(total_b_size, real)
        dot = PrivateArray(dots_size, real)
        part = PrivateArray(sums_size, real)
        p = PrivateArray(scores_size, real)  # the score, then p
        ds = PrivateArray(scores_size, real)  # dp, then ds
        derivative = PrivateArray(factors_size, real)  # of the score by the dot product
        keep = PrivateArray(factors_size, real)
        rows_at = PrivateArray(rows, np.int64)
        earliest = PrivateArray(rows, np.int64)
        last = PrivateArray(rows, np.int64)
        centre = PrivateArray(rows, np.int64)
        peak = PrivateArray(rows, real)
        rate = PrivateArray(rows, real)
        row_delta = PrivateArray(rows, real)
        unchanged = PrivateArray(rows, real)
        maximum = PrivateArray(rows, real)
        highest = PrivateArray(rows, real)
        shift = PrivateArray(rows, real)
        rescale = PrivateArray(rows, real)
        normaliser = PrivateArray(rows, real)
        block_sum = PrivateArray(rows, real)

        for r in range(rows):
            row = min(first + r * lanes + lane, row_count - 1)
            rows_at[r] = row
            unchanged[r] = one
            if with_options:
                earliest[r], last[r] = spans[3 * row], spans[3 * row + 1] - 1
                centre[r] = spans[3 * row + 2]
            elif into_keys:
                earliest[r], last[r] = max(row - sizes.diagonal, 0), columns - 1
            else:
                earliest[r], last[r] = 0, min(row + sizes.diagonal, columns - 1)
            if not into_keys:
                peak[r] = lse[lse_start + row * lse_at.seq]
                rate[r] = one
                row_delta[r] = delta[delta_start + row * delta_at.seq]
            source_a = element(rows_a_at, b, row_head, row)
            source_b = element(rows_b_at, b, row_head, row)
            for d in range(size):
                vector_a[r * width + d] = rows_a[source_a + d] * scale
                vector_b[r * width + d] = rows_b[source_b + d] + zero
                total_a[r * width + d] = zero
                if into_keys:
                    total_b[r * width + d] = zero

        # the columns that meet some row of the group, and those that meet all of its rows
        if with_options:
            begin, end, inner_begin, inner_end = common_columns(spans, first, row_count, columns)
        elif into_keys:
            begin, end = max(first - sizes.diagonal, 0), columns
            inner_begin, inner_end = max(min(first + rows * lanes, row_count) - 1 - sizes.diagonal, 0), columns
        else:
            begin, end = 0, min(first + rows * lanes + sizes.diagonal, columns)
            inner_begin, inner_end = 0, min(first + sizes.diagonal + 1, columns)

        first_walk = 1
        if finds_peaks:
            first_walk = 1 - some_is_large(lse, lse_start, lse_at.seq, first, row_count)
            for r in range(rows):
                maximum[r] = (
                    per_head[b * options.per_head_batch + 2 * row_head + 1] if options.use_sinks != 0 else minus_infinity
                )
                normaliser[r] = one if options.use_sinks != 0 else zero

        for walk in range(first_walk, 2):
            for h in range(head_begin, head_end):
                col_head = h if into_keys else (h + sizes.head_shift) // sizes.group
                a_start = element(cols_a_at, b, col_head, 0)
                b_start = element(cols_b_at, b, col_head, 0)
                for start in range(begin, end, block):
                    count = min(block, end - start)
                    edge = start < inner_begin or start + block > inner_end
                    multiply_block(p, dot, vector_a, cols_a, a_start, cols_a_at.seq, start, columns, size, zero)
                    if with_options:
                        change_and_differentiate(
                            p, derivative, per_head, bias, padding, rows_at, centre, centres, b, h, start, columns, options
                        )
                        edge = edge or may_hide(options)
                    if finds_peaks and walk == 0:
                        hide(p, highest, maximum, start, earliest, last)
                        softmax(p, normaliser, maximum, highest, shift, rescale, block_sum, edge, zero)
                        continue
                    if edge:
                        hide_outside(p, start, earliest, last)
                    if with_options:
                        find_keep(keep, rows_at, start, h, b, options)
                    multiply_block(ds, dot, vector_b, cols_b, b_start, cols_b_at.seq, start, columns, size, zero)
                    if into_keys:
                        differentiate_keys(
                            p, ds, derivative, keep, start, columns, lse, lse_at, delta, delta_at, peaks, b, h, sizes.heads
                        )
                    else:
                        differentiate_queries(p, ds, derivative, keep, peak, rate, row_delta)
                    if edge:
                        clear_hidden(p, ds, zero)
                    accumulate(
                        total_a, unchanged, part, ds, cols_a, a_start, cols_a_at.seq, start, count, size, edge, last, zero
                    )
                    if into_keys and with_options:
                        drop(p, keep, options)
                    if into_keys:
                        accumulate(
                            total_b, unchanged, part, p, cols_b, b_start, cols_b_at.seq, start, count, size, edge, last, zero
                        )
            if finds_peaks and walk == 0:
                adopt(peak, rate, maximum, normaliser, zero)

        for r in range(rows):
            row = first + r * lanes + lane
            if row < row_count:
                target_a = element(grad_a_at, b, row_head, row)
                target_b = element(grad_b_at, b, row_head, row)
                for d in range(size):
                    grad_a[target_a + d] = total_a[r * width + d] * scale
                    if into_keys:
                        grad_b[target_b + d] = total_b[r * width + d]
                if finds_peaks:
                    number = 2 * (panel * row_count + row)
                    peaks[number], peaks[number + 1] = peak[r], rate[r]

    return backward_tile
