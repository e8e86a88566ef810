"""Attention of a sequence that is split over the ranks: Ulysses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _exchange, local
from ._arrays import empty_like, scratch, tensor, to_usm
from ._copies import copy_arrays
from ._options import Options, check_attention
from ._partition import HeadMap, kv_shares, query_shares, share_heads
from ._validate import NAMES, Geometry, Names, agree, check_exchange, check_flag
from .backends import AttnType, LocalAttention
from .redistribute import column, gathered_views, to_gathered, to_local, trade_of


@dataclass(frozen=True, eq=False)
class Context:
    """What `ulysses_attention` keeps for `ulysses_attention_backward`: opaque to users."""

    geometry: Geometry
    q_rows: tuple[int, ...]
    k_rows: tuple[int, ...]
    gathered: tuple[Any, ...]  # q, k, v and lse of the heads of this rank; nothing on one rank


def ulysses_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    comm: Any = None,
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
    return_lse: bool = False,
    return_ctx: bool = False,
    attn_type: LocalAttention = AttnType.INTEL_SYCL,
    exchange: str = "auto",
) -> Any:
    """Attention over a sequence that is split over the ranks of a communicator.

    Collective over `comm`. Every rank passes its rows of all heads and gets its rows of the result. Two all-to-alls trade the
    split by rows for a split by heads and back; in between, each rank computes ordinary attention on its heads. Returns when
    the result is complete. The communication buffers are kept for the next call (`free_workspace`).

    Parameters
    ----------
    q : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Queries of this rank, (batch, seq_local, heads, head_dim) or what `layout` says; float32, float64, float16 or bfloat16,
        any strides. The ranks hold consecutive rows in rank order; seq_local may differ between ranks and may be 0. head_dim is
        at most 256.
    k, v : same kind, dtype and device as q
        Keys and values of this rank, (batch, seq_k_local, kv_heads, head_dim). heads is a multiple of kv_heads: query head h
        reads kv head ``h // (heads // kv_heads)``. If on any rank seq_k_local is not seq_local, k and v travel in a message
        of their own.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default. heads need not be a multiple of the number of ranks, nor be as many.
    softmax_scale, causal, window_size, softcap
        As in `attention`, in rows of the whole sequences: the result does not depend on the number of ranks.
    alibi_slopes, bias, key_padding_mask, sinks, cu_seqlens_q, cu_seqlens_k
        As in `attention`, for all heads and for the rows of all ranks, and the same on every rank. `cu_seqlens_q` counts rows
        in the concatenation of the rows of all ranks. Each rank uses the part for its heads.
    dropout_p, seed, layout, dtype
        As in `attention`.
    return_lse : bool
        Also return the logarithm of the softmax denominators.
    return_ctx : bool
        Also return what `ulysses_attention_backward` would otherwise have to send again: q, k and v of the heads of this rank,
        ``(heads + 2 kv_heads) / P · batch · seq · head_dim`` numbers, and lse.
    attn_type : AttnType, UserAttention or callable
        The implementation of the local attention: a member of `AttnType`, what `register_attention` returned, or a function
        as it takes one.
    exchange : {"auto", "device", "host"}
        Give MPI the device pointers, or copy through pinned host memory; "auto" finds out what MPI supports.

    Returns
    -------
    out : same kind, dtype and device as q
        The shape of q, C-contiguous. Zeros for a query that sees no key.
    lse : same kind and device as q
        Only with `return_lse`: natural logarithm of the softmax denominator, (batch, heads, seq_local), or (heads, total_local)
        with layout "thd"; float64 if q is, else float32. -inf for a query that sees no key and has no sink.
    ctx : Context
        Only with `return_ctx`, as the last result.

    Raises
    ------
    TypeError
        On all ranks, if on any rank an argument is not of a supported kind or dtype.
    ValueError
        On all ranks, if on any rank the shapes do not fit each other, a number is out of range, or the arrays are on different
        queues or devices; or if the ranks disagree on anything but the number of their rows. Of `bias`, only shape and dtype
        are compared.
    NotImplementedError
        On all ranks, if on any rank a torch tensor requires a gradient, or `attn_type` does not have one of the options.
    ImportError
        On all ranks, if on any rank `attn_type` needs a package that is not installed.

    Notes
    -----
    The method is DeepSpeed-Ulysses (Jacobs et al., arXiv:2309.14509). Each rank sends
    ``(P-1)/P² · batch · seq · head_dim · itemsize · 2 (heads + kv_heads)`` bytes if P divides seq and kv_heads, in one message
    to each other rank and direction.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import ulysses_attention
    >>> q = np.ones((1, 16, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> ulysses_attention(q, q, q, causal=True).shape
    (1, 16, 4, 8)
    """
    return distributed(
        "ulysses_attention",
        q,
        k,
        v,
        comm=comm,
        exchange=exchange,
        return_ctx=return_ctx,
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
        return_lse=return_lse,
        attn_type=attn_type,
    )


def distributed(
    function: str,
    q: Any,
    k: Any,
    v: Any,
    *,
    comm: Any,
    exchange: str = "auto",
    return_ctx: bool = False,
    names: Names = NAMES,
    **options: Any,
) -> Any:
    """`ulysses_attention` under any public name."""
    comm = _exchange.resolve_comm(function, comm, names.comm)

    # Validate inputs.
    def check() -> tuple[tuple[int, ...], dict[str, Any], tuple[Any, Geometry, Options]]:
        views, geometry, settings = check_attention(q, k, v, names, **options)
        check_exchange(exchange)
        check_flag("return_ctx", return_ctx)
        common = vars(geometry) | settings.common() | {"return_ctx": return_ctx}
        return (views[0].shape[1], views[1].shape[1]), common, (views, geometry, settings)

    rows, (views, geometry, settings) = agree(comm, function, check)
    q_rows, k_rows = column(rows, 0), column(rows, 1)
    settings.check_lengths(function, sum(q_rows), sum(k_rows))
    # Delegate.
    q_usm, k_usm, v_usm = (to_usm(x) for x in views)
    if comm.size == 1:
        out, lse = local.attend_whole(q_usm, k_usm, v_usm, geometry, settings)
        context = Context(geometry, q_rows, k_rows, ())
    else:
        route = _exchange.choose_route(q_usm.sycl_queue, exchange)
        arrays = q_usm, k_usm, v_usm
        out, lse, context = _attend_split(comm, route, *arrays, q_rows, k_rows, geometry, settings, keep=return_ctx)
    results = local.results_to_user(out, lse, settings, q)
    if not return_ctx:
        return results
    return (*results, context) if settings.return_lse else (results, context)


def _attend_split(
    comm: Any,
    route: _exchange.Route,
    q: Any,
    k: Any,
    v: Any,
    q_rows: tuple[int, ...],
    k_rows: tuple[int, ...],
    geometry: Geometry,
    options: Options,
    *,
    keep: bool,
) -> tuple[Any, Any, Context]:
    """Redistribute, attend, redistribute: the whole path on USM arrays of two or more ranks. `keep`: for a backward pass."""
    heads = share_heads(geometry.heads, geometry.kv_heads, comm.size)
    mine = heads[comm.rank]
    q_heads, kv_heads = query_shares(heads), kv_shares(heads)

    # Every rank: from its rows of all heads to all rows of its heads.
    slots = ("", "") if keep else ("gathered", "gathered k, v")
    if q_rows == k_rows:
        gathered = to_gathered(comm, route, (q, k, v), (q_heads, kv_heads, kv_heads), q_rows, slot=slots[0])
    else:
        gathered = to_gathered(comm, route, (q,), (q_heads,), q_rows, slot=slots[0])
        gathered += to_gathered(comm, route, (k, v), (kv_heads, kv_heads), k_rows, slot=slots[1])

    # Local attention. The result, and lse if it is wanted, are the send buffer of the way back.
    lse_dtype = np.dtype(geometry.compute_dtype)
    lse_columns = lse_dtype.itemsize // q.dtype.itemsize  # of a 16-bit buffer, lse takes two columns
    widths, shares = [geometry.head_dim], [q_heads]
    if options.return_lse:
        widths, shares = [geometry.head_dim, lse_columns], [q_heads, q_heads]
    back = trade_of(comm.rank, q_rows, shares, widths, geometry.batch)
    result = scratch(q.sycl_queue, "result", (sum(back.gathered_counts),), q.dtype)
    out, *lse_as_columns = gathered_views(back, shares, widths, result)
    lse_shape = (geometry.batch, mine.q_count, sum(q_rows))
    lse = None
    if keep:
        lse = empty_like(q, lse_shape, lse_dtype)
    elif options.return_lse and lse_columns == 1:
        lse = tensor.permute_dims(lse_as_columns[0][..., 0], (0, 2, 1))
    elif options.return_lse:
        lse = scratch(q.sycl_queue, "lse", lse_shape, lse_dtype)
    local.attend(*(*gathered, out, lse, options, HeadMap(geometry.group, mine.shift, mine.q_start)))
    if options.return_lse and (keep or lse_columns > 1):
        copy_arrays([as_columns(lse, q.dtype)], lse_as_columns)

    # Every rank: from all rows of its heads back to its rows of all heads.
    out_local = local.empty_out(q, options.layout)
    lse_local = empty_like(q, (geometry.batch, geometry.heads, q.shape[1]), lse_dtype)
    targets = [out_local, as_columns(lse_local, q.dtype)][: len(shares)]
    to_local(comm, route, back, result, targets, shares)
    return out_local, lse_local, Context(geometry, q_rows, k_rows, (*gathered, lse) if keep else ())


def as_columns(lse: Any, dtype: Any) -> Any:
    """A view of C-contiguous lse as numbers of another dtype, (batch, seq, heads, columns): two of 16 bits for one of 32."""
    batch, heads, seq = lse.shape
    columns = lse.dtype.itemsize // dtype.itemsize
    shape, strides = (batch, seq, heads, columns), (heads * seq * columns, columns, seq * columns, 1)
    return tensor.usm_ndarray(shape, dtype=dtype, buffer=lse.usm_data, strides=strides)
