"""The stages of score.py for the columns of a step of the GPU kernels, in registers. Build time only.

Rows are queries and columns are keys or, `into_keys`, the other way round. What differs is where a number comes from: that of
a row is the lane's own, that of a column the same in all lanes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from numba.core import types
from numba.core.types import UniTuple, int32, int64

from .register_tile import each_column, each_four_columns, each_loaded_column, tanh
from .score import stages
from .subgroup import WIDTH, lane_index, transpose_fours

if TYPE_CHECKING:
    from collections.abc import Callable


def register_stages(dtype: str, columns: int, *, into_keys: bool, tanh: Callable[..., float] = tanh) -> SimpleNamespace:
    """The stages as functions for kernels: ``stage(scores, arguments)``, arguments are a tuple."""
    real, number = np.dtype(dtype).type, getattr(types, dtype)
    of = stages(dtype, tanh)
    capped, sloped, biased, padded, in_span, kept, philox = (
        of.capped,
        of.sloped,
        of.biased,
        of.padded,
        of.in_span,
        of.kept,
        of.philox,
    )

    # Their names must differ: numba tells them apart by these.
    def scale_column(dot, t, scale):
        return dot * scale

    def cap_column(score, t, softcap, per_softcap):
        return capped(score, softcap, per_softcap)

    def slope_column(score, t, centre, key, step, slope):
        return sloped(score, slope, centre - key - step * real(t))

    def bias_column(score, t, bias):
        return biased(score, bias)

    def pad_column(score, t, part):
        return padded(score, part)

    def hide_column(score, t, first, last):
        return in_span(score, t, first, last)

    def drop_four(w0, w1, w2, w3, first, row, head, b, seed, threshold, keep_scale):
        """The weights of four keys from a multiple of 4 on."""
        r0, r1, r2, r3 = philox(first >> 2, row, head, b, seed)
        return (
            kept(w0, r0, threshold, keep_scale),
            kept(w1, r1, threshold, keep_scale),
            kept(w2, r2, threshold, keep_scale),
            kept(w3, r3, threshold, keep_scale),
        )

    def drop_four_queries(w0, w1, w2, w3, first, key, head, b, seed, threshold, keep_scale):
        """The weights of four queries, from this one on, and a key in each lane. Four lanes have four keys from a multiple of 4
        on, and each of them draws for one of the queries."""
        drawn = philox(key >> 2, first + (lane_index() & 3), head, b, seed)
        r0, r1, r2, r3 = transpose_fours(drawn)
        return (
            kept(w0, r0, threshold, keep_scale),
            kept(w1, r1, threshold, keep_scale),
            kept(w2, r2, threshold, keep_scale),
            kept(w3, r3, threshold, keep_scale),
        )

    def drop_column(weight, t, key, key_step, row, row_step, head, b, seed, threshold, keep_scale):
        number = key + key_step * t
        w0, w1, w2, w3 = philox(number >> 2, row + row_step * t, head, b, seed)
        even, odd = w2 if number & 2 else w0, w3 if number & 2 else w1
        return kept(weight, odd if number & 1 else even, threshold, keep_scale)

    across_lanes = UniTuple(number, columns // WIDTH) if columns > WIDTH and not into_keys else number

    def each(stage, *argument_types, across=0):
        return each_column(dtype, columns, stage, *argument_types, across=across)

    return SimpleNamespace(
        scale=each(scale_column, number),
        cap=each(cap_column, number, number),
        slope=each(slope_column, number, number, number, number, across=int(into_keys)),  # of queries the centre
        bias=each_loaded_column(dtype, columns, bias_column, in_fours=False),
        bias_in_fours=each_loaded_column(dtype, columns, bias_column, in_fours=True),
        pad=each(pad_column, across_lanes, across=int(not into_keys)),  # of keys whether they take part
        hide=each(hide_column, int32, int32),
        drop_fours=each_four_columns(
            dtype, columns, drop_four_queries if into_keys else drop_four, int64, int64, int64, int64, int64, number
        ),
        drop_each=each(drop_column, *[int64] * 8, number),
    )
