"""Arrays in their two splits, by rows and by heads: the buffers of this rank, and the ways between them."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache, partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ulysses_dp.kernels.launch import place
from ulysses_dp.kernels.relayout import Panel, relayout, source_at, target_at

from .._device.arrays import view
from .._device.trace import note, stage
from .._device.workspace import empty_like, scratch
from . import mpi
from .partition import Counts, levels_of, trade_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .partition import Share, Trade


class Redistribution:
    """Some arrays in their two splits, by rows and by heads, with the buffers of this rank and the ways between them.

    Every way is one relayout pass and one message to every other rank. What this rank has for itself is copied directly between
    the arrays and the buffer of the gathered side: through MPI, it would be copied once more.

    Parameters
    ----------
    wire : Wire
        The ranks, and the way to them. In two steps, every number travels twice and is copied once more, but a rank sends
        ``node_size + P / node_size - 2`` messages instead of ``P - 1``.
    like : usm_ndarray
        Has the queue, and the dtype if none is given.
    shares : sequence of Share
        Per array, which of its heads each rank has on the gathered side; they may overlap.
    widths : sequence of int
        Numbers of a head, per array.
    rows : tuple of int
        Rows that every rank has on the local side.
    batch : int
        Batch of all arrays.
    dtype : numpy.dtype, optional
        Of the buffers.
    slot : str
        Of the scratch memory: redistributions that are under way at the same time need different ones.
    gathered : usm_ndarray, optional
        Flat memory of the gathered side that there is already.
    keep : bool
        Receive into new memory, not into scratch memory.
    """

    def __init__(
        self,
        wire: mpi.Wire,
        like: Any,
        shares: Sequence[Share],
        widths: Sequence[int],
        rows: tuple[int, ...],
        batch: int,
        *,
        dtype: Any = None,
        slot: str = "",
        gathered: Any = None,
        keep: bool = False,
    ) -> None:
        shares, widths = tuple(shares), tuple(widths)
        comm = wire.comm
        self._blocking = wire.blocking
        trade = trade_of(comm.rank, rows, shares, widths, batch)
        dtype, queue = np.dtype(dtype or like.dtype), like.sycl_queue

        def memory(name: str, size: int, usm_type: str = "device") -> Any:
            return scratch(queue, f"{name} {slot}", (size,), dtype, usm_type, owner=comm.handle)

        def side(name: str, array: Any, counts: Counts) -> mpi.Side:
            return mpi.Side(array, *counts[:3], memory(f"host {name}", counts.size, "host") if by_host else None)

        by_host, size = wire.route.name == "host", trade.gathered_size
        if gathered is None:
            gathered = empty_like(like, (size,), dtype) if keep else memory("gathered", size)
        self.gathered, self._local = gathered, memory("local", trade.local_size)
        # the steps towards the gathered side
        self._levels = levels_of(trade, wire.node_size) if wire.levels else None
        if self._levels is None:
            local, everyone = side("local", self._local, trade.local), side("gathered", gathered, trade.gathered)
            self._steps, bases = [(comm, local, everyone)], trade.local.places
        else:
            there = self._levels
            within, between = wire.levels
            self._members, self._groups = memory("members", there.members.size), memory("groups", there.groups.size)
            local, members = side("local", self._local, there.local), side("members", self._members, there.members)
            groups, everyone = side("groups", self._groups, there.groups), side("gathered", gathered, there.gathered)
            self._steps, bases = [(within, local, members), (between, groups, everyone)], there.local_places
        self._layout = _Layout(trade, bases, shares, widths)
        self._rest: list[Callable[[], None]] = []

    @property
    def count(self) -> int:
        """The number of arrays."""
        return len(self._layout.widths)

    @property
    def views(self) -> list[Any]:
        """The arrays on the gathered side, each (batch, all rows, heads of this rank, width)."""
        trade, _, shares, widths = self._layout
        size = trade.sizes[trade.rank]
        views, first = [], 0
        for share, width in zip(shares, widths, strict=True):
            count = share[trade.rank][1]
            shape, strides = (trade.batch, sum(trade.rows), count, width), (size, trade.batch * size, width, 1)
            views.append(view(self.gathered, first, shape, strides))
            first += count * width
        return views

    def pack(self, arrays: Sequence[Any]) -> None:
        """Copy arrays of the local side, (batch, rows of this rank, heads, width), to where they travel from."""
        with stage("pack"):
            panels = _pack_panels(self._layout, tuple(map(place, arrays)))
            self._relayout(arrays, [self._local, self.gathered], panels)

    def unpack(self, targets: Sequence[Any]) -> None:
        """Copy what has come to arrays of the local side, which are dense in the last axis.

        What several ranks have of one head is added up in rank order.
        """
        panels = _unpack_panels(self._layout, tuple(map(place, targets)))
        with stage("unpack"):
            self._relayout([self._local, self.gathered], targets, panels)

    def _relayout(self, sources: Sequence[Any], targets: Sequence[Any], panels: Sequence[Panel]) -> None:
        trade = self._layout.trade
        relayout(sources, targets, panels, rows=trade.rows[trade.rank], batch=trade.batch)
        note(passes=1)

    def start_to_gathered(self) -> None:
        """Send what was packed, receive all rows of the heads of this rank."""
        self._start("scatter", self._steps, forth=True)

    def start_to_local(self) -> None:
        """Send the gathered side, receive what `unpack` needs."""
        self._start("gather", [(comm, target, source) for comm, source, target in reversed(self._steps)], forth=False)

    def _start(self, name: str, steps: list[tuple[Any, mpi.Side, mpi.Side]], *, forth: bool) -> None:
        first, *others = (mpi.AllToAll(name, *step) for step in steps)
        self._rest = [first.wait]
        for other in others:
            self._rest += [partial(self._turn, forth=forth), partial(other.start, blocking=True)]
        first.start(blocking=self._blocking)

    def wait(self) -> None:
        """Wait until what was started is over, if something was."""
        failed = None
        while self._rest:
            try:
                self._rest.pop(0)()
            except Exception as error:  # the other ranks wait for this one in the next step
                failed = failed or error
        if failed is not None:
            raise failed

    def _turn(self, *, forth: bool) -> None:
        """Between two steps: from the order of the members of this group to that of the groups, or back."""
        levels, panels = self._levels, defaultdict(list)
        assert levels is not None
        for (member, group), *starts in levels.blocks:
            width = levels.widths[group]
            ends = [(int(end), start, width, 0, 0) for end, start in zip(levels.is_own(member, group), starts, strict=True)]
            source, target = ends if forth else ends[::-1]
            panels[levels.rows[member]].append(Panel(*source, 1, *target, 1, width))
        sides = [self._members, self._local], [self._groups, self.gathered]
        with stage("turn"):
            for rows, of_these in panels.items():
                relayout(*(sides if forth else sides[::-1]), of_these, rows=rows, batch=1)
            note(passes=1)


class _Block(NamedTuple):
    """The heads of one array that one rank has on the gathered side, and the rows that this rank has on the local side."""

    array: int
    first: int
    heads: int
    width: int
    place: tuple[int, int, int, int, int]  # buffer, local or gathered; offset, strides of rows, batch and heads


class _Layout(NamedTuple):
    """Where arrays lie in the two buffers."""

    trade: Trade
    bases: tuple[int, ...]  # where the blocks of the ranks start on the local side
    shares: tuple[Share, ...]
    widths: tuple[int, ...]


def _blocks(layout: _Layout) -> Iterator[_Block]:
    """What there is of every array for or from every rank, in rank order."""
    trade, bases, shares, widths = layout
    for peer, base in enumerate(bases):
        own = peer == trade.rank
        size, start = trade.sizes[peer], trade.gathered.own.start if own else base
        for number, (share, width) in enumerate(zip(shares, widths, strict=True)):
            first, heads = share[peer]
            yield _Block(number, first, heads, width, (int(own), start, trade.batch * size, size, width))
            start += heads * width


@lru_cache(maxsize=256)
def _pack_panels(layout: _Layout, places: tuple[tuple[int, ...], ...]) -> tuple[Panel, ...]:
    """From arrays at these places to the two buffers."""
    return tuple(
        Panel(*source_at(block.array, places[block.array], block.first), *block.place, block.heads, block.width)
        for block in _blocks(layout)
    )


@lru_cache(maxsize=256)
def _unpack_panels(layout: _Layout, places: tuple[tuple[int, ...], ...]) -> tuple[Panel, ...]:
    """From the two buffers to arrays at these places."""
    panels, covered = [], [0] * len(places)  # heads of each array that the ranks so far have brought
    for block in _blocks(layout):
        number, first = block.array, block.first
        buffer, start, row, batch, head = block.place
        again = min(max(covered[number] - first, 0), block.heads)
        covered[number] = max(covered[number], first + block.heads)
        for skip, heads in ((0, again), (again, block.heads - again)):
            source = (buffer, start + skip * head, row, batch, head, 1)
            target = target_at(number, places[number], first + skip)
            panels.append(Panel(*source, *target, heads, block.width, add=int(skip < again)))
    return tuple(panels)


class Part(Protocol):
    """One of the parts of a call that `pipeline` runs."""

    def start(self) -> None:
        """Start what brings the arrays here."""

    def compute(self) -> None:
        """Wait for that, compute, and start what brings the results back."""

    def finish(self) -> None:
        """Wait for that, and give the results to the user."""

    def wait(self) -> None:
        """Wait until nothing is under way."""


def pipeline(parts: Sequence[Part]) -> None:
    """Run the parts of a call: while one is computed, the next one is on its way here, and the last one on its way back."""
    try:
        parts[0].start()
        for part, following in zip_longest(parts, parts[1:]):
            if following is not None:
                following.start()
            part.compute()
        for part in parts:
            part.finish()
    finally:
        for part in parts:  # whatever happened: MPI must not write into memory that is used again
            part.wait()
