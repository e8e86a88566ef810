"""Spans of keys against the definition of causal masks, windows and packed sequences, and of the queries of every key."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ulysses_dp.kernels.launch_arguments import spans_of_keys

from ulysses_dp._call.spans import spans, trim

pytestmark = pytest.mark.single

limits = st.integers(-1, 12) | st.sampled_from([2**31, 2**63, 2**70])


def dense(table, seq_k):
    """Which keys each query sees."""
    return (table[:, :1] <= np.arange(seq_k)) & (np.arange(seq_k) < table[:, 1:2])


@given(
    lengths=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4),
    causal=st.booleans(),
    window_size=st.tuples(limits, limits),
)
def test_spans(lengths, causal, window_size):
    cu_seqlens_q, cu_seqlens_k = ((0, *map(int, np.cumsum(column))) for column in zip(*lengths, strict=True))
    seq_q, seq_k = cu_seqlens_q[-1], cu_seqlens_k[-1]
    options = {"causal": causal, "window_size": window_size}
    table = spans(seq_q, seq_k, **options, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    expected = np.zeros((seq_q, seq_k), bool)
    left, right = window_size
    for (rows, keys), first_q, first_k in zip(lengths, cu_seqlens_q, cu_seqlens_k, strict=False):
        for i in range(rows):
            centre = i + keys - rows
            assert table[first_q + i, 2] == first_k + centre
            for j in range(keys):
                hidden = (causal and j > centre) or (left >= 0 and j < centre - left) or (right >= 0 and j > centre + right)
                expected[first_q + i, first_k + j] = not hidden
    np.testing.assert_array_equal(dense(table, seq_k), expected)
    # what the search for the queries of a key relies on
    assert (np.diff(table[:, :2], axis=0) >= 0).all()
    np.testing.assert_array_equal(dense(spans_of_keys(table, seq_k), seq_q), expected.T)
    if len(lengths) == 1:
        np.testing.assert_array_equal(spans(seq_q, seq_k, **options), table)

    visible = np.arange(seq_k) % 5 > 1
    trimmed = trim(table, visible)
    np.testing.assert_array_equal(dense(trimmed, seq_k) & visible, expected & visible)
    assert (np.diff(trimmed[:, :2], axis=0) >= 0).all()
