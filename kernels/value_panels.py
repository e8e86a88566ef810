"""The kernel that transposes V for the matrix engines: rows of values become columns, (batch, head, head_dim, keys).

What is infinite or nan becomes 0, and is noted for its block of `KEYS` keys; after the last key there are zeros. A work-group
is one sub-group, with one block: it reads 16 consecutive numbers of a row, one in each lane, and each lane writes what follows
each other in its column, a line of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments import Strides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUB_GROUP = 16
KEYS = 32  # of a block
NAME = "value_panels"
# The specialisation constant says whether the numbers are float16; otherwise they are bfloat16.
CONSTANTS = {"half": 1}

ARGUMENTS = (
    *(("v", "half"), ("panels", "pair"), ("infinite", "table"), ("v_at", Strides)),
    *((name, "int64") for name in ("heads", "keys", "head_dim", "blocks")),
)


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    yield NAME, {"half": "uint16", "pair": "uint32"}, {}


def kernel() -> Callable[..., None]:
    """Make the numba-dpex kernel function."""
    from .intrinsics import element, group_index
    from .register_tile import specialisation
    from .subgroup import any_lane, divide, lane_index

    has_half = specialisation(CONSTANTS["half"])

    def transpose_values(item, no_array, v, panels, infinite, v_at, heads, keys, head_dim, blocks):
        index = group_index()  # a work-group is one sub-group
        lane = lane_index()
        pair = divide(index, blocks)  # (batch, head)
        first = (index - pair * blocks) * KEYS
        b = divide(pair, heads)
        start = element(v_at, b, pair - b * heads, first)
        exponent = 0x7C00 if has_half() != 0 else 0x7F80
        found = False

        def finite(key, d):
            """The bits of a number, and whether they stand for it."""
            bits = 0
            if first + key < keys:
                bits = int(v[start + key * v_at.seq + d])
            return (0, True) if bits & exponent == exponent else (bits, False)

        for d in range(lane, head_dim, SUB_GROUP):
            goal = divide((pair * head_dim + d) * blocks * KEYS + first, 2)
            for t in range(0, KEYS, 2):
                low, low_found = finite(t, d)
                high, high_found = finite(t + 1, d)
                found = found or low_found or high_found
                panels[goal + t // 2] = low | high << 16
        found = any_lane(found)
        if lane == 0:
            infinite[index] = 1 if found else 0

    return transpose_values
