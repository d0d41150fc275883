"""Dense matrices, diagonal ones, and between them those with square blocks on the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.mirrored import EntrywiseMatrix
from curvature.panels import symmetric_product
from curvature.structured import Self, at_least, scaled_product, square_sum


class DenseMatrix(EntrywiseMatrix):
    """Every matrix. Stored: d^2 numbers, ``[d, d]``.

    Example:
        >>> A = DenseMatrix.from_dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> A.gram().to_dense()
        tensor([[1., 2.],
                [2., 5.]])
    """

    name = "dense"

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``: the stored tensor itself."""
        return self.tensors[0]

    @classmethod
    def from_dense(cls: type[Self], M: Tensor, **options: int) -> Self:
        """Copy ``M[*batch, d, d]``; see `StructuredMatrix.from_dense`."""
        options = cls._check_square(M, options)
        return cls([M.clone()], M.shape[-1], **options)

    @classmethod
    def _shapes(cls, dim: int, **options: int) -> tuple[tuple[int, ...], ...]:
        return ((dim, dim),)

    def _diagonal(self) -> tuple[Tensor, ...]:
        return (self.tensors[0].diagonal(dim1=-2, dim2=-1),)

    def _matmul(self, X: Tensor, transpose: bool) -> Tensor:
        (A,) = self.tensors
        return (A.mT if transpose else A) @ X

    def _rmatmul(self, X: Tensor, transpose: bool) -> Tensor:
        (A,) = self.tensors
        return X @ (A.mT if transpose else A)

    def _compose(self: Self, other: Self) -> Self:
        return self.like([self.tensors[0] @ other.tensors[0]])

    @classmethod
    def _project(cls: type[Self], M: Tensor, **options: int) -> Self:
        return cls.from_dense(M)

    @classmethod
    def _project_gram(cls: type[Self], S: Tensor, scale: float, **options: int) -> Self:
        return cls._of([symmetric_product(S, scale)], S.shape[-2], options)

    def _gram(self: Self) -> Self:
        (A,) = self.tensors
        return self.like([symmetric_product(A.mT)])


class DiagonalMatrix(EntrywiseMatrix):
    """Diagonal matrices. Stored: d numbers, ``[d]``.

    Example:
        >>> A = DiagonalMatrix.from_dense(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        >>> A @ torch.ones(2, 1)
        tensor([[1.],
                [3.]])
    """

    name = "diagonal"

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``."""
        return torch.diag_embed(self.tensors[0])

    @classmethod
    def from_dense(cls: type[Self], M: Tensor, **options: int) -> Self:
        """Keep the diagonal of ``M[*batch, d, d]``; see `StructuredMatrix.from_dense`."""
        options = cls._check_square(M, options)
        return cls([M.diagonal(dim1=-2, dim2=-1).clone()], M.shape[-1], **options)

    @classmethod
    def _shapes(cls, dim: int, **options: int) -> tuple[tuple[int, ...], ...]:
        return ((dim,),)

    def _diagonal(self) -> tuple[Tensor, ...]:
        return self.tensors

    def _matmul(self, X: Tensor, transpose: bool) -> Tensor:
        return self.tensors[0].unsqueeze(-1) * X

    def _rmatmul(self, X: Tensor, transpose: bool) -> Tensor:
        return X * self.tensors[0].unsqueeze(-2)

    def _compose(self: Self, other: Self) -> Self:
        return self.like([self.tensors[0] * other.tensors[0]])

    @classmethod
    def _project(cls: type[Self], M: Tensor, **options: int) -> Self:
        return cls.from_dense(M)

    @classmethod
    def _project_gram(cls: type[Self], S: Tensor, scale: float, **options: int) -> Self:
        return cls._of([square_sum(S, -1).mul_(scale).to(S.dtype)], S.shape[-2], options)

    def _gram(self: Self) -> Self:
        return self.like([self.tensors[0].square()])


class BlockDiagonalMatrix(EntrywiseMatrix):
    """Square blocks on the diagonal.

    Stored: the sum of the squared block sizes, as ``[m, block, block]`` and the ragged last block
    ``[rest, rest]``, which is empty where ``block`` divides d. A larger ``block`` than d is limited
    to d.

    Example:
        >>> A = BlockDiagonalMatrix.from_dense(torch.arange(9.0).view(3, 3), block=2)
        >>> A.to_dense()
        tensor([[0., 1., 0.],
                [3., 4., 0.],
                [0., 0., 8.]])
    """

    name = "block-diagonal"
    defaults = {"block": 32}

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``."""
        out = self.tensors[0].new_zeros(self.shape)
        for view, t in zip(self._blocks(out, **self.options), self.tensors, strict=True):
            view.copy_(t)
        return out

    @classmethod
    def from_dense(cls: type[Self], M: Tensor, **options: int) -> Self:
        """Keep the blocks of ``M[*batch, d, d]``; see `StructuredMatrix.from_dense`."""
        options = cls._check_square(M, options)
        blocks = cls._blocks(M, **options)
        copies = [b.clone(memory_format=torch.contiguous_format) for b in blocks]
        return cls(copies, M.shape[-1], **options)

    @classmethod
    def _limit(cls, dim: int, *, block: int) -> dict[str, int]:
        return {"block": min(at_least(1, cls, "block", block), dim)}

    @classmethod
    def _shapes(cls, dim: int, *, block: int) -> tuple[tuple[int, ...], ...]:
        count, rest = divmod(dim, block)
        return ((count, block, block), (rest, rest))

    @staticmethod
    def _blocks(M: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Return views of the blocks, ``[*batch, m, block, block]`` and ``[*batch, rest, rest]``."""
        count = M.shape[-1] // block
        end = count * block
        main = M[..., :end, :end].unflatten(-2, (count, block)).unflatten(-1, (count, block))
        return main.diagonal(dim1=-4, dim2=-2).movedim(-1, -3), M[..., end:, end:]

    @staticmethod
    def _rows(X: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Split ``X[*other, d, n]`` into ``[*other, m, block, n]`` and ``[*other, rest, n]``."""
        count, rest = divmod(X.shape[-2], block)
        if rest == 0:
            return X.unflatten(-2, (count, block)), X[..., :0, :]
        return X[..., : count * block, :].unflatten(-2, (count, block)), X[..., count * block :, :]

    def _diagonal(self) -> tuple[Tensor, ...]:
        return tuple(t.diagonal(dim1=-2, dim2=-1) for t in self.tensors)

    def _matmul(self, X: Tensor, transpose: bool) -> Tensor:
        parts = [
            (A.mT if transpose else A) @ x
            for A, x in zip(self.tensors, self._rows(X, **self.options), strict=True)
        ]
        main = parts[0].flatten(-3, -2)
        return torch.cat([main, parts[1]], -2) if parts[1].shape[-2] else main

    def _compose(self: Self, other: Self) -> Self:
        return self.like(A @ B for A, B in zip(self.tensors, other.tensors, strict=True))

    @classmethod
    def _project(cls: type[Self], M: Tensor, **options: int) -> Self:
        return cls.from_dense(M, **options)

    @classmethod
    def _project_gram(cls: type[Self], S: Tensor, scale: float, **options: int) -> Self:
        tensors = [scaled_product(s, s.mT, scale) for s in cls._rows(S, **options)]
        return cls._of(tensors, S.shape[-2], options)

    def _gram(self: Self) -> Self:
        return self.like(A.mT @ A for A in self.tensors)
