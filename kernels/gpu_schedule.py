"""The schedule for registers of Intel GPUs: launch flash_forward_gpu.py and flash_backward_gpu.py."""

from __future__ import annotations

from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import flash_backward_gpu, flash_forward_gpu
from .arguments import Strides, strides_by_head, strides_of
from .flash_forward_gpu import CONSTANTS, GPU_TILES, SUB_GROUP
from .launch import launch, offset_and_strides, upload
from .launch_arguments import DTYPES, option_arguments, sizes_of, spans_of_keys
from .panel_copy import Panel
from .relayout import copy_panels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .arguments import Problem
    from .score import OptionNumbers


def serves(device: Any, dtype: str, head_dim: int, *, options: bool, backward: bool) -> bool:
    """Whether there are kernels for this: up to the largest tile for everything, where there are sub-groups of 16."""
    return SUB_GROUP in device.sub_group_sizes and head_dim <= max(GPU_TILES[dtype])


def scratch_of(dtype: str, q_shape: Sequence[int], k_shape: Sequence[int], *, backward: bool) -> dict[str, int]:
    """Numbers of every slot of scratch memory that a call with arrays of these shapes takes, without options."""
    (batch, seq_q, heads, head_dim), (_, seq_k, kv_heads, _) = q_shape, k_shape
    blocks_q, blocks_k = -(-seq_q // SUB_GROUP), -(-seq_k // SUB_GROUP)
    if backward:
        tile_size = flash_backward_gpu.tile_for(dtype, head_dim)
        blocks = max(heads * blocks_q, kv_heads * blocks_k)
        return {"panels of rows": 2 * batch * blocks * SUB_GROUP * tile_size}
    tile_size = flash_forward_gpu.tile_for(dtype, head_dim)
    if GPU_TILES[dtype][tile_size].q_in_registers:
        return {}
    return {"panels of q": batch * heads * blocks_q * SUB_GROUP * tile_size}


def launch_forward(q: Any, k: Any, v: Any, out: Any, lse: Any, problem: Problem, scratch: Callable[..., Any]) -> None:
    """Write `out` and `lse`; see `schedules.Schedule.forward`."""
    if out.size:
        _launch_forward((q, k, v), (out.usm_data, strides_of(out)), lse, problem, scratch)


def _launch_forward(
    inputs: tuple[Any, Any, Any],
    target: tuple[Any, Strides],
    lse: Any,
    problem: Problem,
    scratch: Callable[..., Any],
    *,
    peaks: bool = False,
) -> None:
    """Run the forward kernel; `peaks`: for what lse stands for, which then is read."""
    q, k, v = inputs
    queue, dtype = q.sycl_queue, DTYPES[q.itemsize]
    batch, seq_q, heads, head_dim = q.shape
    tile_size = flash_forward_gpu.tile_for(dtype, head_dim)
    tile = GPU_TILES[dtype][tile_size]
    sizes = sizes_of(q, k, problem, rows=seq_q, tile_rows=SUB_GROUP)
    tables, numbers = option_arguments(q, problem.options)
    spans = q.usm_data if problem.options is None else upload(queue, problem.options.spans)
    constants = _constants((k, v), tile_size, problem, numbers, peaks=peaks)
    q_at = strides_of(q)
    if not tile.q_in_registers:
        ((slot, size),) = scratch_of(dtype, q.shape, k.shape, backward=False).items()
        panels = scratch(slot, (size,))
        _pack_rows([q], panels, tile_size)
        q, q_at = panels, Strides(offset_and_strides(panels)[0], 0, 0, 0)
    launch(
        queue,
        flash_forward_gpu.name(dtype, head_dim),
        [*(x.usm_data for x in (q, k, v)), target[0], lse.usm_data, spans, *tables],
        (
            *(*q_at, *strides_of(k), *strides_of(v), *target[1], *strides_by_head(lse)),
            *(*sizes, 0, problem.scale, 0.0, *numbers),
        ),
        groups=batch * heads * sizes.row_blocks * tile.parts,
        lanes=SUB_GROUP,
        constants=constants,
    )


def _constants(
    columns: Sequence[Any],
    tile_size: int,
    problem: Problem,
    numbers: OptionNumbers,
    *,
    peaks: bool = False,
) -> tuple[tuple[int, int], ...]:
    """The specialisation constants of a launch that reads these arrays column by column."""
    fours = numbers.step == 1 and numbers.first_key % 4 == 0  # whether four keys may share a draw of random numbers
    values = {
        "two_dimensional": columns[0].itemsize == 4
        and has_block_loads(columns[0].sycl_queue.sycl_device)
        and all(map(block_loads_read, columns)),
        "exact": columns[0].shape[3] == tile_size,
        "spans": problem.options is not None,
        "softcap": numbers.softcap != 0,
        "slopes": numbers.use_slopes,
        "bias": numbers.use_bias,
        "padding": numbers.use_padding,
        "dropout": numbers.threshold and (1 if fours else 2),
        "peaks": peaks,
    }
    return tuple((CONSTANTS[name], int(value)) for name, value in values.items() if value)


@cache
def has_block_loads(device: Any) -> bool:
    """Whether the device has two-dimensional block loads: GPUs that no longer have sub-groups of 8, from Max and Arc B on."""
    return device.is_gpu and 8 not in device.sub_group_sizes


def block_loads_read(x: Any) -> bool:
    """Whether such loads can read the rows of every head of an array (batch, seq, heads, head_dim)."""
    batch, seq, head, _ = (x.itemsize * stride for stride in x.strides)
    starts = (x.usm_data._pointer + x.itemsize * x._element_offset, batch, head)
    width, limit = x.itemsize * x.shape[3], 2**24  # of width, height and pitch
    aligned = all(start % 64 == 0 for start in starts) and seq % 16 == 0 and width % 4 == 0
    return aligned and 64 <= width <= seq < limit and x.shape[1] < limit


def launch_backward(
    inputs: tuple[Any, Any, Any, Any],
    lse: Any,
    delta: Any,
    grads: tuple[Any, Any, Any],
    problem: Problem,
    scratch: Callable[..., Any],
) -> None:
    """Write the gradients; see `schedules.Schedule.backward`."""
    dout, q, k, v = inputs
    dq, dk, dv = grads
    queue, dtype, options = q.sycl_queue, DTYPES[q.itemsize], problem.options
    batch, seq_q, heads, head_dim = q.shape
    tile_size = flash_backward_gpu.tile_for(dtype, head_dim)
    tile = flash_backward_gpu.GPU_TILES[dtype][tile_size]
    tables, numbers = option_arguments(q, options)
    spans, lse_memory, lse_at = [q.usm_data] * 2, lse.usm_data, strides_by_head(lse)
    if options is not None:
        spans = [upload(queue, x) for x in (options.spans, spans_of_keys(options.spans, k.shape[1]))]
    if options is not None and lse.size:
        peaks = scratch("peaks and rates", (2 * lse.size,))
        lse_memory, lse_at = peaks.usm_data, Strides(offset_and_strides(peaks)[0], 2 * heads * seq_q, 2, 2 * seq_q)
        _launch_forward((q, k, k), (lse_memory, lse_at), lse, problem, scratch, peaks=True)

    ((slot, size),) = scratch_of(dtype, q.shape, k.shape, backward=True).items()
    of_queries, *of_keys = flash_backward_gpu.kernels_of(tile)
    for into_keys, kernels, rows, columns, targets in (
        (False, [of_queries], (q, dout), (k, v), (dq, dq)),
        (True, of_keys, (k, v), (q, dout), (dk, dv)),
    ):
        if targets[0].size == 0:
            continue
        sizes = sizes_of(q, k, problem, rows=rows[0].shape[1], tile_rows=SUB_GROUP)
        row_tiles = batch * rows[0].shape[2] * sizes.row_blocks
        panels = scratch(slot, (size,))
        _pack_rows(rows, panels, tile_size)
        memories = [x.usm_data for x in (panels, *columns, *targets)]
        for gradients in kernels:
            launch(
                queue,
                flash_backward_gpu.name(gradients, dtype, head_dim),
                [*memories, lse_memory, delta.usm_data, spans[into_keys], spans[0], *tables],
                (
                    *(number for x in (*columns, *targets) for number in strides_of(x)),
                    *(*lse_at, *strides_by_head(delta), offset_and_strides(panels)[0], *sizes, 0, problem.scale, 0.0, *numbers),
                ),
                groups=row_tiles * tile.parts,
                lanes=SUB_GROUP,
                constants=_constants(columns, tile_size, problem, numbers),
            )


def _pack_rows(arrays: Sequence[Any], panels: Any, panel_dim: int) -> None:
    """Copy arrays of one shape into panels (batch, heads, row blocks, arrays, panel_dim, 16 rows), with zeros for rows that
    there are not; what is more than head_dim stays as it is, and the kernels take zeros for it."""
    batch, seq, heads, head_dim = arrays[0].shape
    full, rest = divmod(seq, SUB_GROUP)
    size = SUB_GROUP * panel_dim
    block_size = len(arrays) * size
    head_size = (full + (rest > 0)) * block_size
    zero = SimpleNamespace(usm_data=upload(panels.sycl_queue, np.zeros(1, panels.dtype)))
    # Relayout's rows are row blocks here, its batch are heads: a work-group each. Its slots are the elements of head_dim, its
    # width are their rows: a load takes a number of each of 16 rows, and the next one finds their cache lines in the cache.
    for first, blocks, width in ((0, full, SUB_GROUP), (full, 1, rest)):
        entries = []
        for (number, x), b in product(enumerate(arrays), range(batch)):
            offset, batch_stride, seq_stride, head_stride, dim_stride = offset_and_strides(x)
            start = offset + b * batch_stride + first * SUB_GROUP * seq_stride
            goal = offset_and_strides(panels)[0] + b * heads * head_size + first * block_size + number * size
            to = block_size, head_size, SUB_GROUP, head_dim
            entries.append(
                Panel(number, start, SUB_GROUP * seq_stride, head_stride, dim_stride, seq_stride, 0, goal, *to, width)
            )
            if 0 < width < SUB_GROUP:
                entries.append(Panel(len(arrays), *[0] * 5, 0, goal + width, *to, SUB_GROUP - width))
        copy_panels([*arrays, zero], [panels], entries, rows=blocks, batch=heads)
