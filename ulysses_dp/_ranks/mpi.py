"""The only place that calls MPI: the all-to-all of device memory, and the agreement of all ranks before it."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
from functools import cache, lru_cache
from pathlib import Path
from secrets import randbits
from typing import Any, NamedTuple

import numpy as np

from .._device.queue import device_turn, local_rank
from .._device.remembered import Remembered
from .._device.shared import attach, create
from .._device.trace import stage
from .._device.workspace import drop_shared, release, set_shared, shared
from .partition import starts

ABORT = "ULYSSES_DP_ABORT_ON_SIGNAL"  # if set, SIGINT or SIGTERM to one rank ends the job


@cache
def _mpi() -> Any:
    """`mpi4py.MPI`, imported late: it starts MPI, which `attention` on one rank does not need."""
    _load_level_zero()
    from mpi4py import MPI

    return MPI


def _load_level_zero() -> None:
    """Where Intel MPI is to reach GPUs it expects the loader of Level Zero in the process, and aborts without it."""
    if os.environ.get("I_MPI_OFFLOAD", "0") in ("", "0"):
        return
    try:
        ctypes.CDLL("libze_loader.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeError(
            f"I_MPI_OFFLOAD is {os.environ['I_MPI_OFFLOAD']!r}, for which MPI needs the loader of Level Zero: {error}. Install "
            "the driver of the GPU, or unset the variable: the exchange then goes through host memory."
        ) from None


def library_version() -> str:
    """Name and version of the MPI library in one line, or why there is none."""
    try:
        version = _mpi().Get_library_version().replace("\0", "").strip()
    except (ImportError, RuntimeError) as error:
        return f"none found: {error}. Install one, for instance with pip install 'ulysses_dp[mpi]'"
    return " ".join(version.splitlines()[0].split())


class Route(NamedTuple):
    """How the bytes reach MPI."""

    name: str  # "device": MPI is given USM pointers; "host": through pinned host memory; "shared": by memory that ranks share
    reason: str


@lru_cache(maxsize=64)
def choose_route(queue: Any, exchange: str) -> Route:
    """How MPI reaches device memory of this queue; `exchange` is the user's wish."""
    if exchange != "auto":
        return Route(exchange, "as asked")
    device = queue.sycl_device
    if device.is_cpu:
        return Route("device", "the device is the CPU: its memory is host memory")
    if device.backend.name != "level_zero":
        return Route("host", f"MPI takes {device.backend.name} device pointers for host pointers; use level_zero")
    if _mpi_reaches_level_zero():
        return Route("device", "the MPI library supports Level Zero")
    return Route("host", "the MPI library does not report Level Zero support (Intel MPI: set I_MPI_OFFLOAD=1)")


@cache
def _mpi_reaches_level_zero() -> bool:
    """Ask the MPI library; mpi4py does not wrap this query of MPICH and Intel MPI."""
    _mpi()
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libmpi" in line}
    for path in loaded:
        query = getattr(ctypes.CDLL(path), "MPIX_Query_ze_support", None)
        if query is not None and query():
            return True
    return False


def gathered(thing: Any) -> list[Any] | None:
    """Any small object of all processes, on rank 0, None elsewhere; this one alone where there is no MPI."""
    world = _world()
    return [thing] if world is None else world.gather(thing)


def gather_text(text: str) -> str:
    """The texts of all processes on rank 0, an empty string elsewhere; this text alone where there is no MPI."""
    texts = gathered(text) or []
    return text if len(texts) == 1 else "\n\n".join(f"rank {rank}\n{x}" for rank, x in enumerate(texts))


def is_first() -> bool:
    """Whether this process is rank 0, as it is where there is no MPI."""
    world = _world()
    return world is None or world.rank == 0


def _world() -> Any:
    """All ranks; None where there is no MPI, or no longer."""
    try:
        mpi = _mpi()
    except (ImportError, RuntimeError):
        return None
    return mpi.COMM_WORLD if mpi.Is_initialized() and not mpi.Is_finalized() else None


def resolve_comm(function: str, comm: Any, name: str = "comm") -> Ranks:
    """The ranks of a call; raises on this rank alone: without a communicator, no other rank can be told."""
    mpi = _mpi()
    if not mpi.Is_initialized() or mpi.Is_finalized():
        when = "is over: MPI_Finalize was called" if mpi.Is_finalized() else "has not started: MPI_Init was not called"
        raise RuntimeError(f"{function}: MPI {when}")
    _watch_signals()
    if comm is None:
        comm = mpi.COMM_WORLD
    if not isinstance(comm, mpi.Comm):
        raise TypeError(f"{function}: {name} must be an mpi4py communicator or None, not {type(comm).__name__}")
    if comm == mpi.COMM_NULL:
        raise ValueError(f"{function}: {name} is MPI.COMM_NULL: it was freed, or this process is not a member")
    if comm.Is_inter():
        raise ValueError(f"{function}: {name} is an intercommunicator; an intracommunicator is expected")
    ranks = comm.Get_attr(_keyval())
    if ranks is None:
        ranks = Ranks(comm.Dup())
        comm.Set_attr(_keyval(), ranks)
    return ranks


@cache
def _watch_signals() -> None:
    """If the user has asked for it, a signal to one rank ends the job.

    A thread sees to it where the main thread waits in MPI: it would not come to its handlers, and others would not hear of it.
    """
    if not os.environ.get(ABORT) or threading.current_thread() is not threading.main_thread():
        return
    world, ending = _mpi().COMM_WORLD, threading.Lock()

    def end(number: int, *_: Any) -> None:
        if ending.acquire(blocking=False):
            print(f"ulysses_dp: {signal.Signals(number).name} on rank {world.rank} ends the job", file=sys.stderr, flush=True)
            world.Abort(128 + number)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=lambda: end(os.read(reader, 1)[0]), daemon=True).start()


@cache
def _keyval() -> int:
    """The key under which a communicator keeps its `Ranks`, which are freed with it, and so is their memory."""

    def free(comm: Any, key: int, ranks: Ranks) -> None:
        ranks.free()

    return _mpi().Comm.Create_keyval(delete_fn=free)


class Ranks:
    """What this package keeps with a communicator of the user.

    Its ranks are those of a duplicate for this package alone: collectives of the user that are still under way cannot be taken
    for ours. Made by the first call on a communicator. All ranks are in that call, and the library frees what it keeps at the
    end.
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank, self.size, self.handle = comm.rank, comm.size, comm.handle
        self.remembered = Remembered()  # what calls of these ranks have found out
        self._node_size: int | None = None
        self._steps: dict[int, tuple[Any, Any]] = {}
        self._meshes: dict[int, tuple[Ranks, Ranks]] = {}

    def node_size(self, wish: Any) -> int:
        """The size of a node; collective for the first time if it is "auto": then it is found out.

        That is how many consecutive ranks share memory, if that is the same for all nodes, or 1.
        """
        if wish != "auto":
            return int(wish)
        if self._node_size is None:
            node = self.comm.Split_type(_mpi().COMM_TYPE_SHARED, self.rank)
            first, size = node.bcast(self.rank), node.size
            node.Free()
            everywhere = self.comm.allgather((size, first))
            regular = all(n == size and start == rank // size * size for rank, (n, start) in enumerate(everywhere))
            self._node_size = size if regular else 1
        return self._node_size

    def steps(self, node_size: int) -> tuple[Any, Any]:
        """For two steps: the ranks of this node, and those with the number of this one on their nodes.

        Collective for the first time.
        """
        if node_size not in self._steps:
            within = self.comm.Split(self.rank // node_size, self.rank)
            self._steps[node_size] = within, self.comm.Split(self.rank % node_size, self.rank)
        return self._steps[node_size]

    def mesh(self, ring: int) -> tuple[Ranks, Ranks]:
        """For rings of so many ranks: the Ulysses group of this rank, which are consecutive ranks, and its ring.

        Collective for the first time.
        """
        if ring not in self._meshes:
            size = self.size // ring
            group = Ranks(self.comm.Split(self.rank // size, self.rank))
            self._meshes[ring] = group, Ranks(self.comm.Split(self.rank % size, self.rank))
        return self._meshes[ring]

    def free(self) -> None:
        """Give back everything."""
        release(self.handle)
        for mesh in self._meshes.values():
            for ranks in mesh:
                ranks.free()
        for steps in self._steps.values():
            for comm in steps:
                comm.Free()
        self.comm.Free()


def ordered(ranks: Ranks) -> Any:
    """A new communicator with the ranks of each node, and of each device of it, one after the other."""
    comm = ranks.comm
    node = comm.Split_type(_mpi().COMM_TYPE_SHARED, comm.rank)
    on_node = local_rank()
    first = node.allreduce(comm.rank, _mpi().MIN)  # the number of the node, by its lowest rank
    positions = comm.allgather((first, on_node, comm.rank))
    node.Free()
    return comm.Split(0, sorted(positions).index(positions[comm.rank]))


def share_record(ranks: Ranks, record: tuple[int, ...]) -> np.ndarray:
    """The records of all ranks, one row each; all must have the same length."""
    mine = np.array(record, dtype=np.int64)
    everyone = np.empty((ranks.size, mine.size), dtype=np.int64)
    ranks.comm.Allgather(mine, everyone)
    return everyone


def share_object(ranks: Ranks, thing: Any) -> list[Any]:
    """Any small object of every rank, by pickle: for messages about errors."""
    return ranks.comm.allgather(thing)


def meet(ranks: Ranks) -> None:
    """Wait for all ranks."""
    ranks.comm.Barrier()


def any_rank(ranks: Ranks, here: bool) -> bool:
    """Whether something is so on any rank."""
    mine, anywhere = np.array([here], dtype=np.int8), np.empty(1, dtype=np.int8)
    ranks.comm.Allreduce(mine, anywhere, _mpi().MAX)
    return bool(anywhere[0])


def join(ranks: Ranks, numbers: Any) -> np.ndarray:
    """Some numbers of every rank, one after the other."""
    return np.concatenate(ranks.comm.allgather(numbers))


def memory_for_sum(ranks: Ranks, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `sum_in_order` of such an array needs: about three times its memory."""
    share = -(-x.size // ranks.size)
    return tuple(np.zeros((ranks.size, share), x.dtype) for _ in range(3))  # type: ignore[return-value]


def sum_in_order(ranks: Ranks, x: np.ndarray, memory: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """The sum of the arrays of all ranks, in the order of the ranks: the same bits on every rank and every time."""
    sent, received, joined = memory
    sent.reshape(-1)[: x.size] = x.reshape(-1)
    ranks.comm.Alltoall(sent, received)
    mine = sent[0]
    mine[...] = received.sum(axis=0)
    ranks.comm.Allgather(mine, joined)
    return joined.reshape(-1)[: x.size].reshape(x.shape)


def join_rows(ranks: Ranks, x: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
    """Arrays of so many rows of all ranks, one after the other."""
    mine = np.ascontiguousarray(x)
    joined = np.empty((sum(counts), *mine.shape[1:]), mine.dtype)
    row = _mpi().BYTE.Create_contiguous(mine.dtype.itemsize * int(np.prod(mine.shape[1:]))).Commit()
    ranks.comm.Allgatherv([mine, len(mine), row], [joined, (counts, starts(counts)), row])
    row.Free()
    return joined


def communicator(comm: Any) -> Any:
    """What the user has given, or all ranks."""
    return _mpi().COMM_WORLD if comm is None else comm


def split_in_two(ranks: Ranks, coordinates: tuple[int, int]) -> tuple[Any, Any]:
    """New communicators of the ranks that have the same first of two numbers, and of those that have the same second."""
    first, second = coordinates
    return ranks.comm.Split(first, ranks.rank), ranks.comm.Split(second, ranks.rank)


class Link(NamedTuple):
    """How the arrays of a call travel."""

    ranks: Ranks
    route: Route
    node_size: int  # consecutive ranks; if more than 1, and not all, in two steps
    blocking: bool  # whether exchanges are over when they have started

    @property
    def two_steps(self) -> bool:
        """Whether everything travels within nodes first, and then between them."""
        return 1 < self.node_size < self.ranks.size


def link(ranks: Ranks, queue: Any, *, exchange: str = "auto", node_size: Any = 1, blocking: bool = True) -> Link:
    """The way between ranks for memory of a queue; collective for the first time in two steps, or to find out the node size.

    Raises on all ranks if there is no such way.
    """
    new = Link(ranks, choose_route(queue, exchange), ranks.node_size(node_size), blocking)
    if new.two_steps:
        if new.route.name == "shared":
            raise ValueError(f"exchange='shared' has no second step between nodes: node_size must be 1, not {new.node_size}")
        ranks.steps(new.node_size)
    return new


def shared_memory(ranks: Ranks, queue: Any, bounds: tuple[int, ...], *, known: bool) -> Any:
    """Memory that all ranks share, in segments with these bounds, each with pages near its rank; kept for the next call.

    Collective, unless it is `known` that all ranks have it. Raises on all ranks if it cannot be had on any.
    """
    have = shared(queue, ranks.handle)
    if known:
        return have
    device = "" if queue.sycl_device.is_cpu else queue.sycl_device.name.strip()
    everyone = ranks.comm.allgather((device, have.mark if have else 0, have.nbytes if have else 0))
    for rank, (other, _, _) in enumerate(everyone):
        if other:
            raise NotImplementedError(f"exchange='shared' needs CPU devices: that of rank {rank} is {other}")
    if ranks.node_size("auto") != ranks.size:
        raise NotImplementedError("exchange='shared' needs ranks that share memory: MPI reports several nodes")
    if have and have.nbytes >= bounds[-1] and len(set(everyone)) == 1:
        return have
    drop_shared(queue, ranks.handle)  # free the old one first; and there may be no new one
    file, failure, memory = None, "", None
    if ranks.rank == 0:
        try:
            file = create(bounds[-1])
        except Exception as error:  # other systems than Linux do not have it
            failure = f"{type(error).__name__}: {error}"
    file, mark = ranks.comm.bcast((file, randbits(62)))
    if file is not None:
        try:
            memory = attach(queue, file, mark, *bounds[ranks.rank : ranks.rank + 2])
        except Exception as error:  # the other ranks must hear of it
            failure = f"{type(error).__name__}: {error}"
    failures = ranks.comm.allgather(failure)
    if ranks.rank == 0 and file is not None:
        os.close(file.number)
    for rank, text in enumerate(failures):
        if text:
            raise OSError(f"exchange='shared': rank {rank} cannot share {bounds[-1]} bytes of memory: {text}")
    set_shared(queue, ranks.handle, memory)
    return memory


class Meeting:
    """What takes the place of an all-to-all where ranks share memory: after it, each may read what the others have written."""

    def __init__(self, name: str, comm: Any, nbytes: int) -> None:
        self._comm, self._request = comm, None
        self._stage = stage(name, bytes_sent=nbytes, route="shared", exchange=True)

    def start(self, *, blocking: bool = False) -> None:
        """Tell the others that this rank has written; `blocking`, wait until all have."""
        self._stage.open()
        if blocking:
            self._comm.Barrier()
            self._stage.close()
        else:
            self._request = self._comm.Ibarrier()

    def wait(self) -> None:
        """Wait until all have written; once is enough."""
        request, self._request = self._request, None
        if request is not None:
            request.Wait()
            self._stage.close()


@cache
def most_elements() -> float:
    """The largest count and displacement that the MPI library takes: before MPI 4, they are ints of C."""
    return math.inf if _mpi().Get_version() >= (4, 0) else 2**31 - 1


class ExchangeBuffer:
    """What one rank exchanges with every rank, in blocks of one flat USM array.

    Parameters
    ----------
    array : usm_ndarray or None
        The array; None as long as there is none.
    counts, displacements : tuple of int
        Elements of the block for or from every rank, 0 for this one, and where the blocks start.
    own : slice
        The block that does not travel.
    host : usm_ndarray or None
        A copy of the array in host memory, through which the bytes go.
    """

    def __init__(self, array: Any, counts: tuple[int, ...], displacements: tuple[int, ...], own: slice, host: Any) -> None:
        self._blocks, self.own, self.host = (counts, displacements), own, host
        self.messages, self.elements = sum(count > 0 for count in counts), sum(counts)
        self.use(array)

    def use(self, array: Any) -> None:
        """Have the blocks in this array, or in none."""
        self.array = array
        self.message = None if array is None else self._message()

    def _message(self) -> list[Any]:
        """The blocks as mpi4py takes them. It cannot ask for the memory by itself: dpctl refuses the DLPack stream that it asks
        with. The address does not keep the array alive, this object does."""
        x = self.array if self.host is None else self.host
        # elements, not bytes, are counted: an int holds up to eight times as many
        element = {1: _mpi().INT8_T, 2: _mpi().INT16_T, 4: _mpi().INT32_T, 8: _mpi().INT64_T}[x.dtype.itemsize]
        return [_mpi().buffer.fromaddress(x._pointer, x.nbytes), self._blocks, element]


class AllToAll:
    """One all-to-all: between its start and its end, both arrays are MPI's."""

    def __init__(self, name: str, comm: Any, source: ExchangeBuffer, target: ExchangeBuffer) -> None:
        self._comm, self._source, self._target = comm, source, target
        self._stage = stage(
            name,
            bytes_sent=source.elements * source.array.itemsize,
            messages=source.messages,
            route="device" if source.host is None else "host",
            exchange=True,
        )
        self._request: Any = None
        self._error: Exception | None = None
        self._over = False

    def start(self, *, blocking: bool = False) -> None:
        """Send and receive; `blocking`, until the end."""
        source, target = self._source, self._target
        self._stage.open()
        try:
            with device_turn:
                source.array.sycl_queue.wait()  # MPI knows nothing of queues
                _copy_others(source.array, source.host, source.own)
        except Exception as error:  # the other ranks wait for this one
            self._error = error
        if blocking:
            self._comm.Alltoallv(source.message, target.message)
            self.wait()
        else:
            self._request = self._comm.Ialltoallv(source.message, target.message)

    def wait(self) -> None:
        """Wait for the end; once is enough."""
        if self._over:
            return
        self._over = True
        if self._request is not None:
            self._request.Wait()
        if self._error is not None:
            raise self._error
        with device_turn:
            _copy_others(self._target.host, self._target.array, self._target.own)
        self._stage.close()


class Parcel(NamedTuple):
    """A flat USM array on its way to one rank, or from one."""

    array: Any
    peer: int
    tag: int
    host: Any  # a copy of the array in host memory, through which the bytes go; or None


class Shift:
    """A message to one rank and one from another, either of which there may not be: until the end, the arrays are MPI's."""

    def __init__(self, comm: Any, sent: Parcel | None, received: Parcel | None) -> None:
        self._comm, self._sent, self._received = comm, sent, received
        self._stage = stage(
            "shift",
            bytes_sent=sent.array.nbytes if sent else 0,
            messages=1 if sent else 0,
            route="device" if all(x is None or x.host is None for x in (sent, received)) else "host",
            exchange=True,
        )
        self._requests: list[Any] = []
        self._error: Exception | None = None

    def start(self) -> None:
        """Begin to send and to receive."""
        sent, received = self._sent, self._received
        if sent or received:
            self._stage.open()
        if received:
            self._requests.append(self._comm.Irecv([_bytes(received), _mpi().BYTE], received.peer, received.tag))
        if sent:
            try:
                with device_turn:
                    sent.array.sycl_queue.wait()  # MPI knows nothing of queues
                    _copy_all(sent.array, sent.host)
            except Exception as error:  # the other rank waits for this one
                self._error = error
            self._requests.append(self._comm.Isend([_bytes(sent), _mpi().BYTE], sent.peer, sent.tag))

    def wait(self) -> None:
        """Wait for the end; once is enough."""
        requests, self._requests = self._requests, []
        if not requests:
            return
        _mpi().Request.Waitall(requests)
        if self._error is not None:
            raise self._error
        if self._received:
            with device_turn:
                _copy_all(self._received.host, self._received.array)
        self._stage.close()


def _bytes(parcel: Parcel) -> Any:
    x = parcel.array if parcel.host is None else parcel.host
    return _mpi().buffer.fromaddress(x._pointer, x.nbytes)


def _copy_all(source: Any, target: Any) -> None:
    """Copy a flat array to or from the host; nothing where MPI reaches the device."""
    if source is not None and target is not None:
        target[...] = source
        target.sycl_queue.wait()


def _copy_others(source: Any, target: Any, own: slice) -> None:
    """Copy what travels of flat arrays, to or from the host; nothing where MPI reaches the device."""
    if source is None or target is None:
        return
    for part in (slice(0, own.start), slice(own.stop, None)):
        target[part] = source[part]
    target.sycl_queue.wait()
