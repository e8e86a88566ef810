"""What the attention kernels compute, dense in float64 NumPy; the keywords are the fields of `Problem`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import Problem
from .score import dense_distance, dense_kept, dense_scores, largest_exact_lse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .score import ScoreOptions


@np.errstate(invalid="ignore")  # of what is not finite, whether seen or not
def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, **problem: Any) -> tuple[np.ndarray, np.ndarray]:
    """Out and lse of arrays (batch, seq, heads, head_dim), which tests compare with `flash_forward`."""
    call = Problem(**problem)
    q, k, v, _ = _by_heads(call, q, k, v)
    score, _, seen, options = _scores(call, q, k)
    weight, lse = _softmax(score, options)
    out = _product(seen, weight * dense_kept(options, weight.shape), v)
    return out.swapaxes(1, 2), lse


@np.errstate(invalid="ignore")
def backward(*arrays: np.ndarray, **problem: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients dq, dk and dv by dout, q, k, v, lse and delta, which tests compare with `flash_backward`."""
    _, _, k, v, *_ = arrays
    call = Problem(**problem)
    found = _differentiate(*arrays, call)
    ds, by_key = found.ds * found.derivative, found.seen.swapaxes(2, 3)
    dq = call.scale * _product(found.seen, ds, found.k)
    dk, dv = (np.zeros((x.shape[0], x.shape[2], x.shape[1], x.shape[3])) for x in (k, v))
    for total, weight, x in ((dk, call.scale * ds, found.q), (dv, found.weight, found.dout)):
        np.add.at(total, (slice(None), found.kv), _product(by_key, weight.swapaxes(2, 3), x))
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


@np.errstate(invalid="ignore")
def score_gradient(*arrays: np.ndarray, keeps: Sequence[bool], by_slope: bool, **problem: Any) -> np.ndarray:
    """The gradient of what is added to scores, for the arguments of `backward`; tests compare it with `score_walk`.

    It is (batch, heads, queries, keys), of which those that are not kept are added up; `by_slope`, of it times what a slope is
    multiplied with.
    """
    found = _differentiate(*arrays, Problem(**problem))
    ds: np.ndarray = np.where(found.seen & (found.p != 0), found.ds, 0) * (-found.distance if by_slope else 1)
    return ds.sum(axis=tuple(axis for axis, keep in enumerate(keeps) if not keep), keepdims=True)


@np.errstate(invalid="ignore")
def largest_scores(q: np.ndarray, k: np.ndarray, **problem: Any) -> np.ndarray:
    """The largest score of every query, (batch, heads, seq_q), -inf without any; tests compare it with `score_walk`."""
    call = Problem(**problem)
    q, k, _ = _by_heads(call, q, k)
    score, *_ = _scores(call, q, k)
    return score.max(axis=-1, initial=-np.inf)


def _by_heads(call: Problem, q: np.ndarray, *of_keys: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays as (batch, heads, seq, head_dim), float64, and of which head of the keys every query head reads."""
    kv = (np.arange(q.shape[2]) + call.head_shift) // call.group
    q, *of_keys = (x.astype(np.float64).swapaxes(1, 2) for x in (q, *of_keys))
    return q, *(x[:, kv] for x in of_keys), kv


def _scores(call: Problem, q: np.ndarray, k: np.ndarray) -> Any:
    return dense_scores(q, k, scale=call.scale, diagonal=call.diagonal, options=call.options)


def _differentiate(
    dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, lse: np.ndarray, delta: np.ndarray, call: Problem
) -> SimpleNamespace:
    """Weights and gradients of all scores, (batch, heads, seq_q, seq_k), and dout, q and k by heads."""
    large = largest_exact_lse(lse.dtype)
    dout = dout.astype(np.float64).swapaxes(1, 2)
    q, k, v, kv = _by_heads(call, q, k, v)
    score, derivative, seen, options = _scores(call, q, k)
    p = np.where(seen, np.exp(score - lse[..., None]), 0)
    recompute = (abs(lse) > large) & np.isfinite(lse)
    if recompute.any():
        weight, own_lse = _softmax(score, options)
        difference = own_lse - lse  # lse may be that of more keys than these
        share = np.where(difference < -4 * np.finfo(lse.dtype).eps * abs(lse), np.exp(difference), 1)
        p = np.where(recompute[..., None], weight * share[..., None], p)
    dp = dout @ v.swapaxes(2, 3)
    kept = dense_kept(options, score.shape)
    return SimpleNamespace(
        dout=dout,
        q=q,
        k=k,
        kv=kv,  # of which head every query head reads
        seen=seen,
        p=p,
        weight=p * kept,
        ds=p * (dp * kept - delta[..., None]),  # by what is added to the scores
        derivative=derivative,  # of the soft cap
        distance=dense_distance(options, k.shape[2]),
    )


def _product(seen: np.ndarray, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """weight @ x, to which what is not seen adds nothing, not even nan."""
    special = ~np.isfinite(x).all(axis=(0, 1, 3))
    result: np.ndarray = np.where(seen, weight, 0) @ np.where(special[:, None], 0, x)
    for j in np.flatnonzero(special):
        result += np.where(seen[..., j, None], weight[..., j, None] * x[:, :, j, None], 0)
    return result


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
