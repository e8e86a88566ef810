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

from . import flash_forward
from .launch import launch, place
from .relayout import Panel, relayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


ARGUMENTS = flash_forward.POINTERS + flash_forward.SCALARS


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
    from .intrinsics import group_index
    from .subgroup import divide, lane_index, tile_operations

    keys, q_in_registers, key_registers = tile
    fill, load_query, dot, softmax, accumulate, store = tile_operations(head_dim, keys, q_in_registers, key_registers)
    real = np.float32
    minus_infinity, ln2 = real(-np.inf), real(math.log(2))
    panel = SUB_GROUP * head_dim

    def flash_forward(
        item, no_array, q, k, v, out, lse,
        q_offset, q_batch, q_seq, q_head, k_offset, k_batch, k_seq, k_head, v_offset, v_batch, v_seq, v_head,
        out_offset, out_batch, out_seq, out_head, lse_offset, lse_batch, lse_seq, lse_head,
        heads, group, head_shift, seq_q, seq_k, diagonal, row_blocks, runtime_head_dim, scale, zero,
    ):  # fmt: skip
        block = group_index()  # a work-group is one sub-group
        lane = lane_index()
        pair = divide(block, row_blocks)  # (batch, head)
        b = divide(pair, heads)
        h = pair - b * heads
        kv = divide(h + head_shift, group)
        first = (block - pair * row_blocks) * SUB_GROUP
        row = first + lane
        k_start = k_offset + b * k_batch + kv * k_head
        v_start = v_offset + b * v_batch + kv * v_head

        if q_in_registers:
            query = load_query(q, q_offset + b * q_batch + h * q_head + min(row, seq_q - 1) * q_seq)
        else:
            query_start = q_offset + block * panel
        total = fill(zero)
        maximum = minus_infinity
        normaliser = zero
        last = min(row + diagonal + 1, seq_k)  # keys that the row sees
        end = min(first + SUB_GROUP + diagonal, seq_k)
        start = 0
        # a `for` loop has an exit before its first turn too, and the values that meet there spill
        while True:
            if start >= end:
                break
            if q_in_registers:
                dots = dot(query, k, k_start + start * k_seq, k_seq, end - start)
            else:
                # q_seq is 0 here, but the compiler does not know: it would load the panel once, before the loop, and spill
                dots = dot(q, query_start + start * q_seq, k, k_start + start * k_seq, k_seq, end - start)
            step = softmax(dots, scale, last - start, maximum, normaliser, minus_infinity)
            maximum = step[0]
            normaliser = step[1]
            total = accumulate(total, step, v, v_start + start * v_seq, v_seq, end - start)
            start += keys

        if row < seq_q:
            inverse = real(1) / normaliser if normaliser != zero else zero
            store(out, out_offset + b * out_batch + h * out_head + row * out_seq, total, inverse)
            lse[lse_offset + b * lse_batch + h * lse_head + row * lse_seq] = maximum * ln2 + math.log(normaliser)

    return flash_forward


def flash_forward_gpu(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    scratch: Callable[..., Any],
    *,
    scale: float,
    diagonal: int,
    group: int,
    head_shift: int = 0,
) -> None:
    """`flash_forward` by this schedule; `scratch(name, shape)` gives USM memory for the panels of q."""
    batch, seq_q, heads, head_dim = q.shape
    if out.size == 0:
        return
    row_blocks = -(-seq_q // SUB_GROUP)
    if GPU_TILES[head_dim].q_in_registers:
        q_place = place(q)[:4]
    else:
        panels = scratch("panels of q", (batch * heads * row_blocks * SUB_GROUP * head_dim,))
        pack_rows([q], panels)
        q, q_place = panels, (place(panels)[0], 0, 0, 0)
    launch(
        out.sycl_queue,
        name(head_dim),
        [x.usm_data for x in (q, k, v, out, lse)],
        flash_forward.scalars(
            *(q_place, k, v, out, lse),
            **{"scale": scale, "diagonal": diagonal, "group": group, "head_shift": head_shift, "row_blocks": row_blocks},
        ),
        groups=batch * heads * row_blocks,
        lanes=SUB_GROUP,
    )


def pack_rows(arrays: Sequence[Any], panels: Any) -> None:
    """Copy arrays of one shape into panels (batch, heads, row blocks, arrays, head_dim, 16 rows)."""
    batch, seq, heads, head_dim = arrays[0].shape
    full, rest = divmod(seq, SUB_GROUP)
    size = SUB_GROUP * head_dim
    block_size = len(arrays) * size
    head_size = (full + (rest > 0)) * block_size
    entries = []
    for number, x in enumerate(arrays):
        offset, batch_stride, seq_stride, head_stride, dim_stride = place(x)
        for h in range(heads):
            source, target = offset + h * head_stride, h * head_size + number * size
            # relayout's rows are the elements of head_dim here, its slots are row blocks, and its width are their rows
            for first, slots, width in ((0, full, SUB_GROUP), (full, 1, rest)):
                start = source + first * SUB_GROUP * seq_stride
                entries.append(
                    Panel(
                        *(number, start, dim_stride, batch_stride, SUB_GROUP * seq_stride, seq_stride),
                        *(0, target + first * block_size, SUB_GROUP, heads * head_size, block_size),
                        *(slots, width),
                    )
                )
    relayout(arrays, [panels], entries, rows=head_dim, batch=batch)
