"""The options of attention, alone and together, against the oracle; what is the same for gradients, against theirs, too."""

from itertools import combinations, pairwise, product

import dpnp
import numpy as np
import oracle
import pytest
from checks import (
    AXES,
    COMBINATIONS,
    DROPOUT,
    FORMS,
    OPTIONS,
    assert_disagree,
    assert_refused,
    call_on,
    check,
    check_gradient,
    described,
    drawn_call,
    drawn_names,
    drawn_options,
    dtype_of_options,
    kinds_of,
    made,
    ones,
    some_options,
)
from helpers import KINDS, LAYOUTS, SPLITS, as_kind, as_numpy, as_view, needs_ranks, part, random_qkv, split
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_dp import AttnType, attention, merge_attention, ulysses_attention

LENGTHS = [(23, 23), (9, 31), (31, 9)]
WINDOWS = [(0, 0), (0, -1), (-1, 0), (3, 2), (5, -1), (-1, 4), (0, 6), (6, 0), (100, 100), (100, 0), (0, 100), (2**63, 2**70)]
# heads and kv_heads: fewer than ranks, and groups that are cut between ranks
HEADS = [(1, 1), (2, 1), (3, 1), (5, 5), (4, 2), (6, 2), (6, 3)]


@pytest.fixture(params=[check, check_gradient], ids=["forward", "gradient"])
def compare(request):
    """The comparison of attention with the oracle, and that of its gradient with the dense one."""
    return request.param


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_window(comm, functions, window_size, causal):
    for seq, seq_k in LENGTHS:
        whole = random_qkv(seq, 2, seq, 4, 2, 16, seq_k=seq_k)
        check(comm, whole, window_size=window_size, causal=causal, functions=functions)


@pytest.mark.parametrize("window_size", [(20, -1), (3, 3), (64, 1), (-1, 20), (70, 70)])
def test_window_over_several_tiles(comm, functions, window_size):
    """Long enough for tiles of keys that no row of a block sees, or that all rows see."""
    check(comm, random_qkv(1, 1, 150, 2, 1, 16), window_size=window_size, functions=functions)
    check(comm, random_qkv(1, 1, 150, 2, 1, 16), window_size=window_size, causal=True, functions=functions)


@pytest.mark.parametrize("window_size", [[2, 1], (np.int64(2), np.int32(1))], ids=["list", "numpy"])
def test_window_of_other_types(comm, functions, window_size):
    check(comm, random_qkv(1, 1, 12, 2, 2, 16), window_size=window_size, functions=functions)


def test_rows_before_the_window_see_nothing(comm, functions):
    """With fewer keys than queries the first rows end before the first key."""
    out = check(comm, random_qkv(2, 1, 20, 2, 2, 16, seq_k=5), window_size=(2, 1), functions=functions)
    hidden = np.arange(20) + 5 - 20 + 1 < 0
    assert (out[:, part(hidden, split(20, comm.size), comm.rank, axis=0)] == 0).all()


@pytest.mark.parametrize("softcap", [0.5, 5, 30.0, np.float32(2)])
@pytest.mark.parametrize("causal", [False, True])
def test_softcap(comm, functions, softcap, causal):
    q, k, v = random_qkv(3, 2, 23, 4, 2, 16)
    for scale in (1, 4):
        check(comm, (q * np.float32(scale), k, v), softcap=softcap, causal=causal, softmax_scale=0.3, functions=functions)


@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=["heads", "batch and heads"])
@pytest.mark.parametrize("causal", [False, True])
def test_alibi(comm, functions, shape, causal):
    slopes = np.random.default_rng(4).uniform(-0.3, 0.7, shape).astype(np.float32)
    slopes[..., 0] = 0
    for seq, seq_k in LENGTHS:
        check(comm, random_qkv(4, 2, seq, 4, 2, 16, seq_k=seq_k), alibi_slopes=slopes, causal=causal, functions=functions)


@pytest.mark.parametrize("shape", list(product([1, 2], [1, 4], [1, 11], [1, 17])), ids=str)
def test_bias_is_broadcast(comm, functions, shape):
    bias = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    check(comm, random_qkv(5, 2, 11, 4, 2, 16, seq_k=17), bias=bias, functions=functions)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_bias_of_any_strides(comm, functions, layout, kind):
    bias = np.random.default_rng(6).standard_normal((2, 4, 13, 13)).astype(np.float32)
    check(comm, random_qkv(6, 2, 13, 4, 2, 16), bias=as_view(bias, kind, layout), kind=kind, causal=True, functions=functions)


@pytest.mark.parametrize("library", [np, dpnp])
@pytest.mark.parametrize("shape", [(1, 1, 13, 13), (2, 1, 1, 13), (1, 4, 13, 1)])
def test_bias_with_strides_of_0(comm, functions, library, shape):
    bias = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    bias = library.broadcast_to(library.asarray(bias), (2, 4, 13, 13))
    kind = "numpy" if library is np else "dpnp"
    check(comm, random_qkv(7, 2, 13, 4, 2, 16), bias=bias, kind=kind, functions=functions)


@pytest.mark.parametrize(("form", "of_bias"), [("float32", "float64"), ("float64", "float32"), ("float16", "float16")])
def test_bias_of_another_dtype(comm, functions, form, of_bias):
    # numbers that every dtype holds, so that no rounding is tested
    bias = np.random.default_rng(8).integers(-8, 8, (2, 4, 13, 13)).astype(of_bias) / 4
    check(comm, random_qkv(8, 2, 13, 4, 2, 16, form), bias=bias, form=form, functions=functions)


@pytest.mark.parametrize("shape", [(1, 1, 1, 40), (2, 1, 40, 40), (1, 4, 40, 40)])
def test_bias_hides_keys(comm, functions, shape):
    rng = np.random.default_rng(9)
    bias = np.where(rng.random(shape) < 0.5, -np.inf, rng.standard_normal(shape)).astype(np.float32)
    bias[..., 3:40, :] = -np.inf if shape[2] > 1 else bias[..., 3:40, :]  # rows that see nothing
    check(comm, random_qkv(9, 2, 40, 4, 2, 16), bias=bias, functions=functions)


@pytest.mark.parametrize("causal", [False, True])
def test_key_padding_mask(comm, functions, causal):
    for seq, seq_k in LENGTHS:
        takes_part = np.arange(seq_k) < np.array([[seq_k], [seq_k // 2], [1], [0]])
        for mask in (takes_part, takes_part[:, ::-1], np.random.default_rng(10).random((4, seq_k)) < 0.5):
            check(
                comm, random_qkv(10, 4, seq, 2, 1, 16, seq_k=seq_k), key_padding_mask=mask, causal=causal, functions=functions
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_all_padding(comm, functions, kind):
    rows = split(13, comm.size)
    mask = np.array([[True], [False]]).repeat(13, axis=1)
    q, k, v = (as_kind(part(x, rows, comm.rank), kind) for x in random_qkv(11, 2, 13, 4, 2, 16))
    out, lse = map(as_numpy, functions.forward(q, k, v, comm, key_padding_mask=as_kind(mask, kind), return_lse=True))
    assert (out[1] == 0).all()
    assert np.isneginf(lse[1]).all()
    assert np.isfinite(lse[0]).all()


EARLY_ROWS, KEY_25 = np.arange(40)[:, None] < 20, np.arange(40) == 25
HIDING = {
    "causal": {"causal": True},
    "window": {"window_size": (6, 4)},
    "mask": {"key_padding_mask": np.arange(40) != np.array([[25], [7]])},
    "bias": {"bias": np.where(EARLY_ROWS & KEY_25, -np.inf, 0).astype(np.float32)[None, None]},
    "all": some_options(OPTIONS[:-1], 2, 4, 40, 40),
}


@pytest.mark.parametrize("special", [np.nan, np.inf])
@pytest.mark.parametrize("into", [1, 2], ids=["k", "v"])
@pytest.mark.parametrize("options", HIDING.values(), ids=HIDING)
def test_special_values_of_hidden_keys_stay_hidden(comm, functions, special, into, options):
    whole = random_qkv(12, 2, 40, 4, 2, 16)
    whole[into][0, 25, 1, 3] = special
    with np.errstate(invalid="ignore"):  # inf - inf of an infinite score, in the rows that do see the key
        check(comm, whole, functions=functions, **options)


@pytest.mark.parametrize("form", FORMS)
def test_nan_in_the_padding(comm, functions, form):
    q, k, v = random_qkv(13, 2, 21, 4, 2, 16)
    mask = np.arange(21) < np.array([[15], [0]])
    k[~mask], v[~mask] = np.nan, np.inf
    bias = np.where(np.arange(21) == 4, -np.inf, 0).astype(dtype_of_options(form))[None, None, None]
    k[:, 4], v[:, 4] = np.inf, np.nan
    check(comm, (q, k, v), form=form, key_padding_mask=mask, bias=bias, functions=functions)


@pytest.mark.parametrize("sinks", [[0, 0, 0, 0], [-2, 0.5, 3, 20], [-np.inf, 1, -np.inf, 0], [-np.inf] * 4], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_sinks(comm, functions, compare, sinks, causal):
    for seq, seq_k in (*LENGTHS, (5, 0)):  # with fewer keys than queries, causal, the first rows see the sink alone
        whole = random_qkv(14, 2, seq, 4, 2, 16, seq_k=seq_k)
        compare(comm, whole, sinks=np.array(sinks, np.float32), causal=causal, functions=functions)


def test_sinks_of_minus_infinity_change_nothing(comm, functions):
    mine = [part(x, split(23, comm.size), comm.rank) for x in random_qkv(15, 2, 23, 4, 2, 16)]
    sinks = np.full(4, -np.inf, np.float32)
    forward = functions.forward
    results = forward(*mine, comm, sinks=sinks, return_lse=True), forward(*mine, comm, return_lse=True)
    for result, expected in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@pytest.mark.single
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_of_the_oracle(counter, key, words):
    """The known answers of Random123."""
    assert " ".join(f"{int(word):08x}" for word in oracle.philox(counter, key)) == words


def one_hot(seed, heads=4, kv_heads=2, seq=19, seq_k=32):
    """Whole q, k and v with which a row of out is the weights of the row."""
    q, k, v = random_qkv(seed, 2, seq, heads, kv_heads, seq_k, seq_k=seq_k)
    v[...] = np.eye(seq_k, dtype=v.dtype)[:, None]
    return q, k, v


@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("layout", AXES)
def test_dropout_drops_the_same_weights_for_every_split_and_layout(comm, functions, how, layout):
    whole, rows = one_hot(16), split(19, comm.size, how)
    options = {"dropout_p": 0.3, "seed": 0x0123456789ABCDEF}
    out = check(comm, whole, rows=rows, rows_k=split(32, comm.size, how), layout=layout, functions=functions, **options)
    expected = part(oracle.dense_attention(*whole, **options)[0], rows, comm.rank).transpose(AXES[layout])
    np.testing.assert_array_equal(out == 0, expected == 0)


@pytest.mark.parametrize("dropout_p", [1e-12, 0.1, 0.5, 0.99])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_dropout(comm, functions, dropout_p, heads, kv_heads):
    whole = random_qkv(17, 2, 21, heads, kv_heads, 16, seq_k=30)
    check(comm, whole, dropout_p=dropout_p, seed=7, causal=True, functions=functions)


@pytest.mark.single
def test_dropout_keeps_the_mean():
    """Over 51200 weights: the share of zeros has a standard deviation of 0.002, the sum of a row one of about 0.2."""
    weights = attention(*one_hot(18, 10, 10, 80, 32), dropout_p=0.3, seed=1)
    assert abs((weights == 0).mean() - 0.3) < 0.01
    assert abs(weights.sum(axis=-1).mean() - 1) < 0.03


@pytest.mark.single
@pytest.mark.parametrize(("above", "dropped"), [(0, False), (1, True)])
def test_dropout_drops_the_words_below_the_threshold(above, dropped):
    """The first word of seed 0 is a known answer."""
    weights = attention(*one_hot(19), dropout_p=(0x6627E8D5 + above) / 2**32, seed=0)
    assert (weights[0, 0, 0, 0] == 0) == dropped


def test_seeds(comm, functions):
    """Both halves of a seed count."""
    seeds = [0, 1, 2**31, 2**32, 2**63, 2**64 - 1]
    results = [check(comm, one_hot(20), dropout_p=0.5, seed=seed, functions=functions) for seed in seeds]
    if split(19, comm.size)[comm.rank]:
        for one, other in combinations(results, 2):
            assert ((one == 0) != (other == 0)).any()
    again = check(comm, one_hot(20), dropout_p=0.5, seed=seeds[-1], functions=functions)
    np.testing.assert_array_equal(results[-1], again)


def test_a_seed_without_dropout_changes_nothing(comm, functions):
    check(comm, random_qkv(21, 1, 9, 2, 2, 16), dropout_p=0.0, seed=5, functions=functions)
    check(comm, random_qkv(21, 1, 9, 2, 2, 16), dropout_p=0, seed=None, functions=functions)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
def test_heads(comm, functions, heads, kv_heads, names):
    """Options that differ between heads, wherever these go."""
    whole = random_qkv(22, 2, 23, heads, kv_heads, 16)
    check(comm, whole, functions=functions, **some_options(names, 2, heads, 23, 23))


@pytest.mark.parametrize("names", list(combinations(OPTIONS, 2)), ids=" ".join)
def test_pairs_of_options(comm, functions, compare, names):
    for seq, seq_k, head_dim in ((29, 33, 16), (13, 17, 8)):
        whole = random_qkv(23, 2, seq, 6, 3, head_dim, seq_k=seq_k)
        compare(comm, whole, functions=functions, **some_options(names, 2, 6, seq, seq_k))


@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("how_k", SPLITS)
def test_splits(comm, how, how_k):
    """What is given for all rows is found from the rows of any rank."""
    for seq, seq_k in ((31, 31), (17, 26)):
        rows, rows_k = split(seq, comm.size, how), split(seq_k, comm.size, how_k)
        options = some_options(OPTIONS, 2, 6, seq, seq_k)
        check(comm, random_qkv(24, 2, seq, 6, 3, 16, seq_k=seq_k), rows=rows, rows_k=rows_k, **options)


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layouts(comm, functions, compare, layout, strides, kind):
    """For a gradient, dout and out have strides, too."""
    options = {"layout": layout, "strides": strides, "kind": kind, "functions": functions}
    compare(comm, random_qkv(25, 2, 24, 4, 2, 16), **options)
    compare(comm, random_qkv(25, 2, 15, 4, 2, 16, seq_k=22), **options, **some_options(OPTIONS, 2, 4, 15, 22))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("names", [(), ("causal",), *COMBINATIONS], ids=lambda names: " ".join(names) or "none")
def test_dtypes(comm, functions, form, layout, names):
    dtype = dtype_of_options(form)
    options = some_options(names, 2, 6, 21, 21, dtype=dtype)
    for kind in kinds_of(form) if layout == "bshd" else ("numpy",):
        check(comm, random_qkv(26, 2, 21, 6, 2, 16, dtype), form=form, layout=layout, kind=kind, functions=functions, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", [1, 3, 40, 64, 128, 256])
def test_head_dims(comm, functions, form, head_dim):
    whole = random_qkv(head_dim, 1, 37, 4, 2, head_dim, dtype_of_options(form))
    for return_lse in (False, True):
        check(comm, whole, form=form, causal=True, return_lse=return_lse, functions=functions)


@pytest.mark.parametrize("exchange", ["device", "host"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_exchange(comm, exchange, form, return_lse):
    options = {"form": form, "exchange": exchange, "return_lse": return_lse, "rows": split(24, comm.size, "uneven")}
    for kind in kinds_of(form):
        check(comm, random_qkv(27, 2, 24, 6, 3, 16), kind=kind, **options)
        check(comm, random_qkv(27, 2, 24, 6, 3, 16, seq_k=29), kind=kind, causal=True, **options)


@pytest.mark.parametrize("names", [(name,) for name in OPTIONS] + COMBINATIONS, ids=" ".join)
def test_the_reference_of_the_package(comm, functions, names):
    whole = random_qkv(28, 2, 21, 4, 2, 16, seq_k=25)
    check(comm, whole, attn_type=AttnType.NUMPY, functions=functions, **some_options(names, 2, 4, 21, 25))


@pytest.mark.parametrize(("batch", "seq", "seq_k"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (1, 1, 1)])
def test_no_rows_or_no_batch(comm, functions, batch, seq, seq_k):
    whole = random_qkv(29, batch, seq, 4, 2, 16, seq_k=seq_k)
    check(comm, whole, functions=functions, **some_options(OPTIONS, batch, 4, seq, seq_k))


@st.composite
def configurations(draw):
    """Whole arrays and all options, any that are allowed together."""
    sizes = st.sampled_from([1, 2, 7, 13, 16, 31, 40])
    seq = draw(sizes)
    seq_k = draw(st.one_of(st.just(seq), sizes))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (1, 5), (2, 1), (2, 3), (3, 1), (3, 2), (5, 1)]))
    batch, heads, head_dim = draw(st.integers(1, 3)), kv_heads * group, draw(st.sampled_from([1, 3, 16, 40, 64]))
    form, names = draw(st.sampled_from(FORMS)), drawn_names(draw)
    shape, dtype = (batch, heads, seq, seq_k), dtype_of_options(form)
    options = drawn_options(draw, names, shape, draw(st.integers(0, 9)), dtype)
    whole = random_qkv(draw(st.integers(0, 9)), batch, seq, heads, kv_heads, head_dim, seq_k=seq_k)
    if "mask" in names and draw(st.booleans()):
        whole[1][~options["key_padding_mask"]], whole[2][~options["key_padding_mask"]] = np.nan, np.inf
    how = {"return_lse": draw(st.booleans()), "layout": draw(st.sampled_from(list(AXES)))}
    return whole, options | how | drawn_call(draw, form, seq, seq_k)


@settings(max_examples=60)
@given(configuration=configurations())
def test_any_configuration(comm, configuration):
    whole, options = configuration
    check(comm, whole, **options)


@pytest.mark.parametrize("names", [(name,) for name in OPTIONS] + COMBINATIONS, ids=" ".join)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (3, 1)])
def test_result_does_not_depend_on_the_number_of_ranks(comm, names, heads, kv_heads):
    whole, options = random_qkv(30, 2, 96, heads, kv_heads, 64), some_options(names, 2, heads, 96, 96)
    rows = split(96, comm.size, "uneven")
    results = ulysses_attention(*(part(x, rows, comm.rank) for x in whole), comm=comm, return_lse=True, **options)
    alone = attention(*whole, return_lse=True, **options)
    for result, expected, axis in zip(results, alone, (1, 2), strict=True):
        atol = 2e-6 * np.abs(expected[np.isfinite(expected)]).max()
        np.testing.assert_allclose(result, part(expected, rows, comm.rank, axis), rtol=0, atol=atol)


def parts_of(whole, cuts, kind="numpy", **options):
    """Attention to consecutive blocks of the keys, and to all of them."""
    q, k, v = (as_kind(x, kind) for x in whole)
    edges = [0, *cuts, k.shape[1]]
    parts = [
        attention(q, k[:, i:j], v[:, i:j], return_lse=True, **{name: as_kind(x[..., i:j], kind) for name, x in options.items()})
        for i, j in pairwise(edges)
    ]
    options = {name: as_kind(x, kind) for name, x in options.items()}
    return parts, attention(q, k, v, return_lse=True, **options)


def assert_same(results, expected, atol):
    for result, other in zip(results, expected, strict=True):
        assert type(result) is type(other)
        assert result.dtype == other.dtype
        np.testing.assert_allclose(as_numpy(result), as_numpy(other), rtol=0, atol=atol)


@pytest.mark.single
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cut", [0, 1, 17, 30])
def test_merge_of_two_parts(kind, dtype, cut):
    whole = random_qkv(31, 2, 19, 4, 2, 16, dtype, 30)
    (one, other), expected = parts_of(whole, [cut], kind)
    copies = [as_numpy(x).copy() for x in (*one, *other)]
    assert_same(merge_attention(*one, *other), expected, 2 * oracle.TOLERANCE[dtype])
    assert_same(merge_attention(*other, *one), expected, 2 * oracle.TOLERANCE[dtype])
    for x, copy in zip((*one, *other), copies, strict=True):
        np.testing.assert_array_equal(as_numpy(x), copy)


@pytest.mark.single
def test_merge_in_any_order():
    whole = random_qkv(32, 2, 19, 4, 2, 16, seq_k=30)
    bias = np.random.default_rng(32).standard_normal((2, 4, 19, 30)).astype(np.float32)
    (a, b, c), expected = parts_of(whole, [4, 21], bias=bias)
    for first, second, third in ((a, b, c), (c, a, b)):
        assert_same(merge_attention(*merge_attention(*first, *second), *third), expected, 2e-5)
        assert_same(merge_attention(*first, *merge_attention(*second, *third)), expected, 2e-5)


@pytest.mark.single
def test_merge_with_rows_that_see_nothing():
    """In one part, in the other, and in both."""
    mask = np.ones((4, 30), bool)
    mask[1, :12], mask[2, 12:], mask[3] = False, False, False
    (one, other), expected = parts_of(random_qkv(33, 4, 9, 4, 2, 16, seq_k=30), [12], key_padding_mask=mask)
    out, lse = merge_attention(*one, *other)
    assert_same((out, lse), expected, 2e-5)
    assert (out[3] == 0).all()
    assert np.isneginf(lse[3]).all()
    np.testing.assert_array_equal(out[1], other[0][1])
    np.testing.assert_array_equal(out[2], one[0][2])


@pytest.mark.single
def test_merge_of_very_different_parts():
    """No exponential overflows, and the part that counts is kept as it is."""
    rng = np.random.default_rng(34)
    a, b = rng.standard_normal((2, 1, 3, 2, 16)).astype(np.float32)
    low, high = np.full((1, 2, 3), -500, np.float32), np.full((1, 2, 3), 500, np.float32)
    for result in (merge_attention(a, high, b, low), merge_attention(b, low, a, high)):
        np.testing.assert_array_equal(result[0], a)
        np.testing.assert_array_equal(result[1], high)


@pytest.mark.single
def test_merge_of_random_parts():
    rng = np.random.default_rng(35)
    outs, lses = rng.standard_normal((2, 2, 5, 3, 16)), 3 * rng.standard_normal((2, 2, 3, 5))
    expected = oracle.merged(list(zip(outs, lses, strict=True)))
    assert_same(merge_attention(outs[0], lses[0], outs[1], lses[1]), expected, 1e-12)
    half = outs.astype(np.float16)
    result = merge_attention(half[0], lses[0].astype("f4"), half[1], lses[1].astype("f4"))
    assert [x.dtype for x in result] == ["float16", "float32"]
    np.testing.assert_allclose(result[0], expected[0], rtol=0, atol=4 * oracle.TOLERANCE["float16"])


@pytest.mark.single
@pytest.mark.parametrize("shape", [(1, 3, 2, 8), (1, 4, 3, 8), (1, 4, 2, 7), (4, 2, 8)])
def test_merge_refuses_other_shapes(shape):
    out, lse = np.ones((1, 4, 2, 8), np.float32), np.zeros((1, 2, 4), np.float32)
    with pytest.raises((TypeError, ValueError), match="out_b"):
        merge_attention(out, lse, np.ones(shape, np.float32), lse)
    with pytest.raises((TypeError, ValueError), match="lse_"):
        merge_attention(out, lse, out, np.zeros(shape[:-1], np.float32))


ARRAYS = {"q": ones(2, 3, 4, 8), "k": ones(2, 3, 2, 8), "v": ones(2, 3, 2, 8)}  # of one rank, with 3 rows
BITS = {name: oracle.to_bfloat16(ones(2, 3, heads, 8)) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
# the name that the message must have, good options, and what is bad about others, for a number of rows of all ranks
BAD = [
    *[
        ("window_size", {}, {"window_size": bad})
        for bad in ("3", 3, None, (), (3,), (1, 2, 3), ((1, 2), 3), (-2, 0), (0, -2), (1.0, 2), (2, 0.5), (True, 0), (0, "1"))
    ],
    *[("softcap", {}, {"softcap": bad}) for bad in (-1, -0.5, np.nan, "30", 1j, np.ones(2))],
    *[("alibi_slopes", {}, {"alibi_slopes": ones(*shape)}) for shape in ((3,), (2,), (3, 4), (4, 2), (2, 4, 1), (1, 1, 4), ())],
    *[("alibi_slopes", {}, {"alibi_slopes": ones(4, dtype=dtype)}) for dtype in ("c8", "U1", object)],
    ("alibi_slopes", {}, {"alibi_slopes": "steep"}),
    *[("bias", {}, {"bias": ones(*shape)}) for shape in ((), (4,), (1, 1), (4, 1, 1), (1, 1, 1, 1, 1))],
    *[("bias", {}, {"bias": ones(*shape)}) for shape in ((3, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (2, 4, 0, 1))],
    *[("bias", {}, {"bias": ones(1, 1, 1, 1, dtype=dtype)}) for dtype in ("c8", "U1", object)],
    ("bias", {}, {"bias": "strong"}),
    *[("key_padding_mask", {}, {"key_padding_mask": lambda n, d=d: ones(2, n, dtype=d)}) for d in ("i1", "f4", "i8", object)],
    ("key_padding_mask", {}, {"key_padding_mask": lambda n: ones(2, n + 1, dtype=bool)}),
    ("key_padding_mask", {}, {"key_padding_mask": lambda n: ones(3, n, dtype=bool)}),
    ("key_padding_mask", {}, {"key_padding_mask": lambda n: ones(n, dtype=bool)}),
    ("key_padding_mask", {}, {"key_padding_mask": lambda n: ones(2, 1, 1, n, dtype=bool)}),
    ("key_padding_mask", {}, {"key_padding_mask": True}),
    *[("sinks", {}, {"sinks": ones(*shape)}) for shape in ((), (3,), (2,), (2, 4), (4, 1))],
    *[("sinks", {}, {"sinks": ones(4, dtype=dtype)}) for dtype in ("c8", "U1", object)],
    ("sinks", {}, {"sinks": "deep"}),
    *[("layout", {}, {"layout": bad}) for bad in ("dhsb", "BSHD", "", None, 4, ("b", "s", "h", "d"))],
    *[("dropout_p", DROPOUT, DROPOUT | {"dropout_p": bad}) for bad in (-0.1, 1, 1.0, 1.5, True, np.nan, np.inf, "0.1", 1j)],
    *[("seed", DROPOUT, DROPOUT | {"seed": bad}) for bad in (None, -1, 2**64, 1.5, 1.0, "1", True)],
    ("seed", DROPOUT, {"dropout_p": 0.1}),
    *[("dtype", {}, {"dtype": bad}) for bad in ("int7", "int8", "", 3, ["bfloat16"])],
    ("dtype", BITS | {"dtype": "bfloat16"}, BITS),
    ("cu_seqlens_q", {}, {"cu_seqlens_q": lambda n: np.array([0, n])}),
    ("cu_seqlens_q", {}, {"cu_seqlens_q": lambda n: np.array([0, n]), "layout": "sbhd"}),
    ("cu_seqlens_k", {}, {"cu_seqlens_k": lambda n: np.array([0, n])}),
]


@pytest.mark.single
@pytest.mark.parametrize(("name", "good", "bad"), BAD, ids=described)
def test_attention_refuses(name, good, bad):
    call = call_on(None, attention, ARRAYS)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=rf"\b{name}"):
        call(made(bad, 3))
    call(made(good, 3))


@pytest.mark.parametrize(("name", "good", "bad"), BAD, ids=described)
def test_ulysses_attention_refuses(comm, name, good, bad):
    n = 3 * comm.size
    assert_refused(comm, name, made(bad, n), made(good, n), call_on(comm, ulysses_attention, ARRAYS))


@needs_ranks
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("key_padding_mask", {"key_padding_mask": ones(2, 3, dtype=bool)}),
        ("bias", {"bias": ones(2, 4, 3, 1)}),
        ("bias", {"bias": ones(2, 4, 1, 3)}),
    ],
    ids=["mask", "rows of bias", "keys of bias"],
)
def test_arrays_for_the_rows_of_one_rank_are_refused(comm, name, bad):
    """They are given for all rows."""
    assert_refused(comm, name, bad, {}, call_on(comm, ulysses_attention, ARRAYS))


def but_one(x):
    """A copy in which the last element differs."""
    x = x.copy()
    x.flat[-1] = 0
    return x


@needs_ranks
@pytest.mark.parametrize(
    ("name", "this", "others"),
    [
        ("window_size", {"window_size": (3, 1)}, {"window_size": (3, 2)}),
        ("window_size", {"window_size": (3, 1)}, {}),
        ("softcap", {"softcap": 2.0}, {"softcap": 3.0}),
        ("softcap", {}, {"softcap": 3.0}),
        ("alibi_slopes", {"alibi_slopes": but_one(ones(4))}, {"alibi_slopes": ones(4)}),
        ("alibi_slopes", {"alibi_slopes": ones(2, 4)}, {"alibi_slopes": ones(4)}),
        ("alibi_slopes", {}, {"alibi_slopes": ones(4)}),
        # of the bias, which may be large, the shape and the dtype
        ("bias", {"bias": ones(2, 4, 1, 1)}, {"bias": ones(1, 4, 1, 1)}),
        ("bias", {"bias": ones(1, 1, 1, 1)}, {}),
        ("key_padding_mask", {"key_padding_mask": lambda n: but_one(ones(2, n, dtype=bool))}, {}),
        (
            "key_padding_mask",
            {"key_padding_mask": lambda n: but_one(ones(2, n, dtype=bool))},
            {"key_padding_mask": lambda n: ones(2, n, dtype=bool)},
        ),
        ("sinks", {"sinks": but_one(ones(4))}, {"sinks": ones(4)}),
        ("sinks", {}, {"sinks": ones(4)}),
        ("dropout_p", {"dropout_p": 0.2, "seed": 1}, DROPOUT),
        ("seed", {"dropout_p": 0.1, "seed": 1 + 2**63}, DROPOUT),
        # as many rows as batches, so that the shapes do not differ
        ("layout", {"layout": "sbhd"} | {x: ones(2, 2, 2, 8) for x in "qkv"}, {x: ones(2, 2, 2, 8) for x in "qkv"}),
    ],
    ids=described,
)
def test_ranks_disagree(comm, name, this, others):
    n = 3 * comm.size
    assert_disagree(comm, name, made(this, n), made(others, n), call_on(comm, ulysses_attention, ARRAYS))
