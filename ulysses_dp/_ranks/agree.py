"""The agreement of all ranks: on the arguments before a call sends anything, on its memory, and on its outcome.

A bad argument, a lack of memory or a failure of the computation on one rank raises the same exception on every rank, and the
communicator stays usable. Before anything is sent, the ranks exchange one small record each: whether the checks passed, a
digest of what must be the same everywhere, the rows of this rank, and a digest of the last call if it was this one and there is
memory for it again. Where all ranks made this very call the last time, they take what that has left; otherwise they get memory
and exchange whether they did. From there on every rank takes part in all exchanges of the call, whatever fails on it, and the
ranks exchange at the end whether something did.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from .._device.queue import device_turn
from .._device.trace import stage
from .._device.workspace import evictions, prepared, set_prepared
from . import mpi

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

# what a call may raise; anything else arrives as a RuntimeError, since its constructor may want more than a message
_EXCEPTIONS = {e.__name__: e for e in (TypeError, ValueError, NotImplementedError, MemoryError, ImportError, OSError)}
_T = TypeVar("_T")
_SIZES = 2  # the most sizes that a call needs: the record of a rank has a fixed length
_LONGEST = 2000  # characters of a text that travels: what a user passes may have a text of any length


class Common:
    """What must be the same on all ranks in a call of a function, by name. A call that is repeated may keep it."""

    def __init__(self, function: str, values: dict[str, Any]) -> None:
        self._values = {"function": function} | values

    @cached_property
    def texts(self) -> dict[str, str]:
        """What the ranks compare."""
        return {name: _text(value) for name, value in self._values.items()}

    @cached_property
    def digest(self) -> int:
        """A short number for it."""
        return _digest(repr(self.texts))


class Prepared(NamedTuple):
    """What a call has left for the next one like it."""

    record: tuple[int, ...]  # of this rank, but for its end
    memory_key: Any
    records: bytes  # of all ranks if these repeat it
    digest: int  # of all this
    sizes: list[tuple[int, ...]]
    made: Any  # by `CollectiveCall.prepare`; None if it is to be made again


@dataclass  # Python 3.10 has no generic NamedTuple; a frozen one takes a microsecond more
class Agreement(Generic[_T]):
    """What came of the checks of all ranks."""

    sizes: list[tuple[int, ...]]  # the sizes of every rank
    result: _T  # of the checks of this rank
    prepared: Prepared | None  # what the call can leave; None on one rank
    repeated: bool  # whether all ranks have the memory of the same call


@dataclass
class Checked(Generic[_T]):
    """What the checks of one rank found."""

    sizes: tuple[int, ...]  # at most two that may differ between ranks
    common: Common
    result: _T  # for this rank
    memory_key: Any = None  # what the memory of this rank depends on besides: its queue, its route
    renew: Callable[[Any], object] | None = None  # gets what has to be new in every call, for what the last one has left


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
            digest = found.common.digest
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            if ranks.size == 1:
                raise _as_ours(function, _describe(caught)) from caught
            error, found = caught, Checked((), Common(function, {}), None)  # type: ignore[arg-type]
            digest = found.common.digest
        sizes = found.sizes
        if ranks.size == 1:
            return Agreement([sizes], found.result, None, True)
        record = (0 if error is None else 1, digest, *sizes, *(_SIZES - len(sizes)) * (0,))
        last: Prepared | None = prepared((ranks.handle, function))
        again = last is not None and last.record == record and last.memory_key == found.memory_key and _renewed(found, last)
        records = mpi.share_record(ranks, (*record, last.digest if last is not None and again else 0))
        content = records.tobytes()
    if again and last is not None and content == last.records:
        return Agreement(last.sizes, found.result, last, True)
    if records[:, 0].any() or (records[:, 1] != records[0, 1]).any():
        _raise_everywhere(ranks, function, error, found.common.texts)
    everyone = [tuple(map(int, record[2 : 2 + len(sizes)])) for record in records]
    return Agreement(everyone, found.result, _preparation(record, found.memory_key, records, everyone), False)


def _renewed(found: Checked[Any], last: Prepared) -> bool:
    """Whether this rank has the memory of the last call again. If it has not, all ranks get theirs together."""
    if found.renew is None:
        return True
    try:
        found.renew(last.made)
    except Exception:  # raised again where the others can hear of it, if it happens again
        return False
    return last.made is not None


def _preparation(record: tuple[int, ...], memory_key: Any, records: np.ndarray, sizes: list[tuple[int, ...]]) -> Prepared:
    digest = _number(records[:, :-1].tobytes())
    repeated = records.copy()
    repeated[:, -1] = digest
    return Prepared(record, memory_key, repeated.tobytes(), digest, sizes, None)


class CollectiveCall:
    """The steps of one collective call on this rank, after the agreement: a step that fails must not keep others waiting."""

    def __init__(self, ranks: mpi.Ranks, function: str) -> None:
        self._ranks, self._function = ranks, function
        self._error: Exception | None = None

    def prepare(self, agreement: Agreement[Any], allocate: Callable[[], _T], *, lasts: bool) -> _T:
        """Get the memory without which this rank cannot take part in the exchanges; raises on all ranks, or on none.

        `lasts` says that the next call like this one can use what `allocate` returns. Otherwise it calls that again, where all
        memory is there already.
        """
        assert agreement.prepared is not None
        if agreement.repeated:
            return allocate() if agreement.prepared.made is None else agreement.prepared.made
        before = evictions()
        with stage("prepare"):
            result = self.local(allocate)
        self.confirm()
        if evictions() == before:  # otherwise the next call has to ask for memory again
            left = agreement.prepared._replace(made=result if lasts else None)
            set_prepared((self._ranks.handle, self._function), left)
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
