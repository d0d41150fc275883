r"""Stochastic rounding: parameters in half precision that follow steps below their resolution.

The two neighbours :math:`a < x < b` of a number x in a half type are drawn with the probabilities
:math:`P(b) = (x - a) / (b - a)` and :math:`P(a) = 1 - P(b)`, so that the mean is x. Nearest rounding
loses every step smaller than half the distance to the next number, which in bfloat16 is 1/256 of a
parameter: such a parameter stands still. With this one it moves by the right amount on average.

Connolly, Higham and Mary (2021), Stochastic rounding and its probabilistic backward error analysis;
Gupta, Agrawal, Gopalakrishnan and Narayanan (2015), Deep learning with limited numerical precision.
"""

from __future__ import annotations

from math import frexp

import torch
from torch import Generator, Tensor

HALF_TYPES = (torch.bfloat16, torch.float16)

# bfloat16 is the upper half of float32
_DROPPED = 16


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: Generator | None = None) -> Tensor:
    """Round to a half type, up or down at random, so that the mean is ``x``; see the module.

    Numbers that the half type has stay what they are, subnormal ones and both zeros too, and so do
    inf and nan. Numbers beyond its largest one are rounded to the nearest, which is inf for most of
    them, as in ``x.to(dtype)``: a mean of inf has no finite neighbours.

    Args:
        x: Any shape, float32 or float64.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        generator: Where the random numbers come from, on the device of ``x``; torch's default one
            for None.

    Returns:
        A tensor like ``x`` of the half type. The probabilities are exact but for multiples of 2^-24
        to which those of float16, from float32, are rounded (2^-53 from float64).

    Raises:
        TypeError: If ``x`` is in another type than float32 or float64, or ``dtype`` is no half type.

    Example:
        One quarter of the way from 1 to the next number of bfloat16:

        >>> x = torch.full((100000,), 1 + 2**-9)
        >>> y = stochastic_round(x, torch.bfloat16, torch.Generator().manual_seed(0))
        >>> y.unique().tolist(), round((y > 1).float().mean().item(), 2)
        ([1.0, 1.0078125], 0.25)
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"stochastic_round: x is {found}; expected a float32 or float64 tensor.")
    if dtype not in HALF_TYPES:
        raise TypeError(
            f"stochastic_round: dtype={dtype}; expected torch.bfloat16 or torch.float16. Wider types "
            "need no stochastic rounding."
        )
    x = x.detach()
    if dtype == torch.bfloat16 and x.dtype == torch.float32:
        rounded = _add_bits(x, generator)
    else:
        rounded = _draw(x, dtype, generator)
    # False for inf and nan too. The nearest number is all that is left there.
    inside = x.abs() <= torch.finfo(dtype).max
    return torch.where(inside, rounded, x).to(dtype)


def _add_bits(x: Tensor, generator: Generator | None) -> Tensor:
    """Add random bits where float32 has more than bfloat16, and cut off what is there then.

    The bits behind the sign, read as an integer, are ordered like the magnitudes: a carry out of the
    lower half leads to the next number, across exponents too. The sum stays below the sign's bit for
    all numbers up to the largest of bfloat16; what comes out for others is not used.
    """
    bits = torch.empty_like(x, dtype=torch.int32).random_(1 << _DROPPED, generator=generator)
    return bits.add_(x.view(torch.int32)).bitwise_and_(-1 << _DROPPED).view(torch.float32)


def _draw(x: Tensor, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    """Measure x in units in the last place of its half type; round that to one of two integers.

    Units are powers of two, hence all but the comparison with random numbers is exact.
    """
    info = torch.finfo(dtype)
    digits = 2 - frexp(info.eps)[1]  # of the significand: eps is 2^(1 - digits)
    least = frexp(info.smallest_normal)[1] - digits  # subnormal numbers share the last unit
    exponent = torch.frexp(x).exponent.sub_(digits).clamp_(min=least)
    # the power by its bits: not all versions of ldexp compute it in the type of x
    if x.dtype == torch.float32:
        unit = exponent.add_(127).bitwise_left_shift_(23).view(torch.float32)
    else:
        unit = exponent.to(torch.int64).add_(1023).bitwise_left_shift_(52).view(torch.float64)
    in_units = x / unit
    down = in_units.floor()
    up = torch.empty_like(x).uniform_(generator=generator) < in_units.sub_(down)
    return down.add_(up).mul_(unit).copysign_(x)  # a negative number may become zero


def copy_rounded_(target: Tensor, source: Tensor, generator: Generator | None = None) -> Tensor:
    """Overwrite ``target`` with ``source``, and round it stochastically if a generator is given.

    Only a target in half precision is rounded so, and only if the source is wider: otherwise, and for
    None, this is ``target.copy_(source)``, which rounds to the nearest.

    Args:
        target: Any shape; changed in place. Gradients of it are not recorded.
        source: Of the same shape.
        generator: Where the random numbers come from, on the device of ``source``.

    Returns:
        ``target``.

    Example:
        >>> p = torch.ones(4, dtype=torch.bfloat16)
        >>> copy_rounded_(p, torch.full((4,), 0.999)).tolist()
        [1.0, 1.0, 1.0, 1.0]
        >>> copy_rounded_(p, torch.full((4,), 0.999), torch.Generator().manual_seed(0)).tolist()
        [0.99609375, 1.0, 1.0, 1.0]
    """
    with torch.no_grad():
        if generator is None or target.dtype not in HALF_TYPES or source.dtype in HALF_TYPES:
            return target.copy_(source)
        return target.copy_(stochastic_round(source, target.dtype, generator))


def seeded_generator(device: torch.device, *numbers: int) -> Generator:
    """Return a generator that depends on nothing but some non-negative integers, in their order.

    An optimizer that rounds with one of (number of the parameter, number of the step) gives the same
    parameters after a checkpoint without saving any generator, and in all processes that hold copies.

    Args:
        device: Where it draws.
        numbers: What tells it from others.
    """
    seed = 0
    for n in numbers:
        # the finalizer of SplitMix64 (Steele, Lea and Flood, 2014): neighbours get unrelated seeds
        seed = (seed + n + 0x9E3779B97F4A7C15) & _MASK
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & _MASK
        seed ^= seed >> 31
    # generators of CPUs take 32 bits
    return Generator(device).manual_seed(seed >> 32)


_MASK = (1 << 64) - 1
