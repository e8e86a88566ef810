"""Attention as a function of JAX."""

import numpy as np
import pytest
from checks import OPTIONS, some_options
from gradients import dense_gradient
from helpers import outcomes, part, random_qkv, split
from oracle import dense_attention

jax = pytest.importorskip("jax")

from jax import numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from ulysses_dp.jax import attention, ulysses_attention  # noqa: E402

jax.config.update("jax_enable_x64", True)


def rows_of(comm, whole, rows, dtype=None):
    """This rank's rows."""
    return [jnp.asarray(part(x, rows, comm.rank), dtype) for x in whole]


def as_traced(options):
    """Options with arrays of JAX for arrays."""
    return {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


@pytest.mark.parametrize(
    "names", [(), ("causal", "window", "alibi", "sinks"), OPTIONS], ids=lambda names: " ".join(names) or "none"
)
@pytest.mark.parametrize("how", ["uneven", "gaps"])
def test_gradients(comm, names, how):
    """Of everything that may be traced, under jit, against the formulas."""
    rows = split(11, comm.size, how)
    whole, options = random_qkv(0, 2, 11, 4, 2, 8, "float64"), some_options(names, 2, 4, 11, 11, dtype="float64")
    dout, dlse = (np.random.default_rng(1).standard_normal(shape) for shape in (whole[0].shape, (2, 4, 11)))
    given = as_traced(options)
    of_options = {name: given.pop(name) for name in ("sinks", "alibi_slopes", "bias") if name in given}
    fixed = {name: x for name, x in given.items() if not isinstance(x, jax.Array)}

    @jax.jit
    def run(q, k, v, of_options, traced, dout, dlse):
        def attend(q, k, v, of_options):
            return ulysses_attention(q, k, v, comm=comm, return_lse=True, **of_options, **traced, **fixed)

        (out, lse), differentiate = jax.vjp(attend, q, k, v, of_options)
        return out, lse, differentiate((dout, dlse))

    traced = {name: x for name, x in given.items() if name not in fixed}
    out, lse, (*grads, found) = run(
        *rows_of(comm, whole, rows), of_options, traced, part(dout, rows, comm.rank), part(dlse, rows, comm.rank, 2)
    )
    expected_out, expected_lse = dense_attention(*whole, **options)
    expected = dense_gradient(dout, *whole, dlse=dlse, **options)
    pairs = [(out, part(expected_out, rows, comm.rank)), (lse, part(expected_lse, rows, comm.rank, axis=2))]
    pairs += [(x, part(y, rows, comm.rank)) for x, y in zip(grads, expected, strict=False)]
    dslopes, dbias = dense_gradient(dout, *whole, dlse=dlse, of_scores=True, **options)
    by_name = {"sinks": expected[3], "alibi_slopes": dslopes.sum(axis=0), "bias": dbias}
    pairs += [(x, by_name[name]) for name, x in found.items()]
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y[np.isfinite(y)]).max(initial=1))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(comm, dtype):
    rows, whole = split(13, comm.size), random_qkv(3, 2, 13, 4, 2, 16)
    arrays = rows_of(comm, whole, rows, dtype)
    grads = jax.jit(jax.grad(lambda *x: ulysses_attention(*x, comm=comm, causal=True).sum(), (0, 1, 2)))(*arrays)
    numbers = [np.asarray(jnp.asarray(x, dtype).astype("float64")) for x in whole]
    tolerance = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 2e-2}[dtype]
    for x, expected in zip(grads, dense_gradient(np.ones(whole[0].shape), *numbers, causal=True)[:3], strict=True):
        assert x.dtype == dtype
        atol = tolerance * np.abs(expected).max(initial=1)
        np.testing.assert_allclose(x.astype("float64"), part(expected, rows, comm.rank), rtol=0, atol=atol)


def test_the_largest_scores(comm):
    """They come last, and change nothing else; there is no gradient of them."""
    whole, rows = random_qkv(7, 2, 9, 4, 2, 8, "float64"), split(9, comm.size, "uneven")

    def loss(q, k, v, wanted):
        results = ulysses_attention(q, k, v, comm=comm, causal=True, return_lse=True, return_max_logit=wanted)
        return (results[0] ** 2).sum() + sum(x.sum() for x in results[2:]), results

    differentiate = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    (grads, (*results, largest)), (grads_without, without) = (
        differentiate(*rows_of(comm, whole, rows), wanted) for wanted in (True, False)
    )
    np.testing.assert_allclose(largest, dense_attention(*whole, causal=True, max_logit=True)[2], rtol=0, atol=1e-12)
    for x, y in zip((*grads, *results), (*grads_without, *without), strict=True):
        np.testing.assert_array_equal(x, y)


def test_values_of_another_width(comm):
    whole, rows = random_qkv(8, 1, 9, 4, 2, 8, "float64"), split(9, comm.size, "uneven")
    whole = (*whole[:2], np.random.default_rng(8).standard_normal((1, 9, 2, 5)))
    q, k, v = rows_of(comm, whole, rows)
    out = jax.jit(lambda *x: ulysses_attention(*x, comm=comm, causal=True))(q, k, v)
    np.testing.assert_allclose(out, part(dense_attention(*whole, causal=True)[0], rows, comm.rank), rtol=0, atol=1e-12)
    grads = jax.jit(jax.grad(lambda *x: ulysses_attention(*x, comm=comm, causal=True).sum(), (0, 1, 2)))(q, k, v)
    for x, y in zip(grads, dense_gradient(np.ones((1, 9, 4, 5)), *whole, causal=True)[:3], strict=True):
        np.testing.assert_allclose(x, part(y, rows, comm.rank), rtol=0, atol=1e-12)


def test_replicated_tokens(comm):
    """They get the gradient of all ranks; the loss has what comes of them once."""
    rows, n = split(9, comm.size, "uneven"), 3
    whole, dout = random_qkv(12, 2, 9 + n, 4, 2, 8, "float64"), np.random.default_rng(12).standard_normal((2, 9 + n, 4, 8))
    arrays, tokens = rows_of(comm, [x[:, n:] for x in whole], rows), [jnp.asarray(x[:, :n]) for x in whole]

    def attend(q, k, v, tokens):
        return ulysses_attention(q, k, v, comm=comm, causal=True, replicated=tokens)

    @jax.jit
    def run(arrays, tokens, cotangents):
        results, differentiate = jax.vjp(attend, *arrays, tokens)
        return results, differentiate(cotangents)

    def parts(x):
        return part(x[:, n:], rows, comm.rank), x[:, :n]

    results, (*grads, of_tokens) = run(arrays, tokens, tuple(map(jnp.asarray, parts(dout))))
    of_rows, of_all = zip(*map(parts, dense_gradient(dout, *whole, causal=True)[:3]), strict=True)
    expected = (*parts(dense_attention(*whole, causal=True)[0]), *of_rows, *of_all)
    for x, y in zip((*results, *grads, *of_tokens), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y).max(initial=1))
    largest = ulysses_attention(*arrays, comm=comm, replicated=tokens, return_lse=True, return_max_logit=True)[4]
    np.testing.assert_allclose(largest, dense_attention(*whole, max_logit=True)[2], rtol=0, atol=1e-12)
    for bad in (tokens[:2], "tokens", (tokens[0], None, tokens[2])):
        given = bad if comm.rank == 0 else tokens
        for error in outcomes(comm, lambda given=given: jax.block_until_ready(attend(*arrays, given))):
            assert "replicated" in error[1]


def test_more_than_one_call(comm):
    """Calls that need each other, calls that do not and calls in a loop run in the same order on all ranks."""
    q, k, v = rows_of(comm, random_qkv(4, 1, 9, 2, 2, 8, "float64"), split(9, comm.size, "uneven"))

    def loss(q, k, v):
        first, _ = jax.lax.scan(lambda x, _: (ulysses_attention(x, k, v, comm=comm, causal=True), None), q, None, length=3)
        return (first * ulysses_attention(jnp.sin(q), k, v, comm=comm)).sum() + ulysses_attention(q, k, q, comm=comm).sum()

    value_and_grads = jax.value_and_grad(loss, (0, 1, 2))
    for x, y in zip(*map(jax.tree.leaves, (jax.jit(value_and_grads)(q, k, v), value_and_grads(q, k, v))), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_refused(comm):
    """When the program runs, on all ranks."""
    q, k, v = rows_of(comm, random_qkv(5, 1, 9, 2, 2, 8), split(9, comm.size))
    last = comm.rank == comm.size - 1
    for bad in (k[..., :3], None):
        errors = outcomes(comm, lambda bad=bad: jax.block_until_ready(ulysses_attention(q, bad if last else k, v, comm=comm)))
        assert all(error is not None and "k " in error[1] for error in errors)
    assert outcomes(comm, lambda: jax.block_until_ready(ulysses_attention(q, k, v, comm=comm))) == [None] * comm.size


@pytest.mark.single
def test_on_one_rank():
    """`attention`, which JAX may also batch and compute again."""
    q, k, v = map(jnp.asarray, random_qkv(6, 1, 4, 2, 1, 3, "float64"))

    def attend(q, k, v):
        return attention(q, k, v, causal=True)

    check_grads(attend, (q, k, v), order=1, modes=["rev"])
    check_grads(lambda *x: attention(*x, return_lse=True)[1], (q, k, v), order=1, modes=["rev"])
    np.testing.assert_array_equal(jax.vmap(attend)(*(x[None] for x in (q, k, v)))[0], attend(q, k, v))
    grads = (jax.grad(lambda *x, f=f: f(*x).sum(), (0, 1, 2))(q, k, v) for f in (attend, jax.checkpoint(attend)))
    for x, y in zip(*grads, strict=True):
        np.testing.assert_array_equal(x, y)
