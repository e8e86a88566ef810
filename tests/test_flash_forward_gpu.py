"""The GPU schedule: right on the CPU, which runs the same SPIR-V."""

from functools import partial

import numpy as np
import oracle
import pytest
from helpers import random_qkv
from test_flash_forward import compare, run
from ulysses_dp.kernels import gpu_schedule, reference
from ulysses_dp.kernels.flash_forward_gpu import SUB_GROUP, tile_for
from ulysses_dp.kernels.score import ScoreOptions

from ulysses_dp import attention, trace
from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue
from ulysses_dp.reference import dense_attention

pytestmark = [
    pytest.mark.single,
    pytest.mark.skipif(SUB_GROUP not in default_queue().sycl_device.sub_group_sizes, reason="no sub-groups of 16"),
]


run_gpu = partial(run, tile="gpu")


# tiles that are filled, and tiles that are larger than a row; with q in registers, in panels, and shared by two sub-groups
@pytest.mark.parametrize("head_dim", [1, 13, 16, 32, 50, 64, 128, 200])
@pytest.mark.parametrize("layout", ["C", "swapped", "padded"])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "diagonal"),
    [(1, 1, 1), (16, 16, 16), (15, 33, 33), (61, 61, 0), (37, 97, 60), (97, 37, -60), (5, 3, -5), (20, 0, 0), (130, 131, 131)],
)
def test_against_the_reference(head_dim, layout, seq_q, seq_k, diagonal):
    q, k, v = random_qkv(head_dim, 2, seq_q, 6, 2, head_dim, seq_k=seq_k)
    options = {"scale": head_dim**-0.5, "diagonal": diagonal, "group": 3}
    compare(run_gpu(q, k, v, layout=layout, **options), reference.forward(q, k, v, **options), "float32")


@pytest.mark.parametrize("head_shift", [0, 1, 2])
def test_groups_of_heads(head_shift):
    q, k, v = random_qkv(0, 2, 29, 6, (5 + head_shift) // 3 + 1, 64)
    options = {"scale": 0.125, "diagonal": 0, "group": 3, "head_shift": head_shift}
    compare(run_gpu(q, k, v, **options), reference.forward(q, k, v, **options), "float32")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_huge_scores_and_nan_in_a_query(head_dim):
    q, k, v = random_qkv(1, 1, 40, 2, 2, head_dim)
    q[...], k[...] = 0, 0
    rng = np.random.default_rng(0)
    q[..., 5], k[..., 5] = rng.choice([-100, 0, 100], q.shape[:3]), rng.choice([-100, 0, 100], k.shape[:3])
    q[0, 17, 0] = np.nan
    out, lse = run_gpu(q, k, v, scale=1.0, diagonal=0, group=1)
    expected_out, expected_lse = oracle.dense_attention(q, k, v, softmax_scale=1.0, causal=True)
    expected_out[0, 17, 0], expected_lse[0, 0, 17] = np.nan, np.nan
    compare([out], [expected_out], "float32")
    np.testing.assert_allclose(lse, expected_lse, rtol=5e-7, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_through_the_public_function(monkeypatch, head_dim):
    monkeypatch.setenv("ULYSSES_DP_SCHEDULE", "gpu")
    q, k, v = random_qkv(2, 1, 50, 4, 2, head_dim)
    with trace() as record:
        results = attention(q, k, v, causal=True, return_lse=True)
    compare(results, oracle.dense_attention(q, k, v, causal=True), "float32")
    assert len(record.stages) == 1


def test_every_head_dim_has_a_tile():
    tiles = [tile_for("float32", head_dim) for head_dim in (1, 16, 17, 64, 65, 100, 129, 256)]
    assert tiles == [16, 16, 32, 64, 80, 128, 192, 256]


SEQ, KEYS, HEADS = 45, 70, 4
_random = np.random.default_rng(0)
_bias = _random.standard_normal((1, HEADS, SEQ, KEYS)).astype("float32")
_bias[_random.random(_bias.shape) < 0.2] = -np.inf
_bias[:, :, 9] = -np.inf  # a row that sees nothing
OPTIONS = {
    "window": {"window_size": (9, 3)},
    "softcap": {"softcap": 2.0},
    "ALiBi": {"alibi_slopes": 2.0 ** -np.arange(1, HEADS + 1)},
    "bias": {"bias": _bias},
    "padding": {"key_padding_mask": _random.random((2, KEYS)) < 0.7},
    "sinks": {"sinks": np.linspace(-1, 1, HEADS)},
    "dropout": {"dropout_p": 0.3, "seed": 12345678901234},
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("head_dim", [13, 16])
def test_options(monkeypatch, name, head_dim):
    """Every option alone, and all together; special values reach the rows that see them and no others, in a tile either."""
    monkeypatch.setenv("ULYSSES_DP_SCHEDULE", "gpu")
    q, k, v = random_qkv(head_dim, 2, SEQ, HEADS, 2, head_dim, seq_k=KEYS)
    v[0, 3], v[1, 50, 1, 2], v[1, 33, 0, 5] = np.nan, np.inf, -np.inf
    if name in ("dropout", "all"):  # which would leave nan of 0 · inf for some and not for others
        v = np.nan_to_num(v, posinf=1, neginf=1)
    results = attention(q, k, v, return_lse=True, **OPTIONS[name])
    compare(results, dense_attention(q, k, v, **OPTIONS[name]), "float32")


@pytest.mark.parametrize("special", [np.nan, np.inf])
@pytest.mark.parametrize("into", ["k", "v"])
def test_special_values_reach_the_rows_that_see_them(special, into):
    q, k, v = random_qkv(0, 1, 50, 2, 2, 16)
    options = {"scale": 0.25, "diagonal": 0, "group": 1}
    clean = run_gpu(q, k, v, **options)
    {"k": k, "v": v}[into][0, 23, 1, 2] = special
    out, lse = run_gpu(q, k, v, **options)
    with np.errstate(invalid="ignore"):  # inf - inf of an infinite score
        compare((out, lse), oracle.dense_attention(q, k, v, causal=True), "float32")
    np.testing.assert_array_equal(out[:, :23], clean[0][:, :23])
    np.testing.assert_array_equal(lse[..., :23], clean[1][..., :23])


def test_dropout_takes_the_weights_that_the_cpu_kernel_takes(monkeypatch):
    """Of equal values only the sum of the kept weights is left."""
    q, k, v = random_qkv(1, 2, 40, 4, 4, 16, seq_k=50)
    v[...] = 1
    results = []
    for schedule in ("gpu", "narrow"):
        monkeypatch.setenv("ULYSSES_DP_SCHEDULE", schedule)
        results.append(attention(q, k, v, dropout_p=0.5, seed=7))
    np.testing.assert_allclose(*results, rtol=0, atol=1e-6)


def part(first_row, first_key, step):
    """A call for some rows and keys of a sequence, in which ALiBi and dropout count."""
    row = np.arange(SEQ)
    options = ScoreOptions(
        spans=np.stack([0 * row, np.minimum(row + 30, KEYS), first_row + step * row], axis=-1),
        slopes=np.full((1, HEADS), 0.1),
        dropout_p=0.3,
        seed=5,
        first_row=first_row,
        first_key=first_key,
        step=step,
    )
    return {"scale": 0.25, "diagonal": 0, "group": 2, "options": options}


@pytest.mark.parametrize(("first_row", "first_key", "step"), [(5, 8, 1), (5, 7, 1), (1, 2, 3)])
def test_a_part_of_the_rows_and_keys(first_row, first_key, step):
    q, k, v = random_qkv(3, 2, SEQ, HEADS, 2, 16, seq_k=KEYS)
    problem = part(first_row, first_key, step)
    compare(run_gpu(q, k, v, **problem), reference.forward(q, k, v, **problem), "float32")


def test_repetition_is_bit_identical():
    q, k, v = random_qkv(5, 2, 100, 4, 2, 64)
    options = {"scale": 0.125, "diagonal": 0, "group": 2}
    first = run_gpu(q, k, v, **options)
    for _ in range(3):
        for result, expected in zip(run_gpu(q, k, v, **options), first, strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("head_dim", "offset", "readable"), [(64, 0, True), (64, 16, True), (64, 4, False), (8, 0, False), (40, 0, False)]
)
def test_what_block_loads_read(head_dim, offset, readable):
    """Rows that start at multiples of 64 bytes for every head, of at least 64 bytes."""
    shape = (1, 9, 2, head_dim)
    memory = tensor.empty(int(np.prod(shape)) + offset, dtype="f4", sycl_queue=default_queue())
    assert gpu_schedule.block_loads_read(tensor.reshape(memory[offset:], shape)) == readable
    assert not gpu_schedule.block_loads_read(tensor.reshape(memory[offset:], shape)[:, ::-1])
