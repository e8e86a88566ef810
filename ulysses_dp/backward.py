"""The gradient of attention, on one rank and over a sequence that is split over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _exchange
from ._arrays import dtype_of, empty_like, from_usm, kind_of, scratch, tensor, to_usm
from ._copies import copy_arrays
from ._layout import PACKED, from_bshd, to_bshd
from ._options import Options, check_attention
from ._partition import HeadMap, Heads, kv_shares, query_shares, share_heads
from ._trace import stage
from ._validate import Geometry, agree, check_exchange, check_kind, check_places
from .attention import Context, as_columns
from .backends import AttnType, LocalAttention
from .local import empty_out
from .redistribute import column, gathered_views, to_gathered, to_local, trade_of

if TYPE_CHECKING:
    from collections.abc import Sequence


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    /,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    bias: Any = None,
    key_padding_mask: Any = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    attn_type: LocalAttention = AttnType.INTEL_SYCL,
) -> Any:
    """Gradient of `attention`: the vector-Jacobian product for a cotangent of its result.

    Not collective. Returns when the results are complete. Memory does not grow with seq_q x seq_k.

    Parameters
    ----------
    dout : same kind, dtype, device and shape as q
        Cotangent of the result: the gradient of a loss with respect to it.
    q, k, v : arrays
        What `attention` was given.
    out, lse : arrays
        What `attention` returned with ``return_lse=True``.
    softmax_scale, causal, window_size, softcap, alibi_slopes, bias, key_padding_mask, sinks, cu_seqlens_q, cu_seqlens_k
        What `attention` was given. `alibi_slopes` and `bias` get no gradient.
    dropout_p, seed, layout, dtype, attn_type
        What `attention` was given.

    Returns
    -------
    dq, dk, dv : arrays
        Gradients, of the kind, dtype, device and shape of q, k and v.
    dsinks : array
        Only if `sinks` is given: its gradient, (heads,), of the kind of q and the dtype of lse.

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
    views, geometry, options = _check(
        *(dout, q, k, v, out, lse),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        bias=bias,
        key_padding_mask=key_padding_mask,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_p=dropout_p,
        seed=seed,
        layout=layout,
        dtype=dtype,
        attn_type=attn_type,
    )
    options.check_lengths("attention_backward", views[1].shape[1], views[2].shape[1])
    # Delegate.
    grads, dsinks = _differentiate_whole([to_usm(x) for x in views], geometry, options)
    return _to_user(grads, dsinks, options, q)


def ulysses_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    /,
    *,
    comm: Any = None,
    ctx: Context | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    bias: Any = None,
    key_padding_mask: Any = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    attn_type: LocalAttention = AttnType.INTEL_SYCL,
    exchange: str = "auto",
) -> Any:
    """Gradient of `ulysses_attention`, for the rows of this rank.

    Collective over `comm`. One all-to-all brings what the heads of a rank need, one brings dq, dk and dv back. Returns when the
    results are complete.

    Parameters
    ----------
    dout : same kind, dtype, device and shape as q
        Cotangent of the result: the gradient of a loss, the same one on all ranks, with respect to the rows of this rank.
    q, k, v : arrays
        What `ulysses_attention` was given.
    out, lse : arrays
        What `ulysses_attention` returned with ``return_lse=True``.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    ctx : Context, optional
        What `ulysses_attention` returned with ``return_ctx=True``: then q, k, v and lse are not sent again.
    softmax_scale, causal, window_size, softcap, alibi_slopes, bias, key_padding_mask, sinks, cu_seqlens_q, cu_seqlens_k
        What `ulysses_attention` was given. `alibi_slopes` and `bias` get no gradient.
    dropout_p, seed, layout, dtype, attn_type, exchange
        What `ulysses_attention` was given.

    Returns
    -------
    dq, dk, dv : arrays
        Gradients, of the kind, dtype, device and shape of q, k and v.
    dsinks : array
        Only if `sinks` is given: its gradient, (heads,), the same on all ranks, of the kind of q and the dtype of lse.

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
    >>> dq, dk, dv = ulysses_attention_backward(out, q, q, q, out, lse, ctx=ctx, causal=True)
    >>> dq.shape
    (1, 16, 4, 8)
    """
    function = "ulysses_attention_backward"
    comm = _exchange.resolve_comm(function, comm)

    # Validate inputs.
    def check() -> tuple[tuple[int, ...], dict[str, Any], tuple[Any, Geometry, Options]]:
        views, geometry, options = _check(
            *(dout, q, k, v, out, lse),
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            bias=bias,
            key_padding_mask=key_padding_mask,
            sinks=sinks,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            dropout_p=dropout_p,
            seed=seed,
            layout=layout,
            dtype=dtype,
            attn_type=attn_type,
        )
        check_exchange(exchange)
        rows = views[1].shape[1], views[2].shape[1]
        _check_context(ctx, geometry, comm, rows)
        return rows, vars(geometry) | options.common() | {"ctx": "given" if ctx else "not given"}, (views, geometry, options)

    rows, (views, geometry, options) = agree(comm, function, check)
    q_rows, k_rows = column(rows, 0), column(rows, 1)
    options.check_lengths(function, sum(q_rows), sum(k_rows))
    # Delegate.
    arrays = [to_usm(x) for x in views]
    if comm.size == 1:
        grads, dsinks = _differentiate_whole(arrays, geometry, options)
    else:
        route = _exchange.choose_route(arrays[0].sycl_queue, exchange)
        grads, dsinks = _differentiate_split(comm, route, arrays, ctx, q_rows, k_rows, geometry, options)
    return _to_user(grads, dsinks, options, q)


def _check(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *, layout: Any, dtype: Any, **options: Any
) -> tuple[tuple[Any, ...], Geometry, Options]:
    """Check all arguments; returns dout, q, k, v, out as views (batch, seq, heads, head_dim), and lse (batch, heads, seq)."""
    views, geometry, settings = check_attention(q, k, v, layout=layout, dtype=dtype, return_lse=True, backward=True, **options)
    of_q = dtype_of(q), tuple(q.shape)
    rows = (geometry.heads, views[0].shape[1])
    of_lse = geometry.compute_dtype, rows if layout == PACKED else (geometry.batch, *rows)
    for name, x, (expected_dtype, expected) in (("dout", dout, of_q), ("out", out, of_q), ("lse", lse, of_lse)):
        kind = check_kind(name, x)
        if kind is not kind_of(q):
            raise TypeError(f"{name} must be of the kind of q, {type(q).__qualname__}, not {type(x).__qualname__}")
        if dtype_of(x) != expected_dtype:
            raise TypeError(f"{name} must have dtype {expected_dtype}, not {dtype_of(x)}")
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, not {tuple(x.shape)}")
        check_places(("q", name), (q, x), kind)
    lse_view = lse[None, ...] if layout == PACKED else lse
    return (to_bshd(dout, layout), *views, to_bshd(out, layout), lse_view), geometry, settings


def _check_context(ctx: Any, geometry: Geometry, comm: Any, rows: tuple[int, int]) -> None:
    if ctx is None:
        return
    if not isinstance(ctx, Context):
        raise TypeError(f"ctx must be what ulysses_attention returned with return_ctx=True, not {type(ctx).__name__}")
    ranks = len(ctx.q_rows)
    theirs = ctx.geometry, ranks, *((ctx.q_rows[comm.rank], ctx.k_rows[comm.rank]) if ranks == comm.size else ())
    if theirs != (geometry, comm.size, *rows):
        raise ValueError(f"ctx is of another call: of {ctx.geometry} on {ranks} ranks, not {geometry} on {comm.size}")


def _to_user(grads: Sequence[Any], dsinks: Any, options: Options, like: Any) -> tuple[Any, ...]:
    results = tuple(from_usm(from_bshd(x, options.layout), like) for x in grads)
    return results if dsinks is None else (*results, from_usm(dsinks, like))


def _differentiate_whole(arrays: Sequence[Any], geometry: Geometry, options: Options) -> tuple[list[Any], Any]:
    """The gradients of USM arrays (dout, q, k, v, out, lse) with all rows and all heads, in new ones; and that of the sinks."""
    dout, q, k, v, out, lse = arrays
    delta = _delta(dout, out, lse.dtype, options)
    grads = [empty_out(x, options.layout) for x in (q, k, v)]
    _differentiate((dout, q, k, v, lse, delta), grads, options, HeadMap(geometry.group))
    return grads, _of_sinks(lse, delta, options.sinks)


def _delta(dout: Any, out: Any, compute: Any, options: Options) -> Any:
    """Sum of dout * out of every query row, (batch, heads, seq), in scratch memory and the dtype of the computation."""
    batch, seq, heads, _ = out.shape
    with stage("delta"):
        delta = scratch(out.sycl_queue, "delta", (batch, heads, seq), compute)
        options.backend.delta(dout, out, delta)
    return delta


def _of_sinks(lse: Any, delta: Any, sinks: np.ndarray | None) -> Any:
    """Gradient of the sinks of these heads: the share of a sink in each row, times -delta."""
    if sinks is None:
        return None
    logits = tensor.asarray(sinks.reshape(1, -1, 1), dtype=lse.dtype, sycl_queue=lse.sycl_queue)
    weight = tensor.where(logits == -np.inf, 0, tensor.exp(logits - lse))  # -inf - -inf would be nan
    return -tensor.sum(weight * delta, axis=(0, 2), dtype=lse.dtype)


def _differentiate(arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
    """Compute gradients of USM arrays (dout, q, k, v, lse, delta) into `grads`: dq, dk, dv, dense in the last axis."""
    with stage("attention backward"):
        if arrays[0].size:
            options.backend.backward(arrays, grads, options, heads)
        else:  # no query, or no head for this rank: nothing reaches the keys
            for grad in grads:
                grad[...] = 0


def _differentiate_split(
    comm: Any,
    route: _exchange.Route,
    arrays: Sequence[Any],
    ctx: Context | None,
    q_rows: tuple[int, ...],
    k_rows: tuple[int, ...],
    geometry: Geometry,
    options: Options,
) -> tuple[list[Any], Any]:
    """Redistribute, differentiate, redistribute: the whole path on USM arrays (dout, q, k, v, out, lse) of several ranks."""
    dout, q, k, v, out, lse = arrays
    heads = share_heads(geometry.heads, geometry.kv_heads, comm.size)
    mine = heads[comm.rank]
    q_heads, kv_heads = query_shares(heads), kv_shares(heads)

    # Every rank: from its rows of all heads to all rows of its heads.
    queries = [dout, as_columns(_delta(dout, out, lse.dtype, options), q.dtype)]
    if ctx is None:
        queries += [q, as_columns(tensor.asarray(lse, order="C"), q.dtype)]
    if ctx is None and q_rows == k_rows:
        shares = [q_heads] * 4 + [kv_heads] * 2
        gathered = to_gathered(comm, route, (*queries, k, v), shares, q_rows, slot="gathered")
        dout_all, delta_all, q_all, lse_all, k_all, v_all = gathered
    elif ctx is None:
        dout_all, delta_all, q_all, lse_all = to_gathered(comm, route, queries, [q_heads] * 4, q_rows, slot="gathered")
        k_all, v_all = to_gathered(comm, route, (k, v), [kv_heads] * 2, k_rows, slot="gathered k, v")
    else:
        dout_all, delta_all = to_gathered(comm, route, queries, [q_heads] * 2, q_rows, slot="gathered")
        q_all, k_all, v_all, lse_all = ctx.gathered
    delta_all = _from_columns(delta_all, lse.dtype, "delta")
    if ctx is None:
        lse_all = _from_columns(lse_all, lse.dtype, "lse")

    # Local gradients. A kv head that several ranks read is summed over them in the dtype of the computation.
    shared = sum(count for _, count in kv_heads) > geometry.kv_heads
    wire = lse.dtype if shared else q.dtype
    shares = [q_heads, kv_heads, kv_heads]
    trips = [(q_rows, slice(0, 3))] if q_rows == k_rows else [(q_rows, slice(0, 1)), (k_rows, slice(1, 3))]
    trades, buffers, grads_all = [], [], []
    for rows, part in trips:
        widths = [geometry.head_dim] * len(shares[part])
        trades.append(trade_of(comm.rank, rows, shares[part], widths, geometry.batch))
        buffers.append(scratch(q.sycl_queue, f"gradients {part.start}", (sum(trades[-1].gathered_counts),), wire))
        grads_all += gathered_views(trades[-1], shares[part], widths, buffers[-1])
    arrays_all = dout_all, q_all, k_all, v_all, lse_all, delta_all
    _differentiate(arrays_all, grads_all, options, HeadMap(geometry.group, mine.shift, mine.q_start))
    dsinks = _all_sinks(comm, lse_all, delta_all, options.sinks, mine)

    # Every rank: from all rows of its heads back to its rows of all heads.
    grads = [empty_out(x, options.layout) for x in (q, k, v)]
    # copies where several ranks add up what is rounded to 16 bits at the end
    targets = [x if wire == x.dtype else empty_like(x, x.shape, wire) for x in grads]
    for trade, buffer, (_, part) in zip(trades, buffers, trips, strict=True):
        to_local(comm, route, trade, buffer, targets[part], shares[part])
    for target, grad in zip(targets, grads, strict=True):
        if target is not grad:
            copy_arrays((target,), (grad,))
    return grads, dsinks


def _from_columns(x: Any, dtype: Any, name: str) -> Any:
    """The numbers (batch, heads, seq) of this dtype that came in the columns of a message; two of 16 bits are one of 32."""
    if x.dtype == dtype:
        return tensor.permute_dims(x[..., 0], (0, 2, 1))
    batch, seq, heads, _ = x.shape
    numbers = scratch(x.sycl_queue, f"{name} of all rows", (batch, heads, seq), dtype)
    copy_arrays((x,), (as_columns(numbers, x.dtype),))
    return numbers


def _all_sinks(comm: Any, lse: Any, delta: Any, sinks: np.ndarray | None, mine: Heads) -> Any:
    """Gradient of the sinks of all heads, on all ranks; a few numbers, through the host."""
    if sinks is None:
        return None
    local = tensor.asnumpy(_of_sinks(lse, delta, sinks[mine.q_start : mine.q_start + mine.q_count]))
    everyone = np.concatenate(_exchange.share_object(comm, local))
    return tensor.asarray(everyone, sycl_queue=lse.sycl_queue)
