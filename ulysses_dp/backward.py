"""The gradient of attention, on one rank and over a sequence that is split over the ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _local, _path
from ._call.checks import (
    NAMES,
    Geometry,
    check_array,
    check_flag,
    check_inputs,
    check_same_device,
)
from ._call.definitions import parted, takes
from ._call.layout import PACKED, lse_shape, with_width
from ._device.arrays import from_host, tensor, to_host
from ._device.queue import device_turn
from ._device.trace import call, stage
from ._device.workspace import scratch
from ._findings import ScoreGradients
from ._local import LocalOptions
from ._mesh import Course, MeshOptions, UlyssesOptions, check_mesh
from ._path import Arrays, Description
from ._ranks import mpi
from ._ranks.agree import Checked, Common, agree
from ._ranks.partition import HeadMap
from ._replicated import Replicated, check_replicated
from ._ring import new_ring
from .attention import Context
from .mesh import ranks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from ._call.layout import Layout
    from ._call.options import Options
    from ._device.arrays import Array
    from ._mesh import Wish
    from ._ranks.orders import Place
    from ._ring import Ring

ARRAYS = ("q", "k", "v")
TOKENS = ("q_r", "k_r", "v_r")  # that every rank has whole
ON_DEMAND = {"alibi_slopes": "slopes_grad", "bias": "bias_grad"}  # options whose gradient is computed if that is wanted
DIFFERENTIABLE = (*ARRAYS, "sinks", *ON_DEMAND, *TOKENS)  # what has a gradient
GRADIENTS = ("dq", "dk", "dv")
GIVEN = ("dout", *ARRAYS, "out", "lse", "dlse")


@takes(LocalOptions)
def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    /,
    *,
    dlse: Any = None,
    bias_grad: bool = False,
    slopes_grad: bool = False,
    **options: Unpack[LocalOptions],
) -> Any:
    """Gradient of `attention`: the vector-Jacobian product for cotangents of its results.

    Not collective. Returns when the results are complete. Memory does not grow with seq_q x seq_k.

    Parameters
    ----------
    dout : same kind, dtype, device and shape as out
        Cotangent of out: the gradient of a loss with respect to it.
    q, k, v : arrays
        What `attention` was given.
    out, lse : arrays
        What `attention` returned with ``return_lse=True``.
    {names}
        What `attention` was given.
    dlse : same kind, dtype, device and shape as lse, optional
        Cotangent of lse; of a query that sees nothing it has no effect. None: the loss does not depend on lse.
    bias_grad, slopes_grad : bool
        Also return the gradient by `bias`, or by `alibi_slopes`, for which all scores are computed again.

    Returns
    -------
    dq, dk, dv : arrays
        Gradients, of the kind, dtype, device and shape of q, k and v.
    dsinks : array
        Only if `sinks` is given: its gradient, (heads,), of the kind of q and the dtype of lse.
    dslopes : array
        Only with `slopes_grad`: the gradient by `alibi_slopes`, of its shape, of the kind of q and the dtype of lse.
    dbias : array
        Only with `bias_grad`: the gradient by `bias`, of its shape, kind and device, and of the dtype of lse. Where `bias` is
        broadcast, it is the sum. Memory grows with seq_q x seq_k only if `bias` has such a shape.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ImportError
        As `attention` does; and if dout, out or lse do not fit q.

    See Also
    --------
    attention : the forward pass.

    Notes
    -----
    The weights are computed again from lse (Dao, arXiv:2307.08691). Every sum has a fixed order: repeating a call gives the
    same bits. 16-bit arrays are computed in float32, in copies.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import attention, attention_backward
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 1, 5, 2, 8))
    >>> out, lse = attention(q, k, v, return_lse=True)
    >>> dq, dk, dv = attention_backward(dout, q, k, v, out, lse)
    >>> moved = attention(q, k, v + 1e-3 * dout)  # attention is linear in v
    >>> bool(np.isclose(((moved - out) * dout).sum(), 1e-3 * (dv * dout).sum()))
    True
    """
    # Validate inputs.
    more = _check_more(dlse, bias_grad, slopes_grad)
    arrays, geometry, settings = _check(dout, q, k, v, out, lse, dlse, more, **options)
    settings.check_lengths("attention_backward", *_local.rows_of(arrays[1:], settings.layout))
    # Delegate.
    with call("attention_backward"), device_turn:
        grads, dsinks = _differentiate_whole(_to_usm(arrays, settings.layout), geometry, settings)
        return _to_user(grads, dsinks, settings, arrays[1])


@takes(LocalOptions, MeshOptions)
def ulysses_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    /,
    *,
    dlse: Any = None,
    bias_grad: bool = False,
    slopes_grad: bool = False,
    comm: Any = None,
    ctx: Context | None = None,
    replicated: tuple[Any, ...] | None = None,
    replicated_at: Place = "start",
    **options: Unpack[UlyssesOptions],
) -> Any:
    """Gradient of `ulysses_attention`, for the rows of this rank.

    Collective over `comm`. One all-to-all brings what the heads of a rank need, one brings dq, dk and dv back. Returns when the
    results are complete.

    Parameters
    ----------
    dout : same kind, dtype, device and shape as out
        Cotangent of out: the gradient of a loss, the same one on all ranks, with respect to the rows of this rank.
    q, k, v : arrays
        What `ulysses_attention` was given.
    out, lse : arrays
        What `ulysses_attention` returned with ``return_lse=True``.
    {names}
        What `ulysses_attention` was given. With `ctx`, an option that is given must be that of `ctx`; of `bias`, shape and
        dtype are compared.
    dlse : same kind, dtype, device and shape as lse, optional
        Cotangent of the rows of lse of this rank. None: the loss does not depend on these; other ranks may give theirs.
    bias_grad, slopes_grad : bool
        Also return the gradient by `bias`, or by `alibi_slopes`, for which all scores are computed again.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    ctx : Context, optional
        What `ulysses_attention` returned with ``return_ctx=True``: then q, k, v and lse are not sent again, and the options of
        attention need not be repeated.
    replicated : tuple of dout_r, q_r, k_r, v_r, out_r, lse_r and perhaps dlse_r, optional
        The tokens that `ulysses_attention` was given, what it returned of them, and the gradient of the loss with respect to
        that; the same on all ranks.
    replicated_at
        What `ulysses_attention` was given; with `ctx`, that of `ctx`.
    {more names}
        What `ulysses_attention` was given; with `ctx`, the last three are those of `ctx`.

    Returns
    -------
    dq, dk, dv : arrays
        Gradients, of the kind, dtype, device and shape of q, k and v.
    dq_r, dk_r, dv_r : arrays
        Only with `replicated`: the gradients of its tokens by the rows of all ranks, the same on all ranks.
    dsinks : array
        Only if `sinks` is given: its gradient, (heads,), the same on all ranks, of the kind of q and the dtype of lse.
    dslopes : array
        Only with `slopes_grad`: the gradient by `alibi_slopes`, of its shape, the same on all ranks, of the kind of q and the
        dtype of lse.
    dbias : array
        Only with `bias_grad`: the gradient by `bias`, of its shape, the same on all ranks, of the kind and device of `bias` and
        the dtype of lse. Where `bias` is broadcast, it is the sum. The ranks add up theirs in their order, on the host.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ImportError
        On all ranks, as `ulysses_attention` does; and if on any rank dout, out, lse or ctx do not fit q.

    See Also
    --------
    ulysses_attention : the forward pass.

    Notes
    -----
    If P divides seq and kv_heads, each rank sends ``(P-1)/P² · batch · seq · itemsize`` times
    ``2 (heads + kv_heads) head_dim + 2 heads`` bytes for the way there, or ``heads (head_dim + 1)`` with `ctx`, and
    ``(heads + 2 kv_heads) head_dim`` for the way back; of 16-bit arrays, the single numbers per head count twice. A kv head
    that several ranks read is summed over them in rank order, which for 16-bit arrays is done, and sent, in float32.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import ulysses_attention, ulysses_attention_backward
    >>> q = np.ones((1, 16, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> out, lse, ctx = ulysses_attention(q, q, q, causal=True, return_lse=True, return_ctx=True)
    >>> dq, dk, dv = ulysses_attention_backward(out, q, q, q, out, lse, ctx=ctx)
    >>> dq.shape
    (1, 16, 4, 8)
    """
    function = "ulysses_attention_backward"
    of_mesh, of_attention = parted(options, MeshOptions)
    ranks = ranks_of(function, comm, of_mesh.get("ring"))

    # Validate inputs.
    def check() -> Checked[tuple[Array, list[Any], Geometry, Options, Wish, Replicated]]:
        given = (ctx.options if isinstance(ctx, Context) else {}) | of_attention
        more = _check_more(dlse, bias_grad, slopes_grad)
        inputs, geometry, settings = _check(dout, q, k, v, out, lse, dlse, more, **given)
        of_tokens: tuple[Any, ...] = ()
        if replicated is not None:
            check_tokens = partial(_check_arrays, layout=settings.layout, dtype=given.get("dtype"))
            of_tokens = check_replicated(replicated, _names_of(replicated), check_tokens, inputs[1], geometry)
        counts = _local.rows_of(of_tokens[1:], settings.layout) if of_tokens else (0, 0)
        _check_context(ctx, geometry, ranks.size, _local.rows_of(inputs[1:], settings.layout), counts)
        if ctx and of_attention:
            _, _, kept = _check(dout, q, k, v, out, lse, dlse, (), **ctx.options)
            _check_equal(settings.common(), kept.common())
        of_ctx = {name: getattr(ctx.wish, name) for name in ("ring", "order", "kv")} if ctx else {}
        wish = check_mesh(of_mesh | of_ctx, ctx.wish.place if ctx else replicated_at, ranks, geometry, settings)
        tokens = Replicated.of(counts, ranks.size, wish, settings)
        usm, usm_tokens = (_to_usm(x, settings.layout) for x in (inputs, of_tokens))
        if of_tokens:
            usm, usm_tokens = _with_zeros(usm, usm_tokens)
        arrays = tokens.brought(ranks.rank, GIVEN, usm, usm_tokens)

        def for_all() -> Common:
            values = {
                "ctx": f"of {len(ctx.parts)} parts" if ctx else "not given",
                **wish.common(),
                "replicated": counts,
                "bias_grad": "bias_grad" in more,
                "slopes_grad": "slopes_grad" in more,
                **vars(geometry),
                **settings.common(),
            }
            return Common(function, values)

        common = settings.remembered.once((function, wish, counts, more, ctx and len(ctx.parts)), for_all)
        result = inputs[1], arrays, geometry, settings, wish, tokens
        rows = arrays[1].shape[1], arrays[2].shape[1]
        return Checked(rows, common, result, (arrays[0].sycl_queue, wish.exchange))

    with call(function):
        agreement = agree(ranks, function, check)
        like, arrays, geometry, settings, wish, tokens = agreement.result
        kept = ctx.parts if ctx else ()

        def lay_out() -> Course | None:
            travels = partial(_path.gradient_lists, geometry, arrays[1].dtype, context=bool(kept), wire=wish.wire)

            def parts(shared: bool) -> int:
                # the sums of a kv head that several ranks read have the order of the ranks: they stay together
                return len(kept) if kept else 1 if shared else wish.overlap

            return Course.of(
                function, ranks, wish, agreement.sizes, geometry, settings, tokens.shares, parts=parts, travels=travels
            )

        course = settings.remembered.once((function, ranks, wish, tokens, len(kept), *agreement.sizes), lay_out)
        # Delegate.
        if course is None:
            with device_turn:
                grads, dsinks = _differentiate_whole(arrays, geometry, settings)
        else:
            placement = course.placement
            way = {"exchange": wish.exchange, "node_size": wish.node_size, "blocking": len(course.shares) == 1}
            link = mpi.link(placement.group, arrays[0].sycl_queue, **way)
            of_ring = {"backward": True, "kept": kept[0] if kept else None}
            ring = new_ring(placement, link.route, arrays[2], geometry, settings, course.heads, **of_ring)
            gradient = _describe(arrays, geometry, settings, course, kept=kept, ring=ring)
            results, dsinks_of_parts = _path.run(function, agreement, ranks, link, gradient)
            grads, dsinks = [results[name] for name in GRADIENTS], None
            if settings.sinks is not None:
                dsinks = mpi.join(ranks, np.concatenate(dsinks_of_parts)).reshape(placement.ring, geometry.heads).sum(axis=0)
        if settings.findings is not None:
            settings.findings.join(ranks, function)
        if replicated is not None:
            of_all = tokens.parted(function, ranks, dict(zip(GRADIENTS, grads, strict=True)))
            grads = [x for of in of_all for x in of.values()]
        return _to_user(grads, dsinks, settings, like)


def _check(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, more: tuple[str, ...], **options: Any
) -> tuple[tuple[Any, ...], Geometry, Options]:
    """Check all arguments; returns what dout, q, k, v, out, lse and dlse are, the last of which may be None."""
    inputs, geometry, settings = _local.check_attention(q, k, v, return_lse=True, backward=True, more=more, **options)
    if "bias_grad" in more or "slopes_grad" in more:
        of_options = options.get("bias"), options.get("alibi_slopes")
        settings = replace(settings, findings=ScoreGradients(settings, geometry.compute_dtype, more, *of_options))
    return _with_results(dout, inputs, out, lse, dlse, geometry, settings.layout), geometry, settings


def _check_more(dlse: Any, bias_grad: Any, slopes_grad: Any) -> tuple[str, ...]:
    """What more than dout and the gradients by arrays and sinks there is."""
    check_flag("bias_grad", bias_grad)
    check_flag("slopes_grad", slopes_grad)
    wanted = {"dlse": dlse is not None, "bias_grad": bias_grad, "slopes_grad": slopes_grad}
    return tuple(name for name, there in wanted.items() if there)


def _names_of(replicated: Any) -> tuple[str, ...]:
    """What the arrays of tokens are, of which the last may be left out."""
    given = isinstance(replicated, tuple | list) and len(replicated) == len(GIVEN)
    return GIVEN if given else GIVEN[:-1]


def _check_arrays(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any = None, *, layout: Layout, dtype: Any
) -> tuple[tuple[Any, ...], Geometry]:
    """The same without options."""
    inputs, geometry = check_inputs(q, k, v, NAMES, layout, dtype)
    return _with_results(dout, inputs, out, lse, dlse, geometry, layout), geometry


def _with_results(
    dout: Any, inputs: tuple[Array, ...], out: Any, lse: Any, dlse: Any, geometry: Geometry, layout: Layout
) -> tuple[Any, ...]:
    of_q = inputs[0]
    compute, shape = geometry.compute_dtype, lse_shape(of_q.shape, layout)
    out_shape = with_width(of_q.shape, geometry.head_dim_v, layout)
    return (
        _check_like_q("dout", dout, of_q, of_q.dtype, out_shape),
        *inputs,
        _check_like_q("out", out, of_q, of_q.dtype, out_shape),
        _check_like_q("lse", lse, of_q, compute, shape),
        None if dlse is None else _check_like_q("dlse", dlse, of_q, compute, shape),
    )


def _check_like_q(name: str, x: Any, q: Array, dtype: str, shape: tuple[int, ...]) -> Array:
    """Check an array that goes with q; returns what it is."""
    array = check_array(name, x)
    if array.library is not q.library:
        raise TypeError(f"{name} must be of the kind of q, {q.library.name}, not {array.library.name}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, not {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {array.shape}")
    check_same_device(("q", name), (q, array))
    return array


def _to_usm(arrays: tuple[Any, ...], layout: Layout) -> list[Any]:
    """dout, q, k, v and out as USM arrays, (batch, seq, heads, head_dim), and lse and dlse, if any, as (batch, heads, seq)."""
    if not arrays:
        return []
    *others, lse, dlse = arrays
    of_lse = (None if x is None else x.usm() for x in (lse, dlse))
    return [*_local.to_usm(others, layout), *(x[None, ...] if x is not None and layout == PACKED else x for x in of_lse)]


def _with_zeros(*lists: list[Any]) -> tuple[list[Any], ...]:
    """The same arrays, with a dlse of zeros where only others have one."""
    if all(x[-1] is None for x in lists):
        return lists
    return tuple([*x[:-1], tensor.zeros_like(x[-2]) if x[-1] is None else x[-1]] for x in lists)


def _check_context(ctx: Any, geometry: Geometry, ranks: int, rows: tuple[int, int], replicated: tuple[int, int]) -> None:
    if ctx is None:
        return
    if not isinstance(ctx, Context):
        raise TypeError(f"ctx must be what ulysses_attention returned with return_ctx=True, not {type(ctx).__name__}")
    if (ctx.geometry, ctx.ranks, ctx.rows) != (geometry, ranks, rows):
        raise ValueError(f"ctx is of another call: of {ctx.geometry} on {ctx.ranks} ranks, not {geometry} on {ranks}")
    if ctx.replicated != replicated:
        raise ValueError(f"replicated must have the {ctx.replicated} queries and keys of ctx, not {replicated}")


def _check_equal(given: dict[str, str], kept: dict[str, str]) -> None:
    """Check that the options are those of the forward pass, as far as ranks compare them."""
    for name, value in given.items():
        if value != kept[name]:
            raise ValueError(f"{name} must be what ulysses_attention was given for ctx, {kept[name]}, not {value}")


def _to_user(grads: Sequence[Any], dsinks: np.ndarray | None, options: Options, like: Array) -> tuple[Any, ...]:
    results, queue = [_local.to_user(x, options.layout, like) for x in grads], grads[0].sycl_queue
    if dsinks is not None:
        results.append(like.give(from_host(dsinks, queue)))
    if options.findings is not None:
        of_scores = options.findings.results()
        results += [
            (options.bias if name == "bias" and options.bias else like).give(from_host(x, queue))
            for name, x in of_scores.items()
        ]
    return tuple(results)


def _differentiate_whole(arrays: Sequence[Any], geometry: Geometry, options: Options) -> tuple[list[Any], Any]:
    """The gradients of USM arrays (dout, q, k, v, out, lse, dlse) with all rows and all heads, and that of the sinks."""
    dout, q, k, v, out, lse, dlse = arrays
    delta = _delta(dout, out, lse, dlse, options)
    grads = [_local.empty_out(x, options.layout, x.shape[3]) for x in (q, k, v)]
    _local.differentiate((dout, q, k, v, lse, delta), grads, options, HeadMap(geometry.group))
    return grads, _of_sinks(lse, delta, options.sinks)


def _delta(dout: Any, out: Any, lse: Any, dlse: Any, options: Options) -> Any:
    """Sum of dout * out minus dlse of every query row, (batch, heads, seq), in scratch memory and the dtype of lse.

    The derivative of lse by a score is p = exp(score - lse), so that of the loss is p (dp - sum + dlse).
    """
    batch, seq, heads, _ = out.shape
    with stage("delta"):
        delta = scratch(out.sycl_queue, "delta", (batch, heads, seq), lse.dtype)
        options.backend.delta(dout, out, delta)
        if dlse is not None:  # the lse of a row that sees nothing is -inf, whatever happens
            delta -= tensor.where(lse == -np.inf, 0, dlse, order="C")
    return delta


def _of_sinks(lse: Any, delta: Any, sinks: np.ndarray | None) -> np.ndarray | None:
    """Gradient of the sinks of these heads, on the host: the share of a sink in each row, times -delta, added up.

    In float64 and one head after the other, so that it does not depend on which heads are computed together.
    """
    if sinks is None:
        return None
    lse, delta = to_host(lse), to_host(delta)
    total = np.zeros(len(sinks))
    for head, sink in enumerate(sinks):
        for lse_row, delta_row in zip(lse[:, head], delta[:, head], strict=True):
            # -inf - -inf would be nan
            weight = np.zeros(len(lse_row)) if sink == -np.inf else np.exp(sink - lse_row.astype(np.float64))
            total[head] -= (weight * delta_row).sum()
    return total.astype(lse.dtype)


def _describe(
    arrays: Sequence[Any],
    geometry: Geometry,
    options: Options,
    course: Course,
    *,
    kept: tuple[Arrays, ...],
    ring: Ring | None = None,
) -> Description:
    """What the gradient moves and computes: dout and delta, and what the forward pass has not kept, there; dq, dk, dv back."""
    dout, q, k, v, out, lse, dlse = arrays

    def begin() -> tuple[Arrays, Arrays]:
        delta = _delta(dout, out, lse, dlse, options)
        results = {name: _local.empty_out(x, options.layout, x.shape[3]) for name, x in zip(GRADIENTS, (q, k, v), strict=True)}
        return {"dout": dout, "delta": delta, "q": q, "lse": lse, "k": k, "v": v}, results

    def differentiate(number: int, at_hand: Arrays) -> np.ndarray | None:
        """Gradients of all rows and the heads of one part; returns that of their sinks."""
        mine = course.shares[number][course.placement.group.rank]
        if kept:
            at_hand = at_hand | kept[number]
        heads = HeadMap(geometry.group, mine.shift, mine.q_start)
        inputs, grads = ([at_hand[name] for name in names] for names in (("dout", "q", "k", "v", "lse", "delta"), GRADIENTS))
        if ring is None:
            _local.differentiate(inputs, grads, options, heads)
        else:
            ring.running.give(*grads)
        sinks = None if options.sinks is None else options.sinks[mine.q_start : mine.q_start + mine.q_count]
        return _of_sinks(at_hand["lse"], at_hand["delta"], sinks)

    return Description("gradient", q, geometry.batch, course.lists, begin, differentiate, ring=ring)
