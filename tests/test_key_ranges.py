"""Ranges of keys, and packed sequences with rows at their ends that do not count, against the oracle and the dense gradient."""

import numpy as np
import pytest
import test_ring as test_ring_module
from checks import assert_refused, check, check_gradient, packed, some_options
from helpers import COMPLETE, part, random_qkv, split

from ulysses_dp import AttnType, attention, attention_backward, ulysses_attention, ulysses_attention_backward

SEQ, KEYS = 21, 26


def ranges(name, seq=SEQ, keys=KEYS):
    """Tables for every query; those at random are in no order and some are empty."""
    i = np.arange(seq)
    if name == "prefix":
        return np.stack([0 * i, np.maximum(8, i + 1 + keys - seq)], axis=-1)
    if name == "chunks":
        return np.minimum(np.stack([i // 5 * 5, i // 5 * 5 + 5], axis=-1), keys)
    if name == "tree":  # two branches after a root of 7
        return np.stack([np.where(i < 14, 0, 7), np.where(i < 14, i + 1, 10)], axis=-1)
    shape = (2, seq, 2) if name == "of batch" else (seq, 2)
    return np.random.default_rng(6).integers(0, keys + 1, shape)


def check_both(comm, functions, whole, **options):
    check(comm, whole, functions=functions, **options)
    check_gradient(comm, whole, functions=functions, **options)


@pytest.mark.parametrize("names", [(), ("causal", "window", "alibi of batch", "mask", "sinks"), ("softcap", "bias")], ids=str)
@pytest.mark.parametrize("name", ["prefix", "chunks", "tree", "random", "of batch"])
def test_ranges(comm, functions, name, names):
    whole = random_qkv(1, 2, SEQ, 4, 2, 16, seq_k=KEYS)
    check_both(comm, functions, whole, key_ranges=ranges(name), **some_options(names, 2, 4, SEQ, KEYS))


@pytest.mark.parametrize("attn_type", COMPLETE)
@pytest.mark.parametrize("form", ["float64", "float16"])
def test_backends_and_dtypes(comm, functions, attn_type, form):
    whole = random_qkv(2, 2, SEQ, 3, 1, 8, seq_k=KEYS)
    for name in ("random", "of batch"):
        check_both(comm, functions, whole, attn_type=attn_type, form=form, key_ranges=ranges(name))
    check_both(comm, functions, whole, attn_type=attn_type, key_ranges=ranges("random"), dropout_p=0.3, seed=4, causal=True)


@pytest.mark.parametrize("attn_type", [AttnType.TORCH, AttnType.INTEL_ONEDNN])
def test_other_backends(comm, attn_type):
    if attn_type is AttnType.TORCH:
        pytest.importorskip("torch")
    whole = random_qkv(2, 2, SEQ, 4, 2, 16, seq_k=KEYS)
    for name in ("chunks", "random", "of batch"):
        check(comm, whole, attn_type=attn_type, key_ranges=ranges(name), causal=True)
        check_gradient(comm, whole, attn_type=attn_type, key_ranges=ranges(name), causal=True)


def test_over_several_tiles(comm, functions):
    check_both(comm, functions, random_qkv(3, 1, 150, 2, 1, 16), key_ranges=ranges("chunks", 150, 150))
    check_both(comm, functions, random_qkv(3, 1, 90, 2, 1, 16), key_ranges=ranges("random", 90, 90))


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "striped"])
def test_ring(comm, order):
    for name in ("random", "of batch"):
        options = some_options(("bias", "sinks"), 2, 4, SEQ, KEYS)
        whole = random_qkv(4, 2, SEQ, 4, 2, 8, seq_k=KEYS)
        meshes = test_ring_module.rings(comm)
        test_ring_module.check(comm, whole, meshes, order, key_ranges=ranges(name), causal=name == "random", **options)


PACKED = {"equal": ([7, 1, 0, 12, 3], [7, 1, 0, 12, 3]), "other keys": ([7, 4, 0, 12, 3], [4, 6, 5, 17, 2])}
USED = {"equal": ([5, 0, 0, 12, 1], [5, 1, 0, 9, 0]), "other keys": ([7, 1, 0, 8, 2], [2, 6, 4, 17, 2])}


@pytest.mark.parametrize("of", [("seqused_q",), ("seqused_k",), ("seqused_q", "seqused_k")], ids=str)
@pytest.mark.parametrize("names", [("causal",), ("window", "softcap", "alibi", "bias", "mask", "dropout")], ids=str)
@pytest.mark.parametrize("lengths", PACKED)
def test_padding_inside_of_packed_sequences(comm, functions, lengths, names, of):
    whole, options = packed(PACKED[lengths])
    used = dict(zip(("seqused_q", "seqused_k"), USED[lengths], strict=True))
    options |= {name: used[name] for name in of} | some_options(names, 1, 4, *(sum(x) for x in PACKED[lengths]))
    check_both(comm, functions, whole, **options)


def counted(lengths, used):
    """Which rows of packed sequences count."""
    return np.concatenate([np.arange(length) < n for length, n in zip(lengths, used, strict=True)])


@pytest.mark.parametrize("causal", [False, True])
def test_what_does_not_count_is_exactly_zero(comm, causal):
    """Rows of padding may hold anything: they give and get nothing, and the others are as in a batch without them."""
    (q, k, v), options = packed(PACKED["equal"])
    lengths, used = PACKED["equal"][0], [5, 1, 0, 9, 0]
    counts = counted(lengths, used)
    for x in (q, k, v):
        x[~counts] = np.nan
    dout = np.ones_like(q)
    rows = split(len(q), comm.size, "uneven")
    mine = [part(x, rows, comm.rank, 0) for x in (q, k, v)]
    options |= {"seqused_q": used, "seqused_k": used, "causal": causal}
    out, lse = ulysses_attention(*mine, comm=comm, return_lse=True, **options)
    grads = ulysses_attention_backward(part(dout, rows, comm.rank, 0), *mine, out, lse, comm=comm, **options)
    padding = ~part(counts, rows, comm.rank, 0)
    for x in (out, *grads):
        assert (x[padding] == 0).all()
    assert np.isneginf(lse[:, padding]).all()
    ends = np.concatenate([[0], np.cumsum(used)])
    without = {"layout": "thd", "cu_seqlens_q": ends, "causal": causal}
    alone, alone_lse = attention(*(x[counts] for x in (q, k, v)), return_lse=True, **without)
    expected = alone, *attention_backward(dout[counts], *(x[counts] for x in (q, k, v)), alone, alone_lse, **without)
    for x, other in zip((out, *grads), expected, strict=True):
        whole = np.zeros(q.shape[:1] + other.shape[1:], other.dtype)
        whole[counts] = other
        np.testing.assert_allclose(x, part(whole, rows, comm.rank, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "bad", [3, np.zeros((4, 2)), np.zeros((4, 3), int), np.zeros((3, 4, 2), int), [[0, 9]] * 4, [[-1, 2]] * 4]
)
def test_bad_ranges(comm, bad):
    q = np.ones((2, 4, 2, 4), np.float32)
    mine = part(q, split(4, comm.size), comm.rank, 1)

    def call(value):
        return ulysses_attention(mine, mine, mine, comm=comm, key_ranges=value)

    assert_refused(comm, "key_ranges", bad, [[0, 4]] * 4, call)


def test_ranges_of_batches_have_no_dropout(comm):
    q = np.ones((2, 4, 2, 4), np.float32)
    table = np.zeros((2, 4 * comm.size, 2), int) + [[[0, 1]], [[0, 2]]]
    with pytest.raises(NotImplementedError, match="key_ranges that differ between batches"):
        ulysses_attention(q, q, q, comm=comm, key_ranges=table, dropout_p=0.5, seed=1)


@pytest.mark.parametrize("bad", [[1, 2, 3], [5, 0], [-1, 0], [1.0, 2.0], 3])
def test_bad_used(comm, bad):
    q = np.ones((4, 2, 4), np.float32)
    mine = part(q, split(4, comm.size), comm.rank, 0)

    def call(value):
        return ulysses_attention(mine, mine, mine, comm=comm, layout="thd", cu_seqlens_q=[0, 3, 4], seqused_q=value)

    assert_refused(comm, "seqused_q", bad, [2, 1], call)
