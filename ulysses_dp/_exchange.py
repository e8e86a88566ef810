"""The only place that calls MPI: the all-to-all of device memory, and the agreement of all ranks before it."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._arrays import scratch
from ._partition import starts
from ._trace import stage

if TYPE_CHECKING:
    from ._partition import Trade


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
    """The key under which a communicator keeps its private duplicate, which is freed with it."""
    return _mpi().Comm.Create_keyval(delete_fn=lambda comm, key, duplicate: duplicate.Free())


def _private(comm: Any) -> Any:
    """A duplicate for this package alone: collectives of the user that are still under way cannot be taken for ours.

    Made by the first call on a communicator. All ranks are in that call, and the library frees what it keeps at the end.
    """
    duplicate = comm.Get_attr(_keyval())
    if duplicate is None:
        duplicate = comm.Dup()
        comm.Set_attr(_keyval(), duplicate)
    return duplicate


def share_record(comm: Any, record: tuple[int, ...]) -> np.ndarray:
    """The records of all ranks, one row each; all must have the same length."""
    mine = np.array(record, dtype=np.int64)
    everyone = np.empty((comm.size, mine.size), dtype=np.int64)
    comm.Allgather(mine, everyone)
    return everyone


def share_object(comm: Any, thing: Any) -> list[Any]:
    """Any small object of every rank, by pickle: for messages about errors."""
    return comm.allgather(thing)


def to_gathered(comm: Any, route: Route, trade: Trade, local: Any, gathered: Any) -> None:
    """Send the blocks of the flat array `local`, receive those of `gathered`: the rows' split becomes the slots' split."""
    _all_to_all("scatter", comm, route, trade, (local, trade.local_counts), (gathered, trade.gathered_counts))


def to_local(comm: Any, route: Route, trade: Trade, gathered: Any, local: Any) -> None:
    """The exact inverse of `to_gathered`."""
    _all_to_all("gather", comm, route, trade, (gathered, trade.gathered_counts), (local, trade.local_counts))


def _all_to_all(name: str, comm: Any, route: Route, trade: Trade, send: Any, receive: Any) -> None:
    (source, send_counts), (target, receive_counts) = send, receive
    others = [count for peer, count in enumerate(send_counts) if peer != trade.rank and count]
    itemsize = source.dtype.itemsize
    with stage(name, bytes_sent=sum(others) * itemsize, messages=len(others), route=route.name):
        source.sycl_queue.wait()  # MPI knows nothing of queues
        outgoing, incoming = source, target
        if route.name == "host":
            outgoing = scratch(source.sycl_queue, "host outgoing", source.shape, source.dtype, "host")
            incoming = scratch(target.sycl_queue, "host incoming", target.shape, target.dtype, "host")
            if source.size:
                source.sycl_queue.memcpy(outgoing.usm_data, source.usm_data, source.nbytes)
        # elements, not bytes, are counted: an int holds two to eight times as many
        element = {2: _mpi().INT16_T, 4: _mpi().INT32_T, 8: _mpi().INT64_T}[itemsize]
        if trade.even:
            comm.Alltoall([_buffer(outgoing), send_counts[0], element], [_buffer(incoming), receive_counts[0], element])
        else:
            comm.Alltoallv(
                [_buffer(outgoing), (send_counts, starts(send_counts)), element],
                [_buffer(incoming), (receive_counts, starts(receive_counts)), element],
            )
        if route.name == "host" and target.size:
            target.sycl_queue.memcpy(target.usm_data, incoming.usm_data, target.nbytes)


def _buffer(x: Any) -> Any:
    """The memory of a contiguous USM array as mpi4py takes it. mpi4py cannot ask for it by itself: dpctl refuses the DLPack
    stream that it asks with. The address does not keep the array alive, the caller does."""
    return _mpi().buffer.fromaddress(x._pointer, x.nbytes)
