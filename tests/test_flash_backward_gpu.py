"""The GPU schedule of the gradient: right on the CPU, which runs the same SPIR-V; `make memcheck` runs all of its kernels."""

from functools import partial

import numpy as np
import pytest
import test_score
from checks import check_gradient, local
from helpers import as_view, random_qkv
from test_flash_forward import GUARD, guarded
from test_flash_forward_gpu import HEADS, KEYS, OPTIONS, SEQ, part
from ulysses_dp.kernels import cpu_schedule, reference
from ulysses_dp.kernels.arguments import Problem
from ulysses_dp.kernels.flash_backward_gpu import GPU_TILES, SUB_GROUP, tile_for
from ulysses_dp.kernels.schedules import SCHEDULES

from ulysses_dp import AttnType, attention, attention_backward
from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue
from ulysses_dp._device.workspace import scratch

pytestmark = [
    pytest.mark.single,
    pytest.mark.skipif(SUB_GROUP not in default_queue().sycl_device.sub_group_sizes, reason="no sub-groups of 16"),
]
# Tiles that are filled, and tiles that are larger than a row; sub-groups that share a row, with dk and dv apart. Others take
# the compiler of the CPU a minute.
CASES = [("float32", 16), ("float32", 13), ("float64", 16), ("float64", 70)]
SIZES = [
    *((1, 1, 1), (16, 16, 16), (15, 33, 33), (17, 16, -1)),
    *((61, 61, 0), (37, 97, 60), (97, 37, -60), (5, 3, -5), (130, 131, 131)),
]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # relative to the largest number of a gradient, or to 1 where that is larger


def inputs(seed, batch, seq_q, heads, kv_heads, head_dim, seq_k=None, dtype="float32", **options):
    """Random dout, q, k and v, with the lse and delta that belong to them."""
    q, k, v = random_qkv(seed, batch, seq_q, heads, kv_heads, head_dim, dtype, seq_k=seq_k)
    dout = np.random.default_rng(seed + 1).standard_normal(q.shape).astype(dtype)
    out, lse = reference.forward(q, k, v, **options)
    delta = np.einsum("bihd,bihd->bhi", dout, out)
    return dout, q, k, v, lse.astype(dtype), delta.astype(dtype)


def run(dout, q, k, v, lse, delta, *, layout="padded", **options):
    """What the kernels write; the inputs lie between nan, the outputs between numbers that must stay."""
    queue = default_queue()
    arrays = [as_view(x, "usm", layout, queue) for x in (dout, q, k, v)]
    # (batch, heads, seq) as a view of numbers that are stored (seq, batch, heads)
    numbers = [tensor.asarray(np.ascontiguousarray(x.transpose(2, 0, 1)), sycl_queue=queue) for x in (lse, delta)]
    arrays += [tensor.permute_dims(x, (1, 2, 0)) for x in numbers]
    grads, around = zip(*(guarded(x.shape, (1, 0, 2, 3), x.dtype) for x in (q, k, v)), strict=True)
    SCHEDULES["gpu"].backward(arrays[:4], *arrays[4:], grads, Problem(**options), partial(scratch, queue, dtype=q.dtype))
    for whole in map(tensor.asnumpy, around):
        whole[(slice(1, -1),) * whole.ndim] = GUARD
        assert (whole == GUARD).all()
    return [tensor.asnumpy(x) for x in grads]


def compare(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        limit = TOLERANCE[str(result.dtype)] * np.abs(wanted).max(initial=1)
        np.testing.assert_allclose(result, wanted, rtol=0, atol=limit)


def test_every_head_dim_has_a_tile():
    for dtype, tiles in GPU_TILES.items():
        assert all(head_dim <= tile_for(dtype, head_dim) for head_dim in range(1, 257))
        assert all(tile_for(dtype, head_dim) == head_dim for head_dim in tiles)


@pytest.mark.parametrize(("dtype", "head_dim"), CASES)
@pytest.mark.parametrize("layout", ["C", "swapped", "padded", "reversed"])
@pytest.mark.parametrize(("seq_q", "seq_k", "diagonal"), SIZES)
def test_against_the_reference(dtype, head_dim, layout, seq_q, seq_k, diagonal):
    options = {"scale": head_dim**-0.5, "diagonal": diagonal, "group": 3}
    arrays = inputs(head_dim, 2, seq_q, 6, 2, head_dim, seq_k, dtype, **options)
    compare(run(*arrays, layout=layout, **options), reference.backward(*arrays, **options))


@pytest.mark.parametrize("causal", [False, True])
def test_every_length(causal):
    for seq in range(1, 50):
        seq_k = 50 - seq
        options = {"scale": 0.2, "diagonal": seq_k - seq if causal else seq_k, "group": 1}
        arrays = inputs(seq, 1, seq, 1, 1, 16, seq_k, **options)
        compare(run(*arrays, **options), reference.backward(*arrays, **options))


def test_every_diagonal():
    """The mask starts at every place of a step and of the rows of a sub-group."""
    for diagonal in range(-42, 56):
        options = {"scale": 0.2, "diagonal": diagonal, "group": 1}
        arrays = inputs(0, 1, 40, 1, 1, 16, 55, **options)
        compare(run(*arrays, **options), reference.backward(*arrays, **options))


@pytest.mark.parametrize("head_shift", [0, 1, 2])
@pytest.mark.parametrize("head_dim", [13, 16])
def test_groups_of_heads(head_dim, head_shift):
    """Groups that are cut at both ends, and a kv head that no query head reads."""
    options = {"scale": 0.125, "diagonal": 0, "group": 3, "head_shift": head_shift}
    arrays = inputs(0, 2, 29, 5, (4 + head_shift) // 3 + 2, head_dim, **options)
    grads = run(*arrays, **options)
    compare(grads, reference.backward(*arrays, **options))
    for grad in grads[1:]:
        assert (grad[:, :, -1] == 0).all()


@pytest.mark.parametrize(("seq_q", "seq_k"), [(20, 0), (0, 20)])
def test_nothing_to_see(seq_q, seq_k):
    options = {"scale": 1.0, "diagonal": seq_k, "group": 1}
    for grad in run(*inputs(0, 2, seq_q, 2, 2, 16, seq_k, **options), **options):
        assert (grad == 0).all()


@pytest.mark.parametrize("diagonal", [-20, 40])
def test_queries_with_lse_of_minus_infinity(diagonal):
    """They see nothing, whether a mask says so or lse alone."""
    options = {"scale": 0.125, "diagonal": diagonal, "group": 1}
    arrays = inputs(3, 1, 40, 2, 2, 16, **options)
    arrays[4][:, :, :20] = -np.inf
    grads = run(*arrays, **options)
    assert (grads[0][:, :20] == 0).all()
    of_others = [x[:, 20:] if n in (0, 1) else x[..., 20:] if n > 3 else x for n, x in enumerate(arrays)]
    options["diagonal"] += 20
    dq, dk, dv = reference.backward(*of_others, **options)
    compare([grads[0][:, 20:], *grads[1:]], [dq, dk, dv])


@pytest.mark.parametrize("head_dim", [13, 16])
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_special_values_stay_with_those_who_see_them(head_dim, special):
    """Under a causal mask a key reaches no earlier query, and a query no later key, in the same sub-group either."""
    options = {"scale": 0.125, "diagonal": 0, "group": 1}
    arrays = inputs(4, 1, 40, 2, 2, head_dim, **options)
    clean = run(*arrays, **options)
    dout, q, k, v, lse, delta = (x.copy() for x in arrays)
    k[:, 25], v[:, 25] = special, special
    np.testing.assert_array_equal(run(dout, q, k, v, lse, delta, **options)[0][:, :25], clean[0][:, :25])
    dout, q, k, v, lse, delta = (x.copy() for x in arrays)
    dout[:, 21], q[:, 21], lse[..., 21], delta[..., 21] = special, special, special, special
    for grad, expected in zip(run(dout, q, k, v, lse, delta, **options)[1:], clean[1:], strict=True):
        np.testing.assert_array_equal(grad[:, 22:], expected[:, 22:])
        assert not np.isfinite(grad[:, :21]).any()


def test_repetition_is_bit_identical():
    options = {"scale": 0.125, "diagonal": 0, "group": 2}
    arrays = inputs(5, 2, 100, 4, 2, 16, **options)
    first = run(*arrays, **options)
    for _ in range(5):
        for grad, expected in zip(run(*arrays, **options), first, strict=True):
            np.testing.assert_array_equal(grad, expected)


@pytest.mark.parametrize(("head_dim", "form"), [(16, "float32"), (16, "float64"), (16, "float16")])
@pytest.mark.parametrize("causal", [False, True])
def test_through_the_public_function(monkeypatch, comm, head_dim, form, causal):
    monkeypatch.setenv("ULYSSES_DP_SCHEDULE", "gpu")
    monkeypatch.setattr(cpu_schedule, "launch", None)  # the other schedule
    whole = random_qkv(2, 2, 50, 4, 2, head_dim, seq_k=57)
    check_gradient(comm, whole, functions=local, form=form, causal=causal)


@pytest.mark.parametrize("name", ["window", "bias", "all"])
def test_options(monkeypatch, name):
    monkeypatch.setenv("ULYSSES_DP_SCHEDULE", "gpu")
    monkeypatch.setattr(cpu_schedule, "launch", None)
    q, k, v = random_qkv(1, 2, SEQ, HEADS, 2, 16, seq_k=KEYS)
    dout = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
    out, lse = attention(q, k, v, return_lse=True, **OPTIONS[name])
    results = attention_backward(dout, q, k, v, out, lse, **OPTIONS[name])
    wide = [x.astype(np.float64) for x in (dout, q, k, v, out, lse)]
    compare(results, attention_backward(*wide, attn_type=AttnType.NUMPY, **OPTIONS[name]))


@pytest.mark.parametrize(("first_row", "first_key", "step"), [(5, 8, 1), (1, 2, 3)])
def test_a_part_of_the_rows_and_keys(first_row, first_key, step):
    problem = part(first_row, first_key, step)
    arrays = inputs(3, 2, SEQ, HEADS, 2, 16, KEYS, **problem)
    compare(run(*arrays, **problem), reference.backward(*arrays, **problem))


@pytest.mark.parametrize("head_dim", [8, 16])
def test_lse_that_has_lost_the_number_of_keys(monkeypatch, head_dim):
    """Finite biases that hide whole rows."""
    monkeypatch.setenv("ULYSSES_DP_SCHEDULE", "gpu")
    monkeypatch.setattr(cpu_schedule, "launch", None)
    test_score.test_rows_of_one_large_bias("float32", "float32", -1e9, head_dim)
    if head_dim == 16:
        test_score.test_large_biases_of_two_sizes("float32", -1e9)
