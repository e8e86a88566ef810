"""Attention of whole and of distributed arrays against the oracle."""

from concurrent.futures import ThreadPoolExecutor

import dpnp
import numpy as np
import oracle
import pytest
from helpers import (
    COMPLETE,
    KINDS,
    LAYOUTS,
    SPLITS,
    WORLD,
    as_kind,
    as_numpy,
    as_view,
    assert_like,
    needs_ranks,
    new_queue,
    part,
    random_qkv,
    split,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from oracle import TOLERANCE

import ulysses_dp.backends.intel_sycl
from ulysses_dp import attention, free_workspace, ulysses_attention
from ulysses_dp.backends.intel_sycl import IntelSycl

DTYPES = ("float32", "float64")
# heads and kv_heads: MHA, GQA, MQA; fewer than ranks, multiples of their number, and not
HEADS = [(12, 12), (12, 4), (8, 2), (6, 1), (5, 5), (3, 1), (1, 1), (2, 2), (7, 7), (10, 5)]


def local(q, k, v, _comm, **options):
    """`attention` with the arguments of `distributed`."""
    return attention(q, k, v, **options)


def distributed(q, k, v, comm, **options):
    """`ulysses_attention` with the arguments of `local`."""
    return ulysses_attention(q, k, v, comm=comm, **options)


def check(
    comm,
    whole,
    *,
    rows=None,
    rows_k=None,
    kind="numpy",
    layout="C",
    queue=None,
    function=distributed,
    causal=False,
    softmax_scale=None,
    return_lse=True,
    **options,
):
    """Every rank passes its rows of the whole q, k and v, and gets its rows of the oracle's result."""
    rows = split(whole[0].shape[1], comm.size) if rows is None else rows
    rows_k = split(whole[1].shape[1], comm.size) if rows_k is None else rows_k
    mine = [as_view(part(x, n, comm.rank), kind, layout, queue) for x, n in zip(whole, (rows, rows_k, rows_k), strict=True)]
    before = [as_numpy(x).copy() for x in mine]
    results = function(*mine, comm, causal=causal, softmax_scale=softmax_scale, return_lse=return_lse, **options)
    out, lse = results if return_lse else (results, None)

    expected_out, expected_lse = oracle.dense_attention(*whole, causal=causal, softmax_scale=softmax_scale)
    batch, _, heads, head_dim = whole[0].shape
    tolerance = {"rtol": 0, "atol": TOLERANCE[str(whole[0].dtype)]}
    assert_like(out, mine[0], (batch, rows[comm.rank], heads, head_dim))
    np.testing.assert_allclose(as_numpy(out), part(expected_out, rows, comm.rank), **tolerance)
    if return_lse:
        assert_like(lse, mine[0], (batch, heads, rows[comm.rank]), c_contiguous=False)
        np.testing.assert_allclose(as_numpy(lse), part(expected_lse, rows, comm.rank, axis=2), **tolerance)
    for x, unchanged in zip(mine, before, strict=True):
        np.testing.assert_array_equal(as_numpy(x), unchanged)
    return out


@pytest.fixture(params=[pytest.param(local, marks=pytest.mark.single), distributed], ids=["local", "distributed"])
def function(request, comm):
    """Both functions; under mpiexec `attention` has nothing to do with the other ranks."""
    return request.param


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 13), (1, 67)])
def test_heads(comm, function, heads, kv_heads, causal, batch, seq):
    check(comm, random_qkv(seq, batch, seq, heads, kv_heads, 16), causal=causal, function=function)


@pytest.mark.parametrize("head_dim", [1, 3, 16, 32, 64, 80, 96, 128, 192, 256, 257, 576])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(comm, function, head_dim, dtype):
    check(comm, random_qkv(head_dim, 1, 65, 4, 2, head_dim, dtype), causal=True, function=function)


@pytest.mark.parametrize(("batch", "seq"), [(3, 2), (1, 64), (2, 96), (1, 101), (1, 127), (1, 130)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(comm, function, batch, seq, dtype):
    check(comm, random_qkv(seq, batch, seq, 4, 4, 32, dtype), causal=True, function=function)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("seq", "seq_k"), [(7, 64), (64, 7), (1, 50), (50, 1), (0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_of_another_length(comm, function, seq, seq_k, causal, dtype):
    check(comm, random_qkv(seq, 2, seq, 6, 3, 16, dtype, seq_k), causal=causal, function=function)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(0, 0), (0, 2), (4, 2)])
def test_no_batch_or_no_heads(comm, function, batch, heads, kv_heads):
    check(comm, random_qkv(0, batch, 5, heads, kv_heads, 16), function=function)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("how_k", SPLITS)
def test_splits(comm, how, how_k):
    rows, rows_k = split(31, comm.size, how), split(31, comm.size, how_k)
    check(comm, random_qkv(1, 2, 31, 6, 3, 16), rows=rows, rows_k=rows_k, causal=True)
    check(comm, random_qkv(1, 1, 31, 6, 3, 16, seq_k=47), rows=rows, rows_k=split(47, comm.size, how_k), causal=True)


@pytest.mark.parametrize("attn_type", COMPLETE)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("softmax_scale", [None, 0, -0.3, np.float32(0.4)])
def test_options(comm, function, attn_type, return_lse, softmax_scale):
    whole = random_qkv(1, 2, 33, 6, 2, 16)
    options = {"attn_type": attn_type, "return_lse": return_lse, "softmax_scale": softmax_scale}
    check(comm, whole, function=function, **options)
    check(comm, whole, function=function, causal=np.True_, window_size=[-1, -1], softcap=0, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attn_type", COMPLETE)
def test_kinds_and_layouts(comm, function, kind, layout, attn_type):
    options = {"kind": kind, "layout": layout, "attn_type": attn_type, "causal": True, "function": function}
    check(comm, random_qkv(2, 2, 24, 4, 2, 16), **options)
    check(comm, random_qkv(2, 2, 23, 4, 2, 5, "float64", 30), **options)


@pytest.mark.parametrize("kind", ["dpnp", "usm"])
def test_on_a_queue_of_the_user(comm, function, kind):
    check(comm, random_qkv(3, 1, 20, 4, 4, 16), kind=kind, queue=new_queue(), function=function)


@pytest.mark.parametrize("usm_type", ["device", "shared", "host"])
def test_kinds_of_usm_memory(comm, function, usm_type):
    x, rows = random_qkv(3, 1, 20, 4, 4, 16)[0], split(20, comm.size)
    mine = dpnp.asarray(part(x, rows, comm.rank), usm_type=usm_type)
    expected = part(oracle.dense_attention(x, x, x)[0], rows, comm.rank)
    np.testing.assert_allclose(as_numpy(function(mine, mine, mine, comm)), expected, rtol=0, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("library", [np, dpnp])
def test_broadcast_and_shared_arrays(comm, function, library):
    """Strides of 0, read only, and q, k and v that are one array."""
    x, rows = np.repeat(random_qkv(4, 1, 18, 1, 1, 16)[0], 4, axis=2), split(18, comm.size)
    one_head = library.asarray(part(x[:, :, :1], rows, comm.rank))
    mine = library.broadcast_to(one_head, (1, rows[comm.rank], 4, 16))
    expected = part(oracle.dense_attention(x, x, x)[0], rows, comm.rank)
    np.testing.assert_allclose(as_numpy(function(mine, mine, mine, comm)), expected, rtol=0, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("exchange", ["auto", "device", "host"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_k", [24, 29])
def test_exchange(comm, exchange, kind, dtype, seq_k):
    whole = random_qkv(5, 2, 24, 12, 12, 16, dtype, seq_k)
    check(comm, whole, kind=kind, exchange=exchange, causal=True)
    check(comm, whole, kind=kind, exchange=exchange, rows=split(24, comm.size, "gaps"), return_lse=False)


@st.composite
def configurations(draw):
    """Whole arrays and all options, any that are allowed together."""
    counts = st.lists(st.integers(0, 25), min_size=WORLD.size, max_size=WORLD.size).map(tuple)
    rows = draw(counts)
    rows_k = draw(st.one_of(st.just(rows), counts))
    kv_heads, group = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    dtype, head_dim = draw(st.sampled_from(DTYPES)), draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 128, 256])))
    shape = draw(st.integers(1, 3)), sum(rows), kv_heads * group, kv_heads, head_dim, dtype, sum(rows_k)
    return random_qkv(draw(st.integers(0, 9)), *shape), {
        "rows": rows,
        "rows_k": rows_k,
        "causal": draw(st.booleans()),
        "return_lse": draw(st.booleans()),
        "softmax_scale": draw(st.sampled_from([None, 0.5, 0.01])) if head_dim <= 40 else None,
        "kind": draw(st.sampled_from(KINDS)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "exchange": draw(st.sampled_from(["auto", "device", "host"])),
        "attn_type": draw(st.sampled_from(COMPLETE)),
    }


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=150)
@given(configuration=configurations())
def test_any_configuration(comm, configuration):
    whole, options = configuration
    check(comm, whole, **options)


@needs_ranks
def test_ranks_may_differ_in_kind_layout_and_route(comm):
    whole = random_qkv(6, 2, 21, 5, 5, 16)
    check(
        comm,
        whole,
        kind=KINDS[comm.rank % len(KINDS)],
        layout=LAYOUTS[comm.rank % len(LAYOUTS)],
        exchange=("host", "device")[comm.rank % 2],
    )


def test_communicators(comm):
    """The default, this rank alone, and parts of the ranks in reversed order."""
    whole = random_qkv(7, 1, 26, 6, 3, 16)
    rows = split(26, comm.size)
    mine = [part(x, rows, comm.rank) for x in whole]
    np.testing.assert_array_equal(ulysses_attention(*mine), ulysses_attention(*mine, comm=comm))
    check(MPI.COMM_SELF, whole, causal=True)
    for colour in (0, comm.rank % 2, comm.rank):
        piece = comm.Split(colour, key=-comm.rank)
        check(piece, whole, causal=True)
        check(piece, whole, rows=split(26, piece.size, "uneven"))
        piece.Free()


def test_traffic_of_the_user_on_the_same_communicator(comm):
    """Collectives and messages that are under way when a call begins are none of ours, in whatever order ranks start them."""
    whole = random_qkv(9, 1, 26, 6, 3, 16)
    mine = [part(x, split(26, comm.size), comm.rank) for x in whole]
    ours = ulysses_attention(*mine, comm=comm)
    neighbour, total = (comm.rank + 1) % comm.size, np.zeros(1)
    receipt, message = np.zeros(1), np.full(1, comm.rank, float)
    requests = [comm.Irecv(receipt, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)]
    for turn in range(2):
        if turn == comm.rank % 2:
            requests.append(comm.Iallreduce(np.ones(1), total))
            requests.append(comm.Isend(message, neighbour))
        if turn == 0:
            np.testing.assert_array_equal(ulysses_attention(*mine, comm=comm), ours)
    MPI.Request.Waitall(requests)
    assert total == comm.size
    assert receipt == (comm.rank - 1) % comm.size


def test_communicators_are_given_back(comm):
    """There are only so many: what a call keeps with a communicator goes with it."""
    whole = random_qkv(9, 1, 6, 2, 2, 4)
    mine = [part(x, split(6, comm.size), comm.rank) for x in whole]
    for _ in range(3000):
        piece = comm.Dup()
        ulysses_attention(*mine, comm=piece)
        piece.Free()


def test_workspace_is_used_again(comm):
    """Growing and shrinking calls of both dtypes and routes, in between given back."""
    for seq in (3, 40, 90, 40, 0, 3):
        for dtype in DTYPES:
            for exchange in ("device", "host"):
                check(comm, random_qkv(seq, 1, seq, 5, 5, 16, dtype), exchange=exchange, causal=True)
                check(comm, random_qkv(seq, 1, seq, 5, 5, 16, dtype, seq // 2), exchange=exchange)
        if seq == 90:
            free_workspace()


def test_results_survive_later_calls(comm, function):
    """What was returned is no part of the workspace."""
    whole = random_qkv(8, 2, 30, 6, 6, 16)
    mine = [as_kind(part(x, split(30, comm.size), comm.rank), "dpnp") for x in whole]
    results = function(*mine, comm, return_lse=True)
    copies = [as_numpy(x).copy() for x in results]
    function(*(x * 3 for x in mine), comm, return_lse=True)
    for x, copy in zip(results, copies, strict=True):
        np.testing.assert_array_equal(as_numpy(x), copy)


@pytest.mark.parametrize("kind", ["dpnp", "usm"])
def test_memory_of_a_result_is_used_again_only_when_nothing_refers_to_it(comm, function, kind):
    mine = [as_kind(part(x, split(30, comm.size), comm.rank), kind) for x in random_qkv(8, 2, 30, 6, 6, 16)]
    held, wanted = [], []
    for _ in range(12):
        out, lse = function(*mine, comm, return_lse=True)
        wanted += [as_numpy(out).copy(), as_numpy(lse).copy()]
        held += [out[:, ::2], lse]  # a view keeps all of it
        function(*(x * 3 for x in mine), comm, return_lse=True)
        del out
    for x, copy in zip(held, wanted, strict=True):
        np.testing.assert_array_equal(as_numpy(x), copy[:, ::2] if x.shape != copy.shape else copy)


def test_repetition_is_bit_identical(comm, function):
    mine = [part(x, split(77, comm.size), comm.rank) for x in random_qkv(9, 1, 77, 6, 2, 64)]
    first = function(*mine, comm, causal=True, return_lse=True)
    for _ in range(5):
        for result, expected in zip(function(*mine, comm, causal=True, return_lse=True), first, strict=True):
            np.testing.assert_array_equal(result, expected)


def test_a_call_like_the_last_one_finds_what_that_has_found(comm, function, monkeypatch):
    """Only the first one chooses kernels and lists their arguments; the others launch the same on their arrays."""
    steps, first = [], IntelSycl._forward

    def count(*arguments):
        steps.append(1)
        first(*arguments)

    monkeypatch.setattr(IntelSycl, "_forward", count)
    for seed in range(3):
        check(comm, random_qkv(seed, 1, 23, 12, 12, 16), function=function, softmax_scale=0.37, kind="dpnp")
    assert len(steps) <= 1  # none after the same calls of another function


@pytest.mark.single
def test_threads():
    """Every thread has a workspace of its own."""

    def run(seed):
        q, k, v = random_qkv(seed, 1, 30 + seed, 4, 2, 16)
        results = [attention(q, k, v, causal=True) for _ in range(50)]
        expected = oracle.dense_attention(q, k, v, causal=True)[0]
        return max(abs(result - expected).max() for result in results)

    with ThreadPoolExecutor(4) as threads:
        assert max(threads.map(run, range(8))) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_waits_for_earlier_work_of_the_queue(comm, function, dtype):
    """The inputs are still being computed when the call starts, the result is used at once."""
    whole = random_qkv(10, 1, 64, 4, 4, 32, dtype)
    rows = split(64, comm.size)
    for _ in range(5):
        big = dpnp.ones((1500, 1500), dtype=dtype)
        busy = (big @ big)[0, 0] * 0  # takes longer than it takes Python to reach the call
        q, k, v = (as_kind(part(x, rows, comm.rank), "dpnp") + busy.astype(dtype) for x in whole)
        result = function(q * 2, k, v + 1, comm) * 3 + 1
        expected = oracle.dense_attention(2 * whole[0], whole[1], whole[2] + whole[2].dtype.type(1))[0] * 3 + 1
        np.testing.assert_allclose(as_numpy(result), part(expected, rows, comm.rank), rtol=0, atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (12, 3), (5, 5), (2, 1)])
def test_result_does_not_depend_on_the_number_of_ranks(comm, causal, heads, kv_heads):
    whole = random_qkv(11, 2, 128, heads, kv_heads, 64)
    rows = split(128, comm.size, "uneven")
    results = ulysses_attention(*(part(x, rows, comm.rank) for x in whole), comm=comm, causal=causal, return_lse=True)
    alone = attention(*whole, causal=causal, return_lse=True)
    for result, expected, axis in zip(results, alone, (1, 2), strict=True):
        np.testing.assert_allclose(result, part(expected, rows, comm.rank, axis), rtol=0, atol=2e-6)


@pytest.mark.parametrize("special", [np.nan, np.inf])
@pytest.mark.parametrize("into", [0, 1, 2], ids=["q", "k", "v"])
def test_special_values_reach_the_rows_that_see_them(comm, function, special, into):
    whole = random_qkv(12, 1, 40, 4, 2, 16)
    whole[into][0, 25, 1, 3] = special
    with np.errstate(invalid="ignore"):  # inf - inf of an infinite score
        check(comm, whole, causal=True, function=function)


@pytest.mark.single
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_copies_of_keys_and_values(comm, monkeypatch, dtype, kv_heads):
    """From some number of rows on the CPU kernel reads copies of k and v with the rows of a head next to each other."""
    monkeypatch.setattr(ulysses_dp.backends.intel_sycl, "HEAD_MAJOR_FROM", 30 * 16)
    for layout in LAYOUTS:
        whole = random_qkv(13, 2, 30, 4, kv_heads, 16, dtype, 35)
        check(comm, whole, kind="dpnp", layout=layout, causal=True, function=local)
