"""The schedule for registers of Intel GPUs: launch flash_forward_gpu.py and flash_backward_gpu.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import flash_backward_gpu, flash_forward_gpu
from .arguments import Place, Sizes, place_by_head, place_of
from .flash_forward_gpu import GPU_TILES, SUB_GROUP
from .launch import launch, place
from .panel_copy import Panel
from .relayout import relayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .arguments import Problem


def serves(device: Any, dtype: str, head_dim: int, *, options: bool) -> bool:
    """Whether there are kernels for this."""
    return dtype == "float32" and head_dim in GPU_TILES and not options and SUB_GROUP in device.sub_group_sizes


def launch_forward(q: Any, k: Any, v: Any, out: Any, lse: Any, problem: Problem, scratch: Callable[..., Any]) -> None:
    """Write `out` and `lse`; see `schedules.Schedule.forward`."""
    if out.size == 0:
        return
    batch, seq_q, heads, head_dim = q.shape
    row_blocks = -(-seq_q // SUB_GROUP)
    sizes = _sizes(q, k, problem, row_blocks)
    q_place = place_of(q)
    if not GPU_TILES[head_dim].q_in_registers:
        panels = scratch("panels of q", (batch * heads * row_blocks * SUB_GROUP * head_dim,))
        _pack_rows([q], panels)
        q, q_place = panels, Place(place(panels)[0], 0, 0, 0)
    launch(
        out.sycl_queue,
        flash_forward_gpu.name(head_dim),
        [x.usm_data for x in (q, k, v, out, lse)],
        (*q_place, *place_of(k), *place_of(v), *place_of(out), *place_by_head(lse), *sizes, problem.scale, 0.0),
        groups=batch * heads * row_blocks,
        lanes=SUB_GROUP,
    )


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
        _pack_rows(rows, panels)
        scalars = (
            *(number for x in (*columns, *targets) for number in place_of(x)),
            *(number for x in of_rows for number in place_by_head(x)),
            *(place(panels)[0], *_sizes(q, k, problem, row_blocks), 0, problem.scale, 0.0),
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


def _sizes(q: Any, k: Any, problem: Problem, row_blocks: int) -> Sizes:
    _, seq_q, heads, head_dim = q.shape
    return Sizes(
        *(heads, k.shape[2], problem.group, problem.head_shift, seq_q, k.shape[1], problem.diagonal, row_blocks, head_dim)
    )


def _pack_rows(arrays: Sequence[Any], panels: Any) -> None:
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
