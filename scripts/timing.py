"""What the benchmarks share: sides of a comparison that take turns, and results as files that can be compared.

Speeds of a machine drift, by half in an hour on some. So all sides of a comparison take turns, again and again, and a ratio is
the median of the ratios turn by turn. A turn is a few calls, of which the first does not count: threads of the side before may
still be spinning on the cores. The duration of a turn is the median of its calls. With several ranks there is a barrier before
every call, and the slowest rank counts.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files import Output, on_all_ranks, picture_kind, refuse_clashes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    Side = Callable[[], float]  # takes a turn, and returns its seconds
    Row = dict[str, Any]

SCHEMA = 1  # of the JSON files
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")  # of a CPU, that a description of it tells
LOSS = 0.95  # of the speed before: what is slower is marked


def clock(call: Callable[[], Any], comm: Any = None) -> float:
    """How long a call takes, on the slowest rank if there are several. What it returns is freed after that."""
    if comm is not None:
        comm.Barrier()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds if comm is None else comm.allreduce(seconds, _max())


def _max() -> Any:
    from mpi4py import MPI

    return MPI.MAX


def side(call: Callable[[], Any], comm: Any = None, *, seconds: float = 0.03, most: int = 1000) -> Side:
    """A side of a comparison, of which a turn takes about so long, or two calls; collective with several ranks."""
    usual = clock(call, comm)
    if seconds < usual < 10:  # perhaps it compiled something, or something else has run
        usual = min(usual, clock(call, comm))
    count = max(1, int(min(seconds / usual, most)))

    def turn() -> float:
        return statistics.median([clock(call, comm) for _ in range(1 + count)][1:])

    return turn


def in_turns(
    sides: dict[str, Side], seconds: float, comm: Any = None, *, least: int = 5, rarely: tuple[str, ...] = ()
) -> dict[str, list[float]]:
    """Let all take turns for about so many seconds, at least so often: the duration of every turn.

    Those named in `rarely` take every fourth turn.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    turns, end = 0, time.perf_counter() + seconds
    while turns < least or _of_first_rank(time.perf_counter() < end, comm):
        for name, turn in sides.items():
            if name not in rarely or turns % 4 == 0:
                times[name].append(turn())
        turns += 1
    return times


def _of_first_rank(value: bool, comm: Any) -> bool:
    return value if comm is None else comm.bcast(value)


def median_ratio(theirs: list[float], mine: list[float]) -> float:
    """How many times as fast mine is, turn by turn."""
    return statistics.median(b / a for a, b in zip(mine, theirs, strict=True))


def row(case: dict[str, Any], times: dict[str, list[float]], **figures: Any) -> Row:
    """A row of the results.

    Parameters
    ----------
    case : dict
        What was measured; names the row in comparisons.
    times : dict
        Of `in_turns`, with "ours" among the sides.
    **figures
        What else is known about it.
    """
    ours = times["ours"]
    return {
        "case": case,
        "turns": len(ours),
        "seconds": {name: statistics.median(turns) for name, turns in times.items()},
        "least_seconds": {name: min(turns) for name, turns in times.items()},
        "times_as_fast_as": {
            name: median_ratio(turns, ours) for name, turns in times.items() if name != "ours" and len(turns) == len(ours)
        },
        **figures,
    }


def describe_machine(comm: Any = None) -> dict[str, Any]:
    """This machine and what runs on it, as the files of results have it."""
    from ulysses_dp._device.queue import default_queue

    device = default_queue().sycl_device
    cores = len(os.sched_getaffinity(0))
    cpu = _cpu()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_family": "/".join(cpu.get(name, "") for name in ("vendor_id", "cpu family", "model", "stepping")),
        "cpu_flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "cores_of_every_rank": [cores] if comm is None else comm.allgather(cores),
        "device": device.name.strip(),
        "backend": device.backend.name,
        "driver": device.driver_version,
        "threads_of_a_rank": device.max_compute_units,
        "float32_vector": device.native_vector_width_float,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("ulysses_dp", "dpctl", "dpnp", "numpy")},
        "mpi": "" if comm is None else _mpi_version(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("ULYSSES_DP_", "CL_CONFIG_"))},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu() -> dict[str, str]:
    """What Linux says about the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _mpi_version() -> str:
    from mpi4py import MPI

    return " ".join(MPI.Get_library_version().replace("\0", "").split())[:100]


def machine_line(machine: dict[str, Any]) -> str:
    """The description of a machine in a line."""
    cores = machine["cores_of_every_rank"]
    ranks = "" if not machine["mpi"] else f"{len(cores)} ranks, {cores} cores each, "
    return f"{ranks}{machine['threads_of_a_rank']} threads each, {machine['device']} ({machine['cpu_family']})"


class Results:
    """The rows of a benchmark, and the options by which every benchmark saves, draws and compares them.

    Parameters
    ----------
    name : str
        Of the benchmark.
    arguments : argparse.Namespace
        With the options that `add_options` added.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks. Every rank makes the rows, rank 0 prints and writes. What cannot be written or read ends all ranks at once,
        before anything is measured.

    Attributes
    ----------
    rows : list of dict
        Of `row`, to be filled.
    machine : dict
        Of `describe_machine`.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, comm: Any = None) -> None:
        self.name, self.rows = name, []
        self._first = comm is None or comm.rank == 0
        self._comm, self._arguments = comm, arguments
        self._files: dict[str, Output] = {}
        self._before: dict[str, Any] | None = None
        try:
            on_all_ranks(comm, self._open)
        except SystemExit:
            self._drop_files()
            raise
        self.machine = describe_machine(comm)

    @staticmethod
    def add_options(parser: argparse.ArgumentParser, drawn: str) -> None:
        """Add what every benchmark has; `drawn` says what its plot shows."""
        parser.add_argument("--json", metavar="FILE", help="write the rows and the machine here")
        parser.add_argument("--plot", metavar="FILE", help=f"draw {drawn} here")
        parser.add_argument("--against", metavar="FILE", help="compare with the rows of this file of --json")

    def _open(self) -> None:
        arguments = self._arguments
        refuse_clashes({"--against": arguments.against}, {"--json": arguments.json, "--plot": arguments.plot})
        if arguments.against is not None:
            self._before = load(arguments.against)
            if self._before["benchmark"] != self.name:
                raise ValueError(f"{arguments.against}: rows of {self._before['benchmark']}, not of {self.name}")
        if arguments.plot is not None:
            picture_kind(arguments.plot)
        for option in ("json", "plot") if self._first else ():
            if getattr(arguments, option) is not None:
                self._files[option] = Output(getattr(arguments, option))

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Compare and save what has been measured, if nothing went wrong."""
        try:
            if kind is None:
                on_all_ranks(self._comm, self._finish)
        finally:
            self._drop_files()

    def _drop_files(self) -> None:
        """Take away those that are not complete."""
        for file in self._files.values():
            file.__exit__()

    def _finish(self) -> None:
        if not self._first:
            return
        content = {"schema": SCHEMA, "benchmark": self.name, "machine": self.machine, "rows": self.rows}
        if self._before is not None:
            print(*compare(self._before, content), sep="\n")
        if "json" in self._files:
            self._files["json"].part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            self._files["json"].complete()
        if "plot" in self._files:
            from plot_speed import draw

            draw([content], self._files["plot"].part, picture_kind(self._arguments.plot))
            self._files["plot"].complete()


def load(path: str) -> dict[str, Any]:
    """The results that `Results` saved; raises ValueError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, not {SCHEMA}")
        content["benchmark"], content["machine"]["cpu"], [(x["case"], x["seconds"]["ours"]) for x in content["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file that a benchmark saved: {error!r}") from error
    return content


def compare(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Lines that compare the rows of two files: how many times as fast ours has become.

    By the clock, which is right on a quiet machine only; and by the sides that were there both times, as the ratio of the
    ratios to them, for which the machine need not be as fast as it was.
    """
    if before["machine"]["cpu_family"] != after["machine"]["cpu_family"]:
        yield f"the machines differ: {machine_line(before['machine'])} before"
    known = {_key(x): x for x in before["rows"] if x["seconds"]["ours"] is not None}  # as where only ratios were kept
    pairs = [(known[_key(x)], x) for x in after["rows"] if _key(x) in known]
    if not pairs:
        yield "no row is in both files"
        return
    sides = [
        name for name in pairs[0][1]["times_as_fast_as"] if all(name in x["times_as_fast_as"] for pair in pairs for x in pair)
    ]
    yield "times as fast as before: by the clock" + "".join(f", beside {name}" for name in sides)
    changes = []
    for old, new in pairs:
        change = [old["seconds"]["ours"] / new["seconds"]["ours"]]
        change += [new["times_as_fast_as"][name] / old["times_as_fast_as"][name] for name in sides]
        changes.append(change)
        case = "  ".join(f"{name} {value}" for name, value in new["case"].items() if value not in (False, ""))
        yield " ".join(f"{x:6.2f}" for x in change) + f"  {case}" + ("   SLOWER" if change[-1] < LOSS else "")
    means = (statistics.geometric_mean(x) for x in zip(*changes, strict=True))
    yield " ".join(f"{x:6.2f}" for x in means) + f"  geometric means of {len(pairs)} rows"


def _key(x: Row) -> str:
    return json.dumps(x["case"], sort_keys=True)


@contextmanager
def peer(module: str, server: str, python: str = sys.executable) -> Iterator[Connection]:
    """A process that runs `module.server(connection)` of these scripts, perhaps with another Python: the connection to it."""
    mine, theirs = socket.socketpair()
    with theirs:
        program = "import sys; sys.path.insert(0, sys.argv[1]); import timing; timing.serve(*sys.argv[2:])"
        number = theirs.fileno()
        command = [python, "-c", program, str(Path(__file__).parent), module, server, str(number)]
        process = subprocess.Popen(command, pass_fds=[number])
    with process, Connection(mine.detach()) as connection:
        try:
            yield connection
        finally:
            process.terminate()


def serve(module: str, server: str, number: str) -> None:
    """The other end of `peer`."""
    with Connection(int(number)) as connection:
        getattr(importlib.import_module(module), server)(connection)


def remote(connection: Connection) -> Side:
    """A side that takes its turns in the process of a `peer`, which answers None with the seconds of a turn."""

    def turn() -> float:
        connection.send(None)
        return connection.recv()

    return turn
