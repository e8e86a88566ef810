"""`merge_attention` against attention over all keys at once."""

import re
from types import SimpleNamespace

import dpnp
import numpy as np
import oracle
import pytest
from gradients import central_difference, dense_gradient
from helpers import KINDS, as_kind, as_numpy, as_view, assert_like, new_queue, random_qkv

from ulysses_dp import attention, attention_backward, merge_attention, merge_attention_backward
from ulysses_dp._call import checks

pytestmark = pytest.mark.single

DTYPES = ("float32", "float64", "float16")
TOLERANCE = {**oracle.TOLERANCE, "float16": 2e-3, "bfloat16": 2e-2}


def lse_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


def random_part(seed, shape=(2, 5, 3, 4), dtype="float32"):
    """Any out and lse of a part."""
    rng = np.random.default_rng(seed)
    *batch, rows, heads, _ = shape
    return rng.standard_normal(shape).astype(dtype), rng.normal(0, 3, (*batch, heads, rows)).astype(lse_dtype(dtype))


def expected(*parts):
    """The definition: the numerators and the denominators of all parts added, in float64."""
    lse = np.stack([lse.astype(np.float64) for _, lse in parts])
    out = np.stack([out.astype(np.float64) for out, _ in parts])
    denominators = np.exp(lse - lse.max(axis=0))
    shares = np.swapaxes(denominators / denominators.sum(axis=0), -1, -2)[..., None]
    return (shares * out).sum(axis=0), lse.max(axis=0) + np.log(denominators.sum(axis=0))


def assert_merged(results, wanted, dtype="float32"):
    for result, expected_result, name in zip(results, wanted, (dtype, lse_dtype(dtype)), strict=True):
        np.testing.assert_allclose(np.asarray(result, np.float64), expected_result, rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [0, 1, 8, 17])
def test_split_keys(dtype, cut):
    """Down to parts that see no key at all."""
    q, k, v = random_qkv(0, 2, 9, 4, 2, 16, dtype, 17)
    parts = [oracle.dense_attention(q, k[:, part], v[:, part]) for part in (slice(0, cut), slice(cut, 17))]
    parts = [(out.astype(dtype), lse.astype(lse_dtype(dtype))) for out, lse in parts]
    out, lse = merge_attention(*parts[0], *parts[1])
    assert_like(out, parts[0][0], q.shape)
    assert_like(lse, parts[0][1], (2, 4, 9))
    assert_merged((out, lse), oracle.dense_attention(q, k, v), dtype)


def test_after_attention():
    q, k, v = random_qkv(1, 1, 33, 4, 4, 32)
    merged = attention(q, k[:, :0], v[:, :0], return_lse=True)
    for first in range(0, 33, 8):
        part = slice(first, first + 8)
        merged = merge_attention(*merged, *attention(q, k[:, part], v[:, part], return_lse=True))
    assert_merged(merged, oracle.dense_attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_does_not_matter(dtype):
    a, b, c = (random_part(seed, dtype=dtype) for seed in range(3))
    wanted = expected(a, b, c)
    left = merge_attention(*merge_attention(*a, *b), *c)
    right = merge_attention(*a, *merge_attention(*b, *c))
    assert_merged(left, wanted, dtype)
    assert_merged(right, wanted, dtype)
    for result, other in zip(merge_attention(*a, *b), merge_attention(*b, *a), strict=True):
        np.testing.assert_array_equal(result, other)


@pytest.mark.parametrize("dtype", [*DTYPES, "bits"])
@pytest.mark.parametrize("count", [1, 3, 30])
def test_any_number_of_parts(dtype, count):
    """Bits of bfloat16 and float16 are rounded once."""
    parts = [random_part(seed, dtype="float32" if dtype == "bits" else dtype) for seed in range(count)]
    wanted = expected(*parts)
    if dtype == "bits":
        bits = [(oracle.to_bfloat16(out), lse) for out, lse in parts]
        out, lse = merge_attention(*(x for part in bits for x in part), dtype="bfloat16")
        wanted = expected(*((oracle.from_bfloat16(out), lse) for out, lse in bits))
        assert_merged((oracle.from_bfloat16(out), lse), wanted, "bfloat16")
    else:
        assert_merged(merge_attention(*(x for part in parts for x in part)), wanted, dtype)


@pytest.mark.parametrize("kind", [*KINDS, "torch", "array_api_strict"])
def test_in_place(kind):
    """A running result of float32 that parts of 16 bits are merged into."""
    half = "float16" if kind in ("numpy", "torch") else "float32"
    parts = [random_part(seed, dtype=half) for seed in range(4)]
    given = [tuple(as_kind(x, kind) for x in part) for part in parts]
    running = tuple(as_kind(x.astype("float32"), kind) for x in parts[0])
    for part in given[1:]:
        results = merge_attention(*running, *part, out=running)
        assert all(x is y for x, y in zip(results, running, strict=True))
    assert_merged(map(as_numpy, running), expected(*parts))
    for part, unchanged in zip(given, parts, strict=True):
        for x, y in zip(part, unchanged, strict=True):
            np.testing.assert_array_equal(as_numpy(x), y)


def test_results_in_views_and_in_16_bits():
    parts = [random_part(seed) for seed in range(3)]
    padded = np.full((2, 5, 3, 9), np.nan, "float16")
    lse = np.full((2, 5, 3), np.nan, "float32").swapaxes(1, 2)
    merge_attention(*(x for part in parts for x in part), out=(padded[..., 1::2], lse))
    assert_merged((padded[..., 1::2], lse), expected(*parts), "float16")
    assert np.isnan(padded[..., ::2]).all()


@pytest.mark.parametrize(
    ("out", "error", "pattern"),
    [
        (np.ones((2, 5, 3, 4), "f4"), TypeError, "out must be a tuple of two arrays"),
        ((np.ones((2, 5, 3, 4), "f4"), None), TypeError, r"out\[1\] must be an array"),
        ((np.ones((2, 5, 3, 3), "f4"), np.ones((2, 3, 5), "f4")), ValueError, r"out\[0\] must have the shape \(2, 5, 3, 4\)"),
        ((np.ones((2, 5, 3, 4), "f8"), np.ones((2, 3, 5), "f4")), TypeError, r"out\[0\] must have the dtype float32 or"),
        ((np.ones((2, 5, 3, 4), "f4"), np.ones((2, 3, 5), "f8")), TypeError, r"out\[1\] must have the dtype float32"),
    ],
    ids=["one", "none", "shape", "out", "lse"],
)
def test_bad_out(out, error, pattern):
    with pytest.raises(error, match=pattern):
        merge_attention(*arguments().values(), out=out)


@pytest.mark.parametrize(("shape", "with_lse"), [((2, 3, 2, 3), True), ((4, 2, 3), False)])
def test_gradient_by_finite_differences(shape, with_lse):
    """By every third number of three parts, of which one has not seen a key in some rows."""
    parts = [random_part(seed, shape, "float64") for seed in range(3)]
    parts[1][1][..., 0], parts[1][0][..., 0, :, :] = -np.inf, np.nan
    arrays = [x for part in parts for x in part]
    dout, dlse = random_part(9, shape, "float64")

    def loss(*arrays):
        out, lse = merge_attention(*arrays)
        return (out * dout).sum() + (lse * dlse).sum() * with_lse

    gradients = merge_attention_backward(dout, dlse if with_lse else None, *arrays)
    for number, (x, gradient) in enumerate(zip(arrays, gradients, strict=True)):
        assert_like(gradient, x, x.shape)
        unseen = np.isneginf(parts[number // 2][1])
        unseen = unseen if number % 2 else np.broadcast_to(unseen.swapaxes(-1, -2)[..., None], x.shape)
        assert (gradient[unseen] == 0).all()
        for index in list(zip(*np.nonzero(~unseen), strict=True))[number % 3 :: 3]:
            np.testing.assert_allclose(gradient[index], central_difference(loss, arrays, number, index), rtol=0, atol=1e-8)


def test_gradient_through_parts_against_dense():
    """The gradient of attention by parts is that of attention over all keys."""
    q, k, v = random_qkv(3, 2, 7, 4, 2, 8, "float64", 11)
    dout = np.random.default_rng(4).standard_normal(q.shape)
    cuts = [slice(0, 2), slice(2, 3), slice(3, 11)]
    parts = [attention(q, k[:, cut], v[:, cut], return_lse=True) for cut in cuts]
    gradients = iter(merge_attention_backward(dout, None, *(x for part in parts for x in part)))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for cut, (out, lse), dout_i, dlse_i in zip(cuts, parts, gradients, gradients, strict=True):
        # the backward pass takes dout · out of an out, from which what comes through lse is to be subtracted
        moved = out - dlse_i.swapaxes(1, 2)[..., None] * dout_i / (dout_i**2).sum(axis=-1, keepdims=True)
        of_q, dk[:, cut], dv[:, cut] = attention_backward(dout_i, q, k[:, cut], v[:, cut], moved, lse)
        dq += of_q
    for x, wanted in zip((dq, dk, dv), dense_gradient(dout, q, k, v), strict=False):
        np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["float16", "bits", "mixed"])
def test_gradient_of_16_bits(form):
    parts = [random_part(seed, dtype="float16" if form != "bits" else "float32") for seed in range(2)]
    if form == "mixed":
        parts[0] = parts[0][0].astype("float32"), parts[0][1]
    if form == "bits":
        parts = [(oracle.to_bfloat16(out), lse) for out, lse in parts]
    dout, dlse = random_part(5)
    arrays = [x for part in parts for x in part]
    given = merge_attention_backward(dout, dlse, *arrays, dtype="bfloat16" if form == "bits" else None)
    wide = [x.astype("float64") if form != "bits" or n % 2 else oracle.from_bfloat16(x) for n, x in enumerate(arrays)]
    wanted = merge_attention_backward(dout.astype("f8"), dlse.astype("f8"), *(x.astype("f8") for x in wide))
    for x, gradient, y in zip(arrays, given, wanted, strict=True):
        assert_like(gradient, x, x.shape)
        gradient = oracle.from_bfloat16(gradient) if gradient.dtype == np.uint16 else gradient
        np.testing.assert_allclose(gradient.astype("f8"), y, rtol=0, atol=TOLERANCE["bfloat16"] * np.abs(y).max())


@pytest.mark.parametrize("shape", [(7, 3, 4), (0, 3, 4), (7, 0, 4), (7, 3, 0), (0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4)])
def test_packed_and_empty(shape):
    a, b = random_part(0, shape), random_part(1, shape)
    out, lse = merge_attention(*a, *b)
    assert_like(out, a[0], shape)
    assert_like(lse, a[1], a[1].shape)
    assert_merged((out, lse), expected(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys(dtype):
    """What out holds there is not read, and a part without keys changes no bit."""
    a, b = random_part(0, dtype=dtype), random_part(1, dtype=dtype)
    a[0][0, :, 0], a[1][0, 0] = np.nan, -np.inf
    b[0][0, 2, 0], b[1][0, 0, 2] = np.inf, -np.inf
    b[0][1], b[1][1] = 0, -np.inf
    for out, lse in (merge_attention(*a, *b), merge_attention(*b, *a)):
        assert (out[0, 2, 0] == 0).all()
        assert lse[0, 0, 2] == -np.inf
        seen = [0, 1, 3, 4]
        np.testing.assert_array_equal(out[0, seen, 0], b[0][0, seen, 0])
        np.testing.assert_array_equal(lse[0, 0, seen], b[1][0, 0, seen])
        np.testing.assert_array_equal(out[1], a[0][1])
        np.testing.assert_array_equal(lse[1], a[1][1])


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_nan_and_inf_reach_their_row_only(special):
    a, b = random_part(0), random_part(1)
    finite = merge_attention(*a, *b)
    a[0][0, 0, 0, 1] = a[1][0, 1, 2] = special
    b[1][0, 1, 3], a[1][0, 1, 3] = special, -np.inf
    for out, lse in (merge_attention(*a, *b), merge_attention(*b, *a)):
        np.testing.assert_array_equal(out[0, 0, 0, 1], special)
        assert np.isnan(out[0, 2:4, 1]).all()
        np.testing.assert_array_equal(lse[0, 1, 2:4], special)
        # everything else is as it was
        out[0, 0, 0, 1], out[0, 2:4, 1] = finite[0][0, 0, 0, 1], finite[0][0, 2:4, 1]
        lse[0, 1, 2:4] = finite[1][0, 1, 2:4]
        np.testing.assert_array_equal(out, finite[0])
        np.testing.assert_array_equal(lse, finite[1])


@pytest.mark.parametrize("offset", [-1e30, -1e4, 1e4, 1e30, 3e38])
def test_large_lse(offset):
    """The weights come from the difference of the two, which is exact here; nothing overflows."""
    a, b = random_part(0), random_part(1)
    lse_a = np.full_like(a[1], offset)
    lse_b = np.nextafter(lse_a, np.float32(0)) if abs(offset) < 1e5 else lse_a
    wanted = expected((a[0], lse_a), (b[0], lse_b))
    out, lse = merge_attention(a[0], lse_a, b[0], lse_b)
    np.testing.assert_allclose(out, wanted[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(lse, wanted[1], rtol=1e-6)


def test_weights_far_apart():
    a, b = random_part(0), random_part(1)
    out, lse = merge_attention(a[0], a[1] + np.float32(1e30), b[0], b[1] - np.float32(1e30))
    np.testing.assert_array_equal(out, a[0])
    np.testing.assert_array_equal(lse, a[1] + np.float32(1e30))


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_numbers(dtype):
    a = random_part(0, dtype=dtype)
    a[0][...] = np.finfo(dtype).max
    np.testing.assert_array_equal(merge_attention(*a, *a)[0], a[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["swapped", "padded", "reversed", "strided"])
def test_layouts(kind, layout):
    a, b = random_part(0), random_part(1)
    views = [as_view(out, kind, layout) for out, _ in (a, b)]
    lses = [as_kind(np.repeat(lse, 2, axis=1), kind)[:, ::2, :] for _, lse in (a, b)]
    before = [as_numpy(x).copy() for x in (*views, *lses)]
    out, lse = merge_attention(views[0], lses[0], views[1], lses[1])
    assert_like(out, views[0], a[0].shape)
    assert_like(lse, lses[0], a[1].shape)
    assert_merged((as_numpy(out), as_numpy(lse)), expected(a, b))
    for x, unchanged in zip((*views, *lses), before, strict=True):
        np.testing.assert_array_equal(as_numpy(x), unchanged)


@pytest.mark.parametrize("kind", ["dpnp", "usm"])
def test_on_a_queue_of_the_user(kind):
    queue, parts = new_queue(), (random_part(0), random_part(1))
    arrays = [as_kind(x, kind, queue) for part in parts for x in part]
    out, lse = merge_attention(*arrays)
    assert_like(out, arrays[0], (2, 5, 3, 4))
    assert_like(lse, arrays[1], (2, 3, 5))
    assert_merged((as_numpy(out), as_numpy(lse)), expected(*parts))


def as_bfloat16_bits(x):
    """Rounded to the nearest, ties to even, from the definition: the closer one of the two neighbours."""
    down = x.view(np.uint32) >> 16
    below, above = ((bits << 16).astype(np.uint32).view(np.float32).astype(np.float64) for bits in (down, down + 1))
    low, high = np.abs(x - below), np.abs(above - x)
    return (down + ((high < low) | ((high == low) & (down % 2 == 1)))).astype(np.uint16)


def test_bfloat16_is_rounded_once():
    """The same as merging in float32 and rounding."""
    bits = [as_bfloat16_bits(random_part(seed, (2, 50, 3, 16))[0]) for seed in range(2)]
    lses = [random_part(seed, (2, 50, 3, 16))[1] for seed in range(2)]
    lses[1][0] = lses[0][0]  # weights of 1/2 make ties
    floats = [(x.astype(np.uint32) << 16).view(np.float32) for x in bits]
    out, lse = merge_attention(bits[0], lses[0], bits[1], lses[1], dtype="bfloat16")
    wanted, wanted_lse = merge_attention(floats[0], lses[0], floats[1], lses[1])
    np.testing.assert_array_equal(out, as_bfloat16_bits(wanted))
    np.testing.assert_array_equal(lse, wanted_lse)
    assert (wanted.view(np.uint32) % 2**16 == 2**15).any()  # there are ties


def test_special_bfloat16():
    """nan stays nan, however few bits of it are set; inf, the largest numbers, subnormals and -0 stay what they are."""
    values = np.array([0x7F81, 0xFFFF, 0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0x0000, 0x8000, 0x0080, 0x3F80], np.uint16)
    x, lse = values.reshape(1, 1, -1), np.zeros((1, 1), np.float32)
    out = merge_attention(x, lse, x, lse - np.inf, dtype="bfloat16")[0].ravel()
    is_nan = (out & 0x7FFF) > 0x7F80
    np.testing.assert_array_equal(is_nan, [True, True] + 8 * [False])
    np.testing.assert_array_equal((out & 0x7FFF)[2:], (values & 0x7FFF)[2:])
    np.testing.assert_array_equal(out[2:6], values[2:6])


@pytest.mark.parametrize("library", ["torch", "ml_dtypes"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_arrays_of_bfloat16(library, dtype):
    module = pytest.importorskip(library)
    parts = random_part(0), random_part(1)
    if library == "torch":
        arrays = [module.tensor(x).to(module.bfloat16 if x.ndim == 4 else module.float32) for part in parts for x in part]
    else:
        arrays = [x.astype(module.bfloat16) if x.ndim == 4 else x for part in parts for x in part]
    out, lse = merge_attention(*arrays, dtype=dtype)
    assert_like(out, arrays[0], (2, 5, 3, 4))
    assert_like(lse, arrays[1], (2, 3, 5))
    results = (as_numpy(out).astype(np.float32), as_numpy(lse))
    assert_merged(results, expected(*parts), "bfloat16")


def arguments(*shape, dtype="float32", **changed):
    a, b = (random_part(seed, shape or (2, 5, 3, 4), dtype) for seed in range(2))
    return dict(zip(("out_a", "lse_a", "out_b", "lse_b"), (*a, *b), strict=True)) | changed


BAD = [
    (lambda: arguments(out_a=None), TypeError, "out_a must be an array .* not builtins.NoneType"),
    (lambda: arguments(lse_b=[0.0]), TypeError, "lse_b must be an array .* not builtins.list"),
    (lambda: arguments(out_b=as_kind(np.ones((2, 5, 3, 4), "f4"), "dpnp")), TypeError, "out_b must be of the kind of out_a"),
    (lambda: arguments(out_a=np.ones((5, 4), "f4")), ValueError, r"out_a must have the axes .* not shape \(5, 4\)"),
    (lambda: arguments(out_b=np.ones((2, 4, 3, 4), "f4")), ValueError, r"out_b must have the shape \(2, 5, 3, 4\)"),
    (
        lambda: arguments(lse_a=np.ones((2, 5, 3), "f4")),
        ValueError,
        r"lse_a must have the shape \(2, 3, 5\) .* not \(2, 5, 3\)",
    ),
    (lambda: arguments(lse_b=np.ones((2, 3, 5, 1), "f4")), ValueError, r"lse_b must have the shape \(2, 3, 5\)"),
    (lambda: arguments(5, 3, 4, lse_b=np.ones((1, 3, 5), "f4")), ValueError, r"lse_b must have the shape \(3, 5\)"),
    (lambda: arguments(dtype=">f4"), TypeError, "out_a has dtype >f4; supported are float32, float64, .* native byte order"),
    (lambda: arguments(out_a=np.ones((2, 5, 3, 4), int)), TypeError, "out_a has dtype int64"),
    (lambda: arguments(out_b=np.ones((2, 5, 3, 4), "f8")), TypeError, "out_b must have the dtype float32 or .* not float64"),
    (lambda: arguments(out_c=np.ones((2, 5, 3, 4), "f4")), ValueError, "every out must be followed by its lse"),
    (
        lambda: arguments(out_c=np.ones((2, 5, 3, 4), "f4"), lse_c=np.ones((2, 3, 4), "f4")),
        ValueError,
        r"lse_c must have the shape \(2, 3, 5\)",
    ),
    (lambda: arguments(dtype="float16", lse_a=np.ones((2, 3, 5), "f2")), TypeError, "lse_a must have the dtype float32"),
    (lambda: arguments(dtype="float64", lse_b=np.ones((2, 3, 5), "f4")), TypeError, "lse_b must have the dtype float64"),
]


@pytest.mark.parametrize(("make", "error", "pattern"), BAD, ids=[pattern for *_, pattern in BAD])
def test_bad_arguments(make, error, pattern):
    with pytest.raises(error, match=pattern):
        merge_attention(*make().values())


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [
        ("float16", ValueError, "dtype must be None or 'bfloat16', not 'float16'"),
        (np.float32, TypeError, "dtype must be None or 'bfloat16', not <class 'numpy.float32'>"),
        (np.ones(2), TypeError, "dtype must be None or 'bfloat16', not array([1., 1.])"),
        ("bfloat16", TypeError, "dtype is 'bfloat16', but out_a has dtype float32; expected uint16 or bfloat16"),
    ],
    ids=["float16", "type", "array", "bfloat16"],
)
def test_bad_dtype(dtype, error, message):
    with pytest.raises(error, match=re.escape(message)):
        merge_attention(*arguments().values(), dtype=dtype)


def test_devices_without_a_dtype(monkeypatch):
    """float16 is storage: it is merged in float32 on any device."""
    device = SimpleNamespace(name="small", has_aspect_fp64=False, has_aspect_fp16=False)
    monkeypatch.setattr(checks, "device_of", lambda x: device)
    with pytest.raises(TypeError, match="float64 is not supported by the device small"):
        merge_attention(*arguments(dtype="float64").values())
    for dtype in ("float16", "float32"):
        merge_attention(*arguments(dtype=dtype).values())


def test_queues():
    values = [as_kind(x, "dpnp") for x in arguments().values()]
    values[3] = as_kind(arguments()["lse_b"], "dpnp", new_queue())
    with pytest.raises(ValueError, match=r"out_a, lse_a, out_b and lse_b must be on one queue, not out_a: .*, lse_b: "):
        merge_attention(*values)


@pytest.mark.parametrize("kind", ["dpnp", "usm"])
def test_views_that_run_backwards(kind):
    """Of memory that holds nan everywhere else."""
    rng = np.random.default_rng(12)
    outs = rng.standard_normal((2, 1, 5, 1, 3)).astype(np.float32)
    lses = rng.standard_normal((2, 1, 1, 5)).astype(np.float32)
    lses[0, ..., 1] = lses[1, ..., 2] = -np.inf
    whole = np.full((2, 1, 1, 15), np.nan, np.float32)
    whole[..., 9:4:-1] = lses
    memory = dpnp.asarray(whole)
    backwards = memory[..., 9:4:-1]
    parts = []
    for out, lse in zip(outs, backwards, strict=True):
        parts += [dpnp.asarray(out), lse] if kind == "dpnp" else [dpnp.asarray(out).get_array(), lse.get_array()]
    straight = [x for pair in zip(outs, lses, strict=True) for x in pair]
    for x, expected in zip(merge_attention(*parts), merge_attention(*straight), strict=True):
        np.testing.assert_array_equal(as_numpy(x), expected)
    for x, expected in zip(
        merge_attention_backward(parts[0], parts[1], *parts), merge_attention_backward(*straight[:2], *straight), strict=True
    ):
        np.testing.assert_array_equal(as_numpy(x), expected)
