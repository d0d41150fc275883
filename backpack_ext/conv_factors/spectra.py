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
    """What the moment of a two-dimensional convolution by spectra consists of, beside its `Plan`.

    Args:
        rows: Length of the transform along the first dimension.
        columns: Length of the one along the second dimension.
        distances: All distances.
        cores: Per distance the largest cell, which follows from the others.
        borders: The cells that are no core.
        members: Which of these each distance has, ``[distance, borders]`` of ones and zeros.
    """

    rows: int
    columns: int
    distances: tuple[tuple[int, ...], ...]
    cores: tuple[int, ...]
    borders: tuple[int, ...]
    members: Tensor

    @property
    def frequencies(self) -> int:
        """Number of frequencies of the second dimension; the others are their conjugates."""
        return self.columns // 2 + 1


@kept
def spectral(dimensions: tuple[Dimension, ...]) -> Spectral | None:
    """Return the scheme; None unless both of two dimensions have one phase, all of it used."""
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
    cores = tuple(max(cells, key=area.__getitem__) for cells in by_distance.values())
    borders = tuple(n for n in range(len(scheme.cells)) if n not in cores)
    shifts = [scheme.cells[n].shift for n in borders]
    members = torch.tensor([[shift == distance for shift in shifts] for distance in by_distance])
    rows, columns = (d.size + overlaps(d).reach for d in dimensions)
    return Spectral(rows, columns, tuple(by_distance), cores, borders, members)


@kept
def transforms(dimensions: tuple[Dimension, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the matrices of `lagged` in float64.

    They are larger than schemes, and made for geometries only whose moments are taken in this way.

    Returns:
        The transform along the second dimension, ``[2 f, W]`` with all cosines, then all sines; the
        complex one along the first dimension, ``[(f 2), (H 2)]``; cosines and sines of the distances,
        ``[f (second dimension), distance, f (first one)]``, with the weights of the sum.
    """
    scheme, (height, width) = spectral(dimensions), (d.size for d in dimensions)
    H, W, count = scheme.rows, scheme.columns, scheme.frequencies
    first = torch.view_as_real(_waves(count, width, W)).movedim(-1, 0).flatten(0, 1)
    waves = _waves(H, height, H)
    parts = [torch.stack(row, -1) for row in ((waves.real, -waves.imag), (waves.imag, waves.real))]
    second = torch.stack(parts, 1).flatten(2).flatten(0, 1)
    down, right = torch.tensor(scheme.distances, dtype=torch.float64).unbind(1)
    turns = torch.arange(count)[:, None, None] * right[:, None] / W
    phases = turns + torch.arange(H) * down[:, None] / H
    counts = torch.full((count, 1, 1), 2.0, dtype=torch.float64)  # f and -f
    counts[0] = 1
    if W % 2 == 0:
        counts[-1] = 1
    weights = counts / (H * W)
    cosines, sines = (weights * wave(2 * pi * phases) for wave in (torch.cos, torch.sin))
    return first, second, cosines, sines


def _waves(frequencies: int, size: int, length: int) -> Tensor:
    """Return the first rows and columns of a discrete Fourier transform."""
    turns = torch.arange(frequencies)[:, None] * torch.arange(size) % length
    return torch.polar(torch.ones(()).double(), -2 * pi / length * turns.double())


def lagged(x: Tensor, dimensions: tuple[Dimension, ...]) -> Tensor:
    """Return the sums ``[distance, c, c']`` over all pairs of pixels of images ``[n, c, H, W]``."""
    scheme, (n, c, size, _) = spectral(dimensions), x.shape
    first, second, cosines, sines = (t.to(x) for t in transforms(dimensions))
    frequencies = scheme.frequencies
    y = torch.bmm(first.expand(size, -1, -1), x.flatten(0, 1).permute(1, 2, 0))  # [H, (2 f), (n c)]
    y = y.view(2 * size, frequencies, n * c).transpose(0, 1)
    at_once = max(1, AT_ONCE // (scheme.rows * c * c))
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
        edges: The sums of the other cells, ``[c, c']``, in the order of `Spectral.borders`.
        scheme: The scheme.
    """
    if not edges:
        return whole
    border = scheme.members.to(whole) @ torch.stack(edges).flatten(1)
    inner = whole - border.view_as(whole)
    square = scheme.distances.index((0, 0))
    noise = NOISE * torch.finfo(whole.dtype).eps * whole[square].diagonal()
    seen = inner[square].diagonal() > noise
    inner[square] *= seen & seen[:, None]
    return inner


def _flat(weights: Tensor) -> Tensor:
    return weights.transpose(0, 1).flatten(1)
