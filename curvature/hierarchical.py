r"""Hierarchical matrices, and triangular ones with few dense rows or columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvature.mirrored import EntrywiseMatrix, MirroredMatrix
from curvature.structured import accumulator, add_product_, at_least, scaled_product, square_sum


class _Hierarchical(MirroredMatrix, EntrywiseMatrix):
    r"""The matrix :math:`H = [[A, B_1, B_2], [0, \operatorname{diag}(\delta), 0], [0, D, E]]`.

    A is ``k1 x k1``, E is ``k2 x k2``. The tensors are the dense rows
    :math:`T = [A, B_1, B_2]`, ``[k1, d]``, and :math:`U = [D, E]`, ``[k2, d - k1]``, and
    :math:`\delta`, ``[d - k1 - k2]``.
    """

    @staticmethod
    @abstractmethod
    def _sizes(**options: int) -> tuple[int, int]:
        """Return k1 and k2."""

    @classmethod
    def _shapes(cls, dim: int, **options: int) -> tuple[tuple[int, ...], ...]:
        k1, k2 = cls._sizes(**options)
        return ((k1, dim), (k2, dim - k1), (dim - k1 - k2,))

    @property
    def _cuts(self) -> tuple[int, int]:
        """Where the second and the third block row begin."""
        k1, k2 = self._sizes(**self.options)
        return k1, self.dim - k2

    def _diagonal(self) -> tuple[Tensor, ...]:
        T, U, delta = self.tensors
        E = U[..., delta.shape[-1] :]
        return T.diagonal(dim1=-2, dim2=-1), E.diagonal(dim1=-2, dim2=-1), delta

    def _held(self) -> Tensor:
        T, U, delta = self.tensors
        a, b = self._cuts
        out = T.new_zeros(self.shape)
        out[..., :a, :], out[..., b:, a:] = T, U
        out.diagonal(dim1=-2, dim2=-1)[..., a:b] = delta
        return out

    @classmethod
    def _hold(cls, M: Tensor, **options: int) -> Sequence[Tensor]:
        k1, k2 = cls._sizes(**options)
        b = M.shape[-1] - k2
        parts = M[..., :k1, :], M[..., b:, k1:], M.diagonal(dim1=-2, dim2=-1)[..., k1:b]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]

    def _held_matmul(self, X: Tensor, transpose: bool) -> Tensor:
        T, U, delta = self.tensors
        a, b = self._cuts
        # one pass with zeros beside the diagonal also makes room for the other rows
        Y = pad(delta, (a, self.dim - b)).unsqueeze(-1) * X
        if transpose:
            add_product_(Y, T.mT, X[..., :a, :])
            if b < self.dim:
                add_product_(Y[..., a:, :], U.mT, X[..., b:, :])
        else:
            Y[..., :a, :] = T @ X
            if b < self.dim:
                Y[..., b:, :] = U @ X[..., a:, :]
        return Y

    def _held_compose(self, other: _Hierarchical) -> _Hierarchical:
        (T, U, delta), (R, V, eps) = self.tensors, other.tensors
        a, b = self._cuts
        m = b - a
        scales = eps.unsqueeze(-2)
        top = T[..., :a] @ R
        top[..., a:b].addcmul_(T[..., a:b], scales)
        add_product_(top[..., a:], T[..., b:], V)
        bottom = U[..., m:] @ V
        bottom[..., :m].addcmul_(U[..., :m], scales)
        return self.like((top, bottom, delta * eps))

    @classmethod
    def _project_gram(cls, S: Tensor, scale: float, **options: int) -> _Hierarchical:
        d = S.shape[-2]
        k1, k2 = cls._sizes(**options)
        T = scaled_product(S[..., :k1, :], S.mT, scale)
        U = scaled_product(S[..., d - k2 :, :], S[..., k1:, :].mT, scale)
        delta = square_sum(S[..., k1 : d - k2, :], -1).mul_(scale).to(S.dtype)
        return cls._of((T, U, delta), d, options)._double_unpaired()

    def _held_gram(self, outer: bool) -> _Hierarchical:
        T, U, delta = self.tensors
        a, m = self._cuts[0], delta.shape[-1]
        A, B1, B2 = T[..., :a], T[..., a : a + m], T[..., a + m :]
        D, E = U[..., :m], U[..., m:]
        if outer:  # rows of H with rows of H
            top = torch.cat([T @ T.mT, B1 * delta.unsqueeze(-2), T[..., a:] @ U.mT], -1)
            bottom = torch.cat([D * delta.unsqueeze(-2), U @ U.mT], -1)
            return self.like((top, bottom, delta.square()))
        # columns with columns: those of A meet T only, those of B2 and E meet T and U
        wide = torch.cat([B1, D, delta.unsqueeze(-2)], -2).to(accumulator(delta.dtype))
        middle = wide.square().sum(-2).to(delta.dtype)
        bottom = B2.mT @ T[..., a:]
        add_product_(bottom, E.mT, U)
        return self.like((A.mT @ T, bottom, middle))

    def _double_unpaired(self) -> _Hierarchical:
        T, U, delta = self.tensors
        T[..., self._cuts[0] :].mul_(2)
        U[..., : delta.shape[-1]].mul_(2)
        return self


class Hierarchical(_Hierarchical):
    """Matrices ``[[A, B1, B2], [0, diag, 0], [0, D, E]]``: dense first and last rows.

    Stored: (k1 + k2 + 1) d - k1 k2 - k1 - k2 numbers, as ``[A, B1, B2]`` of shape ``[k1, d]``,
    ``[D, E]`` of shape ``[k2, d - k1]`` and the diagonal in the middle, ``[d - k1 - k2]``. Where
    k1 + k2 exceeds d, first k1 is limited to d and then k2 to d - k1.

    Example:
        >>> Hierarchical.from_dense(torch.ones(4, 4), k1=1, k2=1).to_dense()
        tensor([[1., 1., 1., 1.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.],
                [0., 1., 1., 1.]])
    """

    name = "hierarchical"
    defaults = {"k1": 16, "k2": 16}

    @classmethod
    def _limit(cls, dim: int, *, k1: int, k2: int) -> dict[str, int]:
        k1 = min(at_least(0, cls, "k1", k1), dim)
        return {"k1": k1, "k2": min(at_least(0, cls, "k2", k2), dim - k1)}

    @staticmethod
    def _sizes(*, k1: int, k2: int) -> tuple[int, int]:
        return k1, k2


class _RankK(_Hierarchical):
    """k dense first rows and a diagonal: no last rows."""

    defaults = {"k": 16}

    @classmethod
    def _limit(cls, dim: int, *, k: int) -> dict[str, int]:
        return {"k": min(at_least(0, cls, "k", k), dim)}

    @staticmethod
    def _sizes(*, k: int) -> tuple[int, int]:
        return k, 0


class RankKUpper(_RankK):
    """Upper triangular up to a ``k x k`` block: k dense first rows, and a diagonal.

    Stored: (k + 1) d - k numbers, as the rows ``[k, d]``, an empty tensor ``[0, d - k]`` and the
    diagonal ``[d - k]``. k is limited to d.

    Example:
        >>> RankKUpper.from_dense(torch.ones(3, 3), k=1).to_dense()
        tensor([[1., 1., 1.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """

    name = "rank-k-upper"


class RankKLower(_RankK):
    """Lower triangular up to a ``k x k`` block: k dense first columns, and a diagonal.

    The transpose is stored as by `RankKUpper`.

    Example:
        >>> RankKLower.from_dense(torch.ones(3, 3), k=1).to_dense()
        tensor([[1., 0., 0.],
                [1., 1., 0.],
                [1., 0., 1.]])
    """

    name = "rank-k-lower"
    mirrored = True
