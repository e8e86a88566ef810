"""AttnType.TORCH: PyTorch's scaled_dot_product_attention on the memory of the USM arrays."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .._device.arrays import tensor
from .._device.copies import copy_arrays
from .._device.dtypes import held_by
from .._device.workspace import empty_like, scratch
from ._base import Backend
from .dense import BY_MASK, add_up, for_query_heads, is_coarse, mask_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._call.checks import Geometry
    from .._call.options import Options
    from .._ranks.partition import HeadMap

BLOCK = 2**22  # scores that are in memory at once where lse is computed
COARSE = 2.0**-14  # error of the weights from which on the gradient keeps them: for float32, with an lse of 1024


class TorchSdpa(Backend):
    """No soft cap, sinks or dropout. 16-bit arrays are computed in their own dtype.

    torch works on views of the USM arrays, but where it does not see their device. What PyTorch has no option for is one dense
    mask, of the axes over which it differs: seq_q x seq_k for causal masks of different lengths, windows and packed sequences,
    and that for every head for ALiBi. lse, which PyTorch does not return, is another pass over the scores.
    """

    name = "TORCH"
    has = BY_MASK

    def check(self, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()) -> None:
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise ImportError("attn_type TORCH needs PyTorch: pip install 'ulysses_dp[torch]'") from error
        super().check(device, geometry, options, backward=backward, more=more)

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        import torch

        with torch.no_grad():
            mask = _mask(q, k, options, heads)
            if not heads.uniform(q.shape[2], k.shape[2]):
                k, v = for_query_heads(k, v, q, heads)
            queries, keys, values = (_to_torch(x) for x in (q, k, v))
            _write(_attend(queries, keys, values, mask, options), out)
            if lse is not None:
                _write(_lse(queries, keys, mask, options), lse)

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        dout, q, k, v, lse, _ = arrays
        mask, targets = _mask(q, k, options, heads), list(grads)
        if not heads.uniform(q.shape[2], k.shape[2]):
            k, v = for_query_heads(k, v, q, heads)
            targets[1:] = [
                scratch(q.sycl_queue, f"PyTorch d{name} of query heads", x.shape, x.dtype) for name, x in (("k", k), ("v", v))
            ]
        # the fused kernels keep lse, too, to compute the weights again
        kernels = sdpa_kernel(SDPBackend.MATH) if is_coarse(lse, COARSE) else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), kernels:  # whatever the caller has set
            queries, keys, values = (_to_torch(x).requires_grad_() for x in (q, k, v))
            out = _attend(queries, keys, values, mask, options)
            results = torch.autograd.grad(out, (queries, keys, values), _to_torch(dout))
        for result, target, grad in zip(results, targets, grads, strict=True):
            _write(result, target)
            if target is not grad:
                add_up(target, grad, heads)


def _mask(q: Any, k: Any, options: Options, heads: HeadMap) -> Any:
    """The mask of a call as a tensor, or None where there is none, or where it is PyTorch's own causal one."""
    # PyTorch aligns its own causal mask to the first query and key, attention here to the last ones. And on CPUs it hides, then
    # scales, which by a scale of 0 or less makes nan or infinity of -infinity.
    own = not options.causal or (q.shape[1] == k.shape[1] and options.softmax_scale > 0)
    return None if options.plain and own else _to_torch(mask_of(q, k.shape[1], options, heads).added)


def _attend(q: Any, k: Any, v: Any, mask: Any, options: Options) -> Any:
    """Attention of tensors, all of them (batch, seq, heads, head_dim)."""
    import torch

    # it attends over the last axis but one
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=options.causal and mask is None,
        scale=options.softmax_scale,
        enable_gqa=k.shape[2] < q.shape[2],
    )
    return out.transpose(1, 2)


def _lse(q: Any, k: Any, mask: Any, options: Options) -> Any:
    """Logarithm of the softmax denominators, (batch, heads, seq_q), by blocks of rows."""
    import torch

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, seq_q, count, _ = q.shape
    keys = k.repeat_interleave(count // k.shape[2], dim=2).to(dtype).permute(0, 2, 3, 1)
    lse = torch.empty((batch, count, seq_q), dtype=dtype, device=q.device)
    step = max(1, BLOCK // max(1, batch * count * k.shape[1]))
    for start in range(0, seq_q, step):
        rows = slice(start, start + step)
        scores = options.softmax_scale * q[:, rows].transpose(1, 2).to(dtype) @ keys
        if mask is not None:
            scores += mask[:, :, rows] if mask.shape[2] > 1 else mask
        elif options.causal:
            future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(start + 1)
            scores.masked_fill_(future, -torch.inf)
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
    return lse


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
    return result.view(torch.bfloat16) if held_by(x.dtype) == "bfloat16" else result


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
    dtype = held_by(target.dtype)
    result = result.to(getattr(torch, dtype))
    host = (result.view(torch.uint16) if dtype == "bfloat16" else result).numpy()
    target[...] = tensor.asarray(host, sycl_queue=target.sycl_queue)
