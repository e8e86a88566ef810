"""The schedules: what each can do, what it costs on which device, and the choice between them.

A schedule is one way to compute attention: a tile of the kernels for CPU vectors, or the kernels for GPU registers or matrix
engines. What a caller needs to know of one is a `Schedule`; nobody asks for its name.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import cpu_schedule, gpu_schedule, matrix_schedule
from .flash_forward import TILES
from .flash_forward_gpu import SUB_GROUP

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from .arguments import Problem
    from .launch import BuildError

TUNING = "ULYSSES_DP_TUNING"  # a file of scripts/tune.py
SCHEDULE = "ULYSSES_DP_SCHEDULE"  # one schedule, wherever it can run

# In which dtype kernels for float32 and float64 read arrays. bfloat16 is uint16, which USM arrays know.
FULL_PRECISION = {
    np.dtype(array): np.dtype(operand)
    for array, operand in (("float32", "float32"), ("float64", "float64"), ("float16", "float32"), ("uint16", "float32"))
}

# of the score, that the kernels for GPUs have: a new one is computed by those for CPUs until it is among these
GPU_OPTIONS = frozenset(
    [
        "window_size",
        "softcap",
        "alibi_slopes",
        "bias",
        "key_padding_mask",
        "key_ranges",
        "sinks",
        "dropout_p",
        "seed",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "seqused_q",
        "seqused_k",
    ]
)

Costs = dict[int, dict[str, float]]  # by head_dim and schedule; head_dim 0 stands for all that are not listed


@dataclass(frozen=True, eq=False)
class Schedule:
    """One way to compute attention.

    ``forward(q, k, v, out, lse, problem, scratch)`` writes `out`, (batch, seq_q, heads, head_dim), and `lse`, the natural
    logarithm of the softmax denominator of every row, (batch, heads, seq_q); q is (batch, seq_q, heads, head_dim), k and v are
    (batch, seq_k, kv_heads, head_dim). They are USM arrays of any strides, but dense in the last axis; `out` has the dtype of q
    or that of lse. ``scratch(slot, shape, dtype=)`` gives USM memory, by default of the dtype of lse.

    ``backward((dout, q, k, v), lse, delta, (dq, dk, dv), problem, scratch)`` writes the gradients; delta is the sum of
    dout * out of every query row.
    """

    name: str
    rows: int  # query rows of a tile
    operands: Mapping[np.dtype, np.dtype]  # in which dtype it reads arrays of a dtype
    serves: Callable[..., bool]  # (device, operand dtype, head_dim, options=, backward=); options: whether there are any
    costs: Mapping[str, float]  # time per query row by kind of device, relative to each other; not listed: only if asked for
    options: frozenset[str] | None  # of the score, by their public names, that its kernels have; None: all that there are
    by_head: bool  # whether it runs faster where the rows of a head follow each other
    forward: Callable[..., None] = field(repr=False)
    backward: Callable[..., None] | None = field(repr=False)  # None: there is none, and `serves` says so
    # numbers of every slot of scratch memory: (dtype of the computation, shape of q, shape of k, backward=)
    scratch: Callable[..., dict[str, int]] = field(default=lambda *_, **__: {}, repr=False)

    def can(self, device: Any, dtype: Any, head_dim: int, *, options: Collection[str], backward: bool) -> bool:
        """Whether it can compute attention of arrays of this dtype on this device, with options of these names."""
        operand = self.operands.get(np.dtype(dtype))
        if operand is None or not (self.options is None or self.options.issuperset(options)):
            return False
        return self.serves(device, str(operand), head_dim, options=bool(options), backward=backward)


def _of_tile(tile: str, costs: Mapping[str, float]) -> Schedule:
    """The schedule by a tile of the kernels for CPU vectors. It also runs on GPUs, slowly."""

    def serves(device: Any, dtype: str, head_dim: int, *, options: bool, backward: bool) -> bool:
        return cpu_schedule.serves(tile, device, dtype, head_dim, options=options, backward=backward)

    def forward(q: Any, k: Any, v: Any, out: Any, lse: Any, problem: Problem, scratch: Callable[..., Any]) -> None:
        cpu_schedule.launch_forward(tile, q, k, v, out, lse, problem)

    rows = TILES[tile].rows * TILES[tile].lanes
    backward = partial(cpu_schedule.launch_backward, tile)
    how = {"options": None, "by_head": True, "forward": forward, "backward": backward}
    return Schedule(tile, rows, FULL_PRECISION, serves, costs, **how)


# The costs of CPUs were measured by scripts/tune.py on a Zen 5 CPU, which for AVX2 was limited to that; those of GPUs only say
# what is preferred.
_ALL = (
    _of_tile("wide", {"avx512": 1.0, "avx2": 1.33}),
    _of_tile("narrow", {"avx512": 1.03, "avx2": 1.0}),
    _of_tile("short", {"avx512": 1.2, "avx2": 1.17, "gpu": 100.0}),
    Schedule(
        name="gpu",
        rows=SUB_GROUP,
        operands=FULL_PRECISION,
        serves=gpu_schedule.serves,
        costs={"gpu": 1.0},
        options=GPU_OPTIONS,
        by_head=False,
        forward=gpu_schedule.launch_forward,
        backward=gpu_schedule.launch_backward,
        scratch=gpu_schedule.scratch_of,
    ),
    Schedule(
        name="matrix",
        rows=SUB_GROUP,
        operands=matrix_schedule.OPERANDS,
        serves=matrix_schedule.serves,
        costs={"gpu": 0.1},
        options=GPU_OPTIONS,
        by_head=False,
        forward=matrix_schedule.launch_forward,
        backward=None,
        scratch=matrix_schedule.scratch_of,
    ),
)
SCHEDULES = {schedule.name: schedule for schedule in _ALL}

# (name of a schedule, device, dtype, head_dim, options, backward) of what a driver did not build
_refused: set[tuple[str, Any, np.dtype, int, frozenset[str], bool]] = set()


def candidates(
    device: Any, dtype: Any, head_dim: int, *, options: Collection[str] = (), backward: bool = False
) -> tuple[Schedule, ...]:
    """The schedules that can compute this on a device."""
    call = device, np.dtype(dtype), head_dim, frozenset(options), backward
    able = (x for x in SCHEDULES.values() if x.can(device, dtype, head_dim, options=options, backward=backward))
    return tuple(x for x in able if (x.name, *call) not in _refused)


def give_up(
    schedule: Schedule,
    error: BuildError,
    device: Any,
    dtype: Any,
    head_dim: int,
    *,
    options: Collection[str] = (),
    backward: bool = False,
) -> None:
    """Choose a schedule no more for such calls, as the driver does not build a kernel of it; with a warning, which names that.

    Where no other schedule can compute them, that error is raised.
    """
    _refused.add((schedule.name, device, np.dtype(dtype), head_dim, frozenset(options), backward))
    _choose.cache_clear()
    if not candidates(device, dtype, head_dim, options=options, backward=backward):
        raise error
    warnings.warn(
        f"other kernels, which may be slower, compute in the place of this one: {error}", RuntimeWarning, stacklevel=2
    )


@dataclass(frozen=True)
class KindOfDevice:
    """What `choose` asks a device, of one that is not there: for plans."""

    is_gpu: bool
    name: str
    sub_group_sizes: tuple[int, ...] = (16, 32)
    max_work_group_size: int = 1024
    native_vector_width_float: int = 16


KINDS = {kind: KindOfDevice(kind == "gpu", f"a {kind.upper()}") for kind in ("cpu", "gpu")}


class Wishes(NamedTuple):
    """What the environment says of schedules."""

    schedule: str | None = None
    tuning: str | None = None

    @classmethod
    def read(cls) -> Wishes:
        """Those of now; an empty variable counts as unset."""
        return cls(os.environ.get(SCHEDULE) or None, os.environ.get(TUNING) or None)


NO_WISHES = Wishes()


def choose(
    device: Any,
    dtype: Any,
    head_dim: int,
    seq_q: int,
    *,
    options: Collection[str] = (),
    backward: bool = False,
    wishes: Wishes | None = None,
) -> Schedule:
    """The schedule with the least time for this many query rows, rounded up to whole tiles.

    Parameters
    ----------
    device : dpctl.SyclDevice
        Where the kernel will run.
    dtype : numpy.dtype
        Of the arrays: float32, float64, float16, or uint16 for bfloat16.
    head_dim, seq_q : int
        Sizes of the problem.
    options : collection of str
        The public names of those that the plain kernels do not have.
    backward : bool
        Whether for the gradient.
    wishes : Wishes, optional
        What the environment says, if that has been read already: it takes longer than all else here.

    Notes
    -----
    The environment variable ULYSSES_DP_TUNING names a file with costs that `scripts/tune.py` measured on this device, and
    ULYSSES_DP_SCHEDULE names one schedule to use wherever it can run.
    """
    return _choose(device, dtype, head_dim, seq_q, frozenset(options), backward, Wishes.read() if wishes is None else wishes)


@lru_cache(maxsize=1024)
def _choose(
    device: Any, dtype: Any, head_dim: int, seq_q: int, options: frozenset[str], backward: bool, wishes: Wishes
) -> Schedule:
    wish, tuning = wishes
    possible = candidates(device, dtype, head_dim, options=options, backward=backward)
    if wish is not None and wish not in SCHEDULES:
        raise ValueError(f"{SCHEDULE} must be one of {', '.join(SCHEDULES)}, not {wish!r}")
    if not possible:
        raise NotImplementedError(f"no kernel for dtype {dtype} and head_dim {head_dim} runs on {device.name.strip()}")
    for schedule in possible:
        if schedule.name == wish:
            return schedule
    costs = default_costs(device) if tuning is None else read(Path(tuning))
    costs_here = costs.get(head_dim, costs[0])
    return min(possible, key=lambda x: costs_here.get(x.name, math.inf) * -(-seq_q // x.rows) * x.rows)


@cache
def default_costs(device: Any) -> Costs:
    """The costs that the schedules declare for this kind of device."""
    kind = "gpu" if device.is_gpu else "avx512" if device.native_vector_width_float >= 16 else "avx2"
    return {0: {schedule.name: schedule.costs[kind] for schedule in SCHEDULES.values() if kind in schedule.costs}}


@cache
def read(path: Path) -> Costs:
    """The costs that `scripts/tune.py` saved."""
    try:
        table = {int(head_dim): costs for head_dim, costs in json.loads(path.read_text())["costs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{TUNING} must name a file that scripts/tune.py saved, not {path}: {error}") from error
    unknown = sorted({name for costs in table.values() for name in costs} - SCHEDULES.keys())
    if unknown or 0 not in table:
        raise ValueError(f"{TUNING}: {path} has {f'unknown schedules {unknown}' if unknown else 'no costs for head_dim 0'}")
    return table


def write(path: Path, device: str, costs: Costs) -> None:
    """Save costs for ULYSSES_DP_TUNING."""
    path.write_text(json.dumps({"device": device, "costs": costs}, indent=1) + "\n")
