"""The agreement of all ranks: on the arguments before a call sends anything, on its memory, and on its outcome.

A bad argument, a lack of memory or a failure of the computation on one rank raises the same exception on every rank, and the
communicator stays usable. Before anything is sent, the ranks exchange one small record each: whether the checks passed, a
digest of what must be the same everywhere, the rows of this rank, and a digest of the last call. Where all ranks made this very
call the last time, they have the memory for it; otherwise they get it and exchange whether they did. From there on every rank
takes part in all exchanges of the call, whatever fails on it, and the ranks exchange at the end whether something did.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from .._device.trace import stage
from .._device.workspace import evictions, prepared, set_prepared
from . import mpi

if TYPE_CHECKING:
    from collections.abc import Callable

# what a call may raise; anything else arrives as a RuntimeError, since its constructor may want more than a message
_EXCEPTIONS = {e.__name__: e for e in (TypeError, ValueError, NotImplementedError, MemoryError, ImportError)}
_T = TypeVar("_T")
_SIZES = 2  # the most sizes that a call needs: the record of a rank has a fixed length


class Agreement(NamedTuple, Generic[_T]):
    """What came of the checks of all ranks."""

    sizes: list[tuple[int, ...]]  # the sizes of every rank
    result: _T  # of the checks of this rank
    call: tuple[int, Any]  # its digest, the same on all ranks, and the place of this rank's memory
    repeated: bool  # whether all ranks have the memory of the same call


class Checked(NamedTuple, Generic[_T]):
    """What the checks of one rank found."""

    sizes: tuple[int, ...]  # at most two that may differ between ranks
    common: dict[str, Any]  # by name, what must be the same on all ranks
    result: _T  # for this rank
    place: Any  # what else the memory of this rank depends on: its queue, its route


def agree(comm: Any, function: str, check: Callable[[], Checked[_T]]) -> Agreement[_T]:
    """Run the checks of this rank and let all ranks agree on the outcome. Collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks of the call.
    function : str
        Name of the public function, for messages; ranks that call different functions disagree.
    check : callable
        Runs the checks of this rank.

    Returns
    -------
    Agreement

    Raises
    ------
    TypeError, ValueError, NotImplementedError, MemoryError, ImportError
        On every rank the same: what `check` raised on the lowest rank where it did, or what the ranks disagree on.
    """
    error: Exception | None = None
    with stage("agree"):
        try:
            sizes, common, result, place = check()
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            if comm.size == 1:
                raise _as_ours(f"{function}: {caught}", caught) from caught
            error, sizes, common, place = caught, (), {}, None
        if comm.size == 1:
            return Agreement([sizes], result, (0, None), True)
        common = {"function": function} | {name: str(value) for name, value in common.items()}
        last_call, last_place = prepared((comm.handle, function))
        last_call *= last_place == place
        record = (error is not None, _digest(repr(common).encode()), *sizes, *(_SIZES - len(sizes)) * (0,), last_call)
        records = mpi.share_record(comm, record)
    if records[:, 0].any() or (records[:, 1] != records[0, 1]).any():
        _raise_everywhere(comm, function, error, common)
    call = _digest(records[:, :-1].tobytes())
    everyone = [tuple(map(int, record[2 : 2 + len(sizes)])) for record in records]
    return Agreement(everyone, result, (call, place), bool((records[:, -1] == call).all()))


class Course:
    """The steps of one collective call on this rank, after the agreement: a step that fails must not keep others waiting."""

    def __init__(self, comm: Any, function: str) -> None:
        self._comm, self._function = comm, function
        self._error: Exception | None = None

    def prepare(self, agreement: Agreement[Any], allocate: Callable[[], _T], *, fresh: bool = False) -> _T:
        """Get the memory without which this rank cannot take part in the exchanges; raises on all ranks, or on none.

        `fresh` says that some of it is new in every call.
        """
        if agreement.repeated and not fresh:
            return allocate()
        before = evictions()
        with stage("prepare"):
            result = self.run(allocate)
        self.confirm()
        if evictions() == before:  # otherwise the next call has to ask for memory again
            set_prepared((self._comm.handle, self._function), agreement.call)
        return result  # type: ignore[return-value]  # all ranks have it, or confirm has raised

    def run(self, step: Callable[..., _T], *arguments: Any, **options: Any) -> _T | None:
        """Run a step, unless one failed before."""
        if self._error is None:
            try:
                return step(*arguments, **options)
            except Exception as caught:  # the other ranks wait for this one in an exchange
                self._error = caught
        return None

    def share(self, exchange: Callable[[], object]) -> None:
        """Take part in an exchange, whatever failed before."""
        try:
            exchange()
        except Exception as caught:
            self._error = self._error or caught

    def confirm(self) -> None:
        """Raise on all ranks what a step raised on the lowest rank where one did. Collective."""
        with stage("confirm"):
            failed = mpi.any_rank(self._comm, self._error is not None)
        if failed:
            _raise_everywhere(self._comm, self._function, self._error, {})


def _as_ours(message: str, error: Exception) -> Exception:
    return _EXCEPTIONS.get(type(error).__name__, RuntimeError)(message)


def _raise_everywhere(comm: Any, function: str, error: Exception | None, common: dict[str, str]) -> None:
    """Raise the error of the lowest rank that has one, or say what differs; the same on every rank."""
    verdicts = mpi.share_object(comm, (type(error).__name__, str(error), common) if error else (None, "", common))
    for rank, (name, message, _) in enumerate(verdicts):
        if name is not None:
            raise _EXCEPTIONS.get(name, RuntimeError)(f"{function}: rank {rank}: {message}") from error
    for name in dict.fromkeys(name for _, _, theirs in verdicts for name in theirs):
        values: dict[str, list[int]] = {}
        for rank, (_, _, theirs) in enumerate(verdicts):
            values.setdefault(theirs.get(name, "nothing"), []).append(rank)
        if len(values) > 1:
            given = ", ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in values.items())
            raise ValueError(f"{function}: {name} must be the same on all ranks, not {given}")


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=7).digest(), "little")
