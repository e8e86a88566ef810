"""Copy panels between strided layouts in one launch: what packs and unpacks the exchange buffers.

A panel is a block of numbers with four axes `(row, batch, slot, width)`, for instance the query heads that go to one rank
with slot = head and width = head_dim. All panels of a launch have the same rows and batch; a `Panel` says where one lies in
its source and where it goes in its target. A work-group copies one (row, batch) of all panels: a few kilobytes that are
contiguous on at least one side. Elements are moved as unsigned integers of their size, so the copy is bit-exact; between
numbers of 16 bits, which float16 and bfloat16 arrays hold, and float32, in which attention computes, the copy converts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .launch import launch, place, upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


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


def source_of(number: int, x: Any, first: int = 0) -> tuple[int, ...]:
    """The source fields of a panel that is read from array `number`, (batch, row, slot, width), from slot `first` on."""
    return source_at(number, place(x), first)


def source_at(number: int, where: tuple[int, ...], first: int = 0) -> tuple[int, ...]:
    """The same for the place of an array."""
    offset, batch, row, slot, width = where
    return number, offset + first * slot, row, batch, slot, width


def target_of(number: int, x: Any, first: int = 0) -> tuple[int, ...]:
    """The target fields of a panel that goes to array `number`, (batch, row, slot, width), from slot `first` on."""
    return target_at(number, place(x), first)


def target_at(number: int, where: tuple[int, ...], first: int = 0) -> tuple[int, ...]:
    """The same for the place of an array."""
    offset, batch, row, slot, _ = where
    return number, offset + first * slot, row, batch, slot


LANES = 16
MAX_SOURCES, MAX_TARGETS = 6, 3

# (dtype of the sources, dtype of the targets): what is compiled. bfloat16 is stored as uint16, which USM arrays know.
COPIES = {2: "uint16", 4: "uint32", 8: "uint64"}  # by itemsize
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
    from .intrinsics import CONVERSIONS, group_index, lane_index

    convert = CONVERSIONS[conversion]

    columns = len(Panel._fields)

    def relayout(
        item, no_array, source_0, source_1, source_2, source_3, source_4, source_5, target_0, target_1, target_2,
        table, panels, batch,
    ):  # fmt: skip
        index = group_index()
        lane = lane_index()
        row = index // batch
        b = index - row * batch
        # a work-item handles the same element of all panels, one after the other, so that sums have an order
        for panel in range(panels):
            entry = panel * columns
            number = table[entry]
            source = source_0
            if number == 1:
                source = source_1
            elif number == 2:
                source = source_2
            elif number == 3:
                source = source_3
            elif number == 4:
                source = source_4
            elif number == 5:
                source = source_5
            start = table[entry + 1] + row * table[entry + 2] + b * table[entry + 3]
            source_slot = table[entry + 4]
            step = table[entry + 5]
            number = table[entry + 6]
            target = target_0
            if number == 1:
                target = target_1
            elif number == 2:
                target = target_2
            goal = table[entry + 7] + row * table[entry + 8] + b * table[entry + 9]
            target_slot = table[entry + 10]
            slots = table[entry + 11]
            width = table[entry + 12]
            add = table[entry + 13]
            if step == 1 and not (sums and add != 0):
                # Apart from strided copies, whose loads are gathers: 2.4 times as fast. Four loads before their stores keep
                # more of the memory busy: 1.8 times as fast for what is in no cache.
                full = width - width % (4 * lanes)
                for slot in range(slots):
                    origin = start + slot * source_slot + lane
                    place = goal + slot * target_slot + lane
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
            else:
                for slot in range(slots):
                    for chunk in range(0, width, lanes):
                        d = chunk + lane
                        if d < width:
                            value = convert(source[start + slot * source_slot + d * step])
                            place = goal + slot * target_slot + d
                            if sums and add != 0:
                                value += target[place]
                            target[place] = value

    return relayout


@lru_cache(maxsize=128)
def _table(queue: Any, panels: tuple[Panel, ...]) -> Any:
    """The table of panels in device memory."""
    return upload(queue, np.array(panels, dtype=np.int64))


def relayout(sources: Sequence[Any], targets: Sequence[Any], panels: Sequence[Panel], *, rows: int, batch: int) -> None:
    """Copy `panels` from `sources` (up to six USM arrays of one dtype) to `targets` (up to three), all on one queue."""
    panels = _merged(tuple(panels))
    if not panels or rows * batch == 0:
        return
    queue = targets[0].sycl_queue
    # an array that no panel names still needs a valid pointer
    memories = [
        (*arrays, *[arrays[0]] * (most - len(arrays))) for arrays, most in ((sources, MAX_SOURCES), (targets, MAX_TARGETS))
    ]
    launch(
        queue,
        name(sources[0].dtype, targets[0].dtype, sums=any(panel.add for panel in panels)),
        [*(x.usm_data for arrays in memories for x in arrays), _table(queue, panels)],
        (len(panels), batch),
        groups=rows * batch,
        lanes=LANES,
    )


@lru_cache(maxsize=1024)
def _merged(panels: tuple[Panel, ...]) -> tuple[Panel, ...]:
    """The panels that are not empty, as few slots as they can be."""
    return tuple(_merge(panel) for panel in panels if panel.slots * panel.width > 0)


def _merge(panel: Panel) -> Panel:
    """The same panel with one long slot where its slots follow each other without a gap."""
    if panel.source_slot == panel.width == panel.target_slot and panel.source_width == 1:
        return panel._replace(slots=1, width=panel.slots * panel.width)
    return panel


def reference(
    sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], panels: Sequence[Panel], *, rows: int, batch: int
) -> None:
    """What the kernel does, in NumPy on flat arrays."""
    for p in panels:
        row, b, slot, d = np.ogrid[:rows, :batch, : p.slots, : p.width]
        i = p.source_offset + row * p.source_row + b * p.source_batch + slot * p.source_slot + d * p.source_width
        j = p.target_offset + row * p.target_row + b * p.target_batch + slot * p.target_slot + d
        if p.add:
            targets[p.target][j] += sources[p.source][i]
        else:
            targets[p.target][j] = sources[p.source][i]
