"""A second oracle for the options that PyTorch's scaled_dot_product_attention has, where PyTorch is installed."""

import numpy as np
import pytest
from helpers import random_qkv

from ulysses_dp import attention

torch = pytest.importorskip("torch")

from ulysses_dp.torch import attention as differentiable_attention  # noqa: E402

pytestmark = pytest.mark.single

HEADS, SEQ = 4, 37
DISTANCE = np.arange(SEQ)[:, None] - np.arange(SEQ)
SLOPES = np.array([0.5, 0.25, -0.125, 1.0], np.float32)
BIAS = np.random.default_rng(0).standard_normal((2, HEADS, SEQ, SEQ)).astype(np.float32)
BIASES = {f"bias {shape}": shape for shape in ((2, HEADS, SEQ, SEQ), (1, HEADS, 1, SEQ), (2, 1, SEQ, 1), (1, 1, SEQ, SEQ))}
PADDING = np.random.default_rng(1).random((2, SEQ)) < 0.7

# ours, and the mask of PyTorch: True or added to the scores
OPTIONS = {
    "none": ({}, None),
    "causal": ({"causal": True}, DISTANCE >= 0),
    "window": ({"window_size": (5, 3)}, (DISTANCE <= 5) & (DISTANCE >= -3)),
    "causal window": ({"window_size": (7, -1), "causal": True}, (DISTANCE <= 7) & (DISTANCE >= 0)),
    "bias": ({"bias": BIAS}, BIAS),
    "alibi": ({"alibi_slopes": SLOPES}, -SLOPES[:, None, None] * abs(DISTANCE).astype(np.float32)),
    "padding": ({"key_padding_mask": PADDING}, PADDING[:, None, None, :]),
}


def theirs(q, k, v, mask, **options):
    """PyTorch's attention of (batch, seq, heads, head_dim) arrays."""
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else torch.from_numpy(mask)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2).numpy()


@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, scale, kv_heads):
    q, k, v = random_qkv(5, 2, SEQ, HEADS, kv_heads, 16)
    options, mask = OPTIONS[name]
    expected = theirs(q, k, v, mask, scale=scale, enable_gqa=kv_heads != HEADS)
    np.testing.assert_allclose(attention(q, k, v, softmax_scale=scale, **options), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(dtype):
    arrays = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in random_qkv(6, 2, SEQ, HEADS, HEADS, 64)]
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in arrays)).transpose(1, 2)
    out = attention(*arrays)
    assert out.dtype == arrays[0].dtype
    # half a unit in the last place of the result
    assert ((out.float() - expected).abs() <= expected.abs() * torch.finfo(out.dtype).eps * 0.51 + 1e-6).all()


@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("name", [*OPTIONS, *BIASES, "slopes"])
def test_gradients(name, kv_heads):
    """Of q, k, v, and of what is added to the scores, which is a mask that has a gradient to PyTorch; in float64."""
    arrays = [torch.from_numpy(x).requires_grad_() for x in random_qkv(7, 2, SEQ, HEADS, kv_heads, 8, "float64")]
    dout = torch.from_numpy(np.random.default_rng(7).standard_normal(arrays[0].shape))
    added = []
    if name == "slopes":
        added = [torch.from_numpy(SLOPES).double().requires_grad_()]
        options, mask = {"alibi_slopes": added[0]}, -added[0][:, None, None] * torch.from_numpy(abs(DISTANCE))
    elif name in BIASES:
        added = [torch.from_numpy(np.random.default_rng(8).standard_normal(BIASES[name])).requires_grad_()]
        options, mask = {"bias": added[0]}, added[0]
    else:
        options, mask = OPTIONS[name]
        mask = None if mask is None else torch.from_numpy(mask)
        mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    options = {"softmax_scale": 0.4} | options
    ours = differentiable_attention(*arrays, **options)
    qkv = [x.transpose(1, 2) for x in arrays]
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv, mask, scale=0.4, enable_gqa=kv_heads != HEADS)
    results = [torch.autograd.grad(x, [*arrays, *added], dout) for x in (ours, expected.transpose(1, 2))]
    for x, y in zip((ours.detach(), *results[0]), (expected.transpose(1, 2).detach(), *results[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
