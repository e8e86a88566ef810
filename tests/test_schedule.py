"""Which kernel a device gets, and how a user changes that."""

import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_qkv
from ulysses_dp.kernels import schedules
from ulysses_dp.kernels.flash_forward import TILES
from ulysses_dp.kernels.launch import BuildError

from ulysses_dp import AttnType, attention, attention_backward
from ulysses_dp._call.options import OPTIONS
from ulysses_dp._device.queue import default_queue

pytestmark = pytest.mark.single

F32, F64 = np.dtype("float32"), np.dtype("float64")


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch):
    for name in (schedules.SCHEDULE, schedules.TUNING):
        monkeypatch.delenv(name, raising=False)


class Device(SimpleNamespace):
    """What the choice asks a device for."""

    __hash__ = object.__hash__

    def __init__(self, **properties):
        super().__init__(
            name="a device", is_gpu=False, sub_group_sizes=[8, 16], max_work_group_size=256, native_vector_width_float=8
        )
        vars(self).update(properties)


@pytest.mark.parametrize("properties", [{}, {"native_vector_width_float": 16}, {"is_gpu": True}])
def test_every_kind_of_device_has_costs(properties):
    costs = schedules.default_costs(Device(**properties))
    assert costs[0]
    assert costs[0].keys() <= schedules.SCHEDULES.keys()


@pytest.mark.parametrize("head_dim", [1, 16, 50, 64, 128, 256])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("width", [4, 8, 16])
def test_cpu_gets_a_cpu_tile(head_dim, dtype, width):
    for seq in range(1, 200, 7):
        assert schedules.choose(Device(native_vector_width_float=width), dtype, head_dim, seq).name in TILES


def test_short_sequences_get_tiles_that_fit():
    device = Device(native_vector_width_float=16)
    assert schedules.choose(device, F32, 64, 16).rows == 16
    assert 128 % schedules.choose(device, F32, 64, 128).rows == 0


def test_gpu_gets_no_kernel_for_cpus():
    """Not for any dtype, option or head_dim up to the largest tile, forward or gradient."""
    gpu = Device(is_gpu=True)
    space = product(
        ("float32", "float64", "float16", "uint16"), range(1, 257), ((), schedules.GPU_OPTIONS), (False, True), (1, 100)
    )
    for dtype, head_dim, options, backward, seq in space:
        assert schedules.choose(gpu, dtype, head_dim, seq, options=options, backward=backward).name == "gpu"
        assert (
            schedules.choose(Device(is_gpu=True, sub_group_sizes=[8, 32]), dtype, head_dim, seq, options=options).name in TILES
        )


def test_matrix_engines_of_16_lanes_get_their_kernels():
    """For numbers of 16 bits, with all options, forward; Arc A, whose engine takes 8 lanes, and CPUs do not."""
    engine, vectors = Device(is_gpu=True, sub_group_sizes=[16, 32]), Device(is_gpu=True)
    for dtype, head_dim, options in product(("float16", "uint16"), range(1, 257), ((), schedules.GPU_OPTIONS)):
        assert schedules.choose(engine, dtype, head_dim, 100, options=options).name == "matrix"
        assert schedules.choose(engine, dtype, head_dim, 100, options=options, backward=True).name == "gpu"
        assert schedules.choose(vectors, dtype, head_dim, 100, options=options).name == "gpu"
        assert schedules.choose(Device(), dtype, head_dim, 100, options=options).name in TILES
    assert schedules.choose(engine, F32, 64, 100).name == "gpu"


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "uint16"])
@pytest.mark.parametrize("options", [(), schedules.GPU_OPTIONS, ("an option of later",)], ids=["none", "all", "new"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("properties", [{}, {"is_gpu": True}])
def test_something_computes_everything(dtype, options, backward, properties):
    device = Device(**properties)
    for head_dim in range(1, 257):
        chosen = schedules.choose(device, dtype, head_dim, 100, options=options, backward=backward)
        assert chosen.can(device, dtype, head_dim, options=options, backward=backward)


def test_a_schedule_for_16_bits_can_be_chosen(monkeypatch):
    """Nothing converts arrays before the schedule is known."""
    reads = replace(
        schedules.SCHEDULES["gpu"], name="matrix", operands={np.dtype("float16"): np.dtype("float16")}, costs={"avx2": 0.5}
    )
    reads = replace(reads, serves=lambda *_, options, backward: not options)
    monkeypatch.setitem(schedules.SCHEDULES, "matrix", reads)
    assert schedules.choose(Device(), "float16", 64, 100) is reads
    assert schedules.choose(Device(), "float16", 64, 100, options=["softcap"]) is not reads
    assert schedules.choose(Device(), "uint16", 64, 100) is not reads


def test_an_option_that_the_kernels_for_gpus_do_not_have():
    """It is computed, by kernels that have it, and never left out."""
    gpu = Device(is_gpu=True)
    assert schedules.choose(gpu, F32, 64, 100, options=schedules.GPU_OPTIONS).name == "gpu"
    assert schedules.choose(gpu, F32, 64, 100, options=["softcap", "an option of later"]).name in TILES


@pytest.fixture
def refused(monkeypatch):
    """The best schedule of all, of which the driver builds no kernel."""

    def forward(*_):
        raise BuildError("kernel best cannot be built")

    costs = dict.fromkeys(("avx2", "avx512", "gpu"), 0.01)
    best = replace(schedules.SCHEDULES["short"], name="best", costs=costs, serves=lambda *_, **__: True)
    best = replace(best, forward=forward, backward=forward)
    monkeypatch.setitem(schedules.SCHEDULES, "best", best)
    monkeypatch.setattr(schedules, "_refused", set())
    for x in (schedules._choose, schedules.default_costs):
        x.cache_clear()
    yield best
    for x in (schedules._choose, schedules.default_costs):
        x.cache_clear()


@pytest.mark.usefixtures("refused")
def test_a_schedule_that_the_driver_does_not_build():
    """Others take its place, with a warning for each kind of call."""
    q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 9, 2, 23), dtype=np.float32)
    for options in ({}, {"softcap": 2.0}):
        with pytest.warns(RuntimeWarning, match="compute in the place of this one: kernel best cannot be built"):
            out, lse = attention(q, k, v, return_lse=True, **options)
        expected, expected_lse = attention(q, k, v, return_lse=True, attn_type=AttnType.NUMPY, **options)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
        with pytest.warns(RuntimeWarning, match="kernel best cannot be built"):
            grads = attention_backward(dout, q, k, v, out, lse, **options)
        wanted = attention_backward(dout, q, k, v, expected, expected_lse, attn_type=AttnType.NUMPY, **options)
        for x, y in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(attention(q, k, v, **options), out)


def test_nothing_takes_the_place_of_the_last_schedule(refused, monkeypatch):
    monkeypatch.setattr(schedules, "SCHEDULES", {"best": refused})
    with pytest.raises(BuildError, match="kernel best cannot be built"):
        attention(*np.ones((3, 1, 4, 1, 22), np.float32))


def test_names_of_options():
    assert OPTIONS.keys() > schedules.GPU_OPTIONS


def test_nothing_fits():
    with pytest.raises(NotImplementedError, match="no kernel for dtype float32 and head_dim 64 runs on a device"):
        schedules.choose(Device(max_work_group_size=8, sub_group_sizes=[8]), F32, 64, 1)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_wish(monkeypatch, name):
    monkeypatch.setenv(schedules.SCHEDULE, name)
    device, dtype = Device(), np.dtype("float16") if name == "matrix" else F32
    assert schedules.choose(device, dtype, 64, 100).name == name
    # the only one of CPUs for float64
    assert schedules.choose(device, F64, 50, 100).name == (name if name == "gpu" else "short")


def test_unknown_wish(monkeypatch):
    monkeypatch.setenv(schedules.SCHEDULE, "fast")
    with pytest.raises(ValueError, match=r"^ULYSSES_DP_SCHEDULE must be one of wide, .*, not 'fast'"):
        schedules.choose(Device(), F32, 64, 100)


def test_tuned_table(monkeypatch, tmp_path):
    path = tmp_path / "tuning.json"
    schedules.write(path, "a device", {0: {"short": 1.0, "narrow": 2.0}, 64: {"narrow": 1.0, "short": 3.0}})
    monkeypatch.setenv(schedules.TUNING, str(path))
    assert schedules.choose(Device(), F32, 64, 48).name == "narrow"
    assert schedules.choose(Device(), F32, 128, 48).name == "short"


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"costs": {"64": {"short": 1}}}', '{"costs": {"0": {"fast": 1}}}'])
def test_bad_table(monkeypatch, tmp_path, text):
    path = tmp_path / "tuning.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(schedules.TUNING, str(path))
    with pytest.raises(ValueError, match="ULYSSES_DP_TUNING"):
        schedules.choose(Device(), F32, 64, 48)


def test_every_schedule_computes_the_same(monkeypatch):
    q, k, v = random_qkv(0, 1, 70, 4, 2, 64)
    expected = attention(q, k, v, causal=True)
    for schedule in schedules.candidates(default_queue().sycl_device, F32, 64):
        monkeypatch.setenv(schedules.SCHEDULE, schedule.name)
        np.testing.assert_allclose(attention(q, k, v, causal=True), expected, rtol=0, atol=1e-5)


def test_tune(tmp_path):
    script, path = Path(__file__).parents[1] / "scripts/tune.py", tmp_path / "tuning.json"
    command = [sys.executable, script, "--seq", "40", "--seconds", "0.01", "--head-dim", "64", "--save", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "head_dim" in done.stdout
    assert re.search(r"^float32 +64 +1024 +[\d.]+", done.stdout, re.MULTILINE)
    table = schedules.read(path)
    assert set(table) == {0, 64}
    assert all(min(costs.values()) == 1 for costs in table.values())
