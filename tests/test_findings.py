"""The largest scores, and the gradients by what is added to scores, against the oracle and the dense gradient."""

import numpy as np
import pytest
from checks import FORMS, OPTIONS, assert_refused, decode, dtype_of_options, dtype_option, encode, kinds_of, some_options
from gradients import central_difference, dense_gradient
from helpers import COMPLETE, as_kind, as_numpy, outcomes, part, random_qkv, split
from oracle import dense_attention
from test_ring import held, rings

from ulysses_dp import (
    AttnType,
    UlyssesAttention,
    attention,
    attention_backward,
    ulysses_attention,
    ulysses_attention_backward,
    ulysses_flash_attn_func,
)
from ulysses_dp._ranks.orders import ORDERS

SEQ, KEYS, HEADS = 13, 18, 4
SHAPES = [
    (2, 4, 13, 18),
    (1, 4, 13, 18),
    (2, 1, 13, 18),
    (1, 1, 13, 18),
    (1, 4, 1, 18),
    (2, 1, 13, 1),
    (1, 1, 1, 18),
    (2, 4, 1, 1),
]
TOLERANCE = {"float32": 2e-5, "float64": 1e-11, "float16": 3e-3, "bfloat16": 2e-2, "bits": 2e-2}
MIXED = ("causal", "window", "softcap", "mask", "sinks", "dropout")


def unbroadcast(x, shape):
    """The sum over the axes along which an array of this shape was broadcast."""
    axes = tuple(axis for axis, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if m == 1 != n)
    return x.sum(axis=axes, keepdims=True)


def near(result, expected, tolerance):
    atol = tolerance * np.abs(expected[np.isfinite(expected)]).max(initial=1)
    np.testing.assert_allclose(as_numpy(result), expected, rtol=0, atol=atol)


@pytest.fixture(params=[pytest.param(False, marks=pytest.mark.single), True], ids=["local", "distributed"])
def over_ranks(request, comm):
    """Whether the rows are split; under mpiexec what one rank does alone has nothing to do with the others."""
    return request.param


def check(
    comm, whole, *, over_ranks=True, form="float32", kind="numpy", context=False, rows=None, rows_k=None, how=None, **options
):
    """Compare max_logit, dslopes and dbias, which are the same on all ranks; returns them."""
    packed = "cu_seqlens_q" in options
    axis, size = (0 if packed else 1), comm.size if over_ranks else 1
    rows = split(whole[0].shape[axis], size, "uneven") if rows is None else rows
    rows_k = split(whole[1].shape[axis], size) if rows_k is None else rows_k
    rng = np.random.default_rng(9)
    stored = [encode(x, form) for x in (*whole, rng.standard_normal((*whole[0].shape[:-1], whole[2].shape[-1])))]
    shape = (*whole[0].shape[:-3], whole[0].shape[-2], whole[0].shape[-3])
    dlse = rng.standard_normal(shape).astype(dtype_of_options(form))

    def of_rank(x, counts, axis):
        if not over_ranks:
            return x
        return np.take(x, counts[comm.rank], axis) if isinstance(counts[0], np.ndarray) else part(x, counts, comm.rank, axis)

    q, k, v, dout = (as_kind(of_rank(x, n, axis), kind) for x, n in zip(stored, (rows, rows_k, rows_k, rows), strict=True))
    mine = as_kind(of_rank(dlse, rows, 2 - packed), kind)
    given = {name: as_kind(x, kind) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    given |= dtype_option(form) | ({"layout": "thd"} if packed else {})
    wanted = {f"{short}_grad": True for short, name in (("bias", "bias"), ("slopes", "alibi_slopes")) if name in options}
    if over_ranks:
        how = {"comm": comm} | (how or {})
        out, lse, largest, *ctx = ulysses_attention(
            q, k, v, return_lse=True, return_max_logit=True, return_ctx=context, **how, **given
        )
        again = {"ctx": ctx[0], "comm": comm} if context else how | given
        grads = ulysses_attention_backward(dout, q, k, v, out, lse, dlse=mine, **wanted, **again)
    else:
        out, lse, largest = attention(q, k, v, return_lse=True, return_max_logit=True, **given)
        grads = attention_backward(dout, q, k, v, out, lse, dlse=mine, **wanted, **given)
    numbers = [decode(x) for x in stored]
    options.pop("attn_type", None)
    *_, expected = dense_attention(*numbers[:3], max_logit=True, **options)
    dslopes, dbias = dense_gradient(numbers[3], *numbers[:3], dlse=dlse, of_scores=True, **options)
    found, expected = [largest], [expected]
    if "alibi_slopes" in options:
        expected.append(dslopes if options["alibi_slopes"].ndim == 2 else dslopes.sum(axis=0))
    if "bias" in options:
        expected.append(unbroadcast(dbias, options["bias"].shape))
    found += grads[3 + ("sinks" in options) :]
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert type(x) is type(q)
        assert tuple(x.shape) == y.shape
        assert as_numpy(x).dtype == dtype_of_options(form)
        near(x, y, TOLERANCE[form])
        for theirs in comm.allgather(as_numpy(x)):
            np.testing.assert_array_equal(theirs, as_numpy(x))
    return found


def added(shape=(2, 4, SEQ, KEYS), *, of_batch=False, dtype="float32"):
    """A bias that also hides, and slopes."""
    rng = np.random.default_rng(3)
    bias = np.where(rng.random(shape) < 0.1 * (shape[2] * shape[3] > 1), -np.inf, rng.standard_normal(shape)).astype(dtype)
    return {"bias": bias, "alibi_slopes": (rng.random((2, HEADS) if of_batch else HEADS) - 0.3).astype(dtype)}


@pytest.mark.parametrize("attn_type", COMPLETE)
@pytest.mark.parametrize("names", [(), MIXED], ids=["none", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(comm, over_ranks, shape, names, attn_type):
    whole = random_qkv(1, 2, SEQ, HEADS, 2, 8, seq_k=KEYS)
    options = some_options(names, 2, HEADS, SEQ, KEYS) | added(shape, of_batch=shape[0] == 2) | {"attn_type": attn_type}
    for context in {False, over_ranks}:
        check(comm, whole, over_ranks=over_ranks, context=context, **options)


@pytest.mark.parametrize("name", [*OPTIONS, "alibi of batch"])
@pytest.mark.parametrize("attn_type", COMPLETE)
def test_every_option(comm, over_ranks, name, attn_type):
    whole = random_qkv(2, 2, SEQ, HEADS, 1, 8, seq_k=KEYS)
    check(comm, whole, over_ranks=over_ranks, attn_type=attn_type, **some_options((name,), 2, HEADS, SEQ, KEYS))


@pytest.mark.parametrize("form", FORMS)
def test_forms(comm, over_ranks, form):
    whole = random_qkv(3, 2, SEQ, HEADS, 2, 16, dtype_of_options(form), KEYS)
    for kind in kinds_of(form):
        options = added((1, 4, SEQ, KEYS), dtype=dtype_of_options(form)) | some_options(MIXED, 2, HEADS, SEQ, KEYS)
        options["sinks"] = options["sinks"].astype(dtype_of_options(form))
        check(comm, whole, over_ranks=over_ranks, form=form, kind=kind, **options)
        check(comm, whole, over_ranks=over_ranks, form=form, kind=kind, causal=True)


@pytest.mark.parametrize("heads", [(1, 1), (5, 5), (6, 2), (3, 1)])
@pytest.mark.parametrize("seq", [(1, 1), (70, 33), (5, 0), (17, 150)])
def test_sizes(comm, over_ranks, heads, seq):
    """More and fewer heads than ranks, and more than one group of rows; no key."""
    rng = np.random.default_rng(4)
    for shape in ((1, heads[0], *seq), (1, 1, 1, seq[1]), (1, 1, seq[0], 1)):
        bias = rng.standard_normal(shape).astype(np.float32)
        check(comm, random_qkv(4, 1, seq[0], *heads, 5, seq_k=seq[1]), over_ranks=over_ranks, bias=bias, causal=True)


@pytest.mark.parametrize("shape", [(1, 4, 23, 23), (1, 1, 1, 23), (1, 1, 23, 1)], ids=str)
def test_packed(comm, over_ranks, shape):
    whole = [x[0] for x in random_qkv(5, 1, 23, HEADS, 2, 8)]
    options = added(shape) | {"cu_seqlens_q": [0, 9, 9, 23], "seqused_q": [7, 0, 14], "seqused_k": [9, 0, 12]}
    check(comm, whole, over_ranks=over_ranks, causal=True, **options)


@pytest.mark.parametrize("of_batch", [False, True])
def test_ranges_of_keys(comm, over_ranks, of_batch):
    ranges = np.random.default_rng(6).integers(0, KEYS + 1, (2, SEQ, 2) if of_batch else (SEQ, 2))
    whole = random_qkv(6, 2, SEQ, HEADS, 2, 8, seq_k=KEYS)
    for shape in ((2, 4, SEQ, KEYS), (1, 1, 1, KEYS), (2, 1, SEQ, 1)):
        check(comm, whole, over_ranks=over_ranks, key_ranges=ranges, **added(shape, of_batch=of_batch))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kv", ["ring", "all_gather"])
def test_meshes(comm, order, kv):
    options = some_options(MIXED, 2, HEADS, SEQ, KEYS)
    whole = random_qkv(7, 2, SEQ, HEADS, 2, 8, seq_k=KEYS)
    for ring in rings(comm):
        how = {"ring": ring, "order": order, "kv": kv}
        rows, rows_k = (held(n, comm, ring, order) for n in (SEQ, KEYS))
        for shape in ((2, 4, SEQ, KEYS), (1, 1, 1, KEYS), (1, 1, SEQ, 1)):
            check(comm, whole, rows=rows, rows_k=rows_k, how=how, **added(shape), **options)


def test_replicated_tokens(comm):
    """They are rows like others: max_logit is of all, and what is added to scores has the gradient of all."""
    whole, dout = random_qkv(8, 1, 11, HEADS, 2, 8), np.random.default_rng(1).standard_normal((1, 11, HEADS, 8), np.float32)
    bias = np.random.default_rng(2).standard_normal((1, 1, 11, 11), np.float32)
    rows = split(8, comm.size)
    (q, k, v, of_rows), tokens = ([part(x[:, 3:], rows, comm.rank) for x in (*whole, dout)], [x[:, :3] for x in (*whole, dout)])
    out, lse, out_r, lse_r, largest = ulysses_attention(
        q, k, v, comm=comm, bias=bias, replicated=tokens[:3], return_lse=True, return_max_logit=True
    )
    replicated = (tokens[3], *tokens[:3], out_r, lse_r)
    *_, dbias = ulysses_attention_backward(
        of_rows, q, k, v, out, lse, comm=comm, bias=bias, bias_grad=True, replicated=replicated
    )
    near(largest, dense_attention(*whole, bias=bias, max_logit=True)[2], 1e-5)
    near(dbias, dense_gradient(dout, *whole, bias=bias, of_scores=True)[1].sum(axis=1, keepdims=True), 2e-5)


def test_rows_of_one_large_bias(comm, over_ranks):
    """Their lse has lost the number of keys in rounding."""
    whole = random_qkv(9, 1, 40, 2, 2, 8, seq_k=53)
    bias = np.zeros((1, 1, 40, 53), np.float32)
    bias[:, :, [3, 17, 39]] = -1e9
    q, k, v = whole if not over_ranks else [part(x, split(x.shape[1], comm.size), comm.rank) for x in whole]
    how = {"comm": comm} if over_ranks else {}
    forward, backward = (ulysses_attention, ulysses_attention_backward) if over_ranks else (attention, attention_backward)
    for sinks in (None, np.full(2, -2.0, np.float32)):
        out, lse = forward(q, k, v, bias=bias, sinks=sinks, return_lse=True, **how)
        *_, dbias = backward(out, q, k, v, out, lse, bias=bias, sinks=sinks, bias_grad=True, **how)
        p = np.full((2, 3, 53), 1 / 53)  # of the rows whose scores are all the same
        heads = [x[0].swapaxes(0, 1).astype(float) for x in whole]
        if sinks is not None:  # beside -1e9 a sink takes all
            p = 0 * p
        outs = p @ heads[2]
        dp = outs @ heads[2].swapaxes(1, 2)
        expected = (p * (dp - (outs * outs).sum(-1, keepdims=True))).sum(axis=0)
        np.testing.assert_allclose(dbias[0, 0, [3, 17, 39]], expected, rtol=0, atol=1e-5)


def test_what_is_hidden_has_no_influence(comm):
    q, k, v = random_qkv(10, 1, 9, 2, 2, 8)
    mask = np.arange(9)[None] != 4
    bias = np.zeros((1, 2, 9, 9), np.float32)
    results = []
    for value in (1.0, np.nan):
        k[:, 4], v[:, 4] = value, value
        mine = [part(x, split(9, comm.size), comm.rank) for x in (q, k, v)]
        options = {"comm": comm, "bias": bias, "key_padding_mask": mask}
        out, lse, largest = ulysses_attention(*mine, return_lse=True, return_max_logit=True, **options)
        *_, dbias = ulysses_attention_backward(out, *mine, out, lse, bias_grad=True, **options)
        assert (dbias[..., 4] == 0).all()
        results.append((largest, dbias))
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_bias_on_the_host(comm):
    """Its gradient is of its kind, whatever q is; a bias that strides repeat has all of its elements."""
    rows = split(SEQ, comm.size)
    whole = random_qkv(11, 1, SEQ, HEADS, 2, 8)
    q, k, v = (as_kind(part(x, rows, comm.rank), "dpnp") for x in whole)
    bias = np.broadcast_to(np.random.default_rng(5).standard_normal((1, 1, SEQ, 1)).astype(np.float16), (1, 1, SEQ, SEQ))
    out, lse = ulysses_attention(q, k, v, comm=comm, bias=bias, return_lse=True)
    *_, dbias = ulysses_attention_backward(q, q, k, v, out, lse, comm=comm, bias=bias, bias_grad=True)
    assert type(dbias) is np.ndarray
    assert dbias.dtype == np.float32
    expected = dense_gradient(whole[0], *whole, bias=bias.astype(float), of_scores=True)[1]
    near(dbias, unbroadcast(expected, bias.shape), 2e-5)


def test_the_same_bits_again(comm):
    whole, options = random_qkv(12, 2, SEQ, HEADS, 2, 8, seq_k=KEYS), added((1, 1, SEQ, KEYS))
    for first, second in zip(check(comm, whole, **options), check(comm, whole, **options), strict=True):
        np.testing.assert_array_equal(first, second)


def test_differences_of_the_distributed_forward(comm):
    """Against the same package's forward pass alone."""
    rows, rows_k = split(5, comm.size, "uneven"), split(6, comm.size)
    whole, rng = random_qkv(13, 1, 5, 2, 1, 3, "float64", 6), np.random.default_rng(1)
    mine = [part(x, n, comm.rank) for x, n in zip(whole, (rows, rows_k, rows_k), strict=True)]
    bias, slopes, options = rng.standard_normal((1, 1, 5, 6)), rng.random(2), {"comm": comm, "softcap": 2.0, "causal": True}
    dout, dlse = (
        part(rng.standard_normal((1, 5, 2, 3)), rows, comm.rank),
        part(rng.standard_normal((1, 2, 5)), rows, comm.rank, 2),
    )

    def loss(bias, slopes):
        out, lse = ulysses_attention(*mine, bias=bias, alibi_slopes=slopes, return_lse=True, **options)
        return comm.allreduce(float(np.vdot(dout, out) + np.vdot(dlse, np.where(np.isneginf(lse), 0, lse))))

    options_of = options | {"bias": bias, "alibi_slopes": slopes}
    out, lse = ulysses_attention(*mine, return_lse=True, **options_of)
    *_, dslopes, dbias = ulysses_attention_backward(
        dout, *mine, out, lse, dlse=dlse, bias_grad=True, slopes_grad=True, **options_of
    )
    for number, (x, index) in enumerate(((dbias, (0, 0, 4, 2)), (dslopes, (1,)))):
        assert abs(x[index] - central_difference(loss, [bias, slopes], number, index)) < 1e-8


def test_class_and_function(comm):
    whole, rows = random_qkv(14, 2, 19, HEADS, 2, 8), split(19, comm.size)
    mine = [part(x, rows, comm.rank) for x in whole]
    expected = dense_attention(*whole, causal=True, max_logit=True)[2]
    for function in (UlyssesAttention(comm), lambda *x, **options: ulysses_flash_attn_func(*x, group=comm, **options)):
        out, largest = function(*mine, causal=True, return_max_logit=True)
        assert out.shape == mine[0].shape
        near(largest, expected, 1e-5)
        *_, nothing, again = function(*mine, causal=True, return_attn_probs=True, return_max_logit=True)
        assert nothing is None
        np.testing.assert_array_equal(again, largest)


@pytest.mark.parametrize("name", ["return_max_logit", "bias_grad", "slopes_grad"])
def test_refused(comm, name):
    """What is no flag, what has nothing to be the gradient of, and backends that do not have it."""
    q, k, v = (part(x, split(4 * comm.size, comm.size), comm.rank) for x in random_qkv(15, 1, 4 * comm.size, 2, 2, 8))
    options = {"bias": np.zeros((1, 1, 1, 1), np.float32), "alibi_slopes": np.ones(2, np.float32), "comm": comm}
    out, lse = ulysses_attention(q, k, v, return_lse=True, **options)

    def call(value, **other):
        given = {x: y for x, y in (options | other).items() if y is not None}
        if name == "return_max_logit":
            return ulysses_attention(q, k, v, **{name: value}, **given)
        return ulysses_attention_backward(q, q, k, v, out, lse, **{name: value}, **given)

    for bad in (1, "yes", None):
        assert_refused(comm, name, bad, True, call)
    needs = {"bias_grad": "bias", "slopes_grad": "alibi_slopes"}
    if name in needs:
        for error, message in outcomes(comm, lambda: call(True, **{needs[name]: None})):
            assert error is ValueError
            assert f"{name} needs {needs[name]}" in message
    for attn_type in (AttnType.TORCH, AttnType.INTEL_ONEDNN):
        if attn_type is AttnType.TORCH:
            pytest.importorskip("torch")
        for error, message in outcomes(comm, lambda attn_type=attn_type: call(True, attn_type=attn_type)):
            assert error is NotImplementedError
            assert f"{attn_type.name} does not support {name}; INTEL_SYCL does" in message
