"""Options that several optimizers share, shown in each one's signature and documentation."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

# An argument in a class's docstring: its name, and all lines up to the next.
_ENTRY = re.compile(r"^        (\*{0,2}\w+): .*\n(?:^         +.*\n)*", re.MULTILINE)


def shows_options(base: type, documented: type) -> Callable[[Class], Class]:
    """Return a decorator of classes whose constructor hands ``**shared`` on to that of ``base``.

    In the signature ``**shared`` gives way to the options of ``base`` by name only that the class does
    not have itself, and in the docstring to what another class says of them.

    Args:
        base: The class whose constructor takes the options.
        documented: The class whose docstring describes them.

    Example:
        >>> from inspect import signature
        >>> from optim import IKFAC
        >>> list(signature(IKFAC).parameters)[-2:]
        ['maximize', 'precondition']
    """

    def show(cls: Class) -> Class:
        init: Any = cls.__init__
        own = signature(init).parameters
        options = [
            p
            for p in signature(base.__init__).parameters.values()
            if p.kind is Parameter.KEYWORD_ONLY and p.name not in own
        ]
        kept = [p for p in own.values() if p.kind is not Parameter.VAR_KEYWORD]
        init.__signature__ = signature(init).replace(parameters=[*kept, *options])
        if cls.__doc__ is not None:  # there is none under python -OO
            cls.__doc__ = _described(cls.__doc__, documented.__doc__, [p.name for p in options])
        return cls

    return show


def _described(text: str, source: str, names: list[str]) -> str:
    """Put the entries of some arguments in place of that of ``**shared``."""
    entries = {m[1]: m[0] for m in _ENTRY.finditer(source)}
    shared = next(m for m in _ENTRY.finditer(text) if m[1].endswith("shared"))
    return text.replace(shared[0], "".join(entries[name] for name in names))
