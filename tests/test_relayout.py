"""The compiled relayout kernel, and the copy of the host that may take its place, against a reference, bit by bit."""

import numpy as np
import pytest
from helpers import numbered
from hypothesis import given, settings
from hypothesis import strategies as st
from ulysses_dp.kernels import relayout
from ulysses_dp.kernels.relayout import MAX_SOURCES, MAX_TARGETS, Panel, Relayout, reference

from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue

pytestmark = pytest.mark.single

BITS = {"float32": np.uint32, "float64": np.uint64}
GUARD = 3  # elements around and between what is written


def random_bits(size, dtype):
    """Floating-point numbers of all bit patterns, nan of every payload among them."""
    return np.frombuffer(np.random.default_rng(size).bytes(size * np.dtype(dtype).itemsize), dtype).copy()


def run(sources, targets, panels, **sizes):
    """The targets after the kernel, which are those after what is done for so few numbers, and after the reference."""
    expected = [x.copy() for x in targets]
    reference(sources, expected, panels, **sizes)
    queue = default_queue()
    sources = [tensor.asarray(x, sycl_queue=queue) for x in sources]
    results = []
    for limit in (0, relayout.HOST_BYTES):
        results.append([tensor.asarray(x, sycl_queue=queue) for x in targets])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(relayout, "HOST_BYTES", limit)
            copy = Relayout(queue, sources[0].dtype, targets[0].dtype, tuple(panels), **sizes)
        copy.run(sources, results[-1])
    by_kernel, as_always = ([tensor.asnumpy(x) for x in arrays] for arrays in results)
    for x, y in zip(by_kernel, as_always, strict=True):
        np.testing.assert_array_equal(x.view("u1"), y.view("u1"))
    return by_kernel, expected


def nested_strides(extents, order, gap):
    """Strides of axes that are nested in this order, innermost last, and the elements that they span."""
    strides, stride = [0] * len(extents), 1
    for axis in reversed(order):
        strides[axis] = stride
        stride *= extents[axis] + gap
    return strides, stride


@st.composite
def launches(draw):
    """Panels of one launch: sources with any strides, targets that do not overlap and leave gaps."""
    rows, batch, gap = draw(st.integers(0, 4)), draw(st.integers(0, 3)), draw(st.integers(0, 2))
    source_count, target_count = draw(st.integers(1, MAX_SOURCES)), draw(st.integers(1, MAX_TARGETS))
    source_sizes, target_sizes = [1] * source_count, [GUARD] * target_count
    panels = []
    for _ in range(draw(st.integers(0, 5))):
        source, target = draw(st.integers(0, source_count - 1)), draw(st.integers(0, target_count - 1))
        extents = rows, batch, draw(st.integers(0, 3)), draw(st.integers(0, 19))
        strides, span = nested_strides(extents, draw(st.permutations(range(4))), gap)
        offset = source_sizes[source]
        source_sizes[source] += span
        for axis in range(4):
            if draw(st.booleans()) and extents[axis]:
                offset, strides[axis] = offset + (extents[axis] - 1) * strides[axis], -strides[axis]
        target_strides, target_span = nested_strides(extents, (*draw(st.permutations(range(3))), 3), gap)
        panels.append(Panel(source, offset, *strides, target, target_sizes[target], *target_strides[:3], *extents[2:]))
        target_sizes[target] += target_span + GUARD
    return source_sizes, target_sizes, panels, {"rows": rows, "batch": batch}


@pytest.mark.parametrize("dtype", BITS)
@settings(max_examples=200)
@given(launch=launches())
def test_any_panels(dtype, launch):
    source_sizes, target_sizes, panels, sizes = launch
    sources, targets = ([random_bits(n, dtype) for n in numbers] for numbers in (source_sizes, target_sizes))
    for result, expected in zip(*run(sources, targets, panels, **sizes), strict=True):
        np.testing.assert_array_equal(result.view(BITS[dtype]), expected.view(BITS[dtype]))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 257])
@pytest.mark.parametrize("merged", [False, True], ids=["slots apart", "slots together"])
def test_heads_to_ranks(width, merged):
    """(batch, rows, heads, width) to one block (rows, batch, its heads, width) for each of two ranks."""
    x = numbered((2, 5, 4, width))
    source = x if merged else np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    batch_stride, row_stride, slot_stride, _ = (stride // x.itemsize for stride in source.strides)
    block = 5 * 2 * 2 * width
    panels = []
    for rank in range(2):
        in_source = rank * 2 * slot_stride, row_stride, batch_stride, slot_stride, 1
        in_target = rank * block, 2 * 2 * width, 2 * width, width
        panels.append(Panel(0, *in_source, 0, *in_target, slots=2, width=width))
    flat = (source if merged else source.swapaxes(1, 2)).reshape(-1)
    (result,), (by_reference,) = run([flat], [np.full(2 * block, np.nan, np.float32)], panels, rows=5, batch=2)
    expected = [x[:, :, 2 * rank : 2 * rank + 2].swapaxes(0, 1).reshape(-1) for rank in range(2)]
    np.testing.assert_array_equal(result, np.concatenate(expected))
    np.testing.assert_array_equal(by_reference, np.concatenate(expected))


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("width", [1, 4, 8, 12, 16, 24, 40, 64])
def test_sums_over_ranks(dtype, width):
    """Heads 0 and 1 of one rank, which follow each other, then 1 and 2 of the next: head 1 is the sum of both."""
    rng = np.random.default_rng(width)
    sources = [rng.standard_normal(5 * 2 * 2 * width).astype(dtype) for _ in range(2)]
    row, batch, slot = 3 * 2 * width, 3 * width, width
    of_source = 2 * 2 * width, 2 * width, width
    panels = [
        Panel(0, 0, *of_source, 1, 0, 0, row, batch, slot, slots=2, width=width),
        Panel(1, 0, *of_source, 1, 0, slot, row, batch, slot, slots=1, width=width, add=1),
        Panel(1, width, *of_source, 1, 0, 2 * slot, row, batch, slot, slots=1, width=width),
    ]
    for _ in range(5):
        (result,), (expected,) = run(sources, [np.full(5 * row, np.nan, dtype)], panels, rows=5, batch=2)
        np.testing.assert_array_equal(result, expected)
