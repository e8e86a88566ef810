"""tools/gpu/nullgpu.py: what it must find, on Intel's driver without a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from ulysses_dp.kernels import manifest

pytestmark = pytest.mark.single

TOOLS = Path(__file__).parents[1] / "tools/gpu"
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import nullgpu
from ulysses_dp.kernels import manifest
name = "relayout_uint32"
entry, spirv = manifest.read()[name]["entry"], (manifest.FOLDER / f"{name}.spv").read_bytes()
driver = nullgpu.Driver()
print("spill", driver.build(spirv, entry, "").spill_bytes)
print("arguments", driver.build(spirv, entry, "").arguments)
for module, what in ((spirv[: len(spirv) // 8 * 4], entry), (spirv, "another")):
    try:
        driver.build(module, what, "")
    except RuntimeError as error:
        print("raised", error)
"""


@pytest.fixture
def nullgpu():
    spec = importlib.util.spec_from_file_location("nullgpu", TOOLS / "nullgpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_failing_step_is_told(nullgpu, capsys):
    nullgpu.step("good", lambda: None)
    nullgpu.step("bad", lambda: 1 / 0)
    with pytest.raises(SystemExit, match="calls: 1 of 2 failed: bad"):
        nullgpu.finish("calls", 2)
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_builds_tell_what_became_of_the_kernel():
    command = [TOOLS / "null_device.sh", sys.executable, "-c", PROGRAM, TOOLS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "No such file" in done.stderr:
        pytest.skip("no driver")
    arguments = len(manifest.read()["relayout_uint32"]["arguments"])
    failure = "raised zeKernelCreate returned 0x78000011"  # ZE_RESULT_ERROR_INVALID_KERNEL_NAME
    assert done.stdout.splitlines() == ["spill 0", f"arguments {arguments}", failure, failure], done.stderr
