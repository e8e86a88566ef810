"""Attention on one rank: the choice of the backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ulysses_dp.kernels.flash_forward import flash_forward
from ulysses_dp.kernels.flash_forward_gpu import flash_forward_gpu
from ulysses_dp.kernels.relayout import Panel, relayout, source_of, target_of

from ._arrays import empty_like, from_usm, scratch, tensor, to_usm, view
from ._trace import stage
from ._validate import Geometry, Options, check_attention
from .backend import AttnType
from .reference import dense_attention
from .schedule import choose

# Query rows times head_dim from which the CPU kernel gets copies of k and v with the rows of a head next to each other. With
# the heads in between, the rows of one head fall into an eighth of the cache sets. Measured for 8 heads of 64 and 128: 1.15 to
# 1.35 times as fast with the copies for 2048 and 4096 rows, 1.0 and 1.06 times for 1024, slower below.
HEAD_MAJOR_FROM = 1024 * 64


def attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    attn_type: AttnType = AttnType.INTEL_SYCL,
) -> Any:
    """Attention of one rank, softmax(softmax_scale * q kᵀ) v, without the seq_q x seq_k matrix.

    Not collective. Returns when the result is complete.

    Parameters
    ----------
    q : dpnp.ndarray, usm_ndarray or numpy.ndarray
        Queries, (batch, seq_q, heads, head_dim), float32 or float64, any strides. head_dim is at most 256.
    k, v : same kind, dtype and queue as q
        Keys and values, (batch, seq_k, kv_heads, head_dim). heads is a multiple of kv_heads: query head h reads kv head
        ``h // (heads // kv_heads)``.
    softmax_scale : float, optional
        Factor of the dot products; 1/sqrt(head_dim) by default.
    causal : bool
        Query i sees the keys j <= i + seq_k - seq_q: the mask is aligned to the last query and key, as in flash-attn.
    window_size, softcap, alibi_slopes, sinks
        Not supported yet; NotImplementedError unless left at their defaults.
    return_lse : bool
        Also return the logarithm of the softmax denominators.
    attn_type : AttnType
        The implementation.

    Returns
    -------
    out : same kind, dtype and queue as q
        (batch, seq_q, heads, head_dim), C-contiguous. Zeros for a query that sees no key.
    lse : same kind, dtype and queue as q
        Only with `return_lse`: natural logarithm of the sum of exp(score), (batch, heads, seq_q); -inf for a query that
        sees no key.

    Raises
    ------
    TypeError
        An argument is not of a supported kind or dtype, or the kinds or dtypes of q, k and v differ.
    ValueError
        The shapes do not fit each other, head_dim is above 256, or the arrays are on different queues.
    NotImplementedError
        An option that is not supported yet is given.

    Notes
    -----
    The kernel follows FlashAttention-2 (Dao, arXiv:2307.08691); see ``kernels/flash_forward.py``.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 5, 2, 8), dtype=np.float32)
    >>> out = attention(q, k, v, causal=True)
    >>> out.shape
    (1, 5, 2, 8)
    >>> bool(np.allclose(out[0, 0], v[0, 0]))  # the first query sees the first key alone
    True
    """
    # Validate inputs.
    kind, geometry, options = check_attention(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        return_lse=return_lse,
        attn_type=attn_type,
    )
    # Delegate.
    q, k, v = (to_usm(x, kind) for x in (q, k, v))
    out, lse = attend_whole(q, k, v, geometry, options)
    return (from_usm(out, kind), from_usm(lse, kind)) if options.return_lse else from_usm(out, kind)


def attend_whole(q: Any, k: Any, v: Any, geometry: Geometry, options: Options) -> tuple[Any, Any]:
    """Attention of USM arrays with all rows and all heads, into new arrays."""
    q, k, v = (_dense_last_axis(x) for x in (q, k, v))
    out = empty_like(q, q.shape)
    lse_shape = (geometry.batch, geometry.heads, q.shape[1])
    lse = empty_like(q, lse_shape) if options.return_lse else scratch(q.sycl_queue, "lse", lse_shape, q.dtype)
    attend(q, k, v, out, lse, options, group=geometry.group)
    return out, lse


def attend(q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, *, group: int, head_shift: int = 0) -> None:
    """Compute attention of USM arrays into `out` and `lse`; query head h reads kv head ``(h + head_shift) // group``."""
    with stage("attention"):
        if out.size == 0:
            return
        if options.attn_type is AttnType.NUMPY:
            kv = (np.arange(q.shape[2]) + head_shift) // group
            queries, keys, values = (tensor.asnumpy(x) for x in (q, k, v))
            results = dense_attention(
                queries, keys[:, :, kv], values[:, :, kv], softmax_scale=options.softmax_scale, causal=options.causal
            )
            for target, result in zip((out, lse), results, strict=True):
                target[...] = tensor.asarray(result, dtype=target.dtype, sycl_queue=target.sycl_queue)
        else:
            options_of_kernel = {
                "scale": options.softmax_scale,
                "diagonal": k.shape[1] - q.shape[1] if options.causal else k.shape[1],
                "group": group,
                "head_shift": head_shift,
            }
            queue = q.sycl_queue
            schedule = choose(queue.sycl_device, q.dtype, q.shape[3], q.shape[1])
            if schedule == "gpu":
                flash_forward_gpu(q, k, v, out, lse, partial(scratch, queue, dtype=q.dtype), **options_of_kernel)
            else:
                if q.shape[1] * q.shape[3] >= HEAD_MAJOR_FROM:
                    k, v = _head_major(k, v)
                flash_forward(q, k, v, out, lse, tile=schedule, **options_of_kernel)


def _head_major(k: Any, v: Any) -> tuple[Any, Any]:
    """The arrays themselves if the rows of a head follow each other, or else such copies in scratch memory."""
    _, seq, heads, width = k.shape
    if k.strides[1] == v.strides[1] == width or k.size == 0:
        return k, v
    memory = scratch(k.sycl_queue, "k, v", (2 * k.size,), k.dtype)
    strides = (heads * seq * width, width, seq * width, 1)
    copies = view(memory, 0, k.shape, strides), view(memory, k.size, k.shape, strides)
    _copy((k, v), copies)
    return copies


def _dense_last_axis(x: Any) -> Any:
    """The array itself, or a copy if its last axis is strided, which the kernels do not read."""
    if x.strides[3] == 1 or x.shape[3] == 1 or x.size == 0:
        return x
    copy = empty_like(x, x.shape)
    _copy((x,), (copy,))
    return copy


def _copy(sources: tuple[Any, ...], targets: tuple[Any, ...]) -> None:
    """Copy arrays of one shape in one launch; the targets are dense in the last axis."""
    batch, seq, heads, width = sources[0].shape
    pairs = enumerate(zip(sources, targets, strict=True))
    panels = [Panel(*source_of(n, x), *target_of(n, y), heads, width) for n, (x, y) in pairs]
    relayout(sources, targets, panels, rows=seq, batch=batch)
