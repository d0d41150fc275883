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
D + 1 spectral, in two dimensions    three of C columns per frequency, of data only       2 to 4 x
===== ============================== ==================================================== ===========

and few, small ones at the borders. Up to Toeplitz, entries are only added, never subtracted, so that a
level is as accurate as another: each entry to some roundings of sqrt(A_ii A_jj). By spectra
(`backpack_ext.conv_factors.spectra`) sums run over whole images, and what is at the borders is
subtracted for the pairs that miss it: entries are accurate to some roundings of the squares of their
channels, sqrt(E_c E_c'). The two differ for channels that are large at the border only; no entry of the
diagonal becomes negative, and what is zero there stays so.

Strides split a dimension into phases that are treated as images of their own. In a transposed
convolution a pair meets nothing unless k - k' is a multiple of the stride, so that the higher levels
skip most pairs. Data are taken some at a time, such that what is formed stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from operator import add

import torch
from torch import Tensor

from backpack_ext.conv_factors.choice import FEW, LARGE, NARROW, WORKSPACE, best_level, data_at_once
from backpack_ext.conv_factors.geometry import Geometry
from backpack_ext.conv_factors.layout import layout
from backpack_ext.conv_factors.overlaps import Cell, Plan, plan
from backpack_ext.conv_factors.spectra import Spectral, inner_sums, lagged, spectral
from curvature.panels import symmetric_product


def moment(
    x: Tensor,
    geometry: Geometry,
    level: int | None = None,
    dtype: torch.dtype | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    r"""Return :math:`\sum_{no} u_{no} u_{no}^T` as ``[g, (c k), (c k)]``, a sum over data and pixels.

    Args:
        x: Input ``[n, C, *I]`` of the convolution.
        geometry: The convolution's geometry.
        level: In how many dimensions overlaps are made use of, 0 to all, or one more for spectra; that
            of `best_level` if None.
        dtype: Data type of products and sums; that of x but at least float32 by default.
        workspace: Entries that are laid out at once, unless a datum has more.

    Raises:
        ValueError: If there are not so many dimensions, or a convolution's spectra are of no use.

    Example:
        >>> from torch import nn
        >>> conv, x = nn.Conv1d(1, 1, 2, bias=False), torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> moment(x, Geometry.of(conv, x.shape, conv(x).shape))  # patches (1, 2) and (2, 4)
        tensor([[[ 5., 10.],
                 [10., 20.]]])
    """
    dims = geometry.dimensions
    if level is None:
        level = best_level(len(x), x.shape[1], geometry, x.device.type)
    if not 0 <= level <= len(dims) + 1:
        raise ValueError(f"moment: level={level!r}; expected 0 to {len(dims)} dimensions, or one more.")
    dtype = dtype or torch.promote_types(x.dtype, torch.float32)
    scheme = plan(dims[:level]) if level else None
    if not len(x) or (scheme is not None and not scheme.cells):
        size = x.shape[1] // geometry.groups * geometry.entries
        return x.new_zeros(geometry.groups, size, size, dtype=dtype)
    spectra = None
    if level > len(dims):
        spectra = spectral(dims) if geometry.groups == 1 else None
        if spectra is None:
            raise ValueError(
                "moment: spectra are for convolutions of two dimensions, stride 1 and one group, all of "
                "whose input is used."
            )
    total: list[Tensor] = []
    for part in x.split(data_at_once(len(x), x.shape[1], geometry, level, workspace)):
        part = geometry.padded(part.to(dtype))
        if scheme is None:
            found = [_whole(part, geometry)]
        elif spectra is None:
            found = _cells(layout(part, geometry, level), scheme)
        else:
            found = [lagged(part, dims), *_borders(part, [scheme.cells[n] for n in spectra.borders])]
        total = [t.add_(f) for t, f in zip(total, found, strict=True)] if total else found
    if scheme is None:
        return total[0]
    if spectra is not None:
        total = _with_cores(total, spectra)
    return _assembled(total, geometry, level, scheme)


def _with_cores(sums: list[Tensor], spectra: Spectral) -> list[Tensor]:
    """Return the products of all cells, given sums over whole images and the cells at the borders."""
    whole, *edges = sums
    inner = inner_sums(whole, [edge[0] for edge in edges], spectra)
    found = dict(zip(spectra.borders, edges, strict=True))
    found |= zip(spectra.cores, inner.unsqueeze(1), strict=True)
    return [found[n] for n in range(len(found))]


def _borders(x: Tensor, cells: Sequence[Cell]) -> list[Tensor]:
    """Return the products of small cells of images of one phase, ``[1, c, c]`` each."""
    known: dict[tuple, Tensor] = {}

    def box(lo: tuple[int, ...], hi: tuple[int, ...]) -> Tensor:
        if (lo, hi) not in known:
            part = x[(..., *map(slice, lo, hi))]
            known[lo, hi] = part.transpose(0, 1).reshape(1, x.shape[1], -1)
        return known[lo, hi]

    found = []
    for cell in cells:
        moved = (tuple(map(add, end, cell.shift)) for end in (cell.lo, cell.hi))
        other = None if cell.symmetric else box(*moved)
        found.append(_product(box(cell.lo, cell.hi), other))
    return found


def _whole(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the moment of level 0."""
    if geometry.entries == 1 and geometry.groups == 1 and _plain(geometry):
        pixels = x.flatten(2)
        if pixels.shape[2] >= 2 * x.shape[1] and pixels.stride(2) == 1:
            return torch.bmm(pixels, pixels.mT).sum(0, keepdim=True)  # without a copy
    (u,) = layout(x, geometry, 0).values()
    return _product(u.flatten(2), None)


def _plain(geometry: Geometry) -> bool:
    """Whether a kernel of one entry meets each input entry once."""
    return all(d.stride == 1 and d.before == 0 and d.out == d.size for d in geometry.dimensions)


def _product(a: Tensor, b: Tensor | None) -> Tensor:
    """Return ``sum_r a[g,i,r] b[g,j,r]``, with b = a if None, on all cores."""
    g, m, r = a.shape
    if b is None and m > NARROW:
        return symmetric_product(a)
    b = a if b is None else b
    cores = torch.get_num_threads() if a.device.type == "cpu" and g == 1 and m <= NARROW else 1
    if cores == 1 or r < 64 * cores:
        return a @ b.mT
    rest = r % cores
    one, other = (t[0, :, : r - rest].unflatten(1, (cores, r // cores)).transpose(0, 1) for t in (a, b))
    found = (one @ other.mT).sum(0, keepdim=True)
    return found.add_(a[..., r - rest :] @ b[..., r - rest :].mT) if rest else found


def _cells(phases: dict[tuple[int, ...], Tensor], scheme: Plan) -> list[Tensor]:
    """Return the products of all cells, ``[g, m, m]`` each."""
    known: dict[tuple, Tensor] = {}
    return [_cell(phases, cell, known) for cell in scheme.cells]


def _cell(phases: dict[tuple[int, ...], Tensor], cell: Cell, known: dict[tuple, Tensor]) -> Tensor:
    """Return the product of one cell, ``[g, m, m]``; ``known`` are copies that several cells need."""
    a, b = phases[cell.left], phases[cell.right]  # [g, m, J_1, n, J_2, ...]
    (lo, *los), (hi, *his), (shift, *shifts) = cell.lo, cell.hi, cell.shift
    inner = list(enumerate(zip(los, his, shifts, cell.open[1:], strict=True), 4))
    if not cell.in_place:
        one = _cut(a, cell.left, [(start, end) for _, (start, end, _, _) in inner], known)
        one = one[:, :, lo:hi].flatten(2)
        if cell.symmetric:
            return _product(one, None)
        moved = [(start + move, end + move) for _, (start, end, move, _) in inner]
        other = _cut(b, cell.right, moved, known)
        return _product(one, other[:, :, lo + shift : hi + shift].flatten(2))
    bounds = tuple(None if opened else (start, end) for _, (start, end, _, opened) in inner)
    if any(bounds):
        key = (cell.left, bounds)
        if key not in known:
            known[key] = _masked(a, bounds)
        a = known[key]
    # All pairs at one distance in memory; where a shift leaves a row it meets the zeros behind it.
    stride = prod(a.shape[3:])
    distance = shift * stride + sum(move * prod(a.shape[axis + 1 :]) for axis, (_, _, move, _) in inner)
    one, other = a.flatten(2), b.flatten(2)
    first, last = max(lo * stride, -distance), min(hi * stride, other.shape[2] - distance)
    one, other = one[..., first:last], other[..., first + distance : last + distance]
    return _product(one, None if cell.symmetric and not any(bounds) else other)


def _cut(
    a: Tensor, phase: tuple[int, ...], ranges: list[tuple[int, int]], known: dict[tuple, Tensor]
) -> Tensor:
    """Return the ranges of axes 4 and up, in memory of their own where they are few columns."""
    key, whole = (phase, "cut", *ranges), a
    if key in known:
        return known[key]
    for axis, (start, end) in enumerate(ranges, 4):
        a = a.narrow(axis, start, end - start)
    if a.numel() * FEW <= whole.numel():  # cells at a border share its columns
        a = known[key] = a.contiguous()
    return a


def _masked(a: Tensor, bounds: tuple[tuple[int, int] | None, ...]) -> Tensor:
    """Return a copy with zeros outside of the bounds of axes 4 and up."""
    a = a.clone()
    for axis, bound in enumerate(bounds, 4):
        if bound is not None:
            a.narrow(axis, 0, bound[0]).zero_()
            a.narrow(axis, bound[1], a.shape[axis] - bound[1]).zero_()
    return a


def _assembled(cells: list[Tensor], geometry: Geometry, level: int, scheme: Plan) -> Tensor:
    """Add up the cells ``[g, m, m]`` of each pair, and bring pairs into the order of A."""
    g, m, _ = cells[0].shape
    K = prod(d.kernel for d in geometry.dimensions[:level])
    k = prod(d.kernel for d in geometry.dimensions[level:])
    c = m // k
    if g * m * m * K * K < LARGE:
        found = (scheme.members.to(cells[0]) @ torch.stack(cells).flatten(1)).view(-1, g, m, m)
        found = torch.cat([found, found.mT, found.new_zeros(1, g, m, m)])
        found = found.index_select(0, scheme.places.to(found.device))
        found = found.view(K, K, g, c, k, c, k).permute(2, 3, 0, 4, 5, 1, 6)
        return found.reshape(g, m * K, m * K).contiguous()
    full = 2 * len(scheme.pairs) == K * (K + 1)
    out = (cells[0].new_empty if full else cells[0].new_zeros)(g, c, K, k, c, K, k)
    mine = (row.nonzero().flatten().tolist() for row in scheme.members)
    sums = (reduce(torch.add, [cells[q] for q in row]) for row in mine)  # not formed all at once
    for part, (one, other) in zip(sums, scheme.pairs, strict=True):
        part = part.view(g, c, k, c, k)
        out[:, :, one, :, :, other] = part
        if one != other:
            out[:, :, other, :, :, one] = part.permute(0, 3, 4, 1, 2)
    return out.view(g, m * K, m * K)
