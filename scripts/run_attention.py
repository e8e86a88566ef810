"""Attention of arrays in files, the sequence split over the ranks: the main job.

    mpiexec -n 4 python scripts/run_attention.py --q q.npy --k k.npy --v v.npy --out out.npy --causal --check

The files hold whole arrays, (batch, seq, heads, head_dim), as .npy or .safetensors. Every rank reads only its own rows and
writes its own rows into the one output file, which gets its name when it is complete: a run that is refused or fails leaves an
earlier result as it was. A long run is done in steps, a group of heads at a time.
"""

from __future__ import annotations

import argparse
import math
import signal
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_files import FileArray, header, map_array, open_array
from files import Output, naming, on_all_ranks, refuse_clashes

import ulysses_dp
from ulysses_dp._device.queue import default_queue

if TYPE_CHECKING:
    from collections.abc import Iterator

STAGES = {"pack": "pack", "scatter": "all-to-all", "attention": "attention", "gather": "all-to-all back", "unpack": "unpack"}
LONG_RUN = 2e12  # floating-point operations from which a run is done in steps with a progress bar
WARM_UP = 1e10  # the most of them that the first call, which does not count, makes
# of --check, relative to the largest value of v or to 1; 16 bits hold the result to half of it
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class Step(NamedTuple):
    """What one call of attention works on."""

    batch: slice
    heads: slice
    kv_heads: slice


def read(arguments: argparse.Namespace) -> tuple[FileArray, FileArray, FileArray]:
    """The arrays, after what must hold before they can be cut into rows and steps; the library checks the rest."""
    refuse_clashes({f"--{name}": getattr(arguments, name) for name in "qkv"}, outputs(arguments))
    q, k, v = arrays = tuple(open_array(getattr(arguments, name), name, arguments.dtype) for name in "qkv")
    for name, x in zip("qkv", arrays, strict=True):
        if len(x.shape) != 4:
            raise ValueError(
                f"{getattr(arguments, name)}: {name} must have the axes (batch, seq, heads, head_dim), not {x.shape}"
            )
    shapes = q_shape, k_shape, v_shape = tuple(x.shape for x in arrays)
    if k_shape != v_shape or k_shape[2] == 0 or q_shape[2] % k_shape[2] or q_shape[::3] != k_shape[::3]:
        raise ValueError("the shapes do not fit each other: q {}, k {}, v {}".format(*shapes))
    if len({x.dtype for x in arrays}) > 1:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    return q, k, v


def outputs(arguments: argparse.Namespace) -> dict[str, str | None]:
    """The files to write, by their option."""
    return {"--out": arguments.out, "--trace": arguments.trace}


def create(arguments: argparse.Namespace, start: bytes, size: int, stack: ExitStack) -> list[Output | None]:
    """The files to write, with the space for the result reserved; what goes wrong with them goes wrong before the work."""
    created = [stack.enter_context(Output(path)) if path else None for path in outputs(arguments).values()]
    created[0].reserve(start, len(start) + size)
    return created


def rows_of(seq: int, comm: Any) -> slice:
    """The rows of this rank: an even split, where the first ranks may have one row more."""
    share, extra = divmod(seq, comm.size)
    first = comm.rank * share + min(comm.rank, extra)
    return slice(first, first + share + (comm.rank < extra))


def visible_pairs(seq_q: int, seq_k: int, causal: bool) -> int:
    """How many (query, key) pairs are computed in one head."""
    if not causal:
        return seq_q * seq_k
    seen = np.clip(np.arange(seq_q) + seq_k - seq_q + 1, 0, seq_k)
    return int(seen.sum())


def make_steps(batch: int, heads: int, kv_heads: int, ranks: int, flops: float) -> Iterator[Step]:
    """One step, or for a long run one per batch element and group of heads that still gives every rank a head."""
    if flops < LONG_RUN:
        yield Step(slice(0, batch), slice(0, heads), slice(0, kv_heads))
        return
    group = heads // kv_heads
    kv_count = math.ceil(ranks / group)
    for b in range(batch):
        for first in range(0, kv_heads, kv_count):
            last = min(first + kv_count, kv_heads)
            yield Step(slice(b, b + 1), slice(first * group, last * group), slice(first, last))


def progress(steps: list[Step], comm: Any) -> Any:
    """The steps, with a progress bar on rank 0 if there is more than one and tqdm is installed."""
    if len(steps) > 1 and comm.rank == 0:
        try:
            from tqdm import tqdm
        except ImportError:
            return steps
        return tqdm(steps, unit="step")
    return steps


def rows_with_nan(out: FileArray, rows: slice, most: int) -> set[int]:
    """The first rows of this rank with nan in the result, which is worth a look even in rows that are not compared."""
    found: set[int] = set()
    for first in range(rows.start, rows.stop, 1024):
        if len(found) < most:
            part = out.part_as_float64(slice(None), slice(first, min(first + 1024, rows.stop)))
            found.update(int(i) for i in first + np.flatnonzero(np.isnan(part).any(axis=(0, 2, 3))))
    return set(sorted(found)[:most])


def largest_difference(result: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference; infinite where one is nan or infinite and the other is not."""
    same = (result == expected) | (np.isnan(result) & np.isnan(expected))
    apart = np.where(same, 0.0, np.abs(result - expected))
    return float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))


@np.errstate(all="ignore")  # nan and infinity are compared like numbers
def largest_error(
    q: FileArray, k: FileArray, v: FileArray, out: FileArray, rows: list[int], scale: float, causal: bool
) -> float:
    """Largest difference between rows of the output and dense attention in float64, relative to max(1, |v|)."""
    (seq_q, heads), (seq_k, kv_heads) = q.shape[1:3], k.shape[1:3]
    group = heads // kv_heads
    error = 0.0
    for b, h in np.ndindex(k.shape[0], kv_heads if rows else 0):
        keys, values = (x.part_as_float64(slice(b, b + 1), slice(None), slice(h, h + 1))[0, :, 0] for x in (k, v))
        largest = np.abs(values).max(initial=1.0, where=np.isfinite(values))
        for i in rows:
            row = slice(b, b + 1), slice(i, i + 1), slice(h * group, (h + 1) * group)
            query, result = (x.part_as_float64(*row)[0, 0] for x in (q, out))
            expected = np.zeros_like(result)
            seen = i + seq_k - seq_q + 1 if causal else seq_k
            if seen > 0:
                score = scale * query @ keys[:seen].T
                weight = np.exp(score - score.max(axis=1, keepdims=True))
                expected = weight @ values[:seen] / weight.sum(axis=1, keepdims=True)
            error = max(error, largest_difference(result, expected) / largest)
    return error


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("q", "k", "v"):
        parser.add_argument(f"--{name}", required=True, help=f"file with {name}, .npy or .safetensors")
    parser.add_argument("--out", required=True, help="file to write, .npy or .safetensors")
    parser.add_argument("--dtype", choices=["bfloat16"], help="what uint16 in .npy files means; it is written so, too")
    parser.add_argument("--causal", action="store_true", help="query i sees the keys j <= i + seq_k - seq_q")
    parser.add_argument("--softmax-scale", type=float, help="factor of the dot products (1/sqrt(head_dim))")
    backends = [x.value for x in ulysses_dp.AttnType]
    parser.add_argument("--attn-type", choices=backends, default="intel_sycl", help="who computes on a rank (intel_sycl)")
    parser.add_argument("--exchange", choices=["auto", "device", "host", "shared"], default="auto", help="how ranks exchange")
    parser.add_argument("--trace", metavar="FILE", help="write what every rank did when, for ui.perfetto.dev")
    parser.add_argument(
        "--check",
        type=int,
        nargs="?",
        const=16,
        metavar="ROWS",
        help="compare rows (16), and those with nan, with dense attention in float64",
    )
    arguments = parser.parse_args()
    if Path(arguments.out).suffix not in (".npy", ".safetensors"):
        parser.error("--out must end in .npy or .safetensors")
    if arguments.check is not None and arguments.check < 1:
        parser.error("--check must be at least 1")
    return arguments


def run(arguments: argparse.Namespace, comm: Any, stack: ExitStack) -> None:
    """Read, compute, write, and tell how long it took."""
    from mpi4py import MPI

    arrays = on_all_ranks(comm, lambda: read(arguments))
    q, k = arrays[:2]
    batch, seq_q, heads, head_dim = shape = q.shape
    seq_k, kv_heads = k.shape[1:3]
    scale = 1 / math.sqrt(max(head_dim, 1)) if arguments.softmax_scale is None else arguments.softmax_scale

    start = header(Path(arguments.out).suffix, "out", q.dtype, shape)
    size = q.numbers.size * q.numbers.itemsize
    created = on_all_ranks(comm, lambda: create(arguments, start, size, stack) if comm.rank == 0 else None)
    result_file, trace_file = comm.bcast(created)
    mapped = on_all_ranks(comm, lambda: map_array(result_file.part, q.dtype, shape, len(start), "r+"))
    out = FileArray(mapped, q.dtype)

    rows, k_rows = rows_of(seq_q, comm), rows_of(seq_k, comm)
    flops = 4.0 * batch * heads * head_dim * visible_pairs(seq_q, seq_k, arguments.causal)
    options = {"causal": arguments.causal, "softmax_scale": scale, "attn_type": ulysses_dp.AttnType(arguments.attn_type)}
    options |= {"exchange": arguments.exchange, "dtype": q.dtype if q.dtype == "bfloat16" else None}

    def compute(step: Step, most: int = max(seq_q, seq_k)) -> np.ndarray:
        """One call of attention, of at most so many rows."""
        mine, keys = (slice(x.start, min(x.stop, x.start + most)) for x in (rows, k_rows))
        places = (mine, step.heads), (keys, step.kv_heads), (keys, step.kv_heads)
        parts = on_all_ranks(comm, lambda: [x.part(step.batch, *place) for x, place in zip(arrays, places, strict=True)])
        try:
            return ulysses_dp.ulysses_attention(*parts, comm=comm, **options)
        except MPI.Exception:
            raise
        except (TypeError, ValueError, ImportError, MemoryError, RuntimeError) as error:  # the same on all ranks
            raise SystemExit(f"run_attention: {error}" if comm.rank == 0 else 1) from error

    # the first call loads the kernels, and the driver compiles them
    steps = list(make_steps(batch, heads, kv_heads, comm.size, flops))
    began = time.perf_counter()
    compute(steps[0], warm_up_rows(steps[0], head_dim, comm))
    start_up = comm.allreduce(time.perf_counter() - began, MPI.MAX)

    comm.Barrier()
    began = time.perf_counter()
    with ulysses_dp.trace() as record:
        for step in progress(steps, comm):
            out.numbers[step.batch, rows, step.heads] = compute(step)
    on_all_ranks(comm, getattr(out.numbers, "flush", lambda: None))
    on_all_ranks(comm, result_file.complete if comm.rank == 0 else lambda: None)
    total = comm.allreduce(time.perf_counter() - began, MPI.MAX)

    def save_trace() -> None:
        with naming(arguments.trace):
            record.save(trace_file.part, comm)

    if trace_file is not None:
        on_all_ranks(comm, save_trace)
        on_all_ranks(comm, trace_file.complete if comm.rank == 0 else lambda: None)
    seconds = {name: comm.allreduce(record.seconds(name), MPI.MAX) for name in STAGES}
    sent = comm.allreduce(record.bytes_sent(), MPI.MAX)
    routes = comm.gather({stage.route for stage in record.stages} - {""})
    devices = comm.gather(default_queue().sycl_device.name.strip())
    error, chosen = 0.0, []
    if arguments.check is not None and seq_q:
        chosen = np.unique(np.linspace(0, seq_q - 1, arguments.check).astype(int))
        own = {int(i) for i in chosen if rows.start <= i < rows.stop}
        suspects = on_all_ranks(comm, lambda: rows_with_nan(out, rows, arguments.check))
        mine = on_all_ranks(comm, lambda: largest_error(*arrays, out, sorted(own | suspects), scale, arguments.causal))
        error = comm.allreduce(mine, MPI.MAX)

    passed = error <= TOLERANCE[q.dtype]
    if comm.rank == 0:
        route = ", ".join(sorted(set().union(*routes))) or "none (one rank)"
        wire = seconds["scatter"] + seconds["gather"]
        print(f"q {shape}  k, v {k.shape}  {q.dtype}{'  causal' if arguments.causal else ''}")
        print(f"ranks            {comm.size}")
        print(f"devices          {', '.join(f'{devices.count(name)} × {name}' for name in sorted(set(devices)))}")
        print(f"exchange         {route} memory" if comm.size > 1 else f"exchange         {route}")
        print(f"{'start-up':16} {start_up:9.4f} s   loading and compiling the kernels, and a first call that does not count")
        for name, title in STAGES.items():
            print(f"{title:16} {seconds[name]:9.4f} s")
        print(f"{'in all':16} {total:9.4f} s   with reading and writing the files")
        if seconds["attention"]:
            print(f"attention        {flops / seconds['attention'] / 1e9:9.1f} GFLOP/s on all ranks")
        if wire:
            print(f"all-to-alls      {sent / wire / 1e9:9.2f} GB/s sent by each rank")
        if len(chosen):
            verdict = "" if passed else f", above {TOLERANCE[q.dtype]:g}: FAILED"
            print(f"largest error    {error:9.1e} in {len(chosen)} rows{verdict}")
    if not passed:
        raise SystemExit(1)


def warm_up_rows(step: Step, head_dim: int, comm: Any) -> int:
    """The most rows of a rank of which the first call may be, which is a long one otherwise."""
    flops_of_a_pair = 4 * head_dim * (step.batch.stop - step.batch.start) * (step.heads.stop - step.heads.start)
    return math.ceil(math.sqrt(WARM_UP / max(flops_of_a_pair, 1)) / comm.size)


def main() -> None:
    """Run; what nobody expected ends all ranks, which would wait for this one."""
    arguments = parse_arguments()
    from mpi4py import MPI

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's, too, takes away what is not complete
    try:
        with ExitStack() as stack:
            run(arguments, MPI.COMM_WORLD, stack)
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    main()
