"""Dot products of rows, by the kernels for CPUs and for GPUs: the CPU runs the SPIR-V of both."""

import numpy as np
import pytest
from ulysses_dp.kernels import row_product, row_product_gpu, schedules
from ulysses_dp.kernels.row_dot import dot_rows, form_for, reference

from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue

GPU = row_product_gpu
HAS_SUB_GROUPS = GPU.SUB_GROUP in default_queue().sycl_device.sub_group_sizes

pytestmark = pytest.mark.single


@pytest.fixture(
    params=[row_product, pytest.param(GPU, marks=pytest.mark.skipif(not HAS_SUB_GROUPS, reason="no sub-groups of 16"))],
    ids=["cpu", "gpu"],
)
def form(request):
    """The module of a kernel."""
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("head_dim", [1, 5, 16, 17, 63, 64, 65, 100, 128, 200, 256])
@pytest.mark.parametrize(("batch", "seq", "heads"), [(1, 1, 1), (2, 3, 5), (1, 8, 2), (3, 7, 1), (2, 1, 11)])
def test_against_the_reference(form, dtype, head_dim, batch, seq, heads):
    """Views of arrays in any order of axes, into a part of a larger array whose rest must stay."""
    rng = np.random.default_rng(head_dim)
    x, y = rng.standard_normal((2, batch, seq, heads, head_dim)).astype(dtype)
    around = np.full((seq + 2, batch, heads + 1), 7, dtype)
    by_head = tensor.asarray(np.ascontiguousarray(x.swapaxes(1, 2)))
    padded = tensor.asarray(np.pad(y, ((0, 0), (1, 0), (0, 1), (2, 1)), constant_values=np.nan))
    target = tensor.asarray(around)
    out = tensor.permute_dims(target[1:-1, :, :-1], (1, 2, 0))
    dot_rows(tensor.permute_dims(by_head, (0, 2, 1, 3)), padded[:, 1:, :-1, 2:-1], out, form=form)
    around[1:-1, :, :-1] = reference(x, y).transpose(2, 0, 1)
    np.testing.assert_allclose(tensor.asnumpy(target), around, rtol=0, atol={"float32": 1e-4, "float64": 1e-12}[dtype])


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_special_values(form, special):
    """They reach the row in which they are, but not past a number of y that is 0."""
    x, y = np.random.default_rng(0).standard_normal((2, 2, 6, 3, 80)).astype("float32")
    x[0, 2, 1, 70], x[1, 4, 2, 3], y[1, 5, 0, 79] = special, special, special
    y[0, 2, 1] = 0
    out = tensor.empty((2, 3, 6), dtype="float32")
    dot_rows(tensor.asarray(x), tensor.asarray(y), out, form=form)
    np.testing.assert_allclose(tensor.asnumpy(out), reference(x, y), rtol=0, atol=1e-4)
    assert tensor.asnumpy(out)[0, 1, 2] == 0


def test_choice():
    cpu, gpu = schedules.KINDS["cpu"], schedules.KINDS["gpu"]
    assert form_for(cpu, 5) is row_product
    assert form_for(gpu, 5) is GPU
    assert form_for(gpu, GPU.MAX_ROWS + 1) is row_product
    assert form_for(schedules.KindOfDevice(True, "a GPU of wide sub-groups", (32,)), 5) is row_product
