"""Record the stages of the calls in a block: how long each took and what it sent."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import local
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Stage:
    """One stage of one call on this rank."""

    name: str  #: pack, scatter, attention, gather or unpack
    bytes_sent: int = 0  #: bytes sent to other ranks
    messages: int = 0  #: other ranks that were sent something
    route: str = ""  #: of an all-to-all: "device" or "host"
    seconds: float = 0.0


@dataclass
class Trace:
    """The stages that ran in a `trace` block, in order."""

    stages: list[Stage] = field(default_factory=list)

    def seconds(self, name: str) -> float:
        """Total time of the stages of this name, in seconds."""
        return sum(stage.seconds for stage in self.stages if stage.name == name)

    def bytes_sent(self) -> int:
        """Total bytes sent to other ranks."""
        return sum(stage.bytes_sent for stage in self.stages)


_active = local()


@contextmanager
def trace() -> Iterator[Trace]:
    """Record the stages of all calls that this thread makes in the block.

    Not collective. Every stage ends with its work done, with or without a trace, so recording changes no timing.

    Yields
    ------
    Trace
        ``stages`` fills up while the block runs: ``pack``, ``scatter`` (the first all-to-all), ``attention``, ``gather``
        (the second) and ``unpack``.

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
    outer = getattr(_active, "trace", None)
    _active.trace = record = Trace()
    try:
        yield record
    finally:
        _active.trace = outer


def stage(name: str, **details: Any) -> AbstractContextManager[object]:
    """Time one stage if a trace is active; `details` are fields of `Stage`."""
    record = getattr(_active, "trace", None)
    return nullcontext() if record is None else _timed(record, Stage(name, **details))


@contextmanager
def _timed(record: Trace, entry: Stage) -> Iterator[None]:
    start = time.perf_counter()
    yield
    entry.seconds = time.perf_counter() - start
    record.stages.append(entry)
