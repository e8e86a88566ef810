"""Orders of axes: from the user's to (batch, seq, heads, head_dim) and back. Views only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._device.arrays import tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

Layout = str | tuple[int, ...]  # a name, or which axes are batch, seq, heads and head_dim
LAYOUTS: dict[str, tuple[int, ...]] = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}
PACKED = "thd"  # the rows of all sequences on one axis


def bshd_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape (batch, seq, heads, head_dim) of an array of this shape and layout; packed sequences are one batch."""
    if layout == "bshd":
        return shape
    return (1, *shape) if layout == PACKED else tuple(shape[axis] for axis in axes_of(layout))


def to_bshd(x: Any, layout: Layout) -> Any:
    """A view (batch, seq, heads, head_dim) of a USM array of a layout; packed sequences are one batch."""
    if layout == "bshd":
        return x
    return x[None, ...] if layout == PACKED else permute(x, axes_of(layout))


def from_bshd(x: Any, layout: Layout) -> Any:
    """The inverse of `to_bshd`."""
    if layout == "bshd":
        return x
    return x[0, ...] if layout == PACKED else permute(x, inverse(axes_of(layout)))


def permute(x: Any, axes: tuple[int, ...]) -> Any:
    """A view of a USM array with its axes in this order."""
    return x if axes == (0, 1, 2, 3) else tensor.permute_dims(x, axes)


def lse_to_user(lse: Any, layout: Layout) -> Any:
    """(batch, heads, seq), whatever the order of axes; (heads, total) of packed sequences."""
    return lse[0, ...] if layout == PACKED else lse


def lse_shape(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """The shape of lse for q of this shape and layout; () if that has another number of axes."""
    if len(shape) != (3 if layout == PACKED else 4):
        return ()
    batch, seq, heads, _ = bshd_shape(tuple(shape), layout)
    return (heads, seq) if layout == PACKED else (batch, heads, seq)


def with_width(shape: Sequence[int], width: int, layout: Layout) -> tuple[int, ...]:
    """The shape of an array like one of this shape and layout, but of another head_dim."""
    last = 2 if layout == PACKED else axes_of(layout)[3]
    return (*shape[:last], width, *shape[last + 1 :])


def out_shape(q: Sequence[int], v: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """The shape of out for q and v of these shapes and layout; that of q if these have another number of axes."""
    if not len(q) == len(v) == (3 if layout == PACKED else 4):
        return tuple(q)
    return with_width(q, bshd_shape(tuple(v), layout)[3], layout)


def axes_of(layout: Layout) -> tuple[int, ...]:
    """Which axes of an array of this layout are batch, seq, heads and head_dim; packed sequences have these as they are."""
    return LAYOUTS.get(layout, LAYOUTS["bshd"]) if isinstance(layout, str) else layout


def axes_to_bshd(heads: int, seq: int) -> tuple[int, ...]:
    """The order of axes that makes an array (batch, seq, heads, head_dim), given which axes are the heads and the rows."""
    batch, head_dim = (axis for axis in range(4) if axis not in (heads, seq))
    return batch, seq, heads, head_dim


def inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The order of axes that undoes another."""
    return tuple(axes.index(axis) for axis in range(len(axes)))
