"""AttnType.TORCH: PyTorch's scaled_dot_product_attention on the memory of the USM arrays."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .._call.spans import UNLIMITED, spans
from .._device.arrays import tensor
from .._device.copies import copy_arrays
from .._device.workspace import empty_like
from ._base import Backend, compute_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._call.checks import Geometry
    from .._call.options import Options
    from .._ranks.partition import HeadMap

BLOCK = 2**22  # scores that are in memory at once where lse is computed


class TorchSdpa(Backend):
    """No soft cap, sinks or dropout. 16-bit arrays are computed in their own dtype.

    torch works on views of the USM arrays, but where it does not see their device. What PyTorch has no option for is one dense
    mask, of the axes over which it differs: seq_q x seq_k for causal masks of different lengths, windows and packed sequences,
    and that for every head for ALiBi. lse, which PyTorch does not return, is another pass over the scores.
    """

    name = "TORCH"

    def check(self, device: Any, geometry: Geometry, options: Options, *, backward: bool) -> None:
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise ImportError("attn_type TORCH needs PyTorch: pip install 'ulysses_dp[torch]'") from error
        self.refuse_rare_options(options)

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        import torch

        with torch.no_grad():
            queries, keys, values = (_to_torch(x) for x in (q, k, v))
            masks = _Masks.of(q, k, options, heads, queries.device)
            _write(_attend(queries, keys, values, masks, options, heads), out)
            if lse is not None:
                _write(_lse(queries, keys, masks, options, heads), lse)

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        import torch

        dout, q, k, v, _, _ = arrays
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has set
            queries, keys, values = (_to_torch(x).requires_grad_() for x in (q, k, v))
            masks = _Masks.of(q, k, options, heads, queries.device)
            out = _attend(queries, keys, values, masks, options, heads)
            results = torch.autograd.grad(out, (queries, keys, values), _to_torch(dout))
        for result, grad in zip(results, grads, strict=True):
            _write(result, grad)


def _attend(q: Any, k: Any, v: Any, masks: _Masks, options: Options, heads: HeadMap) -> Any:
    """Attention of tensors, all of them (batch, seq, heads, head_dim)."""
    import torch

    # PyTorch aligns its own causal mask to the first query and key, attention here to the last ones. And on CPUs it hides, then
    # scales, which by a scale of 0 or less makes nan or infinity of -infinity.
    is_causal = options.plain and options.causal and q.shape[1] == k.shape[1] and options.softmax_scale > 0
    uniform = heads.uniform(q.shape[2], k.shape[2])
    if not uniform:
        k, v = _expanded(k, q, heads), _expanded(v, q, heads)
    # it attends over the last axis but one
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=None if is_causal else masks.rows(slice(None)),
        is_causal=is_causal,
        scale=options.softmax_scale,
        enable_gqa=k.shape[2] < q.shape[2],
    )
    return out.transpose(1, 2)


def _expanded(x: Any, q: Any, heads: HeadMap) -> Any:
    """A kv head for every query head."""
    return x[:, :, heads.kv_heads(q.shape[2])]


def _lse(q: Any, k: Any, masks: _Masks, options: Options, heads: HeadMap) -> Any:
    """Logarithm of the softmax denominators, (batch, heads, seq_q), by blocks of rows."""
    import torch

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, seq_q, count, _ = q.shape
    keys = _expanded(k, q, heads).to(dtype).permute(0, 2, 3, 1)
    lse = torch.empty((batch, count, seq_q), dtype=dtype, device=q.device)
    step = max(1, BLOCK // max(1, batch * count * k.shape[1]))
    for start in range(0, seq_q, step):
        rows = slice(start, start + step)
        scores = options.softmax_scale * q[:, rows].transpose(1, 2).to(dtype) @ keys
        mask = masks.rows(rows)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
    return lse


@dataclass(frozen=True, eq=False)
class _Masks:
    """What is added to the scores of a call, and which keys its queries see; tensors on the device of q."""

    spans: Any  # (seq_q, 3): first key, end of the keys, key on the diagonal; None where all see all
    seq_k: int
    slopes: Any = None  # (1 or batch, heads, 1, 1)
    bias: Any = None  # 4-D, broadcast by axes of length 1
    padding: Any = None  # (batch, 1, 1, seq_k), bool

    @classmethod
    def of(cls, q: Any, k: Any, options: Options, heads: HeadMap, device: Any) -> _Masks:
        """The masks of USM arrays, for the heads of q, on a device of torch."""
        import torch

        def near(x: np.ndarray | None) -> Any:
            return None if x is None else torch.tensor(x.copy(), device=device)

        seq_q, seq_k = q.shape[1], k.shape[1]
        # 16-bit numbers would be too coarse for what is added; PyTorch takes masks of float32 with them
        dtype = compute_dtype(q)
        extras = options.extras(q, seq_k, heads.first, dtype)
        if extras is None:
            return cls(near(spans(seq_q, seq_k, causal=True, window_size=UNLIMITED) if options.causal else None), seq_k)
        bias = None
        if extras.bias is not None:
            bias = _to_torch(extras.bias)
            bias = bias[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in bias.stride())]
        return cls(
            near(extras.spans),
            seq_k,
            slopes=None if extras.slopes is None else near(extras.slopes[..., None, None].astype(dtype)),
            bias=bias,
            padding=None if extras.padding is None else near(extras.padding[:, None, None, :]),
        )

    def rows(self, rows: slice) -> Any:
        """The mask for some rows, which broadcasts to (batch, heads, rows, seq_k): bool, or to be added; None for no mask."""
        import torch

        if self.spans is None:
            return None
        table = self.spans[rows]
        keys = torch.arange(self.seq_k, device=table.device)
        first_row = table[:1]
        different = bool((table[:, :2] != first_row[:, :2]).any())
        first, end, _ = (table if different else first_row)[..., None].unbind(1)
        seen = (first <= keys) & (keys < end)
        if self.padding is not None:
            seen = seen & self.padding
        if self.slopes is None and self.bias is None:
            return seen[None, None] if seen.ndim == 2 else seen
        added: Any = 0
        if self.slopes is not None:
            added = -self.slopes * (table[:, 2:] - keys).abs()
        if self.bias is not None:
            added = added + (self.bias[:, :, rows] if self.bias.shape[2] > 1 else self.bias)
        return torch.where(seen, added, -torch.inf)


def _in_reach(x: Any) -> bool:
    """Whether torch works on the memory of a USM array itself."""
    import torch

    device = x.sycl_device
    return device.is_cpu or (device.is_gpu and torch.xpu.is_available())


def _to_torch(x: Any) -> Any:
    """A USM array as a tensor: a view where torch reaches its memory, otherwise a copy."""
    import torch

    if min(x.strides) < 0:  # torch has no such strides
        x, source = empty_like(x, x.shape), x
        copy_arrays((source,), (x,))
    x.sycl_queue.wait()  # torch knows nothing of it
    if not _in_reach(x):
        result = torch.from_numpy(tensor.asnumpy(x))
    elif x.sycl_device.is_cpu:
        result = torch.from_numpy(_on_host(x))
    else:  # never run: there was no XPU, only the documentation of DLPack in torch and dpctl
        result = torch.from_dlpack(x)
    return result.view(torch.bfloat16) if x.dtype == np.uint16 else result


def _on_host(x: Any) -> np.ndarray:
    """A view of a USM array of a CPU device, whose memory is host memory; it keeps the array alive."""
    strides = tuple(stride * x.dtype.itemsize for stride in x.strides)
    interface = {"version": 3, "shape": x.shape, "typestr": x.dtype.str, "data": (x._pointer, False), "strides": strides}
    return np.asarray(SimpleNamespace(__array_interface__=interface, keeps=x))


def _write(result: Any, target: Any) -> None:
    """Copy a tensor to a USM array, which PyTorch cannot be told to compute into, and round it to the dtype of that."""
    import torch

    if _in_reach(target):
        _to_torch(target).copy_(result)
        if not target.sycl_device.is_cpu:
            torch.xpu.synchronize()  # never run; the queue of the array knows nothing of that of torch
        return
    dtype = "bfloat16" if target.dtype == np.uint16 else str(target.dtype)
    result = result.to(getattr(torch, dtype))
    host = (result.view(torch.uint16) if dtype == "bfloat16" else result).numpy()
    target[...] = tensor.asarray(host, sycl_queue=target.sycl_queue)
