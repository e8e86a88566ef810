"""Attention row by row from its definition, in NumPy float64: what every other implementation is compared with."""

import numpy as np

# absolute, for inputs of the order of 1
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def dense_attention(q, k, v, *, softmax_scale=None, causal=False):
    """Attention of (batch, seq, heads, head_dim) arrays; returns out and lse, (batch, heads, seq_q), in float64.

    A key with score -inf has weight 0; a row without any other key has zeros and lse = -inf.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1:3]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out, lse = np.zeros(q.shape), np.full((batch, heads, seq_q), -np.inf)
    for b, h, i in np.ndindex(batch, heads, seq_q):
        # counted from the ends of both sequences, which is where the causal mask is aligned
        seen = [j for j in range(seq_k) if not causal or seq_k - j >= seq_q - i]
        kv_head = h // (heads // kv_heads)
        score = scale * k[b, seen, kv_head] @ q[b, i, h]
        highest = score.max(initial=-np.inf)
        if highest == -np.inf:
            continue
        weight = np.exp(score - highest)
        out[b, i, h] = weight @ v[b, seen, kv_head] / weight.sum()
        lse[b, h, i] = highest + np.log(weight.sum())
    return out, lse
