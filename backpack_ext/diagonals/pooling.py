"""Pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack_ext.diagonals.rule import Diagonals, Step, call


def average(step: Step) -> Diagonals:
    """Cross an average pooling: its own products with ``h / divisor^2``.

    The divisor of an output varies with ``count_include_pad``, ``ceil_mode``, ``divisor_override`` and
    adaptive windows. Where it is the same for all outputs, the product of h is divided once more.
    """
    (h,) = step.h
    return call(step.node, (h * _weights(step),))


def _weights(step: Step) -> Tensor | float:
    """Return one over the divisor of each output."""
    n, (h,), x = step.node, step.h, step.node._saved_self
    name = n.name()
    if name.startswith("Adaptive"):
        return _adaptive(x.shape[2 - x.dim() % 2 :], h)
    dims = 3 if "3D" in name else 2
    kernel, padding = n._saved_kernel_size, n._saved_padding
    stride = n._saved_stride or kernel
    if n._saved_divisor_override:
        return 1.0 / n._saved_divisor_override
    weights = h.new_ones(())
    for k in range(dims):
        axis = k - dims
        size, out = x.shape[axis], h.shape[axis]
        start = torch.arange(out, device=h.device) * _at(stride, k) - _at(padding, k)
        end = (start + _at(kernel, k)).clamp(max=size + _at(padding, k))
        if not n._saved_count_include_pad:
            start, end = start.clamp(min=0), end.clamp(max=size)
        shape = [1] * dims
        shape[k] = out
        weights = weights / (end - start).to(h.dtype).reshape(shape)
    return weights


def _adaptive(sizes: torch.Size, h: Tensor) -> Tensor:
    dims = len(sizes)
    weights = h.new_ones(())
    for k, size in enumerate(sizes):
        out = h.shape[k - dims]
        position = torch.arange(out, device=h.device)
        start, end = position * size // out, -(-(position + 1) * size // out)
        shape = [1] * dims
        shape[k] = out
        weights = weights / (end - start).to(h.dtype).reshape(shape)
    return weights


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
