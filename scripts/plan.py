"""What a call will cost on 1 to 16384 ranks: messages, bytes, memory, time; or how well that is predicted here.

    python scripts/plan.py --seq 1048576 --heads 32 --kv-heads 8 --head-dim 128 --machine aurora --plot plan.png
    python scripts/plan.py --seq 131072 --heads 32 --machine aurora --ranks 48 --meshes --causal --order zigzag
    mpiexec -n 2 python scripts/plan.py --measure here.json
    mpiexec -n 2 python scripts/plan.py --seq 4096 --heads 8 --machine here.json --check

--measure makes calls of two sizes and writes the description of this machine; it also prints it as Python source, as it stands
in ulysses_dp/machine.py. --check makes the calls of the plan and compares. Both take the fastest of a few calls, because what
else runs on the machine only adds, and of each stage the mean over the ranks, because these add up to the time of the call.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import ulysses_dp
from ulysses_dp.machine import MACHINES, Level, Machine, find

if TYPE_CHECKING:
    from collections.abc import Callable

    from ulysses_dp.plan import Plan

# in the order in which they come, and their titles in the table
STAGES = {"delta": "delta", "pack": "pack", "scatter": "scatter", "attention": "attention"}
STAGES |= {"attention backward": "backward", "shift": "shift", "gather": "gather", "unpack": "unpack"}
RANKS = [2**n for n in range(15)]
SMALL, LARGE = 32, 4096  # rows of the two sizes that --measure calls
HEADS, HEAD_DIM = 8, 64  # at least this many heads
DTYPES = ("float32", "float64", "float16", "bfloat16")
OUTSIDE = "outside"  # the time of a call in none of these stages
WAYS = ("ring", "order", "kv", "wire_dtype")  # what calls take as `plan` does


def problem(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `plan` that say what is computed."""
    names = ("seq", "heads", "kv_heads", "head_dim", "dtype", "batch", "causal", "backward", *WAYS)
    return {name: getattr(arguments, name) for name in names}


def stage_seconds(plan: Plan) -> dict[str, float]:
    """Seconds by stage, those of the same name forward and backward together."""
    seconds: dict[str, float] = {}
    for stage in (*plan.forward.stages, *plan.backward.stages):
        seconds[stage.name] = seconds.get(stage.name, 0.0) + stage.seconds
    return seconds


def short(seconds: float) -> str:
    """A duration in a few characters."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def meshes(call: dict[str, Any], ranks: list[int], machine: Machine) -> list[Plan]:
    """The plans of all meshes of these numbers of ranks."""
    sizes = [(n, ring) for n in ranks for ring in range(1, n + 1) if n % ring == 0]
    return [ulysses_dp.plan(**call | {"ring": ring}, ranks=n, machine=machine) for n, ring in sizes]


def mesh_of(plan: Plan) -> str:
    """Ranks of a group by groups."""
    return f"{plan.ranks // plan.ring}x{plan.ring}"


def print_table(plans: list[Plan]) -> None:
    """One line for each mesh; then what to know about them."""
    names = {name for plan in plans for name in stage_seconds(plan)}
    stages = [name for name in STAGES if name in names]
    titles = "".join(f"{STAGES[name]:>10}" for name in stages)
    about = " ranks     mesh     rows heads kv balance  messages   sent MB memory GB"
    print(f"{about} |{titles}     total  efficiency  largest seq")
    for plan in plans:
        seconds = stage_seconds(plan)
        cells = "".join(f"{short(seconds[name]) if name in seconds else '-':>10}" for name in stages)
        gigabytes = sum(plan.memory.values()) / 1e9
        print(
            f"{plan.ranks:6} {mesh_of(plan):>8} {plan.rows:8} {plan.heads:5} {plan.kv_heads:2} {plan.balance:7.3g} "
            f"{plan.messages:9} {plan.bytes_sent / 1e6:9.4g} {gigabytes:9.3g} |"
            f"{cells}{short(plan.seconds):>10} {plan.efficiency:11.1%} {plan.largest_seq:12}"
        )
    notes: dict[str, list[str]] = {}
    for plan in plans:
        for note in plan.notes:
            notes.setdefault(note, []).append(mesh_of(plan) if plan.ring > 1 else str(plan.ranks))
    for note, ranks in notes.items():
        print(f"{'all' if len(ranks) == len(plans) else ', '.join(ranks)}: {note}")


def as_row(plan: Plan) -> dict[str, Any]:
    """A plan as a row of the JSON file."""
    return asdict(plan) | {"messages": plan.messages, "bytes_sent": plan.bytes_sent}


def draw(plans: list[Plan], path: str) -> None:
    """Draw the time of the whole and of every stage against the number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ranks = [plan.ranks for plan in plans]
    axes.plot(ranks, [plan.seconds for plan in plans], "ko-", label="whole")
    for name in dict.fromkeys(name for plan in plans for name in stage_seconds(plan)):
        line = [(plan.ranks, seconds[name]) for plan in plans if name in (seconds := stage_seconds(plan))]
        axes.plot(*zip(*line, strict=True), ".-", label=name)
    axes.axvline(plans[0].useful_ranks, color="grey", linewidth=0.8, linestyle="--", label="as many ranks as heads")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="ranks", ylabel="seconds", title=f"{plans[0].seq} rows on {plans[0].machine}")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


# --- calls --------------------------------------------------------------------------------------------------------------------


def inputs(comm: Any, call: dict[str, Any]) -> list[Any]:
    """q, k, v and dout of this rank, on the device; on the host if that has no float16."""
    import dpnp

    from ulysses_dp._device.queue import default_queue

    rng = np.random.default_rng(comm.rank)
    heads, kv_heads = call["heads"], call["kv_heads"] or call["heads"]
    rows = len(ulysses_dp.row_positions(call["seq"], comm, order=call["order"], ring=call["ring"]))
    shapes = [(call["batch"], rows, n, call["head_dim"]) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    if call["dtype"] == "bfloat16":
        arrays = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in arrays]
    else:
        arrays = [x.astype(call["dtype"]) for x in arrays]
    queue = default_queue()
    if call["dtype"] == "float16" and not queue.sycl_device.has_aspect_fp16:
        return arrays
    return [dpnp.asarray(x, sycl_queue=queue) for x in arrays]


def run(comm: Any, call: dict[str, Any], repeats: int) -> list[tuple[dict[str, float], int]]:
    """Make the calls of a plan; forward and backward, the seconds of the stages of the fastest, and the bytes sent there."""
    q, k, v, dout = inputs(comm, call)
    options = {name: call[name] for name in ("causal", *WAYS)} | {"comm": comm}
    options["dtype"] = call["dtype"] if call["dtype"] == "bfloat16" else None
    results: tuple[Any, ...] = ()

    def forward() -> None:
        nonlocal results
        results = ulysses_dp.ulysses_attention(q, k, v, return_lse=True, **options)

    def forward_alone() -> None:
        ulysses_dp.ulysses_attention(q, k, v, **options)

    def backward() -> None:
        ulysses_dp.ulysses_attention_backward(dout, q, k, v, *results, **options)

    calls: list[Callable[[], None]] = [forward, backward] if call["backward"] else [forward_alone]
    seconds: list[list[dict[str, float]]] = [[] for _ in calls]
    sent = [0] * len(calls)
    for turn in range(repeats + 1):
        for number, function in enumerate(calls):
            comm.Barrier()
            start = time.perf_counter()
            with ulysses_dp.trace() as record:
                function()
            whole = time.perf_counter() - start
            # what is shifted runs beside the attention: the time for which it is waited is outside
            names = {stage.name for stage in record.stages} & STAGES.keys() - {"shift"}
            times = {name: record.seconds(name) for name in names}
            times[OUTSIDE] = whole - sum(times.values())
            times = {name: comm.allreduce(value) / comm.size for name, value in times.items()}
            if turn:  # the first one compiles the kernels and gets the memory
                seconds[number].append(times)
            sent[number] = next((stage.bytes_sent for stage in record.stages if stage.name == "scatter"), 0)
    return [(min(turns, key=lambda times: sum(times.values())), n) for turns, n in zip(seconds, sent, strict=True)]


def measure(comm: Any, repeats: int, name: str) -> Machine:
    """Describe this machine by calls of two sizes: the small one tells the constants, the large one the speeds."""
    from ulysses_dp._device.queue import default_queue

    device = default_queue().sycl_device
    shared, ranks = device.is_cpu, comm.size
    heads = -(-HEADS // ranks) * ranks  # everything divides
    call = {"heads": heads, "kv_heads": heads, "head_dim": HEAD_DIM, "batch": 1, "causal": False, "backward": True}
    call |= {"ring": 1, "order": "contiguous", "kv": "ring", "wire_dtype": None}
    (small, _), _ = run(comm, call | {"seq": SMALL * ranks, "dtype": "float32"}, 10 * repeats)
    constant = statistics.fmean((small["pack"], small["unpack"]))
    latency = max((small["scatter"] + small["gather"]) / 2 - constant, 1e-6) / (ranks - 1)
    seq, parts = LARGE // ranks * ranks, ranks if shared else 1
    flops, backward_flops, copies, links = {}, {}, [], []
    for dtype in DTYPES:
        (forward, sent), (backward, _) = run(comm, call | {"seq": seq, "dtype": dtype}, repeats)
        products = heads / ranks * HEAD_DIM * seq**2 * parts
        flops[dtype] = 4 * products / (forward["attention"] - constant)
        backward_flops[dtype] = 10 * products / (backward["attention backward"] - constant)
        copies.append(2 * sent * ranks / (ranks - 1) * parts / max(forward["pack"] - constant, 1e-9))
        links.append(sent * parts / max(forward["scatter"] - constant - latency * (ranks - 1), 1e-9))
    where = f"scripts/plan.py --measure, {ranks} ranks, {device.name.strip()}, {platform.processor() or platform.machine()}"
    return Machine(
        name=name,
        device="cpu" if device.is_cpu else "gpu",
        shared=shared,
        measured=True,
        memory=device.global_mem_size,
        flops={dtype: rounded(x) for dtype, x in flops.items()},
        backward_flops={dtype: rounded(x) for dtype, x in backward_flops.items()},
        copy_bandwidth=rounded(statistics.median(copies)),
        stage_seconds=rounded(constant),
        call_seconds=rounded(small[OUTSIDE]),
        levels=(Level(None if shared else ranks, rounded(latency), rounded(statistics.median(links))),),
        sources={"all": where},
    )


def rounded(x: float) -> float:
    """Three digits are more than a measurement has."""
    return float(f"{x:.3g}")


def check(comm: Any, arguments: argparse.Namespace) -> None:
    """Make the calls of the plan and print by how much it is wrong."""
    call, machine = problem(arguments), find(arguments.machine)
    plan = ulysses_dp.plan(**call, ranks=comm.size, machine=machine)
    call |= {"ring": plan.ring, "kv": plan.kv}
    measured = run(comm, call, arguments.repeats)
    if comm.rank:
        return
    print(f"{machine.name}, {comm.size} ranks: {call}")
    print(f"{'stage':20} {'predicted':>10} {'measured':>10}   error")
    totals = [0.0, 0.0]
    for planned, (times, _) in zip((plan.forward, plan.backward), measured, strict=False):
        predicted: dict[str, float] = {}
        for stage in planned.stages:
            predicted[stage.name] = predicted.get(stage.name, 0.0) + stage.seconds
        predicted[OUTSIDE] = machine.call_seconds + predicted.pop("shift", 0.0)
        for name, seconds in predicted.items():
            print_error(name, seconds, times.get(name, 0.0))
        totals = [totals[0] + sum(predicted.values()), totals[1] + sum(times.values())]
    print_error("whole", *totals)


def print_error(name: str, predicted: float, measured: float) -> None:
    """One line of --check."""
    print(f"{name:20} {short(predicted):>10} {short(measured):>10} {predicted / measured - 1:+7.0%}")


def ring_or_auto(text: str) -> int | str:
    """What --ring is."""
    return text if text == "auto" else int(text)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=131072, help="rows of the whole sequence (131072)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (32)")
    parser.add_argument("--kv-heads", type=int, help="heads of k and v (as many as query heads)")
    parser.add_argument("--head-dim", type=int, default=128, help="(128)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backward", action="store_true", help="with the gradient")
    parser.add_argument("--machine", default="cpu-2-cores", help=f"{', '.join(MACHINES)}, or a file of --measure")
    parser.add_argument("--ring", type=ring_or_auto, default=1, help="groups of ranks, or auto (1)")
    parser.add_argument("--order", default="contiguous", help="contiguous, zigzag, zigzag_ranks or striped")
    parser.add_argument("--kv", default="ring", help="ring, all_gather or auto")
    parser.add_argument("--wire-dtype", help="int8 or float8_e4m3: as what arrays travel (as they are)")
    parser.add_argument("--meshes", action="store_true", help="all meshes of these ranks: Ulysses degree x ring degree")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (powers of two up to 16384)")
    parser.add_argument("--json", type=Path, help="write the plans here")
    parser.add_argument("--plot", help="draw time against ranks here")
    parser.add_argument("--measure", type=Path, help="describe this machine in this file; under mpiexec")
    parser.add_argument("--check", action="store_true", help="compare with calls on these ranks; under mpiexec")
    parser.add_argument("--repeats", type=int, default=9, help="calls of --measure and --check that count (9)")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if arguments.meshes and arguments.plot:
        parser.error("--plot draws numbers of ranks, not --meshes")
    return arguments


def main() -> None:
    """Plan, or measure, or check."""
    arguments = parse_arguments()
    if arguments.measure or arguments.check:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    try:
        if arguments.measure:
            if comm.size == 1:
                raise ValueError("--measure needs at least two ranks: mpiexec -n 2")
            machine = measure(comm, arguments.repeats, arguments.measure.stem)
            if comm.rank == 0:
                arguments.measure.write_text(machine.to_json(), encoding="utf-8")
                print(machine)
            return
        if arguments.check:
            check(comm, arguments)
            return
        ranks = arguments.ranks or [n for n in RANKS if n <= (find(arguments.machine).ranks or n)]
        if arguments.meshes:
            plans = meshes(problem(arguments), ranks, find(arguments.machine))
        else:
            plans = [ulysses_dp.plan(**problem(arguments), ranks=n, machine=arguments.machine) for n in ranks]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"plan: {error}") from error
    print_table(plans)
    if arguments.json:
        arguments.json.write_text(json.dumps([as_row(plan) for plan in plans], indent=1), encoding="utf-8")
    if arguments.plot:
        draw(plans, arguments.plot)


if __name__ == "__main__":
    main()
