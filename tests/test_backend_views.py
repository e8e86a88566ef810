"""Every local backend on views of all sorts, and on what others have no place for: dense masks, their memory, large biases."""

import numpy as np
import oracle
import pytest
from checks import is_array
from gradients import dense_gradient
from helpers import WORLD, as_kind, as_numpy, outcomes, part, random_qkv, split
from test_backends import USER

from ulysses_dp import (
    AttnType,
    attention,
    attention_backward,
    backends,
    free_workspace,
    ulysses_attention,
    ulysses_attention_backward,
)
from ulysses_dp._call.options import OPTIONS
from ulysses_dp._device.arrays import tensor
from ulysses_dp.backends import dense

BACKENDS = [*(x for x in AttnType if x is not AttnType.AUTO), USER]
COMPLETE = (AttnType.INTEL_SYCL, AttnType.NUMPY, USER)  # with options that the others refuse


def view_of(x, kind, rng):
    """The numbers of a NumPy array in other memory: axes in any order, gaps, backwards, an offset; nonsense lies in between."""
    if not x.size:
        return as_kind(x, kind)
    order = rng.permutation(x.ndim) if rng.random() < 0.7 else np.arange(x.ndim)
    turned = x.transpose(order)
    steps = rng.choice([1, 1, 2, -1], x.ndim)
    margins = rng.choice([0, 0, 1, 3], (2, x.ndim))
    nonsense = np.array(np.nan if x.dtype.kind == "f" else 1, x.dtype)
    wide = np.full(margins.sum(axis=0) + abs(steps) * turned.shape, nonsense)
    inside = tuple(slice(a, a + abs(s) * n, abs(s)) for a, s, n in zip(margins[0], steps, turned.shape, strict=True))
    backwards = tuple(slice(None, None, -1) if s < 0 else slice(None) for s in steps)
    wide[inside] = turned[backwards]
    lead = rng.integers(20)
    memory = as_kind(np.concatenate([np.full(lead, nonsense), wide.ravel()]), kind)[lead:]
    shaped = tensor.reshape(memory, wide.shape) if kind == "usm" else memory.reshape(wide.shape)
    view = shaped[inside][backwards]
    back = tuple(map(int, np.argsort(order)))
    view = tensor.permute_dims(view, back) if kind == "usm" else view.transpose(back)
    np.testing.assert_array_equal(as_numpy(view), x)
    return view


def drawn(rng, attn_type):
    """Whole dout, q, k, v and options of a call, small and odd."""
    batch, seq, seq_k = (int(rng.choice(x)) for x in ([1, 1, 2, 3], [1, 1, 2, 5, 9, 18], [1, 1, 2, 5, 9, 18]))
    kv_heads, group, head_dim = (int(rng.choice(x)) for x in ([1, 1, 2, 3], [1, 1, 2, 3], [2, 5, 8, 16, 64]))
    heads = kv_heads * group
    options = {"causal": bool(rng.random() < 0.4)}
    if packed := batch == 1 and rng.random() < 0.4:
        cuts = [np.sort(rng.integers(0, n + 1, 2)) for n in (seq, seq_k)]
        ends = [np.array([0, *x, n], np.int32) for x, n in zip(cuts, (seq, seq_k), strict=True)]
        options |= {"layout": "thd", "cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    if rng.random() < 0.2:
        options["softmax_scale"] = float(rng.choice([-0.4, 0, 1.5]))
    if rng.random() < 0.2:
        options["window_size"] = tuple(map(int, rng.integers(-1, 4, 2)))
    if rng.random() < 0.2:
        options["alibi_slopes"] = rng.random(heads).astype(np.float32)
    if rng.random() < 0.3:
        shape = [int(rng.choice([1, n])) for n in (batch, heads, seq, seq_k)]
        options["bias"] = np.where(rng.random(shape) < 0.1, -np.inf, rng.standard_normal(shape)).astype(np.float32)
    if rng.random() < 0.3:
        options["key_padding_mask"] = rng.random((batch, seq_k)) < 0.6  # some rows see nothing
    if attn_type in COMPLETE and rng.random() < 0.3:
        options |= {"softcap": 1.5, "sinks": rng.standard_normal(heads).astype(np.float32)}
    shapes = [(batch, n, h, head_dim) for n, h in ((seq, heads), (seq, heads), (seq_k, kv_heads), (seq_k, kv_heads))]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return [x[0] for x in arrays] if packed else arrays, options


@pytest.fixture(params=BACKENDS, ids=lambda x: x.name)
def attn_type(request):
    """One backend after the other, as far as they are installed."""
    if request.param not in (*backends.usable(), USER):
        pytest.skip(f"{request.param.name} is not installed")
    return request.param


def compare(comm, whole, options, attn_type, views, kind="numpy", hows=("even", "even"), alone=False):
    """Forward and gradient of the rows of this rank, of which every argument is a view, against the oracle."""
    packed = options.get("layout") == "thd"
    axis = 0 if packed else 1
    ranks, rank = (1, 0) if alone else (comm.size, comm.rank)
    rows, rows_k = (split(x.shape[axis], ranks, how) for x, how in zip(whole[1:3], hows, strict=True))
    mine = [view_of(part(x, n, rank, axis), kind, views) for x, n in zip(whole, (rows, rows, rows_k, rows_k), strict=True)]
    given = {name: view_of(x, kind, views) if is_array(x) else x for name, x in options.items()}
    run, run_backward = (attention, attention_backward) if alone else (ulysses_attention, ulysses_attention_backward)
    given |= {"attn_type": attn_type} | ({} if alone else {"comm": comm})
    out, lse = run(*mine[1:], return_lse=True, **given)
    numbers = {name: x for name, x in options.items() if name != "layout"}
    expected_out, expected_lse = oracle.dense_attention(*whole[1:], **numbers)
    gradients = run_backward(*mine, *(view_of(as_numpy(x), kind, views) for x in (out, lse)), **given)
    expected = dense_gradient(*whole, **numbers)[: 3 + ("sinks" in options)]
    pairs = [(out, expected_out, rows, axis), (lse, expected_lse, rows, axis + 1)]
    pairs += [(x, y, n, axis) for x, y, n in zip(gradients[:3], expected, (rows, rows_k, rows_k), strict=False)]
    for result, wanted, n, along in pairs:
        atol = 4e-5 * np.abs(wanted[np.isfinite(wanted)]).max(initial=1)
        np.testing.assert_allclose(as_numpy(result), part(wanted, n, rank, along), rtol=0, atol=atol)
    for result, wanted in zip(gradients[3:], expected[3:], strict=True):
        np.testing.assert_allclose(as_numpy(result), wanted, rtol=0, atol=4e-5 * np.abs(wanted).max(initial=1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["numpy", "dpnp", "usm"])
@pytest.mark.parametrize("alone", [pytest.param(True, marks=pytest.mark.single), False], ids=["local", "distributed"])
def test_views_in_every_argument(comm, attn_type, kind, alone, seed):
    """Every rank draws the same arrays, and its own views of them."""
    rng, views = np.random.default_rng(seed), np.random.default_rng([seed, WORLD.rank])
    for _ in range(4):
        whole, options = drawn(rng, attn_type)
        hows = rng.choice(["even", "uneven", "gaps", "first", "last"], 2)
        compare(comm, whole, options, attn_type, views, kind, hows, alone)


MASKED = [AttnType.TORCH, AttnType.INTEL_ONEDNN]


@pytest.fixture(params=MASKED, ids=lambda x: x.name)
def masked(request):
    """One of the backends that get options as a dense mask."""
    if request.param not in backends.usable():
        pytest.skip(f"{request.param.name} is not installed")
    return request.param


@pytest.fixture
def built(monkeypatch):
    """A list that grows by the number of keys of every mask that is built."""
    seen, build = [], dense._build
    monkeypatch.setattr(dense, "_build", lambda queue, seq_k, *rest: (seen.append(seq_k), build(queue, seq_k, *rest))[1])
    free_workspace()
    return seen


@pytest.mark.single
def test_masks_are_built_once(masked, built):
    """For forward and gradient; others for other options; and again after the workspace was freed."""
    q, k, v = random_qkv(0, 2, 9, 4, 2, 8)
    padding = np.arange(18).reshape(2, 9) % 3 > 0
    for _ in range(3):
        for options in ({"window_size": (2, 1)}, {"alibi_slopes": [0, 1, 2, 3]}, {"key_padding_mask": padding}):
            out, lse = attention(q, k, v, return_lse=True, attn_type=masked, **options)
            attention_backward(q, q, k, v, out, lse, attn_type=masked, **options)
            np.testing.assert_allclose(out, oracle.dense_attention(q, k, v, **options)[0], rtol=0, atol=1e-5)
    assert built == [9, 9, 9]
    padding[1, 4] ^= True  # the same array, other contents
    out = attention(q, k, v, key_padding_mask=padding, attn_type=masked)
    np.testing.assert_allclose(out, oracle.dense_attention(q, k, v, key_padding_mask=padding)[0], rtol=0, atol=1e-5)
    assert built == [9, 9, 9, 9]
    free_workspace()
    attention(q, k, v, window_size=(2, 1), attn_type=masked)
    assert built == [9, 9, 9, 9, 9]


@pytest.mark.single
def test_masks_respect_the_limit_of_the_workspace(masked, built, monkeypatch):
    monkeypatch.setenv("ULYSSES_DP_WORKSPACE", "1000")
    q, k, v = random_qkv(0, 1, 30, 2, 2, 8)
    for window in ((2, 1), (3, 1), (2, 1)):
        out = attention(q, k, v, window_size=window, attn_type=masked)
        np.testing.assert_allclose(out, oracle.dense_attention(q, k, v, window_size=window)[0], rtol=0, atol=1e-5)
    assert built == [30, 30, 30]


@pytest.mark.single
def test_a_bias_is_read_in_every_call(masked, built):
    """Its numbers may have changed in place; alone, it is the mask."""
    q, k, v = random_qkv(0, 1, 9, 2, 2, 8)
    bias = np.random.default_rng(0).standard_normal((1, 2, 9, 9)).astype(np.float32)
    for options in ({}, {"causal": True}):
        for _ in range(2):
            bias += 1
            bias[..., 3] = -np.inf
            out = attention(q, k, v, bias=bias, attn_type=masked, **options)
            np.testing.assert_allclose(out, oracle.dense_attention(q, k, v, bias=bias, **options)[0], rtol=0, atol=1e-5)
    assert built == [9]


@pytest.mark.single
@pytest.mark.parametrize("size", [-1e4, -1e9, 1e9, np.finfo(np.float32).min])
def test_bias_over_a_whole_row(masked, size):
    """The logarithm of the number of keys, which the weights need, is lost in lse: they are computed without, or refused."""
    q, k, v = random_qkv(1, 1, 12, 2, 2, 8)
    q[:, [3, 7]] = 0  # so that no score is lost in the bias
    bias = np.zeros((1, 1, 12, 12), np.float32)
    bias[:, :, 3], bias[:, :, 5, :6], bias[:, :, 7] = size, -abs(size), size
    bias[:, :, 7, :6] = -np.inf
    options = {"bias": bias, "attn_type": masked}
    out, lse = attention(q, k, v, return_lse=True, **options)
    expected_out, expected_lse = oracle.dense_attention(q, k, v, bias=bias)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-5)
    if masked is AttnType.INTEL_ONEDNN and abs(size) > 16384:
        with pytest.raises(
            NotImplementedError, match=r"the gradient of rows whose lse is beyond 16384 in size; INTEL_SYCL does"
        ):
            attention_backward(q, q, k, v, out, lse, **options)
        return
    atol = 1e-5 if masked is AttnType.TORCH else 2e-3
    gradients = attention_backward(out, q, k, v, out, lse, **options)
    for gradient, wanted in zip(gradients, dense_gradient(out, q, k, v, bias=bias), strict=False):
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=atol)


GIVEN = {
    "softmax_scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "window_size": {"window_size": (3, 2)},
    "softcap": {"softcap": 2.0},
    "alibi_slopes": {"alibi_slopes": [0.5, 1.0]},
    "bias": {"bias": np.ones((1, 1, 9, 9), np.float32)},
    "key_padding_mask": {"key_padding_mask": np.arange(9)[None] < 5},
    "sinks": {"sinks": [0.5, -1.0]},
    "dropout_p": {"dropout_p": 0.2, "seed": 1},
    "seed": {"dropout_p": 0.2, "seed": 1},
    "cu_seqlens_q": {"cu_seqlens_q": [0, 4, 9], "layout": "thd"},
    "cu_seqlens_k": {"cu_seqlens_q": [0, 4, 9], "cu_seqlens_k": [0, 5, 9], "layout": "thd"},
    "key_ranges": {"key_ranges": [(max(row - 2, 0), row + 1) for row in range(9)]},
    "seqused_q": {"cu_seqlens_q": [0, 4, 9], "seqused_q": [3, 5], "layout": "thd"},
    "seqused_k": {"cu_seqlens_q": [0, 4, 9], "seqused_k": [4, 2], "layout": "thd"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_declared(comm, attn_type, name):
    """A backend has an option and is right, or all ranks are told which backend has it."""
    whole, options = random_qkv(2, 1, 9, 2, 2, 8), GIVEN[name]
    whole = [x[0] for x in whole] if "layout" in options else whole
    axis = 0 if "layout" in options else 1
    rows = split(9, comm.size)
    mine = [part(x, rows, comm.rank, axis) for x in whole]
    if attn_type is USER or name in backends.backend_for(attn_type).has:
        if attn_type is USER and name in ("dropout_p", "seed"):
            pytest.skip("the user's function of the tests has no dropout")
        out = ulysses_attention(*mine, comm=comm, attn_type=attn_type, **options)
        expected, _ = oracle.dense_attention(*whole, **{key: x for key, x in options.items() if key != "layout"})
        np.testing.assert_allclose(out, part(expected, rows, comm.rank, axis), rtol=0, atol=1e-5)
        return
    results = outcomes(comm, lambda: ulysses_attention(*mine, comm=comm, attn_type=attn_type, **options))
    ((error, message),) = set(results)
    assert error is NotImplementedError
    assert f"attn_type {attn_type.name} does not support " in message
    assert message.endswith("; INTEL_SYCL does")
