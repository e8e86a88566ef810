"""Gradient of attention on one device, by recomputation from lse: no seq_q × seq_k matrix is kept.

With p = exp(score - lse), delta = sum(dout * out) of every query row, and both factors of a dot product called a and b:

    dv = pᵀ dout        dp = dout vᵀ        ds = p (dp - delta)        dq = scale · ds k        dk = scale · dsᵀ q

(Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2). Two kernels of one source, each without atomic additions, so that every
sum has one order: the one for queries keeps rows of q and dout in its lanes and walks over keys, the one `into_keys` keeps
rows of k and v and walks over the queries of all heads that read its kv head.

              block of columns                           queries            into_keys
           ┌──── keys ────┬─ ─ ─           rows a, b:    q, dout            k, v
    rows × │ a·aᵀ and b·bᵀ │               columns a, b: k, v               q, dout
    lanes  │ in registers  │               sums:         dq += ds k         dk += ds q, dv += p dout
           └──────────────┴─ ─ ─

Tiles and options are those of flash_forward.py, whose `Extras` serve here, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .flash_forward import (
    DTYPES,
    MAX_HEAD_DIM,
    OPTION_SCALARS,
    OPTIONS_TILE,
    TILES,
    Extras,
    Tile,
    dropped,
    no_option_scalars,
    option_memories,
    option_scalars,
    scores,
)
from .launch import launch, place, upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEAD_DIMS = {"float32": (32, 64, 80, 128), "float64": ()}  # with kernels of their own
TILES_OF = {"float32": ("wide", "narrow"), "float64": ("short",)}

POINTERS = (
    ("rows_a", "pointer"), ("rows_b", "pointer"), ("cols_a", "pointer"), ("cols_b", "pointer"),
    ("grad_a", "pointer"), ("grad_b", "pointer"), ("lse", "pointer"), ("delta", "pointer"),
    ("spans", "table"), ("centres", "table"), ("per_head", "pointer"), ("bias", "pointer"), ("padding", "pointer"),
)  # fmt: skip
PLACES = tuple(
    (f"{array}_{part}", "int64")
    for array in ("rows_a", "rows_b", "cols_a", "cols_b", "grad_a", "grad_b", "lse", "delta")
    for part in ("offset", "batch", "seq", "head")
)
SCALARS = (
    ("row_heads", "int64"), ("q_heads", "int64"), ("group", "int64"), ("head_shift", "int64"),
    ("row_count", "int64"), ("col_count", "int64"), ("diagonal", "int64"), ("row_blocks", "int64"), ("head_dim", "int64"),
    ("dot_scale", "real"), ("scale", "real"), ("zero", "real"),
)  # fmt: skip
ARGUMENTS = POINTERS + PLACES + SCALARS + OPTION_SCALARS


def name(dtype: str, head_dim: int, tile: str, *, into_keys: bool, options: bool) -> str:
    """Name of the compiled kernel that serves this dtype and head_dim by this tile; with options, by that of `OPTIONS_TILE`."""
    size = f"d{head_dim}" if head_dim in HEAD_DIMS[dtype] else "any"
    return f"flash_backward_{'keys' if into_keys else 'queries'}_{dtype}_{size}_{tile}{'_options' * options}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for dtype in DTYPES.values():
        for head_dim in (*HEAD_DIMS[dtype], None):
            for into_keys in (False, True):
                for tile, options in (*((tile, False) for tile in TILES_OF[dtype]), (OPTIONS_TILE[dtype], True)):
                    flags = {"into_keys": into_keys, "options": options}
                    constants = {"dtype": dtype, "head_dim": head_dim, "tile": TILES[tile], **flags}
                    yield name(dtype, head_dim or 0, tile, **flags), {"pointer": dtype, "real": dtype}, constants


def kernel(*, dtype: str, head_dim: int | None, tile: Tile, into_keys: bool, options: bool) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one dtype, head_dim (None: any up to `MAX_HEAD_DIM`) and tile."""
    from numba_dpex.kernel_api import PrivateArray

    from .intrinsics import exp2, group_index, lane_index, mad

    rows, keys, dims, block, lanes = tile
    real = np.dtype(dtype).type
    any_head_dim = head_dim is None
    width = head_dim or MAX_HEAD_DIM
    dots_size, sums_size, scores_size, vectors_size = rows * keys, rows * dims, rows * block, rows * width
    minus_infinity, log2e, one = real(-np.inf), real(math.log2(math.e)), real(1)
    word, lowest = 0xFFFFFFFF, np.finfo(real).min

    def flash_backward(
        item, no_array, rows_a, rows_b, cols_a, cols_b, grad_a, grad_b, lse, delta, spans, centres, per_head, bias, padding,
        rows_a_offset, rows_a_batch, rows_a_seq, rows_a_head, rows_b_offset, rows_b_batch, rows_b_seq, rows_b_head,
        cols_a_offset, cols_a_batch, cols_a_seq, cols_a_head, cols_b_offset, cols_b_batch, cols_b_seq, cols_b_head,
        grad_a_offset, grad_a_batch, grad_a_seq, grad_a_head, grad_b_offset, grad_b_batch, grad_b_seq, grad_b_head,
        lse_offset, lse_batch, lse_seq, lse_head, delta_offset, delta_batch, delta_seq, delta_head,
        row_heads, q_heads, group, head_shift, row_count, col_count, diagonal, row_blocks, runtime_head_dim,
        dot_scale, scale, zero,
        per_head_batch, use_slopes, use_sinks, use_bias, use_padding,
        bias_offset, bias_batch, bias_head, bias_seq, bias_key, padding_batch, threshold, seed, first_head, softcap, keep_scale,
    ):  # fmt: skip
        size = runtime_head_dim if any_head_dim else width
        index = group_index()
        lane = lane_index()
        panel = index // row_blocks  # (batch, head of the rows)
        step = index - panel * row_blocks
        # the rows with the most columns under a causal mask first: the last queries, the first keys
        first = (step if into_keys else row_blocks - 1 - step) * rows * lanes
        b = panel // row_heads
        row_head = panel - b * row_heads
        if into_keys:
            # the query heads of this rank that read this kv head
            head_begin, head_end = max(row_head * group - head_shift, 0), min((row_head + 1) * group - head_shift, q_heads)
        else:
            head_begin, head_end = row_head, row_head + 1

        vector_a = PrivateArray(vectors_size, real)
        vector_b = PrivateArray(vectors_size, real)
        total_a = PrivateArray(vectors_size, real)
        total_b = PrivateArray(vectors_size if into_keys else rows, real)
        dot = PrivateArray(dots_size, real)
        part = PrivateArray(sums_size, real)
        score = PrivateArray(scores_size, real)  # then p
        slope_of_score = PrivateArray(scores_size, real)  # dp, then ds
        steepness = PrivateArray(scores_size if options else 1, real)  # derivative of the soft cap
        keep = PrivateArray(scores_size if options else 1, real)
        earliest = PrivateArray(rows, np.int64)
        last = PrivateArray(rows, np.int64)
        centre = PrivateArray(rows, np.int64)
        row_lse = PrivateArray(rows, real)
        row_delta = PrivateArray(rows, real)

        # `zero` is an argument: a constant would become a memset, and a copy without it a memcpy, which force the arrays out
        # of vector layout
        for r in range(rows):
            row = min(first + r * lanes + lane, row_count - 1)
            if options:
                earliest[r], last[r] = spans[3 * row], spans[3 * row + 1] - 1
                centre[r] = spans[3 * row + 2]
            elif into_keys:
                earliest[r], last[r] = max(row - diagonal, 0), col_count - 1
            else:
                earliest[r], last[r] = 0, min(row + diagonal, col_count - 1)
            if not into_keys:
                row_lse[r] = lse[lse_offset + b * lse_batch + row_head * lse_head + row * lse_seq] * log2e
                row_delta[r] = delta[delta_offset + b * delta_batch + row_head * delta_head + row * delta_seq]
            source_a = rows_a_offset + b * rows_a_batch + row_head * rows_a_head + row * rows_a_seq
            source_b = rows_b_offset + b * rows_b_batch + row_head * rows_b_head + row * rows_b_seq
            for d in range(size):
                vector_a[r * width + d] = rows_a[source_a + d] * dot_scale
                vector_b[r * width + d] = rows_b[source_b + d] + zero
                total_a[r * width + d] = zero
                if into_keys:
                    total_b[r * width + d] = zero

        # the columns that meet some row of the group, and those that meet all of its rows
        if options:
            begin, end, inner_begin, inner_end = col_count, 0, 0, col_count
            for row in range(first, min(first + rows * lanes, row_count)):
                begin, inner_begin = min(begin, spans[3 * row]), max(inner_begin, spans[3 * row])
                end, inner_end = max(end, spans[3 * row + 1]), min(inner_end, spans[3 * row + 1])
            begin -= begin % 4  # one draw of random numbers serves four keys
        elif into_keys:
            begin, end = max(first - diagonal, 0), col_count
            inner_begin, inner_end = max(min(first + rows * lanes, row_count) - 1 - diagonal, 0), col_count
        else:
            begin, end = 0, min(first + rows * lanes + diagonal, col_count)
            inner_begin, inner_end = 0, min(first + diagonal + 1, col_count)

        for h in range(head_begin, head_end):
            col_head = h if into_keys else (h + head_shift) // group
            a_offset = cols_a_offset + b * cols_a_batch + col_head * cols_a_head
            b_offset = cols_b_offset + b * cols_b_batch + col_head * cols_b_head
            lse_start = lse_offset + b * lse_batch + h * lse_head
            delta_start = delta_offset + b * delta_batch + h * delta_head
            bias_start = bias_offset + b * bias_batch + h * bias_head
            slope = b * per_head_batch + 2 * h
            for start in range(begin, end, block):
                count = min(block, end - start)
                for j in range(0, block, keys):
                    for t in range(dots_size):
                        dot[t] = zero
                    for d in range(size):
                        for t in range(keys):
                            value = cols_a[a_offset + min(start + j + t, col_count - 1) * cols_a_seq + d]
                            for r in range(rows):
                                dot[r * keys + t] = mad(vector_a[r * width + d], value, dot[r * keys + t])
                    for r in range(rows):
                        for t in range(keys):
                            score[r * block + j + t] = dot[r * keys + t]
                            dot[r * keys + t] = zero
                    for d in range(size):
                        for t in range(keys):
                            value = cols_b[b_offset + min(start + j + t, col_count - 1) * cols_b_seq + d]
                            for r in range(rows):
                                dot[r * keys + t] = mad(vector_b[r * width + d], value, dot[r * keys + t])
                    for r in range(rows):
                        for t in range(keys):
                            slope_of_score[r * block + j + t] = dot[r * keys + t] + zero
                if options:
                    for t in range(scores_size):
                        steepness[t] = one
                        keep[t] = one
                    if softcap > zero:
                        for t in range(scores_size):
                            capped = math.tanh(score[t])
                            score[t] = softcap * capped
                            steepness[t] = one - capped * capped
                    if use_slopes != 0:
                        for j in range(block):
                            col = min(start + j, col_count - 1)
                            for r in range(rows):
                                row = first + r * lanes + lane
                                distance = abs(centres[3 * col + 2] - row) if into_keys else abs(centre[r] - col)
                                score[r * block + j] = mad(per_head[slope], real(-distance), score[r * block + j])
                    if use_bias != 0:
                        for j in range(block):
                            col = min(start + j, col_count - 1)
                            for r in range(rows):
                                row = min(first + r * lanes + lane, row_count - 1)
                                query, key = (col, row) if into_keys else (row, col)
                                added = bias[bias_start + query * bias_seq + key * bias_key]
                                biased = mad(added, log2e, score[r * block + j])
                                biased = lowest if biased < lowest else biased
                                score[r * block + j] = minus_infinity if added == minus_infinity else biased
                    if use_padding != 0:
                        for j in range(block):
                            col = min(start + j, col_count - 1)
                            for r in range(rows):
                                row = min(first + r * lanes + lane, row_count - 1)
                                key = row if into_keys else col
                                hidden = padding[b * padding_batch + key] == zero
                                score[r * block + j] = minus_infinity if hidden else score[r * block + j]
                    if threshold > 0:
                        key_0, key_1 = seed & word, (seed >> 32) & word
                        for r in range(rows):
                            row = first + r * lanes + lane
                            for j in range(0, block, 1 if into_keys else 4):
                                if into_keys:
                                    c0, c1, c2, c3 = row // 4, start + j, h + first_head, b
                                else:
                                    c0, c1, c2, c3 = (start + j) // 4, row, h + first_head, b
                                k0, k1 = key_0, key_1
                                for _ in range(10):
                                    p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
                                    n0, n2 = ((p1 >> 32) & word) ^ c1 ^ k0, ((p0 >> 32) & word) ^ c3 ^ k1
                                    c0, c1, c2, c3 = n0, p1 & word, n2, p0 & word
                                    k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
                                t = r * block + j
                                if into_keys:
                                    which = row % 4
                                    drawn = c0 if which == 0 else (c1 if which == 1 else (c2 if which == 2 else c3))
                                    keep[t] = keep_scale if drawn >= threshold else zero
                                else:
                                    keep[t] = keep_scale if c0 >= threshold else zero
                                    keep[t + 1] = keep_scale if c1 >= threshold else zero
                                    keep[t + 2] = keep_scale if c2 >= threshold else zero
                                    keep[t + 3] = keep_scale if c3 >= threshold else zero
                edge = start < inner_begin or start + block > inner_end
                if options:
                    edge = edge or use_bias + use_padding != 0
                if edge:
                    # what is not seen may be anything, nan too: a score of -inf stands for it
                    for r in range(rows):
                        for j in range(block):
                            unseen = start + j < earliest[r] or start + j > last[r]
                            score[r * block + j] = minus_infinity if unseen else score[r * block + j]
                if into_keys:
                    for j in range(block):
                        col = min(start + j, col_count - 1)
                        of_lse, of_delta = lse[lse_start + col * lse_seq] * log2e, delta[delta_start + col * delta_seq]
                        for r in range(rows):
                            t = r * block + j
                            # what is not seen has no weight, even if lse is nan
                            score[t] = zero if score[t] == minus_infinity else exp2(score[t] - of_lse)
                            if options:
                                slope_of_score[t] = score[t] * (slope_of_score[t] * keep[t] - of_delta) * steepness[t]
                            else:
                                slope_of_score[t] = score[t] * (slope_of_score[t] - of_delta)
                else:
                    for j in range(block):
                        for r in range(rows):
                            t = r * block + j
                            score[t] = zero if score[t] == minus_infinity else exp2(score[t] - row_lse[r])
                            if options:
                                slope_of_score[t] = score[t] * (slope_of_score[t] * keep[t] - row_delta[r]) * steepness[t]
                            else:
                                slope_of_score[t] = score[t] * (slope_of_score[t] - row_delta[r])
                if edge:
                    # no weight, no slope, even where dp or delta is nan
                    for t in range(scores_size):
                        slope_of_score[t] = zero if score[t] == zero else slope_of_score[t]
                if options and into_keys and threshold > 0:
                    for t in range(scores_size):
                        score[t] *= keep[t]
                for d in range(0, size, dims):
                    for t in range(sums_size):
                        part[t] = zero
                    for j in range(count):
                        source = a_offset + (start + j) * cols_a_seq
                        for t in range(dims):
                            value = cols_a[source + (min(d + t, size - 1) if any_head_dim else d + t)]
                            if edge:
                                for r in range(rows):
                                    factor = slope_of_score[r * block + j]
                                    seen = value if factor != zero else zero
                                    part[r * dims + t] = mad(factor, seen, part[r * dims + t])
                            else:
                                for r in range(rows):
                                    part[r * dims + t] = mad(slope_of_score[r * block + j], value, part[r * dims + t])
                    for r in range(rows):
                        for t in range(dims):
                            total_a[r * width + d + t] += part[r * dims + t]
                    if into_keys:
                        for t in range(sums_size):
                            part[t] = zero
                        for j in range(count):
                            source = b_offset + (start + j) * cols_b_seq
                            for t in range(dims):
                                value = cols_b[source + (min(d + t, size - 1) if any_head_dim else d + t)]
                                if edge:
                                    for r in range(rows):
                                        factor = score[r * block + j]
                                        seen = value if factor != zero else zero
                                        part[r * dims + t] = mad(factor, seen, part[r * dims + t])
                                else:
                                    for r in range(rows):
                                        part[r * dims + t] = mad(score[r * block + j], value, part[r * dims + t])
                        for r in range(rows):
                            for t in range(dims):
                                total_b[r * width + d + t] += part[r * dims + t]

        for r in range(rows):
            row = first + r * lanes + lane
            if row < row_count:
                target_a = grad_a_offset + b * grad_a_batch + row_head * grad_a_head + row * grad_a_seq
                target_b = grad_b_offset + b * grad_b_batch + row_head * grad_b_head + row * grad_b_seq
                for d in range(size):
                    grad_a[target_a + d] = total_a[r * width + d] * scale
                    if into_keys:
                        grad_b[target_b + d] = total_b[r * width + d]

    return flash_backward


def flash_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    lse: Any,
    delta: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    *,
    scale: float,
    diagonal: int,
    group: int,
    head_shift: int = 0,
    extras: Extras | None = None,
    tile: str | None = None,
) -> None:
    """Gradient of attention of USM arrays, written into `dq`, `dk` and `dv`; all but lse and delta are dense in the last axis.

    Parameters
    ----------
    dout, q, k, v : usm_ndarray
        Cotangent and inputs of the forward, (batch, seq, heads or kv_heads, head_dim), float32 or float64.
    lse, delta : usm_ndarray
        Logarithm of the softmax denominators, and the sum of dout * out, of every query row; (batch, heads, seq_q).
    dq, dk, dv : usm_ndarray
        Receive the gradients; shapes of q, k and v.
    scale, diagonal, group, head_shift, extras, tile
        As in `flash_forward`.
    """
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1:3]
    dtype = DTYPES[q.dtype.itemsize]
    if extras is not None or tile is None:
        tile = OPTIONS_TILE[dtype]
    lanes = TILES[tile].lanes
    log2e = math.log2(math.e)
    dot_scale = scale * log2e
    if extras is None:
        tables, memories, option_numbers = [q.usm_data] * 2, [q.usm_data] * 3, no_option_scalars()
    else:
        tables = [upload(q.sycl_queue, x) for x in (extras.spans, spans_of_keys(extras.spans, seq_k))]
        memories, option_numbers = option_memories(q, extras), option_scalars(q, extras)
        if extras.softcap:
            dot_scale = scale / extras.softcap
    for into_keys in (False, True):
        pairs = ((k, v), (q, dout)) if into_keys else ((q, dout), (k, v))
        (rows_a, rows_b), (cols_a, cols_b) = pairs
        grads = (dk, dv) if into_keys else (dq, dq)
        row_count, col_count, row_heads = (seq_k, seq_q, kv_heads) if into_keys else (seq_q, seq_k, heads)
        if grads[0].size == 0:
            continue
        row_blocks = -(-row_count // (TILES[tile].rows * lanes))
        arrays = rows_a, rows_b, cols_a, cols_b, *grads
        launch(
            q.sycl_queue,
            name(dtype, head_dim, tile, into_keys=into_keys, options=extras is not None),
            [*(x.usm_data for x in (*arrays, lse, delta)), tables[into_keys], tables[0], *memories],
            (
                *(number for x in arrays for number in place(x)[:4]),
                *(number for x in (lse, delta) for number in place_of_rows(x)),
                *(row_heads, heads, group, head_shift, row_count, col_count, diagonal, row_blocks, head_dim),
                *(dot_scale, scale, 0.0),
                *option_numbers,
            ),
            groups=batch * row_heads * row_blocks,
            lanes=lanes,
        )


def place_of_rows(x: Any) -> tuple[int, ...]:
    """Where an array (batch, heads, seq) lies: offset, and the strides in the order of `PLACES`."""
    offset, batch, head, seq = place(x)
    return offset, batch, seq, head


def spans_of_keys(spans: np.ndarray, seq_k: int) -> np.ndarray:
    """For every key the first query that sees it and the end of these queries; (seq_k, 3), int64, the last column unused.

    The first keys and the ends in `spans` never decrease, so the queries of a key follow each other.
    """
    key = np.arange(seq_k)
    first, end = np.searchsorted(spans[:, 1], key, side="right"), np.searchsorted(spans[:, 0], key, side="right")
    return np.stack([first, np.maximum(end, first), key], axis=-1).astype(np.int64).reshape(seq_k, 3)


def reference(
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
    extras: Extras | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the kernels compute, dense in float64 NumPy: dq, dk and dv."""
    kv_heads = k.shape[2]
    dout, q, k, v = (x.astype(np.float64).swapaxes(1, 2) for x in (dout, q, k, v))
    kv = (np.arange(q.shape[1]) + head_shift) // group
    k, v = k[:, kv], v[:, kv]
    score, seen, extras = scores(q, k, scale=scale, diagonal=diagonal, extras=extras)
    with np.errstate(invalid="ignore"):
        p = np.where(seen, np.exp(score - lse[..., None]), 0)
        dp = dout @ v.swapaxes(2, 3)
        kept = np.where(dropped(extras, score.shape), 0, 1 / (1 - extras.dropout_p))
        ds = p * (dp * kept - delta[..., None])
        if extras.softcap:
            dots = scale * q @ k.swapaxes(2, 3)
            ds = ds * (1 - np.tanh(dots / extras.softcap) ** 2)
    ds = np.where(seen, ds, 0)
    k = np.where(seen.any(axis=(0, 1, 2))[:, None], k, 0)  # of keys that nobody sees, which may be nan
    dq = scale * ds @ k
    dk, dv = np.zeros((2, k.shape[0], kv_heads, k.shape[2], k.shape[3]))
    for h, of in enumerate(kv):
        dk[:, of] += scale * ds[:, h].swapaxes(1, 2) @ q[:, h]
        dv[:, of] += (p * kept)[:, h].swapaxes(1, 2) @ dout[:, h]
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
