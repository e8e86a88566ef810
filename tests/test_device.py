"""What a process finds of its own accord: runtime, device, number within the node; in clean environments."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ulysses_dp.kernels import manifest

from ulysses_dp._device.queue import local_rank

pytestmark = pytest.mark.single

RESULT = "import numpy, ulysses_dp; q = numpy.ones((1, 2, 1, 4), 'f4'); print(ulysses_dp.attention(q, q, q).sum())"
LAUNCHERS = ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


def python(*arguments, **environment):
    """Run Python in this environment and no other, and return what it prints."""
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_device_is_found_without_any_setting():
    code = (
        "import ulysses_dp; from ulysses_dp._device.queue import default_queue; print(default_queue().sycl_device.device_type)"
    )
    assert python("-c", code) in ("device_type.cpu", "device_type.gpu")


def test_the_result_is_computed_without_any_setting():
    assert python("-c", RESULT) == "8.0"


@pytest.mark.parametrize("name", ["OCL_ICD_FILENAMES", "OCL_ICD_VENDORS"])
def test_the_environment_of_the_user_stays(name):
    code = "import os, ulysses_dp; print({name: value for name, value in os.environ.items() if name.startswith('OCL_ICD')})"
    assert python("-c", code, **{name: "/of/the/user"}) == str({name: "/of/the/user"})


@pytest.mark.parametrize("use", ["", "q = numpy.ones((1, 2, 1, 4)); ulysses_dp.attention(q, q, q);"])
def test_one_rank_does_not_start_mpi(use):
    assert python("-c", f"import sys, numpy, ulysses_dp; {use} print('mpi4py.MPI' in sys.modules)") == "False"


def test_no_device():
    code = """if True:
        import ulysses_dp._device.queue
        try:
            ulysses_dp._device.queue.default_queue()
        except RuntimeError as error:
            print(error)
    """
    message = python("-c", code, ONEAPI_DEVICE_SELECTOR="opencl:cpu", OCL_ICD_FILENAMES="/of/nobody")
    assert message.startswith("SYCL offers no GPU and no CPU device; ")
    assert "; OCL_ICD_FILENAMES is '/of/nobody'." in message
    message = python("-c", code, ONEAPI_DEVICE_SELECTOR="cuda:gpu")
    assert "; ONEAPI_DEVICE_SELECTOR is 'cuda:gpu';" in message
    assert "ONEAPI_DEVICE_SELECTOR=opencl:cpu" in message


@pytest.mark.parametrize("selector", ["opencl:cpu", "*:cpu", "opencl:*", "opencl:0", "*:*", "!opencl:gpu", ""])
def test_selectors(selector):
    """What the doctor suggests, too. Nothing but the OpenCL adapter is loaded for the first: its libraries must be found."""
    assert python("-c", RESULT, ONEAPI_DEVICE_SELECTOR=selector) == "8.0"


@pytest.mark.parametrize("name", ["OCL_ICD_FILENAMES", "OCL_ICD_VENDORS", "ULYSSES_DP_WORKSPACE"])
def test_empty_variables_count_as_unset(name):
    assert python("-c", RESULT, **{name: ""}) == "8.0"


@pytest.mark.parametrize("selector", ["cpu", "gpu", "opencl", "opencl: cpu", "opencl:cpu;", "opencl:cpu,opencl:gpu", ":cpu"])
def test_selectors_that_sycl_cannot_read(selector):
    """They would end the process without a word of Python."""
    code = "try: import ulysses_dp\nexcept ValueError as error: print(error)"
    message = python("-c", code, ONEAPI_DEVICE_SELECTOR=selector)
    assert message.startswith("ONEAPI_DEVICE_SELECTOR must be backend:device, as in opencl:cpu")
    assert message.endswith(f", not {selector!r}")


def test_report():
    title, *lines = python("-m", "ulysses_dp").splitlines()
    assert title.startswith("ulysses_dp ")
    said = {}
    for line in lines:
        label, text = line.split(maxsplit=1)
        said.setdefault(label, []).append(text.strip())
    assert set(said) == {"device", "process", "MPI", "exchange", "kernels", "known", "backends"}
    assert [text.endswith("this process") for text in said["device"]].count(True) == 1
    assert said["process"] == ["number 0 on this node"]
    assert "MPI" in said["MPI"][0]
    assert said["exchange"][0].startswith(("device: ", "host: "))
    assert re.fullmatch(r"INTEL_SYCL, .*NUMPY; AUTO takes .*INTEL_SYCL.*", said["backends"][0])
    assert said["kernels"] == [f"{len(manifest.read())} in {manifest.FOLDER}"]


def test_report_of_every_rank():
    mpiexec = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec")
    command = [mpiexec, "-n", "2", sys.executable, "-m", "ulysses_dp"]
    text = subprocess.run(command, env={}, capture_output=True, text=True, timeout=120, check=True).stdout
    _, first, second = re.split(r"^rank \d$", text, flags=re.MULTILINE)
    assert "number 0 on this node" in first
    assert "number 1 on this node" in second


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_local_rank(no_launcher, monkeypatch, name):
    assert local_rank() == 0
    monkeypatch.setenv(name, "5")
    assert local_rank() == 5
    monkeypatch.setenv(name, "")
    assert local_rank() == 0


def test_local_rank_of_the_launcher_before_that_of_the_batch_system(no_launcher, monkeypatch):
    """srun sets its variable for the one mpiexec that it starts, too."""
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("MPI_LOCALRANKID", "3")
    assert local_rank() == 3
