"""The only place that calls MPI: the all-to-all of device memory, and the agreement of all ranks before it."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._device.queue import local_rank
from .._device.trace import stage
from .._device.workspace import release


@cache
def _mpi() -> Any:
    """`mpi4py.MPI`, imported late: it starts MPI, which `attention` on one rank does not need."""
    from mpi4py import MPI

    return MPI


def library_version() -> str:
    """Name and version of the MPI library in one line, or why there is none."""
    try:
        version = _mpi().Get_library_version().replace("\0", "").strip()
    except (ImportError, RuntimeError) as error:
        return f"none found: {error}. Install one, for instance with pip install 'ulysses_dp[mpi]'"
    return " ".join(version.splitlines()[0].split())


class Route(NamedTuple):
    """How the bytes reach MPI."""

    name: str  # "device": MPI is given USM pointers; "host": through pinned host memory
    reason: str


def choose_route(queue: Any, exchange: str) -> Route:
    """How MPI reaches device memory of this queue; `exchange` is the user's wish: "auto", "device" or "host"."""
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


def gather_text(text: str) -> str:
    """The texts of all processes on rank 0, an empty string elsewhere; this text alone where there is no MPI."""
    try:
        world = _mpi().COMM_WORLD
    except (ImportError, RuntimeError):
        return text
    if world.size == 1:
        return text
    texts = world.gather(text)
    return "\n\n".join(f"rank {rank}\n{x}" for rank, x in enumerate(texts)) if texts else ""


def resolve_comm(function: str, comm: Any, name: str = "comm") -> Any:
    """The communicator to use, with the same ranks; raises on this rank alone: without one, no other rank can be told."""
    mpi = _mpi()
    if comm is None:
        return _private(mpi.COMM_WORLD)
    if not isinstance(comm, mpi.Comm):
        raise TypeError(f"{function}: {name} must be an mpi4py communicator or None, not {type(comm).__name__}")
    if comm == mpi.COMM_NULL:
        raise ValueError(f"{function}: {name} is MPI.COMM_NULL: it was freed, or this process is not a member")
    if comm.Is_inter():
        raise ValueError(f"{function}: {name} is an intercommunicator; an intracommunicator is expected")
    return _private(comm)


@cache
def _keyval() -> int:
    """The key under which a communicator keeps its private duplicate, which is freed with it, and so is its memory."""

    def free(comm: Any, key: int, duplicate: Any) -> None:
        release(duplicate.handle)
        _node_sizes.pop(duplicate.handle, None)
        for part in _levels.pop(duplicate.handle, {}).values():
            for piece in part:
                piece.Free()
        duplicate.Free()

    return _mpi().Comm.Create_keyval(delete_fn=free)


def _private(comm: Any) -> Any:
    """A duplicate for this package alone: collectives of the user that are still under way cannot be taken for ours.

    Made by the first call on a communicator. All ranks are in that call, and the library frees what it keeps at the end.
    """
    duplicate = comm.Get_attr(_keyval())
    if duplicate is None:
        duplicate = comm.Dup()
        comm.Set_attr(_keyval(), duplicate)
    return duplicate


# by the handle of a private duplicate, and by the size of a node
_levels: dict[int, dict[int, tuple[Any, Any]]] = {}
_node_sizes: dict[int, int] = {}


def _levels_of(comm: Any, node_size: int) -> tuple[Any, Any]:
    known = _levels.setdefault(comm.handle, {})
    if node_size not in known:
        known[node_size] = comm.Split(comm.rank // node_size, comm.rank), comm.Split(comm.rank % node_size, comm.rank)
    return known[node_size]


def _ranks_per_node(comm: Any) -> int:
    """How many consecutive ranks share memory, if that is the same for all nodes, or 1; collective for the first time."""
    if comm.handle in _node_sizes:
        return _node_sizes[comm.handle]
    node = comm.Split_type(_mpi().COMM_TYPE_SHARED, comm.rank)
    first, size = node.bcast(comm.rank), node.size
    node.Free()
    everywhere = comm.allgather((size, first))
    regular = all(n == size and start == rank // size * size for rank, (n, start) in enumerate(everywhere))
    _node_sizes[comm.handle] = size if regular else 1
    return _node_sizes[comm.handle]


def ordered(comm: Any) -> Any:
    """A new communicator with the ranks of each node, and of each device of it, one after the other."""
    node = comm.Split_type(_mpi().COMM_TYPE_SHARED, comm.rank)
    on_node = local_rank()
    first = node.allreduce(comm.rank, _mpi().MIN)  # the number of the node, by its lowest rank
    places = comm.allgather((first, on_node, comm.rank))
    node.Free()
    return comm.Split(0, sorted(places).index(places[comm.rank]))


def share_record(comm: Any, record: tuple[int, ...]) -> np.ndarray:
    """The records of all ranks, one row each; all must have the same length."""
    mine = np.array(record, dtype=np.int64)
    everyone = np.empty((comm.size, mine.size), dtype=np.int64)
    comm.Allgather(mine, everyone)
    return everyone


def share_object(comm: Any, thing: Any) -> list[Any]:
    """Any small object of every rank, by pickle: for messages about errors."""
    return comm.allgather(thing)


def meet(comm: Any) -> int:
    """Wait for all ranks; returns the number of this one."""
    comm.Barrier()
    return int(comm.rank)


def any_rank(comm: Any, here: bool) -> bool:
    """Whether something is so on any rank."""
    mine, anywhere = np.array([here], dtype=np.int8), np.empty(1, dtype=np.int8)
    comm.Allreduce(mine, anywhere, _mpi().MAX)
    return bool(anywhere[0])


def join(comm: Any, numbers: Any) -> np.ndarray:
    """Some numbers of every rank, one after the other."""
    return np.concatenate(comm.allgather(numbers))


class Wire(NamedTuple):
    """How arrays travel."""

    comm: Any
    route: Route
    blocking: bool  # whether exchanges are over when they have started
    node_size: int  # consecutive ranks
    levels: tuple[Any, ...]  # for two steps: the ranks of this node, and those with the number of this one on their nodes


def wire(comm: Any, route: Route, node_size: Any, *, blocking: bool = True) -> Wire:
    """The ways between ranks; collective for the first time if it is in two steps, or to find out the size of a node."""
    size = _ranks_per_node(comm) if node_size == "auto" else node_size
    return Wire(comm, route, blocking, size, _levels_of(comm, size) if 1 < size < comm.size else ())


class Side(NamedTuple):
    """What one rank exchanges with every rank, in blocks of one flat USM array."""

    array: Any
    counts: tuple[int, ...]  # elements of the block for or from every rank; 0 for this one
    places: tuple[int, ...]  # where the blocks start
    own: slice  # the block that does not travel
    host: Any  # a copy of the array in host memory, through which the bytes go; or None


class AllToAll:
    """One all-to-all: between its start and its end, both arrays are MPI's."""

    def __init__(self, name: str, comm: Any, source: Side, target: Side) -> None:
        self._comm, self._source, self._target = comm, source, target
        self._itemsize = itemsize = source.array.dtype.itemsize
        self._stage = stage(
            name,
            bytes_sent=sum(source.counts) * itemsize,
            messages=sum(count > 0 for count in source.counts),
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
            source.array.sycl_queue.wait()  # MPI knows nothing of queues
            _copy_others(source.array, source.host, source.own)
        except Exception as error:  # the other ranks wait for this one
            self._error = error
        # elements, not bytes, are counted: an int holds two to eight times as many
        element = {2: _mpi().INT16_T, 4: _mpi().INT32_T, 8: _mpi().INT64_T}[self._itemsize]
        send, receive = ([_buffer(side), (side.counts, side.places), element] for side in (source, target))
        if blocking:
            self._comm.Alltoallv(send, receive)
            self.wait()
        else:
            self._request = self._comm.Ialltoallv(send, receive)

    def wait(self) -> None:
        """Wait for the end; once is enough."""
        if self._over:
            return
        self._over = True
        if self._request is not None:
            self._request.Wait()
        if self._error is not None:
            raise self._error
        _copy_others(self._target.host, self._target.array, self._target.own)
        self._stage.close()


def _copy_others(source: Any, target: Any, own: slice) -> None:
    """Copy what travels of flat arrays, to or from the host; nothing where MPI reaches the device."""
    if source is None or target is None:
        return
    for part in (slice(0, own.start), slice(own.stop, None)):
        target[part] = source[part]
    target.sycl_queue.wait()


def _buffer(side: Side) -> Any:
    """The memory of a contiguous USM array as mpi4py takes it. mpi4py cannot ask for it by itself: dpctl refuses the DLPack
    stream that it asks with. The address does not keep the array alive, the caller does."""
    x = side.array if side.host is None else side.host
    return _mpi().buffer.fromaddress(x._pointer, x.nbytes)
