"""What the entries of a convolution kernel meet at each output pixel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Unfold a padded input of any number of spatial dimensions.

    ``u[r, o, c, k] = x[r, c, stride * o + dilation * k]``, copied once. In memory rows and pixels come
    last: neighbours in the input stay neighbours, which is three to nine times faster to write than
    patch by patch; products take either layout at the same speed.

    Args:
        x: ``[R, C, *I]``, padding included.
        kernel: Kernel size per dimension.
        stride: Stride per dimension.
        dilation: Dilation per dimension.

    Returns:
        ``[R, O, C, K]`` with O output pixels and K kernel entries, both row-major.
    """
    dims = len(kernel)
    for d, (k, s, r) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + d, r * (k - 1) + 1, s)[..., ::r]
    # from [R, C, *O, *K]
    order = (1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
    return x.permute(order).flatten(1, dims).flatten(3).permute(2, 3, 0, 1)


def mean_patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the means over output pixels of the patches of an input padded with zeros.

    ``u[r, c, k] = mean_o x[r, c, stride * o + dilation * k - padding]``. The pixels that a kernel entry
    meets are a box, so that each spatial dimension is contracted with an indicator, and no patch is
    formed.

    Args:
        x: ``[R, C, *I]``, padding not included.
        kernel: Kernel size per dimension.
        stride: Stride per dimension.
        padding: Zeros on both sides per dimension.
        dilation: Dilation per dimension.

    Returns:
        ``[R, 1, C, K]`` with K kernel entries, row-major.
    """
    for d in reversed(range(len(kernel))):  # the last one first: its rows are contiguous
        size = x.shape[2 + d]
        weights = _met(size, kernel[d], stride[d], padding[d], dilation[d]).to(x.device, x.dtype)
        x = (x.movedim(2 + d, -1) @ weights).movedim(-1, 2 + d)
    return x.flatten(2).unsqueeze(1)


@lru_cache(maxsize=256)
def _met(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Return ``[size, kernel]``: at the entries that a kernel entry meets, one over the output size."""
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    met = stride * torch.arange(out)[:, None] + dilation * torch.arange(kernel) - padding
    indicator = torch.arange(size)[:, None, None] == met
    return indicator.sum(1).double() / out


def transposed_patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pixels: Sequence[int],
) -> Tensor:
    """Unfold the input of a transposed convolution.

    ``u[r, o, c, k] = x[r, c, i]`` where ``stride * i - padding + dilation * k = o``, else 0. That
    is the unfolding, with stride 1 and the kernel flipped, of the input with ``stride - 1`` zeros
    between neighbours.

    Args:
        x: ``[R, C, *I]``.
        kernel: Kernel size per dimension.
        stride: Stride per dimension.
        padding: Padding per dimension.
        dilation: Dilation per dimension.
        pixels: Output size per dimension, output padding included.

    Returns:
        ``[R, O, C, K]`` with O output pixels and K kernel entries, both row-major.
    """
    stuffed_size = [s * (n - 1) + 1 for s, n in zip(stride, x.shape[2:], strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *stuffed_size)
    stuffed[(..., *(slice(None, None, s) for s in stride))] = x
    pad = []
    for n, k, p, d, o in zip(stuffed_size, kernel, padding, dilation, pixels, strict=True):
        before = d * (k - 1) - p
        pad = [before, o + d * (k - 1) - n - before, *pad]
    u = patches(F.pad(stuffed, pad), kernel, [1] * len(kernel), dilation)
    return u.flip(3)
