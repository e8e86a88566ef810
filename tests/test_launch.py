"""The launcher, and the manifest that guards it from kernels that are not those of the sources."""

import importlib.util
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import dpctl
import numpy as np
import pytest
from ulysses_dp.kernels import (
    flash_backward,
    flash_backward_gpu,
    flash_forward,
    flash_forward_gpu,
    flash_forward_matrix,
    manifest,
    panel_copy,
    panel_wire,
    row_merge,
    row_merge_gpu,
    row_product,
    row_product_gpu,
    schedules,
    score_walk,
    value_panels,
)
from ulysses_dp.kernels.launch import Replay, _kernel, check_headers, launch, warn_of_kernel_for_cpus
from ulysses_dp.kernels.row_dot import dot_rows
from ulysses_dp.kernels.row_dot import reference as dots_of

from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.copies import copy_arrays
from ulysses_dp._device.queue import default_queue

pytestmark = pytest.mark.single

SOURCES = json.loads((manifest.FOLDER / "manifest.json").read_text())["sources"]


@pytest.fixture
def copied(tmp_path):
    """A copy of the kernels and their manifest module, loaded from there."""
    folder = shutil.copytree(Path(manifest.__file__).parent, tmp_path / "kernels")
    spec = importlib.util.spec_from_file_location("manifest_of_a_copy", folder / "manifest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_manifest_lists_every_variant():
    expected = {
        name
        for kernel in (
            *(flash_forward, flash_forward_gpu, flash_forward_matrix, flash_backward, flash_backward_gpu),
            *(panel_copy, panel_wire, row_merge, row_merge_gpu, row_product, row_product_gpu, score_walk, value_panels),
        )
        for name, *_ in kernel.variants()
    }
    assert set(manifest.read()) == expected
    assert {path.stem for path in manifest.FOLDER.glob("*.spv")} == expected


def test_unchanged_copy(copied):
    assert copied.FOLDER != manifest.FOLDER
    assert copied.read() == manifest.read()


@pytest.mark.parametrize("source", SOURCES)
def test_changed_source(copied, source):
    with copied.FOLDER.with_name(source).open("a") as file:
        file.write("# changed\n")
    with pytest.raises(RuntimeError, match=f"^the compiled kernels are older than {source}: run `make kernels`"):
        copied.read()


def test_missing_source(copied):
    copied.FOLDER.with_name("tile.py").unlink()
    with pytest.raises(RuntimeError, match=r"^the compiled kernels are older than tile.py: run `make kernels`"):
        copied.read()


@pytest.mark.parametrize(
    "source",
    [
        "launch.py",
        "build_log.py",
        "schedules.py",
        "cpu_schedule.py",
        "launch_arguments.py",
        "relayout.py",
        "row_dot.py",
        "manifest.py",
    ],
)
def test_changed_launcher(copied, source):
    """A change of what only launches kernels does not make these stale."""
    with copied.FOLDER.with_name(source).open("a") as file:
        file.write("# changed\n")
    assert copied.read() == manifest.read()


def test_no_kernels(copied):
    shutil.rmtree(copied.FOLDER)
    with pytest.raises(RuntimeError, match=r"^no compiled kernels in .*spirv: install the package"):
        copied.read()


def test_work_group_too_large():
    """dpctl can return normally from such a launch, with the output untouched."""
    queue = default_queue()
    lanes = queue.sycl_device.max_work_group_size + 1
    with pytest.raises(RuntimeError, match=f"kernel relayout_uint32 needs work-groups of {lanes}"):
        launch(queue, "relayout_uint32", [], (), groups=1, lanes=lanes)


def test_wrong_number_of_arguments(monkeypatch):
    """A manifest that does not describe the SPIR-V is an error, not undefined behaviour."""
    name = "relayout_uint64"
    entry = manifest.read()[name]
    changed = {**manifest.read(), name: {**entry, "arguments": entry["arguments"][:-1]}}
    monkeypatch.setattr(manifest, "read", lambda: changed)
    queue = default_queue()
    with pytest.raises(RuntimeError, match=f"kernel {name} takes .* arguments, its manifest lists"):
        _kernel.__wrapped__(queue.sycl_context, queue.sycl_device, name)


def test_kernel_that_the_compiler_refuses():
    """A CPU has no matrix engine. The driver says what it lacks, which dpctl drops."""
    queue = default_queue()
    if not queue.sycl_device.is_cpu:
        pytest.skip("a device that may have what the kernel asks for")
    name, constants = "flash_forward_matrix_d64", ((flash_forward_matrix.CONSTANTS["hardware"], 1),)
    message = rf"^kernel {name} with the constants .* cannot be built for opencl:cpu (?s:.)*Symbols not found: .*matrix_mad"
    with pytest.raises(RuntimeError, match=message):
        _kernel(queue.sycl_context, queue.sycl_device, name, constants)


@pytest.mark.parametrize(
    ("name", "warns"),
    [
        *(("flash_forward_float32_any_narrow_options", True), ("row_merge_float32", True), ("row_merge_gpu_float32", False)),
        *(("flash_backward_gpu_dq_float64_d64", False), ("relayout_uint16", False), ("value_panels", False)),
    ],
)
def test_a_kernel_for_cpus_on_a_gpu(name, warns):
    spirv = (manifest.FOLDER / f"{name}.spv").read_bytes()
    warn_of_kernel_for_cpus(schedules.KINDS["cpu"], name, spirv)
    with pytest.warns(RuntimeWarning, match=f"a GPU computes with the kernel {name}, which") if warns else nullcontext():
        warn_of_kernel_for_cpus(schedules.KINDS["gpu"], name, spirv)


def test_replay():
    """A step is done once, and launched again for other arrays. Whether these share memory makes a difference."""
    rng, replay, steps = np.random.default_rng(0), Replay(), []
    host = rng.standard_normal((4, 1, 3, 2, 5), dtype=np.float32)
    arrays = [tensor.asarray(x) for x in host]

    def run(a, b):
        out = tensor.empty((1, 2, 3), dtype="float32")

        def step():
            steps.append((a, b))
            dot_rows(arrays[a], arrays[b], out)

        replay.run("dot", (arrays[a], arrays[b], out), step)
        np.testing.assert_allclose(tensor.asnumpy(out), dots_of(host[a], host[b]), rtol=1e-5, atol=1e-5)

    for pair in ((0, 1), (2, 3), (2, 2), (3, 3), (1, 2)):
        run(*pair)
    assert steps == [(0, 1), (2, 2)]


@pytest.mark.parametrize("add", [False, True])
def test_replay_of_a_step_with_memory_of_its_own(add):
    """It is done every time: that memory may be another one. A sum has a table, what the host copies has none."""
    replay, steps = Replay(), []
    for n in range(3):
        x, y = tensor.full((1, 3, 2, 4), n, dtype="float32"), tensor.zeros((1, 3, 2, 4), dtype="float32")

        def step(x=x, y=y, n=n):
            steps.append(n)
            copy_arrays([x], [y], add=add)

        replay.run("copy", (x, y), step)
        assert (tensor.asnumpy(y) == n).all()
    assert steps == ([0, 1, 2] if add else [0])


@pytest.mark.parametrize(
    ("header", "old", "new"),
    [
        ("enum_types", "DPCTL_INT8_T,", "DPCTL_BOOL,\n    DPCTL_INT8_T,"),
        ("enum_types", "DPCTL_VOID_PTR", "DPCTL_POINTER"),
        ("queue_interface", "size_t NArgs,", ""),
        ("queue_interface", "SubmitNDRange(", "Submit("),
    ],
)
def test_another_c_interface_of_dpctl(tmp_path, header, old, new):
    """It would crash, or run with the wrong arguments."""
    copied = shutil.copytree(dpctl.get_include(), tmp_path / "include")
    check_headers(copied)
    path = copied / f"syclinterface/dpctl_sycl_{header}.h"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RuntimeError, match="has another C interface"):
        check_headers(copied)


def test_a_dpctl_without_headers(tmp_path):
    check_headers(tmp_path)
