"""Attention on one rank: of all rows and heads, or of some heads of a call that is split over ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

from ._call.checks import NAMES, check_inputs, check_layout, device_of
from ._call.definitions import Option, by_value
from ._call.layout import Layout, axes_of, bshd_shape, from_bshd, inverse, lse_to_user, to_bshd
from ._call.options import AttentionOptions, check_options
from ._device.arrays import tensor
from ._device.copies import copy_arrays
from ._device.queue import device_turn
from ._device.trace import stage
from ._device.workspace import empty_like
from ._ranks.partition import HeadMap
from .backends import AttnType, LocalAttention, backend_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._call.checks import Geometry, Names
    from ._call.options import Options
    from ._device.arrays import Array


class LocalOptions(AttentionOptions, total=False):
    """All options of `attention`, and who computes it."""

    attn_type: Annotated[
        LocalAttention,
        Option(
            AttnType.INTEL_SYCL,
            lambda name, attn_type, call: attn_type,  # checked by what knows the backends
            "AttnType, UserAttention or callable",
            "The implementation of the local attention: a member of `AttnType`, what `register_attention` returned, or a "
            "function as it takes one.",
        ),
    ]


def check_attention(
    q: Any,
    k: Any,
    v: Any,
    names: Names = NAMES,
    *,
    layout: Any = "bshd",
    dtype: Any = None,
    return_lse: Any,
    attn_type: Any = AttnType.INTEL_SYCL,
    backward: bool = False,
    more: Sequence[str] = (),
    **options: Any,
) -> tuple[tuple[Array, ...], Geometry, Options]:
    """Check all arguments of a call, and choose who computes; returns what q, k and v are.

    `more` names what a gradient takes or gives besides dout, dq, dk, dv and dsinks.
    """
    layout = check_layout(layout)
    arrays, geometry = check_inputs(q, k, v, names, layout, dtype)
    plain = by_value(options)
    if type(attn_type) is AttnType and type(return_lse) is bool and plain is not None:
        settings = _plain_options(geometry, layout, return_lse, attn_type, plain)
    else:
        settings = check_options(geometry, arrays[0], layout, options, return_lse=return_lse, return_lse_name=names.return_lse)
        settings = replace(settings, backend=backend_for(attn_type))
    of_q = arrays[0]
    backend = settings.backend.for_call(of_q, device_of(of_q), geometry, settings, backward=backward, more=more)
    if backend is not settings.backend:  # once for options that come back, which have then found out more
        settings = settings.remembered.once(backend, lambda: replace(settings, backend=backend))
    return arrays, geometry, settings


@lru_cache(maxsize=256)
def _plain_options(
    geometry: Geometry, layout: Layout, return_lse: bool, attn_type: AttnType, options: tuple[tuple[str, type, Any], ...]
) -> Options:
    """The checks that calls with the same plain options need not repeat."""
    checked = check_options(geometry, None, layout, {name: value for name, _, value in options}, return_lse=return_lse)
    return replace(checked, backend=backend_for(attn_type))


def attend_whole(arrays: Sequence[Any], geometry: Geometry, options: Options) -> tuple[Any, Any]:
    """Attention of USM arrays with all rows and all heads, into new arrays; out is C-contiguous in the order of the layout."""
    q, k, v = arrays
    out = empty_out(q, options.layout, geometry.head_dim_v)
    lse = None
    if options.return_lse:
        lse = empty_like(q, (geometry.batch, geometry.heads, q.shape[1]), geometry.compute_dtype)
    attend(q, k, v, out, lse, options, HeadMap(geometry.group))
    return out, lse


def empty_out(q: Any, layout: Layout, width: int) -> Any:
    """A new USM array like q, (batch, seq, heads, width), that is C-contiguous in the order of the layout.

    Only where head_dim, which the kernels write densely, is not the last axis of the layout, it is so in the order bshd, and
    `to_user` copies it.
    """
    axes, shape = axes_of(layout), (*q.shape[:3], width)
    if axes[3] != 3 or axes == (0, 1, 2, 3):
        return empty_like(q, shape)
    order = inverse(axes)
    return tensor.permute_dims(empty_like(q, tuple(shape[axis] for axis in order)), axes)


def rows_of(arrays: Sequence[Array], layout: Layout) -> tuple[int, int]:
    """The rows of q and of k, which are the first arrays."""
    of_q, of_k = (bshd_shape(x.shape, layout)[1] for x in arrays[:2])
    return of_q, of_k


def to_usm(arrays: Sequence[Array], layout: Layout) -> list[Any]:
    """The arrays of a layout as USM arrays, (batch, seq, heads, head_dim)."""
    return [to_bshd(x.usm(), layout) for x in arrays]


def results_to_user(out: Any, lse: Any, options: Options, like: Array) -> list[Any]:
    """The results of USM arrays as the user wants them: the axes of the layout, and the library of `like`."""
    out = to_user(out, options.layout, like)
    return [out, like.give(lse_to_user(lse, options.layout))] if options.return_lse else [out]


def alone_or_all(results: Sequence[Any]) -> Any:
    """What a function returns: one result as it is, several as a tuple."""
    return tuple(results) if len(results) > 1 else results[0]


def to_user(x: Any, layout: Layout, like: Array) -> Any:
    """A USM array (batch, seq, heads, head_dim) in the layout of the user, C-contiguous, in the library of `like`."""
    x = from_bshd(x, layout)
    with device_turn:
        if not x.flags.c_contiguous:  # head_dim is not its last axis
            x, source = empty_like(x, x.shape), x
            copy_arrays([source], [x])
        return like.give(x)


def attend(q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
    """Compute attention of USM arrays into `out`, which is dense in the last axis, and `lse`, if that is not None."""
    with stage("attention"):
        if out.size and options.findings is not None:
            options.findings.see((q, k), options, heads)
        if out.size and options.differ_by_batch:
            for b, mine in options.by_batch():
                options.backend.forward(q[b], k[b], v[b], out[b], None if lse is None else lse[b], mine, heads)
        elif out.size:
            options.backend.forward(q, k, v, out, lse, options, heads)


def differentiate(arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
    """Compute gradients of USM arrays (dout, q, k, v, lse, delta) into `grads`: dq, dk, dv, dense in the last axis."""
    with stage("attention backward"):
        if arrays[0].size and options.findings is not None:
            options.findings.see(arrays, options, heads)
        if arrays[0].size and options.differ_by_batch:
            for b, mine in options.by_batch():
                options.backend.backward([x[b] for x in arrays], [x[b] for x in grads], mine, heads)
        elif arrays[0].size:
            options.backend.backward(arrays, grads, options, heads)
        else:  # no query, or no head for this rank: nothing reaches the keys
            for grad in grads:
                grad[...] = 0
