"""Attention forward for the matrix engines of Intel GPUs: float16 and bfloat16, with sums, softmax and lse in float32.

The tile is that of matrix_tile.py: a sub-group has 16 queries, one in each lane, and a step takes `keys` keys.

                          16 queries                             16 queries
                        ┌────────────┐                         ┌────────────┐
                head_dim│     Qᵀ     │                    keys │  weights   │ rounded to 16 bits
                        └────────────┘                         └────────────┘
            ┌──────────┐┌────────────┐             ┌──────────┐┌────────────┐
       keys │    K     ││   scores   │    head_dim │    Vᵀ    ││   output   │ total
            └──────────┘└────────────┘             └──────────┘└────────────┘

    Qᵀ       registers, or for large head_dim loaded again in every step
    total    registers, `width` numbers; where there are more, sub-groups share a head_dim, and each computes the scores
    K, Vᵀ    blocks of 32 numbers of `rows` rows from memory, each used once

A step of head_dim 64 and 64 keys is 64 dpas, 512 cycles of the engine, for 16 KB of K and Vᵀ: 262 000 operations, 16 for a
byte, 32 bytes a cycle. The eight engines that share a first cache ask for half of what it gives on Max (512 bytes a cycle), but
for several times what the second one gives. So the sub-groups of a work-group are neighbours that read the same K and Vᵀ. By
machine code the vector pipe has work for 331 of the 512 cycles, and the loads for 248, at the same time: the engine is the
busiest. What keeps it from its peaks, 256 TF/s on a tile of Max and 97 on Arc B580, is that a sub-group waits for its own loads
and softmax; others hide it. Published kernels of this kind reach 40 to 50 and 65 % of them. No speed was measured here.

The output is only rescaled where a maximum has grown by a factor of more than 2**8: a tile that is carried around a loop and
that only the engine reads stays where it is. Up to that, weights may be larger than 1.

In memory V lies as Vᵀ, by value_panels.py: with zeros for what is infinite or nan, because 0 · inf of a key that a row does not
see would be nan. The rows that see it get it at the end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arguments import Sizes, Strides
from .flash_forward_gpu import BUILD_OPTIONS as BUILD_OPTIONS
from .flash_forward_gpu import SUB_GROUP as SUB_GROUP
from .score import OPTION_ARGUMENTS
from .value_panels import KEYS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Tile(NamedTuple):
    """The compile-time constants of a kernel."""

    keys: int  # keys of one step
    parts: int  # sub-groups that share a head_dim
    q_in_registers: bool
    rows: int  # of a block load


# By the largest head_dim that they serve. Of 256 registers total takes `width`, Qᵀ half of head_dim, scores one for each key.
MATRIX_TILES = {
    32: Tile(keys=64, parts=1, q_in_registers=True, rows=32),
    64: Tile(keys=64, parts=1, q_in_registers=True, rows=32),
    96: Tile(keys=32, parts=1, q_in_registers=True, rows=32),
    128: Tile(keys=32, parts=1, q_in_registers=False, rows=16),
    192: Tile(keys=32, parts=2, q_in_registers=False, rows=32),
    256: Tile(keys=32, parts=2, q_in_registers=False, rows=16),
}
SUB_GROUPS = 16  # of a work-group
# Specialisation constants by number; see matrix_tile.py for the first three. `changed`: there is more than products times a
# positive scale, so that scores are made before their maximum is taken. dropout is as in flash_forward_gpu.py;
# bias 2 means that the keys of a row follow each other.
OPTIONS = ("spans", "softcap", "slopes", "bias", "padding", "dropout")
CONSTANTS = {name: n for n, name in enumerate(("hardware", "half", "wide", "changed", *OPTIONS), start=1)}

ARGUMENTS = (
    *((name, "half") for name in ("q", "k", "v", "values", "out")),
    ("infinite", "table"),
    ("lse", "pointer"),
    ("spans", "table"),
    *OPTION_ARGUMENTS[:-1],
    *((f"{name}_at", Strides) for name in ("q", "k", "v", "out", "lse")),
    *(("sizes", Sizes), ("tiles", "int64"), ("columns", "int64"), ("value_keys", "int64"), ("still", "int64")),
    *(("scale", "real"), ("factor", "real"), ("zero", "real")),
    OPTION_ARGUMENTS[-1],
)


def tile_for(head_dim: int) -> int:
    """The head_dim of the tile that serves this one."""
    return min(size for size in MATRIX_TILES if size >= head_dim)


def name(head_dim: int) -> str:
    """Name of the compiled kernel."""
    return f"flash_forward_matrix_d{tile_for(head_dim)}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for head_dim, tile in MATRIX_TILES.items():
        types = {"half": "uint16", "pointer": "float32", "real": "float32"}
        yield name(head_dim), types, {"head_dim": head_dim, "tile": tile}


def kernel(*, head_dim: int, tile: Tile) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one tile."""
    from .intrinsics import element, group_index, mad
    from .matrix_tile import matrix_operations
    from .register_stages import register_stages
    from .register_tile import exp2, quick_tanh, specialisation
    from .subgroup import any_lane, divide, highest_lane, lane_index, lowest_lane, sub_group_index

    keys, parts, q_in_registers, rows = tile
    width = head_dim // parts
    real = np.float32
    minus_infinity, one, ln2, log2e = real(-np.inf), real(1), real(math.log(2)), real(math.log2(math.e))
    growth = real(8)  # of a maximum that is let pass, as a power of two
    has_spans, has_softcap, has_slopes, has_bias, has_padding, has_dropout = (specialisation(CONSTANTS[x]) for x in OPTIONS)
    has_changed = specialisation(CONSTANTS["changed"])
    of_tile, stage = (
        matrix_operations(head_dim, width, keys, rows, CONSTANTS),
        register_stages("float32", keys, into_keys=False, tanh=quick_tanh),
    )
    fill, load_queries, dot, dot_loaded, highest, weigh_products, weigh_scores, sum_of, rounded, rescale = (
        *(of_tile.fill, of_tile.load_queries, of_tile.dot, of_tile.dot_loaded, of_tile.highest, of_tile.weigh_products),
        *(of_tile.weigh_scores, of_tile.sum_of, of_tile.rounded, of_tile.rescale),
    )
    accumulate, store, add_infinite = of_tile.accumulate, of_tile.store, of_tile.add_infinite
    load_across = of_tile.load_across
    scale_all, cap_all, slope_all, bias_all, bias_in_fours, pad_all, hide_all, drop_fours, drop_each = (
        *(stage.scale, stage.cap, stage.slope, stage.bias, stage.bias_in_fours, stage.pad, stage.hide),
        *(stage.drop_fours, stage.drop_each),
    )

    def forward_matrix(
        item, no_array, q, k, v, values, out, infinite, lse, spans, per_head, bias, padding,
        q_at, k_at, v_at, out_at, lse_at, sizes, tiles, columns, value_keys, still, scale, factor, zero, options,
    ):  # fmt: skip
        number = group_index() * SUB_GROUPS + sub_group_index()
        index = min(number, tiles - 1)  # the last work-group may have sub-groups without a tile
        lane = lane_index()
        tile_number = divide(index, parts)
        part = index - tile_number * parts
        pair = divide(tile_number, sizes.row_blocks)  # (batch, head)
        # the rows with the most keys under a causal mask first
        block = sizes.row_blocks - 1 - (tile_number - pair * sizes.row_blocks)
        b = divide(pair, sizes.heads)
        h = pair - b * sizes.heads
        kv = divide(h + sizes.head_shift, sizes.group)
        first = block * SUB_GROUP
        row = first + lane
        mine = min(row, sizes.seq_q - 1)
        q_start, k_start = element(q_at, b, h, 0), element(k_at, b, kv, 0)
        of_kv = b * sizes.kv_heads + kv
        value_start = (of_kv * sizes.head_dim + part * width) * value_keys
        v_size = sizes.head_dim - part * width

        earliest, end_row, centre = 0, min(mine + sizes.diagonal + 1, sizes.seq_k), 0
        if has_spans() != 0:
            earliest, end_row, centre = spans[3 * mine], spans[3 * mine + 1], spans[3 * mine + 2]
        if number >= tiles:
            earliest, end_row = 0, 0
        # The keys that some row sees, in whole steps, as in flash_forward_gpu.py; loads want a multiple of 4, too.
        begin, end = lowest_lane(earliest) & -4, highest_lane(end_row)
        inner_begin = begin + divide(highest_lane(earliest) - begin + keys - 1, keys) * keys
        inner_end = inner_begin + divide(max(lowest_lane(end_row) - inner_begin, 0), keys) * keys
        first_seen, end_seen = np.int32(earliest), np.int32(end_row)  # of half the registers

        of_head = b * options.per_head_batch + 2 * h
        bias_start = options.bias_offset + b * options.bias_batch + h * options.bias_head + mine * options.bias_seq
        padding_start = b * options.padding_batch
        if q_in_registers:
            query = load_queries(q, q_start, q_at.seq, sizes.seq_q, columns, first)
        total = fill(zero)
        # a sink is a key that is seen first and has no value
        maximum = per_head[of_head + 1] if options.use_sinks != 0 else minus_infinity
        normaliser = one if options.use_sinks != 0 else zero
        # maximum is a natural logarithm where scores are made, else one to the base of 2
        to_log2, to_ln = (log2e, one) if has_changed() != 0 else (one, ln2)
        slack = growth / to_log2

        def step(total, maximum, normaliser, start, edge):
            # with options there is no room for them
            if q_in_registers and has_changed() == 0:
                score = dot(query, k, k_start, k_at.seq, sizes.seq_k, columns, start)
            else:
                # still is 0, but the compiler does not know: it would load all of Qᵀ once, before the loop, and spill
                loop_row = first + (start & still)
                score = dot_loaded(
                    q, q_start, q_at.seq, sizes.seq_q, loop_row, k, k_start, k_at.seq, sizes.seq_k, columns, start
                )
            if has_changed() != 0:
                score = scale_all(score, (scale,))
            if has_softcap() != 0:
                score = cap_all(score, (options.softcap, options.per_softcap))
            if has_slopes() != 0:
                diagonal = real(centre - options.first_key - options.step * start)
                score = slope_all(score, (diagonal, zero, real(options.step), per_head[of_head]))
            if has_bias() != 0:
                if has_bias() == 2 and not edge:
                    score = bias_in_fours(score, bias, bias_start, options.bias_key, sizes.seq_k, start, still)
                else:
                    score = bias_all(score, bias, bias_start, options.bias_key, sizes.seq_k, start, still)
            if has_padding() != 0:
                score = pad_all(score, (load_across(padding, padding_start, sizes.seq_k, start),))
            if edge:
                score = hide_all(score, (np.int32(first_seen - start), np.int32(end_seen - 1 - start)))

            top = highest(score)
            top = top if has_changed() != 0 else top * factor
            raised = any_lane(top > maximum + slack)
            risen = max(maximum, top) if raised else maximum
            # -inf - -inf would be nan for a row that has seen no key yet
            shift = risen if risen > minus_infinity else zero
            rescaling = exp2((maximum - shift) * to_log2)
            if has_changed() != 0:
                weights = weigh_scores(score, shift, log2e)
            else:
                weights = weigh_products(score, shift, factor)
            normaliser = mad(normaliser, rescaling, sum_of(weights))
            first_key, own_row = options.first_key + options.step * start, options.first_row + options.step * mine
            # what is kept is scaled at the end: it could become too large for float16 here
            if has_dropout() == 1:
                weights = drop_fours(
                    weights, first_key, still, (own_row, h + options.first_head, b, options.seed, options.threshold, one)
                )
            if has_dropout() == 2:
                pairs = (first_key, options.step, own_row, 0, h + options.first_head, b, options.seed)
                weights = drop_each(weights, (*pairs, options.threshold, one))
            total = rescale(total, rescaling, raised)
            total = accumulate(total, rounded(weights), values, value_start, value_keys, v_size, start)
            return total, risen, normaliser

        # A `for` loop has an exit before its first turn too, and the values that meet there spill.
        start = inner_begin
        while True:
            if start >= inner_end:
                break
            total, maximum, normaliser = step(total, maximum, normaliser, start, False)
            start += keys
        start = begin if begin < inner_begin else inner_end
        while True:
            if start >= end:
                break
            total, maximum, normaliser = step(total, maximum, normaliser, start, True)
            start += keys
            start = inner_end if start == inner_begin else start

        def pass_on(first, target):
            """What is infinite or nan in the values of a block of keys reaches the row, if it sees the key."""
            for key in range(max(first, first_seen), min(first + KEYS, end_seen)):
                sees = True
                if has_bias() != 0:
                    sees = bias[bias_start + key * options.bias_key] > minus_infinity
                if has_padding() != 0:
                    sees = sees and padding[padding_start + key] != zero
                for d in range(min(width, v_size) if sees else 0):
                    add_infinite(out, target + d, v[element(v_at, b, kv, key) + part * width + d])

        if row < sizes.seq_q and number < tiles:
            target = element(out_at, b, h, row) + part * width
            store(out, target, v_size, total, options.keep_scale / normaliser if normaliser != zero else zero)
            if part == 0:
                lse[element(lse_at, b, h, row)] = maximum * to_ln + math.log(normaliser)
            blocks = divide(value_keys, KEYS)
            for block in range(divide(begin, KEYS), divide(max(end, 0) + KEYS - 1, KEYS)):
                if infinite[of_kv * blocks + block] != 0:
                    pass_on(block * KEYS, target)

    return forward_matrix
