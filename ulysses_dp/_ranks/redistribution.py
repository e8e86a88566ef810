"""Arrays in their two splits, by rows and by heads: the buffers of this rank, and the ways between them."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache, partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ulysses_dp.kernels.launch import offset_and_strides
from ulysses_dp.kernels.relayout import MAX_TARGETS, Panel, Relayout, copy_panels, source_at, target_at

from .._device.arrays import tensor, usm_array, view
from .._device.copies import copy_arrays
from .._device.trace import note, stage
from .._device.workspace import empty_like, freed_with_workspace, scratch
from . import mpi
from .partition import Item, TwoStep, dtype_of_message, transfer_of, window_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np

    from .partition import Blocks, Transfer

_Thing = TypeVar("_Thing")

BY_ROWS, BY_HEADS = range(2)  # the numbers of the two buffers where both are sources, or targets, of a copy


class Redistribution:
    """Items of the same rows in their two splits, by rows and by heads: the buffers of this rank, and the ways between them.

    Every way is one relayout pass and one message to every other rank. What this rank has for itself is copied directly between
    the arrays and the buffer by heads: through MPI, it would be copied once more.

    Parameters
    ----------
    link : Link
        The ranks, and the way to them. In two steps, every number travels twice and is copied once more, but a rank sends
        ``node_size + P / node_size - 2`` messages instead of ``P - 1``.
    like : usm_ndarray
        Has the queue.
    items : tuple of Item
        What travels in one message.
    batch : int
        Batch of all arrays.
    slot : str
        Of the scratch memory: redistributions that are under way at the same time need different ones.
    by_heads : usm_ndarray, optional
        Flat memory by heads that there is already.
    keep : bool
        Receive into new memory, not into scratch memory.
    window : Window, optional
        In memory that all ranks share, for the route "shared". Then `pack` writes into the buffers by heads of the other ranks,
        `unpack` reads from them, and instead of messages the ranks wait for each other in between. That is all the order there
        has to be. A rank enters the last agreement of a call when it has read what it needs, and leaves it after all have
        entered: so the next call overwrites nothing that is still read. The buffers of a call are apart.
    """

    def __init__(
        self,
        link: mpi.Link,
        like: Any,
        items: tuple[Item, ...],
        batch: int,
        *,
        slot: str = "",
        by_heads: Any = None,
        keep: bool = False,
        window: Window | None = None,
    ) -> None:
        ranks, queue = link.ranks, like.sycl_queue
        self._link, self._queue, self._keep = link, queue, keep
        self._arrays: dict[str, Any] | None = None  # by heads, once they are asked for
        self._rest: list[Callable[[], None]] = []
        self._steps: list[tuple[Any, mpi.ExchangeBuffer, mpi.ExchangeBuffer]] = []  # to heads
        self._in_window: Any = None  # the buffer by heads where what comes is copied from it
        self._layout = layout = layout_of(ranks.rank, items, batch, link, window.starts if window else (), keep=keep)
        self._shown = keep and layout.wire is None  # whether memory by heads itself is kept, not what is made of it
        if window is not None:
            size = layout.dtype.itemsize
            self._by_rows = usm_array(window.memory, (window.memory.nbytes // size,), layout.dtype)
            if keep:
                self._in_window = self._by_rows
                self.renew(like)
            else:
                self.use(self._by_rows)
            return
        _check_numbers(layout, link)

        def memory(name: str, size: int, usm_type: str = "device") -> Any:
            return scratch(queue, f"{name} {slot}", (size,), layout.dtype, usm_type, owner=ranks.handle)

        def buffer(name: str, array: Any, blocks: Blocks) -> mpi.ExchangeBuffer:
            host = memory(f"host {name}", blocks.size, "host") if link.route.name == "host" else None
            return mpi.ExchangeBuffer(array, blocks.counts, blocks.displacements, blocks.own, host)

        if by_heads is None:
            size = layout.transfer.size_by_heads
            by_heads = empty_like(like, (size,), layout.dtype) if self._shown else memory("by heads", size)
        self._by_rows = memory("by rows", layout.transfer.size_by_rows)
        two_step = layout.two_step
        if two_step is None:
            by_rows = buffer("by rows", self._by_rows, layout.transfer.by_rows)
            self._steps = [(ranks.comm, by_rows, buffer("by heads", by_heads, layout.transfer.by_heads))]
        else:
            within, between = ranks.steps(link.node_size)
            self._members, self._groups = memory("members", two_step.members.size), memory("groups", two_step.groups.size)
            by_rows, members = (
                buffer("by rows", self._by_rows, two_step.by_rows),
                buffer("members", self._members, two_step.members),
            )
            groups, everyone = buffer("groups", self._groups, two_step.groups), buffer("by heads", by_heads, two_step.by_heads)
            self._steps = [(within, by_rows, members), (between, groups, everyone)]
        self.use(by_heads)

    def renew(self, like: Any) -> None:
        """Get new memory by heads, where what comes is kept."""
        if self._shown:
            self.use(empty_like(like, (self._layout.transfer.size_by_heads,), self._layout.dtype))

    def use(self, by_heads: Any) -> None:
        """Have this flat memory by heads."""
        self._by_heads, self._arrays = by_heads, None
        if self._steps and by_heads is not self._steps[-1][2].array:
            self._steps[-1][2].use(by_heads)

    def let_go(self) -> None:
        """Let go of memory by heads that belongs to one call alone."""
        if self._shown:
            self.use(None)
        elif self._keep:
            self._arrays = None

    def pack(self, arrays: Mapping[str, Any]) -> None:
        """Copy the arrays of the items, with the rows of this rank, to where they travel from."""
        with stage("pack"):
            sources = [_in_message(item, arrays[item.name], self._layout.dtype) for item in self._layout.items]
            for one in _packing(self._layout, self._queue, tuple(map(offset_and_strides, sources))):
                one.run(sources, [self._by_rows, self._by_heads])
                note(passes=1)

    def unpack(self, arrays: Mapping[str, Any]) -> None:
        """Copy what has come to the arrays of the items, with the rows of this rank; these are dense in the last axis.

        What several ranks have of one head is added up in rank order. If an array has another dtype than its item, it gets the
        sum rounded; if no rank has any of its heads, zeros.
        """
        items, dtype = self._layout.items, self._layout.dtype
        given = [arrays[item.name] for item in items]
        results = [_of_dtype(x, item.dtype) for item, x in zip(items, given, strict=True)]
        targets = [_in_message(item, x, dtype) for item, x in zip(items, results, strict=True)]
        with stage("unpack"):
            for one in _unpacking(self._layout, self._queue, tuple(map(offset_and_strides, targets))):
                one.run([self._by_rows, self._by_heads], targets)
                note(passes=1)
        for number, (x, result) in enumerate(zip(given, results, strict=True)):
            if number in self._layout.without_heads:
                x[...] = 0
            elif result is not x:
                copy_arrays((result,), (x,))

    def received(self) -> dict[str, Any]:
        """The items as they came to the heads of this rank, by name: views of the buffer, or copies of what it cannot show."""
        if self._in_window is not None:
            self._keep_what_came()
        arrays = self.arrays_by_heads()
        for item, columns in self._wide():
            copy_arrays((columns,), (as_columns(arrays[item.name], self._layout.dtype),))
        if self._layout.wire is not None:
            with stage("unpack"):
                for few in _threes(self._coded()):
                    copy_arrays([x for _, x in few], [arrays[item.name] for item, _ in few], wire=self._layout.wire)
        return arrays

    def _keep_what_came(self) -> None:
        """Copy what others wrote into the window: the next call uses it again."""
        transfer = self._layout.transfer
        row = transfer.batch * transfer.sizes[transfer.rank]
        before = sum(transfer.rows[: transfer.rank])
        after = before + transfer.rows[transfer.rank]
        with stage("unpack"):
            for first, rows in ((0, before), (after, sum(transfer.rows) - after)):
                source = self._layout.window[transfer.rank] + first * row
                panel = Panel(0, source, row, 0, 0, 1, 0, first * row, row, 0, 0, 1, row)
                copy_panels([self._in_window], [self._by_heads], [panel], rows=rows, batch=1)
            note(passes=1)

    def arrays_by_heads(self) -> dict[str, Any]:
        """Where the items for the heads of this rank are computed, by name: (batch, all rows, heads of this rank, width).

        A single number per head is (batch, heads, rows). If it is wider than the numbers of the message, it has memory of its
        own, from which `fill` copies it.
        """
        if self._arrays is None:
            self._arrays = self._views()
        return self._arrays

    def _views(self) -> dict[str, Any]:
        arrays = {}
        for item, columns in zip(self._layout.items, self._columns(), strict=True):
            if item.name not in self._layout.wide:
                arrays[item.name] = columns if item.width is not None else tensor.permute_dims(columns[..., 0], (0, 2, 1))
                continue
            batch, seq, heads, _ = columns.shape
            # the rows of a head follow each other, as kernels read them best
            shape = (batch, heads, seq) if item.width is None else (batch, heads, seq, item.width)
            if self._keep and item.wire is not None:
                array = empty_like(self._by_heads, shape, item.dtype)
            else:
                array = scratch(self._queue, _memory_of(item), shape, item.dtype)
            arrays[item.name] = array if item.width is None else tensor.permute_dims(array, (0, 2, 1, 3))
        return arrays

    def fill(self, arrays: Mapping[str, Any]) -> None:
        """Copy what was computed in memory of its own to where it travels from; the rest is there already."""
        for item, columns in self._wide():
            copy_arrays((as_columns(arrays[item.name], self._layout.dtype),), (columns,))
        if self._layout.wire is not None:
            with stage("pack"):
                for few in _threes(self._coded()):
                    copy_arrays([arrays[item.name] for item, _ in few], [x for _, x in few], wire=self._layout.wire)

    def _columns(self) -> list[Any]:
        """The items in the buffer by heads, (batch, all rows, heads of this rank, columns)."""
        transfer = self._layout.transfer
        size = transfer.sizes[transfer.rank]
        views, first = [], self._layout.by_heads_start
        for item, width in zip(self._layout.items, self._layout.widths, strict=True):
            count = item.heads[transfer.rank][1]
            shape = transfer.batch, sum(transfer.rows), count, width
            views.append(view(self._by_heads, first, shape, (size, transfer.batch * size, width, 1)))
            first += count * width
        return views

    def _wide(self) -> Iterator[tuple[Item, Any]]:
        """Every single number that needs memory of its own, with its columns."""
        if self._layout.wide:
            for item, columns in zip(self._layout.items, self._columns(), strict=True):
                if item.name in self._layout.wide and item.wire is None:
                    yield item, columns

    def _coded(self) -> list[tuple[Item, Any]]:
        """Every item that travels as something else, with its columns."""
        pairs = zip(self._layout.items, self._columns(), strict=True)
        return [(item, columns) for item, columns in pairs if item.wire is not None]

    def start_to_heads(self) -> None:
        """Send what was packed, receive all rows of the heads of this rank."""
        if self._layout.window:
            self._meet("scatter", sum(self._layout.transfer.counts_by_rows))
        else:
            self._start("scatter", self._steps, to_heads=True)

    def start_to_rows(self) -> None:
        """Send what is by heads, receive what `unpack` needs."""
        if self._layout.window:
            self._meet("gather", sum(self._layout.transfer.by_heads.counts))
        else:
            self._start("gather", [(comm, target, source) for comm, source, target in reversed(self._steps)], to_heads=False)

    def _meet(self, name: str, numbers: int) -> None:
        meeting = mpi.Meeting(name, self._link.ranks.comm, numbers * self._layout.dtype.itemsize)
        self._rest = [meeting.wait]
        meeting.start(blocking=self._link.blocking)

    def _start(self, name: str, steps: list[tuple[Any, mpi.ExchangeBuffer, mpi.ExchangeBuffer]], *, to_heads: bool) -> None:
        first, *others = [mpi.AllToAll(name, *step) for step in steps]
        self._rest = [first.wait]
        for other in others:
            self._rest += [partial(self._turn, to_heads=to_heads), partial(other.start, blocking=True)]
        first.start(blocking=self._link.blocking)

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

    def _turn(self, *, to_heads: bool) -> None:
        """Between two steps: from the order of the members of this group to that of the groups, or back."""
        two_step, panels = self._layout.two_step, defaultdict(list)
        assert two_step is not None
        for (member, group), before, after in two_step.blocks:
            width = two_step.widths[group]
            source, target = (before, after) if to_heads else (after, before)
            panels[two_step.rows[member]].append(Panel(*source, width, 0, 0, 1, *target, width, 0, 0, 1, width))
        sides = [self._members, self._by_rows], [self._groups, self._by_heads]
        with stage("turn"):
            for rows, of_these in panels.items():
                copy_panels(*(sides if to_heads else sides[::-1]), of_these, rows=rows, batch=1)
            note(passes=1)


def as_columns(x: Any, dtype: np.dtype) -> Any:
    """A view of numbers (batch, heads, seq) in another dtype, (batch, seq, heads, columns): two of 16 bits for one of 32."""
    batch, heads, seq = x.shape
    columns = x.dtype.itemsize // dtype.itemsize
    of_batch, of_head, of_row = (stride * columns for stride in x.strides)
    strides, offset = (of_batch, of_row, of_head, 1), x._element_offset * columns
    return usm_array(x.usm_data, (batch, seq, heads, columns), dtype, strides, offset)


def _of_dtype(x: Any, dtype: np.dtype) -> Any:
    """The array itself, or memory for its numbers in another dtype."""
    return x if x.dtype == dtype else empty_like(x, x.shape, dtype)


def _threes(things: list[_Thing]) -> Iterator[list[_Thing]]:
    """As many as one launch takes."""
    return (things[n : n + MAX_TARGETS] for n in range(0, len(things), MAX_TARGETS))


def _memory_of(item: Item) -> str:
    """The slot of the scratch memory for an item by heads that its message cannot show."""
    return f"{item.name} of all rows"


def _in_message(item: Item, x: Any, dtype: np.dtype) -> Any:
    """An array of an item as its message holds it, (batch, rows, heads, columns)."""
    return x if item.width is not None else as_columns(x, dtype)


class _Layout:
    """Where the items of one redistribution lie in its buffers: all that does not depend on their memory."""

    def __init__(
        self, rank: int, items: tuple[Item, ...], batch: int, node_size: int, window: tuple[int, ...], *, keep: bool
    ) -> None:
        self.items, self.dtype = items, dtype_of_message(items)
        self.widths = tuple(item.columns(self.dtype) for item in items)
        self.wide = {item.name for item in items if item.dtype != self.dtype}
        self.wire = next((item.wire for item in items if item.wire is not None), None)
        self.without_heads = {n for n, item in enumerate(items) if not any(count for _, count in item.heads)}  # on any rank
        self.transfer = transfer_of(rank, items, batch)
        self.two_step = TwoStep(self.transfer, node_size) if node_size else None
        # of the blocks of the ranks in the buffer by rows, or in the buffers by heads of these ranks
        self.starts = self.two_step.starts_by_rows if self.two_step else self.transfer.by_rows.displacements
        self.window = tuple(start // self.dtype.itemsize for start in window)
        if window:
            rows = sum(self.transfer.rows[:rank]) * batch
            self.starts = tuple(start + rows * size for start, size in zip(self.window, self.transfer.sizes, strict=True))
        self.by_heads_start = self.window[rank] if window and not keep else 0

    def largest_number(self) -> int:
        """The largest count or displacement that MPI gets for it."""
        sides = [self.transfer.by_rows, self.transfer.by_heads]
        if self.two_step:
            sides = [self.two_step.by_rows, self.two_step.members, self.two_step.groups, self.two_step.by_heads]
        return max(max(*blocks.counts, *blocks.displacements) for blocks in sides)


@lru_cache(maxsize=256)
def _layout(rank: int, items: tuple[Item, ...], batch: int, node_size: int, window: tuple[int, ...], *, keep: bool) -> _Layout:
    return _Layout(rank, items, batch, node_size, window, keep=keep)


def layout_of(
    rank: int, items: tuple[Item, ...], batch: int, link: mpi.Link, window: tuple[int, ...] = (), *, keep: bool = False
) -> _Layout:
    """The layout of items for a rank; in a window, with the buffers by heads of the ranks from these bytes on."""
    return _layout(rank, items, batch, link.node_size if link.two_steps else 0, window, keep=keep)


class Window(NamedTuple):
    """Where the items of one redistribution are in memory that all ranks share."""

    memory: Any
    starts: tuple[int, ...]  # of the buffers by heads, in bytes, by rank


def windows_for(
    link: mpi.Link, queue: Any, messages: tuple[tuple[Item, ...], ...], batch: int, *, known: bool = False
) -> Iterator[Window | None]:
    """Where each message is in memory that the ranks share; None for all where they do not.

    Collective, unless it is `known` that all ranks have the memory.
    """
    if link.route.name != "shared":
        return repeat(None)
    layout = window_of(messages, batch)
    memory = mpi.shared_memory(link.ranks, queue, layout.bounds, known=known)
    return (Window(memory, starts) for starts in layout.starts)


def _check_numbers(layout: _Layout, link: mpi.Link) -> None:
    """Check that the MPI library can count what every rank exchanges. All ranks know this of all, so all raise the same."""
    transfer, most = layout.transfer, mpi.most_elements()
    if (
        most == math.inf
        or max(max(transfer.rows) * sum(transfer.sizes), sum(transfer.rows) * max(transfer.sizes)) * transfer.batch <= most
    ):
        return
    for rank in range(link.ranks.size):
        n = layout_of(rank, layout.items, transfer.batch, link).largest_number()
        if n > most:
            raise NotImplementedError(
                f"rank {rank} would exchange {n} numbers, and the MPI library counts to {most}: it needs one that has MPI 4"
            )


class _Block(NamedTuple):
    """The heads of one item that one rank has by heads, and the rows that this rank has by rows."""

    item: int
    first: int
    heads: int
    width: int
    position: tuple[int, int, int, int, int]  # the buffer; offset, strides of rows, batch and heads


def _blocks(layout: _Layout) -> Iterator[_Block]:
    """What there is of every item for or from every rank, in rank order."""
    transfer = layout.transfer
    for peer, start in enumerate(layout.starts):
        buffer, size = BY_ROWS, transfer.sizes[peer]
        if peer == transfer.rank:
            buffer, start = BY_HEADS, layout.by_heads_start + transfer.by_heads.own.start
        for number, (item, columns) in enumerate(zip(layout.items, layout.widths, strict=True)):
            first, heads = item.heads[peer]
            width = columns if item.wire is None else item.numbers
            yield _Block(number, first, heads, width, (buffer, start, transfer.batch * size, size, columns))
            start += heads * columns


@freed_with_workspace
@lru_cache(maxsize=128)
def _packing(layout: _Layout, queue: Any, strides: tuple[tuple[int, ...], ...]) -> list[Relayout]:
    """From arrays with these offsets and strides to the two buffers."""
    panels = [
        (block.item, Panel(*source_at(block.item, strides[block.item], block.first), *block.position, block.heads, block.width))
        for block in _blocks(layout)
    ]
    return _of_rows(layout, queue, panels, back=False)


@freed_with_workspace
@lru_cache(maxsize=128)
def _unpacking(layout: _Layout, queue: Any, strides: tuple[tuple[int, ...], ...]) -> list[Relayout]:
    """From the two buffers to arrays with these offsets and strides."""
    panels, covered = [], [0] * len(strides)  # heads of each item that the ranks so far have brought
    for block in _blocks(layout):
        number, first = block.item, block.first
        buffer, start, row, batch, head = block.position
        again = min(max(covered[number] - first, 0), block.heads)
        covered[number] = max(covered[number], first + block.heads)
        for skip, heads, add in ((0, again, 1), (again, block.heads - again, 0)):
            source = (buffer, start + skip * head, row, batch, head, 1)
            target = target_at(number, strides[number], first + skip)
            panels.append((number, Panel(*source, *target, heads, block.width, add=add)))
    return _of_rows(layout, queue, panels, back=True)


def _of_rows(layout: _Layout, queue: Any, panels: list[tuple[int, Panel]], *, back: bool) -> list[Relayout]:
    """The copies of panels, by the numbers of their items, that have the rows of this rank: one for each way to travel."""
    transfer, passes = layout.transfer, []
    for wire in dict.fromkeys(item.wire for item in layout.items):
        dtype = next(item.dtype for item in layout.items if item.wire == wire) if wire else layout.dtype
        of_wire = tuple(panel for number, panel in panels if layout.items[number].wire == wire)
        source, target = (layout.dtype, dtype) if back else (dtype, layout.dtype)
        passes.append(Relayout(queue, source, target, of_wire, transfer.rows[transfer.rank], transfer.batch, wire))
    return passes


def scratch_bytes(items: tuple[Item, ...], transfer: Transfer, slot: str) -> dict[str, int]:
    """Bytes of the slots of scratch memory that a `Redistribution` in one step takes on the device."""
    dtype = dtype_of_message(items)
    sizes = {f"by rows {slot}": (transfer.size_by_rows, dtype), f"by heads {slot}": (transfer.size_by_heads, dtype)}
    for item in items:
        if item.dtype != dtype:
            heads = item.heads[transfer.rank][1]
            sizes[_memory_of(item)] = transfer.batch * sum(transfer.rows) * heads * item.numbers, item.dtype
    return {name: max(size, 1) * of.itemsize for name, (size, of) in sizes.items()}
