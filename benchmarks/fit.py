"""Exponents of growth: the least-squares line through logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PowerLaw:
    """``y = constant * x ** exponent``.

    Args:
        exponent: The slope of log y over log x.
        constant: y at x = 1.
        error: Standard error of the exponent, from the scatter of log y about the line; None with two
            points, which leave none. Curved data have a large one too: then there is no power law.
    """

    exponent: float
    constant: float
    error: float | None


def power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw | None:
    """Fit a power law by least squares in logarithms.

    Args:
        xs: Positive sizes.
        ys: What was measured at each of them.

    Returns:
        The fit; None if there are fewer than two sizes, or a measured value is not positive.
    """
    if len(set(xs)) < 2 or min(ys) <= 0:
        return None
    x, y = [math.log(v) for v in xs], [math.log(v) for v in ys]
    n, mean_x, mean_y = len(x), math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - mean_x) ** 2 for a in x)
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    offset = mean_y - slope * mean_x
    error = None
    if n > 2:
        rest = math.fsum((b - offset - slope * a) ** 2 for a, b in zip(x, y, strict=True))
        error = math.sqrt(rest / (n - 2) / spread)
    return PowerLaw(slope, math.exp(offset), error)
