"""Predict a call before it runs: messages, bytes, memory and time for any number of ranks.

The counts come from the layout arithmetic that calls use, and the tests compare them, and the memory, with those of calls. The
times are a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from ulysses_dp.kernels.tile import MAX_HEAD_DIM

from ._call.checks import check_flag, check_integer
from ._device.dtypes import DTYPES, names
from ._mesh import check_kv, check_order, check_wire
from ._plan.memory import memory_of
from ._plan.problem import Problem
from ._plan.times import best_node_size, calls_of, parts
from .machine import Machine, find
from .mesh import check_ring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._device.trace import Call
    from ._ranks.orders import Order

UNEVEN = 1.05  # times the mean, from which on a plan says so


@dataclass(frozen=True)
class Plan:
    """What `plan` predicts. Every figure is that of the rank which has most of it."""

    machine: str
    ranks: int
    seq: int
    rows: int  #: of the sequence
    heads: int  #: query heads
    kv_heads: int
    ring: int  #: groups of ranks
    kv: str  #: how keys get to other groups
    balance: float  #: pairs of query and key of the busiest rank, in means of all ranks
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
    key_ranges: Any = None,
    backward: bool = False,
    ring: SupportsIndex | str = 1,
    order: Order = "contiguous",
    kv: str = "ring",
    head_dim_v: int | None = None,
    wire_dtype: str | None = None,
    machine: Any = "cpu-2-cores",
) -> Plan:
    """Predict `ulysses_attention` on any number of ranks: memory, messages, bytes and time of the busiest rank.

    Not collective; needs neither MPI nor a device. docs/planning.md says how, from which figures, and how well.

    Parameters
    ----------
    seq : int
        Rows of the whole sequence, of q and of k and v, split as evenly as possible in their order.
    heads : int
        Query heads.
    kv_heads : int, optional
        Heads of k and v; `heads` by default.
    head_dim : int
        From 1 to 576.
    dtype : {"float32", "float64", "float16", "bfloat16"}
        Of q, k and v, which are on the device.
    ranks : int
        The size of the communicator.
    batch : int
        Sequences.
    causal : bool
        Half of the products.
    key_ranges : array of int, optional
        As in `ulysses_attention`, (seq, 2): the products of the keys that queries see.
    backward : bool
        Add the gradient: `ulysses_attention` with ``return_lse=True``, then `ulysses_attention_backward` without `ctx`.
    ring : int or "auto"
        Groups of ranks, as in `ulysses_attention`.
    order : {"contiguous", "zigzag", "zigzag_ranks", "striped"}
        Which rows every rank holds, as in `ulysses_attention`.
    kv : {"ring", "all_gather", "auto"}
        How keys get to other groups, as in `ulysses_attention`.
    head_dim_v : int, optional
        That of v and out; `head_dim` by default.
    wire_dtype : {None, "int8", "float8_e4m3"}
        As what arrays travel, as in `ulysses_attention`.
    machine : str, path or Machine
        "cpu-2-cores" (measured), "aurora-node" or "aurora" (models from published figures), a file that
        ``scripts/plan.py --measure`` wrote, or a description.

    Returns
    -------
    Plan
        ``forward`` and ``backward`` hold the stages as `trace` records them, with messages, bytes and seconds; ``memory`` the
        bytes by use. Of a ring, "attention" is all attention of a rank, and "shift" all that travels between groups, with the
        time in which they wait for each other; ``ring`` and ``kv`` are what "auto" chose. ``rows``, ``heads``, ``kv_heads``,
        ``messages`` and ``bytes_sent`` are those of a rank, ``seconds`` and ``efficiency`` those of the whole; ``fits``,
        ``balance``, ``largest_seq``, ``useful_ranks`` and ``notes`` say what to do with it.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range, or the machine has fewer ranks or does not know the dtype.
    NotImplementedError
        `wire_dtype` is given with float64 or a ring.

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
    if head_dim_v is not None:
        check_integer("head_dim_v", head_dim_v)
    for name, width in (("head_dim", head_dim), ("head_dim_v", 1 if head_dim_v is None else head_dim_v)):
        if not 1 <= width <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must be from 1 to {MAX_HEAD_DIM}, not {width}")
    if heads % sizes["kv_heads"]:
        raise ValueError(f"heads must be a multiple of kv_heads, not {heads} and {kv_heads}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {names()}, not {dtype!r}")
    check_flag("causal", causal)
    check_flag("backward", backward)
    groups, order = check_ring(ring, ranks, heads), check_order(order)
    kv, wire = check_kv(kv, groups, heads, sizes["kv_heads"]), check_wire(wire_dtype, dtype, groups)
    ranges = None if key_ranges is None else _check_ranges(key_ranges, seq)
    machine = find(machine)
    if machine.ranks is not None and ranks > machine.ranks:
        raise ValueError(f"ranks must be at most {machine.ranks} on the machine {machine.name}, not {ranks}")
    for speeds, needed in (("flops", True), ("backward_flops", backward)):
        if needed and dtype not in getattr(machine, speeds):
            raise ValueError(f"machine {machine.name} has no {speeds} for the dtype {dtype}")
    # Delegate.
    problem = Problem(
        **sizes,
        dtype=dtype,
        ranks=ranks,
        batch=batch,
        causal=bool(causal),
        backward=backward,
        gpu=machine.device == "gpu",
        ring=groups,
        order=order,
        kv=kv,
        key_ranges=ranges,
        head_dim_v=head_dim_v,
        wire=wire,
    )
    return _predict(problem, machine)


def _check_ranges(key_ranges: Any, seq: int) -> bytes:
    ranges = np.asarray(key_ranges)
    if ranges.dtype.kind not in "iu":
        raise TypeError(f"key_ranges must be integers, not {ranges.dtype}")
    if ranges.shape != (seq, 2):
        raise ValueError(f"key_ranges must be ({seq}, 2), one for every query, not {ranges.shape}")
    if ranges.min() < 0 or ranges.max() > seq:
        raise ValueError(f"key_ranges must be from 0 to the {seq} keys, not {ranges.min()} to {ranges.max()}")
    return ranges.astype(np.int64).tobytes()


def _predict(problem: Problem, machine: Machine) -> Plan:
    examples = _examples(problem)
    forward, backward = calls_of(problem, machine, _of_all_groups(problem, examples))
    seconds = forward.seconds + backward.seconds
    efficiency = 1.0
    if problem.ranks > 1:
        one_rank = replace(problem, ranks=1, ring=1, order="contiguous")
        alone = sum(call.seconds for call in calls_of(one_rank, machine, [0]))
        efficiency = alone / seconds / (1 if machine.shared else problem.ranks)
    memory = max((memory_of(problem, rank) for rank in examples), key=lambda uses: sum(uses.values()))
    largest_seq = _largest_seq(problem, machine, examples)
    return Plan(
        machine=machine.name,
        ranks=problem.ranks,
        seq=problem.seq,
        rows=max(problem.rows),
        heads=max(share.q_count for share in problem.shares),
        kv_heads=max(share.kv_count for share in problem.shares),
        ring=problem.ring,
        kv=problem.kv,
        balance=_balance(problem),
        forward=forward,
        backward=backward,
        memory=memory,
        seconds=seconds,
        efficiency=efficiency,
        fits=problem.seq <= largest_seq,
        largest_seq=largest_seq,
        useful_ranks=problem.heads * problem.ring,
        notes=tuple(_notes(problem, machine, sum(memory.values()), largest_seq)),
    )


def _balance(problem: Problem) -> float:
    """The pairs of query and key of the busiest rank, by the mean of all."""
    mean = sum(problem.pairs) * problem.heads / problem.ranks
    return max(problem.pairs) * problem.shares[0].q_count / mean if mean else 1.0


def _examples(problem: Problem) -> list[int]:
    """Ranks that stand for all: of those with the same numbers of rows and heads, the first and the last."""
    first: dict[tuple[int, int, int], int] = {}
    last: dict[tuple[int, int, int], int] = {}
    for rank, rows in enumerate(problem.rows):
        share = problem.share(rank)
        kind = rows, share.q_count, share.kv_count
        first.setdefault(kind, rank)
        last[kind] = rank
    return sorted({*first.values(), *last.values()})


def _of_all_groups(problem: Problem, ranks: Sequence[int]) -> list[int]:
    """The ranks in the same places of all groups: what a rank sends to other groups depends on where it is."""
    places = {rank % problem.group for rank in ranks}
    return [rank for rank in range(problem.ranks) if rank % problem.group in places] if problem.ring > 1 else list(ranks)


def _notes(problem: Problem, machine: Machine, memory: int, largest_seq: int) -> list[str]:
    notes = []
    if problem.group > problem.heads:
        useful = problem.heads * problem.ring
        notes.append(f"more ranks than heads: those beyond {useful} have none, and attention gets no faster")
    elif problem.heads % problem.group:
        most = problem.shares[0].q_count
        notes.append(f"uneven: the busiest ranks have {most} heads, the average is {problem.heads / problem.group:.3g}")
    if problem.heads % problem.group:
        notes.append(f"ring={check_ring('auto', problem.ranks, problem.heads)} would give all ranks as many heads")
    uneven = max(problem.pairs) * problem.ring / max(sum(problem.pairs), 1)
    if uneven > UNEVEN:
        notes.append(f"the busiest group computes {uneven:.3g} times the mean of all: see order")
    if problem.copies_of_kv > problem.kv_heads:
        notes.append(f"ranks share kv heads: {problem.copies_of_kv} copies of the {problem.kv_heads} are sent")
    if without := problem.rows.count(0):
        notes.append(f"{without} of {problem.ranks} ranks have no row")
    if problem.seq > largest_seq:
        available = machine.memory / parts(machine, problem.ranks)
        notes.append(f"does not fit: {memory / 1e9:.3g} GB, a rank has {available / 1e9:.3g}; at most {largest_seq} rows do")
    best, direct, two_steps = best_node_size(problem, machine) if problem.travels is None else (1, 0.0, 0.0)
    if best > 1:
        notes.append(f"node_size={best} would take {two_steps:.2g} s for the forward exchanges instead of {direct:.2g} s")
    if not machine.measured:
        notes.append(f"{machine.name} is a model from published figures, not measured")
    return notes


def _largest_seq(problem: Problem, machine: Machine, examples: Sequence[int]) -> int:
    """The longest sequence of which everything fits into the memory of every rank; 0 if none does."""
    available = machine.memory / parts(machine, problem.ranks)

    # with any number of rows, the first rank of each kind has the most of them
    def fits(seq: int) -> bool:
        shorter = replace(problem, seq=seq, key_ranges=None)
        return all(sum(memory_of(shorter, rank).values()) <= available for rank in examples)

    low, high = 0, problem.seq  # what fits, and what does not
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
