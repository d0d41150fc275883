"""Damped inverses and eigenbases of symmetric structured matrices: pure functions for KFAC.

Structures whose inverses they contain: dense, block-diagonal and diagonal. All is computed in float32
or above. Rounding may have made a positive semidefinite matrix indefinite, a lot in half precision:
negative eigenvalues count as zero, and nothing fails.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvature import DiagonalMatrix, StructuredMatrix
from curvature.decomposition import symmetric_eigh, widen

# Names of structures that have inverses here.
INVERTIBLE = ("dense", "block-diagonal", "diagonal")


def pi_ratio(A: StructuredMatrix, B: StructuredMatrix) -> Tensor:
    r"""Return :math:`\pi`, how a damping is split between two factors, ``[g]``.

    .. math::  \pi^2 = \frac{\operatorname{tr}(A) / \dim A}{\operatorname{tr}(B) / \dim B}

    1 where a trace is not positive.

    References:
        Martens & Grosse (2015), Optimizing neural networks with Kronecker-factored approximate
        curvature, section 6.3.
    """
    a, b = A.trace() / A.dim, B.trace() / B.dim
    return torch.where((a > 0) & (b > 0), a / b, 1.0).sqrt()


def damped_inverse(M: StructuredMatrix, shift: Tensor) -> StructuredMatrix:
    r"""Return :math:`(M + \text{shift} \, I)^{-1}`, in the structure of M.

    Args:
        M: ``[g,d,d]``.
        shift: ``[g]``, positive.
    """
    if isinstance(M, DiagonalMatrix):
        return M.like([1 / (widen(M.tensors[0]).clamp(min=0) + shift[..., None])])
    return M.like(_damped_inverse(widen(t), shift) for t in M.tensors)


def _damped_inverse(M: Tensor, shift: Tensor) -> Tensor:
    """Invert ``M[g,...,d,d]`` through Cholesky, through eigenvalues where that fails."""
    if not M.numel():
        return M
    shift = shift.reshape(*shift.shape, *[1] * (M.dim() - 1 - shift.dim()))  # [g,...,1]
    damped = M.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(shift)
    L, info = torch.linalg.cholesky_ex(damped)
    if not info.any():
        return torch.cholesky_inverse(L)
    values, Q = symmetric_eigh("A factor", M)
    return (Q / (values.clamp(min=0) + shift).unsqueeze(-2)) @ Q.mT


def eigenbasis(M: StructuredMatrix) -> tuple[StructuredMatrix, Tensor]:
    """Return an orthogonal matrix in the structure of ``M[g,d,d]``, and eigenvalues ``[g,d]``.

    ``M = Q diag(values) Q^T``; no eigenvalue is negative.
    """
    if isinstance(M, DiagonalMatrix):
        values = widen(M.tensors[0]).clamp(min=0)
        return M.like([torch.ones_like(values)]), values
    lead, bases, found = len(M.batch_shape), [], []
    for t in M.tensors:
        t = widen(t)
        values, Q = symmetric_eigh("A factor", t) if t.numel() else (t.diagonal(dim1=-2, dim2=-1), t)
        bases.append(Q)
        found.append(values.clamp(min=0).flatten(lead))
    return M.like(bases), torch.cat(found, dim=-1)
