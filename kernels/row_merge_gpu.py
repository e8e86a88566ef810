"""The kernel that joins attention over different keys on GPUs: what row_merge.py computes, a sub-group to a row.

There the row is found by divisions of 64 bits, which take a GPU longer than a row of 64 numbers, and a work-group of 16 leaves
half of the lanes idle where the compiler takes 32 for it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .row_merge import ARGUMENTS as OF_ONE_ROW
from .row_merge import DTYPES
from .row_product_gpu import LANES as LANES
from .row_product_gpu import ROWS, SUB_GROUP
from .row_product_gpu import serves as serves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ARGUMENTS = (*OF_ONE_ROW, ("rows", "int64"))


def name(itemsize: int) -> str:
    """Name of the compiled kernel."""
    return f"row_merge_gpu_{DTYPES[itemsize]}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for itemsize, dtype in DTYPES.items():
        options = {"dtype": dtype, "lanes": SUB_GROUP, "group_rows": ROWS}
        yield name(itemsize), {"pointer": dtype, "real": dtype}, options


def kernel(*, dtype: str, lanes: int, group_rows: int) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one dtype."""
    from .intrinsics import element, exp, group_index, mad
    from .subgroup import divide, lane_index, remainder, sub_group_index

    minus_infinity = np.dtype(dtype).type(-np.inf)

    def merge_row(
        item, no_array, out, lse, part, part_lse, merged_lse, out_at, lse_at, part_at, part_lse_at, merged_lse_at,
        seq, heads, head_dim, zero, rows,
    ):  # fmt: skip
        row = group_index() * group_rows + sub_group_index()
        lane = lane_index()
        if row < rows:  # the last work-group may have too many sub-groups
            h = remainder(row, heads)
            of_heads = divide(row, heads)
            i = remainder(of_heads, seq)
            b = divide(of_heads, seq)
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
                to = element(out_at, b, h, i) + lane
                at = element(part_at, b, h, i) + lane
                full = head_dim - head_dim % (4 * lanes)
                # all loads before what waits for them, as many as a thread must have under way to fill the memory's pipe
                for d in range(0, full, 4 * lanes):
                    out_0, part_0 = out[to + d], part[at + d]
                    out_1, part_1 = out[to + d + lanes], part[at + d + lanes]
                    out_2, part_2 = out[to + d + 2 * lanes], part[at + d + 2 * lanes]
                    out_3, part_3 = out[to + d + 3 * lanes], part[at + d + 3 * lanes]
                    out[to + d] = mad(part_0, new_weight, out_0 * old_weight)
                    out[to + d + lanes] = mad(part_1, new_weight, out_1 * old_weight)
                    out[to + d + 2 * lanes] = mad(part_2, new_weight, out_2 * old_weight)
                    out[to + d + 3 * lanes] = mad(part_3, new_weight, out_3 * old_weight)
                for d in range(full, head_dim, lanes):
                    if d + lane < head_dim:
                        out[to + d] = mad(part[at + d], new_weight, out[to + d] * old_weight)
                merged = highest + math.log(total) + zero
            if lane == 0:
                merged_lse[element(merged_lse_at, b, h, i)] = merged

    return merge_row
