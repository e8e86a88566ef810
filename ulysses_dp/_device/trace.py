"""Record what calls do: how long each stage took, what it sent, copied and allocated."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Stage:
    """One stage of one call on this rank."""

    name: str  #: agree, prepare, pack, scatter, attention, gather, unpack, confirm; of a gradient also delta
    bytes_sent: int = 0  #: bytes of arrays sent to other ranks
    messages: int = 0  #: other ranks that were sent something
    route: str = ""  #: of an all-to-all: "device" or "host"
    start: float = 0.0  #: `time.perf_counter` at the start, in seconds
    seconds: float = 0.0
    passes: int = 0  #: relayout passes: launches of the kernel that copies arrays into another layout
    allocations: int = 0  #: allocations of device memory
    exchange: bool = False  #: an all-to-all, which may run beside other stages


@dataclass
class Call:
    """One call of a public function on this rank."""

    function: str
    start: float = 0.0
    seconds: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    passes: int = 0  #: of all stages, and between them
    allocations: int = 0


@dataclass
class Trace:
    """The calls that ran in a `trace` block, in order."""

    calls: list[Call] = field(default_factory=list)

    @property
    def stages(self) -> list[Stage]:
        """The stages of all calls."""
        return [stage for call in self.calls for stage in call.stages]

    def seconds(self, name: str) -> float:
        """Total time of the stages of this name, in seconds."""
        return sum(stage.seconds for stage in self.stages if stage.name == name)

    def bytes_sent(self) -> int:
        """Total bytes sent to other ranks."""
        return sum(stage.bytes_sent for stage in self.stages)

    def save(self, path: str | Path, comm: Any = None) -> None:
        """Write a file for Perfetto (ui.perfetto.dev) or chrome://tracing, one row per rank.

        Collective over `comm`, where the traces of all ranks go into one file, which rank 0 writes; by default the trace of
        this rank alone. The clocks of the ranks are set against each other with a barrier: to some microseconds.

        Parameters
        ----------
        path : str or Path
            Where to write, in Chrome's trace event format (JSON).
        comm : mpi4py.MPI.Intracomm, optional
            The ranks.
        """
        from .._ranks import mpi

        rank = 0
        if comm is None:
            events = self._events(rank, time.perf_counter())
        else:
            ranks = mpi.resolve_comm("Trace.save", comm)
            rank = ranks.rank
            mpi.meet(ranks)
            everyone = mpi.share_object(ranks, self._events(rank, time.perf_counter()))
            events = [event for of_rank in everyone for event in of_rank]
        if rank == 0:
            first = min((event["ts"] for event in events if "ts" in event), default=0.0)
            for event in events:
                if "ts" in event:
                    event["ts"] = round(event["ts"] - first, 3)
            Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def _events(self, rank: int, now: float) -> list[dict[str, Any]]:
        """The trace as events of Chrome's format, in microseconds before `now`."""
        events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}]
        number = 0
        for call in self.calls:
            place = {"pid": rank, "tid": 0}
            start = 1e6 * (call.start - now)
            events.append({"name": call.function, "ph": "X", "ts": start, "dur": 1e6 * call.seconds, **place})
            for stage in call.stages:
                start, duration = 1e6 * (stage.start - now), 1e6 * stage.seconds
                details = {x: getattr(stage, x) for x in ("bytes_sent", "messages", "route", "passes", "allocations")}
                event = {"name": stage.name, **place, "args": {x: value for x, value in details.items() if value}}
                if stage.exchange:  # may overlap others of its row, which only asynchronous events may
                    number += 1
                    event |= {"cat": "exchange", "id": f"{rank}.{number}"}
                    events += [{**event, "ph": "b", "ts": start}, {**event, "ph": "e", "ts": start + duration}]
                else:
                    events.append({**event, "ph": "X", "ts": start, "dur": duration})
        return events


class _Active(local):
    """What this thread records into."""

    trace: Trace | None = None
    call: Call | None = None
    stage: Stage | None = None


_active = _Active()


@contextmanager
def trace() -> Iterator[Trace]:
    """Record the stages of all calls that this thread makes in the block.

    Not collective. Every stage ends with its work done, with or without a trace, so recording changes no timing.

    Yields
    ------
    Trace
        ``calls`` fills up while the block runs, each with its stages: ``agree`` (checks, and the agreement of all ranks on
        them), ``prepare`` (memory, where that of the last call does not do), ``pack``, ``scatter`` (the first all-to-all),
        ``attention``, ``gather`` (the second), ``unpack`` and ``confirm`` (that no rank failed). ``Trace.save`` writes a file
        for Perfetto.

    Examples
    --------
    >>> import numpy as np
    >>> import ulysses_dp
    >>> q = np.ones((1, 16, 2, 8), dtype=np.float32)
    >>> with ulysses_dp.trace() as record:
    ...     out = ulysses_dp.attention(q, q, q)
    >>> [stage.name for stage in record.stages]
    ['attention']
    """
    outer = _active.trace, _active.call, _active.stage
    _active.trace, _active.call, _active.stage = record, _, _ = Trace(), None, None
    try:
        yield record
    finally:
        _active.trace, _active.call, _active.stage = outer


@contextmanager
def call(function: str) -> Iterator[None]:
    """Record a call of a public function if a trace is active; a call inside a call is a part of it."""
    if _active.trace is None or _active.call is not None:
        yield
        return
    _active.call = entry = Call(function, time.perf_counter())
    _active.trace.calls.append(entry)
    try:
        yield
    finally:
        entry.seconds = time.perf_counter() - entry.start
        _active.call = None


def stage(name: str, **details: Any) -> Timer:
    """Time one stage if a call is recorded; `details` are fields of `Stage`. One that fails is not recorded."""
    return Timer(name, **details)


class Timer:
    """The clock of one stage: a context manager, or opened and closed apart for what runs beside other stages."""

    def __init__(self, name: str, **details: Any) -> None:
        self._call = _active.call
        self._entry = Stage(name, **details) if self._call is not None else None

    def open(self) -> None:
        """Start the clock."""
        if self._entry is not None:
            self._entry.start = time.perf_counter()

    def close(self) -> None:
        """Stop the clock and record."""
        if self._entry is not None and self._call is not None:
            self._entry.seconds = time.perf_counter() - self._entry.start
            self._call.stages.append(self._entry)

    def __enter__(self) -> None:
        self._outer, _active.stage = _active.stage, self._entry
        self.open()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        _active.stage = self._outer
        if error is None:
            self.close()


def note(*, passes: int = 0, allocations: int = 0) -> None:
    """Count work for the call, and the stage, that is under way."""
    for entry in (_active.call, _active.stage):
        if entry is not None:
            entry.passes += passes
            entry.allocations += allocations
