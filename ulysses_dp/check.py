"""What ``python -m ulysses_dp --check`` does: compute with every kernel that this device would get, and compare.

The kernels run in another process. A check that is not right, does not end or ends its process costs that process only: the
next one goes on in a new one. The exchange needs all ranks, so it runs in the ranks themselves, and last.
"""

from __future__ import annotations

import faulthandler
import json
import queue as queues
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import dpnp
import numpy as np

from ulysses_dp.kernels import flash_backward, flash_backward_gpu, flash_forward, merge_rows
from ulysses_dp.kernels.panel_wire import LARGEST, SCALE_BYTES
from ulysses_dp.kernels.relayout import half_steps
from ulysses_dp.kernels.schedules import choose

from ._device.copies import copy_arrays
from ._device.dtypes import DTYPES
from ._device.queue import default_queue
from ._ranks import mpi
from .attention import attention, ulysses_attention
from .backends import AttnType
from .backward import attention_backward, ulysses_attention_backward
from .redistribute import gather_heads, scatter_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

ROWS = (5, 67, 260)  # less than a tile, some tiles and a rest, many
TIMED_ROWS = 1024
HEADS, KV_HEADS = 4, 2
ANY_HEAD_DIM = 40  # without a kernel of its own
PRODUCT = 1024  # rows of dpnp's matrix product, whose speed stands for that of the device
# Largest error, of numbers around 1, that counts as right. The results of 16 bits are rounded to that.
LIMITS = {"float32": 1e-4, "float64": 1e-11, "float16": 4e-3, "bfloat16": 4e-2}
TURNS, TURN_SECONDS = 5, 0.5  # so many calls of the largest size are timed, or as many as fit


@dataclass
class Result:
    """A line of the table."""

    name: str
    by: str = ""  # which schedules, by the size, or which route
    verdict: str = "right"
    error: float | None = None
    seconds: float | None = None  # of the largest size
    flops: float = 0.0  # of that
    bytes_sent: float = 0.0
    share: float | None = None  # of the speed of dpnp's matrix product
    details: str = ""  # for the report

    @property
    def right(self) -> bool:
        """Whether nothing is wrong; what was not tried is not wrong."""
        return self.verdict == "right" or self.verdict.startswith("not tried")


@dataclass(frozen=True)
class Check:
    """One family of kernels: what it computes, on arrays of which dtype and head_dim, with or without options."""

    what: str
    dtype: str
    head_dim: int = 0
    options: bool = False

    @property
    def name(self) -> str:
        """As the table has it."""
        width = f" {self.head_dim}" if self.head_dim else ""
        return f"{self.what} {self.dtype}{width}{' options' if self.options else ''}"

    def run(self) -> Result:
        """Compute on the device of this process, and compare."""
        result: Result = {"product": _product, "merge": _merge, "travel": _travel}.get(self.what, _attention)(self)
        if result.error is not None and not result.error <= LIMITS[self.dtype]:
            result.verdict = f"WRONG: more than {LIMITS[self.dtype]:.0e}"
        return result


def checks(device: Any) -> list[Check]:
    """All checks of the kernels that attention uses on a device."""
    full = [name for name in ("float32", "float64") if name == "float32" or device.has_aspect_fp64]
    found = [Check("product", dtype) for dtype in full]
    backward = flash_backward_gpu.GPU_TILES["float32"] if device.is_gpu else flash_backward.HEAD_DIMS["float32"]
    for what, own in (("forward", flash_forward.HEAD_DIMS), ("gradient", backward)):
        for options in (False, True):
            found += [Check(what, dtype, head_dim, options) for dtype in full for head_dim in (*own, ANY_HEAD_DIM)]
            found += [Check(what, dtype, 64, options) for dtype in DTYPES if dtype not in ("float32", "float64")]
    found += [Check("travel", name) for name, dtype in DTYPES.items() if dtype.compute == "float32"]
    return found + [Check("merge", dtype) for dtype in full]


# --- on the device: in a process of its own -----------------------------------------------------------------------------------


def _product(check: Check) -> Result:
    a, b = _random(0, (2, PRODUCT, PRODUCT), check.dtype)
    x, y = (dpnp.asarray(z, sycl_queue=default_queue()) for z in (a, b))
    error = _error(dpnp.asnumpy(x @ y) / PRODUCT**0.5, a.astype(np.float64) @ b / PRODUCT**0.5)
    return Result(check.name, "dpnp", error=error, seconds=_seconds(lambda: (x @ y).sycl_queue.wait()), flops=2.0 * PRODUCT**3)


def _attention(check: Check) -> Result:
    """Attention or its gradient of a few sizes, against the dense reference in float64."""
    backward, queue, dtype = check.what == "gradient", default_queue(), check.dtype
    stored = np.dtype(DTYPES[dtype].stored)
    tiles, worst = [], 0.0
    for rows in ROWS:
        arrays = _inputs(check, rows)
        options, of_reference = _options(check, rows)
        given, wide = _on_device(arrays), [_wide(x, dtype) for x in arrays]
        results, expected = (
            attention(*given[:3], return_lse=True, **options),
            attention(*wide[:3], return_lse=True, **of_reference),
        )
        if backward:
            results = attention_backward(given[3], *given[:3], *results, **options)
            expected = attention_backward(wide[3], *wide[:3], *expected, **of_reference)
        for x, y in zip(map(dpnp.asnumpy, results), expected, strict=True):
            worst = max(worst, _error(_wide(x, dtype if x.dtype == stored else ""), y))
        more = options.keys() - {"causal", "dtype"}
        schedule = choose(queue.sycl_device, stored, check.head_dim, rows, options=more, backward=backward)
        tiles.append(schedule.name)
    q, k, v, dout = _on_device(_inputs(check, TIMED_ROWS))
    options, _ = _options(check, TIMED_ROWS)
    out, lse = attention(q, k, v, return_lse=True, **options)
    if backward:
        seconds = _seconds(lambda: attention_backward(dout, q, k, v, out, lse, **options))
    else:
        seconds = _seconds(lambda: attention(q, k, v, **options))
    products = 5 if backward else 2
    flops = products * 2.0 * HEADS * TIMED_ROWS**2 / 2 * check.head_dim  # of the causal half
    return Result(check.name, ", ".join(dict.fromkeys(tiles)), error=worst, seconds=seconds, flops=flops)


def _inputs(check: Check, rows: int) -> list[np.ndarray]:
    """q, k, v and dout."""
    heads = HEADS, KV_HEADS, KV_HEADS, HEADS
    return [_random(n, (1, rows, count, check.head_dim), check.dtype) for n, count in enumerate(heads)]


def _options(check: Check, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a check, for the device and for the reference."""
    options: dict[str, Any] = {"causal": True}
    if check.options:
        bias = _random(7, (1, 1, rows, rows), DTYPES[check.dtype].compute)
        options |= {"softcap": 8.0, "dropout_p": 0.25, "seed": 3, "key_padding_mask": np.arange(rows)[None] % 11 != 3}
        options |= {"alibi_slopes": np.linspace(0.01, 0.5, HEADS), "sinks": np.linspace(-1, 1, HEADS), "bias": bias}
    of_reference = options | {"attn_type": AttnType.NUMPY}
    if check.options:
        (options["bias"],), of_reference["bias"] = _on_device([bias]), bias.astype(np.float64)
    if check.dtype == "bfloat16":
        options["dtype"] = "bfloat16"
    return options, of_reference


def _on_device(arrays: Sequence[np.ndarray]) -> list[Any]:
    return [dpnp.asarray(x, sycl_queue=default_queue()) for x in arrays]


def _merge(check: Check) -> Result:
    """The kernel that merges, where they lie, the steps of a ring."""
    shape = 1, ROWS[1], HEADS, 64
    arrays = [_random(n, shape if n % 2 == 0 else (1, HEADS, ROWS[1]), check.dtype) for n in range(4)]
    expected = merge_rows.reference(*arrays)
    out, lse, part, part_lse, merged = (x.get_array() for x in _on_device([*arrays, arrays[1]]))
    merge_rows.merge(out, lse, part, part_lse, merged)
    error = max(_error(dpnp.asnumpy(dpnp.asarray(x)), y) for x, y in zip((out, merged), expected, strict=True))
    seconds = _seconds(lambda: merge_rows.merge(out, lse, part, part_lse, merged))
    return Result(check.name, error=error, seconds=seconds)


def _travel(check: Check) -> Result:
    """The kernels that make 8 bits of numbers, and numbers of these: how much further than they may be these are away."""
    worst, x = 0.0, _random(0, (1, TIMED_ROWS, HEADS, 64), check.dtype)
    given, back, codes = (y.get_array() for y in _on_device([x, x, np.zeros((*x.shape[:3], 64 + SCALE_BYTES), np.uint8)]))

    def travel(wire: str) -> None:
        copy_arrays([given], [codes], wire=wire)
        copy_arrays([codes], [back], wire=wire)

    numbers = _wide(x, check.dtype)
    for wire in LARGEST:
        travel(wire)
        excess = abs(_wide(dpnp.asnumpy(dpnp.asarray(back)), check.dtype) - numbers) - half_steps(numbers, wire)
        worst = max(worst, _error(np.maximum(excess, 0), np.zeros(x.shape)))
    return Result(check.name, ", ".join(LARGEST), error=worst, seconds=_seconds(lambda: travel(wire)))


def _random(number: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random numbers as they are stored: bfloat16 as its bits."""
    x = np.random.default_rng(number).standard_normal(shape)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x.astype(dtype)


def _wide(x: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as they are stored, in float64."""
    return ((x.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else x).astype(np.float64)


def _error(x: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest number if that is more than 1; infinite where a number is nan."""
    same = (x == expected) | (np.isnan(x) & np.isnan(expected))  # infinities of the same sign, too
    with np.errstate(invalid="ignore"):
        differences = np.where(same, 0.0, np.abs(x - expected)) / max(
            1.0, np.abs(expected[np.isfinite(expected)]).max(initial=0)
        )
    return float(np.where(np.isnan(differences), np.inf, differences).max(initial=0.0))


def _seconds(call: Callable[[], Any]) -> float:
    """How long a call takes: the median of some, without the first."""
    call()
    times: list[float] = []
    while len(times) < TURNS and sum(times) < TURN_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def serve(first: int) -> None:
    """In a process of its own: run the checks from this number on, and print each result as a line of JSON."""
    for check in checks(default_queue().sycl_device)[first:]:
        try:
            result = check.run()
        except Exception as error:
            result = Result(check.name, verdict=f"failed: {type(error).__name__}", details=str(error))
        print(json.dumps(asdict(result)), flush=True)


# --- from outside -------------------------------------------------------------------------------------------------------------


def check_kernels(limit: float, show: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Run all checks of kernels in other processes, a new one after each that was not right; `limit` seconds for each."""
    results: list[Result] = []
    names = [check.name for check in checks(default_queue().sycl_device)]
    while len(results) < len(names):
        for result in _answers(len(results), names, limit):
            product = next((x for x in results if x.name == f"product {_compute_dtype(result.name)}"), None)
            if product and product.seconds and result.seconds and result.flops:
                result.share = result.flops / result.seconds / (product.flops / product.seconds)
            results.append(result)
            show(result)
    return results


def _compute_dtype(name: str) -> str:
    return DTYPES[name.split()[1]].compute


def _answers(first: int, names: Sequence[str], limit: float) -> Iterator[Result]:
    """The results of one process, up to the first that is not right."""
    lines: queues.SimpleQueue[str] = queues.SimpleQueue()

    def read(output: Iterable[str]) -> None:
        for line in output:
            lines.put(line)
        lines.put("")

    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        command = [sys.executable, "-m", "ulysses_dp.check", str(first)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            for name in names[first:]:
                try:
                    line = lines.get(timeout=limit)
                except queues.Empty:
                    yield Result(name, verdict=f"no answer in {limit:g} s", details=_tail(errors))
                    return
                if not line:
                    yield Result(name, verdict=f"ended its process: {_ending(process.wait())}", details=_tail(errors))
                    return
                result = Result(**json.loads(line))
                yield result
                if not result.right:
                    return
        finally:
            process.kill()
            process.wait()
            reader.join()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _tail(errors: Any) -> str:
    """The end of what a process said."""
    errors.seek(0)
    return str(errors.read())[-2000:]


def check_exchange(limit: float) -> Iterator[Result]:
    """Redistribute, and compute attention and its gradient by every route; collective. `limit`: seconds for each."""
    queue = default_queue()
    ranks = mpi.resolve_comm("check", None)
    ways: list[tuple[str, dict[str, Any]]] = []
    for route in ("device", "host"):
        usual = mpi.choose_route(queue, "auto")
        if route == "device" and any(mpi.share_object(ranks, usual.name != "device")):
            # MPI would take the pointer for one of the host, and end the process
            yield Result("exchange", route, verdict=f"not tried: {usual.reason}")
        else:
            ways.append((route, {"exchange": route}))
    route = ways[0][0]
    sizes = [n for n in range(2, ranks.size) if ranks.size % n == 0]
    ways += [(f"{route}, in two steps", {"exchange": route, "node_size": n}) for n in sizes[:1]]
    for by, way in ways:
        yield _exchange(by, way, ranks, limit)
        yield _ulysses(by, way, ranks, limit)
    if ranks.size > 1:
        yield from _shared(ranks, limit)
        yield _ulysses(f"{route}, ring of {ranks.size}", {"exchange": route, "ring": ranks.size}, ranks, limit)


def _shared(ranks: mpi.Ranks, limit: float) -> Iterator[Result]:
    """The same through memory that the ranks share, where they can."""
    by, way = "shared", {"exchange": "shared"}
    try:
        yield _exchange(by, way, ranks, limit)
    except (NotImplementedError, OSError) as error:  # on all ranks
        yield Result("exchange", by, verdict=f"not tried: {error}")
    else:
        yield _ulysses(by, way, ranks, limit)


@contextmanager
def _watched(limit: float) -> Iterator[None]:
    """End the process, which ends the job, if what is inside does not."""
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _exchange(by: str, way: dict[str, Any], ranks: mpi.Ranks, limit: float) -> Result:
    """Every number says where it was, so that the rows and heads of every rank are known."""
    rows, heads, width = 512, 3 * ranks.size + 1, 64
    mine = slice(ranks.rank * rows, (ranks.rank + 1) * rows)
    whole = np.arange(rows * ranks.size * heads, dtype=np.float32).reshape(1, -1, heads, 1)
    x = dpnp.asarray(np.broadcast_to(whole, (1, rows * ranks.size, heads, width))[:, mine], sycl_queue=default_queue())
    with _watched(limit):
        there = scatter_heads(x, **way)
        counts = mpi.share_object(ranks, there.shape[2])
        first = sum(counts[: ranks.rank])
        expected = np.broadcast_to(whole[:, :, first : first + there.shape[2]], there.shape)
        moved = np.array_equal(dpnp.asnumpy(there), expected) and sum(counts) == heads
        back = dpnp.asnumpy(gather_heads(there, seq_local=rows, **way))
        error = 0.0 if moved and np.array_equal(back, dpnp.asnumpy(x)) else np.inf
        seconds = _seconds_of_all(lambda: scatter_heads(x, **way), ranks)
    sent = x.nbytes * (ranks.size - 1) / ranks.size
    verdict = "right" if error == 0 else "WRONG: other numbers"
    return Result("exchange", by, verdict, error, seconds, bytes_sent=sent)


def _ulysses(by: str, way: dict[str, Any], ranks: mpi.Ranks, limit: float) -> Result:
    """Attention of all ranks and its gradient, against the dense reference on every rank."""
    rows, width = 96, 64
    total, mine = rows * ranks.size, slice(ranks.rank * rows, (ranks.rank + 1) * rows)
    whole = [_random(n, (1, total, h, width), "float32") for n, h in enumerate((HEADS, KV_HEADS, KV_HEADS, HEADS))]
    q, k, v, dout = (dpnp.asarray(x[:, mine], sycl_queue=default_queue()) for x in whole)
    with _watched(limit):
        out, lse = ulysses_attention(q, k, v, causal=True, return_lse=True, **way)
        grads = ulysses_attention_backward(dout, q, k, v, out, lse, causal=True, **way)
        seconds = _seconds_of_all(lambda: ulysses_attention(q, k, v, causal=True, **way), ranks)
    dense: dict[str, Any] = {"causal": True, "attn_type": AttnType.NUMPY}
    wide = [x.astype(np.float64) for x in whole]
    reference = attention(*wide[:3], return_lse=True, **dense)
    expected = reference[0], *attention_backward(wide[3], *wide[:3], *reference, **dense)
    error = max(_error(dpnp.asnumpy(x), y[:, mine]) for x, y in zip((out, *grads), expected, strict=True))
    verdict = "right" if error <= LIMITS["float32"] else f"WRONG: more than {LIMITS['float32']:.0e}"
    return Result("ulysses_attention", by, verdict, error, seconds, flops=4.0 * HEADS * total**2 / 2 * width / ranks.size)


def _seconds_of_all(call: Callable[[], Any], ranks: mpi.Ranks) -> float:
    """How long a collective call takes."""
    times = []
    for _ in range(1 + TURNS):
        mpi.meet(ranks)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# --- the table ----------------------------------------------------------------------------------------------------------------


def joined(of_ranks: Sequence[Sequence[Result]]) -> list[Result]:
    """One line for the same check of all ranks: the largest error, the longest time, and which ranks are not right."""
    lines = []
    names = list(dict.fromkeys((x.name, x.by) for results in of_ranks for x in results))
    for name, by in names:
        same = {rank: x for rank, results in enumerate(of_ranks) for x in results if (x.name, x.by) == (name, by)}
        bad = {rank: x for rank, x in same.items() if not x.right}
        slowest = max(same.values(), key=lambda x: x.seconds or 0.0)
        verdict = slowest.verdict
        if bad:
            on = "" if len(of_ranks) == 1 else f" (ranks {', '.join(map(str, bad))})"
            verdict = f"{next(iter(bad.values())).verdict}{on}"
        errors = [x.error for x in same.values() if x.error is not None]
        details = "\n".join(f"rank {rank}: {x.details}" for rank, x in same.items() if x.details)
        figures = slowest.seconds, slowest.flops, slowest.bytes_sent, slowest.share
        lines.append(Result(name, by, verdict, max(errors, default=None), *figures, details))
    return lines


def line(result: Result) -> str:
    """A line of the table."""
    seconds = result.seconds
    error = "" if result.error is None else f"{result.error:.1e}"
    micros = "" if seconds is None else f"{1e6 * seconds:.0f}"
    speed = f"{result.flops / seconds / 1e9:.1f}" if seconds and result.flops else ""
    if seconds and result.bytes_sent:
        speed = f"{result.bytes_sent / seconds / 1e9:.2f} GB/s"
    share = "" if result.share is None else f"{result.share:.0%}"
    return f"{result.name:<32} {result.by:<20} {error:>8} {micros:>9} {speed:>11} {share:>8}  {result.verdict}".rstrip()


HEADER = f"{'check':<32} {'by':<20} {'error':>8} {'µs':>9} {'GFLOP/s':>11} {'of matmul':>8}  result"


if __name__ == "__main__":
    serve(int(sys.argv[1]))
