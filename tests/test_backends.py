"""Every local backend on the same configurations, forward and backward; functions of users; names; what is not installed."""

import re
import sys
from functools import partial
from pathlib import Path

import dpnp
import numpy as np
import oracle
import pytest
from checks import AXES, FORMS, check, check_gradient, decode, described, dtype_of_options, kinds_of, packed, some_options
from gradients import dense_gradient
from helpers import COMPLETE, KINDS, LAYOUTS, as_kind, as_numpy, needs_ranks, new_queue, outcomes, part, random_qkv, split

from ulysses_dp import (
    AttnType,
    UlyssesAttention,
    attention,
    attention_backward,
    backends,
    register_attention,
    ulysses_attention,
    ulysses_attention_backward,
)
from ulysses_dp._device.arrays import dtype_of, library_of, tensor
from ulysses_dp._device.queue import default_queue
from ulysses_dp._ranks.partition import share_heads
from ulysses_dp.backends import torch_sdpa


def like(x, given, dtype=None):
    """Numbers of NumPy as an array of the kind and, if no other is given, dtype of another; bfloat16 as bit patterns."""
    dtype = dtype or (given.dtype if isinstance(given, np.ndarray) else dtype_of(given))  # str(bfloat16) is no dtype of NumPy
    x = oracle.to_bfloat16(x) if dtype == "uint16" else x.astype(dtype)
    kind = library_of(given).name.split(".")[0].removesuffix("_ndarray")
    return as_kind(x, kind, getattr(given, "sycl_queue", None))


def on_host(arrays, options):
    """What a function was given, as the oracle takes it."""
    options = {name: x if isinstance(x, tuple | float | bool | int) else as_numpy(x) for name, x in options.items()}
    options.pop("dtype", None)
    return [decode(x)[0] if "cu_seqlens_q" in options else decode(x) for x in arrays], options


def dense(q, k, v, *, return_lse, **options):
    """A user's attention with all options but dropout, which would need to know where the heads of this rank start."""
    arrays, options = on_host((q, k, v), options)
    out, lse = oracle.dense_attention(*arrays, **options)
    out = like(out.reshape(q.shape), q)
    lse_dtype = "float64" if dtype_of(q) == "float64" else "float32"
    return (out, like(lse.reshape(q.shape[0], q.shape[2], q.shape[1]), q, lse_dtype)) if return_lse else out


def dense_backward(dout, q, k, v, *, lse, delta, **options):
    """The gradient of `dense`."""
    assert type(lse) is type(delta) is type(q)
    assert lse.shape == delta.shape == (q.shape[0], q.shape[2], q.shape[1])
    arrays, options = on_host((dout, q, k, v), options)
    gradients = dense_gradient(*arrays, **options)[:3]
    return tuple(like(x.reshape(y.shape), y) for x, y in zip(gradients, (q, k, v), strict=True))


USER = register_attention("dense", dense, backward=dense_backward)
# It may refuse options, which are not tested then; the others have all that is tested here.
PARTIAL = (AttnType.INTEL_ONEDNN,)


@pytest.fixture(params=[*(x for x in AttnType if x is not AttnType.AUTO), USER], ids=lambda x: x.name)
def attn_type(request):
    """One backend after the other, as far as they are installed."""
    if request.param not in (*backends.usable(), USER):
        pytest.skip(f"{request.param.name} is not installed")
    return request.param


@pytest.fixture
def compare(functions, attn_type):
    """A comparison of the backend with an oracle, by `check` or `check_gradient`.

    It ends the test if the backend refuses the options, which it does on all ranks alike.
    """

    def run(check_one, *arguments, **options):
        try:
            check_one(*arguments, attn_type=attn_type, functions=functions, **options)
        except NotImplementedError as error:
            if attn_type not in PARTIAL:
                raise
            pytest.skip(str(error))

    return run


def hidden(*shape):
    """A mask that leaves no key at all to the first batch."""
    mask = np.random.default_rng(1).random(shape) < 0.6
    mask[0] = False
    return mask


def random_bias(*shape):
    bias = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    bias[..., -1] = -np.inf
    return bias


def options_of(*names, heads=6, seq=13, seq_k=22):
    return some_options(names, 2, heads, seq, seq_k)


# batch, seq, heads, kv_heads, head_dim, seq_k; and the options
CONFIGURATIONS = {
    "plain": ((2, 33, 6, 6, 16, 33), {}),
    "other keys": ((2, 33, 6, 6, 16, 21), {}),
    "groups": ((2, 23, 6, 2, 16, 23), {"causal": True}),
    "cut groups": ((1, 23, 10, 5, 16, 23), {"causal": True}),
    "one kv head": ((1, 23, 5, 1, 16, 19), {}),
    "fewer heads than ranks": ((1, 9, 1, 1, 8, 9), {"causal": True}),
    "scale": ((1, 9, 2, 2, 8, 11), {"softmax_scale": -0.4}),
    "causal, scale": ((1, 9, 2, 2, 8, 9), {"softmax_scale": -0.4, "causal": True}),
    "causal, scale 0": ((1, 9, 2, 2, 8, 9), {"softmax_scale": 0, "causal": True}),
    "scale 0": ((1, 9, 2, 2, 8, 11), {"softmax_scale": 0}),
    "causal": ((2, 33, 4, 4, 16, 33), {"causal": True}),
    "causal, more keys": ((2, 9, 4, 2, 16, 31), {"causal": True}),
    "causal, fewer keys": ((2, 31, 4, 2, 16, 9), {"causal": True}),  # 22 rows see none
    "one row": ((2, 1, 4, 2, 16, 31), {"causal": True}),
    "one key": ((2, 7, 4, 2, 16, 1), {}),
    "no keys": ((2, 7, 4, 2, 16, 0), {}),
    "no rows": ((2, 0, 4, 2, 16, 7), {}),
    "no batch": ((0, 3, 4, 2, 16, 7), {}),
    "head_dim 5": ((1, 9, 2, 2, 5, 9), {"causal": True}),
    "head_dim 256": ((1, 9, 2, 2, 256, 9), {}),
    "window": ((2, 13, 6, 3, 16, 22), {"window_size": (3, 2)}),
    "causal window": ((2, 22, 6, 3, 16, 22), {"window_size": (3, -1), "causal": True}),
    "alibi": ((2, 13, 6, 3, 16, 22), options_of("alibi", "causal")),
    "alibi of batch": ((2, 13, 6, 3, 16, 22), options_of("alibi of batch")),
    "bias": ((2, 13, 6, 3, 16, 22), options_of("bias", "causal")),
    "bias of keys": ((2, 13, 6, 2, 16, 22), {"bias": random_bias(1, 1, 1, 22)}),
    "bias of rows": ((2, 13, 6, 2, 16, 22), {"bias": random_bias(1, 6, 13, 1)}),  # hides a row everywhere
    "padding": ((2, 13, 6, 3, 16, 22), options_of("mask")),
    "all is padding": ((2, 13, 6, 3, 16, 22), {"key_padding_mask": hidden(2, 22), "causal": True}),
    "all together": ((2, 13, 6, 3, 16, 22), options_of("causal", "window", "alibi", "bias", "mask")),
}
PACKED = {
    "packed": (([7, 1, 0, 12, 3], [7, 1, 0, 12, 3]), ()),
    "packed, causal": (([7, 1, 0, 12, 3], [7, 1, 0, 12, 3]), ("causal",)),
    "packed, other keys": (([7, 1, 0, 12, 3, 5], [4, 1, 6, 17, 0, 2]), ("causal", "alibi", "mask")),
    "packed, window": (([7, 1, 0, 12, 3, 5], [4, 1, 6, 17, 0, 2]), ("window", "bias")),
}


def configuration(name):
    """Whole arrays, and the options for the checks."""
    if name in PACKED:
        lengths, names = PACKED[name]
        whole, options = packed(lengths)
        return whole, options | some_options(names, 1, 4, *map(sum, lengths))
    (*shape, seq_k), options = CONFIGURATIONS[name]
    return random_qkv(3, *shape, seq_k=seq_k), options


def splits(comm, whole, options):
    """Even rows of all ranks, and rows that differ between ranks and between q and k."""
    axis = 0 if "layout" in options else 1
    sizes = whole[0].shape[axis], whole[1].shape[axis]
    for hows in (("even", "even"), ("uneven", "gaps")):
        yield {name: split(n, comm.size, how) for name, n, how in zip(("rows", "rows_k"), sizes, hows, strict=True)}


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *PACKED])
def test_forward(comm, compare, name):
    whole, options = configuration(name)
    for rows in splits(comm, whole, options):
        compare(check, comm, whole, **rows, **options)


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *PACKED])
def test_backward(comm, compare, name):
    whole, options = configuration(name)
    for rows in splits(comm, whole, options):
        compare(check_gradient, comm, whole, **rows, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [(), ("causal",), ("window", "alibi", "bias", "mask")], ids=described)
def test_dtypes(comm, compare, form, names):
    dtype = dtype_of_options(form)
    for heads, kv_heads in ((6, 2), (5, 1)):  # in two ways cut between ranks
        options = some_options(names, 2, heads, 21, 21, dtype=dtype) | {"form": form}
        whole = random_qkv(4, 2, 21, heads, kv_heads, 16, dtype)
        for kind in kinds_of(form):
            compare(check, comm, whole, kind=kind, **options)
            compare(check_gradient, comm, whole, kind=kind, **options)


@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize("layout", AXES)
def test_layouts(comm, compare, attn_type, strides, layout):
    if attn_type in COMPLETE:
        pytest.skip("tested with the options")
    whole, options = random_qkv(5, 2, 12, 4, 2, 16), {"kind": "dpnp", "strides": strides, "layout": layout, "causal": True}
    compare(check, comm, whole, **options)
    compare(check_gradient, comm, whole, **options)


@pytest.mark.parametrize("form", ["float32", "bits"])
@pytest.mark.parametrize("exchange", ["device", "host"])
def test_context_and_exchange(comm, attn_type, form, exchange):
    if attn_type in PARTIAL:
        pytest.skip(f"{attn_type.name} may refuse this dtype")
    whole, options = random_qkv(6, 2, 14, 6, 3, 16), {"form": form, "exchange": exchange, "causal": True}
    check(comm, whole, return_lse=False, attn_type=attn_type, **options)
    check_gradient(comm, whole, context=True, attn_type=attn_type, **options)


@pytest.mark.parametrize("name", ["plain", "causal", "cut groups"])
def test_heads_do_not_see_each_other(comm, attn_type, name):
    """The axes of a backend's own function may be others. As many rows as heads, so that no shape betrays a wrong order."""
    _, options = configuration(name)
    q, k, v = random_qkv(7, 1, 6, 6, 6, 6)
    rows = split(6, comm.size)
    q[:, :, 2:] *= 50
    v[:, :, 2:] += 1000
    out = ulysses_attention(*(part(x, rows, comm.rank) for x in (q, k, v)), comm=comm, attn_type=attn_type, **options)
    expected, _ = oracle.dense_attention(*(x[:, :, :2] for x in (q, k, v)), **options)
    np.testing.assert_allclose(out[:, :, :2], part(expected, rows, comm.rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("into", [0, 1, 2, 3], ids=["q", "k", "v", "dout"])
@pytest.mark.parametrize("attn_type", COMPLETE)  # the others multiply what is hidden by 0
def test_special_values_reach_what_sees_them_alone(comm, attn_type, special, into):
    rng = np.random.default_rng(into)
    seen = rng.random((24, 24)) < 0.3
    options = {"bias": np.where(seen, 0, -np.inf).astype(np.float32)[None, None], "attn_type": attn_type, "comm": comm}
    arrays = [*random_qkv(8, 2, 24, 4, 2, 8), rng.standard_normal((2, 24, 4, 8)).astype(np.float32)]
    counts = split(24, comm.size, "uneven")

    def gradients():
        q, k, v, dout = (part(x, counts, comm.rank) for x in arrays)
        out, lse = ulysses_attention(q, k, v, return_lse=True, **options)
        return out, *ulysses_attention_backward(dout, q, k, v, out, lse, **options)

    clean = gradients()
    arrays[into][1, 11, 1, 3] = special
    rows = np.zeros((2, 24, 4), bool)  # whose scores or gradients come to know of it; head 1 shares its keys with head 0
    if into in (0, 3):
        rows[1, 11, 1] = True
    else:
        rows[1, seen[:, 11], 2:] = True
    keys = seen.T @ rows.reshape(2, 24, 2, 2).any(-1)
    reached = {"out": rows & (into != 3), "dq": rows, "dk": keys, "dv": keys}
    for hit, x, y in zip(reached.values(), gradients(), clean, strict=True):
        free = part(~hit, counts, comm.rank)
        np.testing.assert_allclose(x[free], y[free], rtol=0, atol=2e-6)


@pytest.mark.single
def test_backends_interleave_on_one_queue(attn_type):
    """A thousand times two backends and dpnp in turns, each with what the other has just computed."""
    queue = new_queue()
    whole = random_qkv(8, 1, 12, 2, 2, 16)
    q, k, v = (as_kind(x, "dpnp", queue) for x in whole)
    expected = []
    for factor in range(1, 8):
        first, _ = oracle.dense_attention(factor * whole[0], *whole[1:], causal=True)
        second, _ = oracle.dense_attention(2 * first, *whole[1:], causal=True)
        expected.append((first, second + first))
    for turn in range(1000):
        first = attention((1 + turn % 7) * q, k, v, causal=True)
        second = attention(2 * first, k, v, causal=True, attn_type=attn_type) + first
        for result, wanted in zip((first, second), expected[turn % 7], strict=True):
            np.testing.assert_allclose(dpnp.asnumpy(result), wanted, rtol=0, atol=1e-5)


def rows_of(comm, kind="numpy"):
    """q, k and v of this rank."""
    rows = split(9, comm.size)
    return [as_kind(part(x, rows, comm.rank), kind) for x in random_qkv(9, 1, 9, 4, 2, 8)]


def assert_all_raise(comm, call, error, *words):
    """One error on all ranks, whose message has these words."""
    results = outcomes(comm, call)
    assert len(set(results)) == 1, results
    assert results[0] is not None, "nothing was raised"
    assert results[0][0] is error, results[0]
    for word in words:
        assert word in results[0][1], results[0][1]


# ---- PyTorch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("options", [{"softcap": 1.0}, {"sinks": [0.0] * 4}, {"dropout_p": 0.1, "seed": 1}], ids=str)
def test_torch_refuses(comm, torch, options):
    q, k, v = rows_of(comm)
    options = options | {"attn_type": AttnType.TORCH, "comm": comm}
    name = next(iter(options))
    assert_all_raise(comm, lambda: ulysses_attention(q, k, v, **options), NotImplementedError, "TORCH", name, "INTEL_SYCL")
    out, lse = ulysses_attention(q, k, v, comm=comm, return_lse=True)
    assert_all_raise(comm, lambda: ulysses_attention_backward(q, q, k, v, out, lse, **options), NotImplementedError, name)


@pytest.mark.parametrize("ranks", ["all", "last"])
def test_torch_is_not_installed(comm, monkeypatch, ranks):
    q, k, v = rows_of(comm)
    if ranks == "all" or comm.rank == comm.size - 1:
        monkeypatch.setitem(sys.modules, "torch", None)
    wanted = "attn_type TORCH needs PyTorch: pip install 'ulysses_dp[torch]'"
    assert_all_raise(comm, lambda: ulysses_attention(q, k, v, comm=comm, attn_type=AttnType.TORCH), ImportError, wanted)
    assert outcomes(comm, lambda: ulysses_attention(q, k, v, comm=comm)) == [None] * comm.size
    if ranks == "all":
        with pytest.raises(ImportError, match="needs PyTorch"):
            attention(q, k, v, attn_type=AttnType.TORCH)


@pytest.mark.single
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "uint16"])
def test_torch_sees_the_memory_of_usm_arrays(torch, dtype):
    if not default_queue().sycl_device.is_cpu:
        pytest.skip("the device is not the CPU")
    base = tensor.reshape(tensor.asarray(np.arange(2 * 6 * 4 * 3), dtype=dtype), (2, 6, 4, 3))
    for x in (base, base[:, 1::2], tensor.permute_dims(base, (0, 2, 1, 3))):
        result = torch_sdpa._to_torch(x)
        assert result.data_ptr() == x._pointer
        assert result.dtype == (torch.bfloat16 if dtype == "uint16" else getattr(torch, dtype))
        bits = result.view(torch.uint16) if dtype == "uint16" else result
        np.testing.assert_array_equal(bits.numpy(), tensor.asnumpy(x))


@pytest.mark.single
@pytest.mark.parametrize("name", ["causal, more keys", "all together", "packed, other keys"])
@pytest.mark.parametrize("form", ["float32", "bits", "float16"])
def test_torch_on_a_device_that_it_does_not_see(comm, torch, monkeypatch, name, form):
    """Through copies on the host; here for a device that it could see."""
    monkeypatch.setattr(torch_sdpa, "_in_reach", lambda _x: False)
    whole, options = configuration(name)
    check(comm, whole, attn_type=AttnType.TORCH, form=form, **options)
    check_gradient(comm, whole, attn_type=AttnType.TORCH, form=form, **options)


@pytest.mark.parametrize("name", ["plain", "groups", "causal, fewer keys", "all together", "no keys", "packed, window"])
def test_torch_lse_by_blocks(comm, torch, monkeypatch, name):
    monkeypatch.setattr(torch_sdpa, "BLOCK", 2 * 6 * 33 * 5)
    whole, options = configuration(name)
    check(comm, whole, attn_type=AttnType.TORCH, **options)


def test_torch_lse_is_computed_only_if_somebody_wants_it(comm, torch, monkeypatch):
    monkeypatch.setattr(torch_sdpa, "_lse", None)
    q, k, v = rows_of(comm)
    ulysses_attention(q, k, v, comm=comm, attn_type=AttnType.TORCH)
    for wanted in ("return_lse", "return_ctx") if comm.size > 1 else ("return_lse",):
        with pytest.raises(TypeError):
            ulysses_attention(q, k, v, comm=comm, attn_type=AttnType.TORCH, **{wanted: True})


def test_torch_gradient_whatever_the_caller_has_switched_off(comm, torch):
    whole = random_qkv(10, 1, 11, 4, 2, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            check_gradient(comm, whole, attn_type=AttnType.TORCH, causal=True)


# ---- AUTO


@pytest.fixture
def taken(monkeypatch):
    """The names of the backends that computed something."""
    names = []
    for cls in (backends.IntelSycl, backends.TorchSdpa):

        def forward(self, *arguments, original=cls.forward):
            names.append(self.name)
            original(self, *arguments)

        monkeypatch.setattr(cls, "forward", forward)
    return names


def test_auto_is_our_kernel_where_nothing_is_preferred(comm, monkeypatch, taken):
    monkeypatch.setattr(backends, "PREFERRED", {})
    ulysses_attention(*rows_of(comm), comm=comm, attn_type=AttnType.AUTO)
    assert taken == ["INTEL_SYCL"]


def test_auto_takes_what_is_preferred_installed_and_able(comm, torch, monkeypatch, taken):
    device = default_queue().sycl_device.device_type.name
    monkeypatch.setattr(backends, "PREFERRED", {(device, "float32"): AttnType.TORCH})
    q, k, v = rows_of(comm)
    run = partial(ulysses_attention, comm=comm, attn_type=AttnType.AUTO)
    run(q, k, v, causal=True)
    run(q, k, v, softcap=1.0)
    run(q, k, v, window_size=(3, 3))  # a dense mask for PyTorch
    run(*(x.astype(np.float64) for x in (q, k, v)))
    monkeypatch.setitem(sys.modules, "torch", None)
    run(q, k, v)
    assert taken == ["TORCH", *["INTEL_SYCL"] * 4]


@needs_ranks
def test_ranks_agree_on_what_auto_takes(comm, torch, monkeypatch):
    q, k, v = rows_of(comm)
    last = comm.rank == comm.size - 1
    attn_type = AttnType.AUTO if last else AttnType.INTEL_SYCL
    monkeypatch.setattr(backends, "PREFERRED", {})
    assert outcomes(comm, lambda: ulysses_attention(q, k, v, comm=comm, attn_type=attn_type)) == [None] * comm.size
    if last:
        device = default_queue().sycl_device.device_type.name
        monkeypatch.setattr(backends, "PREFERRED", {(device, "float32"): AttnType.TORCH})
    run = partial(ulysses_attention, q, k, v, comm=comm, attn_type=AttnType.AUTO)
    assert_all_raise(comm, run, ValueError, "attn_type must be the same on all ranks", "INTEL_SYCL", "TORCH")


@pytest.mark.single
def test_description(monkeypatch):
    device = default_queue().sycl_device
    monkeypatch.setattr(backends, "PREFERRED", {})
    monkeypatch.setattr(backends, "version_of", lambda x: None if x is AttnType.INTEL_ONEDNN else "2.5")
    assert backends.describe(device) == "INTEL_SYCL, TORCH 2.5, NUMPY; AUTO takes INTEL_SYCL"
    preferred = {(device.device_type.name, "float16"): AttnType.TORCH, ("gpu", "float16"): AttnType.INTEL_ONEDNN}
    monkeypatch.setattr(backends, "PREFERRED", preferred)
    assert backends.describe(device).endswith("AUTO takes TORCH for plain float16, INTEL_SYCL for the rest")
    monkeypatch.setattr(backends, "version_of", lambda x: "1" if x in (AttnType.INTEL_SYCL, AttnType.NUMPY) else None)
    assert backends.describe(device) == "INTEL_SYCL, NUMPY; AUTO takes INTEL_SYCL"


# ---- functions of users


@pytest.mark.parametrize("kind", [*KINDS, "torch", "array_api_strict"])
def test_user_gets_arrays_of_the_kind_of_the_call(comm, kind):
    whole = random_qkv(11, 2, 10, 4, 2, 8)
    rows = split(10, comm.size)
    q, k, v = (as_kind(np.ascontiguousarray(part(x, rows, comm.rank)), kind) for x in whole)
    options = some_options(("causal", "alibi", "bias", "mask"), 2, 4, 10, 10)
    seen = []

    def spy(*arrays, **options):
        arrays_too = [x for x in options.values() if not isinstance(x, bool | float)]
        seen.extend(library_of(x) for x in (*arrays, *arrays_too))
        assert all(x.sycl_queue == q.sycl_queue for x in (*arrays, *arrays_too) if kind in ("dpnp", "usm"))
        return dense(*arrays, **options)

    given = {name: as_kind(x, kind) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    results = ulysses_attention(q, k, v, comm=comm, attn_type=spy, return_lse=True, **given)
    assert seen == [library_of(q)] * 6
    for result, expected, axis in zip(results, oracle.dense_attention(*whole, **options), (1, 2), strict=True):
        assert type(result) is type(q)
        np.testing.assert_allclose(as_numpy(result), part(expected, rows, comm.rank, axis), rtol=0, atol=1e-5)


def record(calls):
    """A function that notes its options."""

    def function(q, k, v, **options):
        calls.append((q.shape, k.shape, options))
        return dense(q, k, v, **{name: x for name, x in options.items() if name not in ("dropout_p", "seed")})

    return function


@pytest.mark.single
def test_user_gets_the_options_that_are_set():
    calls = []
    q, k, v = random_qkv(12, 2, 5, 4, 2, 8)
    run = partial(attention, q, k, v, attn_type=record(calls))
    run()
    scale = 1 / np.sqrt(8)
    assert calls.pop()[2] == {"softmax_scale": scale, "causal": False, "return_lse": False}
    run(window_size=(-1, 0), return_lse=True)
    assert calls.pop()[2] == {"softmax_scale": scale, "causal": True, "return_lse": True}
    run(window_size=(2, 1), softcap=2, softmax_scale=1, dropout_p=0.5, seed=3, sinks=[1, 2, 3, 4], alibi_slopes=[0, 1, 2, 3])
    options = calls.pop()[2]
    for name, expected in (("sinks", [1, 2, 3, 4]), ("alibi_slopes", [0, 1, 2, 3])):
        x = options.pop(name)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, expected)
    plain = {"softmax_scale": 1.0, "causal": False, "return_lse": False}
    assert options == plain | {"window_size": (2, 1), "softcap": 2.0, "dropout_p": 0.5, "seed": 3}
    whole, packing = packed(([3, 2], [1, 4]))
    attention(*whole, attn_type=record(calls), **packing)
    of_q, of_k, options = calls.pop()
    assert (of_q, of_k) == ((1, 5, 4, 16), (1, 5, 2, 16))
    np.testing.assert_array_equal(options["cu_seqlens_q"], [0, 3, 5])
    np.testing.assert_array_equal(options["cu_seqlens_k"], [0, 1, 5])
    attention(*(oracle.to_bfloat16(x) for x in (q, k, v)), dtype="bfloat16", attn_type=record(calls))
    assert calls.pop()[2]["dtype"] == "bfloat16"


def test_user_gets_equal_groups(comm):
    """The kv heads as they are, or a head of k and v for every head of q where the ranks leave some kv heads fewer."""
    for heads, kv_heads in ((6, 3), (6, 1), (10, 5), (2, 2)):
        calls = []
        q, k, v = (part(x, split(4, comm.size), comm.rank) for x in random_qkv(13, 1, 4, heads, kv_heads, 8))
        ulysses_attention(q, k, v, comm=comm, attn_type=record(calls))
        for of_q, of_k, _ in calls:
            mine = share_heads(heads, kv_heads, comm.size)[comm.rank]
            group = heads // kv_heads
            readers = [(mine.q_start + head) // group for head in range(mine.q_count)]
            equal = len({readers.count(head) for head in readers}) == 1
            assert of_q[2] == mine.q_count
            assert of_k[2] == (mine.kv_count if equal else mine.q_count)
        assert len(calls) == (comm.rank < heads)


def plain_only(q, k, v, softmax_scale, causal, return_lse):
    return dense(q, k, v, softmax_scale=softmax_scale, causal=causal, return_lse=return_lse)


@pytest.mark.parametrize("options", [{"softcap": 1.0}, {"window_size": (1, 1)}, {"sinks": [0.0] * 4}], ids=str)
def test_user_function_without_an_option(comm, options):
    q, k, v = rows_of(comm)
    run = partial(ulysses_attention, q, k, v, comm=comm, attn_type=plain_only)
    name = next(iter(options))
    assert_all_raise(comm, partial(run, **options), NotImplementedError, "attn_type plain_only cannot be called", f"'{name}'")
    assert outcomes(comm, run) == [None] * comm.size


@needs_ranks
def test_user_function_without_an_option_on_one_rank(comm):
    """Of two versions of a function with one name."""
    q, k, v = rows_of(comm)
    mine = register_attention("versioned", plain_only if comm.rank == comm.size - 1 else dense)
    run = partial(ulysses_attention, q, k, v, comm=comm, attn_type=mine)
    assert_all_raise(comm, partial(run, softcap=2.0), NotImplementedError, f"rank {comm.size - 1}", "versioned", "'softcap'")
    assert outcomes(comm, run) == [None] * comm.size


@needs_ranks
def test_ranks_disagree_on_the_function(comm):
    q, k, v = rows_of(comm)
    attn_type = plain_only if comm.rank == comm.size - 1 else dense
    run = partial(ulysses_attention, q, k, v, comm=comm, attn_type=attn_type)
    assert_all_raise(comm, run, ValueError, "attn_type must be the same on all ranks", "plain_only", "dense")


def test_gradients_by_lse(comm, attn_type):
    """What computes from delta has them; the others say who has."""
    rows, whole = split(9, comm.size), random_qkv(21, 1, 9, 4, 2, 8)
    mine = [part(x, rows, comm.rank) for x in whole]
    dlse = np.random.default_rng(1).standard_normal((1, 4, 9), dtype=np.float32)

    def from_delta(dout, q, k, v, *, lse, delta, **options):
        of_dlse = (dout * oracle.dense_attention(q, k, v, **options)[0]).sum(-1).swapaxes(1, 2) - delta
        return tuple(x.astype(q.dtype) for x in dense_gradient(dout, q, k, v, dlse=of_dlse, **options)[:3])

    if attn_type is USER:
        attn_type = register_attention("from delta", dense, backward=from_delta)
    out, lse = ulysses_attention(*mine, comm=comm, attn_type=attn_type, return_lse=True)

    def differentiate():
        arrays = mine[0], *mine, out, lse
        return ulysses_attention_backward(*arrays, comm=comm, attn_type=attn_type, dlse=part(dlse, rows, comm.rank, 2))

    if attn_type in (AttnType.TORCH, AttnType.INTEL_ONEDNN):
        assert_all_raise(comm, differentiate, NotImplementedError, f"{attn_type.name} does not support dlse; INTEL_SYCL does")
        return
    for result, expected in zip(differentiate(), dense_gradient(whole[0], *whole, dlse=dlse), strict=False):
        np.testing.assert_allclose(result, part(expected, rows, comm.rank), rtol=0, atol=2e-5)


def test_user_function_without_backward(comm):
    q, k, v = rows_of(comm)
    out, lse = ulysses_attention(q, k, v, comm=comm, attn_type=dense, return_lse=True)
    run = partial(ulysses_attention_backward, q, q, k, v, out, lse, comm=comm)
    assert_all_raise(comm, partial(run, attn_type=dense), NotImplementedError, "attn_type dense has no backward")
    wants_out = register_attention("wants out", dense, backward=lambda dout, q, k, v, out, lse, **_: (q, k, v))
    words = "wants out", "cannot be called with", "missing a required argument: 'out'"
    assert_all_raise(comm, partial(run, attn_type=wants_out), NotImplementedError, *words)


QUEUE_OF_ITS_OWN = new_queue()
BAD_RESULTS = [
    ("numpy", lambda q: q[:, 1:], ValueError, "out with shape (1, 9, 4, 8), not (1, 8, 4, 8)"),
    ("numpy", lambda q: q.swapaxes(1, 2), ValueError, "out with shape (1, 9, 4, 8), not (1, 4, 9, 8)"),
    ("numpy", lambda q: q.astype(np.float64), TypeError, "out with dtype float32, not float64"),
    ("numpy", lambda q: dpnp.asarray(q), TypeError, "out as numpy.ndarray, not dpnp.ndarray"),
    ("numpy", lambda _: None, TypeError, "out as numpy.ndarray, not NoneType"),
    ("dpnp", lambda q: dpnp.asnumpy(q), TypeError, "out as dpnp.ndarray, not numpy.ndarray"),
    ("dpnp", lambda q: dpnp.asarray(dpnp.asnumpy(q), sycl_queue=QUEUE_OF_ITS_OWN), ValueError, "out where q is"),
    ("usm", lambda q: dpnp.asarray(q), TypeError, "out as usm_ndarray, not dpnp.ndarray"),
    ("torch", lambda q: q.numpy(), TypeError, "out as torch.Tensor, not numpy.ndarray"),
    ("torch", lambda q: q.double(), TypeError, "out with dtype float32, not float64"),
]


@pytest.mark.single
@pytest.mark.parametrize(("kind", "change", "error", "message"), BAD_RESULTS)
def test_user_returns_something_else(kind, change, error, message):
    def wrong(q, k, v, *, softmax_scale, causal, return_lse):
        return change(q)

    q, k, v = (as_kind(x, kind) for x in random_qkv(14, 1, 9, 4, 2, 8))
    with pytest.raises(error) as caught:
        attention(q, k, v, attn_type=wrong)
    assert "attn_type test_user_returns_something_else.<locals>.wrong must return" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.single
def test_user_returns_no_lse_or_a_wrong_one():
    q, k, v = random_qkv(15, 2, 9, 4, 2, 8)
    good = np.zeros((2, 4, 9), np.float32)
    for results, error, message in (
        (q, TypeError, "must return (out, lse), not ndarray"),
        ((q,), TypeError, "must return (out, lse), not 1 results"),
        ((q, good, good), TypeError, "must return (out, lse), not 3 results"),
        ((q, good.swapaxes(1, 2)), ValueError, "lse with shape (2, 4, 9), not (2, 9, 4)"),
        ((q, good.astype(np.float64)), TypeError, "lse with dtype float32, not float64"),
    ):
        backend = register_attention("returns", lambda *_, results=results, **__: results)
        with pytest.raises(error) as caught:
            attention(q, k, v, attn_type=backend, return_lse=True)
        assert "attn_type returns " in str(caught.value)
        assert message in str(caught.value)
    both = register_attention("returns both", lambda *_, **__: (q, good))
    np.testing.assert_array_equal(attention(q, k, v, attn_type=both), q)  # lse that nobody asked for


@pytest.mark.single
def test_user_returns_wrong_gradients():
    q, k, v = random_qkv(16, 2, 9, 4, 2, 8)
    out, lse = attention(q, k, v, return_lse=True)
    for results, error, message in (
        ((q, k), TypeError, "must return (dq, dk, dv), not 2 results"),
        ((q, q, v), ValueError, "dk with shape (2, 9, 2, 8), not (2, 9, 4, 8)"),
        ((q, k, v.astype(np.float64)), TypeError, "dv with dtype float32, not float64"),
    ):
        backend = register_attention("differentiates", dense, backward=lambda *_, results=results, **__: results)
        with pytest.raises(error) as caught:
            attention_backward(q, q, k, v, out, lse, attn_type=backend)
        assert "attn_type differentiates " in str(caught.value)
        assert message in str(caught.value)


def test_any_callable(comm):
    """Functions, methods, objects and partial functions."""

    class Kernel:
        def __call__(self, *arrays, **options):
            return dense(*arrays, **options)

    whole = random_qkv(17, 1, 9, 4, 2, 8)
    for attn_type in (dense, Kernel(), Kernel().__call__, partial(dense), lambda *arrays, **options: dense(*arrays, **options)):
        check(comm, whole, attn_type=attn_type, causal=True)


@pytest.mark.single
def test_example_of_the_documentation(capsys):
    page = Path(__file__).parents[1] / "docs/backends.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out == "True True\n"


@needs_ranks
@pytest.mark.parametrize("raised", [ValueError, OSError, KeyError])
def test_user_function_raises_on_one_rank(comm, raised):
    q, k, v = rows_of(comm)
    last = comm.size - 1

    def fails(*arrays, **options):
        if comm.rank == last:
            raise raised("no luck")
        return dense(*arrays, **options)

    def returns_less(*arrays, **options):
        return dense(*arrays, **options)[:, comm.rank == last :]

    run = partial(ulysses_attention, q, k, v, comm=comm)
    error = RuntimeError if raised is KeyError else raised
    assert_all_raise(comm, partial(run, attn_type=fails), error, f"rank {last}", "no luck")
    assert_all_raise(comm, partial(run, attn_type=returns_less), ValueError, f"rank {last}", "returns_less must return out")
    assert outcomes(comm, partial(run, attn_type=dense)) == [None] * comm.size


def test_layer_of_a_user_function(comm):
    whole = random_qkv(18, 1, 9, 4, 2, 8)
    mine = [part(x, split(9, comm.size), comm.rank) for x in whole]
    expected, _ = oracle.dense_attention(*whole, causal=True)
    out = UlyssesAttention(comm, attn_type=USER)(*mine, causal=True)
    np.testing.assert_allclose(out, part(expected, split(9, comm.size), comm.rank), rtol=0, atol=1e-5)


# ---- names


@pytest.mark.single
def test_from_string():
    for member in AttnType:
        assert AttnType.from_string(member.value) is AttnType.from_string(member.name) is member
    assert AttnType.from_string("dense") is USER
    again = register_attention("dense of now", dense)
    assert AttnType.from_string("dense of now") is again
    assert register_attention("dense of now", plain_only) is AttnType.from_string("dense of now") is not again
    with pytest.raises(ValueError, match=r"intel_sycl, intel_onednn, torch, numpy, auto, .*dense.* not 'flash'"):
        AttnType.from_string("flash")
    with pytest.raises(TypeError, match="name must be a string, not AttnType"):
        AttnType.from_string(AttnType.TORCH)


@pytest.mark.single
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("torch", dense), ValueError, "name must not be empty or that of a member of AttnType, not 'torch'"),
        (("NUMPY", dense), ValueError, "not 'NUMPY'"),
        (("", dense), ValueError, "name must not be empty"),
        ((dense, "dense"), TypeError, "name must be a string, not function"),
        (("mine", None), TypeError, "forward must be a function, not NoneType"),
        (("mine", "dense"), TypeError, "forward must be a function, not str"),
    ],
)
def test_register_attention(arguments, error, message):
    with pytest.raises(error) as caught:
        register_attention(*arguments)
    assert message in str(caught.value)
    assert "mine" not in backends._registered


@pytest.mark.single
def test_register_backward():
    with pytest.raises(TypeError, match="backward must be a function, not bool"):
        register_attention("mine", dense, backward=True)
