"""The one path of every distributed call: items to heads → compute → items to rows.

What a call moves is two lists of items. All that depends on what it computes is in these lists, in the arrays that it starts
with, and in the function between the two redistributions.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._ranks.agree import CollectiveCall
from ._ranks.partition import Item, kv_heads_are_shared, kv_shares, query_shares, trips
from ._ranks.redistribution import Redistribution, windows_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ._call.checks import Geometry
    from ._ranks import mpi
    from ._ranks.agree import Agreement
    from ._ranks.partition import Heads
    from ._ranks.redistribution import Window
    from ._ring import Ring

Arrays = dict[str, Any]  # USM arrays by the names of items


class Lists(NamedTuple):
    """What a call moves, in both directions; either list may be empty."""

    to_heads: tuple[Item, ...]
    to_rows: tuple[Item, ...]


@lru_cache(maxsize=256)
def forward_lists(
    geometry: Geometry,
    dtype: np.dtype,
    heads: tuple[Heads, ...],
    q_rows: tuple[int, ...],
    k_rows: tuple[int, ...],
    *,
    lse: bool,
    wire: str | None = None,
) -> Lists:
    """What attention moves for these heads of every rank, in arrays of this dtype: q, k and v; out, and lse if it is wanted."""
    of_q, of_kv, width, width_v = query_shares(heads), kv_shares(heads), geometry.head_dim, geometry.head_dim_v
    out = Item("out", of_q, q_rows, width_v, dtype, wire)
    return Lists(
        (
            Item("q", of_q, q_rows, width, dtype, wire),
            Item("k", of_kv, k_rows, width, dtype, wire),
            Item("v", of_kv, k_rows, width_v, dtype, wire),
        ),
        (out, Item("lse", of_q, q_rows, None, np.dtype(geometry.compute_dtype))) if lse else (out,),
    )


@lru_cache(maxsize=256)
def gradient_lists(
    geometry: Geometry,
    dtype: np.dtype,
    heads: tuple[Heads, ...],
    q_rows: tuple[int, ...],
    k_rows: tuple[int, ...],
    *,
    context: bool,
    wire: str | None = None,
) -> Lists:
    """What the gradient of attention moves: dout and delta, and if no context has kept them q, lse, k and v; dq, dk and dv.

    Gradients of kv heads that several ranks read are added up, and travel in the dtype of the computation.
    """
    of_q, of_kv, width, width_v = query_shares(heads), kv_shares(heads), geometry.head_dim, geometry.head_dim_v
    compute = np.dtype(geometry.compute_dtype)
    of_sum = compute if kv_heads_are_shared(heads) else dtype
    kept = (
        Item("q", of_q, q_rows, width, dtype, wire),
        Item("lse", of_q, q_rows, None, compute),
        Item("k", of_kv, k_rows, width, dtype, wire),
        Item("v", of_kv, k_rows, width_v, dtype, wire),
    )
    return Lists(
        (
            Item("dout", of_q, q_rows, width_v, dtype, wire),
            Item("delta", of_q, q_rows, None, compute),
            *(() if context else kept),
        ),
        (
            Item("dq", of_q, q_rows, width, of_sum, wire),
            Item("dk", of_kv, k_rows, width, of_sum, wire),
            Item("dv", of_kv, k_rows, width_v, of_sum, wire),
        ),
    )


class Description(NamedTuple):
    """A distributed call: what it moves, and what it computes in between."""

    name: str  # of its scratch memory
    like: Any  # has its queue
    batch: int
    parts: Sequence[Lists]  # while one is computed, others travel
    begin: Callable[[], tuple[Arrays, Arrays]]  # returns the arrays by rows that are sent, and those that are filled
    compute: Callable[[int, Arrays], Any]  # of a part, by its number: reads and writes arrays by heads
    keep: bool = False  # whether what comes to heads is new memory
    by_heads: Any = None  # flat memory by heads from which everything goes to rows, if there is one already
    ring: Ring | None = None  # what computes with the keys of other groups, before `compute`


class _Part:
    """The redistributions of one part; items that are split into rows alike travel in one message."""

    def __init__(self, what: Description, link: mpi.Link, number: int, windows: Iterator[Window | None]) -> None:
        to_heads, to_rows = what.parts[number]
        messages = count()

        def new(items: tuple[Item, ...], **memory: Any) -> Redistribution:
            slot = slot_of(what.name, number, next(messages))
            return Redistribution(link, what.like, items, what.batch, slot=slot, window=next(windows), **memory)

        self.to_heads = [new(items, keep=what.keep) for items in trips(to_heads)]
        self.to_rows = [new(items, by_heads=what.by_heads) for items in trips(to_rows)]
        self._results = self.to_rows if what.by_heads is None else []  # that still have to be computed

    def begin(self, what: Description) -> None:
        """Take what belongs to a call alone."""
        if what.by_heads is not None:
            for move in self.to_rows:
                move.use(what.by_heads)

    def renew(self, like: Any) -> None:
        """Get what has to be new in every call."""
        for move in self.to_heads:
            move.renew(like)

    def end(self, what: Description) -> None:
        """Let go of what belongs to a call alone."""
        for move in self.to_heads:
            move.let_go()
        if what.by_heads is not None:
            for move in self.to_rows:
                move.use(None)

    def at_hand(self) -> Arrays:
        """All items by heads: those that came, and memory for those that go back."""
        arrays: Arrays = {}
        for move in self.to_heads:
            arrays |= move.received()
        for move in self._results:
            arrays |= move.arrays_by_heads()
        return arrays

    def fill(self, arrays: Arrays) -> None:
        """What was computed, to where it is sent from."""
        for move in self._results:
            move.fill(arrays)


def renew(parts: list[_Part], like: Any) -> None:
    """Get what has to be new in every call, for one that repeats the one that has left these parts."""
    for part in parts or ():
        part.renew(like)


def slot_of(call: str, part: int, message: int) -> str:
    """The name of the scratch memory of one message."""
    return f"{call} {part}.{message}"


def run(
    function: str, agreement: Agreement[Any], ranks: mpi.Ranks, link: mpi.Link, what: Description
) -> tuple[Arrays, list[Any]]:
    """Pack, all-to-all, compute, all-to-all, unpack: while one part is computed, the next one and the last one travel.

    Collective. Raises on all ranks, whatever fails on one.

    Parameters
    ----------
    function : str
        Name of the public function, for messages.
    agreement : Agreement
        Of the ranks on this call.
    ranks : Ranks
        All ranks of the call.
    link : Link
        Those that share the heads, and the way between them.
    what : Description
        The call.

    Returns
    -------
    results : dict
        The arrays by rows that were filled.
    outcomes : list
        What `compute` returned for every part.
    """
    call = CollectiveCall(ranks, function)

    def prepare() -> list[_Part]:
        # first what all ranks do together: from there on, one may fail alone
        messages = tuple(items for part in what.parts for way in part for items in trips(way))
        windows = windows_for(link, what.like.sycl_queue, messages, what.batch, known=agreement.repeated)
        if what.ring is not None:
            what.ring.prepare()
        return [_Part(what, link, n, windows) for n in range(len(what.parts))]

    parts = call.prepare(agreement, prepare, lasts=what.ring is None)
    for part in parts:
        part.begin(what)
    arrays, results = call.local(what.begin) or ({}, {})
    outcomes: list[Any] = []

    def send(part: _Part) -> None:
        for move in part.to_heads:
            call.local(move.pack, arrays)
            call.exchange(move.start_to_heads)

    try:
        send(parts[0])
        for number, (part, following) in enumerate(zip_longest(parts, parts[1:])):
            if following is not None:
                send(following)
            for move in part.to_heads:
                call.exchange(move.wait)
            at_hand = call.local(part.at_hand)
            if what.ring is not None:
                what.ring.compute(call, at_hand)
            outcomes.append(call.local(what.compute, number, at_hand))
            call.local(part.fill, at_hand)
            for move in part.to_rows:
                call.exchange(move.start_to_rows)
        for part in parts:
            for move in part.to_rows:
                call.exchange(move.wait)
                call.local(move.unpack, results)
    finally:
        for part in parts:  # whatever happened: MPI must not write into memory that is used again
            for move in (*part.to_heads, *part.to_rows):
                call.exchange(move.wait)
            part.end(what)
    call.confirm()
    return results, outcomes
