"""Which kernel a device gets, and how a user changes that."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_qkv
from ulysses_dp.kernels.flash_forward import HEAD_DIMS, TILES
from ulysses_dp.kernels.flash_forward_gpu import GPU_TILES

from ulysses_dp import attention, schedule
from ulysses_dp._device.queue import default_queue

pytestmark = pytest.mark.single

F32, F64 = np.dtype("float32"), np.dtype("float64")


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch):
    for name in (schedule.SCHEDULE, schedule.TUNING):
        monkeypatch.delenv(name, raising=False)


class Device(SimpleNamespace):
    """What the choice asks a device for."""

    __hash__ = object.__hash__

    def __init__(self, **properties):
        super().__init__(is_gpu=False, sub_group_sizes=[8, 16], max_work_group_size=256, native_vector_width_float=8)
        vars(self).update(properties)


@pytest.mark.parametrize("table", [schedule.AVX512, schedule.AVX2, schedule.GPU])
def test_tables_name_schedules(table):
    assert 0 in table
    assert {name for costs in table.values() for name in costs} <= schedule.ROWS.keys()
    assert set(table) <= {0, *HEAD_DIMS}


@pytest.mark.parametrize("head_dim", [1, 16, 50, 64, 128, 256])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("width", [4, 8, 16])
def test_cpu_gets_a_cpu_tile(head_dim, dtype, width):
    for seq in range(1, 200, 7):
        assert schedule.choose(Device(native_vector_width_float=width), dtype, head_dim, seq) in TILES


def test_short_sequences_get_tiles_that_fit():
    device = Device(native_vector_width_float=16)
    assert schedule.ROWS[schedule.choose(device, F32, 64, 16)] == 16
    assert 128 % schedule.ROWS[schedule.choose(device, F32, 64, 128)] == 0


def test_gpu_schedule_where_it_fits():
    gpu = Device(is_gpu=True)
    for head_dim in (*HEAD_DIMS, 50):
        assert (schedule.choose(gpu, F32, head_dim, 100) == "gpu") == (head_dim in GPU_TILES)
        assert schedule.choose(gpu, F64, head_dim, 100) in TILES
    assert schedule.choose(Device(is_gpu=True, sub_group_sizes=[8, 32]), F32, 64, 100) in TILES


@pytest.mark.parametrize("name", schedule.ROWS)
def test_wish(monkeypatch, name):
    monkeypatch.setenv(schedule.SCHEDULE, name)
    device = Device()
    assert schedule.choose(device, F32, 64, 100) == name
    assert schedule.choose(device, F64, 50, 100) == "short"  # the only one for float64


def test_unknown_wish(monkeypatch):
    monkeypatch.setenv(schedule.SCHEDULE, "fast")
    with pytest.raises(ValueError, match=r"^ULYSSES_DP_SCHEDULE must be one of wide, .*, not 'fast'"):
        schedule.choose(Device(), F32, 64, 100)


def test_tuned_table(monkeypatch, tmp_path):
    path = tmp_path / "tuning.json"
    schedule.write(path, "a device", {0: {"short": 1.0, "narrow": 2.0}, 64: {"narrow": 1.0, "short": 3.0}})
    monkeypatch.setenv(schedule.TUNING, str(path))
    assert schedule.choose(Device(), F32, 64, 48) == "narrow"
    assert schedule.choose(Device(), F32, 128, 48) == "short"


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"costs": {"64": {"short": 1}}}', '{"costs": {"0": {"fast": 1}}}'])
def test_bad_table(monkeypatch, tmp_path, text):
    path = tmp_path / "tuning.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(schedule.TUNING, str(path))
    with pytest.raises(ValueError, match="ULYSSES_DP_TUNING"):
        schedule.choose(Device(), F32, 64, 48)


def test_every_schedule_computes_the_same(monkeypatch):
    q, k, v = random_qkv(0, 1, 70, 4, 2, 64)
    expected = attention(q, k, v, causal=True)
    for name in schedule.candidates(default_queue().sycl_device, F32, 64):
        monkeypatch.setenv(schedule.SCHEDULE, name)
        np.testing.assert_allclose(attention(q, k, v, causal=True), expected, rtol=0, atol=1e-5)


def test_tune(tmp_path):
    script, path = Path(__file__).parents[1] / "scripts/tune.py", tmp_path / "tuning.json"
    command = [sys.executable, script, "--seq", "40", "--seconds", "0.01", "--save", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "head_dim" in done.stdout
    assert re.search(r"^float32 +64 +1024 +[\d.]+", done.stdout, re.MULTILINE)
    table = schedule.read(path)
    assert set(table) == {0, *HEAD_DIMS}
    assert all(min(costs.values()) == 1 for costs in table.values())
