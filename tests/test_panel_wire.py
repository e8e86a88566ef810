"""Numbers as 8 bits with a scale: the compiled kernels against their NumPy reference, and both against what they promise."""

import numpy as np
import pytest
from checks import decode, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from ulysses_dp.kernels.panel_wire import LARGEST, SCALE_BYTES
from ulysses_dp.kernels.relayout import Panel, copy_panels, from_wire, to_wire

from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue

pytestmark = pytest.mark.single

FORMS = {"float32": 0.0, "float16": 2.0**-11, "bits": 2.0**-8}  # the error of rounding to them
GUARD = 3
GREATEST = float(np.finfo(np.float32).max)


def there_and_back(x, wire, *, rows, slots, width):
    """The bytes that a kernel makes of (rows, slots, width) numbers, and the numbers that another makes of these."""
    queue, slot = default_queue(), width + SCALE_BYTES
    source = tensor.asarray(np.ascontiguousarray(x).reshape(-1), sycl_queue=queue)
    codes = tensor.full(rows * slots * slot + GUARD, 0xAA, dtype="uint8", sycl_queue=queue)
    back = tensor.full(x.size + GUARD, 7, dtype=source.dtype, sycl_queue=queue)
    there = Panel(0, 0, slots * width, 0, width, 1, 0, 0, slots * slot, 0, slot, slots, width)
    copy_panels([source], [codes], [there], rows=rows, batch=1, wire=wire)
    here = Panel(0, 0, slots * slot, 0, slot, 1, 0, 0, slots * width, 0, width, slots, width)
    copy_panels([codes], [back], [here], rows=rows, batch=1, wire=wire)
    codes, back = tensor.asnumpy(codes), tensor.asnumpy(back)
    assert (codes[-GUARD:] == 0xAA).all()
    assert (back[-GUARD:] == 7).all()
    return codes[:-GUARD].reshape(rows, slots, slot), back[:-GUARD].reshape(x.shape)


def assert_close(result, x, wire, form):
    """Within half a step of the code, infinities and nan where they were, and nothing larger than the largest."""
    result, x = decode(result).astype(np.float64), decode(x).astype(np.float64)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(result[~finite], x[~finite])
    assert np.isfinite(result[finite]).all()
    largest = np.where(finite, abs(x), 0).max(axis=-1, keepdims=True, initial=0)
    largest = np.maximum(largest, LARGEST[wire] * 2.0**-126)  # below, numbers have fewer bits
    x, result = np.where(finite, x, 0), np.where(finite, result, 0)
    step = largest / 252 if wire == "int8" else np.maximum(abs(x) / 16, largest * 2.0**-10 / 416)
    rounding = FORMS[form] * np.maximum(abs(x), 2.0**-14)  # float16 has fewer bits below
    assert (abs(result - x) <= step * (1 + 1e-5) + rounding).all()
    assert (abs(result) <= largest).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wire", LARGEST)
@pytest.mark.parametrize("width", [1, 3, 16, 33, 64, 128])
def test_kernels_are_their_reference(wire, form, width):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((5, 3, width)) * 10.0 ** rng.integers(-5, 4, (5, 3, 1))
    x[0, 0], x[1, 1, 0], x[2, 2, -1], x[3, 0, width // 2] = 0, np.nan, np.inf, -np.inf
    x = encode(x, form)
    codes, back = there_and_back(x, wire, rows=5, slots=3, width=width)
    numbers = decode(x).astype(np.float32)
    np.testing.assert_array_equal(codes, to_wire(numbers, wire))
    np.testing.assert_array_equal(decode(back), decode(encode(from_wire(codes, wire), form)))
    assert_close(back, x, wire, form)


@pytest.mark.parametrize("wire", LARGEST)
@settings(max_examples=100)
@given(x=arrays.arrays(np.float32, st.tuples(st.just(2), st.just(2), st.integers(1, 40)), elements=st.floats(width=32)))
def test_any_numbers(wire, x):
    """Of any size: nothing overflows, and nothing that is not finite is lost."""
    codes, back = there_and_back(x, wire, rows=2, slots=2, width=x.shape[2])
    np.testing.assert_array_equal(codes, to_wire(x, wire))
    np.testing.assert_array_equal(back, from_wire(codes, wire))
    assert_close(back, x, wire, "float32")


@pytest.mark.parametrize("wire", LARGEST)
def test_the_largest_and_the_smallest_numbers(wire):
    x = np.array([[GREATEST, -GREATEST, 1.0], [1e-45, -1e-45, 0.0], [1e-38, 3e-39, 0.0], [np.inf, np.nan, 2.0]], np.float32)
    _, back = there_and_back(x[:, None], wire, rows=4, slots=1, width=3)
    back = back[:, 0]
    np.testing.assert_allclose(back[0], [GREATEST, -GREATEST, 0], rtol=1e-6, atol=GREATEST / 250)
    assert np.isfinite(back[:3]).all()
    np.testing.assert_allclose(back[3], [np.inf, np.nan, 2], rtol=1e-6)


def test_float8_is_that_of_ml_dtypes():
    """But for the codes of infinities."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    special = (codes & 0x7F) >= 0x7E
    scale = np.ones((256, 1), np.float32).view(np.uint8)
    result = from_wire(np.concatenate([codes[:, None], scale], axis=1), "float8_e4m3")[:, 0]
    np.testing.assert_array_equal(result[~special], expected[~special])


@pytest.mark.parametrize("wire", LARGEST)
def test_sums(wire):
    """What several ranks have of a head is added up in the order of the panels."""
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((2, 4, 24), dtype=np.float32)
    codes = to_wire(parts, wire)
    queue, slot = default_queue(), 24 + SCALE_BYTES
    sources = [tensor.asarray(x.reshape(-1), sycl_queue=queue) for x in codes]
    target = tensor.full(4 * 24, np.nan, dtype="float32", sycl_queue=queue)
    panels = [Panel(n, 0, slot, 0, slot, 1, 0, 0, 24, 0, 24, 1, 24, add=n) for n in range(2)]
    copy_panels(sources, [target], panels, rows=4, batch=1, wire=wire)
    expected = from_wire(codes, wire)
    np.testing.assert_array_equal(tensor.asnumpy(target).reshape(4, 24), expected[0] + expected[1])
