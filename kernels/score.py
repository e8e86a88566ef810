"""The score of a query and a key, and what becomes of it: scale, soft cap, ALiBi, bias, padding, span, softmax, dropout.

    dot  ── scale, soft cap ── + ALiBi ── + bias ── hidden? -inf ── exp(score - lse) = p ── dropout

Everything that more than one kernel must agree on is here once: what a call passes to the kernels (`ScoreOptions` and, as the
kernels get it, `OPTION_ARGUMENTS`), every stage with its derivative as the kernels compute it (`stages`), and the same in
NumPy (`dense_scores`, `dense_probabilities`). A new option is an entry in each.

Scores are natural logarithms: a bias may be any finite number, and in other units the largest ones would overflow.

Dropout draws from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a function of seed,
batch, head, row and key alone, so that no split of the work changes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """What the kernels with options take besides; everything for the query heads of this call alone."""

    # (seq_q, 3), int64: the first of these keys that a row sees, their end, and of the key on its diagonal the number in the
    # whole sequence
    spans: np.ndarray
    softcap: float = 0.0  # 0: none
    slopes: np.ndarray | None = None  # (1 or batch, heads), float64
    sinks: np.ndarray | None = None  # (heads,), float64
    bias: Any = None  # (batch, heads, seq_q, seq_k) of the kernel's dtype, broadcast by strides of 0
    padding: np.ndarray | None = None  # (1 or batch, seq_k), bool: True for the keys that take part
    dropout_p: float = 0.0
    seed: int = 0
    first_head: int = 0  # number of the first of these heads among all heads, for dropout
    # the numbers of these rows and keys in the whole sequence: i-th row is first_row + i * step, key j first_key + j * step
    first_row: int = 0
    first_key: int = 0
    step: int = 1


class OptionNumbers(NamedTuple):
    """The options of a call that are numbers, as the kernels take them."""

    per_head_batch: int = 0
    use_slopes: int = 0
    use_sinks: int = 0
    use_bias: int = 0
    use_padding: int = 0
    bias_offset: int = 0
    bias_batch: int = 0
    bias_head: int = 0
    bias_seq: int = 0
    bias_key: int = 0
    padding_batch: int = 0
    threshold: int = 0  # of the random words, those below it drop a weight
    seed: int = 0
    first_head: int = 0
    first_row: int = 0
    first_key: int = 0
    step: int = 1
    softcap: float = 0.0
    per_softcap: float = 0.0  # 1 / softcap
    keep_scale: float = 1.0  # of the weights that dropout keeps


# per_head: slope and sink of every head; bias; padding: 1 for the keys that take part, else 0
OPTION_ARGUMENTS = (("per_head", "pointer"), ("bias", "pointer"), ("padding", "pointer"), ("options", OptionNumbers))


def option_numbers(options: ScoreOptions, heads: int, bias_at: tuple[int, ...], largest: float) -> OptionNumbers:
    """The numbers for these many query heads; of the bias offset and strides, of the dtype of the scores the largest number."""
    slopes, padding, softcap = options.slopes, options.padding, options.softcap
    bias_offset, bias_batch, bias_head, bias_seq, bias_key = bias_at
    return OptionNumbers(
        per_head_batch=0 if slopes is None or slopes.shape[0] == 1 else 2 * heads,
        use_slopes=int(slopes is not None),
        use_sinks=int(options.sinks is not None),
        use_bias=int(options.bias is not None),
        use_padding=int(padding is not None),
        bias_offset=bias_offset,
        bias_batch=bias_batch,
        bias_head=bias_head,
        bias_seq=bias_seq,
        bias_key=bias_key,
        padding_batch=0 if padding is None or padding.shape[0] == 1 else padding.shape[1],
        threshold=threshold(options.dropout_p),
        seed=options.seed,
        first_head=options.first_head,
        first_row=options.first_row,
        first_key=options.first_key,
        step=options.step,
        softcap=softcap,
        per_softcap=min(1 / softcap, largest) if softcap else 0.0,
        keep_scale=1 / (1 - options.dropout_p),
    )


def option_tables(options: ScoreOptions, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """What `per_head` and `padding` point to, in float64."""
    slopes = np.zeros((1, heads)) if options.slopes is None else options.slopes
    sinks = np.zeros(heads) if options.sinks is None else options.sinks
    padding = np.empty((1, 0)) if options.padding is None else options.padding
    return np.stack(np.broadcast_arrays(slopes, sinks), axis=-1), padding.astype(np.float64)


def threshold(dropout_p: float) -> int:
    """Random words of 32 bits below it drop a weight."""
    return int(dropout_p * 2**32)


def largest_exact_lse(dtype: np.dtype) -> float:
    """The size of an lse beyond which it may have lost the number of keys in rounding."""
    return float(0.5**11 / np.finfo(dtype).eps)


# --- in the kernels: build time only -----------------------------------------------------------------------------------------


def stages(dtype: str, tanh: Callable[..., Any] = math.tanh) -> SimpleNamespace:
    """The stages for scores of one dtype, as functions of numbers whose code goes where they are called. The kernels for GPUs
    have a `tanh` of their own."""
    from .intrinsics import exp, inlined, mad

    real = np.dtype(dtype).type
    zero, one, minus_infinity, lowest = real(0), real(1), real(-np.inf), np.finfo(real).min
    large = real(largest_exact_lse(np.dtype(real)))
    tolerance = real(4 * np.finfo(real).eps)
    word, half = np.uint32, np.uint64(32)
    factor_0, factor_1, increment_0, increment_1 = map(np.uint64, (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))

    @inlined
    def capped(score, softcap, per_softcap):
        """The score after the soft cap."""
        return softcap * tanh(score * per_softcap)

    @inlined
    def cap_derivative(capped_score, per_softcap):
        """Derivative of the soft cap, from its result."""
        part = capped_score * per_softcap
        return one - part * part

    @inlined
    def sloped(score, slope, distance):
        """The score after ALiBi, whose derivative is 1."""
        return mad(slope, real(-abs(distance)), score)

    @inlined
    def biased(score, bias):
        """The score after a bias, whose derivative is 1. Only one of -inf hides the key: no finite one may round to it."""
        total = score + bias
        total = lowest if total < lowest else total
        return minus_infinity if bias == minus_infinity else total

    @inlined
    def padded(score, part):
        """The score, or -inf for a key that takes no part."""
        return minus_infinity if part == zero else score

    @inlined
    def changed(score, per_head, bias, padding, b, h, query, key, distance, options):
        """The score of one pair after all of these stages; `tile.option_operations` has them for a block."""
        if options.softcap > zero:
            score = capped(score, options.softcap, options.per_softcap)
        if options.use_slopes != 0:
            score = sloped(score, per_head[b * options.per_head_batch + 2 * h], distance)
        if options.use_bias != 0:
            origin = options.bias_offset + b * options.bias_batch + h * options.bias_head
            score = biased(score, bias[origin + query * options.bias_seq + key * options.bias_key])
        if options.use_padding != 0:
            score = padded(score, padding[b * options.padding_batch + key])
        return score

    @inlined
    def in_span(score, column, first, last):
        """The score, or -inf outside of the columns that a row sees."""
        return score if column >= first and column <= last else minus_infinity

    @inlined
    def probability(score, peak):
        """exp(score - peak), 0 for what is hidden, even if the peak is nan."""
        return zero if score == minus_infinity else exp(score - peak)

    @inlined
    def is_large(lse):
        """Whether this lse may have lost the number of keys in rounding: log(8) is nothing beside 1e9."""
        size = abs(lse)
        return size > large and size < real(np.inf)

    @inlined
    def share(own_lse, lse):
        """Which part of the denominators is of these keys, if there are others: 1 where rounding hides a difference."""
        difference = own_lse - lse
        return exp(difference) if difference < -tolerance * abs(lse) else one

    @inlined
    def philox(c0, c1, c2, c3, seed):
        """Four random words of 32 bits from a counter of four words. Only the products need 64 bits, which numba would take for
        every number."""
        c0, c1, c2, c3, k0, k1 = word(c0), word(c1), word(c2), word(c3), word(seed), word(seed >> 32)
        for _ in range(10):
            p0, p1 = factor_0 * c0, factor_1 * c2
            c0, c1, c2, c3 = word((p1 >> half) ^ c1 ^ k0), word(p1), word((p0 >> half) ^ c3 ^ k1), word(p0)
            k0, k1 = word(k0 + increment_0), word(k1 + increment_1)
        return c0, c1, c2, c3

    @inlined
    def kept(weight, drawn, threshold, keep_scale):
        """The weight after dropout, for which this word was drawn."""
        return weight * keep_scale if drawn >= word(threshold) else zero

    return SimpleNamespace(
        capped=capped, cap_derivative=cap_derivative, sloped=sloped, biased=biased, padded=padded, changed=changed,
        in_span=in_span,
        probability=probability, is_large=is_large, share=share, philox=philox, kept=kept,
    )  # fmt: skip


# --- in NumPy ----------------------------------------------------------------------------------------------------------------


def dense_scores(
    q: np.ndarray, k: np.ndarray, *, scale: float, diagonal: int, options: ScoreOptions | None
) -> tuple[np.ndarray, np.ndarray | float, np.ndarray, ScoreOptions]:
    """All scores of float64 (batch, heads, seq, head_dim) arrays, -inf where hidden.

    Also their derivatives by ``scale * q kᵀ``, which of them are seen, and the options with all spans.
    """
    seq_q, seq_k = q.shape[2], k.shape[2]
    i, j = np.ogrid[:seq_q, :seq_k]
    if options is None:
        options = ScoreOptions(np.stack(np.broadcast_arrays(0, np.clip(i[:, 0] + diagonal + 1, 0, seq_k), 0), axis=-1))
    score: np.ndarray = scale * q @ k.swapaxes(2, 3)
    derivative: np.ndarray | float = 1.0
    if options.softcap:
        with np.errstate(over="ignore"):
            part = np.tanh(score / options.softcap)
        score, derivative = options.softcap * part, 1 - part**2
    if options.slopes is not None:
        score = score - options.slopes[..., None, None] * dense_distance(options, seq_k)
    seen = np.broadcast_to((options.spans[:, :1] <= j) & (j < options.spans[:, 1:2]), score.shape)
    if options.bias is not None:
        score, seen = score + options.bias, seen & ~np.isneginf(options.bias)
    if options.padding is not None:
        seen = seen & options.padding[:, None, None, :]
    return np.where(seen, score, -np.inf), derivative, seen, options


def dense_distance(options: ScoreOptions, seq_k: int) -> np.ndarray:
    """How far every key is from the diagonal, (seq_q, seq_k)."""
    distance: np.ndarray = abs(options.spans[:, 2:] - options.first_key - options.step * np.arange(seq_k))
    return distance


def dense_kept(options: ScoreOptions, shape: tuple[int, ...]) -> np.ndarray | float:
    """By what dropout multiplies the weights (batch, heads, seq_q, seq_k)."""
    if not options.dropout_p:
        return 1.0
    b, h, i, j = np.ogrid[tuple(map(slice, shape))]
    i, j = options.first_row + options.step * i, options.first_key + options.step * j
    counters = np.stack(np.broadcast_arrays(j // 4, i, h + options.first_head, b), axis=-1)
    drawn = np.take_along_axis(philox(counters, options.seed), np.broadcast_to(j % 4, shape)[..., None], -1)[..., 0]
    return np.where(drawn < threshold(options.dropout_p), 0, 1 / (1 - options.dropout_p))


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10: (…, 4) words of 32 bits from (…, 4) counters."""
    word = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        shift = np.uint64(32)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & word, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & word
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)
