"""What the launchers of all schedules pass besides arrays: the sizes of a call, and the tables and numbers of its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import Sizes
from .launch import offset_and_strides, upload
from .score import OptionNumbers, option_numbers, option_tables

if TYPE_CHECKING:
    from .arguments import Problem
    from .score import ScoreOptions


DTYPES = {4: "float32", 8: "float64"}  # by itemsize


def sizes_of(q: Any, k: Any, problem: Problem, *, rows: int, tile_rows: int) -> Sizes:
    """The sizes of a call, of which so many rows are divided into tiles."""
    _, seq_q, heads, head_dim = q.shape
    return Sizes(
        heads=heads,
        kv_heads=k.shape[2],
        group=problem.group,
        head_shift=problem.head_shift,
        seq_q=seq_q,
        seq_k=k.shape[1],
        diagonal=problem.diagonal,
        row_blocks=-(-rows // tile_rows),
        head_dim=head_dim,
    )


def option_arguments(q: Any, options: ScoreOptions | None, dtype: Any = None) -> tuple[list[Any], OptionNumbers]:
    """The tables and numbers of the options, in the dtype of the scores, by default that of q.

    The plain kernels do not look at them.
    """
    if options is None:
        return [q.usm_data] * 3, OptionNumbers()
    queue, heads, bias, dtype = q.sycl_queue, q.shape[2], options.bias, dtype or q.dtype
    per_head, padding = (upload(queue, table.astype(dtype)) for table in option_tables(options, heads))
    bias_at = (0,) * 5 if bias is None else offset_and_strides(bias)
    numbers = option_numbers(options, heads, bias_at, float(np.finfo(dtype).max))
    return [per_head, (q if bias is None else bias).usm_data, padding], numbers


def spans_of_keys(spans: np.ndarray, seq_k: int) -> np.ndarray:
    """For every key the first query that sees it and the end of these queries; (seq_k, 3), int64, the last column unused.

    The first keys and the ends in `spans` never decrease, so the queries of a key follow each other.
    """
    key = np.arange(seq_k)
    first, end = np.searchsorted(spans[:, 1], key, side="right"), np.searchsorted(spans[:, 0], key, side="right")
    return np.stack([first, np.maximum(end, first), key], axis=-1).astype(np.int64).reshape(seq_k, 3)
