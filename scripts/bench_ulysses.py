"""Attention over ranks, end to end, against yunchang over gloo with PyTorch's local attention, in one interleaved run.

    pip install '.[mpi,peers]'
    mpiexec -n 2 python scripts/bench_ulysses.py --json ulysses.json --plot ulysses.png

    python scripts/bench_ulysses.py --scaling --json scaling.json --plot scaling.png
    mpiexec -n 4 python scripts/bench_ulysses.py --meshes --json meshes.json

Ours is what users call, on dpnp arrays: `ulysses_attention`, and for the gradient `ulysses_attention_backward` with the
context of the forward call. Theirs is `yunchang.UlyssesAttention`, and its gradient by autograd. It has no local attention for
CPUs: it gets PyTorch's `scaled_dot_product_attention`, and all the rest is yunchang's. Every rank runs both in one process, in
turns (see timing.py), with as many threads as its SYCL device has. Before that, the results of both are compared.

--meshes compares all meshes of these ranks, forward, with pure Ulysses, and if PyTorch and yunchang are installed with
`yunchang.LongContextAttention` of the same degrees, whose local attention is PyTorch's flash attention for CPUs. With a causal
mask the order is zigzag, for both, and ours is measured with contiguous rows, too. All of them take turns.

--scaling starts runs on 1, 2 and 4 ranks, in turns, and compares ours with itself: strong scaling has --seq rows in all, weak
scaling has them on every rank. Every rank computes on one core of its own as long as there are so many, and then several share
one. The efficiency is the speed of all ranks, in floating-point operations per second, by that of one rank and by the number of
cores; the median of the rounds, in each of which every number of ranks has one run. The stages are those of calls that are not
timed, the mean over the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from timing import Results, in_turns, machine_line, median_ratio, row, side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from timing import Row

HEADS = 8
HEAD_DIM = 64
SEQS = (2048, 4096, 8192)  # on all ranks together
PASSES = {False: "forward", True: "forward and backward"}
STAGES = ("agree", "pack", "scatter", "attention", "gather", "unpack", "confirm")
SCALING_SEQS = (1024, 4096)
MESH_SEQS = (4096, 8192)
MESH_PEERS = ("pure Ulysses", "contiguous", "yunchang")  # what a mesh is compared with
RANKS = (1, 2, 4)
TURN = {"seconds": 0.005, "most": 20}  # of one side
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
    import dpnp

    import ulysses_dp
    from ulysses_dp._device.queue import default_queue

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


def measure(case: Case, comm: Any, seconds: float) -> Row:
    """Check and time one case."""
    from bench_exchange import as_numpy, check

    calls = {"ours": our_call(case, comm), "yunchang": their_call(case, comm)}
    results = (map(as_numpy, call()) for call in calls.values())
    check(str(case), all(close(x, y) for x, y in zip(*results, strict=True)), comm)
    times = in_turns({name: side(call, comm, **TURN) for name, call in calls.items()}, seconds, comm, least=3)
    return row({"ranks": comm.size, **asdict(case)}, times)


def line(result: Row) -> str:
    """A row of the table."""
    case, seconds = result["case"], result["seconds"]
    problem = f"{case['seq']:6}  {'causal' if case['causal'] else '-':6}  {PASSES[case['backward']]:20}"
    ratio = result["times_as_fast_as"]["yunchang"]
    return f"{problem} | {seconds['ours']:8.4f} {seconds['yunchang']:11.4f} | {ratio:5.2f} {result['turns']:6}"


def compare_with_yunchang(arguments: argparse.Namespace) -> None:
    """The table of all cases, on the ranks that run this."""
    from bench_exchange import gloo, yunchang_missing
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    problem = yunchang_missing()
    if HEADS % comm.size or any(seq % comm.size or seq < comm.size for seq in arguments.seq):
        problem = f"yunchang needs {HEADS} heads and every --seq to be multiples of the number of ranks, {comm.size}"
    if problem:
        raise SystemExit(f"bench_ulysses: {problem}" if comm.rank == 0 else 1)
    say = print if comm.rank == 0 else lambda *_, **__: None
    with Results("bench_ulysses", arguments, comm) as results, gloo(comm):
        say(machine_line(results.machine))
        say("   seq  mask    pass                 |   ours s  yunchang s | ratio  turns")
        for seq in arguments.seq:
            for causal in (False, True):
                for backward in (False, True):
                    results.rows.append(measure(Case(seq, causal, backward), comm, arguments.seconds))
                    say(line(results.rows[-1]), flush=True)
        ratios = [x["times_as_fast_as"]["yunchang"] for x in results.rows]
        say(f"ratios {min(ratios):.2f} to {max(ratios):.2f}, geometric mean {statistics.geometric_mean(ratios):.2f}")


# --- meshes -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meshed:
    """A call on a mesh."""

    seq: int
    causal: bool
    ring: int
    order: str

    def arrays(self, comm: Any) -> list[np.ndarray]:
        """q, k and v of this rank."""
        import ulysses_dp

        rows = ulysses_dp.row_positions(self.seq, comm, order=self.order, ring=self.ring)
        rng = np.random.default_rng(0)
        return [rng.standard_normal((1, self.seq, HEADS, HEAD_DIM), dtype=np.float32)[:, rows] for _ in range(3)]

    def our_call(self, comm: Any) -> Callable[[], list[Any]]:
        """Ours, on dpnp arrays."""
        import dpnp

        import ulysses_dp
        from ulysses_dp._device.queue import default_queue

        q, k, v = (dpnp.asarray(x, sycl_queue=default_queue()) for x in self.arrays(comm))
        how = {"comm": comm, "causal": self.causal, "ring": self.ring, "order": self.order}
        return lambda: [ulysses_dp.ulysses_attention(q, k, v, **how)]

    def their_call(self, comm: Any) -> Callable[[], list[Any]]:
        """Yunchang's; `gloo` must be running, and their ring must have a local attention."""
        import torch
        from yunchang import LongContextAttention, set_seq_parallel_pg
        from yunchang.kernels import AttnType

        set_seq_parallel_pg(comm.size // self.ring, self.ring, comm.rank, comm.size)
        # their zigzag takes its rows to be two chunks, which those of one group are not
        implementation = "zigzag" if self.order == "zigzag" and self.ring > 1 else "basic"
        attention = LongContextAttention(ring_impl_type=implementation, attn_type=AttnType.TORCH_EFFICIENT)
        q, k, v = map(torch.from_numpy, self.arrays(comm))

        def call() -> list[Any]:
            with torch.no_grad():
                return [attention(q, k, v, causal=self.causal)]

        return call


@contextmanager
def local_attention_for_cpus() -> Iterator[None]:
    """Give the rings of yunchang PyTorch's flash attention for CPUs, with its lse: what they choose among is for GPUs."""
    import torch
    from yunchang.ring import ring_flash_attn, zigzag_ring_flash_attn

    def attend(q: Any, k: Any, v: Any, dropout_p: float, softmax_scale: float, *, causal: bool, **_: Any) -> tuple[Any, Any]:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(*heads_first, dropout_p, causal, scale=softmax_scale)
        return out.transpose(1, 2), lse

    modules = ring_flash_attn, zigzag_ring_flash_attn
    chosen = [module.select_flash_attn_impl for module in modules]
    for module in modules:
        module.select_flash_attn_impl = lambda *_, **__: attend
    try:
        yield
    finally:
        for module, choice in zip(modules, chosen, strict=True):
            module.select_flash_attn_impl = choice


def measure_meshes(seq: int, causal: bool, comm: Any, seconds: float, *, peer: bool) -> list[Row]:
    """Check and time all meshes, in turns; a row for each, with what it is compared with."""
    from bench_exchange import as_numpy, check

    rings = [ring for ring in range(1, comm.size + 1) if comm.size % ring == 0 and HEADS % (comm.size // ring) == 0]
    cases = [Meshed(seq, causal, ring, "zigzag" if causal else "contiguous") for ring in rings]
    cases += [Meshed(seq, causal, ring, "contiguous") for ring in rings[1:] if causal]
    calls = {(case, "ours"): case.our_call(comm) for case in cases}
    if peer:
        calls |= {(case, "yunchang"): case.their_call(comm) for case in cases if case.order == "zigzag" or not causal}
    for case, whose in calls:
        if whose == "yunchang":
            ours, theirs = (as_numpy(calls[case, name]()[0]) for name in ("ours", "yunchang"))
            check(str(case), close(ours, theirs), comm)
    times = in_turns({key: side(call, comm, **TURN) for key, call in calls.items()}, seconds, comm, least=3)
    rows = []
    for case in cases:
        of_case = {"ours": times[case, "ours"], "pure Ulysses": times[cases[0], "ours"]}
        contiguous = replace(case, order="contiguous")
        if contiguous in cases and contiguous != case:
            of_case["contiguous"] = times[contiguous, "ours"]
        if (case, "yunchang") in times:
            of_case["yunchang"] = times[case, "yunchang"]
        rows.append(row({"ranks": comm.size, **asdict(case)}, of_case))
    return rows


def mesh_line(result: Row) -> str:
    """A row of the table."""
    case, ratios = result["case"], result["times_as_fast_as"]
    mesh = f"{case['ranks'] // case['ring']}x{case['ring']}"
    problem = f"{case['seq']:6}  {'causal' if case['causal'] else '-':6}  {mesh:>5}  {case['order']:10}"
    cells = "".join(f"{ratios[name]:13.2f}" if name in ratios else f"{'':13}" for name in MESH_PEERS)
    return f"{problem} | {result['seconds']['ours']:8.4f} |{cells} {result['turns']:6}"


def compare_meshes(arguments: argparse.Namespace) -> None:
    """The table of all meshes of the ranks that run this."""
    from bench_exchange import gloo, yunchang_missing
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    problem = yunchang_missing()
    if any(seq % (2 * comm.size) for seq in arguments.seq):
        raise SystemExit(f"bench_ulysses: every --seq must be a multiple of {2 * comm.size}" if comm.rank == 0 else 1)
    say = print if comm.rank == 0 else lambda *_, **__: None
    with ExitStack() as stack:
        results = stack.enter_context(Results("bench_ulysses --meshes", arguments, comm))
        say(machine_line(results.machine))
        if problem:
            say(f"without a peer: {problem}")
        else:
            stack.enter_context(gloo(comm))
            stack.enter_context(local_attention_for_cpus())
        say("   seq  mask     UxR  order      |   ours s |" + "".join(f"{name:>13}" for name in MESH_PEERS) + "  turns")
        for seq in arguments.seq:
            for causal in (False, True):
                rows = measure_meshes(seq, causal, comm, arguments.seconds, peer=not problem)
                results.rows.extend(rows)
                for result in rows:
                    say(mesh_line(result), flush=True)
        say("the columns to the right: how many times as fast ours is as these")


# --- scaling ------------------------------------------------------------------------------------------------------------------


def scaling_cases(seqs: list[int], ranks: int) -> list[tuple[str, int, Case]]:
    """Kind of scaling, rows by which it is named, and what so many ranks compute."""
    cases = []
    for seq in seqs:
        cases.append(("strong", seq, Case(seq, causal=False, backward=False)))
        cases.append(("weak", seq, Case(seq * ranks, causal=False, backward=False)))
    return cases


def stage_seconds(call: Callable[[], Any], comm: Any, count: int = 5) -> dict[str, float]:
    """Medians of some calls, of the mean over the ranks; "other" is the Python around the stages."""
    import ulysses_dp

    turns = []
    for _ in range(count):
        comm.Barrier()
        with ulysses_dp.trace() as record:
            call()
        seconds = {name: record.seconds(name) for name in STAGES}
        seconds["other"] = record.calls[0].seconds - sum(seconds.values())
        turns.append({name: comm.allreduce(x) / comm.size for name, x in seconds.items()})
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


def one_run(arguments: argparse.Namespace) -> None:
    """One of the runs of `scaling`, on the ranks that run this: the cases, timed, and the seconds of their stages."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    cores = arguments.cores
    os.sched_setaffinity(0, {cores[comm.rank % len(cores)]})  # before there is a device
    rows = []
    for kind, seq, case in scaling_cases(arguments.seq, comm.size):
        call = our_call(case, comm)
        (durations,) = in_turns({"ours": side(call, comm, **TURN)}, arguments.seconds, comm, least=3).values()
        medians = stage_seconds(call, comm)
        rows.append({"scaling": kind, "seq": seq, "seconds": statistics.median(durations), "stages": medians})
    if comm.rank == 0:
        Path(arguments.one_run).write_text(json.dumps(rows))


def scaling(arguments: argparse.Namespace) -> None:
    """Start a run on every number of ranks, in turns, and compare them."""
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if mpiexec is None:
        raise SystemExit("bench_ulysses: --scaling needs mpiexec")
    cores = sorted(os.sched_getaffinity(0))
    times: dict[tuple[str, int, int], list[float]] = defaultdict(list)  # by kind, rows and ranks: of every round
    stages: dict[tuple[str, int, int], list[dict[str, float]]] = defaultdict(list)
    with Results("bench_ulysses --scaling", arguments) as results:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(arguments.rounds):
                for ranks in sorted({1, *arguments.ranks}):
                    for x in run_on(mpiexec, ranks, cores, Path(folder) / "rows.json", arguments):
                        times[x["scaling"], x["seq"], ranks].append(x["seconds"])
                        stages[x["scaling"], x["seq"], ranks].append(x["stages"])
        print(machine_line(results.machine))
        print("scaling    seq  ranks |  seconds efficiency | share of " + " ".join(f"{x:>9}" for x in (*STAGES, "other")))
        for kind, seq, ranks in sorted(times):
            own, one = times[kind, seq, ranks], times[kind, seq, 1]
            work = ranks**2 if kind == "weak" else 1  # times that of one rank
            efficiency = work * median_ratio(one, own) / min(ranks, len(cores))
            parts = {name: statistics.median(x[name] for x in stages[kind, seq, ranks]) for name in (*STAGES, "other")}
            shares = {name: x / sum(parts.values()) for name, x in parts.items()}
            case = {"scaling": kind, "seq": seq, "ranks": ranks}
            results.rows.append(row(case, {"ours": own}, efficiency=efficiency, shares=shares))
            cells = " ".join(f"{share:9.0%}" for share in shares.values())
            note = f"   {ranks} ranks on {len(cores)} cores" if ranks > len(cores) else ""
            print(f"{kind:7} {seq:6} {ranks:6} | {statistics.median(own):8.4f} {efficiency:10.2f} |          {cells}{note}")


def run_on(mpiexec: str, ranks: int, cores: list[int], path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one run."""
    options = ["--seq", *arguments.seq, "--seconds", arguments.seconds, "--cores", *cores, "--one-run", path]
    command = [mpiexec, "-n", ranks, sys.executable, "-m", "mpi4py", __file__, *options]  # an error of one rank ends all
    environment = {**os.environ, "I_MPI_PIN": "0"}  # every rank chooses its core itself
    done = subprocess.run(list(map(str, command)), env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"bench_ulysses: the run on {ranks} ranks ended with {done.returncode}")
    return json.loads(path.read_text())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seq",
        type=int,
        nargs="+",
        help="rows of all ranks together (2048 4096 8192; --scaling 1024 4096; --meshes 4096 8192)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="time for each row, of --meshes for all meshes; at least three turns (4; --scaling 1 in every run; --meshes 20)",
    )
    parser.add_argument("--scaling", action="store_true", help="ours on several numbers of ranks; not under mpiexec")
    parser.add_argument("--meshes", action="store_true", help="all meshes of the ranks, beside yunchang's")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of --scaling (1 2 4)")
    parser.add_argument("--rounds", type=int, default=3, help="of --scaling (3)")
    parser.add_argument("--cores", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--one-run", help=argparse.SUPPRESS)
    Results.add_options(parser, "the ratios, or the efficiency and the stages,")
    arguments = parser.parse_args()
    scales = arguments.scaling or arguments.one_run
    arguments.seq = arguments.seq or list(SCALING_SEQS if scales else MESH_SEQS if arguments.meshes else SEQS)
    arguments.seconds = arguments.seconds or (1 if scales else 20 if arguments.meshes else 4)
    if min(arguments.ranks) < 1 or min(arguments.seq) < 1 or arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error("--seq, --seconds, --ranks and --rounds must be positive")
    return arguments


def main() -> None:
    """Measure, print, save."""
    arguments = parse_arguments()
    if arguments.one_run:
        one_run(arguments)
    elif arguments.scaling:
        scaling(arguments)
    elif arguments.meshes:
        compare_meshes(arguments)
    else:
        compare_with_yunchang(arguments)


if __name__ == "__main__":
    main()
