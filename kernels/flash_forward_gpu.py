"""Attention forward for Intel GPUs: the algorithm of flash_forward.py with the tile of register_tile.py, made for registers.

A work-group is one sub-group, with 16 query rows, one in each lane. There is no local memory and no barrier.

    q      head_dim registers, or for large head_dim read from a panel (head_dim, 16 rows) again in every step
    total  the running output, `width` numbers; where there are more, sub-groups share a head_dim, and each computes the scores
    K, V   one row of 16 numbers at a time in one register, read once for the sub-group and broadcast lane by lane

A step takes `keys` keys: their dot products, the stages of score.py, one update of the running maximum, then their values. One
module serves all options: what a call does not use, specialisation constants leave out before the driver compiles it.

With the constant `peaks` it computes no output, but for the gradient what lse stands for: see flash_backward.py. `lse` is then
read, and `out` takes peak and rate of every query, next to each other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import flash_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Tile(NamedTuple):
    """The compile-time constants of a kernel."""

    keys: int  # keys of one step
    parts: int  # sub-groups that share a head_dim
    q_in_registers: bool


# By dtype and the largest head_dim that they serve. A lane has 256 registers: q and total fit for head_dim 64, above that only
# total. Half the keys would double the share of what is done once for a step, such as rescaling total. A number of float64
# takes two registers.
GPU_TILES = {
    "float32": {
        16: Tile(keys=16, parts=1, q_in_registers=True),
        32: Tile(keys=16, parts=1, q_in_registers=True),
        64: Tile(keys=16, parts=1, q_in_registers=True),
        80: Tile(keys=16, parts=1, q_in_registers=False),
        96: Tile(keys=16, parts=1, q_in_registers=False),
        128: Tile(keys=16, parts=1, q_in_registers=False),
        192: Tile(keys=16, parts=2, q_in_registers=False),
        256: Tile(keys=16, parts=2, q_in_registers=False),
    },
    "float64": {
        16: Tile(keys=8, parts=1, q_in_registers=True),
        64: Tile(keys=8, parts=1, q_in_registers=False),
        128: Tile(keys=8, parts=2, q_in_registers=False),
        256: Tile(keys=8, parts=4, q_in_registers=False),
    },
}
SUB_GROUP = 16
# those of the kernel for CPUs, and one number before scale, zero and the options
ARGUMENTS = (*flash_forward.ARGUMENTS[:-3], ("still", "int64"), *flash_forward.ARGUMENTS[-3:])
# 256 registers are twice the default; the option that asks for them, by backend
BUILD_OPTIONS = {"level_zero": "-ze-opt-large-register-file", "opencl": "-cl-intel-256-GRF-per-thread"}
# Specialisation constants by number, of the gradient too; see register_tile.py for the first two. dropout is 1 where four keys
# share a draw of random numbers, and 2 where their numbers do not follow each other from a multiple of 4.
OPTIONS = ("spans", "softcap", "slopes", "bias", "padding", "dropout")
CONSTANTS = {name: n for n, name in enumerate(("two_dimensional", "exact", *OPTIONS, "peaks"), start=1)}


def tile_for(dtype: str, head_dim: int) -> int:
    """The head_dim of the tile that serves this one."""
    return min(size for size in GPU_TILES[dtype] if size >= head_dim)


def name(dtype: str, head_dim: int) -> str:
    """Name of the compiled kernel."""
    return f"flash_forward_gpu_{dtype}_d{tile_for(dtype, head_dim)}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for dtype, tiles in GPU_TILES.items():
        for head_dim, tile in tiles.items():
            constants = {"dtype": dtype, "head_dim": head_dim, "tile": tile}
            yield name(dtype, head_dim), {"pointer": dtype, "real": dtype}, constants


def kernel(*, dtype: str, head_dim: int, tile: Tile) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one tile."""
    from .intrinsics import element, group_index
    from .register_stages import register_stages
    from .register_tile import specialisation, tile_operations
    from .score import stages
    from .subgroup import any_lane, divide, highest_lane, lane_index, lowest_lane

    keys, parts, q_in_registers = tile
    width = head_dim // parts
    real = np.dtype(dtype).type
    minus_infinity, one, log2e = real(-np.inf), real(1), real(math.log2(math.e))
    panel = SUB_GROUP * head_dim
    has_spans, has_softcap, has_slopes, has_bias, has_padding, has_dropout = (specialisation(CONSTANTS[x]) for x in OPTIONS)
    has_peaks = specialisation(CONSTANTS["peaks"])
    of_tile, stage = tile_operations(dtype, head_dim, width, keys, CONSTANTS), register_stages(dtype, keys, into_keys=False)
    fill, load_query, dot, lowest, softmax, mark, accumulate, accumulate_seen, store = (
        *(of_tile.fill, of_tile.load_row, of_tile.dot if q_in_registers else of_tile.dot_panel, of_tile.lowest),
        *(of_tile.softmax, of_tile.mark, of_tile.accumulate, of_tile.accumulate_unmarked, of_tile.store),
    )
    scale_all, cap_all, slope_all, bias_all, pad_all, hide_all, drop_fours, drop_each = (
        *(stage.scale, stage.cap, stage.slope, stage.bias, stage.pad, stage.hide, stage.drop_fours, stage.drop_each),
    )
    is_large, share = stages(dtype).is_large, stages(dtype).share

    def forward_registers(
        item, no_array, q, k, v, out, lse, spans, per_head, bias, padding,
        q_at, k_at, v_at, out_at, lse_at, sizes, still, scale, zero, options,
    ):  # fmt: skip
        index = group_index()  # a work-group is one sub-group
        lane = lane_index()
        tile_number = divide(index, parts)
        part = index - tile_number * parts
        pair = divide(tile_number, sizes.row_blocks)  # (batch, head)
        # the rows with the most keys under a causal mask first
        block = sizes.row_blocks - 1 - (tile_number - pair * sizes.row_blocks)
        b = divide(pair, sizes.heads)
        h = pair - b * sizes.heads
        kv = divide(h + sizes.head_shift, sizes.group)
        row = block * SUB_GROUP + lane
        mine = min(row, sizes.seq_q - 1)
        k_start = element(k_at, b, kv, 0)
        v_start = element(v_at, b, kv, 0) + part * width
        v_size = sizes.head_dim - part * width

        earliest, end_row, centre = 0, min(mine + sizes.diagonal + 1, sizes.seq_k), 0
        if has_spans() != 0:
            earliest, end_row, centre = spans[3 * mine], spans[3 * mine + 1], spans[3 * mine + 2]
        # The keys that some row sees, in whole steps; one draw of random numbers serves four keys. The steps of keys that all
        # rows see come first, without a mask, then those before and after them.
        begin, end = lowest_lane(earliest) & -4, highest_lane(end_row)
        inner_begin = begin + divide(highest_lane(earliest) - begin + keys - 1, keys) * keys
        inner_end = inner_begin + divide(max(lowest_lane(end_row) - inner_begin, 0), keys) * keys

        given_lse = element(lse_at, b, h, mine)
        if has_peaks() != 0:
            # no step at all where lse has kept the number of keys
            steps = np.int64(1) if any_lane(is_large(lse[given_lse])) else np.int64(0)
            begin, inner_begin, inner_end, end = begin * steps, inner_begin * steps, inner_end * steps, end * steps

        of_head = b * options.per_head_batch + 2 * h
        bias_start = options.bias_offset + b * options.bias_batch + h * options.bias_head + mine * options.bias_seq
        if q_in_registers:
            query = load_query(q, element(q_at, b, h, mine), sizes.head_dim)
        else:
            query_start = q_at.offset + (pair * sizes.row_blocks + block) * panel
        total = fill(zero)
        # a sink is a key that is seen first and has no value
        maximum = per_head[of_head + 1] if options.use_sinks != 0 else minus_infinity
        normaliser = one if options.use_sinks != 0 else zero

        # numba puts the code of these functions where they are called, and the compiler drops what a constant leaves out
        def scores(start, edge):
            if q_in_registers:
                score = dot(query, k, k_start, k_at.seq, sizes.seq_k, sizes.head_dim, start)
            else:
                # `still` is 0, but the compiler does not know: it would load the panel once, before the loop, and spill
                q_start = query_start + (start & still)
                score = dot(q, q_start, k, k_start, k_at.seq, sizes.seq_k, sizes.head_dim, start)
            score = scale_all(score, (scale,))
            if has_softcap() != 0:
                score = cap_all(score, (options.softcap, options.per_softcap))
            if has_slopes() != 0:
                diagonal = real(centre - options.first_key - options.step * start)
                score = slope_all(score, (diagonal, zero, real(options.step), per_head[of_head]))
            if has_bias() != 0:
                score = bias_all(score, bias, bias_start, options.bias_key, sizes.seq_k, start, still)
            if has_padding() != 0:
                key = min(start + lane, sizes.seq_k - 1)
                score = pad_all(score, (padding[b * options.padding_batch + key],))
            if edge:
                score = hide_all(score, (np.int32(earliest - start), np.int32(end_row - 1 - start)))
            return score

        def add(total, maximum, normaliser, score, start, hides):
            update = softmax(score, maximum, normaliser, minus_infinity, log2e)
            maximum = update[0]
            normaliser = update[1]
            first_key, number = options.first_key + options.step * start, options.first_row + options.step * mine
            if has_dropout() == 1:
                draw = (number, h + options.first_head, b, options.seed, options.threshold, options.keep_scale)
                update = drop_fours(update, first_key, still, draw)
            if has_dropout() == 2:
                pairs = (first_key, options.step, number, 0, h + options.first_head, b, options.seed)
                update = drop_each(update, (*pairs, options.threshold, options.keep_scale))
            if hides:
                update = mark(update, score, minus_infinity)
                total = accumulate_seen(total, update, v, v_start, v_at.seq, sizes.seq_k, v_size, start)
            else:
                total = accumulate(total, update, v, v_start, v_at.seq, sizes.seq_k, v_size, start)
            return total, maximum, normaliser

        # A `for` loop has an exit before its first turn too, and the values that meet there spill.
        start = inner_begin
        while True:
            if start >= inner_end:
                break
            score = scores(start, False)
            # the first step in which bias or padding hide a key, and all after it, are left to the other loop
            if has_bias() + has_padding() != 0 and any_lane(lowest(score) == minus_infinity):
                break
            total, maximum, normaliser = add(total, maximum, normaliser, score, start, False)
            start += keys
        inner_end = start
        start = begin if begin < inner_begin else inner_end
        while True:
            if start >= end:
                break
            total, maximum, normaliser = add(total, maximum, normaliser, scores(start, True), start, True)
            start += keys
            start = inner_end if start == inner_begin else start

        target = element(out_at, b, h, row)
        if has_peaks() != 0:
            # lse may be that of more keys than these; a row that sees none keeps it, and so does one whose sum is nan
            peak, rate = lse[given_lse], one
            if end > 0 and maximum > minus_infinity and normaliser > zero:
                peak, rate = maximum, share(maximum + math.log(normaliser), peak) / normaliser
            if row < sizes.seq_q and part == 0:
                out[target], out[target + 1] = peak, rate
        elif row < sizes.seq_q:
            inverse = one / normaliser if normaliser != zero else zero
            store(out, target + part * width, v_size, total, inverse)
            if part == 0:
                lse[given_lse] = maximum + math.log(normaliser)

    return forward_registers
