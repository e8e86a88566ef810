"""Dense attention in NumPy float64, written from the definition: the oracle of the tests and the backend AttnType.NUMPY."""

from __future__ import annotations

import numpy as np


def dense_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, /, *, softmax_scale: float | None = None, causal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Attention straight from its definition, softmax(softmax_scale * q kᵀ) v.

    Not collective. Memory grows with batch * heads * seq_q * seq_k.

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

    Returns
    -------
    out : numpy.ndarray
        (batch, seq_q, heads, head_dim), float64. Zeros for a query that sees no key.
    lse : numpy.ndarray
        log of the sum of exp(score), (batch, heads, seq_q), float64. -inf for a query that sees no key.

    Raises
    ------
    ValueError
        The shapes do not fit each other.

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
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    seq_q, heads, head_dim = q.shape[1:]
    seq_k, kv_heads = k.shape[1:3]
    if kv_heads:
        k, v = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    scale = 1 / np.sqrt(head_dim) if softmax_scale is None else softmax_scale
    diagonal = seq_k - seq_q if causal else seq_k
    seen = np.arange(seq_k) <= np.arange(seq_q)[:, None] + diagonal
    score = np.where(seen, scale * np.einsum("bihd,bjhd->bhij", q, k), -np.inf)
    highest = score.max(axis=-1, keepdims=True, initial=-np.inf)
    weight = np.exp(score - np.where(np.isneginf(highest), 0, highest))
    total = weight.sum(axis=-1, keepdims=True)
    out = np.einsum("bhij,bjhd->bihd", weight / np.where(total == 0, 1, total), np.where(np.isfinite(v), v, 0))
    # what is not finite reaches the queries that see it and, unlike in a product with a weight of 0, no other
    for special in (np.inf, -np.inf, np.nan):
        where = np.isnan(v) if np.isnan(special) else v == special
        if where.any():
            out += np.where(np.einsum("ij,bjhd->bihd", seen, where) > 0, special, 0)
    with np.errstate(divide="ignore"):
        lse = (highest + np.log(total))[..., 0]
    return out, lse
