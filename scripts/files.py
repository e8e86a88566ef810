"""Files that a script writes: whole or not at all, and never over what it reads; errors of one rank that end all ranks."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_T = TypeVar("_T")


def on_all_ranks(comm: Any, action: Callable[[], _T]) -> _T:
    """Do something that can fail on one rank alone, such as reading a file; its error ends all ranks, with one line of rank 0.

    Collective, unless `comm` is None: a script without ranks.
    """
    problem = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the other ranks wait for this one
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:1000]
    for rank, text in enumerate([problem] if comm is None else comm.allgather(problem)):
        if text is not None:
            where = "" if comm is None or comm.size == 1 else f"rank {rank}: "
            raise SystemExit(f"{Path(sys.argv[0]).stem}: {where}{text}" if comm is None or comm.rank == 0 else 1)
    return result


def regular(path: str | Path) -> Path:
    """The path of a file that can be read: opening a pipe would wait for a writer."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return Path(path)


def picture_kind(path: str) -> str:
    """The kind of picture that the name of a file asks for; raises ValueError if there is none."""
    from matplotlib.backend_bases import FigureCanvasBase

    kind = Path(path).suffix.removeprefix(".")
    if kind not in FigureCanvasBase.filetypes:
        raise ValueError(f"{path}: the file name must end in one of .{', .'.join(FigureCanvasBase.filetypes)}")
    return kind


def refuse_clashes(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Raise ValueError if an output is an input or another output, be it by another name or a link. Opens nothing.

    The files by their option; None for one that is not given.
    """
    taken = {option: path for option, path in inputs.items() if path is not None}
    for option, path in outputs.items():
        if path is None:
            continue
        for other, other_path in taken.items():
            if _same(path, other_path):
                raise ValueError(f"{option} {path} is the file of {other} {other_path}, which would be lost")
        taken[option] = path


def _same(a: Any, b: Any) -> bool:
    try:
        return Path(a).samefile(b)
    except OSError:  # one does not exist
        return os.path.realpath(a) == os.path.realpath(b)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let errors of the system name this file, not the one beside it or none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class Output:
    """A file that gets its name when it is complete. Until then an earlier one stays, and the content is in `part` beside it.

    A context manager, which takes away what has not become complete. What a link points to is replaced, not the link.
    """

    def __init__(self, path: str | Path) -> None:
        """Make the file `part`; raises OSError where `path` cannot be written."""
        self.path = path
        self._target = Path(os.path.realpath(path))
        self.part = self._target.with_name(f".{self._target.name[:40]}.{secrets.token_hex(4)}.part")
        mode = None
        with naming(path):
            if self._target.is_symlink() or self._target.exists():  # a link is still one if it is in a loop
                mode = stat.S_IMODE(regular(self._target).stat().st_mode)
                if not os.access(self._target, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            os.close(os.open(self.part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            if mode is not None:
                self.part.chmod(mode)

    def reserve(self, start: bytes, size: int) -> None:
        """Write the start of the file and reserve space for all of it, so that what comes later cannot lack space."""
        with naming(self.path), self.part.open("wb") as file:
            file.write(start)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, size)

    def complete(self) -> None:
        """Give the file its name."""
        with naming(self.path):
            self.part.replace(self._target)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.part.unlink(missing_ok=True)
