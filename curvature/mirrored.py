r"""Two kinds of storage: a number per entry; one implementation for a structure and its transpose."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from curvature.structured import Self, StructuredMatrix, accumulator, square_sum


class EntrywiseMatrix(StructuredMatrix):
    """A structure each of whose stored numbers is one entry of the matrix."""

    @abstractmethod
    def _diagonal(self) -> tuple[Tensor, ...]:
        """Return views ``[*batch, ...]`` that together are the diagonal."""

    def _trace(self) -> Tensor:
        lead = len(self.batch_shape)
        parts = [v.flatten(lead) for v in self._diagonal()]
        diagonal = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # a sum each takes longer
        return diagonal.sum(-1, dtype=accumulator(self.dtype))

    def _square_norm(self) -> Tensor:
        if not self.batch_shape and accumulator(self.dtype) == self.dtype:  # few calls
            norms = torch.stack(torch._foreach_norm(self.tensors))
            return norms.dot(norms)
        axes = [len(shape) for shape in self.shapes(self.dim, **self.options)]
        parts = zip(self.tensors, axes, strict=True)
        return reduce(Tensor.add_, (square_sum(t, tuple(range(-k, 0))) for t, k in parts))

    def _add_identity(self, alpha: float) -> None:
        for v in self._diagonal():
            v.add_(alpha)


class MirroredMatrix(StructuredMatrix):
    r"""A structure and its transpose in one implementation.

    The tensors hold a matrix H. The structured matrix is H, or :math:`H^T` where the class says
    ``mirrored = True``. Subclasses implement the hooks for H. Since :math:`P(M)` of a symmetric M
    is mirrored with the structure, projections hold the same numbers on both sides.
    """

    mirrored: ClassVar[bool] = False

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``."""
        H = self._held()
        return H.mT if self.mirrored else H

    @classmethod
    def from_dense(cls: type[Self], M: Tensor, **options: int) -> Self:
        """Keep the structure's entries of ``M[*batch, d, d]``; see `StructuredMatrix.from_dense`."""
        options = cls._check_square(M, options)
        return cls(cls._hold(M.mT if cls.mirrored else M, **options), M.shape[-1], **options)

    @abstractmethod
    def _held(self) -> Tensor:
        """Return H, dense."""

    @classmethod
    @abstractmethod
    def _hold(cls, M: Tensor, **options: int) -> Sequence[Tensor]:
        """Return the tensors that hold H's entries of a dense matrix, as a copy."""

    @abstractmethod
    def _held_matmul(self, X: Tensor, transpose: bool) -> Tensor:
        """Return ``H X``, or ``H^T X``."""

    @abstractmethod
    def _held_compose(self: Self, other: Self) -> Self:
        """Hold the product of this H with the other one."""

    @abstractmethod
    def _held_gram(self: Self, outer: bool) -> Self:
        """Hold the entries (not doubled) of ``H^T H``, or of ``H H^T`` for ``outer``."""

    @abstractmethod
    def _double_unpaired(self: Self) -> Self:
        """Double, in place, the entries whose mirror image is not kept."""

    def _matmul(self, X: Tensor, transpose: bool) -> Tensor:
        return self._held_matmul(X, transpose != self.mirrored)

    def _compose(self: Self, other: Self) -> Self:
        return other._held_compose(self) if self.mirrored else self._held_compose(other)

    @classmethod
    def _project(cls: type[Self], M: Tensor, **options: int) -> Self:
        return cls.from_dense(M, **options)._double_unpaired()

    def _gram(self: Self) -> Self:
        return self._held_gram(outer=self.mirrored)._double_unpaired()
