"""Local attention against PyTorch's scaled_dot_product_attention and against the peak of sgemm, in one interleaved run.

    pip install '.[peers]'
    python scripts/bench_attention.py --json bench.json --plot bench.png
    python scripts/bench_attention.py --backends
    python scripts/bench_attention.py --against bench.json
    python scripts/bench_attention.py --beside ../before/.venv/bin/python
    python scripts/bench_attention.py --memory

All sides take turns (see timing.py). Ours is the call that users make, `ulysses_dp.attention` on bshd dpnp arrays ("bshd"), or
on views of the buffer that the exchange receives ("wire"). PyTorch gets its preferred layout, contiguous (batch, heads, seq,
head_dim), in a process of its own. The peak is dpnp.matmul of 2048 x 2048 matrices. With --backends, the other local backends
that are installed take their turns in our process, through the same call. With --beside, another checkout takes its turns in a
process of its own Python: for a change that costs or gains a few percent, also on a machine that is not quiet.

With --memory: by how much the first call raises the peak memory of a process, in bytes per element of q. What grows with seq
squared would double from row to row.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import os
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from timing import Results, in_turns, machine_line, peer, remote, row, side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection

    from timing import Row, Side

HEADS = 8
HEAD_DIMS = (32, 64, 80, 128, 256)
WINDOW = 256  # keys to each side
PADDED = 0.25  # share of the keys that --options pads
SEQS = (128, 256, 512, 1000, 1024, 2048, 4095, 4096)
PEAK_SIZE = 2048


@dataclass(frozen=True)
class Case:
    """One problem."""

    head_dim: int
    seq: int
    causal: bool = False
    batch: int = 1
    heads: int = HEADS
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
                    yield Case(head_dim, seq, causal, batch, kv_heads=kv_heads)
    if not full:
        for causal in (False, True):
            for seq in (256, 1024):
                yield Case(64, seq, causal, batch=4)
                yield Case(64, seq, causal, kv_heads=2)
                yield Case(64, seq, causal, batch=4, kv_heads=2)
    for head_dim in (64, 128):
        for seq in (1024, 4096):
            yield Case(head_dim, seq, layout="wire")


def torch_turns(connection: Connection) -> None:
    """PyTorch's turns in a process of their own: receives its threads, then cases to prepare, and None for a turn."""
    import torch

    torch.set_num_threads(connection.recv())
    attention = torch.nn.functional.scaled_dot_product_attention
    turn: Side
    for message in iter(connection.recv, "stop"):
        if message is not None:
            case = Case(**message)
            inputs = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in case.arrays()]
            inputs = [x.requires_grad_(case.backward) for x in inputs]
            _, mask = option_arguments(case)
            call = partial(
                attention,
                *inputs,
                attn_mask=None if mask is None else torch.from_numpy(mask),
                is_causal=case.causal and mask is None,
                enable_gqa=case.kv_heads != HEADS,
            )
            if case.backward:
                out = call()
                call = partial(torch.autograd.grad, out, inputs, torch.ones_like(out), retain_graph=True)
            turn = side(call)
        connection.send(turn())


def our_turns(connection: Connection) -> None:
    """The turns of another checkout, in a process of its Python."""
    turn: Side
    for message in iter(connection.recv, "stop"):
        if message is not None:
            turn = side(our_call(Case(**message)))
        connection.send(turn())


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


def measure(case: Case, peers: dict[str, Connection], peak: Side, budget: float, backends: Iterable[str]) -> Row:
    """Time a case for about `budget` seconds, at least five turns of every side."""
    sides = {"ours": side(our_call(case))}
    for name, connection in peers.items():
        connection.send(asdict(case))
        connection.recv()
        sides[name] = remote(connection)
    for backend in backends:
        with contextlib.suppress(NotImplementedError):  # it does not have all cases
            sides[backend] = side(our_call(case, backend))
    times = in_turns(sides | {"sgemm": peak}, budget, rarely=("sgemm",))
    result = row(asdict(case), times)
    sgemm = 2 * PEAK_SIZE**3 / result["seconds"]["sgemm"]
    speeds = {name: case.flops / result["seconds"][name] for name in sides}
    return result | {
        "gflops": {name: speed / 1e9 for name, speed in speeds.items()},
        "of_sgemm": speeds["ours"] / sgemm,
        "sgemm_gflops": sgemm / 1e9,
    }


def memory_of_a_call(connection: Connection) -> None:
    """Answer with the bytes by which a call of this size raises the peak of resident memory; Linux only."""
    case = Case(**connection.recv())
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


def print_memory() -> None:
    """Print how the memory of a call grows with seq; the result and the head-major copies of k and v are 12 bytes."""
    print("head_dim    seq | bytes per element of q")
    for head_dim in (64, 128):
        for seq in (4096, 8192, 16384, 32768):
            with peer("bench_attention", "memory_of_a_call") as connection:
                connection.send(asdict(Case(head_dim, seq, causal=True)))
                print(f"{head_dim:8} {seq:6} | {connection.recv() / (HEADS * seq * head_dim):6.2f}", flush=True)


def line(case: Case, result: Row, others: Iterable[str]) -> str:
    """A row of the table."""
    speeds = result["gflops"]
    problem = f"{case.head_dim:8} {case.seq:5}  {'causal' if case.causal else '-':6} {case.batch:5} {case.kv_heads:8}"
    mine = f"{1e6 * result['seconds']['ours']:8.0f} {speeds['ours']:8.1f} {speeds['pytorch']:8.1f}"
    ratios = f"{result['times_as_fast_as']['pytorch']:5.2f} {result['of_sgemm']:8.0%}"
    cells = "".join(f" {speeds[name]:12.1f}" if name in speeds else f" {'-':>12}" for name in others)
    return f"{problem} {case.option or case.layout:6} | {mine} | {ratios}{cells}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each row (1.5)")
    parser.add_argument("--full", action="store_true", help="every combination of sizes")
    parser.add_argument("--backward", action="store_true", help="the gradient instead of the forward pass")
    parser.add_argument("--options", action="store_true", help="windows, padding, ALiBi and bias instead")
    parser.add_argument("--backends", action="store_true", help="a column for each other backend that is installed")
    parser.add_argument("--beside", metavar="PYTHON", help="a column for the checkout with this Python")
    parser.add_argument("--head-dim", type=int, nargs="*", help="only these")
    parser.add_argument("--seq", type=int, nargs="*", help="only these")
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count(), help="of PyTorch (all cores)")
    parser.add_argument("--memory", action="store_true", help="print memory instead of speed")
    Results.add_options(parser, "the ratios")
    arguments = parser.parse_args()
    if not arguments.memory and importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is missing: pip install '.[peers]'")
    if arguments.beside and not os.access(arguments.beside, os.X_OK):
        parser.error(f"--beside must name a Python, not {arguments.beside}")
    return arguments


def main() -> None:
    """Measure, print, save."""
    arguments = parse_arguments()
    if arguments.memory:
        print_memory()
        return
    wanted = cases(arguments.full)
    if arguments.options:
        wanted = option_cases()
    elif arguments.backward:
        wanted = backward_cases()
    backends = []
    if arguments.backends:
        from ulysses_dp.backends import usable

        backends = [x.value for x in usable() if x.value not in ("intel_sycl", "numpy")]
    with contextlib.ExitStack() as stack:
        results = stack.enter_context(Results("bench_attention", arguments))
        peers = {"pytorch": stack.enter_context(peer("bench_attention", "torch_turns"))}
        peers["pytorch"].send(arguments.threads)
        if arguments.beside:
            peers["before"] = stack.enter_context(peer("bench_attention", "our_turns", arguments.beside))
        others = [*backends, *(name for name in peers if name != "pytorch")]
        print(machine_line(results.machine))
        print("head_dim   seq  mask   batch kv_heads layout |       µs  GFLOP/s  PyTorch | ratio  of sgemm", end="")
        print("".join(f" {x:>12}" for x in others))
        peak = side(peak_call())
        for case in wanted:
            if case.head_dim in (arguments.head_dim or [case.head_dim]) and case.seq in (arguments.seq or [case.seq]):
                results.rows.append(measure(case, peers, peak, arguments.seconds, backends))
                print(line(case, results.rows[-1], others), flush=True)
        for connection in peers.values():
            connection.send("stop")
        if not results.rows:
            raise SystemExit("bench_attention: no row has this --head-dim and --seq")
        print(f"sgemm {statistics.median(x['sgemm_gflops'] for x in results.rows):.0f} GFLOP/s, ", end="")
        print(f"geometric mean of the ratios {geometric_mean(results.rows, 'pytorch'):.2f}", end="")
        print(f", to the other checkout {geometric_mean(results.rows, 'before'):.2f}" if arguments.beside else "")


def geometric_mean(rows: list[Row], other: str) -> float:
    """Of the ratios to one side."""
    return math.exp(statistics.fmean(math.log(x["times_as_fast_as"][other]) for x in rows))


if __name__ == "__main__":
    main()
