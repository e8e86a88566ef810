"""Compile the kernels for Intel GPUs without a GPU, and read the machine code.

    scripts/get_ocloc.sh                  # fetches today's compiler, where none is installed
    python scripts/gpu_report.py          # every kernel made for GPUs, every device

Takes the newest ocloc, Intel's offline compiler, among those on PATH and those that `get_ocloc.sh` fetched, or the one given.
One line per kernel and device: SIMD width, registers (GRF), bytes of spilled registers and of private memory, instructions.
Then the hot loop, the one with the most matrix or multiply-add instructions: its instructions, how many are mad and dpas, and
the cycles that each pipe of the vector engine is busy in one turn:

    xmx     a dpas of eight rows takes eight cycles
    float   one cycle for 16 numbers
    int     the same; 64-bit integers twice as long
    math    exp2, log2, division: four cycles for 16 numbers
    send    registers that come from memory or go there, one of 64 bytes in a cycle: the most that the first cache can

The pipes work at the same time, so the busiest one bounds the speed. The pipe that counts is xmx where there is a dpas, else
float; "reach" is the share of these cycles in which it does dpas or mad: what the code allows of the peak if nothing stalls.

Kernels of one module for all options are compiled without any, with all but dropout ("+options"), with all ("+dropout"), and
for rows that block loads cannot read ("+views"); those for the forward also as they find peaks for the gradient ("+peaks").
Those for matrix engines are compiled for bfloat16, and also for float16 ("+float16"); among their options is a bias whose keys
follow each other, or do not ("+strided bias").

A bar breaks where a kernel spills or uses private memory on pvc (Max) or bmg (Arc B), where the hot loop of a float32 kernel
on pvc has too few mad, or where that of a kernel for matrix engines has too many instructions for a dpas, or has a pipe that is
busier than the engine. The bars are for compilers from 2025 on. Ends with 1 if one breaks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ulysses_dp.kernels import manifest
from ulysses_dp.kernels.constants import specialise

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from gpu import spirv

DEVICES = ("pvc", "bmg", "lnl", "ptl", "cri", "dg2")
CLEAN = ("pvc", "bmg")  # where nothing may spill
BARS_FROM = (25,)  # the first version of ocloc to which the bars apply
# Share of mad in the hot loop on pvc, of float32 kernels: by a part of the name and the head_dims.
MAD_BARS = {"forward": ((64, 96, 128), 0.83), "backward": ((64, 128), 0.80)}
# Most instructions of the hot loop for a dpas, of kernels for matrix engines, by head_dim; the engine is the busiest pipe.
DPAS_BARS = {64: 9.2, 96: 8.0, 128: 8.0, 192: 7.0, 256: 7.0}
WITHOUT_BLOCK_LOADS = ("dg2",)  # of two dimensions
LANES = {"dg2": 8}  # of a pipe in a cycle; 16 elsewhere
DOUBLE = {"pvc": 1, "cri": 1}  # cycles of a float64 instruction for one of float32; 16 elsewhere
PIPES = ("xmx", "float", "int", "math", "send")
JUMPS = ("jmpi", "goto", "while", "brc", "brd")
TIME_LIMIT = 600  # seconds for one compilation


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
    dpas: int = 0
    scratch: int = 0  # messages to private memory or spills, in the hot loop
    cycles: dict[str, int] = field(default_factory=dict)  # of the hot loop, by pipe
    useful: int = 0  # cycles of dpas or mad
    problem: str = ""
    broken: list[str] = field(default_factory=list)

    @property
    def bound(self) -> str:
        """The pipe that takes longest."""
        return max(self.cycles, key=lambda pipe: self.cycles[pipe], default="")

    @property
    def reach(self) -> float:
        """Share of the cycles in which the pipe that counts does what counts."""
        busiest = max(self.cycles.values(), default=0)
        return self.useful / busiest if busiest else 0.0

    @property
    def mad_share(self) -> float:
        """Share of mad among the instructions of the hot loop."""
        return self.mad / self.loop if self.loop else 0.0


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


def is_message(name: str) -> bool:
    """Whether an instruction of this name goes to memory, or to another unit outside the vector engine."""
    return name.startswith(("send", "load", "store", "atomic"))


def hot_loop(code: list[str], labels: dict[str, int]) -> list[str]:
    """The instructions of the smallest loop among those with nearly the most dpas or, where there are none, mad, or messages.

    Nearly: the loop for what is masked may need a few more for addresses.
    """
    loops: list[list[str]] = []
    for end, instruction in enumerate(code):
        if opcode(instruction) in JUMPS:
            starts = [labels.get(target, end + 1) for target in re.findall(r"[\w.$]+", instruction.split("//")[0])]
            loops += [code[start : end + 1] for start in starts if start <= end]
    for is_work in (lambda name: name.startswith("dpas"), lambda name: name == "mad", is_message, lambda name: True):
        work = [sum(map(is_work, map(opcode, loop))) for loop in loops]
        most = max(work, default=0)
        if most:
            return min((loop for loop, count in zip(loops, work, strict=True) if count >= 0.95 * most), key=len)
    return []


def moved_registers(instruction: str) -> int:
    """Registers that a message brings or takes, without those that hold addresses."""
    text, _, comment = instruction.partition("//")
    counted = re.search(r"wr:\w+\+(\d+), rd:(\d+)", comment)
    if counted:  # the compiler says it of those messages that have no form of their own
        return max(int(counted[1]), int(counted[2]))
    without_address = re.sub(r"\[[^\]]*\]|\{[^}]*\}", "", text)
    return max((int(count) for count in re.findall(r"\br\d+(?:\.\d+)?:(\d+)", without_address)), default=1)


def pipe_of(instruction: str, device: str) -> tuple[str, int]:
    """The pipe that an instruction takes, and for how many cycles; no pipe for jumps and waits."""
    name, text = opcode(instruction), instruction.split("//")[0]
    if name.startswith("dpas"):
        repeat = re.search(r"dpas\w*\.\d+x(\d+)", text)
        return "xmx", int(repeat[1]) if repeat else 8
    if is_message(name):
        return "send", moved_registers(instruction)
    if name in (*JUMPS, "join", "if", "else", "endif", "break", "cont", "sync", "nop", "call", "ret"):
        return "", 0
    width = re.search(r"\((\d+)\|", text)
    turns = max(1, int(width[1]) // LANES.get(device, 16)) if width else 1
    if name == "math":
        return "math", 4 * turns
    if re.search(r":df\b", text):
        return "float", turns * DOUBLE.get(device, 16)
    if re.search(r":(f|hf|bf)\b", text):
        return "float", turns
    return "int", turns * (2 if re.search(r":u?q\b", text) else 1)


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
    kinds = Counter(map(opcode, loop))
    report.loop, report.mad = len(loop), kinds["mad"]
    report.dpas = sum(count for name, count in kinds.items() if name.startswith("dpas"))
    messages = [x for x in loop if is_message(opcode(x))]
    report.scratch = sum("scratch" in x or "ss[" in x or "dc0" in x for x in messages)
    cycles = Counter(dict.fromkeys(PIPES, 0))
    for instruction in loop:
        pipe, count = pipe_of(instruction, report.device)
        if pipe:
            cycles[pipe] += count
        if opcode(instruction).startswith("dpas") or (not report.dpas and opcode(instruction) == "mad"):
            report.useful += count
    report.cycles = dict(cycles) if loop else {}


def listing(folder: Path, entry: str) -> Path | None:
    """The listing of this kernel: a compilation leaves others too, of symbol tables and of what it tried first."""
    of_kernel = [path for path in folder.glob("*.asm") if path.read_text(errors="replace").split(None, 2)[1:2] == [entry]]
    return max(of_kernel, key=lambda path: path.stat().st_mtime_ns, default=None)


def forms(kernel: str) -> list[str]:
    """A kernel as it is without options, and its other forms; see `spirv.forms`."""
    return [f"{kernel}+{form}" if form else kernel for form in spirv.forms(kernel)]


def compile_kernel(ocloc: Path, kernel: str, device: str) -> Report:
    """Compile one kernel for one device."""
    report = Report(kernel, device)
    module, _, form = kernel.partition("+")
    entry = manifest.read()[module]
    options = entry["build_options"].get("opencl", "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "kernel.spv"
        constants = spirv.forms(module, two_dimensional=device not in WITHOUT_BLOCK_LOADS)[form]
        file.write_bytes(specialise((manifest.FOLDER / f"{module}.spv").read_bytes(), constants))
        command = [ocloc, "compile", "-file", file, "-spirv_input", "-device", device]
        command += ["-out_dir", folder, *(["-options", options] if options else [])]
        environment = {**os.environ, "IGC_ShaderDumpEnable": "1", "IGC_DumpToCustomDir": name}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, cwd=folder, check=False
            )
        except subprocess.TimeoutExpired:
            report.problem = f"not compiled in {TIME_LIMIT} s"
            return report
        path = listing(folder, entry["entry"])
        if done.returncode or path is None:
            reason = re.search(r"error: .*", done.stdout + done.stderr)
            report.problem = f"ocloc ended with {done.returncode}" + (f": {reason[0][:100]}" if reason else "")
            return report
        read_assembly(report, path.read_text(errors="replace"), path.name)
    return report


def judge(report: Report) -> None:
    """Note the bars that the report breaks."""
    if report.device not in CLEAN:
        return
    if report.problem:
        report.broken.append(report.problem)
    if report.spill_bytes or report.private_bytes or report.scratch:
        report.broken.append("spills or private memory")
    head_dim = manifest.read()[report.kernel.partition("+")[0]]["constants"].get("head_dim")
    most = (
        DPAS_BARS.get(head_dim)
        if "_matrix_" in report.kernel and not report.kernel.endswith(("options", "dropout", "bias"))
        else None
    )
    if most is not None and not report.problem:
        if report.loop > most * report.dpas:
            report.broken.append(f"{report.loop / max(report.dpas, 1):.1f} instructions for a dpas > {most}")
        if report.bound != "xmx":
            report.broken.append(f"{report.bound} is busier than the engine")
    head_dim = None if "+" in report.kernel else head_dim  # the bars are for loops without options
    for part, (head_dims, least) in MAD_BARS.items():
        concerned = part in report.kernel and "float32" in report.kernel and head_dim in head_dims and report.device == "pvc"
        if concerned and report.mad_share < least and not report.problem:
            report.broken.append(f"mad {report.mad_share:.0%} < {least:.0%}")


def version(ocloc: Path) -> tuple[int, ...]:
    """The version of the driver that this ocloc belongs to; () if it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = [ocloc, "query", "OCL_DRIVER_VERSION"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ()
        file = Path(folder, "OCL_DRIVER_VERSION")  # where older ones write it
        text = file.read_text() if file.exists() else done.stdout
    found = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def tools_folder() -> Path:
    """Where scripts/get_ocloc.sh puts what it fetches."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("GPU_TOOLS") or cache / "ulysses_dp")


def newest_ocloc() -> Path | None:
    """The newest of those on PATH and of those that were fetched."""
    folders = [Path(x) for x in os.environ.get("PATH", "").split(os.pathsep) if x]
    found = {x for folder in folders for x in folder.glob("ocloc*") if re.fullmatch(r"ocloc(-[\d.]+)?", x.name)}
    return max(found | set(tools_folder().glob("*/bin/ocloc")), key=version, default=None)


def line(report: Report) -> str:
    """What is printed of a report."""
    numbers = report.problem or (
        f"{report.simd:4} {report.registers:4} {report.spill_bytes:6} {report.private_bytes:7} {report.instructions:6} | "
        f"{report.loop:5} {report.mad:5} {report.dpas:4} | {' '.join(f'{report.cycles.get(pipe, 0):5}' for pipe in PIPES)} | "
        f"{report.bound:5} {report.reach:5.0%} {report.mad_share:5.0%}"
    )
    return f"{report.kernel:44} {report.device:4} {numbers}" + "".join(f"  BROKEN: {bar}" for bar in report.broken)


def main() -> None:
    """Compile, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels with this in their name, whether made for GPUs or not")
    parser.add_argument("--device", nargs="*", default=DEVICES, help=f"of {', '.join(DEVICES)}")
    parser.add_argument("--ocloc", type=Path, help="this one instead of the newest")
    parser.add_argument("--json", type=Path, help="write the reports here")
    arguments = parser.parse_args()
    ocloc = arguments.ocloc or newest_ocloc()
    if ocloc is None:
        sys.exit("gpu_report: ocloc is not installed; scripts/get_ocloc.sh fetches it")
    number = version(ocloc)
    if not number:
        sys.exit(f"gpu_report: {ocloc} does not run")
    judged = number >= BARS_FROM
    print(f"{ocloc}, version {'.'.join(map(str, number))}" + ("" if judged else ": too old for the bars, only reported"))
    print(
        f"{'':49}SIMD  GRF  spill private instr. |  loop   mad dpas | {' '.join(f'{p:>5}' for p in PIPES)} | bound reach   mad"
    )

    names = sorted(manifest.read())
    kernels = [name for name in names if (arguments.kernel in name if arguments.kernel else spirv.for_gpu(name))]
    if not kernels:
        sys.exit(f"gpu_report: no kernel has {arguments.kernel!r} in its name")
    reports = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is done by the processes that they wait for
        pairs = [(form, device) for kernel in kernels for form in forms(kernel) for device in arguments.device]
        for report in pool.map(lambda pair: compile_kernel(ocloc, *pair), pairs):
            if judged:
                judge(report)
            reports.append(report)
            print(line(report), flush=True)
    if arguments.json:
        derived = [{**asdict(r), "bound": r.bound, "reach": r.reach, "mad_share": r.mad_share} for r in reports]
        arguments.json.write_text(json.dumps({"ocloc": number, "reports": derived}, indent=1) + "\n")
    broken = sum(bool(r.broken) for r in reports)
    print(f"{len(reports)} compilations, {broken} break a bar")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
