"""Measure the kernel schedules and the backends on the device at hand, and save the table of the schedules for ulysses_dp.

    python scripts/tune.py --save tuning.json
    export ULYSSES_DP_TUNING=$PWD/tuning.json

Every schedule that can run is timed on the same problem in turns, for each head_dim with a kernel of its own and for one
without. The table holds the time per query row relative to the best; a call then takes the schedule with the least time for
its rows, rounded up to whole tiles.

A second table compares the backends that are installed, for the user to choose `attn_type` by.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dpnp
import numpy as np
from timing import in_turns, side
from ulysses_dp.kernels import schedules
from ulysses_dp.kernels.flash_forward import HEAD_DIMS

from ulysses_dp import AttnType, attention
from ulysses_dp._device.queue import default_queue
from ulysses_dp.backends import usable

if TYPE_CHECKING:
    from collections.abc import Callable

HEADS = 8
ROWS = 960  # a multiple of the rows of every tile
ANY = 50  # a head_dim that has no kernel of its own
LENGTHS = (128, 1024)  # rows, for the backends


def measure(head_dim: int, seq: int, seconds: float) -> dict[str, float]:
    """Time of every schedule relative to the best."""
    inputs = arrays(head_dim, seq, "float32")

    def call(name: str) -> None:
        os.environ[schedules.SCHEDULE] = name
        attention(*inputs)

    possible = schedules.candidates(default_queue().sycl_device, inputs[0].dtype, head_dim)
    medians = medians_of({schedule.name: partial(call, schedule.name) for schedule in possible}, seconds)
    os.environ.pop(schedules.SCHEDULE)
    return {name: round(value / min(medians.values()), 3) for name, value in medians.items()}


def arrays(head_dim: int, seq: int, dtype: str) -> list[Any]:
    """q, k and v on the device; bfloat16 as bit patterns."""
    queue = default_queue()
    numbers = np.random.default_rng(0).standard_normal((3, 1, seq, HEADS, head_dim), dtype=np.float32)
    if dtype == "bfloat16":
        numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return [dpnp.asarray(x, dtype=numbers.dtype if dtype == "bfloat16" else dtype, sycl_queue=queue) for x in numbers]


def medians_of(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of every call, all of them measured in turns."""
    times = in_turns({name: side(call, seconds=0) for name, call in calls.items()}, seconds, least=1)
    return {name: statistics.median(turns) for name, turns in times.items()}


def compare_backends(seconds: float) -> None:
    """Print the milliseconds of a call for every backend that is installed, but for the reference."""
    names = [x for x in usable() if x is not AttnType.NUMPY]
    dtypes = ["float32", "float64", "float16", "bfloat16"]
    device = default_queue().sycl_device
    if not device.has_aspect_fp16:
        dtypes.remove("float16")
    if not device.has_aspect_fp64:
        dtypes.remove("float64")
    print(f"\nmilliseconds of a call, {HEADS} heads, no mask")
    print("dtype     head_dim  rows" + "".join(f"{x.name:>14}" for x in names))
    for dtype in dtypes:
        for head_dim in (64, 128):
            for seq in LENGTHS:
                inputs = arrays(head_dim, seq, dtype)
                options = {"dtype": dtype} if dtype == "bfloat16" else {}
                calls = {}
                for x in names:
                    call = partial(attention, *inputs, attn_type=x, **options)
                    try:
                        call()
                    except (NotImplementedError, ImportError):  # on this device, or for this dtype
                        continue
                    calls[x.name] = call
                medians = medians_of(calls, seconds)
                cells = (f"{1e3 * medians[x.name]:14.2f}" if x.name in medians else f"{'-':>14}" for x in names)
                print(f"{dtype:8} {head_dim:9} {seq:5}" + "".join(cells), flush=True)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=ROWS, help=f"rows of the problem ({ROWS})")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row of the tables (1.0)")
    parser.add_argument("--save", type=Path, help="write the table here, for ULYSSES_DP_TUNING")
    parser.add_argument(
        "--head-dim", type=int, nargs="*", choices=HEAD_DIMS, default=HEAD_DIMS, help="head_dims of the first table (all)"
    )
    arguments = parser.parse_args()
    if arguments.seq < 1 or arguments.seconds <= 0:
        parser.error("--seq and --seconds must be positive")

    device = default_queue().sycl_device
    print(f"{device.name.strip()}: time relative to the best schedule, {HEADS} heads, {arguments.seq} rows, float32")
    print("head_dim  " + "".join(f"{name:>8}" for name in schedules.SCHEDULES))
    costs = {}
    for head_dim in (0, *arguments.head_dim):
        costs[head_dim] = measure(head_dim or ANY, arguments.seq, arguments.seconds)
        cells = (f"{costs[head_dim].get(name, float('nan')):8.2f}".replace("nan", "  -") for name in schedules.SCHEDULES)
        print(f"{head_dim or 'other':8}  " + "".join(cells), flush=True)
    if arguments.save:
        schedules.write(arguments.save, device.name.strip(), costs)
        print(f"saved; to use it: export {schedules.TUNING}={arguments.save.resolve()}")
    compare_backends(arguments.seconds)


if __name__ == "__main__":
    main()
