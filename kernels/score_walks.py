"""Launch score_walk.py: the largest scores of queries, and the gradient of what is added to scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments import strides_of
from .launch import launch, offset_and_strides, upload
from .launch_arguments import option_arguments, sizes_of
from .score_walk import DTYPES, GROUP_ROWS, TILE, Walk, name

if TYPE_CHECKING:
    from .arguments import Problem


def softmax_of_rows(q: Any, k: Any, panels: Any, result: Any, problem: Problem) -> None:
    """Write the largest score of every query, and the sum of exp(score - that), into (batch, heads, 2, seq_q).

    q and k are (batch, seq, heads, head_dim) of the dtype of the computation, the second of them dense in the last axis. The
    panels are q as (batch, heads, head_dim, rows), C-contiguous like the result; rows is seq_q rounded up to a multiple of
    `GROUP_ROWS`. The result is not written if there are no keys. A query without keys has -inf and 0; sinks do not count.
    """
    walk = Walk(batch=q.shape[0], sum_batch=0, sum_heads=0, sum_columns=1, by_slope=0)
    walk_scores("softmax", q, k, (panels, panels), (k, k), result, result, problem, walk)


def walk_scores(
    kind: str,
    q: Any,
    k: Any,
    panels: tuple[Any, Any],
    columns: tuple[Any, Any],
    of_queries: Any,
    result: Any,
    problem: Problem,
    walk: Walk,
) -> None:
    """Write the gradient of what is added to scores, added up over some axes.

    The panels are q and dout, or for the kind "keys" instead of "queries" k and v, as (batch, heads, head_dim, rows),
    C-contiguous, with rows up to a multiple of `GROUP_ROWS`; the columns are the others, (batch, seq, heads, head_dim), dense
    in the last axis. `of_queries` is (batch, heads, seq_q, 3): of every query the peak and the rate with which p = exp(score -
    peak) rate, and delta. The result is (batch, heads, rows), or if columns are not added up (batch, heads, columns, rows), of
    which only the columns that some row sees are written; of an axis that is added up there is one. Both are C-contiguous. The
    kind "softmax" is for `softmax_of_rows`.
    """
    assert problem.options is not None
    if result.size == 0 or columns[0].size == 0:
        return
    rows = panels[0].shape[3]
    sizes = sizes_of(q, k, problem, rows=rows, tile_rows=GROUP_ROWS)
    tables, numbers = option_arguments(q, problem.options)
    if any(offset_and_strides(x)[0] for x in (*panels, of_queries, result)):
        raise RuntimeError("panels and results of a walk over scores must start where their memory does")
    launch(
        q.sycl_queue,
        name(DTYPES[result.itemsize], kind),
        [*(x.usm_data for x in (*panels, *columns, result, of_queries)), upload(q.sycl_queue, problem.options.spans), *tables],
        (*strides_of(columns[0]), *strides_of(columns[1]), *sizes, *walk, problem.scale, 0.0, *numbers),
        groups=result.shape[0] * result.shape[1] * sizes.row_blocks,
        lanes=TILE.lanes,
    )
