"""Attention over ranks, end to end, against yunchang over gloo with PyTorch's local attention, in one interleaved run.

    pip install '.[mpi,peers]'
    mpiexec -n 2 python scripts/bench_ulysses.py --json ulysses.json --plot ulysses.png

Ours is what users call, on dpnp arrays: `ulysses_attention`, and for the gradient `ulysses_attention_backward` with the
context of the forward call. Theirs is `yunchang.UlyssesAttention`, and its gradient by autograd. It has no local attention for
CPUs: it gets PyTorch's `scaled_dot_product_attention`, and all the rest is yunchang's. Every rank runs both in one process, in
turns, with as many threads as its SYCL device has. Before every call there is a barrier, the slowest rank counts, and the
ratio is the median over the turns (see bench_exchange.py). Before that, the results of both are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dpnp
import numpy as np
from bench_exchange import as_numpy, check, gloo, interleave, machine, median_ratio, yunchang_missing
from mpi4py import MPI

import ulysses_dp
from ulysses_dp._device.queue import default_queue

if TYPE_CHECKING:
    from collections.abc import Callable

HEADS = 8
HEAD_DIM = 64
SEQS = (2048, 4096, 8192)  # on all ranks together
PASSES = {False: "forward", True: "forward and backward"}
TOLERANCE = 1e-4  # of the largest number: two float32 results, of which neither is exact


@dataclass(frozen=True)
class Case:
    """One problem."""

    seq: int
    causal: bool
    backward: bool  # forward and backward, or forward alone

    def arrays(self, comm: Any) -> list[np.ndarray]:
        """q, k, v and dout of this rank."""
        rng = np.random.default_rng(comm.rank)
        shape = (1, self.seq // comm.size, HEADS, HEAD_DIM)
        return [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]


def our_call(case: Case, comm: Any) -> Callable[[], list[Any]]:
    """Our side of a case: out, or dq, dk and dv."""
    q, k, v, dout = (dpnp.asarray(x, sycl_queue=default_queue()) for x in case.arrays(comm))

    def forward() -> list[Any]:
        return [ulysses_dp.ulysses_attention(q, k, v, comm=comm, causal=case.causal)]

    def both() -> list[Any]:
        out, lse, ctx = ulysses_dp.ulysses_attention(q, k, v, comm=comm, causal=case.causal, return_lse=True, return_ctx=True)
        return ulysses_dp.ulysses_attention_backward(dout, q, k, v, out, lse, comm=comm, causal=case.causal, ctx=ctx)

    return both if case.backward else forward


def their_call(case: Case, comm: Any) -> Callable[[], list[Any]]:
    """The side of yunchang; `gloo` must be running."""
    import torch
    from yunchang import UlyssesAttention
    from yunchang.kernels import AttnType

    def local_attention(q: Any, k: Any, v: Any, *, causal: bool, softmax_scale: float, **_: Any) -> Any:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(*heads_first, is_causal=causal, scale=softmax_scale).transpose(1, 2)

    # any type of PyTorch's can be constructed; its function would pass k and v around all ranks once more
    attention = UlyssesAttention(attn_type=AttnType.TORCH_EFFICIENT)
    attention.attn_fn = local_attention
    *qkv, dout = (torch.from_numpy(x) for x in case.arrays(comm))

    def forward() -> list[Any]:
        with torch.no_grad():
            return [attention(*qkv, causal=case.causal)]

    def both() -> list[Any]:
        inputs = [x.detach().requires_grad_() for x in qkv]
        return torch.autograd.grad(attention(*inputs, causal=case.causal), inputs, dout)

    return both if case.backward else forward


def close(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two float32 results are the same up to rounding."""
    return bool(abs(x - y).max() <= TOLERANCE * abs(y).max())


def measure(case: Case, comm: Any, seconds: float) -> dict[str, Any]:
    """Check and time one case."""
    calls = {"ours": our_call(case, comm), "yunchang": their_call(case, comm)}
    results = (map(as_numpy, call()) for call in calls.values())
    check(str(case), all(close(x, y) for x, y in zip(*results, strict=True)), comm)
    times = interleave(calls, comm, seconds)
    return {
        "ranks": comm.size,
        **asdict(case),
        "turns": len(times["ours"]),
        "seconds": {name: statistics.median(x) for name, x in times.items()},
        "least_seconds": {name: min(x) for name, x in times.items()},
        "ratio": median_ratio(times["yunchang"], times["ours"]),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    problem = f"{row['seq']:6}  {'causal' if row['causal'] else '-':6}  {PASSES[row['backward']]:20}"
    seconds = row["seconds"]
    return f"{problem} | {seconds['ours']:8.4f} {seconds['yunchang']:11.4f} | {row['ratio']:5.2f} {row['turns']:6}"


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Draw the ratio to yunchang against seq."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for causal in (False, True):
        for backward in (False, True):
            line = [row for row in rows if row["causal"] == causal and row["backward"] == backward]
            label = PASSES[backward] + (", causal" if causal else "")
            axes.plot([row["seq"] for row in line], [row["ratio"] for row in line], "o-", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="seq", xticks=sorted({row["seq"] for row in rows}), ylim=(0, None))
    axes.set_ylabel("times as fast as yunchang with PyTorch SDPA")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Check, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, nargs="+", default=SEQS, help="rows of all ranks together (2048 4096 8192)")
    parser.add_argument("--seconds", type=float, default=4, help="time for each row; at least three turns (4)")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--plot", help="draw the ratios here")
    arguments = parser.parse_args()

    comm = MPI.COMM_WORLD
    problem = yunchang_missing()
    if HEADS % comm.size or any(seq % comm.size or seq < comm.size for seq in arguments.seq):
        problem = f"yunchang needs {HEADS} heads and every --seq to be multiples of the number of ranks, {comm.size}"
    if problem:
        raise SystemExit(f"bench_ulysses: {problem}" if comm.rank == 0 else 1)
    say = print if comm.rank == 0 else lambda *_, **__: None
    say(machine(comm))
    say("   seq  mask    pass                 |   ours s  yunchang s | ratio  turns")
    rows = []
    with gloo(comm):
        for seq in arguments.seq:
            for causal in (False, True):
                for backward in (False, True):
                    row = measure(Case(seq, causal, backward), comm, arguments.seconds)
                    rows.append(row)
                    say(line(row), flush=True)
    ratios = [row["ratio"] for row in rows]
    say(
        f"ratios {min(ratios):.2f} to {max(ratios):.2f}, geometric mean {math.exp(statistics.fmean(map(math.log, ratios))):.2f}"
    )
    if comm.rank == 0 and arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    if comm.rank == 0 and arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
