"""Record what calls do, and write it to files for Perfetto."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._device.trace import Call, Record, Stage, recording
from ._ranks import mpi
from ._ranks.agree import on_all_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Call", "Stage", "Trace", "trace"]


class Trace(Record):
    """The calls that ran in a `trace` block, in order."""

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

        Raises
        ------
        OSError
            On all ranks, if the file cannot be written.
        """
        if comm is None:
            _write(path, self._events(0, time.perf_counter()))
            return
        ranks = mpi.resolve_comm("Trace.save", comm)
        mpi.meet(ranks)
        everyone = mpi.share_object(ranks, self._events(ranks.rank, time.perf_counter()))

        def write() -> None:
            if ranks.rank == 0:
                _write(path, [event for of_rank in everyone for event in of_rank])

        on_all_ranks(ranks, "Trace.save", write)

    def _events(self, rank: int, now: float) -> list[dict[str, Any]]:
        """The trace as events of Chrome's format, in microseconds before `now`."""
        events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}]
        number = 0
        for call in self.calls:
            track = {"pid": rank, "tid": 0}
            start = 1e6 * (call.start - now)
            events.append({"name": call.function, "ph": "X", "ts": start, "dur": 1e6 * call.seconds, **track})
            for stage in call.stages:
                start, duration = 1e6 * (stage.start - now), 1e6 * stage.seconds
                details = {x: getattr(stage, x) for x in ("bytes_sent", "messages", "route", "passes", "allocations")}
                event = {"name": stage.name, **track, "args": {x: value for x, value in details.items() if value}}
                if stage.exchange:  # may overlap others of its row, which only asynchronous events may
                    number += 1
                    event |= {"cat": "exchange", "id": f"{rank}.{number}"}
                    events += [{**event, "ph": "b", "ts": start}, {**event, "ph": "e", "ts": start + duration}]
                else:
                    events.append({**event, "ph": "X", "ts": start, "dur": duration})
        return events


def _write(path: str | Path, events: list[dict[str, Any]]) -> None:
    """Write events with times from the first one on."""
    first = min((event["ts"] for event in events if "ts" in event), default=0.0)
    timed = [event | {"ts": round(event["ts"] - first, 3)} if "ts" in event else event for event in events]
    Path(path).write_text(json.dumps({"traceEvents": timed, "displayTimeUnit": "ms"}))


@contextmanager
def trace() -> Iterator[Trace]:
    """Record the stages of all calls that this thread makes in the block.

    Not collective. Every stage ends with its work done, with or without a trace, so recording changes no timing.

    Yields
    ------
    Trace
        ``calls`` fills up while the block runs, each with its stages. First come ``agree`` (checks, and the agreement of all
        ranks on them) and ``prepare`` (memory, where that of the last call does not do). Then come ``pack``, ``scatter`` (the
        first all-to-all), ``attention``, ``gather`` (the second), ``unpack`` and ``confirm`` (that no rank failed).
        ``Trace.save`` writes a file for Perfetto.

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
    record = Trace()
    with recording(record):
        yield record
