"""What a definition of an option says, and what public functions make of it: signatures and documentation."""

from __future__ import annotations

import inspect
from functools import cache
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Function = TypeVar("Function", bound=Callable[..., Any])


class Option(NamedTuple):
    """An option of attention, beside its type: the annotation of a `TypedDict` holds it."""

    default: Any
    check: Callable[[str, Any, Any], Any]  # of its name, the value and the call; returns what calls work with
    form: str  # its type in the words of the documentation
    text: str
    heads_axis: int | None = None  # of the checked array, the axis of which a rank needs the part for its heads


@cache
def options_of(keywords: type) -> dict[str, Option]:
    """The options that a `TypedDict` defines, by name."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(keywords, include_extras=True).items()}


def takes(keywords: type, more: type | None = None, **texts: str) -> Callable[[Function], Function]:
    """Show the options that a function takes as ``**options`` in its signature, and in its docstring.

    There, ``{options}`` becomes their documentation, and ``{names}`` their names; ``{more options}`` and ``{more names}`` those
    of the second `TypedDict`. Of other texts that docstrings share, the names are given.
    """
    groups = {"": keywords} if more is None else {"": keywords, "more ": more}

    def parameters(group: type) -> list[inspect.Parameter]:
        hints = get_type_hints(group)
        return [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[name])
            for name, option in options_of(group).items()
        ]

    def show(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
        by_keyword = [x for x in own if x.kind is x.KEYWORD_ONLY]
        first, *others = map(parameters, groups.values())
        shown = [*(x for x in own if x not in by_keyword), *first, *by_keyword, *(x for group in others for x in group)]
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        if function.__doc__ is not None:  # python -OO has none
            text = inspect.cleandoc(function.__doc__)
            for which, group in groups.items():
                options = options_of(group)
                text = text.replace(f"{{{which}options}}", _documentation(options))
                text = text.replace(f"{{{which}names}}", ", ".join(options))
            for name, shared in texts.items():
                text = text.replace(f"{{{name}}}", shared)
            function.__doc__ = text
        return function

    return show


def parted(options: Mapping[str, Any], keywords: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that a `TypedDict` defines, and the others."""
    of_it = options_of(keywords)
    return {x: y for x, y in options.items() if x in of_it}, {x: y for x, y in options.items() if x not in of_it}


def by_value(options: Mapping[str, Any]) -> tuple[tuple[str, type, Any], ...] | None:
    """Name, type and value of options that say all by these, or None. The types tell True from 1, which are equal."""
    if not all(map(_is_plain, options.values())):
        return None
    return tuple([(name, type(value), value) for name, value in options.items()])


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(type(x) is int for x in value))


_PLAIN = frozenset([bool, int, float, str, type(None)])


def _documentation(options: dict[str, Option]) -> str:
    indent = 4 * " "
    return "\n".join(
        f"{name} : {option.form}\n{fill(option.text, 120, initial_indent=indent, subsequent_indent=indent)}"
        for name, option in options.items()
    )
