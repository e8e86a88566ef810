"""Where the time of a short call of `attention` goes, in microseconds.

    python scripts/bench_call.py --json call.json
    python scripts/bench_call.py --against call.json

For float32 without options, on dpnp arrays. What takes turns (see timing.py):

- "call": the call;
- "Python": the call without the device: the C functions that hand the kernel to the driver and wait for it do nothing;
- "kernel": these functions alone, with the arguments of the call;
- "1 group": the same with one work-group instead of all: what it costs to hand over, to wake a thread, to compute one tile and
  to come back;
- "idle": the kernel, 5 ms after the last one: what it costs to wake threads that have gone to sleep.

The least of the turns counts. The last columns part the time of Python by where its functions are, in shares that a profiler
found: "checks" of arguments and options, "arrays" and their memory, "backends", "kernels" with what launches them, and "dpnp",
with dpctl. "other" are built-in functions and what is above these. "groups" are the work-groups of the kernels.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import pstats
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dpnp
import numpy as np
from timing import Results, clock, in_turns, machine_line, row, side
from ulysses_dp.kernels import launch

import ulysses_dp
from ulysses_dp._device.queue import default_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from timing import Row

HEAD_DIM = 64
CASES = ((1, 16), (8, 16), (8, 32), (8, 64), (8, 128), (8, 256), (8, 512))  # heads, rows
ROOT = Path(__file__).parents[1]
PAUSE = 0.005  # seconds
PLACES = {
    "checks": ("ulysses_dp/_call/",),
    "arrays": ("ulysses_dp/_device/",),
    "backends": ("ulysses_dp/backends/", "kernels/schedules.py"),
    "kernels": ("kernels/",),
    "dpnp": ("dpnp/", "dpctl/"),
    "other": ("",),
}


@contextmanager
def replaced(**functions: Any) -> Iterator[None]:
    """Let `ulysses_dp.kernels.launch` call these instead of the C functions of these names."""
    before = {name: getattr(launch, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(launch, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(launch, name, function)


def without_device(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call without its kernels."""

    def run() -> Any:
        with replaced(_submit=lambda *_: 1, _wait=lambda _: None, _delete=lambda _: None):
            return call()

    return run


def kernels_of(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """The arguments with which a call hands kernels to the driver."""
    submit, seen = launch._submit, []

    def note(*arguments: Any) -> Any:
        seen.append(arguments)
        return submit(*arguments)

    with replaced(_submit=note):
        call()
    return seen


def run_kernels(kernels: list[tuple[Any, ...]], groups: int | None = None) -> None:
    """Hand kernels to the driver again, all their work-groups or so many, and wait for each."""
    for kernel in kernels:
        *before, whole, lanes, dimensions, events, count = kernel
        size = whole if groups is None else (ctypes.c_size_t * 1)(groups * lanes[0])
        event = launch._submit(*before, size, lanes, dimensions, events, count)
        launch._wait(event)
        launch._delete(event)


def after_a_pause(call: Callable[[], Any]) -> Callable[[], float]:
    """A turn of one call on an idle device."""

    def turn() -> float:
        time.sleep(PAUSE)
        return clock(call)

    return turn


def shares_of_python(call: Callable[[], Any], count: int = 1000) -> dict[str, float]:
    """How the time of Python functions is parted, by their places."""
    profile = cProfile.Profile(time.thread_time)
    profile.enable()
    for _ in range(count):
        call()
    profile.disable()
    seconds = dict.fromkeys(PLACES, 0.0)
    for (file, *_), (_, _, own, _, _) in pstats.Stats(profile).stats.items():
        inside = file.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
        seconds[next(name for name, starts in PLACES.items() if inside.startswith(starts))] += own
    return {name: x / sum(seconds.values()) for name, x in seconds.items()}


def measure(heads: int, seq: int, seconds: float) -> Row:
    """Time one problem."""
    numbers = np.random.default_rng(0).standard_normal((3, 1, seq, heads, HEAD_DIM), dtype=np.float32)
    q, k, v = (dpnp.asarray(x, sycl_queue=default_queue()) for x in numbers)

    def call() -> Any:
        return ulysses_dp.attention(q, k, v)

    call()
    kernels = kernels_of(call)
    sides = {
        "ours": side(call, seconds=0.01),
        "Python": side(without_device(call), seconds=0.01),
        "kernel": side(lambda: run_kernels(kernels), seconds=0.01),
        "1 group": side(lambda: run_kernels(kernels, 1), seconds=0.01),
        "idle": after_a_pause(lambda: run_kernels(kernels)),
    }
    times = in_turns(sides, seconds)
    groups = [kernel[5][0] // kernel[6][0] for kernel in kernels]
    shares = shares_of_python(without_device(call))
    return row({"heads": heads, "seq": seq, "head_dim": HEAD_DIM}, times, groups=groups, python=shares)


def line(result: Row) -> str:
    """A row of the table."""
    case, least = result["case"], {name: 1e6 * x for name, x in result["least_seconds"].items()}
    cells = " ".join(f"{least[name]:8.1f}" for name in ("ours", "Python", "kernel", "1 group", "idle"))
    parts = " ".join(f"{share * least['Python']:8.1f}" for share in result["python"].values())
    return f"{case['heads']:5} {case['seq']:5} {'+'.join(map(str, result['groups'])):>7} | {cells} | {parts}"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each row (1.5)")
    parser.add_argument("--seq", type=int, nargs="*", help="only these")
    Results.add_options(parser, "the parts")
    arguments = parser.parse_args()
    with Results("bench_call", arguments) as results:
        print(machine_line(results.machine))
        print("heads  rows  groups |     call   Python   kernel  1 group     idle |", end=" ")
        print(" ".join(f"{name:>8}" for name in PLACES))
        for heads, seq in CASES:
            if seq in (arguments.seq or [seq]):
                results.rows.append(measure(heads, seq, arguments.seconds))
                print(line(results.rows[-1]), flush=True)


if __name__ == "__main__":
    main()
