"""What fails on one rank, before a call sends anything or in the middle of it, is raised on all ranks, and nothing is lost."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from checks import check, distributed, outcomes
from helpers import COMPLETE, as_kind, as_numpy, needs_ranks, new_queue, part, random_qkv, split
from mpi4py import MPI
from oracle import TOLERANCE, dense_attention

from ulysses_dp import (
    backends,
    free_workspace,
    gather_heads,
    scatter_heads,
    ulysses_attention,
    ulysses_attention_backward,
)
from ulysses_dp._device import workspace
from ulysses_dp._device.arrays import tensor
from ulysses_dp._ranks import mpi
from ulysses_dp._ranks.redistribution import Redistribution
from ulysses_dp.backends.intel_sycl import IntelSycl


class OutOfOrderError(Exception):
    """Not one of the exceptions that a call passes on as they are."""


def failing_on(rank, comm, error, after=0):
    """A function that raises on one rank, when it was called `after` times."""
    calls = []

    def fail(*arguments, **options):
        calls.append(arguments)
        if comm.rank == rank and len(calls) > after:
            raise error

    return fail


@pytest.fixture
def mine(comm):
    return [part(x, split(26, comm.size, "uneven"), comm.rank) for x in random_qkv(3, 2, 26, 8, 4, 16)]


def forward(mine, comm, **options):
    return ulysses_attention(*mine, comm=comm, causal=True, return_lse=True, **options)


def backward(mine, comm, **options):
    q, k, v = mine
    out, lse = np.ones_like(q), np.zeros((q.shape[0], q.shape[2], q.shape[1]), np.float32)
    return ulysses_attention_backward(out, q, k, v, out, lse, comm=comm, **options)


TOKENS = np.ones((2, 3, 8, 16), np.float32)
CALLS = {
    "forward": forward,
    "forward of 3 parts": lambda mine, comm: forward(mine, comm, overlap=3),
    "forward through the host": lambda mine, comm: forward(mine, comm, exchange="host"),
    "backward": backward,
    "backward of 2 parts": lambda mine, comm: backward(mine, comm, overlap=2),
    "forward around a ring": lambda mine, comm: forward(mine, comm, ring=comm.size),
    "forward of gathered keys": lambda mine, comm: forward(mine, comm, ring=comm.size, kv="all_gather"),
    "forward with replicated tokens": lambda mine, comm: forward(mine, comm, replicated=[TOKENS[:, :, :n] for n in (8, 4, 4)]),
    "backward around a ring": lambda mine, comm: backward(mine, comm, ring=comm.size),
    "backward of gathered keys": lambda mine, comm: backward(mine, comm, ring=comm.size, kv="all_gather"),
    "scatter_heads": lambda mine, comm: scatter_heads(mine[0], comm=comm),
    "gather_heads": lambda mine, comm: gather_heads(mine[0].swapaxes(1, 2).copy().swapaxes(1, 2)[:, :2], comm=comm),
}


@needs_ranks
@pytest.mark.parametrize(
    ("name", "step"),
    [
        *((name, step) for name in CALLS if "heads" not in name for step in ("pack", "attention", "unpack")),
        ("scatter_heads", "pack"),
        ("gather_heads", "unpack"),
    ],
)
def test_a_step_that_fails_on_one_rank(comm, monkeypatch, mine, name, step):
    """All ranks raise the same, and the next call on the communicator is right."""
    call = CALLS[name]
    rank = comm.size - 1
    broken = failing_on(rank, comm, OutOfOrderError("out of order"))
    with monkeypatch.context() as patch:
        if step == "attention":
            patch.setattr(IntelSycl, "forward", broken)
            patch.setattr(IntelSycl, "backward", broken)
        else:
            patch.setattr(Redistribution, step, broken)
        results = outcomes(comm, lambda: call(mine, comm))
    function = name.split()[0].replace("forward", "ulysses_attention").replace("backward", "ulysses_attention_backward")
    assert results == [(RuntimeError, f"{function}: rank {rank}: OutOfOrderError: out of order")] * comm.size
    check(comm, random_qkv(4, 2, 26, 8, 4, 16), causal=True)


@needs_ranks
@pytest.mark.parametrize("name", CALLS)
def test_no_memory_on_one_rank(comm, monkeypatch, mine, name):
    """Before anything is sent, all ranks raise MemoryError; with the memory, the same call is right."""
    call = CALLS[name]
    free_workspace()
    with monkeypatch.context() as patch:
        if comm.rank == 0:
            patch.setattr(workspace, "_allocate", failing_on(0, comm, MemoryError("no memory")))
        results = outcomes(comm, lambda: call(mine, comm))
    assert len(set(results)) == 1, results
    assert results[0][0] is MemoryError
    assert "rank 0: no memory" in results[0][1]
    assert outcomes(comm, lambda: call(mine, comm)) == [None] * comm.size
    check(comm, random_qkv(4, 2, 26, 8, 4, 16), causal=True)


@needs_ranks
def test_more_memory_than_there_is(comm):
    """A terabyte on the last rank, without rows on the others."""
    rows = 2**29 if comm.rank == comm.size - 1 else 0
    number = tensor.ones((1, 1, 1, 1), dtype="float32")
    huge = tensor.broadcast_to(number, (1, rows, 8, 64))
    results = outcomes(comm, lambda: ulysses_attention(huge, huge, huge, comm=comm))
    assert len(set(results)) == 1, results
    assert results[0][0] is MemoryError
    assert "bytes of device memory" in results[0][1]
    check(comm, random_qkv(4, 2, 26, 8, 4, 16), causal=True)


@needs_ranks
def test_memory_is_agreed_upon_once(comm, mine):
    """Who comes back with the same call brings the memory for it; every other call has to get it, on all ranks together."""
    rows, piece = split(26, comm.size, "uneven"), comm.Dup()
    counted = []
    original = mpi.any_rank

    def any_rank(*arguments):
        counted.append(1)
        return original(*arguments)

    def rounds(**options):
        counted.clear()
        ulysses_attention(*mine, comm=piece, **options)
        return len(counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpi, "any_rank", any_rank)
        assert [rounds(), rounds(), rounds()] == [2, 1, 1]
        assert [rounds(causal=True), rounds(causal=True)] == [2, 1]
        assert [rounds(exchange="host"), rounds(exchange="host"), rounds()] == [2, 1, 2]
        if comm.rank == 0:
            free_workspace()
        assert [rounds(), rounds()] == [2, 1]
        assert [rounds(return_ctx=True), rounds(return_ctx=True)] == [2, 1]  # new memory for the context is had before that
    assert sum(rows) == 26
    piece.Free()


def test_a_thousand_calls_leave_nothing_behind(comm):
    """Random calls of all functions: no memory, no request, no communicator."""
    rng = np.random.default_rng(8)
    piece = comm.Dup()

    def one():
        heads = 4 * int(rng.integers(1, 3))
        batch, seq, how = int(rng.integers(1, 3)), int(rng.integers(0, 30)), rng.choice(["even", "uneven", "gaps", "first"])
        whole = random_qkv(int(rng.integers(99)), batch, seq, heads, heads // int(rng.choice([1, 2, 4])), 16)
        rows = split(seq, comm.size, how)
        mine = [as_kind(part(x, rows, comm.rank), "dpnp") for x in whole]
        which, options = rng.integers(4), {"overlap": int(rng.integers(1, 4)), "exchange": str(rng.choice(["device", "host"]))}
        if which == 0:
            y = scatter_heads(mine[0], comm=piece, exchange=options["exchange"])
            gather_heads(y, comm=piece, seq_local=rows[comm.rank])
        elif which == 1:
            out, lse, ctx = ulysses_attention(*mine, comm=piece, return_lse=True, return_ctx=True, **options)
            ulysses_attention_backward(out, *mine, out, lse, ctx=ctx, comm=piece, **options)
        elif which == 2:
            with pytest.raises(ValueError, match="softcap"):
                ulysses_attention(*mine, comm=piece, softcap=-1.0)
        else:
            ulysses_attention(*mine, comm=piece, causal=bool(rng.integers(2)), **options)

    for _ in range(200):
        one()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memories = sum(memory.nbytes for memory in workspace._store().memories.values())
    for _ in range(800):
        one()
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is mpi.AllToAll]
    assert sum(memory.nbytes for memory in workspace._store().memories.values()) <= 2 * memories
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB: compiled kernels and small tables
    handle = mpi.resolve_comm("test", piece).handle
    piece.Free()
    assert not [key for key in workspace._store().memories if key[0] == handle]


@needs_ranks
def test_an_interrupt_leaves_no_exchange_under_way(comm, monkeypatch, mine):
    """What is no failure of the call, like Ctrl-C, passes through at once; MPI no longer writes into the buffers then."""
    expected = forward(mine, comm, overlap=3)
    with monkeypatch.context() as patch:
        interrupt = failing_on(comm.rank, comm, KeyboardInterrupt())
        patch.setattr(IntelSycl, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            forward(mine, comm, overlap=3)
    gc.collect()
    for result, wanted in zip(forward(mine, comm, overlap=3), expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


@needs_ranks
@pytest.mark.skipif(MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="MPI was not started for several threads")
def test_threads_with_communicators_of_their_own(comm):
    pieces = [comm.Dup() for _ in range(3)]
    rows = split(26, comm.size)

    def run(number):
        queue = new_queue()
        whole = random_qkv(number, 1, 26, 8, 4, 16)
        mine = [as_kind(part(x, rows, comm.rank), "dpnp", queue) for x in whole]
        results = [as_numpy(ulysses_attention(*mine, comm=pieces[number], overlap=1 + n % 2)) for n in range(20)]
        expected = part(dense_attention(*whole)[0], rows, comm.rank)
        return max(abs(result - expected).max() for result in results)

    with ThreadPoolExecutor(len(pieces)) as threads:
        assert max(threads.map(run, range(len(pieces)))) < TOLERANCE["float32"]
    for piece in pieces:
        piece.Free()


STRUCK = """
import os, signal, sys
import numpy as np
from mpi4py import MPI
from ulysses_dp import ulysses_attention
q = np.ones((1, 64, 4, 16), dtype=np.float32)
for n in range(1000000):
    ulysses_attention(q, q, q)
    if n == 20 and MPI.COMM_WORLD.rank == 1:
        os.kill(os.getpid(), int(sys.argv[1]))
"""


def run_ranks(path, script, *arguments, ranks=3, **environment):
    """Run a script on some ranks; returns the exit status, and what it printed."""
    path.write_text(script)
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    command = [mpiexec, "-n", str(ranks), sys.executable, str(path), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, env=os.environ | environment, **streams) as run:
        try:
            printed, _ = run.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            pytest.fail("the other ranks still wait")
    return run.returncode, printed


@pytest.mark.single
def test_a_rank_that_is_killed_ends_the_run(tmp_path):
    status, _ = run_ranks(tmp_path / "struck.py", STRUCK, signal.SIGKILL.value)
    assert status != 0


@pytest.mark.single
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_rank_ends_the_run_if_asked_for(tmp_path, number):
    """The rank itself would wait in MPI_Finalize for the others, and they in an exchange for it."""
    status, printed = run_ranks(tmp_path / "struck.py", STRUCK, number.value, ULYSSES_DP_ABORT_ON_SIGNAL="1")
    assert status != 0
    assert f"ulysses_dp: {number.name} on rank 1 ends the job" in printed


OUTSIDE = """
import mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
import numpy as np
from mpi4py import MPI
import ulysses_dp
x = np.ones((1, 4, 2, 8), dtype=np.float32)
with ulysses_dp.trace() as record:
    ulysses_dp.attention(x, x, x)
calls = {
    "ulysses_attention": lambda: ulysses_dp.ulysses_attention(x, x, x),
    "ulysses_attention_backward": lambda: ulysses_dp.ulysses_attention_backward(x, x, x, x, x, x[..., 0].swapaxes(1, 2)),
    "scatter_heads": lambda: ulysses_dp.scatter_heads(x, comm=MPI.COMM_WORLD),
    "order_ranks": ulysses_dp.order_ranks,
    "Trace.save": lambda: record.save("trace.json", MPI.COMM_WORLD),
}
for word, step in (("has not started", MPI.Init), ("is over", MPI.Finalize)):
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            assert str(error).startswith(f"{name}: MPI {word}"), error
        else:
            raise AssertionError(name)
    if word == "has not started":
        MPI.Init()
        ulysses_dp.ulysses_attention(x, x, x)
        MPI.Finalize()
print("right")
"""


@pytest.mark.single
def test_before_and_after_mpi(tmp_path):
    status, printed = run_ranks(tmp_path / "outside.py", OUTSIDE, ranks=2)
    assert status == 0, printed
    assert printed.count("right") == 2


class UnspeakableError(Exception):
    """Its text cannot be made: a common slip, since args[0] is no string."""

    def __str__(self):
        return self.args[0]


@needs_ranks
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UnspeakableError(5), (RuntimeError, "UnspeakableError: its text cannot be made: TypeError")),
        (KeyError("x"), (RuntimeError, "KeyError: 'x'")),
        (AssertionError(), (RuntimeError, "AssertionError")),
        (ModuleNotFoundError("no such thing"), (ImportError, "ModuleNotFoundError: no such thing")),
        (PermissionError(13, "no"), (OSError, "PermissionError: [Errno 13] no")),
        (ValueError("x" * 10**7), (ValueError, "x" * 2000 + "… (10000000 characters with digest ")),
        (ValueError("\udcff"), (ValueError, "\udcff")),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_texts_of_exceptions(comm, monkeypatch, mine, error, expected):
    """All ranks raise, with the type and the text of what was raised on one; whatever that is."""
    kind, text = expected
    with monkeypatch.context() as patch:
        patch.setattr(IntelSycl, "forward", failing_on(comm.size - 1, comm, error))
        results = outcomes(comm, lambda: forward(mine, comm))
    assert len(set(results)) == 1
    assert results[0][0] is kind
    assert results[0][1].startswith(f"ulysses_attention: rank {comm.size - 1}: {text}")
    assert len(results[0][1]) < 3000


class Text:
    """An argument that is nothing, with this text or with none."""

    def __init__(self, text=None):
        self.text = text

    def __str__(self):
        if self.text is None:
            raise ZeroDivisionError("no text")
        return self.text

    __repr__ = __str__


@needs_ranks
@pytest.mark.parametrize("text", [None, "y" * 10**7], ids=["none", "huge"])
@pytest.mark.parametrize("name", ["softmax_scale", "window_size", "softcap", "layout", "attn_type", "exchange", "overlap"])
def test_texts_of_arguments(comm, mine, name, text):
    for ranks in ([comm.size - 1], range(comm.size)):
        options = {name: Text(text)} if comm.rank in ranks else {}
        results = outcomes(comm, lambda options=options: ulysses_attention(*mine, comm=comm, **options))
        assert len(set(results)) == 1
        assert results[0] is not None
        assert len(results[0][1]) < 3000


@needs_ranks
def test_huge_texts_that_differ(comm, mine):
    """Names of functions, which all ranks have to give alike."""

    def function(q, k, v, *, softmax_scale, causal, return_lse):
        return q * 1

    function.__qualname__ = "f" * 10**6 + ("g" if comm.rank else "h")
    results = outcomes(comm, lambda: ulysses_attention(*mine, comm=comm, attn_type=function))
    assert len(set(results)) == 1
    assert results[0][0] is ValueError
    assert "attn_type must be the same on all ranks" in results[0][1]
    assert len(results[0][1]) < 5000


@pytest.mark.parametrize("overlap", [2, 3, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (12, 4), (5, 5), (6, 1), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"exchange": "host"}, {"form": "bfloat16"}, {"rows_k": "last"}])
def test_overlap(comm, overlap, heads, kv_heads, options):
    """Right, and bit by bit what one part gives."""
    whole = random_qkv(5, 2, 29, heads, kv_heads, 16)
    options = dict(options)
    if "rows_k" in options:
        options["rows_k"] = split(29, comm.size, options["rows_k"])
    rows = split(29, comm.size, "uneven")

    def of(parts):
        def forward(q, k, v, comm, **others):
            return ulysses_attention(q, k, v, comm=comm, overlap=parts, **others)

        return check(comm, whole, rows=rows, functions=distributed._replace(forward=forward), causal=True, **options)

    np.testing.assert_array_equal(of(overlap), of(1))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (12, 6), (6, 1)])
@pytest.mark.parametrize("attn_type", backends.usable())
def test_overlap_of_gradients(comm, attn_type, keep, heads, kv_heads):
    """Bit by bit what one part gives, and with the backends of others up to rounding."""
    exact = attn_type in COMPLETE
    rows = split(29, comm.size, "uneven")
    mine = [part(x, rows, comm.rank) for x in random_qkv(6, 2, 29, heads, kv_heads, 16)]
    how = {"comm": comm, "attn_type": attn_type, "causal": True} | ({"sinks": np.linspace(-1, 1, heads)} if exact else {})
    results = []
    for overlap in (1, 3):
        out, lse, *ctx = ulysses_attention(*mine, return_lse=True, return_ctx=keep, overlap=overlap, **how)
        grads = ulysses_attention_backward(out, *mine, out, lse, ctx=ctx[0] if keep else None, overlap=overlap, **how)
        results.append((out, lse, *grads))
    for x, y in zip(*results, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=0 if exact else 1e-5)


def test_overlap_is_checked(comm, mine):
    for overlap, error in ((0, ValueError), ("all", ValueError), (1.5, TypeError), (True, TypeError)):
        results = outcomes(comm, lambda overlap=overlap: ulysses_attention(*mine, comm=comm, overlap=overlap))
        assert len(set(results)) == 1
        assert results[0][0] is error
        assert "overlap must be" in results[0][1]
