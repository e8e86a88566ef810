"""Attention forward for Intel GPUs: the algorithm of flash_forward.py with another tile, made for registers.

The tile, per sub-group: 16 query rows, one in each lane. There is no local memory and no barrier.

    q      head_dim registers, or for large head_dim read from a panel (head_dim, 16 rows) again in every step
    total  head_dim registers, the running output
    K, V   one row of 16 numbers at a time in one register, read once for the sub-group and broadcast lane by lane

A step takes `keys` keys: their dot products, one update of the running maximum, then their values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arguments import Place, Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ARGUMENTS = (
    *((name, "pointer") for name in ("q", "k", "v", "out", "lse")),
    *((f"{name}_at", Place) for name in ("q", "k", "v", "out", "lse")),
    *(("sizes", Sizes), ("scale", "real"), ("zero", "real")),
)


class Tile(NamedTuple):
    """The compile-time constants of a kernel."""

    keys: int  # keys of one step
    q_in_registers: bool
    key_registers: int  # registers of one key that are read at once


# A lane has 256 registers: q and total fit for head_dim 64, above that only total does.
GPU_TILES = {
    32: Tile(keys=16, q_in_registers=True, key_registers=2),
    64: Tile(keys=16, q_in_registers=True, key_registers=2),
    80: Tile(keys=8, q_in_registers=False, key_registers=1),
    96: Tile(keys=8, q_in_registers=False, key_registers=1),
    128: Tile(keys=8, q_in_registers=False, key_registers=1),
}
SUB_GROUP = 16
# 256 registers are twice the default; the option that asks for them, by backend
BUILD_OPTIONS = {"level_zero": "-ze-opt-large-register-file", "opencl": "-cl-intel-256-GRF-per-thread"}


def name(head_dim: int) -> str:
    """Name of the compiled kernel."""
    return f"flash_forward_gpu_float32_d{head_dim}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for head_dim, tile in GPU_TILES.items():
        yield name(head_dim), {"pointer": "float32", "real": "float32"}, {"head_dim": head_dim, "tile": tile}


def kernel(*, head_dim: int, tile: Tile) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one head_dim and tile."""
    from .intrinsics import element, group_index
    from .subgroup import divide, lane_index, tile_operations

    keys, q_in_registers, key_registers = tile
    fill, load_query, dot, softmax, accumulate, store = tile_operations(head_dim, keys, q_in_registers, key_registers)
    real = np.float32
    minus_infinity, ln2, log2e = real(-np.inf), real(math.log(2)), real(math.log2(math.e))
    panel = SUB_GROUP * head_dim

    def forward_registers(item, no_array, q, k, v, out, lse, q_at, k_at, v_at, out_at, lse_at, sizes, scale, zero):
        block = group_index()  # a work-group is one sub-group
        lane = lane_index()
        pair = divide(block, sizes.row_blocks)  # (batch, head)
        b = divide(pair, sizes.heads)
        h = pair - b * sizes.heads
        kv = divide(h + sizes.head_shift, sizes.group)
        first = (block - pair * sizes.row_blocks) * SUB_GROUP
        row = first + lane
        k_start = element(k_at, b, kv, 0)
        v_start = element(v_at, b, kv, 0)
        to_log2 = scale * log2e  # the hardware has exp2

        if q_in_registers:
            query = load_query(q, element(q_at, b, h, min(row, sizes.seq_q - 1)))
        else:
            query_start = q_at.offset + block * panel
        total = fill(zero)
        maximum = minus_infinity
        normaliser = zero
        last = min(row + sizes.diagonal + 1, sizes.seq_k)  # keys that the row sees
        end = min(first + SUB_GROUP + sizes.diagonal, sizes.seq_k)
        start = 0
        # a `for` loop has an exit before its first turn too, and the values that meet there spill
        while True:
            if start >= end:
                break
            if q_in_registers:
                dots = dot(query, k, k_start + start * k_at.seq, k_at.seq, end - start)
            else:
                # q_at.seq is 0 here, but the compiler does not know: it would load the panel once, before the loop, and spill
                dots = dot(q, query_start + start * q_at.seq, k, k_start + start * k_at.seq, k_at.seq, end - start)
            step = softmax(dots, to_log2, last - start, maximum, normaliser, minus_infinity)
            maximum = step[0]
            normaliser = step[1]
            total = accumulate(total, step, v, v_start + start * v_at.seq, v_at.seq, end - start)
            start += keys

        if row < sizes.seq_q:
            inverse = real(1) / normaliser if normaliser != zero else zero
            store(out, element(out_at, b, h, row), total, inverse)
            of_lse = element(lse_at, b, h, row)
            lse[of_lse] = maximum * ln2 + math.log(normaliser)

    return forward_registers
