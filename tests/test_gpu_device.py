"""Which GPU a process takes, on Intel's driver without a GPU, and what it says where there is none."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

NULL_DEVICE = Path(__file__).parents[1] / "tools/gpu/null_device.sh"
CHOICE = """
from ulysses_dp._device.queue import default_queue, local_rank
device = default_queue().sycl_device
tile = device.parent_device
print("a device" if tile is None else tile.create_sub_devices(partition="numa").index(device) == local_rank())
"""
OFFLOAD = """
import numpy, ulysses_dp
try:
    ulysses_dp.scatter_heads(numpy.zeros((1, 2, 2, 4)))
except RuntimeError as error:
    print(error)
"""


def python(program, *prefix, **environment):
    command = [*prefix, sys.executable, "-c", program]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("hierarchy", ["FLAT", "COMPOSITE"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_tile_for_each_rank(hierarchy, rank):
    done = python(CHOICE, NULL_DEVICE, TILES="2", ZE_FLAT_DEVICE_HIERARCHY=hierarchy, MPI_LOCALRANKID=rank)
    if "No such file" in done.stderr:
        pytest.skip("no driver")
    assert done.stdout == {"FLAT": "a device\n", "COMPOSITE": "True\n"}[hierarchy], done.stderr


def test_a_mask_that_leaves_no_gpu_is_named():
    done = python(CHOICE, ONEAPI_DEVICE_SELECTOR="level_zero:gpu", ZE_AFFINITY_MASK="0.1", OCL_ICD_FILENAMES="/of/nobody")
    if done.returncode == 0:
        pytest.skip("there is a GPU with this tile")
    message = done.stderr.strip().splitlines()[-1]
    assert "; ZE_AFFINITY_MASK is '0.1'" in message
    assert "ZE_FLAT_DEVICE_HIERARCHY is FLAT, or not set, every tile has a number of its own" in message


def test_offload_without_level_zero_is_refused_before_mpi_aborts():
    try:
        ctypes.CDLL("libze_loader.so.1")
    except OSError:
        done = python(OFFLOAD, I_MPI_OFFLOAD="1")
        assert done.stdout.startswith("I_MPI_OFFLOAD is '1', for which MPI needs the loader of Level Zero"), done.stderr
    else:
        pytest.skip("Level Zero is installed")
