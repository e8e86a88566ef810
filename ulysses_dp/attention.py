"""Attention of a sequence that is split over the ranks: Ulysses."""

from __future__ import annotations

from typing import Any

from . import _exchange, local
from ._arrays import empty_like, from_usm, permute, scratch, to_usm, view
from ._partition import Trade, share_heads
from ._validate import NAMES, Geometry, Names, Options, agree, check_attention, check_exchange
from .backend import AttnType
from .redistribute import column, inverse, to_gathered, to_local

BSHD = (0, 1, 2, 3)


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
    sinks: Any = None,
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
    q : dpnp.ndarray, usm_ndarray or numpy.ndarray
        Queries of this rank, (batch, seq_local, heads, head_dim), float32 or float64, any strides. The ranks hold consecutive
        rows in rank order; seq_local may differ between ranks and may be 0. head_dim is at most 256.
    k, v : same kind, dtype and queue as q
        Keys and values of this rank, (batch, seq_k_local, kv_heads, head_dim). heads is a multiple of kv_heads: query head h
        reads kv head ``h // (heads // kv_heads)``. If on any rank seq_k_local is not seq_local, k and v travel in a message
        of their own.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default. heads need not be a multiple of the number of ranks, nor be as many.
    softmax_scale : float, optional
        Factor of the dot products; 1/sqrt(head_dim) by default.
    causal : bool
        Query i sees the keys j <= i + seq_k - seq_q, in rows of the whole sequences: the mask is aligned to the last query and
        key, as in flash-attn.
    window_size, softcap, alibi_slopes, sinks
        Not supported yet; NotImplementedError unless left at their defaults.
    return_lse : bool
        Also return the logarithm of the softmax denominators.
    attn_type : AttnType
        The implementation of the local attention.
    exchange : {"auto", "device", "host"}
        Give MPI the device pointers, or copy through pinned host memory; "auto" finds out what MPI supports.

    Returns
    -------
    out : same kind, dtype and queue as q
        (batch, seq_local, heads, head_dim), C-contiguous. Zeros for a query that sees no key.
    lse : same kind, dtype and queue as q
        Only with `return_lse`: natural logarithm of the sum of exp(score), (batch, heads, seq_local).

    Raises
    ------
    TypeError
        On all ranks, if on any rank an argument is not of a supported kind or dtype.
    ValueError
        On all ranks, if on any rank the shapes do not fit each other, head_dim is above 256, or the arrays are on different
        queues; or if the ranks disagree on anything but the number of their rows.
    NotImplementedError
        On all ranks, if any rank gives an option that is not supported yet.

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
        sinks=sinks,
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
    axes: tuple[int, ...] = BSHD,
    names: Names = NAMES,
    **options: Any,
) -> Any:
    """`ulysses_attention` under any public name, for arrays of which `axes` are (batch, seq, heads, head_dim)."""
    comm = _exchange.resolve_comm(function, comm, names.comm)
    q, k, v = (permute(x, axes) for x in (q, k, v))

    # Validate inputs.
    def check() -> tuple[tuple[int, ...], dict[str, Any], tuple[Any, Geometry, Options]]:
        kind, geometry, settings = check_attention(q, k, v, names, **options)
        check_exchange(exchange)
        return (q.shape[1], k.shape[1]), {**vars(geometry), **vars(settings), "axes": axes}, (kind, geometry, settings)

    rows, (kind, geometry, settings) = agree(comm, function, check)
    # Delegate.
    q, k, v = (to_usm(x, kind) for x in (q, k, v))
    if comm.size == 1:
        out, lse = local.attend_whole(q, k, v, geometry, settings)
    else:
        route = _exchange.choose_route(q.sycl_queue, exchange)
        out, lse = _attend_split(comm, route, q, k, v, column(rows, 0), column(rows, 1), geometry, settings)
    out = from_usm(permute(out, inverse(axes)), kind)
    return (out, from_usm(lse, kind)) if settings.return_lse else out


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

    # Local attention. The result, with lse as one more column if it is wanted, is the send buffer of the way back.
    seq, batch, head_dim = sum(q_rows), geometry.batch, geometry.head_dim
    width = head_dim + options.return_lse
    back = Trade(comm.rank, q_rows, column(q_heads, 1), batch, width)
    count = back.slots[comm.rank]
    result = scratch(q.sycl_queue, "result", (sum(back.gathered_counts),), q.dtype)
    row, b, head = batch * count * width, count * width, width
    out = view(result, 0, (batch, seq, count, head_dim), (b, row, head, 1))
    if options.return_lse:
        lse = view(result, head_dim, (batch, count, seq), (b, head, row))
    else:
        lse = scratch(q.sycl_queue, "lse", (batch, count, seq), q.dtype)
    shift = heads[comm.rank].shift
    local.attend(q_all, k_all, v_all, out, lse, options, group=geometry.group, head_shift=shift)

    # Every rank: from all rows of its heads back to its rows of all heads.
    out_local = empty_like(q, q.shape)
    lse_local = empty_like(q, (batch, geometry.heads, q.shape[1]))
    targets = [(out_local, 0)]
    if options.return_lse:
        lse_batch, lse_head, lse_seq = lse_local.strides
        shape, strides = (batch, q.shape[1], geometry.heads, 1), (lse_batch, lse_seq, lse_head, 1)
        targets.append((view(lse_local, 0, shape, strides), head_dim))
    to_local(comm, route, back, result, targets)
    return out_local, lse_local
