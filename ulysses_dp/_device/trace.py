"""What calls note of themselves: how long each stage took, what it sent, copied and allocated."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import local
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Stage:
    """One stage of one call on this rank."""

    name: str  #: agree, prepare, pack, scatter, attention, gather, unpack, confirm; of a gradient also delta
    bytes_sent: int = 0  #: bytes of arrays for other ranks: sent, or with route "shared" where they read them
    messages: int = 0  #: other ranks that were sent something; none with route "shared"
    route: str = ""  #: of an all-to-all: "device", "host" or "shared"
    start: float = 0.0  #: `time.perf_counter` at the start, in seconds
    seconds: float = 0.0
    passes: int = 0  #: relayout passes: copies of arrays into another layout, by a kernel or by the host
    allocations: int = 0  #: allocations of device memory
    pairs: int = 0  #: in a ring: pairs of query and key that were computed, of all heads and batches of this rank
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
    pairs: int = 0


@dataclass
class Record:
    """Calls, in order."""

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


class _Active(local):
    """What this thread records into."""

    record: Record | None = None
    call: Call | None = None
    stage: Stage | None = None


_active = _Active()


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Record the calls that this thread makes in the block."""
    outer = _active.record, _active.call, _active.stage
    _active.record, _active.call, _active.stage = record, None, None
    try:
        yield
    finally:
        _active.record, _active.call, _active.stage = outer


def call(function: str) -> AbstractContextManager[None]:
    """Record a call of a public function if a trace is active; a call inside a call is a part of it."""
    return _IDLE if _active.record is None or _active.call is not None else _record_call(_active.record, function)


@contextmanager
def _record_call(record: Record, function: str) -> Iterator[None]:
    _active.call = entry = Call(function, time.perf_counter())
    record.calls.append(entry)
    try:
        yield
    finally:
        entry.seconds = time.perf_counter() - entry.start
        _active.call = None


def stage(name: str, **details: Any) -> Timer:
    """Time one stage if a call is recorded; `details` are fields of `Stage`. One that fails is not recorded."""
    return _IDLE if _active.call is None else Timer(name, **details)


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


class _Idle(Timer):
    """The clock of every stage where nothing is recorded: one object, because a short call has many stages."""

    def __init__(self) -> None:
        pass

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        pass


_IDLE = _Idle()


def note(*, passes: int = 0, allocations: int = 0, pairs: int = 0) -> None:
    """Count work for the call, and the stage, that is under way."""
    if _active.call is None:
        return
    for entry in (_active.call, _active.stage):
        if entry is not None:
            entry.passes += passes
            entry.allocations += allocations
            entry.pairs += pairs
