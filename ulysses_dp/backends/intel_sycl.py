"""AttnType.INTEL_SYCL: the numba-dpex kernels of this package."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ulysses_dp.kernels.flash_backward import TILES_OF, flash_backward
from ulysses_dp.kernels.flash_backward_gpu import flash_backward_gpu
from ulysses_dp.kernels.flash_forward import flash_forward
from ulysses_dp.kernels.flash_forward_gpu import flash_forward_gpu

from .._device.copies import copy_arrays, readable
from .._device.workspace import scratch
from ..schedule import choose, fastest
from ._base import Backend, compute_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._call.checks import Geometry
    from .._call.options import Options
    from .._ranks.partition import HeadMap

# Query rows times head_dim from which the CPU kernels get copies in which the rows of a head follow each other. With the heads
# in between, the rows of one head fall into an eighth of the cache sets. Measured for 8 heads of 64 and 128: 1.15 to 1.35
# times as fast with the copies for 2048 and 4096 rows, 1.0 and 1.06 times for 1024, slower below.
HEAD_MAJOR_FROM = 1024 * 64


class IntelSycl(Backend):
    """All options, on any SYCL device. 16-bit arrays are computed in float32, in copies."""

    name = "INTEL_SYCL"

    def check(self, device: Any, geometry: Geometry, options: Options, *, backward: bool) -> None:
        # a bad environment variable of this rank
        choose(device, geometry.compute_dtype, geometry.head_dim, seq_q=1)

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        queue, compute = q.sycl_queue, compute_dtype(q)
        if lse is None:  # the kernels write it either way
            lse = scratch(queue, "lse", (q.shape[0], q.shape[2], q.shape[1]), compute)
        schedule = choose(queue.sycl_device, compute, q.shape[3], q.shape[1])
        on_gpu = schedule == "gpu" and options.plain
        (q,) = readable((q,), "q", compute, by_head=False)
        k, v = readable((k, v), "k, v", compute, by_head=not on_gpu and _walks_far(q))
        result = out if out.dtype == compute else scratch(queue, "result before rounding", out.shape, compute)
        arguments = _arguments(q, k, options, heads)
        if on_gpu:
            flash_forward_gpu(q, k, v, result, lse, partial(scratch, queue, dtype=compute), **arguments)
        else:
            tile = schedule if schedule != "gpu" else None
            flash_forward(q, k, v, result, lse, tile=tile, extras=options.extras(q, k.shape[1], heads.first), **arguments)
        if result is not out:
            copy_arrays((result,), (out,))

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        dout, q, k, v, lse, delta = arrays
        queue, compute = q.sycl_queue, lse.dtype
        on_gpu = options.plain and choose(queue.sycl_device, compute, q.shape[3], q.shape[1]) == "gpu"
        by_head = not on_gpu and _walks_far(q)
        dout, q = readable((dout, q), "dout, q", compute, by_head=by_head)
        k, v = readable((k, v), "k, v", compute, by_head=by_head)
        results = [x if x.dtype == compute else scratch(queue, f"gradient {n}", x.shape, compute) for n, x in enumerate(grads)]
        arguments = _arguments(q, k, options, heads)
        if on_gpu:
            memory = partial(scratch, queue, dtype=compute)
            flash_backward_gpu(dout, q, k, v, lse, delta, *results, memory, **arguments)
        else:
            tile = fastest(queue.sycl_device, q.shape[3], TILES_OF[str(compute)])
            extras = options.extras(q, k.shape[1], heads.first)
            flash_backward(dout, q, k, v, lse, delta, *results, extras=extras, tile=tile, **arguments)
        for result, grad in zip(results, grads, strict=True):
            if result is not grad:
                copy_arrays((result,), (grad,))


def _arguments(q: Any, k: Any, options: Options, heads: HeadMap) -> dict[str, Any]:
    """What all kernels take besides arrays and extras."""
    diagonal = options.diagonal(q.shape[1], k.shape[1])
    return {"scale": options.softmax_scale, "diagonal": diagonal, "group": heads.group, "head_shift": heads.shift}


def _walks_far(rows: Any) -> bool:
    """Whether arrays that are walked over for every tile of these rows are better copied; see `HEAD_MAJOR_FROM`."""
    return rows.shape[1] * rows.shape[3] >= HEAD_MAJOR_FROM
