"""Attention of a sequence that is split over the ranks: Ulysses."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _exchange, local
from ._arrays import empty_like, scratch, tensor, to_usm, view
from ._options import Options, check_attention
from ._partition import Trade, share_heads
from ._validate import NAMES, Geometry, Names, agree, check_exchange
from .backend import AttnType
from .redistribute import column, to_gathered, to_local


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
    attn_type: AttnType = AttnType.INTEL_SYCL,
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
    attn_type : AttnType
        The implementation of the local attention.
    exchange : {"auto", "device", "host"}
        Give MPI the device pointers, or copy through pinned host memory; "auto" finds out what MPI supports.

    Returns
    -------
    out : same kind, dtype and device as q
        The shape of q, C-contiguous. Zeros for a query that sees no key.
    lse : same kind and device as q
        Only with `return_lse`: natural logarithm of the softmax denominator, (batch, heads, seq_local), or (heads, total_local)
        with layout "thd"; float64 if q is, else float32. -inf for a query that sees no key and has no sink.

    Raises
    ------
    TypeError
        On all ranks, if on any rank an argument is not of a supported kind or dtype.
    ValueError
        On all ranks, if on any rank the shapes do not fit each other, a number is out of range, or the arrays are on different
        queues or devices; or if the ranks disagree on anything but the number of their rows. Of `bias`, only shape and dtype
        are compared.
    NotImplementedError
        On all ranks, if on any rank a torch tensor requires a gradient.

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
    names: Names = NAMES,
    **options: Any,
) -> Any:
    """`ulysses_attention` under any public name."""
    comm = _exchange.resolve_comm(function, comm, names.comm)

    # Validate inputs.
    def check() -> tuple[tuple[int, ...], dict[str, Any], tuple[Any, Geometry, Options]]:
        views, geometry, settings = check_attention(q, k, v, names, **options)
        check_exchange(exchange)
        return (views[0].shape[1], views[1].shape[1]), vars(geometry) | settings.common(), (views, geometry, settings)

    rows, (views, geometry, settings) = agree(comm, function, check)
    q_rows, k_rows = column(rows, 0), column(rows, 1)
    settings.check_lengths(function, sum(q_rows), sum(k_rows))
    # Delegate.
    q_usm, k_usm, v_usm = (to_usm(x) for x in views)
    if comm.size == 1:
        results = local.attend_whole(q_usm, k_usm, v_usm, geometry, settings)
    else:
        route = _exchange.choose_route(q_usm.sycl_queue, exchange)
        results = _attend_split(comm, route, q_usm, k_usm, v_usm, q_rows, k_rows, geometry, settings)
    return local.results_to_user(*results, settings, q)


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
) -> tuple[Any, Any]:
    """Redistribute, attend, redistribute: the whole path on USM arrays of two or more ranks."""
    heads = share_heads(geometry.heads, geometry.kv_heads, comm.size)
    q_heads = [(h.q_start, h.q_count) for h in heads]
    kv_heads = [(h.kv_start, h.kv_count) for h in heads]

    # Every rank: from its rows of all heads to all rows of its heads.
    if q_rows == k_rows:
        q_all, k_all, v_all = to_gathered(comm, route, (q, k, v), (q_heads, kv_heads, kv_heads), q_rows, slot="gathered")
    else:
        (q_all,) = to_gathered(comm, route, (q,), (q_heads,), q_rows, slot="gathered")
        k_all, v_all = to_gathered(comm, route, (k, v), (kv_heads, kv_heads), k_rows, slot="gathered k, v")

    # Local attention. The result, with lse as more columns if it is wanted, is the send buffer of the way back.
    seq, batch, head_dim = sum(q_rows), geometry.batch, geometry.head_dim
    lse_dtype = np.dtype(geometry.compute_dtype)
    lse_columns = lse_dtype.itemsize // q.dtype.itemsize if options.return_lse else 0
    width = head_dim + lse_columns
    back = Trade(comm.rank, q_rows, column(q_heads, 1), batch, width)
    count = back.slots[comm.rank]
    result = scratch(q.sycl_queue, "result", (sum(back.gathered_counts),), q.dtype)
    row, b, head = batch * count * width, count * width, width
    out = view(result, 0, (batch, seq, count, head_dim), (b, row, head, 1))
    if lse_columns == 1:
        lse = view(result, head_dim, (batch, count, seq), (b, head, row))
    else:
        lse = scratch(q.sycl_queue, "lse", (batch, count, seq), lse_dtype)
    share = heads[comm.rank]
    local.attend(
        *(q_all, k_all, v_all, out, lse, options),
        group=geometry.group,
        head_shift=share.shift,
        first_head=share.q_start,
    )
    if lse_columns > 1:
        columns = view(result, head_dim, (batch, seq, count, lse_columns), (b, row, head, 1))
        local.copy_arrays([_as_columns(lse, q.dtype)], [columns])

    # Every rank: from all rows of its heads back to its rows of all heads.
    out_local = local.empty_out(q, options.layout)
    lse_local = empty_like(q, (batch, geometry.heads, q.shape[1]), lse_dtype)
    targets = [(out_local, 0)]
    if options.return_lse:
        targets.append((_as_columns(lse_local, q.dtype), head_dim))
    to_local(comm, route, back, result, targets)
    return out_local, lse_local


def _as_columns(lse: Any, dtype: Any) -> Any:
    """A view of C-contiguous lse as numbers of another dtype, (batch, seq, heads, columns): two of 16 bits for one of 32."""
    batch, heads, seq = lse.shape
    columns = lse.dtype.itemsize // dtype.itemsize
    shape, strides = (batch, seq, heads, columns), (heads * seq * columns, columns, seq * columns, 1)
    return tensor.usm_ndarray(shape, dtype=dtype, buffer=lse.usm_data, strides=strides)
