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
        """
        m, sizes, outs = module, tuple(in_shape[2:]), tuple(out_shape[2:])
        if m.transposed:
            return _transposed(sizes, outs, m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
        widths = tuple(m._reversed_padding_repeated_twice)  # also of "same" and "valid"
        mode = None if m.padding_mode == "zeros" else m.padding_mode
        return _convolution(sizes, outs, m.kernel_size, m.stride, m.dilation, m.groups, mode, widths)


@lru_cache(maxsize=1024)
def _convolution(sizes, outs, kernel, stride, dilation, groups, mode, widths) -> Geometry:
    before = widths[::2][::-1]
    if mode is not None:
        after = widths[1::2][::-1]
        sizes = tuple(n + b + a for n, b, a in zip(sizes, before, after, strict=True))
        before = (0,) * len(sizes)
    each = zip(sizes, outs, kernel, stride, dilation, before, strict=True)
    dimensions = tuple(Dimension(*values) for values in each)
    return Geometry(dimensions, groups, mode, () if mode is None else widths)


@lru_cache(maxsize=1024)
def _transposed(sizes, outs, kernel, stride, padding, dilation, groups) -> Geometry:
    each = zip(sizes, outs, kernel, stride, dilation, padding, strict=True)
    return Geometry(tuple(Dimension(*values, transposed=True) for values in each), groups)
