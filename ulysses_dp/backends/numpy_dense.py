"""AttnType.NUMPY: the dense float64 references beside the kernels, on the host."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ulysses_dp.kernels import reference, row_dot

from .._call.options import ALL_MORE, OPTIONS
from .._device.arrays import tensor
from .._device.copies import copy_arrays, readable
from .._device.workspace import scratch
from ._base import Backend, compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from .._call.options import Options
    from .._ranks.partition import HeadMap


class NumpyDense(Backend):
    """Slow, and its memory grows with seq_q x seq_k; all options."""

    name = "NUMPY"
    in_blocks = True
    has = (*OPTIONS, *ALL_MORE)

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        compute = compute_dtype(q)
        (q,) = readable((q,), "q", compute, by_head=False)
        k, v = readable((k, v), "k, v", compute, by_head=False)
        _compute(reference.forward, (q, k, v), (out, lse), options, q, k, heads)

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        dout, q, k, v, lse, delta = arrays
        dout, q = readable((dout, q), "dout, q", lse.dtype, by_head=False)
        k, v = readable((k, v), "k, v", lse.dtype, by_head=False)
        arrays = dout, q, k, v, lse, delta
        _compute(reference.backward, arrays, grads, options, q, k, heads)

    def largest_scores(self, q: Any, k: Any, options: Options, heads: HeadMap) -> np.ndarray:
        q, k = (readable((x,), name, compute_dtype(x), by_head=False)[0] for name, x in (("q", q), ("k", k)))
        largest: np.ndarray = _dense(reference.largest_scores, (q, k), options, q, k, heads).max(axis=(0, 2))
        return largest

    def score_gradient(
        self, arrays: Sequence[Any], options: Options, heads: HeadMap, *, keeps: Sequence[bool], by_slope: bool
    ) -> np.ndarray:
        dout, q, k, v, lse, delta = arrays
        dout, q = readable((dout, q), "dout, q", lse.dtype, by_head=False)
        k, v = readable((k, v), "k, v", lse.dtype, by_head=False)
        dense = partial(reference.score_gradient, keeps=keeps, by_slope=by_slope)
        result: np.ndarray = _dense(dense, (dout, q, k, v, lse, delta), options, q, k, heads)
        return result

    def delta(self, dout: Any, out: Any, delta: Any) -> None:
        dout, out = readable((dout, out), "dout, out", delta.dtype, by_head=False)
        _write(delta, row_dot.reference(tensor.asnumpy(dout), tensor.asnumpy(out)))


def _compute(
    dense: Callable[..., Any],
    arrays: Sequence[Any],
    targets: Sequence[Any],
    options: Options,
    q: Any,
    k: Any,
    heads: HeadMap,
) -> None:
    for target, result in zip(targets, _dense(dense, arrays, options, q, k, heads), strict=True):
        if target is not None:
            _write(target, result)


def _dense(dense: Callable[..., Any], arrays: Sequence[Any], options: Options, q: Any, k: Any, heads: HeadMap) -> Any:
    """What a reference makes of USM arrays."""
    score_options = options.score_options(q, k.shape[1], heads.first)
    if score_options is not None and score_options.bias is not None:
        score_options = replace(score_options, bias=tensor.asnumpy(score_options.bias))
    return dense(
        *(tensor.asnumpy(x) for x in arrays),
        scale=options.softmax_scale,
        diagonal=options.diagonal(q.shape[1], k.shape[1]),
        group=heads.group,
        head_shift=heads.shift,
        options=score_options,
    )


def _write(target: Any, dense: Any) -> None:
    """Round dense results to the dtype of a USM array."""
    if target.dtype.kind == "u":  # bfloat16
        exact = scratch(target.sycl_queue, "dense result", target.shape, tensor.float32)
        exact[...] = tensor.asarray(dense, dtype=exact.dtype, sycl_queue=exact.sycl_queue)
        copy_arrays((exact,), (target,))
    else:
        target[...] = tensor.asarray(dense, dtype=target.dtype, sycl_queue=target.sycl_queue)
