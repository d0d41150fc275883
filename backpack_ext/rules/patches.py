"""What the entries of a convolution kernel meet at each output pixel."""

from __future__ import annotations

from collections.abc import Sequence

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
