"""The adapter to PyTorch's autograd in scripts/torch_autograd.py."""

import importlib.util

import numpy as np
import pytest
from checks import OPTIONS, some_options
from gradients import dense_gradient
from helpers import SPLITS, WORLD, outcomes, part, random_qkv, split
from test_scripts import ROOT, mpiexec

torch = pytest.importorskip("torch")

SCRIPT = ROOT / "scripts" / "torch_autograd.py"
COMBINATIONS = [
    (),
    ("causal",),
    ("sinks",),
    ("causal", "window", "alibi", "sinks"),
    ("softcap", "bias", "mask", "dropout"),
    OPTIONS,
]


@pytest.fixture(scope="module")
def ulysses():
    """The function of the script."""
    spec = importlib.util.spec_from_file_location("torch_autograd", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ulysses


class OfRank(torch.autograd.Function):
    """The rows of this rank of a tensor that all ranks have; its gradient is that of all ranks."""

    @staticmethod
    def forward(_ctx, x, rows):
        return part(x, rows, WORLD.rank).clone()

    @staticmethod
    def backward(_ctx, gradient):
        return torch.cat([torch.from_numpy(x) for x in WORLD.allgather(gradient.numpy())], dim=1), None


class OfAll(torch.autograd.Function):
    """The rows of all ranks, for a loss that every rank computes alike."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return torch.cat([torch.from_numpy(x) for x in WORLD.allgather(x.numpy())], dim=1)

    @staticmethod
    def backward(ctx, gradient):
        return part(gradient, ctx.rows, WORLD.rank), None


def as_tensors(options):
    """Options with tensors for arrays."""
    return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


def rows_of(comm, whole, rows, dtype=None):
    """This rank's rows as tensors that require a gradient."""
    return [torch.from_numpy(part(x, rows, comm.rank)).to(dtype).clone().requires_grad_() for x in whole]


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: " ".join(names) or "none")
@pytest.mark.parametrize("how", SPLITS)
def test_gradients(comm, ulysses, names, how):
    rows = split(11, comm.size, how)
    whole, options = random_qkv(0, 2, 11, 4, 2, 8, "float64"), some_options(names, 2, 4, 11, 11, dtype="float64")
    dout = np.random.default_rng(1).standard_normal(whole[0].shape)
    arrays, given = rows_of(comm, whole, rows), as_tensors(options)
    if "sinks" in given:
        arrays.append(given["sinks"].requires_grad_())
    out = ulysses(*arrays[:3], comm, **given)
    out.backward(torch.from_numpy(part(dout, rows, comm.rank)))
    for number, (x, expected) in enumerate(zip(arrays, dense_gradient(dout, *whole, **options), strict=False)):
        expected = part(expected, rows, comm.rank) if number < 3 else expected
        np.testing.assert_allclose(x.grad, expected, rtol=0, atol=1e-12 * np.abs(expected).max(initial=1))


@pytest.mark.parametrize("names", [("causal",), OPTIONS], ids=" ".join)
def test_gradcheck(comm, ulysses, names):
    """All ranks move the same element of the whole arrays at a time."""
    rows = split(3, comm.size, "uneven")
    whole = [torch.from_numpy(x).requires_grad_() for x in random_qkv(2, 1, 3, 2, 1, 2, "float64")]
    options = as_tensors(some_options(names, 1, 2, 3, 3, dtype="float64"))
    if "sinks" in options:
        whole.append(options.pop("sinks").requires_grad_())

    def function(q, k, v, sinks=None):
        mine = (OfRank.apply(x, rows) for x in (q, k, v))
        return OfAll.apply(ulysses(*mine, comm, sinks=sinks, **options), rows)

    assert outcomes(comm, lambda: torch.autograd.gradcheck(function, tuple(whole))) == [None] * comm.size


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_dtypes(comm, ulysses, dtype):
    """And a gradient of the result that is one number with strides of 0."""
    rows, whole = split(13, comm.size), random_qkv(3, 2, 13, 4, 2, 16)
    arrays = rows_of(comm, whole, rows, getattr(torch, dtype))
    ulysses(*arrays, comm, causal=True).sum().backward()
    numbers = [torch.from_numpy(x).to(arrays[0].dtype).double().numpy() for x in whole]
    tolerance = {"float32": 2e-5, "float64": 1e-11, "float16": 3e-3, "bfloat16": 2e-2}[dtype]
    for x, expected in zip(arrays, dense_gradient(np.ones(whole[0].shape), *numbers, causal=True)[:3], strict=True):
        assert x.grad.dtype == x.dtype
        atol = tolerance * np.abs(expected).max(initial=1)
        np.testing.assert_allclose(x.grad.double(), part(expected, rows, comm.rank), rtol=0, atol=atol)


def test_layers_and_a_second_backward(comm, ulysses):
    """A layer after the other, whose graph is kept."""
    rows = split(9, comm.size)
    q, k, v = rows_of(comm, random_qkv(4, 1, 9, 2, 2, 8, "float64"), rows)
    loss = ulysses(ulysses(q, k, v, comm, causal=True), k, v, comm).square().sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in (q, k, v)]
    loss.backward()
    for x, gradient in zip((q, k, v), first, strict=True):
        np.testing.assert_array_equal(x.grad, 2 * gradient)


def test_only_some_gradients(comm, ulysses):
    rows, whole = split(9, comm.size), random_qkv(5, 1, 9, 2, 2, 8, "float64")
    q, k, v = rows_of(comm, whole, rows)
    ulysses(q.detach(), k, v.detach(), comm).sum().backward()
    assert (q.grad, v.grad) == (None, None)
    expected = dense_gradient(np.ones(whole[0].shape), *whole)[1]
    np.testing.assert_allclose(k.grad, part(expected, rows, comm.rank), rtol=0, atol=1e-12)


def test_without_a_gradient(comm, ulysses):
    q, k, v = rows_of(comm, random_qkv(6, 1, 9, 2, 2, 8), split(9, comm.size))
    with torch.no_grad():
        assert not ulysses(q, k, v, comm).requires_grad
    assert ulysses(q, k, v, comm).requires_grad


def test_what_has_no_gradient(comm, ulysses):
    """Of the gradient there is none, and of biases and slopes there is none."""
    q, k, v = rows_of(comm, random_qkv(7, 1, 9, 2, 2, 8), split(9, comm.size))
    for name, x in (("alibi_slopes", torch.ones(2)), ("bias", torch.ones(1, 2, 1, 1))):
        with pytest.raises(NotImplementedError, match=name):
            ulysses(q, k, v, comm, **{name: x.requires_grad_()})
    loss = ulysses(q, k, v, comm).sum()
    with pytest.raises(NotImplementedError, match="requires a gradient"):
        torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.single
@pytest.mark.parametrize("ranks", [1, 2])
def test_script(ranks):
    text = mpiexec(ranks, SCRIPT)
    assert text.count("differs from PyTorch's by at most") == 3 * ranks
    assert "FAILED" not in text
