"""The schedule for the matrix engines of Intel GPUs: launch flash_forward_matrix.py, for numbers of 16 bits."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import flash_forward_matrix, value_panels
from .arguments import strides_by_head, strides_of
from .flash_forward_matrix import CONSTANTS, MATRIX_TILES, SUB_GROUP, SUB_GROUPS
from .gpu_schedule import block_loads_read, has_block_loads
from .launch import launch, upload
from .launch_arguments import option_arguments, sizes_of
from .panel_copy import Panel
from .relayout import copy_panels, source_of, target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .arguments import Problem
    from .score import OptionNumbers

# In which dtype it reads arrays: as they are. bfloat16 is uint16, which USM arrays know.
OPERANDS = {np.dtype(dtype): np.dtype(dtype) for dtype in ("float16", "uint16")}


_PITCH = 32  # elements of 64 bytes: rows of a surface start at multiples of these


def serves(device: Any, dtype: str, head_dim: int, *, options: bool, backward: bool) -> bool:
    """Whether there are kernels for this: the forward on GPUs whose engine takes 16 lanes, and slowly on CPUs.

    The first GPUs with an engine, Arc A and Core Ultra 1, have it for 8 lanes: these have sub-groups of 8, and no block loads
    of two dimensions.
    """
    here = has_block_loads(device) if device.is_gpu else SUB_GROUP in device.sub_group_sizes
    return here and not backward and head_dim <= max(MATRIX_TILES)


def scratch_of(dtype: str, q_shape: Sequence[int], k_shape: Sequence[int], *, backward: bool) -> dict[str, int]:
    """Numbers of float32 of every slot of scratch memory that a call with arrays of these shapes takes, where q and k are
    dense: as wide rows as loads read are read where they lie."""
    (batch, seq_q, heads, head_dim), (_, seq_k, kv_heads, _) = q_shape, k_shape
    blocks = batch * kv_heads * _blocks(seq_k)
    slots = {"transposed values": blocks * head_dim * value_panels.KEYS // 2, "values that are not finite": 2 * blocks}
    if head_dim % _PITCH:
        rows = {"q": batch * heads * seq_q, "k": batch * kv_heads * seq_k}
        slots |= {_surface_of(name): _surface_size(n, _columns(head_dim)) for name, n in rows.items()}
    return slots


def launch_forward(q: Any, k: Any, v: Any, out: Any, lse: Any, problem: Problem, scratch: Callable[..., Any]) -> None:
    """Write `out` and `lse`; see `schedules.Schedule.forward`."""
    if not out.size:
        return
    queue, (batch, seq_q, heads, head_dim) = q.sycl_queue, q.shape
    tile = MATRIX_TILES[flash_forward_matrix.tile_for(head_dim)]
    sizes = sizes_of(q, k, problem, rows=seq_q, tile_rows=SUB_GROUP)
    tables, numbers = option_arguments(q, problem.options, lse.dtype)
    spans = q.usm_data if problem.options is None else upload(queue, problem.options.spans)
    constants = _constants(q, out, problem, numbers)
    values, infinite, value_keys = _value_panels(v, scratch)
    columns = _columns(head_dim)
    q, k = (_surface(x, columns, scratch, _surface_of(name)) for name, x in (("q", q), ("k", k)))
    tiles = batch * heads * sizes.row_blocks * tile.parts
    launch(
        queue,
        flash_forward_matrix.name(head_dim),
        [*(x.usm_data for x in (q, k, v, values, out, infinite, lse)), spans, *tables],
        (
            *(*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(out), *strides_by_head(lse)),
            *(*sizes, tiles, columns, value_keys, 0),
            *(problem.scale, problem.scale * math.log2(math.e), 0.0, *numbers),
        ),
        groups=-(-tiles // SUB_GROUPS),
        lanes=SUB_GROUP * SUB_GROUPS,
        constants=constants,
    )


def _constants(q: Any, out: Any, problem: Problem, numbers: OptionNumbers) -> tuple[tuple[int, int], ...]:
    """The specialisation constants of a launch."""
    fours = numbers.step == 1 and numbers.first_key % 4 == 0
    values = {
        "hardware": q.sycl_queue.sycl_device.is_gpu,
        "half": q.dtype == np.float16,
        "wide": out.dtype == np.float32,
        "spans": problem.options is not None,
        "softcap": numbers.softcap != 0,
        "slopes": numbers.use_slopes,
        "bias": numbers.use_bias and (2 if numbers.bias_key == 1 else 1),
        "padding": numbers.use_padding,
        "dropout": numbers.threshold and (1 if fours else 2),
    }
    more = any(values[name] for name in ("softcap", "slopes", "bias", "padding")) or numbers.use_sinks
    values["changed"] = more or problem.scale <= 0
    return tuple(sorted((CONSTANTS[name], int(value)) for name, value in values.items() if value))


def _value_panels(v: Any, scratch: Callable[..., Any]) -> tuple[Any, Any, int]:
    """V as value_panels.py makes it, which blocks hold what is not finite, and the keys of a row."""
    batch, seq_k, heads, head_dim = v.shape
    blocks = _blocks(seq_k)
    groups, value_keys = batch * heads * blocks, blocks * value_panels.KEYS
    panels = scratch("transposed values", (groups * head_dim * value_panels.KEYS // 2,))
    infinite = scratch("values that are not finite", (2 * groups,))
    launch(
        v.sycl_queue,
        value_panels.NAME,
        [x.usm_data for x in (v, panels, infinite)],
        (*strides_of(v), heads, seq_k, head_dim, blocks),
        groups=groups,
        lanes=SUB_GROUP,
        constants=((value_panels.CONSTANTS["half"], 1),) if v.dtype == np.float16 else (),
    )
    return panels, infinite, value_keys


def _blocks(seq_k: int) -> int:
    """Of keys, one at least: what loads read must be there."""
    return max(-(-seq_k // value_panels.KEYS), 1)


def _columns(head_dim: int) -> int:
    """The numbers of a row that loads read: rows of fewer than 64 bytes, or of an odd number of elements, are no surface."""
    return head_dim if head_dim >= 32 and head_dim % 2 == 0 else flash_forward_matrix.tile_for(head_dim)


def _pitch(columns: int) -> int:
    return -(-columns // _PITCH) * _PITCH


def _surface_of(name: str) -> str:
    """The slot of its copy."""
    return f"surface of {name}"


def _surface_size(rows: int, columns: int) -> int:
    """Numbers of float32 that the copy of so many rows takes."""
    return max(rows, 1) * _pitch(columns) // 2


def _surface(x: Any, columns: int, scratch: Callable[..., Any], slot: str) -> Any:
    """An array (batch, seq, heads, head_dim) as loads can read `columns` numbers of its rows: itself, or a copy with zeros."""
    batch, seq, heads, head_dim = x.shape
    if head_dim == columns and block_loads_read(x):
        return x
    pitch = _pitch(columns)
    memory = scratch(slot, (_surface_size(batch * heads * seq, columns),))
    copy = SimpleNamespace(
        usm_data=memory.usm_data, shape=x.shape, dtype=x.dtype, sycl_queue=x.sycl_queue,
        strides=(heads * seq * pitch, pitch, seq * pitch, 1), _element_offset=0,
    )  # fmt: skip
    zero = SimpleNamespace(usm_data=upload(x.sycl_queue, np.zeros(1, x.dtype)), dtype=x.dtype)
    panels = [Panel(*source_of(0, x), *target_of(0, copy), heads, head_dim)]
    if columns > head_dim:
        number, offset, *steps = target_of(0, copy)
        panels.append(Panel(1, *[0] * 5, number, offset + head_dim, *steps, heads, columns - head_dim))
    copy_panels([x, zero], [copy], panels, rows=seq, batch=batch)
    return copy
