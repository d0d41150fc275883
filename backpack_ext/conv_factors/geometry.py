"""The geometry of a convolution: which input entry a kernel entry meets at which output pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Dimension:
    r"""One spatial dimension: how kernel entries k meet input entries i at output pixels o.

    .. math::  i = \text{stride} \; o + \text{dilation} \; k - \text{before}

    For a transposed convolution o and i change places. Outside of the input there are zeros.

    Args:
        size: Number of input entries I.
        out: Number of output pixels O.
        kernel: Number of kernel entries K.
        stride: Stride.
        dilation: Dilation.
        before: Zeros before the input; for a transposed convolution its padding.
        transposed: Whether the convolution is a transposed one.
    """

    size: int
    out: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    transposed: bool = False

    def pattern(self) -> Tensor:
        """Return which input entries are met, as a mask ``[I, O, K]``."""
        i = torch.arange(self.size)[:, None, None]
        o = torch.arange(self.out)[:, None]
        k = torch.arange(self.kernel)
        if self.transposed:
            return self.stride * i + self.dilation * k - self.before == o
        return self.stride * o + self.dilation * k - self.before == i

    def met(self) -> Tensor:
        """Return at how many output pixels (one, or none) an entry is met, ``[I, K]``.

        That is ``pattern().sum(1)``, in memory that does not grow with O.
        """
        i = torch.arange(self.size)[:, None]
        k = torch.arange(self.kernel)
        if self.transposed:
            o = self.stride * i + self.dilation * k - self.before
            return ((o >= 0) & (o < self.out)).long()
        times_stride = i + self.before - self.dilation * k
        o = times_stride // self.stride
        return ((times_stride % self.stride == 0) & (o >= 0) & (o < self.out)).long()


@dataclass(frozen=True)
class Geometry:
    """The spatial dimensions of a convolution, and how its input is padded before.

    Args:
        dimensions: The spatial dimensions, after `padded`.
        groups: Number of groups.
        mode: How `padded` fills in, as in ``torch.nn.functional.pad``; None if zeros, which are part
            of the dimensions and never formed.
        widths: What `padded` adds, in the order of ``torch.nn.functional.pad``.
    """

    dimensions: tuple[Dimension, ...]
    groups: int = 1
    mode: str | None = None
    widths: tuple[int, ...] = ()

    def __post_init__(self):
        # it is looked up at each call of a layer, and consists of two dozen numbers
        key = hash((self.dimensions, self.groups, self.mode, self.widths))
        object.__setattr__(self, "_hash", key)
        most = max((d.size * d.kernel for d in self.dimensions), default=0)
        object.__setattr__(self, "_most", most)

    def __hash__(self) -> int:
        """Return the hash that was computed once."""
        return self._hash

    def __reduce__(self):
        """Have other processes compute their own: hashes of strings differ between them."""
        return Geometry, (self.dimensions, self.groups, self.mode, self.widths)

    @property
    def most(self) -> int:
        """The largest number of input entries times kernel entries of a dimension."""
        return self._most

    @property
    def pixels(self) -> int:
        """Number of output pixels of an image."""
        return prod(d.out for d in self.dimensions)

    @property
    def entries(self) -> int:
        """Number of kernel entries."""
        return prod(d.kernel for d in self.dimensions)

    @property
    def unpadded(self) -> tuple[int, ...]:
        """Sizes of the input before `padded`."""
        widths = self.widths or (0, 0) * len(self.dimensions)
        around = (before + after for before, after in zip(widths[-2::-2], widths[::-2], strict=True))
        return tuple(d.size - n for d, n in zip(self.dimensions, around, strict=True))

    def padded(self, x: Tensor) -> Tensor:
        """Return the input ``[R, C, *I]`` with what is not zeros around it."""
        return x if self.mode is None else F.pad(x, self.widths, mode=self.mode)

    @staticmethod
    def of(module: nn.Module, in_shape: Sequence[int], out_shape: Sequence[int]) -> Geometry:
        """Return the geometry of a call of ``nn.Conv1d`` to ``3d`` or ``nn.ConvTranspose1d`` to ``3d``.

        Args:
            module: The convolution.
            in_shape: Shape of its input, ``[R, C, *I]``.
            out_shape: Shape of its output.

        Raises:
            ValueError: If the module's numbers do not lead from the one to the other: its forward is
                another one, or its attributes have changed since.
        """
        m, sizes, outs = module, tuple(in_shape[2:]), tuple(out_shape[2:])
        dims = len(m.kernel_size)
        stride, dilation = spread(m.stride, dims), spread(m.dilation, dims)
        if m.transposed:
            padding = spread(m.padding, dims)
            return _transposed(sizes, outs, m.kernel_size, stride, padding, dilation, m.groups)
        mode = None if m.padding_mode == "zeros" else m.padding_mode
        return _convolution(
            sizes, outs, m.kernel_size, stride, dilation, m.groups, mode, padding_widths(m)
        )


def spread(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return a number for each dimension, as torch reads a module's attributes."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def padding_widths(module: nn.Module) -> tuple[int, ...]:
    """Return what a convolution adds around its input, in the order of ``torch.nn.functional.pad``.

    As its forward does it: zeros by what ``padding`` says now, anything else by what it said when the
    module was made.
    """
    m, dims = module, len(module.kernel_size)
    if m.padding_mode != "zeros":
        return tuple(m._reversed_padding_repeated_twice)
    if m.padding == "valid":
        return (0,) * (2 * dims)
    if m.padding == "same":
        totals = [d * (k - 1) for d, k in zip(spread(m.dilation, dims), m.kernel_size, strict=True)]
        return tuple(n for total in reversed(totals) for n in (total // 2, total - total // 2))
    return tuple(p for p in reversed(spread(m.padding, dims)) for _ in range(2))


@lru_cache(maxsize=1024)
def _convolution(sizes, outs, kernel, stride, dilation, groups, mode, widths) -> Geometry:
    before = widths[::2][::-1]
    if mode is not None:
        after = widths[1::2][::-1]
        sizes = tuple(n + b + a for n, b, a in zip(sizes, before, after, strict=True))
        before = (0,) * len(sizes)
    each = zip(sizes, outs, kernel, stride, dilation, before, strict=True)
    dimensions = tuple(Dimension(*values) for values in each)
    pads = (0,) * len(widths) if mode is not None else widths
    around = (b + a for b, a in zip(pads[-2::-2], pads[::-2], strict=True))
    for d, pad in zip(dimensions, around, strict=True):
        _check(d, (d.size + pad - d.dilation * (d.kernel - 1) - 1) // d.stride + 1, 0)
    return Geometry(dimensions, groups, mode, () if mode is None else widths)


@lru_cache(maxsize=1024)
def _transposed(sizes, outs, kernel, stride, padding, dilation, groups) -> Geometry:
    each = zip(sizes, outs, kernel, stride, dilation, padding, strict=True)
    dimensions = tuple(Dimension(*values, transposed=True) for values in each)
    for d in dimensions:  # the output padding may be the call's own (`output_size`)
        least = (d.size - 1) * d.stride - 2 * d.before + d.dilation * (d.kernel - 1) + 1
        _check(d, least, max(d.stride, d.dilation) - 1)
    return Geometry(dimensions, groups)


def _check(d: Dimension, out: int, more: int) -> None:
    """Raise unless a dimension has ``out`` output pixels, or up to ``more`` beyond."""
    if not out <= d.out <= out + more:
        raise ValueError(
            f"{d.size} input entries and a kernel of {d.kernel} with stride {d.stride} and dilation "
            f"{d.dilation} make {out} pixels, not {d.out}"
        )
