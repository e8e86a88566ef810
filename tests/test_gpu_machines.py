"""The machines that run kernels for GPUs without an Intel GPU (tools/gpu): what they must find and reach."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ulysses_dp.kernels.constants import specialise

pytestmark = pytest.mark.single

TOOLS = Path(__file__).parents[1] / "tools"
PLANT = """
import sys, tempfile
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from gpu import oclgrind, standin
standin.install()
from ulysses_dp.kernels.row_dot import dot_rows
machine = oclgrind.Oclgrind(standin.manifest().FOLDER, Path(tempfile.mkdtemp()))
x = np.ones((1, 3, 2, 5), np.float32)
out = standin.empty(machine, (1, 2, 3), np.float32)
given = standin.asarray(machine, x)
short = standin.Array(standin.asarray(machine, x[:, :, :, :4]).usm_data, x.dtype, x.shape, given.strides)
row = standin.empty(machine, (1, 2, 2), np.float32).usm_data
faults = {
    "none": (given, out),
    "read outside": (short, out),
    "write outside": (given, standin.Array(row, x.dtype, (1, 2, 3), (6, 3, 1))),
    "uninitialised": (standin.empty(machine, x.shape, np.float32), out),
    "race": (standin.asarray(machine, np.arange(30, dtype=np.float32).reshape(x.shape)),
             standin.Array(out.usm_data, x.dtype, (1, 2, 3), (0, 0, 0))),
}
left, target = faults[sys.argv[2]]
dot_rows(left, given, target)
print("sums", standin.asnumpy(target).ravel())
"""
REACH = """
import sys
sys.path.insert(0, sys.argv[1])
from gpu import cases, spirv, standin
standin.install()
dry = cases.Dry()
for case in cases.kinds():
    cases.attention(dry, case, compare=False)
for kind in cases.COPIES:
    cases.copy(dry, kind, 0, compare=False)
for kind in cases.TRAVELS:
    cases.travel(dry, kind, 0, compare=False)
for dtype in cases.LIMITS:
    cases.dot(dry, dtype, 0, compare=False)
    cases.merge(dry, dtype, 0, compare=False)
print(*sorted({name for name in standin.manifest().read() if spirv.for_gpu(name)} - {name for name, _ in dry.wanted}))
"""


@pytest.fixture(scope="module")
def tools():
    """The modules of tools/gpu that need nothing in the place of the package."""
    sys.path.insert(0, str(TOOLS))
    from gpu import cases, oclgrind, spirv, standin

    yield {"cases": cases, "oclgrind": oclgrind, "spirv": spirv, "standin": standin}
    sys.path.remove(str(TOOLS))


def python(program, *arguments):
    command = [sys.executable, "-c", program, TOOLS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", None),
        ("read outside", "Invalid read"),
        ("write outside", "Invalid write"),
        ("uninitialised", "uninitialized"),
        ("race", "race"),
    ],
)
def test_planted_faults_are_found(tools, fault, message):
    if tools["oclgrind"].missing():
        pytest.skip("no Oclgrind")
    done = python(PLANT, fault)
    if message is None:
        assert done.stdout == "sums [5. 5. 5. 5. 5. 5.]\n", done.stderr
    else:
        assert done.returncode == tools["oclgrind"].FAULT
        assert message in done.stdout


def test_every_kernel_for_gpus_is_reached():
    done = python(REACH)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr


def test_views(tools):
    """What the launchers get instead of usm_ndarray says where its numbers lie, as NumPy does."""
    standin, dry = tools["standin"], tools["cases"].Dry()
    x = np.zeros((3, 4, 5), np.float32)
    array = standin.asarray(dry, x)
    for index in (slice(None, None, -1), (1, slice(1, 3)), (slice(None), slice(3, None, -2), -1), (slice(2, 2),)):
        view, expected = array[index], x[index]
        assert view.shape == expected.shape
        assert view.strides == tuple(s // 4 for s in expected.strides)
        if view.size:
            assert view._element_offset == (expected.ctypes.data - x.ctypes.data) // 4
    assert array.permute((2, 0, 1)).strides == (1, 20, 5)
    for shape in ((), (0, 3), (2, 0), (2, 3)):
        empty = standin.empty(dry, shape, np.float64)
        assert standin.asnumpy(empty).shape == shape


def test_bfloat16(tools):
    cases = tools["cases"]
    x = np.array([1, -2.5, 3e38, 1 + 2**-8, 1 + 3 * 2**-8, np.inf, np.nan], np.float32)
    expected = np.array([1, -2.5, 3e38, 1, 1 + 2**-6, np.inf, np.nan], np.float32)
    np.testing.assert_allclose(cases.widened(cases.narrowed(x)), expected, rtol=2**-9)
    assert cases.widened(cases.narrowed(x))[3:5].tolist() == [1, 1 + 2**-6]  # ties to even


def test_specialise():
    """Only the default of the constant with this identifier changes."""
    decorations = [4 << 16 | 71, 7, 1, 3, 4 << 16 | 71, 8, 1, 4]
    module = np.array([*[0] * 5, *decorations, 4 << 16 | 50, 2, 7, 0, 4 << 16 | 50, 2, 8, 0], np.uint32)
    changed = np.frombuffer(specialise(module.tobytes(), ((4, 9),)), np.uint32)
    expected = module.copy()
    expected[-1] = 9
    np.testing.assert_array_equal(changed, expected)
