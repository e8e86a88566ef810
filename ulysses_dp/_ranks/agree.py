"""The agreement of all ranks: on the arguments before a call sends anything, on its memory, and on its outcome.

A bad argument, a lack of memory or a failure of the computation on one rank raises the same exception on every rank, and the
communicator stays usable. Before anything is sent, the ranks exchange one small record each: whether the checks passed, a
digest of what must be the same everywhere, the rows of this rank, and a digest of the last call. Where all ranks made this very
call the last time, they have the memory for it; otherwise they get it and exchange whether they did. From there on every rank
takes part in all exchanges of the call, whatever fails on it, and the ranks exchange at the end whether something did.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from .._device.queue import device_turn
from .._device.trace import stage
from .._device.workspace import evictions, prepared, set_prepared
from . import mpi

if TYPE_CHECKING:
    from collections.abc import Callable

# what a call may raise; anything else arrives as a RuntimeError, since its constructor may want more than a message
_EXCEPTIONS = {e.__name__: e for e in (TypeError, ValueError, NotImplementedError, MemoryError, ImportError, OSError)}
_T = TypeVar("_T")
_SIZES = 2  # the most sizes that a call needs: the record of a rank has a fixed length
_LONGEST = 2000  # characters of a text that travels: what a user passes may have a text of any length


class CallKey(NamedTuple):
    """By what a rank knows a call for which it has the memory."""

    digest: int  # the same on all ranks
    memory: Any  # what else the memory of this rank depends on: its queue, its route


@dataclass(frozen=True)  # Python 3.10 has no generic NamedTuple
class Agreement(Generic[_T]):
    """What came of the checks of all ranks."""

    sizes: list[tuple[int, ...]]  # the sizes of every rank
    result: _T  # of the checks of this rank
    key: CallKey
    repeated: bool  # whether all ranks have the memory of the same call


@dataclass(frozen=True)
class Checked(Generic[_T]):
    """What the checks of one rank found."""

    sizes: tuple[int, ...]  # at most two that may differ between ranks
    common: dict[str, Any]  # by name, what must be the same on all ranks
    result: _T  # for this rank
    memory_key: Any  # see `CallKey`


class _Failure(NamedTuple):
    """What another rank is told of an exception: the name of its type here, and its message."""

    name: str
    message: str


def agree(ranks: mpi.Ranks, function: str, check: Callable[[], Checked[_T]]) -> Agreement[_T]:
    """Run the checks of this rank and let all ranks agree on the outcome. Collective.

    Parameters
    ----------
    ranks : Ranks
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
            found = check()
            sizes, result, memory_key = found.sizes, found.result, found.memory_key
            texts = {"function": function} | {name: _text(value) for name, value in found.common.items()}
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            if ranks.size == 1:
                raise _as_ours(function, _describe(caught)) from caught
            error, sizes, texts, memory_key = caught, (), {"function": function}, None
        if ranks.size == 1:
            return Agreement([sizes], result, CallKey(0, None), True)
        last_digest, last_memory = prepared((ranks.handle, function))
        if last_memory != memory_key:
            last_digest = 0
        failed = 0 if error is None else 1
        record = (failed, _digest(repr(texts)), *sizes, *(_SIZES - len(sizes)) * (0,), last_digest)
        records = mpi.share_record(ranks, record)
    if records[:, 0].any() or (records[:, 1] != records[0, 1]).any():
        _raise_everywhere(ranks, function, error, texts)
    key = CallKey(_number(records[:, :-1].tobytes()), memory_key)
    everyone = [tuple(map(int, record[2 : 2 + len(sizes)])) for record in records]
    return Agreement(everyone, result, key, bool((records[:, -1] == key.digest).all()))


class CollectiveCall:
    """The steps of one collective call on this rank, after the agreement: a step that fails must not keep others waiting."""

    def __init__(self, ranks: mpi.Ranks, function: str) -> None:
        self._ranks, self._function = ranks, function
        self._error: Exception | None = None

    def prepare(self, agreement: Agreement[Any], allocate: Callable[[], _T], *, fresh: bool = False) -> _T:
        """Get the memory without which this rank cannot take part in the exchanges; raises on all ranks, or on none.

        `fresh` says that some of it is new in every call.
        """
        if agreement.repeated and not fresh:
            return allocate()
        before = evictions()
        with stage("prepare"):
            result = self.local(allocate)
        self.confirm()
        if evictions() == before:  # otherwise the next call has to ask for memory again
            set_prepared((self._ranks.handle, self._function), agreement.key)
        return result  # type: ignore[return-value]  # all ranks have it, or confirm has raised

    def local(self, step: Callable[..., _T], *arguments: Any) -> _T | None:
        """Do what this rank does alone, unless something failed before."""
        if self._error is None:
            try:
                with device_turn:
                    return step(*arguments)
            except Exception as caught:  # the other ranks wait for this one in an exchange
                self._error = caught
        return None

    def exchange(self, step: Callable[[], object]) -> None:
        """Take part in what all ranks do together, whatever failed before."""
        try:
            step()
        except Exception as caught:
            self._error = self._error or caught

    def confirm(self) -> None:
        """Raise on all ranks what a step raised on the lowest rank where one did. Collective."""
        with stage("confirm"):
            failed = mpi.any_rank(self._ranks, self._error is not None)
        if failed:
            _raise_everywhere(self._ranks, self._function, self._error, {})


def on_all_ranks(ranks: mpi.Ranks, function: str, step: Callable[[], _T]) -> _T:
    """Do something on this rank; raise on all ranks if it fails on any. Collective."""
    call = CollectiveCall(ranks, function)
    result = call.local(step)
    call.confirm()
    return result  # type: ignore[return-value]  # all ranks have it, or confirm has raised


def _describe(error: Exception) -> _Failure:
    """How the other ranks hear of an exception: with its type, if that is not one that a call raises, and its text."""
    name = next((base.__name__ for base in type(error).__mro__ if _EXCEPTIONS.get(base.__name__) is base), "")
    try:
        text = _shorten(_text(error))
    except Exception as second:
        text = f"its text cannot be made: {type(second).__name__}"
    if name != type(error).__name__:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return _Failure(name, text)


def _as_ours(prefix: str, failure: _Failure) -> Exception:
    return _EXCEPTIONS.get(failure.name, RuntimeError)(f"{prefix}: {failure.message}")


def _raise_everywhere(ranks: mpi.Ranks, function: str, error: Exception | None, texts: dict[str, str]) -> None:
    """Raise the error of the lowest rank that has one, or say what differs; the same on every rank."""
    shortened = {name: _shorten(text) for name, text in texts.items()}
    verdicts = mpi.share_object(ranks, (_describe(error) if error else None, shortened))
    for rank, (failure, _) in enumerate(verdicts):
        if failure is not None:
            raise _as_ours(f"{function}: rank {rank}", failure) from error
    for name in dict.fromkeys(name for _, theirs in verdicts for name in theirs):
        values: dict[str, list[int]] = {}
        for rank, (_, theirs) in enumerate(verdicts):
            values.setdefault(theirs.get(name, "nothing"), []).append(rank)
        if len(values) > 1:
            given = ", ".join(f"{value} on rank {', '.join(map(str, whose))}" for value, whose in values.items())
            raise ValueError(f"{function}: {name} must be the same on all ranks, not {given}")


def _text(thing: Any) -> str:
    """The text of anything, as a plain str: a class of the user's might not survive the way."""
    return str.__str__(str(thing))


def _shorten(text: str) -> str:
    """A text of limited length, which texts that differ keep different."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}… ({len(text)} characters with digest {_digest(text):x})"


def _digest(text: str) -> int:
    return _number(text.encode(errors="surrogatepass"))


def _number(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=7).digest(), "little")
