"""Attention from its definition, in NumPy float64: what every other implementation is compared with."""

import numpy as np

# absolute, for inputs of the order of 1
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1.6e-2}


def dense_attention(
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
    max_logit=False,
):
    """Attention of (batch, seq, heads, head_dim) arrays; returns out and lse, (batch, heads, seq_q), in float64.

    With cu_seqlens_q the arrays are packed sequences, (total, heads, head_dim), and lse is (heads, total_q). With `max_logit`
    also the largest score of every head.

    A key with score -inf has weight 0; a row without any other key has zeros and lse = -inf, or the sink. Nothing of a hidden
    key, not even nan, reaches the result.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    packed = cu_seqlens_q is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1:3]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    ends_q = cu_seqlens_q if packed else (0, seq_q)
    ends_k = (ends_q if cu_seqlens_k is None else cu_seqlens_k) if packed else (0, seq_k)
    together, distance = positions(ends_q, ends_k, seq_q, seq_k, seqused_q, seqused_k)
    ranged = in_ranges(key_ranges, seq_q, seq_k)
    visible = together & in_window(distance, causal, window_size)
    slopes = np.broadcast_to(0.0 if alibi_slopes is None else alibi_slopes, (batch, heads))
    bias = np.broadcast_to(0.0 if bias is None else bias, (batch, heads, seq_q, seq_k))
    takes_part = np.broadcast_to(True if key_padding_mask is None else key_padding_mask, (batch, seq_k))
    sinks = np.broadcast_to(-np.inf if sinks is None else sinks, (heads,)).astype(np.float64)

    out, lse, largest = np.zeros((*q.shape[:3], v.shape[3])), np.full((batch, heads, seq_q), -np.inf), np.full(heads, -np.inf)
    for b, h in np.ndindex(batch, heads):
        kv_head = h // (heads // kv_heads)
        with np.errstate(invalid="ignore"):  # of nan and inf in keys that may be hidden
            score = scale * (q[b, :, h] @ k[b, :, kv_head].T)
            if softcap > 0:
                score = softcap * np.tanh(score / softcap)
            score = score - float(slopes[b, h]) * abs(distance) + bias[b, h]
        seen = visible & ranged[b % len(ranged)] & takes_part[b] & (bias[b, h] != -np.inf)
        factor = dropout_factors(dropout_p, seed, b, h, seq_q, seq_k)
        for i in range(seq_q):
            row = score[i, seen[i]]
            largest[h] = max(largest[h], row.max(initial=-np.inf))
            highest = max(row.max(initial=-np.inf), sinks[h])
            if highest == -np.inf:
                continue
            weight = np.exp(row - highest)
            total = weight.sum() + np.exp(sinks[h] - highest)
            out[b, i, h] = (factor[i, seen[i]] * weight / total) @ v[b, seen[i], kv_head]
            lse[b, h, i] = highest + np.log(total)
    results = (out[0], lse[0]) if packed else (out, lse)
    return (*results, largest) if max_logit else results


def positions(cu_seqlens_q, cu_seqlens_k, seq_q, seq_k, seqused_q=None, seqused_k=None):
    """Whether query row and key are of one sequence, and by how much the key comes first, counted from the sequences' ends.

    Of a sequence only the rows and keys that are used count.
    """
    together, distance = np.zeros((seq_q, seq_k), bool), np.zeros((seq_q, seq_k))
    for n in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(*map(int, cu_seqlens_q[n : n + 2])), slice(*map(int, cu_seqlens_k[n : n + 2]))
        if seqused_q is not None:
            rows = slice(rows.start, rows.start + int(seqused_q[n]))
        if seqused_k is not None:
            keys = slice(keys.start, keys.start + int(seqused_k[n]))
        from_end_q, from_end_k = (np.arange(x.stop - x.start, 0, -1) for x in (rows, keys))
        together[rows, keys] = True
        distance[rows, keys] = from_end_k - from_end_q[:, None]
    return together, distance


def in_window(distance, causal, window_size):
    """Which keys the causal mask and the window leave."""
    left, right = window_size
    seen = distance >= 0 if causal else np.ones(distance.shape, bool)
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= -distance <= right
    return seen


def in_ranges(key_ranges, seq_q, seq_k):
    """Which keys the ranges leave, (1 or batch, seq_q, seq_k)."""
    if key_ranges is None:
        return np.ones((1, seq_q, seq_k), bool)
    ranges = np.asarray(key_ranges).reshape(-1, seq_q, 2)
    return (ranges[..., :1] <= np.arange(seq_k)) & (np.arange(seq_k) < ranges[..., 1:])


def dropout_factors(dropout_p, seed, b, h, seq_q, seq_k):
    """What the weights of one head are multiplied with, (seq_q, seq_k): 0 or 1 / (1 - dropout_p)."""
    if dropout_p == 0:
        return np.ones((seq_q, seq_k))
    blocks = -(-seq_k // 4)
    counters = np.zeros((4, seq_q, blocks), np.uint64)
    counters[0], counters[1] = np.arange(blocks), np.arange(seq_q)[:, None]
    counters[2:] = np.reshape([h, b], (2, 1, 1))
    words = philox(counters, (seed & 0xFFFFFFFF, seed >> 32))
    words = np.moveaxis(words, 0, -1).reshape(seq_q, 4 * blocks)[:, :seq_k]
    return np.where(words < int(dropout_p * 2**32), 0, 1 / (1 - dropout_p))


def philox(counters, key):
    """Philox4x32-10 (Salmon et al., SC11) of 32-bit numbers held in uint64: (4, ...) counters to (4, ...) random words."""
    c0, c1, c2, c3 = np.asarray(counters, np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for n in range(10):
        k0, k1 = (np.uint64((k + n * weyl) % 2**32) for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (second >> half) ^ c1 ^ k0, second & low, (first >> half) ^ c3 ^ k1, first & low
    return np.stack([c0, c1, c2, c3])


def merged(parts):
    """One (out, lse) of partial results over disjoint keys: out (..., seq, heads, head_dim) with lse (..., heads, seq)."""
    outs, lses = zip(*parts, strict=True)
    lse = np.logaddexp.reduce(lses)
    shares = [np.exp(x - np.where(np.isneginf(lse), 0, lse)) for x in lses]
    return sum(x * share.swapaxes(-1, -2)[..., None] for x, share in zip(outs, shares, strict=True)), lse


def to_bfloat16(x):
    """Numbers rounded to the nearest bfloat16, ties to even, as bit patterns in uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    """The numbers of bfloat16 bit patterns in uint16."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
