r"""Products :math:`M M^T` of structured matrices, made ready to be applied many times.

An optimizer that keeps an inverse factor as :math:`K K^T` changes K rarely and multiplies with
:math:`K K^T` at each step. The forms here are what is cheapest to multiply with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import singledispatch

import torch
from torch import Tensor

from curvature.block_diagonal import BlockDiagonalMatrix, DenseMatrix, DiagonalMatrix
from curvature.hierarchical import _Hierarchical
from curvature.panels import symmetric_product
from curvature.structured import StructuredMatrix, add_product_, leading_axes
from curvature.toeplitz import DIRECT, Convolution, _Toeplitz
from curvature.triangular import _Triangular

# Up to this dimension the product of a Toeplitz matrix with its transpose is held as a dense matrix.
# Measured on two CPU cores in float32 with 512 rows or columns, Fourier / dense: rows 1.1 (to 2.2,
# where each call has to get its memory from the system anew) at d = 512, 0.8 to 1.0 at 640, 0.7 at
# 785, 0.5 at 1153; columns 1.5 to 3, 1.0 to 1.4, 0.9 to 0.95, 0.7.
TOEPLITZ_DENSE = 640

# Numbers that a Fourier transform on CPU takes at once. Larger temporary tensors are given back to
# the system after each product, and their pages fetched anew (d = 785: up to twice as long); with a
# quarter of it calls take longer than what they do.
CHUNK = 2**18


class Outer(ABC):
    r"""The symmetric matrix :math:`M M^T` of a structured matrix M, in a form that is fast to apply.

    Shapes and types of what it is applied to are those of `StructuredMatrix.matmul`; nothing but what
    torch refuses is refused.

    Args:
        dim: Number of rows and columns d.
        *tensors: What is held.

    Attributes:
        tensors: As above, each with the batch axes of M in front. They share no memory with M.
        dim: As above.
    """

    def __init__(self, dim: int, *tensors: Tensor):
        self.dim = dim
        self.tensors = tensors

    @abstractmethod
    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X`` for ``X[*other, d, n]``; leading axes broadcast with those of M."""

    @abstractmethod
    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T`` for ``X[*other, n, d]``; leading axes broadcast with those of M."""

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``."""
        t = self.tensors[0]
        return self.matmul(torch.eye(self.dim, dtype=t.dtype, device=t.device))


@singledispatch
def outer(M: StructuredMatrix) -> Outer:
    r"""Return :math:`M M^T` in the form that is cheapest to apply; later changes of M do not show.

    ================================ ===================================== =======================
    M                                held                                  product with ``[d, n]``
    ================================ ===================================== =======================
    dense, triangular, small Toeplitz ``[d, d]``                           d^2 n
    diagonal                         ``[d]``                               d n
    block-diagonal                   the blocks                            d block n
    hierarchical, rank-k-upper       `Arrow`                               2 (k1 + k2) d n
    rank-k-lower                     `DiagonalPlusGram`                    2 k d n
    large Toeplitz                   `Fourier`                             four transforms
    a user's                         a copy of M                           two products with M
    ================================ ===================================== =======================

    ``outer.register`` makes a form for a user's structure known.

    Args:
        M: ``[*batch, d, d]``.

    Example:
        >>> from curvature.structures import STRUCTURES
        >>> M = STRUCTURES["rank-k-upper"].from_dense(torch.tensor([[1.0, 2.0], [9.0, 3.0]]), k=1)
        >>> N = outer(M)  # [[1, 2], [0, 3]] times its transpose
        >>> N.matmul(torch.eye(2)), N.rmatmul(torch.ones(1, 2))
        (tensor([[5., 6.],
                [6., 9.]]), tensor([[11., 15.]]))
    """
    return TwoProducts(M)


def outer_for_few(M: StructuredMatrix) -> Outer:
    """Return the same for products with few vectors before M changes: with hundreds, not thousands.

    A Toeplitz matrix is not made dense where that would take longer than it saves.
    """
    if isinstance(M, _Toeplitz) and M.dim > DIRECT:
        return Fourier(M)
    return outer(M)


class TwoProducts(Outer):
    """What there is for all structures: the product with the transpose, then that with M."""

    def __init__(self, M: StructuredMatrix):
        self._M = M.clone()
        super().__init__(M.dim, *self._M.tensors)

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M (M^T X)``."""
        return self._M.matmul(self._M.matmul(X, transpose=True))

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``(X M) M^T``."""
        return self._M.rmatmul(self._M.rmatmul(X), transpose=True)


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
    """Blocks on the diagonal, ``[m, block, block]`` and a last one ``[rest, rest]``.

    Args:
        M: The block-diagonal matrix whose product with its transpose is held.
    """

    def __init__(self, M: BlockDiagonalMatrix):
        blocks = M.like(A @ A.mT for A in M.tensors)
        super().__init__(M.dim, *blocks.tensors)
        self._blocks = blocks

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        return self._blocks.matmul(X)

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        main, rest = self.tensors
        count, block = main.shape[-3:-1]
        end = count * block
        out = X.new_empty(*leading_axes(rest, X), *X.shape[-2:])
        parts = X[..., :end].unflatten(-1, (count, block)).transpose(-2, -3) @ main
        out[..., :end].unflatten(-1, (count, block)).copy_(parts.transpose(-2, -3))
        if end < self.dim:
            out[..., end:] = X[..., end:] @ rest
        return out


class DiagonalPlus(Outer):
    r"""A diagonal plus products with few vectors, :math:`S = D + A^T B + E^T R`.

    E selects the first and last entries of a vector, where D and A are zero: there R has
    S's own rows.

    Attributes:
        cuts: Where the first entries end, and the last ones begin.
    """

    cuts: tuple[int, int]

    @property
    @abstractmethod
    def epsilon(self) -> Tensor:
        """The diagonal, ``[d]``."""

    @property
    @abstractmethod
    def A(self) -> Tensor:
        """As above, ``[m, d]``."""

    @property
    @abstractmethod
    def B(self) -> Tensor | None:
        """As above, ``[m, d]``; None if it is E."""

    @property
    @abstractmethod
    def R(self) -> Tensor | None:
        """As above, a row for each entry that E selects; None if there is none."""

    @abstractmethod
    def at(self, k: int) -> DiagonalPlus:
        """Return the k-th of a stack of matrices, sharing memory."""


class Arrow(DiagonalPlus):
    r"""Dense first and last rows and columns, and a diagonal in the middle.

    .. math:: \begin{pmatrix} A & B & C \\ B^T & \operatorname{diag}(\epsilon) & D^T \\
              C^T & D & E \end{pmatrix}

    Held: the dense rows ``[k1 + k2, d]``, the same with zeros in place of A, C and E, and
    :math:`(0, \epsilon, 0)` as ``[d]``. With the zeros each step fills whole rows, in place.

    Args:
        M: The hierarchical matrix whose product with its transpose is held.
    """

    def __init__(self, M: _Hierarchical):
        W, delta = M.dense_rows, M.middle
        self.cuts = a, b = M._cuts
        rows, middle = (_aligned(W, W.shape) for _ in range(2))
        torch.mul(W, delta, out=middle)
        rows.copy_(middle)
        ends = W @ W.mT
        rows[..., :a], rows[..., b:] = ends[..., :a], ends[..., a:]
        super().__init__(M.dim, rows, middle, delta.square().squeeze(-2))

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        rows, middle, epsilon = self.tensors
        a, b = self.cuts
        if a == b:  # all is dense
            return rows @ X
        Y = epsilon.unsqueeze(-1) * X
        ends = torch.cat([X[..., :a, :], X[..., b:, :]], -2) if b < self.dim else X[..., :a, :]
        add_product_(Y, middle.mT, ends)
        dense = rows @ X
        Y[..., :a, :], Y[..., b:, :] = dense[..., :a, :], dense[..., a:, :]
        return Y

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        rows, middle, epsilon = self.tensors
        a, b = self.cuts
        if a == b:
            return X @ rows
        Y = epsilon.unsqueeze(-2) * X
        ends = torch.cat([X[..., :a], X[..., b:]], -1) if b < self.dim else X[..., :a]
        add_product_(Y, ends, middle)
        dense = _times_transpose(X, rows)
        Y[..., :a], Y[..., b:] = dense[..., :a], dense[..., a:]
        return Y

    @property
    def epsilon(self) -> Tensor:
        """The diagonal of the middle."""
        return self.tensors[2]

    @property
    def A(self) -> Tensor:
        """The dense rows of the middle."""
        return self.tensors[1]

    @property
    def B(self) -> None:
        """It is E."""
        return None

    @property
    def R(self) -> Tensor:
        """The dense rows."""
        return self.tensors[0]

    def at(self, k: int) -> Arrow:
        """Return the k-th of a stack of matrices, sharing memory."""
        new = object.__new__(Arrow)
        new.dim, new.cuts, new.tensors = self.dim, self.cuts, tuple(t[k] for t in self.tensors)
        return new


class DiagonalPlusGram(DiagonalPlus):
    r""":math:`\operatorname{diag}(\epsilon) + W^T W`, held as ``W[k, d]`` and ``epsilon[d]``.

    It is what the transpose of a hierarchical matrix, with dense first and last columns, gives.
    """

    def __init__(self, W: Tensor, epsilon: Tensor):
        super().__init__(W.shape[-1], W, epsilon)
        self.cuts = 0, self.dim

    @property
    def epsilon(self) -> Tensor:
        """The diagonal."""
        return self.tensors[1]

    @property
    def A(self) -> Tensor:
        """W."""
        return self.tensors[0]

    @property
    def B(self) -> Tensor:
        """W, too."""
        return self.tensors[0]

    @property
    def R(self) -> None:
        """All is in the other terms."""
        return None

    def at(self, k: int) -> DiagonalPlusGram:
        """Return the k-th of a stack of matrices, sharing memory."""
        return DiagonalPlusGram(*(t[k] for t in self.tensors))

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        W, epsilon = self.tensors
        return add_product_(epsilon.unsqueeze(-1) * X, W.mT, W @ X)

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        W, epsilon = self.tensors
        return add_product_(X * epsilon.unsqueeze(-2), _times_transpose(X, W), W)


class Fourier(Outer):
    r"""The transform of the first column (row) of a lower (upper) triangular Toeplitz matrix.

    A product takes four transforms, see `Convolution`: what the first pair gives beyond d has to be cut
    off before the second. (:math:`M M^T` is a Toeplitz matrix less the square of a Hankel matrix; that
    takes four as well, since the square does.)

    Args:
        M: The Toeplitz matrix. From half types all is computed in float32.
    """

    def __init__(self, M: _Toeplitz):
        self._held, self._mirrored, self._dtype = Convolution(M.tensors[0]), M.mirrored, M.dtype
        super().__init__(M.dim, self._held.f.squeeze(-2))

    def matmul(self, X: Tensor) -> Tensor:
        """Return ``M M^T X``."""
        f, step = self.tensors[0], self._step(X)
        out = X.new_empty(*leading_axes(f.unsqueeze(-1), X), *X.shape[-2:])
        for k in range(0, X.shape[-1], step):
            # transforms along columns take twice as long as those of rows, with both transpositions
            out[..., k : k + step] = self._times(X[..., k : k + step].mT.contiguous()).mT
        return out

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return ``X M M^T``."""
        f, step = self.tensors[0], self._step(X)
        if step >= X.shape[-2]:
            return self._times(X).to(X.dtype)
        out = X.new_empty(*leading_axes(f.unsqueeze(-1), X), *X.shape[-2:])
        for k in range(0, X.shape[-2], step):
            out[..., k : k + step, :] = self._times(X[..., k : k + step, :])
        return out

    def _step(self, X: Tensor) -> int:
        """Return how many rows, or columns, of X are transformed at once."""
        if X.device.type != "cpu":
            return max(1, X.numel())
        matrices = max(1, self.tensors[0].shape[:-1].numel(), X.shape[:-2].numel())
        return max(1, CHUNK // (self._held.length * matrices))

    def _times(self, X: Tensor) -> Tensor:
        """Return ``X M M^T`` in the type of the transforms."""
        first = not self._mirrored  # M^T, unless M is the transpose of what is held
        return self._held.times(X, first, not first)

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``."""
        return self.matmul(torch.eye(self.dim, dtype=self._dtype, device=self.tensors[0].device))


def _aligned(like: Tensor, shape: torch.Size) -> Tensor:
    """Return room for rows that begin at multiples of 16 numbers in memory.

    Products with some of their columns take a quarter longer on CPU otherwise.
    """
    return like.new_empty(*shape[:-1], -(-shape[-1] // 16) * 16).narrow(-1, 0, shape[-1])


def _times_transpose(X: Tensor, rows: Tensor) -> Tensor:
    """Return ``X rows^T`` for few rows.

    A product whose result has 30 columns takes 1.7 times as long on CPU as one that has 30 rows.
    """
    return (rows @ X.mT).mT


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
    if not M.mirrored:
        return Arrow(M)
    W = _aligned(M.dense_rows, M.dense_rows.shape).copy_(M.dense_rows)
    return DiagonalPlusGram(W, M.middle.square().squeeze(-2))
