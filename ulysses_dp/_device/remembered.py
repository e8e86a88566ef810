"""What calls have found out, for the next one like them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    _T = TypeVar("_T")

MOST = 256


class Remembered:
    """Findings by what they follow from. All are forgotten when there are too many: of lengths that never come again."""

    def __init__(self) -> None:
        self._found: dict[Any, Any] = {}

    def once(self, key: Any, find: Callable[[], _T]) -> _T:
        """What `find` returns, which follows from the key; it is called for a new one only, and again if it raised."""
        try:
            return self._found[key]
        except KeyError:
            pass
        found = find()
        if len(self._found) >= MOST:
            self._found.clear()
        self._found[key] = found
        return found
