"""Run the SPIR-V of the kernels on an NVIDIA GPU, translated, and compare with the NumPy references.

    python scripts/run_on_nvidia.py build       # where the kernels are built; no GPU. Writes .gpu/nvidia
    python3 scripts/run_on_nvidia.py            # where the GPU is: needs NumPy, CuPy, this repository and .gpu/nvidia

What a GPU would get is run: every kernel made for GPUs, and for whatever these do not serve those of CPUs. Each call has random
sizes, strides and options; inputs lie between NaN, results between numbers that must stay, and scratch memory is full of NaN.
Every call runs twice and must give the same bits. Then arrays behind offsets above 2**31, and at last a part of it again under
compute-sanitizer, which sees every access outside of an allocation. Prints a table of the kernels; ends with 1 if anything is
wrong.

It proves index arithmetic, bounds, numerics and work-groups that run at the same time. Of Intel's compiler, registers, memory
messages and speed it proves nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".gpu/nvidia"
sys.path.insert(0, str(ROOT / "tools"))
from gpu import cases, nvidia, spirv, standin  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RANDOM_SEEDS = 500  # a run takes as many of these random calls as there is time for
ROWS = 300  # at most, of a random call
SANITIZER_SECONDS = 100


def plan(rows: int = ROWS) -> Iterator[tuple[str, Callable[..., Any]]]:
    """All calls but the large ones: those of every kind first, then random ones."""
    for case in cases.kinds():
        yield str(case), lambda machine, case=case, **more: cases.attention(machine, case, **more)
    for kind in cases.COPIES:
        yield f"copy {kind}", lambda machine, kind=kind, **more: cases.copy(machine, kind, 0, **more)
    for kind in cases.TRAVELS:
        yield f"travel {kind}", lambda machine, kind=kind, **more: cases.travel(machine, kind, 0, **more)
    for dtype in cases.LIMITS:
        yield f"row_dot {dtype}", lambda machine, dtype=dtype, **more: cases.dot(machine, dtype, 0, **more)
        yield f"merge {dtype}", lambda machine, dtype=dtype, **more: cases.merge(machine, dtype, 0, **more)
    for seed in range(1, RANDOM_SEEDS + 1):
        case = cases.random_case(seed, rows)
        yield str(case), lambda machine, case=case, **more: cases.attention(machine, case, **more)
        if seed % 5 == 0:
            kind = cases.COPIES[seed // 5 % len(cases.COPIES)]
            yield f"copy {kind} {seed}", lambda machine, kind=kind, seed=seed, **more: cases.copy(machine, kind, seed, **more)
        if seed % 25 == 0:
            dtype = list(cases.LIMITS)[seed // 25 % 2]
            yield f"row_dot {dtype} {seed}", lambda m, dtype=dtype, seed=seed, **more: cases.dot(m, dtype, seed, **more)
            yield f"merge {dtype} {seed}", lambda m, dtype=dtype, seed=seed, **more: cases.merge(m, dtype, seed, **more)


# --- where there is no GPU ----------------------------------------------------------------------------------------------------


def build(tools: Path, only: str) -> None:
    """Translate every kernel that a run needs into `FOLDER`."""
    standin.install()
    from ulysses_dp.kernels.constants import specialise

    manifest = standin.manifest()
    dry = cases.Dry()
    for _, call in plan(rows=4):
        call(dry, compare=False)
    for_gpu = {name for name in manifest.read() if spirv.for_gpu(name)}
    missed = for_gpu - {name for name, _ in dry.wanted}
    if missed:
        sys.exit(f"run_on_nvidia: no call reaches {', '.join(sorted(missed))}")
    if not only:
        shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    compiler = nvidia.Compiler(tools)

    def translate(kernel: tuple[str, tuple[tuple[int, int], ...]]) -> str:
        name, constants = kernel
        start, target = time.perf_counter(), FOLDER / nvidia.file_name(name, constants)
        module = (manifest.FOLDER / f"{name}.spv").read_bytes()
        compiler.compile(specialise(module, constants), target)
        return f"{target.name:60} {target.stat().st_size / 1024:6.0f} KB {time.perf_counter() - start:6.1f} s"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(translate, sorted(x for x in dry.wanted if only in x[0])):
            print(line, flush=True)
    shutil.copy(manifest.FOLDER / "manifest.json", FOLDER)
    (FOLDER / "for_gpu.json").write_text(json.dumps(sorted(for_gpu)) + "\n")
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{FOLDER.relative_to(ROOT)}: {size / 2**20:.1f} MiB")


# --- where the GPU is ---------------------------------------------------------------------------------------------------------


class Record:
    """What became of the calls, by kernel."""

    def __init__(self, machine: nvidia.Nvidia):
        self.machine, self.failures = machine, []
        self.calls: dict[str, int] = {}

    def run(self, title: str, call: Callable[..., Any], *, repeat: bool) -> None:
        """One call, which must give the same bits if it is repeated."""
        before = dict(self.machine.launches)
        try:
            first = call(self.machine)
            if repeat and first is not None:
                again = call(self.machine)
                if any(x.tobytes() != y.tobytes() for x, y in zip(first, again, strict=True)):
                    raise AssertionError(f"{title}: not the same bits again")
        except AssertionError as error:
            self.failures.append(str(error))
            print(f"FAILED  {error}", flush=True)
        for name, count in self.machine.launches.items():
            if count > before.get(name, 0):
                self.calls[name] = self.calls.get(name, 0) + 1


def far(machine: nvidia.Nvidia, dtype: str, head_dim: int) -> None:
    """Forward and gradient of arrays behind more than 2**31 numbers, in one allocation."""
    from ulysses_dp.kernels import reference, schedules
    from ulysses_dp.kernels.arguments import Problem

    seq, heads, start = 600, 2, 2**31 + 12345 * 64
    shape, size = (1, seq, heads, head_dim), seq * heads * head_dim
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(4))
    itemsize = np.dtype(dtype).itemsize
    memory = standin.Memory(machine, (start + 8 * size) * itemsize)
    strides = (size, heads * head_dim, head_dim, 1)
    arrays = [standin.Array(memory, dtype, shape, strides, start + i * size) for i in range(8)]
    flat = memory.handle.view(dtype)
    for i, x in enumerate((q, k, v, dout)):
        flat[start + i * size : start + (i + 1) * size] = machine.cupy.asarray(x.ravel())
    problem = {"scale": head_dim**-0.5, "diagonal": 0, "group": 1}

    def scratch(slot: str, shape: tuple[int, ...]) -> Any:
        return standin.empty(machine, shape, dtype)

    def choose(*, backward: bool) -> Any:
        return schedules.choose(standin.Gpu(), np.dtype(dtype), head_dim, seq, backward=backward)

    lse = standin.empty(machine, (1, heads, seq), dtype)
    choose(backward=False).forward(*arrays[:3], arrays[4], lse, Problem(**problem, options=None), scratch)
    expected, expected_lse = reference.forward(q, k, v, **problem)
    delta = standin.asarray(machine, np.einsum("bihd,bihd->bhi", dout, expected).astype(dtype))
    inputs = arrays[3], *arrays[:3]
    choose(backward=True).backward(inputs, lse, delta, tuple(arrays[5:]), Problem(**problem, options=None), scratch)
    numbers = [x.astype(dtype) for x in (expected_lse, np.einsum("bihd,bihd->bhi", dout, expected))]
    wanted = expected, *reference.backward(dout, q, k, v, *numbers, **problem)
    for i, (name, x) in enumerate(zip(("out", "dq", "dk", "dv"), wanted, strict=True), 4):
        got = machine.cupy.asnumpy(flat[start + i * size : start + (i + 1) * size]).reshape(shape)
        if not cases.error(got, x) <= cases.LIMITS[dtype]:
            raise AssertionError(f"offsets above 2**31, {dtype} head_dim {head_dim}: error of {name} {cases.error(got, x):.2e}")


def report(record: Record, for_gpu: set[str]) -> None:
    """The table, and whether every kernel for GPUs was run."""
    print(f"{'kernel':52} {'calls':>6} {'launches':>9}")
    for name in sorted(record.calls):
        print(f"{name:52} {record.calls[name]:6} {record.machine.launches[name]:9}")
    missed = sorted(for_gpu - record.machine.launches.keys())
    if missed:
        record.failures.append(f"not run: {', '.join(missed)}")
    kinds = f"{len(record.calls)} kernels, {len(for_gpu)} made for GPUs"
    print(f"{kinds}; {sum(record.machine.launches.values())} launches; {len(record.failures)} failures")
    for failure in record.failures:
        print(f"FAILED  {failure}")


def sanitize() -> str:
    """A part again under compute-sanitizer; what it says, or an empty string if all is well."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("compute-sanitizer: skipped: it is not there")
        return ""
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, Path(__file__).resolve(), "sanitized"]
    environment = {**os.environ, "CUPY_NO_POOL": "1"}
    limit = SANITIZER_SECONDS + 150  # each launch takes longer, and what must be run is run whatever the time
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"compute-sanitizer: no end in {limit} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    print(f"compute-sanitizer: {' | '.join(lines[-2:])}")
    return "" if done.returncode == 0 else "\n".join(["compute-sanitizer:", *lines[-30:]])


def run(seconds: float, *, sanitized: bool) -> None:
    """Everything; under compute-sanitizer small calls only."""
    standin.install(FOLDER)
    start = time.perf_counter()
    machine = nvidia.Nvidia(sorted(FOLDER.glob("*.ptx.gz")), FOLDER / "assembled")
    print(f"{len(machine.kernels)} kernels assembled and loaded in {time.perf_counter() - start:.0f} s", flush=True)
    properties = machine.cupy.cuda.runtime.getDeviceProperties(0)
    print(f"{properties['name'].decode()}, CuPy {machine.cupy.__version__}, {time.strftime('%d %B %Y')}", flush=True)
    for_gpu = set(json.loads((FOLDER / "for_gpu.json").read_text()))
    record, start = Record(machine), time.perf_counter()
    # what must be run whatever the time: a kernel that was never run is a failure
    needed = len(list(cases.kinds())) + len(cases.COPIES) + len(cases.TRAVELS) + 2 * len(cases.LIMITS)
    for number, (title, call) in enumerate(plan(rows=60 if sanitized else ROWS)):
        if number >= needed and time.perf_counter() - start > seconds:
            break
        record.run(title, call, repeat=not sanitized)
    print(f"{number} calls, {time.perf_counter() - start:.0f} s", flush=True)
    if not sanitized:
        for dtype, head_dim in (("float32", 64), ("float32", 128), ("float64", 64)):
            record.run("far", lambda machine, a=(dtype, head_dim): far(machine, *a), repeat=False)
            machine.cupy.get_default_memory_pool().free_all_blocks()
        print("offsets above 2**31: done", flush=True)
        found = sanitize()
        if found:
            record.failures.append(found)
    report(record, for_gpu)
    sys.exit(bool(record.failures))


def main() -> None:
    """Build or run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("build", "run", "sanitized"), default="run")
    parser.add_argument("--kernel", default="", help="build only kernels with this in their name")
    parser.add_argument("--seconds", type=float, default=150, help="for random calls")
    arguments = parser.parse_args()
    if arguments.what == "build":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        build(Path(os.environ.get("GPU_TOOLS") or cache / "ulysses_dp"), arguments.kernel)
        return
    if not (FOLDER / "for_gpu.json").exists():
        sys.exit("run_on_nvidia: nothing is built: `python scripts/run_on_nvidia.py build` first, and bring .gpu/nvidia")
    sanitized = arguments.what == "sanitized"
    run(SANITIZER_SECONDS if sanitized else arguments.seconds, sanitized=sanitized)


if __name__ == "__main__":
    main()
