"""Every kernel made for GPUs, and the copies, in Oclgrind at small odd sizes: `make memcheck`.

    python tools/gpu/memcheck.py [--kernel NAME] [--random N]

Each call runs in a process of its own. A line tells what it launched and how long it took. A fault is an access outside of an
allocation, an uninitialised number that decides something or is written, a race, a barrier that not all lanes reach, a write
around a result, or a wrong result. Ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu import cases, oclgrind, spirv, standin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIME_LIMIT = 900  # seconds for one call
ROWS = 23  # at most, of a random call
AT_ONCE = 2


def calls() -> Iterator[tuple[str, Callable]]:
    """By title, all that may be run: calls of every kind, and endless random ones."""
    for kind, seed in product(cases.COPIES, range(3)):
        yield f"copy {kind} {seed}", lambda machine, kind=kind, seed=seed, **more: cases.copy(machine, kind, seed, **more)
    for kind, seed in product(cases.TRAVELS, range(3)):
        yield f"travel {kind} {seed}", lambda machine, kind=kind, seed=seed, **more: cases.travel(machine, kind, seed, **more)
    for dtype, seed in product(cases.LIMITS, range(3)):
        yield f"row_dot {dtype} {seed}", lambda machine, dtype=dtype, seed=seed, **more: cases.dot(machine, dtype, seed, **more)
        yield f"merge {dtype} {seed}", lambda machine, dtype=dtype, seed=seed, **more: cases.merge(machine, dtype, seed, **more)
    for case in cases.kinds():
        # two tiles of rows, the second one not full
        small = cases.small(case)
        yield str(small), lambda machine, case=small, **more: cases.attention(machine, case, **more)
    for seed in count(1):
        case = cases.random_case(seed, ROWS)
        yield str(case), lambda machine, case=case, **more: cases.attention(machine, case, **more)


def chosen(part: str, random: int) -> Iterator[tuple[int, str]]:
    """Numbers and titles of the calls to run: copies, what launches a kernel for GPUs that no call before did, random ones."""
    seen: set[tuple[str, tuple[tuple[int, int], ...]]] = set()
    left = random
    for number, (title, call) in enumerate(calls()):
        kernels = cases.wanted(lambda machine, call=call: call(machine, compare=False))
        is_random = "seed" in title and not title.endswith("seed 0")
        if is_random and left <= 0:
            return
        if not any(part in name for name, _ in kernels):
            continue
        for_gpu = {kernel for kernel in kernels if spirv.for_gpu(kernel[0])}
        if is_random and for_gpu:
            left -= 1
        elif title.startswith(("forward", "backward")) and not for_gpu - seen:
            continue
        seen |= for_gpu
        yield number, title


def run_one(number: int, *, filled: bool) -> None:
    """Run one call here."""
    title, call = next(x for i, x in enumerate(calls()) if i == number)
    with tempfile.TemporaryDirectory() as folder:
        machine = oclgrind.Oclgrind(standin.manifest().FOLDER, Path(folder), filled=filled)
        try:
            call(machine)
        except NotImplementedError as error:
            print(f"{title}: not run: {error}")
        else:
            print(f"{title}: {machine.launches} launches")


def in_process(number: int, *more: str) -> tuple[int, list[str]]:
    """Run one call in a process of its own; its exit status and what it said."""
    command = [sys.executable, Path(__file__).resolve(), "--inside", str(number), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return 1, [f"no end in {TIME_LIMIT} s"]
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()


def run(number: int, title: str) -> bool:
    """Run one call and say how it ended."""
    start = time.perf_counter()
    code, lines = in_process(number)
    if code == 0:
        print(f"ok: {lines[-1]}, {time.perf_counter() - start:.0f} s", flush=True)
        return True
    found = [f"    {line[:200]}" for line in lines[-20:] if line.strip()]
    if any("uninitialized" in line for line in lines):
        # what hides behind: the same with memory full of zeros
        code, lines = in_process(number, "--filled")
        found.append(f"    with memory full of zeros: {lines[-1] if code == 0 else ' '.join(lines[-5:])}")
    print(f"FAULT: {title}, {time.perf_counter() - start:.0f} s", *found, sep="\n", flush=True)
    return False


def main() -> None:
    """Choose, run, say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only calls that launch a kernel with this in its name")
    parser.add_argument("--random", type=int, default=4, help="how many random calls")
    parser.add_argument("--inside", type=int, help="run this call here")
    parser.add_argument("--filled", action="store_true", help="with scratch memory full of zeros")
    arguments = parser.parse_args()
    missing = oclgrind.missing()
    if missing:
        print(f"memcheck: skipped: no {', '.join(missing)}; on Debian 12, apt install {oclgrind.PACKAGES} brings them")
        return
    standin.install()
    if arguments.inside is not None:
        run_one(arguments.inside, filled=arguments.filled)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        good = list(pool.map(lambda x: run(*x), chosen(arguments.kernel, arguments.random)))
    print(f"memcheck: {len(good)} calls, {good.count(False)} with faults")
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()
