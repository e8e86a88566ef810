"""Predict a call before it runs: messages, bytes, memory and time for any number of ranks.

The counts come from the layout arithmetic that calls use, and the tests compare them, and the memory, with those of calls. The
times are a model: a stage costs a constant, and its operations, bytes or messages divided by what the machine does in a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ulysses_dp.kernels.flash_backward_gpu import COLUMNS
from ulysses_dp.kernels.flash_forward_gpu import GPU_TILES, SUB_GROUP, tile_for
from ulysses_dp.kernels.tile import MAX_HEAD_DIM

from ._call.checks import Geometry, check_flag, check_integer
from ._device.dtypes import DTYPES, names
from ._device.trace import Call, Stage
from ._device.workspace import ALIGNMENT
from ._path import forward_lists, gradient_lists, slot_of
from ._ranks.partition import Heads, Item, Transfer, dtype_of_message, share_heads, split, transfer_of
from ._ranks.redistribution import scratch_bytes
from .backends.intel_sycl import HEAD_MAJOR_FROM
from .machine import Machine, find

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Plan:
    """What `plan` predicts. Every figure is that of the rank which has most of it."""

    machine: str
    ranks: int
    seq: int
    rows: int  #: of the sequence
    heads: int  #: query heads
    kv_heads: int
    forward: Call  #: of `ulysses_attention`, with its stages, as `trace` records it
    backward: Call  #: of `ulysses_attention_backward`; without stages unless asked for
    memory: dict[str, int]  #: bytes on the device by use; scratch memory by the name of its slot
    seconds: float  #: of both calls
    efficiency: float  #: speed-up over one rank, divided by the number of devices
    fits: bool  #: into the memory of a rank
    largest_seq: int  #: that fits
    useful_ranks: int  #: with more ranks, some have no head
    notes: tuple[str, ...]  #: what to know before going on

    @property
    def messages(self) -> int:
        """Messages sent to other ranks, forward and backward."""
        return sum(stage.messages for stage in (*self.forward.stages, *self.backward.stages))

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks, forward and backward."""
        return sum(stage.bytes_sent for stage in (*self.forward.stages, *self.backward.stages))


def plan(
    seq: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: str = "float32",
    ranks: int = 1,
    *,
    batch: int = 1,
    causal: bool = False,
    backward: bool = False,
    machine: Any = "cpu-2-cores",
) -> Plan:
    """Predict `ulysses_attention` on any number of ranks: memory, messages, bytes and time of the busiest rank.

    Not collective; needs neither MPI nor a device. docs/planning.md says how, from which figures, and how well.

    Parameters
    ----------
    seq : int
        Rows of the whole sequence, of q and of k and v, split as evenly as possible.
    heads : int
        Query heads.
    kv_heads : int, optional
        Heads of k and v; `heads` by default.
    head_dim : int
        From 1 to 256.
    dtype : {"float32", "float64", "float16", "bfloat16"}
        Of q, k and v, which are on the device.
    ranks : int
        The size of the communicator.
    batch : int
        Sequences.
    causal : bool
        Half of the products.
    backward : bool
        Add the gradient: `ulysses_attention` with ``return_lse=True``, then `ulysses_attention_backward` without `ctx`.
    machine : str, path or Machine
        "cpu-2-cores" (measured), "aurora-node" or "aurora" (models from published figures), a file that
        ``scripts/plan.py --measure`` wrote, or a description.

    Returns
    -------
    Plan
        ``forward`` and ``backward`` hold the stages as `trace` records them, with messages, bytes and seconds; ``memory`` the
        bytes by use. ``rows``, ``heads``, ``kv_heads``, ``messages`` and ``bytes_sent`` are those of a rank, ``seconds`` and
        ``efficiency`` those of the whole; ``fits``, ``largest_seq``, ``useful_ranks`` and ``notes`` say what to do with it.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range, or the machine has fewer ranks or does not know the dtype.

    See Also
    --------
    trace : records what a call really does.

    Examples
    --------
    >>> from ulysses_dp import plan
    >>> p = plan(131072, heads=32, head_dim=128, dtype="bfloat16", ranks=8, machine="aurora-node")
    >>> p.rows, p.heads, p.messages, p.bytes_sent
    (16384, 4, 14, 469762048)
    >>> p.fits, p.useful_ranks
    (True, 32)
    """
    # Validate inputs.
    sizes = {"seq": seq, "heads": heads, "kv_heads": heads if kv_heads is None else kv_heads, "head_dim": head_dim}
    for name, n in (sizes | {"ranks": ranks, "batch": batch}).items():
        check_integer(name, n)
        if n < 1:
            raise ValueError(f"{name} must be at least 1, not {n}")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be from 1 to {MAX_HEAD_DIM}, not {head_dim}")
    if heads % sizes["kv_heads"]:
        raise ValueError(f"heads must be a multiple of kv_heads, not {heads} and {kv_heads}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {names()}, not {dtype!r}")
    check_flag("causal", causal)
    check_flag("backward", backward)
    machine = find(machine)
    if machine.ranks is not None and ranks > machine.ranks:
        raise ValueError(f"ranks must be at most {machine.ranks} on the machine {machine.name}, not {ranks}")
    for speeds, needed in (("flops", True), ("backward_flops", backward)):
        if needed and dtype not in getattr(machine, speeds):
            raise ValueError(f"machine {machine.name} has no {speeds} for the dtype {dtype}")
    # Delegate.
    problem = _Problem(
        **sizes, dtype=dtype, ranks=ranks, batch=batch, causal=causal, backward=backward, gpu=machine.device == "gpu"
    )
    return _predict(problem, machine)


@dataclass(frozen=True)
class _Problem:
    """The sizes of a call, and what follows from them alone."""

    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    ranks: int
    batch: int
    causal: bool
    backward: bool
    gpu: bool

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def compute_itemsize(self) -> int:
        return DTYPES[DTYPES[self.dtype].compute].itemsize

    @property
    def converts(self) -> bool:
        """Whether attention computes in another dtype."""
        return self.compute_itemsize != self.itemsize

    @property
    def copies_of_kv(self) -> int:
        """How many kv heads all ranks have together: one that several of them read counts for each."""
        return _copies_of_kv(self.heads, self.kv_heads, self.ranks)

    @property
    def shares(self) -> tuple[Heads, ...]:
        return share_heads(self.heads, self.kv_heads, self.ranks)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        return split(self.seq, self.ranks)

    def messages(self, *, gradient: bool = False) -> tuple[_Message, _Message]:
        """What a rank sends to every other in a call, there and back."""
        to_heads, to_rows = _messages(replace(self, seq=0), gradient=gradient)
        return to_heads, to_rows


class _Message(NamedTuple):
    """What travels at once, in one direction."""

    items: tuple[Item, ...]
    sizes: tuple[int, ...]  # numbers of every rank in a row
    slot: str

    @property
    def itemsize(self) -> int:
        return dtype_of_message(self.items).itemsize

    def transfer(self, problem: _Problem, rank: int) -> Transfer:
        """The exchange, seen by a rank."""
        return Transfer(rank, problem.rows, self.sizes, problem.batch)


# These two do not depend on seq, and are asked for again and again in the search for the largest one.
@lru_cache(maxsize=64)
def _messages(problem: _Problem, *, gradient: bool) -> list[_Message]:
    """The messages of a call, from its lists of items."""
    geometry = Geometry(problem.batch, problem.heads, problem.kv_heads, problem.head_dim, problem.dtype)
    dtype = np.dtype(DTYPES[problem.dtype].stored)
    where = geometry, dtype, problem.shares, problem.rows, problem.rows
    if gradient:
        name, lists = "gradient", gradient_lists(*where, context=False)
    else:
        name, lists = "forward", forward_lists(*where, lse=problem.backward)
    return [_Message(items, transfer_of(0, items, 1).sizes, slot_of(name, 0, number)) for number, items in enumerate(lists)]


@lru_cache(maxsize=256)
def _copies_of_kv(heads: int, kv_heads: int, ranks: int) -> int:
    return sum(share.kv_count for share in share_heads(heads, kv_heads, ranks))


def _examples(problem: _Problem) -> list[int]:
    """Ranks that stand for all: of those with the same numbers of rows and heads, the first and the last."""
    first: dict[tuple[int, int, int], int] = {}
    last: dict[tuple[int, int, int], int] = {}
    for rank, (rows, share) in enumerate(zip(problem.rows, problem.shares, strict=True)):
        kind = rows, share.q_count, share.kv_count
        first.setdefault(kind, rank)
        last[kind] = rank
    return sorted({*first.values(), *last.values()})


def _predict(problem: _Problem, machine: Machine) -> Plan:
    examples = _examples(problem)
    forward, backward = _calls(problem, machine, examples)
    seconds = forward.seconds + backward.seconds
    efficiency = 1.0
    if problem.ranks > 1:
        alone = sum(call.seconds for call in _calls(replace(problem, ranks=1), machine, [0]))
        efficiency = alone / seconds / (1 if machine.shared else problem.ranks)
    memory = max((_memory(problem, rank) for rank in examples), key=lambda uses: sum(uses.values()))
    largest_seq = _largest_seq(problem, machine, examples)
    return Plan(
        machine=machine.name,
        ranks=problem.ranks,
        seq=problem.seq,
        rows=problem.rows[0],
        heads=max(share.q_count for share in problem.shares),
        kv_heads=max(share.kv_count for share in problem.shares),
        forward=forward,
        backward=backward,
        memory=memory,
        seconds=seconds,
        efficiency=efficiency,
        fits=problem.seq <= largest_seq,
        largest_seq=largest_seq,
        useful_ranks=problem.heads,
        notes=tuple(_notes(problem, machine, sum(memory.values()), largest_seq)),
    )


def _calls(problem: _Problem, machine: Machine, ranks: Sequence[int]) -> tuple[Call, Call]:
    """The calls forward and backward, in which every stage has the largest figures of these ranks."""
    forward = Call("ulysses_attention", stages=_most([_forward(problem, machine, rank) for rank in ranks]))
    backward = Call("ulysses_attention_backward", stages=_most([_backward(problem, machine, rank) for rank in ranks]))
    for call in (forward, backward):
        if call.stages:
            call.seconds = machine.call_seconds + sum(stage.seconds for stage in call.stages)
    return forward, backward


def _most(lists: Sequence[list[Stage]]) -> list[Stage]:
    """The same stages of several ranks, as one list with the largest figures."""
    figures = "bytes_sent", "messages", "seconds"
    return [
        replace(stages[0], **{figure: max(getattr(stage, figure) for stage in stages) for figure in figures})
        for stages in zip(*lists, strict=True)
    ]


def _notes(problem: _Problem, machine: Machine, memory: int, largest_seq: int) -> list[str]:
    notes = []
    if problem.ranks > problem.heads:
        notes.append(f"more ranks than heads: those beyond {problem.heads} have none, and attention gets no faster")
    elif problem.heads % problem.ranks:
        most = problem.shares[0].q_count
        notes.append(f"uneven: the busiest ranks have {most} heads, the average is {problem.heads / problem.ranks:.3g}")
    if problem.copies_of_kv > problem.kv_heads:
        notes.append(f"ranks share kv heads: {problem.copies_of_kv} copies of the {problem.kv_heads} are sent")
    if problem.seq < problem.ranks:
        notes.append(f"{problem.ranks - problem.seq} of {problem.ranks} ranks have no row")
    if problem.seq > largest_seq:
        available = machine.memory / _parts(machine, problem.ranks)
        notes.append(f"does not fit: {memory / 1e9:.3g} GB, a rank has {available / 1e9:.3g}; at most {largest_seq} rows do")
    best, direct, two_steps = _best_node_size(problem, machine)
    if best > 1:
        notes.append(f"node_size={best} would take {two_steps:.2g} s for the forward exchanges instead of {direct:.2g} s")
    if problem.gpu and problem.backward and problem.head_dim not in COLUMNS:
        notes.append(f"head_dim {problem.head_dim} has no gradient made for GPUs: it takes longer than predicted")
    if not machine.measured:
        notes.append(f"{machine.name} is a model from published figures, not measured")
    return notes


def _parts(machine: Machine, ranks: int) -> int:
    """Into how many parts the machine's memory and speeds are divided."""
    return ranks if machine.shared else 1


# --- stages and their times -------------------------------------------------------------------------------------------------


def _forward(problem: _Problem, machine: Machine, rank: int) -> list[Stage]:
    """The stages of `ulysses_attention` on a rank."""
    attention = _attention(problem, machine, rank, "attention", 4, machine.flops)
    if problem.ranks == 1:
        return [attention]
    return _around(problem, machine, rank, attention, *problem.messages())


def _around(problem: _Problem, machine: Machine, rank: int, attention: Stage, there: _Message, back: _Message) -> list[Stage]:
    """The stages of a call on several ranks: what is computed, with the way there and back."""
    return [
        _relayout(problem, machine, "pack", there, rank),
        _exchange(problem, machine, "scatter", there, rank),
        attention,
        _exchange(problem, machine, "gather", back, rank),
        _relayout(problem, machine, "unpack", back, rank),
    ]


def _backward(problem: _Problem, machine: Machine, rank: int) -> list[Stage]:
    """The stages of `ulysses_attention_backward` on a rank; none if it is not asked for."""
    if not problem.backward:
        return []
    rows = problem.batch * problem.rows[rank] * problem.heads
    delta = _copy(problem, machine, "delta", 2 * rows * problem.head_dim * problem.itemsize)
    attention = _attention(problem, machine, rank, "attention backward", 10, machine.backward_flops)
    if problem.ranks == 1:
        return [delta, attention]
    return [delta, *_around(problem, machine, rank, attention, *problem.messages(gradient=True))]


def _relayout(problem: _Problem, machine: Machine, name: str, message: _Message, rank: int) -> Stage:
    """A stage that copies what a rank has of an exchange by rows, including what does not travel."""
    transfer = message.transfer(problem, rank)
    return _copy(problem, machine, name, 2 * (transfer.size_by_rows + transfer.counts_by_heads[rank]) * message.itemsize)


def _copy(problem: _Problem, machine: Machine, name: str, moved: int) -> Stage:
    """A stage that reads and writes so many bytes."""
    return Stage(name, seconds=machine.stage_seconds + moved * _parts(machine, problem.ranks) / machine.copy_bandwidth)


def _attention(problem: _Problem, machine: Machine, rank: int, name: str, operations: int, speeds: dict[str, float]) -> Stage:
    """A stage that computes, with so many operations for an element of head_dim and a pair of a query and a key it sees."""
    pairs = problem.seq * (problem.seq + 1) // 2 if problem.causal else problem.seq**2
    flops = operations * problem.batch * problem.shares[rank].q_count * problem.head_dim * pairs
    return Stage(name, seconds=machine.stage_seconds + flops * _parts(machine, problem.ranks) / speeds[problem.dtype])


def _exchange(problem: _Problem, machine: Machine, name: str, message: _Message, rank: int) -> Stage:
    """An all-to-all: a rank deals with its peers one after the other, those of the same level at the level's speed."""
    counts = _bytes(problem, message, rank, to_heads=name == "scatter")
    seconds = machine.stage_seconds + _wire_seconds(problem, machine, rank, counts)
    sent, messages = int(counts[0].sum()), int(np.count_nonzero(counts[0]))
    return Stage(name, bytes_sent=sent, messages=messages, route="device", seconds=seconds, exchange=True)


def _bytes(problem: _Problem, message: _Message, rank: int, *, to_heads: bool) -> np.ndarray:
    """Bytes that a rank sends to (first row) and gets from (second row) all ranks."""
    transfer = message.transfer(problem, rank)
    sides = transfer.counts_by_rows, transfer.counts_by_heads
    counts = np.array(sides if to_heads else sides[::-1], dtype=np.int64) * message.itemsize
    counts[:, rank] = 0  # what stays
    return counts


def _wire_seconds(problem: _Problem, machine: Machine, rank: int, counts: np.ndarray) -> float:
    """Time for bytes to (first row) and from (second row) all ranks."""
    seconds, inner = 0.0, slice(rank, rank + 1)
    for level in machine.levels:
        size = level.ranks or problem.ranks
        outer = slice(rank // size * size, min((rank // size + 1) * size, problem.ranks))
        peers = np.concatenate([counts[:, outer.start : inner.start], counts[:, inner.stop : outer.stop]], axis=1)
        time = np.count_nonzero(peers, axis=1) * level.latency
        time += peers.sum(axis=1) * _parts(machine, problem.ranks) / level.bandwidth
        seconds += time.max()  # links carry both directions at once
        inner = outer
    return float(seconds)


def _best_node_size(problem: _Problem, machine: Machine) -> tuple[int, float, float]:
    """The number of ranks for `node_size` with the fastest exchanges of the first rank, and its times directly and with that.

    In two steps, rank k of node n gets what its node has for those with its number, and sends it to them.
    """
    ranks, copied = problem.ranks, 0
    exchanges = []
    for message, to_heads in zip(problem.messages(), (True, False), strict=True):
        counts = _bytes(problem, message, 0, to_heads=to_heads)
        exchanges.append(counts)
        copied += int(counts[0].sum()) * 2
    times = {1: sum(_wire_seconds(problem, machine, 0, counts) for counts in exchanges)}
    for level in machine.levels:
        size = level.ranks or 1
        if 1 < size < ranks and ranks % size == 0:
            seconds = 2 * _copy(problem, machine, "turn", copied // 2).seconds
            for counts in exchanges:
                within, between = np.zeros_like(counts), np.zeros_like(counts)
                within[:, 1:size] = counts.reshape(2, -1, size).sum(axis=1)[:, 1:]
                between[:, size::size] = counts[:, size::size] * size
                seconds += sum(_wire_seconds(problem, machine, 0, step) for step in (within, between))
            times[size] = seconds
    best = min(times, key=lambda size: times[size])
    return best, times[1], times[best]


# --- memory -----------------------------------------------------------------------------------------------------------------


def _largest_seq(problem: _Problem, machine: Machine, examples: Sequence[int]) -> int:
    """The longest sequence of which everything fits into the memory of every rank; 0 if none does."""
    available = machine.memory / _parts(machine, problem.ranks)

    # with any number of rows, the first rank of each kind has the most of them
    def fits(seq: int) -> bool:
        shorter = replace(problem, seq=seq)
        return all(sum(_memory(shorter, rank).values()) <= available for rank in examples)

    low, high = 0, problem.seq  # what fits, and what does not
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _memory(problem: _Problem, rank: int) -> dict[str, int]:
    """Bytes on the device of a rank after the calls: the user's arrays, the results, and every slot of scratch memory."""
    rows = problem.rows[rank]
    row_of_q, row_of_kv = (problem.batch * n * problem.head_dim * problem.itemsize for n in (problem.heads, problem.kv_heads))
    lse = problem.batch * problem.heads * rows * problem.compute_itemsize
    uses = {"inputs": rows * (row_of_q + 2 * row_of_kv), "results": rows * row_of_q}
    if problem.backward:
        gradients = rows * (row_of_q + 2 * row_of_kv)
        uses["inputs"] += rows * row_of_q
        uses["results"] += lse + gradients
        if problem.ranks > 1:
            _, back = problem.messages(gradient=True)
            if back.itemsize != problem.itemsize:
                uses["gradients before rounding"] = gradients // problem.itemsize * back.itemsize
    return uses | _scratch(problem, rank)


def _scratch(problem: _Problem, rank: int) -> dict[str, int]:
    """Bytes that each slot of `workspace.scratch` has after the calls, on a rank."""
    share, batch, seq, several = problem.shares[rank], problem.batch, problem.seq, problem.ranks > 1
    compute = problem.compute_itemsize
    q_size, kv_size = (batch * seq * n * problem.head_dim for n in (share.q_count, share.kv_count))
    on_gpu = problem.gpu and DTYPES[problem.dtype].compute == "float32"
    walks_far = seq * problem.head_dim >= HEAD_MAJOR_FROM
    slots: dict[str, int] = {}

    def need(slot: str, elements: int, itemsize: int) -> None:
        slots[slot] = max(slots.get(slot, 0), -(-max(elements, 1) * itemsize // ALIGNMENT) * ALIGNMENT)

    def copies(slot: str, count: int, size: int, heads: int, by_head: bool) -> None:
        # what an exchange brings lies between other arrays, what the user gives only between other heads
        if problem.converts or (by_head and size and (several or heads > 1)):
            need(slot, count * size, compute)

    def travel(*messages: _Message) -> None:
        for message in messages if several else ():
            for slot, nbytes in scratch_bytes(message.items, message.transfer(problem, rank), message.slot).items():
                need(slot, nbytes, 1)

    travel(*problem.messages())
    if q_size and not problem.backward:  # the kernels write lse whether it is wanted or not
        need("lse", batch * seq * share.q_count, compute)
    if q_size:
        copies("q", 1, q_size, share.q_count, by_head=False)
        copies("k, v", 2, kv_size, share.kv_count, by_head=walks_far and not on_gpu)
        if problem.converts:
            need("result before rounding", q_size, compute)
        tile_size = tile_for(problem.head_dim)
        if on_gpu and not GPU_TILES[tile_size].q_in_registers:
            need("panels of q", batch * share.q_count * math.ceil(seq / SUB_GROUP) * SUB_GROUP * tile_size, compute)
    if not problem.backward:
        return slots

    rows_size = batch * problem.rows[rank] * problem.heads
    if problem.converts:
        need("dout, out", 2 * rows_size * problem.head_dim, compute)
    need("delta", rows_size, compute)
    travel(*problem.messages(gradient=True))
    if not q_size:
        return slots
    gradient_on_gpu = on_gpu and problem.head_dim in COLUMNS
    copies("dout, q", 2, q_size, share.q_count, by_head=walks_far and not gradient_on_gpu)
    copies("k, v", 2, kv_size, share.kv_count, by_head=walks_far and not gradient_on_gpu)
    if gradient_on_gpu:
        need("panels of rows", 2 * max(q_size, kv_size) // seq * math.ceil(seq / SUB_GROUP) * SUB_GROUP, compute)
    itemsize = problem.messages(gradient=True)[1].itemsize if several else problem.itemsize
    if itemsize != compute:
        for number, size in enumerate((q_size, kv_size, kv_size)):
            need(f"gradient {number}", size, compute)
    return slots
