"""The product of two tensors with named axes, of any number of axes and names."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, first: Sequence, second: Sequence, kept: Sequence) -> Tensor:
    """Multiply two tensors and sum over the axes that are not kept.

    One matrix product, or none where each axis of one is an axis of the other or is kept. No axis is
    of one tensor only and summed: `reduced` does that before.

    Args:
        a: A tensor with the axes `first`.
        b: A tensor with the axes `second`.
        first: Names of a's axes.
        second: Names of b's axes.
        kept: Names of the result's axes.

    Returns:
        The product, with axes in the order of `kept`.
    """
    sizes = dict(zip((*first, *second), (*a.shape, *b.shape), strict=True))
    if next((x for x in kept if (x in first) != (x in second)), None) in second:
        a, b, first, second = b, a, second, first  # so that less of the result is in another order
    if prod(sizes[x] for x in kept) > max(a.numel(), b.numel()):
        one, two = kept, kept  # factors are brought into the order of the result, which is larger
    else:
        one, two = first, second
    inner = [x for x in first if x in second and x not in kept]
    batch = [x for x in one if x in first and x in second and x in kept]
    left = [x for x in one if x in first and x not in second]
    right = [x for x in two if x in second and x not in first]

    def arranged(t: Tensor, names: Sequence, order: list) -> Tensor:
        return t.permute([names.index(x) for x in order])

    def count(names: list) -> int:
        return prod(sizes[x] for x in names)

    if not inner or not (left or right):  # no matrix product: no sum, or one of nothing but products
        a = arranged(a, first, batch + left + inner)
        b = arranged(b, second, batch + right + inner)
        a = a[(...,) + (None,) * len(right)]
        b = b[(slice(None),) * len(batch) + (None,) * len(left)]
        c = a * b
        c = c.sum(tuple(range(c.dim() - len(inner), c.dim()))) if inner else c
    else:
        a = arranged(a, first, batch + left + inner).reshape(count(batch), count(left), count(inner))
        b = arranged(b, second, batch + inner + right).reshape(count(batch), count(inner), count(right))
        c = torch.bmm(a, b).reshape([sizes[x] for x in batch + left + right])
    return arranged(c, batch + left + right, list(kept))


def reduced(a: Tensor, names: Sequence, kept: Sequence) -> Tensor:
    """Sum a tensor with the axes `names` over those that are not kept."""
    summed = [axis for axis, x in enumerate(names) if x not in kept]
    return a.sum(summed) if summed else a
