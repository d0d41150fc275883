"""The input of a convolution, in place of the patches that its kernel meets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpack_ext.conv_factors import Geometry
from backpack_ext.conv_factors.unfold import patches


@dataclass(eq=False)
class Images:
    """Inputs ``a[g,n,s,i]`` of a convolution, or of a transposed one, known through its images.

    At stride 1 they are as many times as large as the images as the kernel has entries. They are
    formed where they are asked for, and not kept.

    Args:
        x: The convolution's own input ``[n, C, *I]``: each datum is one image.
        geometry: The convolution's.

    Example:
        >>> from torch import nn
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> Images(x, Geometry.of(nn.Conv1d(1, 1, 2), (1, 1, 3), (1, 1, 2))).patches()
        tensor([[[[1., 2.],
                  [2., 3.]]]])
    """

    x: Tensor
    geometry: Geometry

    @property
    def smaller(self) -> bool:
        """Whether the images have fewer entries than their patches."""
        return self.x.shape[2:].numel() < self.geometry.pixels * self.geometry.entries

    def patches(self, data: slice = slice(None)) -> Tensor:
        """Return the inputs of (some of) the data, ``[g,n,s,i]``."""
        u, groups = patches(self.x[data], self.geometry).flatten(2), self.geometry.groups
        return u.unsqueeze(0) if groups == 1 else torch.stack(u.chunk(groups, dim=2))

    def select(self, index: Tensor) -> Images:
        """Return the images of some of the data."""
        return replace(self, x=self.x[index])

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Images:
        """Return what a function makes of the images."""
        return replace(self, x=function(self.x))

    def same(self, other: object) -> bool:
        """Whether other inputs are those of the same images, in the same memory."""
        return isinstance(other, Images) and other.x is self.x and other.geometry == self.geometry
