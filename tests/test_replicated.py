"""Tokens that every rank holds whole, forward and gradient, on every mesh: they count once, wherever they are."""

import numpy as np
import pytest
from checks import some_options
from gradients import dense_gradient
from helpers import as_kind, as_numpy, needs_ranks, outcomes, random_qkv, split
from oracle import TOLERANCE, dense_attention, from_bfloat16, to_bfloat16

from ulysses_dp import (
    LongContextAttention,
    UlyssesAttention,
    trace,
    ulysses_attention,
    ulysses_attention_backward,
    ulysses_flash_attn_func,
    ulysses_flash_attn_kvpacked_func,
    ulysses_flash_attn_qkvpacked_func,
    ulysses_flash_attn_varlen_func,
)
from ulysses_dp._ranks.orders import ORDERS, PLACES, positions, rows_of_ranks

OPTIONS = ("window", "softcap", "alibi", "bias", "mask", "sinks", "dropout", "ranges")
HEADS, KV_HEADS, WIDTH = 4, 2, 8


def rings(comm):
    return [ring for ring in range(1, 7) if comm.size % ring == 0]


def parted(x, tokens, place):
    """The replicated tokens and the sequence in a whole of both."""
    cut = tokens if place == "start" else x.shape[1] - tokens
    parts = x[:, :cut], x[:, cut:]
    return parts if place == "start" else parts[::-1]


def mine(comm, x, ring, order, counts=None, cu_seqlens=None):
    """The rows of this rank of a sequence."""
    rows = rows_of_ranks(x.shape[1], comm.size, ring, order, cu_seqlens, counts)
    return x[:, positions(rows[comm.rank])]


def check(comm, arrays, tokens, place, ring, order, *, counts=None, context=False, dtype="float32", kv="ring", **options):
    """Of whole arrays, these many tokens, of the queries and of the keys, are replicated."""
    n = dict(zip("qkv", (*tokens, tokens[1]), strict=True))
    whole = dict(zip("qkv", arrays, strict=True))
    whole["dout"] = np.random.default_rng(3).standard_normal(arrays[0].shape).astype(dtype)
    n["dout"] = n["out"] = n["lse"] = n["q"]
    both = {name: parted(x, n[name], place) for name, x in whole.items()}
    of_tokens = {name: x for name, (x, _) in both.items()}
    rows = {
        name: mine(comm, x, ring, order, counts if counts is None else split(x.shape[1], comm.size, counts))
        for name, (_, x) in both.items()
    }
    how = {"comm": comm, "ring": ring, "order": order, "kv": kv, "replicated_at": place} | options
    results = ulysses_attention(
        *(rows[x] for x in "qkv"), replicated=[of_tokens[x] for x in "qkv"], return_lse=True, return_ctx=context, **how
    )
    out, lse, out_r, lse_r = results[:4]
    expected, expected_lse = dense_attention(*arrays, **options)
    tolerance = 3 * TOLERANCE[dtype]

    def compare(got, got_r, dense, name, scale=1.0):
        dense_r, of_rows = parted(dense, n[name], place)
        of_rows = mine(comm, of_rows, ring, order, counts if counts is None else split(of_rows.shape[1], comm.size, counts))
        np.testing.assert_allclose(got / scale, of_rows / scale, atol=tolerance, rtol=1e-5)
        np.testing.assert_allclose(got_r / scale, dense_r / scale, atol=tolerance, rtol=1e-5)

    compare(out, out_r, expected, "q")
    compare(lse.swapaxes(1, 2), lse_r.swapaxes(1, 2), expected_lse.swapaxes(1, 2), "q")
    again = {"comm": comm, "ctx": results[4]} if context else how
    # of the rows, of the tokens, or of both
    dlse = np.random.default_rng(8).standard_normal((*arrays[0].shape[:3], 1)).astype(dtype)
    rows_are, tokens_are = context or place == "start", not context or place == "start"
    dlse_r, of_rows = parted(dlse, n["q"], place)
    dlse_r *= tokens_are
    of_rows *= rows_are
    dlse = np.concatenate([dlse_r, of_rows] if place == "start" else [of_rows, dlse_r], axis=1)[..., 0].swapaxes(1, 2)
    of_rows = mine(comm, of_rows, ring, order, counts if counts is None else split(of_rows.shape[1], comm.size, counts))
    of_rows, dlse_r = (x[..., 0].swapaxes(1, 2) for x in (of_rows, dlse_r))
    grads = ulysses_attention_backward(
        rows["dout"],
        *(rows[x] for x in "qkv"),
        out,
        lse,
        dlse=of_rows if rows_are else None,
        replicated=(of_tokens["dout"], *(of_tokens[x] for x in "qkv"), out_r, lse_r, *([dlse_r] if tokens_are else [])),
        **again,
    )
    *dense, dsinks = dense_gradient(whole["dout"], *arrays, dlse=dlse, **options)
    for number, (name, of_all) in enumerate(zip("qkv", dense, strict=True)):
        compare(grads[number], grads[3 + number], of_all, name, max(1.0, abs(of_all).max(initial=0.0)))
    if options.get("sinks") is not None:
        np.testing.assert_allclose(grads[6], dsinks, atol=10 * tolerance, rtol=1e-4)
    return [out_r, lse_r, *grads[3:6]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", ORDERS)
def test_every_mesh_and_order(comm, order, place):
    arrays = random_qkv(0, 2, 29, HEADS, KV_HEADS, WIDTH)
    for ring in rings(comm):
        kv = "all_gather" if ring == 2 else "ring"
        check(comm, arrays, (7, 7), place, ring, order, kv=kv, causal=True, context=place == "start")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_counts_both(comm, name, place):
    arrays = random_qkv(1, 1, 23, HEADS, KV_HEADS, WIDTH)
    if name == "ranges":
        ends = np.random.default_rng(0).integers(0, 24, (23, 2))
        options = {"key_ranges": np.sort(ends, axis=1)}
    else:
        options = some_options((name,), 1, HEADS, 23, 23)
    for ring in rings(comm):
        check(comm, arrays, (5, 5), place, ring, "zigzag", causal=name != "window", **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tokens", [(0, 0), (1, 1), (0, 6), (3, 0), (17, 19)], ids=str)
def test_any_number_of_tokens(comm, tokens, place):
    """Also of keys alone, and a whole without other rows."""
    arrays = random_qkv(2, 1, 17, HEADS, KV_HEADS, WIDTH, seq_k=19)
    for ring in rings(comm):
        check(comm, arrays, tokens, place, ring, "contiguous", context=True)


@pytest.mark.parametrize("how", ["uneven", "gaps", "last"])
def test_uneven_rows(comm, how):
    arrays = random_qkv(3, 1, 25, HEADS, KV_HEADS, WIDTH, "float64")
    for ring in rings(comm):
        check(comm, arrays, (4, 4), "start", ring, "contiguous", counts=how, causal=True, dtype="float64")


def test_they_are_the_same_on_all_ranks_and_again(comm):
    arrays = random_qkv(4, 1, 21, HEADS, KV_HEADS, WIDTH)
    for ring in rings(comm):
        first, second = (check(comm, arrays, (6, 6), "end", ring, "zigzag", causal=True) for _ in range(2))
        for x, y in zip(first, second, strict=True):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(x, comm.bcast(x))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", ORDERS)
def test_packed_sequences(comm, order, place):
    """The tokens may be a sequence of their own, a part of one, or more than one."""
    q, k, v = (x[0] for x in random_qkv(5, 1, 40, HEADS, KV_HEADS, WIDTH))
    ends, tokens = (0, 5, 5, 18, 31, 40), 11
    options = {"causal": True, "cu_seqlens_q": ends}
    expected, _ = dense_attention(q, k, v, **options)
    first = 0 if place == "start" else 40 - tokens
    of_rows = np.clip(np.array(ends) - (tokens if place == "start" else 0), 0, 40 - tokens)
    packed = None if order == "contiguous" else tuple(map(int, of_rows))
    for ring in rings(comm):
        of_tokens, rows = zip(*(parted(x[None], tokens, place) for x in (q, k, v)), strict=True)
        rows = [mine(comm, x, ring, order, None, packed)[0] for x in rows]
        how = {"comm": comm, "ring": ring, "order": order, "replicated_at": place, "layout": "thd"} | options
        out, out_r = ulysses_attention(*rows, replicated=[x[0] for x in of_tokens], **how)
        _, rest = parted(expected[None], tokens, place)
        np.testing.assert_allclose(out, mine(comm, rest, ring, order, None, packed)[0], atol=3e-5)
        np.testing.assert_allclose(out_r, expected[first : first + tokens], atol=3e-5)


@pytest.mark.parametrize("kind", ["dpnp", "usm", "torch"])
@pytest.mark.parametrize("layout", ["bhsd", "sbhd"])
def test_kinds_and_layouts(comm, kind, layout):
    axes = {"bhsd": (0, 2, 1, 3), "sbhd": (1, 0, 2, 3)}[layout]
    whole = random_qkv(6, 2, 18, HEADS, KV_HEADS, WIDTH)
    expected, expected_lse = dense_attention(*whole)
    of_tokens, rows = zip(*(parted(x, 4, "start") for x in whole), strict=True)
    given = [
        [as_kind(np.ascontiguousarray(x.transpose(axes)), kind) for x in some]
        for some in ([mine(comm, x, 1, "contiguous") for x in rows], of_tokens)
    ]
    results = ulysses_attention(*given[0], replicated=given[1], comm=comm, layout=layout, return_lse=True)
    assert {type(x) for x in results} == {type(given[0][0])}
    out, _, out_r, lse_r = map(as_numpy, results)
    np.testing.assert_allclose(out.transpose(axes), mine(comm, expected[:, 4:], 1, "contiguous"), atol=1e-5)
    np.testing.assert_allclose(out_r.transpose(axes), expected[:, :4], atol=1e-5)
    np.testing.assert_allclose(lse_r, expected_lse[..., :4], atol=1e-5)


def by_name(comm, name, rows, tokens, **options):
    """Out, lse and those of the tokens, of a function by the name of another package."""
    q, k, v = rows
    how = {"causal": True, "return_attn_probs": True, "replicated": tokens} | options
    if name == "UlyssesAttention":
        layer, swapped = UlyssesAttention(comm, 1, 2), [x.swapaxes(1, 2) for x in (*rows, *tokens)]
        out, lse, nothing, out_r, lse_r = layer(*swapped[:3], **how | {"replicated": swapped[3:]})
        out, out_r = out.swapaxes(1, 2), out_r.swapaxes(1, 2)
    elif name == "LongContextAttention":
        layer = LongContextAttention(ring_impl_type="zigzag", sequence_process_group=comm, ring=comm.size)
        out, lse, nothing, out_r, lse_r = layer(*rows, **how)
    elif name == "varlen":
        ends = [0, 5, comm.allreduce(q.shape[1]) + tokens[0].shape[1]]
        how["replicated"] = [x[0] for x in tokens]
        results = ulysses_flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, group=comm, **how)
        out, lse, nothing, out_r, lse_r = (x if x is None else x[None] for x in results)
    else:
        function, arrays = {
            "flash": (ulysses_flash_attn_func, lambda: rows),
            "qkv": (ulysses_flash_attn_qkvpacked_func, lambda: [np.stack(rows, 2)]),
            "kv": (ulysses_flash_attn_kvpacked_func, lambda: [q, np.stack((k, v), 2)]),
        }[name]
        out, lse, nothing, out_r, lse_r = function(*arrays(), group=comm, **how)
    assert nothing is None
    return out, lse, out_r, lse_r


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["UlyssesAttention", "LongContextAttention", "flash", "qkv", "kv", "varlen"])
def test_functions_by_other_names(comm, name, place):
    """Their results, and the gradient that belongs to these."""
    kv_heads = HEADS if name == "qkv" else KV_HEADS
    whole, tokens = random_qkv(9, 1, 16 * comm.size + 5, HEADS, kv_heads, WIDTH), 5
    ends = {"cu_seqlens_q": (0, 5, whole[0].shape[1])} if name == "varlen" else {}
    dense_options, sequences = {"causal": True} | ends, [x[0] for x in whole] if ends else whole
    dout = np.random.default_rng(4).standard_normal(whole[0].shape, dtype=np.float32)
    expected, expected_lse = dense_attention(*sequences, **dense_options)
    *dense, _ = dense_gradient(dout[0] if ends else dout, *sequences, **dense_options)
    expected, expected_lse, *dense = (x[None] if ends else x for x in (expected, expected_lse, *dense))

    how = {"ring": comm.size, "order": "zigzag"} if name == "LongContextAttention" else {"ring": 1, "order": "contiguous"}
    of_tokens, rows = zip(*(parted(x, tokens, place) for x in (*whole, dout)), strict=True)
    rows = [mine(comm, x, *how.values()) for x in rows]
    results = by_name(comm, name, rows[:3], of_tokens[:3], replicated_at=place)
    out, lse, out_r, lse_r = results
    packed = {"layout": "thd", **ends} if ends else {}
    arrays = rows[3], *rows[:3], out, lse
    arrays_r = of_tokens[3], *of_tokens[:3], out_r, lse_r
    arrays, arrays_r = ([np.ascontiguousarray(x[0] if ends else x) for x in some] for some in (arrays, arrays_r))
    grads = ulysses_attention_backward(
        *arrays, comm=comm, causal=True, replicated=arrays_r, replicated_at=place, **how, **packed
    )
    grads = [x[None] if ends else x for x in grads]
    lses = [np.moveaxis(x, 1, 2)[..., None] for x in (lse, lse_r, expected_lse)]
    for got, got_r, of_all in ((out, out_r, expected), lses, *zip(grads[:3], grads[3:], dense, strict=True)):
        dense_r, of_rows = parted(of_all, tokens, place)
        np.testing.assert_allclose(got, mine(comm, of_rows, *how.values()), atol=1e-4)
        np.testing.assert_allclose(got_r, dense_r, atol=1e-4)


def test_bits(comm):
    whole = [from_bfloat16(to_bfloat16(x)) for x in random_qkv(7, 1, 32, HEADS, KV_HEADS, WIDTH)]
    expected, _ = dense_attention(*whole)
    for ring in rings(comm):
        of_tokens, rows = zip(*(parted(to_bfloat16(x), 6, "end") for x in whole), strict=True)
        rows = [mine(comm, x, ring, "zigzag") for x in rows]
        how = {"comm": comm, "ring": ring, "order": "zigzag", "dtype": "bfloat16", "replicated_at": "end"}
        out, out_r = ulysses_attention(*rows, replicated=of_tokens, **how)
        np.testing.assert_allclose(from_bfloat16(out_r), expected[:, -6:], rtol=2**-8, atol=1e-5)
        np.testing.assert_allclose(from_bfloat16(out), mine(comm, expected[:, :-6], ring, "zigzag"), rtol=2**-8, atol=1e-5)


def test_a_causal_mask_loads_all_groups_alike_with_them(comm):
    """In zigzag order, the groups share the tokens as they share the rows."""
    size = comm.size
    arrays = random_qkv(8, 1, 24 * size, size, size, WIDTH)
    for ring in rings(comm)[1:]:
        of_tokens, rows = zip(*(parted(x, 8 * size, "start") for x in arrays), strict=True)
        rows = [mine(comm, x, ring, "zigzag") for x in rows]
        with trace() as record:
            ulysses_attention(*rows, replicated=of_tokens, comm=comm, causal=True, ring=ring, order="zigzag")
        pairs = 24 * size * (24 * size + 1) // 2
        assert sum(call.pairs for call in record.calls) == pairs  # ring heads, and of their pairs a ring-th


GOOD = np.ones((1, 2, HEADS, WIDTH), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"replicated": GOOD}, TypeError, "replicated must be a tuple of q, k, v, not ndarray"),
        ({"replicated": (GOOD, GOOD)}, ValueError, "replicated must be the 3 arrays q, k, v, not 2"),
        ({"replicated": (GOOD, GOOD, None)}, TypeError, "replicated: v must be an array"),
        ({"replicated": (GOOD, GOOD, GOOD[:, :1])}, ValueError, "replicated: k and v must have the same shape"),
        ({"replicated": [x[:, :, :2] for x in (GOOD, GOOD, GOOD)]}, ValueError, "replicated must have the heads"),
        ({"replicated": [x.repeat(2, 0) for x in (GOOD, GOOD, GOOD)]}, ValueError, "replicated must have the batch"),
        ({"replicated": [x.astype("float64") for x in (GOOD, GOOD, GOOD)]}, TypeError, "replicated must have the dtype"),
        ({"replicated_at": "middle"}, ValueError, "replicated_at must be one of start and end, not 'middle'"),
        ({"replicated_at": 0}, TypeError, "replicated_at must be a string"),
    ],
)
def test_bad_tokens(comm, change, error, message):
    """On one rank; all raise."""
    options = {"replicated": (GOOD, GOOD, GOOD), "comm": comm} | (change if comm.rank == comm.size - 1 else {})
    for kind, text in outcomes(comm, lambda: ulysses_attention(GOOD, GOOD, GOOD, **options)):
        assert kind is error
        assert message in text


def test_options_for_the_rows_alone(comm):
    options = {"replicated": (GOOD, GOOD, GOOD), "comm": comm, "key_padding_mask": np.ones((1, 2 * comm.size), bool)}
    for kind, text in outcomes(comm, lambda: ulysses_attention(GOOD, GOOD, GOOD, **options)):
        assert kind is ValueError
        assert f"key_padding_mask must be (batch, {2 * comm.size + 2})" in text


@needs_ranks
def test_another_number_on_every_rank(comm):
    x = GOOD.repeat(comm.rank + 1, 1)
    for kind, text in outcomes(comm, lambda: ulysses_attention(GOOD, GOOD, GOOD, replicated=(x, x, x), comm=comm)):
        assert kind is ValueError
        assert "replicated must be the same on all ranks" in text


def test_bad_gradients(comm):
    three = (GOOD, GOOD, GOOD)
    out, lse, out_r, lse_r, ctx = ulysses_attention(*three, replicated=three, comm=comm, return_lse=True, return_ctx=True)
    for replicated, error, message in (
        ((out_r, *three, out_r), ValueError, "replicated must be the 6 arrays dout, q, k, v, out, lse, not 5"),
        ((out_r, *three, out_r, lse_r[..., :1]), ValueError, "replicated: lse must have shape"),
        (None, ValueError, "replicated must have the (2, 2) queries and keys of ctx, not (0, 0)"),
    ):
        for kind, text in outcomes(
            comm,
            lambda replicated=replicated: ulysses_attention_backward(
                out, *three, out, lse, replicated=replicated, comm=comm, ctx=ctx
            ),
        ):
            assert kind is error
            assert message in text
