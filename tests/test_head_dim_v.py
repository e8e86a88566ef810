"""Values of another width than queries and keys, as multi-head latent attention has them, against the oracles."""

import numpy as np
import pytest
import test_findings
import test_plan
import test_ring as test_ring_module
from checks import FORMS, assert_refused, check, check_gradient, distributed, dtype_of_options, kinds_of, some_options
from gradients import dense_gradient
from helpers import COMPLETE, part, random_qkv, split
from oracle import dense_attention

from ulysses_dp import AttnType, backends, decode_attention, plan, ulysses_attention, ulysses_attention_backward
from ulysses_dp._plan.memory import memory_of
from ulysses_dp._plan.problem import Problem
from ulysses_dp._ranks.orders import ORDERS

SEQ, KEYS = 13, 18
WIDTHS = [(24, 16), (16, 24), (8, 1), (1, 5), (192, 128)]
MIXED = ("causal", "window", "softcap", "alibi", "bias", "mask", "sinks", "dropout")


def arrays_of(widths, batch=2, heads=4, kv_heads=2, dtype="float32", seq=SEQ, keys=KEYS):
    """Whole q, k and v, of which v has a width of its own."""
    q, k, _ = random_qkv(0, batch, seq, heads, kv_heads, widths[0], dtype, keys)
    return q, k, random_qkv(1, batch, seq, heads, kv_heads, widths[1], dtype, keys)[2]


def check_both(comm, functions, whole, *, context=False, **options):
    check(comm, whole, functions=functions, **options)
    check_gradient(comm, whole, functions=functions, context=context, **options)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("names", [(), MIXED], ids=["none", "mixed"])
@pytest.mark.parametrize("attn_type", COMPLETE)
def test_widths(comm, functions, widths, names, attn_type):
    options = some_options(names, 2, 4, SEQ, KEYS)
    check_both(comm, functions, arrays_of(widths), attn_type=attn_type, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("names", [("causal",), MIXED], ids=["causal", "mixed"])
def test_the_widest(comm, functions, names, dtype):
    """576 and 512: the absorbed form of multi-head latent attention, one kv head for all."""
    whole = arrays_of((576, 512), batch=1, kv_heads=1, dtype=dtype)
    check_both(comm, functions, whole, form=dtype, **some_options(names, 1, 4, SEQ, KEYS, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
def test_forms(comm, functions, form):
    for kind in kinds_of(form):
        for layout in ("bshd", "bhsd"):
            whole = arrays_of((24, 16), dtype=dtype_of_options(form))
            check_both(comm, functions, whole, form=form, kind=kind, layout=layout, strides="swapped", causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (6, 2), (3, 1)])
def test_heads_that_the_ranks_cut(comm, functions, heads, kv_heads):
    whole = arrays_of((24, 16), heads=heads, kv_heads=kv_heads)
    for context in {False, functions is distributed}:
        check_both(comm, functions, whole, context=context, causal=True)


def test_packed_sequences(comm, functions):
    whole = [x[0] for x in arrays_of((24, 16), batch=1, seq=23, keys=23)]
    options = {"layout": "thd", "cu_seqlens_q": [0, 9, 9, 23], "seqused_k": [9, 0, 11]}
    check_both(comm, functions, whole, causal=True, **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kv", ["ring", "all_gather"])
def test_meshes(comm, order, kv):
    options = some_options(MIXED, 2, 4, SEQ, KEYS)
    rings = test_ring_module.rings(comm)
    test_ring_module.check(comm, arrays_of((24, 16)), rings, order, kv=kv, **options)
    test_ring_module.check(comm, arrays_of((8, 24)), rings, order, kv=kv, causal=True, context=True)


@pytest.mark.parametrize("widths", [(24, 16), (8, 24)], ids=str)
def test_gradients_by_what_is_added(comm, widths):
    for shape in ((2, 4, SEQ, KEYS), (1, 1, 1, KEYS), (1, 1, SEQ, 1)):
        test_findings.check(comm, arrays_of(widths), **test_findings.added(shape), **some_options(MIXED[:3], 2, 4, SEQ, KEYS))


def test_overlap_and_steps(comm):
    """Parts that overlap change no bit."""
    rows = split(SEQ, comm.size), split(KEYS, comm.size), split(KEYS, comm.size)
    mine = [part(x, n, comm.rank) for x, n in zip(arrays_of((24, 16)), rows, strict=True)]
    expected = ulysses_attention(*mine, comm=comm)
    for how in ({"overlap": 2}, {"exchange": "host"}, {"exchange": "shared"}):
        np.testing.assert_array_equal(ulysses_attention(*mine, comm=comm, **how), expected)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", ["float32", "bits"])
@pytest.mark.parametrize("widths", [(24, 16), (8, 24)], ids=str)
def test_plans_count_both(comm, widths, form, backward):
    """Bytes and messages of every stage, and the memory of every rank, slot by slot; with a ring, too."""
    width, width_v = widths
    machine = test_plan.on_this_device("cpu-2-cores")
    dtype = test_plan.dtype_of(form)
    for ring in test_ring_module.rings(comm):
        sizes, how = (2, 13, 12, 2, width), {"ring": ring}
        planned = plan(
            13, 12, 2, width, dtype, comm.size, batch=2, backward=backward, machine=machine, head_dim_v=width_v, **how
        )
        forward, gradient, slots = test_plan.run(comm, sizes, form, backward, head_dim_v=width_v, **how)
        for of_plan, recorded in ((planned.forward, forward), (planned.backward, gradient)):
            counted = test_plan.in_all(recorded.stages, comm)
            of_shift = counted.pop("shift", (0, 0))
            expected = {stage.name: (stage.bytes_sent, stage.messages) for stage in of_plan.stages}
            assert expected.pop("shift", (0, 0)) == comm.bcast(of_shift)
            assert expected == counted
        gpu = machine.device == "gpu"
        problem = Problem(13, 12, 2, width, dtype, comm.size, 2, False, backward, gpu, ring=ring, head_dim_v=width_v)
        memory = memory_of(problem, comm.rank)
        others = ("inputs", "results", "gradients before rounding")
        assert {slot: n for slot, n in memory.items() if slot not in others} == slots


@pytest.mark.single
def test_plans_of_the_widest():
    assert plan(64, 4, head_dim=576, head_dim_v=512, ranks=2).bytes_sent == 64 * 4 // 4 * 4 * (2 * 576 + 2 * 512)
    for name, bad in (("head_dim", 577), ("head_dim_v", 577), ("head_dim_v", 0)):
        with pytest.raises(ValueError, match=f"{name} must be from 1 to 576"):
            plan(64, 4, **{name: bad})


def test_decoding(comm):
    q, k, v = arrays_of((24, 16), seq=2)
    rows = split(KEYS, comm.size, "uneven")
    out = decode_attention(q, part(k, rows, comm.rank), part(v, rows, comm.rank), comm=comm, causal=True)
    np.testing.assert_allclose(out, dense_attention(q, k, v, causal=True)[0], rtol=0, atol=1e-5)


def test_other_backends(comm):
    """PyTorch has it; oneDNN says who does."""
    rows = split(SEQ, comm.size), split(KEYS, comm.size), split(KEYS, comm.size)
    whole = arrays_of((24, 16))
    if AttnType.TORCH in backends.usable():
        for heads in ((4, 2), (3, 1)):
            whole_of = arrays_of((24, 16), heads=heads[0], kv_heads=heads[1])
            check(comm, whole_of, attn_type=AttnType.TORCH, causal=True)
            check_gradient(comm, whole_of, attn_type=AttnType.TORCH, causal=True)
    if AttnType.INTEL_ONEDNN in backends.usable():
        mine = [part(x, n, comm.rank) for x, n in zip(whole, rows, strict=True)]
        with pytest.raises(NotImplementedError, match="another head_dim of v; INTEL_SYCL does"):
            ulysses_attention(*mine, comm=comm, attn_type=AttnType.INTEL_ONEDNN)


def test_frameworks(comm):
    torch = pytest.importorskip("torch")
    from ulysses_dp.torch import ulysses_attention as of_torch

    whole, rows = arrays_of((24, 16), dtype="float64", keys=SEQ), split(SEQ, comm.size)
    dout = np.random.default_rng(2).standard_normal((*whole[0].shape[:3], 16))
    tensors = [torch.from_numpy(part(x, rows, comm.rank)).clone().requires_grad_() for x in whole]
    for function in (of_torch, torch.compile(of_torch, fullgraph=True, backend="aot_eager")):
        out = function(*tensors, comm=comm, causal=True)
        grads = torch.autograd.grad(out, tensors, torch.from_numpy(part(dout, rows, comm.rank)))
        for x, expected in zip(grads, dense_gradient(dout, *whole, causal=True), strict=False):
            np.testing.assert_allclose(x, part(expected, rows, comm.rank), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [np.ones((1, 4, 2, 577), np.float32), np.ones((1, 4, 2, 0), np.float32)])
def test_refused(comm, bad):
    q = np.ones((1, 4, 2, 8), np.float32)
    assert_refused(comm, "head_dim of v", bad, q, lambda v: ulysses_attention(q, q, v, comm=comm))
    out, lse = ulysses_attention(q, q, q[..., :5], comm=comm, return_lse=True)
    assert_refused(comm, "dout", q, out, lambda dout: ulysses_attention_backward(dout, q, q, q[..., :5], out, lse, comm=comm))
