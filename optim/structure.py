"""Which structure the factors of a layer have: reading the argument ``structure``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from curvature import STRUCTURES, StructuredMatrix


class Structure(NamedTuple):
    """A class of structured matrices with its options.

    Attributes:
        cls: The class.
        options: Names and values.
    """

    cls: type[StructuredMatrix]
    options: tuple[tuple[str, int], ...] = ()

    def zeros(self, dim: int, batch: tuple[int, ...], like) -> StructuredMatrix:
        """Return zeros ``[*batch, dim, dim]`` with the data type and device of ``like``."""
        return self.cls.zeros(dim, batch, like.dtype, like.device, **dict(self.options))


DIAGONAL = Structure(STRUCTURES["diagonal"])


def structures_of(
    owner: str, value: Any, allowed: tuple[str, ...] | None = None
) -> tuple[Structure, Structure] | None:
    """Return the structures of K and of C that an argument names; None if it is None.

    Args:
        owner: Name of the optimizer, for messages.
        value: A name in `curvature.STRUCTURES`, or ``(name, options)``, for both; or a pair of these,
            the first for the inputs' factor K, the second for the outputs' factor C.
        allowed: Names that the optimizer can use; all by default.

    Raises:
        ValueError: If a name or an option is unknown, or of no use here.
    """
    if value is None:
        return None
    if _is_one(value):
        return (_structure(owner, value, allowed),) * 2
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_one, value)):
        first, second = (_structure(owner, part, allowed) for part in value)
        return first, second
    raise ValueError(
        f"{owner}: structure={value!r}; expected a name, (name, options), a pair of these for K and C, "
        f"or None; {_known(allowed)}."
    )


def _is_one(value: Any) -> bool:
    """Whether a value is one structure, in form."""
    if isinstance(value, str):
        return True
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and isinstance(value[0], str) and isinstance(value[1], Mapping)


def _structure(owner: str, value: Any, allowed: tuple[str, ...] | None) -> Structure:
    name, options = (value, {}) if isinstance(value, str) else value
    if name not in (allowed or STRUCTURES):
        raise ValueError(f"{owner}: structure {name!r} is not supported; {_known(allowed)}.")
    cls = STRUCTURES[name]
    try:
        cls.shapes(1, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{owner}: structure {name!r} with options {dict(options)}: {error}") from error
    return Structure(cls, tuple(options.items()))


def _known(allowed: tuple[str, ...] | None) -> str:
    return f"there are {', '.join(map(repr, allowed or STRUCTURES))}"
