"""Arrays of every kind: the same numbers, and results of the kind, dtype, shape and place of what came in."""

import subprocess
import sys
from functools import partial

import numpy as np
import oracle
import pytest
from helpers import KINDS, as_kind, as_numpy, assert_like, numbered, outcomes, part, random_qkv, split
from oracle import TOLERANCE

from ulysses_dp import (
    UlyssesAttention,
    all_to_all_4d,
    attention,
    gather_heads,
    merge_attention,
    scatter_heads,
    ulysses_attention,
    ulysses_flash_attn_func,
)
from ulysses_dp._device.arrays import LIBRARIES, describe, dtype_of, library_of
from ulysses_dp._device.arrays import tensor as usm

ALL_KINDS = (*KINDS, "torch", "array_api_strict")
DTYPES = ("float32", "float64")
BHSD = (0, 2, 1, 3)


@pytest.fixture(params=ALL_KINDS)
def kind(request):
    """One kind after the other, as far as they are installed."""
    if request.param not in KINDS:
        pytest.importorskip(request.param)
    return request.param


def mine(comm, whole, kind):
    """The rows of this rank, and how many rows every rank has."""
    rows = split(whole[0].shape[1], comm.size, "uneven")
    return [as_kind(np.ascontiguousarray(part(x, rows, comm.rank)), kind) for x in whole], rows


def permute(x, axes):
    """A view of an array of any kind with its axes in another order."""
    if hasattr(x, "permute"):
        return x.permute(axes)
    if isinstance(x, usm.usm_ndarray):
        return usm.permute_dims(x, axes)
    return x.transpose(axes) if hasattr(x, "transpose") else x.__array_namespace__().permute_dims(x, axes)


def assert_close(result, expected):
    np.testing.assert_allclose(as_numpy(result), expected, rtol=0, atol=TOLERANCE[dtype_of(result)])


def test_all_kinds_are_tested():
    assert len(ALL_KINDS) == len(LIBRARIES)


@pytest.mark.single
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(kind, dtype):
    whole = random_qkv(0, 2, 13, 4, 2, 16, dtype, 17)
    q, k, v = (as_kind(x, kind) for x in whole)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    for result, expected in zip((out, lse), oracle.dense_attention(*whole, causal=True), strict=True):
        assert_like(result, q, expected.shape)
        assert_close(result, expected)
    np.testing.assert_array_equal(as_numpy(attention(q, k, v, causal=True)), as_numpy(out))
    for x, unchanged in zip((q, k, v), whole, strict=True):
        np.testing.assert_array_equal(as_numpy(x), unchanged)


@pytest.mark.single
def test_options_of_batches(kind):
    """A bias is cut by batches where these have ranges of keys of their own."""
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(0, 3, 9, 2, 2, 8)
    bias, ranges = rng.standard_normal((3, 2, 9, 9)).astype(np.float32), rng.integers(0, 10, (3, 9, 2))
    out = attention(*(as_kind(x, kind) for x in (q, k, v)), bias=as_kind(bias, kind), key_ranges=ranges)
    assert_close(out, oracle.dense_attention(q, k, v, bias=bias, key_ranges=ranges)[0])


@pytest.mark.single
def test_strided_arrays(kind):
    whole = random_qkv(1, 2, 11, 4, 4, 16)
    swapped = [permute(as_kind(np.ascontiguousarray(x.transpose(BHSD)), kind), BHSD) for x in whole]
    assert [tuple(x.shape) for x in swapped] == [x.shape for x in whole]
    assert_close(attention(*swapped), oracle.dense_attention(*whole)[0])
    every_other = [as_kind(np.repeat(x, 2, axis=1), kind)[:, ::2, ...] for x in whole]
    assert_close(attention(*every_other), oracle.dense_attention(*whole)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [ulysses_attention, ulysses_flash_attn_func])
def test_distributed_attention(comm, kind, dtype, function):
    whole = random_qkv(2, 2, 21, 6, 3, 16, dtype)
    (q, k, v), rows = mine(comm, whole, kind)
    wish = {"return_lse" if function is ulysses_attention else "return_attn_probs": True}
    out, lse, *_ = function(q, k, v, causal=True, **wish)
    expected_out, expected_lse = oracle.dense_attention(*whole, causal=True)
    assert_like(out, q, q.shape)
    assert_close(out, part(expected_out, rows, comm.rank))
    assert_like(lse, q, (2, 6, rows[comm.rank]))
    assert_close(lse, part(expected_lse, rows, comm.rank, axis=2))


def test_layer_of_another_layout(comm, kind):
    whole = random_qkv(3, 2, 18, 4, 2, 16)
    (q, k, v), rows = mine(comm, whole, kind)
    out = UlyssesAttention(comm, 1, 2)(*(permute(x, BHSD) for x in (q, k, v)))
    assert_like(out, q, (2, 4, rows[comm.rank], 16), c_contiguous=False)
    assert_close(permute(out, BHSD), part(oracle.dense_attention(*whole)[0], rows, comm.rank))


@pytest.mark.parametrize("dtype", DTYPES)
def test_redistribution(comm, kind, dtype):
    whole = numbered((2, 3 * comm.size + 1, 2 * comm.size + 1, 3), dtype)
    (x,), rows = mine(comm, [whole], kind)
    heads = split(whole.shape[2], comm.size)
    scattered = scatter_heads(x, comm=comm)
    assert_like(scattered, x, (2, whole.shape[1], heads[comm.rank], 3), c_contiguous=False)
    np.testing.assert_array_equal(as_numpy(scattered), part(whole, heads, comm.rank, axis=2))
    back = gather_heads(scattered, comm=comm, seq_local=rows[comm.rank])
    assert_like(back, x, x.shape, c_contiguous=False)
    np.testing.assert_array_equal(as_numpy(back), as_numpy(x))
    np.testing.assert_array_equal(as_numpy(all_to_all_4d(x, comm=comm)), as_numpy(scattered))


@pytest.mark.single
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(kind, dtype):
    q, k, v = random_qkv(4, 2, 9, 4, 2, 16, dtype)
    parts = [[as_kind(x.astype(dtype), kind) for x in oracle.dense_attention(q, k[:, s], v[:, s])] for s in halves(9)]
    out, lse = merge_attention(*parts[0], *parts[1])
    for result, given, expected in zip((out, lse), parts[0], oracle.dense_attention(q, k, v), strict=True):
        assert_like(result, given, expected.shape)
        assert_close(result, expected)


def halves(n):
    return slice(0, n // 2), slice(n // 2, n)


@pytest.mark.single
def test_bfloat16_as_uint16(kind):
    """The bit patterns of 1 and 3, whose mean is 2."""
    one, three = (as_kind(np.full((1, 2, 3, 4), bits, np.uint16), kind) for bits in (0x3F80, 0x4040))
    lse = as_kind(np.zeros((1, 3, 2), np.float32), kind)
    out, _ = merge_attention(one, lse, three, lse, dtype="bfloat16")
    assert_like(out, one, one.shape)
    np.testing.assert_array_equal(as_numpy(out), np.full((1, 2, 3, 4), 0x4000))
    with pytest.raises(TypeError, match=r"out_a has dtype uint16; .*give dtype='bfloat16'"):
        merge_attention(one, lse, three, lse)


@pytest.mark.single
@pytest.mark.parametrize("other", ["numpy", "dpnp"])
def test_mixed_kinds(kind, other):
    if kind == other:
        other = "usm"
    q, x = (as_kind(np.ones((1, 2, 2, 4), np.float32), name) for name in (kind, other))
    with pytest.raises(TypeError, match=f"arrays of one kind, not q: {library_of(q).name}, k: {library_of(x).name}"):
        attention(q, x, x)
    with pytest.raises(TypeError, match=f"out_b must be of the kind of out_a, {library_of(q).name}, not {library_of(x).name}"):
        merge_attention(q, q, x, x)


@pytest.mark.single
def test_dtypes_have_the_same_names(kind):
    for name in ("float32", "float64", "int32", "uint16", "bool"):
        assert dtype_of(as_kind(np.ones(2, name), kind)) == name
    with pytest.raises(TypeError, match="q has dtype int32; supported are"):
        attention(*3 * [as_kind(np.ones((1, 2, 2, 4), np.int32), kind)])


@pytest.mark.single
def test_nothing_optional_is_imported():
    code = """if True:
    import sys, numpy, ulysses_dp
    x = numpy.ones((1, 2, 2, 4), "float32")
    ulysses_dp.attention(x, x, x)
    print([name for name in ("torch", "array_api_strict", "ml_dtypes") if name in sys.modules])
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert result.stdout.strip() == "[]"


@pytest.mark.single
def test_devices_of_array_api_strict():
    xp = pytest.importorskip("array_api_strict")
    x = random_qkv(5, 1, 7, 2, 2, 8)[0]
    here, there = (xp.asarray(x, device=xp.Device(name)) for name in ("CPU_DEVICE", "device1"))
    assert_like(attention(there, there, there), there, x.shape)
    assert_close(attention(there, there, there), as_numpy(attention(here, here, here)))
    with pytest.raises(ValueError, match=r"q, k and v must be on one device, not .*CPU_DEVICE.*device1"):
        attention(here, there, there)


@pytest.mark.single
@pytest.mark.parametrize("version", ["2022.12", "2025.12"])
def test_versions_of_the_array_api(version):
    xp = pytest.importorskip("array_api_strict")
    whole = random_qkv(5, 1, 7, 2, 2, 8)
    with xp.ArrayAPIStrictFlags(api_version=version):
        result = attention(*map(xp.asarray, whole))
    assert_close(result, oracle.dense_attention(*whole)[0])


def torch_tensors():
    """Tensors that cannot be used: why, and how to make one from a NumPy array."""
    torch = pytest.importorskip("torch")
    fake = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode()
    return {
        "gradient": (NotImplementedError, "requires a gradient", lambda x: torch.tensor(x, requires_grad=True)),
        "parameter": (NotImplementedError, "requires a gradient", lambda x: torch.nn.Parameter(torch.tensor(x))),
        "meta": (TypeError, "is on the torch device meta", lambda x: torch.tensor(x, device="meta")),
        "sparse": (TypeError, "must be a dense tensor, not torch.sparse_coo", lambda x: torch.tensor(x).to_sparse()),
        "nested": (TypeError, "must be a dense tensor, not nested", lambda x: torch.nested.nested_tensor(list(x))),
        "fake": (
            TypeError,
            "must be a plain torch.Tensor of this rank, not torch._subclasses.fake_tensor.FakeTensor",
            lambda x: fake.from_tensor(torch.tensor(x)),
        ),
        "complex": (TypeError, "has dtype complex64", lambda x: torch.tensor(x).to(torch.complex64)),
    }


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", ["gradient", "parameter", "meta", "sparse", "nested", "fake", "complex"])
def test_tensors_that_cannot_be_used(comm, name):
    """On one rank: the same error on all."""
    error, message, make = torch_tensors()[name]
    good = as_kind(np.ones((1, 3, 2, 4), np.float32), "torch")
    bad = make(as_numpy(good)) if comm.rank == comm.size - 1 else good
    calls = {
        "q": lambda x: ulysses_attention(x, good, good, comm=comm),
        "key": lambda x: UlyssesAttention(comm, 1, 2)(good, x, good),
        "x": lambda x: scatter_heads(x, comm=comm),
    }
    for argument, call in calls.items():
        results = outcomes(comm, partial(call, bad))
        assert len(set(results)) == 1, results
        assert results[0][0] is error
        assert f"{argument} {message}" in results[0][1]
        assert outcomes(comm, partial(call, good)) == [None] * comm.size


@pytest.mark.single
def test_tensors_with_a_gradient_where_none_is_wanted():
    torch = pytest.importorskip("torch")
    whole = random_qkv(6, 1, 7, 2, 2, 8)
    q, k, v = (torch.tensor(x, requires_grad=True) for x in whole)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = attention(q, k, v)
        assert not out.requires_grad
        assert_close(out, oracle.dense_attention(*whole)[0])


@pytest.mark.single
def test_views_that_torch_keeps():
    """A tensor that is negated when it is read, and one with strides of 0."""
    torch = pytest.importorskip("torch")
    x = random_qkv(7, 1, 7, 2, 2, 8)[0]
    negated = torch.complex(torch.zeros(x.shape), -torch.tensor(x)).conj().imag
    assert negated.is_neg()
    assert_close(attention(negated, negated, negated), oracle.dense_attention(x, x, x)[0])
    one_head = x[:, :, :1]
    repeated = torch.tensor(one_head).expand(1, 7, 4, 8)
    assert_close(attention(repeated, repeated, repeated), oracle.dense_attention(*3 * [one_head.repeat(4, axis=2)])[0])


@pytest.mark.single
@pytest.mark.parametrize("library", ["torch", "ml_dtypes"])
def test_bfloat16_goes_to_the_device_as_uint16_and_back(library):
    module = pytest.importorskip(library)
    numbers = np.array([[1.0, -2.5, np.inf], [0.0, 3e38, 1e-40]], np.float32)
    x = module.tensor(numbers).bfloat16() if library == "torch" else numbers.astype(module.bfloat16)
    assert dtype_of(x) == "bfloat16"
    for given in (x, x[:, ::2], x.T):
        array = describe(given, library_of(given))
        bits = array.usm()
        assert (bits.dtype, bits.shape) == (np.uint16, tuple(given.shape))
        back = array.give(bits)
        assert_like(back, given, given.shape, c_contiguous=False)
        np.testing.assert_array_equal(as_numpy(back), as_numpy(given))
    array = describe(x, library_of(x))
    assert dtype_of(array.give(usm.zeros(3, dtype="f4"))) == "float32"  # an lse
    assert usm.asnumpy(array.usm())[0, 0] == 0x3F80
