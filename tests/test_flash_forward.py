"""The compiled attention kernels against the reference beside their source, and against the oracle where nan is masked."""

from functools import partial

import numpy as np
import oracle
import pytest
from helpers import as_view, random_qkv
from oracle import TOLERANCE
from ulysses_dp.kernels import reference
from ulysses_dp.kernels.arguments import Problem
from ulysses_dp.kernels.flash_forward import HEAD_DIMS, TILES, TILES_OF
from ulysses_dp.kernels.schedules import SCHEDULES

from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue
from ulysses_dp._device.workspace import scratch

pytestmark = pytest.mark.single

DTYPES = ("float32", "float64")
GUARD = 7.0
BLOCK = max(tile.block for tile in TILES.values())


def guarded(shape, order, dtype):
    """An output full of nan inside a larger array full of GUARD, stored in another order of axes; and that larger array."""
    inside = np.full([shape[axis] for axis in order], np.nan, dtype)
    whole = tensor.asarray(np.pad(inside, 1, constant_values=GUARD), sycl_queue=default_queue())
    return tensor.permute_dims(whole[(slice(1, -1),) * len(order)], tuple(map(order.index, range(len(order))))), whole


def run(q, k, v, *, layout="padded", tile="short", **problem):
    """What the kernel of a schedule writes; the inputs lie between nan, the outputs between numbers that must stay."""
    batch, seq_q, heads, _ = q.shape
    q_usm, k_usm, v_usm = (as_view(x, "usm", layout, default_queue()) for x in (q, k, v))
    out, around_out = guarded(q.shape, (1, 0, 2, 3), q.dtype)
    lse, around_lse = guarded((batch, heads, seq_q), (2, 0, 1), q.dtype)
    memory = partial(scratch, default_queue(), dtype=lse.dtype)
    SCHEDULES[tile].forward(q_usm, k_usm, v_usm, out, lse, Problem(**problem), memory)
    for whole in map(tensor.asnumpy, (around_out, around_lse)):
        whole[(slice(1, -1),) * whole.ndim] = GUARD
        assert (whole == GUARD).all()
    return tensor.asnumpy(out), tensor.asnumpy(lse)


def compare(results, expected, dtype):
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "tile"), [(dtype, tile) for dtype in DTYPES for tile in TILES_OF[dtype]])
@pytest.mark.parametrize("head_dim", sorted({1, 3, 50, 253, *HEAD_DIMS}))
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "diagonal"),
    [
        (1, 1, 1),
        (1, 33, 33),
        (25, 1, 1),
        (24, 32, 32),
        (61, 61, 0),
        (37, 97, 60),
        (97, 37, -60),
        (53, 64, 3),
        (64, 53, -7),
        (5, 3, -5),
        (130, 131, 131),
    ],
)
def test_against_reference(dtype, tile, head_dim, seq_q, seq_k, diagonal):
    q, k, v = random_qkv(head_dim, 1, seq_q, 2, 2, head_dim, dtype, seq_k)
    options = {"scale": head_dim**-0.5, "diagonal": diagonal, "group": 1}
    results = run(q, k, v, tile=tile, **options)
    compare(results, reference.forward(q, k, v, **options), dtype)
    if diagonal in (seq_k, seq_k - seq_q):
        compare(results, oracle.dense_attention(q, k, v, causal=diagonal < seq_k), dtype)


@pytest.mark.parametrize(("dtype", "tile"), [(dtype, tile) for dtype in DTYPES for tile in TILES_OF[dtype]])
def test_every_diagonal(dtype, tile):
    """The mask starts at every place of a block of keys and of a work-group's rows."""
    q, k, v = random_qkv(0, 1, 50, 1, 1, 16, dtype, 70)
    for diagonal in range(-52, 72):
        options = {"scale": 0.25, "diagonal": diagonal, "group": 1}
        compare(run(q, k, v, tile=tile, **options), reference.forward(q, k, v, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length(dtype):
    for seq in range(1, 100):
        q, k, v = random_qkv(seq, 1, seq, 1, 1, 3, dtype, 100 - seq)
        options = {"scale": 0.5, "diagonal": 100, "group": 1}
        compare(run(q, k, v, **options), reference.forward(q, k, v, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_keys(dtype):
    """Rounding errors do not add up over hundreds of blocks."""
    q, k, v = random_qkv(0, 1, 25, 2, 2, 64, dtype, 20011)
    options = {"scale": 0.125, "diagonal": 20011 - 25, "group": 1}
    compare(run(q, k, v, **options), reference.forward(q, k, v, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_early_and_late_keys_weigh_the_same(dtype):
    """Scores that are all equal: half of the keys with value 0, then half with value 1, whose sums are exact."""
    keys = 100_000
    q, k, v = (np.zeros((1, seq, 1, 16), dtype) for seq in (1, keys, keys))
    v[:, keys // 2 :] = 1
    out, lse = run(q, k, v, scale=1.0, diagonal=keys, group=1)
    compare((out, lse), (np.full(out.shape, 0.5), np.full(lse.shape, np.log(keys))), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["C", "swapped", "padded", "reversed"])
def test_layouts(dtype, layout):
    q, k, v = random_qkv(0, 3, 41, 4, 4, 16, dtype, 45)
    options = {"scale": 0.25, "diagonal": 4, "group": 1}
    compare(run(q, k, v, layout=layout, **options), reference.forward(q, k, v, **options), dtype)


@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_groups_of_heads(group):
    heads = 6
    for head_shift in range(group):
        q, k, v = random_qkv(group, 2, 29, heads, (heads - 1 + head_shift) // group + 1, 16)
        options = {"scale": 0.25, "diagonal": 0, "group": group, "head_shift": head_shift}
        compare(run(q, k, v, **options), reference.forward(q, k, v, **options), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_scales(dtype, scale):
    q, k, v = random_qkv(0, 1, 30, 2, 2, 16, dtype, 70)
    options = {"scale": scale, "diagonal": 40, "group": 1}
    compare(run(q, k, v, **options), reference.forward(q, k, v, **options), dtype)


@pytest.mark.parametrize("seq_q", [0, 5])
def test_no_keys_or_no_queries(seq_q):
    q, k, v = random_qkv(0, 1, seq_q, 2, 2, 16, seq_k=0)
    out, lse = run(q, k, v, layout="C", scale=1.0, diagonal=0, group=1)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores(dtype):
    """One product per score, so that equal scores are equal in every precision: each of -1e4, 0 and 1e4."""
    q, k, v = random_qkv(0, 1, 60, 2, 2, 16, dtype, 75)
    q[...], k[...] = 0, 0
    rng = np.random.default_rng(0)
    q[..., 5], k[..., 5] = rng.choice([-100, 0, 100], q.shape[:3]), rng.choice([-100, 0, 100], k.shape[:3])
    out, lse = run(q, k, v, scale=1.0, diagonal=15, group=1)
    expected_out, expected_lse = oracle.dense_attention(q, k, v, softmax_scale=1.0, causal=True)
    compare([out], [expected_out], dtype)
    np.testing.assert_allclose(lse, expected_lse, rtol=np.finfo(dtype).eps * 4, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_query_stays_in_its_row(dtype):
    q, k, v = random_qkv(0, 2, 50, 2, 2, 16, dtype)
    options = {"scale": 0.25, "diagonal": 0, "group": 1}
    clean_out, clean_lse = run(q, k, v, **options)
    q[1, 17, 0, 3] = np.nan
    clean_out[1, 17, 0], clean_lse[1, 0, 17] = np.nan, np.nan
    out, lse = run(q, k, v, **options)
    np.testing.assert_array_equal(out, clean_out)
    np.testing.assert_array_equal(lse, clean_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("into", ["k", "v"])
@pytest.mark.parametrize("key", [0, 23, 24, 31, 32, 49])
def test_special_values_reach_the_rows_that_see_them(dtype, special, into, key):
    q, k, v = random_qkv(0, 1, 50, 2, 2, 16, dtype)
    options = {"scale": 0.25, "diagonal": 0, "group": 1}
    clean = run(q, k, v, **options)
    {"k": k, "v": v}[into][0, key, 1, 2] = special
    out, lse = run(q, k, v, **options)
    with np.errstate(invalid="ignore"):  # inf - inf of an infinite score
        compare((out, lse), oracle.dense_attention(q, k, v, causal=True), dtype)
    np.testing.assert_array_equal(out[:, :key], clean[0][:, :key])
    np.testing.assert_array_equal(lse[..., :key], clean[1][..., :key])
    np.testing.assert_array_equal(out[:, :, 0], clean[0][:, :, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [slice(0, 1), slice(0, BLOCK), slice(5, 2 * BLOCK), slice(None)])
def test_scores_of_minus_infinity(dtype, hidden):
    """Keys with score -inf have no weight, even where a whole block of keys, or all, have."""
    q, k, v = random_qkv(0, 1, 80, 2, 2, 16, dtype)
    q, k[:, hidden] = abs(q), -np.inf
    results = run(q, k, v, scale=0.25, diagonal=0, group=1)
    compare(results, oracle.dense_attention(q, k, v, causal=True), dtype)


@pytest.mark.parametrize("seq", [100, 1000])
@pytest.mark.parametrize("size", [1, 10])
def test_no_less_exact_than_pytorch(seq, size):
    """Against the float64 oracle, on the same inputs; errors of different orders of summation may differ by a fifth."""
    torch = pytest.importorskip("torch")
    q, k, v = (size * x for x in random_qkv(0, 1, seq, 1, 1, 64))
    expected, _ = oracle.dense_attention(q, k, v)
    ours, _ = run(q, k, v, scale=0.125, diagonal=seq, group=1, tile="wide")
    theirs = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)))
    errors = [np.sqrt(np.mean((x - expected) ** 2)) for x in (ours, theirs.transpose(1, 2).numpy())]
    assert errors[0] <= 1.2 * errors[1]
