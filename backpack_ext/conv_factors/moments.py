r"""The second moment of a convolution's patches, of which KFAC-expand's input factor is the mean.

.. math::  A_{(c k)(c' k')} = \sum_{no} u_{no, ck} u_{no, c'k'}, \qquad
           u_{no, ck} = x[n, c, i(o, k)]

with i(o, k) the input entry that kernel entry k meets at output pixel o. Two patches that overlap
share products: along a dimension, all pairs (k, k') at one distance run over the same products
x[i] x[i + distance], and differ at the borders only. A method is a number of dimensions in which that is
made use of (its level), from the first on; the others are unfolded:

===== ============================== ==================================================== ===========
level name                           products                                             memory
===== ============================== ==================================================== ===========
0     unfolding                      one symmetric one of ``K C`` columns                 K times x
1     half unfolding                 one of ``(K / k_1) C`` columns per distance          K / k_1 x
D     Toeplitz                       one of C columns per distance in all dimensions      1 to 3 x
===== ============================== ==================================================== ===========

and few, small ones at the borders. Entries are only added, never subtracted, so that a level is as
accurate as another. Strides split a dimension into phases that are treated as images of their own. In
a transposed convolution a pair meets nothing unless k - k' is a multiple of the stride, so that the
higher levels skip most pairs. Data are taken some at a time, such that what is formed stays small.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from backpack_ext.conv_factors.geometry import Geometry
from backpack_ext.conv_factors.layout import layout
from backpack_ext.conv_factors.overlaps import Cell, Plan, plan
from curvature.panels import symmetric_product

# Entries that are laid out at once.
WORKSPACE = 2**22
# Up to this many columns, products of many rows use one core only unless the rows are divided.
NARROW = 256
# From this share of a dimension on, a segment is multiplied in place, with zeros elsewhere.
WIDE = 0.5


def moment(x: Tensor, geometry: Geometry, level: int, workspace: int | None = None) -> Tensor:
    r"""Return :math:`\sum_{no} u_{no} u_{no}^T` as ``[g, (c k), (c k)]``, a sum over data and pixels.

    Args:
        x: Input ``[n, C, *I]`` of the convolution; half types are summed in float32.
        geometry: The convolution's geometry.
        level: In how many dimensions overlaps are made use of, 0 to all.
        workspace: Entries that are laid out at once; `WORKSPACE` by default.

    Returns:
        The sum, in the data type of x but at least float32.

    Raises:
        ValueError: If there are not so many dimensions.
    """
    dims = geometry.dimensions
    if not 0 <= level <= len(dims):
        raise ValueError(f"moment: level={level!r}; expected 0 to {len(dims)}, the dimensions.")
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = _data_at_once(x, geometry, level, WORKSPACE if workspace is None else workspace)
    scheme = plan(dims[:level]) if level else None
    if not len(x) or (scheme is not None and not scheme.cells):
        return _nothing(x.to(dtype), geometry)
    total = None
    for part in x.split(step):
        part = geometry.padded(part.to(dtype))
        if scheme is None:
            found = _whole(part, geometry)
        else:
            found = _cells(layout(part, geometry, level), scheme)
        total = found if total is None else total + found
    return total if scheme is None else _assembled(total, geometry, level, scheme)


def columns(channels: int, geometry: Geometry, level: int) -> int:
    """Return the number of columns of products, ``(c k)`` with k of the dimensions that are unfolded."""
    count = channels // geometry.groups
    for d in geometry.dimensions[level:]:
        count *= d.kernel
    return count


def _data_at_once(x: Tensor, geometry: Geometry, level: int, workspace: int) -> int:
    """Return the number of data that are laid out at once: in parts of about equal size."""
    n, channels = x.shape[:2]
    m, dims = columns(channels, geometry, level), geometry.dimensions
    rows = max(1, prod(d.size for d in dims[:level]) * prod(d.out for d in dims[level:]))
    each = geometry.groups * rows * m
    # adding up results is to cost little beside the products: at least as many rows as columns
    most = max(1, workspace // each, -(-2 * m // rows))
    return -(-n // -(-n // most)) if n else 1  # in parts of about equal size


def _whole(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the moment of level 0."""
    n, channels = x.shape[:2]
    if geometry.entries == 1 and geometry.groups == 1 and _plain(geometry):
        pixels = x.flatten(2)
        if pixels.shape[2] >= 2 * channels and pixels.stride(2) == 1:
            return torch.bmm(pixels, pixels.mT).sum(0, keepdim=True)  # without a copy
    (u,) = layout(x, geometry, 0).values()
    return _product(u.flatten(1, -2), None)


def _plain(geometry: Geometry) -> bool:
    """Whether a kernel of one entry meets each input entry once."""
    return all(d.stride == 1 and d.before == 0 and d.out == d.size for d in geometry.dimensions)


def _nothing(x: Tensor, geometry: Geometry) -> Tensor:
    size = x.shape[1] // geometry.groups * geometry.entries
    return x.new_zeros(geometry.groups, size, size)


def _product(a: Tensor, b: Tensor | None) -> Tensor:
    """Return ``sum_r a[g,r,i] b[g,r,j]``, with b = a if None, on all cores."""
    m = a.shape[2]
    if b is None and m > NARROW:
        return symmetric_product(a.mT)
    b = a if b is None else b
    cores = torch.get_num_threads() if a.device.type == "cpu" and len(a) == 1 and m <= NARROW else 1
    rows = a.shape[1] // cores * cores
    if cores == 1 or rows < 64 * cores:
        return a.mT @ b
    shape = (cores, rows // cores, m)
    found = (a[0, :rows].view(shape).mT @ b[0, :rows].view(shape)).sum(0, keepdim=True)
    return found if rows == a.shape[1] else found.add_(a[:, rows:].mT @ b[:, rows:])


def _cells(phases: dict[tuple[int, ...], Tensor], scheme: Plan) -> Tensor:
    """Return the products of all cells, ``[cells, g, m, m]``."""
    masked: dict[tuple, Tensor] = {}
    found = [_cell(phases, cell, masked) for cell in scheme.cells]
    return torch.stack(found)


def _cell(phases: dict[tuple[int, ...], Tensor], cell: Cell, masked: dict[tuple, Tensor]) -> Tensor:
    """Return the product of one cell, ``[g, m, m]``."""
    a, b = phases[cell.left], phases[cell.right]  # [g, J_1, n, J_2, ...]
    (lo, *los), (hi, *his), (shift, *shifts) = cell.lo, cell.hi, cell.shift
    inner = list(enumerate(zip(los, his, shifts, cell.open[1:], strict=True), 3))
    if not all(opened or his - los >= WIDE * a.shape[axis] for axis, (los, his, _, opened) in inner):
        one, other = a[:, lo:hi], b[:, lo + shift : hi + shift]
        for axis, (start, end, move, _) in inner:
            one = one.narrow(axis, start, end - start)
            other = other.narrow(axis, start + move, end - start)
        one = one.flatten(1, -2)
        return _product(one, None if cell.symmetric else other.flatten(1, -2))
    bounds = tuple(None if opened else (start, end) for _, (start, end, _, opened) in inner)
    bounded = any(bounds)
    if bounded:
        key = (cell.left, bounds)
        if key not in masked:
            masked[key] = _masked(a, bounds)
        a = masked[key]
    # All pairs at one distance in memory; where a shift leaves a row it meets the zeros behind it.
    distance, stride = 0, prod(a.shape[2:-1])
    first, last = lo * stride, hi * stride
    for axis, (_, _, move, _) in inner:
        distance += move * prod(a.shape[axis + 1 : -1])
    distance += shift * stride
    one, other = a.flatten(1, -2), b.flatten(1, -2)
    first, last = max(first, -distance), min(last, other.shape[1] - distance)
    one = one[:, first:last]
    return _product(one, None if cell.symmetric and not bounded else other[:, first + distance : last + distance])


def _masked(a: Tensor, bounds: tuple[tuple[int, int] | None, ...]) -> Tensor:
    """Return a copy with zeros outside of the bounds of axes 3 and up."""
    a = a.clone()
    for axis, bound in enumerate(bounds, 3):
        if bound is not None:
            a.narrow(axis, 0, bound[0]).zero_()
            a.narrow(axis, bound[1], a.shape[axis] - bound[1]).zero_()
    return a


def _assembled(total: Tensor, geometry: Geometry, level: int, scheme: Plan) -> Tensor:
    """Add up the cells ``[cells, g, m, m]`` of each pair, and bring pairs into the order of A."""
    _, g, m, _ = total.shape
    K = prod(d.kernel for d in geometry.dimensions[:level])
    k = prod(d.kernel for d in geometry.dimensions[level:])
    full = 2 * len(scheme.pairs) == K * (K + 1)
    out = (total.new_empty if full else total.new_zeros)(g, m // k, K, k, m // k, K, k)
    parts = (scheme.members.to(total) @ total.flatten(1)).view(-1, g, m // k, k, m // k, k)
    for part, (one, other) in zip(parts, scheme.pairs, strict=True):
        out[:, :, one, :, :, other] = part
        if one != other:
            out[:, :, other, :, :, one] = part.permute(0, 3, 4, 1, 2)
    return out.view(g, m * K, m * K)
