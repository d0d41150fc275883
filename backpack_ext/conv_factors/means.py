"""Patches of convolutions averaged over output pixels, without forming them."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from backpack_ext.conv_factors.axis import Core, axes_of
from backpack_ext.conv_factors.cost import WIDE_CHANNELS, Plan, cheapest, costs_of
from backpack_ext.conv_factors.geometry import Geometry
from backpack_ext.conv_factors.kept import kept
from curvature.precision import without_autocast

# Half precision is widened that many entries at a time, by the kind of device.
CHUNK = {"cpu": 1 << 20}
OTHER_CHUNK = 1 << 25


@without_autocast
def patch_means(x: Tensor, geometry: Geometry, plan: Plan | None = None) -> Tensor:
    r"""Return the means of an input's patches over the output pixels.

    .. math::  \hat x_{rck} = \frac{1}{O} \sum_o u_{rock}

    with ``u[r,o,c,k]`` the input that kernel entry k meets at output pixel o, zero where it meets none;
    O counts all output pixels. Any stride, dilation, padding and padding mode, and transposed
    convolutions. See `backpack_ext.conv_factors.cost` for the ways.

    Args:
        x: ``[R, C, *I]``, padding not included; in half precision it is accumulated in float32.
        geometry: The convolution's, see `Geometry.of`.
        plan: In which order to sum; the cheapest by default.

    Returns:
        ``[R, C, K]`` with K kernel entries, row-major; in float32, or x's own data type if wider.

    Raises:
        ValueError: If the input is not of the geometry's size.

    References:
        Dangel (2023), Convolutions through the lens of tensor networks (the separable way).

    Example:
        >>> from torch import nn
        >>> conv = nn.Conv2d(1, 1, 2)
        >>> x = torch.arange(9.0).reshape(1, 1, 3, 3)
        >>> patch_means(x, Geometry.of(conv, x.shape, (1, 1, 2, 2)))  # means of 2x2 windows
        tensor([[[2., 3., 5., 6.]]])
    """
    axes = axes_of(geometry)
    sizes = geometry.unpadded
    if x.dim() != len(sizes) + 2 or tuple(x.shape[2:]) != sizes:
        raise ValueError(
            f"patch_means: an input of shape {tuple(x.shape)}; the geometry is that of [R, C, "
            f"{', '.join(map(str, sizes))}]."
        )
    last = x.stride(1) == 1 and x.shape[1] >= WIDE_CHANNELS and not x.is_contiguous()
    if plan is None:
        plan = cheapest(geometry, x.shape[0] * x.shape[1], costs_of(x.device.type), last)
    if any(axis.step > 1 for axis in axes):
        x = x[(..., *(axis.entries for axis in axes))]
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == wide:
        return _means(x, geometry, plan, last)
    each = max(1, x[:1].numel())
    pieces = x.split(max(1, CHUNK.get(x.device.type, OTHER_CHUNK) // each))
    found = [_means(piece.to(wide), geometry, plan, last) for piece in pieces]
    return found[0] if len(found) == 1 else torch.cat(found)


def _means(x: Tensor, geometry: Geometry, plan: Plan, last: bool) -> Tensor:
    axes = axes_of(geometry)
    weights = _weights(geometry, plan, x.device, x.dtype)
    cores = [axis.core(period) for axis, period in zip(axes, plan.periods, strict=True)]
    if plan.joined and len(weights[0]) == 1:  # one sum over all dimensions
        for d, core in enumerate(cores):
            x = x if core is None else x.narrow(2 + d, core.low, core.high - core.low)
        return x.sum(tuple(range(2, x.dim()))).unsqueeze(2) * weights[0][0, : geometry.entries]
    for d, core in enumerate(cores):
        if core is not None:
            x = _summed(x, 2 + d, core)
    if plan.joined:
        if last and x.stride(1) == 1:  # [R, K, C], whose rows need no copy
            W = weights[0][:, : geometry.entries]
            return (W.mT @ x.movedim(1, -1).flatten(1, -2)).mT
        return (x.flatten(2) @ weights[0])[..., : geometry.entries]
    for d in reversed(range(len(axes))):  # the last one first: its rows are contiguous
        products = (x.movedim(2 + d, -1) @ weights[d])[..., : axes[d].weights.shape[1]]
        x = products.movedim(-1, 2 + d)
    return x.flatten(2)


def _summed(x: Tensor, dim: int, core: Core) -> Tensor:
    """Return the rows before the core, the sum of its periods, and the rows behind."""
    middle = x.narrow(dim, core.low, core.high - core.low)
    if core.period == 1:
        middle = middle.sum(dim, keepdim=True)
    else:
        middle = middle.unflatten(dim, (-1, core.period)).sum(dim)
    if core.rows == middle.shape[dim]:
        return middle
    before = x.narrow(dim, core.first, core.low - core.first)
    behind = x.narrow(dim, core.high, core.last - core.high)
    return torch.cat([before, middle, behind], dim)


@kept
def _weights(
    geometry: Geometry, plan: Plan, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return the weights of what is left of each dimension, ``[J, K]``; their product if joined.

    Zeros fill them up to as many columns as a product is to have, see `Costs.columns`.
    """
    pairs = zip(axes_of(geometry), plan.periods, strict=True)
    found = [axis.core(p).weights if p else axis.weights for axis, p in pairs]
    if plan.joined:
        found = [reduce(torch.kron, found)]
    columns = costs_of(device.type).columns
    return tuple(pad(W, (0, columns(W.shape[1]) - W.shape[1])).to(device, dtype) for W in found)
