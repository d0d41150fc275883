"""Hessian diagonals of losses without a closed form, by Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.decomposition import widen


def loss_diagonal(
    function: Callable[..., Tensor], *outputs: Tensor, check: bool = True
) -> tuple[Tensor, ...]:
    r"""Compute the exact Hessian diagonal of a scalar function with respect to each argument.

    For `attach_diagonal`, if the loss has no known diagonal. With the vector v that is one in column c
    of every row and zero elsewhere

    .. math::  (H v)_{nc} = \sum_m \frac{\partial^2 f}{\partial z_{nc} \partial z_{mc}}
               = \frac{\partial^2 f}{\partial z_{nc}^2}

    because **rows are assumed not to interact**: the function is a sum over n (or a mean) of terms
    that depend on the n-th row of each argument only. Columns and arguments may interact.

    **Cost**: an argument ``[N, C]`` takes C Hessian-vector products of the function, whatever N is;
    ``[N, C, ...]`` takes as many as a row has entries. A product is about two evaluations of the
    gradient. The network takes no part.

    Args:
        function: Of the arguments; returns a scalar. It is to be made of operations that can be
            differentiated twice, and to return the same each time (no dropout).
        *outputs: The arguments, with rows along the first axis. They may be tensors of a graph. What
            all rows share, a parameter ``[C]``, has to be expanded: ``log_std.expand_as(mean)``.
        check: Whether to check the assumption by two more products for each argument.

    Returns:
        For each argument the diagonal in its shape, detached.

    Raises:
        TypeError: If an argument has an integer dtype.
        ValueError: If the function returns no scalar, an argument has no rows, or rows interact.

    Example:
        >>> from torch.nn import functional as F
        >>> z, y = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
        >>> (h,) = loss_diagonal(lambda z: F.cross_entropy(z, y, reduction="sum"), z)
        >>> torch.allclose(h, z.softmax(1) * (1 - z.softmax(1)))
        True
    """
    for z in outputs:
        if not z.is_floating_point():
            raise TypeError(f"loss_diagonal: an argument is {z.dtype}; expected a real tensor.")
        if z.dim() == 0:
            raise ValueError("loss_diagonal: an argument is a scalar; expected rows, [N, ...].")
    # float16 and bfloat16 would lose what differences of probabilities are made of
    leaves = [widen(z.detach()).clone().requires_grad_() for z in outputs]
    with torch.enable_grad():
        value = function(*leaves)
        if value.numel() != 1:
            raise ValueError(
                f"loss_diagonal: the function returned shape {tuple(value.shape)}; expected a scalar."
            )
        grads = torch.autograd.grad(
            value.sum(), leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
    if check:
        for k, (g, z) in enumerate(zip(grads, leaves, strict=True)):
            _check_rows(k, g, z)
    return tuple(_diagonal(g, z) for g, z in zip(grads, leaves, strict=True))


def _diagonal(g: Tensor, z: Tensor) -> Tensor:
    """Return the diagonal of dg/dz, rows of z being independent."""
    h, v = torch.zeros_like(z), torch.zeros_like(z)
    h_columns, v_columns = (t.view(len(z), -1) if z.numel() else t for t in (h, v))
    for c in range(z[0].numel() if len(z) else 0):
        v_columns[:, c] = 1
        h_columns[:, c] = _product(g, z, v).reshape(len(z), -1)[:, c]
        v_columns[:, c] = 0
    return h.detach()


def _product(g: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """Return H v."""
    if not g.requires_grad:
        return torch.zeros_like(z)
    return torch.autograd.grad(g, z, v, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


def _check_rows(k: int, g: Tensor, z: Tensor) -> None:
    """Raise if rows interact: signs of the rows go through H then, and meet others'."""
    if len(z) < 2 or z[0].numel() == 0:
        return
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(z),), generator=generator).to(z) * 2 - 1
    signs[0], signs[1] = 1, -1
    signs = signs.view(-1, *[1] * (z.dim() - 1))
    weights = 1 + torch.rand(z.shape[1:], generator=generator).to(z)
    plain, signed = _product(g, z, weights.expand_as(z)), _product(g, z, signs * weights)
    off = (signed - signs * plain).abs().max()
    if off > 100 * torch.finfo(z.dtype).eps ** 0.75 * plain.abs().max().clamp(min=signed.abs().max()):
        raise ValueError(
            f"loss_diagonal: rows of argument {k} interact, so that Hessian-vector products do not give "
            "the diagonal. Expected a sum over rows of terms that depend on one row each. An argument "
            "that all rows share has to be expanded to one row each; otherwise give attach_diagonal "
            "the diagonal in closed form."
        )
