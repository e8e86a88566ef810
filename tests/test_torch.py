"""Attention as an operation of PyTorch's autograd and compiler."""

import numpy as np
import pytest
from checks import OPTIONS, some_options
from gradients import dense_gradient
from helpers import SPLITS, WORLD, needs_ranks, outcomes, part, random_qkv, split
from oracle import dense_attention
from test_scripts import ROOT, mpiexec

torch = pytest.importorskip("torch")

import ulysses_dp  # noqa: E402
from ulysses_dp.torch import attention, ulysses_attention  # noqa: E402

SCRIPT = ROOT / "scripts" / "torch_autograd.py"
COMBINATIONS = [
    (),
    ("causal",),
    ("sinks",),
    ("causal", "window", "alibi", "sinks"),
    ("softcap", "bias", "mask", "dropout"),
    OPTIONS,
]


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
def test_gradients(comm, names, how):
    rows = split(11, comm.size, how)
    whole, options = random_qkv(0, 2, 11, 4, 2, 8, "float64"), some_options(names, 2, 4, 11, 11, dtype="float64")
    dout, dlse = (np.random.default_rng(1).standard_normal(shape) for shape in (whole[0].shape, (2, 4, 11)))
    arrays, given = rows_of(comm, whole, rows), as_tensors(options)
    of_options = [given[name].requires_grad_() for name in ("sinks", "alibi_slopes", "bias") if name in given]
    results = ulysses_attention(*arrays[:3], comm=comm, return_lse=True, **given)
    torch.autograd.backward(results, [torch.from_numpy(part(x, rows, comm.rank, axis)) for x, axis in ((dout, 1), (dlse, 2))])
    *grads, dsinks = dense_gradient(dout, *whole, dlse=dlse, **options)
    dslopes, dbias = dense_gradient(dout, *whole, dlse=dlse, of_scores=True, **options)
    by_name = {"sinks": dsinks, "alibi_slopes": dslopes.sum(axis=0), "bias": dbias}
    expected_of_options = [x for name, x in by_name.items() if name in given]
    pairs = [(x, part(y, rows, comm.rank)) for x, y in zip(arrays, grads, strict=True)]
    for x, expected in pairs + list(zip(of_options, expected_of_options, strict=True)):
        np.testing.assert_allclose(x.grad, expected, rtol=0, atol=1e-12 * np.abs(expected).max(initial=1))


@pytest.mark.parametrize("names", [("causal",), OPTIONS], ids=" ".join)
def test_gradcheck(comm, names):
    """All ranks move the same element of the whole arrays at a time."""
    rows = split(3, comm.size, "uneven")
    whole = [torch.from_numpy(x).requires_grad_() for x in random_qkv(2, 1, 3, 2, 1, 2, "float64")]
    options = as_tensors(some_options(names, 1, 2, 3, 3, dtype="float64"))
    names = [name for name in ("sinks", "alibi_slopes", "bias") if name in options]
    whole += [options.pop(name).requires_grad_() for name in names]

    def function(q, k, v, *others):
        mine = (OfRank.apply(x, rows) for x in (q, k, v))
        return OfAll.apply(ulysses_attention(*mine, comm=comm, **dict(zip(names, others, strict=True)), **options), rows)

    assert outcomes(comm, lambda: torch.autograd.gradcheck(function, tuple(whole))) == [None] * comm.size


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_dtypes(comm, dtype):
    """And a gradient of the result that is one number with strides of 0."""
    rows, whole = split(13, comm.size), random_qkv(3, 2, 13, 4, 2, 16)
    arrays = rows_of(comm, whole, rows, getattr(torch, dtype))
    ulysses_attention(*arrays, comm=comm, causal=True).sum().backward()
    numbers = [torch.from_numpy(x).to(arrays[0].dtype).double().numpy() for x in whole]
    tolerance = {"float32": 2e-5, "float64": 1e-11, "float16": 3e-3, "bfloat16": 2e-2}[dtype]
    for x, expected in zip(arrays, dense_gradient(np.ones(whole[0].shape), *numbers, causal=True)[:3], strict=True):
        assert x.grad.dtype == x.dtype
        atol = tolerance * np.abs(expected).max(initial=1)
        np.testing.assert_allclose(x.grad.double(), part(expected, rows, comm.rank), rtol=0, atol=atol)


def test_layers_and_a_second_backward(comm):
    """A layer after the other, whose graph is kept."""
    rows = split(9, comm.size)
    q, k, v = rows_of(comm, random_qkv(4, 1, 9, 2, 2, 8, "float64"), rows)
    loss = ulysses_attention(ulysses_attention(q, k, v, comm=comm, causal=True), k, v, comm=comm).square().sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in (q, k, v)]
    loss.backward()
    for x, gradient in zip((q, k, v), first, strict=True):
        np.testing.assert_array_equal(x.grad, 2 * gradient)


def test_only_some_gradients(comm):
    rows, whole = split(9, comm.size), random_qkv(5, 1, 9, 2, 2, 8, "float64")
    q, k, v = rows_of(comm, whole, rows)
    ulysses_attention(q.detach(), k, v.detach(), comm=comm).sum().backward()
    assert (q.grad, v.grad) == (None, None)
    expected = dense_gradient(np.ones(whole[0].shape), *whole)[1]
    np.testing.assert_allclose(k.grad, part(expected, rows, comm.rank), rtol=0, atol=1e-12)


def test_without_a_gradient(comm):
    q, k, v = rows_of(comm, random_qkv(6, 1, 9, 2, 2, 8), split(9, comm.size))
    with torch.no_grad():
        assert not ulysses_attention(q, k, v, comm=comm).requires_grad
    assert ulysses_attention(q, k, v, comm=comm).requires_grad


def test_what_has_no_gradient(comm):
    """Of the gradient there is none."""
    q, k, v = rows_of(comm, random_qkv(7, 1, 9, 2, 2, 8), split(9, comm.size))
    loss = ulysses_attention(q, k, v, comm=comm).sum()
    with pytest.raises(NotImplementedError, match="requires a gradient"):
        torch.autograd.grad(loss, q, create_graph=True)


@needs_ranks
def test_gradients_of_options_on_some_ranks_only(comm):
    """All ranks hear of it."""
    q, k, v = rows_of(comm, random_qkv(7, 1, 9, 2, 2, 8), split(9, comm.size))
    for name, x in (("alibi_slopes", torch.ones(2)), ("bias", torch.ones(1, 2, 1, 1))):
        loss = ulysses_attention(q, k, v, comm=comm, **{name: x.requires_grad_(comm.rank == 0)}).sum()
        for error, message in outcomes(comm, loss.backward):
            assert error is ValueError
            assert "_grad must be the same on all ranks" in message


@needs_ranks
def test_gradients_on_some_ranks_only(comm):
    """The ranks that record a gradient would wait for the others in the backward pass."""
    arrays = [x.requires_grad_(comm.rank > 0) for x in rows_of(comm, random_qkv(7, 1, 9, 2, 2, 8), split(9, comm.size))]
    errors = outcomes(comm, lambda: ulysses_attention(*arrays, comm=comm))
    assert {error for error, _ in errors} == {ValueError}


def test_what_is_no_tensor(comm):
    q, k, v = rows_of(comm, random_qkv(7, 1, 9, 2, 2, 8), split(9, comm.size))
    errors = outcomes(comm, lambda: ulysses_attention(q, None if comm.rank == 0 else k, v, comm=comm))
    assert {error for error, _ in errors} == {TypeError}


def both(q, k, v, sinks, bias, slopes, mask, comm):
    """Two calls that depend on each other and one that does not, with some of everything between them."""
    first = ulysses_attention(q.sin(), k, v, comm=comm, causal=True, sinks=sinks, window_size=(5, -1))
    second = ulysses_attention(first, k.cos(), first, comm=comm, key_padding_mask=mask, dropout_p=0.25, seed=3)
    other, lse = ulysses_attention(q * 2, k, v, comm=comm, layout="bshd", return_lse=True, bias=bias, alibi_slopes=slopes)
    _, alone = ulysses_attention(q, k.exp(), v, comm=comm, causal=True, return_lse=True)
    return (second.square() + other.sin()).sum() + lse.square().sum() + alone.sum()


def test_compiled(comm):
    """One graph, in which every call is an operator; the same numbers as without the compiler."""
    rows = split(9, comm.size, "uneven")
    arrays = rows_of(comm, random_qkv(8, 2, 9, 4, 4, 8, "float64"), rows)
    arrays += [torch.ones(shape).double().requires_grad_() for shape in (4, (1, 1, 9, 9), (2, 4))]
    mask = torch.from_numpy(np.random.default_rng(8).random((2, 9)) < 0.8)
    expected = [both(*arrays, mask, comm)]
    expected += torch.autograd.grad(expected[0], arrays)
    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = [compiled(*arrays, mask, comm)]
        results += torch.autograd.grad(results[0], arrays)
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_allclose(result.detach(), wanted.detach(), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arrays, mask, comm), expected[0].detach())


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_the_largest_scores(comm, compiled):
    """They come last, and change nothing else; there is no gradient of them."""
    whole, rows = random_qkv(11, 2, 9, 4, 2, 8, "float64"), split(9, comm.size, "uneven")
    arrays, how = rows_of(comm, whole, rows), {"comm": comm, "causal": True}

    def attend(q, k, v):
        return ulysses_attention(q, k, v, return_max_logit=True, **how)

    torch.compiler.reset()
    function = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    out, largest = function(*arrays)
    assert not largest.requires_grad
    np.testing.assert_allclose(largest, dense_attention(*whole, causal=True, max_logit=True)[2], rtol=0, atol=1e-12)
    expected = ulysses_attention(*arrays, **how)
    torch.testing.assert_close(out, expected)
    for x, y in zip(*(torch.autograd.grad(z.square().sum(), arrays) for z in (out, expected)), strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        torch.testing.assert_close(function(*arrays)[1], largest)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("place", ["start", "end"])
def test_replicated_tokens(comm, place, compiled):
    """They get the gradient of all ranks; the loss has what comes of them once."""
    rows, n = split(9, comm.size, "uneven"), 3
    whole, rng = random_qkv(12, 2, 9 + n, 4, 2, 8, "float64"), np.random.default_rng(12)
    dout, dlse = rng.standard_normal((2, 9 + n, 4, 8)), rng.standard_normal((2, 9 + n, 4))
    of_tokens, of_ranks = (slice(n), slice(n, None)) if place == "start" else (slice(9, None), slice(9))
    arrays = rows_of(comm, [x[:, of_ranks] for x in whole], rows)
    tokens = [torch.from_numpy(x[:, of_tokens].copy()).requires_grad_() for x in whole]
    bias = torch.zeros(1, 4, 1, 9 + n).double().requires_grad_()

    def attend(q, k, v, tokens, bias):
        how = {"comm": comm, "causal": True, "bias": bias, "replicated": tokens, "replicated_at": place}
        return ulysses_attention(q, k, v, return_lse=True, return_max_logit=True, **how)

    torch.compiler.reset()
    function = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    *results, largest = function(*arrays, tokens, bias)
    expected = dense_attention(*whole, causal=True, max_logit=True)
    np.testing.assert_allclose(largest, expected[2], rtol=0, atol=1e-12)

    def parts(x):
        return part(x[:, of_ranks], rows, comm.rank), x[:, of_tokens]

    of_lse = [x.swapaxes(1, 2) for x in parts(expected[1].swapaxes(1, 2))]
    for x, y in zip((*results[::2], *results[1::2]), (*parts(expected[0]), *of_lse), strict=True):
        np.testing.assert_allclose(x.detach(), y, rtol=0, atol=1e-12)
    of_out, cotangents_of_lse = parts(dout), [x.swapaxes(1, 2) for x in parts(dlse)]
    cotangents = [torch.from_numpy(x.copy()) for pair in zip(of_out, cotangents_of_lse, strict=True) for x in pair]
    grads = torch.autograd.grad(results, [*arrays, *tokens, bias], cotangents)
    dense = dense_gradient(dout, *whole, causal=True, dlse=dlse.swapaxes(1, 2))[:3]
    dbias = dense_gradient(dout, *whole, causal=True, dlse=dlse.swapaxes(1, 2), bias=np.zeros((1, 4, 1, 12)), of_scores=True)[1]
    of_rows, of_all = zip(*map(parts, dense), strict=True)
    for x, y in zip(grads, (*of_rows, *of_all, dbias.sum(axis=(0, 2), keepdims=True)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y).max(initial=1))


def test_what_replicated_tokens_must_be(comm):
    """Refused on all ranks, whatever is wrong on one."""
    q, k, v = rows_of(comm, random_qkv(7, 1, 9, 2, 2, 8), split(9, comm.size))
    for bad in ((q, k), "tokens", (q, None, v)):
        given = bad if comm.rank == 0 else tuple(x.detach() for x in (q, k, v))
        errors = outcomes(comm, lambda given=given: ulysses_attention(q, k, v, comm=comm, replicated=given))
        assert all(error in (TypeError, ValueError) and "replicated" in message for error, message in errors)
    out, out_r = ulysses_attention(q, k, v, comm=comm, replicated=[torch.ones(1, 1, 2, 8)] * 3)
    assert (out.requires_grad, out_r.requires_grad) == (True, True)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_arrays_travel_as_8_bits(comm, compiled):
    """There and back, forward and backward: the bits of the functions that autograd calls."""
    mine = rows_of(comm, random_qkv(13, 1, 9, 4, 2, 8), split(9, comm.size, "uneven"))

    def attend(q, k, v):
        return ulysses_attention(q, k, v, comm=comm, causal=True, wire_dtype="int8")

    torch.compiler.reset()
    out = (torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend)(*mine)
    grads = torch.autograd.grad(out, mine, torch.ones_like(out))
    how, arrays = {"comm": comm, "causal": True, "wire_dtype": "int8"}, [x.detach().numpy() for x in mine]
    expected, lse = ulysses_dp.ulysses_attention(*arrays, return_lse=True, **how)
    gradients = ulysses_dp.ulysses_attention_backward(np.ones_like(expected), *arrays, expected, lse, **how)
    for x, y in zip((out.detach(), *grads), (expected, *gradients), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.single
def test_compiled_again_for_another_call():
    """Other options are another call; a packed one has another lse."""
    q = torch.from_numpy(random_qkv(9, 1, 9, 2, 2, 8, "float64")[0][0]).requires_grad_()
    ends = torch.tensor([0, 4, 9])

    def packed(q, ends, causal):
        out, lse = attention(q, q, q, layout="thd", cu_seqlens_q=ends, causal=causal, return_lse=True)
        return out + lse.detach().T[..., None]

    torch.compiler.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for causal in (True, False, True):
        torch.testing.assert_close(compiled(q, ends, causal), packed(q, ends, causal))


@pytest.mark.single
def test_on_one_rank():
    """`attention`, and what a checkpoint computes again."""
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in random_qkv(10, 1, 4, 2, 1, 3, "float64"))
    sinks = torch.zeros(2).double().requires_grad_()

    def attend(q, k, v, sinks):
        return attention(q, k, v, causal=True, sinks=sinks)

    def of_lse(q, k, v, sinks):
        return attention(q, k, v, causal=True, sinks=sinks, return_lse=True)[1]

    assert torch.autograd.gradcheck(of_lse, (q, k, v, sinks))
    assert torch.autograd.gradcheck(attend, (q, k, v, sinks))
    again = torch.utils.checkpoint.checkpoint(attend, q, k, v, sinks, use_reentrant=False)
    for x, y in zip(
        *(torch.autograd.grad(out.sum(), (q, k, v, sinks)) for out in (again, attend(q, k, v, sinks))), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.single
@pytest.mark.parametrize("ranks", [1, 2])
def test_script(ranks):
    text = mpiexec(ranks, SCRIPT)
    assert text.count("differs from PyTorch's by at most") == 3 * ranks
    assert "FAILED" not in text
