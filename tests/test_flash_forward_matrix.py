"""The schedule for matrix engines: right on the CPU, which runs the same SPIR-V with functions in place of the engine.

Each set of specialisation constants takes the driver long to compile: so few are used here, on the smallest tiles.
"""

from functools import partial

import numpy as np
import oracle
import pytest
from helpers import as_view, random_qkv
from test_flash_forward import guarded
from test_flash_forward_gpu import HEADS, KEYS, OPTIONS, SEQ
from ulysses_dp.kernels import reference
from ulysses_dp.kernels.arguments import Problem
from ulysses_dp.kernels.flash_forward_matrix import MATRIX_TILES, SUB_GROUP, tile_for
from ulysses_dp.kernels.schedules import SCHEDULES

from ulysses_dp import attention
from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue
from ulysses_dp._device.workspace import scratch
from ulysses_dp.reference import dense_attention

pytestmark = [
    pytest.mark.single,
    pytest.mark.skipif(SUB_GROUP not in default_queue().sycl_device.sub_group_sizes, reason="no sub-groups of 16"),
]

BITS = {"bfloat16": 8, "float16": 11}  # of a number, with the leading one


def narrowed(x, form):
    """Numbers as arrays hold them in 16 bits."""
    if form == "float16":
        return x.astype(np.float16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def widened(x):
    """Numbers of 16 bits as float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


def run(q, k, v, *, layout="C", dtype="float32", **problem):
    """What the kernel writes of arrays of 16 bits, as numbers; there is nothing around the outputs that changes."""
    queue, (batch, seq_q, heads, _) = default_queue(), q.shape
    given = [as_view(x.view(np.float16), "usm", layout, queue) for x in (q, k, v)]
    if q.dtype == np.uint16:
        given = [
            tensor.usm_ndarray(x.shape, "u2", buffer=x.usm_data, strides=x.strides, offset=x._element_offset) for x in given
        ]
    out, around_out = guarded(q.shape, (1, 0, 2, 3), "float32")
    if dtype != "float32":
        out, around_out = tensor.empty(q.shape, dtype=dtype, sycl_queue=queue), None
    lse, around_lse = guarded((batch, heads, seq_q), (2, 0, 1), "float32")
    memory = partial(scratch, queue, dtype=np.dtype("float32"))
    SCHEDULES["matrix"].forward(*given, out, lse, Problem(**problem), memory)
    for whole in (tensor.asnumpy(x) for x in (around_out, around_lse) if x is not None):
        whole[(slice(1, -1),) * whole.ndim] = 7
        assert (whole == 7).all()
    out = tensor.asnumpy(out)
    return out if dtype == "float32" else widened(out), tensor.asnumpy(lse)


def drawn(seed, form, *sizes, **more):
    """q, k and v in 16 bits, and as numbers."""
    stored = [narrowed(x, form) for x in random_qkv(seed, *sizes, **more)]
    return stored, [widened(x) for x in stored]


def assert_lse(lse, expected):
    np.testing.assert_allclose(
        lse, expected, rtol=0, atol=2e-6 * max(1, np.abs(expected[np.isfinite(expected)]).max(initial=1))
    )


def weights_rounded(q, k, v, form, *, scale, diagonal, group):
    """Attention in float64 but for weights, which are rounded to 16 bits."""
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    score = np.einsum("bihd,bjhd->bhij", q, k, dtype=np.float64) * scale
    i, j = np.ogrid[: q.shape[1], : k.shape[1]]
    score = np.where(j <= i + diagonal, score, -np.inf)
    weights = np.exp(score - score.max(axis=-1, keepdims=True))
    half = widened(narrowed(weights, form)).astype(np.float64)
    return np.einsum("bhij,bjhd->bihd", half / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("form", BITS)
def test_as_exact_as_weights_of_16_bits(form):
    """At most 1.5 times the error of float64 with such weights; lse as in float32."""
    stored, numbers = drawn(0, form, 2, 130, 4, 2, 32, seq_k=131)
    problem = {"scale": 32**-0.5, "diagonal": 1, "group": 2}
    out, lse = run(*stored, **problem)
    expected, expected_lse = reference.forward(*(x.astype(np.float64) for x in numbers), **problem)
    ideal = weights_rounded(*numbers, form, **problem)
    assert np.sqrt(np.mean((out - expected) ** 2)) <= 1.5 * np.sqrt(np.mean((ideal - expected) ** 2))
    assert np.abs(out - expected).max() <= 1.5 * np.abs(ideal - expected).max()
    assert_lse(lse, expected_lse)
    rounded, _ = run(*stored, dtype=stored[0].dtype, **problem)
    np.testing.assert_array_equal(rounded, widened(narrowed(out, form)))


# dense rows, rows that block loads cannot read, and rows that are narrower than these; on the smallest tile
@pytest.mark.parametrize("head_dim", [1, 13, 32])
@pytest.mark.parametrize("layout", ["C", "swapped", "padded"])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "diagonal"),
    [(1, 1, 1), (16, 64, 64), (15, 33, 33), (61, 61, 0), (37, 97, 60), (97, 37, -60), (5, 3, -5), (20, 0, 0), (130, 131, 131)],
)
def test_against_the_reference(head_dim, layout, seq_q, seq_k, diagonal):
    stored, numbers = drawn(head_dim, "bfloat16", 2, seq_q, 6, 2, head_dim, seq_k=seq_k)
    problem = {"scale": head_dim**-0.5, "diagonal": diagonal, "group": 3}
    out, lse = run(*stored, layout=layout, **problem)
    expected, expected_lse = reference.forward(*numbers, **problem)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2.0**-7)
    assert_lse(lse, expected_lse)


# queries loaded in every step, and a head_dim that two sub-groups share
@pytest.mark.parametrize("head_dim", [200])
def test_large_head_dims(head_dim):
    stored, numbers = drawn(0, "bfloat16", 1, 37, 3, 1, head_dim, seq_k=97)
    problem = {"scale": head_dim**-0.5, "diagonal": 60, "group": 3}
    out, lse = run(*stored, **problem)
    expected, expected_lse = reference.forward(*numbers, **problem)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2.0**-7)
    assert_lse(lse, expected_lse)


@pytest.mark.parametrize("head_shift", [0, 1, 2])
def test_groups_of_heads(head_shift):
    stored, numbers = drawn(0, "bfloat16", 2, 29, 6, (5 + head_shift) // 3 + 1, 32)
    problem = {"scale": 0.125, "diagonal": 0, "group": 3, "head_shift": head_shift}
    out, lse = run(*stored, **problem)
    expected, expected_lse = reference.forward(*numbers, **problem)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2.0**-7)
    assert_lse(lse, expected_lse)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("into", ["q", "k", "v"])
def test_special_values_reach_the_rows_that_see_them(special, into):
    """And no others, in a tile either."""
    stored, numbers = drawn(0, "bfloat16", 1, 50, 2, 2, 32)
    problem = {"scale": 0.25, "diagonal": 0, "group": 1}
    clean = run(*stored, **problem)
    for arrays in (stored, numbers):
        x = dict(zip("qkv", arrays, strict=True))[into]
        x[0, 23, 1, 2] = narrowed(np.full(1, special), "bfloat16")[0] if x.dtype == np.uint16 else special
    out, lse = run(*stored, **problem)
    with np.errstate(invalid="ignore"):  # inf - inf of an infinite score
        expected, expected_lse = oracle.dense_attention(*numbers, softmax_scale=0.25, causal=True)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2.0**-7)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(out[:, :23], clean[0][:, :23])
    np.testing.assert_array_equal(lse[..., :23], clean[1][..., :23])


def test_scores_that_grow_and_shrink():
    """Past what the maximum is let pass, up and down."""
    stored, numbers = drawn(0, "bfloat16", 1, 40, 2, 2, 32, seq_k=200)
    numbers[1] *= np.array([1, 30, 0.1, 100, 3])[np.arange(200) // 40, None, None]
    stored[1] = narrowed(numbers[1], "bfloat16")
    numbers[1] = widened(stored[1])
    problem = {"scale": 1.0, "diagonal": 160, "group": 1}
    out, lse = run(*stored, **problem)
    expected, expected_lse = reference.forward(*(x.astype(np.float64) for x in numbers), **problem)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2.0**-6)
    assert_lse(lse, expected_lse)


@pytest.mark.parametrize("name", ["window", "bias", "bias of rows", "all"])
def test_options(monkeypatch, name):
    """Special values reach the rows that see them, and dropout drops the weights that other kernels drop. A bias is read four
    keys at once where they follow each other, and else key by key."""
    monkeypatch.setenv("ULYSSES_DP_SCHEDULE", "matrix")
    stored, numbers = drawn(3, "bfloat16", 2, SEQ, HEADS, 2, 32, seq_k=KEYS)
    if name != "all":  # which has dropout, that leaves nan of 0 · inf
        for arrays in (stored, numbers):
            for place, special in (((0, 3), np.nan), ((1, 50, 1, 2), np.inf), ((1, 33, 0, 5), -np.inf)):
                arrays[2][place] = narrowed(np.full(1, special), "bfloat16")[0] if arrays is stored else special
    options = {"bias": OPTIONS["bias"]["bias"][..., :1]} if name == "bias of rows" else OPTIONS[name]
    out, lse = attention(*stored, dtype="bfloat16", return_lse=True, **options)
    expected, expected_lse = dense_attention(*numbers, **options)
    np.testing.assert_allclose(widened(out), expected, rtol=2.0**-8, atol=2.0**-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [13, 32])
def test_scratch_memory_is_as_declared(head_dim):
    """For dense arrays: what `plan` counts."""
    (q, k, v), _ = drawn(5, "bfloat16", 2, 21, 4, 2, head_dim, seq_k=70)
    given = [as_view(x.view(np.float16), "usm", "C", default_queue()) for x in (q, k, v)]
    taken = {}

    def memory(slot, shape):
        taken[slot] = int(np.prod(shape))
        return tensor.empty(shape, dtype="float32", sycl_queue=default_queue())

    out, lse = (tensor.empty(shape, dtype="float32", sycl_queue=default_queue()) for shape in (q.shape, (2, 4, 21)))
    problem = Problem(scale=0.125, diagonal=49, group=2)
    SCHEDULES["matrix"].forward(*given, out, lse, problem, memory)
    assert taken == SCHEDULES["matrix"].scratch("float32", q.shape, k.shape, backward=False)


def test_repetition_is_bit_identical():
    stored, _ = drawn(5, "bfloat16", 2, 100, 4, 2, 32)
    problem = {"scale": 0.125, "diagonal": 0, "group": 2}
    first = run(*stored, **problem)
    for _ in range(3):
        for result, expected in zip(run(*stored, **problem), first, strict=True):
            np.testing.assert_array_equal(result, expected)


def test_every_head_dim_has_a_tile():
    assert [tile_for(head_dim) for head_dim in (1, 32, 33, 65, 97, 129, 193, 256)] == [32, 32, 64, 96, 128, 192, 256, 256]
    assert all(size % 32 == 0 and tile.keys % 32 == 0 for size, tile in MATRIX_TILES.items())
