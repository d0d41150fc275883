r"""In how many dimensions a convolution's moment makes use of overlaps: what is fastest.

The time of a level (see `backpack_ext.conv_factors.moments`), whose products have m columns, is taken
to be

.. math::  \frac{\text{multiply-adds}}{\text{rate} \; m / (m + h)}
           + \text{copy} \; \text{entries laid out or copied} + \text{write} \; \text{entries of } A
           + \text{call} \; \text{small operations}

with multiply-adds of all products, of which symmetric ones of more than `NARROW` columns count 0.6;
at level 0, where A is a product itself, half of the writing. Spectra have to be faster by a margin:
what only adds is more accurate. On GPUs, where they are not measured, they are not thought of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from operator import add, sub

from backpack_ext.conv_factors.geometry import Dimension, Geometry
from backpack_ext.conv_factors.overlaps import Cell, overlaps, plan
from backpack_ext.conv_factors.spectra import Spectral, spectral

# Up to this many columns, products of many rows use one core only unless the rows are divided, and
# half a product is not faster than a whole one.
NARROW = 256
# Share of a whole product's time that half of it takes.
HALF = 0.6
# Entries that are laid out at once, and how many times as many of spectra.
WORKSPACE, SPECTRA = 2**22, 4
# Columns that are this small a part of the input are copied once for all cells.
FEW = 8
# From this many entries of A on, it is put together pair by pair; before, by about so many operations.
LARGE, JOINING = 2**21, 10
# What a multiply-add of transforms, and of sums over frequencies, takes beside one of large products;
# the former gain little from a second core.
TRANSFORMING, SUMMING = 1.8, 0.3
# So many images times channels are transformed at half the rate.
FEW_ROWS = 512
# By how much spectra have to be faster.
MARGIN = 1.25
# Levels with more products than this are not thought of.
PRODUCTS = 1500


@dataclass(frozen=True)
class Machine:
    """What takes how long.

    Args:
        rate: Multiply-adds per second of large products.
        half: Number of columns with half of that rate, h.
        copy: Seconds to lay out an entry.
        write: Seconds to write an entry of A.
        call: Seconds that a small operation takes at least.
    """

    rate: float
    half: float
    copy: float
    write: float
    call: float


# One core, float32, measured; with more cores everything but calls is faster by about the same factor.
# The figures of GPUs are taken from data sheets, not measured.
CPU = Machine(rate=46e9, half=40, copy=1.2e-9, write=2.5e-9, call=16e-6)
GPU = Machine(rate=10e12, half=128, copy=2e-11, write=1e-11, call=8e-6)


def columns(channels: int, geometry: Geometry, level: int) -> int:
    """Return the number of columns m of products, ``(c k)`` with k of the unfolded dimensions."""
    return channels // geometry.groups * prod(d.kernel for d in geometry.dimensions[level:])


def rows_of(geometry: Geometry, level: int) -> int:
    """Return the number of rows that a datum is laid out in."""
    dims = geometry.dimensions
    return max(1, prod(d.size for d in dims[:level]) * prod(d.out for d in dims[level:]))


def data_at_once(n: int, channels: int, geometry: Geometry, level: int, workspace: int) -> int:
    """Return the number of data that are laid out at once."""
    m, rows = columns(channels, geometry, level), rows_of(geometry, level)
    each = geometry.groups * rows * m
    # adding up results is to cost little beside the products: at least as many rows as columns
    fewest = -(-2 * m // rows)
    if level > len(geometry.dimensions):  # each frequency has a row per datum
        fewest = min(m, SPECTRA * workspace // each)
    most = max(1, workspace // each, fewest)
    return -(-n // -(-n // most))  # in parts of about equal size


@lru_cache(maxsize=4096)
def best_level(n: int, channels: int, geometry: Geometry, device: str = "cpu") -> int:
    """Return the level that takes the shortest time on n images of so many channels."""
    dims = len(geometry.dimensions)
    if geometry.entries == 1:
        return 0
    times = [seconds(n, channels, geometry, level, device) for level in range(dims + 2)]
    times[-1] *= MARGIN
    return min(range(dims + 2), key=times.__getitem__)


def seconds(n: int, channels: int, geometry: Geometry, level: int, device: str = "cpu") -> float:
    """Return how long a level is expected to take; infinity if it has too many products."""
    machine = CPU if device == "cpu" else GPU
    g, m = geometry.groups, columns(channels, geometry, level)
    size, rows = columns(channels, geometry, 0), n * rows_of(geometry, level)
    half = HALF if m > NARROW else 1.0
    rate = machine.rate * m / (m + machine.half)
    if level == 0:
        products = g * rows * m * m * half / rate
        return products + machine.copy * g * rows * m + machine.write * g * size * size / 2
    kept = geometry.dimensions[:level]
    if _many(kept):
        return float("inf")
    scheme, unfolded = plan(kept), g * n * prod(d.out for d in geometry.dimensions[level:])
    calls = len(scheme.cells) + (JOINING if g * size * size < LARGE else 2 * len(scheme.pairs))
    found = machine.write * g * size * size + machine.call * calls
    if level > len(geometry.dimensions):
        spectra = spectral(kept) if g == 1 and device == "cpu" else None
        if spectra is None:
            return float("inf")
        once = data_at_once(max(1, n), channels, geometry, level, WORKSPACE)
        return found + _of_spectra(n, once, m, kept, spectra, machine)
    work, copied = _of_cells(scheme.cells, kept, half)
    return found + unfolded * (work * m * m / rate + machine.copy * m * copied)


def _of_cells(cells: Sequence[Cell], kept: Sequence[Dimension], half: float) -> tuple[float, int]:
    """Return multiply-adds of cells per square of the columns, and entries laid out per column."""
    inner = prod(overlaps(d).entries + overlaps(d).reach for d in kept[1:])
    whole = overlaps(kept[0]).entries * inner
    work, copied, masks, cuts = 0.0, 0, set(), set()
    for cell in cells:
        sides = [hi - lo for lo, hi in zip(cell.lo, cell.hi, strict=True)]
        box = sides[0] * inner if cell.in_place else prod(sides)
        work += box * (half if cell.symmetric else 1.0)
        if cell.in_place:
            if not all(cell.open[1:]):
                masks.add((cell.left, cell.lo[1:], cell.hi[1:]))
        elif prod(sides[1:]) * FEW <= inner:  # columns that cells share
            moved = (tuple(map(add, end[1:], cell.shift[1:])) for end in (cell.lo, cell.hi))
            cuts |= {(cell.left, cell.lo[1:], cell.hi[1:]), (cell.right, *moved)}
        else:
            copied += box if cell.symmetric else 2 * box
    copied += sum(whole // inner * prod(map(sub, his, los)) for _, los, his in cuts)
    phases = prod(overlaps(d).step for d in kept)
    return work, copied + whole * (len(masks) + phases)


def _of_spectra(
    n: int, once: int, c: int, kept: tuple[Dimension, ...], spectra: Spectral, machine: Machine
) -> float:
    """Return the seconds of sums over n whole images, some at once, and over their borders."""
    frequencies, (H, W), half = spectra.frequencies, (d.size for d in kept), machine.half / 2
    transforms = 2 * (n * c + FEW_ROWS) * frequencies * H * (W + 2 * spectra.rows)
    products = 3 * n * (1 + half / c) * (1 + half / once)
    products += 2 * n / once * SUMMING * len(spectra.distances)
    work = TRANSFORMING * transforms + frequencies * spectra.rows * c * c * products
    cells = [plan(kept).cells[k] for k in spectra.borders]
    border = n * c * sum(prod(map(sub, cell.hi, cell.lo)) for cell in cells)
    work += border * (c + machine.half)
    return work / machine.rate + 2 * machine.copy * border


def product_is_faster(n: int, channels: int, geometry: Geometry, device: str = "cpu") -> bool:
    """Whether one product of patches that are there already takes the shortest time."""
    level = best_level(n, channels, geometry, device)
    if level == 0:
        return True
    machine, m = CPU if device == "cpu" else GPU, columns(channels, geometry, 0)
    copies = machine.copy * geometry.groups * n * rows_of(geometry, 0) * m
    formed = seconds(n, channels, geometry, 0, device) - copies
    return formed <= seconds(n, channels, geometry, level, device)


def _many(kept: tuple) -> bool:
    """Whether so many dimensions have too many products, or pairs, to be counted."""
    if prod(d.kernel for d in kept) ** 2 > 2 * PRODUCTS:
        return True  # overlaps of long kernels take long to list
    return prod(overlaps(d).pieces for d in kept) > 2 * PRODUCTS
