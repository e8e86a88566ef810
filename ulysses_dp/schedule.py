"""Which kernel a device gets: small tables of measured costs, and how a user replaces them (`scripts/tune.py`)."""

from __future__ import annotations

import json
import math
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ulysses_dp.kernels.flash_forward import TILES, TILES_OF
from ulysses_dp.kernels.flash_forward_gpu import GPU_TILES, SUB_GROUP

# Time per query row by head_dim, relative to each other; head_dim 0 stands for all that are not listed. A call takes the
# schedule with the least time for its rows, rounded up to whole tiles. Measured by scripts/tune.py on a Zen 5 CPU, which
# for AVX2 was limited to that.
Costs = dict[int, dict[str, float]]


AVX512: Costs = {0: {"wide": 1.0, "narrow": 1.03, "short": 1.2}}
AVX2: Costs = {0: {"wide": 1.33, "narrow": 1.0, "short": 1.17}}
GPU: Costs = {0: {"short": 1.0}} | {d: {"gpu": 1.0} for d in GPU_TILES}

TUNING = "ULYSSES_DP_TUNING"  # a file of scripts/tune.py
SCHEDULE = "ULYSSES_DP_SCHEDULE"  # one schedule, wherever it can run
ROWS = {name: tile.rows * tile.lanes for name, tile in TILES.items()} | {"gpu": SUB_GROUP}


def candidates(device: Any, dtype: Any, head_dim: int) -> list[str]:
    """The schedules that can run on a device for a dtype and head_dim."""
    gpu = dtype == np.float32 and head_dim in GPU_TILES and SUB_GROUP in device.sub_group_sizes
    fits = [name for name in TILES_OF[str(dtype)] if TILES[name].lanes <= device.max_work_group_size]
    return fits + ["gpu"] * gpu


def choose(device: Any, dtype: Any, head_dim: int, seq_q: int) -> str:
    """The schedule for this many query rows: the name of a tile of `flash_forward`, or "gpu" for the kernels for GPUs.

    Parameters
    ----------
    device : dpctl.SyclDevice
        Where the kernel will run.
    dtype : numpy.dtype
        float32 or float64.
    head_dim, seq_q : int
        Sizes of the problem.

    Notes
    -----
    The environment variable ULYSSES_DP_TUNING names a file with costs that `scripts/tune.py` measured on this device, and
    ULYSSES_DP_SCHEDULE names one schedule to use wherever it can run.
    """
    return _choose(device, np.dtype(dtype), head_dim, seq_q, os.environ.get(SCHEDULE), os.environ.get(TUNING))


@lru_cache(maxsize=1024)
def _choose(device: Any, dtype: Any, head_dim: int, seq_q: int, wish: str | None, tuning: str | None) -> str:
    possible = candidates(device, dtype, head_dim)
    if wish is not None and wish not in ROWS:
        raise ValueError(f"{SCHEDULE} must be one of {', '.join(ROWS)}, not {wish!r}")
    if wish in possible:
        return wish
    costs = _costs(device, tuning)
    costs_here = {name: cost for name, cost in costs.get(head_dim, costs[0]).items() if name in possible} or {possible[0]: 1.0}
    return min(costs_here, key=lambda name: costs_here[name] * -(-seq_q // ROWS[name]) * ROWS[name])


def fastest(device: Any, head_dim: int, tiles: tuple[str, ...]) -> str:
    """Of these tiles the one with the least time per row, if none is measured the first."""
    costs = _costs(device, os.environ.get(TUNING))
    costs_here = costs.get(head_dim, costs[0])
    return min(tiles, key=lambda name: costs_here.get(name, math.inf))


@cache
def _costs(device: Any, tuning: str | None) -> Costs:
    if tuning is not None:
        return read(Path(tuning))
    if device.is_gpu:
        return GPU
    return AVX512 if device.native_vector_width_float >= 16 else AVX2


def read(path: Path) -> Costs:
    """The costs that `scripts/tune.py` saved."""
    try:
        table = {int(head_dim): costs for head_dim, costs in json.loads(path.read_text())["costs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{TUNING} must name a file that scripts/tune.py saved, not {path}: {error}") from error
    unknown = sorted({name for costs in table.values() for name in costs} - ROWS.keys())
    if unknown or 0 not in table:
        raise ValueError(f"{TUNING}: {path} has {f'unknown schedules {unknown}' if unknown else 'no costs for head_dim 0'}")
    return table


def write(path: Path, device: str, costs: Costs) -> None:
    """Save costs for ULYSSES_DP_TUNING."""
    path.write_text(json.dumps({"device": device, "costs": costs}, indent=1) + "\n")
