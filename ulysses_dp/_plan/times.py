"""The stages of a call that is planned, with their messages, bytes and times.

A stage costs a constant, and its operations, bytes or messages divided by what the machine does in a second.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .._device.trace import Call, Stage
from .._ranks.orders import count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..machine import Machine
    from .problem import Message, Problem


def calls_of(problem: Problem, machine: Machine, ranks: Sequence[int]) -> tuple[Call, Call]:
    """The calls forward and backward, in which every stage has the largest figures of these ranks."""
    forward = Call("ulysses_attention", stages=_most([_forward(problem, machine, rank) for rank in ranks]))
    backward = Call("ulysses_attention_backward", stages=_most([_backward(problem, machine, rank) for rank in ranks]))
    for call in (forward, backward):
        for stage in call.stages:
            if stage.name == "shift":
                stage.seconds = _ring_seconds(problem, machine, gradient=call is backward)
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


def parts(machine: Machine, ranks: int) -> int:
    """Into how many parts the machine's memory and speeds are divided."""
    return ranks if machine.shared else 1


def _forward(problem: Problem, machine: Machine, rank: int) -> list[Stage]:
    """The stages of `ulysses_attention` on a rank."""
    inside = [_attention(problem, machine, rank, gradient=False), *_shifts(problem, rank, gradient=False)]
    return inside if problem.ranks == 1 else _around(problem, machine, rank, inside, *problem.messages())


def _around(problem: Problem, machine: Machine, rank: int, inside: list[Stage], there: Message, back: Message) -> list[Stage]:
    """The stages of a call on several ranks: what is computed, with the way there and back."""
    if problem.wire is not None:
        inside = [_decode(problem, machine, "unpack", there, rank), *inside, _decode(problem, machine, "pack", back, rank)]
    return [
        _relayout(problem, machine, "pack", there, rank),
        _exchange(problem, machine, "scatter", there, rank),
        *inside,
        _exchange(problem, machine, "gather", back, rank),
        _relayout(problem, machine, "unpack", back, rank),
    ]


def _backward(problem: Problem, machine: Machine, rank: int) -> list[Stage]:
    """The stages of `ulysses_attention_backward` on a rank; none if it is not asked for."""
    if not problem.backward:
        return []
    rows = problem.batch * problem.rows[rank] * problem.heads
    delta = _copy(problem, machine, "delta", 2 * rows * problem.widths[1] * problem.itemsize)
    inside = [_attention(problem, machine, rank, gradient=True), *_shifts(problem, rank, gradient=True)]
    if problem.ranks == 1:
        return [delta, *inside]
    return [delta, *_around(problem, machine, rank, inside, *problem.messages(gradient=True))]


def _relayout(problem: Problem, machine: Machine, name: str, message: Message, rank: int) -> Stage:
    """A stage that copies what a rank has of an exchange by rows, including what does not travel."""
    transfer = message.transfer(problem, rank)
    numbers = transfer.size_by_rows + transfer.counts_by_heads[transfer.rank]
    rows = transfer.rows[transfer.rank] * problem.batch
    moved = numbers * message.itemsize + rows * message.row_in_arrays(range(len(transfer.rows)))
    return _copy(problem, machine, name, moved)


def _decode(problem: Problem, machine: Machine, name: str, message: Message, rank: int) -> Stage:
    """A stage that makes numbers of the codes that a rank has of an exchange by heads, or the other way round."""
    transfer = message.transfer(problem, rank)
    rows = sum(transfer.rows) * problem.batch
    moved = transfer.size_by_heads * message.itemsize + rows * message.row_in_arrays([transfer.rank])
    return _copy(problem, machine, name, moved)


def _copy(problem: Problem, machine: Machine, name: str, moved: int) -> Stage:
    """A stage that reads and writes so many bytes."""
    return Stage(name, seconds=machine.stage_seconds + moved * parts(machine, problem.ranks) / machine.copy_bandwidth)


def _attention(problem: Problem, machine: Machine, rank: int, *, gradient: bool) -> Stage:
    """A stage that computes; of a ring, all that the group of the rank computes."""
    group, launches = rank // problem.group, 1
    if problem.travels is not None:
        launches = sum(len(problem.travels.meetings(group, owner)) for owner in range(problem.ring))
    heads, pairs = problem.share(rank).q_count, problem.pairs[group]
    seconds = _attention_seconds(problem, machine, heads, pairs, launches, gradient=gradient)
    return Stage("attention backward" if gradient else "attention", seconds=seconds)


def _attention_seconds(problem: Problem, machine: Machine, heads: int, pairs: int, launches: int, *, gradient: bool) -> float:
    """So many operations for an element of head_dim and a pair of a query and a key it sees, and a constant for a launch."""
    of_qk, of_v, speeds = (6, 4, machine.backward_flops) if gradient else (2, 2, machine.flops)
    width, width_v = problem.widths
    flops = (of_qk * width + of_v * width_v) * problem.batch * heads * pairs
    return launches * machine.stage_seconds + flops * parts(machine, problem.ranks) / speeds[problem.dtype]


def _shifts(problem: Problem, rank: int, *, gradient: bool) -> list[Stage]:
    """What a rank sends to other groups, as one stage; none without a ring. The time is that of all groups together."""
    if problem.ring == 1 or problem.travels is None:
        return []
    trips = _trips(problem, rank // problem.group, problem.share(rank).kv_count, gradient=gradient)
    sent = [nbytes for of_hop in trips for _, nbytes in of_hop]
    return [Stage("shift", bytes_sent=sum(sent), messages=len(sent), route="device", exchange=True)]


def _trips(problem: Problem, group: int, kv_heads: int, *, gradient: bool) -> list[list[tuple[int, int]]]:
    """What a rank of a group with so many kv heads sends in every hop: so many groups ahead, so many bytes."""
    travels, numbers = problem.travels, problem.batch * kv_heads * sum(problem.widths)
    assert travels is not None
    trips = []
    for hop in range(problem.ring):
        sent = [(travels.keys_sent(group, hop), problem.itemsize)]
        if gradient:
            sent.append((travels.sums_sent(group, hop), problem.compute_itemsize))
        trips.append([(x.distance, count(travels.keys[x.owner]) * numbers * size) for x, size in sent if x is not None])
    return trips


def _ring_seconds(problem: Problem, machine: Machine, *, gradient: bool) -> float:
    """Time for what travels between groups, and in which they wait for each other.

    Around a ring, every hop takes as long as in the slowest group. Gathered keys are sent before anything is computed.
    """
    travels, groups = problem.travels, range(problem.ring)
    assert travels is not None
    share = max(problem.shares, key=lambda share: share.kv_count)
    travel = np.zeros((problem.ring, problem.ring))
    work = np.zeros_like(travel)
    for group in groups:
        rank = group * problem.group
        for hop, trips in enumerate(_trips(problem, group, share.kv_count, gradient=gradient)):
            for distance, nbytes in trips:
                peer = (group + distance) % problem.ring * problem.group
                travel[group, hop] += _link_seconds(problem, machine, rank, peer, nbytes)
            met = travels.meetings(group, travels.owner(group, hop))
            pairs = sum(pairs for *_, pairs in met)
            heads = problem.shares[0].q_count
            work[group, hop] = _attention_seconds(problem, machine, heads, pairs, len(met), gradient=gradient)
    if travels.gathers:
        return float(travel.sum(axis=1).max())
    return float(travel.max(axis=0).sum() + work.max(axis=0).sum() - work.sum(axis=1).max())


def _link_seconds(problem: Problem, machine: Machine, rank: int, peer: int, nbytes: int) -> float:
    """Time for a message between two ranks, at the speed of the closest level that has both."""
    sizes = ((level, level.ranks or problem.ranks) for level in machine.levels)
    level = next(level for level, size in sizes if rank // size == peer // size)
    return level.latency + nbytes * parts(machine, problem.ranks) / level.bandwidth


def _exchange(problem: Problem, machine: Machine, name: str, message: Message, rank: int) -> Stage:
    """An all-to-all: a rank deals with its peers one after the other, those of the same level at the level's speed."""
    counts = _bytes(problem, message, rank, to_heads=name == "scatter")
    seconds = machine.stage_seconds + _wire_seconds(problem, machine, rank, counts)
    sent, messages = int(counts[0].sum()), int(np.count_nonzero(counts[0]))
    return Stage(name, bytes_sent=sent, messages=messages, route="device", seconds=seconds, exchange=True)


def _bytes(problem: Problem, message: Message, rank: int, *, to_heads: bool) -> np.ndarray:
    """Bytes that a rank sends to (first row) and gets from (second row) all ranks."""
    transfer = message.transfer(problem, rank)
    sides = transfer.counts_by_rows, transfer.counts_by_heads
    counts, first = np.zeros((2, problem.ranks), dtype=np.int64), rank // problem.group * problem.group
    counts[:, first : first + problem.group] = sides if to_heads else sides[::-1]
    counts[:, rank] = 0  # what stays
    return counts * message.itemsize


def _wire_seconds(problem: Problem, machine: Machine, rank: int, counts: np.ndarray) -> float:
    """Time for bytes to (first row) and from (second row) all ranks."""
    seconds, inner = 0.0, slice(rank, rank + 1)
    for level in machine.levels:
        size = level.ranks or problem.ranks
        outer = slice(rank // size * size, min((rank // size + 1) * size, problem.ranks))
        peers = np.concatenate([counts[:, outer.start : inner.start], counts[:, inner.stop : outer.stop]], axis=1)
        time = np.count_nonzero(peers, axis=1) * level.latency
        time += peers.sum(axis=1) * parts(machine, problem.ranks) / level.bandwidth
        seconds += time.max()  # links carry both directions at once
        inner = outer
    return float(seconds)


def best_node_size(problem: Problem, machine: Machine) -> tuple[int, float, float]:
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
