"""The dtypes of attention, in one table: a new dtype is a row here, and the kernels that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class DType(NamedTuple):
    """What the numbers of q, k and v are."""

    name: str  # as NumPy and the user say
    itemsize: int
    compute: str  # the dtype in which attention computes, and gives lse
    stored: str  # the dtype of the USM arrays that hold it: those have no bfloat16


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("float32", 4, "float32", "float32"),
        DType("float64", 8, "float64", "float64"),
        DType("float16", 2, "float32", "float16"),
        DType("bfloat16", 2, "float32", "uint16"),
    )
}
_HELD = {dtype.stored: dtype.name for dtype in DTYPES.values()}
# of dtypes that NumPy does not have, the dtype of an array of its bit patterns, by their name
BITS = {dtype.name: dtype.stored for dtype in DTYPES.values() if dtype.stored != dtype.name}


def held_by(dtype: Any) -> str:
    """The name of the numbers that USM arrays of this dtype hold."""
    return _HELD.get(str(dtype), str(dtype))


def names(dtypes: Sequence[DType] = tuple(DTYPES.values())) -> str:
    """The names, for messages."""
    return ", ".join(dtype.name for dtype in dtypes)
