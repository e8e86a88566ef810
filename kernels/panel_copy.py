"""The kernel that copies panels between strided layouts in one launch: what packs and unpacks the exchange buffers.

A panel is a block of numbers with four axes `(row, batch, slot, width)`, for instance the query heads that go to one rank
with slot = head and width = head_dim. All panels of a launch have the same rows and batch; a `Panel` says where one lies in
its source and where it goes in its target. A work-group copies one (row, batch) of all panels: a few kilobytes that are
contiguous on at least one side. Elements are moved as unsigned integers of their size, so the copy is bit-exact; between
numbers of 16 bits, which float16 and bfloat16 arrays hold, and float32, in which attention computes, the copy converts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Panel(NamedTuple):
    """One panel: offsets and strides are in elements of the source and target arrays, numbered in the order given."""

    source: int
    source_offset: int
    source_row: int
    source_batch: int
    source_slot: int
    source_width: int
    target: int
    target_offset: int
    target_row: int
    target_batch: int
    target_slot: int
    slots: int
    width: int  # dense in the target
    add: int = 0  # 1: add to the target what earlier panels put there


LANES = SUB_GROUP = 16  # of a work-group: of GPUs that are not told so, the compiler takes 32, and half of them are idle
MAX_SOURCES, MAX_TARGETS = 6, 3

# (dtype of the sources, dtype of the targets): what is compiled. bfloat16 is stored as uint16, which USM arrays know.
COPIES = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}  # by itemsize
HALVES = {"float16": "float16", "uint16": "bfloat16"}  # by dtype of the USM array

ARGUMENTS = (
    ("source_0", "source"), ("source_1", "source"), ("source_2", "source"),
    ("source_3", "source"), ("source_4", "source"), ("source_5", "source"),
    ("target_0", "target"), ("target_1", "target"), ("target_2", "target"),
    ("table", "table"), ("panels", "int64"), ("batch", "int64"),
)  # fmt: skip


def name(source: Any, target: Any, *, sums: bool = False) -> str:
    """Name of the compiled kernel that copies between arrays of these dtypes, and adds where a panel says so."""
    if sums:
        return f"relayout_sum_{source}"
    if source == target or source.itemsize == target.itemsize:
        return f"relayout_{COPIES[source.itemsize]}"
    narrow, wide = sorted((source, target), key=lambda dtype: dtype.itemsize)
    return f"relayout_{HALVES[str(narrow)]}_{'to' if wide == target else 'from'}_{wide}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for dtype in COPIES.values():
        yield f"relayout_{dtype}", {"source": dtype, "target": dtype}, {"lanes": LANES, "conversion": None, "sums": False}
    for dtype in ("float32", "float64"):
        yield f"relayout_sum_{dtype}", {"source": dtype, "target": dtype}, {"lanes": LANES, "conversion": None, "sums": True}
    for half in HALVES.values():
        for direction, types in (("to", ("uint16", "float32")), ("from", ("float32", "uint16"))):
            conversion = f"{half}_{direction}_float32"
            options = {"lanes": LANES, "conversion": conversion, "sums": False}
            yield f"relayout_{conversion}", dict(zip(("source", "target"), types, strict=True)), options


def kernel(*, lanes: int, conversion: str | None, sums: bool) -> Callable[..., None]:
    """Make the numba-dpex kernel function; the element types are those of its pointers. `sums` honours `Panel.add`."""
    from .intrinsics import CONVERSIONS, inlined

    convert = CONVERSIONS[conversion]

    @inlined
    def copy_dense(source, origin, target, place, full, width, lane):
        """Copy a slot that is dense on both sides. Four loads before their stores, up to `full`, keep more of the memory busy:
        1.8 times as fast for what is in no cache."""
        for chunk in range(0, full, 4 * lanes):
            value_0 = convert(source[origin + chunk])
            value_1 = convert(source[origin + chunk + lanes])
            value_2 = convert(source[origin + chunk + 2 * lanes])
            value_3 = convert(source[origin + chunk + 3 * lanes])
            target[place + chunk] = value_0
            target[place + chunk + lanes] = value_1
            target[place + chunk + 2 * lanes] = value_2
            target[place + chunk + 3 * lanes] = value_3
        for chunk in range(full, width, lanes):
            if chunk + lane < width:
                target[place + chunk] = convert(source[origin + chunk])

    @inlined
    def copy_strided(source, origin, step, target, place, width, lane, adds):
        """Copy any slot, or add it to what is there."""
        for d in range(lane, width, lanes):
            value = convert(source[origin + d * step])
            if adds:
                value += target[place + d]
            target[place + d] = value

    @inlined
    def copy_slots(source, start, source_slot, step, target, goal, target_slot, slots, width, add, lane):
        adds = sums and add != 0
        # apart from strided copies, whose loads are gathers: 2.4 times as fast
        if step == 1 and not adds:
            full = width - width % (4 * lanes)
            origin, place = start + lane, goal + lane
            for _ in range(slots):
                copy_dense(source, origin, target, place, full, width, lane)
                origin += source_slot
                place += target_slot
        else:
            for slot in range(slots):
                copy_strided(source, start + slot * source_slot, step, target, goal + slot * target_slot, width, lane, adds)

    return over_panels(copy_slots)


def over_panels(copy_slots: Callable[..., None]) -> Callable[..., None]:
    """Make a kernel function that copies what a row and batch have of all panels, the slots of each in this way."""
    from .intrinsics import group_index, inlined, lane_index
    from .subgroup import divide

    columns = len(Panel._fields)

    @inlined
    def choose_source(number, x0, x1, x2, x3, x4, x5):
        low = x0 if number == 0 else (x1 if number == 1 else x2)
        high = x3 if number == 3 else (x4 if number == 4 else x5)
        return low if number < 3 else high

    @inlined
    def choose_target(number, x0, x1, x2):
        return x0 if number == 0 else (x1 if number == 1 else x2)

    def copy_panels(
        item, no_array, source_0, source_1, source_2, source_3, source_4, source_5, target_0, target_1, target_2,
        table, panels, batch,
    ):  # fmt: skip
        index = group_index()
        lane = lane_index()
        # a division of 64 bits takes a GPU as long as the copy of a head
        row = divide(index, batch) if index < 2**31 else index // batch
        b = index - row * batch
        # a work-item handles the same element of all panels, one after the other, so that sums have an order
        for panel in range(panels):
            entry = panel * columns
            source = choose_source(table[entry], source_0, source_1, source_2, source_3, source_4, source_5)
            start = table[entry + 1] + row * table[entry + 2] + b * table[entry + 3]
            source_slot = table[entry + 4]
            step = table[entry + 5]
            target = choose_target(table[entry + 6], target_0, target_1, target_2)
            goal = table[entry + 7] + row * table[entry + 8] + b * table[entry + 9]
            target_slot = table[entry + 10]
            slots = table[entry + 11]
            width = table[entry + 12]
            copy_slots(source, start, source_slot, step, target, goal, target_slot, slots, width, table[entry + 13], lane)

    return copy_panels
