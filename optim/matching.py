"""Whether a gradient still is the product of its rows: seen by two random vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isfinite, sqrt

import torch
from torch import Tensor

from optim.rounding import seeded_generator
from optim.rows import Rows

# How far, in units of rounding, a gradient may be from the product of its rows.
TOLERANCE = 20.0


# Steps with the same random vectors, which take a tenth of a millisecond to draw.
STEPS = 16


def probe(d: int, like: Tensor, step: int) -> Tensor:
    """Return two vectors ``[2,d]`` of numbers between 0.5 and 1.5 in size, the same for some steps.

    Signs are random. No entry is small: a change of any single entry of a gradient shows.
    """
    return _probe(d, like.device, like.dtype, step // STEPS)


@lru_cache(maxsize=8)
def _probe(d: int, device: torch.device, dtype: torch.dtype, number: int) -> Tensor:
    generator = seeded_generator(torch.device("cpu"), d, number)
    x = torch.rand(2, d, generator=generator, dtype=torch.float64) * 2 - 1
    return (x + x.sign() / 2).to(device, dtype)


class Match:
    r"""Whether a gradient is a multiple of the product of its rows, :math:`G = s\, b^T a`.

    As Freivalds does: both sides are multiplied with random vectors, here
    :math:`\bar x_i = x_i / \|a_{:i}\|_2`, so that small inputs count like large ones. They agree if

    .. math::
        |G \bar x - s\, b^T (a \bar x)|_o \le \tau\, |s|\, \epsilon\, \sqrt{i}\, \|b_{:o}\|_2

    in each row o, where the right side is what rounding explains: :math:`\epsilon` is the precision of
    the data type, i the number of columns, and :math:`\tau` = `TOLERANCE`, times :math:`\sqrt{r} / 16`
    for more than 256 rows. Where inputs are all zero, gradients have to be zero. There are two vectors,
    as any change along one of rank one (of one output, two classes, one datum) is a multiple of what a
    single vector sees.

    Args:
        rows: The rows.
        grads: Gradients of the layer's parameters, shaped like them.
        a: Its inputs ``[g,r,i]``, with the column of a joined bias.
        b: Its gradients at outputs, ``[g,r,o]``.
        x: Two vectors ``[2,i]``.

    References:
        Freivalds (1977), Probabilistic machines can use less running time.
    """

    def __init__(self, rows: Rows, grads: Sequence[Tensor], a: Tensor, b: Tensor, x: Tensor):
        form = rows.layer.form
        # vectors are rows, and norms sums of squares: both take a fraction of the time on CPU
        norms = a.square().sum(dim=1, keepdim=True).sqrt_()  # [g,1,i]
        # smaller than any norm but zero: what a gradient has in columns of zeros becomes huge
        x = x / norms.clamp(min=torch.finfo(a.dtype).tiny ** 0.75)
        G = form.axes.to_matrix(grads[0]).to(a.dtype)
        self.found = x[..., : G.shape[-1]] @ G.mT  # [g,2,o]
        if rows.layer.bias is not None:
            bias = form.bias_axes.to_matrix(grads[1]).to(a.dtype)
            self.found = self.found.addcmul(x[..., -1:], bias.mT)
        self.expected = (x @ a.mT) @ b
        count, columns = max(1, a.shape[1]), a.shape[2]
        unit = TOLERANCE * max(1.0, sqrt(count) / 16) * sqrt(columns) * rows.eps
        self.bound = b.square().sum(dim=1, keepdim=True).sqrt_().mul_(unit)  # [g,1,o]
        # where squares overflow a bound would allow everything
        self.total = self.bound.sum() + norms.sum()

    def holds(self) -> Tensor:
        """Return 1 or 0, whether s is one, and a number that is finite if that can be said: ``[2]``.

        It cannot where squares of rows overflow. Where they underflow it is 0.
        """
        same = ((self.found - self.expected).abs_() <= self.bound).all()
        return torch.stack([same.to(self.total.dtype), self.total])

    def multiple(self) -> Tensor:
        """Return the s of least squares, and 1 or 0: whether it is right, ``[2]``.

        Clipping by the norm, and gradient scalers, multiply whole gradients.
        """
        found, expected = self.found, self.expected
        scale = torch.dot(found.flatten(), expected.flatten()) / expected.square().sum()
        fits = ((found - scale * expected).abs_() <= scale.abs() * self.bound).all()
        fits &= self.total.isfinite() & scale.isfinite()
        return torch.stack([scale, fits.to(scale.dtype)])


def scales_of(matches: Sequence[Match]) -> list[float | None]:
    """Return each gradient's factor s; None where it is no multiple of the product of its rows.

    That waits for the device once, or twice if some factors are not one.
    """
    device = matches[0].total.device
    first = torch.stack([m.holds().to(device) for m in matches]).tolist()
    same = [bool(s) and isfinite(total) for s, total in first]
    others = [m.multiple().to(device) for m, s in zip(matches, same, strict=True) if not s]
    answers = iter(torch.stack(others).tolist() if others else ())
    found = (None if s else next(answers) for s in same)
    return [1.0 if answer is None else answer[0] if answer[1] else None for answer in found]
