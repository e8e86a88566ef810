"""Packed sequences of different lengths, layout "thd", against the oracle."""

import numpy as np
import oracle
import pytest
from checks import (
    FORMS,
    OPTIONS,
    assert_disagree,
    assert_refused,
    call_on,
    check,
    described,
    drawn_call,
    drawn_names,
    drawn_options,
    dtype_of_options,
    kinds_of,
    made,
    offsets,
    ones,
    packed,
    some_options,
)
from helpers import COMPLETE, KINDS, LAYOUTS, SPLITS, as_kind, as_numpy, needs_ranks, part, split
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_dp import attention, merge_attention, ulysses_attention

# the queries and the keys of every sequence: one row, none, queries without keys and the reverse, more keys and fewer
LENGTHS = {
    "one": ([23], [23]),
    "equal": ([7, 1, 0, 12, 3], [7, 1, 0, 12, 3]),
    "other keys": ([7, 1, 0, 12, 3, 5], [4, 1, 6, 17, 0, 2]),
    "single rows": ([1] * 9, [1] * 9),
    "decoding": ([1, 1, 1, 1], [9, 0, 14, 1]),
    "empty at the ends": ([0, 0, 11, 0], [0, 3, 11, 0]),
    "long": ([70, 5, 66], [70, 40, 66]),
}
SHORT = {name: LENGTHS[name] for name in ("equal", "other keys")}
HEADS = [(1, 1), (3, 1), (4, 2), (6, 2), (5, 5)]
COMBINATIONS = [("causal", "window", "alibi", "sinks"), ("softcap", "bias", "mask", "dropout"), OPTIONS]
WINDOWS = [(0, 0), (-1, 0), (0, -1), (2, 1), (3, -1), (-1, 2), (100, 100)]


def sequences(lengths):
    """The rows and the keys of every sequence."""
    ends = [offsets(x).tolist() for x in lengths]
    return [tuple(slice(x[n], x[n + 1]) for x in ends) for n in range(len(lengths[0]))]


@pytest.mark.single
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("names", [(), ("causal", "window", "alibi", "sinks")], ids=["none", "some"])
def test_oracle_attends_to_each_sequence_alone(lengths, names):
    (q, k, v), _ = packed(lengths, dtype="float64")
    options = some_options(names, 1, 4, 0, 0)
    out, lse = oracle.dense_attention(q, k, v, cu_seqlens_q=offsets(lengths[0]), cu_seqlens_k=offsets(lengths[1]), **options)
    for rows, keys in sequences(lengths):
        alone = oracle.dense_attention(q[None, rows], k[None, keys], v[None, keys], **options)
        np.testing.assert_allclose(out[rows], alone[0][0], rtol=0, atol=1e-14)
        np.testing.assert_allclose(lse[:, rows], alone[1][0], rtol=0, atol=1e-14)


@pytest.mark.single
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_sequence_is_as_if_alone(lengths):
    (q, k, v), packing = packed(lengths)
    options = some_options(("causal", "window", "softcap", "alibi", "sinks"), 1, 4, 0, 0)
    out, lse = attention(q, k, v, return_lse=True, **packing, **options)
    for rows, keys in sequences(lengths):
        alone = attention(q[None, rows], k[None, keys], v[None, keys], return_lse=True, **options)
        np.testing.assert_allclose(out[rows], alone[0][0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(lse[:, rows], alone[1][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_lengths(comm, functions, lengths, causal, return_lse):
    whole, packing = packed(lengths)
    check(comm, whole, causal=causal, return_lse=return_lse, functions=functions, **packing)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_are_packed_like_queries_unless_said(comm, functions, causal):
    whole, packing = packed(LENGTHS["equal"])
    del packing["cu_seqlens_k"]
    check(comm, whole, causal=causal, functions=functions, **packing)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("kind", KINDS)
def test_offsets(comm, functions, dtype, kind):
    whole, packing = packed(LENGTHS["other keys"])
    packing |= {name: packing[name].astype(dtype) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    check(comm, whole, kind=kind, functions=functions, **packing)


@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("how_k", SPLITS)
@pytest.mark.parametrize("lengths", SHORT.values(), ids=SHORT)
def test_splits(comm, how, how_k, lengths):
    """Ranks meet inside of sequences; what is given for all rows is found from the rows of any rank."""
    whole, packing = packed(lengths, 6, 3)
    total, total_k = map(sum, lengths)
    rows, rows_k = split(total, comm.size, how), split(total_k, comm.size, how_k)
    check(comm, whole, rows=rows, rows_k=rows_k, causal=True, **packing)
    check(comm, whole, rows=rows, rows_k=rows_k, **packing, **some_options(OPTIONS, 1, 6, total, total_k))


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_window(comm, functions, window_size, causal):
    for lengths in (*SHORT.values(), LENGTHS["long"]):
        whole, packing = packed(lengths)
        check(comm, whole, window_size=window_size, causal=causal, functions=functions, **packing)


@pytest.mark.parametrize("names", [(name,) for name in OPTIONS] + COMBINATIONS, ids=" ".join)
@pytest.mark.parametrize("lengths", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("attn_type", COMPLETE)
def test_options(comm, functions, names, lengths, attn_type):
    whole, packing = packed(lengths)
    options = some_options(names, 1, 4, *map(sum, lengths))
    check(comm, whole, attn_type=attn_type, functions=functions, **packing, **options)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
def test_heads(comm, functions, heads, kv_heads, names):
    lengths = LENGTHS["other keys"]
    whole, packing = packed(lengths, heads, kv_heads)
    check(comm, whole, functions=functions, **packing, **some_options(names, 1, heads, *map(sum, lengths)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [(), *COMBINATIONS], ids=lambda names: " ".join(names) or "none")
def test_dtypes(comm, functions, form, names):
    lengths, dtype = LENGTHS["other keys"], dtype_of_options(form)
    whole, packing = packed(lengths, dtype=dtype)
    options = some_options(names, 1, 4, *map(sum, lengths), dtype=dtype)
    for kind in kinds_of(form):
        check(comm, whole, form=form, kind=kind, functions=functions, **packing, **options)


@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_strides(comm, functions, strides, kind):
    whole, packing = packed(LENGTHS["equal"])
    check(comm, whole, strides=strides, kind=kind, causal=True, functions=functions, **packing)


@pytest.mark.parametrize("head_dim", [1, 3, 40, 128])
def test_head_dims(comm, functions, head_dim):
    whole, packing = packed(LENGTHS["other keys"], head_dim=head_dim)
    check(comm, whole, causal=True, functions=functions, **packing)


@pytest.mark.parametrize("exchange", ["device", "host"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", SHORT.values(), ids=SHORT)
def test_exchange(comm, exchange, kind, lengths):
    whole, packing = packed(lengths, 6, 3)
    check(comm, whole, exchange=exchange, kind=kind, causal=True, **packing)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_without_keys(comm, functions, kind):
    """They get zeros, and the sink alone in lse."""
    whole, packing = packed(([3, 4, 2], [3, 0, 2]))
    sinks, rows = np.array([1, -np.inf, 0, -3], np.float32), split(9, comm.size)
    rows_k = split(5, comm.size)
    mine = [as_kind(part(x, n, comm.rank, axis=0), kind) for x, n in zip(whole, (rows, rows_k, rows_k), strict=True)]
    packing |= {name: as_kind(packing[name], kind) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    out, lse = map(as_numpy, functions.forward(*mine, comm, sinks=as_kind(sinks, kind), return_lse=True, **packing))
    alone = part((np.arange(9) >= 3) & (np.arange(9) < 7), rows, comm.rank, axis=0)
    assert (out[alone] == 0).all()
    np.testing.assert_allclose(lse[:, alone], np.broadcast_to(sinks[:, None], (4, alone.sum())), rtol=0, atol=1e-6)


@pytest.mark.parametrize("total_k", [0, 4])
@pytest.mark.parametrize("sequences", [1, 3])
def test_no_rows(comm, functions, total_k, sequences):
    whole, packing = packed(([0] * sequences, [total_k] + [0] * (sequences - 1)))
    check(comm, whole, causal=True, functions=functions, **packing)


@pytest.mark.parametrize("special", [np.nan, np.inf])
@pytest.mark.parametrize("into", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("causal", [False, True])
def test_special_values_stay_in_their_sequence(comm, functions, special, into, causal):
    whole, packing = packed(([14, 20, 9], [14, 20, 9]))
    whole[into][22, 1, 3] = special
    with np.errstate(invalid="ignore"):  # inf - inf of an infinite score, in the rows that see it
        out = check(comm, whole, causal=causal, functions=functions, **packing)
    others = np.abs(np.arange(43) - 23.5) > 10
    assert np.isfinite(out[part(others, split(43, comm.size), comm.rank, axis=0)]).all()


@pytest.mark.single
@pytest.mark.parametrize("kind", KINDS)
def test_merge(kind):
    """The first and the second half of the keys of every sequence."""
    rows, keys = [7, 1, 0, 12, 3], [4, 1, 6, 16, 0]
    (q, k, v), _ = packed((rows, keys))
    half = [n // 2 for n in keys]
    first = np.concatenate([np.arange(n) < m for n, m in zip(keys, half, strict=True)])
    parts = []
    for taken, lengths in ((first, half), (~first, [n - m for n, m in zip(keys, half, strict=True)])):
        cu_seqlens = {name: as_kind(offsets(x), kind) for name, x in (("cu_seqlens_q", rows), ("cu_seqlens_k", lengths))}
        arrays = (as_kind(x, kind) for x in (q, k[taken], v[taken]))
        parts += attention(*arrays, layout="thd", return_lse=True, **cu_seqlens)
    results = merge_attention(*parts)
    whole = oracle.dense_attention(q, k, v, cu_seqlens_q=offsets(rows), cu_seqlens_k=offsets(keys))
    for result, part_of_it, expected in zip(results, parts[:2], whole, strict=True):
        assert type(result) is type(part_of_it)
        assert result.dtype == np.float32
        np.testing.assert_allclose(as_numpy(result), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (3, 1)])
def test_result_does_not_depend_on_the_number_of_ranks(comm, names, heads, kv_heads):
    lengths = LENGTHS["long"]
    whole, packing = packed(lengths, heads, kv_heads, 64)
    options = packing | {"return_lse": True} | some_options(names, 1, heads, *map(sum, lengths))
    rows, rows_k = (split(sum(x), comm.size, "uneven") for x in lengths)
    mine = [part(x, n, comm.rank, axis=0) for x, n in zip(whole, (rows, rows_k, rows_k), strict=True)]
    results = ulysses_attention(*mine, comm=comm, **options)
    for result, expected, axis in zip(results, attention(*whole, **options), (0, 1), strict=True):
        atol = 2e-6 * np.abs(expected[np.isfinite(expected)]).max()
        np.testing.assert_allclose(result, part(expected, rows, comm.rank, axis), rtol=0, atol=atol)


@st.composite
def configurations(draw):
    """Whole packed arrays and all options, any that are allowed together."""
    lengths = st.integers(0, 12)
    both = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=5))
    same = draw(st.booleans())
    rows, keys = [n for n, _ in both], [n if same else m for n, m in both]
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3), (3, 1), (5, 1)]))
    form, heads = draw(st.sampled_from(FORMS)), kv_heads * group
    dtype = dtype_of_options(form)
    whole, packing = packed(
        (rows, keys), heads, kv_heads, draw(st.sampled_from([1, 3, 16, 64])), dtype, draw(st.integers(0, 9))
    )
    if same and draw(st.booleans()):
        del packing["cu_seqlens_k"]
    options = drawn_options(
        draw, drawn_names(draw, packed=True), (1, heads, sum(rows), sum(keys)), draw(st.integers(0, 9)), dtype
    )
    how = {"return_lse": draw(st.booleans())}
    return whole, packing | options | how | drawn_call(draw, form, sum(rows), sum(keys))


@settings(max_examples=50)
@given(configuration=configurations())
def test_any_configuration(comm, configuration):
    whole, options = configuration
    check(comm, whole, **options)


ARRAYS = {"q": ones(4, 4, 8), "k": ones(4, 2, 8), "v": ones(4, 2, 8)}  # of one rank, with 4 rows


def good(n):
    return {"layout": "thd", "cu_seqlens_q": np.array([0, 3, n], np.int32)}


# the name that the message must have, and what is bad, for a number of rows of all ranks
BAD_OFFSETS = {
    "not from 0": lambda n: np.array([1, 3, n]),
    "negative": lambda n: np.array([-1, 3, n]),
    "decreasing": lambda n: np.array([0, 3, 2, n]),
    "beyond the end and back": lambda n: np.array([0, n + 1, n]),
    "end too early": lambda n: np.array([0, n - 1]),
    "end too late": lambda n: np.array([0, n + 1]),
    "floats": lambda n: np.array([0.0, 3.0, n]),
    "bools": lambda n: np.array([False, True]),
    "strings": lambda n: np.array(["0", str(n)]),
    "two axes": lambda n: np.array([[0, n]]),
    "no axes": lambda n: np.array(n),
    "nothing": lambda n: np.array([], np.int32),
    "a number": lambda n: n,
    "a string": lambda n: "0, 4",
}
BAD = [
    *[("cu_seqlens_q", {"cu_seqlens_q": make}) for make in BAD_OFFSETS.values()],
    *[("cu_seqlens_k", {"cu_seqlens_k": make}) for make in BAD_OFFSETS.values()],
    ("cu_seqlens_k", {"cu_seqlens_k": lambda n: np.array([0, n])}),
    ("cu_seqlens_k", {"cu_seqlens_k": lambda n: np.array([0, 1, 2, n])}),
    ("cu_seqlens", {"k": ones(5, 2, 8), "v": ones(5, 2, 8)}),
    ("cu_seqlens_q", {"cu_seqlens_q": None}),
    ("cu_seqlens_q", {"cu_seqlens_q": None, "cu_seqlens_k": lambda n: np.array([0, 3, n])}),
    ("q", {"q": ones(1, 4, 4, 8)}),
    ("q", {"q": ones(4, 8)}),
    ("k", {"k": ones(1, 4, 2, 8), "v": ones(1, 4, 2, 8)}),
    ("k", {"v": ones(3, 2, 8)}),
    ("alibi_slopes", {"alibi_slopes": ones(2, 4)}),
    ("alibi_slopes", {"alibi_slopes": ones(3)}),
    ("bias", {"bias": ones(2, 1, 1, 1)}),
    ("bias", {"bias": lambda n: ones(1, 4, n, n + 1)}),
    ("key_padding_mask", {"key_padding_mask": lambda n: ones(2, n, dtype=bool)}),
    ("key_padding_mask", {"key_padding_mask": lambda n: ones(1, n + 1, dtype=bool)}),
    ("sinks", {"sinks": ones(3)}),
]
IDS = [*[f"q {name}" for name in BAD_OFFSETS], *[f"k {name}" for name in BAD_OFFSETS]]
IDS += [f"{name} {described(bad)}" for name, bad in BAD[len(IDS) :]]


@pytest.mark.single
@pytest.mark.parametrize(("name", "bad"), BAD, ids=IDS)
def test_attention_refuses(name, bad):
    call = call_on(None, attention, ARRAYS)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=rf"\b{name}"):
        call(good(4) | made(bad, 4))
    call(good(4))


@pytest.mark.parametrize(("name", "bad"), BAD, ids=IDS)
def test_ulysses_attention_refuses(comm, name, bad):
    n = 4 * comm.size
    assert_refused(comm, name, good(n) | made(bad, n), good(n), call_on(comm, ulysses_attention, ARRAYS))


@needs_ranks
@pytest.mark.parametrize(
    ("name", "this"),
    [
        ("cu_seqlens_q", {"cu_seqlens_q": lambda n: np.array([0, 2, n], np.int32)}),
        ("cu_seqlens_q", {"cu_seqlens_q": lambda n: np.array([0, 3, 3, n], np.int32)}),
        ("cu_seqlens_k", {"cu_seqlens_k": lambda n: np.array([0, 2, n], np.int32)}),
    ],
    ids=["another end", "another sequence", "other keys"],
)
def test_ranks_disagree(comm, name, this):
    n = 4 * comm.size
    assert_disagree(comm, name, good(n) | made(this, n), good(n), call_on(comm, ulysses_attention, ARRAYS))


@needs_ranks
def test_offsets_of_the_rows_of_one_rank_are_refused(comm):
    """They count in the rows of all ranks."""
    assert_refused(comm, "cu_seqlens_q", good(4), good(4 * comm.size), call_on(comm, ulysses_attention, ARRAYS))
