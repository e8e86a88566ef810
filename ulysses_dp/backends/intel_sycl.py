"""AttnType.INTEL_SYCL: the numba-dpex kernels of this package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ulysses_dp.kernels.arguments import Problem
from ulysses_dp.kernels.launch import BuildError
from ulysses_dp.kernels.reference import largest_exact_lse
from ulysses_dp.kernels.schedules import NO_WISHES, Wishes, choose, give_up
from ulysses_dp.kernels.score_walk import GROUP_ROWS, Walk
from ulysses_dp.kernels.score_walks import softmax_of_rows, walk_scores

from .._call.options import ALL_MORE, OPTIONS
from .._device.arrays import from_host, tensor, to_host
from .._device.copies import copy_arrays, readable
from .._device.workspace import scratch
from ._base import Backend, compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    has = (*OPTIONS, *ALL_MORE)

    wishes: Wishes = NO_WISHES  # of the environment, which is read once in a call

    def for_call(
        self, q: Array, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()
    ) -> Backend:
        kind = IntelSycl if geometry.head_dim == geometry.head_dim_v else OfTwoWidths
        backend = _backend(kind, Wishes.read())
        backend.check(device, geometry, options, backward=backward, more=more)
        return backend

    def check(self, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()) -> None:
        super().check(device, geometry, options, backward=backward, more=more)
        # a bad environment variable of this rank, or a device without kernels
        self._choose(device, geometry.compute_dtype, max(geometry.head_dim, geometry.head_dim_v), 1, options, backward=backward)

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        if lse is None:  # the kernels write it either way
            lse = scratch(q.sycl_queue, "lse", (q.shape[0], q.shape[2], q.shape[1]), compute_dtype(q))
        arrays = q, k, v, out, lse
        self._replay(arrays, lambda: self._forward(*arrays, options, heads), options, heads)

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        self._replay((*arrays, *grads), lambda: self._backward(arrays, grads, options, heads), options, heads)

    def _replay(self, arrays: Sequence[Any], step: Callable[[], None], options: Options, heads: HeadMap) -> None:
        """Do a step, or launch again what it launched for arrays in the same places."""
        queue = arrays[0].sycl_queue
        if not queue.sycl_device.is_cpu:  # which kernel reads an array on a GPU depends on its address
            step()
            return
        key = self, heads, queue, arrays[0].dtype, *[(x.shape, x.strides, x._element_offset) for x in arrays]
        options.replay.run(key, arrays, step)

    def _by_best(self, q: Any, options: Options, compute: Callable[[Schedule], None], *, backward: bool = False) -> None:
        """Compute by the best of the schedules whose kernels the driver builds."""
        device, dtype, (_, seq_q, _, head_dim) = q.sycl_queue.sycl_device, q.dtype, q.shape
        while True:
            schedule = self._choose(device, dtype, head_dim, seq_q, options, backward=backward)
            try:
                compute(schedule)
                break
            except BuildError as error:
                give_up(schedule, error, device, dtype, head_dim, options=options.more_than_plain, backward=backward)

    def _forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        self._by_best(q, options, lambda schedule: self._forward_by(schedule, (q, k, v), out, lse, options, heads))

    def _forward_by(
        self, schedule: Schedule, inputs: Sequence[Any], out: Any, lse: Any, options: Options, heads: HeadMap
    ) -> None:
        q, k, v = inputs
        queue, compute = q.sycl_queue, compute_dtype(q)
        operand = schedule.operands[q.dtype]
        (q,) = readable((q,), "q", operand, by_head=False)
        k, v = readable((k, v), "k, v", operand, by_head=schedule.by_head and _walks_far(q))
        result = out if out.dtype in (operand, compute) else scratch(queue, "result before rounding", out.shape, operand)
        schedule.forward(q, k, v, result, lse, _problem(q, k, options, heads), partial(scratch, queue, dtype=compute))
        if result is not out:
            copy_arrays((result,), (out,))

    def _backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        _, q, k, *_ = arrays
        runs = options.runs(q.shape[1], k.shape[1])
        if len(runs) > 1:
            self._backward_by_runs(arrays, grads, runs, heads)
            return
        self._by_best(q, options, lambda schedule: self._backward_by(schedule, arrays, grads, options, heads), backward=True)

    def _backward_by(
        self, schedule: Schedule, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap
    ) -> None:
        dout, q, k, v, lse, delta = arrays
        queue, compute = q.sycl_queue, lse.dtype
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
        how = {"options": options.more_than_plain, "backward": backward, "wishes": self.wishes}
        return choose(device, dtype, head_dim, seq_q, **how)

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
            self._backward(at_hand, (dq[:, rows], *parts), mine, heads)
            copy_arrays(parts, sums, add=True)
        copy_arrays(sums, of_keys)

    def largest_scores(self, q: Any, k: Any, options: Options, heads: HeadMap) -> np.ndarray:
        largest, _ = _softmax_of_rows(q, k, options, heads)
        result: np.ndarray = largest.max(axis=(0, 2), initial=-np.inf)
        return result

    def score_gradient(
        self, arrays: Sequence[Any], options: Options, heads: HeadMap, *, keeps: Sequence[bool], by_slope: bool
    ) -> np.ndarray:
        dout, q, k, v, lse, delta = arrays
        of_queries = _of_queries(q, k, lse, delta, options, heads)
        dout, q = readable((dout, q), "dout, q", lse.dtype, by_head=False)
        k, v = readable((k, v), "k, v", lse.dtype, by_head=False)
        (batch, seq_q, count, _), seq_k = q.shape, k.shape[1]
        keeps_batch, keeps_heads, keeps_rows, keeps_keys = keeps
        keeps_pairs = keeps_keys and keeps_rows
        shape = batch if keeps_batch else 1, count if keeps_heads else 1, *((seq_q,) if keeps_pairs else ())
        result = scratch(q.sycl_queue, "score gradient", (*shape, seq_k if keeps_keys else seq_q), lse.dtype)
        result[...] = 0
        rows, columns = ((k, v), (q, dout)) if keeps_keys else ((q, dout), (k, v))
        panels = tuple(_panels(x, f"{n} of rows") for n, x in enumerate(rows))
        walk = Walk(
            batch=batch,
            sum_batch=int(not keeps_batch),
            sum_heads=int(not keeps_heads),
            sum_columns=int(not keeps_pairs),
            by_slope=int(by_slope),
        )
        problem = _problem(q, k, options, heads, walks=True)
        walk_scores("keys" if keeps_keys else "queries", q, k, panels, columns, of_queries, result, problem, walk)
        found = to_host(result)
        if keeps_keys:
            return found if keeps_rows else found[:, :, None, :]
        return found[..., None] if keeps_rows else found.sum(axis=2, dtype=np.float64)[..., None, None]


class OfTwoWidths(IntelSycl):
    """The same where v has another head_dim than q and k, which no kernel has: the narrower arrays get zeros for the rest."""

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        q, k, v = _widened(q, k, v)
        (wide,) = _like_wide((out,), q.shape[3])
        super().forward(q, k, v, wide, lse, options, heads)
        copy_arrays((wide[..., : out.shape[3]],), (out,))

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        dout, q, k, v, lse, delta = arrays
        dout, q, k, v = _widened(dout, q, k, v)
        wide = _like_wide(grads, q.shape[3])
        super().backward((dout, q, k, v, lse, delta), wide, options, heads)
        for x, grad in zip(wide, grads, strict=True):
            copy_arrays((x[..., : grad.shape[3]],), (grad,))

    def score_gradient(
        self, arrays: Sequence[Any], options: Options, heads: HeadMap, *, keeps: Sequence[bool], by_slope: bool
    ) -> np.ndarray:
        dout, q, k, v, lse, delta = arrays
        dout, q, k, v = _widened(dout, q, k, v)
        return super().score_gradient((dout, q, k, v, lse, delta), options, heads, keeps=keeps, by_slope=by_slope)


@cache
def _backend(kind: type[IntelSycl], wishes: Wishes) -> IntelSycl:
    """One for all calls of a kind: what they launched is remembered for it."""
    return kind(wishes)


def _widened(*arrays: Any) -> list[Any]:
    """The arrays with the largest head_dim of them, the narrower ones in scratch memory, where zeros follow."""
    width, found = max(x.shape[3] for x in arrays), []
    for n, x in enumerate(arrays):
        if x.shape[3] < width:
            x, narrow = scratch(x.sycl_queue, f"wide {n}", (*x.shape[:3], width), x.dtype), x
            x[...] = 0
            copy_arrays((narrow,), (x[..., : narrow.shape[3]],))
        found.append(x)
    return found


def _like_wide(arrays: Sequence[Any], width: int) -> list[Any]:
    """Scratch memory for results like these, but of this head_dim."""
    return [scratch(x.sycl_queue, f"wide result {n}", (*x.shape[:3], width), x.dtype) for n, x in enumerate(arrays)]


def _softmax_of_rows(q: Any, k: Any, options: Options, heads: HeadMap) -> np.ndarray:
    """The largest score of every query, and the sum of exp(score - that), each (batch, heads, seq_q)."""
    (q,) = readable((q,), "q", compute_dtype(q), by_head=False)
    (k,) = readable((k,), "k", q.dtype, by_head=False)
    result = scratch(q.sycl_queue, "softmax of rows", (q.shape[0], q.shape[2], 2, q.shape[1]), q.dtype)
    result[:, :, 0], result[:, :, 1] = -np.inf, 0
    softmax_of_rows(q, k, _panels(q, "of rows"), result, _problem(q, k, options, heads, walks=True))
    return to_host(result).swapaxes(0, 2).swapaxes(1, 2)


def _of_queries(q: Any, k: Any, lse: Any, delta: Any, options: Options, heads: HeadMap) -> Any:
    """Peak, rate and delta of every query, (batch, heads, seq_q, 3): p = exp(score - peak) rate, as in `flash_backward`."""
    logs, deltas = to_host(lse), to_host(delta)
    peak, rate = logs.astype(np.float64), np.ones(logs.shape)
    large = np.isfinite(peak) & (abs(peak) > largest_exact_lse(lse.dtype))
    if large.any():  # they may have lost the number of keys in rounding
        highest, total = _softmax_of_rows(q, k, options, heads).astype(np.float64)
        if options.sinks is not None:
            sinks = options.for_heads("sinks", slice(heads.first, heads.first + q.shape[2]))[:, None]
            top = np.maximum(highest, sinks)
            highest, total = top, total * np.exp(highest - top) + np.exp(sinks - top)
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = highest + np.log(total) - peak  # lse may be that of more keys than these
            share = np.where(difference < -4 * np.finfo(lse.dtype).eps * abs(peak), np.exp(difference), 1)
            rate = np.where(large & (total > 0), share / total, rate)
        peak = np.where(large & (total > 0), highest, peak)
    return from_host(np.stack([peak, rate, deltas], axis=-1).astype(lse.dtype), q.sycl_queue)


def _panels(x: Any, slot: str) -> Any:
    """An array (batch, rows, heads, head_dim) as (batch, heads, head_dim, rows), in scratch memory.

    More rows, of which nothing is used, fill the last group.
    """
    batch, rows, heads, width = x.shape
    panels = scratch(x.sycl_queue, f"panels {slot}", (batch, heads, width, -(-rows // GROUP_ROWS) * GROUP_ROWS), x.dtype)
    if x.size:
        copy_arrays((tensor.permute_dims(x, (0, 3, 2, 1)),), (tensor.permute_dims(panels[..., :rows], (0, 2, 1, 3)),))
    return panels


def _problem(q: Any, k: Any, options: Options, heads: HeadMap, *, walks: bool = False) -> Problem:
    """The call as the kernels take it; those that walk over scores always get options."""
    score_options = options.all_score_options if walks else options.score_options
    return Problem(
        scale=options.softmax_scale,
        diagonal=options.diagonal(q.shape[1], k.shape[1]),
        group=heads.group,
        head_shift=heads.shift,
        options=score_options(q, k.shape[1], heads.first, compute_dtype(q)),
    )


def _walks_far(rows: Any) -> bool:
    """Whether arrays that are walked over for every tile of these rows are better copied; see `HEAD_MAJOR_FROM`."""
    return rows.shape[1] * rows.shape[3] >= HEAD_MAJOR_FROM
