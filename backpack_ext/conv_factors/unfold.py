"""What the entries of a convolution's kernel meet at each output pixel, laid out in full."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from backpack_ext.conv_factors.geometry import Dimension, Geometry


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Unfold the input of a convolution, or of a transposed one.

    ``u[r, o, c, k]`` is the entry of ``x[r, c]`` that kernel entry k meets at output pixel o, or zero;
    copied once. In memory rows and pixels come last: neighbours in the input stay neighbours, which is
    three to nine times faster to write than patch by patch; products take either layout at the same
    speed.

    Args:
        x: ``[R, C, *I]``, padding not included.
        geometry: The convolution's.

    Returns:
        ``[R, O, C, K]`` with O output pixels and K kernel entries, both row-major.
    """
    dims, x = len(geometry.dimensions), unfold(geometry.padded(x), geometry.dimensions)
    order = (1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))  # from [R, C, *O, *K]
    return x.permute(order).flatten(1, dims).flatten(3).permute(2, 3, 0, 1)


def unfold(x: Tensor, dimensions: Sequence[Dimension]) -> Tensor:
    """Return the entries that kernel entries meet in the last dimensions of an input.

    A transposed convolution is one of stride 1, with its kernel flipped, of the input with
    ``stride - 1`` zeros between neighbours.

    Args:
        x: ``[..., *I]``, `Geometry.padded`.
        dimensions: The dimensions I.

    Returns:
        ``[..., *O, *K]``; a view of x, or of a padded copy, unless a dimension is transposed.
    """
    first, strides = x.dim() - len(dimensions), [1 if d.transposed else d.stride for d in dimensions]
    met = []
    for d, stride in zip(dimensions, strides, strict=True):
        reach = d.dilation * (d.kernel - 1)
        start = d.before - reach if d.transposed else -d.before
        met.append((start, start + stride * (d.out - 1) + reach + 1))
    x = window(_stuffed(x, dimensions), first, met)
    for axis, (d, stride) in enumerate(zip(dimensions, strides, strict=True), first):
        x = x.unfold(axis, d.dilation * (d.kernel - 1) + 1, stride)[..., :: d.dilation]
    flipped = [k for k, d in enumerate(dimensions, x.dim() - len(dimensions)) if d.transposed]
    return x.flip(flipped) if flipped else x


def window(x: Tensor, first: int, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """Crop and pad: return the entries from ``start`` to ``stop`` of axes, zeros where there are none.

    Args:
        x: A tensor.
        first: The first of the axes, which follow each other.
        bounds: ``(start, stop)`` of each axis; they may lie anywhere.

    Returns:
        A view of x, or a copy if there are zeros.
    """
    pads: list[int] = []  # the last axis first
    for axis, (start, stop) in enumerate(bounds, first):
        size = x.shape[axis]
        low = min(max(start, 0), size)
        high = max(low, min(stop, size))
        if (low, high) != (0, size):
            x = x.narrow(axis, low, high - low)
        pads = [low - start, stop - high, *pads] if low < high else [stop - start, 0, *pads]
    behind = x.dim() - first - len(bounds)
    return F.pad(x, [0, 0] * behind + pads) if any(pads) else x


def _stuffed(x: Tensor, dimensions: Sequence[Dimension]) -> Tensor:
    """Return an input with ``stride - 1`` zeros between its neighbours in transposed dimensions."""
    steps = [d.stride if d.transposed else 1 for d in dimensions]
    if all(step == 1 for step in steps):
        return x
    sizes = [step * (d.size - 1) + 1 for step, d in zip(steps, dimensions, strict=True)]
    stuffed = x.new_zeros(*x.shape[: x.dim() - len(sizes)], *sizes)
    stuffed[(..., *(slice(None, None, step) for step in steps))] = x
    return stuffed
