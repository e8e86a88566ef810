"""The memory of a call that is planned: what users have, and every slot of scratch memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ulysses_dp.kernels.schedules import KINDS, NO_WISHES, choose

from .._device.dtypes import DTYPES
from .._device.workspace import ALIGNMENT
from .._ranks.orders import count
from .._ranks.redistribution import scratch_bytes
from ..backends.intel_sycl import HEAD_MAJOR_FROM

if TYPE_CHECKING:
    from ulysses_dp.kernels.schedules import Schedule

    from .._itinerary import Itinerary
    from .._ranks.partition import Heads
    from .problem import Message, Problem


def memory_of(problem: Problem, rank: int) -> dict[str, int]:
    """Bytes on the device of a rank after the calls: the user's arrays, the results, and every slot of scratch memory."""
    rows = problem.rows[rank]
    width, width_v = problem.widths
    row_of_q, row_of_out = (problem.batch * problem.heads * n * problem.itemsize for n in (width, width_v))
    row_of_kv = problem.batch * problem.kv_heads * (width + width_v) * problem.itemsize
    lse = problem.batch * problem.heads * rows * problem.compute_itemsize
    uses = {"inputs": rows * (row_of_q + row_of_kv), "results": rows * row_of_out}
    if problem.backward:
        gradients = rows * (row_of_q + row_of_kv)
        uses["inputs"] += rows * row_of_out
        uses["results"] += lse + gradients
        if problem.ranks > 1:
            _, back = problem.messages(gradient=True)
            if back.first_itemsize != problem.itemsize:
                uses["gradients before rounding"] = gradients // problem.itemsize * back.first_itemsize
    return uses | _scratch(problem, rank)


def _scratch(problem: Problem, rank: int) -> dict[str, int]:
    """Bytes that each slot of `workspace.scratch` has after the calls, on a rank."""
    slots = _Slots()
    share, several = problem.share(rank), problem.ranks > 1
    seq = sum(problem.rows_of_group(rank))
    rows_size = problem.batch * problem.rows[rank] * problem.heads

    def travel(*messages: Message) -> None:
        for message in messages if several else ():
            for slot, nbytes in scratch_bytes(message.items, message.transfer(problem, rank), message.slot).items():
                slots.need(slot, nbytes, 1)

    travel(*problem.messages())
    # what came as codes was made numbers again head by head
    apart = several and problem.wire is None
    alone = not several
    by_head = {"by_head": apart or (alone and share.q_count > 1), "kv_by_head": apart or (alone and share.kv_count > 1)}
    group = _Attended(problem, share, seq, seq, **by_head)
    ring = problem.travels and _RingMemory(problem, problem.travels, rank)
    if ring:
        ring.forward(slots)
    else:
        group.forward(slots, lse=problem.backward)
    if not problem.backward:
        return slots
    if problem.converts:
        slots.need("dout, out", 2 * rows_size * problem.widths[1], problem.compute_itemsize)
    slots.need("delta", rows_size, problem.compute_itemsize)
    travel(*problem.messages(gradient=True))
    if ring:
        ring.backward(slots)
    else:
        group.backward(slots, problem.messages(gradient=True)[1].first_itemsize if several else problem.itemsize)
    return slots


class _Slots(dict[str, int]):
    """Bytes by slot."""

    def need(self, slot: str, elements: int, itemsize: int) -> None:
        """A slot is as large as the most that it was ever asked for."""
        self[slot] = max(self.get(slot, 0), -(-max(elements, 1) * itemsize // ALIGNMENT) * ALIGNMENT)


class _Attended(NamedTuple):
    """Some rows and keys of the heads of a rank, as the backend gets them."""

    problem: Problem
    share: Heads
    rows: int
    keys: int
    by_head: bool  # whether other numbers lie between the rows of a head of q
    kv_by_head: bool  # and of k and v

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of q, and of k, as wide as the kernels read them."""
        width = self.problem.batch * max(self.problem.widths)
        return width * self.rows * self.share.q_count, width * self.keys * self.share.kv_count

    @property
    def _dtype(self) -> str:
        return DTYPES[self.problem.dtype].compute

    def _schedule(self, *, backward: bool) -> Schedule:
        device = KINDS["gpu" if self.problem.gpu else "cpu"]
        stored = DTYPES[self.problem.dtype].stored
        return choose(device, stored, max(self.problem.widths), self.rows, backward=backward, wishes=NO_WISHES)

    def _converts(self, schedule: Schedule) -> bool:
        """Whether it reads arrays of another dtype than they have."""
        stored = np.dtype(DTYPES[self.problem.dtype].stored)
        return schedule.operands[stored] != stored

    def _scratch(self, slots: _Slots, *, backward: bool) -> None:
        """What the schedule takes."""
        problem, share, width = self.problem, self.share, max(self.problem.widths)
        shapes = (problem.batch, self.rows, share.q_count, width), (problem.batch, self.keys, share.kv_count, width)
        for slot, size in self._schedule(backward=backward).scratch(self._dtype, *shapes, backward=backward).items():
            slots.need(slot, size, problem.compute_itemsize)

    @property
    def _walks_far(self) -> bool:
        return self.rows * max(self.problem.widths) >= HEAD_MAJOR_FROM

    def _widened(self, slots: _Slots, arrays: str, results: str, itemsize: int) -> None:
        """What arrays of q and out (q), of k and v (k), get where q and v have two widths: the narrow ones, and all results."""
        sizes, (width, width_v) = dict(zip("qk", self.sizes, strict=True)), self.problem.widths
        if width == width_v:
            return
        for number, name in enumerate(arrays):
            if (width_v if name in "ov" else width) < max(width, width_v):
                slots.need(f"wide {number}", sizes["q" if name in "oq" else "k"], self.problem.itemsize)
        for number, name in enumerate(results):
            slots.need(f"wide result {number}", sizes[name], itemsize)

    def forward(self, slots: _Slots, *, lse: bool) -> None:
        """What the kernels need for the result, which is not rounded by them in a ring; and for lse, if that is not wanted."""
        problem, (q_size, kv_size), compute = self.problem, self.sizes, self.problem.compute_itemsize
        if not q_size:
            return
        self._widened(slots, "qkv", "q", compute if problem.travels is not None else problem.itemsize)
        if not lse:  # the kernels write it whether it is wanted or not
            slots.need("lse", problem.batch * self.rows * self.share.q_count, compute)
        schedule = self._schedule(backward=False)
        converts = self._converts(schedule)
        if converts:
            slots.need("q", q_size, compute)
            if problem.travels is None:
                slots.need("result before rounding", q_size, compute)
        by_head = self._walks_far and schedule.by_head
        if converts or (by_head and self.kv_by_head and kv_size):
            slots.need("k, v", 2 * kv_size, compute)
        self._scratch(slots, backward=False)

    def backward(self, slots: _Slots, itemsize: int) -> None:
        """What the kernels need for gradients in arrays of this itemsize."""
        problem, (q_size, kv_size), compute = self.problem, self.sizes, self.problem.compute_itemsize
        if not q_size:
            return
        self._widened(slots, "oqkv", "qkk", itemsize)
        by_head = self._walks_far and self._schedule(backward=True).by_head
        if problem.converts or (by_head and self.by_head):
            slots.need("dout, q", 2 * q_size, compute)
        if problem.converts or (by_head and self.kv_by_head and kv_size):
            slots.need("k, v", 2 * kv_size, compute)
        self._scratch(slots, backward=True)
        if itemsize != compute:
            for number, size in enumerate((q_size, kv_size, kv_size)):
                slots.need(f"gradient {number}", size, compute)


class _RingMemory:
    """What a rank of a ring has besides: the keys that visit it, and running results."""

    def __init__(self, problem: Problem, travels: Itinerary, rank: int) -> None:
        self._problem, self._share = problem, problem.share(rank)
        self._group, self._widths = rank // problem.group, [problem.batch * width for width in problem.widths]
        self._travels, self._rows = travels, sum(problem.rows_of_group(rank))
        numbers = [sum(self._widths) * self._share.kv_count * count(keys) for keys in travels.keys]
        self._most, self._own = max(numbers), numbers[self._group]
        self._places = range(problem.ring if travels.gathers else 2)

    def forward(self, slots: _Slots) -> None:
        """Of attention."""
        problem, heads, compute = self._problem, self._share.q_count, self._problem.compute_itemsize
        for place in self._places:
            slots.need(f"ring keys {place}", self._most, problem.itemsize)
        if problem.converts:
            slots.need("ring out", self._widths[1] * self._rows * heads, compute)
        for number in range(2):
            slots.need(f"ring lse {number}", problem.batch * self._rows * heads, compute)
        met = set()
        for owner in self._met():
            for rows, keys in self._segments(owner):
                if rows.start in met:
                    slots.need("ring part", self._widths[1] * (rows.stop - rows.start) * heads, compute)
                    slots.need("ring part lse", problem.batch * (rows.stop - rows.start) * heads, compute)
                met.add(rows.start)
                self._attended(rows, keys).forward(slots, lse=True)

    def backward(self, slots: _Slots) -> None:
        """Of the gradient."""
        problem, share, compute = self._problem, self._share, self._problem.compute_itemsize
        for place in self._places:
            slots.need(f"ring keys {place}", self._most, problem.itemsize)
            slots.need(f"ring sums {place}", self._most, compute)
        slots.need("ring sums at home", self._own, compute)
        for hop in self._places[1:] if self._travels.gathers else ():
            slots.need(f"ring sums of {hop}", self._own, compute)
        if problem.messages(gradient=True)[1].first_itemsize != compute:
            slots.need("ring dq", self._widths[0] * self._rows * share.q_count, compute)
        for owner in self._met():
            for rows, keys in self._segments(owner):
                attended = self._attended(rows, keys)
                of_q, of_kv = attended.rows * share.q_count, attended.keys * share.kv_count
                width, width_v = self._widths
                for number, size in enumerate((of_q * width, of_kv * width, of_kv * width_v)):
                    slots.need(f"ring gradient {number}", size, compute)
                attended.backward(slots, compute)

    def _met(self) -> list[int]:
        """Whose keys this group meets, one after the other."""
        return [self._travels.owner(self._group, hop) for hop in range(self._problem.ring)]

    def _segments(self, owner: int) -> list[tuple[slice, slice]]:
        return [(rows, keys) for rows, keys, *_ in self._travels.meetings(self._group, owner)]

    def _attended(self, rows: slice, keys: slice) -> _Attended:
        """The keys that travel lie head by head."""
        return _Attended(self._problem, self._share, rows.stop - rows.start, keys.stop - keys.start, True, False)
