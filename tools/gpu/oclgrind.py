"""A machine that interprets SPIR-V and checks every access: Oclgrind (J. Price and S. McIntosh-Smith, IWOCL 2015).

It reports reads and writes outside of the memory of an argument, uninitialised numbers that decide where a kernel goes or what
it writes, races between work-items and barriers that diverge. SPIR-V is translated to the LLVM that Oclgrind knows, and linked
with the built-ins of oclgrind.c.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import standin

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
PROGRAMS = ("oclgrind", "clang-14", "llvm-spirv-14", "llvm-link-14", "opt-14", "llvm-dis-14", "llvm-as-14")
PACKAGES = "oclgrind clang-14 llvm-14 llvm-spirv-14"
CHECKS = {"OCLGRIND_DATA_RACES": "1", "OCLGRIND_UNINITIALIZED": "1", "OCLGRIND_MAX_ERRORS": "5", "OCLGRIND_CHECK_API": "1"}
FAULT = 3  # exit status


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def translate(module: Path, target: Path) -> None:
    """SPIR-V to the LLVM bitcode of a program for Oclgrind."""

    def run(*command: Any) -> None:
        subprocess.run([str(x) for x in command], check=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clang = ("clang-14", "--target=spir64", "-O1", "-fno-vectorize", "-fno-slp-vectorize", "-x", "c", "-emit-llvm", "-c")
        run(*clang, HERE / "oclgrind.c", "-o", folder / "built_ins.bc")
        run("llvm-spirv-14", "-r", module, "-o", folder / "kernel.bc")
        run("llvm-link-14", folder / "kernel.bc", folder / "built_ins.bc", "-o", folder / "linked.bc")
        run("opt-14", "-passes=always-inline", folder / "linked.bc", "-o", folder / "inlined.bc")
        run("llvm-dis-14", folder / "inlined.bc", "-o", folder / "linked.ll")
        text = (folder / "linked.ll").read_text()
        if re.search(r"\bhalf\b", text):
            raise NotImplementedError("Oclgrind knows no numbers of 16 bits")
        # Oclgrind finds local memory by the name of its kernel; its numbers are undefined, as on a device
        entry = re.search(r'define (?:dso_local )?spir_kernel void @"?([^\s("]+)"?\(', text)
        text = re.sub(r"@box\b", f'@"{entry[1]}.box"', text)
        text = re.sub(
            r'^(@"[^"]*\.box") = .*?(\[.*?\]) zeroinitializer',
            r"\1 = internal unnamed_addr addrspace(3) global \2 undef",
            text,
            flags=re.M,
        )
        (folder / "linked.ll").write_text(text)
        run("llvm-as-14", folder / "linked.ll", "-o", target)


class Oclgrind:
    """One process has one: the log of the checks is found by the environment.

    Memory is uninitialised until something is written to it, or full of zeros if it is to be `filled`.
    """

    sycl_device = standin.Gpu()

    def __init__(self, kernels: Path, folder: Path, *, filled: bool = False):
        self.spirv, self.folder, self.filled, self.launches = kernels, folder, filled, 0
        self.log = folder / "log"
        self.log.touch()
        os.environ.update(CHECKS, OCLGRIND_LOG=str(self.log))
        # beside the program, which need not be installed to be found
        program = Path(shutil.which("oclgrind") or "/usr/bin/oclgrind").resolve()
        self.cl = ctypes.CDLL(str(program.parents[1] / "lib/oclgrind/liboclgrind-rt.so"))
        for function in ("Context", "CommandQueue", "ProgramWithBinary", "Kernel", "Buffer"):
            getattr(self.cl, f"clCreate{function}").restype = ctypes.c_void_p
        platform, self.device = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("clGetPlatformIDs", 1, ctypes.byref(platform), None)
        self._call("clGetDeviceIDs", platform, ctypes.c_ulong(0xFFFFFFFF), 1, ctypes.byref(self.device), None)
        self.context = self._create("Context", None, 1, ctypes.byref(self.device), None, None)
        self.queue = self._create("CommandQueue", self.context, self.device, ctypes.c_ulong(0))
        self.kernel = cache(self._kernel)
        threading.Thread(target=self._watch, daemon=True).start()

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.cl, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} returned {code}")

    def _create(self, name: str, *arguments: Any) -> Any:
        code = ctypes.c_int()
        result = getattr(self.cl, f"clCreate{name}")(*arguments, ctypes.byref(code))
        if code.value:
            raise RuntimeError(f"clCreate{name} returned {code.value}")
        return ctypes.c_void_p(result)

    def _kernel(self, name: str, constants: tuple[tuple[int, int], ...]) -> Any:
        from ulysses_dp.kernels.constants import specialise  # of what `standin.install` has put in the place of the package

        module, program = self.folder / "kernel.spv", self.folder / "kernel.bc"
        module.write_bytes(specialise((self.spirv / f"{name}.spv").read_bytes(), constants))
        translate(module, program)
        binary, status = program.read_bytes(), ctypes.c_int()
        text = ctypes.create_string_buffer(binary, len(binary))
        size, pointer = ctypes.c_size_t(len(binary)), ctypes.cast(text, ctypes.c_void_p)
        arguments = ctypes.byref(self.device), ctypes.byref(size), ctypes.byref(pointer), ctypes.byref(status)
        made = self._create("ProgramWithBinary", self.context, 1, *arguments)
        self._call("clBuildProgram", made, 1, ctypes.byref(self.device), b"", None, None)
        return self._create("Kernel", made, standin.manifest().read()[name]["entry"].encode())

    def allocate(self, nbytes: int) -> Any:
        """A buffer of exactly this size: one byte further is outside."""
        handle = self._create("Buffer", self.context, ctypes.c_ulong(1), ctypes.c_size_t(nbytes), None)
        if self.filled:
            self.write(handle, np.zeros(nbytes, np.uint8))
        return handle

    def write(self, handle: Any, numbers: np.ndarray) -> None:
        """Fill a buffer from its beginning."""
        place = ctypes.c_void_p(numbers.ctypes.data)
        self._call(
            *("clEnqueueWriteBuffer", self.queue, handle, 1),
            *(ctypes.c_size_t(0), ctypes.c_size_t(numbers.nbytes), place, 0, None, None),
        )

    def read(self, handle: Any, nbytes: int) -> bytes:
        """All of a buffer."""
        numbers = np.empty(nbytes, np.uint8)
        place = ctypes.c_void_p(numbers.ctypes.data)
        self._call(
            *("clEnqueueReadBuffer", self.queue, handle, 1),
            *(ctypes.c_size_t(0), ctypes.c_size_t(nbytes), place, 0, None, None),
        )
        return numbers.tobytes()

    def run(self, name: str, arguments: Sequence[Any], groups: int, lanes: int, constants: dict[int, int]) -> None:
        """Interpret a kernel; ends the process with `FAULT` if a check finds something."""
        kernel = self.kernel(name, tuple(sorted(constants.items())))
        for number, argument in enumerate(arguments):
            self._call("clSetKernelArg", kernel, number, ctypes.c_size_t(ctypes.sizeof(argument)), ctypes.byref(argument))
        size, local = ctypes.c_size_t(groups * lanes), ctypes.c_size_t(lanes)
        where = kernel, 1, None, ctypes.byref(size), ctypes.byref(local), 0, None, None
        self._call("clEnqueueNDRangeKernel", self.queue, *where)
        self._call("clFinish", self.queue)
        self.launches += 1
        self.stop_at_fault()

    def stop_at_fault(self) -> None:
        """End the process if a check has found something."""
        found = self.log.read_text(errors="replace").strip()
        if found:
            print(f"Oclgrind: {found}", flush=True)
            os._exit(FAULT)

    def _watch(self) -> None:
        """Do not wait for the end of a launch that is wrong: thousands of messages take minutes."""
        with suppress(FileNotFoundError):  # the folder goes when all is done
            while True:
                time.sleep(1)
                self.stop_at_fault()
