"""The kernel for dot products of rows on CPUs: the sum of dout * out over head_dim, which every backward pass needs first.

One work-item takes one row (batch, seq, head); both arrays are read once. GPUs have row_product_gpu.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments import Strides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LANES = ROWS = 16  # of a work-group, a row each
DTYPES = {4: "float32", 8: "float64"}  # by itemsize
ARGUMENTS = (
    *((name, "pointer") for name in ("x", "y", "out")),
    *((f"{name}_at", Strides) for name in ("x", "y", "out")),
    *((name, "int64") for name in ("seq", "heads", "rows", "head_dim")),
    ("zero", "real"),
)


def name(itemsize: int) -> str:
    """Name of the compiled kernel."""
    return f"row_dot_{DTYPES[itemsize]}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for itemsize, dtype in DTYPES.items():
        yield name(itemsize), {"pointer": dtype, "real": dtype}, {"lanes": LANES}


def kernel(*, lanes: int) -> Callable[..., None]:
    """Make the numba-dpex kernel function; the element type is that of its pointers."""
    from .intrinsics import element, group_index, lane_index, mad

    def multiply_rows(item, no_array, x, y, out, x_at, y_at, out_at, seq, heads, rows, head_dim, zero):
        index = group_index() * lanes + lane_index()
        if index < rows:
            h = index % heads
            i = index // heads % seq
            b = index // heads // seq
            x_start = element(x_at, b, h, i)
            y_start = element(y_at, b, h, i)
            total = zero
            for d in range(head_dim):
                value = y[y_start + d]
                # a row of zeros has seen nothing: nothing can change it, whatever x is
                total = mad(x[x_start + d], value, total) if value != zero else total
            out[element(out_at, b, h, i)] = total

    return multiply_rows
