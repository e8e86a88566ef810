"""Attention and its gradient from the definition in float64, with what rounding may do to every number; for `fuzz.py` alone."""

import numpy as np


def attention(
    q,
    k,
    v,
    dout=None,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    bias=None,
    key_padding_mask=None,
    sinks=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    dropout_p=0.0,
    seed=0,
    key_ranges=None,
    dlse=None,
    bias_shape=None,
    unit=2.0**-23,
    unit_of_scores=None,
    stored=0.0,
):
    """Results by name, each (value, tolerance), of (batch, seq, heads, head_dim) arrays; packed sequences are one batch.

    `unit` is the rounding of the computation, `unit_of_scores` that of its scores where it is another, `stored` that of out and
    the gradients. What may depend on nan has no tolerance: a row that sees nan, and a key that such a row sees. A bias that
    swallows all scores of a row is taken to do just that.
    """
    (batch, seq_q, heads, width), (seq_k, kv_heads) = q.shape, k.shape[1:3]
    group, scale = heads // kv_heads if kv_heads else 1, width**-0.5 if softmax_scale is None else softmax_scale
    seen, ahead = visible(seq_q, seq_k, causal, window_size, cu_seqlens_q, cu_seqlens_k)
    shape = batch, heads, seq_q, seq_k
    bias = np.broadcast_to(0.0 if bias is None else bias, shape)
    seen = np.broadcast_to(seen, shape) & (bias > -np.inf)
    if key_ranges is not None:
        first, end = (x[:, None, :, None] for x in np.moveaxis(np.broadcast_to(key_ranges, (batch, seq_q, 2)), -1, 0))
        seen = seen & (first <= np.arange(seq_k)) & (np.arange(seq_k) < end)
    if key_padding_mask is not None:
        seen = seen & key_padding_mask[:, None, None, :]
    # (batch, heads, seq, width), a kv head for every query head
    q, dout = (None if x is None else x.swapaxes(1, 2) for x in (q, dout))
    k, v = (np.repeat(x.swapaxes(1, 2), group, axis=1)[:, :heads] for x in (k, v))
    spoilt_key = np.isnan(k).any(-1) | np.isnan(v).any(-1)
    spoilt = np.isnan(q).any(-1) | (seen & spoilt_key[:, :, None, :]).any(-1)
    q, k, v = (np.nan_to_num(x, nan=0.0) for x in (q, k, v))

    of_scores = unit if unit_of_scores is None else unit_of_scores
    score, error = scale * (q @ t(k)), 4 * of_scores * abs(scale) * (abs(q) @ t(abs(k)))
    bend, bend_error = np.ones(shape), 0.0
    if softcap:
        bent = np.tanh(score / softcap)
        bend, bend_error = 1 - bent**2, np.minimum(1, 2 * error / softcap + 8 * of_scores)
        score, error = softcap * bent, np.minimum(error, 2 * softcap) + 4 * of_scores * softcap
    slopes = np.broadcast_to(0.0 if alibi_slopes is None else np.asarray(alibi_slopes), (batch, heads))[..., None, None]
    score = score - slopes * abs(ahead)
    swallowed = min(of_scores, 2.0**-23) * abs(np.where(seen, bias, 0)) > 4 * abs(score)
    swallowed = (swallowed | ~seen).all(-1, keepdims=True) & seen
    error = np.where(swallowed, 0, error + 2 * of_scores * (abs(slopes * ahead) + abs(np.where(seen, bias, 0)) + abs(score)))
    score = np.where(seen, np.where(swallowed, bias, score + np.where(seen, bias, 0)), -np.inf)

    sinks = np.broadcast_to(-np.inf if sinks is None else np.asarray(sinks), (heads,))[:, None]
    highest = np.maximum(score.max(-1, initial=-np.inf), sinks)
    safe = np.where(np.isneginf(highest), 0, highest)
    weight, of_sink = np.exp(score - safe[..., None]), np.exp(sinks - safe)
    total = weight.sum(-1) + of_sink
    with np.errstate(divide="ignore"):
        lse = safe + np.log(total)
    total = np.where(total == 0, 1, total)
    p, p_sink = weight / total[..., None], of_sink / total
    keep = dropout(dropout_p, seed, shape)
    weight = p * keep
    lse_error = (p * error).sum(-1) + unit * (8 + 2 * abs(np.where(np.isneginf(lse), 0, lse)))
    # swallowed scores are as large as lse and equal: what is left of them when lse is taken off is exact
    by_lse = np.where(swallowed & (p > 0), 8 * unit, lse_error[..., None])
    relative = error + by_lse + 16 * unit
    relative[relative > 0.2] = 1e30  # nothing is left of the weight
    tiny = 2.0**-24 if stored > 2.0**-20 else 0.0  # what is left of the smallest numbers of 16 bits
    weight_error = times(weight, relative)
    out = weight @ v
    out_error = weight_error @ abs(v) + 8 * unit * weight @ abs(v) + stored * abs(out) + tiny

    def spoil(x, where):
        return np.where(where, np.inf, 4 * x + 1e-30 + tiny)

    results = {
        "out": (out.swapaxes(1, 2), spoil(out_error, spoilt[..., None]).swapaxes(1, 2)),
        "lse": (lse, spoil(lse_error, spoilt)),
    }
    largest = score.max((0, 2, 3), initial=-np.inf)
    slack = np.where(seen, error + 4 * unit * abs(np.where(seen, score, 0)), 0).max((0, 2, 3), initial=0.0)
    results["max_logit"] = largest, spoil(slack, spoilt.any((0, 2)))
    if dout is None:
        return results
    spoilt = spoilt | np.isnan(dout).any(-1)
    dout = np.nan_to_num(dout, nan=0.0)
    of_key = (seen & spoilt[..., None]).any(-2) | spoilt_key
    dp, dp_size = keep * (dout @ t(v)), keep * (abs(dout) @ t(abs(v)))
    delta, delta_size, delta_error = (
        (x * y).sum(-1)[..., None] for x, y in ((dout, out), (abs(dout), abs(out)), (abs(dout), out_error))
    )
    if dlse is not None:
        of_lse = np.where(np.isneginf(lse), 0, dlse)[..., None]
        delta, delta_size = delta - of_lse, delta_size + abs(of_lse)
    of_score = p * (dp - delta)
    of_score_error = times(abs(of_score), relative) + p * (8 * unit * (dp_size + delta_size) + delta_error)
    of_score_error = np.where(seen & spoilt[..., None], np.inf, of_score_error)
    for name, factor, shape_of in (("dslopes", -abs(ahead), (batch, heads, 1, 1)), ("dbias", 1, bias_shape)):
        if shape_of is None:
            continue
        axes = tuple(axis for axis, (n, m) in enumerate(zip(shape_of, shape, strict=True)) if n == 1 != m)
        terms = np.sqrt(np.prod([shape[axis] for axis in axes]))
        value, size = ((x * factor).sum(axes, keepdims=True) for x in (of_score, abs(of_score)))
        slack = np.multiply(of_score_error, abs(factor), out=np.zeros(shape), where=np.broadcast_to(factor, shape) != 0)
        results[name] = value, 4 * slack.sum(axes, keepdims=True) + 8 * terms * unit * abs(size) + 1e-30
    ds = scale * bend * of_score
    ds_error = times(abs(ds), relative) + abs(scale) * p * (8 * unit * (dp_size + delta_size) + delta_error)
    ds_error = ds_error + abs(scale) * p * abs(dp - delta) * bend_error

    def by_key(x):
        """The sum over the query heads of a kv head."""
        return x.reshape(batch, kv_heads, group, seq_k, x.shape[-1]).sum(2).swapaxes(1, 2)

    dq, dq_error = ds @ k, ds_error @ abs(k) + 8 * unit * abs(ds) @ abs(k)
    dk, dk_error = t(ds) @ q, t(ds_error) @ abs(q) + 8 * unit * t(abs(ds)) @ abs(q)
    dv, dv_error = t(weight) @ dout, t(weight_error) @ abs(dout) + 8 * unit * t(weight) @ abs(dout)
    results["dq"] = dq.swapaxes(1, 2), spoil(dq_error + stored * abs(dq), spoilt[..., None]).swapaxes(1, 2)
    for name, x, x_error in (("dk", dk, dk_error), ("dv", dv, dv_error)):
        if not heads:
            results[name] = (np.zeros((batch, seq_k, kv_heads, q.shape[-1] if name == "dk" else dout.shape[-1])),) * 2
            continue
        # rounded once per head where a backend adds up what is stored
        results[name] = by_key(x), by_key(spoil(x_error + stored * abs(x), of_key[..., None]))
    delta, delta_size, delta_error = delta[..., 0], delta_size[..., 0], delta_error[..., 0]
    dsinks_error = p_sink * (delta_error + delta_size * (16 * unit + lse_error))
    results["dsinks"] = -(p_sink * delta).sum((0, 2)), spoil(dsinks_error, spoilt).sum((0, 2))
    return results


def t(x):
    """The transposed matrices."""
    return x.swapaxes(-1, -2)


def times(x, error):
    """The product, in which nothing of 0 is wrong."""
    return np.multiply(x, error, out=np.zeros(np.broadcast_shapes(x.shape, error.shape)), where=x > 0)


def visible(seq_q, seq_k, causal, window_size, starts_q, starts_k):
    """Which keys a query may see, and by how many places a key is ahead of it; both (seq_q, seq_k)."""
    if starts_q is None:
        starts_q, starts_k = (0, seq_q), (0, seq_k)
    starts_k = starts_q if starts_k is None else starts_k
    owner_q, owner_k = (np.searchsorted(x, np.arange(n), "right") for x, n in ((starts_q, seq_q), (starts_k, seq_k)))
    i, j = np.arange(seq_q) - np.asarray(starts_q)[owner_q], np.arange(seq_k) - np.asarray(starts_k)[owner_k]
    ahead = j - i[:, None]
    (left, right), far = window_size, seq_q + seq_k
    right = min(far if right < 0 else right, 0 if causal else far)
    return (owner_q[:, None] == owner_k) & (ahead <= right) & (-ahead <= (far if left < 0 else left)), ahead


def dropout(dropout_p, seed, shape):
    """What every weight is multiplied with: 0, or 1 / (1 - dropout_p); Philox4x32-10 by (key // 4, row, head, batch)."""
    if not dropout_p:
        return np.ones(shape)
    b, h, i, j = np.indices(shape, dtype=np.uint64)
    words, key, mask = [j // 4, i, h, b], [seed & 0xFFFFFFFF, seed >> 32], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        high, low = zip(*(divmod(words[n] * np.uint64(m), 2**32) for n, m in ((0, 0xD2511F53), (2, 0xCD9E8D57))), strict=True)
        words = [high[1] ^ words[1] ^ np.uint64(key[0]), low[1] & mask, high[0] ^ words[3] ^ np.uint64(key[1]), low[0] & mask]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return np.where(np.choose((j % 4).astype(int), words) < int(dropout_p * 2**32), 0, 1 / (1 - dropout_p))


def merge(parts):
    """(out, lse) of partial results over different keys; out is (…, seq, heads, width), lse (…, heads, seq)."""
    lses = np.stack([lse for _, lse in parts])
    highest = lses.max(0)
    weights = np.exp(lses - np.where(np.isneginf(highest), 0, highest))
    total = weights.sum(0)
    with np.errstate(divide="ignore"):
        lse = np.where(np.isneginf(highest), -np.inf, highest + np.log(total))
    shares = weights / np.where(total == 0, 1, total)
    return sum(
        t(share)[..., None] * np.where(t(share)[..., None] > 0, out, 0) for share, (out, _) in zip(shares, parts, strict=True)
    ), lse
