"""The kernel that joins attention over different keys on CPUs: two results of the same queries, weighted by their softmax
denominators.

With w = exp(lse - max(lse_a, lse_b)) of each part, out is the average of the two with the weights w_a and w_b, and lse is the
maximum + log(w_a + w_b) (Dao et al., arXiv:2205.14135, section 3.1). The weights are not exp(lse - merged lse), which would get
the rounding error of the merged lse. The lanes of a work-group share a row (batch, seq, head). out changes in place; lse does
not, because other lanes may still read it. GPUs have row_merge_gpu.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import Strides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LANES = 16  # of a work-group, all for one row
ROWS = 1
DTYPES = {4: "float32", 8: "float64"}  # by itemsize
ARGUMENTS = (
    *((name, "pointer") for name in ("out", "lse", "part", "part_lse", "merged_lse")),
    *((f"{name}_at", Strides) for name in ("out", "lse", "part", "part_lse", "merged_lse")),
    *((name, "int64") for name in ("seq", "heads", "head_dim")),
    ("zero", "real"),
)


def name(itemsize: int) -> str:
    """Name of the compiled kernel."""
    return f"row_merge_{DTYPES[itemsize]}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for itemsize, dtype in DTYPES.items():
        yield name(itemsize), {"pointer": dtype, "real": dtype}, {"dtype": dtype, "lanes": LANES}


def kernel(*, dtype: str, lanes: int) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one dtype."""
    from .intrinsics import element, exp, group_index, lane_index, mad

    minus_infinity = np.dtype(dtype).type(-np.inf)

    def merge_row(
        item, no_array, out, lse, part, part_lse, merged_lse, out_at, lse_at, part_at, part_lse_at, merged_lse_at,
        seq, heads, head_dim, zero,
    ):  # fmt: skip
        row = group_index()
        lane = lane_index()
        h = row % heads
        i = row // heads % seq
        b = row // heads // seq
        old = lse[element(lse_at, b, h, i)]
        new = part_lse[element(part_lse_at, b, h, i)]
        merged = old
        # a part that has seen no key changes no bit, whatever it holds
        if new != minus_infinity:
            highest = old if old > new else new  # nan if new is nan
            old_weight = exp(old - highest)
            new_weight = exp(new - highest)
            total = old_weight + new_weight
            old_weight /= total
            new_weight /= total
            out_start = element(out_at, b, h, i)
            part_start = element(part_at, b, h, i)
            for d in range(lane, head_dim, lanes):
                out[out_start + d] = mad(part[part_start + d], new_weight, out[out_start + d] * old_weight)
            merged = highest + math.log(total) + zero
        if lane == 0:
            merged_lse[element(merged_lse_at, b, h, i)] = merged

    return merge_row
