"""Copies of panels between USM arrays (see panel_copy.py), also to and from 8 bits (see panel_wire.py)."""

from __future__ import annotations

import ctypes
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import panel_wire
from .launch import KEPT_BYTES, offset_and_strides, ready, record, upload
from .panel_copy import LANES, MAX_SOURCES, MAX_TARGETS, Panel, name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .launch import Runs


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
# What the host copies itself, where it can. Measured on two cores, where a launch takes 13 to 20 µs: NumPy takes 4, and 0.7 for
# each panel. For 16 panels it is the faster one up to these bytes, in any layout and dtype; for fewer, up to twice as many.
HOST_BYTES, HOST_PANELS = 2**17, 16


class Relayout:
    """Panels as they are copied between arrays of these dtypes on a queue: a launch, and the table of panels if it is small.

    To or from a wire, the side of its codes is uint8. A panel has the width of the numbers, and the slots of the codes have
    `SCALE_BYTES` more. Few numbers in the memory of the host that stay what they are, NumPy copies: a launch takes longer.
    """

    def __init__(
        self,
        queue: Any,
        source: Any,
        target: Any,
        panels: tuple[Panel, ...],
        rows: int,
        batch: int,
        wire: str | None = None,
    ) -> None:
        panels = _merged(panels) if wire is None else _filled(panels)
        self._copy: Runs | None = None
        self._more: Callable[[], list[Any]] = list  # memories that it gets besides the arrays
        if not panels or rows * batch == 0:
            return
        sums = any(panel.add for panel in panels)
        nbytes = source.itemsize * rows * batch * sum(panel.slots * panel.width for panel in panels)
        is_short = nbytes <= HOST_BYTES and len(panels) <= HOST_PANELS
        only_moves = wire is None and source.itemsize == target.itemsize and not sums
        if queue.sycl_device.is_cpu and is_short and only_moves:
            self._copy = _HostCopy(queue, source.itemsize, panels, rows, batch)
            return
        if wire is None:
            kernel = name(source, target, sums=sums)
        else:
            back = source == np.uint8
            kernel = panel_wire.name(wire, target if back else source, back=back)
        self._copy = ready(queue, kernel, (len(panels), batch), rows * batch, LANES)
        new_table = partial(upload, queue, np.array(panels, dtype=np.int64))
        kept = [new_table()] if self.is_small(panels) else None
        self._more = lambda: [new_table()] if kept is None else kept

    @staticmethod
    def is_small(panels: Sequence[Panel]) -> bool:
        """Whether the table is kept for the next time."""
        return len(panels) * _PANEL_BYTES <= KEPT_BYTES

    def run(self, sources: Sequence[Any], targets: Sequence[Any]) -> None:
        """Copy between arrays, up to six and up to three."""
        if self._copy is not None:
            # an array that no panel names still needs a valid pointer
            of_sources = [x.usm_data for x in sources] + [sources[0].usm_data] * (MAX_SOURCES - len(sources))
            of_targets = [x.usm_data for x in targets] + [targets[0].usm_data] * (MAX_TARGETS - len(targets))
            self._copy.run([*of_sources, *of_targets, *self._more()])


class _HostCopy:
    """What a launch does, by NumPy."""

    def __init__(self, queue: Any, itemsize: int, panels: tuple[Panel, ...], rows: int, batch: int) -> None:
        self._queue, self._dtype = queue, np.dtype(f"u{itemsize}")
        self._panels = [
            (
                (rows, batch, x.slots, x.width),
                *(x.target + MAX_SOURCES, x.target_offset * itemsize),
                tuple(itemsize * n for n in (x.target_row, x.target_batch, x.target_slot, 1)),
                *(x.source, x.source_offset * itemsize),
                tuple(itemsize * n for n in (x.source_row, x.source_batch, x.source_slot, x.source_width)),
            )
            for x in panels
        ]
        self._used = {x.target + MAX_SOURCES for x in panels} | {x.source for x in panels}

    def run(self, memories: Sequence[Any]) -> None:
        """Copy, after all earlier work of the queue."""
        record(self, memories)
        self._queue.wait()
        bytes_of = {n: _bytes(memories[n].nbytes).from_address(memories[n]._pointer) for n in self._used}
        dtype = self._dtype
        for shape, target, goal, target_strides, source, start, source_strides in self._panels:
            result = np.ndarray(shape, dtype, bytes_of[target], goal, target_strides)
            result[...] = np.ndarray(shape, dtype, bytes_of[source], start, source_strides)


@lru_cache(maxsize=256)
def _bytes(count: int) -> Any:
    """The type of so many bytes of memory, as NumPy takes them."""
    return ctypes.c_char * count


_relayout = lru_cache(maxsize=128)(Relayout)


def copy_panels(
    sources: Sequence[Any], targets: Sequence[Any], panels: Sequence[Panel], *, rows: int, batch: int, wire: str | None = None
) -> None:
    """Copy `panels` from `sources` (up to six USM arrays of one dtype) to `targets` (up to three), all on one queue."""
    new = _relayout if Relayout.is_small(panels) else Relayout
    new(targets[0].sycl_queue, sources[0].dtype, targets[0].dtype, tuple(panels), rows, batch, wire).run(sources, targets)


def free_tables() -> None:
    """Give back the tables of panels that are kept."""
    _relayout.cache_clear()


@lru_cache(maxsize=1024)
def _merged(panels: tuple[Panel, ...]) -> tuple[Panel, ...]:
    """The panels that are not empty, with as few slots as they can have.

    Where one is added to another, slots stay as they are: then the work-item that adds to an element is the one that wrote it.
    """
    filled = _filled(panels)
    return filled if any(panel.add for panel in filled) else tuple(map(_merge, filled))


def _filled(panels: tuple[Panel, ...]) -> tuple[Panel, ...]:
    return tuple(panel for panel in panels if panel.slots * panel.width > 0)


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


def to_wire(x: np.ndarray, wire: str) -> np.ndarray:
    """What the kernel makes of slots of numbers, (…, width), in NumPy: (…, width + `SCALE_BYTES`) of uint8."""
    x = x.astype(np.float32)
    largest = np.where(np.isfinite(x), abs(x), 0).max(axis=-1, keepdims=True, initial=0)
    scale = np.maximum(largest * panel_wire.unit(wire), panel_wire.SMALLEST_SCALE)
    scaled = x * (1 / scale)
    finite = np.where(np.isfinite(scaled), scaled, 0)
    if wire == "int8":
        codes, infinity, nan = np.rint(finite).astype(np.int8).view(np.uint8), np.where(x < 0, 0x81, 0x7F), 0x80
    else:
        stands_for = _numbers(wire)[:0x7E].astype(np.float64)
        middles = (stands_for[:-1] + stands_for[1:]) / 2
        codes = np.searchsorted(middles, abs(finite))
        codes += (codes % 2 == 1) & (abs(finite) == middles[np.minimum(codes, middles.size - 1)])  # a tie, to the even code
        sign = np.where(np.signbit(x), 0x80, 0)
        codes, infinity, nan = codes | sign, 0x7E | sign, 0x7F | sign
    codes = np.where(np.isnan(x), nan, np.where(np.isinf(x), infinity, codes)).astype(np.uint8)
    return np.concatenate([codes, scale.view(np.uint8)], axis=-1)


def from_wire(codes: np.ndarray, wire: str) -> np.ndarray:
    """The numbers that come back, in float32."""
    width = codes.shape[-1] - panel_wire.SCALE_BYTES
    scale = np.ascontiguousarray(codes[..., width:]).view(np.float32)
    return _numbers(wire)[codes[..., :width]] * scale


def half_steps(x: np.ndarray, wire: str) -> np.ndarray:
    """How far finite numbers may be away when they come back, but for the rounding of the scale, in float64."""
    size = abs(x.astype(np.float64))
    largest = size.max(axis=-1, keepdims=True, initial=0)
    if wire == "int8":
        return np.broadcast_to(largest / 252, x.shape)
    return np.maximum(size / 16, largest * 2.0**-10 / panel_wire.LARGEST[wire])


def _numbers(wire: str) -> np.ndarray:
    """What the 256 codes stand for."""
    code = np.arange(256)
    if wire == "int8":
        number = code.astype(np.int8).astype(np.float32)
        number[[0x7F, 0x80, 0x81]] = np.inf, np.nan, -np.inf
        return number
    exponent, fraction = code >> 3 & 15, code & 7
    number = np.where(exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent - 7)).astype(np.float32)
    number[[0x7E, 0x7F, 0xFE, 0xFF]] = np.inf, np.nan, np.inf, np.nan
    return np.where(code < 128, number, -number)
