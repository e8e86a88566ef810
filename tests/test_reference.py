"""The dense reference of the package against the oracle of the tests."""

import numpy as np
import oracle
import pytest
from helpers import random_qkv
from hypothesis import given
from hypothesis import strategies as st

from ulysses_dp.reference import dense_attention

pytestmark = pytest.mark.single


def compare(q, k, v, **options):
    for result, expected in zip(dense_attention(q, k, v, **options), oracle.dense_attention(q, k, v, **options), strict=True):
        assert result.dtype == np.float64
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


@given(
    batch=st.integers(0, 2),
    seq=st.integers(0, 9),
    seq_k=st.integers(0, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    softmax_scale=st.sampled_from([None, 0.0, 0.3, -2.0]),
    causal=st.booleans(),
)
def test_against_oracle(batch, seq, seq_k, kv_heads, group, head_dim, softmax_scale, causal):
    q, k, v = random_qkv(0, batch, seq, kv_heads * group, kv_heads, head_dim, "float64", seq_k)
    compare(q, k, v, softmax_scale=softmax_scale, causal=causal)


def test_rows_that_see_nothing():
    q, k, v = random_qkv(0, 1, 5, 2, 1, 3, seq_k=2)
    out, lse = dense_attention(q, k, v, causal=True)
    assert (out[:, :3] == 0).all()
    assert np.isneginf(lse[..., :3]).all()
    assert np.isfinite(lse[..., 3:]).all()


def test_no_rows_no_keys_no_heads():
    empty, rows = np.zeros((1, 0, 2, 3)), np.zeros((1, 4, 2, 3))
    assert [x.shape for x in dense_attention(empty, rows, rows)] == [(1, 0, 2, 3), (1, 2, 0)]
    out, lse = dense_attention(rows, empty, empty)
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    headless = np.zeros((1, 4, 0, 3))
    assert [x.shape for x in dense_attention(headless, headless, headless)] == [(1, 4, 0, 3), (1, 0, 4)]


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_special_values_reach_the_rows_that_see_them(special, causal):
    q, k, v = random_qkv(0, 1, 6, 4, 2, 3)
    v[0, 2, 1, 0] = special  # key 2 of the kv head of query heads 2 and 3
    compare(q, k, v, causal=causal)
    out, _ = dense_attention(q, k, v, causal=causal)
    reached = np.zeros(out.shape, bool)
    reached[0, 2 if causal else 0 :, 2:, 0] = True
    np.testing.assert_array_equal(~np.isfinite(out), reached)


@pytest.mark.parametrize("special", [np.nan, -np.inf])
def test_special_scores(special):
    q, k, v = random_qkv(0, 1, 6, 2, 2, 3)
    q, k[0, 2] = abs(q), special  # a score of nan, or of -inf, for every query that sees key 2
    compare(q, k, v, causal=True)
    k[...] = special
    compare(q, k, v, causal=True)


@pytest.mark.parametrize(
    "options",
    [
        {"key_ranges": [(0, 2), (1, 4), (3, 3), (0, 6), (2, 5), (5, 6)]},
        {"cu_seqlens_q": [0, 2, 6], "seqused_q": [1, 3], "seqused_k": [2, 2], "causal": True},
    ],
)
def test_ranges_of_keys_and_padded_sequences(options):
    packed = "cu_seqlens_q" in options
    q, k, v = random_qkv(3, 1, 6, 4, 2, 3)
    expected = oracle.dense_attention(*((x[0] for x in (q, k, v)) if packed else (q, k, v)), **options)
    for x, y in zip(dense_attention(q, k, v, **options), expected, strict=True):
        np.testing.assert_allclose(x[0] if packed else x, y, rtol=0, atol=1e-6)


def test_ranges_of_every_batch_are_refused():
    q = np.zeros((2, 3, 1, 4))
    with pytest.raises(ValueError, match=r"key_ranges must be \(3, 2\), the same for all batches, not \(2, 3, 2\)"):
        dense_attention(q, q, q, key_ranges=np.zeros((2, 3, 2), int))
