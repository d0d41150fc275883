r"""Products :math:`M M^T` of structured matrices, made ready to be applied many times.

An optimizer that keeps an inverse factor as :math:`K K^T` changes K rarely and multiplies with
:math:`K K^T` at each step. The forms here are what is cheapest to multiply with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import singledispatch

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvature.block_diagonal import BlockDiagonalMatrix, DenseMatrix, DiagonalMatrix
from curvature.hierarchical import _Hierarchical
from curvature.panels import symmetric_product
from curvature.structured import StructuredMatrix, accumulator, add_product_
from curvature.toeplitz import _Toeplitz, _transform_length
from curvature.triangular import _Triangular

# Up to this dimension the product of a Toeplitz matrix with its transpose is held as a dense matrix.
TOEPLITZ_DENSE = 600


class Outer(ABC):
    r"""The symmetric matrix :math:`M M^T` of a structured matrix M, in a form that is fast to apply.

    Args:
        dim: Number of rows and columns d.
        *tensors: What is held.

    Attributes:
        tensors: As above, each with the batch axes of M in front.
        dim: As above.
    """

    def __init__(self, dim: int, *tensors: Tensor):
        self.dim = dim
        self.tensors = tensors

    @abstractmethod
    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X`` for ``X[*other, d, n]``; leading axes broadcast with those of M."""

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T`` for ``X[*other, n, d]``; leading axes broadcast with those of M."""
        return self.matmul(X.mT).mT

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``."""
        t = self.tensors[0]
        return self.matmul(torch.eye(self.dim, dtype=t.dtype, device=t.device))


@singledispatch
def outer(M: StructuredMatrix) -> Outer:
    r"""Return :math:`M M^T` in the form that is cheapest to apply; later changes of M may not show.

    A structure of a user is multiplied with twice; ``outer.register`` makes another form known.

    Args:
        M: ``[*batch, d, d]``.

    """
    return TwoProducts(M)


class TwoProducts(Outer):
    """What there is for all structures: the product with the transpose, then that with M."""

    def __init__(self, M: StructuredMatrix):
        super().__init__(M.dim, *M.tensors)
        self._M = M

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M (M^T X)``."""
        return self._M.matmul(self._M.matmul(X, transpose=True))

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``(X M) M^T``."""
        return self._M.rmatmul(self._M.rmatmul(X), transpose=True)

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``."""
        D = self._M.to_dense()
        return D @ D.mT


class Dense(Outer):
    """All d^2 entries, ``[d, d]``."""

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        return self.tensors[0] @ X

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        return X @ self.tensors[0]

    def to_dense(self) -> Tensor:
        """Return the tensor itself."""
        return self.tensors[0]


class Diagonal(Outer):
    """The diagonal, ``[d]``."""

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        return self.tensors[0].unsqueeze(-1) * X

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        return X * self.tensors[0].unsqueeze(-2)


class Blocks(Outer):
    """Blocks on the diagonal, ``[m, block, block]`` and a last one ``[rest, rest]``."""

    def __init__(self, M: BlockDiagonalMatrix):
        blocks = M._like(A @ A.mT for A in M.tensors)
        super().__init__(M.dim, *blocks.tensors)
        self._blocks = blocks

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        return self._blocks.matmul(X)

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        return self._blocks.rmatmul(X)


class Arrow(Outer):
    r"""Dense first and last rows and columns, and a diagonal in the middle.

    .. math:: \begin{pmatrix} A & B & C \\ B^T & \operatorname{diag}(\epsilon) & D^T \\
              C^T & D & E \end{pmatrix}

    Held: the dense rows ``[k1 + k2, d]``, the same with zeros in place of A, C and E, and
    :math:`(0, \epsilon, 0)` as ``[d]``. With the zeros each step fills whole rows, in place.

    Args:
        k1: Number of first rows.
        rows: As above.
        epsilon: Only the middle, ``[d - k1 - k2]``.
    """

    def __init__(self, k1: int, rows: Tensor, epsilon: Tensor):
        d, m = rows.shape[-1], epsilon.shape[-1]
        self._cuts = a, b = k1, k1 + m
        middle = torch.zeros_like(rows)
        middle[..., a:b] = rows[..., a:b]
        super().__init__(d, rows, middle, pad(epsilon, (a, d - b)))

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        rows, middle, epsilon = self.tensors
        a, b = self._cuts
        Y = epsilon.unsqueeze(-1) * X
        ends = torch.cat([X[..., :a, :], X[..., b:, :]], -2) if b < self.dim else X[..., :a, :]
        add_product_(Y, middle.mT, ends)
        dense = rows @ X
        Y[..., :a, :], Y[..., b:, :] = dense[..., :a, :], dense[..., a:, :]
        return Y

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        rows, middle, epsilon = self.tensors
        a, b = self._cuts
        Y = epsilon.unsqueeze(-2) * X
        ends = torch.cat([X[..., :a], X[..., b:]], -1) if b < self.dim else X[..., :a]
        add_product_(Y, ends, middle)
        dense = X @ rows.mT
        Y[..., :a], Y[..., b:] = dense[..., :a], dense[..., a:]
        return Y


class DiagonalPlusGram(Outer):
    r""":math:`\operatorname{diag}(\epsilon) + W^T W`, held as ``W[k, d]`` and ``epsilon[d]``."""

    def __init__(self, W: Tensor, epsilon: Tensor):
        super().__init__(W.shape[-1], W, epsilon)

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        W, epsilon = self.tensors
        return add_product_(epsilon.unsqueeze(-1) * X, W.mT, W @ X)

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        W, epsilon = self.tensors
        return add_product_(X * epsilon.unsqueeze(-2), X @ W.mT, W)


class Fourier(Outer):
    r"""A Toeplitz triangle H as the transform of its first column: :math:`H H^T` or :math:`H^T H`.

    Four Fourier transforms, and no copies but theirs.
    """

    def __init__(self, M: _Toeplitz):
        n = _transform_length(2 * M.dim - 1)
        f = torch.fft.rfft(M.tensors[0].to(accumulator(M.dtype)), n)
        super().__init__(M.dim, f)
        self._length, self._mirrored, self._dtype = n, M.mirrored, M.dtype

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        return self._twice(X, self.tensors[0].unsqueeze(-1), -2)

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        return self._twice(X, self.tensors[0].unsqueeze(-2), -1)

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``."""
        return self.matmul(torch.eye(self.dim, dtype=self._dtype, device=self.tensors[0].device))

    def _twice(self, X: Tensor, f: Tensor, axis: int) -> Tensor:
        n, d = self._length, self.dim
        back = f.conj().resolve_conj()
        first, second = (f, back) if self._mirrored else (back, f)
        F = torch.fft.rfft(X.to(accumulator(X.dtype)), n, dim=axis)
        Y = torch.fft.irfft(F * first, n, dim=axis)
        Y.narrow(axis, d, n - d).zero_()
        F = torch.fft.rfft(Y, dim=axis)
        return torch.fft.irfft(F.mul_(second), n, dim=axis).narrow(axis, 0, d).to(X.dtype)


@outer.register
def _(M: DenseMatrix) -> Outer:
    return Dense(M.dim, symmetric_product(M.tensors[0]))


@outer.register
def _(M: DiagonalMatrix) -> Outer:
    return Diagonal(M.dim, M.tensors[0].square())


@outer.register
def _(M: BlockDiagonalMatrix) -> Outer:
    return Blocks(M)


@outer.register
def _(M: _Triangular) -> Outer:
    return Dense(M.dim, symmetric_product(M.to_dense()))


@outer.register
def _(M: _Toeplitz) -> Outer:
    if M.dim <= TOEPLITZ_DENSE:
        return Dense(M.dim, symmetric_product(M.to_dense()))
    return Fourier(M)


@outer.register
def _(M: _Hierarchical) -> Outer:
    T, U, delta = M.tensors
    a, b = M._cuts
    square = delta.square()
    if M.mirrored:
        W = T.new_zeros(*T.shape[:-2], T.shape[-2] + U.shape[-2], M.dim)
        W[..., :a, :], W[..., a:, a:] = T, U
        return DiagonalPlusGram(W, pad(square, (a, M.dim - b)))
    m = b - a
    R = T.new_zeros(*T.shape[:-2], T.shape[-2] + U.shape[-2], M.dim)
    scaled = delta.unsqueeze(-2)
    R[..., :a, :a] = T @ T.mT
    R[..., :a, a:b] = T[..., a:b] * scaled
    R[..., :a, b:] = cross = T[..., a:] @ U.mT
    R[..., a:, :a] = cross.mT
    R[..., a:, a:b] = U[..., :m] * scaled
    R[..., a:, b:] = U @ U.mT
    return Arrow(a, R, square)
