"""One spatial dimension of patch means: how much of each input entry a kernel entry's mean has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from backpack_ext.conv_factors.geometry import Geometry
from backpack_ext.conv_factors.kept import kept


@dataclass(frozen=True, eq=False)
class Core:
    r"""Rows of an `Axis` whose middle repeats itself: it is summed before anything is multiplied.

    .. math::
        \sum_i x_i W_{ik} = \sum_{i < l} x_i W_{ik}
            + \sum_{b < B} W_{l + b, k} \sum_m x_{l + m B + b} + \sum_{i \geq h} x_i W_{ik}

    with :math:`l` = ``low``, :math:`h` = ``high``, B = ``period``. Nothing is subtracted, so that
    nothing cancels.

    Args:
        first: The first row that any kernel entry meets.
        low: The first row of the core.
        high: The row behind the core; ``high - low`` is a multiple of the period.
        last: The row behind the last one that any kernel entry meets.
        period: B; the stride, or a multiple.
        weights: ``[J, K]``: the rows before the core, one period of it, and the rows behind.
    """

    first: int
    low: int
    high: int
    last: int
    period: int
    weights: Tensor

    @property
    def rows(self) -> int:
        """Number of rows J that remain."""
        return len(self.weights)


@dataclass(frozen=True, eq=False)
class Axis:
    """The weights ``[I, K]`` of one dimension, whose product over dimensions gives patch means.

    Args:
        step: Only each ``step``-th input entry is met, from ``start`` on; ``weights`` has only those.
        start: The first of them.
        weights: ``[I, K]`` in float64: how often kernel entry k meets entry i, over the number of
            output pixels.
        stride: The convolution's stride, in input entries; 1 for a transposed convolution.
    """

    start: int
    step: int
    weights: Tensor
    stride: int

    @property
    def size(self) -> int:
        """Number of input entries I that may be met."""
        return len(self.weights)

    @property
    def entries(self) -> slice:
        """Those of the input that may be met."""
        return slice(self.start, self.start + self.step * self.size, self.step)

    @cached_property
    def cores(self) -> tuple[Core, ...]:
        """The ways to sum a core, that leave fewer rows than there are; by period."""
        periods = {1, self.stride, self.stride * -(-WIDE // self.stride)}
        found = (self._core(period) for period in sorted(periods))
        return tuple(core for core in found if core is not None and core.rows < self.size)

    def core(self, period: int) -> Core | None:
        """Return the core of a period of `cores`; None for 0."""
        return next(core for core in self.cores if core.period == period) if period else None

    def _core(self, period: int) -> Core | None:
        """Return the core that covers the longest run of rows which repeat after a period."""
        W = self.weights
        if self.size <= period:
            return None
        met = W.any(1).nonzero().flatten()
        low, length = _longest_run((W[:-period] == W[period:]).all(1))
        count = length // period + 1
        first, last = int(met[0]), int(met[-1]) + 1
        high = low + count * period
        weights = torch.cat([W[first:low], W[low : low + period], W[high:last]])
        return Core(min(first, low), low, high, max(last, high), period, weights)


# Sums over rows are vectorised over what is behind a row: wide enough if there are this many entries.
WIDE = 64


def _longest_run(same: Tensor) -> tuple[int, int]:
    """Return where the longest run of True begins, and its length."""
    ends = torch.cat([torch.tensor([-1]), (~same).nonzero().flatten(), torch.tensor([len(same)])])
    lengths = ends.diff() - 1
    k = int(lengths.argmax())
    return int(ends[k]) + 1, int(lengths[k])


@kept
def axes_of(geometry: Geometry) -> tuple[Axis, ...]:
    """Return the dimensions' weights, of the input as it is: its padding is part of them."""
    return tuple(_axis(geometry, d) for d in range(len(geometry.dimensions)))


def _axis(geometry: Geometry, d: int) -> Axis:
    dimension = geometry.dimensions[d]
    met = dimension.met()
    if geometry.mode is not None:
        at = 2 * (len(geometry.dimensions) - 1 - d)
        before, after = geometry.widths[at : at + 2]
        size = dimension.size - before - after
        # where the entries of the padded input come from
        source = F.pad(torch.arange(size).double()[None, None], (before, after), mode=geometry.mode)
        met = met.new_zeros(size, dimension.kernel).index_add_(0, source.long().flatten(), met)
    used = met.any(1).nonzero().flatten()
    start, step = 0, 1
    if not len(used):  # all pixels are in the padding: one entry stands for all, with weight zero
        used = torch.tensor([0])
    if len(used) == 1 or (len(used) > 1 and len(set(used.diff().tolist())) == 1):
        gap = int(used[1] - used[0]) if len(used) > 1 else len(met)
        if gap > 1:  # what is left out is a whole part of the input, not an edge
            start, step, met = int(used[0]), gap, met[used]
    stride = 1 if dimension.transposed else dimension.stride
    return Axis(start, step, met.double() / dimension.out, stride)
