"""Measure which kernel schedule is the fastest on the device at hand, and save the table that ulysses_dp then uses.

    python scripts/tune.py --save tuning.json
    export ULYSSES_DP_TUNING=$PWD/tuning.json

Every schedule that can run is timed on the same problem in turns, for each head_dim with a kernel of its own and for one
without. The table holds the time per query row relative to the best; a call then takes the schedule with the least time for
its rows, rounded up to whole tiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import dpnp
import numpy as np
from ulysses_dp.kernels.flash_forward import HEAD_DIMS

from ulysses_dp import attention, schedule
from ulysses_dp.device import default_queue

HEADS = 8
ROWS = 960  # a multiple of the rows of every tile
ANY = 50  # a head_dim that has no kernel of its own


def measure(head_dim: int, seq: int, seconds: float) -> dict[str, float]:
    """Time of every schedule relative to the best."""
    queue = default_queue()
    rng = np.random.default_rng(0)
    inputs = [dpnp.asarray(x, sycl_queue=queue) for x in rng.standard_normal((3, 1, seq, HEADS, head_dim), dtype=np.float32)]
    names = schedule.candidates(queue.sycl_device, inputs[0].dtype, head_dim)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = None
    while end is None or time.perf_counter() < end:
        for name in names:
            os.environ[schedule.SCHEDULE] = name
            start = time.perf_counter()
            attention(*inputs)
            times[name].append(time.perf_counter() - start)
        if end is None:  # the first turn compiled the kernels
            times = {name: [] for name in names}
            end = time.perf_counter() + seconds
    medians = {name: statistics.median(turns or [float("inf")]) for name, turns in times.items()}
    return {name: round(value / min(medians.values()), 3) for name, value in medians.items()}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=ROWS, help=f"rows of the problem ({ROWS})")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each head_dim (1.0)")
    parser.add_argument("--save", type=Path, help="write the table here, for ULYSSES_DP_TUNING")
    arguments = parser.parse_args()
    if arguments.seq < 1 or arguments.seconds <= 0:
        parser.error("--seq and --seconds must be positive")

    device = default_queue().sycl_device
    print(f"{device.name.strip()}: time relative to the best schedule, {HEADS} heads, {arguments.seq} rows, float32")
    print("head_dim  " + "".join(f"{name:>8}" for name in schedule.ROWS))
    costs = {}
    for head_dim in (0, *HEAD_DIMS):
        costs[head_dim] = measure(head_dim or ANY, arguments.seq, arguments.seconds)
        cells = (f"{costs[head_dim].get(name, float('nan')):8.2f}".replace("nan", "  -") for name in schedule.ROWS)
        print(f"{head_dim or 'other':8}  " + "".join(cells), flush=True)
    if arguments.save:
        schedule.write(arguments.save, device.name.strip(), costs)
        print(f"saved; to use it: export {schedule.TUNING}={arguments.save.resolve()}")


if __name__ == "__main__":
    main()
