"""Interpolation: along each axis an output is a weighted sum of inputs, and weights multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack_ext.diagonals.rule import Diagonals, Step

# Without anti-aliasing, whose weights are others.
INTERPOLATIONS = (
    *("UpsampleLinear1DBackward0", "UpsampleBilinear2DBackward0", "UpsampleBicubic2DBackward0"),
    *("UpsampleTrilinear3DBackward0",),
)


def interpolation(step: Step) -> Diagonals:
    """Cross an interpolation: its own products with the squares of the weights of each axis."""
    n, (h,) = step.node, step.h
    cubic = n.name().startswith("UpsampleBicubic")
    sizes, dims = n._saved_self_sym_sizes[2:], h.dim() - 2
    scales = [getattr(n, "_saved_scales" + axis) for axis in _AXES[dims]]
    for k, (size, out, scale) in enumerate(zip(sizes, n._saved_output_size, scales, strict=True)):
        eye = torch.eye(size, dtype=h.dtype, device=h.device)
        W = (_cubic if cubic else _linear)(eye, out, n._saved_align_corners, scale)  # [size, out]
        h = torch.tensordot(h, W.square(), ([2 + k], [1])).movedim(-1, 2 + k)
    return (h,)


_AXES = {1: ("",), 2: ("_h", "_w"), 3: ("_d", "_h", "_w")}


def _linear(rows: Tensor, out: int, align_corners: bool, scale: float | None) -> Tensor:
    return torch.ops.aten.upsample_linear1d(rows[None], [out], align_corners, scale)[0]


def _cubic(rows: Tensor, out: int, align_corners: bool, scale: float | None) -> Tensor:
    planes = rows[None, :, None]
    return torch.ops.aten.upsample_bicubic2d(planes, [1, out], align_corners, None, scale)[0, :, 0]
