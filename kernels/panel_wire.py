"""The kernels that copy panels (see panel_copy.py) to and from 8 bits: how numbers travel where their precision is not needed.

A slot, such as a row of a head, becomes a code of 8 bits for each number, and then a float32 in four bytes, the scale: a number
is what its code stands for, times the scale. The scale makes the largest finite number of the slot the largest code, so nothing
overflows. Infinities and nan have codes of their own, and arrive as what they are; they have no part in the scale.

    wire         largest  codes                                              +inf, -inf  nan
    int8         126      integers, rounded to the nearest                   127, -127   -128
    float8_e4m3  416      4 bits of exponent, 3 of the fraction (OCP FP8)    7E, FE      7F

A number comes back with an error of at most 1/252 of the largest of its slot as int8; as float8_e4m3 of at most 1/16 of itself,
or 2**-10/416 of the largest. A work-group is one sub-group, which looks for the largest together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .panel_copy import ARGUMENTS as ARGUMENTS
from .panel_copy import HALVES, LANES, over_panels
from .panel_copy import SUB_GROUP as SUB_GROUP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGEST = {"float8_e4m3": 416.0, "int8": 126.0}  # what the largest code of a wire stands for
SCALE_BYTES = 4  # after the codes of a slot
SMALLEST_SCALE = np.finfo(np.float32).smallest_normal  # its inverse is finite
DTYPES = {"float32": "float32"} | HALVES  # of the numbers, by dtype of the USM array


def unit(wire: str) -> np.float32:
    """What the largest number of a slot is multiplied with for the scale.

    A bit less than 1 / `LARGEST`, so that no rounding makes more of the number than it was: that could be infinite.
    """
    below = np.float32(1 / LARGEST[wire])
    for _ in range(2):
        below = np.nextafter(below, np.float32(0))
    return below


def name(wire: str, dtype: Any, *, back: bool) -> str:
    """Name of the compiled kernel to a wire, or back, for numbers in USM arrays of this dtype."""
    return f"relayout_{wire}_{'to' if back else 'from'}_{DTYPES[str(dtype)]}"


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """What the build compiles: (kernel name, types by kind of argument, keyword arguments of `kernel`)."""
    for wire in LARGEST:
        for stored, dtype in DTYPES.items():
            pointer = "float32" if dtype == "float32" else "uint16"
            for back in (False, True):
                source, target = ("uint8", pointer) if back else (pointer, "uint8")
                yield (
                    name(wire, stored, back=back),
                    {"source": source, "target": target},
                    {"wire": wire, "dtype": dtype, "back": back},
                )


def kernel(*, wire: str, dtype: str, back: bool) -> Callable[..., None]:
    """Make the numba-dpex kernel function. Back in float32, it honours `Panel.add`."""
    from .intrinsics import CONVERSIONS, bits_of, float_of, inlined
    from .subgroup import maximum_of_lanes

    plain = dtype == "float32"
    widen, narrow = (CONVERSIONS[None if plain else f"{dtype}_{way}_float32"] for way in ("to", "from"))
    encode, decode = (CONVERSIONS[f"{wire}_{way}_float32"] for way in ("from", "to"))
    per_largest, smallest, finite = unit(wire), SMALLEST_SCALE, np.finfo(np.float32).max
    zero, one = np.float32(0), np.float32(1)

    @inlined
    def larger(largest, value):
        size = value if value > zero else -value
        size = size if size <= finite else zero  # nan is not
        return size if size > largest else largest

    @inlined
    def to_code(source, origin, step, target, place, width, lane):
        """All lanes go through all loops to the end: with fewer than all, they exchange what they should not."""
        full = width - width % LANES
        last = min(full + lane, width - 1)  # lanes without a number of their own have the last one again
        largest = zero
        for chunk in range(0, full, LANES):
            largest = larger(largest, widen(source[origin + (chunk + lane) * step]))
        rest = widen(source[origin + last * step])
        scale = maximum_of_lanes(larger(largest, rest)) * per_largest
        scale = scale if scale > smallest else smallest
        factor = one / scale
        for chunk in range(0, full, LANES):
            target[place + chunk + lane] = encode(widen(source[origin + (chunk + lane) * step]) * factor)
        if full + lane < width:
            target[place + full + lane] = encode(rest * factor)
        if lane < SCALE_BYTES:
            target[place + width + lane] = bits_of(scale) >> 8 * lane & 255

    @inlined
    def to_codes(source, start, source_slot, step, target, goal, target_slot, slots, width, add, lane):
        # apart from strided numbers, whose loads are gathers
        if step == 1:
            for slot in range(slots):
                to_code(source, start + slot * source_slot, 1, target, goal + slot * target_slot, width, lane)
        else:
            for slot in range(slots):
                to_code(source, start + slot * source_slot, step, target, goal + slot * target_slot, width, lane)

    @inlined
    def from_codes(source, start, source_slot, step, target, goal, target_slot, slots, width, add, lane):
        adds = plain and add != 0
        for slot in range(slots):
            origin = start + slot * source_slot
            place = goal + slot * target_slot
            bits = 0
            for n in range(SCALE_BYTES):
                bits |= int(source[origin + width + n]) << 8 * n
            scale = float_of(bits)
            for d in range(lane, width, LANES):
                value = decode(source[origin + d]) * scale
                if adds:
                    value += target[place + d]
                target[place + d] = narrow(value)

    return over_panels(from_codes if back else to_codes)
