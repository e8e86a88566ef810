"""The gradient that the backward passes are compared with, against differences of the oracle's attention and PyTorch."""

from itertools import combinations

import numpy as np
import oracle
import pytest
from checks import OPTIONS, some_options
from gradients import central_difference, dense_gradient
from helpers import random_qkv

pytestmark = pytest.mark.single

PACKED = {"cu_seqlens_q": np.array([0, 3, 3, 5]), "cu_seqlens_k": np.array([0, 2, 4, 7])}


def assert_gradient(whole, options):
    """All elements of the gradients against central differences."""
    rng = np.random.default_rng(1)
    dout, dlse = (rng.standard_normal(x.shape) for x in oracle.dense_attention(*whole, **options))
    sinks = options.get("sinks")
    arrays = [*whole] if sinks is None else [*whole, sinks.astype(np.float64)]

    def loss(q, k, v, *sinks):
        out, lse = oracle.dense_attention(q, k, v, **options | dict(zip(["sinks"], sinks, strict=False)))
        return np.vdot(dout, out) + np.vdot(dlse, np.where(np.isneginf(lse), 0, lse))

    gradients = dense_gradient(dout, *whole, dlse=dlse, **options)
    for number, x in enumerate(arrays):
        assert gradients[number].shape == x.shape
        differences = np.reshape([central_difference(loss, arrays, number, index) for index in np.ndindex(x.shape)], x.shape)
        np.testing.assert_allclose(gradients[number], differences, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "names", [(), *((name,) for name in OPTIONS), ("alibi of batch",), ("causal", "sinks", "dropout"), OPTIONS], ids=" ".join
)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_differences(names, form):
    batch, seq, seq_k = (2, 4, 5) if form == "dense" else (1, 5, 7)
    if form == "packed" and "alibi of batch" in names:
        pytest.skip("packed sequences are one batch")
    q, k, v = random_qkv(0, batch, seq, 4, 2, 2, "float64", seq_k)
    options = some_options(names, batch, 4, seq, seq_k, dtype="float64")
    if "window" in names:
        options["window_size"] = (1, 1)
    if form == "packed":
        assert_gradient((q[0], k[0], v[0]), PACKED | options)
    else:
        assert_gradient((q, k, v), {"softmax_scale": 0.9} | options)


@pytest.mark.parametrize("names", list(combinations(OPTIONS, 2)), ids=" ".join)
def test_differences_of_pairs(names):
    assert_gradient(random_qkv(2, 1, 3, 2, 1, 2, "float64", 4), some_options(names, 1, 2, 3, 4, dtype="float64"))


def test_hidden_values_and_rows_reach_nothing():
    """As if the keys that are hidden from all, and the queries that see nothing, held zeros."""
    q, k, v = random_qkv(3, 2, 6, 4, 2, 3, "float64", 4)
    dout = np.random.default_rng(4).standard_normal(q.shape)
    options = {"key_padding_mask": np.array([[True, False, True, True], [False] * 4]), "causal": True}
    clean = [x.copy() for x in (dout, q, k, v)]
    for x, hidden in zip((dout, q, k, v), 2 * [np.arange(6) < [[2], [6]]] + 2 * [~options["key_padding_mask"]], strict=True):
        x[hidden] = np.nan
    gradients = dense_gradient(dout, q, k, v, **options)
    for gradient, expected in zip(gradients, dense_gradient(*clean, **options), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ["none", "causal", "window", "bias", "alibi", "padding", "softcap", "sinks"])
def test_pytorch(name, kv_heads):
    """scaled_dot_product_attention where it has the option, else the formula in PyTorch; its autograd in both cases."""
    torch = pytest.importorskip("torch")
    seq, heads = 11, 4
    q, k, v = random_qkv(5, 2, seq, heads, kv_heads, 8, "float64")
    rng = np.random.default_rng(6)
    dout, bias, sinks = rng.standard_normal(q.shape), rng.standard_normal((2, heads, seq, seq)), rng.standard_normal(heads)
    slopes, padding = np.array([0.5, 0.25, -0.125, 1.0]), np.array([[True] * 9 + [False] * 2, [True] * 11])
    distance = np.arange(seq)[:, None] - np.arange(seq)
    options, mask = {
        "none": ({}, None),
        "causal": ({"causal": True}, distance >= 0),
        "window": ({"window_size": (5, 3)}, (distance <= 5) & (distance >= -3)),
        "bias": ({"bias": bias}, bias),
        "alibi": ({"alibi_slopes": slopes}, -slopes[:, None, None] * abs(distance)),
        "padding": ({"key_padding_mask": padding}, padding[:, None, None]),
        "softcap": ({"softcap": 1.5}, None),
        "sinks": ({"sinks": sinks}, None),
    }[name]
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v, sinks)]
    query, key, value = (x.transpose(1, 2) for x in tensors[:3])
    if name in ("softcap", "sinks"):
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        score = query @ key.transpose(2, 3) / 8**0.5
        if name == "softcap":
            score = 1.5 * torch.tanh(score / 1.5)
        else:
            score = torch.cat([score, tensors[3].reshape(1, heads, 1, 1).expand(2, heads, seq, 1)], dim=3)
        out = torch.softmax(score, dim=3)[..., :seq] @ value
    else:
        mask = None if mask is None else torch.from_numpy(mask)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=kv_heads != heads)
    out.backward(torch.from_numpy(dout).transpose(1, 2))
    for gradient, x in zip(dense_gradient(dout, q, k, v, **options), tensors[: 4 if name == "sinks" else 3], strict=False):
        np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=0, atol=1e-13)
