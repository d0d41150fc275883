"""How often preconditioners are refreshed."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

Interval = int | Callable[[int], int]


class early_frequent:
    r"""An interval that grows with the number of steps t, up to T.

    .. math::  \min(\max(\lfloor \log_4 (t + 1) \rfloor, 1), T)

    Factors that start at the identity are far from the curvature at first, and stay near it later.
    It can be pickled, as optimizers that use it are.

    Args:
        T: The largest interval.

    Raises:
        ValueError: If T is no positive integer.

    Example:
        >>> [early_frequent(3)(t) for t in (0, 14, 15, 62, 63, 10000)]
        [1, 1, 2, 2, 3, 3]
    """

    def __init__(self, T: int):
        self.T = check_interval("early_frequent", "T", T)

    def __call__(self, step: int) -> int:
        """Return the interval at a step."""
        # the number of factors of 4 in t + 1, without a rounded logarithm
        return min(max(((step + 1).bit_length() - 1) // 2, 1), self.T)

    def __repr__(self) -> str:
        return f"early_frequent({self.T})"


def check_interval(owner: str, name: str, value: Interval) -> Interval:
    """Return an interval if it is one.

    Raises:
        ValueError: If it is neither a positive integer nor callable.
    """
    if callable(value):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{owner}: {name}={value!r}; expected a positive integer, or a function of the step."
        )
    return value


def interval_at(owner: str, name: str, value: Interval, step: int) -> int:
    """Return the interval at a step.

    Raises:
        ValueError: If a function returned no positive integer.
    """
    return check_interval(owner, f"{name}({step})", value(step)) if callable(value) else value


def check_number(
    owner: str,
    name: str,
    value: float,
    low: float = 0.0,
    high: float = float("inf"),
    open_: bool = False,
) -> None:
    """Raise unless a value is a finite number in [low, high], or in [low, high) if ``open_``.

    Raises:
        ValueError: If it is not.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    above = number >= high if open_ else number > high
    if isinstance(value, (str, bool)) or not isfinite(number) or number < low or above:
        if high == float("inf"):
            expected = "a finite number" if low == -high else f"a finite number >= {low:g}"
        else:
            expected = f"a number in [{low:g}, {high:g}{')' if open_ else ']'}"
        raise ValueError(f"{owner}: {name}={value!r}; expected {expected}.")
