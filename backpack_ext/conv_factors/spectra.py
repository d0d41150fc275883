r"""Sums over all pairs of pixels at a distance, by the spectra of images.

.. math::  S_{\delta, cc'} = \sum_{ni} x_{nci} x_{nc', i + \delta}
           = \frac{1}{L} \sum_f e^{2 \pi \mathrm{i} f \delta / L} \sum_n \bar y_{ncf} y_{nc'f}

with y the discrete Fourier transform of x, as long as no distance wraps around (L is at least the size
plus the largest distance). Each frequency takes one product over the data, all distances together as
many multiplications as three or four of them take pixel by pixel. Transforms are products with cosines
and sines, which are faster than a fast transform at the sizes of feature maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from backpack_ext.conv_factors.geometry import Dimension
from backpack_ext.conv_factors.kept import kept
from backpack_ext.conv_factors.overlaps import overlaps, plan

# Entries of products of spectra that are formed at once, so that they stay in the cache.
AT_ONCE = 2**18
# Squares of a core below so many roundings of the whole channel's are noise.
NOISE = 16


@dataclass(eq=False)
class Spectral:
    """What the moment of a two-dimensional convolution needs beside its `Plan`, all in float64.

    Args:
        rows, columns: Lengths of the transforms.
        first: Of the second dimension, ``[2 f, W]``: all cosines, then all sines.
        second: Of the first dimension, complex, ``[(f 2), (H 2)]``.
        cosines: Of distances, ``[f (second dimension), distance, f (first one)]``, over L.
        sines: The same.
        distances: All distances.
        cores: Per distance the largest cell, which follows from the others.
        others: Which cells these are, ``[distance, cells]`` of ones and zeros.
        borders: The cells that are no core.
    """

    rows: int
    columns: int
    first: Tensor
    second: Tensor
    cosines: Tensor
    sines: Tensor
    distances: tuple[tuple[int, ...], ...]
    cores: tuple[int, ...]
    others: Tensor
    borders: tuple[int, ...]


@kept
def spectral(dimensions: tuple[Dimension, ...]) -> Spectral | None:
    """Return what `lagged` needs; None unless both of two dimensions have one phase, all of it used."""
    if len(dimensions) != 2 or any(overlaps(d).step != 1 for d in dimensions):
        return None
    scheme, sizes = plan(dimensions), [d.size for d in dimensions]
    by_distance: dict[tuple[int, ...], list[int]] = {}
    for n, cell in enumerate(scheme.cells):
        by_distance.setdefault(cell.shift, []).append(n)
    area = [(cell.hi[0] - cell.lo[0]) * (cell.hi[1] - cell.lo[1]) for cell in scheme.cells]
    for distance, cells in by_distance.items():
        whole = (sizes[0] - abs(distance[0])) * (sizes[1] - abs(distance[1]))
        if sum(area[n] for n in cells) != whole:
            return None
    if not by_distance:
        return None
    distances = tuple(by_distance)
    cores = tuple(max(cells, key=area.__getitem__) for cells in by_distance.values())
    others = torch.zeros(len(cores), len(scheme.cells), dtype=torch.float64)
    for row, core, cells in zip(others, cores, by_distance.values(), strict=True):
        row[cells] = 1
        row[core] = 0
    H, W = (d.size + overlaps(d).reach for d in dimensions)
    first = torch.view_as_real(_waves(W // 2 + 1, sizes[1], W)).movedim(-1, 0).flatten(0, 1)
    waves = _waves(H, sizes[0], H)
    parts = [torch.stack(row, -1) for row in ((waves.real, -waves.imag), (waves.imag, waves.real))]
    second = torch.stack(parts, 1).flatten(2).flatten(0, 1)
    down, right = torch.tensor(distances, dtype=torch.float64).unbind(1)
    turns = torch.arange(W // 2 + 1)[:, None, None] * right[:, None] / W
    phases = turns + torch.arange(H) * down[:, None] / H
    counts = torch.full((W // 2 + 1, 1, 1), 2.0, dtype=torch.float64)  # f and -f
    counts[0] = 1
    if W % 2 == 0:
        counts[-1] = 1
    weights = counts / (H * W)
    cosines, sines = (weights * wave(2 * pi * phases) for wave in (torch.cos, torch.sin))
    borders = tuple(n for n in range(len(scheme.cells)) if n not in cores)
    return Spectral(H, W, first, second, cosines, sines, distances, cores, others, borders)


def _waves(frequencies: int, size: int, length: int) -> Tensor:
    """Return the first rows and columns of a discrete Fourier transform."""
    turns = torch.arange(frequencies)[:, None] * torch.arange(size) % length
    return torch.polar(torch.ones(()).double(), -2 * pi / length * turns.double())


def lagged(x: Tensor, scheme: Spectral) -> Tensor:
    """Return the sums ``[distance, c, c']`` over all pairs of pixels of images ``[n, c, H, W]``."""
    n, c, size, _ = x.shape
    first, second, cosines, sines = (
        t.to(x) for t in (scheme.first, scheme.second, scheme.cosines, scheme.sines)
    )
    frequencies, L = len(first) // 2, scheme.rows
    y = torch.bmm(first.expand(size, -1, -1), x.flatten(0, 1).permute(1, 2, 0))  # [H, (2 f), (n c)]
    y = y.view(2 * size, frequencies, n * c).transpose(0, 1)
    at_once = max(1, AT_ONCE // (L * c * c))
    even = x.new_zeros(len(scheme.distances), c * c)
    odd = torch.zeros_like(even)
    for a in range(0, frequencies, at_once):
        part = y[a : a + at_once]
        z = torch.matmul(second, part).view(-1, 2 * n, c)  # [(f f'), (2 n), c]
        even.addmm_(_flat(cosines[a : a + at_once]), torch.bmm(z.mT, z).flatten(1))
        product = torch.bmm(z[:, :n].mT, z[:, n:])
        odd.addmm_(_flat(sines[a : a + at_once]), product.flatten(1))
    even, odd = even.view(-1, c, c), odd.view(-1, c, c)
    return even.sub_(odd).add_(odd.mT)


def inner_sums(whole: Tensor, edges: list[Tensor], scheme: Spectral) -> Tensor:
    """Return the cores' sums ``[distance, c, c']``: those of `lagged` without those of the borders.

    Errors are relative to the squares of whole channels. A channel that is active at the border only has
    nothing in the core: what rounding leaves of its square, which may be negative, becomes zero.

    Args:
        whole: What `lagged` returns.
        edges: The sums of the other cells, ``[c, c']``, as `Spectral.borders` lists them.
        scheme: The scheme.
    """
    if not edges:
        return whole
    border = scheme.others[:, list(scheme.borders)].to(whole) @ torch.stack(edges).flatten(1)
    inner = whole - border.view_as(whole)
    square = scheme.distances.index((0, 0))
    noise = NOISE * torch.finfo(whole.dtype).eps * whole[square].diagonal()
    seen = inner[square].diagonal() > noise
    inner[square] *= seen & seen[:, None]
    return inner


def _flat(weights: Tensor) -> Tensor:
    return weights.transpose(0, 1).flatten(1)
