"""Patches of convolutions averaged over output pixels, without forming them."""

from __future__ import annotations

from dataclasses import dataclass
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
    sizes = geometry.unpadded
    if x.dim() != len(sizes) + 2 or tuple(x.shape[2:]) != sizes:
        raise ValueError(
            f"patch_means: an input of shape {tuple(x.shape)}; the geometry is that of [R, C, "
            f"{', '.join(map(str, sizes))}]."
        )
    last = x.stride(1) == 1 and x.shape[1] >= WIDE_CHANNELS and not x.is_contiguous()
    wide = torch.promote_types(x.dtype, torch.float32)
    if plan is None:
        way = _chosen(geometry, x.shape[0] * x.shape[1], last, x.device, wide)
    else:
        way = _way(geometry, plan, last, x.device, wide)
    if way.met is not None:
        x = x[way.met]
    if x.dtype == wide:
        return _means(x, way)
    each = max(1, x[:1].numel())
    pieces = x.split(max(1, CHUNK.get(x.device.type, OTHER_CHUNK) // each))
    found = [_means(piece.to(wide), way) for piece in pieces]
    return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True, eq=False)
class _Way:
    """A plan with all that it needs.

    Args:
        met: What of the input is met, as an index; None if all.
        cores: By dimension what is summed first; None for nothing.
        weights: See `_weights`.
        kernel: The kernel's sizes.
        columns: Their product.
        joined: Whether all dimensions that are left are multiplied at once.
        last: Whether the input's channels are its last axis in memory.
    """

    met: tuple | None
    cores: tuple[Core | None, ...]
    weights: tuple[Tensor, ...]
    kernel: tuple[int, ...]
    columns: int
    joined: bool
    last: bool


@kept
def _chosen(geometry: Geometry, rows: int, last: bool, device: torch.device, dtype: torch.dtype) -> _Way:
    """Return the cheapest way."""
    plan = cheapest(geometry, rows, costs_of(device.type), last)
    return _way(geometry, plan, last, device, dtype)


def _way(geometry: Geometry, plan: Plan, last: bool, device: torch.device, dtype: torch.dtype) -> _Way:
    axes = axes_of(geometry)
    met = (..., *(axis.entries for axis in axes)) if any(axis.step > 1 for axis in axes) else None
    cores = tuple(axis.core(period) for axis, period in zip(axes, plan.periods, strict=True))
    kernel = tuple(axis.weights.shape[1] for axis in axes)
    weights = _weights(geometry, plan, device, dtype)
    return _Way(met, cores, weights, kernel, geometry.entries, plan.joined, last)


def _means(x: Tensor, way: _Way) -> Tensor:
    weights = way.weights
    if way.joined and len(weights[0]) == 1:  # one sum over all dimensions
        for d, core in enumerate(way.cores):
            x = x if core is None else x.narrow(2 + d, core.low, core.high - core.low)
        return x.sum(tuple(range(2, x.dim()))).unsqueeze(2) * weights[0][0, : way.columns]
    for d, core in enumerate(way.cores):
        if core is not None:
            x = _summed(x, 2 + d, core)
    if way.joined:
        if way.last and x.stride(1) == 1:  # [R, K, C], whose rows need no copy
            W = weights[0][:, : way.columns]
            return (W.mT @ x.movedim(1, -1).flatten(1, -2)).mT
        return (x.flatten(2) @ weights[0])[..., : way.columns]
    for d in reversed(range(len(weights))):  # the last one first: its rows are contiguous
        products = (x.movedim(2 + d, -1) @ weights[d])[..., : way.kernel[d]]
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
