"""Every local backend on arrays that are views of all sorts: offsets, gaps, backwards, axes of length 1, in every argument."""

import numpy as np
import oracle
import pytest
from checks import is_array
from gradients import dense_gradient
from helpers import WORLD, as_kind, as_numpy, part, split
from test_backends import USER

from ulysses_dp import AttnType, attention, attention_backward, backends, ulysses_attention, ulysses_attention_backward
from ulysses_dp._device.arrays import tensor

BACKENDS = [*(x for x in AttnType if x is not AttnType.AUTO), USER]
COMPLETE = (AttnType.INTEL_SYCL, AttnType.NUMPY, USER)  # with options that the others refuse


def view_of(x, kind, rng):
    """The numbers of a NumPy array in other memory: axes in any order, gaps, backwards, an offset; nonsense lies in between."""
    if not x.size:
        return as_kind(x, kind)
    order = rng.permutation(x.ndim) if rng.random() < 0.7 else np.arange(x.ndim)
    turned = x.transpose(order)
    steps = rng.choice([1, 1, 2, -1], x.ndim)
    margins = rng.choice([0, 0, 1, 3], (2, x.ndim))
    nonsense = np.array(np.nan if x.dtype.kind == "f" else 1, x.dtype)
    wide = np.full(margins.sum(axis=0) + abs(steps) * turned.shape, nonsense)
    inside = tuple(slice(a, a + abs(s) * n, abs(s)) for a, s, n in zip(margins[0], steps, turned.shape, strict=True))
    backwards = tuple(slice(None, None, -1) if s < 0 else slice(None) for s in steps)
    wide[inside] = turned[backwards]
    lead = rng.integers(20)
    memory = as_kind(np.concatenate([np.full(lead, nonsense), wide.ravel()]), kind)[lead:]
    shaped = tensor.reshape(memory, wide.shape) if kind == "usm" else memory.reshape(wide.shape)
    view = shaped[inside][backwards]
    back = tuple(map(int, np.argsort(order)))
    view = tensor.permute_dims(view, back) if kind == "usm" else view.transpose(back)
    np.testing.assert_array_equal(as_numpy(view), x)
    return view


def drawn(rng, attn_type):
    """Whole dout, q, k, v and options of a call, small and odd."""
    batch, seq, seq_k = (int(rng.choice(x)) for x in ([1, 1, 2, 3], [1, 1, 2, 5, 9, 18], [1, 1, 2, 5, 9, 18]))
    kv_heads, group, head_dim = (int(rng.choice(x)) for x in ([1, 1, 2, 3], [1, 1, 2, 3], [2, 5, 8, 16, 64]))
    heads = kv_heads * group
    options = {"causal": bool(rng.random() < 0.4)}
    if packed := batch == 1 and rng.random() < 0.4:
        cuts = [np.sort(rng.integers(0, n + 1, 2)) for n in (seq, seq_k)]
        ends = [np.array([0, *x, n], np.int32) for x, n in zip(cuts, (seq, seq_k), strict=True)]
        options |= {"layout": "thd", "cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    if rng.random() < 0.2:
        options["softmax_scale"] = float(rng.choice([-0.4, 0, 1.5]))
    if rng.random() < 0.2:
        options["window_size"] = tuple(map(int, rng.integers(-1, 4, 2)))
    if rng.random() < 0.2:
        options["alibi_slopes"] = rng.random(heads).astype(np.float32)
    if rng.random() < 0.3:
        shape = [int(rng.choice([1, n])) for n in (batch, heads, seq, seq_k)]
        options["bias"] = np.where(rng.random(shape) < 0.1, -np.inf, rng.standard_normal(shape)).astype(np.float32)
    if rng.random() < 0.3:
        options["key_padding_mask"] = rng.random((batch, seq_k)) < 0.6  # some rows see nothing
    if attn_type in COMPLETE and rng.random() < 0.3:
        options |= {"softcap": 1.5, "sinks": rng.standard_normal(heads).astype(np.float32)}
    shapes = [(batch, n, h, head_dim) for n, h in ((seq, heads), (seq, heads), (seq_k, kv_heads), (seq_k, kv_heads))]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return [x[0] for x in arrays] if packed else arrays, options


@pytest.fixture(params=BACKENDS, ids=lambda x: x.name)
def attn_type(request):
    """One backend after the other, as far as they are installed."""
    if request.param not in (*backends.usable(), USER):
        pytest.skip(f"{request.param.name} is not installed")
    return request.param


def compare(comm, whole, options, attn_type, views, kind="numpy", hows=("even", "even"), alone=False):
    """Forward and gradient of the rows of this rank, of which every argument is a view, against the oracle."""
    packed = options.get("layout") == "thd"
    axis = 0 if packed else 1
    ranks, rank = (1, 0) if alone else (comm.size, comm.rank)
    rows, rows_k = (split(x.shape[axis], ranks, how) for x, how in zip(whole[1:3], hows, strict=True))
    mine = [view_of(part(x, n, rank, axis), kind, views) for x, n in zip(whole, (rows, rows, rows_k, rows_k), strict=True)]
    given = {name: view_of(x, kind, views) if is_array(x) else x for name, x in options.items()}
    run, run_backward = (attention, attention_backward) if alone else (ulysses_attention, ulysses_attention_backward)
    given |= {"attn_type": attn_type} | ({} if alone else {"comm": comm})
    out, lse = run(*mine[1:], return_lse=True, **given)
    numbers = {name: x for name, x in options.items() if name != "layout"}
    expected_out, expected_lse = oracle.dense_attention(*whole[1:], **numbers)
    viewed = out if kind != "numpy" and ranks > 1 else view_of(as_numpy(out), kind, views)
    gradients = run_backward(*mine, viewed, lse if viewed is out else view_of(as_numpy(lse), kind, views), **given)
    expected = dense_gradient(*whole, **numbers)[: 3 + ("sinks" in options)]
    pairs = [(out, expected_out, rows, axis), (lse, expected_lse, rows, axis + 1)]
    pairs += [(x, y, n, axis) for x, y, n in zip(gradients[:3], expected, (rows, rows_k, rows_k), strict=False)]
    for result, wanted, n, along in pairs:
        atol = 4e-5 * np.abs(wanted[np.isfinite(wanted)]).max(initial=1)
        np.testing.assert_allclose(as_numpy(result), part(wanted, n, rank, along), rtol=0, atol=atol)
    for result, wanted in zip(gradients[3:], expected[3:], strict=True):
        np.testing.assert_allclose(as_numpy(result), wanted, rtol=0, atol=4e-5 * np.abs(wanted).max(initial=1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["numpy", "dpnp", "usm"])
@pytest.mark.parametrize("alone", [pytest.param(True, marks=pytest.mark.single), False], ids=["local", "distributed"])
def test_views_in_every_argument(comm, attn_type, kind, alone, seed):
    """Every rank draws the same arrays, and its own views of them."""
    rng, views = np.random.default_rng(seed), np.random.default_rng([seed, WORLD.rank])
    for _ in range(4):
        whole, options = drawn(rng, attn_type)
        hows = rng.choice(["even", "uneven", "gaps", "first", "last"], 2)
        compare(comm, whole, options, attn_type, views, kind, hows, alone)
