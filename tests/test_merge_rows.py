"""Join attention over different keys, by the kernels for CPUs and for GPUs: the CPU runs the SPIR-V of both."""

import numpy as np
import pytest
from ulysses_dp.kernels import row_merge, row_merge_gpu, schedules
from ulysses_dp.kernels.merge_rows import form_for, merge, reference

from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue

GPU = row_merge_gpu
HAS_SUB_GROUPS = GPU.SUB_GROUP in default_queue().sycl_device.sub_group_sizes
LIMITS = {"float32": 1e-5, "float64": 1e-12}

pytestmark = pytest.mark.single


@pytest.fixture(
    params=[row_merge, pytest.param(GPU, marks=pytest.mark.skipif(not HAS_SUB_GROUPS, reason="no sub-groups of 16"))],
    ids=["cpu", "gpu"],
)
def form(request):
    """The module of a kernel."""
    return request.param


def random_parts(batch, seq, heads, head_dim, dtype):
    """out and lse of two parts: some rows have seen no key of one or of both."""
    rng = np.random.default_rng(head_dim)
    out, part = rng.standard_normal((2, batch, seq, heads, head_dim)).astype(dtype)
    lse, part_lse = (3 * rng.standard_normal((2, batch, heads, seq))).astype(dtype)
    for x, of_x in ((out, lse), (part, part_lse)):
        of_x[rng.random(of_x.shape) < 0.2] = -np.inf
        x[np.isneginf(of_x).swapaxes(1, 2)] = 0
    return out, lse, part, part_lse


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("head_dim", [1, 5, 16, 17, 63, 64, 65, 100, 128, 200, 256])
@pytest.mark.parametrize(("batch", "seq", "heads"), [(1, 1, 1), (2, 3, 5), (1, 8, 2), (3, 7, 1), (2, 1, 11)])
def test_against_the_reference(form, dtype, head_dim, batch, seq, heads):
    """Views of arrays in any order of axes, into parts of larger arrays whose rest must stay."""
    out, lse, part, part_lse = random_parts(batch, seq, heads, head_dim, dtype)
    expected, expected_lse = reference(out, lse, part, part_lse)
    around = np.full((seq + 2, batch, heads + 1, head_dim + 3), 7, dtype)
    inside = around[1:-1, :, :-1, 2:-1]
    inside[...] = out.swapaxes(0, 1)
    around_lse = np.full((seq + 2, batch, heads + 1), 7, dtype)
    of_out, of_lse = tensor.asarray(around), tensor.asarray(around_lse)
    of_part = tensor.permute_dims(tensor.asarray(np.ascontiguousarray(part.swapaxes(1, 2))), (0, 2, 1, 3))
    by_row = tensor.permute_dims(tensor.asarray(np.ascontiguousarray(part_lse.swapaxes(1, 2))), (0, 2, 1))
    view = tensor.permute_dims(of_out[1:-1, :, :-1, 2:-1], (1, 0, 2, 3))
    merged = tensor.permute_dims(of_lse[1:-1, :, :-1], (1, 2, 0))
    merge(view, tensor.asarray(lse), of_part, by_row, merged, form=form)
    inside[...] = expected.swapaxes(0, 1)
    around_lse[1:-1, :, :-1] = expected_lse.transpose(2, 0, 1)
    np.testing.assert_allclose(tensor.asnumpy(of_out), around, rtol=0, atol=LIMITS[dtype])
    np.testing.assert_allclose(tensor.asnumpy(of_lse), around_lse, rtol=0, atol=LIMITS[dtype])


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_special_values(form, special):
    """They reach the row in which they are; a part that has seen no key changes no bit, whatever it holds."""
    parts = random_parts(1, 6, 3, 80, "float32")
    out, lse, part, part_lse = parts
    lse[...], part_lse[...] = np.abs(lse[np.isfinite(lse)].max()), 1
    part_lse[0, 1, 2] = -np.inf
    out[0, 1, 0, 70], part[0, 3, 2, 79], part[0, 2, 1] = special, special, special
    arrays = [tensor.asarray(x) for x in parts]
    merged = tensor.empty(lse.shape, dtype="float32")
    merge(*arrays, merged, form=form)
    result = tensor.asnumpy(arrays[0])
    expected, expected_lse = reference(*parts)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(tensor.asnumpy(merged), expected_lse, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(result[0, 2, 1], out[0, 2, 1])


def test_the_same_bits():
    """Of both kernels, in float32, whose exponential function is that of this package."""
    results = []
    for form in (row_merge, GPU) if HAS_SUB_GROUPS else (row_merge,) * 2:
        parts = [tensor.asarray(x) for x in random_parts(2, 9, 3, 72, "float32")]
        merged = tensor.empty(parts[1].shape, dtype="float32")
        merge(*parts, merged, form=form)
        results.append((tensor.asnumpy(parts[0]), tensor.asnumpy(merged)))
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


def test_choice():
    cpu, gpu = schedules.KINDS["cpu"], schedules.KINDS["gpu"]
    assert form_for(cpu, 5) is row_merge
    assert form_for(gpu, 5) is GPU
    assert form_for(gpu, 2**31) is row_merge
    assert form_for(schedules.KindOfDevice(True, "a GPU of wide sub-groups", (32,)), 5) is row_merge
