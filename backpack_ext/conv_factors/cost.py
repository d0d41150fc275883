r"""What the ways to compute patch means cost, and which one is the cheapest.

Patch means of an input ``x[r,c,I]`` are its product with weights that factor over the dimensions,
:math:`\hat x_{rck} = \sum_i x_{rci} \prod_d W^d_{i_d k_d}`. A `Plan` says in which order:

============= ====================================================================================
core          In the interior of a dimension all kernel entries (of one stride phase) meet the same
              entries: these are summed first, once for all, and only the edges are kept beside the
              sum. Reads x once and leaves few rows.
joined        One product of what is left with the product of the weights, ``[J, K]``.
separable     One product per dimension, the last one first.
============= ====================================================================================

Without edges in any dimension (1x1 kernels, kernels that tile the input, transposed convolutions whose
output is not cut, circular padding) nothing but sums remains.

The costs, in nanoseconds, are linear in what a step reads, multiplies and writes, plus its call. They
are those of one core in float32, measured by ``python -m benchmarks.conv_factors``, which also prints
where the choice was not the fastest. On accelerators only their ratios to a call differ: there calls and
reads count, from the data sheet of an H100; not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from backpack_ext.conv_factors.axis import axes_of
from backpack_ext.conv_factors.geometry import Geometry

# Largest number of entries of a joined weight matrix: it is cached, and beyond it no product is cheap.
MAX_JOINED = 1 << 18
# Products with inputs in the memory format channels_last need no copy from that many channels on; for
# fewer the product of each image is a narrow one, which is slower than a copy.
WIDE_CHANNELS = 16


@dataclass(frozen=True)
class Plan:
    """How to compute patch means.

    Args:
        periods: Per dimension the period of the core that is summed first; 0 for none.
        joined: Whether all dimensions that are left are multiplied at once.
    """

    periods: tuple[int, ...]
    joined: bool

    def rows(self, geometry: Geometry) -> list[int]:
        """Return how many rows of each dimension are left for the product."""
        pairs = zip(axes_of(geometry), self.periods, strict=True)
        return [axis.core(period).rows if period else axis.size for axis, period in pairs]

    def is_sum(self, geometry: Geometry) -> bool:
        """Whether one sum over all dimensions is left: no kernel entry has an edge."""
        return all(rows == 1 for rows in self.rows(geometry))

    def __str__(self) -> str:
        """Name it, as in ``"core 2,- joined"``: a core of period 2 in the first dimension."""
        core = "core " + ",".join(str(p or "-") for p in self.periods) + " " if any(self.periods) else ""
        return core + ("joined" if self.joined else "separable")


@dataclass(frozen=True)
class Costs:
    """Costs of steps in nanoseconds.

    Args:
        call: One operation.
        summed: Reading an entry for a sum.
        chunk: A contiguous piece of a sum over rows, over which it is vectorised.
        line: A sum along the last dimension, beyond its entries.
        read: Reading an entry for a product.
        jump: Reading an entry whose neighbours are in other rows.
        multiplied: A multiplication and addition of a product.
        width: The columns of a product are filled up to a multiple of it.
        written: Copying an entry.
    """

    call: float
    summed: float
    chunk: float
    line: float
    read: float
    jump: float
    multiplied: float
    width: int
    written: float

    def columns(self, kernel: int) -> int:
        """Return how many columns a product with that many kernel entries has.

        On CPUs those beyond a multiple of ``width`` are slow: measured, 9 columns take 3.6 times as long
        as 16, and 2 take longer than 16. A single one is a product with a vector, which is not.
        """
        return kernel if kernel == 1 else -(-kernel // self.width) * self.width


CPU = Costs(
    5500,
    summed=0.085,
    chunk=0.7,
    line=4.5,
    read=0.18,
    jump=2.0,
    multiplied=0.021,
    width=16,
    written=0.95,
)
ACCELERATOR = Costs(
    5000,
    summed=0.0015,
    chunk=0.0,
    line=0.0,
    read=0.0015,
    jump=0.0015,
    multiplied=0.00005,
    width=1,
    written=0.003,
)


def costs_of(kind: str) -> Costs:
    """Return the costs on a kind of device, as `torch.device.type` names it."""
    return CPU if kind == "cpu" else ACCELERATOR


def cost(plan: Plan, geometry: Geometry, rows: int, costs: Costs = CPU, last: bool = False) -> float:
    """Return the nanoseconds of a plan.

    Args:
        plan: The plan.
        geometry: The convolution.
        rows: Number of images times channels, R C.
        costs: Of steps.
        last: Whether the input's channels are its last axis in memory.
    """
    axes = axes_of(geometry)
    sizes, contiguous = [axis.size for axis in axes], all(axis.step == 1 for axis in axes)
    if plan.joined and plan.is_sum(geometry):
        jumps = costs.jump * prod(sizes) if last and not contiguous else 0
        return costs.call * 2 + rows * (costs.summed * prod(sizes) + costs.line + jumps)
    calls, each = 0, 0.0
    for d, period in enumerate(plan.periods):
        if not period:
            continue
        core, whole = axes[d].core(period), prod(sizes)
        behind = period * prod(sizes[d + 1 :])
        each += costs.summed * whole
        each += costs.chunk * whole / behind if behind > 1 else costs.line * whole / sizes[d]
        if last and len(axes) > 1:
            each += costs.jump * whole  # sums across images' rows leave the caches
        sizes[d] = core.rows
        each += costs.written * prod(sizes)
        calls += 1 + 2 * (core.rows > period)
        contiguous = True
    if plan.joined:
        if last:  # a product per image, whose columns are channels
            each += (costs.jump / 2 + costs.multiplied * geometry.entries) * prod(sizes)
        else:
            each += (costs.read + costs.multiplied * costs.columns(geometry.entries)) * prod(sizes)
        each += 0 if contiguous else costs.written * prod(sizes)
        return costs.call * (calls + 1) + rows * each
    for d in reversed(range(len(axes))):
        whole, kernel = prod(sizes), axes[d].weights.shape[1]
        each += (costs.read + costs.multiplied * costs.columns(kernel)) * whole
        if d < len(axes) - 1 or last or not contiguous:
            each += (costs.jump if last else costs.written) * whole
        sizes[d] = kernel
        calls += 2
    return costs.call * calls + rows * each


@lru_cache(maxsize=1024)
def plans_of(geometry: Geometry) -> tuple[Plan, ...]:
    """Return all plans of a convolution that differ."""
    axes = axes_of(geometry)
    choices = [(0, *(core.period for core in axis.cores)) for axis in axes]
    found = []
    for periods in product(*choices):
        joined = Plan(periods, True)
        if len(axes) == 1 or prod(joined.rows(geometry)) * geometry.entries <= MAX_JOINED:
            found.append(joined)
        if len(axes) > 1:
            found.append(Plan(periods, False))
    return tuple(found)


@lru_cache(maxsize=1024)
def cheapest(geometry: Geometry, rows: int, costs: Costs = CPU, last: bool = False) -> Plan:
    """Return the plan that costs the least.

    Args:
        geometry: The convolution.
        rows: Number of images times channels, R C.
        costs: Of steps.
        last: Whether the input's channels are its last axis in memory.

    Example:
        >>> from torch import nn
        >>> def choose(module, channels, size):
        ...     x, y = (32, channels, size, size), (32, 1, *[(size - 1) // module.stride[0] + 1] * 2)
        ...     return str(cheapest(Geometry.of(module, x, y), 32 * channels))
        >>> choose(nn.Conv2d(64, 64, 3, padding=1), 64, 56)  # summed, but for its edges
        'core 1,1 joined'
        >>> choose(nn.Conv2d(512, 512, 3, padding=1), 512, 7)  # a small map
        'joined'
        >>> choose(nn.Conv2d(512, 512, 1), 512, 7)  # a mean
        'core 1,1 joined'
    """
    return min(plans_of(geometry), key=lambda plan: cost(plan, geometry, rows, costs, last))
