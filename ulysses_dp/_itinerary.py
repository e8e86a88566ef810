"""Which keys visit which groups of a mesh, and when: pure integers, for the ring that moves them and for plans."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ._call.spans import meetings
from ._ranks.orders import Rows, count, rows_of_groups

if TYPE_CHECKING:
    from ._call.spans import Block


class Trip(NamedTuple):
    """Keys of a group, or their gradients, that one group sends to another."""

    owner: int
    distance: int  # so many groups ahead; negative: back


@dataclass(frozen=True)
class Itinerary:
    """The travels of the keys of all groups.

    In a ring, they go from group to group as far as some row sees them. Gathered, they go straight to the groups that see them.
    """

    rows: tuple[Rows, ...]  # of every group
    keys: tuple[Rows, ...]
    mask: tuple[tuple[str, Any], ...]
    gathers: bool

    @property
    def size(self) -> int:
        """How many groups there are."""
        return len(self.rows)

    @cached_property
    def _meetings(self) -> dict[tuple[int, int], tuple[tuple[slice, slice, Block, int], ...]]:
        return {}

    @cached_property
    def _lengths(self) -> tuple[int, int]:
        return sum(map(count, self.rows)), sum(map(count, self.keys))

    @cached_property
    def _reaches(self) -> tuple[int, ...]:
        hops = range(self.size)
        return tuple(max(hop for hop in hops if not hop or self.sees((owner + hop) % self.size, owner)) for owner in hops)

    def meetings(self, group: int, owner: int) -> tuple[tuple[slice, slice, Block, int], ...]:
        """What the rows of a group see of the keys of another: see `spans.meetings`."""
        if (group, owner) not in self._meetings:
            self._meetings[group, owner] = meetings(self.rows[group], self.keys[owner], *self._lengths, self.mask)
        return self._meetings[group, owner]

    def sees(self, group: int, owner: int) -> bool:
        """Whether a row of a group sees a key of another."""
        return bool(self.meetings(group, owner))

    def pairs(self, group: int, owner: int) -> int:
        """How many pairs of row and key these are."""
        return sum(pairs for *_, pairs in self.meetings(group, owner))

    def owner(self, group: int, hop: int) -> int:
        """Whose keys are with a group after so many hops."""
        return (group - hop) % self.size

    def reach(self, owner: int) -> int:
        """How many hops the keys of a group go."""
        return self._reaches[owner]

    def are_here(self, group: int, hop: int) -> bool:
        """Whether the keys from so many groups back are with a group at that hop."""
        owner = self.owner(group, hop)
        return not hop or (self.sees(group, owner) if self.gathers else hop <= self.reach(owner))

    def keys_sent(self, group: int, hop: int) -> Trip | None:
        """The keys that a group sends at that hop: it passes on those that are here; gathered, it sends its own so far."""
        if self.gathers:
            return Trip(group, hop) if hop and self.sees((group + hop) % self.size, group) else None
        owner = self.owner(group, hop)
        return Trip(owner, 1) if hop < self.reach(owner) else None

    def sums_sent(self, group: int, hop: int) -> Trip | None:
        """The gradients of keys that a group sends after that hop: to where these go next, or home."""
        owner = self.owner(group, hop)
        if self.gathers:
            return Trip(owner, -hop) if hop and self.are_here(group, hop) else None
        if hop < self.reach(owner):
            return Trip(owner, 1)
        return Trip(owner, -hop) if hop and hop == self.reach(owner) else None


@lru_cache(maxsize=64)
def itinerary(
    rows: tuple[Rows, ...], keys: tuple[Rows, ...], ring: int, mask: tuple[tuple[str, Any], ...], *, gathers: bool
) -> Itinerary | None:
    """The travels on a mesh whose ranks hold these rows and keys; None where one group holds all of both in their order."""
    if ring == 1 and all(len(x) <= 1 for held in (rows, keys) for x in rows_of_groups(held, 1)):
        return None
    return Itinerary(rows_of_groups(rows, ring), rows_of_groups(keys, ring), mask, gathers)
