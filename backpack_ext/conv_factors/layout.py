"""How the input of a convolution is laid out for products: some dimensions unfolded, others not."""

from __future__ import annotations

from itertools import product

from torch import Tensor
from torch.nn import functional as F

from backpack_ext.conv_factors.geometry import Dimension, Geometry
from backpack_ext.conv_factors.overlaps import overlaps


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
        By phase, ``[g, (c k), J_1, n, J_2, ..., J_level, *O]`` with O and k of the dimensions that are
        unfolded, in memory in this order; ``[g, (c k), n, *O]`` for level 0. A copy of rows: where the
        last dimension of x is contiguous, so is what is read.
    """
    kept, unfolded = geometry.dimensions[:level], geometry.dimensions[level:]
    each, groups = [overlaps(d) for d in kept], geometry.groups
    for axis, d in enumerate(unfolded, 2 + level):
        x = _unfold(x, axis, d)
    x = x.unflatten(1, (groups, -1))  # [n, g, c, *I, *O, *K]
    dims = len(geometry.dimensions)
    images, kernels = range(3, 3 + dims), range(3 + dims, x.dim())
    order = [1, 2, *kernels, *images[:level][:1], 0, *images[:level][1:], *images[level:]]
    lead = 2 + len(kernels)
    found = {}
    for phase in product(*(range(o.step) for o in each)):
        steps = (slice(q, None, o.step) for q, o in zip(phase, each, strict=True))
        part = x[(slice(None),) * 3 + tuple(steps)].permute(order)
        held = list(part.shape)
        for axis, o in enumerate(each):
            # behind the axes of features come J_1, n, J_2, ...
            held[lead + axis + (axis > 0)] = o.entries + (o.reach if axis else 0)
        if tuple(held) == part.shape:
            whole = part.contiguous()
        else:
            whole = part.new_zeros(held)
            whole[tuple(map(slice, part.shape))] = part
        found[phase] = whole.flatten(1, lead - 1)
    return found


def _unfold(x: Tensor, axis: int, d: Dimension) -> Tensor:
    """Return the entries that kernel entries meet, ``[..., O, ..., K]`` K last; a view if it can be.

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
