"""The backward passes against the dense gradient: options, splits, layouts, dtypes and kinds, contexts, and bad arguments."""

import pickle
from copy import deepcopy

import numpy as np
import pytest
from checks import (
    AXES,
    COMBINATIONS,
    DROPOUT,
    FORMS,
    OPTIONS,
    assert_close,
    assert_disagree,
    assert_refused,
    call_on,
    check_gradient,
    decode,
    described,
    distributed,
    drawn_call,
    drawn_names,
    drawn_options,
    dtype_of_options,
    dtype_option,
    encode,
    kinds_of,
    local,
    made,
    ones,
    packed,
    random_dout,
    some_options,
)
from gradients import TOLERANCE, dense_gradient
from helpers import (
    COMPLETE,
    KINDS,
    SPLITS,
    as_kind,
    as_numpy,
    assert_like,
    needs_ranks,
    new_queue,
    outcomes,
    part,
    random_qkv,
    split,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_dp import (
    AttnType,
    attention,
    attention_backward,
    free_workspace,
    trace,
    ulysses_attention,
    ulysses_attention_backward,
)
from ulysses_dp._device.arrays import tensor

LENGTHS = [(23, 23), (9, 31), (31, 9)]
WINDOWS = [(0, 0), (0, -1), (-1, 0), (3, 2), (-1, 4), (6, 0), (100, 100)]
# heads and kv_heads: fewer than ranks, and groups that are cut between ranks
HEADS = [(1, 1), (2, 1), (3, 1), (5, 5), (4, 2), (6, 2), (6, 3)]
# the queries and the keys of every sequence: one row, none, queries without keys and the reverse, more keys and fewer
PACKED = {
    "one": ([23], [23]),
    "equal": ([7, 1, 0, 12, 3], [7, 1, 0, 12, 3]),
    "other keys": ([7, 1, 0, 12, 3, 5], [4, 1, 6, 17, 0, 2]),
    "decoding": ([1, 1, 1, 1], [9, 0, 14, 1]),
    "long": ([70, 5, 66], [70, 40, 66]),
    "no rows": ([0, 0], [3, 0]),
}


def assert_same(results, expected):
    """The same numbers in float32, which may be added up in another order."""
    for result, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, other, rtol=0, atol=2e-6 * np.abs(other).max(initial=1))


def assert_equal(results, expected):
    for result, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, other)


@pytest.mark.parametrize("names", [(), *((name,) for name in OPTIONS), ("alibi of batch",), *COMBINATIONS], ids=" ".join)
@pytest.mark.parametrize("attn_type", COMPLETE)
def test_options(comm, functions, names, attn_type):
    for seq, seq_k in ((19, 19), (13, 22)):
        whole = random_qkv(seq, 2, seq, 4, 2, 16, seq_k=seq_k)
        check_gradient(comm, whole, functions=functions, attn_type=attn_type, **some_options(names, 2, 4, seq, seq_k))


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_window(comm, functions, window_size, causal):
    for seq, seq_k in LENGTHS:
        whole = random_qkv(seq, 1, seq, 4, 2, 16, seq_k=seq_k)
        check_gradient(comm, whole, window_size=window_size, causal=causal, functions=functions)


@pytest.mark.parametrize("window_size", [(-1, -1), (20, -1), (3, 3), (-1, 20), (70, 70)])
@pytest.mark.parametrize("causal", [False, True])
def test_several_tiles(comm, functions, window_size, causal):
    """Long enough for tiles of keys that no row of a block sees, or that all rows see."""
    check_gradient(comm, random_qkv(2, 1, 150, 2, 1, 16), window_size=window_size, causal=causal, functions=functions)
    check_gradient(comm, random_qkv(2, 1, 67, 2, 1, 16, seq_k=131), window_size=window_size, causal=causal, functions=functions)


@pytest.mark.parametrize("softcap", [0.5, 5, 30.0])
def test_softcap(comm, functions, softcap):
    q, k, v = random_qkv(3, 2, 23, 4, 2, 16)
    for scale in (1, 4):  # of which the second is flat at the cap
        check_gradient(comm, (q * np.float32(scale), k, v), softcap=softcap, softmax_scale=0.3, functions=functions)


@pytest.mark.parametrize("shape", [(1, 1, 1, 17), (2, 1, 11, 1), (1, 4, 11, 17), (2, 4, 1, 1)], ids=str)
def test_bias_is_broadcast(comm, functions, shape):
    bias = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    bias[..., -1] = -np.inf
    check_gradient(comm, random_qkv(5, 2, 11, 4, 2, 16, seq_k=17), bias=bias, functions=functions)


def random_dlse(batch, heads, seq):
    return np.random.default_rng(98).standard_normal((batch, heads, seq))


@pytest.mark.parametrize("names", [(), *((name,) for name in OPTIONS), *COMBINATIONS], ids=lambda x: " ".join(x) or "none")
@pytest.mark.parametrize("attn_type", COMPLETE)
def test_dlse(comm, functions, names, attn_type):
    """A loss that depends on lse, too: as the z-loss of a router does, or one of merged parts."""
    dlse = random_dlse(2, 4, 19).astype(np.float32)
    whole, options = random_qkv(6, 2, 19, 4, 2, 16), some_options(names, 2, 4, 19, 19)
    for context in {False, functions is distributed}:
        check_gradient(comm, whole, dlse=dlse, functions=functions, attn_type=attn_type, context=context, **options)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_dlse(comm, functions, form):
    """Of (batch, heads, seq) in any layout, or (heads, total); where nothing is seen it may be anything."""
    dtype = dtype_of_options(form)
    whole, dlse = random_qkv(6, 2, 9, 4, 2, 16, dtype, 7), random_dlse(2, 4, 9).astype(dtype)
    clean = np.where(np.arange(9) < 2, 0, dlse)
    for kind in kinds_of(form):
        options = {"form": form, "kind": kind, "causal": True, "layout": "bhsd", "functions": functions}
        expected = check_gradient(comm, whole, dlse=clean, **options)
        dlse[..., :2] = np.nan
        assert_equal(check_gradient(comm, whole, dlse=dlse, **options), expected)
        assert_equal(check_gradient(comm, whole, dlse=dlse, sinks=np.full(4, -np.inf), **options)[:3], expected)
        whole_rows, packing = packed(PACKED["other keys"], dtype=dtype)
        check_gradient(
            comm, whole_rows, dlse=random_dlse(1, 4, 28)[0].astype(dtype), form=form, kind=kind, functions=functions, **packing
        )


def test_dlse_of_some_ranks(comm):
    """Zeros and nothing are the same, and ranks need not agree on it."""
    q, k, v = (part(x, split(11, comm.size), comm.rank) for x in random_qkv(6, 2, 11, 4, 2, 8))
    out, lse = ulysses_attention(q, k, v, comm=comm, return_lse=True)
    dlse = np.ones_like(lse) if comm.rank == 0 else np.zeros_like(lse)
    expected = ulysses_attention_backward(q, q, k, v, out, lse, comm=comm, dlse=dlse)
    results = ulysses_attention_backward(q, q, k, v, out, lse, comm=comm, dlse=None if comm.rank else dlse)
    assert_equal(results, expected)


@pytest.mark.parametrize(
    "bad", [3, np.ones((1, 2, 3)), np.ones((2, 4, 2), np.float32), np.ones((2, 4), np.float32), np.ones((2, 2, 4), np.float64)]
)
def test_bad_dlse(comm, bad):
    q, k, v = (part(x, split(2 * comm.size, comm.size), comm.rank) for x in random_qkv(6, 1, 2 * comm.size, 4, 2, 8))
    out, lse = ulysses_attention(q, k, v, comm=comm, return_lse=True)
    assert_refused(comm, "dlse", bad, lse, lambda dlse: ulysses_attention_backward(q, q, k, v, out, lse, comm=comm, dlse=dlse))


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_dropout(comm, functions, heads, kv_heads):
    """The weights that were dropped in the forward pass, whichever rank has the head."""
    whole = random_qkv(7, 2, 17, heads, kv_heads, 16, seq_k=22)
    for dropout_p in (1e-12, 0.1, 0.99):
        check_gradient(comm, whole, dropout_p=dropout_p, seed=7, causal=True, functions=functions)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("names", [(), *COMBINATIONS], ids=" ".join)
def test_heads(comm, functions, heads, kv_heads, names):
    """Ranks that share a kv head each hold a part of its gradient; ranks may have no head at all."""
    whole = random_qkv(8, 2, 15, heads, kv_heads, 16)
    check_gradient(comm, whole, functions=functions, **some_options(names, 2, heads, 15, 15))
    check_gradient(comm, whole, context=functions is distributed, functions=functions, **some_options(names, 2, heads, 15, 15))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("how_k", SPLITS)
def test_splits(comm, how, how_k):
    """Queries and keys travel together only if their splits are the same."""
    for seq, seq_k, context in ((19, 19, False), (19, 19, True), (13, 22, how == "uneven")):
        rows, rows_k = split(seq, comm.size, how), split(seq_k, comm.size, how_k)
        options = some_options(OPTIONS, 2, 6, seq, seq_k) | {"rows": rows, "rows_k": rows_k, "context": context}
        check_gradient(comm, random_qkv(9, 2, seq, 6, 3, 16, seq_k=seq_k), **options)


def views_of(x, kind):
    """The numbers of an array (batch, heads, seq), seen in memory that holds others: with offsets, and strides of any sign."""
    none = np.full_like(x, np.nan)
    yield as_kind(np.stack([none, x]), kind)[1]
    yield as_kind(np.stack([none, x], axis=-1), kind)[..., 1]
    yield as_kind(np.pad(x, 1, constant_values=np.nan), kind)[1:-1, 1:-1, 1:-1]
    yield as_kind(np.ascontiguousarray(x[::-1, ::-1, ::-1]), kind)[::-1, ::-1, ::-1]
    swapped = as_kind(np.stack([none.transpose(2, 0, 1), x.transpose(2, 0, 1)]), kind)[1]
    yield tensor.permute_dims(swapped, (1, 2, 0)) if kind == "usm" else swapped.transpose(1, 2, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("context", [False, True])
def test_strides_of_lse(comm, kind, form, context):
    if kind not in kinds_of(form):
        pytest.skip("no such arrays")
    rows = split(9, comm.size, "uneven")
    stored = [encode(x, form) for x in random_qkv(11, 2, 9, 4, 2, 16)]
    q, k, v = (as_kind(part(x, rows, comm.rank), kind) for x in stored)
    options = {"comm": comm, **dtype_option(form)}
    out, lse, ctx = ulysses_attention(q, k, v, return_lse=True, return_ctx=True, **options)
    ctx = ctx if context else None
    expected = ulysses_attention_backward(q, q, k, v, out, lse, ctx=ctx, **options)
    for seen in views_of(as_numpy(lse), kind):
        results = ulysses_attention_backward(q, q, k, v, out, seen, ctx=ctx, **options)
        assert_equal(map(as_numpy, results), map(as_numpy, expected))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("context", [False, True])
def test_no_query_heads(comm, functions, kind, form, context):
    """Nothing reads the keys: zeros."""
    if kind not in kinds_of(form) or (context and functions is local):
        pytest.skip("no such arrays, or no context")
    q, k, v = (as_kind(encode(x, form), kind) for x in random_qkv(12, 2, 5, 0, 3, 8))
    gradients = functions.gradient(q, k, v, q, comm, context=context, **dtype_option(form))
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        assert_like(gradient, x, x.shape)
        assert not decode(gradient).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [(), ("causal",), *COMBINATIONS], ids=lambda names: " ".join(names) or "none")
def test_dtypes(comm, functions, form, names):
    dtype = dtype_of_options(form)
    options = some_options(names, 2, 6, 21, 21, dtype=dtype)
    whole = random_qkv(12, 2, 21, 6, 2, 16, dtype)
    for kind in kinds_of(form):
        check_gradient(
            comm,
            whole,
            form=form,
            kind=kind,
            context=kind != "numpy" and functions is distributed,
            functions=functions,
            **options,
        )
    check_gradient(comm, whole, form=form, layout="sbhd", functions=functions, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", [1, 3, 40, 64, 128, 256, 300, 576])
def test_head_dims(comm, functions, form, head_dim):
    whole = random_qkv(head_dim, 1, 37, 4, 2, head_dim, dtype_of_options(form))
    check_gradient(comm, whole, form=form, causal=True, functions=functions)


@pytest.mark.parametrize("exchange", ["device", "host"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("context", [False, True])
def test_exchange(comm, exchange, form, context):
    for kind in kinds_of(form):
        options = {"form": form, "kind": kind, "exchange": exchange, "context": context}
        check_gradient(comm, random_qkv(13, 2, 12, 6, 3, 16), rows=split(12, comm.size, "uneven"), **options)
        check_gradient(comm, random_qkv(13, 2, 12, 6, 3, 16, seq_k=17), causal=True, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("batch", "seq", "seq_k"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0), (1, 1, 1), (1, 1, 13), (3, 2, 1), (1, 11, 7)]
)
@pytest.mark.parametrize("names", [(), OPTIONS], ids=["none", "all"])
def test_small_sizes(comm, functions, batch, seq, seq_k, names):
    whole = random_qkv(14, batch, seq, 3, 1, 5, seq_k=seq_k)
    for context in {False, functions is distributed}:
        check_gradient(comm, whole, functions=functions, context=context, **some_options(names, batch, 3, seq, seq_k))


@pytest.mark.parametrize("names", [(), ("causal",), *COMBINATIONS], ids=lambda names: " ".join(names) or "none")
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_packed(comm, functions, names, lengths):
    whole, packing = packed(lengths)
    names = tuple(name for name in names if name != "alibi of batch")
    check_gradient(comm, whole, functions=functions, **packing, **some_options(names, 1, 4, *map(sum, lengths)))


@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("how_k", SPLITS)
def test_splits_of_packed(comm, how, how_k):
    """Ranks meet inside of sequences."""
    lengths = PACKED["other keys"]
    whole, packing = packed(lengths, 6, 3)
    rows, rows_k = (split(sum(n), comm.size, x) for n, x in zip(lengths, (how, how_k), strict=True))
    packing |= {"rows": rows, "rows_k": rows_k}
    check_gradient(comm, whole, causal=True, **packing)
    check_gradient(comm, whole, context=True, **packing, **some_options(OPTIONS, 1, 6, *map(sum, lengths)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strides", ["C", "reversed"])
def test_forms_of_packed(comm, functions, form, strides):
    lengths, dtype = PACKED["equal"], dtype_of_options(form)
    whole, packing = packed(lengths, dtype=dtype)
    del packing["cu_seqlens_k"]
    options = packing | some_options(("causal", "sinks"), 1, 4, 23, 23, dtype=dtype)
    for kind in kinds_of(form):
        check_gradient(comm, whole, form=form, kind=kind, strides=strides, functions=functions, **options)


@pytest.mark.parametrize("name", ["torch", "array_api_strict"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_kinds(comm, functions, name, dtype):
    pytest.importorskip(name)
    options = some_options(OPTIONS, 2, 4, 13, 13, dtype=dtype)
    for context in {False, functions is distributed}:
        check_gradient(
            comm, random_qkv(15, 2, 13, 4, 2, 16, dtype), form=dtype, kind=name, functions=functions, context=context
        )
        how = {"form": dtype, "kind": name, "functions": functions, "layout": "bhsd", "context": context}
        check_gradient(comm, random_qkv(15, 2, 13, 4, 2, 16, dtype), **how, **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_of_torch(comm, dtype):
    torch = pytest.importorskip("torch")
    rows = split(13, comm.size)
    whole = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in random_qkv(16, 2, 13, 4, 2, 16)]
    q, k, v = (part(x, rows, comm.rank) for x in whole)
    out, lse = ulysses_attention(q, k, v, comm=comm, causal=True, return_lse=True)
    gradients = ulysses_attention_backward(q, q, k, v, out, lse, comm=comm, causal=True)
    numbers = [x.double().numpy() for x in (whole[0], *whole)]
    for gradient, x, expected in zip(gradients, (q, k, v), dense_gradient(*numbers, causal=True)[:3], strict=True):
        assert_like(gradient, x, x.shape)
        assert_close(gradient, part(expected, rows, comm.rank), dtype, TOLERANCE)


def test_rows_that_see_nothing_and_keys_that_nobody_sees(comm, functions):
    """Their gradients are zeros, exactly, and nan in them reaches nothing."""
    q, k, v = random_qkv(17, 3, 40, 4, 2, 16)
    dout = random_dout(q).astype(np.float32)
    rows = split(40, comm.size)
    mask = np.arange(40) < np.array([[40], [30], [0]])
    bias = np.zeros((1, 1, 40, 40), np.float32)
    bias[..., 7], bias[..., 3:21, :] = -np.inf, -np.inf
    blind, unseen = np.isneginf(bias).all(-1)[0] | ~mask.any(1)[:, None], np.isneginf(bias).all(-2)[0] | ~mask
    for names in ((), ("sinks",), ("softcap", "dropout", "causal")):
        options = some_options(names, 3, 4, 40, 40) | {"key_padding_mask": mask, "bias": bias}
        clean = check_gradient(comm, (q, k, v), dout=dout, functions=functions, **options)
        for gradient, hidden in zip(clean[:3], (blind, unseen, unseen), strict=True):
            assert (gradient[part(hidden, rows, comm.rank)] == 0).all()
        for special in (np.nan, np.inf):
            dirty = [x.copy() for x in (q, k, v, dout)]
            for x, hidden in zip(dirty, (blind, unseen, unseen, blind), strict=True):
                x[hidden] = special
            assert_same(check_gradient(comm, dirty[:3], dout=dirty[3], functions=functions, **options), clean)


@pytest.mark.parametrize("special", [np.nan, np.inf])
@pytest.mark.parametrize("into", [0, 1, 2, 3], ids=["q", "k", "v", "dout"])
@pytest.mark.parametrize("causal", [False, True])
def test_special_values_stay_in_their_sequence(comm, functions, special, into, causal):
    whole, packing = packed(([14, 20, 9], [14, 20, 9]))
    dout = random_dout(whole[0]).astype(np.float32)
    clean = check_gradient(comm, whole, dout=dout, causal=causal, functions=functions, **packing)
    arrays = [x.copy() for x in (*whole, dout)]
    arrays[into][22, 1, 3] = special
    mine = [part(x, split(43, comm.size), comm.rank, axis=0) for x in arrays]
    dirty = functions.gradient(*mine, comm, causal=causal, **packing)
    others = part(np.abs(np.arange(43) - 23.5) > 10, split(43, comm.size), comm.rank, axis=0)
    assert_same([x[others] for x in dirty], [x[others] for x in clean])


@pytest.mark.parametrize("into", [1, 2], ids=["k", "v"])
def test_special_values_of_keys_do_not_reach_earlier_queries(comm, functions, into):
    whole = random_qkv(18, 2, 40, 4, 2, 16)
    clean = check_gradient(comm, whole, causal=True, functions=functions)[0]
    whole[into][0, 25, 1, 3] = np.nan
    mine = [part(x, split(40, comm.size), comm.rank) for x in (*whole, random_dout(whole[0]).astype(np.float32))]
    dirty = as_numpy(functions.gradient(*mine, comm, causal=True)[0])
    reached = np.zeros(whole[0].shape, bool)
    reached[0, 25:, 2:] = True  # the query heads of the kv head
    reached = part(reached, split(40, comm.size), comm.rank)
    assert_same([dirty[~reached]], [clean[~reached]])


def test_special_values_beside_a_huge_bias_do_not_reach_hidden_keys(comm, functions):
    """Where lse has lost the number of keys, the kernels sum up again: nan in one key makes that sum nan."""
    whole = random_qkv(20, 1, 20, 4, 2, 16)
    whole[1][0, 3] = np.nan
    mask = np.arange(20)[None] != 7
    options = {"key_padding_mask": mask, "bias": np.full((1, 1, 20, 20), -1e9, np.float32)}
    mine = [part(x, split(20, comm.size), comm.rank) for x in (*whole, random_dout(whole[0]).astype(np.float32))]
    hidden = part(~mask[0], split(20, comm.size), comm.rank, axis=0)
    for gradient in functions.gradient(*mine, comm, **options)[1:]:
        assert (as_numpy(gradient)[:, hidden] == 0).all()


@pytest.mark.parametrize("names", [(), OPTIONS], ids=["none", "all"])
@pytest.mark.parametrize("form", ["float32", "float64"])
def test_linear_in_dout(comm, functions, names, form):
    whole = random_qkv(19, 2, 29, 4, 2, 16, form)
    one, other = (random_dout(whole[0], seed) for seed in (1, 2))
    options = some_options(names, 2, 4, 29, 29, dtype=form) | {"form": form, "functions": functions}
    of_one, of_other, of_both, of_twice, of_zeros = (
        check_gradient(comm, whole, dout=dout, **options) for dout in (one, other, 3 * one + other, 2 * one, 0 * one)
    )
    for a, b, both, twice, zeros in zip(of_one, of_other, of_both, of_twice, of_zeros, strict=True):
        assert_close(both, 3 * a.astype(float) + b, form, TOLERANCE)
        np.testing.assert_array_equal(twice, 2 * a)
        assert (zeros == 0).all()


@pytest.mark.parametrize("names", [(), *COMBINATIONS], ids=lambda names: " ".join(names) or "none")
def test_repetition_is_bit_identical(comm, functions, names):
    """Also where several ranks, and several heads of a group, add up the gradient of a kv head."""
    whole, options = random_qkv(20, 2, 70, 6, 1, 32), some_options(names, 2, 6, 70, 70)
    first = check_gradient(comm, whole, functions=functions, **options)
    for _ in range(3):
        assert_equal(check_gradient(comm, whole, functions=functions, **options), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [(), *COMBINATIONS], ids=lambda names: " ".join(names) or "none")
@pytest.mark.parametrize("how", ["even", "uneven"])
def test_context_changes_nothing(comm, names, kind, how):
    options = some_options(names, 2, 6, 24, 29) | {"kind": kind}
    options |= {"rows": split(24, comm.size, how), "rows_k": split(29, comm.size, how)}
    whole = random_qkv(21, 2, 24, 6, 3, 16, seq_k=29)
    assert_equal(check_gradient(comm, whole, context=True, **options), check_gradient(comm, whole, context=False, **options))


def test_what_comes_with_a_context(comm):
    """It is the last of the results, and the others are as without it."""
    q, k, v = (part(x, split(9, comm.size), comm.rank) for x in random_qkv(22, 2, 9, 4, 2, 16))
    out, lse, _ = ulysses_attention(q, k, v, comm=comm, return_lse=True, return_ctx=True)
    alone, ctx = ulysses_attention(q, k, v, comm=comm, return_ctx=True)
    assert_equal((out, lse), ulysses_attention(q, k, v, comm=comm, return_lse=True, return_ctx=False))
    assert_equal([alone], [out])
    with_context = ulysses_attention_backward(q, q, k, v, out, lse, comm=comm, ctx=ctx)
    assert_equal(with_context, ulysses_attention_backward(q, q, k, v, out, lse, comm=comm, ctx=None))


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_outlive_later_calls(comm, kind):
    """As the layers of a model are called: forward one after the other, backward in reverse, some of it twice."""
    rows = split(19, comm.size, "uneven")
    layers = []
    for seed in range(3):
        q, k, v = (as_kind(part(x, rows, comm.rank), kind) for x in random_qkv(seed, 2, 19, 4, 2, 16))
        options = {"comm": comm, "causal": True}
        out, lse, ctx = ulysses_attention(q, k, v, return_lse=True, return_ctx=True, **options)
        expected = ulysses_attention_backward(q, q, k, v, out, lse, **options)
        layers.append(((q, q, k, v, out, lse), ctx, list(map(np.array, map(as_numpy, expected)))))
    free_workspace()
    for arrays, ctx, expected in layers[::-1] + layers[:1]:
        gradients = ulysses_attention_backward(*arrays, ctx=ctx, comm=comm, causal=True)
        assert_equal(map(as_numpy, gradients), expected)


@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (5, 5), (3, 1)])
def test_context_saves_sending_q_k_and_v(comm, how, heads, kv_heads):
    rows = split(24, comm.size, how)
    q, k, v = (part(x, rows, comm.rank) for x in random_qkv(23, 2, 24, heads, kv_heads, 16))
    with trace() as forward:
        out, lse, ctx = ulysses_attention(q, k, v, comm=comm, return_lse=True, return_ctx=True)
    with trace() as with_context:
        ulysses_attention_backward(q, q, k, v, out, lse, comm=comm, ctx=ctx)
    with trace() as without:
        ulysses_attention_backward(q, q, k, v, out, lse, comm=comm)
    there = sum(stage.bytes_sent for stage in forward.stages if stage.name == "scatter")
    assert with_context.bytes_sent() <= without.bytes_sent() - there
    assert (comm.allreduce(there) > 0) == (comm.allreduce(with_context.bytes_sent()) > 0) == (comm.size > 1)


@pytest.mark.single
def test_attention_backward_sends_nothing():
    q, k, v = random_qkv(24, 1, 20, 2, 2, 16)
    out, lse = attention(q, k, v, return_lse=True)
    with trace() as record:
        attention_backward(q, q, k, v, out, lse)
    assert record.bytes_sent() == 0


@pytest.mark.parametrize("names", [(), *((name,) for name in OPTIONS), OPTIONS], ids=lambda names: " ".join(names) or "none")
def test_differences_of_the_distributed_forward(comm, names):
    """Against the same package's forward pass alone: a few elements, each moved on the rank that has it."""
    seq, seq_k, step = 5, 6, 1e-5
    rows, rows_k = split(seq, comm.size, "uneven"), split(seq_k, comm.size)
    whole = random_qkv(25, 1, seq, 2, 1, 3, "float64", seq_k)
    options = some_options(names, 1, 2, seq, seq_k, dtype="float64")
    dout = random_dout(whole[0])
    weights = part(dout, rows, comm.rank)
    counts = rows, rows_k, rows_k

    def loss(arrays, sinks):
        given = options if sinks is None else options | {"sinks": sinks}
        mine = (part(x, n, comm.rank) for x, n in zip(arrays, counts, strict=True))
        return comm.allreduce(float(np.vdot(weights, ulysses_attention(*mine, comm=comm, **given))))

    mine = [part(x, n, comm.rank) for x, n in zip(whole, counts, strict=True)]
    gradients = distributed.gradient(*mine, weights, comm, **options)
    rng, sinks = np.random.default_rng(26), options.get("sinks")
    for number, gradient in enumerate(gradients):
        joined = np.concatenate(comm.allgather(gradient), axis=1) if number < 3 else gradient
        for _ in range(3 if number < 3 else 2):
            index = tuple(int(rng.integers(n)) for n in joined.shape)
            values = []
            for change in (step, -step):
                arrays = [x.copy() for x in (*whole, *([] if sinks is None else [sinks]))]
                arrays[number][index] += change
                values.append(loss(arrays[:3], None if sinks is None else arrays[3]))
            assert abs(joined[index] - (values[0] - values[1]) / (2 * step)) < 1e-8


@pytest.mark.parametrize("names", [(), *COMBINATIONS], ids=lambda names: " ".join(names) or "none")
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (3, 1)])
def test_result_does_not_depend_on_the_number_of_ranks(comm, names, heads, kv_heads):
    whole, options = random_qkv(27, 2, 64, heads, kv_heads, 64), some_options(names, 2, heads, 64, 64)
    rows = split(64, comm.size, "uneven")
    arrays = *whole, random_dout(whole[0]).astype(np.float32)
    results = distributed.gradient(*(part(x, rows, comm.rank) for x in arrays), comm, context=True, **options)
    for number, (result, expected) in enumerate(zip(results, local.gradient(*arrays, None, **options), strict=True)):
        expected = part(expected, rows, comm.rank) if number < 3 else expected
        np.testing.assert_allclose(result, expected, rtol=0, atol=5e-6 * np.abs(expected).max(initial=1))


@st.composite
def configurations(draw):
    """Whole arrays and all options, any that are allowed together."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (1, 5), (2, 1), (2, 3), (3, 1), (5, 1)]))
    heads, head_dim = kv_heads * group, draw(st.sampled_from([1, 3, 16, 40]))
    form, is_packed = draw(st.sampled_from(FORMS)), draw(st.booleans())
    dtype, seed = dtype_of_options(form), draw(st.integers(0, 9))
    names = drawn_names(draw, packed=is_packed)
    if is_packed:
        both = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4))
        lengths = [n for n, _ in both], [n for _, n in both]
        batch, (seq, seq_k) = 1, map(sum, lengths)
        whole, how = packed(lengths, heads, kv_heads, head_dim, dtype, seed)
    else:
        sizes = st.sampled_from([1, 2, 7, 13, 16, 23])
        batch, seq = draw(st.integers(1, 2)), draw(sizes)
        seq_k = draw(st.one_of(st.just(seq), sizes))
        whole = random_qkv(seed, batch, seq, heads, kv_heads, head_dim, dtype, seq_k)
        how = {"layout": draw(st.sampled_from(list(AXES)))}
    how |= {"context": draw(st.booleans())} | drawn_call(draw, form, seq, seq_k)
    return whole, how | drawn_options(draw, names, (batch, heads, seq, seq_k), seed, dtype)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=40)
@given(configuration=configurations())
def test_any_configuration(comm, configuration):
    whole, options = configuration
    check_gradient(comm, whole, **options)


def regression(comm, steps=8):
    """Fit the projections and the sinks of attention to what other ones give; the loss before every step.

    Every rank of `comm` has its rows of the data; without one, this rank has all of them.
    """
    rng = np.random.default_rng(28)
    batch, seq, features, heads, kv_heads, head_dim = 2, 24, 6, 4, 2, 5
    shapes = [(features, heads, head_dim), (features, kv_heads, head_dim), (features, kv_heads, head_dim)]
    data = rng.standard_normal((batch, seq, features))
    wanted, weights = ([rng.standard_normal(shape) / features**0.5 for shape in shapes] for _ in range(2))
    sinks = np.zeros(heads)
    options = {"causal": True, "dropout_p": 0.1, "softcap": 8.0}

    def project(x, matrices):
        return [np.tensordot(x, w, axes=1) for w in matrices]

    target = attention(*project(data, wanted), causal=True, sinks=np.linspace(-1, 1, heads))
    total = (lambda x: x) if comm is None else comm.allreduce
    if comm is not None:
        rows = split(seq, comm.size, "uneven")
        data, target = part(data, rows, comm.rank), part(target, rows, comm.rank)
    losses = []
    for step in range(steps):
        q, k, v = project(data, weights)
        options |= {"seed": step, "sinks": sinks}
        if comm is None:
            out, lse = attention(q, k, v, return_lse=True, **options)
            *gradients, dsinks = attention_backward(out - target, q, k, v, out, lse, **options)
        else:
            out, lse, ctx = ulysses_attention(q, k, v, comm=comm, return_lse=True, return_ctx=True, **options)
            arrays = out - target, q, k, v, out, lse
            *gradients, dsinks = ulysses_attention_backward(*arrays, comm=comm, ctx=ctx, **options)
        losses.append(total(0.5 * float(((out - target) ** 2).sum())))
        weights = [
            w - 0.02 * total(np.tensordot(data, dx, axes=([0, 1], [0, 1]))) for w, dx in zip(weights, gradients, strict=True)
        ]
        sinks = sinks - 0.02 * dsinks
    return np.array(losses)


def test_training(comm):
    """Gradient descent on rows split over ranks goes where it goes on one rank, and that is downwards."""
    losses, alone = regression(comm), regression(None)
    np.testing.assert_allclose(losses, alone, rtol=1e-10)
    assert losses[-1] < 0.7 * losses[0]


Q, K = ones(2, 3, 4, 8), ones(2, 3, 2, 8)
ARRAYS = {"dout": Q, "q": Q, "k": K, "v": K, "out": Q, "lse": 5 * ones(2, 4, 3)}  # of one rank, with 3 rows


def backward_on(comm):
    """`ulysses_attention_backward` of options."""
    return call_on(comm, ulysses_attention_backward, ARRAYS)


def like_q(name):
    """What is wrong with an array that has to be like q."""
    shapes = [(2, 2, 4, 8), (2, 3, 2, 8), (2, 3, 4, 7), (1, 3, 4, 8), (3, 4, 8), (2, 3, 32), (), (2, 4, 3, 8)]
    dtypes = ["float64", "float16", "int32", "complex64", "uint16", object]
    bad = [ones(*shape) for shape in shapes] + [ones(2, 3, 4, 8, dtype=dtype) for dtype in dtypes]
    return [(name, {}, {name: x}) for x in (*bad, None, "big", 1.0, [[[[1.0]]]])]


def of_lse():
    """What is wrong with lse: its shape, its dtype, or that it is no array."""
    bad = [ones(*shape) for shape in [(2, 3, 4), (2, 4, 2), (1, 4, 3), (2, 2, 3), (4, 3), (2, 4, 3, 1), ()]]
    bad += [ones(2, 4, 3, dtype=dtype) for dtype in ("float64", "float16", "int32", "complex64")]
    return [("lse", {}, {"lse": x}) for x in (*bad, None, "big", 1.0, [[[1.0]]])]


DOUBLE = {
    name: ones(2, 3, heads, 8, dtype=np.float64) for name, heads in (("dout", 4), ("q", 4), ("k", 2), ("v", 2), ("out", 4))
}
THD = {name: ones(3, heads, 8) for name, heads in (("dout", 4), ("q", 4), ("k", 2), ("v", 2), ("out", 4))}
THD |= {"lse": 5 * ones(4, 3), "layout": "thd", "cu_seqlens_q": lambda n: np.array([0, 2, n])}
# the name that the message must have, good options, and what is bad about others, for a number of rows of all ranks
BAD = [
    *like_q("dout"),
    *like_q("out"),
    *of_lse(),
    ("lse", DOUBLE | {"lse": ones(2, 4, 3, dtype=np.float64)}, DOUBLE | {"lse": ones(2, 4, 3)}),
    ("q", {}, {"q": ones(2, 3, 4)}),
    ("k", {}, {"k": ones(2, 3, 3, 8), "v": ones(2, 3, 3, 8)}),
    ("v", {}, {"v": ones(2, 3, 3, 8)}),
    ("dout", {}, {"v": ones(2, 3, 2, 7)}),  # v may be narrower than k, but out and dout have its width
    *[("softmax_scale", {}, {"softmax_scale": bad}) for bad in ("1", np.nan, np.inf, True)],
    ("causal", {}, {"causal": 1}),
    *[("window_size", {}, {"window_size": bad}) for bad in (3, (1, 2, 3), (-2, 0), (1.0, 2))],
    *[("softcap", {}, {"softcap": bad}) for bad in (-1, np.nan, "30")],
    *[("alibi_slopes", {}, {"alibi_slopes": bad}) for bad in (ones(3), ones(4, 2), "steep")],
    *[("bias", {}, {"bias": bad}) for bad in (ones(4), ones(3, 1, 1, 1), ones(1, 1, 1, 2), "strong")],
    ("key_padding_mask", {}, {"key_padding_mask": lambda n: ones(2, n)}),
    ("key_padding_mask", {}, {"key_padding_mask": lambda n: ones(2, n + 1, dtype=bool)}),
    *[("sinks", {}, {"sinks": bad}) for bad in (ones(3), ones(2, 4), "deep")],
    *[("layout", {}, {"layout": bad}) for bad in ("dhsb", None, 4)],
    *[("dropout_p", DROPOUT, DROPOUT | {"dropout_p": bad}) for bad in (-0.1, 1.0, "0.1")],
    *[("seed", DROPOUT, DROPOUT | {"seed": bad}) for bad in (None, -1, 1.5)],
    *[("dtype", {}, {"dtype": bad}) for bad in ("int8", 3)],
    ("attn_type", {}, {"attn_type": "numpy"}),
    ("cu_seqlens_q", {}, {"cu_seqlens_q": lambda n: np.array([0, n])}),
    ("cu_seqlens_q", THD, THD | {"cu_seqlens_q": lambda n: np.array([0, n + 1])}),
    ("cu_seqlens_q", THD, THD | {"cu_seqlens_q": None}),
    ("lse", THD, THD | {"lse": ones(1, 4, 3)}),
    ("lse", THD, THD | {"lse": ones(3, 4)}),
    ("dout", THD, THD | {"dout": ones(1, 3, 4, 8)}),
    ("out", THD, THD | {"out": ones(2, 4, 8)}),
]
BAD_IDS = [f"{number} {name} {described(bad)}" for number, (name, _, bad) in enumerate(BAD)]


@pytest.mark.single
@pytest.mark.parametrize(("name", "good", "bad"), BAD, ids=BAD_IDS)
def test_attention_backward_refuses(name, good, bad):
    call = call_on(None, attention_backward, ARRAYS)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=rf"\b{name}"):
        call(made(bad, 3))
    call(made(good, 3))


@pytest.mark.parametrize(("name", "good", "bad"), [*BAD, ("exchange", {}, {"exchange": "fast"})], ids=[*BAD_IDS, "exchange"])
def test_ulysses_attention_backward_refuses(comm, name, good, bad):
    n = 3 * comm.size
    assert_refused(comm, name, made(bad, n), made(good, n), backward_on(comm))


@pytest.mark.parametrize("name", ["dout", "out", "lse"])
@pytest.mark.parametrize(("kind", "other"), [("numpy", "dpnp"), ("dpnp", "numpy"), ("usm", "dpnp")])
def test_mixed_kinds(comm, name, kind, other):
    good = {of: as_kind(x, kind) for of, x in ARRAYS.items()}
    bad = good | {name: as_kind(as_numpy(good[name]), other)}
    assert_refused(comm, name, bad, good, backward_on(comm))


@pytest.mark.parametrize("name", ["dout", "out", "lse"])
@pytest.mark.parametrize("kind", ["dpnp", "usm"])
def test_another_queue(comm, name, kind):
    good = {of: as_kind(x, kind) for of, x in ARRAYS.items()}
    bad = good | {name: as_kind(as_numpy(good[name]), kind, new_queue())}
    assert_refused(comm, name, bad, good, backward_on(comm))


@pytest.mark.parametrize("name", ["dout", "q", "out", "lse"])
def test_tensors_with_a_gradient(comm, name):
    """In grad mode PyTorch would expect to go on through the result."""
    torch = pytest.importorskip("torch")
    good = {of: torch.from_numpy(x.copy()) for of, x in ARRAYS.items()}
    assert_refused(comm, name, good | {name: good[name].clone().requires_grad_()}, good, backward_on(comm))


def forward_context(comm, q, k, **options):
    return ulysses_attention(q, k, k, comm=comm, return_ctx=True, **options)[-1]


@pytest.mark.parametrize("bad", [(), 1, "ctx", {}, True, ones(2, 3, 4, 8), object()], ids=lambda x: type(x).__name__)
def test_no_context(comm, bad):
    good = {"ctx": forward_context(comm, ones(2, 3, 4, 8), ones(2, 3, 2, 8))}
    assert_refused(comm, "ctx", {"ctx": bad}, good, backward_on(comm))


@pytest.mark.parametrize(
    ("q", "k"),
    [
        (ones(2, 4, 4, 8), ones(2, 4, 2, 8)),
        (ones(2, 3, 4, 8), ones(2, 4, 2, 8)),
        (ones(1, 3, 4, 8), ones(1, 3, 2, 8)),
        (ones(2, 3, 4, 8), ones(2, 3, 4, 8)),
        (ones(2, 3, 4, 4), ones(2, 3, 2, 4)),
        (ones(2, 3, 4, 8, dtype=np.float64), ones(2, 3, 2, 8, dtype=np.float64)),
    ],
    ids=["rows", "keys", "batch", "kv heads", "head_dim", "dtype"],
)
def test_context_of_another_call(comm, q, k):
    good = {"ctx": forward_context(comm, ones(2, 3, 4, 8), ones(2, 3, 2, 8))}
    assert_refused(comm, "ctx", {"ctx": forward_context(comm, q, k)}, good, backward_on(comm))


@needs_ranks
def test_context_on_one_rank_alone(comm):
    """The others would wait for q, k and v."""
    ctx = {"ctx": forward_context(comm, ones(2, 3, 4, 8), ones(2, 3, 2, 8))}
    assert_disagree(comm, "ctx", ctx, {}, backward_on(comm))
    assert_disagree(comm, "ctx", {}, ctx, backward_on(comm))


@pytest.mark.parametrize(
    "names", [(), *((name,) for name in OPTIONS), *COMBINATIONS], ids=lambda names: " ".join(names) or "none"
)
@pytest.mark.parametrize("kind", ["numpy", "dpnp"])
def test_a_context_knows_the_options(comm, names, kind):
    """They may be left out, or repeated, all or some of them."""
    options = {"comm": comm, "softmax_scale": 0.3} | some_options(names, 2, 4, 9, 9)
    options = {name: as_kind(x, kind) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    q, k, v = (as_kind(part(x, split(9, comm.size), comm.rank), kind) for x in random_qkv(27, 2, 9, 4, 2, 16))
    out, lse, ctx = ulysses_attention(q, k, v, return_lse=True, return_ctx=True, **options)
    expected = [as_numpy(x) for x in ulysses_attention_backward(q, q, k, v, out, lse, **options)]
    for repeated in ({"comm": comm}, dict(list(options.items())[:-1]), options):
        results = ulysses_attention_backward(q, q, k, v, out, lse, ctx=ctx, **repeated)
        assert_equal(map(as_numpy, results), expected)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("causal", {"causal": True}, {"causal": False}),
        ("causal", {}, {"causal": True}),
        ("softmax_scale", {"softmax_scale": 0.3}, {"softmax_scale": None}),
        ("window_size", {"window_size": (3, 1)}, {"window_size": (-1, -1)}),
        ("softcap", {"softcap": 2.0}, {"softcap": 0.0}),
        ("alibi_slopes", {"alibi_slopes": ones(4)}, {"alibi_slopes": 2 * ones(4)}),
        ("sinks", {"sinks": ones(4)}, {"sinks": None}),
        ("seed", DROPOUT, {"seed": 2}),
        ("dropout_p", DROPOUT, {"dropout_p": 0.2}),
        ("attn_type", {}, {"attn_type": AttnType.NUMPY}),
        ("bias", {"bias": ones(1, 1, 1, 1)}, {"bias": ones(1, 4, 1, 1)}),
    ],
    ids=described,
)
def test_options_that_are_not_those_of_the_context(comm, name, forward, backward):
    ctx = {"ctx": forward_context(comm, ones(2, 3, 4, 8), ones(2, 3, 2, 8), **forward)}
    assert_refused(comm, name, ctx | backward, ctx, backward_on(comm))


def test_an_option_that_there_is_not(comm):
    assert_refused(comm, "there is no option 'scale'", {"scale": 1.0}, {}, backward_on(comm))


def test_a_context_cannot_be_pickled(comm):
    ctx = forward_context(comm, ones(2, 3, 4, 8), ones(2, 3, 2, 8))
    for copy in (pickle.dumps, deepcopy):
        with pytest.raises(TypeError, match="a Context cannot be pickled"):
            copy(ctx)


@pytest.mark.parametrize("bad", [1, "yes", None])
def test_wish_for_a_context(comm, bad):
    def call(options):
        return ulysses_attention(ones(2, 3, 4, 8), ones(2, 3, 2, 8), ones(2, 3, 2, 8), comm=comm, **options)

    assert_refused(comm, "return_ctx", {"return_ctx": bad}, {"return_ctx": True}, call)


@needs_ranks
def test_wish_for_a_context_on_one_rank_alone(comm):
    def call(options):
        return ulysses_attention(ones(2, 3, 4, 8), ones(2, 3, 2, 8), ones(2, 3, 2, 8), comm=comm, **options)

    assert_disagree(comm, "return_ctx", {"return_ctx": True}, {}, call)


@needs_ranks
@pytest.mark.parametrize(
    ("name", "this", "others"),
    [
        ("causal", {"causal": True}, {}),
        ("window_size", {"window_size": (3, 1)}, {"window_size": (3, 2)}),
        ("softcap", {"softcap": 2.0}, {}),
        ("sinks", {"sinks": ones(4)}, {}),
        ("sinks", {"sinks": 2 * ones(4)}, {"sinks": ones(4)}),
        ("seed", DROPOUT | {"seed": 2}, DROPOUT),
        ("key_padding_mask", {"key_padding_mask": lambda n: np.arange(2 * n).reshape(2, n) > 0}, {}),
    ],
    ids=described,
)
def test_ranks_disagree(comm, name, this, others):
    n = 3 * comm.size
    assert_disagree(comm, name, made(this, n), made(others, n), backward_on(comm))


@needs_ranks
def test_forward_and_backward_at_once(comm):
    """One rank in the forward pass and the others in the backward pass: an error, and no deadlock."""

    def call(forward):
        if forward:
            return ulysses_attention(Q, K, K, comm=comm)
        return backward_on(comm)({})

    results = outcomes(comm, lambda: call(comm.rank == comm.size - 1))
    assert all(result is not None and result[0] is ValueError and "function" in result[1] for result in results), results
    assert outcomes(comm, lambda: call(False)) == [None] * comm.size


@pytest.mark.parametrize("attn_type", COMPLETE)
def test_ranks_without_heads(comm, attn_type):
    """Found by test_any_configuration: the reference failed on them alone, and the other ranks waited."""
    check_gradient(comm, random_qkv(3, 1, 16, 1, 1, 3, seq_k=1), rows=split(16, comm.size, "last"), attn_type=attn_type)
