"""Dense attention in NumPy float64, for comparison; the backend AttnType.NUMPY computes the same."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ulysses_dp.kernels import score as score_options
from ulysses_dp.kernels.reference import forward

from ._call.definitions import takes
from ._call.options import ScoreOptions
from ._call.spans import spans
from ._ranks.partition import group_size

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(ScoreOptions)
def dense_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    /,
    **options: Unpack[ScoreOptions],
) -> tuple[np.ndarray, np.ndarray]:
    """Attention straight from its definition, softmax(softmax_scale * q kᵀ) v.

    Not collective. Memory grows with batch * heads * seq_q * seq_k. The arguments are not checked.

    Parameters
    ----------
    q : numpy.ndarray
        Queries, (batch, seq_q, heads, head_dim), any real dtype; computed in float64.
    k, v : numpy.ndarray
        Keys and values, (batch, seq_k, kv_heads, head_dim); heads is a multiple of kv_heads.
    {names}
        As in `attention`, as NumPy arrays; packed sequences are one batch here, too, and `key_ranges` is (seq_q, 2).

    Returns
    -------
    out : numpy.ndarray
        (batch, seq_q, heads, head_dim), float64. Zeros for a query that sees no key.
    lse : numpy.ndarray
        log of the sum of exp(score), (batch, heads, seq_q), float64. -inf for a query that sees no key.

    Raises
    ------
    ValueError
        `key_ranges` differ between batches.

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
    call = inspect.signature(dense_attention).bind(q, k, v, **options)
    call.apply_defaults()
    given = SimpleNamespace(**call.arguments)
    ranges = None if given.key_ranges is None else np.asarray(given.key_ranges, np.int64)
    if ranges is not None and ranges.shape != (seq_q, 2):
        raise ValueError(f"dense_attention: key_ranges must be ({seq_q}, 2), the same for all batches, not {ranges.shape}")
    ends = _numbers(given.cu_seqlens_q)
    score = score_options.ScoreOptions(
        spans=spans(
            seq_q,
            seq_k,
            causal=given.causal,
            window_size=given.window_size,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends if given.cu_seqlens_k is None else _numbers(given.cu_seqlens_k),
            seqused_q=_numbers(given.seqused_q),
            seqused_k=_numbers(given.seqused_k),
            key_ranges=None if ranges is None else ranges.tobytes(),
        ),
        softcap=given.softcap,
        slopes=None if given.alibi_slopes is None else np.asarray(given.alibi_slopes).reshape(-1, heads),
        sinks=None if given.sinks is None else np.asarray(given.sinks),
        bias=given.bias,
        padding=given.key_padding_mask,
        dropout_p=given.dropout_p,
        seed=given.seed or 0,
    )
    scale = head_dim**-0.5 if given.softmax_scale is None else given.softmax_scale
    return forward(q, k, v, scale=scale, diagonal=0, group=group_size(heads, kv_heads), options=score)


def _numbers(x: Any) -> tuple[int, ...] | None:
    return None if x is None else tuple(map(int, x))
