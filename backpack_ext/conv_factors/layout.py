"""How the input of a convolution is laid out for products: some dimensions unfolded, others not."""

from __future__ import annotations

from itertools import product

from torch import Tensor

from backpack_ext.conv_factors.geometry import Geometry
from backpack_ext.conv_factors.overlaps import overlaps
from backpack_ext.conv_factors.unfold import unfold


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
    x = unfold(x, unfolded)
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
