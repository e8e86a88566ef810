"""The classes of yunchang against the oracle."""

from itertools import permutations

import numpy as np
import oracle
import pytest
from helpers import COMPLETE, KINDS, as_kind, as_numpy, assert_like, outcomes, part, random_qkv, split
from oracle import TOLERANCE

from ulysses_dp import (
    UlyssesAttention,
    attention,
    ulysses_attention,
    ulysses_attention_backward,
    ulysses_flash_attn_func,
)


@pytest.fixture
def problem(comm):
    """What this rank passes, and its parts of out and lse."""
    whole, rows = random_qkv(1, 2, 19, 6, 3, 16), split(19, comm.size, "uneven")
    out, lse = oracle.dense_attention(*whole, causal=True, softmax_scale=0.3)
    return [part(x, rows, comm.rank) for x in whole], part(out, rows, comm.rank), part(lse, rows, comm.rank, axis=2)


def assert_near(result, expected):
    np.testing.assert_allclose(as_numpy(result), expected, rtol=0, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads_axis", "seq_axis"), list(permutations(range(4), 2)))
def test_axes(comm, problem, kind, heads_axis, seq_axis):
    """The arrays with the heads and the rows on any axes; the batch comes before head_dim."""
    arrays, expected_out, expected_lse = problem
    order = [0, 0, 0, 0]  # which axis of (batch, seq, heads, head_dim) is on each axis
    order[heads_axis], order[seq_axis] = 2, 1
    order[min({0, 1, 2, 3} - {heads_axis, seq_axis})], order[max({0, 1, 2, 3} - {heads_axis, seq_axis})] = 0, 3
    mine = [as_kind(np.ascontiguousarray(x.transpose(order)), kind) for x in arrays]
    layer = UlyssesAttention(comm, heads_axis, seq_axis - 4)
    out, lse, nothing = layer(*mine, causal=True, softmax_scale=0.3, return_attn_probs=True)
    assert nothing is None
    assert_like(out, mine[0], mine[0].shape, c_contiguous=False)
    assert_like(lse, mine[0], expected_lse.shape, c_contiguous=False)
    assert_near(out, expected_out.transpose(order))
    assert_near(lse, expected_lse)


@pytest.mark.parametrize("attn_type", COMPLETE)
def test_layer(comm, problem, attn_type):
    arrays, expected, _ = problem
    layer = UlyssesAttention(sequence_process_group=comm, use_sync=True, attn_type=attn_type)
    assert_near(layer(*arrays, 0.0, 0.3, True, (-1, -1), 0.0, None, True), expected)
    assert_near(layer(query=arrays[0], key=arrays[1], value=arrays[2], softmax_scale=0.3, causal=True), expected)
    for axis, name in enumerate(("gather_idx", "scatter_idx"), start=1):
        assert getattr(layer, name) == axis
    assert (layer.sequence_process_group, layer.use_sync, layer.attn_type) == (comm, True, attn_type)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0), (2, 3, 0, 1)], ids=str)
def test_results_are_c_contiguous_in_every_layout(comm, kind, axes):
    rows = split(7, comm.size, "uneven")
    order = np.argsort(axes)  # of the axes of bshd, in the user's array
    q, k, v = (part(x, rows, comm.rank).transpose(order) for x in random_qkv(2, 2, 7, 4, 2, 8))
    mine = [as_kind(np.ascontiguousarray(x), kind) for x in (q, k, v)]
    out, lse = ulysses_attention(*mine, comm=comm, layout=axes, return_lse=True)
    assert_like(out, mine[0], q.shape)
    for grad, x in zip(ulysses_attention_backward(out, *mine, out, lse, comm=comm, layout=axes), mine, strict=True):
        assert_like(grad, x, x.shape)
    expected = ulysses_attention(*(x.transpose(axes) for x in (q, k, v)), comm=comm)
    np.testing.assert_array_equal(as_numpy(out).transpose(axes), expected)


def test_defaults_are_those_of_ulysses_attention(comm, problem):
    arrays, _, _ = problem
    expected = ulysses_attention(*arrays, comm=comm)
    np.testing.assert_array_equal(UlyssesAttention()(*arrays), expected)
    np.testing.assert_array_equal(ulysses_flash_attn_func(*arrays), expected)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ({"scatter_idx": 4}, ValueError, "scatter_idx must be an axis of a 4-D array, not 4"),
        ({"gather_idx": -5}, ValueError, "gather_idx must be an axis"),
        ({"gather_idx": 1.0}, TypeError, "gather_idx must be an integer, not float"),
        ({"scatter_idx": True}, TypeError, "scatter_idx must be an integer, not bool"),
        ({"scatter_idx": -3}, ValueError, "scatter_idx and gather_idx must be different axes"),
    ],
)
def test_bad_axes(axes, error, message):
    with pytest.raises(error, match=message):
        UlyssesAttention(**axes)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(comm, kind):
    """A layer takes (rows, heads, head_dim) with `cu_seqlens_q`, and no other axes then."""
    rows, ends = split(23, comm.size, "uneven"), [0, 9, 9, 23]
    whole = [x[0] for x in random_qkv(2, 1, 23, 4, 2, 8)]
    options = {"cu_seqlens_q": ends, "seqused_q": [9, 0, 11], "seqused_k": [7, 0, 14], "causal": True}
    expected_out, expected_lse = oracle.dense_attention(*whole, **options)
    mine = [as_kind(part(x, rows, comm.rank, 0), kind) for x in whole]
    out, lse, _ = UlyssesAttention(comm)(*mine, return_attn_probs=True, **options)
    assert_near(out, part(expected_out, rows, comm.rank, 0))
    assert_near(lse, part(expected_lse, rows, comm.rank, 1))
    for layer, arrays, text in (
        (UlyssesAttention(comm, 1, 2), mine, "the 4 axes"),
        (UlyssesAttention(comm, 1, 2), [x[None, ...] for x in mine], "cu_seqlens_q is for layout 'thd'"),
        (UlyssesAttention(comm), [x[None, ...] for x in mine], "the 3 axes"),
    ):
        for error, message in outcomes(comm, lambda layer=layer, arrays=arrays: layer(*arrays, **options)):
            assert error is ValueError
            assert text in message


def test_ranges_of_keys(comm):
    """Through every function: a mask of documents."""
    whole, rows = random_qkv(3, 2, 19, 4, 2, 8), split(19, comm.size, "uneven")
    row = np.arange(19)
    ranges = np.stack([np.where(row < 7, 0, 7), np.where(row < 7, 7, row + 1)], axis=-1)
    expected, _ = oracle.dense_attention(*whole, key_ranges=ranges)
    mine = [part(x, rows, comm.rank) for x in whole]
    for out in (
        UlyssesAttention(comm)(*mine, key_ranges=ranges),
        UlyssesAttention(comm, 1, 2)(*(x.swapaxes(1, 2) for x in mine), key_ranges=ranges).swapaxes(1, 2),
        ulysses_flash_attn_func(*mine, group=comm, key_ranges=ranges),
    ):
        assert_near(out, part(expected, rows, comm.rank))


@pytest.mark.parametrize("kind", ["numpy", "dpnp", "torch", "array_api_strict"])
def test_options_of_all_functions_and_kinds(comm, kind):
    """One call with every option at once, through every function: the bits of `attention` on whole NumPy arrays."""
    rng = np.random.default_rng(0)
    whole = random_qkv(0, 2, 9, 6, 3, 7)
    options = {
        "window_size": (3, 2),
        "softcap": 2.0,
        "alibi_slopes": rng.random((2, 6), dtype=np.float32),
        "bias": rng.standard_normal((2, 1, 9, 9), dtype=np.float32),
        "key_padding_mask": rng.random((2, 9)) < 0.7,
        "sinks": rng.random(6, dtype=np.float32),
        "dropout_p": 0.2,
        "seed": 3,
    }
    expected_out, expected_lse = attention(*whole, return_lse=True, **options)
    rows = split(9, comm.size, "uneven")
    expected = part(expected_out, rows, comm.rank), part(expected_lse, rows, comm.rank, axis=2)
    options = {name: as_kind(x, kind) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    mine = [np.ascontiguousarray(part(x, rows, comm.rank)) for x in whole]
    bshd, bhsd = [as_kind(x, kind) for x in mine], [as_kind(np.ascontiguousarray(x.swapaxes(1, 2)), kind) for x in mine]
    by_function = ulysses_flash_attn_func(*bshd, return_attn_probs=True, group=comm, **options)
    by_layer = UlyssesAttention(comm)(*bshd, return_attn_probs=True, **options)
    by_axes = UlyssesAttention(comm, 1, 2)(*bhsd, return_attn_probs=True, **options)
    by_layout = ulysses_attention(*bhsd, return_lse=True, comm=comm, layout="bhsd", **options)
    for out, lse, *_ in (by_function, by_layer):
        np.testing.assert_array_equal(as_numpy(out), expected[0])
        np.testing.assert_array_equal(as_numpy(lse), expected[1])
    for out, lse, *_ in (by_axes, by_layout):
        np.testing.assert_array_equal(as_numpy(out).swapaxes(1, 2), expected[0])
        np.testing.assert_array_equal(as_numpy(lse), expected[1])
