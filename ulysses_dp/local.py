"""Attention on one rank: the choice of the backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._arrays import from_usm, tensor, to_usm
from ._layout import Layout, axes_of, from_bshd, inverse, lse_to_user
from ._options import Options, check_attention
from ._partition import HeadMap
from ._trace import call, stage
from ._workspace import empty_like
from .backends import AttnType, LocalAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._validate import Geometry


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
    attn_type: LocalAttention = AttnType.INTEL_SYCL,
) -> Any:
    r"""Attention of one rank, softmax(softmax_scale * q kᵀ) v, without the seq_q x seq_k matrix.

    Not collective. Returns when the result is complete.

    Parameters
    ----------
    q : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Queries, (batch, seq_q, heads, head_dim) or what `layout` says; float32, float64, float16 or bfloat16, any strides.
        head_dim is at most 256.
    k, v : same kind, dtype and device as q
        Keys and values, (batch, seq_k, kv_heads, head_dim). heads is a multiple of kv_heads: query head h reads kv head
        ``h // (heads // kv_heads)``.
    softmax_scale : float, optional
        Factor of the dot products; 1/sqrt(head_dim) by default.
    causal : bool
        Query i sees the keys j <= i + seq_k - seq_q: the mask is aligned to the last query and key, as in flash-attn.
    window_size : (int, int)
        Query i sees the keys from i + seq_k - seq_q - left to i + seq_k - seq_q + right; -1 means no limit. Keys outside the
        window take no time.
    softcap : float
        If positive, a score s becomes softcap * tanh(s / softcap), before ALiBi and bias.
    alibi_slopes : array or sequence of float, optional
        (heads,) or (batch, heads): slope * \|i + seq_k - seq_q - j\| is subtracted from the score of query i and key j.
    bias : array, optional
        Added to the scores; 4 axes, broadcastable to (batch, heads, seq_q, seq_k), float32, float64, float16 or bfloat16, on
        the host or on the queue of q. What it repeats by strides of 0 is not copied. -inf hides a key.
    key_padding_mask : array of bool, optional
        (batch, seq_k): True for the keys that take part.
    sinks : array or sequence of float, optional
        (heads,): a logit per head, whose exponential is added to the softmax denominator.
    cu_seqlens_q, cu_seqlens_k : array or sequence of int, optional
        With layout "thd": where the packed sequences start, from 0 to the number of rows. Queries of a sequence see keys of the
        same sequence only, and `causal`, `window_size` and `alibi_slopes` count within it. `cu_seqlens_k` is `cu_seqlens_q` by
        default.
    dropout_p : float
        Probability with which a weight is dropped; those that stay are divided by 1 - dropout_p. Which ones are dropped is a
        function of seed, batch, head, query and key alone (Philox4x32-10).
    seed : int, optional
        From 0 to 2**64 - 1; needed if dropout_p is positive.
    layout : {"bshd", "sbhd", "bhsd", "thd"} or tuple of int
        The axes of q, k, v and out: b batch, s seq, h heads, d head_dim; t the rows of all packed sequences, which count as one
        batch in bias, key_padding_mask and dropout. A tuple says which axes are batch, seq, heads and head_dim.
    dtype : str, optional
        "bfloat16" if q, k and v are uint16 arrays that hold bfloat16 numbers; USM arrays have no such dtype.
    return_lse : bool
        Also return the logarithm of the softmax denominators.
    attn_type : AttnType, UserAttention or callable
        The implementation: a member of `AttnType`, what `register_attention` returned, or a function as it takes one.

    Returns
    -------
    out : same kind, dtype and device as q
        The axes of q, C-contiguous. Zeros for a query that sees no key.
    lse : same kind and device as q
        Only with `return_lse`: natural logarithm of the softmax denominator, (batch, heads, seq_q), or (heads, total) with
        layout "thd"; float64 if q is, else float32. -inf for a query that sees no key and has no sink.

    Raises
    ------
    TypeError
        An argument is not of a supported kind or dtype, or the kinds or dtypes of q, k and v differ.
    ValueError
        The shapes do not fit each other, a number is out of range, or the arrays are on different queues or devices.
    NotImplementedError
        A torch tensor requires a gradient, or `attn_type` does not have one of the options.
    ImportError
        `attn_type` needs a package that is not installed.

    Notes
    -----
    The kernel follows FlashAttention-2 (Dao, arXiv:2307.08691); see ``kernels/flash_forward.py``. 16-bit arrays are computed in
    float32, in copies. A key that a query does not see has no influence on it, even if it is nan or infinite.

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
    views, geometry, options = check_attention(
        *(q, k, v),
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
    options.check_lengths("attention", views[0].shape[1], views[1].shape[1])
    # Delegate.
    with call("attention"):
        out, lse = attend_whole([to_usm(x) for x in views], geometry, options)
        return results_to_user(out, lse, options, q)


def attend_whole(arrays: Sequence[Any], geometry: Geometry, options: Options) -> tuple[Any, Any]:
    """Attention of USM arrays with all rows and all heads, into new arrays; out is C-contiguous in the order of the layout."""
    q, k, v = arrays
    out = empty_out(q, options.layout)
    lse = None
    if options.return_lse:
        lse = empty_like(q, (geometry.batch, geometry.heads, q.shape[1]), geometry.compute_dtype)
    attend(q, k, v, out, lse, options, HeadMap(geometry.group))
    return out, lse


def empty_out(q: Any, layout: Layout) -> Any:
    """A new USM array for the result, (batch, seq, heads, head_dim), that is C-contiguous in the order of the layout.

    Only where head_dim, which the kernels write densely, is not the last axis of the layout, it is so in the order bshd.
    """
    axes = axes_of(layout)
    if axes[3] != 3 or axes == (0, 1, 2, 3):
        return empty_like(q, q.shape)
    order = inverse(axes)
    return tensor.permute_dims(empty_like(q, tuple(q.shape[axis] for axis in order)), axes)


def results_to_user(out: Any, lse: Any, options: Options, like: Any) -> Any:
    """The results of USM arrays as the user wants them: the axes of the layout, and the kind of `like`."""
    out = from_usm(from_bshd(out, options.layout), like)
    return (out, from_usm(lse_to_user(lse, options.layout), like)) if options.return_lse else out


def attend(q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
    """Compute attention of USM arrays into `out`, which is dense in the last axis, and `lse`, if that is not None."""
    with stage("attention"):
        if out.size:
            options.backend.forward(q, k, v, out, lse, options, heads)
