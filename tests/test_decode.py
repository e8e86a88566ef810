"""`decode_attention`: a cache that stays split over the ranks, against the dense float64 oracle over all of it."""

import numpy as np
import pytest
from checks import some_options
from helpers import KINDS, as_kind, as_numpy, assert_like, outcomes, part, random_qkv, split
from oracle import TOLERANCE, dense_attention, from_bfloat16, to_bfloat16

from ulysses_dp import decode_attention, trace

OPTIONS = ("causal", "window", "softcap", "alibi", "bias", "mask", "sinks")


def cache_of(x, counts, comm):
    return part(x, counts, comm.rank)


@pytest.mark.parametrize("how", ["even", "uneven", "gaps", "last"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(comm, how, name):
    q, k, v = random_qkv(0, 2, 3, 4, 2, 16, seq_k=37)
    counts = split(37, comm.size, how)
    options = some_options((name,), 2, 4, 3, 37)
    expected, expected_lse = dense_attention(q, k, v, **options)
    result, lse = decode_attention(q, *(cache_of(x, counts, comm) for x in (k, v)), comm=comm, return_lse=True, **options)
    np.testing.assert_allclose(result, expected, atol=TOLERANCE["float32"])
    np.testing.assert_allclose(lse, expected_lse, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("lengths", [None, [5, 2]])
def test_the_largest_scores(comm, lengths):
    """Of the keys of all ranks, without those beyond the lengths; the results are those of a call without them."""
    q, k, v = random_qkv(0, 2, 3, 4, 2, 16, seq_k=9 * comm.size)
    options = some_options(("softcap", "alibi", "sinks"), 2, 4, 3, 9 * comm.size)
    mine = [cache_of(x, (9,) * comm.size, comm) for x in (k, v)]
    how = {"comm": comm, "lengths": lengths, "return_lse": True} | options
    out, lse, largest = decode_attention(q, *mine, return_max_logit=True, **how)
    for x, y in zip((out, lse), decode_attention(q, *mine, **how), strict=True):
        np.testing.assert_array_equal(x, y)
    used = [9, 9] if lengths is None else lengths
    expected = []
    for b, n in enumerate(used):
        keys = (x[b : b + 1].reshape(comm.size, 9, 2, 16)[:, :n].reshape(1, -1, 2, 16) for x in (k, v))
        of_batch = {name: x[b : b + 1] if name == "alibi_slopes" and x.ndim == 2 else x for name, x in options.items()}
        expected.append(dense_attention(q[b : b + 1], *keys, max_logit=True, **of_batch)[2])
    np.testing.assert_allclose(largest, np.max(expected, axis=0), atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_all_options_at_once(comm, seed):
    rng = np.random.default_rng(seed)
    kv_heads, seq_k, seq_q, batch = (int(rng.integers(1, n)) for n in (4, 50, 5, 3))
    heads = kv_heads * int(rng.integers(1, 4))
    q, k, v = random_qkv(seed, batch, seq_q, heads, kv_heads, int(rng.choice([1, 7, 32])), seq_k=seq_k)
    counts = split(seq_k, comm.size, str(rng.choice(["even", "uneven", "first"])))
    options = some_options(tuple(name for name in OPTIONS if rng.random() < 0.5), batch, heads, seq_q, seq_k, seed=seed)
    result = decode_attention(q, *(cache_of(x, counts, comm) for x in (k, v)), comm=comm, **options)
    np.testing.assert_allclose(result, dense_attention(q, k, v, **options)[0], atol=TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_dtypes(comm, kind, dtype):
    arrays = random_qkv(1, 1, 2, 4, 2, 8, "float32" if dtype == "bfloat16" else dtype, seq_k=24)
    if dtype == "bfloat16":
        arrays = tuple(to_bfloat16(x) for x in arrays)
    q, k, v = arrays
    counts = split(24, comm.size)
    mine = [as_kind(np.ascontiguousarray(x), kind) for x in (q, cache_of(k, counts, comm), cache_of(v, counts, comm))]
    mine = [mine[0], *(as_kind(as_numpy(x), kind, getattr(mine[0], "sycl_queue", None)) for x in mine[1:])]
    result = decode_attention(*mine, comm=comm, dtype="bfloat16" if dtype == "bfloat16" else None)
    assert_like(result, mine[0], q.shape)
    numbers = [from_bfloat16(x) if dtype == "bfloat16" else x for x in (q, k, v, as_numpy(result))]
    np.testing.assert_allclose(numbers[3], dense_attention(*numbers[:3])[0], atol=TOLERANCE[dtype])


def test_a_loop_of_generation(comm):
    """50 steps with a cache that is larger than what it holds, against the whole again in every step."""
    rng = np.random.default_rng(2)
    heads, kv_heads, width, slots = 4, 2, 16, 64
    caches, length = np.full((2, 1, slots, kv_heads, width), np.nan, np.float32), 0
    whole = np.empty((2, 1, 0, kv_heads, width), np.float32)
    for step in range(50):
        q, *new = (rng.standard_normal((1, 1, n, width), dtype=np.float32) for n in (heads, kv_heads, kv_heads))
        whole = np.concatenate([whole, np.stack(new)], axis=2)
        if step % comm.size == comm.rank:  # in turns, which is no order of positions
            caches[:, :, length] = np.stack(new)[:, :, 0]
            length += 1
        result = decode_attention(q, *caches, comm=comm, lengths=length)
        np.testing.assert_allclose(result, dense_attention(q, *whole)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "window", "softcap", "alibi", "alibi of batch", "sinks", "ranges of batch"])
def test_lengths_of_every_batch(comm, name):
    """Batches that have grown differently, and some of them not on all ranks; what is beyond their lengths is nan."""
    batch, rows = 3, 9
    rng = np.random.default_rng(4)
    lengths = rng.integers(0, rows + 1, (comm.size, batch))
    lengths[0] = 9, 4, 2
    q, *whole = random_qkv(4, batch, 2, 4, 2, 8, seq_k=rows * comm.size)
    ranges = {"key_ranges": np.array([[(0, 2), (1, 2)], [(0, 1), (0, 2)], [(1, 2), (0, 1)]])}
    options = ranges if name == "ranges of batch" else some_options((name,), batch, 4, 2, rows * comm.size)
    caches = np.full((2, batch, rows, 2, 8), np.nan, np.float32)
    first = lengths[: comm.rank].sum(axis=0)
    for b, n in enumerate(lengths[comm.rank]):
        for cache, x in zip(caches, whole, strict=True):
            cache[b, :n] = x[b, first[b] : first[b] + n]
    result = decode_attention(q, *caches, comm=comm, lengths=lengths[comm.rank], **options)
    for b, n in enumerate(lengths.sum(axis=0)):
        own = {key: x[b : b + 1] for key, x in options.items()} if name.endswith("of batch") else options
        expected, _ = dense_attention(q[b : b + 1], *(x[b : b + 1, :n] for x in whole), **own)
        np.testing.assert_allclose(result[b : b + 1], expected, atol=TOLERANCE["float32"])


def test_what_lengths_of_every_batch_do_not_go_with(comm):
    q, k = np.ones((2, 1, 2, 4), np.float32), np.ones((2, 4, 2, 4), np.float32)
    bias = np.zeros((1, 1, 1, 1), np.float32)
    for kind, text in outcomes(comm, lambda: decode_attention(q, k, k, comm=comm, lengths=(1, 2), bias=bias)):
        assert kind is ValueError
        assert "bias needs as many keys in every batch" in text


def test_nothing_of_the_cache_moves(comm):
    q, k, v = random_qkv(3, 1, 1, 4, 2, 8, seq_k=1000)
    counts = split(1000, comm.size)
    with trace() as record:
        decode_attention(q, *(cache_of(x, counts, comm) for x in (k, v)), comm=comm)
    assert record.bytes_sent() == (comm.size - 1) * 4 * (8 + 1) * 4


def test_a_bias_in_which_the_number_of_keys_is_lost(comm):
    q, k = np.ones((1, 1, 2, 4), np.float32), np.ones((1, 1 + comm.rank, 2, 4), np.float32)
    bias = np.full((1, 1, 1, 1), -1e9, np.float32)
    if comm.size == 1:
        np.testing.assert_allclose(decode_attention(q, k, k, comm=comm, bias=bias), 1)
        return
    for kind, text in outcomes(comm, lambda: decode_attention(q, k, k, comm=comm, bias=bias)):
        assert kind is ValueError
        assert "lse must be at most 4096" in text


def test_no_key_at_all(comm):
    q, k = np.ones((1, 1, 2, 4), np.float32), np.ones((1, 0, 2, 4), np.float32)
    result, lse = decode_attention(q, k, k, comm=comm, return_lse=True)
    assert (result == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": 9}, ValueError, "lengths must be at most the 4 rows"),
        ({"lengths": -1}, ValueError, "lengths must not be negative"),
        ({"lengths": 1.5}, TypeError, "lengths must be an integer"),
        ({"lengths": (1, 2)}, ValueError, "lengths must be a number or 1, one for every batch, not 2"),
        ({"return_lse": 2}, TypeError, "return_lse must be a bool"),
        ({"layout": "thd", "cu_seqlens_q": (0, 1)}, ValueError, ""),
    ],
)
def test_bad_arguments(comm, change, error, message):
    q, k = np.ones((1, 1, 2, 4), np.float32), np.ones((1, 4, 2, 4), np.float32)
    for kind, text in outcomes(comm, lambda: decode_attention(q, k, k, comm=comm, **change)):
        assert kind is error
        assert message in text
