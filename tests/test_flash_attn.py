"""The functions of flash-attn against the oracle."""

import numpy as np
import oracle
import pytest
from checks import assert_refused, dtype_option, encode
from helpers import KINDS, as_kind, as_numpy, assert_like, outcomes, part, random_qkv, split
from test_layer import assert_near

from ulysses_dp import (
    ulysses_attention,
    ulysses_flash_attn_func,
    ulysses_flash_attn_kvpacked_func,
    ulysses_flash_attn_qkvpacked_func,
    ulysses_flash_attn_varlen_func,
    ulysses_flash_attn_varlen_kvpacked_func,
    ulysses_flash_attn_varlen_qkvpacked_func,
)

SLOPES = np.array([0.5, 0.25, 0.125, 1], np.float32)
# by position, as flash-attn has them
FLASH = 0.0, 0.3, True, (7, -1), 2.0, SLOPES, True, True
NAMED = {"softmax_scale": 0.3, "causal": True, "window_size": (7, -1), "softcap": 2.0, "alibi_slopes": SLOPES}


@pytest.mark.parametrize("kind", KINDS)
def test_function(comm, kind):
    whole, rows = random_qkv(1, 2, 19, 6, 3, 16), split(19, comm.size, "uneven")
    out, lse = oracle.dense_attention(*whole, causal=True, softmax_scale=0.3)
    expected_out, expected_lse = part(out, rows, comm.rank), part(lse, rows, comm.rank, axis=2)
    mine = [as_kind(part(x, rows, comm.rank), kind) for x in whole]
    out, lse, nothing = ulysses_flash_attn_func(*mine, 0.0, 0.3, True, (-1, -1), 0.0, None, True, True, group=comm)
    assert nothing is None
    assert_like(out, mine[0], expected_out.shape)
    assert_near(out, expected_out)
    assert_near(lse, expected_lse)
    alone = ulysses_flash_attn_func(*mine, softmax_scale=0.3, causal=True)
    np.testing.assert_array_equal(as_numpy(alone), as_numpy(out))


def test_function_of_packed_sequences(comm):
    rows, ends = split(23, comm.size, "uneven"), [0, 9, 9, 23]
    q, k, v = (part(x, rows, comm.rank)[0] for x in random_qkv(2, 1, 23, 4, 2, 8))
    out, lse, nothing = ulysses_flash_attn_varlen_func(q, k, v, ends, ends, 14, 14, *FLASH, group=comm, seqused_q=[9, 0, 11])
    assert nothing is None
    packed = {"layout": "thd", "cu_seqlens_q": ends, "cu_seqlens_k": ends, "seqused_q": [9, 0, 11]}
    expected = ulysses_attention(q, k, v, comm=comm, return_lse=True, **NAMED, **packed)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])
    for kind, text in outcomes(comm, lambda: ulysses_flash_attn_varlen_func(q, k, v, [0, 9], ends, group=comm)):
        assert kind is ValueError
        assert "cu_seqlens" in text


def together(arrays, axis):
    return np.ascontiguousarray(np.stack(arrays, axis=axis))


def assert_is(result, out, lse, like):
    """Out and lse of flash-attn's functions, within rounding of the oracle's."""
    assert result[2] is None
    assert_like(result[0], like, out.shape)
    assert_near(result[0], out)
    assert_near(result[1], lse)


@pytest.mark.parametrize("kind", [*KINDS, "torch", "array_api_strict"])
def test_arrays_in_one(comm, kind):
    """qkv, and q with kv, which may have other heads and other rows."""
    rows, rows_k = split(19, comm.size, "uneven"), split(23, comm.size)
    q, k, v = random_qkv(4, 2, 19, 4, 4, 8)
    expected, lse = oracle.dense_attention(q, k, v, **NAMED)
    mine = as_kind(part(together((q, k, v), 2), rows, comm.rank), kind)
    result = ulysses_flash_attn_qkvpacked_func(mine, *FLASH, group=comm)
    assert_is(result, part(expected, rows, comm.rank), part(lse, rows, comm.rank, 2), mine)
    q, k, v = random_qkv(5, 2, 19, 4, 2, 8, seq_k=23)
    expected, lse = oracle.dense_attention(q, k, v, **NAMED)
    of_q, of_kv = (as_kind(part(x, n, comm.rank), kind) for x, n in ((q, rows), (together((k, v), 2), rows_k)))
    result = ulysses_flash_attn_kvpacked_func(of_q, of_kv, *FLASH, group=comm)
    assert_is(result, part(expected, rows, comm.rank), part(lse, rows, comm.rank, 2), of_q)


@pytest.mark.parametrize("kind", [*KINDS, "torch", "array_api_strict"])
def test_packed_arrays_in_one(comm, kind):
    """The same of packed sequences, of which some rows are padding."""
    rows, rows_k, ends, ends_k = split(23, comm.size, "uneven"), split(20, comm.size), [0, 9, 9, 23], [0, 4, 6, 20]
    q, k, v = (x[0] for x in random_qkv(6, 1, 23, 4, 4, 8))
    expected, lse = oracle.dense_attention(q, k, v, cu_seqlens_q=ends, seqused_q=[9, 0, 11], seqused_k=[9, 0, 11], **NAMED)
    mine = as_kind(part(together((q, k, v), 1), rows, comm.rank, 0), kind)
    result = ulysses_flash_attn_varlen_qkvpacked_func(mine, ends, 14, *FLASH, group=comm, seqused=[9, 0, 11])
    assert_is(result, part(expected, rows, comm.rank, 0), part(lse, rows, comm.rank, 1), mine)
    q, k, v = (x[0] for x in random_qkv(7, 1, 23, 4, 2, 8, seq_k=20))
    packing = {"cu_seqlens_q": ends, "cu_seqlens_k": ends_k}
    expected, lse = oracle.dense_attention(q, k, v, seqused_k=[3, 2, 14], **packing, **NAMED)
    of_q, of_kv = (as_kind(part(x, n, comm.rank, 0), kind) for x, n in ((q, rows), (together((k, v), 1), rows_k)))
    result = ulysses_flash_attn_varlen_kvpacked_func(
        of_q, of_kv, ends, ends_k, 14, 14, *FLASH, group=comm, seqused_k=[3, 2, 14]
    )
    assert_is(result, part(expected, rows, comm.rank, 0), part(lse, rows, comm.rank, 1), of_q)


def test_arrays_in_one_with_everything(comm):
    """Bit patterns, ranges of keys, orders of rows: what `ulysses_attention` gives of the parts."""
    rows = split(4 * comm.size, comm.size)
    bits = encode(together(random_qkv(8, 1, 4 * comm.size, 2, 2, 8), 2), "bits")
    mine = part(bits, rows, comm.rank)
    ranges = [(0, row + 1) for row in range(4 * comm.size)]
    options = {"order": "striped", "ring": comm.size, "key_ranges": ranges} | dtype_option("bits")
    result = ulysses_flash_attn_qkvpacked_func(mine, group=comm, kv="all_gather", **options)
    parts = [mine[:, :, n] for n in range(3)]
    np.testing.assert_array_equal(result, ulysses_attention(*parts, comm=comm, kv="all_gather", **options))
    result = ulysses_flash_attn_kvpacked_func(parts[0], mine[:, :, 1:], group=comm, **options)
    np.testing.assert_array_equal(result, ulysses_attention(*parts, comm=comm, **options))


@pytest.mark.parametrize(
    "bad", [None, 3, "qkv", np.ones((1, 2, 2, 4, 8)), np.ones((1, 2, 3, 8)), np.ones((1, 2, 3, 2, 8), int)]
)
def test_bad_arrays_in_one(comm, bad):
    """On some ranks only, too."""
    good = np.ones((1, 2, 3, 4, 8), np.float32)
    ends = [0, 2 * comm.size]
    calls = {
        "q(kv| of qkv)": lambda x: ulysses_flash_attn_qkvpacked_func(x, group=comm),
        "kv": lambda x: ulysses_flash_attn_kvpacked_func(good[:, :, 0], x if x is not good else x[:, :, 1:], group=comm),
    }
    for name, call in calls.items():
        assert_refused(comm, f"({name}|q of qkv|k of kv)", bad, good, call)
    good = good[0]
    bad = bad[0] if isinstance(bad, np.ndarray) else bad
    calls = {
        "qkv": lambda x: ulysses_flash_attn_varlen_qkvpacked_func(x, ends, group=comm),
        "kv": lambda x: ulysses_flash_attn_varlen_kvpacked_func(
            good[:, 0], x if x is not good else x[:, 1:], ends, ends, group=comm
        ),
    }
    for name, call in calls.items():
        assert_refused(comm, f"({name}|q of qkv|k of kv)", bad, good, call)


@pytest.mark.single
def test_slopes_in_the_order_of_old_versions_of_flash_attn():
    q = np.ones((1, 3, 2, 4), np.float32)
    with pytest.raises(TypeError, match="softcap must be a real number, not ndarray; by position, alibi_slopes come after it"):
        ulysses_flash_attn_func(q, q, q, 0.0, None, True, (-1, -1), np.ones(2, np.float32))
