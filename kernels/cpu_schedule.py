"""The schedules for CPU vectors: launch flash_forward.py and flash_backward.py by one of their tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import flash_backward, flash_forward
from .arguments import strides_by_head, strides_of
from .flash_forward import LARGE_TILE, OPTIONS_TILE, TILES
from .launch import launch, upload
from .launch_arguments import DTYPES, option_arguments, sizes_of, spans_of_keys
from .tile import WIDTHS

if TYPE_CHECKING:
    from collections.abc import Callable

    from .arguments import Problem


def serves(tile: str, device: Any, dtype: str, head_dim: int, *, options: bool, backward: bool) -> bool:
    """Whether there are kernels with this tile; every head_dim has one."""
    if TILES[tile].lanes > device.max_work_group_size:
        return False
    if head_dim > WIDTHS["any"]:
        return tile == LARGE_TILE
    if options:
        return tile == OPTIONS_TILE[dtype]
    return tile in (flash_backward if backward else flash_forward).TILES_OF[dtype]


def launch_forward(tile: str, q: Any, k: Any, v: Any, out: Any, lse: Any, problem: Problem) -> None:
    """Write `out` and `lse`; see `schedules.Schedule.forward`."""
    if out.size == 0:
        return
    batch, _, heads, head_dim = q.shape
    tile_rows = TILES[tile].rows * TILES[tile].lanes
    sizes = sizes_of(q, k, problem, rows=q.shape[1], tile_rows=tile_rows)
    tables, numbers = option_arguments(q, problem.options)
    spans = q.usm_data if problem.options is None else upload(q.sycl_queue, problem.options.spans)
    launch(
        q.sycl_queue,
        flash_forward.name(DTYPES[q.itemsize], head_dim, tile, options=problem.options is not None),
        [*(x.usm_data for x in (q, k, v, out, lse)), spans, *tables],
        (
            *(*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(out), *strides_by_head(lse)),
            *(*sizes, problem.scale, 0.0, *numbers),
        ),
        groups=batch * heads * sizes.row_blocks,
        lanes=TILES[tile].lanes,
    )


def launch_backward(
    tile: str,
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
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1:3]
    with_options = problem.options is not None
    queue, tile_rows = q.sycl_queue, TILES[tile].rows * TILES[tile].lanes
    tables, numbers = option_arguments(q, problem.options)
    if problem.options is None:
        spans, peaks = [q.usm_data] * 2, lse.usm_data
    else:
        spans = [upload(queue, x) for x in (problem.options.spans, spans_of_keys(problem.options.spans, seq_k))]
        peaks = scratch("peaks and rates", (2 * batch * heads * seq_q,)).usm_data
    for into_keys in (False, True):
        rows_a, rows_b, cols_a, cols_b = (k, v, q, dout) if into_keys else (q, dout, k, v)
        grad_a, grad_b = (dk, dv) if into_keys else (dq, dq)
        if grad_a.size == 0:
            continue
        sizes = sizes_of(q, k, problem, rows=seq_k if into_keys else seq_q, tile_rows=tile_rows)
        arrays = rows_a, rows_b, cols_a, cols_b, grad_a, grad_b
        launch(
            queue,
            flash_backward.name(DTYPES[q.itemsize], head_dim, tile, into_keys=into_keys, options=with_options),
            [*(x.usm_data for x in (*arrays, lse, delta)), peaks, spans[into_keys], spans[0], *tables],
            (
                *(number for x in arrays for number in strides_of(x)),
                *(*strides_by_head(lse), *strides_by_head(delta), *sizes, problem.scale, 0.0, *numbers),
            ),
            groups=batch * (kv_heads if into_keys else heads) * sizes.row_blocks,
            lanes=TILES[tile].lanes,
        )
