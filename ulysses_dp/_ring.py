"""The ring inside a call: keys travel from group to group of ranks while results are merged where they lie.

The rows of a rank stay. Its keys visit the groups after its own, one after the other, as far as some row there sees them; what
nobody sees does not travel. Partial results are merged in the dtype of the computation and rounded once, at the end: merging in
16 bits is what ring implementations fail by. All sums have the order of the ring, so repetition is bit-identical. The gradients
of keys travel behind them, and come home with the last hop (Liu et al., arXiv:2310.01889).

Or every group sends its keys straight to all that see them, and gets back what these have of their gradients, which it adds up
in the order of the groups: more memory, and nothing is sent on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ulysses_dp.kernels import merge_rows
from ulysses_dp.kernels.score import largest_exact_lse

from . import _local
from ._device.arrays import tensor, view
from ._device.copies import copy_arrays
from ._device.trace import note
from ._device.workspace import scratch
from ._itinerary import itinerary
from ._ranks import mpi
from ._ranks.orders import count, slices
from ._ranks.partition import HeadMap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._call.checks import Geometry
    from ._call.options import Options
    from ._itinerary import Itinerary
    from ._mesh import Placement
    from ._ranks.agree import CollectiveCall
    from ._ranks.partition import Heads

Arrays = dict[str, Any]
Memory = tuple[Any, Any]  # a flat array, and one in host memory through which its bytes go, or None


def new_ring(
    placement: Placement, route: mpi.Route, like: Any, geometry: Geometry, options: Options, heads: Heads, **of_gradients: Any
) -> Ring | None:
    """What computes where one group does not hold all rows in their order."""
    ranks, ring, kv, rows, keys = placement.ranks, placement.ring, placement.kv, placement.rows, placement.keys
    travels = itinerary(rows, keys, ring, options.mask, gathers=kv == "all_gather")
    return Ring(ranks, travels, route, like, geometry, options, heads, **of_gradients) if travels else None


class Ring:
    """The groups of a mesh as one rank sees them: who holds which rows and keys, and the memory in which keys travel.

    Parameters
    ----------
    ranks : Ranks
        Of the call.
    travels : Itinerary
        Which keys are where, and when.
    route : Route
        How bytes reach MPI.
    like : usm_ndarray
        Has the queue and the dtype.
    geometry, options
        Of the call.
    heads : Heads
        Of this rank.
    backward : bool
        Whether gradients travel, too.
    kept : dict
        What an earlier call has kept of the arrays by heads.
    """

    def __init__(
        self,
        ranks: mpi.Ranks,
        travels: Itinerary,
        route: mpi.Route,
        like: Any,
        geometry: Geometry,
        options: Options,
        heads: Heads,
        *,
        backward: bool = False,
        kept: Arrays | None = None,
    ) -> None:
        _, self._ranks = ranks.mesh(travels.size)
        self._backward, self._travels, self._gathers = backward, travels, travels.gathers
        self._size, self._position, self._by_host = travels.size, self._ranks.rank, route.name == "host"
        self.geometry, self.options, self.kept = geometry, options, kept or {}
        self.heads, self.kv_heads = HeadMap(geometry.group, heads.shift, heads.q_start), heads.kv_count
        self.compute_dtype, self.queue = np.dtype(geometry.compute_dtype), like.sycl_queue
        self._dtype = like.dtype
        self.running: Any = None  # what the last `compute` has come to; after a failure, nobody asks for it

    def prepare(self) -> None:
        """Get the memory in which keys travel."""
        most, mine = max(map(self._numbers, range(self._size))), self._numbers(self._position)
        places = self._size if self._gathers else 2
        self._moving = [self._memory(f"keys {n}", most, self._dtype) for n in range(places)]
        if self._backward:
            self._sums = [self._memory(f"sums {n}", most, self.compute_dtype) for n in range(places)]
            self._home = self._memory("sums at home", mine, self.compute_dtype)
            others = range(1, self._size) if self._gathers else ()
            self._shares = {hop: self._memory(f"sums of {hop}", mine, self.compute_dtype) for hop in others}

    def compute(self, call: CollectiveCall, arrays: Arrays | None) -> None:
        """Attention, or its gradients, of the rows of this group and the keys of all. Collective.

        `arrays` is None if this rank has failed: it takes part in the exchanges all the same.
        """
        if self._backward and self._gathers:
            self._differentiate_gathered(call, arrays)
        elif self._backward:
            self._differentiate(call, arrays)
        else:
            self._attend(call, arrays)

    def _attend(self, call: CollectiveCall, arrays: Any) -> None:
        self.running = call.local(_Forward, self, arrays)
        for hop, shift in enumerate(self._keys_on_their_way(call)):
            if self._are_here(hop):
                call.local(lambda hop=hop: self.running.meet(self._owner(hop), self._at_hand(self._moving, hop)))
            call.exchange(shift.wait)

    def _differentiate(self, call: CollectiveCall, arrays: Any) -> None:
        self.running = call.local(_Backward, self, arrays)
        reach = self._travels.reach(self._position)
        back = self._parcel(self._home, self._position, reach, tag=-1) if reach else None
        homecoming, sums = mpi.Shift(self._ranks.comm, None, back), mpi.Shift(self._ranks.comm, None, None)
        call.exchange(homecoming.start)
        for hop, shift in enumerate(self._keys_on_their_way(call)):
            call.exchange(sums.wait)
            if self._are_here(hop):
                call.local(
                    lambda hop=hop: self.running.meet(
                        self._owner(hop),
                        self._at_hand(self._moving, hop),
                        self._at_hand(self._sums, hop) if hop or reach else self.sums,
                        first=hop == 0,
                    )
                )
            sums = self._shift_sums(hop)
            call.exchange(sums.start)
            call.exchange(shift.wait)
        call.exchange(sums.wait)
        call.exchange(homecoming.wait)

    def _differentiate_gathered(self, call: CollectiveCall, arrays: Any) -> None:
        self.running = call.local(_Backward, self, arrays)
        ways_home = []
        for hop, shift in enumerate(self._keys_on_their_way(call)):
            if self._are_here(hop):
                call.local(
                    lambda hop=hop: self.running.meet(
                        self._owner(hop), self._at_hand(self._moving, hop), self._at_hand(self._sums, hop), first=True
                    )
                )
            ways_home.append(self._send_home(hop))
            call.exchange(ways_home[-1].start)
            call.exchange(shift.wait)
        for way in ways_home:
            call.exchange(way.wait)
        call.local(self._add_up)

    def _send_home(self, hop: int) -> mpi.Shift:
        """Send the gradients of the keys from so many groups back to these, and get those of as many ahead for the own keys."""
        if not hop:
            return mpi.Shift(self._ranks.comm, None, None)
        sent = self._travels.sums_sent(self._position, hop)
        received = self._travels.sums_sent((self._position + hop) % self._size, hop)
        return mpi.Shift(
            self._ranks.comm,
            sent and self._parcel(self._sums[hop], sent.owner, -hop, tag=self._size + hop),
            received and self._parcel(self._shares[hop], self._position, hop, tag=self._size + hop),
        )

    def _add_up(self) -> None:
        """The gradients of the own keys, of all groups that have seen them, in the order of the groups."""
        for x in self.sums:
            x[...] = 0
        for group in range(self._size):
            hop = (group - self._position) % self._size
            if not hop or self._travels.sees(group, self._position):
                share = self._shares[hop][0] if hop else self._sums[0][0]
                copy_arrays(self._views(share, self._position), self.sums, add=True)

    @property
    def sums(self) -> list[Any]:
        """The gradients of the keys of this group, after all hops."""
        return self._views(self._home[0], self._position)

    def load(self, k: Any, v: Any) -> None:
        """Copy the keys of this group to where they travel from."""
        copy_arrays((k, v), self._views(self._moving[0][0], self._position))

    def row_slices(self) -> list[slice]:
        """Where the segments of the rows of this group lie."""
        return [where for where, _ in slices(self._travels.rows[self._position])]

    def meetings(self, owner: int) -> list[tuple[slice, slice, Options]]:
        """What the rows of this group see of the keys of another: where both lie, and the options for them."""
        found = self._travels.meetings(self._position, owner)
        return [(rows, keys, self.options.of_block(block)) for rows, keys, block, _ in found]

    def note_pairs(self, owner: int, heads: int) -> None:
        """Count the pairs of row and key of so many heads for the trace."""
        note(pairs=self.geometry.batch * heads * self._travels.pairs(self._position, owner))

    def temporary(self, slot: str, shape: tuple[int, ...]) -> Any:
        """Scratch memory in the dtype of the computation."""
        return scratch(self.queue, f"ring {slot}", shape, self.compute_dtype)

    def _are_here(self, hop: int) -> bool:
        return self._travels.are_here(self._position, hop)

    def _owner(self, hop: int) -> int:
        """Whose keys are here after so many hops."""
        return self._travels.owner(self._position, hop)

    def _numbers(self, owner: int) -> int:
        """How many numbers k and v of a group are."""
        return sum(self._sizes(owner))

    def _sizes(self, owner: int) -> list[int]:
        widths, rows = (self.geometry.head_dim, self.geometry.head_dim_v), count(self._travels.keys[owner])
        return [self.geometry.batch * self.kv_heads * width * rows for width in widths]

    def _memory(self, name: str, size: int, dtype: Any) -> Memory:
        def flat(prefix: str, usm_type: str) -> Any:
            return scratch(self.queue, f"ring {prefix}{name}", (size,), dtype, usm_type, owner=self._ranks.handle)

        return flat("", "device"), flat("host ", "host") if self._by_host else None

    def _views(self, flat: Any, owner: int) -> list[Any]:
        """k and v of a group, or their gradients, in flat memory. The rows of a head follow each other, as kernels like it."""
        rows, batch, heads = count(self._travels.keys[owner]), self.geometry.batch, self.kv_heads
        starts, views = (0, self._sizes(owner)[0]), []
        for start, width in zip(starts, (self.geometry.head_dim, self.geometry.head_dim_v), strict=True):
            strides = heads * rows * width, width, rows * width, 1
            views.append(view(flat, start, (batch, rows, heads, width), strides))
        return views

    def _at_hand(self, memories: list[Memory], hop: int) -> list[Any]:
        return self._views(memories[hop % len(memories)][0], self._owner(hop))

    def _parcel(self, memory: Memory, owner: int, distance: int, *, tag: int) -> mpi.Parcel:
        """Keys of a group, or their gradients, on the way to or from the rank so far ahead."""
        array, host = (x if x is None else x[: self._numbers(owner)] for x in memory)
        return mpi.Parcel(array, (self._position + distance) % self._size, tag % (3 * self._size), host)

    def _keys_on_their_way(self, call: CollectiveCall) -> Iterator[mpi.Shift]:
        """The exchange of keys behind the computation of every hop; gathered, all keys are on their way at once."""
        if not self._gathers:
            for hop in range(self._size):
                shift = self._shift_keys(hop)
                call.exchange(shift.start)
                yield shift
            return
        shifts = [self._send_keys(distance) for distance in range(1, self._size)]
        for shift in shifts:
            call.exchange(shift.start)
        yield from (*shifts, mpi.Shift(self._ranks.comm, None, None))

    def _send_keys(self, distance: int) -> mpi.Shift:
        """Send the own keys so many groups ahead, if they are seen there, and get those from as many back."""
        sent = self._travels.keys_sent(self._position, distance)
        received = self._travels.keys_sent(self._owner(distance), distance)
        return mpi.Shift(
            self._ranks.comm,
            sent and self._parcel(self._moving[0], self._position, distance, tag=distance),
            received and self._parcel(self._moving[distance], received.owner, -distance, tag=distance),
        )

    def _shift_keys(self, hop: int) -> mpi.Shift:
        """Pass on the keys that are here, if they go further, and get those of the group before, if they come as far."""
        here, there = self._moving[hop % 2], self._moving[(hop + 1) % 2]
        sent = self._travels.keys_sent(self._position, hop)
        received = self._travels.keys_sent(self._owner(1), hop)
        return mpi.Shift(
            self._ranks.comm,
            sent and self._parcel(here, sent.owner, 1, tag=hop),
            received and self._parcel(there, received.owner, -1, tag=hop),
        )

    def _shift_sums(self, hop: int) -> mpi.Shift:
        """Pass on the gradients of the keys that are here, or send them home, and get those of the next keys."""
        here, there = self._sums[hop % 2], self._sums[(hop + 1) % 2]
        sent = self._travels.sums_sent(self._position, hop)
        received = self._travels.sums_sent(self._owner(1), hop)
        return mpi.Shift(
            self._ranks.comm,
            sent and self._parcel(here, *sent, tag=self._size + hop if sent.distance == 1 else -1),
            self._parcel(there, received.owner, -1, tag=self._size + hop) if received and received.distance == 1 else None,
        )


class _Forward:
    """The running result of the rows of this group."""

    def __init__(self, ring: Ring, arrays: Arrays) -> None:
        self._ring, self._q = ring, arrays["q"]
        ring.load(arrays["k"], arrays["v"])
        out, (batch, seq, heads, _) = arrays["out"], arrays["q"].shape
        self._out = out if out.dtype == ring.compute_dtype else ring.temporary("out", out.shape)
        self._lse = [ring.temporary(f"lse {n}", (batch, heads, seq)) for n in range(2)]
        self._merges = dict.fromkeys((rows.start for rows in ring.row_slices()), 0)  # of every segment, so far
        self._out[...] = 0
        # a sink is a key without a value, and counts once
        sinks = ring.options.sinks
        mine = slice(ring.heads.first, ring.heads.first + heads)
        start = -np.inf if sinks is None else _near(sinks[mine].reshape(1, -1, 1), self._lse[0])
        self._lse[0][...] = start

    def meet(self, owner: int, keys_and_values: list[Any]) -> None:
        """Add the keys of a group."""
        ring, q, (k, v) = self._ring, self._q, keys_and_values
        ring.note_pairs(owner, q.shape[2])
        for rows, keys, options in ring.meetings(owner):
            q_rows, out = q[:, rows], self._out[:, rows]
            turn = self._merges[rows.start] % 2
            old, new = self._lse[turn][..., rows], self._lse[1 - turn][..., rows]
            first = not self._merges[rows.start] and ring.options.sinks is None  # there is nothing to merge with
            part = out if first else ring.temporary("part", out.shape)
            part_lse = new if first else ring.temporary("part lse", new.shape)
            _local.attend(q_rows, k[:, keys], v[:, keys], part, part_lse, options, ring.heads)
            if not first:
                merge_rows.merge(out, old, part, part_lse, new)
            self._merges[rows.start] += 1

    def give(self, out: Any, lse: Any) -> None:
        """Write the results."""
        parts = [(rows, self._lse[self._merges[rows.start] % 2][..., rows]) for rows in self._ring.row_slices()]
        if self._ring.options.bias is not None:
            for _, part in parts:
                check_lse(part, "with a bias and a ring")
        if self._out is not out:
            copy_arrays((self._out,), (out,))
        if lse is not None:
            for rows, part in parts:
                lse[..., rows] = part


class _Backward:
    """The running gradients of the rows of this group, and of the keys that are here."""

    def __init__(self, ring: Ring, arrays: Arrays) -> None:
        self._ring, self._arrays = ring, arrays | ring.kept
        arrays = self._arrays
        if not ring.options.plain:
            check_lse(arrays["lse"], "for gradients with these options and a ring")
        ring.load(arrays["k"], arrays["v"])
        dq = arrays["dq"]
        self._dq = dq if dq.dtype == ring.compute_dtype else ring.temporary("dq", dq.shape)
        self._dq[...] = 0

    def meet(self, owner: int, keys_and_values: list[Any], sums: list[Any], *, first: bool) -> None:
        """Add to dq what the keys of a group give, and to their own gradients what the rows of this group give."""
        ring, (k, v) = self._ring, keys_and_values
        ring.note_pairs(owner, self._dq.shape[2])
        if first:
            for x in sums:
                x[...] = 0
        for rows, keys, options in ring.meetings(owner):
            dout, q, dq = (x[:, rows] for x in (self._arrays["dout"], self._arrays["q"], self._dq))
            lse, delta = (self._arrays[name][..., rows] for name in ("lse", "delta"))
            k_part, v_part = k[:, keys], v[:, keys]
            parts = [ring.temporary(f"gradient {n}", x.shape) for n, x in enumerate((dq, k_part, v_part))]
            _local.differentiate((dout, q, k_part, v_part, lse, delta), parts, options, ring.heads)
            copy_arrays(parts[:1], [dq], add=True)
            copy_arrays(parts[1:], [x[:, keys] for x in sums], add=True)

    def give(self, dq: Any, dk: Any, dv: Any) -> None:
        """Write the results."""
        if self._dq is not dq:
            copy_arrays((self._dq,), (dq,))
        copy_arrays(self._ring.sums, [dk, dv])


def check_lse(lse: Any, what: str) -> None:
    """Refuse what needs the number of keys of every part of a row: a large lse, of USM or NumPy, has lost it in rounding.

    The kernels with options find the largest score again (`score.is_large`), but among the keys at hand.
    """
    if not lse.size:
        return
    xp, most = np if isinstance(lse, np.ndarray) else tensor, largest_exact_lse(lse.dtype)
    largest = float(xp.max(xp.where(xp.isfinite(lse), xp.abs(lse), 0)))
    if largest > most:
        raise ValueError(f"lse must be at most {most:g} in size {what}, not {largest:g}")


def _near(x: np.ndarray, like: Any) -> Any:
    return tensor.asarray(x, dtype=like.dtype, sycl_queue=like.sycl_queue)
