"""A machine that runs the SPIR-V of the kernels on an NVIDIA GPU: translated to LLVM, linked with the built-ins of nvidia.c.

It proves index arithmetic, bounds, numerics and work-groups that truly run at the same time; of Intel's compiler, registers,
memory messages and speed it proves nothing. `Compiler` makes PTX where LLVM 19 is, `Nvidia` runs it where the GPU and CuPy are.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import standin

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
ARCHITECTURE = "sm_90"  # Hopper
PROGRAMS = "clang-19 llvm-spirv-19 llvm-dis llvm-link opt llc"
LAYOUT = "e-i64:64-i128:128-v16:16-v32:32-n16:32:64"


def file_name(name: str, constants: Sequence[tuple[int, int]]) -> str:
    """Where the code of a kernel lies, and how it is specialised."""
    return "".join([name, *(f"-{number}={value}" for number, value in constants), ".ptx.gz"])


class Compiler:
    """LLVM and NVIDIA's library, fetched into a folder if they are not there; nothing is installed."""

    def __init__(self, folder: Path):
        self.llvm, self.cuda = folder / "trixie", folder / "cuda"
        command = [HERE / "debian_root.sh", "trixie", self.llvm, PROGRAMS, "llvm-19", "clang-19", "llvm-spirv-19"]
        subprocess.run(command, check=True)
        if not self.cuda.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", self.cuda]
            subprocess.run([*pip, "nvidia-cuda-nvcc-cu12"], check=True)
        self.library = next(self.cuda.rglob("libdevice.10.bc"))

    def run(self, program: str, *arguments: Any) -> None:
        """Run a program of LLVM; raises with what it says."""
        done = subprocess.run([self.llvm / "bin" / program, *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr[-2000:]}")

    def compile(self, spirv: bytes, target: Path) -> None:
        """SPIR-V to compressed PTX, in which the kernel is called `entry`."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            kernel, built_ins, linked, ptx = (folder / x for x in ("kernel.bc", "built_ins.bc", "linked.bc", "kernel.ptx"))
            (folder / "kernel.spv").write_bytes(spirv)
            self.run("llvm-spirv-19", "-r", folder / "kernel.spv", "-o", kernel)
            self.run("llvm-dis", kernel, "-o", folder / "kernel.ll")
            text = (folder / "kernel.ll").read_text()
            text = re.sub(r"target datalayout = .*", f'target datalayout = "{LAYOUT}"', text)
            text = re.sub(r"target triple = .*", 'target triple = "nvptx64-nvidia-cuda"', text)
            entry = re.search(r'define spir_kernel void @("?[^\s("]+"?)\(', text)
            if entry is None:
                raise RuntimeError("there is no kernel in the module")
            text = text.replace(entry[1], "entry").replace("spir_kernel", "ptx_kernel").replace("spir_func ", "")
            (folder / "kernel.ll").write_text(re.sub(r"^!opencl\.[\w.]+ = .*$", "", text, flags=re.MULTILINE))
            self.run(
                *(
                    "clang-19",
                    "--target=nvptx64-nvidia-cuda",
                    "-nocudalib",
                    "-O2",
                    "-x",
                    "c",
                    HERE / "nvidia.c",
                    "-emit-llvm",
                    "-c",
                ),
                *("-Xclang", "-target-cpu", "-Xclang", ARCHITECTURE, "-Xclang", "-target-feature", "-Xclang", "+ptx80"),
                *("-o", built_ins),
            )
            self.run("llvm-link", folder / "kernel.ll", built_ins, "-o", linked)
            self.run("llvm-link", "--only-needed", "--internalize", linked, self.library, "-o", linked)
            passes = "-passes=internalize,always-inline,default<O3>"
            self.run("opt", passes, "--internalize-public-api-list=entry", linked, "-o", kernel)
            self.run("llc", "-O3", f"-mcpu={ARCHITECTURE}", "-mattr=+ptx80", kernel, "-o", ptx)
            left = sorted(set(re.findall(r"\.extern \.func.*?(\w+)\s*\(", ptx.read_text(), re.DOTALL)))
            if left:
                raise RuntimeError(f"nvidia.c has no {', '.join(left)}")
            target.write_bytes(gzip.compress(ptx.read_bytes(), mtime=0))


def assemble(files: list[Path], folder: Path) -> list[Path]:
    """PTX to the code of this GPU, all cores at once; what already lies in the folder, and is newer, stays.

    Without optimisation: by -O2 and -O3 the ptxas of CUDA 13.0, and so the driver, makes code of the strided copies that reads
    far outside, by -O0 and -O1 it does not. It also takes less time.
    """
    ptxas = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
    folder.mkdir(parents=True, exist_ok=True)

    def one(file: Path) -> Path:
        ptx = folder / file.name.removesuffix(".gz")
        code = ptx.with_suffix(".cubin")
        if code.exists() and code.stat().st_mtime > file.stat().st_mtime:
            return code
        ptx.write_bytes(gzip.decompress(file.read_bytes()))
        command = [ptxas, "-O0", f"-arch={ARCHITECTURE}", ptx, "-o", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ptxas: {file.name}: {done.stderr[-2000:]}")
        return code

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # the largest first, so that none is left alone at the end
        made = dict(pool.map(lambda x: (x, one(x)), sorted(files, key=lambda x: -x.stat().st_size)))
    return [made[x] for x in files]


class Nvidia:
    """The GPU, through CuPy."""

    sycl_device = standin.Gpu()

    def __init__(self, files: list[Path], folder: Path):
        import cupy

        self.cupy, self.kernels = cupy, {}
        for source, code in zip(files, assemble(files, folder), strict=True):
            self.kernels[source.name] = cupy.RawModule(path=str(code)).get_function("entry")
        self.launches: dict[str, int] = {}
        if os.environ.get("CUPY_NO_POOL"):
            cupy.cuda.set_allocator(None)  # each array an allocation of its own, so that a tool sees where it ends

    def allocate(self, nbytes: int) -> Any:
        """Memory full of NaN."""
        return self.cupy.full(nbytes, 0xFF, dtype=np.uint8)

    def write(self, handle: Any, numbers: np.ndarray) -> None:
        """Fill memory from its beginning."""
        handle[: numbers.nbytes] = self.cupy.asarray(numbers.reshape(-1).view(np.uint8))

    def read(self, handle: Any, nbytes: int) -> bytes:
        """All of the memory."""
        return self.cupy.asnumpy(handle).tobytes()

    def run(self, name: str, arguments: Sequence[Any], groups: int, lanes: int, constants: dict[int, int]) -> None:
        """Run a kernel to its end; raises if it traps."""
        kernel = self.kernels[file_name(name, sorted(constants.items()))]
        packed = tuple(np.uint64(x.data.ptr) if hasattr(x, "data") else np.dtype(type(x)).type(x.value) for x in arguments)
        kernel((groups,), (lanes,), packed)
        self.cupy.cuda.get_current_stream().synchronize()
        self.launches[name] = self.launches.get(name, 0) + 1
