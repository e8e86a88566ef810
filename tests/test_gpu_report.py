"""scripts/gpu_report.py: what it reads from a listing, which listing it takes, and what it judges."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ulysses_dp.kernels import manifest

pytestmark = pytest.mark.single

SCRIPT = Path(__file__).parents[1] / "scripts/gpu_report.py"
LISTING = """//.kernel entry_of_this
//.thread_config numGRF=256, numAcc=8, numSWSB=32
//.spill size 128
//.declare V0033 (43)  rf=r size=64 type=d alias=+0 align=32 words (r0.0)
// .private memory size 64
L_outer:
        mov (16|M0)              r9.0<1>:q     r8.0<1;1,0>:q                        // $1
L_hot:
        load.ugm.d32x64t.a64 (1|M0)  r132:4    [r8:1]             {$2} // ex_desc:0x0; desc:0x4403580 // $2
        mad (16|M0)              r3.0<1>:f     r3.0<1;0>:f       r4.0<1;0>:f       r132.0<0>:f  // $3
        mad (16|M0)              r3.0<1>:f     r3.0<1;0>:f       r4.0<1;0>:f       r132.1<0>:f  // $3
(W)     mad (32|M0)              r3.0<1>:f     r3.0<1;0>:f       r4.0<1;0>:f       r132.2<0>:f  // $3
        math.exp (16|M0)         r3.0<1>:f     r3.0<1;1,0>:f                        // $4
(W)     add (1|M0)               r9.0<1>:q     r9.0<0;1,0>:q     16:w               // $5
        send.dc0 (16|M0)         null     r0      r93:2   0x0 0x020F2000 {$3} // wr:1h+2, rd:0; hword scratch block write x4
        sync.nop                             null                             {Compacted,$2.dst}
(W&f0.0) jmpi                                 L_hot                                  // $6
(W&f1.0) jmpi                                 L_outer                                // $7
"""


@pytest.fixture(scope="module")
def gpu_report():
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = sys.modules["gpu_report"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ocloc(gpu_report):
    path = gpu_report.newest_ocloc()
    if path is None:
        pytest.skip("no ocloc")
    return path


def read(gpu_report, listing, device="pvc", kernel="flash_forward_gpu_float32_d64"):
    report = gpu_report.Report(kernel, device)
    gpu_report.read_assembly(report, listing, "OCL_asm0_simd16_entry_0001.asm")
    return report


def test_reads_the_innermost_loop(gpu_report):
    report = read(gpu_report, LISTING)
    assert (report.simd, report.registers, report.spill_bytes, report.private_bytes) == (16, 256, 128, 64)
    assert (report.instructions, report.loop, report.mad, report.dpas, report.scratch) == (11, 9, 3, 0, 1)
    assert report.cycles == {"xmx": 0, "float": 4, "int": 2, "math": 4, "send": 6}
    assert (report.bound, report.reach) == ("send", pytest.approx(4 / 6))


def test_matrix_engine_counts_where_there_is_one(gpu_report):
    dpas = "        dpas.8x8 (16|M0)         r10:f         r20:f             r30:bf            r40.0:bf         {$4} // $8\n"
    report = read(gpu_report, LISTING.replace("        math.exp", dpas * 2 + "        math.exp"))
    assert (report.dpas, report.cycles["xmx"], report.useful, report.bound, report.reach) == (2, 16, 16, "xmx", 1.0)


def test_doubles_and_narrow_pipes(gpu_report):
    doubles = LISTING.replace(":f ", ":df ")
    assert [read(gpu_report, doubles, device).cycles["float"] for device in ("pvc", "bmg")] == [4, 64]
    assert read(gpu_report, LISTING, "dg2").cycles["float"] == 8


def test_takes_the_listing_of_the_kernel(gpu_report, tmp_path):
    for number, kernel in enumerate(("Intel_Symbol_Table_Void_Program", "entry_of_this", "entry_of_this_too")):
        (tmp_path / f"OCL_{9 - number}.asm").write_text(LISTING.replace("entry_of_this", kernel, 1))
    assert gpu_report.listing(tmp_path, "entry_of_this").name == "OCL_8.asm"
    assert gpu_report.listing(tmp_path, "another") is None


@pytest.mark.parametrize(
    ("change", "device", "broken"),
    [
        (None, "pvc", ["spills or private memory", "mad 33% < 83%"]),
        ("clean", "pvc", ["mad 33% < 83%"]),
        ("clean", "bmg", []),
        ("clean and full", "pvc", []),
        ("scratch", "bmg", ["spills or private memory"]),
        (None, "lnl", []),
    ],
)
def test_bars(gpu_report, change, device, broken):
    listing = LISTING
    if change:
        listing = listing.replace("spill size 128", "").replace("private memory size 64", "")
    if change in ("clean", "clean and full"):
        listing = re.sub("; hword scratch.*", "", listing).replace("send.dc0", "send.ugm")
    if change == "clean and full":
        mad = "        mad (16|M0)              r3.0<1>:f     r3.0<1;0>:f       r4.0<1;0>:f       r132.0<0>:f  // $3\n"
        listing = listing.replace("        math.exp", 40 * mad + "        math.exp")
    report = read(gpu_report, listing, device)
    gpu_report.judge(report)
    assert report.broken == broken


@pytest.mark.parametrize(
    ("count", "broken"), [(3, []), (1, ["12.0 instructions for a dpas > 9.2", "send is busier than the engine"])]
)
def test_bars_of_matrix_engines(gpu_report, count, broken):
    clean = re.sub("; hword scratch.*|spill size 128|private memory size 64", "", LISTING).replace("send.dc0", "send.ugm")
    dpas = "        dpas.8x8 (16|M0)         r10:f         r20:f             r30:bf            r40.0:bf         {$4} // $8\n"
    clean = clean.replace(
        "        math.exp", (dpas * count) + "        sync.nop  null // $8\n" * 2 * (count == 1) + "        math.exp"
    )
    report = read(gpu_report, clean, kernel="flash_forward_matrix_d64")
    report.cycles["send"] += 10 * (count == 1)
    gpu_report.judge(report)
    assert report.broken == broken


def test_kernel_that_does_not_compile_breaks_a_bar(gpu_report):
    report = gpu_report.Report("flash_forward_gpu_float32_d64", "bmg", problem="ocloc ended with 134")
    gpu_report.judge(report)
    assert report.broken == ["ocloc ended with 134"]


def test_kernels_for_gpus(gpu_report):
    of_gpu = {name for name in manifest.read() if gpu_report.spirv.for_gpu(name)}
    assert of_gpu
    assert {gpu_report.spirv.sub_group_size(name) for name in of_gpu} == {16}


def test_no_ocloc(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT], env={"PATH": "", "GPU_TOOLS": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "scripts/get_ocloc.sh fetches it" in done.stderr


def test_real_compiler(gpu_report, ocloc):
    """float64 leaves two listings, of which the last by name is no kernel's; the first line says which compiler it was."""
    name = next(x for x in manifest.read() if "float64" in x and "forward" in x)
    report = gpu_report.compile_kernel(ocloc, name, "pvc")
    assert not report.problem
    assert report.mad > 0
    assert report.cycles["float"] >= report.mad
