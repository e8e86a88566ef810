"""`wire_dtype`: what travels as 8 bits is rounded as the reference says, for every number of ranks, and nothing else is."""

import numpy as np
import oracle
import pytest
from checks import decode, dtype_option, encode, kinds_of
from gradients import dense_gradient
from helpers import LAYOUTS, SPLITS, as_kind, as_numpy, as_view, assert_like, needs_ranks, outcomes, part, random_qkv, split
from test_trace import names
from ulysses_dp.kernels.panel_wire import LARGEST
from ulysses_dp.kernels.relayout import from_wire, to_wire

from ulysses_dp import attention, attention_backward, free_workspace, trace, ulysses_attention, ulysses_attention_backward

WIRES = list(LARGEST)
FORMS = ["float32", "float16", "bits"]
# (batch, seq, heads, kv_heads, head_dim): more kv heads than ranks, fewer, one, no multiples, ranks without heads or rows
SIZES = [(1, 48, 12, 12, 16), (2, 13, 12, 2, 17), (1, 24, 6, 1, 8), (2, 7, 5, 5, 33), (1, 3, 2, 1, 64)]
HALF_STEP = {"int8": 1 / 252, "float8_e4m3": 1 / 16}  # the largest error, by the largest number of a row of a head
ROUNDING = {"float32": 1e-5, "float16": 1e-3, "bits": 8e-3}


def travelled(x, wire, form="float32"):
    """Numbers as they arrive, of a form: rounded to codes, and then to the form."""
    return encode(from_wire(to_wire(decode(x).astype(np.float32), wire), wire), form)


def half_steps(x, wire):
    """The largest errors of numbers that travel."""
    return HALF_STEP[wire] * abs(x).max(axis=-1, keepdims=True, initial=0)


def assert_within(result, expected, wire, form, times=1.0):
    """As far from the expected numbers as the way rounds, and the form."""
    bound = times * half_steps(expected, wire) + ROUNDING[form] * abs(expected).max(initial=1)
    assert (abs(decode(result) - expected) <= bound).all()


@pytest.mark.parametrize(("wire", "form"), [("int8", "float32"), ("float8_e4m3", "float16"), ("int8", "bits")])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("how", SPLITS)
def test_attention(comm, sizes, how, wire, form):
    """The dense result of what arrives, which is rounded in turn; lse is not. On one rank nothing travels."""
    whole = [encode(x, form) for x in random_qkv(0, *sizes)]
    arrives = whole if comm.size == 1 else [travelled(x, wire, form) for x in whole]
    expected, expected_lse = oracle.dense_attention(*map(decode, arrives), causal=True)
    rows = split(sizes[1], comm.size, how)
    mine = [part(x, rows, comm.rank) for x in whole]
    out, lse = ulysses_attention(*mine, comm=comm, causal=True, return_lse=True, wire_dtype=wire, **dtype_option(form))
    assert_like(out, mine[0], mine[0].shape)
    if comm.size == 1:
        np.testing.assert_allclose(decode(out), expected, atol=2 * ROUNDING[form])
    else:
        assert_within(out, part(expected, rows, comm.rank), wire, form)
    np.testing.assert_allclose(lse, part(expected_lse, rows, comm.rank, 2), atol=1e-5)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bits_are_those_of_any_number_of_ranks(comm, sizes, wire):
    """Those of what arrives, computed at once; nan and infinities among it, some of which are hidden."""
    whole = random_qkv(1, *sizes)
    whole[0][0, 1, 0, 0], whole[1][0, 2, 0, 1], whole[2][0, 2, -1, 3], whole[2][0, 1, 0, 2] = np.nan, -np.inf, np.inf, np.nan
    arrives = whole if comm.size == 1 else [travelled(x, wire) for x in whole]
    options = {"causal": True, "softcap": 5.0}
    expected, expected_lse = attention(*arrives, return_lse=True, **options)
    if comm.size > 1:
        expected = travelled(expected, wire)
    rows = split(sizes[1], comm.size, "uneven")
    mine = [part(x, rows, comm.rank) for x in whole]
    out, lse = ulysses_attention(*mine, comm=comm, return_lse=True, wire_dtype=wire, **options)
    np.testing.assert_array_equal(out, part(expected, rows, comm.rank))
    np.testing.assert_array_equal(lse, part(expected_lse, rows, comm.rank, 2))
    assert np.isnan(expected).any()
    assert np.isfinite(expected).any()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("exchange", ["device", "host"])
def test_every_way(comm, wire, exchange):
    """Parts, two steps, keys of another length, an order of rows, packed sequences, replicated tokens: the same bits."""
    whole = random_qkv(2, 2, 12 * comm.size, 8, 4, 16)
    how = {"comm": comm, "wire_dtype": wire, "exchange": exchange}
    rows = split(12 * comm.size, comm.size)
    mine = [part(x, rows, comm.rank) for x in whole]
    expected = ulysses_attention(*mine, comm=comm, wire_dtype=wire)
    for options in ({"overlap": 2}, {"overlap": 9}, {"node_size": 1 + (comm.size % 2 == 0)}, {"order": "striped"}):
        out = ulysses_attention(*mine, **options, **how)
        if options.get("order"):  # a call without a mask does not depend on it but for the order of sums
            np.testing.assert_allclose(out, expected, atol=2 * HALF_STEP[wire] * abs(expected).max())
        else:
            np.testing.assert_array_equal(out, expected)
    arrives = whole if comm.size == 1 else [travelled(x, wire) for x in whole]
    dense = oracle.dense_attention(*arrives)[0]
    keys = split(12 * comm.size, comm.size, "uneven")  # k and v in a message of their own
    q, k, v = mine[0], part(whole[1], keys, comm.rank), part(whole[2], keys, comm.rank)
    assert_within(ulysses_attention(q, k, v, **how), part(dense, rows, comm.rank), wire, "float32")
    tokens = [x[:, :5] for x in whole]
    rest = split(12 * comm.size - 5, comm.size, "uneven")
    others = [part(x[:, 5:], rest, comm.rank) for x in whole]
    out, out_r = ulysses_attention(*others, replicated=tokens, **how)
    assert_within(out, part(dense[:, 5:], rest, comm.rank), wire, "float32")
    assert_within(out_r, dense[:, :5], wire, "float32")
    packed = {"layout": "thd", "cu_seqlens_q": [0, 7, 12 * comm.size]}
    dense = oracle.dense_attention(
        *(x[0] for x in arrives), cu_seqlens_q=packed["cu_seqlens_q"], cu_seqlens_k=[0, 7, 12 * comm.size]
    )[0]
    assert_within(ulysses_attention(*(x[0] for x in mine), **packed, **how), part(dense, rows, comm.rank, 0), wire, "float32")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strides", LAYOUTS)
def test_views_and_kinds(comm, strides, form):
    whole = [encode(x, form) for x in random_qkv(3, 2, 14, 6, 3, 12)]
    rows = split(14, comm.size, "uneven")
    mine = [part(x, rows, comm.rank) for x in whole]
    how = {"comm": comm, "wire_dtype": "int8"} | dtype_option(form)
    expected = ulysses_attention(*mine, **how)
    for kind in kinds_of(form):
        if form == "bits" and strides in ("padded", "strided"):
            continue  # there is no nan to put between bit patterns
        out = ulysses_attention(*(as_view(x, kind, strides) for x in mine), **how)
        np.testing.assert_array_equal(as_numpy(out), expected)


def expected_gradient(arrays, dout, wire, **options):
    """Results of attention, and the gradient before it travels: by what arrives, but for delta, which is of dout as it was."""
    q, k, v, arrived_dout = (travelled(x, wire) for x in (*arrays, dout))
    out, lse = attention(q, k, v, return_lse=True, **options)
    out = travelled(out, wire)
    dlse = np.einsum("bihd,bihd->bhi", arrived_dout - dout, out)
    return attention_backward(arrived_dout, q, k, v, out, lse, dlse=dlse, **options)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradient(comm, sizes, wire, context):
    whole, rows = random_qkv(4, *sizes), split(sizes[1], comm.size, "uneven")
    dout = np.random.default_rng(5).standard_normal(whole[0].shape, dtype=np.float32)
    mine, my_dout = [part(x, rows, comm.rank) for x in whole], part(dout, rows, comm.rank)
    options = {"comm": comm, "causal": True, "wire_dtype": wire}
    out, lse, *ctx = ulysses_attention(*mine, return_lse=True, return_ctx=context, **options)
    ulysses_attention(*(x[:, ::-1] for x in mine), **options)  # what the context keeps is its own
    options |= {"ctx": ctx[0]} if context else {}
    for _ in range(2):
        grads = ulysses_attention_backward(my_dout, *mine, out, lse, **options)
        if comm.size == 1:
            expected = attention_backward(dout, *whole, *attention(*whole, causal=True, return_lse=True), causal=True)
        else:
            expected = expected_gradient(whole, dout, wire, causal=True)
        # a kv head that ranks share is the sum of what each rounds
        for name, grad, x in zip("qkv", grads, expected, strict=True):
            times = 1 if name == "q" or sizes[3] % comm.size == 0 else 3 * comm.size
            if comm.size == 1:
                np.testing.assert_array_equal(grad, x)
            else:
                assert_within(grad, part(x, rows, comm.rank), wire, "float32", times)


@pytest.mark.parametrize(("wire", "limit"), [("int8", 0.02), ("float8_e4m3", 0.08)])
@pytest.mark.parametrize("form", FORMS)
def test_errors_that_are_documented(comm, wire, limit, form):
    """Of normally distributed numbers, against the dense result of what was given, by the root of mean squares."""
    whole = [encode(x, form) for x in random_qkv(6, 1, 96, 4, 2, 64)]
    dout = encode(np.random.default_rng(7).standard_normal(whole[0].shape), form)
    numbers, rows = [decode(x) for x in whole], split(96, comm.size)
    expected = oracle.dense_attention(*numbers)[0], *dense_gradient(decode(dout), *numbers)[:3]
    mine, my_dout = [part(x, rows, comm.rank) for x in whole], part(dout, rows, comm.rank)
    how = {"comm": comm, "wire_dtype": wire} | dtype_option(form)
    out, lse = ulysses_attention(*mine, return_lse=True, **how)
    grads = ulysses_attention_backward(my_dout, *mine, out, lse, **how)
    for result, of_all in zip((out, *grads), expected, strict=True):
        error = decode(result) - part(of_all, rows, comm.rank)
        assert np.sqrt((error**2).mean()) <= limit * np.sqrt((of_all**2).mean())


@needs_ranks
@pytest.mark.parametrize("form", FORMS)
def test_bytes_and_steady_state(comm, form):
    """A byte for each number and four for each row and head, lse as it is; from the second call on nothing is allocated."""
    free_workspace()
    batch, heads, kv_heads, width, seq = 2, 12, 12, 16, 24
    whole = [encode(x, form) for x in random_qkv(0, batch, seq, heads, kv_heads, width)]
    mine = [part(x, split(seq, comm.size), comm.rank) for x in whole]
    how = {"comm": comm, "wire_dtype": "int8", "return_lse": True} | dtype_option(form)
    for time in range(3):
        with trace() as record:
            ulysses_attention(*mine, **how)
        assert names(record) == ["pack", "scatter", "unpack", "attention", "pack", "gather", "unpack"]
        assert (record.calls[0].allocations > 0) == (time == 0)
    there, back = (
        next(stage.bytes_sent for stage in record.stages if stage.name == name) * comm.size**2 for name in ("scatter", "gather")
    )
    assert there == (comm.size - 1) * batch * seq * (heads + 2 * kv_heads) * (width + 4)
    assert back == (comm.size - 1) * batch * seq * heads * (width + 4 + 4)


GOOD = np.ones((1, 2, 4, 8), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wire_dtype": 8}, TypeError, "wire_dtype must be a string or None, not int"),
        ({"wire_dtype": np.int8}, TypeError, "wire_dtype must be a string or None, not type"),
        ({"wire_dtype": "int4"}, ValueError, "wire_dtype must be one of float8_e4m3 and int8, or None, not 'int4'"),
        ({"wire_dtype": "int8", "exchange": "shared"}, NotImplementedError, "'auto', 'device' and 'host' have it"),
    ],
)
def test_refused(comm, change, error, message):
    """On one rank; all raise."""
    for function in (
        ulysses_attention,
        lambda *x, **how: ulysses_attention_backward(GOOD, *x, GOOD, GOOD[..., 0].swapaxes(1, 2), **how),
    ):
        how = {"comm": comm} | (change if comm.rank == comm.size - 1 else {})
        raised = outcomes(comm, lambda function=function, how=how: function(GOOD, GOOD, GOOD, **how))
        assert {kind for kind, _ in raised} == {error}
        assert all(message in text for _, text in raised)
    assert outcomes(comm, lambda: ulysses_attention(GOOD, GOOD, GOOD, comm=comm)) == [None] * comm.size


def test_refused_together(comm):
    for arrays, how, message in (
        ([GOOD.astype(np.float64)] * 3, {}, "float64; float32, float16 and bfloat16 have it"),
        *([([GOOD] * 3, {"ring": comm.size}, "ring=1 has it")] if comm.size > 1 else []),
    ):
        raised = outcomes(comm, lambda arrays=arrays, how=how: ulysses_attention(*arrays, comm=comm, wire_dtype="int8", **how))
        assert {kind for kind, _ in raised} == {NotImplementedError}
        assert all(message in text for _, text in raised)


@needs_ranks
def test_another_on_every_rank(comm):
    wire = "int8" if comm.rank else None
    for kind, text in outcomes(comm, lambda: ulysses_attention(GOOD, GOOD, GOOD, comm=comm, wire_dtype=wire)):
        assert kind is ValueError
        assert "wire_dtype must be the same on all ranks, not None on rank 0" in text


@pytest.mark.parametrize("kind", ["torch", "array_api_strict"])
def test_other_kinds(comm, kind):
    mine = [part(x, split(9, comm.size), comm.rank) for x in random_qkv(8, 1, 9, 4, 2, 8)]
    expected = ulysses_attention(*mine, comm=comm, wire_dtype="float8_e4m3")
    out = ulysses_attention(*(as_kind(x, kind) for x in mine), comm=comm, wire_dtype="float8_e4m3")
    np.testing.assert_array_equal(as_numpy(out), expected)
