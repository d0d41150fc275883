r"""Updates of Kronecker-factored preconditioners: pure functions of tensors and structured matrices.

Index letters: g matrices of one shape (groups of a layer, layers of one shape), o outputs, i inputs.
A layer's gradient is ``G[g,o,i]``, its curvature ``B (x) A`` with ``A[g,i,i]`` and ``B[g,o,o]``. Axes
g may be missing throughout.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from curvature import StructuredMatrix
from optim.structure import Structure

Structured = TypeVar("Structured", bound=StructuredMatrix)


def projected_moment(
    K: StructuredMatrix | None, x: Tensor, scale: float, structure: Structure
) -> StructuredMatrix:
    r"""Return :math:`P(K^T (\text{scale} \sum_r x_r x_r^T) K)`, never forming the sum itself.

    Args:
        K: ``[g,d,d]``, or ``[d,d]``; None for the identity.
        x: Rows ``[g,r,d]``, or ``[r,d]``.
        scale: Factor of the sum.
        structure: What P keeps.
    """
    S = x if K is None else K.rmatmul(x)
    return structure.cls.project_gram(S.mT, scale, **dict(structure.options))


def projected_matrix(K: StructuredMatrix | None, A: Tensor, structure: Structure) -> StructuredMatrix:
    r"""Return :math:`P(K^T A K)` of a symmetric matrix that has been formed.

    Args:
        K: ``[g,d,d]``, or ``[d,d]``; None for the identity.
        A: Shaped alike.
        structure: What P keeps.
    """
    if K is not None:
        A = K.rmatmul(K.rmatmul(A).mT)
    return structure.cls.project(A, **dict(structure.options))


def singd(
    K: Structured,
    C: StructuredMatrix,
    m_K: Structured | None,
    m_C: StructuredMatrix | None,
    H_K: Structured,
    H_C: StructuredMatrix,
    *,
    damping: float,
    alpha1: float,
    lr_cov: float,
    normalize: bool = False,
) -> tuple[Structured, StructuredMatrix, Structured, StructuredMatrix]:
    r"""Return K, C and their momenta after one refresh of SINGD (dense: of INGD).

    With :math:`\operatorname{tr}` the trace divided by the dimension, and all from the old K and C,

    .. math::
        m_K &\leftarrow \alpha_1 m_K + \tfrac{1}{2} \big[\operatorname{tr}(H_C) H_K
            + \lambda \operatorname{tr}(C^T C) P(K^T K) - I\big], \qquad
        K \leftarrow K - \beta_1 K m_K \\
        m_C &\leftarrow \alpha_1 m_C + \tfrac{1}{2} \big[\operatorname{tr}(H_K) H_C
            + \lambda \operatorname{tr}(K^T K) P(C^T C) - I\big], \qquad
        C \leftarrow C - \beta_1 C m_C

    Args:
        K: The inputs' factor, ``[g,i,i]``.
        C: The outputs' factor, ``[g,o,o]``.
        m_K: Momentum of K; None for zero.
        m_C: Momentum of C; None for zero.
        H_K: :math:`P(K^T A K)`.
        H_C: :math:`P(C^T B C)`.
        damping: :math:`\lambda`.
        alpha1: Decay of the momenta (:math:`\alpha_1` in Lin et al.).
        lr_cov: Step size :math:`\beta_1`.
        normalize: Whether to divide :math:`\beta_1` by :math:`\max(1, \|m\|_F)`, and to write
            :math:`\tfrac{1}{2} (1 - \alpha_1)` in front of the brackets.

    References:
        Lin et al. (2023), Simplifying momentum-based positive-definite submanifold optimization with
        applications to deep learning (INGD). Lin et al. (2024), Structured inverse-free natural
        gradient: memory-efficient and numerically stable KFAC.
    """
    tr_K, tr_C = _factor(K.square_norm()) / K.dim, _factor(C.square_norm()) / C.dim
    half = 0.5 * (1 - alpha1) if normalize else 0.5
    new_K = _bracket(K, H_K, _factor(H_C.trace()) / C.dim, damping * tr_C, half)
    new_C = _bracket(C, H_C, _factor(H_K.trace()) / K.dim, damping * tr_K, half)
    if m_K is not None:
        new_K.add_(m_K, alpha1)
    if m_C is not None:
        new_C.add_(m_C, alpha1)
    return _moved(K, new_K, lr_cov, normalize), _moved(C, new_C, lr_cov, normalize), new_K, new_C


def ikfac(
    K: Structured,
    C: StructuredMatrix,
    H_K: Structured,
    H_C: StructuredMatrix,
    *,
    damping: float,
    lr_cov: float,
) -> tuple[Structured, StructuredMatrix]:
    r"""Return K and C after one refresh of inverse-free KFAC.

    .. math::
        m_K = \tfrac{1}{2} \big[H_K + \lambda P(K^T K) - I\big], \qquad K \leftarrow K - \beta_1 K m_K

    and C alike. :math:`(K K^T)^{-1}` tracks the moving average of :math:`A + \lambda I` with weight
    :math:`\beta_1`, up to :math:`O(\beta_1)`.

    Args:
        K: The inputs' factor, ``[g,i,i]``.
        C: The outputs' factor, ``[g,o,o]``.
        H_K: :math:`P(K^T A K)`.
        H_C: :math:`P(C^T B C)`.
        damping: :math:`\lambda`.
        lr_cov: Step size :math:`\beta_1`.

    References:
        Lin et al. (2024), Structured inverse-free natural gradient.
    """
    m_K = _bracket(K, H_K, 1.0, damping, 0.5)
    m_C = _bracket(C, H_C, 1.0, damping, 0.5)
    return _moved(K, m_K, lr_cov, False), _moved(C, m_C, lr_cov, False)


def _bracket(
    K: Structured,
    H: Structured,
    trace: float | Tensor,
    damping: float | Tensor,
    half: float,
) -> Structured:
    """Return ``half [trace H + damping P(K^T K) - I]``."""
    if isinstance(damping, (int, float)) and not damping:
        m = H * (half * trace)
    else:  # in the memory of the product
        m = K.gram().mul_(half * damping).add_(H, half * trace)
    return m.add_identity_(-half)


def _moved(K: Structured, m: Structured, lr_cov: float, normalize: bool) -> Structured:
    """Return ``K - lr_cov K m``, the step divided by the norm of m where that is above one."""
    step = K @ m
    if normalize:
        return step.mul_(-lr_cov / m.norm().clamp(min=1)).add_(K)
    for t, u in zip(K.tensors, step.tensors, strict=True):
        torch.add(t, u, alpha=-lr_cov, out=u)
    return step


def _factor(t: Tensor) -> float | Tensor:
    """Return what to scale matrices with, a number where there is but one, and no device to wait for."""
    return t.item() if t.is_cpu and t.dim() == 0 else t
