"""The device memory that calls use again and again: what they compute in, and what earlier results gave back."""

from __future__ import annotations

import math
import os
import sys
from collections import OrderedDict, deque
from threading import local
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet, ref

import numpy as np

from ulysses_dp.kernels.launch import free_uploads
from ulysses_dp.kernels.relayout import free_tables

from .arrays import tensor, usm_array
from .queue import default_queue
from .trace import note

if TYPE_CHECKING:
    from collections.abc import Callable

    _Cached = TypeVar("_Cached", bound=Any)

POOLED_RESULTS = 8
POOLED_SHARE = 4  # of the limit, this part may be memory of results
SHARED = "shared"  # the slot of what ranks share
ALIGNMENT = 8  # bytes: a whole number of elements of any dtype
LIMIT = "ULYSSES_DP_WORKSPACE"  # bytes that a thread keeps; by default a quarter of the device's memory


class _Store:
    """What one thread keeps."""

    def __init__(self) -> None:
        # scratch by owner, queue and slot, the least recently used first
        self.memories: OrderedDict[tuple[int, Any, str], Any] = OrderedDict()
        self.results: list[tuple[Any, Any]] = []  # of results, in use or given back, with what they are good for
        self.evictions = 0
        self.seen: dict[Any, deque[ref[Any]]] = {}  # by queue: the last arrays of the user and results
        self.prepared: dict[tuple[int, str], Any] = {}  # by owner and function: what the last call has left


_this_thread = local()
_stores: WeakSet[_Store] = WeakSet()
_caches: list[Callable[[], object]] = [free_uploads, free_tables]  # what `free_workspace` clears, too


def freed_with_workspace(cached: _Cached) -> _Cached:
    """Let `free_workspace` clear the cache of a function, made by `functools.lru_cache`."""
    _caches.append(cached.cache_clear)
    return cached


def _store() -> _Store:
    try:
        return _this_thread.store
    except AttributeError:
        _this_thread.store = store = _Store()
        _stores.add(store)
        return store


def scratch(queue: Any, slot: str, shape: tuple[int, ...], dtype: Any, usm_type: str = "device", *, owner: int = 0) -> Any:
    """An uninitialised USM array that is this thread's until it asks for the same slot of the same queue and owner again.

    MPI libraries cache what they learn about a buffer, and fresh device memory has to be mapped page by page: using the same
    memory in every call saves both. The owner is a communicator, with which its memory goes, or 0.
    """
    memories = _store().memories
    nbytes = max(math.prod(shape), 1) * dtype.itemsize
    key = owner, queue, slot
    if key in memories and memories[key].nbytes >= nbytes:
        memories.move_to_end(key)
    else:
        if memories.pop(key, None) is not None and owner:  # free the old one first, and what calls have made with it
            _store().prepared.clear()
        _leave_queues(queue)
        # dpctl takes no memory for an array of which it does not hold a whole number of elements
        memories[key] = _allocate(queue, -(-nbytes // ALIGNMENT) * ALIGNMENT, usm_type)
        _bound(queue)
    return usm_array(memories[key], shape, dtype)


def _leave_queues(queue: Any) -> None:
    """Let go of the memory of other queues of which no array is left: nobody will call with them again.

    Python cannot be asked whether a queue is still in use: dpctl itself keeps every queue that it has worked with.
    """
    store, mine = _store(), (queue, default_queue())
    queues = {key[1] for key in store.memories} | {key[0] for key, _ in store.results}
    gone = [x for x in queues if x not in mine and not any(array() is not None for array in store.seen.get(x, ()))]
    for left in gone:
        store.seen.pop(left, None)
        store.results = [entry for entry in store.results if entry[0][0] != left]
        for key in [key for key in store.memories if key[1] == left]:
            del store.memories[key]
    if gone:
        store.prepared.clear()


def _see(queue: Any, *arrays: Any) -> None:
    """Remember that there are these arrays on a queue, for as long as they are there."""
    seen = _store().seen.setdefault(queue, deque(maxlen=POOLED_RESULTS))
    seen.extend(map(ref, arrays))


def _allocate(queue: Any, nbytes: int, usm_type: str) -> Any:
    note(allocations=1)
    try:
        return tensor.empty(nbytes, dtype="u1", usm_type=usm_type, sycl_queue=queue).usm_data
    except Exception as error:  # dpctl has an exception of its own for this
        raise MemoryError(f"the device {queue.sycl_device.name.strip()} has no {nbytes} bytes of {usm_type} memory") from error


def _bound(queue: Any) -> None:
    """Let go of what was not used for the longest time, above the limit. What the current call still uses lives on with it."""
    store = _store()
    while len(store.memories) > 1 and sum(memory.nbytes for memory in store.memories.values()) > _limit(queue):
        store.memories.popitem(last=False)
        store.prepared.clear()
        store.evictions += 1


def kept(queue: Any, slot: str, make: Callable[[], Any]) -> Any:
    """The USM array that `make` returned for this slot of a queue; like scratch memory, it may be let go and made again."""
    memories, key = _store().memories, (0, queue, slot)
    if key not in memories:
        memories[key] = make()
        _bound(queue)
    memories.move_to_end(key)
    return memories[key]


def _limit(queue: Any) -> int:
    wish = os.environ.get(LIMIT, "")
    if wish and not wish.isdigit():
        raise ValueError(f"{LIMIT} must be a number of bytes, not {wish!r}")
    return int(wish) if wish else queue.sycl_device.global_mem_size // 4


def shared(queue: Any, owner: int) -> Any:
    """The memory that this thread shares with the other ranks of a communicator, or None."""
    memories, key = _store().memories, (owner, queue, SHARED)
    if key in memories:
        memories.move_to_end(key)
    return memories.get(key)


def set_shared(queue: Any, owner: int, memory: Any) -> None:
    """Keep memory that ranks share."""
    note(allocations=1)
    _store().memories[owner, queue, SHARED] = memory
    _bound(queue)


def drop_shared(queue: Any, owner: int) -> None:
    """Let go of memory that ranks share: no earlier call has all its memory any more."""
    store = _store()
    store.memories.pop((owner, queue, SHARED), None)
    store.prepared.clear()


def prepared(key: tuple[int, str]) -> Any:
    """What the last call of a function on a communicator has left, if this thread has all memory of it, or None."""
    return _store().prepared.get(key)


def evictions() -> int:
    """How often this thread has let go of memory above the limit."""
    return _store().evictions


def set_prepared(key: tuple[int, str], left: Any) -> None:
    """Keep what a call of a function on a communicator leaves, for which there is all memory."""
    _store().prepared[key] = left


def _references(entry: tuple[Any, Any]) -> int:
    """How many references there are to the memory of an entry of the pool, as Python counts them."""
    memory = entry[1]
    return sys.getrefcount(memory)


# Measured, because versions of Python differ in whether a local variable and an argument count.
_REFERENCES_OF_POOL = _references((None, object()))


def empty_like(x: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """A new, uninitialised USM array with the queue, kind of USM memory and, if none is given, dtype of x.

    It may get memory that an earlier result gave back: fresh memory is mapped page by page on first use, which took two fifths
    of the time of a short call of attention, and two thirds of that of a long exchange. Memory is given back when nothing but
    the pool refers to it any more. Work of the queue that still reads it is no danger: it is waited for before anything is
    launched.
    """
    dtype = np.dtype(dtype or x.dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = _given_back((x.sycl_queue, x.usm_type, nbytes)) or _new_result(x.sycl_queue, x.usm_type, nbytes)
    result = usm_array(memory, shape, dtype)
    _see(x.sycl_queue, x, result)
    return result


def _given_back(key: tuple[Any, str, int]) -> Any:
    """Memory for a result like this that an earlier one gave back, or None."""
    pool = _store().results
    for place, entry in enumerate(pool):
        if entry[0] == key and _references(entry) == _REFERENCES_OF_POOL:
            pool.append(pool.pop(place))  # the least recently used one is dropped first
            return entry[1]
    return None


def _new_result(queue: Any, usm_type: str, nbytes: int) -> Any:
    """New memory for a result, which the pool will know."""
    _leave_queues(queue)
    memory = _allocate(queue, max(nbytes, 1), usm_type)
    pool = _store().results
    if nbytes:
        pool.append(((queue, usm_type, nbytes), memory))
        while len(pool) > POOLED_RESULTS or POOLED_SHARE * sum(size for (_, _, size), _ in pool) > _limit(queue):
            pool.pop(0)
    return memory


def release(owner: int) -> None:
    """Give back the memory of a communicator, in all threads."""
    for store in list(_stores):
        for prepared_key in [key for key in store.prepared if key[0] == owner]:
            store.prepared.pop(prepared_key, None)
        for key in [key for key in store.memories if key[0] == owner]:
            store.memories.pop(key, None)


def free_workspace() -> None:
    """Give back the device memory that is kept for later calls: buffers of this thread, and tables that threads share.

    Not collective. Calls keep their buffers for the next call on the same communicator and queue, until the communicator is
    freed. They are as large as the largest call so far needed, but not more than ``ULYSSES_DP_WORKSPACE`` bytes in all: an
    environment variable, by default a quarter of the device's memory. Calls also keep the memory of up to eight results, a
    quarter as much at most, to use it again after these are gone. Small tables on the device are for all threads. The next
    call allocates anew.

    Examples
    --------
    >>> import ulysses_dp
    >>> ulysses_dp.free_workspace()
    """
    store = _store()
    store.memories.clear()
    store.results.clear()
    store.prepared.clear()
    store.seen.clear()
    for clear in _caches:
        clear()
