"""What other libraries have no place for: options as one dense mask, kv heads for query heads, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from ulysses_dp.kernels.relayout import Panel, copy_panels, source_of, target_of

from .._call.spans import UNLIMITED, spans
from .._device.arrays import tensor
from .._device.copies import copy_arrays, readable
from .._device.dtypes import held_by
from .._device.trace import note
from .._device.workspace import kept, scratch
from ._base import compute_dtype

if TYPE_CHECKING:
    from .._call.options import Options
    from .._ranks.partition import HeadMap

# the options for which a scale and a mask are enough
BY_MASK = (
    *("softmax_scale", "causal", "window_size", "alibi_slopes", "bias", "key_padding_mask"),
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "key_ranges"),
)
MINUS_INFINITY_BITS = 0xFF80  # of bfloat16


@dataclass(frozen=True)
class Mask:
    """What hides keys and changes scores after their scale, as one array that is added."""

    added: Any  #: USM array (1 or batch, 1 or heads, 1 or seq_q, seq_k), -inf for a hidden key
    slot: str = ""  #: under which it is kept, if it is

    def blind(self) -> Any:
        """Which queries see no key; (1 or batch, 1 or heads, 1 or seq_q)."""

        hidden = MINUS_INFINITY_BITS if held_by(self.added.dtype) == "bfloat16" else -np.inf

        def find() -> Any:
            return tensor.all(self.added == hidden, axis=-1)

        return kept(self.added.sycl_queue, f"blind {self.slot}", find) if self.slot else find()


def mask_of(q: Any, seq_k: int, options: Options, heads: HeadMap) -> Mask:
    """The mask of a call, for USM array q (batch, seq_q, heads, head_dim), with the causal mask in it.

    It has the dtype of q if it hides only, which 16 bits hold, too; or else that of the computation. All but the bias, whose
    numbers may be others in the next call, is kept for later calls.
    """
    compute = compute_dtype(q)
    score_options = options.score_options(q, seq_k, heads.first, compute)
    if score_options is None:
        table, slopes, padding, bias = spans(q.shape[1], seq_k, causal=options.causal, window_size=UNLIMITED), None, None, None
    else:
        table, slopes, padding, bias = score_options.spans, score_options.slopes, score_options.padding, score_options.bias
    if slopes is None and (table[:, :2] == table[:1, :2]).all():
        table = table[:1]
    dtype = q.dtype if slopes is None and bias is None else compute
    content = blake2b(repr((seq_k, dtype, table.shape, [x is not None and x.shape for x in (slopes, padding)])).encode())
    for x in (table, slopes, padding):
        content.update(b"" if x is None else x.tobytes())
    slot = f"mask {content.hexdigest()}"
    if bias is None:
        return Mask(kept(q.sycl_queue, slot, lambda: _build(q.sycl_queue, seq_k, dtype, table, slopes, padding)), slot)
    bias = bias[tuple(slice(None if stride else 1) for stride in bias.strides)]
    all_seen = len(table) == 1 and tuple(table[0, :2]) == (0, seq_k) and (padding is None or padding.all())
    if all_seen and slopes is None and bias.shape[3] == seq_k:
        return Mask(bias)
    added = kept(q.sycl_queue, slot, lambda: _build(q.sycl_queue, seq_k, dtype, table, slopes, padding))
    hidden = (added == -np.inf) | (bias == -np.inf)
    # large finite numbers hide nothing, however large their sum
    return Mask(tensor.where(hidden, -np.inf, tensor.maximum(added + bias, np.finfo(compute).min), order="C"))


def _build(queue: Any, seq_k: int, dtype: Any, table: np.ndarray, slopes: np.ndarray | None, padding: np.ndarray | None) -> Any:
    """A mask of spans, ALiBi slopes and padding."""
    exact = np.dtype(np.float64 if dtype == np.float64 else np.float32)

    def on_device(x: np.ndarray, dtype: Any = None) -> Any:
        return tensor.asarray(x.copy(), dtype=dtype, sycl_queue=queue)

    first, end, diagonal = (on_device(x[:, None]) for x in table.T)
    key = tensor.arange(seq_k, dtype=first.dtype, sycl_queue=queue)
    hidden = ((key < first) | (key >= end))[None, None]
    added = tensor.zeros((1, 1, 1, 1), dtype=exact, sycl_queue=queue)
    if padding is not None:
        hidden = hidden | on_device(~padding[:, None, None, :])
    if slopes is not None:
        added = -on_device(slopes[..., None, None], exact) * tensor.astype(tensor.abs(key - diagonal), exact)
    mask = tensor.where(hidden, -np.inf, added, order="C")
    if mask.dtype == dtype or not mask.size:
        return mask
    rounded = tensor.empty(mask.shape, dtype=dtype, sycl_queue=queue)
    copy_arrays((mask,), (rounded,))
    return rounded


def for_query_heads(k: Any, v: Any, q: Any, heads: HeadMap) -> list[Any]:
    """k and v with a head for every head of q."""
    index = tensor.asarray(heads.kv_heads(q.shape[2]), sycl_queue=q.sycl_queue)
    return [tensor.take(x, index, axis=2) for x in (k, v)]


def add_up(parts: Any, grad: Any, heads: HeadMap) -> None:
    """Add the gradients of query heads up to those of kv heads, in the order of the query heads and the computing dtype."""
    compute = compute_dtype(parts)
    (parts,) = readable((parts,), "parts of kv heads", compute, by_head=False)
    total = grad if grad.dtype == compute else scratch(grad.sycl_queue, "sums of kv heads", grad.shape, compute)
    batch, seq, count, width = parts.shape
    kv_heads = heads.kv_heads(count)
    panels = [
        Panel(*source_of(0, parts, head), *target_of(0, total, kv), 1, width, add=int(kv in kv_heads[:head]))
        for head, kv in enumerate(kv_heads)
    ]
    copy_panels((parts,), (total,), panels, rows=seq, batch=batch)
    note(passes=1)
    if total is not grad:
        copy_arrays((total,), (grad,))


def is_coarse(lse: Any, error: float) -> bool:
    """Whether rounding lse has changed the weights that are computed from it by more than this part in some row.

    Of scores around 1e9, which a bias makes that is to hide all keys of a row, their number is lost: its logarithm is nothing.
    """
    size = tensor.abs(lse)
    return bool(tensor.any((size > 2 * error / np.finfo(lse.dtype).eps) & (size < np.inf)))
