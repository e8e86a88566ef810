"""Attention forward on one device: softmax(scale * q kᵀ) v by blocks of keys, without the seq_q × seq_k matrix.

For each query row the kernel keeps the running maximum m of its scores, the running sum l of exp2(score - m) and the running
output, and rescales the last two when a block of keys raises the maximum (the online softmax of Milakov and Gimelshein,
arXiv:1805.02867; tiled as in FlashAttention-2 by Dao, arXiv:2307.08691). Scores are kept in units of log2, so that the
exponential is exp2 and the scale carries log2(e).

The tile, per work-group of `lanes` work-items (one vector of the CPU):

                      block keys
                 ┌──── keys ────┬─ ─ ─          each work-item owns `rows` query rows: row r of lane i is
     rows ×      │ rows × keys  │               first + r * lanes + i, so that a load of q is the only gather
     lanes       │ dot products │               and every key or value is one broadcast from memory;
     queries     │ in registers │               the same shape serves P·V: rows × dims sums in registers
                 └──────────────┴─ ─ ─

Two kernels come of one source. The plain one has a causal mask at most. The one with `options` reads the keys of every query
row from a table of spans, which serves windows and packed sequences alike, and changes the scores before the softmax: soft cap,
ALiBi, bias, padding. Its dropout draws from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
a function of seed, batch, head, row and key alone, so that no split of the work changes it.

The three ways to reach a query: `flash_forward` launches the compiled kernel on USM arrays, `kernel` makes the numba-dpex
function that is compiled when the package is built, and `reference` says in NumPy what both compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .launch import launch, place, upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_HEAD_DIM = 256


class Tile(NamedTuple):
    """Sizes of the register and block tiles; all are compile-time constants of a kernel."""

    rows: int  # query rows of one work-item
    keys: int  # keys whose dot products are held in registers at once
    dims: int  # head_dim elements whose sums are held in registers at once
    block: int  # keys between two updates of the running maximum
    lanes: int  # work-items of a work-group


# 16 lanes are one vector register of AVX-512 and two of AVX2; on a CPU with AVX-512, 8 lanes are not vectorised at all (14
# times slower, measured). `ulysses_dp.schedule` chooses between the tiles.
TILES = {
    "wide": Tile(rows=2, keys=8, dims=8, block=32, lanes=16),  # 16 sums, for the 32 registers of AVX-512
    "narrow": Tile(rows=2, keys=6, dims=4, block=36, lanes=16),  # 12 sums, for the 16 registers of AVX2
    "short": Tile(rows=1, keys=8, dims=8, block=32, lanes=16),  # wastes less of a short sequence
}
TILES_OF = {"float32": tuple(TILES), "float64": ("short",)}  # for float64 the others are within 10 % of it
OPTIONS_TILE = {"float32": "narrow", "float64": "short"}  # with options: within 5 % of "wide" with AVX-512, too

# A constant head_dim lets the compiler unroll the dot products: 1.25 times the speed of the kernel for any head_dim.
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
DTYPES = {4: "float32", 8: "float64"}  # by itemsize

POINTERS = (("q", "pointer"), ("k", "pointer"), ("v", "pointer"), ("out", "pointer"), ("lse", "pointer"))
SCALARS = (
    ("q_offset", "int64"), ("q_batch", "int64"), ("q_seq", "int64"), ("q_head", "int64"),
    ("k_offset", "int64"), ("k_batch", "int64"), ("k_seq", "int64"), ("k_head", "int64"),
    ("v_offset", "int64"), ("v_batch", "int64"), ("v_seq", "int64"), ("v_head", "int64"),
    ("out_offset", "int64"), ("out_batch", "int64"), ("out_seq", "int64"), ("out_head", "int64"),
    ("lse_offset", "int64"), ("lse_batch", "int64"), ("lse_seq", "int64"), ("lse_head", "int64"),
    ("heads", "int64"), ("group", "int64"), ("head_shift", "int64"), ("seq_q", "int64"), ("seq_k", "int64"),
    ("diagonal", "int64"), ("row_blocks", "int64"), ("head_dim", "int64"), ("scale", "real"), ("zero", "real"),
)  # fmt: skip
OPTION_POINTERS = (("spans", "table"), ("per_head", "pointer"), ("bias", "pointer"), ("padding", "pointer"))
OPTION_SCALARS = (
    ("per_head_batch", "int64"),
    ("use_slopes", "int64"), ("use_sinks", "int64"), ("use_bias", "int64"), ("use_padding", "int64"),
    ("bias_offset", "int64"), ("bias_batch", "int64"), ("bias_head", "int64"), ("bias_seq", "int64"), ("bias_key", "int64"),
    ("padding_batch", "int64"), ("threshold", "int64"), ("seed", "int64"), ("first_head", "int64"),
    ("softcap", "real"), ("keep_scale", "real"),
)  # fmt: skip
ARGUMENTS = POINTERS + OPTION_POINTERS + SCALARS + OPTION_SCALARS


@dataclass(frozen=True, eq=False)
class Extras:
    """What the kernel with options takes besides; everything for the query heads of this call alone."""

    spans: np.ndarray  # (seq_q, 3): first key, end of the keys, key on the diagonal; int64
    softcap: float = 0.0  # 0: none
    slopes: np.ndarray | None = None  # (1 or batch, heads), float64
    sinks: np.ndarray | None = None  # (heads,), float64
    bias: Any = None  # (batch, heads, seq_q, seq_k) of the kernel's dtype, broadcast by strides of 0
    padding: np.ndarray | None = None  # (1 or batch, seq_k), bool: True for the keys that take part
    dropout_p: float = 0.0
    seed: int = 0
    first_head: int = 0  # number of the first of these heads among all heads, for dropout


def name(dtype: str, head_dim: int, tile: str, *, options: bool = False) -> str:
    """Name of the compiled kernel that serves this dtype and head_dim by this tile; with options, by that of `OPTIONS_TILE`."""
    own = head_dim in HEAD_DIMS and not (options and dtype == "float64")
    size = f"d{head_dim}" if own else "any"
    return f"flash_forward_{dtype}_{size}_{tile}{'_options' * options}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for dtype in DTYPES.values():
        for head_dim in (*HEAD_DIMS, None):
            for tile, options in (*((tile, False) for tile in TILES_OF[dtype]), (OPTIONS_TILE[dtype], True)):
                if options and dtype == "float64" and head_dim:
                    continue
                constants = {"dtype": dtype, "head_dim": head_dim, "tile": TILES[tile], "options": options}
                yield name(dtype, head_dim or 0, tile, options=options), {"pointer": dtype, "real": dtype}, constants


def kernel(*, dtype: str, head_dim: int | None, tile: Tile, options: bool) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one dtype, head_dim (None: any up to `MAX_HEAD_DIM`) and tile."""
    from numba_dpex.kernel_api import PrivateArray

    from .intrinsics import exp2, group_index, lane_index, mad

    rows, keys, dims, block, lanes = tile
    real = np.dtype(dtype).type
    any_head_dim = head_dim is None
    width = head_dim or MAX_HEAD_DIM
    # private arrays are flat: [rows][…] each
    dots_size, sums_size, scores_size, vectors_size = rows * keys, rows * dims, rows * block, rows * width
    minus_infinity, ln2, log2e = real(-np.inf), real(math.log(2)), real(math.log2(math.e))
    word, one, lowest = 0xFFFFFFFF, real(1), np.finfo(real).min

    def flash_forward(
        item, no_array, q, k, v, out, lse, spans, per_head, bias, padding,
        q_offset, q_batch, q_seq, q_head, k_offset, k_batch, k_seq, k_head, v_offset, v_batch, v_seq, v_head,
        out_offset, out_batch, out_seq, out_head, lse_offset, lse_batch, lse_seq, lse_head,
        heads, group, head_shift, seq_q, seq_k, diagonal, row_blocks, runtime_head_dim, scale, zero,
        per_head_batch, use_slopes, use_sinks, use_bias, use_padding,
        bias_offset, bias_batch, bias_head, bias_seq, bias_key, padding_batch, threshold, seed, first_head, softcap, keep_scale,
    ):  # fmt: skip
        size = runtime_head_dim if any_head_dim else width
        index = group_index()
        lane = lane_index()
        panel = index // row_blocks  # (batch, head)
        # from the last rows to the first: under a causal mask these have the most keys, and should not start last
        first = (row_blocks - 1 - (index - panel * row_blocks)) * rows * lanes
        b = panel // heads
        h = panel - b * heads
        kv = (h + head_shift) // group
        q_offset += b * q_batch + h * q_head
        k_offset += b * k_batch + kv * k_head
        v_offset += b * v_batch + kv * v_head
        out_offset += b * out_batch + h * out_head
        lse_offset += b * lse_batch + h * lse_head

        query = PrivateArray(vectors_size, real)
        total = PrivateArray(vectors_size, real)
        score = PrivateArray(scores_size, real)
        dot = PrivateArray(dots_size, real)
        part = PrivateArray(sums_size, real)
        last = PrivateArray(rows, np.int64)  # last key that the row sees
        earliest = PrivateArray(rows, np.int64)  # first key that the row sees
        centre = PrivateArray(rows, np.int64)  # the key on the diagonal
        bias_row = PrivateArray(rows, np.int64)
        maximum = PrivateArray(rows, real)
        new_maximum = PrivateArray(rows, real)
        shift = PrivateArray(rows, real)
        rescale = PrivateArray(rows, real)
        normaliser = PrivateArray(rows, real)
        block_sum = PrivateArray(rows, real)

        slope = b * per_head_batch + 2 * h
        sink = slope + 1
        # `zero` is an argument: a constant would become a memset, which forces the arrays out of vector layout
        for r in range(rows):
            row = min(first + r * lanes + lane, seq_q - 1)
            if options:
                earliest[r] = spans[3 * row]
                last[r] = spans[3 * row + 1] - 1
                centre[r] = spans[3 * row + 2]
                bias_row[r] = bias_offset + b * bias_batch + h * bias_head + row * bias_seq
                # a sink is a key that is seen first and has no value
                maximum[r] = per_head[sink] if use_sinks != 0 else minus_infinity
                normaliser[r] = real(1) if use_sinks != 0 else zero
            else:
                last[r] = min(row + diagonal, seq_k - 1)
                maximum[r] = minus_infinity + zero
                normaliser[r] = zero
            source = q_offset + row * q_seq
            for d in range(size):
                query[r * width + d] = q[source + d] * scale
                total[r * width + d] = zero

        # the keys that some row of the group sees, and those that all of its rows see
        if options:
            begin, end, inner_begin, inner_end = seq_k, 0, 0, seq_k
            for row in range(first, min(first + rows * lanes, seq_q)):
                begin, inner_begin = min(begin, spans[3 * row]), max(inner_begin, spans[3 * row])
                end, inner_end = max(end, spans[3 * row + 1]), min(inner_end, spans[3 * row + 1])
            begin -= begin % 4  # one draw of random numbers serves four keys
        else:
            begin, end = 0, min(first + rows * lanes + diagonal, seq_k)
            inner_begin, inner_end = 0, min(first + diagonal + 1, seq_k)
        for start in range(begin, end, block):
            for r in range(rows):
                new_maximum[r] = maximum[r]
            for j in range(0, block, keys):
                for t in range(dots_size):
                    dot[t] = zero
                for d in range(size):
                    for t in range(keys):
                        key = k[k_offset + min(start + j + t, seq_k - 1) * k_seq + d]
                        for r in range(rows):
                            dot[r * keys + t] = mad(query[r * width + d], key, dot[r * keys + t])
                for r in range(rows):
                    for t in range(keys):
                        score[r * block + j + t] = dot[r * keys + t]
                        new_maximum[r] = max(new_maximum[r], dot[r * keys + t])
            if options:
                if softcap > zero:
                    for t in range(scores_size):
                        score[t] = softcap * math.tanh(score[t])
                if use_slopes != 0:
                    for r in range(rows):
                        for j in range(block):
                            distance = abs(centre[r] - start - j)
                            score[r * block + j] = mad(per_head[slope], real(-distance), score[r * block + j])
                if use_bias != 0:
                    for j in range(block):
                        key_place = min(start + j, seq_k - 1) * bias_key
                        for r in range(rows):
                            added = bias[bias_row[r] + key_place]
                            biased = mad(added, log2e, score[r * block + j])
                            # a bias of the lowest number, which others use for a mask, must not become -inf by log2e
                            biased = lowest if biased < lowest else biased
                            score[r * block + j] = minus_infinity if added == minus_infinity else biased
                if use_padding != 0:
                    for j in range(block):
                        if padding[b * padding_batch + min(start + j, seq_k - 1)] == zero:
                            for r in range(rows):
                                score[r * block + j] = minus_infinity
            # the only blocks with a mask: at the diagonal and at the ends of the keys
            edge = start < inner_begin or start + block > inner_end
            if options:
                edge = edge or use_bias + use_padding != 0
                changed = edge or use_slopes != 0 or softcap > zero
            else:
                changed = edge
            if changed:
                for r in range(rows):
                    new_maximum[r] = maximum[r]
                    for j in range(block):
                        in_span = start + j <= last[r] and (not options or start + j >= earliest[r])
                        visible = score[r * block + j] if in_span else minus_infinity
                        score[r * block + j] = visible
                        new_maximum[r] = max(new_maximum[r], visible)
            for r in range(rows):
                # a row that has seen no key yet has maximum -inf, and -inf - -inf would be nan
                shift[r] = new_maximum[r] if new_maximum[r] > minus_infinity else zero
                rescale[r] = exp2(maximum[r] - shift[r])
                maximum[r] = new_maximum[r]
                block_sum[r] = zero
            # sums of a block start from zero: the rounding errors of many keys then grow with the number of blocks
            for j in range(block):
                for r in range(rows):
                    weight = exp2(score[r * block + j] - shift[r])
                    block_sum[r] += weight
                    if options:
                        # a mark that a weight of 0, by underflow or dropout, does not have: this key is hidden
                        hidden = edge and score[r * block + j] == minus_infinity
                        score[r * block + j] = -one if hidden else weight
                    else:
                        score[r * block + j] = weight
            for r in range(rows):
                normaliser[r] = mad(normaliser[r], rescale[r], block_sum[r])
            if options and threshold > 0:
                key_0, key_1 = seed & word, (seed >> 32) & word
                for r in range(rows):
                    row = first + r * lanes + lane
                    for j in range(0, block, 4):
                        c0, c1, c2, c3 = (start + j) // 4, row, h + first_head, b
                        k0, k1 = key_0, key_1
                        for _ in range(10):
                            p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
                            c0, c1, c2, c3 = ((p1 >> 32) & word) ^ c1 ^ k0, p1 & word, ((p0 >> 32) & word) ^ c3 ^ k1, p0 & word
                            k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
                        t = r * block + j
                        score[t] = score[t] * keep_scale if c0 >= threshold or score[t] < zero else zero
                        score[t + 1] = score[t + 1] * keep_scale if c1 >= threshold or score[t + 1] < zero else zero
                        score[t + 2] = score[t + 2] * keep_scale if c2 >= threshold or score[t + 2] < zero else zero
                        score[t + 3] = score[t + 3] * keep_scale if c3 >= threshold or score[t + 3] < zero else zero
            count = min(block, end - start)
            for d in range(0, size, dims):
                for r in range(rows):
                    for t in range(dims):
                        part[r * dims + t] = zero
                for j in range(count):
                    source = v_offset + (start + j) * v_seq
                    for t in range(dims):
                        value = v[source + (min(d + t, size - 1) if any_head_dim else d + t)]
                        if edge:
                            # 0 · nan is nan: a value that the row does not see must not reach its sum
                            for r in range(rows):
                                # bias and padding hide keys that are within the span: these have a negative weight
                                hidden = score[r * block + j] < zero if options else start + j > last[r]
                                seen = zero if hidden else value
                                part[r * dims + t] = mad(score[r * block + j], seen, part[r * dims + t])
                        else:
                            for r in range(rows):
                                part[r * dims + t] = mad(score[r * block + j], value, part[r * dims + t])
                for r in range(rows):
                    for t in range(dims):
                        total[r * width + d + t] = mad(total[r * width + d + t], rescale[r], part[r * dims + t])

        for r in range(rows):
            row = first + r * lanes + lane
            if row < seq_q:
                # no key seen: zeros and lse = -inf
                inverse = real(1) / normaliser[r] if normaliser[r] != zero else zero
                target = out_offset + row * out_seq
                for d in range(size):
                    out[target + d] = total[r * width + d] * inverse
                lse[lse_offset + row * lse_seq] = maximum[r] * ln2 + math.log(normaliser[r])

    return flash_forward


def flash_forward(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    scale: float,
    diagonal: int,
    group: int,
    head_shift: int = 0,
    extras: Extras | None = None,
    tile: str | None = None,
) -> None:
    """Attention of USM arrays, written into `out` and `lse`; any strides but a dense last axis of q, k, v and out.

    Parameters
    ----------
    q : usm_ndarray
        Queries, (batch, seq_q, heads, head_dim), float32 or float64.
    k, v : usm_ndarray
        Keys and values, (batch, seq_k, kv_heads, head_dim).
    out : usm_ndarray
        Receives the result; shape of q.
    lse : usm_ndarray
        Receives the natural logarithm of the softmax denominator of every row; (batch, heads, seq_q).
    scale : float
        Factor of the dot products.
    diagonal : int
        Query row i sees the keys j <= i + diagonal; not used with `extras`, whose spans say which.
    group, head_shift : int
        Query head h reads kv head ``(h + head_shift) // group``.
    extras : Extras, optional
        The options.
    tile : str, optional
        Which of `TILES`, of those that `TILES_OF` lists for the dtype; with `extras`, and by default, that of `OPTIONS_TILE`.
    """
    batch, seq_q, heads, head_dim = q.shape
    dtype = DTYPES[q.dtype.itemsize]
    if extras is not None or tile is None:
        tile = OPTIONS_TILE[dtype]
    if out.size == 0:
        return
    rows, lanes = TILES[tile].rows, TILES[tile].lanes
    row_blocks = -(-seq_q // (rows * lanes))
    numbers = scalars(
        *(place(q)[:4], k, v, out, lse),
        **{"scale": scale, "diagonal": diagonal, "group": group, "head_shift": head_shift, "row_blocks": row_blocks},
    )
    if extras is None:
        pointers, option_numbers = [q.usm_data] * len(OPTION_POINTERS), no_option_scalars()
    else:
        pointers, option_numbers = [upload(q.sycl_queue, extras.spans), *option_memories(q, extras)], option_scalars(q, extras)
        if extras.softcap:
            numbers = (*numbers[:-2], scale / extras.softcap, 0.0)  # tanh takes the scores without log2(e)
    launch(
        q.sycl_queue,
        name(dtype, head_dim, tile, options=extras is not None),
        [*(x.usm_data for x in (q, k, v, out, lse)), *pointers],
        numbers + option_numbers,
        groups=batch * heads * row_blocks,
        lanes=lanes,
    )


def scalars(
    q_place: tuple[int, ...],
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    scale: float,
    diagonal: int,
    group: int,
    head_shift: int,
    row_blocks: int,
) -> tuple[float, ...]:
    """The values of `SCALARS`; `q_place` is offset, batch, seq and head stride of q."""
    _, seq_q, heads, head_dim = out.shape
    lse_offset, lse_batch, lse_head, lse_seq = place(lse)
    return (
        *(*q_place, *(number for x in (k, v, out) for number in place(x)[:4])),
        *(lse_offset, lse_batch, lse_seq, lse_head),
        *(heads, group, head_shift, seq_q, k.shape[1], diagonal, row_blocks, head_dim),
        *(scale * math.log2(math.e), 0.0),
    )


def no_option_scalars() -> tuple[float, ...]:
    """Values of `OPTION_SCALARS` for a kernel without options."""
    return (0,) * (len(OPTION_SCALARS) - 2) + (0.0, 0.0)


def option_scalars(q: Any, extras: Extras) -> tuple[float, ...]:
    """The values of `OPTION_SCALARS`."""
    bias_place = (0,) * 5 if extras.bias is None else place(extras.bias)
    slopes_batch = 0 if extras.slopes is None or extras.slopes.shape[0] == 1 else 2 * q.shape[2]
    padding_batch = 0 if extras.padding is None or extras.padding.shape[0] == 1 else extras.padding.shape[1]
    return (
        *(slopes_batch, extras.slopes is not None, extras.sinks is not None),
        *(extras.bias is not None, extras.padding is not None, *bias_place),
        *(padding_batch, threshold(extras.dropout_p), extras.seed, extras.first_head),
        *(extras.softcap * math.log2(math.e), 1 / (1 - extras.dropout_p)),
    )


def option_memories(q: Any, extras: Extras) -> list[Any]:
    """The values of `OPTION_POINTERS` but the spans: slope and sink of every head in units of log2, bias, padding."""
    slopes = np.zeros((1, q.shape[2])) if extras.slopes is None else extras.slopes
    sinks = np.zeros(q.shape[2]) if extras.sinks is None else extras.sinks
    per_head = np.stack(np.broadcast_arrays(slopes, sinks), axis=-1) * math.log2(math.e)
    padding = np.empty((1, 0), bool) if extras.padding is None else extras.padding
    return [
        upload(q.sycl_queue, per_head.astype(q.dtype)),
        (q if extras.bias is None else extras.bias).usm_data,
        upload(q.sycl_queue, padding.astype(q.dtype)),
    ]


def threshold(dropout_p: float) -> int:
    """Random words of 32 bits below it drop a weight."""
    return int(dropout_p * 2**32)


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 in NumPy: (…, 4) words of 32 bits from (…, 4) counters."""
    word = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        shift = np.uint64(32)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & word, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & word
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    diagonal: int,
    group: int,
    head_shift: int = 0,
    extras: Extras | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes, dense in float64 NumPy: out and lse."""
    q, k, v = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v))
    kv = (np.arange(q.shape[1]) + head_shift) // group
    k, v = k[:, kv], v[:, kv]
    score, seen, extras = scores(q, k, scale=scale, diagonal=diagonal, extras=extras)
    highest = score.max(axis=-1, keepdims=True, initial=-np.inf)
    if extras.sinks is not None:
        highest = np.maximum(highest, extras.sinks[:, None, None])
    shift = np.where(np.isneginf(highest), 0, highest)
    weight = np.exp(score - shift)
    total = weight.sum(axis=-1, keepdims=True)
    if extras.sinks is not None:
        total = total + np.exp(extras.sinks[:, None, None] - shift)
    with np.errstate(divide="ignore"):
        lse = (shift + np.log(total))[..., 0]
    weight = weight / np.where(total == 0, 1, total)
    weight = np.where(dropped(extras, weight.shape), 0, weight / (1 - extras.dropout_p))
    out = weight @ np.where(np.isfinite(v), v, 0)
    # what is not finite reaches the queries that see it and, unlike in a product with a weight of 0, no other
    for special in (np.inf, -np.inf, np.nan):
        where = np.isnan(v) if np.isnan(special) else v == special
        if where.any():
            out += np.where(seen.astype(float) @ where > 0, special, 0)
    return out.swapaxes(1, 2), lse


def scores(
    q: np.ndarray, k: np.ndarray, *, scale: float, diagonal: int, extras: Extras | None
) -> tuple[np.ndarray, np.ndarray, Extras]:
    """Scores of float64 (batch, heads, seq, head_dim) arrays, which of them are seen, and the options with all spans."""
    seq_q, seq_k = q.shape[2], k.shape[2]
    i, j = np.ogrid[:seq_q, :seq_k]
    if extras is None:
        extras = Extras(np.stack(np.broadcast_arrays(0, np.clip(i[:, 0] + diagonal + 1, 0, seq_k), 0), axis=-1))
    score = scale * q @ k.swapaxes(2, 3)
    if extras.softcap:
        score = extras.softcap * np.tanh(score / extras.softcap)
    if extras.slopes is not None:
        score = score - extras.slopes[..., None, None] * abs(extras.spans[:, 2:] - j)
    seen = np.broadcast_to((extras.spans[:, :1] <= j) & (j < extras.spans[:, 1:2]), score.shape)
    if extras.bias is not None:
        score, seen = score + extras.bias, seen & ~np.isneginf(extras.bias)
    if extras.padding is not None:
        seen = seen & extras.padding[:, None, None, :]
    return np.where(seen, score, -np.inf), seen, extras


def dropped(extras: Extras, shape: tuple[int, ...]) -> np.ndarray:
    """Which weights (batch, heads, seq_q, seq_k) dropout takes away."""
    if not extras.dropout_p:
        return np.zeros(shape, bool)
    b, h, i, j = np.ogrid[tuple(map(slice, shape))]
    counters = np.stack(np.broadcast_arrays(j // 4, i, h + extras.first_head, b), axis=-1)
    drawn = np.take_along_axis(philox(counters, extras.seed), np.broadcast_to(j % 4, shape)[..., None], -1)[..., 0]
    return drawn < threshold(extras.dropout_p)
