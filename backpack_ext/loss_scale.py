"""The scale of the losses of one backward pass."""

from __future__ import annotations

import warnings
from math import log2
from typing import TYPE_CHECKING

from torch import Tensor

from backpack_ext.errors import UnsupportedError

if TYPE_CHECKING:
    from backpack_ext.extension import Extension
    from backpack_ext.loss_call import LossCall


class LossScale:
    """``r c``: a loss's reduction, and the factor that it enters the total with.

    Args:
        multiplier: The factor of a ``grad_scaler``, which does not count.
        collected: What collects results over data sets or processes, which wants one scale; if any.

    Attributes:
        terms: ``1 / r``, the number of terms that a mean loss is taken over; None for a sum.
    """

    __slots__ = ("collected", "known", "multiplier", "terms", "value")

    def __init__(self, multiplier: float, collected: str | None):
        self.multiplier, self.collected = multiplier, collected
        self.value, self.known, self.terms = 1.0, False, None

    def note(self, call: LossCall, grad: Tensor, scaled: list[Extension]) -> None:
        """Record that of a loss.

        Args:
            call: The loss.
            grad: The gradient at its value.
            scaled: The extensions that divide by the scale.

        Raises:
            ValueError: If c is negative.
            UnsupportedError: If losses of different scale meet where it is divided by.
        """
        c = float(grad) / self.multiplier
        if c < 0:
            raise ValueError(
                f"{call.label} enters the total with the negative factor {c:g}: its curvature would "
                "be negative and has no real root. Give it a positive factor."
            )
        if c >= 2**8 and log2(c).is_integer() and self.multiplier == 1:
            warnings.warn(
                f"{call.label} was multiplied by {c:g}, and so is its curvature. If that is the factor "
                "of a GradScaler, pass the scaler: backpack(..., grad_scaler=scaler).",
                stacklevel=2,
            )
        r = call.scale()
        scale, terms = r * c, 1 / r if call.module.reduction == "mean" else None
        same = not self.known or abs(scale - self.value) <= 1e-6 * max(scale, self.value)
        if self.collected and self.known:  # 2 losses of 1/2: the sum over processes tells them apart
            same = same and abs((terms or 0) - (self.terms or 0)) <= 1e-6 * (terms or 0)
        if (scaled or self.collected) and not same:
            what = f"{type(scaled[0]).__name__} with empirical vectors" if scaled else self.collected
            raise UnsupportedError(
                f"{what} divides by the scale of the loss, but this backward pass has losses of "
                f"scale {self.value:g} and {scale:g}. Use one pass per loss, or equal scales."
            )
        self.value, self.known, self.terms = scale, True, terms
