"""Attention of arrays in files, the sequence split over the ranks: the main job.

    mpiexec -n 4 python scripts/run_attention.py --q q.npy --k k.npy --v v.npy --out out.npy --causal --check

The files hold whole arrays, (batch, seq, heads, head_dim), as .npy or .safetensors. Every rank reads only its own rows and
writes its own rows into the one output file. A long run is done in steps, a group of heads at a time.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import ulysses_dp
from ulysses_dp._device.queue import default_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAGES = {"pack": "pack", "scatter": "all-to-all", "attention": "attention", "gather": "all-to-all back", "unpack": "unpack"}
LONG_RUN = 2e12  # floating-point operations from which a run is done in steps with a progress bar
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # of --check, relative to the largest value of v or to 1


class Step(NamedTuple):
    """What one call of attention works on."""

    batch: slice
    heads: slice
    kv_heads: slice


def open_array(path: str, name: str) -> Any:
    """The array in a file, of which slices are read on demand: a memory map, or the like for .safetensors.

    A .safetensors file holds either one array or several, of which `name` is taken.
    """
    if Path(path).suffix == ".npy":
        return np.load(path, mmap_mode="r")
    if Path(path).suffix == ".safetensors":
        return SafeTensor(path, name)
    raise ValueError(f"{path}: the file name must end in .npy or .safetensors")


class SafeTensor:
    """One array of a .safetensors file, sliced on demand."""

    def __init__(self, path: str, name: str) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ValueError(f"{path}: reading it needs the package safetensors (pip install safetensors)") from error
        self._file = safe_open(path, framework="numpy")
        names = list(self._file.keys())
        if name not in names and len(names) != 1:
            raise ValueError(f"{path}: holds {', '.join(names)}, but no array named {name}")
        self._array = self._file.get_slice(name if name in names else names[0])
        self.shape = tuple(self._array.get_shape())
        self.dtype = self[tuple(slice(0, 0) for _ in self.shape)].dtype
        self.ndim = len(self.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._array[index]


def on_all_ranks(comm: Any, action: Callable[[], Any]) -> Any:
    """Do something that can fail on one rank alone, such as reading a file; its error ends all ranks."""
    result, problem = None, None
    try:
        result = action()
    except (OSError, ValueError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    problems = comm.allgather(problem)
    for rank, text in enumerate(problems):
        if text is not None:
            raise SystemExit(f"run_attention: rank {rank}: {text}" if comm.rank == 0 else 1)
    return result


def check_shapes(q: Any, k: Any, v: Any) -> None:
    """What must hold before the arrays can be cut into rows and steps; the library checks the rest."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have the 4 axes (batch, seq, heads, head_dim), not shape {tuple(x.shape)}")
    if k.shape != v.shape or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"the shapes do not fit each other: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")


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


def largest_error(q: Any, k: Any, v: Any, out: Any, rows: list[int], scale: float, causal: bool) -> float:
    """Largest difference between rows of the output and dense attention in float64, relative to max(1, |v|)."""
    group = q.shape[2] // k.shape[2]
    error = 0.0
    for b, h in np.ndindex(k.shape[0], k.shape[2]):
        keys, values = (x[b : b + 1, :, h : h + 1, :][0, :, 0].astype(np.float64) for x in (k, v))
        heads = slice(h * group, (h + 1) * group)
        for i in rows:
            seen = i + k.shape[1] - q.shape[1] + 1 if causal else k.shape[1]
            query, result = (x[b : b + 1, i : i + 1, heads, :][0, 0].astype(np.float64) for x in (q, out))
            expected = np.zeros_like(result)
            if seen > 0:
                score = scale * query @ keys[:seen].T
                weight = np.exp(score - score.max(axis=1, keepdims=True))
                expected = weight @ values[:seen] / weight.sum(axis=1, keepdims=True)
            error = max(error, np.abs(result - expected).max() / max(1.0, np.abs(values).max()))
    return error


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("q", "k", "v"):
        parser.add_argument(f"--{name}", required=True, help=f"file with {name}, .npy or .safetensors")
    parser.add_argument("--out", required=True, help="file to write, .npy")
    parser.add_argument("--causal", action="store_true", help="query i sees the keys j <= i + seq_k - seq_q")
    parser.add_argument("--softmax-scale", type=float, help="factor of the dot products (1/sqrt(head_dim))")
    backends = [x.value for x in ulysses_dp.AttnType]
    parser.add_argument("--attn-type", choices=backends, default="intel_sycl", help="who computes on a rank (intel_sycl)")
    parser.add_argument("--exchange", choices=["auto", "device", "host"], default="auto", help="how MPI reaches device memory")
    parser.add_argument("--trace", metavar="FILE", help="write what every rank did when, for ui.perfetto.dev")
    parser.add_argument(
        "--check", type=int, nargs="?", const=16, metavar="ROWS", help="compare rows (16) with dense attention in float64"
    )
    arguments = parser.parse_args()
    if Path(arguments.out).suffix != ".npy":
        parser.error("--out must end in .npy")
    if arguments.check is not None and arguments.check < 1:
        parser.error("--check must be at least 1")
    return arguments


def main() -> None:
    """Read, compute, write, and tell how long it took."""
    arguments = parse_arguments()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD

    def read() -> tuple[Any, Any, Any]:
        arrays = tuple(open_array(getattr(arguments, name), name) for name in ("q", "k", "v"))
        check_shapes(*arrays)
        return arrays

    q, k, v = on_all_ranks(comm, read)
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1:3]
    scale = 1 / math.sqrt(max(head_dim, 1)) if arguments.softmax_scale is None else arguments.softmax_scale

    def create() -> None:
        if comm.rank == 0:
            np.lib.format.open_memmap(arguments.out, mode="w+", dtype=q.dtype, shape=q.shape)

    on_all_ranks(comm, create)
    out = on_all_ranks(comm, lambda: np.lib.format.open_memmap(arguments.out, mode="r+"))

    rows, k_rows = rows_of(seq_q, comm), rows_of(seq_k, comm)
    flops = 4.0 * batch * heads * head_dim * visible_pairs(seq_q, seq_k, arguments.causal)
    options = {"causal": arguments.causal, "softmax_scale": scale, "attn_type": ulysses_dp.AttnType(arguments.attn_type)}

    def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        try:
            return ulysses_dp.ulysses_attention(query, key, value, comm=comm, exchange=arguments.exchange, **options)
        except (TypeError, ValueError, NotImplementedError, ImportError) as error:  # the same on all ranks
            raise SystemExit(f"run_attention: {error}" if comm.rank == 0 else 1) from error

    def compute(step: Step) -> None:
        mine = np.ascontiguousarray(q[step.batch, rows, step.heads, :])
        keys, values = (np.ascontiguousarray(x[step.batch, k_rows, step.kv_heads, :]) for x in (k, v))
        out[step.batch, rows, step.heads, :] = attend(mine, keys, values)

    # the first call loads the kernels, and the driver compiles them: one row does
    start = time.perf_counter()
    attend(*(np.zeros((1, 1, *x.shape[2:]), dtype=x.dtype) for x in (q, k, v)))
    start_up = comm.allreduce(time.perf_counter() - start, MPI.MAX)

    steps = list(make_steps(batch, heads, kv_heads, comm.size, flops))
    comm.Barrier()
    start = time.perf_counter()
    with ulysses_dp.trace() as record:
        for step in progress(steps, comm):
            compute(step)
    out.flush()
    comm.Barrier()
    total = comm.allreduce(time.perf_counter() - start, MPI.MAX)

    if arguments.trace:
        record.save(arguments.trace, comm)
    seconds = {name: comm.allreduce(record.seconds(name), MPI.MAX) for name in STAGES}
    sent = comm.allreduce(record.bytes_sent(), MPI.MAX)
    routes = comm.gather({stage.route for stage in record.stages} - {""})
    devices = comm.gather(default_queue().sycl_device.name.strip())
    error = None
    if arguments.check is not None and out.size and seq_k:
        chosen = np.unique(np.linspace(0, seq_q - 1, arguments.check).astype(int))
        own = [int(i) for i in chosen if rows.start <= i < rows.stop]
        error = comm.allreduce(largest_error(q, k, v, out, own, scale, arguments.causal), MPI.MAX)

    passed = error is None or error <= TOLERANCE[str(q.dtype)]
    if comm.rank == 0:
        route = ", ".join(sorted(set().union(*routes))) or "none (one rank)"
        wire = seconds["scatter"] + seconds["gather"]
        print(f"q {q.shape}  k, v {k.shape}  {q.dtype}{'  causal' if arguments.causal else ''}")
        print(f"ranks            {comm.size}")
        print(f"devices          {', '.join(f'{devices.count(name)} × {name}' for name in sorted(set(devices)))}")
        print(f"exchange         {route} memory" if comm.size > 1 else f"exchange         {route}")
        print(f"{'start-up':16} {start_up:9.4f} s   loading and compiling the kernels")
        for name, title in STAGES.items():
            print(f"{title:16} {seconds[name]:9.4f} s")
        print(f"{'in all':16} {total:9.4f} s   with reading and writing the files")
        if seconds["attention"]:
            print(f"attention        {flops / seconds['attention'] / 1e9:9.1f} GFLOP/s on all ranks")
        if wire:
            print(f"all-to-alls      {sent / wire / 1e9:9.2f} GB/s sent by each rank")
        if error is not None:
            verdict = "" if passed else f", above {TOLERANCE[str(q.dtype)]:g}: FAILED"
            print(f"largest error    {error:9.1e} in {len(chosen)} rows{verdict}")
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
