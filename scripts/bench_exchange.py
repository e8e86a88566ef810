"""The exchanges of ulysses_dp against a plain Alltoall, a memcpy and what others have, in one interleaved run.

    pip install '.[mpi,peers]'
    mpiexec -n 2 python scripts/bench_exchange.py --json exchange.json --plot exchange.png

A size is what every rank has of the arrays, before the exchange and after. The jobs:

- "scatter_heads", "gather_heads": the public functions on one dpnp array, with their checks and agreements;
- "scatter q|k|v", "gather q|k|v": the exchanges inside `ulysses_attention` and its backward pass, three arrays in one message:
  pack and all-to-all there, all-to-all and unpack back.

Every job is timed next to

- Alltoall: MPI's own, of as many bytes in the same kind of USM memory, without any relayout;
- memcpy: the C library's, of as many bytes in host memory, on all ranks at once;
- NumPy: reshape, transpose, Alltoall, transpose, reshape; one after the other for q, k and v;
- yunchang: its `SeqAllToAll4D` over gloo, which its attention calls for q, k and v one after the other.

All take turns (see timing.py). Before that, every result is compared with the numbers that belong there.

Buffers are written before they are used: memory that never was is one page of zeros, which is fast to read. They stay in the
cache if they fit. With --cold, every call takes the next of several sets of them, together twice as large as the last-level
cache, but no more than 256 sets, so that small sizes are less cold; ours keeps its communication buffers, as it always does.

The stages come from `ulysses_dp.trace`, in calls that are not timed. A stage ends when this rank is done with it: the
all-to-all includes waiting for other ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import tempfile
from contextlib import contextmanager, nullcontext
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dpnp
import numpy as np
from mpi4py import MPI
from timing import Results, clock, in_turns, machine_line, row, side

import ulysses_dp
from ulysses_dp._device import trace
from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue
from ulysses_dp._ranks import mpi
from ulysses_dp._ranks.partition import Item, blocks_of, split
from ulysses_dp._ranks.redistribution import Redistribution, windows_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from timing import Row

    Call = Callable[[], list[Any]]

WIDTH = 64  # of a head
QKV = (8, 4, 4)  # heads of q, k and v
ALL_HEADS = sum(QKV)
PRIME = 8388593  # float32 holds all integers below exactly
SIZES = tuple(2**power for power in range(10, 29, 2))
MOST_COPIES = 256
TURN = {"seconds": 0.005, "most": 20}  # of one side
STAGES = {"pack": ("pack",), "wire": ("scatter", "gather"), "unpack": ("unpack",), "agree": ("agree", "prepare", "confirm")}
CONTENDERS = ("ours", "alltoall", "memcpy", "numpy", "yunchang")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
HEADER = (
    "                       |         ours      |           of which, share          |           GB/s of others"
    "            |     ours, times as fast as      µs\n"
    "   size  job           |       µs     GB/s |   pack   wire unpack  agree  other | Alltoall   memcpy    NumPy yunchang "
    "| Alltoall    NumPy yunchang    above Alltoall"
)
ROOM = 14  # times the size: the most memory that a rank needs


class Job(NamedTuple):
    """What is exchanged, and in which direction."""

    name: str
    heads: tuple[int, ...]  # of every array
    scatter: bool


JOBS = (
    Job("scatter_heads", (ALL_HEADS,), True),
    Job("gather_heads", (ALL_HEADS,), False),
    Job("scatter q|k|v", QKV, True),
    Job("gather q|k|v", QKV, False),
)


def shape_of(size: int) -> tuple[int, int]:
    """Rows of a rank and width of a head for about so many bytes of float32."""
    width = min(WIDTH, size // (4 * ALL_HEADS))
    return size // (4 * ALL_HEADS * width), width


def numbers(rows: range, heads: range, width: int) -> np.ndarray:
    """What belongs to these rows and heads of all, (1, rows, heads, width): as good as different everywhere."""
    row = np.arange(rows.start, rows.stop, dtype=np.int32)[:, None]
    column = np.arange(heads.start * width, heads.stop * width, dtype=np.int32)
    return ((row * (ALL_HEADS * width) + column) % PRIME).astype(np.float32).reshape(1, len(rows), len(heads), width)


def arrays_of(job: Job, size: int, comm: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The arrays of this rank before the job and after."""
    rows, width = shape_of(size)
    own, every = range(comm.rank * rows, (comm.rank + 1) * rows), range(comm.size * rows)
    by_rows, by_heads = [], []
    for heads, last in zip(job.heads, accumulate(job.heads), strict=True):
        share, first = heads // comm.size, last - heads
        by_rows.append(numbers(own, range(first, last), width))
        by_heads.append(numbers(every, range(first + comm.rank * share, first + (comm.rank + 1) * share), width))
    return (by_rows, by_heads) if job.scatter else (by_heads, by_rows)


def ours(job: Job, sources: list[np.ndarray], results: list[np.ndarray], comm: Any, exchange: str) -> Call:
    """Our side of a job: a public function, or the exchange as `attention.py` and `backward.py` do it."""
    queue = default_queue()
    if len(sources) == 1:
        (x,) = (dpnp.asarray(x, sycl_queue=queue) for x in sources)
        function = ulysses_dp.scatter_heads if job.scatter else ulysses_dp.gather_heads
        return lambda: [function(x, comm=comm, exchange=exchange)]

    link = mpi.link(mpi.resolve_comm("bench_exchange", comm), queue, exchange=exchange)
    rows, width = (sources if job.scatter else results)[0].shape[1::2]
    arrays = {name: tensor.asarray(x, sycl_queue=queue) for name, x in zip("qkv", sources, strict=True)}
    items = tuple(
        Item(name, blocks_of(split(heads, comm.size)), (rows,) * comm.size, width, np.dtype(np.float32))
        for name, heads in zip("qkv", job.heads, strict=True)
    )

    window = next(windows_for(link, queue, (items,), 1))

    def redistribution(by_heads: Any = None) -> Redistribution:
        return Redistribution(link, arrays["q"], items, 1, by_heads=by_heads, window=window)

    def scatter() -> list[Any]:
        with trace.call(job.name):
            move = redistribution()
            move.pack(arrays)
            move.start_to_heads()
            move.wait()
            return list(move.received().values())

    if job.scatter:
        return scatter
    # what computed the arrays has written them where they are sent from
    by_heads = tensor.empty(sum(x.size for x in arrays.values()), dtype=np.float32, sycl_queue=queue)
    for name, view in redistribution(by_heads).arrays_by_heads().items():
        view[...] = arrays[name]
    targets = {name: tensor.zeros(x.shape, dtype=np.float32, sycl_queue=queue) for name, x in zip("qkv", results, strict=True)}
    queue.wait()

    def gather() -> list[Any]:
        with trace.call(job.name):
            move = redistribution(by_heads)
            move.start_to_rows()
            move.wait()
            move.unpack(targets)
            return list(targets.values())

    return gather


def plain_alltoall(size: int, comm: Any) -> tuple[Call, list[np.ndarray]]:
    """MPI's Alltoall in device memory, and what it must bring."""
    blocks = np.arange(comm.size)
    count = size // 4 // comm.size
    first = np.repeat(comm.rank * comm.size + blocks, count).astype(np.float32)
    expected = np.repeat(blocks * comm.size + comm.rank, count).astype(np.float32)
    send = tensor.asarray(first, sycl_queue=default_queue())
    receive = tensor.ones(send.shape, dtype=np.float32, sycl_queue=default_queue())
    default_queue().wait()
    # mpi4py cannot ask dpctl for the memory by itself, and an address does not keep an array alive
    arrays = send, receive
    buffers = [[MPI.buffer.fromaddress(x._pointer, x.nbytes), MPI.FLOAT] for x in arrays]

    def exchange() -> list[Any]:
        comm.Alltoall(*buffers)
        return [arrays[1]]

    return exchange, [expected]


def memcpy(source: np.ndarray) -> Call:
    """Copy as many bytes within this rank."""
    arrays = np.ones_like(source), source  # which addresses do not keep alive
    addresses = [x.ctypes.data for x in arrays]

    def copy() -> list[Any]:
        ctypes.memmove(*addresses, arrays[1].nbytes)
        return [arrays[0]]

    return copy


def textbook(x: np.ndarray, comm: Any, scatter: bool) -> np.ndarray:
    """The exchange of one array as NumPy and mpi4py do it in a few lines."""
    batch, seq, heads, width = x.shape
    ranks = comm.size
    if scatter:
        send = np.ascontiguousarray(x.reshape(batch, seq, ranks, heads // ranks, width).transpose(2, 0, 1, 3, 4))
        receive = np.empty_like(send)
        comm.Alltoall(send, receive)
        return np.ascontiguousarray(receive.transpose(1, 0, 2, 3, 4)).reshape(batch, ranks * seq, heads // ranks, width)
    send = np.ascontiguousarray(x.reshape(batch, ranks, seq // ranks, heads, width).transpose(1, 0, 2, 3, 4))
    receive = np.empty_like(send)
    comm.Alltoall(send, receive)
    return np.ascontiguousarray(receive.transpose(1, 2, 0, 3, 4)).reshape(batch, seq // ranks, ranks * heads, width)


def yunchang_call(sources: list[np.ndarray], scatter: bool) -> Call:
    """The same by yunchang; `gloo` must be running."""
    import torch
    from yunchang.comm.all_to_all import SeqAllToAll4D

    tensors = [torch.from_numpy(x) for x in sources]
    axes = (2, 1) if scatter else (1, 2)
    return lambda: [SeqAllToAll4D.apply(None, x, *axes) for x in tensors]


def yunchang_missing() -> str:
    """Why yunchang cannot be measured; empty if it can."""
    try:
        import yunchang  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install '.[peers]' to compare with yunchang"
    return ""


@contextmanager
def gloo(comm: Any) -> Iterator[None]:
    """PyTorch's process group over gloo, of the same ranks on one node; every rank gets as many threads as its SYCL device."""
    import torch

    torch.set_num_threads(default_queue().sycl_device.max_compute_units)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(comm.bcast(folder)) / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=comm.rank, world_size=comm.size)
        try:
            yield
        finally:
            comm.Barrier()
            torch.distributed.destroy_process_group()
            comm.Barrier()  # before the folder goes


def as_numpy(x: Any) -> np.ndarray:
    """Any of the results on the host."""
    if isinstance(x, dpnp.ndarray):
        return dpnp.asnumpy(x)
    return tensor.asnumpy(x) if isinstance(x, tensor.usm_ndarray) else np.asarray(x)


def check(name: str, right: bool, comm: Any) -> None:
    """End all ranks if something is wrong on any."""
    if not comm.allreduce(right, MPI.LAND):
        raise SystemExit(f"{name}: wrong numbers" if comm.rank == 0 else 1)


def stage_shares(call: Callable[[], Any], comm: Any, count: int = 9) -> dict[str, float]:
    """Shares of the stages in the median call of some, the mean over the ranks; "other" is the Python around them."""
    with ulysses_dp.trace() as record:
        for _ in range(count):
            clock(call, comm)
    median = sorted(record.calls, key=lambda entry: entry.seconds)[count // 2]
    shares = {}
    for name, stages in STAGES.items():
        shares[name] = sum(stage.seconds for stage in median.stages if stage.name in stages) / median.seconds
    shares["other"] = 1 - sum(shares.values())
    return {name: comm.allreduce(share) / comm.size for name, share in shares.items()}


def contenders(job: Job, size: int, comm: Any, exchange: str, peers: bool) -> dict[str, Call]:
    """All who do a job, each with buffers of its own, and checked."""
    sources, results = arrays_of(job, size, comm)
    nbytes = sum(x.nbytes for x in sources)
    alltoall, (received,) = plain_alltoall(nbytes, comm)
    calls: dict[str, Call] = {
        "ours": ours(job, sources, results, comm, exchange),
        "alltoall": alltoall,
        "memcpy": memcpy(received),
        "numpy": lambda: [textbook(x, comm, job.scatter) for x in sources],
    }
    if peers:
        calls["yunchang"] = yunchang_call(sources, job.scatter)
    expected = dict.fromkeys(calls, results) | {"alltoall": [received], "memcpy": [received]}
    for name, call in calls.items():
        pairs = zip(call(), expected[name], strict=True)
        check(f"{name}, {job.name}, {nbytes} bytes", all(np.array_equal(as_numpy(x), y) for x, y in pairs), comm)
    return calls


def rotate(calls: list[Call]) -> Call:
    """A call that is the next of some every time."""
    turns = cycle(calls)
    return lambda: next(turns)()


def measure(job: Job, size: int, comm: Any, seconds: float, exchange: str, peers: bool, copies: int) -> Row:
    """Check and time a job at one size, with so many sets of buffers."""
    sets = [contenders(job, size, comm, exchange, peers) for _ in range(copies)]
    calls = {name: rotate([calls[name] for calls in sets]) for name in sets[0]}
    times = in_turns({name: side(call, comm, **TURN) for name, call in calls.items()}, seconds, comm, least=3)
    shares = stage_shares(calls["ours"], comm)
    ulysses_dp.free_workspace()
    case = {"job": job.name, "bytes": 4 * ALL_HEADS * math.prod(shape_of(size)), "ranks": comm.size, "copies": copies}
    if exchange != "auto":
        case["exchange"] = exchange
    above = statistics.median(a - b for a, b in zip(times["ours"], times["alltoall"], strict=True))
    return row(case, times, shares=shares, seconds_above_alltoall=above)


def rate(result: Row, name: str) -> float:
    """GB/s: the bytes of a rank's arrays by the duration."""
    return result["case"]["bytes"] / result["seconds"][name] / 1e9


def line(result: Row) -> str:
    """A row of the table."""
    seconds, case = result["seconds"], result["case"]
    shares = " ".join(f"{share:6.0%}" for share in result["shares"].values())
    rates = " ".join(f"{rate(result, x):8.3f}" if x in seconds else f"{'-':>8}" for x in CONTENDERS[1:])
    ratios = " ".join(f"{result['times_as_fast_as'].get(x, math.nan):8.2f}" for x in ("alltoall", "numpy", "yunchang"))
    job = f"{size_text(case['bytes']):>7}  {case['job']:13} | {1e6 * seconds['ours']:8.0f} {rate(result, 'ours'):8.3f}"
    return f"{job} | {shares} | {rates} | {ratios} {1e6 * result['seconds_above_alltoall']:8.0f}"


def size_text(size: int) -> str:
    """64K for 65536, and so on."""
    for unit, factor in reversed(UNITS.items()):
        if size >= factor:
            return f"{size / factor:g}{unit}"
    return str(size)


def size_of(text: str) -> int:
    """65536 for 64K, and so on."""
    factor = UNITS.get(text[-1:].upper(), 1)
    size = int(text[:-1] if factor > 1 else text) * factor
    if size < SIZES[0]:
        raise ValueError(text)
    return size


def summary(rows: list[Row]) -> Iterator[str]:
    """What the large and the small sizes come to, job by job."""
    for job in JOBS:
        of_job = [x for x in rows if x["case"]["job"] == job.name]
        large = [x["times_as_fast_as"] for x in of_job if x["case"]["bytes"] >= 2**20]
        small = [1e6 * x["seconds_above_alltoall"] for x in of_job if x["case"]["bytes"] <= 2**12]
        parts = [f"{job.name:13}"]
        for name in ("alltoall", "numpy", "yunchang"):
            ratios = [x[name] for x in large if name in x]
            if ratios:
                parts.append(f"{min(ratios):.2f} to {max(ratios):.2f} × {name} from 1M on")
        if small:
            parts.append(f"at most {max(small):.0f} µs above alltoall up to 4K")
        yield "   ".join(parts)


def cache_bytes() -> int:
    """Size of the last-level cache of this machine; 64 MB where Linux does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(map(size_of, sizes), default=2**26)


def free_bytes() -> int:
    """Memory that new processes may have; Linux only."""
    (free,) = (x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(free.split()[1]) * 1024


def main() -> None:
    """Check, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=size_of, nargs="+", default=SIZES, help="of a rank's arrays, 1K or more (1K to 256M)")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each row (1.5)")
    parser.add_argument("--exchange", default="auto", help="of ulysses_dp: auto, device, host or shared (auto)")
    parser.add_argument("--cold", action="store_true", help="take turns with more buffers than fit the cache")
    Results.add_options(parser, "the rates and shares")
    arguments = parser.parse_args()

    comm = MPI.COMM_WORLD
    if comm.size < 2 or QKV[-1] % comm.size:
        raise SystemExit(f"bench_exchange: {QKV[-1]} heads need 2 or 4 ranks, not {comm.size}" if comm.rank == 0 else 1)
    missing = yunchang_missing()
    say = print if comm.rank == 0 else lambda *_, **__: None
    with Results("bench_exchange", arguments, comm) as results, gloo(comm) if not missing else nullcontext():
        say(machine_line(results.machine), "cold" if arguments.cold else "warm", sep=", ")
        if missing:
            say(missing)
        say(HEADER)
        for size in arguments.sizes:
            if comm.bcast(comm.size * ROOM * size > free_bytes()):
                say(f"{size_text(size):>7}  needs more memory than there is")
                continue
            copies = min(math.ceil(2 * cache_bytes() / size), MOST_COPIES) if arguments.cold else 1
            for job in JOBS:
                results.rows.append(measure(job, size, comm, arguments.seconds, arguments.exchange, not missing, copies))
                say(line(results.rows[-1]), flush=True)
        say(*summary(results.rows), sep="\n")


if __name__ == "__main__":
    main()
