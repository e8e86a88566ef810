"""Dense attention in NumPy float64, for comparison; the backend AttnType.NUMPY computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from ulysses_dp.kernels.reference import forward
from ulysses_dp.kernels.score import ScoreOptions

from ._call.spans import spans
from ._ranks.partition import group_size


def dense_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
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
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention straight from its definition, softmax(softmax_scale * q kᵀ) v.

    Not collective. Memory grows with batch * heads * seq_q * seq_k. The arguments are not checked.

    Parameters
    ----------
    q : numpy.ndarray
        Queries, (batch, seq_q, heads, head_dim), any real dtype; computed in float64.
    k, v : numpy.ndarray
        Keys and values, (batch, seq_k, kv_heads, head_dim); heads is a multiple of kv_heads.
    softmax_scale : float, optional
        Factor of the dot products; 1/sqrt(head_dim) by default.
    causal : bool
        Query i sees the keys j <= i + seq_k - seq_q (the last query sees all keys).
    window_size, softcap, alibi_slopes, bias, key_padding_mask, sinks, cu_seqlens_q, cu_seqlens_k, dropout_p, seed
        As in `attention`, as NumPy arrays; packed sequences are one batch here, too.

    Returns
    -------
    out : numpy.ndarray
        (batch, seq_q, heads, head_dim), float64. Zeros for a query that sees no key.
    lse : numpy.ndarray
        log of the sum of exp(score), (batch, heads, seq_q), float64. -inf for a query that sees no key.

    References
    ----------
    Vaswani et al., "Attention is all you need", 2017; grouped heads: Ainslie et al., "GQA", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp.reference import dense_attention
    >>> q = np.zeros((1, 2, 1, 4))
    >>> v = np.arange(8.0).reshape(1, 2, 1, 4)
    >>> out, lse = dense_attention(q, q, v)  # equal scores: the mean of v
    >>> out[0, 0, 0]
    array([2., 3., 4., 5.])
    >>> print(lse.round(4))
    [[[0.6931 0.6931]]]
    """
    seq_q, heads, head_dim = q.shape[1:]
    seq_k, kv_heads = k.shape[1:3]
    ends = tuple(map(int, cu_seqlens_q)) if cu_seqlens_q is not None else None
    options = ScoreOptions(
        spans=spans(
            *(seq_q, seq_k),
            causal=causal,
            window_size=window_size,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends if cu_seqlens_k is None else tuple(map(int, cu_seqlens_k)),
        ),
        softcap=softcap,
        slopes=None if alibi_slopes is None else np.asarray(alibi_slopes).reshape(-1, heads),
        sinks=None if sinks is None else np.asarray(sinks),
        bias=bias,
        padding=key_padding_mask,
        dropout_p=dropout_p,
        seed=seed,
    )
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    return forward(q, k, v, scale=scale, diagonal=0, group=group_size(heads, kv_heads), options=options)
