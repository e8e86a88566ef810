"""Attention on meshes, forward and gradient, against the dense float64 oracle: every factorisation, order and option."""

import numpy as np
import pytest
from checks import some_options
from gradients import dense_gradient
from helpers import as_kind, as_numpy, outcomes, random_qkv, split
from oracle import TOLERANCE, dense_attention, from_bfloat16, to_bfloat16

from ulysses_dp import (
    AttnType,
    LongContextAttention,
    UlyssesAttention,
    attention,
    trace,
    ulysses_attention,
    ulysses_attention_backward,
    ulysses_flash_attn_func,
)
from ulysses_dp._ranks.orders import ORDERS, positions, rows_of_ranks

RINGS = (1, 2, 3, 4, 5, 6)
OPTIONS = ("window", "softcap", "alibi", "alibi of batch", "bias", "mask", "sinks", "dropout")


def rings(comm):
    return [ring for ring in RINGS if comm.size % ring == 0]


def held(seq, comm, ring, order, counts=None, cu_seqlens=None):
    """The numbers of the rows of every rank."""
    return [positions(rows) for rows in rows_of_ranks(seq, comm.size, ring, order, cu_seqlens, counts)]


def run(comm, arrays, rows, keys, dout, dlse, *, context=False, **options):
    """What this rank gets: out, lse, the gradients, and dsinks."""
    q, k, v = arrays[0][:, rows], arrays[1][:, keys], arrays[2][:, keys]
    result = ulysses_attention(q, k, v, comm=comm, return_lse=True, return_ctx=context, **options)
    out, lse = result[:2]
    again = {"ctx": result[2]} if context else options
    grads = ulysses_attention_backward(dout[:, rows], q, k, v, out, lse, dlse=dlse[..., rows], comm=comm, **again)
    return out, lse, grads


def check(comm, arrays, sizes, order, *, q_counts=None, k_counts=None, context=False, dtype="float32", kv="ring", **options):
    """A call and its gradient on meshes of so many groups, against the oracle, which is asked once for all."""
    q, k, v = arrays
    dout = np.random.default_rng(7).standard_normal((*q.shape[:3], v.shape[3])).astype(q.dtype)
    dlse = np.random.default_rng(8).standard_normal((q.shape[0], q.shape[2], q.shape[1])).astype(q.dtype)
    expected, expected_lse = dense_attention(q, k, v, **options)
    *dense, dsinks = dense_gradient(dout, q, k, v, dlse=dlse, **options)
    tolerance = TOLERANCE[dtype] * 3
    for ring in sizes:
        rows = held(q.shape[1], comm, ring, order, q_counts)[comm.rank]
        keys = held(k.shape[1], comm, ring, order, k_counts)[comm.rank]
        out, lse, grads = run(comm, arrays, rows, keys, dout, dlse, context=context, ring=ring, order=order, kv=kv, **options)
        np.testing.assert_allclose(out, expected[:, rows], atol=tolerance, rtol=0)
        np.testing.assert_allclose(lse, expected_lse[..., rows], atol=tolerance, rtol=1e-5)
        for mine, whole, which in zip(grads, dense, (rows, keys, keys), strict=False):
            scale = max(1.0, np.abs(whole).max(initial=0.0))
            np.testing.assert_allclose(mine / scale, whole[:, which] / scale, atol=tolerance, rtol=0)
        if options.get("sinks") is not None:
            np.testing.assert_allclose(grads[3], dsinks, atol=10 * tolerance, rtol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv", ["ring", "all_gather"])
def test_every_mesh_and_order(comm, order, causal, kv):
    arrays = random_qkv(0, 2, 37, 6, 2, 16)
    check(comm, arrays, rings(comm), order, kv=kv, causal=causal, context=causal == (kv == "ring"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_option(comm, name, order, dtype):
    arrays = random_qkv(1, 1, 29, 4, 2, 8, dtype)
    options = some_options((name,), 1, 4, 29, 29, dtype=dtype)
    check(comm, arrays, rings(comm), order, causal=name != "window", dtype=dtype, **options)


@pytest.mark.parametrize("seed", range(12))
def test_all_options_at_once(comm, seed):
    rng = np.random.default_rng(seed)
    seq, seq_k, head_dim = rng.integers(1, 60), rng.integers(1, 60), int(rng.choice([1, 5, 16, 32]))
    kv_heads = int(rng.integers(1, 4))
    heads, batch = kv_heads * int(rng.integers(1, 4)), int(rng.integers(1, 3))
    names = [name for name in OPTIONS if rng.random() < 0.5]
    options = some_options(tuple(names), batch, heads, seq, seq_k, seed=seed)
    order = str(rng.choice(ORDERS))
    ring = int(rng.choice(rings(comm)))
    kv = str(rng.choice(["ring", "all_gather", "auto"]))
    arrays = random_qkv(seed, batch, seq, heads, kv_heads, head_dim, seq_k=seq_k)
    causal, context = (bool(rng.random() < 0.5) for _ in range(2))
    check(comm, arrays, [ring], order, kv=kv, causal=causal, context=context, **options)


@pytest.mark.parametrize("how", ["uneven", "gaps", "first", "last"])
def test_uneven_rows_and_ranks_without_any(comm, how):
    arrays = random_qkv(2, 1, 31, 4, 2, 8)
    counts = split(31, comm.size, how)
    for kv, sizes in (("ring", (1, 2)), ("all_gather", (3, 4, 5, 6))):
        of_these = [ring for ring in rings(comm) if ring in sizes]
        check(comm, arrays, of_these, "contiguous", q_counts=counts, k_counts=counts, kv=kv, causal=True, window_size=(9, 0))


@pytest.mark.parametrize("order", ORDERS)
def test_packed_sequences(comm, order):
    ends = (0, 5, 5, 18, 40)
    q, k, v = (x[0] for x in random_qkv(3, 1, 40, 4, 2, 8))
    dout = np.random.default_rng(5).standard_normal(q.shape).astype(q.dtype)
    for ring in rings(comm):
        rows = held(40, comm, ring, order, None, None if order == "contiguous" else ends)[comm.rank]
        options = {"layout": "thd", "cu_seqlens_q": ends, "causal": True, "ring": ring, "order": order, "comm": comm}
        mine = [x[rows] for x in (q, k, v)]
        out, lse = ulysses_attention(*mine, return_lse=True, **options)
        expected, expected_lse = dense_attention(q, k, v, causal=True, cu_seqlens_q=ends)
        np.testing.assert_allclose(out, expected[rows], atol=3e-5)
        np.testing.assert_allclose(lse, expected_lse[:, rows], atol=3e-5)
        grads = ulysses_attention_backward(dout[rows], *mine, out, lse, **options)
        dense = dense_gradient(dout, q, k, v, causal=True, cu_seqlens_q=ends)
        for x, whole in zip(grads, dense, strict=False):
            np.testing.assert_allclose(x, whole[rows], atol=6e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_packed_sequences_with_padding_at_the_end(comm, order):
    """The rows of each that do not count lie behind those that do; masks are aligned to these."""
    ends, used = (0, 9, 20, 32), {"seqused_q": (9, 7, 4), "seqused_k": (6, 11, 4)}
    q, k, v = (x[0] for x in random_qkv(16, 1, 32, 4, 2, 8))
    options = {"cu_seqlens_q": ends, "causal": True, "window_size": (5, 0)} | used
    expected, expected_lse = dense_attention(q, k, v, **options)
    dense = dense_gradient(q, q, k, v, **options)
    for ring in rings(comm):
        rows = held(32, comm, ring, order, None, None if order == "contiguous" else ends)[comm.rank]
        how = {"layout": "thd", "ring": ring, "order": order, "comm": comm} | options
        mine = [x[rows] for x in (q, k, v)]
        out, lse = ulysses_attention(*mine, return_lse=True, **how)
        np.testing.assert_allclose(out, expected[rows], atol=3e-5)
        np.testing.assert_allclose(lse, expected_lse[:, rows], atol=3e-5)
        for x, whole in zip(ulysses_attention_backward(mine[0], *mine, out, lse, **how), dense, strict=False):
            np.testing.assert_allclose(x, whole[rows], atol=6e-5)


@pytest.mark.parametrize("kv", ["ring", "all_gather"])
def test_one_array_for_all_and_again(comm, kv):
    """Keys that are queries and values, too, and a gradient that is taken twice: what travels is nobody's array."""
    x = random_qkv(17, 1, 24, 2, 2, 8)[0]
    dense = dense_gradient(x, x, x, x, causal=True)[:3]
    for ring in rings(comm):
        rows = held(24, comm, ring, "zigzag")[comm.rank]
        how = {"comm": comm, "causal": True, "ring": ring, "order": "zigzag", "kv": kv}
        mine = as_kind(x[:, rows], "dpnp")
        out, lse, ctx = ulysses_attention(mine, mine, mine, return_lse=True, return_ctx=True, **how)
        of_ctx = {"comm": comm, "ctx": ctx}
        first, *others = (
            list(map(as_numpy, ulysses_attention_backward(mine, mine, mine, mine, out, lse, **again)))
            for again in (of_ctx, how, of_ctx)
        )
        for grads in others:
            for a, b in zip(first, grads, strict=True):
                np.testing.assert_array_equal(a, b)
        for a, whole in zip(first, dense, strict=True):
            np.testing.assert_allclose(a, whole[:, rows], atol=3e-5)
        np.testing.assert_array_equal(as_numpy(mine), x[:, rows])


def test_16_bits_are_rounded_once(comm):
    q, k, v = (from_bfloat16(to_bfloat16(x)) for x in random_qkv(4, 1, 64, 4, 2, 16))
    expected, _ = dense_attention(q, k, v)
    for ring in rings(comm):
        rows = held(64, comm, ring, "zigzag")[comm.rank]
        bits = [to_bfloat16(x[:, rows]) for x in (q, k, v)]
        out = ulysses_attention(*bits, comm=comm, dtype="bfloat16", ring=ring, order="zigzag")
        # half of the last of 8 bits, and a little for float32
        np.testing.assert_allclose(from_bfloat16(out), expected[:, rows], rtol=2**-8, atol=1e-5)


def test_gradients_of_16_bits(comm):
    q, k, v, dout = (
        from_bfloat16(to_bfloat16(x)) for x in (*random_qkv(18, 1, 64, 4, 2, 16), random_qkv(19, 1, 64, 4, 2, 16)[0])
    )
    *dense, _ = dense_gradient(dout, q, k, v, causal=True)
    for ring in rings(comm):
        rows = held(64, comm, ring, "zigzag")[comm.rank]
        mine = [to_bfloat16(x[:, rows]) for x in (q, k, v)]
        how = {"comm": comm, "dtype": "bfloat16", "ring": ring, "order": "zigzag", "causal": True}
        out, lse = ulysses_attention(*mine, return_lse=True, **how)
        grads = ulysses_attention_backward(to_bfloat16(dout[:, rows]), *mine, out, lse, **how)
        for x, whole in zip(grads, dense, strict=True):
            # out, of which the gradient is made, is rounded, too, and dk and dv are not rounded in between
            np.testing.assert_allclose(from_bfloat16(x), whole[:, rows], rtol=2**-8, atol=TOLERANCE["bfloat16"])


@pytest.mark.parametrize("kv", ["ring", "all_gather"])
def test_a_call_that_is_repeated_allocates_nothing(comm, kv):
    arrays = random_qkv(20, 1, 32, 4, 2, 16)
    for ring in rings(comm):
        rows = held(32, comm, ring, "zigzag")[comm.rank]
        mine = [as_kind(x[:, rows], "dpnp") for x in arrays]
        how = {"comm": comm, "causal": True, "ring": ring, "order": "zigzag", "kv": kv}
        for _ in range(3):
            with trace() as record:
                out, lse = ulysses_attention(*mine, return_lse=True, **how)
                grads = ulysses_attention_backward(out, *mine, out, lse, **how)
            del out, lse, grads
        assert [call.allocations for call in record.calls] == [0, 0]


def test_the_same_for_every_mesh_and_bit_by_bit_again(comm):
    q, k, v = random_qkv(5, 1, 48, 4, 4, 32)
    whole = attention(q, k, v, causal=True)
    for ring in rings(comm):
        rows = held(48, comm, ring, "striped")[comm.rank]
        mine = [x[:, rows] for x in (q, k, v)]
        first, second = (ulysses_attention(*mine, comm=comm, causal=True, ring=ring, order="striped") for _ in range(2))
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, whole[:, rows], atol=2e-6)


def test_other_kinds_and_routes(comm):
    q, k, v = random_qkv(6, 1, 24, 4, 2, 8)
    expected, _ = dense_attention(q, k, v, causal=True)
    for ring in rings(comm):
        rows = held(24, comm, ring, "zigzag")[comm.rank]
        mine = [x[:, rows] for x in (q, k, v)]
        for options in ({"exchange": "host"}, {"attn_type": AttnType.NUMPY}):
            out = ulysses_attention(*mine, comm=comm, causal=True, ring=ring, order="zigzag", **options)
            np.testing.assert_allclose(out, expected[:, rows], atol=1e-5)


def test_hidden_nan_stays_hidden(comm):
    q, k, v = random_qkv(7, 1, 24, 2, 2, 8)
    k[:, -3:], v[:, -3:] = np.nan, np.inf
    expected, _ = dense_attention(q, k, v, causal=True)
    for ring in rings(comm):
        rows = held(24, comm, ring, "zigzag")[comm.rank]
        out = ulysses_attention(*(x[:, rows] for x in (q, k, v)), comm=comm, causal=True, ring=ring, order="zigzag")
        early = rows < 21
        np.testing.assert_allclose(out[:, early], expected[:, rows[early]], atol=1e-5)


def test_more_ranks_than_heads(comm):
    arrays = random_qkv(8, 1, 20, 1, 1, 8)
    rows = held(20, comm, comm.size, "zigzag")[comm.rank]
    out = ulysses_attention(*(x[:, rows] for x in arrays), comm=comm, causal=True, ring="auto", order="zigzag")
    np.testing.assert_allclose(out, dense_attention(*arrays, causal=True)[0][:, rows], atol=1e-5)


@pytest.mark.parametrize("order", ["zigzag", "zigzag_ranks"])
def test_a_causal_mask_loads_all_ranks_alike(comm, order):
    seq = 16 * comm.size
    arrays = random_qkv(9, 1, seq, comm.size, comm.size, 8)
    for ring in rings(comm)[1:]:
        rows = held(seq, comm, ring, order)[comm.rank]
        with trace() as record:
            ulysses_attention(*(x[:, rows] for x in arrays), comm=comm, causal=True, ring=ring, order=order)
        heads = comm.size // (comm.size // ring)
        assert sum(call.pairs for call in record.calls) == heads * seq * (seq + 1) // 2 // ring


def test_keys_go_no_further_than_they_are_seen(comm):
    seq, width = 8 * comm.size, 8
    arrays = random_qkv(10, 1, seq, 1, 1, width)
    counts = (8,) * comm.size
    rows = held(seq, comm, comm.size, "contiguous", counts)[comm.rank]
    mine = [x[:, rows] for x in arrays]
    block = 2 * 8 * width * 4
    last = comm.rank == comm.size - 1
    for options, hops in (({"causal": True, "window_size": (7, 0)}, 1), ({"causal": True, "window_size": (8, 0)}, 1)):
        with trace() as record:
            ulysses_attention(*mine, comm=comm, ring=comm.size, **options)
        # the own keys go to the next rank alone
        assert record.bytes_sent() == (0 if last else hops * block)
    with trace() as record:
        ulysses_attention(*mine, comm=comm, ring=comm.size)
    assert record.bytes_sent() == (comm.size - 1) * block


def test_gathered_keys_go_to_those_who_see_them(comm):
    seq, width = 8 * comm.size, 8
    mine = [x[:, 8 * comm.rank : 8 * comm.rank + 8] for x in random_qkv(10, 1, seq, 1, 1, width)]
    block, later = 2 * 8 * width * 4, comm.size - 1 - comm.rank
    for options, far in (({}, comm.size - 1), ({"causal": True}, later), ({"window_size": (7, 0)}, min(later, 1))):
        with trace() as record:
            out, lse = ulysses_attention(*mine, comm=comm, ring=comm.size, kv="all_gather", return_lse=True, **options)
        assert record.bytes_sent() == far * block
        with trace() as record:
            ulysses_attention_backward(out, *mine, out, lse, comm=comm, ring=comm.size, kv="all_gather", **options)
        # the gradients come back from where the keys went
        seen = comm.size - 1 if not options else comm.rank if "causal" in options else min(comm.rank, 1)
        assert record.bytes_sent() == (far + seen) * block


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ring": 7}, ValueError, "ring must divide"),
        ({"ring": "all"}, ValueError, "ring must be an integer or a Mesh or 'auto', not 'all'"),
        ({"ring": 1.0}, TypeError, "ring must be an integer"),
        ({"kv": "gather"}, ValueError, "kv must be one of ring, all_gather and auto"),
        ({"kv": None}, TypeError, "kv must be a string"),
        ({"order": "random"}, ValueError, "order must be one of"),
        ({"order": 3}, TypeError, "order must be a string"),
        ({"order": "striped", "overlap": 2}, ValueError, "overlap must be 1"),
    ],
)
def test_bad_meshes(comm, options, error, message):
    q = np.ones((1, 4, 2, 8), np.float32)
    for kind, text in outcomes(comm, lambda: ulysses_attention(q, q, q, comm=comm, **options)):
        assert kind is error
        assert message in text


@pytest.mark.parametrize(("name", "order"), [("basic", "contiguous"), ("zigzag", "zigzag"), ("stripe", "striped")])
def test_the_class_and_the_functions_of_others(comm, name, order):
    q, k, v = random_qkv(12, 1, 24, 2, 2, 8)
    expected, _ = dense_attention(q, k, v, causal=True)
    for ring in rings(comm):
        rows = held(24, comm, ring, order)[comm.rank]
        mine = [x[:, rows] for x in (q, k, v)]
        layers = (
            LongContextAttention(ring_impl_type=name, sequence_process_group=comm, ring=ring),
            UlyssesAttention(comm, ring=ring, order=order),
        )
        results = [layer(*mine, causal=True) for layer in layers]
        results.append(ulysses_flash_attn_func(*mine, causal=True, group=comm, ring=ring, order=order))
        for result in results:
            np.testing.assert_allclose(result, expected[:, rows], atol=1e-5)


def test_an_unknown_ring_implementation():
    with pytest.raises(ValueError, match="ring_impl_type must be one of basic, zigzag"):
        LongContextAttention(ring_impl_type="spiral")


def test_rows_that_do_not_fit_the_order(comm):
    if comm.size == 1:
        pytest.skip("one rank holds all rows")
    q = np.ones((1, 5 + 3 * comm.rank, 2, 8), np.float32)
    for kind, text in outcomes(comm, lambda: ulysses_attention(q, q, q, comm=comm, ring=comm.size, order="zigzag")):
        assert kind is ValueError
        assert "see row_positions" in text


def test_what_needs_a_smaller_lse_is_refused(comm):
    """Keys that all have a large bias are equal, but how many a group has is lost in its lse."""
    if comm.size == 1:
        pytest.skip("one rank needs no ring")
    q, k, v = (x[:, :4] for x in random_qkv(11, 1, 4 * comm.size, 2, 2, 8))
    options = {"bias": np.full((1, 1, 1, 1), -1e9, np.float32), "comm": comm}
    out, lse = ulysses_attention(q, k, v, return_lse=True, **options)
    for call in (
        lambda: ulysses_attention(q, k, v, ring=comm.size, **options),
        lambda: ulysses_attention_backward(out, q, k, v, out, lse, ring=comm.size, **options),
    ):
        for kind, text in outcomes(comm, call):
            assert kind is ValueError
            assert "lse must be at most 4096" in text


def test_a_large_bias_for_some_keys(comm):
    """Those of one group, even if they are all it has, are hidden."""
    bias = np.zeros((1, 1, 1, 4 * comm.size), np.float32)
    bias[..., :4] = -1e9 * (comm.size > 1)
    q, k, v = random_qkv(11, 1, 4 * comm.size, 2, 2, 8)
    mine = slice(4 * comm.rank, 4 * comm.rank + 4)
    out = ulysses_attention(*(x[:, mine] for x in (q, k, v)), ring=comm.size, comm=comm, bias=bias)
    np.testing.assert_allclose(out, dense_attention(q, k, v, bias=bias)[0][:, mine], atol=1e-5)


def test_several_meshes_alive_at_once(comm):
    """Contexts of all meshes are kept, on two communicators, and used in another order than they were made."""
    seq, other = 8 * comm.size, comm.Dup()
    q, k, v = random_qkv(13, 1, seq, 4, 2, 8)
    dense = dense_gradient(q, q, k, v, causal=True)[:3]
    made = []
    for kv in ("ring", "all_gather"):
        for ring in rings(comm):
            for ranks in (comm, other):
                rows = held(seq, comm, ring, "zigzag")[comm.rank]
                mine = [x[:, rows] for x in (q, k, v)]
                how = {"comm": ranks, "causal": True, "ring": ring, "order": "zigzag", "kv": kv}
                made.append((ranks, rows, mine, ulysses_attention(*mine, return_lse=True, return_ctx=True, **how)))
    for ranks, rows, mine, (out, lse, ctx) in reversed(made):
        grads = ulysses_attention_backward(mine[0], *mine, out, lse, comm=ranks, ctx=ctx)
        for x, whole in zip(grads, dense, strict=True):
            np.testing.assert_allclose(x, whole[:, rows], atol=3e-5)
    other.Free()


@pytest.mark.parametrize("order", ORDERS)
def test_a_sequence_that_is_shorter_than_the_ring(comm, order):
    for seq in (1, max(comm.size - 1, 1)):
        arrays = random_qkv(14, 1, seq, 2, 1, 8)
        for kv in ("ring", "all_gather"):
            check(comm, arrays, [comm.size], order, kv=kv, causal=True)


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_mask_all_ranks_are_loaded_alike(comm, order):
    seq = 4 * comm.size
    rows = held(seq, comm, comm.size, order)[comm.rank]
    arrays = random_qkv(15, 1, seq, 1, 1, 8)
    with trace() as record:
        ulysses_attention(*(x[:, rows] for x in arrays), comm=comm, ring=comm.size, order=order)
    assert sum(call.pairs for call in record.calls) == (4 * seq if comm.size > 1 else 0)
