"""The sizes of a call that is planned, and what follows from them alone: shares, rows, messages, pairs of query and key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._call.checks import Geometry
from .._call.spans import UNLIMITED, meetings
from .._device.dtypes import DTYPES
from .._itinerary import itinerary
from .._path import forward_lists, gradient_lists, slot_of
from .._ranks.orders import Segment, count, rows_of_ranks
from .._ranks.partition import Heads, Item, Transfer, dtype_of_message, share_heads, split, transfer_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._itinerary import Itinerary
    from .._ranks.orders import Order


@dataclass(frozen=True)
class Problem:
    """The sizes of a call, and what follows from them alone."""

    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    ranks: int
    batch: int
    causal: bool
    backward: bool
    gpu: bool
    ring: int = 1
    order: Order = "contiguous"
    kv: str = "ring"
    key_ranges: bytes | None = None
    head_dim_v: int | None = None  # of v and out; None: as that of q and k
    wire: str | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """head_dim of q and k, and of v and out."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def compute_itemsize(self) -> int:
        return DTYPES[DTYPES[self.dtype].compute].itemsize

    @property
    def converts(self) -> bool:
        """Whether attention computes in another dtype."""
        return self.compute_itemsize != self.itemsize

    @property
    def group(self) -> int:
        """Ranks that share the heads."""
        return self.ranks // self.ring

    @property
    def copies_of_kv(self) -> int:
        """How many kv heads all ranks of a group have together: one that several of them read counts for each."""
        return _copies_of_kv(self.heads, self.kv_heads, self.group)

    @property
    def shares(self) -> tuple[Heads, ...]:
        """The heads of the ranks of a group."""
        return share_heads(self.heads, self.kv_heads, self.group)

    def share(self, rank: int) -> Heads:
        return self.shares[rank % self.group]

    @cached_property
    def rows(self) -> tuple[int, ...]:
        if self.order == "contiguous":
            return split(self.seq, self.ranks)
        return tuple(map(count, rows_of_ranks(self.seq, self.ranks, self.ring, self.order)))

    def rows_of_group(self, rank: int) -> tuple[int, ...]:
        """The rows of the ranks of its group."""
        first = rank // self.group * self.group
        return self.rows[first : first + self.group]

    @property
    def mask(self) -> tuple[tuple[str, Any], ...]:
        """What says which keys a row sees: arguments of `spans`."""
        return ("causal", self.causal), ("window_size", UNLIMITED), ("key_ranges", self.key_ranges)

    @cached_property
    def travels(self) -> Itinerary | None:
        """Which keys visit which groups; None where a group has all rows in their order."""
        if self.ranks == 1 or (self.ring == 1 and self.order == "contiguous"):
            return None
        rows = rows_of_ranks(self.seq, self.ranks, self.ring, self.order)
        return itinerary(rows, rows, self.ring, self.mask, gathers=self.kv == "all_gather")

    @cached_property
    def pairs(self) -> tuple[int, ...]:
        """Pairs of query and key that the rows of every group see, of one head and batch."""
        if self.travels is not None:
            groups = range(self.ring)
            return tuple(sum(self.travels.pairs(group, owner) for owner in groups) for group in groups)
        whole = (Segment(0, self.seq),)
        return (sum(pairs for *_, pairs in meetings(whole, whole, self.seq, self.seq, self.mask)),)

    def messages(self, *, gradient: bool = False) -> tuple[Message, Message]:
        """What a rank sends to every other of its group in a call, there and back."""
        to_heads, to_rows = _messages(replace(self, seq=0, key_ranges=None), gradient=gradient)
        return to_heads, to_rows


class Message(NamedTuple):
    """What travels at once, in one direction."""

    items: tuple[Item, ...]
    sizes: tuple[int, ...]  # numbers of every rank in a row
    slot: str

    @property
    def itemsize(self) -> int:
        return dtype_of_message(self.items).itemsize

    @property
    def first_itemsize(self) -> int:
        """That of its first item where it does not travel."""
        return self.items[0].dtype.itemsize

    def row_in_arrays(self, peers: Iterable[int]) -> int:
        """Bytes of a row of the heads of some ranks in the arrays of the items."""
        return sum(item.heads[peer][1] * item.numbers * item.dtype.itemsize for item in self.items for peer in peers)

    def transfer(self, problem: Problem, rank: int) -> Transfer:
        """The exchange in the group of a rank, seen by this one."""
        return Transfer(rank % problem.group, problem.rows_of_group(rank), self.sizes, problem.batch)


# These two do not depend on seq, and are asked for again and again in the search for the largest one.
@lru_cache(maxsize=64)
def _messages(problem: Problem, *, gradient: bool) -> list[Message]:
    """The messages of a call, from its lists of items."""
    geometry = Geometry(problem.batch, problem.heads, problem.kv_heads, *problem.widths, problem.dtype)
    dtype = np.dtype(DTYPES[problem.dtype].stored)
    rows = (0,) * problem.group
    where = geometry, dtype, problem.shares, rows, rows
    if gradient:
        name, lists = "gradient", gradient_lists(*where, context=False, wire=problem.wire)
    else:
        name, lists = "forward", forward_lists(*where, lse=problem.backward, wire=problem.wire)
    return [Message(items, transfer_of(0, items, 1).sizes, slot_of(name, 0, number)) for number, items in enumerate(lists)]


@lru_cache(maxsize=256)
def _copies_of_kv(heads: int, kv_heads: int, ranks: int) -> int:
    return sum(share.kv_count for share in share_heads(heads, kv_heads, ranks))
