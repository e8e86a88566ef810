"""AttnType.INTEL_SYCL: the numba-dpex kernels of this package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ulysses_dp.kernels.arguments import Problem
from ulysses_dp.kernels.schedules import NO_WISHES, Wishes, choose

from .._call.options import OPTIONS
from .._device.copies import copy_arrays, readable
from .._device.workspace import scratch
from ._base import Backend, compute_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ulysses_dp.kernels.schedules import Schedule

    from .._call.checks import Geometry
    from .._call.options import Options
    from .._device.arrays import Array
    from .._ranks.partition import HeadMap

# Query rows times head_dim from which the CPU kernels get copies in which the rows of a head follow each other. With the heads
# in between, the rows of one head fall into an eighth of the cache sets. Measured for 8 heads of 64 and 128: 1.15 to 1.35
# times as fast with the copies for 2048 and 4096 rows, 1.0 and 1.06 times for 1024, slower below.
HEAD_MAJOR_FROM = 1024 * 64


@dataclass(frozen=True, eq=False)
class IntelSycl(Backend):
    """All options, on any SYCL device. What the chosen kernels do not read as it is, 16-bit arrays for instance, is copied."""

    name = "INTEL_SYCL"
    in_blocks = True
    has = (*OPTIONS, "dlse")

    wishes: Wishes = NO_WISHES  # of the environment, which is read once in a call

    def for_call(
        self, q: Array, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()
    ) -> Backend:
        wishes = Wishes.read()
        backend = self if wishes == self.wishes else replace(self, wishes=wishes)
        backend.check(device, geometry, options, backward=backward, more=more)
        return backend

    def check(self, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()) -> None:
        super().check(device, geometry, options, backward=backward, more=more)
        # a bad environment variable of this rank, or a device without kernels
        self._choose(device, geometry.compute_dtype, geometry.head_dim, 1, options, backward=backward)

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        queue, compute = q.sycl_queue, compute_dtype(q)
        schedule = self._choose(queue.sycl_device, q.dtype, q.shape[3], q.shape[1], options)
        if lse is None:  # the kernels write it either way
            lse = scratch(queue, "lse", (q.shape[0], q.shape[2], q.shape[1]), compute)
        operand = schedule.operands[q.dtype]
        (q,) = readable((q,), "q", operand, by_head=False)
        k, v = readable((k, v), "k, v", operand, by_head=schedule.by_head and _walks_far(q))
        result = out if out.dtype == operand else scratch(queue, "result before rounding", out.shape, operand)
        schedule.forward(q, k, v, result, lse, _problem(q, k, options, heads), partial(scratch, queue, dtype=compute))
        if result is not out:
            copy_arrays((result,), (out,))

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        dout, q, k, v, lse, delta = arrays
        runs = options.runs(q.shape[1], k.shape[1])
        if len(runs) > 1:
            self._backward_by_runs(arrays, grads, runs, heads)
            return
        queue, compute = q.sycl_queue, lse.dtype
        schedule = self._choose(queue.sycl_device, q.dtype, q.shape[3], q.shape[1], options, backward=True)
        operand = schedule.operands[q.dtype]
        by_head = schedule.by_head and _walks_far(q)
        dout, q = readable((dout, q), "dout, q", operand, by_head=by_head)
        k, v = readable((k, v), "k, v", operand, by_head=by_head)
        results = [x if x.dtype == compute else scratch(queue, f"gradient {n}", x.shape, compute) for n, x in enumerate(grads)]
        problem, memory = _problem(q, k, options, heads), partial(scratch, queue, dtype=compute)
        schedule.backward((dout, q, k, v), lse, delta, tuple(results), problem, memory)
        for result, grad in zip(results, grads, strict=True):
            if result is not grad:
                copy_arrays((result,), (grad,))

    def _choose(
        self, device: Any, dtype: Any, head_dim: int, seq_q: int, options: Options, *, backward: bool = False
    ) -> Schedule:
        how = {"options": not options.plain, "backward": backward}
        return choose(device, dtype, head_dim, seq_q, **how, wishes=self.wishes)

    def _backward_by_runs(
        self, arrays: Sequence[Any], grads: Sequence[Any], runs: list[tuple[slice, Options]], heads: HeadMap
    ) -> None:
        """Write the gradients by some rows after the others; those of the keys are added up."""
        dout, q, k, v, lse, delta = arrays
        dq, *of_keys = grads
        parts, sums = (
            [scratch(q.sycl_queue, f"{slot} {n}", x.shape, lse.dtype) for n, x in enumerate(of_keys)]
            for slot in ("gradient of a run", "gradient of runs")
        )
        for x in sums:
            x[...] = 0
        for rows, mine in runs:
            at_hand = dout[:, rows], q[:, rows], k, v, lse[..., rows], delta[..., rows]
            self.backward(at_hand, (dq[:, rows], *parts), mine, heads)
            copy_arrays(parts, sums, add=True)
        copy_arrays(sums, of_keys)


def _problem(q: Any, k: Any, options: Options, heads: HeadMap) -> Problem:
    """The call as the kernels take it."""
    return Problem(
        scale=options.softmax_scale,
        diagonal=options.diagonal(q.shape[1], k.shape[1]),
        group=heads.group,
        head_shift=heads.shift,
        options=options.extras(q, k.shape[1], heads.first),
    )


def _walks_far(rows: Any) -> bool:
    """Whether arrays that are walked over for every tile of these rows are better copied; see `HEAD_MAJOR_FROM`."""
    return rows.shape[1] * rows.shape[3] >= HEAD_MAJOR_FROM
