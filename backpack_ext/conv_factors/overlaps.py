"""Which pairs of kernel entries meet the same pairs of input entries, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from backpack_ext.conv_factors.geometry import Dimension
from backpack_ext.conv_factors.kept import kept

# From this share of a dimension on, a segment is multiplied in place, with zeros elsewhere.
WIDE = 0.5


@dataclass(frozen=True)
class Window:
    r"""The input entries that a pair of kernel entries (k, k') meets in one dimension.

    At the output pixels where both are inside of the input, k meets the entries
    :math:`i_j = \text{step} \; j + \text{left}` and k' meets
    :math:`i'_j = \text{step} \; (j + \text{shift}) + \text{right}`, for lo <= j < hi. Pairs that agree
    in left and shift run over the same products and differ in their bounds only.
    """

    left: int
    right: int
    shift: int
    lo: int
    hi: int


def step_of(dimension: Dimension) -> int:
    """Return the distance of the input entries that a kernel entry meets at neighbouring pixels."""
    return 1 if dimension.transposed else dimension.stride


def window(dimension: Dimension, k: int, other: int) -> Window | None:
    """Return what a pair of kernel entries meets; None if there is nothing."""
    d, step = dimension, step_of(dimension)
    if d.transposed:
        # i = (o + before - dilation k) / stride must be whole for both
        distance = d.dilation * (k - other)
        if distance % d.stride:
            return None
        distance //= d.stride
        left, first = 0, -((d.dilation * k - d.before) // d.stride)  # the first i with o >= 0
        last = (d.out - 1 + d.before - d.dilation * k) // d.stride  # the last one with o < out
    else:
        distance = d.dilation * (other - k)
        start = d.dilation * k - d.before
        left = start % step
        first = (start - left) // step
        last = first + d.out - 1
    right = (left + distance) % step
    shift = (left + distance - right) // step
    lo = max(first, 0, -shift)
    hi = min(last, (d.size - 1 - left) // step, (d.size - 1 - right) // step - shift) + 1
    return Window(left, right, shift, lo, hi) if lo < hi else None


class Overlaps:
    """The windows of all pairs of one dimension, cut into segments that pairs share.

    Attributes:
        windows: By pair (k, k'), those that are not empty.
        reach: Largest absolute shift.
        entries: Number of entries of a phase, the last ones of which may be beyond the input.
    """

    def __init__(self, dimension: Dimension):
        K = range(dimension.kernel)
        found = {(k, other): window(dimension, k, other) for k, other in product(K, K)}
        self.windows = {pair: w for pair, w in found.items() if w is not None}
        self.reach = max((abs(w.shift) for w in self.windows.values()), default=0)
        self.step, self.size = step_of(dimension), dimension.size
        self.entries = -(-dimension.size // self.step)
        self._cuts: dict[tuple[int, int], set[int]] = {}
        for w in self.windows.values():
            self._cuts.setdefault((w.left, w.shift), set()).update((w.lo, w.hi))

    def segments(self, w: Window) -> list[tuple[int, int]]:
        """Return the segments of a window."""
        cuts = sorted(c for c in self._cuts[w.left, w.shift] if w.lo <= c <= w.hi)
        return list(pairwise(cuts))

    def is_open(self, w: Window, lo: int, hi: int) -> bool:
        """Whether a segment has all pairs of input entries at the window's shift."""
        left, right = ((self.size - 1 - phase) // self.step + 1 for phase in (w.left, w.right))
        return lo == max(0, -w.shift) and hi == min(left, right - w.shift)

    @property
    def pieces(self) -> int:
        """Number of segments of all groups of pairs."""
        return sum(len(cuts) - 1 for cuts in self._cuts.values())


@kept
def overlaps(dimension: Dimension) -> Overlaps:
    """Return the overlaps of a dimension, kept for later calls."""
    return Overlaps(dimension)


@dataclass(frozen=True)
class Cell:
    """A box of input entries, and the box that it is multiplied with, one entry per dimension.

    ``left`` to ``hi`` are those of `Window`; ``open`` says whether there are no further entries of both
    phases at that shift, so that the bounds need not be kept. ``in_place`` says whether the box is most
    of all dimensions but the first, so that it is multiplied where it lies.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    shift: tuple[int, ...]
    lo: tuple[int, ...]
    hi: tuple[int, ...]
    open: tuple[bool, ...]
    in_place: bool

    @property
    def symmetric(self) -> bool:
        """Whether the two boxes are one."""
        return self.left == self.right and not any(self.shift)


@dataclass(eq=False)
class Plan:
    r"""The products that the moment of some leading dimensions consists of.

    With kernel entries k <= k' of these dimensions (row-major; the others follow by symmetry),
    A_kk' is the sum of :math:`x_i x_{i + \text{shift}}^T` over all entries i of the pair's cells. Every
    cell is added, none subtracted: nothing cancels.

    Args:
        cells: The different cells.
        pairs: The pairs (k, k') that meet anything.
        members: Per pair, which cells it adds up, ``[p, cells]`` of ones and zeros.
        places: For all pairs, row-major, where their sum is in a list of the p sums of ``pairs``, then
            these transposed, then zero.
    """

    cells: tuple[Cell, ...]
    pairs: tuple[tuple[int, int], ...]
    members: Tensor
    places: Tensor


def _pairs(dimensions: tuple[Dimension, ...]) -> Iterator[tuple[tuple, tuple]]:
    entries = list(product(*(range(d.kernel) for d in dimensions)))
    return ((k, other) for n, k in enumerate(entries) for other in entries[n:])


@kept
def plan(dimensions: tuple[Dimension, ...]) -> Plan:
    """Return the plan of dimensions, kept for later calls."""
    each = [overlaps(d) for d in dimensions]
    strides = [1]
    for d in reversed(dimensions[1:]):
        strides.insert(0, strides[0] * d.kernel)
    cells: dict[Cell, int] = {}
    pairs, members = [], []
    for k, other in _pairs(dimensions):
        windows = [o.windows.get(p) for o, p in zip(each, zip(k, other, strict=True), strict=True)]
        if None in windows:
            continue
        fixed = [tuple(getattr(w, name) for w in windows) for name in ("left", "right", "shift")]
        pieces = product(*(o.segments(w) for o, w in zip(each, windows, strict=True)))
        mine = []
        for piece in pieces:
            opened = tuple(o.is_open(w, *p) for o, w, p in zip(each, windows, piece, strict=True))
            lo, hi = zip(*piece, strict=True)
            inner = list(zip(opened, each, piece, strict=True))[1:]
            in_place = all(free or b - a >= WIDE * o.entries for free, o, (a, b) in inner)
            cell = Cell(*fixed, lo, hi, opened, in_place)
            mine.append(cells.setdefault(cell, len(cells)))
        pairs.append(tuple(sum(s * q for s, q in zip(strides, e, strict=True)) for e in (k, other)))
        members.append(mine)
    table = torch.zeros(len(pairs), len(cells))
    for row, mine in zip(table, members, strict=True):
        row[mine] = 1
    K, P = strides[0] * dimensions[0].kernel, len(pairs)
    places = [2 * P] * K**2
    for n, (k, other) in enumerate(pairs):
        places[other * K + k] = P + n
        places[k * K + other] = n
    return Plan(tuple(cells), tuple(pairs), table, torch.tensor(places))
