"""Local attention against PyTorch's scaled_dot_product_attention and against the peak of sgemm, in one interleaved run.

    pip install '.[peers]'
    python scripts/bench_attention.py --json bench.json --plot bench.png
    python scripts/bench_attention.py --backends
    python scripts/bench_attention.py --memory

Each row of the table is the median over pairs of turns: ours and PyTorch's follow each other, again and again, so that both
see the same machine, and the ratio is taken pair by pair. A turn is a few calls, of which the first does not count: while it
runs, threads of the other side may still be spinning on the cores. Ours is the call that users make, `ulysses_dp.attention` on
bshd dpnp arrays ("bshd"), or on views of the buffer that the exchange receives ("wire"). PyTorch gets its preferred layout,
contiguous (batch, heads, seq, head_dim), in a process of its own. The peak is dpnp.matmul of 2048 x 2048 matrices. With
--backends, the other local backends that are installed take their turns in our process, through the same call.

With --memory: by how much the first call raises the peak memory of a process, in bytes per element of q. What grows with seq
squared would double from row to row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection

HEADS = 8
HEAD_DIMS = (32, 64, 80, 128, 256)
WINDOW = 256  # keys to each side
PADDED = 0.25  # share of the keys that --options pads
SEQS = (128, 256, 512, 1000, 1024, 2048, 4095, 4096)
PEAK_SIZE = 2048
TURN = 0.03  # seconds


@dataclass(frozen=True)
class Case:
    """One problem."""

    head_dim: int
    seq: int
    causal: bool = False
    batch: int = 1
    kv_heads: int = HEADS
    layout: str = "bshd"
    option: str = ""
    backward: bool = False

    @property
    def flops(self) -> float:
        """Floating-point operations of the products that are needed, for the pairs of a query and a key that it sees.

        Two products forward, and five backward, of which the kernels compute two more than once.
        """
        pairs = self.seq * (self.seq + 1) / 2 if self.causal else self.seq**2
        if self.option == "window":
            pairs = int(np.sum(window_mask(self.seq, self.causal)))
        elif self.option == "padding":
            pairs *= 1 - PADDED
        return (10.0 if self.backward else 4.0) * self.batch * HEADS * self.head_dim * pairs

    def arrays(self) -> list[np.ndarray]:
        """q, k and v, bshd; the same in both processes."""
        rng = np.random.default_rng(0)
        heads = (HEADS, self.kv_heads, self.kv_heads)
        return [rng.standard_normal((self.batch, self.seq, n, self.head_dim), dtype=np.float32) for n in heads]


def window_mask(seq: int, causal: bool) -> np.ndarray:
    """Which keys each query sees in a window."""
    distance = np.arange(seq)[:, None] - np.arange(seq)
    return (distance <= WINDOW) & (distance >= (0 if causal else -WINDOW))


def option_arguments(case: Case) -> tuple[dict[str, Any], np.ndarray | None]:
    """The option of a case as ours takes it, and as the dense mask by which PyTorch has it, (1 or heads, 1 or seq, seq)."""
    seq = case.seq
    rng = np.random.default_rng(1)
    slopes = 2.0 ** -np.arange(1, HEADS + 1, dtype=np.float32)
    distance = abs(np.arange(seq)[:, None] - np.arange(seq)).astype(np.float32)
    if case.option == "window":
        return {"window_size": (WINDOW, WINDOW)}, window_mask(seq, case.causal)[None]
    if case.option == "padding":
        mask = np.arange(seq) < seq * (1 - PADDED)
        return {"key_padding_mask": np.tile(mask, (case.batch, 1))}, mask[None, None]
    if case.option == "alibi":
        return {"alibi_slopes": slopes}, -slopes[:, None, None] * distance
    if case.option == "bias":
        bias = rng.standard_normal((HEADS, seq, seq), dtype=np.float32)
        return {"bias": bias[None]}, bias
    return {}, None


def option_cases() -> Iterator[Case]:
    """The rows of --options. PyTorch has no mask and `is_causal` in one call: a causal window is one dense mask."""
    for option in ("window", "padding", "alibi", "bias"):
        for seq in (1024, 4096):
            yield Case(64, seq, option=option)
    for seq in (1024, 4096):
        yield Case(64, seq, causal=True, option="window")


def backward_cases() -> Iterator[Case]:
    """The rows of --backward."""
    for causal in (False, True):
        for head_dim in HEAD_DIMS:
            for seq in (256, 1024, 2048, 4096):
                yield Case(head_dim, seq, causal, backward=True)
        yield Case(64, 1024, causal, kv_heads=2, backward=True)


def cases(full: bool) -> Iterator[Case]:
    """The rows: all of head_dim, seq and mask; the other sizes one at a time, or with `full` in every combination."""
    for causal in (False, True):
        for head_dim in HEAD_DIMS:
            for seq in SEQS:
                yield Case(head_dim, seq, causal)
                for batch, kv_heads in ((4, HEADS), (1, 2), (4, 2)) if full else ():
                    yield Case(head_dim, seq, causal, batch, kv_heads)
    if not full:
        for causal in (False, True):
            for seq in (256, 1024):
                yield Case(64, seq, causal, batch=4)
                yield Case(64, seq, causal, kv_heads=2)
                yield Case(64, seq, causal, batch=4, kv_heads=2)
    for head_dim in (64, 128):
        for seq in (1024, 4096):
            yield Case(head_dim, seq, layout="wire")


def torch_process(connection: Connection, threads: int) -> None:
    """Time PyTorch whenever asked to: receives a `Case` to prepare or None to take a turn, answers with seconds."""
    import torch

    torch.set_num_threads(threads)
    attention = torch.nn.functional.scaled_dot_product_attention
    for message in iter(connection.recv, "stop"):
        if message is not None:
            inputs = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in message.arrays()]
            inputs = [x.requires_grad_(message.backward) for x in inputs]
            _, mask = option_arguments(message)
            call = partial(
                attention,
                *inputs,
                attn_mask=None if mask is None else torch.from_numpy(mask),
                is_causal=message.causal and mask is None,
                enable_gqa=message.kv_heads != HEADS,
            )
            if message.backward:
                out = call()
                call = partial(torch.autograd.grad, out, inputs, torch.ones_like(out), retain_graph=True)
        connection.send(turn(call))


def our_call(case: Case, backend: str = "intel_sycl") -> Callable[[], Any]:
    """Our side of a case, ready to be called."""
    import dpnp

    import ulysses_dp

    attn_type = ulysses_dp.AttnType(backend)
    q, k, v = (dpnp.asarray(x) for x in case.arrays())
    if case.layout == "wire":
        # what MPI delivers: (seq, batch, heads + 2 kv_heads, head_dim)
        buffer = dpnp.ascontiguousarray(dpnp.concatenate([x.transpose(1, 0, 2, 3) for x in (q, k, v)], axis=2))
        edges = (0, HEADS, HEADS + case.kv_heads, HEADS + 2 * case.kv_heads)
        q, k, v = (buffer[:, :, a:b].transpose(1, 0, 2, 3) for a, b in pairwise(edges))
    if case.backward:
        settings = {"causal": case.causal, "attn_type": attn_type}
        out, lse = ulysses_dp.attention(q, k, v, return_lse=True, **settings)
        return partial(ulysses_dp.attention_backward, dpnp.ones_like(out), q, k, v, out, lse, **settings)
    options, _ = option_arguments(case)
    if "bias" in options:
        options["bias"] = dpnp.asarray(options["bias"])
    return partial(ulysses_dp.attention, q, k, v, causal=case.causal, attn_type=attn_type, **options)


def peak_call() -> Callable[[], Any]:
    """The sgemm that stands for the peak of the machine."""
    import dpnp

    from ulysses_dp._device.queue import default_queue

    a = dpnp.ones((PEAK_SIZE, PEAK_SIZE), dtype=np.float32, sycl_queue=default_queue())

    def multiply() -> None:
        dpnp.matmul(a, a).sycl_queue.wait()

    return multiply


def turn(call: Callable[[], Any]) -> float:
    """Median duration of the calls of one turn: at least one after the first, and about 30 ms of them."""
    durations: list[float] = []
    while len(durations) < 2 or sum(durations) < TURN:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[1:])


def measure(case: Case, peer: Connection, peak: Callable[[], Any], budget: float, backends: Iterable[str]) -> dict[str, Any]:
    """Time a case for about `budget` seconds, at least five pairs of turns."""
    ours = our_call(case)
    ours()
    others: dict[str, Callable[[], Any]] = {}
    for backend in backends:
        with contextlib.suppress(NotImplementedError):  # it does not have all cases
            call = our_call(case, backend)
            call()
            others[backend] = call
    peer.send(case)
    peer.recv()
    times: dict[str, list[float]] = {name: [] for name in others}
    pairs, peaks = [], []
    end = time.perf_counter() + budget
    while len(pairs) < 5 or time.perf_counter() < end:
        if len(pairs) % 4 == 0:
            peaks.append(turn(peak))
        mine = turn(ours)
        peer.send(None)
        pairs.append((mine, peer.recv()))
        for name, other in others.items():
            times[name].append(turn(other))
    mine, theirs = (statistics.median(x) for x in zip(*pairs, strict=True))
    sgemm = 2 * PEAK_SIZE**3 / statistics.median(peaks)
    return {
        **asdict(case),
        "pairs": len(pairs),
        "microseconds": mine * 1e6,
        "gflops": case.flops / mine / 1e9,
        "torch_gflops": case.flops / theirs / 1e9,
        "ratio": statistics.median(b / a for a, b in pairs),
        "of_sgemm": case.flops / mine / sgemm,
        "sgemm_gflops": sgemm / 1e9,
        "backends_gflops": {name: case.flops / statistics.median(turns) / 1e9 for name, turns in times.items()},
    }


def memory_process(connection: Connection, case: Case) -> None:
    """Answer with the bytes by which a call of this size raises the peak of resident memory; Linux only."""
    our_call(Case(case.head_dim, case.seq // 8, case.causal))()  # what does not depend on the size: the compiled kernels
    call = our_call(case)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident_peak()
    results = [call()]
    connection.send(resident_peak() - before)
    del results


def resident_peak() -> int:
    """The most bytes that this process has had in memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def print_memory(context: Any) -> None:
    """Print how the memory of a call grows with seq; the result and the head-major copies of k and v are 12 bytes."""
    print("head_dim    seq | bytes per element of q")
    for head_dim in (64, 128):
        for seq in (4096, 8192, 16384, 32768):
            answer, connection = context.Pipe()
            process = context.Process(target=memory_process, args=(connection, Case(head_dim, seq, causal=True)))
            process.start()
            print(f"{head_dim:8} {seq:6} | {answer.recv() / (HEADS * seq * head_dim):6.2f}", flush=True)
            process.join()


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Draw the ratio to PyTorch against seq, a line for each head_dim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, causal in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for head_dim in HEAD_DIMS:
            plain = Case(head_dim, 0, causal)
            keys = ("head_dim", "causal", "batch", "kv_heads", "layout")
            line = [row for row in rows if all(row[key] == getattr(plain, key) for key in keys)]
            axes.plot([row["seq"] for row in line], [row["ratio"] for row in line], "o-", label=f"head_dim {head_dim}")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="seq", title="causal" if causal else "no mask")
    figure.axes[0].set_ylabel("times as fast as PyTorch SDPA")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each row (1.5)")
    parser.add_argument("--full", action="store_true", help="every combination of sizes")
    parser.add_argument("--backward", action="store_true", help="the gradient instead of the forward pass")
    parser.add_argument("--options", action="store_true", help="windows, padding, ALiBi and bias instead")
    parser.add_argument("--backends", action="store_true", help="a column for each other backend that is installed")
    parser.add_argument("--head-dim", type=int, nargs="*", help="only these")
    parser.add_argument("--seq", type=int, nargs="*", help="only these")
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count(), help="of PyTorch (all cores)")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--plot", help="draw the ratios here")
    parser.add_argument("--memory", action="store_true", help="print memory instead of speed")
    arguments = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    if arguments.memory:
        print_memory(context)
        return
    peer, remote = context.Pipe()
    process = context.Process(target=torch_process, args=(remote, arguments.threads), daemon=True)
    process.start()
    peak = peak_call()
    rows = []
    backends = []
    if arguments.backends:
        from ulysses_dp.backends import usable

        backends = [x.value for x in usable() if x.value not in ("intel_sycl", "numpy")]
    print("head_dim   seq  mask   batch kv_heads layout |       µs  GFLOP/s  PyTorch | ratio  of sgemm", end="")
    print("".join(f" {x:>12}" for x in backends))
    rows_to_measure = cases(arguments.full)
    if arguments.options:
        rows_to_measure = option_cases()
    elif arguments.backward:
        rows_to_measure = backward_cases()
    for case in rows_to_measure:
        if arguments.head_dim and case.head_dim not in arguments.head_dim:
            continue
        if arguments.seq and case.seq not in arguments.seq:
            continue
        row = measure(case, peer, peak, arguments.seconds, backends)
        rows.append(row)
        print(
            f"{case.head_dim:8} {case.seq:5}  {'causal' if case.causal else '-':6} {case.batch:5} {case.kv_heads:8} "
            f"{case.option or case.layout:6} | {row['microseconds']:8.0f} {row['gflops']:8.1f} {row['torch_gflops']:8.1f} | "
            f"{row['ratio']:5.2f} {row['of_sgemm']:8.0%}",
            end="",
        )
        speeds = (row["backends_gflops"].get(x) for x in backends)
        print("".join(f" {'-':>12}" if speed is None else f" {speed:12.1f}" for speed in speeds), flush=True)
    peer.send("stop")
    process.join()
    print(f"sgemm {statistics.median(row['sgemm_gflops'] for row in rows):.0f} GFLOP/s, ", end="")
    print(f"geometric mean of the ratios {math.exp(statistics.fmean(math.log(row['ratio']) for row in rows)):.2f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
