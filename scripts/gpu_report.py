"""Compile every shipped kernel for Intel GPUs without a GPU, and read the machine code.

    python scripts/gpu_report.py

Needs ocloc, Intel's offline compiler (Debian and Ubuntu: apt install intel-opencl-icd). One line per kernel and device: the
SIMD width, the register file (GRF), bytes of spilled registers, private memory, instructions; and of the hot loop, the one
with the most multiply-adds, its instructions by kind. "of peak" is the share of mad in the hot loop: the fraction of the peak
that the code allows if every instruction takes one issue slot and nothing stalls. Exits with 1 if a kernel misses its bar.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ulysses_dp.kernels import manifest

DEVICES = ("pvc", "dg2")
NEWER_DEVICES = ("mtl", "lnl", "bmg", "ptl")  # taken if ocloc knows them
# What a kernel must reach on a device: share of mad in the hot loop. No spills and no private memory go without saying.
BARS = {
    ("flash_forward_gpu_float32_d64", "pvc"): 0.75,
    ("flash_forward_gpu_float32_d128", "pvc"): 0.70,
    ("flash_backward_gpu_dq_float32_d64", "pvc"): 0.80,
    ("flash_backward_gpu_dk_dv_float32_d64", "pvc"): 0.80,
    ("flash_backward_gpu_dq_float32_d128", "pvc"): 0.77,
    ("flash_backward_gpu_dk_float32_d128", "pvc"): 0.70,
    ("flash_backward_gpu_dv_float32_d128", "pvc"): 0.75,
}
TIME_LIMIT = 300  # seconds for one compilation


@dataclass
class Report:
    """What the machine code of one kernel on one device says."""

    kernel: str
    device: str
    simd: int = 0
    registers: int = 0
    spill_bytes: int = 0
    private_bytes: int = 0
    local_bytes: int = 0
    instructions: int = 0
    loop: int = 0  # instructions of the hot loop
    mad: int = 0
    memory: int = 0  # loads, stores and other messages
    scratch: int = 0  # messages to private memory or spills
    other: int = 0
    problem: str = ""

    @property
    def of_peak(self) -> float:
        """Share of mad in the hot loop."""
        return self.mad / self.loop if self.loop else 0.0

    @property
    def bar(self) -> float | None:
        """The share that it must reach, if there is one."""
        return BARS.get((self.kernel, self.device))

    @property
    def passes(self) -> bool:
        """Whether it meets its bar."""
        if self.bar is None:
            return True
        clean = not (self.problem or self.spill_bytes or self.private_bytes or self.scratch)
        return clean and self.of_peak >= self.bar


def header(assembly: str, pattern: str) -> int:
    """A number from the comments that the compiler writes about a kernel; 0 where it has nothing to say."""
    found = re.search(r"^//.*?" + pattern, assembly, re.MULTILINE)
    return int(found[1]) if found else 0


def instructions(assembly: str) -> tuple[list[str], dict[str, int]]:
    """The instructions, and the position of every label."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        text = line.split("//")[0].strip() if not line.strip().startswith("//") else ""
        label = re.match(r"([A-Za-z_.$][\w.$]*):\s*", text)
        if label:
            labels[label[1]] = len(code)
            text = text[label.end() :]
        if text and not text.startswith("."):
            # the comment of a message says what kind of memory it goes to
            code.append(line.strip()[label.end() :] if label else line.strip())
    return code, labels


def opcode(instruction: str) -> str:
    """The name of an instruction, without predicate and modifiers."""
    found = re.match(r"(?:\([^)]*\)\s*)?([a-z]\w*)", instruction)
    return found[1] if found else ""


def hot_loop(code: list[str], labels: dict[str, int]) -> list[str]:
    """The instructions of the smallest loop among those with the most multiply-adds."""
    best: list[str] = []
    for end, instruction in enumerate(code):
        if opcode(instruction) not in ("jmpi", "goto", "while", "brc", "brd"):
            continue
        for target in re.findall(r"[\w.$]+", instruction.split("//")[0]):
            start = labels.get(target, end + 1)
            if start <= end:
                loop = code[start : end + 1]
                best = max(best, loop, key=lambda x: (sum(opcode(i) == "mad" for i in x), -len(x)))
    return best


def read_assembly(report: Report, assembly: str, file_name: str) -> None:
    """Fill in the report from the listing of the compiler."""
    width = re.search(r"simd(\d+)", file_name)
    report.simd = int(width[1]) if width else 0
    report.registers = header(assembly, r"numGRF=(\d+)") or 128
    report.spill_bytes = header(assembly, r"spill size (\d+)")
    report.private_bytes = header(assembly, r"private memory size (\d+)")
    report.local_bytes = header(assembly, r"slm size (\d+)")
    code, labels = instructions(assembly)
    report.instructions = len(code)
    loop = hot_loop(code, labels)
    kinds = Counter(opcode(x) for x in loop)
    messages = [x for x in loop if opcode(x).startswith(("send", "load", "store"))]
    report.loop, report.mad, report.memory = len(loop), kinds["mad"], len(messages)
    report.scratch = sum("scratch" in x or "ss[" in x or "dc0" in x for x in messages)
    report.other = report.loop - report.mad - report.memory


def compile_kernel(ocloc: str, kernel: str, device: str) -> Report:
    """Compile one kernel for one device."""
    report = Report(kernel, device)
    options = manifest.read()[kernel]["build_options"].get("opencl", "")
    with tempfile.TemporaryDirectory() as folder:
        command = [ocloc, "compile", "-file", str(manifest.FOLDER / f"{kernel}.spv"), "-spirv_input", "-device", device]
        command += ["-out_dir", folder, *(["-options", options] if options else [])]
        environment = {**os.environ, "IGC_ShaderDumpEnable": "1", "IGC_DumpToCustomDir": folder}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, cwd=folder, check=False
            )
        except subprocess.TimeoutExpired:
            report.problem = f"not compiled in {TIME_LIMIT} s"
            return report
        listings = sorted(Path(folder).glob("*.asm"))
        if done.returncode or not listings:
            report.problem = f"ocloc ended with {done.returncode}"
            return report
        read_assembly(report, listings[-1].read_text(errors="replace"), listings[-1].name)
    return report


def known_devices(ocloc: str) -> list[str]:
    """The devices to compile for: `DEVICES`, and newer ones that this ocloc knows."""
    text = subprocess.run([ocloc, "compile", "--help"], capture_output=True, text=True, check=False).stdout
    return [*DEVICES, *(device for device in NEWER_DEVICES if re.search(rf"\b{device}\b", text))]


def main() -> None:
    """Compile, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--device", nargs="*", help=f"only these ({', '.join(DEVICES)})")
    parser.add_argument("--json", help="write the reports here")
    arguments = parser.parse_args()
    ocloc = shutil.which("ocloc")
    if ocloc is None:
        sys.exit("gpu_report: ocloc is not installed; on Debian and Ubuntu, apt install intel-opencl-icd brings it")

    print(f"{'kernel':52} device SIMD  GRF  spill private  SLM instr. | hot loop   mad  mem scratch other  of peak")
    devices = arguments.device or known_devices(ocloc)
    wanted = [(kernel, device) for kernel in manifest.read() if arguments.kernel in kernel for device in devices]
    reports = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is done by the processes that they wait for
        for r in pool.map(lambda pair: compile_kernel(ocloc, *pair), wanted):
            reports.append(r)
            bar = "" if r.bar is None else f"  bar {r.bar:.0%}: {'met' if r.passes else 'MISSED'}"
            detail = r.problem or (
                f"{r.simd:4} {r.registers:4} {r.spill_bytes:6} {r.private_bytes:7} {r.local_bytes:4} {r.instructions:6} | "
                f"{r.loop:8} {r.mad:5} {r.memory:4} {r.scratch:7} {r.other:5} {r.of_peak:8.0%}"
            )
            print(f"{r.kernel:52} {r.device:6} {detail}{bar}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([{**asdict(r), "of_peak": r.of_peak} for r in reports], indent=1))
    if not all(r.passes for r in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
