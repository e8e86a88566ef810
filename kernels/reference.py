"""What the attention kernels compute, dense in float64 NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .score import dense_kept, dense_scores

if TYPE_CHECKING:
    from .score import ScoreOptions


def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    diagonal: int,
    group: int,
    head_shift: int = 0,
    options: ScoreOptions | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Out and lse of arrays (batch, seq, heads, head_dim), which tests compare with `flash_forward`."""
    q, k, v = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v))
    kv = (np.arange(q.shape[1]) + head_shift) // group
    k, v = k[:, kv], v[:, kv]
    score, _, seen, options = dense_scores(q, k, scale=scale, diagonal=diagonal, options=options)
    weight, lse = _softmax(score, options)
    weight = weight * dense_kept(options, weight.shape)
    out = weight @ np.where(np.isfinite(v), v, 0)
    # what is not finite reaches the queries that see it and, unlike in a product with a weight of 0, no other
    for special in (np.inf, -np.inf, np.nan):
        where = np.isnan(v) if np.isnan(special) else v == special
        if where.any():
            out += np.where(seen.astype(float) @ where > 0, special, 0)
    return out.swapaxes(1, 2), lse


def backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lse: np.ndarray,
    delta: np.ndarray,
    *,
    scale: float,
    diagonal: int,
    group: int,
    head_shift: int = 0,
    options: ScoreOptions | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients dq, dk and dv, which tests compare with `flash_backward`."""
    kv_heads = k.shape[2]
    # an lse above it may have lost the number of keys in rounding; see score.py
    large = 0.5**11 / np.finfo(lse.dtype).eps
    dout, q, k, v = (x.astype(np.float64).swapaxes(1, 2) for x in (dout, q, k, v))
    kv = (np.arange(q.shape[1]) + head_shift) // group
    k, v = k[:, kv], v[:, kv]
    score, derivative, seen, options = dense_scores(q, k, scale=scale, diagonal=diagonal, options=options)
    with np.errstate(invalid="ignore"):
        p = np.where(seen, np.exp(score - lse[..., None]), 0)
        recompute = (abs(lse) > large) & np.isfinite(lse)
        if recompute.any():
            weight, own_lse = _softmax(score, options)
            difference = own_lse - lse  # lse may be that of more keys than these
            share = np.where(difference < -4 * np.finfo(lse.dtype).eps * abs(lse), np.exp(difference), 1)
            p = np.where(recompute[..., None], weight * share[..., None], p)
        dp = dout @ v.swapaxes(2, 3)
        kept = dense_kept(options, score.shape)
        ds = p * (dp * kept - delta[..., None]) * derivative
    ds = np.where(seen, ds, 0)
    k = np.where(seen.any(axis=(0, 1, 2))[:, None], k, 0)  # of keys that nobody sees, which may be nan
    dq = scale * ds @ k
    dk, dv = np.zeros((2, k.shape[0], kv_heads, k.shape[2], k.shape[3]))
    for h, of in enumerate(kv):
        dk[:, of] += scale * ds[:, h].swapaxes(1, 2) @ q[:, h]
        dv[:, of] += (p * kept)[:, h].swapaxes(1, 2) @ dout[:, h]
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def _softmax(score: np.ndarray, options: ScoreOptions) -> tuple[np.ndarray, np.ndarray]:
    """The weights, and the logarithm of their denominators; a sink is a key that has no weight."""
    highest = score.max(axis=-1, keepdims=True, initial=-np.inf)
    if options.sinks is not None:
        highest = np.maximum(highest, options.sinks[:, None, None])
    shift = np.where(np.isneginf(highest), 0, highest)
    weight = np.exp(score - shift)
    total = weight.sum(axis=-1, keepdims=True)
    if options.sinks is not None:
        total = total + np.exp(options.sinks[:, None, None] - shift)
    with np.errstate(divide="ignore"):
        lse = (shift + np.log(total))[..., 0]
    return weight / np.where(total == 0, 1, total), lse
