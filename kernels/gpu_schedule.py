"""The schedule for registers of Intel GPUs: launch flash_forward_gpu.py and flash_backward_gpu.py."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import flash_backward_gpu, flash_forward_gpu
from .arguments import Place, place_by_head, place_of
from .flash_backward_gpu import COLUMNS
from .flash_forward_gpu import CONSTANTS, GPU_TILES, SUB_GROUP, tile_for
from .launch import launch, place, upload
from .launch_arguments import option_arguments, sizes_of
from .panel_copy import Panel
from .relayout import relayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .arguments import Problem


def serves(device: Any, dtype: str, head_dim: int, *, options: bool, backward: bool) -> bool:
    """Whether there are kernels for this: forward for everything in float32, backward for a causal mask at most."""
    if dtype != "float32" or SUB_GROUP not in device.sub_group_sizes:
        return False
    return not backward or (head_dim in COLUMNS and not options)


def launch_forward(q: Any, k: Any, v: Any, out: Any, lse: Any, problem: Problem, scratch: Callable[..., Any]) -> None:
    """Write `out` and `lse`; see `schedules.Schedule.forward`."""
    if out.size == 0:
        return
    queue = out.sycl_queue
    batch, seq_q, heads, head_dim = q.shape
    tile_size = tile_for(head_dim)
    tile = GPU_TILES[tile_size]
    sizes = sizes_of(q, k, problem, rows=seq_q, tile_rows=SUB_GROUP)
    tables, numbers = option_arguments(q, problem.options)
    spans = q.usm_data if problem.options is None else upload(queue, problem.options.spans)
    set_constants = {
        "two_dimensional": _has_block_loads(queue.sycl_device) and all(map(_block_loads_read, (k, v))),
        "exact": head_dim == tile_size,
        "spans": problem.options is not None,
        "softcap": numbers.softcap != 0,
        "slopes": numbers.use_slopes,
        "bias": numbers.use_bias,
        "padding": numbers.use_padding,
        "dropout": numbers.threshold and (1 if numbers.step == 1 and numbers.first_key % 4 == 0 else 2),
    }
    q_place = place_of(q)
    if not tile.q_in_registers:
        panels = scratch("panels of q", (batch * heads * sizes.row_blocks * SUB_GROUP * tile_size,))
        _pack_rows([q], panels, tile_size)
        q, q_place = panels, Place(place(panels)[0], 0, 0, 0)
    launch(
        queue,
        flash_forward_gpu.name(head_dim),
        [*(x.usm_data for x in (q, k, v, out, lse)), spans, *tables],
        (
            *(*q_place, *place_of(k), *place_of(v), *place_of(out), *place_by_head(lse)),
            *(*sizes, problem.scale, 0.0, *numbers),
        ),
        groups=batch * heads * sizes.row_blocks * tile.parts,
        lanes=SUB_GROUP,
        constants=tuple((CONSTANTS[name], int(value)) for name, value in set_constants.items() if value),
    )


@cache
def _has_block_loads(device: Any) -> bool:
    """Whether the device has two-dimensional block loads: GPUs that no longer have sub-groups of 8, from Max and Arc B on."""
    return device.is_gpu and 8 not in device.sub_group_sizes


def _block_loads_read(x: Any) -> bool:
    """Whether such loads can read the rows of every head of an array (batch, seq, heads, head_dim) of float32."""
    batch, seq, head, _ = (4 * stride for stride in x.strides)
    starts = (x.usm_data._pointer + 4 * x._element_offset, batch, head)
    limit = 2**24  # of width, height and pitch
    aligned = all(start % 64 == 0 for start in starts) and seq % 16 == 0
    return aligned and 4 * x.shape[3] >= 64 and 4 * x.shape[3] <= seq < limit and x.shape[1] < limit


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
    head_dim = q.shape[3]
    of_queries, *of_keys = flash_backward_gpu.kernels_of(head_dim)
    # the kernels for keys count rows and columns from the last one
    pairs = [tuple(x[:, ::-1] for x in pair) for pair in ((k, v), (q, dout), grads[1:])]
    numbers = tuple(x[:, :, ::-1] for x in (lse, delta))
    for kernels, rows, columns, targets, of_rows in (
        ([of_queries], (q, dout), (k, v), (grads[0], grads[0]), (lse, delta)),
        (of_keys, *pairs, numbers),
    ):
        batch, row_count, row_heads, _ = rows[0].shape
        if targets[0].size == 0:
            continue
        row_blocks = -(-row_count // SUB_GROUP)
        panels = scratch("panels of rows", (batch * row_heads * row_blocks * 2 * SUB_GROUP * head_dim,))
        _pack_rows(rows, panels, head_dim)
        scalars = (
            *(number for x in (*columns, *targets) for number in place_of(x)),
            *(number for x in of_rows for number in place_by_head(x)),
            *(place(panels)[0], *sizes_of(q, k, problem, rows=row_count, tile_rows=SUB_GROUP), 0, problem.scale, 0.0),
        )
        for gradients in kernels:
            launch(
                q.sycl_queue,
                flash_backward_gpu.name(gradients, head_dim),
                [x.usm_data for x in (panels, *columns, *targets, *of_rows)],
                scalars,
                groups=batch * row_heads * row_blocks,
                lanes=SUB_GROUP,
            )


def _pack_rows(arrays: Sequence[Any], panels: Any, panel_dim: int) -> None:
    """Copy arrays of one shape into panels (batch, heads, row blocks, arrays, panel_dim, 16 rows), with zeros for rows that
    there are not; what is more than head_dim stays as it is, and the kernels take zeros for it."""
    batch, seq, heads, head_dim = arrays[0].shape
    full, rest = divmod(seq, SUB_GROUP)
    size = SUB_GROUP * panel_dim
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
            if rest:
                zeros = 0, target + full * block_size + rest, SUB_GROUP, heads * head_size, block_size
                entries.append(Panel(len(arrays), 0, 0, 0, 0, 0, *zeros, 1, SUB_GROUP - rest))
    zero = SimpleNamespace(usm_data=upload(panels.sycl_queue, np.zeros(1, panels.dtype)))
    relayout([*arrays, zero], [panels], entries, rows=head_dim, batch=batch)
