"""The kernel for dot products of rows on GPUs: a sub-group takes a row, and its lanes read consecutive numbers.

Where one work-item takes one row (row_product.py), every load of a sub-group touches as many cache lines as it has lanes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .row_product import ARGUMENTS as ARGUMENTS
from .row_product import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUB_GROUP = 16
ROWS = 8  # of a work-group, a sub-group each: enough that the device is not busy with starting work-groups
LANES = ROWS * SUB_GROUP
MAX_ROWS = 2**31 - ROWS  # of all: they are counted in 32 bits


def name(itemsize: int) -> str:
    """Name of the compiled kernel."""
    return f"row_dot_gpu_{DTYPES[itemsize]}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for itemsize, dtype in DTYPES.items():
        yield name(itemsize), {"pointer": dtype, "real": dtype}, {"lanes": SUB_GROUP, "group_rows": ROWS}


def serves(device: Any, rows: int) -> bool:
    """Whether a device gets it for so many rows."""
    return device.is_gpu and SUB_GROUP in device.sub_group_sizes and rows <= MAX_ROWS


def kernel(*, lanes: int, group_rows: int) -> Callable[..., None]:
    """Make the numba-dpex kernel function; the element type is that of its pointers."""
    from .intrinsics import element, group_index, inlined, mad
    from .subgroup import divide, lane_index, remainder, sub_group_index, sum_of_lanes

    @inlined
    def add_product(x, y, total, zero):
        # a row of zeros has seen nothing: nothing can change it, whatever x is
        return mad(x if y != zero else zero, y, total)

    def multiply_rows(item, no_array, x, y, out, x_at, y_at, out_at, seq, heads, rows, head_dim, zero):
        row = group_index() * group_rows + sub_group_index()
        # the last work-group may have too many sub-groups: they do the last row again, and write nothing
        index = min(row, rows - 1)
        h = remainder(index, heads)
        of_heads = divide(index, heads)
        i = remainder(of_heads, seq)
        b = divide(of_heads, seq)
        lane = lane_index()
        x_start = element(x_at, b, h, i) + lane
        y_start = element(y_at, b, h, i) + lane
        total = zero
        full = head_dim - head_dim % (4 * lanes)
        # all loads before what waits for them, as many as a thread must have under way to fill the memory's pipe
        for d in range(0, full, 4 * lanes):
            x_0, y_0 = x[x_start + d], y[y_start + d]
            x_1, y_1 = x[x_start + d + lanes], y[y_start + d + lanes]
            x_2, y_2 = x[x_start + d + 2 * lanes], y[y_start + d + 2 * lanes]
            x_3, y_3 = x[x_start + d + 3 * lanes], y[y_start + d + 3 * lanes]
            total = add_product(x_0, y_0, total, zero)
            total = add_product(x_1, y_1, total, zero)
            total = add_product(x_2, y_2, total, zero)
            total = add_product(x_3, y_3, total, zero)
        for d in range(full, head_dim, lanes):
            if d + lane < head_dim:
                total = add_product(x[x_start + d], y[y_start + d], total, zero)
        total = sum_of_lanes(total)
        if lane == 0 and row < rows:
            out[element(out_at, b, h, i)] = total

    return multiply_rows
