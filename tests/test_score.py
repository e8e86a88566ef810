"""Scores of any size: finite biases that hide a whole row, as masks of other libraries do, and soft caps beside large scales.

The weights of such rows are known without an oracle: rounding makes the scores of all keys with the same bias equal.
"""

import numpy as np
import pytest
from helpers import random_qkv
from oracle import TOLERANCE

from ulysses_dp import attention, attention_backward
from ulysses_dp.reference import dense_attention

pytestmark = pytest.mark.single

LOWEST = float(np.finfo("float32").min)
SEQ, KEYS = 40, 53
# (dtype of q, k and v, dtype of the bias, bias)
BIASES = [
    *(("float32", "float32", x) for x in (-1e9, -1e30, 0.7 * LOWEST, LOWEST, 1e9, -LOWEST)),
    *(("float32", "float64", x) for x in (-1e9, LOWEST, -1e300, 1e300)),
    *(("float64", "float64", x) for x in (-1e18, LOWEST, 1e18, float(np.finfo("float64").min))),
]


def gradient(p, dout, q, k, v, scale):
    """dq, dk and dv of known weights, (batch, heads, seq_q, seq_k) in float64."""
    dout, q, k, v = (np.float64(x).swapaxes(1, 2) for x in (dout, q, k, v))
    out = p @ v
    ds = p * (dout @ v.swapaxes(2, 3) - (dout * out).sum(-1, keepdims=True))
    grads = scale * ds @ k, scale * ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout
    return out.swapaxes(1, 2), *(x.swapaxes(1, 2) for x in grads)


def check(p, arrays, dtype, rows, **options):
    """Compare these rows of out, and the gradients if only these rows have a cotangent."""
    dout, q, k, v = arrays
    dout = np.where(np.isin(np.arange(SEQ), rows)[:, None, None], dout, 0).astype(dtype)
    out, lse = attention(q, k, v, return_lse=True, **options)
    grads = attention_backward(dout, q, k, v, out, lse, **options)
    expected_out, *expected = gradient(p, dout, q, k, v, q.shape[3] ** -0.5)
    np.testing.assert_allclose(out[:, rows], expected_out[:, rows], rtol=0, atol=TOLERANCE[dtype])
    for result, wanted in zip(grads[:3], expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=4 * TOLERANCE[dtype])
    return lse


def inputs(dtype, head_dim):
    arrays = random_qkv(0, 1, SEQ, 2, 2, head_dim, dtype, KEYS)
    return np.random.default_rng(1).standard_normal(arrays[0].shape).astype(dtype), *arrays


@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize(("dtype", "bias_dtype", "value"), BIASES)
def test_rows_of_one_large_bias(dtype, bias_dtype, value, head_dim):
    """All keys that such a row sees have the same weight, and lse is right to its last bit."""
    bias = np.zeros((1, 1, SEQ, KEYS), bias_dtype)
    rows = [3, 17, 39]
    bias[:, :, rows] = value
    lse = check(np.full((1, 2, SEQ, KEYS), 1 / KEYS), inputs(dtype, head_dim), dtype, rows, bias=bias)
    rounded = np.clip(value, np.finfo(dtype).min, np.finfo(dtype).max).astype(dtype)
    np.testing.assert_allclose(lse[..., rows], rounded + np.log(KEYS).astype(dtype), rtol=2 * np.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "value"), [("float32", 0.5 * LOWEST), ("float32", -1e9), ("float64", -1e300)])
def test_large_biases_of_two_sizes(dtype, value):
    """Only the keys with the larger one count, beside hidden ones too, in whatever block they lie."""
    bias = np.full((1, 1, SEQ, KEYS), 1.5 * value, dtype)
    seen = np.arange(KEYS) % 10 == 5
    bias[..., seen] = value
    bias[..., 7] = -np.inf
    p = np.broadcast_to(seen / seen.sum(), (1, 2, SEQ, KEYS))
    check(p, inputs(dtype, 16), dtype, list(range(SEQ)), bias=bias)


def test_large_biases_with_other_options():
    """A causal mask and padding leave the weights of what they let through equal; a sink of the same size takes part."""
    dtype, value = "float32", np.float32(-1e9)
    padding = np.ones((1, KEYS), bool)
    padding[:, 4] = False
    seen = np.tri(SEQ, KEYS, KEYS - SEQ) * padding
    options = {"bias": np.full((1, 1, SEQ, KEYS), value, dtype), "causal": True, "key_padding_mask": padding}
    arrays = inputs(dtype, 64)
    for sinks in (None, np.full(2, value)):
        p = np.broadcast_to(seen / (seen.sum(-1, keepdims=True) + (sinks is not None)), (1, 2, SEQ, KEYS))
        check(p, arrays, dtype, list(range(SEQ)), sinks=sinks, **options)


def test_rows_beside_a_large_one_stay_exact():
    """Rows of a tile with a large lse are computed by their own maximum, too: as exact as before."""
    dout, q, k, v = inputs("float32", 64)
    bias = np.random.default_rng(2).standard_normal((1, 2, SEQ, KEYS)).astype("float32")
    options = {"softcap": 3.0, "alibi_slopes": np.float32([0.1, 0.2]), "dropout_p": 0.2, "seed": 5}
    out, lse = attention(q, k, v, bias=bias, return_lse=True, **options)
    expected = attention_backward(dout, q, k, v, out, lse, bias=bias, **options)
    bias[:, :, 20] = -1e9
    dout[:, 20] = 0
    out, lse = attention(q, k, v, bias=bias, return_lse=True, **options)
    dq, *_ = attention_backward(dout, q, k, v, out, lse, bias=bias, **options)
    others = np.arange(SEQ) != 20
    np.testing.assert_allclose(dq[:, others], expected[0][:, others], rtol=0, atol=1e-5)
    reference = dense_attention(q, k, v, bias=np.where(others[:, None], bias, 0), **options)[0]
    np.testing.assert_allclose(out[:, others], reference[:, others], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("scale", "softcap"), [(1e9, 1e-30), (1e30, 1e-30), (1e-30, 1e30), (-1e9, 1e-30)])
def test_scale_and_soft_cap_of_any_size(dtype, scale, softcap):
    """Each is in range; nothing that they make together is nan, and the result is that of the definition."""
    dout, q, k, v = inputs(dtype, 16)
    k[:, 5] = 0  # 0 · inf would be nan
    options = {"softmax_scale": scale, "softcap": softcap}
    out, lse = attention(q, k, v, return_lse=True, **options)
    expected_out, expected_lse = dense_attention(q, k, v, **options)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=TOLERANCE[dtype])
    if scale * 10 < softcap:  # beyond, the cap is a step, which has no derivative
        for grad in attention_backward(dout, q, k, v, out, lse, **options):
            assert np.isfinite(grad).all()


def test_gradient_by_parts_of_the_keys():
    """lse is that of all keys, and so large that the kernels find the maximum of their keys again: the parts add up."""
    dout, q, k, v = inputs("float32", 16)
    bias = np.full((1, 1, SEQ, KEYS), 6000, "float32")
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    dq, dk, dv = attention_backward(dout, q, k, v, out, lse, bias=bias)
    first, second = (
        attention_backward(dout, q, k[:, part], v[:, part], out, lse, bias=bias[..., part])
        for part in (slice(0, 20), slice(20, None))
    )
    tolerance = 10 * 6000 * np.finfo("float32").eps  # as exact as lse
    np.testing.assert_allclose(first[0] + second[0], dq, rtol=0, atol=tolerance)
    for result, whole in zip(zip(first[1:], second[1:], strict=True), (dk, dv), strict=True):
        np.testing.assert_allclose(np.concatenate(result, axis=1), whole, rtol=0, atol=tolerance)
