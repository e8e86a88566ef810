"""The gradient of attention from its formulas, in NumPy float64: what every backward pass is compared with."""

import numpy as np
from oracle import dropout_factors, in_ranges, in_window, positions

# relative to the largest number of a gradient, or to 1 where that is larger: the 16-bit forms round out, too
TOLERANCE = {"float32": 2e-5, "float64": 1e-11, "float16": 3e-3, "bfloat16": 2e-2}


def dense_gradient(
    dout,
    q,
    k,
    v,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    bias=None,
    key_padding_mask=None,
    sinks=None,
    dropout_p=0.0,
    seed=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    key_ranges=None,
    seqused_q=None,
    seqused_k=None,
    dlse=None,
    of_scores=False,
):
    """Gradient of sum(dout * out) + sum(dlse * lse) for arrays and options as in `oracle.dense_attention`.

    Returns dq, dk, dv and dsinks, which are zeros without sinks; or `of_scores` the gradients by slopes of (batch, heads) and
    by a bias of (batch, heads, seq_q, seq_k). The dlse of a query without keys and sink has no effect. Nothing of a key reaches
    the gradients of a query that does not see it, or the reverse, not even nan.
    """
    dout, q, k, v = (np.asarray(x).astype(np.float64) for x in (dout, q, k, v))
    packed = cu_seqlens_q is not None
    if packed:
        dout, q, k, v = dout[None], q[None], k[None], v[None]
    (batch, seq_q, heads, head_dim), (seq_k, kv_heads) = q.shape, k.shape[1:3]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    ends_q = cu_seqlens_q if packed else (0, seq_q)
    ends_k = (ends_q if cu_seqlens_k is None else cu_seqlens_k) if packed else (0, seq_k)
    together, distance = positions(ends_q, ends_k, seq_q, seq_k, seqused_q, seqused_k)
    ranged = in_ranges(key_ranges, seq_q, seq_k)
    slopes = np.broadcast_to(0.0 if alibi_slopes is None else alibi_slopes, (batch, heads)).astype(np.float64)
    bias = np.broadcast_to(0.0 if bias is None else bias, (batch, heads, seq_q, seq_k)).astype(np.float64)
    takes_part = np.broadcast_to(True if key_padding_mask is None else key_padding_mask, (batch, seq_k))
    sinks = np.broadcast_to(-np.inf if sinks is None else sinks, (heads,)).astype(np.float64)[:, None, None]
    seen = together & in_window(distance, causal, window_size) & takes_part[:, None, None] & (bias != -np.inf) & ranged[:, None]
    keep = [dropout_factors(dropout_p, seed, b, h, seq_q, seq_k) for b, h in np.ndindex(batch, heads)]
    keep = np.reshape(keep, seen.shape)

    # (batch, heads, seq, head_dim), and a key head for every query head
    dout, q = (x.swapaxes(1, 2) for x in (dout, q))
    k, v = (x.swapaxes(1, 2).repeat(heads // kv_heads if kv_heads else 1, axis=1) for x in (k, v))
    with np.errstate(invalid="ignore"):  # of nan and inf in rows that may see nothing, or keys that may be hidden
        score = scale * (q @ k.swapaxes(2, 3))
        slope_of_softcap = 1.0
        if softcap > 0:
            score = softcap * np.tanh(score / softcap)
            slope_of_softcap = 1 - (score / softcap) ** 2
        score = np.where(seen, score - slopes[..., None, None] * abs(distance) + bias, -np.inf)
        highest = np.maximum(score.max(axis=-1, keepdims=True, initial=-np.inf), sinks)
        blind = np.isneginf(highest)
        highest = np.where(blind, 0, highest)
        weight, of_sink = np.where(seen, np.exp(score - highest), 0), np.exp(sinks - highest)
        total = weight.sum(axis=-1, keepdims=True) + of_sink
        total = np.where(total == 0, 1, total)
        p, p_sink = weight / total, of_sink / total
        dp = np.where(seen, keep * (dout @ v.swapaxes(2, 3)), 0)
        mean = (p * dp).sum(axis=-1, keepdims=True)
        if dlse is not None:
            mean = mean - np.where(blind, 0, np.asarray(dlse).astype(np.float64).reshape(mean.shape))
        ds = np.where(seen & (p != 0), p * (dp - mean), 0)
        if of_scores:
            return -(ds * abs(distance)).sum(axis=(2, 3)), ds
        ds = scale * slope_of_softcap * ds

    group = (batch, kv_heads, heads // kv_heads if kv_heads else 1)
    dq = product(seen, ds, k)
    dk = product(seen.swapaxes(2, 3), ds.swapaxes(2, 3), q).reshape(*group, seq_k, head_dim).sum(axis=2)
    dv = product(seen.swapaxes(2, 3), (p * keep).swapaxes(2, 3), dout).reshape(*group, seq_k, v.shape[3]).sum(axis=2)
    dq, dk, dv = (x.swapaxes(1, 2) for x in (dq, dk, dv))
    dsinks = -(p_sink * mean).sum(axis=(0, 2, 3))
    return (*((x[0] for x in (dq, dk, dv)) if packed else (dq, dk, dv)), dsinks)


def product(seen, weights, x):
    """weights @ x, to which what is not seen adds nothing, not even nan."""
    if np.isfinite(x).all():
        return np.where(seen, weights, 0) @ x
    with np.errstate(invalid="ignore"):
        return np.where(seen[..., None], weights[..., None] * x[..., None, :, :], 0).sum(axis=-2)


def central_difference(function, arrays, number, index, step=1e-5):
    """Derivative of a function of arrays by one element of one of them."""
    values = []
    for change in (step, -step):
        moved = [x.copy() for x in arrays]
        moved[number][index] += change
        values.append(function(*moved))
    return (values[0] - values[1]) / (2 * step)
