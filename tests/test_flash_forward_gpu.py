"""The GPU schedule: right on the CPU, which runs the same SPIR-V."""

from functools import partial

import numpy as np
import oracle
import pytest
from helpers import random_qkv
from test_flash_forward import compare, run
from ulysses_dp.kernels import reference
from ulysses_dp.kernels.flash_forward_gpu import GPU_TILES, SUB_GROUP

from ulysses_dp import attention, trace
from ulysses_dp._device.queue import default_queue

pytestmark = [
    pytest.mark.single,
    pytest.mark.skipif(SUB_GROUP not in default_queue().sycl_device.sub_group_sizes, reason="no sub-groups of 16"),
]


run_gpu = partial(run, tile="gpu")


@pytest.mark.parametrize("head_dim", GPU_TILES)
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
