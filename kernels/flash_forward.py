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

The three ways to reach a query: `flash_forward` launches the compiled kernel on USM arrays, `kernel` makes the numba-dpex
function that is compiled when the package is built, and `reference` says in NumPy what both compute.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .launch import launch, place

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

# A constant head_dim lets the compiler unroll the dot products: 1.25 times the speed of the kernel for any head_dim.
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
DTYPES = {4: "float32", 8: "float64"}  # by itemsize

ARGUMENTS = (
    ("q", "pointer"), ("k", "pointer"), ("v", "pointer"), ("out", "pointer"), ("lse", "pointer"),
    ("q_offset", "int64"), ("q_batch", "int64"), ("q_seq", "int64"), ("q_head", "int64"),
    ("k_offset", "int64"), ("k_batch", "int64"), ("k_seq", "int64"), ("k_head", "int64"),
    ("v_offset", "int64"), ("v_batch", "int64"), ("v_seq", "int64"), ("v_head", "int64"),
    ("out_offset", "int64"), ("out_batch", "int64"), ("out_seq", "int64"), ("out_head", "int64"),
    ("lse_offset", "int64"), ("lse_batch", "int64"), ("lse_seq", "int64"), ("lse_head", "int64"),
    ("heads", "int64"), ("group", "int64"), ("head_shift", "int64"), ("seq_q", "int64"), ("seq_k", "int64"),
    ("diagonal", "int64"), ("row_blocks", "int64"), ("head_dim", "int64"), ("scale", "real"), ("zero", "real"),
)  # fmt: skip


def name(dtype: str, head_dim: int, tile: str) -> str:
    """Name of the compiled kernel that serves this dtype and head_dim by this tile."""
    return f"flash_forward_{dtype}_{f'd{head_dim}' if head_dim in HEAD_DIMS else 'any'}_{tile}"


def variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What the build compiles: (kernel name, dtype, keyword arguments of `kernel`)."""
    for dtype in DTYPES.values():
        for head_dim in (*HEAD_DIMS, None):
            for tile in TILES_OF[dtype]:
                options = {"dtype": dtype, "head_dim": head_dim, "tile": TILES[tile]}
                yield name(dtype, head_dim or 0, tile), dtype, options


def kernel(*, dtype: str, head_dim: int | None, tile: Tile) -> Callable[..., None]:
    """Make the numba-dpex kernel function for one dtype, head_dim (None: any up to `MAX_HEAD_DIM`) and tile."""
    from numba_dpex.kernel_api import PrivateArray

    from .intrinsics import exp2, group_index, lane_index, mad

    rows, keys, dims, block, lanes = tile
    real = np.dtype(dtype).type
    any_head_dim = head_dim is None
    width = head_dim or MAX_HEAD_DIM
    # private arrays are flat: [rows][…] each
    dots_size, sums_size, scores_size, vectors_size = rows * keys, rows * dims, rows * block, rows * width
    minus_infinity, ln2 = real(-np.inf), real(math.log(2))

    def flash_forward(
        item, no_array, q, k, v, out, lse,
        q_offset, q_batch, q_seq, q_head, k_offset, k_batch, k_seq, k_head, v_offset, v_batch, v_seq, v_head,
        out_offset, out_batch, out_seq, out_head, lse_offset, lse_batch, lse_seq, lse_head,
        heads, group, head_shift, seq_q, seq_k, diagonal, row_blocks, runtime_head_dim, scale, zero,
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
        maximum = PrivateArray(rows, real)
        new_maximum = PrivateArray(rows, real)
        shift = PrivateArray(rows, real)
        rescale = PrivateArray(rows, real)
        normaliser = PrivateArray(rows, real)
        block_sum = PrivateArray(rows, real)

        # `zero` is an argument: a constant would become a memset, which forces the arrays out of vector layout
        for r in range(rows):
            row = first + r * lanes + lane
            last[r] = min(row + diagonal, seq_k - 1)
            maximum[r] = minus_infinity + zero
            normaliser[r] = zero
            source = q_offset + min(row, seq_q - 1) * q_seq
            for d in range(size):
                query[r * width + d] = q[source + d] * scale
                total[r * width + d] = zero

        end = min(first + rows * lanes + diagonal, seq_k)
        for start in range(0, end, block):
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
            # the only blocks with a mask: at the diagonal and at the end of the keys
            edge = start + block > min(first + diagonal + 1, seq_k)
            if edge:
                for r in range(rows):
                    new_maximum[r] = maximum[r]
                    for j in range(block):
                        visible = score[r * block + j] if start + j <= last[r] else minus_infinity
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
                    score[r * block + j] = weight
                    block_sum[r] += weight
            for r in range(rows):
                normaliser[r] = mad(normaliser[r], rescale[r], block_sum[r])
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
                                seen = value if start + j <= last[r] else zero
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
    tile: str,
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
        Receives the natural logarithm of the sum of exp(score) of every row; (batch, heads, seq_q).
    scale : float
        Factor of the dot products.
    diagonal : int
        Query row i sees the keys j <= i + diagonal.
    group, head_shift : int
        Query head h reads kv head ``(h + head_shift) // group``.
    tile : str
        Which of `TILES`, of those that `TILES_OF` lists for the dtype.
    """
    batch, seq_q, heads, head_dim = q.shape
    if out.size == 0:
        return
    rows, lanes = TILES[tile].rows, TILES[tile].lanes
    row_blocks = -(-seq_q // (rows * lanes))
    lse_offset, lse_batch, lse_head, lse_seq = place(lse)
    launch(
        q.sycl_queue,
        name(DTYPES[q.dtype.itemsize], head_dim, tile),
        [x.usm_data for x in (q, k, v, out, lse)],
        (
            *(number for x in (q, k, v, out) for number in place(x)[:4]),
            *(lse_offset, lse_batch, lse_seq, lse_head),
            *(heads, group, head_shift, seq_q, k.shape[1], diagonal, row_blocks, head_dim),
            *(scale * math.log2(math.e), 0.0),
        ),
        groups=batch * heads * row_blocks,
        lanes=lanes,
    )


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float, diagonal: int, group: int, head_shift: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes, in float64 NumPy, block by block as the kernel does."""
    block = TILES["wide"].block
    q, k, v = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v))
    kv = (np.arange(q.shape[1]) + head_shift) // group
    total, normaliser = np.zeros(q.shape), np.zeros(q.shape[:3])
    maximum = np.full(q.shape[:3], -np.inf)
    for start in range(0, k.shape[2], block):
        key, value = (x[:, kv, start : start + block] for x in (k, v))
        j = start + np.arange(key.shape[2])
        seen = j <= np.arange(q.shape[2])[:, None] + diagonal
        score = np.where(seen, scale * math.log2(math.e) * q @ key.swapaxes(2, 3), -np.inf)
        new_maximum = np.maximum(maximum, score.max(-1))
        shift = np.where(new_maximum > -np.inf, new_maximum, 0.0)
        weight, rescale = np.exp2(score - shift[..., None]), np.exp2(maximum - shift)
        normaliser = normaliser * rescale + weight.sum(-1)
        total = total * rescale[..., None] + weight @ value
        maximum = new_maximum
    with np.errstate(divide="ignore"):
        lse = maximum * math.log(2) + np.log(normaliser)
    return (total / np.where(normaliser == 0, 1, normaliser)[..., None]).swapaxes(1, 2), lse
