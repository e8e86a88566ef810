"""Memory that processes of one node share, as USM memory of a CPU device.

What a kernel reads and writes there is memory of the host, but dpctl makes arrays of USM memory only, and backends want arrays.
So the pages of a USM allocation are replaced by those of a file that has no name, which every process maps in the same way:
nothing else has to know that the memory is shared. Before the allocation is freed, it gets pages of its own again.

Every process lets go of its mapping when it likes, and the pages go with the last one. A window of MPI would have to be freed
by all ranks together, but `free_workspace` and the bound of the workspace are matters of one rank. Memory of GPUs that
processes share, which dpctl 0.23 announces, would be a second class like this one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dpctl.memory import MemoryUSMDevice

if TYPE_CHECKING:
    from collections.abc import Callable

_MAP_FIXED = 0x10  # of Linux, which Python does not name


@cache
def _map() -> Any:
    """The function of the C library, which Python gives no address. Only Linux has all that is needed here."""
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    return function


class SharedFile(NamedTuple):
    """An open file of another process, and how to see that it is the right one."""

    process: int
    number: int
    identity: tuple[int, int, int]  # device, inode, bytes


def create(nbytes: int) -> SharedFile:
    """A file in memory; the caller closes its number when all processes have opened it."""
    number = os.memfd_create("ulysses_dp")
    os.ftruncate(number, nbytes)
    return SharedFile(os.getpid(), number, _identity(number))


def _identity(number: int) -> tuple[int, int, int]:
    status = os.fstat(number)
    return status.st_dev, status.st_ino, status.st_size


class SharedMemory(MemoryUSMDevice):
    """A USM allocation with pages of a shared file. Made by `attach`: the constructor is dpctl's."""

    mark = 0  # the same in all processes that share it, and in no other memory
    own_pages: Callable[[], object] | None = None  # gives them back, where they were replaced

    def __del__(self) -> None:
        if self.own_pages is not None:
            self.own_pages()


def attach(queue: Any, file: SharedFile, mark: int, first: int, last: int) -> SharedMemory:
    """Map all of a file. Its bytes from `first` to `last` get pages near this process, or `OSError` says that there are none:
    without that, the first write would end the process."""
    number = os.open(f"/proc/{file.process}/fd/{file.number}", os.O_RDWR)
    try:
        if _identity(number) != file.identity:
            raise OSError(f"process {file.process} is another one here: the ranks do not see the same processes")
        if last > first:
            os.posix_fallocate(number, first, last - first)
        memory = SharedMemory(file.identity[2], alignment=mmap.PAGESIZE, queue=queue)
        if memory._pointer % mmap.PAGESIZE:
            raise OSError("SYCL gives no memory that starts with a page")
        pages = memory._pointer, memory.nbytes, mmap.PROT_READ | mmap.PROT_WRITE
        if _map()(*pages, mmap.MAP_SHARED | _MAP_FIXED, number, 0) != memory._pointer:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        memory.own_pages = partial(_map(), *pages, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1, 0)
    finally:
        os.close(number)
    memory.mark = mark
    return memory
