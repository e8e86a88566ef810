"""The library on Intel's real Level Zero driver without a GPU (see null_device.sh): `make nullgpu`.

    python tools/gpu/nullgpu.py

Every kernel is built by the driver with the flags of a run; those for GPUs must have no spilled registers. Then every path of
the library runs in one process and, with one rank for each tile, on 1, 2 and 12 tiles under both device hierarchies. It must
go through without an exception; nothing is computed, so no result is looked at. Prints a line for each step, and ends with 1
if one failed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import subprocess
import sys
import traceback
from collections import Counter
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).resolve().parent
DRIVER = "root/usr/lib/x86_64-linux-gnu/libze_intel_gpu.so.1"
MACHINES = (  # cards, tiles of a card, hierarchy
    *((1, 1, "FLAT"), (1, 1, "COMPOSITE"), (1, 2, "FLAT"), (1, 2, "COMPOSITE"), (6, 2, "FLAT"), (6, 2, "COMPOSITE")),
)
TIME_LIMIT = 1200  # seconds for one step
HEAD_DIMS = (1, 32, 40, 64, 80, 96, 128, 192, 256)
OPTIONS = ("window", "softcap", "alibi", "bias", "mask", "sinks", "dropout")

_failed: list[str] = []


def step(name: str, call: Callable[[], Any]) -> None:
    """Run one call; note the exception that it ends with."""
    try:
        call()
    except Exception:
        _failed.append(name)
        print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)


def finish(what: str, count: int) -> None:
    """Say what went through."""
    if _failed:
        sys.exit(f"{what}: {len(_failed)} of {count} failed: {', '.join(_failed)}")
    print(f"{what}: {count} went through", flush=True)


# --- every kernel, through the driver's own interface: dpctl does not say what spills -----------------------------------------


class _ModuleDescription(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("format", ctypes.c_uint32),
        ("size", ctypes.c_size_t),
        ("input", ctypes.c_char_p),
        ("flags", ctypes.c_char_p),
        ("constants", ctypes.c_void_p),
    )


class _Description(ctypes.Structure):
    """Of a context or a kernel."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
    )


class _KernelProperties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("arguments", ctypes.c_uint32),
        ("group_size", ctypes.c_uint32 * 3),
        ("sub_groups", ctypes.c_uint32),
        ("sub_group_size", ctypes.c_uint32),
        ("largest", ctypes.c_uint32 * 2),
        ("local_bytes", ctypes.c_uint32),
        ("private_bytes", ctypes.c_uint32),
        ("spill_bytes", ctypes.c_uint32),
        ("uuid", ctypes.c_uint8 * 32),
    )


_CONTEXT, _MODULE, _KERNEL, _PROPERTIES = 0xD, 0x1B, 0x1D, 0x1E  # ze_structure_type_t


class Driver:
    """Level Zero on the first device."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["ZE_ENABLE_ALT_DRIVERS"])
        self.device, self.context, driver = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        one = ctypes.c_uint32(1)
        self.call("zeInit", 0)
        self.call("zeDriverGet", ctypes.byref(one), ctypes.byref(driver))
        self.call("zeDeviceGet", driver, ctypes.byref(one), ctypes.byref(self.device))
        self.call("zeContextCreate", driver, ctypes.byref(_Description(_CONTEXT)), ctypes.byref(self.context))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises if it fails."""
        result = getattr(self.library, name)(*arguments)
        if result:
            raise RuntimeError(f"{name} returned {result:#x}")

    def build(self, spirv: bytes, entry: str, flags: str) -> _KernelProperties:
        """Compile a kernel and ask what became of it."""
        module, log, kernel = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        description = _ModuleDescription(_MODULE, None, 0, len(spirv), spirv, flags.encode(), None)
        try:
            self.call(
                *("zeModuleCreate", self.context, self.device, ctypes.byref(description)),
                *(ctypes.byref(module), ctypes.byref(log)),
            )
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {self.text(log)}") from None
        self.call("zeKernelCreate", module, ctypes.byref(_Description(_KERNEL, None, 0, entry.encode())), ctypes.byref(kernel))
        properties = _KernelProperties(_PROPERTIES)
        self.call("zeKernelGetProperties", kernel, ctypes.byref(properties))
        self.call("zeKernelDestroy", kernel)
        self.call("zeModuleDestroy", module)
        return properties

    def text(self, log: ctypes.c_void_p) -> str:
        """What the compiler said."""
        size = ctypes.c_size_t()
        self.call("zeModuleBuildLogGetString", log, ctypes.byref(size), None)
        text = ctypes.create_string_buffer(size.value)
        self.call("zeModuleBuildLogGetString", log, ctypes.byref(size), text)
        return text.value.decode(errors="replace")


def build_kernels() -> None:
    """Build all kernels of the manifest."""
    from ulysses_dp.kernels import manifest
    from ulysses_dp.kernels.constants import specialise

    sys.path.insert(0, str(HERE.parent))
    from gpu import spirv

    driver, names, others = Driver(), sorted(manifest.read()), Counter()

    def build(name: str) -> None:
        entry = manifest.read()[name]
        forms = spirv.forms(name)
        module = specialise((manifest.FOLDER / f"{name}.spv").read_bytes(), forms.get("dropout", forms[""]))
        made = driver.build(module, entry["entry"], entry["build_options"].get("level_zero", ""))
        if made.arguments != len(entry["arguments"]):
            raise RuntimeError(f"it takes {made.arguments} arguments, the manifest lists {len(entry['arguments'])}")
        if spirv.for_gpu(name) and made.spill_bytes:
            raise RuntimeError(f"{made.spill_bytes} bytes of registers are spilled")
        if not spirv.for_gpu(name):
            others["clean" if not made.spill_bytes + made.private_bytes else "with spills or private memory"] += 1

    for name in names:
        step(name, lambda name=name: build(name))
    of_gpu = sum(map(spirv.for_gpu, names))
    print(f"{of_gpu} kernels made for GPUs; others: {', '.join(f'{n} {what}' for what, n in others.items())}")
    finish("kernels built", len(names))


# --- the library --------------------------------------------------------------------------------------------------------------


def some_options(name: str, batch: int, heads: int, seq: int, seq_k: int) -> dict[str, Any]:
    """Keyword arguments of one option."""
    return {
        "window": {"window_size": (7, 3)},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": np.linspace(0, 1, heads, dtype=np.float32)},
        "bias": {"bias": np.zeros((batch, heads, seq, seq_k), np.float32)},
        "mask": {"key_padding_mask": np.ones((batch, seq_k), bool)},
        "sinks": {"sinks": np.zeros(heads, np.float32)},
        "dropout": {"dropout_p": 0.25, "seed": 5},
    }[name]


def local_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that needs one process only."""
    import dpnp

    from ulysses_dp import UlyssesAttention, attention, attention_backward, doctor, free_workspace, merge_attention, trace
    from ulysses_dp._device.queue import default_queue

    queue = default_queue()

    def arrays(heads: int, head_dim: int, dtype: str = "float32", rows: tuple[int, int] = (37, 53)) -> list[Any]:
        shapes = [
            (2, n, h, head_dim) for n, h in zip((rows[0], rows[1], rows[1]), (heads, heads // 2, heads // 2), strict=True)
        ]
        return [dpnp.asarray(np.zeros(shape, dtype), sycl_queue=queue) for shape in shapes]

    def both(head_dim: int, dtype: str = "float32", **options: Any) -> None:
        q, k, v = arrays(4, head_dim, dtype)
        named = {"dtype": "bfloat16"} if dtype == "uint16" else {}
        out, lse = attention(q, k, v, return_lse=True, **named, **options)
        attention_backward(q, q, k, v, out, lse, **named, **options)

    for dtype, head_dim, causal in product(("float32", "float64", "float16", "uint16"), HEAD_DIMS, (False, True)):
        yield f"{dtype} head_dim {head_dim} causal {causal}", lambda a=(head_dim, dtype, causal): both(*a[:2], causal=a[2])
    for dtype, head_dim, name in product(("float32", "float64"), HEAD_DIMS, OPTIONS):
        options = some_options(name, 2, 4, 37, 53)
        yield f"{dtype} head_dim {head_dim} {name}", lambda a=(head_dim, dtype, options): both(*a[:2], **a[2])
    together = {key: value for name in OPTIONS for key, value in some_options(name, 2, 4, 37, 53).items()}
    yield "all options", lambda: both(64, causal=True, **together)

    def packed() -> None:
        q, k, v = (x[0] for x in arrays(4, 64, rows=(50, 50)))
        starts = np.array([0, 7, 7, 50])
        out, lse = attention(q, k, v, cu_seqlens_q=starts, layout="thd", causal=True, return_lse=True)
        attention_backward(q, q, k, v, out, lse, cu_seqlens_q=starts, layout="thd", causal=True)

    def on_host() -> None:
        q, k, v = (np.zeros((1, 20, 4, 64), np.float32) for _ in range(3))
        attention(q, k, v, causal=True)

    def strided() -> None:
        q, k, v = (dpnp.zeros((1, 4, 50, 128), dtype=np.float32, sycl_queue=queue) for _ in range(3))
        attention(*(dpnp.swapaxes(x, 1, 2)[..., 64:] for x in (q, k, v)))

    def merged() -> None:
        q, k, v = arrays(4, 64)
        out, lse = attention(q, k, v, return_lse=True)
        merge_attention(out, lse, out, lse)

    def traced() -> None:
        with trace():
            attention(*arrays(4, 64))

    yield "packed sequences", packed
    yield "NumPy arrays", on_host
    yield "views", strided
    yield "merge", merged
    yield "trace", traced
    yield "the class", lambda: UlyssesAttention()(*arrays(4, 64))
    yield "long rows", lambda: attention(*arrays(4, 64, rows=(4096, 4096)), causal=True)
    yield "free_workspace", free_workspace
    yield "doctor", doctor.report


def distributed_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What all ranks do together: rank r has a tile of its own."""
    import dpnp
    from mpi4py import MPI

    from ulysses_dp import gather_heads, scatter_heads, ulysses_attention, ulysses_attention_backward
    from ulysses_dp._device.queue import default_queue

    comm, queue = MPI.COMM_WORLD, default_queue()
    rows = 5 + 3 * (comm.rank % 2)

    def arrays(head_dim: int = 64, dtype: str = "float32") -> list[Any]:
        return [dpnp.asarray(np.zeros((1, rows, h, head_dim), dtype), sycl_queue=queue) for h in (16, 4, 4)]

    def both(head_dim: int = 64, dtype: str = "float32", **options: Any) -> None:
        q, k, v = arrays(head_dim, dtype)
        out, lse = ulysses_attention(q, k, v, return_lse=True, **options)
        ulysses_attention_backward(q, q, k, v, out, lse, **options)

    seq = sum(comm.allgather(rows))
    for dtype in ("float32", "float64", "float16"):
        yield f"{dtype}", lambda dtype=dtype: both(128, dtype, causal=True)
    for name in OPTIONS:
        options = some_options(name, 1, 16, seq, seq)
        yield name, lambda options=options: both(causal=True, **options)
    yield "through the host", lambda: both(exchange="host")
    yield "in overlapping parts", lambda: both(overlap=2)
    yield "redistribution", lambda: gather_heads(scatter_heads(arrays()[0]))
    yield "NumPy arrays", lambda: ulysses_attention(*(np.zeros((1, rows, 4, 64), np.float32) for _ in range(3)))


def own_tile() -> None:
    """Each rank must have a tile for itself, as long as there are enough."""
    from mpi4py import MPI

    from ulysses_dp._device.queue import default_queue

    device = default_queue().sycl_device
    chosen = device.filter_string if device.parent_device is None else f"{device.parent_device.filter_string}, a tile"
    print(f"rank {MPI.COMM_WORLD.rank}: {chosen}, {device.max_compute_units} units", flush=True)
    if int(os.environ["TILES"]) > 1 and device.partition_max_sub_devices > 1:
        raise RuntimeError("this rank has a card of several tiles")


def inside(what: str) -> None:
    """The steps of one process."""
    if what == "kernels":
        build_kernels()
        return
    if what == "ranks":
        step("a tile for each rank", own_tile)
    calls = list(local_calls() if what == "local" else distributed_calls())
    for name, call in calls:
        step(name, call)
    finish({"local": "calls on one rank", "ranks": "calls on all ranks"}[what], len(calls) + (what == "ranks"))


# --- outside ------------------------------------------------------------------------------------------------------------------


def run(title: str, command: list[str], cards: int = 1, tiles: int = 1, hierarchy: str = "FLAT") -> bool:
    """Run this script on a null device, and say how it ended."""
    environment = {**os.environ, "CARDS": str(cards), "TILES": str(tiles), "ZE_FLAT_DEVICE_HIERARCHY": hierarchy}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, text = f"no end in {TIME_LIMIT} s", (error.stdout or b"").decode(errors="replace")
    lines = text.strip().splitlines()
    print(f"{'ok' if code == 0 else 'FAILED'}: {title}: {lines[-1] if code == 0 and lines else ''}", flush=True)
    if code:
        print("\n".join(f"    {x}" for x in lines[-40:]), f"    ended with {code}", sep="\n", flush=True)
    return code == 0


def main() -> None:
    """All steps on all machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--inside", choices=("kernels", "local", "ranks"), help="run in this process, which is on a null device"
    )
    arguments = parser.parse_args()
    if arguments.inside:
        inside(arguments.inside)
        return
    spec = importlib.util.spec_from_file_location("gpu_report", HERE.parents[1] / "scripts/gpu_report.py")
    gpu_report = sys.modules["gpu_report"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_report)
    if not (gpu_report.tools_folder() / "sid" / DRIVER).exists():
        print("nullgpu: skipped: Intel's driver is not there; scripts/get_ocloc.sh fetches it")
        return
    on_null = [str(HERE / "null_device.sh"), sys.executable, str(Path(__file__).resolve()), "--inside"]
    good = [run("every kernel", [*on_null, "kernels"]), run("one process", [*on_null, "local"])]
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    for cards, tiles, hierarchy in MACHINES:
        ranks = cards * tiles
        title = f"{ranks} rank(s), {cards} card(s) of {tiles} tile(s), {hierarchy}"
        good.append(run(title, [mpiexec, "-n", str(ranks), *on_null, "ranks"], cards, tiles, hierarchy))
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
