"""``--check`` on a copy of the package in which a kernel was broken on purpose, and what it says of its results."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ulysses_dp.kernels import manifest

import ulysses_dp
from ulysses_dp import check
from ulysses_dp._device.queue import default_queue

pytestmark = pytest.mark.single


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A copy of the package: merging in float32 adds where it should multiply, in float64 its module is cut short."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(Path(ulysses_dp.__file__).parent, folder / "ulysses_dp")
    shutil.copytree(manifest.FOLDER.parent, folder / "ulysses_dp/kernels", dirs_exist_ok=True)
    path = folder / "ulysses_dp/kernels/spirv/row_merge_float32.spv"
    words, position = np.fromfile(path, np.uint32), 5
    while position < len(words):
        length, opcode = int(words[position]) >> 16, int(words[position]) & 0xFFFF
        if opcode == 133:  # OpFMul, which has the form of OpFAdd
            words[position] = length << 16 | 129
        position += length
    words.tofile(path)
    path = path.with_name("row_merge_float64.spv")
    path.write_bytes(path.read_bytes()[:100])
    return folder


def answers_from(what, dtype, package=None, seconds=100):
    """What one process says of the checks from this one on."""
    names = [x.name for x in check.checks(default_queue().sycl_device)]
    first = names.index(f"{what} {dtype}")
    environment = os.environ | ({"PYTHONPATH": str(package)} if package else {})
    code = f"from ulysses_dp import check; print(*map(check.line, check._answers({first}, {names}, {seconds})), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=300, cwd=package
    )
    return done.stdout.splitlines()


def test_finds_a_kernel_that_computes_something_else(broken):
    (line,) = answers_from("merge", "float32", broken)
    assert "WRONG: more than" in line


def test_finds_a_kernel_that_cannot_be_loaded(broken):
    (line,) = answers_from("merge", "float64", broken)
    assert "failed: " in line or "ended its process" in line


def test_goes_on_until_something_is_wrong():
    assert [line.split()[-1] for line in answers_from("merge", "float64")] == ["right"]


def test_a_check_that_hangs_is_given_up():
    (line,) = answers_from("merge", "float32", seconds=1e-3)
    assert line.endswith("no answer in 0.001 s")


def test_a_process_that_crashes():
    assert check._ending(-signal.SIGSEGV) == "signal 11"


def test_every_dtype_and_direction_is_checked():
    names = {x.name for x in check.checks(default_queue().sycl_device)}
    assert {"forward float32 64", "gradient float32 64 options", "forward bfloat16 64", "merge float32"} <= names


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0])
def test_error(bad):
    assert check._error(np.array([1.0, bad]), np.array([1.0, 1.0])) == (1.0 if bad == 2 else np.inf)
    assert check._error(np.array([-np.inf, 3.0]), np.array([-np.inf, 3.0])) == 0


def test_ranks_are_joined():
    good, bad = check.Result("a", error=1.0, seconds=1.0), check.Result("a", verdict="WRONG", error=2.0, seconds=0.5)
    (line,) = check.joined([[good], [bad]])
    assert (line.verdict, line.error, line.seconds, line.right) == ("WRONG (ranks 1)", 2.0, 1.0, False)
