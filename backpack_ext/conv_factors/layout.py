"""How the input of a convolution is laid out for products: some dimensions unfolded, others not."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from backpack_ext.conv_factors.geometry import Dimension, Geometry
from backpack_ext.conv_factors.overlaps import overlaps, step_of


def layout(x: Tensor, geometry: Geometry, level: int) -> dict[tuple[int, ...], Tensor]:
    r"""Lay out an input with the first ``level`` dimensions as they are and the others unfolded.

    Entries of a dimension that is not unfolded are those of a phase, ``i = step j + phase``. Behind all
    of these dimensions but the first there are as many zeros as a shift may reach, so that boxes that
    are shifted against each other are shifted as a whole.

    Args:
        x: ``[n, C, *I]``, `Geometry.padded`.
        geometry: The geometry.
        level: How many dimensions are not unfolded.

    Returns:
        By phase, ``[g, J_1, n, J_2, ..., J_level, *O, (c k)]`` with O and k of the dimensions that are
        unfolded, in memory in this order; ``[g, n, *O, (c k)]`` for level 0.
    """
    kept, unfolded = geometry.dimensions[:level], geometry.dimensions[level:]
    each, n, groups = [overlaps(d) for d in kept], len(x), geometry.groups
    for axis, d in enumerate(unfolded, 2 + level):
        x = _unfold(x, axis, d)
    # [n, g, c, *I, *O, *K]
    x = x.unflatten(1, (groups, -1))
    inner = range(3 + level, x.dim())
    rest = [*inner[: len(unfolded)], 2, *inner[len(unfolded) :]]
    order = [1, 0, *rest] if not level else [1, 3, 0, *range(4, 3 + level), *rest]
    tails = [0, *(o.reach for o in each[1:])][:level]
    found = {}
    for phase in product(*(range(o.step) for o in each)):
        part = x[(slice(None),) * 3 + tuple(slice(q, None, o.step) for q, o in zip(phase, each))]
        part = part.permute(order)
        lengths = [o.entries for o in each]
        sizes = [length + tail for length, tail in zip(lengths, tails, strict=True)]
        held = [part.shape[0], *sizes[:1], n, *sizes[1:], *part.shape[2 + max(0, level - 1) + (level > 0) :]]
        if not level or tuple(held) == tuple(part.shape):
            whole = part.contiguous()
        else:
            whole = part.new_zeros(held)
            box = [slice(None), *(slice(size) for size in part.shape[1 : 2 + level])]
            whole[tuple(box)] = part
        features = whole.dim() - 1 - len(unfolded)
        found[phase] = whole.flatten(features)
    return found


def _unfold(x: Tensor, axis: int, d: Dimension) -> Tensor:
    """Return the entries that kernel entries meet, ``[..., O, ..., K]`` with K last; a view if it can be.

    A transposed convolution is one of stride 1, with its kernel flipped, of the input with
    ``stride - 1`` zeros between neighbours.
    """
    reach, size, before, stride = d.dilation * (d.kernel - 1), d.size, d.before, d.stride
    if d.transposed:
        before, size = reach - before, stride * (size - 1) + 1
        if stride > 1:
            shape = list(x.shape)
            shape[axis] = size
            stuffed = x.new_zeros(shape)
            stuffed[(slice(None),) * axis + (slice(None, None, stride),)] = x
            x = stuffed
        stride = 1
    after = stride * (d.out - 1) + reach + 1 - size - before
    if before or after:
        x = F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [before, after])
    x = x.unfold(axis, reach + 1, stride)[..., :: d.dilation]
    return x.flip(-1) if d.transposed else x


def sums(x: Tensor, geometry: Geometry) -> Tensor:
    r"""Return the sum of all patches, :math:`\sum_{no} x[n, c, i(o, k)]`, as ``[g, (c k)]``.

    Args:
        x: ``[n, C, *I]``, `Geometry.padded`.
        geometry: The geometry.
    """
    x = x.sum(0)
    for d in geometry.dimensions:  # each time the first spatial axis becomes the last one, of K
        met = d.pattern().sum(1).to(x.device, x.dtype)
        x = x.movedim(1, -1) @ met
    return x.reshape(geometry.groups, -1)
