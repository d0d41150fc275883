r"""The steps of the square-root-free optimizers, as functions of tensors and structured matrices.

All of them take lists over parameters, or the factors of one parameter, and hold no state. Tensors of
state and updates are at least in float32; parameters may be in half precision.

Letters: B number of terms of a mean loss, g gradient of that mean, n and j axes of a parameter with
sizes d_n, :math:`G_{(n)}` the gradient unfolded to ``[d_n, rest]``, K_n the factor of an axis.

Lin, Dangel, Eschenhagen, Bae, Turner and Makhzani (2024), Can we remove the square-root in adaptive
gradient methods? A second-order perspective.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Generator, Tensor, nn

from curvature import DenseMatrix, DiagonalMatrix, StructuredMatrix
from curvature.precision import without_autocast
from optim.rounding import copy_rounded_
from optim.state import by_device_and_dtype, state_dtype


def rf_rmsprop(
    params: list[Tensor],
    grads: list[Tensor],
    curvatures: list[Tensor],
    momentum_buffers: list[Tensor] | None,
    generators: list[Generator | None],
    *,
    lr: float,
    alpha: float,
    damping: float,
    momentum: float,
    weight_decay: float,
    batch_size: float,
    maximize: bool = False,
    foreach: bool | None = None,
) -> None:
    """Update parameters and state in place by one step of `RFRMSProp`, which has the formula.

    Args:
        params: Parameters.
        grads: Their gradients, each shaped like its parameter.
        curvatures: Moving averages w of B g^2, likewise.
        momentum_buffers: Moving sums of updates, likewise; None without momentum.
        generators: For stochastic rounding of parameters; None for rounding to the nearest.
        lr: Step size.
        alpha: Decay rate of w.
        damping: Is added to w.
        momentum: Decay rate of the momentum buffers.
        weight_decay: What of the parameters is added to the update.
        batch_size: Number of terms B.
        maximize: Whether to negate the gradients.
        foreach: Whether to use one kernel per operation for all parameters; None to decide.
    """
    buffers = momentum_buffers if momentum_buffers is not None else [None] * len(params)
    tensors = (params, grads, curvatures, buffers, generators)
    for ps, gs, ws, bs, rs in _parts(foreach, *tensors):
        gs = _directions(gs, ws, maximize)
        _average_squares(gs, ws, alpha, batch_size)
        us = torch._foreach_div(gs, _denominators(ws, damping))
        descend(ps, us, None if momentum_buffers is None else bs, rs, lr, momentum, weight_decay)


def rf_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    curvatures: list[Tensor],
    generators: list[Generator | None],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    batch_size: float,
    maximize: bool = False,
    foreach: bool | None = None,
) -> None:
    """Update parameters and state in place by one step of `RFAdamW`, which has the formula.

    Args:
        params: Parameters.
        grads: Their gradients, each shaped like its parameter.
        exp_avgs: Moving averages m of g, likewise.
        curvatures: Moving averages w of B g^2, likewise.
        generators: For stochastic rounding of parameters; None for rounding to the nearest.
        lr: Step size.
        betas: Decay rates of m and w.
        eps: Is added to w.
        weight_decay: Decoupled weight decay.
        batch_size: Number of terms B.
        maximize: Whether to negate the gradients.
        foreach: Whether to use one kernel per operation for all parameters; None to decide.
    """
    tensors = (params, grads, exp_avgs, curvatures, generators)
    for ps, gs, ms, ws, rs in _parts(foreach, *tensors):
        gs = _directions(gs, ws, maximize)
        torch._foreach_lerp_(ms, gs, 1 - betas[0])
        _average_squares(gs, ws, betas[1], batch_size)
        us = torch._foreach_div(ms, _denominators(ws, eps))
        # the decay joins the update, so that half precision is rounded once
        descend(ps, us, None, rs, lr, 0.0, weight_decay)


def descend(
    params: list[Tensor],
    updates: list[Tensor],
    momentum_buffers: list[Tensor] | None,
    generators: Sequence[Generator | None],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Move parameters of one device and data type by weight decay, then momentum, then step size.

    ``u += weight_decay p``, ``buffer = momentum buffer + u``, ``p -= lr buffer``.

    Args:
        params: Parameters.
        updates: The preconditioned gradients u, in the data type of state; changed in place.
        momentum_buffers: Like the updates; None for ``p -= lr u``.
        generators: For stochastic rounding of parameters; None for rounding to the nearest.
        lr: Step size.
        momentum: Decay rate of the buffers.
        weight_decay: Weight decay.
    """
    dtype = updates[0].dtype
    wide = params if params[0].dtype == dtype else [p.to(dtype) for p in params]
    if weight_decay != 0:
        torch._foreach_add_(updates, wide, alpha=weight_decay)
    if momentum_buffers is not None:
        torch._foreach_mul_(momentum_buffers, momentum)
        torch._foreach_add_(momentum_buffers, updates)
        updates = momentum_buffers
    torch._foreach_add_(wide, updates, alpha=-lr)
    if wide is not params:
        for p, q, generator in zip(params, wide, generators, strict=True):
            copy_rounded_(p, q, generator)


def _parts(foreach: bool | None, params: list[Tensor], *others: list) -> list[tuple[list, ...]]:
    """Split lists into what one call of a kernel takes: all of a device and type, or one by one."""
    if foreach is None:
        # Parameters of other classes (distributed tensors) bring their own operations.
        foreach = all(p.is_cuda and type(p) in (Tensor, nn.Parameter) for p in params)
    if foreach:
        return by_device_and_dtype(params, *others)
    return [tuple([value] for value in entry) for entry in zip(params, *others, strict=True)]


def _directions(gs: list[Tensor], like: list[Tensor], maximize: bool) -> list[Tensor]:
    gs = [g.to(t.dtype) for g, t in zip(gs, like, strict=True)]
    return torch._foreach_neg(gs) if maximize else gs


def _average_squares(gs: list[Tensor], ws: list[Tensor], decay: float, batch_size: float) -> None:
    torch._foreach_mul_(ws, decay)
    torch._foreach_addcmul_(ws, gs, gs, value=(1 - decay) * batch_size)


def _denominators(ws: list[Tensor], damping: float) -> list[Tensor]:
    found = torch._foreach_add(ws, damping)
    if damping == 0:  # w of an entry whose gradient stays zero decays to zero: 0 / 0
        torch._foreach_clamp_min_(found, torch.finfo(ws[0].dtype).smallest_normal)
    return found


# ---------------------------------------------------------------------- Shampoo


@without_autocast
def shampoo_momenta(
    grad: Tensor,
    factors: Sequence[StructuredMatrix],
    momenta: Sequence[StructuredMatrix],
    *,
    damping: float,
    alpha2: float,
    batch_size: float,
) -> list[StructuredMatrix]:
    r"""Return the new matrices m_n of one parameter.

    .. math::
        H_n &= \frac{B}{\prod_{j \ne n} d_j} K_n^T G_{(n)}
        \Big(\bigotimes_{j \ne n} K_j K_j^T\Big) G_{(n)}^T K_n \\
        m_n &\leftarrow \alpha_2 m_n + \frac{1 - \alpha_2}{2} \Big[ P(H_n)
        + \lambda \prod_{j \ne n} \frac{\|K_j\|_F^2}{d_j} P(K_n^T K_n) - I \Big]

    All H_n are Gram matrices of unfoldings of one tensor, the gradient times :math:`K_j^T` on every
    axis. So the cost is one product per axis, and one for the projected Gram matrix.

    Args:
        grad: ``[d_1, ..., d_N]``, in the data type of the factors.
        factors: K_n, each ``[d_n, d_n]``.
        momenta: m_n, likewise, each of the structure of its factor; not changed.
        damping: lambda.
        alpha2: Decay rate of the momenta, alpha_2.
        batch_size: Number of terms B.
    """
    X = grad
    for n, K in enumerate(factors):
        X = _on_axis(K, X, n, transpose=True)
    traces = [K.square_norm() / K.dim for K in factors]
    weight = (1 - alpha2) / 2
    found = []
    for n, (K, m) in enumerate(zip(factors, momenta, strict=True)):
        scale = weight * batch_size * K.dim / grad.numel()
        new = type(K).project_gram(_unfolded(X, n), scale, **K.options)
        new.add_(m, alpha2)
        if damping != 0:
            others = prod(traces[:n] + traces[n + 1 :])
            new.add_(K.gram(), weight * damping * others)
        found.append(new.add_identity_(-weight))
    return found


@without_autocast
def shampoo_factors_(
    factors: Sequence[StructuredMatrix], momenta: Sequence[StructuredMatrix], lr_cov: float
) -> None:
    r"""Update factors in place: :math:`K_n \leftarrow K_n - \beta_2 K_n m_n / \max(1, \|m_n\|_F)`.

    Args:
        factors: K_n of one parameter.
        momenta: m_n, what `shampoo_momenta` returned.
        lr_cov: Step size beta_2.
    """
    for K, m in zip(factors, momenta, strict=True):
        K.add_(K @ m, -lr_cov / m.norm().clamp(min=1))


@without_autocast
def shampoo_products(factors: Sequence[StructuredMatrix]) -> list[StructuredMatrix | None]:
    """Return K K^T of dense and diagonal factors, which multiply in half the time; else None."""
    return [_product(K) for K in factors]


def _product(K: StructuredMatrix) -> StructuredMatrix | None:
    if isinstance(K, DenseMatrix):
        D = K.to_dense()
        return DenseMatrix([D @ D.mT], K.dim)
    return K @ K if isinstance(K, DiagonalMatrix) else None


@without_autocast
def shampoo_precondition(
    grad: Tensor,
    factors: Sequence[StructuredMatrix],
    products: Sequence[StructuredMatrix | None] | None = None,
) -> Tensor:
    """Return the gradient times K_n K_n^T on every axis.

    Args:
        grad: ``[d_1, ..., d_N]``, in the data type of the factors.
        factors: K_n, each ``[d_n, d_n]``.
        products: What `shampoo_products` returned for them, or None.
    """
    X = grad
    for n, K in enumerate(factors):
        P = products[n] if products is not None else None
        if P is not None:
            X = _on_axis(P, X, n)
        else:
            X = _on_axis(K, _on_axis(K, X, n, transpose=True), n)
    return X


def _on_axis(A: StructuredMatrix, X: Tensor, n: int, transpose: bool = False) -> Tensor:
    """Return X with A, or its transpose, multiplied to axis n, as one product of matrices."""
    if n == X.dim() - 1:
        return A.rmatmul(X.reshape(-1, A.dim), not transpose).view(X.shape)
    first = X.movedim(n, 0)
    return A.matmul(first.reshape(A.dim, -1), transpose).view(first.shape).movedim(0, n)


def _unfolded(X: Tensor, n: int) -> Tensor:
    """Return X as ``[d_n, rest]``; the order of the columns is any."""
    if n == X.dim() - 1:
        return X.reshape(-1, X.shape[n]).mT
    return X.movedim(n, 0).reshape(X.shape[n], -1)


def wide_gradient(grad: Tensor, maximize: bool) -> Tensor:
    """Return a gradient in the data type of state, with an axis at least, negated for ``maximize``."""
    g = grad.to(state_dtype(grad)).reshape(grad.shape or (1,))
    return -g if maximize else g
