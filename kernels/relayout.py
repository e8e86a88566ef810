"""Copies of panels (see panel_copy.py) between USM arrays."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .launch import KEPT_BYTES, offset_and_strides, ready, upload
from .panel_copy import LANES, MAX_SOURCES, MAX_TARGETS, Panel, name

if TYPE_CHECKING:
    from collections.abc import Sequence


def source_of(number: int, x: Any, first: int = 0) -> tuple[int, ...]:
    """The source fields of a panel that is read from array `number`, (batch, row, slot, width), from slot `first` on."""
    return source_at(number, offset_and_strides(x), first)


def source_at(number: int, where: tuple[int, ...], first: int = 0) -> tuple[int, ...]:
    """The same for the place of an array."""
    offset, batch, row, slot, width = where
    return number, offset + first * slot, row, batch, slot, width


def target_of(number: int, x: Any, first: int = 0) -> tuple[int, ...]:
    """The target fields of a panel that goes to array `number`, (batch, row, slot, width), from slot `first` on."""
    return target_at(number, offset_and_strides(x), first)


def target_at(number: int, where: tuple[int, ...], first: int = 0) -> tuple[int, ...]:
    """The same for the place of an array."""
    offset, batch, row, slot, _ = where
    return number, offset + first * slot, row, batch, slot


_PANEL_BYTES = 8 * len(Panel._fields)


class Relayout:
    """Panels as they are copied between arrays of these dtypes on a queue: a launch, and the table of panels if it is small."""

    def __init__(self, queue: Any, source: Any, target: Any, panels: tuple[Panel, ...], rows: int, batch: int) -> None:
        panels = _merged(panels)
        self._launch = None
        if not panels or rows * batch == 0:
            return
        kernel = name(source, target, sums=any(panel.add for panel in panels))
        self._launch = ready(queue, kernel, (len(panels), batch), rows * batch, LANES)
        self._new_table = partial(upload, queue, np.array(panels, dtype=np.int64))
        self._table = self._new_table() if self.is_small(panels) else None

    @staticmethod
    def is_small(panels: Sequence[Panel]) -> bool:
        """Whether the table is kept for the next time."""
        return len(panels) * _PANEL_BYTES <= KEPT_BYTES

    def run(self, sources: Sequence[Any], targets: Sequence[Any]) -> None:
        """Copy between arrays, up to six and up to three."""
        if self._launch is not None:
            # an array that no panel names still needs a valid pointer
            of_sources = [x.usm_data for x in sources] + [sources[0].usm_data] * (MAX_SOURCES - len(sources))
            of_targets = [x.usm_data for x in targets] + [targets[0].usm_data] * (MAX_TARGETS - len(targets))
            self._launch.run([*of_sources, *of_targets, self._new_table() if self._table is None else self._table])


_relayout = lru_cache(maxsize=128)(Relayout)


def copy_panels(sources: Sequence[Any], targets: Sequence[Any], panels: Sequence[Panel], *, rows: int, batch: int) -> None:
    """Copy `panels` from `sources` (up to six USM arrays of one dtype) to `targets` (up to three), all on one queue."""
    new = _relayout if Relayout.is_small(panels) else Relayout
    new(targets[0].sycl_queue, sources[0].dtype, targets[0].dtype, tuple(panels), rows, batch).run(sources, targets)


def free_tables() -> None:
    """Give back the tables of panels that are kept."""
    _relayout.cache_clear()


@lru_cache(maxsize=1024)
def _merged(panels: tuple[Panel, ...]) -> tuple[Panel, ...]:
    """The panels that are not empty, with as few slots as they can have.

    Where one is added to another, slots stay as they are: then the work-item that adds to an element is the one that wrote it.
    """
    filled = tuple(panel for panel in panels if panel.slots * panel.width > 0)
    return filled if any(panel.add for panel in filled) else tuple(map(_merge, filled))


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
