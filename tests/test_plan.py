"""Plans against calls: a plan counts what a call records, on every rank, and its memory is what a call keeps."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from checks import dtype_option, encode
from helpers import random_qkv, split
from mpi4py import MPI
from ulysses_dp.kernels.flash_forward_gpu import GPU_TILES

from ulysses_dp import (
    Machine,
    free_workspace,
    plan,
    row_positions,
    trace,
    ulysses_attention,
    ulysses_attention_backward,
)
from ulysses_dp._device import workspace
from ulysses_dp._device.queue import default_queue
from ulysses_dp._plan.memory import memory_of
from ulysses_dp._plan.problem import Problem
from ulysses_dp._ranks.orders import ORDERS
from ulysses_dp.machine import MACHINES, Level

# (batch, seq, heads, kv_heads, head_dim): even, uneven, shared kv heads, ranks without heads, without rows; copies by head
SIZES = [(1, 48, 12, 12, 16), (2, 13, 12, 2, 16), (1, 24, 6, 2, 8), (2, 7, 5, 5, 16), (1, 3, 2, 1, 8), (1, 1100, 4, 2, 64)]
FORMS = ["float32", "float64", "float16", "bits"]
WIRES = [("float32", "int8"), ("float16", "float8_e4m3"), ("bits", "int8")]

AROUND = ("agree", "prepare", "confirm")  # the agreement of the ranks, which a plan has among the constants of a call

# Figures that make times easy to reckon: 1 s a stage, 10 s a call, 1 s for a flop or a byte.
UNIT = Machine(
    name="unit",
    device="cpu",
    shared=False,
    measured=False,
    memory=1e9,
    flops={"float32": 1.0},
    backward_flops={"float32": 1.0},
    copy_bandwidth=1.0,
    stage_seconds=1.0,
    call_seconds=10.0,
    levels=(Level(2, 1.0, 4.0), Level(6, 100.0, 2.0), Level(None, 10000.0, 1.0)),
)


def on_this_device(name):
    """The machine with the kernels of the device that runs the tests."""
    return replace(MACHINES[name], device="gpu" if default_queue().sycl_device.is_gpu else "cpu", levels=UNIT.levels)


def dtype_of(form):
    return "bfloat16" if form == "bits" else form


def run(comm, sizes, form, backward, head_dim_v=None, **options):
    """Make the calls that a plan is about; returns their traces and the bytes that scratch memory then has, by slot."""
    batch, seq, heads, kv_heads, head_dim = sizes
    rows = row_positions(seq, comm, order=options.get("order", "contiguous"), ring=options.get("ring", 1))
    whole = [*random_qkv(0, batch, seq, heads, kv_heads, head_dim)]
    if head_dim_v is not None:
        whole[2] = random_qkv(1, batch, seq, heads, kv_heads, head_dim_v)[2]
    q, k, v = (encode(x[:, rows], form) for x in whole)
    how = {"comm": comm} | options | dtype_option(form)
    free_workspace()
    with trace() as forward:
        results = ulysses_attention(q, k, v, return_lse=backward, **how)
    with trace() as gradient:
        if backward:
            out, lse = results
            ulysses_attention_backward(out, q, k, v, out, lse, **how)
    # what goes through the host is not on the device
    slots = {slot: x.nbytes for (_, _, slot), x in workspace._store().memories.items() if not slot.startswith("host")}
    free_workspace()
    return forward, gradient, slots


@pytest.mark.parametrize(("form", "wire"), [*((form, None) for form in FORMS), *WIRES])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_stages_and_memory_are_those_of_a_call(comm, sizes, form, wire, backward):
    """The plan is that of the rank with the most, stage by stage; its memory that of the rank with the most in all."""
    batch, seq, heads, kv_heads, head_dim = sizes
    machine = on_this_device("cpu-2-cores")
    options = {"batch": batch, "backward": backward, "wire_dtype": wire}
    expected = plan(seq, heads, kv_heads, head_dim, dtype_of(form), comm.size, machine=machine, **options)
    forward, gradient, slots = run(comm, sizes, form, backward, wire_dtype=wire)
    for planned, recorded in ((expected.forward, forward), (expected.backward, gradient)):
        stages = [stage for stage in recorded.stages if stage.name not in AROUND]
        assert [stage.name for stage in planned.stages] == [stage.name for stage in stages]
        for of_plan, stage in zip(planned.stages, stages, strict=True):
            assert of_plan.bytes_sent == comm.allreduce(stage.bytes_sent, MPI.MAX)
            assert of_plan.messages == comm.allreduce(stage.messages, MPI.MAX)
    mine = split(seq, comm.size)[comm.rank]
    itemsize = np.dtype("uint16" if form == "bits" else form).itemsize
    row = batch * head_dim * itemsize
    inputs = mine * row * (heads * (1 + backward) + 2 * kv_heads)
    in_all = inputs + expected_results(mine, row, sizes, itemsize, backward) + sum(slots.values())
    problem = Problem(
        *(seq, heads, kv_heads, head_dim, dtype_of(form), comm.size, batch, False, backward, machine.device == "gpu"), wire=wire
    )
    memory = memory_of(problem, comm.rank)
    others = ("inputs", "results", "gradients before rounding")
    assert {slot: n for slot, n in memory.items() if slot not in others} == slots
    assert sum(memory.values()) - memory.get(others[2], 0) == in_all
    assert sum(expected.memory.values()) == comm.allreduce(sum(memory.values()), MPI.MAX)


def in_all(stages, comm):
    """Of the stages of each name, bytes and messages of the rank that has most of them."""
    names = dict.fromkeys(stage.name for stage in stages if stage.name not in AROUND)
    return {
        name: tuple(
            comm.allreduce(sum(getattr(x, figure) for x in stages if x.name == name), MPI.MAX)
            for figure in ("bytes_sent", "messages")
        )
        for name in comm.bcast(names)
    }


@pytest.mark.parametrize("kv", ["ring", "all_gather"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("sizes", "form"), [*zip(SIZES[1:], ("float32", "bits") * 3, strict=False)], ids=str)
def test_meshes_are_those_of_calls(comm, sizes, form, backward, kv):
    """Every mesh and order: bytes and messages of all stages of a name, and the memory of every rank, slot by slot."""
    batch, seq, heads, kv_heads, head_dim = sizes
    machine = on_this_device("cpu-2-cores")
    for number, (ring, order) in enumerate(product(range(1, comm.size + 1), ORDERS)):
        if comm.size % ring:
            continue
        how = {"ring": ring, "order": order, "kv": kv, "causal": number % 3 > 0}
        planned = plan(
            seq, heads, kv_heads, head_dim, dtype_of(form), comm.size, batch=batch, backward=backward, machine=machine, **how
        )
        forward, gradient, slots = run(comm, sizes, form, backward, **how)
        for of_plan, recorded in ((planned.forward, forward), (planned.backward, gradient)):
            counted = in_all(recorded.stages, comm)
            of_shift = counted.pop("shift", (0, 0))
            expected = {stage.name: (stage.bytes_sent, stage.messages) for stage in of_plan.stages}
            assert expected.pop("shift", (0, 0)) == comm.bcast(of_shift)
            assert expected == counted
        problem = Problem(
            *(seq, heads, kv_heads, head_dim, dtype_of(form), comm.size, batch, how["causal"], backward),
            machine.device == "gpu",
            ring,
            order,
            kv,
        )
        memory = memory_of(problem, comm.rank)
        others = ("inputs", "results", "gradients before rounding")
        assert {slot: n for slot, n in memory.items() if slot not in others} == slots, how
        assert sum(planned.memory.values()) == comm.allreduce(sum(memory.values()), MPI.MAX)
        if ring > 1:
            pairs = comm.allgather(sum(call.pairs for call in forward.calls))
            assert planned.balance == pytest.approx(max(pairs) * comm.size / sum(pairs))


def expected_results(rows, row, sizes, itemsize, backward):
    """Bytes of out, and of lse and the gradients."""
    batch, _, heads, kv_heads, _ = sizes
    lse = backward * batch * heads * rows * max(itemsize, 4)
    return rows * row * heads + lse + backward * rows * row * (heads + 2 * kv_heads)


@pytest.mark.single
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float64", 8), ("bfloat16", 2)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 24])
def test_bytes_of_the_formula(ranks, dtype, itemsize):
    batch, seq, heads, kv_heads, head_dim = 2, 240, 48, 24, 32
    p = plan(seq, heads, kv_heads, head_dim, dtype, ranks, batch=batch, machine="aurora")
    volume = batch * seq * head_dim * itemsize * 2 * (heads + kv_heads)
    assert p.bytes_sent * ranks**2 == (ranks - 1) * volume
    assert p.messages == 2 * (ranks - 1)
    assert (p.rows, p.heads, p.kv_heads) == (seq // ranks, heads // ranks, kv_heads // ranks)


@pytest.mark.single
@pytest.mark.parametrize("wire", ["int8", "float8_e4m3"])
@pytest.mark.parametrize(("dtype", "compute"), [("float32", 4), ("bfloat16", 4)])
def test_bytes_of_the_formula_in_eight_bits(wire, dtype, compute):
    """A byte for each number, and four for each row and head; lse and delta as they are."""
    batch, seq, heads, kv_heads, head_dim, ranks = 2, 240, 48, 24, 32, 6
    options = {"batch": batch, "machine": "aurora", "wire_dtype": wire}
    of_row = 2 * (heads + kv_heads) * (head_dim + 4)
    p = plan(seq, heads, kv_heads, head_dim, dtype, ranks, **options)
    assert p.bytes_sent * ranks**2 == (ranks - 1) * batch * seq * of_row
    p = plan(seq, heads, kv_heads, head_dim, dtype, ranks, backward=True, **options)
    of_gradient = (3 * heads + 4 * kv_heads) * (head_dim + 4) + 3 * heads * compute
    assert p.bytes_sent * ranks**2 == (ranks - 1) * batch * seq * (of_row + of_gradient)


@pytest.mark.single
def test_figures_are_those_of_the_rank_with_the_most():
    """6 heads of 2 kv heads on 4 ranks: rank 1 has heads 2 and 3, which read both kv heads; ranks 2 and 3 have one head."""
    p = plan(10, 6, 2, 1, ranks=4, machine=UNIT)
    assert (p.rows, p.heads, p.kv_heads, p.useful_ranks) == (3, 2, 2, 6)
    heads, kv_heads, rows = (2, 2, 1, 1), (1, 2, 1, 1), (3, 3, 2, 2)
    numbers = [q + 2 * kv for q, kv in zip(heads, kv_heads, strict=True)]
    there = max(rows[rank] * (sum(numbers) - numbers[rank]) for rank in range(4))
    back = max(heads[rank] * (10 - rows[rank]) for rank in range(4))
    assert [stage.bytes_sent for stage in p.forward.stages] == [0, 4 * there, 0, 4 * back, 0]
    assert p.bytes_sent == 4 * (there + back)


@pytest.mark.single
@pytest.mark.parametrize(("heads", "ranks"), [(8, 8), (8, 7), (16, 16), (4, 13)])
def test_seconds_by_hand(heads, ranks):
    """The slowest rank, every peer at the speed of the closest level that has both, sending and receiving at once."""
    seq, head_dim = 29, 3
    p = plan(seq, heads, heads, head_dim, "float32", ranks, machine=UNIT)
    rows, owned = split(seq, ranks), split(heads, ranks)

    def seconds(rank, sent, received):
        total, links = 1.0, ((2, 1.0, 4.0), (6, 100.0, 2.0), (ranks, 10000.0, 1.0))
        for number, (size, latency, bandwidth) in enumerate(links):
            inside = links[number - 1][0] if number else 1
            peers = [p for p in range(ranks) if p // size == rank // size and p // inside != rank // inside and p != rank]
            total += max(sum(latency * (n[p] > 0) + n[p] / bandwidth for p in peers) for n in (sent, received))
        return total

    width = 4 * head_dim
    to_heads = [[rows[a] * 3 * owned[b] * width for b in range(ranks)] for a in range(ranks)]
    to_rows = [[rows[b] * owned[a] * width for b in range(ranks)] for a in range(ranks)]
    expected = [
        1 + 2 * rows[0] * 3 * heads * width,
        max(seconds(rank, to_heads[rank], [to_heads[p][rank] for p in range(ranks)]) for rank in range(ranks)),
        1 + 4 * owned[0] * seq**2 * head_dim,
        max(seconds(rank, to_rows[rank], [to_rows[p][rank] for p in range(ranks)]) for rank in range(ranks)),
        1 + 2 * rows[0] * heads * width,
    ]
    assert [stage.seconds for stage in p.forward.stages] == pytest.approx(expected)
    assert p.seconds == pytest.approx(10 + sum(expected))
    alone = 10 + 1 + 4 * heads * seq**2 * head_dim
    assert p.efficiency == pytest.approx(alone / p.seconds / ranks)


@pytest.mark.single
def test_shape_of_published_times():
    """14 heads on 4 GPUs (vllm-project/vllm-omni#7589): two lengths give the two speeds of the model, which tell the others.

    head_dim, which is not published, cancels out.
    """
    published = {2**14: 2.283e-3, 2**15: 7.130e-3, 2**16: 26.906e-3, 2**17: 104.801e-3, 2**18: 412.942e-3}

    def attend(seq, flops, bandwidth):
        tiny = {"stage_seconds": 1e-9, "call_seconds": 1e-9, "copy_bandwidth": 1e18}
        machine = replace(UNIT, flops={"bfloat16": flops}, levels=(Level(4, 1e-9, bandwidth),), memory=1e12, **tiny)
        return plan(seq, 14, head_dim=128, dtype="bfloat16", ranks=4, machine=machine)

    (short, long), reach = list(published)[-2:], 1e18
    of_flops, of_bytes = np.linalg.solve(
        [[attend(seq, 1.0, reach).seconds, attend(seq, reach, 1.0).seconds] for seq in (short, long)],
        [published[short], published[long]],
    )
    for seq, seconds in published.items():
        p = attend(seq, 1 / of_flops, 1 / of_bytes)
        assert p.seconds == pytest.approx(seconds, rel=0.02 if seq > 2**14 else 0.15)
        assert "the busiest ranks have 4 heads, the average is 3.5" in p.notes[0]


@pytest.mark.single
def test_ranks_of_one_device_share_its_speed():
    """A quarter of the speed each; a message costs what it costs."""
    own, shared = (
        plan(64, 4, ranks=4, machine=replace(UNIT, shared=s, levels=(Level(None, 7.0, 1.0),))) for s in (False, True)
    )
    for a, b in zip(own.forward.stages, shared.forward.stages, strict=True):
        assert (b.messages, b.bytes_sent) == (a.messages, a.bytes_sent)
        constant = 1 + 7 * a.messages
        assert b.seconds - constant == pytest.approx(4 * (a.seconds - constant))
    alone = plan(64, 4, machine=replace(UNIT, shared=True))
    assert alone.seconds == plan(64, 4, machine=UNIT).seconds
    assert shared.efficiency == pytest.approx(alone.seconds / shared.seconds)


@pytest.mark.single
@pytest.mark.parametrize("backward", [False, True])
def test_a_causal_call_has_about_half_of_the_products(backward):
    full, half = (plan(1000, 4, causal=causal, backward=backward, machine=UNIT) for causal in (False, True))
    for name, operations in (("attention", 4), ("attention backward", 10))[: 1 + backward]:
        (a,), (b,) = ([s for s in (*p.forward.stages, *p.backward.stages) if s.name == name] for p in (full, half))
        assert a.seconds == 1 + operations * 4 * 64 * 1000**2
        assert b.seconds == 1 + operations * 4 * 64 * 1000 * 1001 // 2


@pytest.mark.single
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("machine", MACHINES)
def test_more_ranks_help_until_there_are_as_many_as_heads(machine, backward):
    options = {"heads": 32, "kv_heads": 8, "head_dim": 128, "backward": backward, "machine": machine}
    plans = [plan(2**17, ranks=2**n, **options) for n in range(15) if 2**n <= (MACHINES[machine].ranks or 2**14)]
    for fewer, more in pairwise(plans):
        assert more.rows <= fewer.rows
        assert more.efficiency <= fewer.efficiency * 1.000001
        assert more.messages > fewer.messages
        if fewer.ranks > 1:  # one rank sends nothing, and needs no buffers for it
            assert more.bytes_sent < fewer.bytes_sent
            assert sum(more.memory.values()) < sum(fewer.memory.values())
        if not MACHINES[machine].shared and more.ranks <= 32:
            assert more.seconds < fewer.seconds
            assert more.largest_seq > fewer.largest_seq or fewer.ranks == 1
        assert any("more ranks than heads" in note for note in more.notes) == (more.ranks > 32)
    longer = [plan(seq, ranks=8, **options) for seq in (2**12, 2**12 + 1, 2**15)]
    assert [p.seconds for p in longer] == sorted(p.seconds for p in longer)
    assert [p.bytes_sent for p in longer] == sorted(p.bytes_sent for p in longer)


@pytest.mark.single
@pytest.mark.parametrize("ranks", [1, 3, 8, 24])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_largest_sequence_fits_and_no_longer_one(ranks, backward, dtype, shared):
    machine = replace(MACHINES["cpu-2-cores"], shared=shared, memory=3e9)
    available = 3e9 / (ranks if shared else 1)

    def try_with(seq):
        return plan(seq, 12, 4, 80, dtype, ranks, batch=2, backward=backward, machine=machine)

    largest = try_with(100).largest_seq
    assert largest > 1000
    assert try_with(largest).fits
    assert sum(try_with(largest).memory.values()) <= available
    for more in (1, 17, largest):
        longer = try_with(largest + more)
        assert not longer.fits
        assert longer.largest_seq == largest
        assert sum(longer.memory.values()) > available
        assert any("does not fit" in note for note in longer.notes)


@pytest.mark.single
def test_nothing_fits():
    assert plan(8, 4, machine=replace(UNIT, memory=100)).largest_seq == 0


@pytest.mark.single
def test_memory_of_the_gpu_kernel():
    """It reads what was received as it is, without the copies of k and v; panels of q where q is not kept in registers."""
    for head_dim in (64, 128):
        on_cpu, on_gpu = (
            plan(4096, 8, ranks=2, head_dim=head_dim, machine=replace(UNIT, device=d)).memory for d in ("cpu", "gpu")
        )
        assert on_cpu["k, v"] == 2 * 4096 * 4 * head_dim * 4
        assert "k, v" not in on_gpu
        assert on_gpu.get("panels of q", 0) == (0 if GPU_TILES["float32"][head_dim].q_in_registers else 4096 * 4 * head_dim * 4)


@pytest.mark.single
def test_notes_say_what_to_watch():
    def notes(*arguments, **options):
        return " | ".join(plan(*arguments, **options).notes)

    assert notes(4096, 8, ranks=2) == ""
    assert "those beyond 8 have none" in notes(4096, 8, ranks=64)
    assert "3 heads, the average is 2.67" in notes(4096, 8, ranks=3)
    assert "4 copies of the 2" in notes(4096, 8, 2, ranks=4)
    assert "2 of 5 ranks have no row" in notes(3, 5, ranks=5)
    assert "at most" in notes(2**30, 8, ranks=2)
    assert "model" in notes(4096, 8, machine="aurora-node")


@pytest.mark.single
def test_auto_is_that_of_the_call():
    """The smallest ring with which all ranks have as many heads."""
    for heads, ranks, ring in ((32, 12, 3), (8, 64, 8), (8, 8, 1), (6, 4, 2), (1, 5, 5)):
        p = plan(3840, heads, ranks=ranks, machine=UNIT, ring="auto", order="zigzag", causal=True)
        assert (p.ring, p.useful_ranks % ranks) == (ring, 0)
        assert p.balance == pytest.approx(1)
    assert plan(64, 8, 2, ranks=4, machine=UNIT, ring=2, kv="auto").kv == "all_gather"
    assert plan(64, 8, 8, ranks=4, machine=UNIT, ring=4, kv="auto").kv == "ring"


@pytest.mark.single
@pytest.mark.parametrize("ring", [2, 4])
def test_balance_of_the_orders(ring):
    """Of equal chunks, causal: contiguous (2R - 1)/R, zigzag 1, striped a little more."""
    orders = ("contiguous", "zigzag", "zigzag_ranks", "striped")
    balances = [plan(6400, 4, ranks=4, machine=UNIT, ring=ring, order=x, causal=True).balance for x in orders]
    assert balances == pytest.approx([(2 * ring - 1) / ring, 1, 1, 1 + (ring - 1) / 6401], abs=2e-4)
    assert [plan(6400, 4, ranks=4, machine=UNIT, ring=ring, order=x).balance for x in orders] == [1, 1, 1, 1]


@pytest.mark.single
def test_seconds_of_a_ring_by_hand():
    """Every hop takes as long as in the slowest group, and its messages; 2 groups of 2 ranks, of which each has 8 rows."""
    p = plan(16, 2, head_dim=1, ranks=4, machine=UNIT, ring=2, causal=True)
    attention, shift = (stage for stage in p.forward.stages if stage.name in ("attention", "shift"))
    assert attention.seconds == 2 + 4 * (
        8 * 8 + 8 * 9 // 2
    )  # the second group: two launches, all pairs with the first, its own
    # the first group sends its keys over the second level, and waits for what the second computes of them; that is all there is
    assert (shift.messages, shift.bytes_sent) == (1, 2 * 8 * 4)
    assert shift.seconds == pytest.approx(100 + 64 / 2)
    gathered = plan(16, 2, head_dim=1, ranks=4, machine=UNIT, ring=2, causal=True, kv="all_gather")
    assert gathered.seconds == pytest.approx(p.seconds)
    three = plan(24, 1, head_dim=1, ranks=3, machine=UNIT, ring=3, order="zigzag", causal=True)
    (stage,) = (stage for stage in three.forward.stages if stage.name == "shift")
    assert (stage.messages, stage.bytes_sent) == (2, 2 * 2 * 8 * 4)


@pytest.mark.single
def test_ranges_of_keys_count():
    ranges = np.stack([np.zeros(64, int), np.minimum(np.arange(64) + 1, 9)], axis=1)
    pairs = int(np.diff(ranges).sum())
    for options, launches in (({}, 1), ({"ranks": 4, "ring": 2}, 3)):
        p = plan(64, 4, head_dim=8, machine=UNIT, key_ranges=ranges, **options)
        stage = next(stage for stage in p.forward.stages if stage.name == "attention")
        if not options:
            assert stage.seconds == launches + 4 * 4 * 8 * pairs
        else:  # the second group sees keys of the first alone
            assert stage.seconds == 1 + 4 * 2 * 8 * 32 * 9
            assert p.messages == 2 * 1 + 1
    assert plan(64, 4, machine=UNIT, key_ranges=ranges).largest_seq == plan(64, 4, machine=UNIT).largest_seq
    for bad, error in ((ranges[:5], ValueError), (ranges + 60, ValueError), (ranges * 0.5, TypeError)):
        with pytest.raises(error, match="key_ranges must be"):
            plan(64, 4, machine=UNIT, key_ranges=bad)


GOOD = {"seq": 64, "heads": 8, "kv_heads": 2, "ranks": 4}


@pytest.mark.single
@pytest.mark.parametrize(
    ("name", "bad", "error"),
    [
        *((name, 0, ValueError) for name in ("seq", "heads", "kv_heads", "head_dim", "ranks", "batch")),
        *((name, 2.0, TypeError) for name in ("seq", "heads", "kv_heads", "head_dim", "ranks", "batch")),
        ("seq", True, TypeError),
        ("seq", -5, ValueError),
        ("kv_heads", 3, ValueError),
        ("head_dim", 577, ValueError),
        ("dtype", "int8", ValueError),
        ("dtype", np.float32, ValueError),
        ("causal", 1, TypeError),
        ("backward", None, TypeError),
        ("ring", 3, ValueError),
        ("ring", "all", ValueError),
        ("order", "spiral", ValueError),
        ("kv", "gather", ValueError),
        ("machine", "abacus", ValueError),
        ("machine", 5, TypeError),
    ],
    ids=str,
)
def test_bad_arguments(name, bad, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        plan(**GOOD | {name: bad})


@pytest.mark.single
def test_what_the_machine_does_not_have():
    with pytest.raises(ValueError, match="ranks must be at most 12 on the machine aurora-node, not 13"):
        plan(64, 8, ranks=13, machine="aurora-node")
    with pytest.raises(ValueError, match="ranks must be at most 1 "):
        plan(64, 8, ranks=2, machine=replace(UNIT, levels=()))
    with pytest.raises(ValueError, match="unit has no flops for the dtype float64"):
        plan(64, 8, dtype="float64", machine=UNIT)
    with pytest.raises(ValueError, match="no backward_flops"):
        plan(64, 8, backward=True, machine=replace(UNIT, backward_flops={}))


@pytest.mark.single
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_descriptions_survive_a_file(machine, tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(machine.to_json(), encoding="utf-8")
    assert Machine.from_json(path.read_text(encoding="utf-8")) == machine
    assert (
        plan(64, 8, ranks=4, machine=path) == plan(64, 8, ranks=4, machine=str(path)) == plan(64, 8, ranks=4, machine=machine)
    )
    assert plan(64, 8, ranks=4, machine=machine.name) == plan(64, 8, ranks=4, machine=machine)


@pytest.mark.single
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '"name"', UNIT.to_json().replace("memory", "memories"), UNIT.to_json().replace("1.0", "-1.0")]
)
def test_bad_descriptions(text, tmp_path):
    with pytest.raises(ValueError, match="not the description of a machine"):
        Machine.from_json(text)
    (tmp_path / "machine.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="machine must be one of cpu-2-cores"):
        plan(64, 8, machine=tmp_path / "machine.json")


@pytest.mark.single
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"device": "tpu"}, ValueError, "device"),
        ({"shared": 1}, TypeError, "shared"),
        ({"memory": "64 GB"}, TypeError, "memory"),
        ({"copy_bandwidth": 0}, ValueError, "copy_bandwidth"),
        ({"flops": {"float32": float("nan")}}, ValueError, "flops of float32"),
        ({"levels": (Level(2, 1.0, 0.0),)}, ValueError, "bandwidth of level 0"),
        ({"levels": (Level(2, 1.0, 1.0), Level(3, 1.0, 1.0))}, ValueError, "ranks of level 1 must be a multiple of the 2"),
        ({"levels": (Level(None, 1.0, 1.0), Level(4, 1.0, 1.0))}, TypeError, "ranks of level 0"),
        ({"levels": (Level(1, 1.0, 1.0),)}, ValueError, "ranks of level 0"),
    ],
    ids=str,
)
def test_machines_are_checked(changes, error, message):
    with pytest.raises(error, match=message):
        replace(UNIT, **changes)


@pytest.mark.single
def test_node_size_is_advised_where_messages_are_many_and_short():
    def advice(seq, ranks, machine="aurora"):
        notes = plan(seq, 32, 8, 128, ranks=ranks, machine=machine).notes
        return [note.split()[0] for note in notes if "node_size" in note]

    assert advice(4096, 384) == ["node_size=12"]
    assert advice(4096, 24) == advice(131072, 12) == advice(4096, 385) == advice(4096, 384, "cpu-2-cores") == []
