"""Pooling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack_ext.diagonals.rule import Diagonals, Step, call


def average(step: Step) -> Diagonals:
    """Cross an average pooling: its own products with ``h / divisor^2``.

    The divisor of an output varies with ``count_include_pad``, ``ceil_mode``, ``divisor_override`` and
    adaptive windows. Where it is the same for all outputs, the product of h is divided once more.
    """
    (h,) = step.h
    return call(step.node, (h * _weights(step),))


def _weights(step: Step) -> Tensor | float:
    """Return one over the divisor of each output: the product of its window's lengths."""
    n, (h,), x = step.node, step.h, step.node._saved_self
    dims, adaptive = 3 if "3D" in n.name() else 2, n.name().startswith("Adaptive")
    if not adaptive and n._saved_divisor_override:
        return 1.0 / n._saved_divisor_override
    weights = h.new_ones(())
    for k in range(dims):
        size, out = x.shape[k - dims], h.shape[k - dims]
        position = torch.arange(out, device=h.device)
        if adaptive:
            length = -(-(position + 1) * size // out) - position * size // out
        else:
            length = _lengths(n, k, position, size)
        weights = weights / length.to(h.dtype).reshape([-1 if a == k else 1 for a in range(dims)])
    return weights


def _lengths(n: Node, k: int, position: Tensor, size: int) -> Tensor:
    """Return how many entries along the k-th axis, of a size, the windows at positions count."""
    kernel, padding = _at(n._saved_kernel_size, k), _at(n._saved_padding, k)
    start = position * _at(n._saved_stride or n._saved_kernel_size, k) - padding
    end = (start + kernel).clamp(max=size + padding)
    if not n._saved_count_include_pad:
        start, end = start.clamp(min=0), end.clamp(max=size)
    return end - start


def _at(values: tuple[int, ...], k: int) -> int:
    return values[k] if k < len(values) else values[0]


def maximum(step: Step) -> Diagonals:
    """Cross a max pooling: h goes to the entry that was chosen."""
    (h,), n = step.h[:1], step.node
    x, index = n._saved_self, n._saved_result1
    dims = 3 if "3D" in n.name() else 2
    h_in = h.new_zeros(*x.shape[: x.dim() - dims], x.shape[-dims:].numel())
    h_in.scatter_add_(-1, index.flatten(-dims), h.flatten(-dims))
    return (h_in.unflatten(-1, x.shape[-dims:]),)
