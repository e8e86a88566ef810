"""What a definition of an option says, and what public functions make of it: signatures and documentation."""

from __future__ import annotations

import inspect
from functools import cache
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable

    _Function = TypeVar("_Function", bound=Callable[..., Any])


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


def takes(keywords: type) -> Callable[[_Function], _Function]:
    """Show the options that a function takes as ``**options`` in its signature, and in its docstring.

    There, ``{options}`` becomes their documentation, and ``{names}`` their names.
    """
    options, hints = options_of(keywords), get_type_hints(keywords)

    def show(function: _Function) -> _Function:
        signature = inspect.signature(function)
        own = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[name])
            for name, option in options.items()
        ]
        by_keyword = [x for x in own if x.kind is x.KEYWORD_ONLY]
        parameters = [*(x for x in own if x not in by_keyword), *more, *by_keyword]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        if function.__doc__ is not None:  # python -OO has none
            text = inspect.cleandoc(function.__doc__)
            function.__doc__ = text.replace("{options}", _documentation(options)).replace("{names}", ", ".join(options))
        return function

    return show


def _documentation(options: dict[str, Option]) -> str:
    indent = 4 * " "
    return "\n".join(
        f"{name} : {option.form}\n{fill(option.text, 120, initial_indent=indent, subsequent_indent=indent)}"
        for name, option in options.items()
    )
