"""What a call does, counted: stages, collectives, kernel launches, messages and bytes."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from helpers import SPLITS, as_view, needs_ranks, outcomes, part, random_qkv, split
from mpi4py import MPI
from ulysses_dp.kernels import relayout
from ulysses_dp.kernels.launch import Launch

from ulysses_dp import all_to_all_4d, attention, free_workspace, gather_heads, scatter_heads, trace, ulysses_attention

FORWARD = ["pack", "scatter", "attention", "gather", "unpack"]
AROUND = ("agree", "prepare", "confirm")  # the agreement of the ranks


def names(record):
    """The stages of the work, without those of the agreement."""
    return [stage.name for stage in record.stages if stage.name not in AROUND]


class CountingComm(MPI.Intracomm):
    """A communicator that notes which collectives are called on it and on its duplicates, which are of the same class."""

    calls: ClassVar[list[str]] = []

    def __new__(cls, comm=None):
        cls.calls.clear()
        return super().__new__(cls, comm)


def _counted(name):
    def call(self, *arguments):
        self.calls.append(name)
        return getattr(super(CountingComm, self), name)(*arguments)

    return call


for _name in ("Allgather", "Allreduce", "Alltoall", "Alltoallv", "Ialltoallv", "allgather", "Barrier"):
    setattr(CountingComm, _name, _counted(_name))


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched, and what the host copies itself."""
    launched = []

    def note(kind, name):
        def noting(self, memories):
            launched.append(name(self))
            run(self, memories)

        run = kind.run
        monkeypatch.setattr(kind, "run", noting)

    note(Launch, lambda launch: launch.name.split("_d16")[0])  # whatever tile the device gets
    note(relayout._HostCopy, lambda _: "host copy")
    return launched


@pytest.mark.single
def test_attention_is_one_stage():
    with trace() as record:
        attention(*random_qkv(0, 1, 20, 2, 2, 16))
    assert names(record) == ["attention"]
    assert record.stages[0].seconds > 0
    assert record.bytes_sent() == 0


@pytest.mark.parametrize("how", ["even", "uneven"])
@pytest.mark.parametrize(("limit", "copy"), [(0, "relayout_uint32"), (relayout.HOST_BYTES, "host copy")])
def test_forward(comm, launches, monkeypatch, how, limit, copy):
    """One agreement and one relayout pass before and one each after, two all-to-alls; memory is allocated the first time only.

    Alone, the attention kernel and nothing else.
    """
    monkeypatch.setattr(relayout, "HOST_BYTES", limit)
    free_workspace()
    counting = CountingComm(comm.Dup())
    mine = [part(x, split(24, comm.size, how), comm.rank) for x in random_qkv(0, 2, 24, 12, 12, 16)]
    for time in range(3):
        launches.clear()
        counting.calls.clear()
        with trace() as record:
            ulysses_attention(*mine, comm=counting, return_lse=True)
        (call,) = record.calls
        assert call.function == "ulysses_attention"
        if comm.size == 1:
            assert names(record) == ["attention"]
            assert counting.calls == []
            assert launches == ["flash_forward_float32"]
        else:
            assert names(record) == FORWARD
            first_time = ["Allreduce"] * (time == 0)  # whether all ranks got their memory
            assert counting.calls == ["Allgather", *first_time, "Alltoallv", "Alltoallv", "Allreduce"]
            assert launches == [copy, "flash_forward_float32", copy]
        assert call.passes == sum(stage.passes for stage in call.stages) == len(launches) - 1
        assert (call.allocations > 0) == (time == 0)
        assert all(stage.seconds > 0 and stage.start >= call.start for stage in record.stages)
        assert sum(stage.seconds for stage in record.stages) <= call.seconds
    assert record.seconds("attention") == sum(stage.seconds for stage in record.stages if stage.name == "attention")
    counting.Free()
    free_workspace()  # what copies by the limit of this test


@needs_ranks
def test_keys_of_another_length_take_a_message_of_their_own(comm):
    whole = random_qkv(0, 1, 24, 12, 12, 16, seq_k=36)
    with trace() as record:
        ulysses_attention(*(part(x, split(x.shape[1], comm.size), comm.rank) for x in whole), comm=comm)
    assert names(record) == ["pack", "scatter", *FORWARD]


@needs_ranks
def test_redistributions(comm, launches):
    x = part(random_qkv(0, 2, 24, 12, 12, 16)[0], split(24, comm.size), comm.rank)
    with trace() as record:
        y = scatter_heads(x)
    assert names(record) == ["pack", "scatter"]
    assert len(launches) == 1
    with trace() as record:
        gather_heads(as_view(y, "dpnp", "swapped"))
    assert names(record) == ["pack", "gather", "unpack"]
    on_device = scatter_heads(as_view(x, "dpnp"))
    with trace() as record:
        gather_heads(on_device)  # stored as it is sent
    assert names(record) == ["gather", "unpack"]
    with trace() as record:
        all_to_all_4d(x)
    assert names(record) == ["pack", "scatter"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(60, 60), (120, 60)])
def test_bytes_of_the_formula(comm, dtype, heads, kv_heads):
    batch, seq, head_dim, ranks = 2, 60, 4, comm.size  # 60 is a multiple of 1 to 6
    mine = [part(x, split(seq, ranks), comm.rank) for x in random_qkv(0, batch, seq, heads, kv_heads, head_dim, dtype)]
    with trace() as record:
        ulysses_attention(*mine, comm=comm)
    itemsize = np.dtype(dtype).itemsize
    assert record.bytes_sent() * ranks**2 == (ranks - 1) * batch * seq * head_dim * itemsize * 2 * (heads + kv_heads)
    assert sum(stage.messages for stage in record.stages) == 2 * (ranks - 1)


@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (5, 5), (6, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("exchange", ["device", "host"])
def test_bytes_and_messages_of_any_split(comm, how, heads, kv_heads, return_lse, exchange):
    """Only what its owner needs is sent: the query heads of a peer and, once each, the kv heads that these read."""
    batch, seq, head_dim, ranks, me = 2, 13, 16, comm.size, comm.rank
    rows, q_heads, group = split(seq, ranks, how), split(heads, ranks), heads // kv_heads
    mine = [part(x, rows, me) for x in random_qkv(0, batch, seq, heads, kv_heads, head_dim)]
    with trace() as record:
        ulysses_attention(*mine, comm=comm, return_lse=return_lse, exchange=exchange)
    read = [len({h // group for h in range(sum(q_heads[:rank]), sum(q_heads[: rank + 1]))}) for rank in range(ranks)]
    peers = [rank for rank in range(ranks) if rank != me]
    there = [rows[me] * batch * head_dim * (q_heads[peer] + 2 * read[peer]) for peer in peers]
    back = [rows[peer] * batch * (head_dim + return_lse) * q_heads[me] for peer in peers]
    sent = {stage.name: stage for stage in record.stages if stage.name in ("scatter", "gather")}
    assert len(sent) == (2 if ranks > 1 else 0)
    for name, numbers in (("scatter", there), ("gather", back)):
        if name in sent:
            assert sent[name].bytes_sent == 4 * sum(numbers)
            assert sent[name].messages == sum(n > 0 for n in numbers)
            assert sent[name].route == exchange


@pytest.mark.single
def test_blocks_in_blocks_and_after_errors():
    q, k, v = random_qkv(0, 1, 4, 1, 1, 16)
    with trace() as outer:
        attention(q, k, v)
        with trace() as inner:
            attention(q, k, v)
        with pytest.raises(ZeroDivisionError), trace():
            raise ZeroDivisionError
        attention(q, k, v)
    attention(q, k, v)
    assert [len(record.stages) for record in (outer, inner)] == [2, 1]


@pytest.mark.parametrize("overlap", [1, 2])
def test_file_for_perfetto(comm, overlap):
    """Valid JSON with one process per rank; every beginning has its end, and stages lie within their calls."""
    folder = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)  # pytest's would be cleared by every rank
    path = Path(folder) / "trace.json"
    mine = [part(x, split(24, comm.size), comm.rank) for x in random_qkv(0, 2, 24, 12, 12, 16)]
    with trace() as record:
        for _ in range(2):
            ulysses_attention(*mine, comm=comm, overlap=overlap)
    record.save(path, comm)
    comm.Barrier()
    events = json.loads(path.read_text())["traceEvents"]
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)
    assert {event["pid"] for event in events} == set(range(comm.size))
    for rank in range(comm.size):
        mine = [event for event in events if event["pid"] == rank]
        assert [event["args"]["name"] for event in mine if event["ph"] == "M"] == [f"rank {rank}"]
        timed = [event for event in mine if event["ph"] != "M"]
        assert all(event["ts"] >= 0 for event in timed)
        calls = [event for event in timed if event["name"] == "ulysses_attention"]
        assert len(calls) == 2
        begun = {event["id"]: event for event in timed if event["ph"] == "b"}
        ended = {event["id"]: event for event in timed if event["ph"] == "e"}
        assert begun.keys() == ended.keys()
        assert len(begun) == (4 * overlap if comm.size > 1 else 0)
        assert all(begun[number]["ts"] <= ended[number]["ts"] for number in begun)
        for event in timed:
            assert any(c["ts"] - 1 <= event["ts"] <= c["ts"] + c["dur"] + 1 for c in calls)
        assert ("bytes_sent" in next(iter(begun.values()))["args"]) if begun else True


@pytest.mark.single
def test_file_of_one_rank(tmp_path):
    with trace() as record:
        attention(*random_qkv(0, 1, 20, 2, 2, 16))
    record.save(tmp_path / "one.json")
    names_in_file = [event["name"] for event in json.loads((tmp_path / "one.json").read_text())["traceEvents"]]
    assert names_in_file == ["process_name", "attention", "attention"]


@pytest.mark.parametrize("path", ["/nosuch/trace.json", "/"])
def test_file_that_cannot_be_written(comm, path):
    """Rank 0 writes, all ranks raise."""
    with trace() as record:
        ulysses_attention(*random_qkv(0, 1, 4, 2, 2, 8), comm=comm)
    results = outcomes(comm, lambda: record.save(path, comm))
    assert len(set(results)) == 1
    assert results[0][0] is OSError or comm.size == 1
    assert path in results[0][1]
    with pytest.raises(OSError, match=path):
        record.save(path)
