"""Attention forward on one device: softmax(scale * q kᵀ) v by blocks of keys, without the seq_q × seq_k matrix.

For each query row the kernel keeps the running maximum m of its scores, the running sum l of exp(score - m) and the running
output. When a block of keys raises the maximum, it rescales the last two (the online softmax of Milakov and Gimelshein,
arXiv:1805.02867, tiled as in FlashAttention-2 by Dao, arXiv:2307.08691). The tile is that of tile.py, its rows are queries.

Two kernels come of one source. The plain one has a causal mask at most. The one with `options` reads the keys of every query
row from a table of spans, which serves windows and packed sequences alike, and has all stages of score.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import Sizes, Strides
from .score import OPTION_ARGUMENTS
from .tile import WIDTHS, Tile, general

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# 16 lanes are one vector register of AVX-512 and two of AVX2; on a CPU with AVX-512, 8 lanes are not vectorised at all (14
# times slower, measured). `schedules` chooses between the tiles.
TILES = {
    "wide": Tile(rows=2, keys=8, dims=8, block=32, lanes=16),  # 16 sums, for the 32 registers of AVX-512
    "narrow": Tile(rows=2, keys=6, dims=4, block=36, lanes=16),  # 12 sums, for the 16 registers of AVX2
    "short": Tile(rows=1, keys=8, dims=8, block=32, lanes=16),  # wastes less of a short sequence
}
TILES_OF = {"float32": tuple(TILES), "float64": ("short",)}  # for float64 the others are within 10 % of it
OPTIONS_TILE = {"float32": "narrow", "float64": "short"}  # with options: within 5 % of "wide" with AVX-512, too
LARGE_TILE = "short"  # beyond the kernels for any head_dim: others would keep twice the numbers in private arrays

# A constant head_dim lets the compiler unroll the dot products: 1.25 times the speed of the kernel for any head_dim.
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)

ARGUMENTS = (
    *((name, "pointer") for name in ("q", "k", "v", "out", "lse")),
    ("spans", "table"),
    *OPTION_ARGUMENTS[:-1],
    *((f"{name}_at", Strides) for name in ("q", "k", "v", "out", "lse")),
    *(("sizes", Sizes), ("scale", "real"), ("zero", "real")),
    OPTION_ARGUMENTS[-1],
)


def name(dtype: str, head_dim: int, tile: str, *, options: bool = False) -> str:
    """Name of the compiled kernel that serves this dtype and head_dim by this tile."""
    own = head_dim in HEAD_DIMS and not (options and dtype == "float64")
    size = f"d{head_dim}" if own else general(head_dim)
    return f"flash_forward_{dtype}_{size}_{tile}{'_options' * options}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for dtype in TILES_OF:
        tiles, with_options = [(tile, False) for tile in TILES_OF[dtype]], (OPTIONS_TILE[dtype], True)
        sizes = [(x, x, tiles if dtype == "float64" else [*tiles, with_options]) for x in HEAD_DIMS]
        sizes += [(None, WIDTHS["any"], [*tiles, with_options])]
        sizes += [(None, WIDTHS["large"], [(LARGE_TILE, False), (LARGE_TILE, True)])]
        for head_dim, width, tiles_of in sizes:
            for tile, options in tiles_of:
                constants = {"dtype": dtype, "head_dim": head_dim, "width": width, "tile": TILES[tile], "options": options}
                # a head_dim that has no kernel of its own stands for all of them
                given = width if head_dim or width > WIDTHS["any"] else 0
                yield name(dtype, given, tile, options=options), {"pointer": dtype, "real": dtype}, constants


def kernel(*, dtype: str, head_dim: int | None, width: int, tile: Tile, options: bool) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one dtype, head_dim (None: any up to `width`) and tile."""
    from numba_dpex.kernel_api import PrivateArray

    from .intrinsics import element, group_index, inlined, lane_index
    from .tile import option_operations, softmax_operations, tile_operations

    rows, keys, dims, block, lanes = tile
    real = np.dtype(dtype).type
    any_head_dim = head_dim is None
    minus_infinity, one = real(-np.inf), real(1)
    with_options = options
    # private arrays are flat, [rows][…] each, and of constant size
    vectors_size, scores_size, dots_size, sums_size = rows * width, rows * block, rows * keys, rows * dims
    keep_size = scores_size if options else 1

    # A weight of 0 may come of underflow or dropout, and its value counts if it is nan. So what bias, padding and spans hide
    # gets a negative weight.
    hides = inlined((lambda weight, _, __: weight < 0) if options else (lambda _, key, last: key > last))
    multiply, accumulate, common_columns = tile_operations(tile, width=width, any_head_dim=any_head_dim, hides=hides)
    hide, softmax = softmax_operations(tile, dtype, both_ends=options, marks=options)
    change, _, may_change, may_hide, draw = option_operations(tile, dtype, into_keys=False)

    @inlined
    def score_block(score, highest, dot, query, k, origin, stride, start, seq_k, size, zero):
        """Scores of the next `block` keys, and the highest of each row so far."""
        for j in range(0, block, keys):
            multiply(dot, query, k, origin, stride, start + j, seq_k, size, zero)
            for r in range(rows):
                for t in range(keys):
                    score[r * block + j + t] = dot[r * keys + t]
                    highest[r] = max(highest[r], dot[r * keys + t])

    @inlined
    def drop(weight, keep, zero):
        for t in range(scores_size):
            weight[t] = weight[t] if weight[t] < zero else weight[t] * keep[t]

    def forward_tile(
        item, no_array, q, k, v, out, lse, spans, per_head, bias, padding,
        q_at, k_at, v_at, out_at, lse_at, sizes, scale, zero, options,
    ):  # fmt: skip
        size = sizes.head_dim if any_head_dim else width
        index = group_index()
        lane = lane_index()
        panel = index // sizes.row_blocks  # (batch, head)
        # from the last rows to the first: under a causal mask these have the most keys, and should not start last
        first = (sizes.row_blocks - 1 - (index - panel * sizes.row_blocks)) * rows * lanes
        b = panel // sizes.heads
        h = panel - b * sizes.heads
        kv = (h + sizes.head_shift) // sizes.group
        q_start = element(q_at, b, h, 0)
        k_start = element(k_at, b, kv, 0)
        v_start = element(v_at, b, kv, 0)

        query = PrivateArray(vectors_size, real)
        total = PrivateArray(vectors_size, real)
        score = PrivateArray(scores_size, real)  # then the weights
        keep = PrivateArray(keep_size, real)
        dot = PrivateArray(dots_size, real)
        part = PrivateArray(sums_size, real)
        rows_at = PrivateArray(rows, np.int64)
        earliest = PrivateArray(rows, np.int64)  # first key that the row sees
        last = PrivateArray(rows, np.int64)  # last key that the row sees
        centre = PrivateArray(rows, np.int64)  # the key on the diagonal
        maximum = PrivateArray(rows, real)
        highest = PrivateArray(rows, real)
        shift = PrivateArray(rows, real)
        rescale = PrivateArray(rows, real)
        normaliser = PrivateArray(rows, real)
        block_sum = PrivateArray(rows, real)

        for r in range(rows):
            row = min(first + r * lanes + lane, sizes.seq_q - 1)
            rows_at[r] = row
            if with_options:
                earliest[r] = spans[3 * row]
                last[r] = spans[3 * row + 1] - 1
                centre[r] = spans[3 * row + 2]
                # a sink is a key that is seen first and has no value
                maximum[r] = per_head[b * options.per_head_batch + 2 * h + 1] if options.use_sinks != 0 else minus_infinity
                normaliser[r] = one if options.use_sinks != 0 else zero
            else:
                last[r] = min(row + sizes.diagonal, sizes.seq_k - 1)
                maximum[r] = minus_infinity + zero
                normaliser[r] = zero
            source = q_start + row * q_at.seq
            for d in range(size):
                query[r * width + d] = q[source + d] * scale
                total[r * width + d] = zero

        if with_options:
            begin, end, inner_begin, inner_end = common_columns(spans, first, sizes.seq_q, sizes.seq_k)
        else:
            begin, end = 0, min(first + rows * lanes + sizes.diagonal, sizes.seq_k)
            inner_begin, inner_end = 0, min(first + sizes.diagonal + 1, sizes.seq_k)

        for start in range(begin, end, block):
            for r in range(rows):
                highest[r] = maximum[r]
            score_block(score, highest, dot, query, k, k_start, k_at.seq, start, sizes.seq_k, size, zero)
            # the only blocks with a mask: at the diagonal and at the ends of the keys
            edge = start < inner_begin or start + block > inner_end
            changed = edge
            if with_options:
                change(score, per_head, bias, padding, rows_at, centre, spans, b, h, start, sizes.seq_k, options)
                edge = edge or may_hide(options)
                changed = edge or may_change(options)
            if changed:
                hide(score, highest, maximum, start, earliest, last)
            softmax(score, normaliser, maximum, highest, shift, rescale, block_sum, edge, zero)
            if with_options and options.threshold > 0:
                draw(keep, rows_at, start, h, b, options)
                drop(score, keep, zero)
            count = min(block, end - start)
            accumulate(total, rescale, part, score, v, v_start, v_at.seq, start, count, size, edge, last, zero)

        for r in range(rows):
            row = first + r * lanes + lane
            if row < sizes.seq_q:
                # no key seen: zeros and lse = -inf
                inverse = one / normaliser[r] if normaliser[r] != zero else zero
                target = element(out_at, b, h, row)
                for d in range(size):
                    out[target + d] = total[r * width + d] * inverse
                of_lse = element(lse_at, b, h, row)
                lse[of_lse] = maximum[r] + math.log(normaliser[r])

    return forward_tile
