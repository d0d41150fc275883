r"""Hierarchical matrices, and triangular ones with few dense rows or columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from curvature.mirrored import MirroredMatrix
from curvature.structured import accumulator, add_product_, at_least, scaled_product, square_sum


class _Hierarchical(MirroredMatrix):
    r"""The matrix :math:`H = [[A, B_1, B_2], [0, \operatorname{diag}(\delta), 0], [0, D, E]]`.

    A is ``k1 x k1``, E is ``k2 x k2``. There is one tensor P, ``[k1 + k2 + 1, d]``: the dense rows
    :math:`W = [[A, B_1, B_2], [0, D, E]]` and :math:`(0, \delta, 0)`. What stands for no entry is zero,
    always: products rely on it, and arithmetic takes one operation for all.
    """

    @staticmethod
    @abstractmethod
    def _sizes(**options: int) -> tuple[int, int]:
        """Return k1 and k2."""

    @classmethod
    def _shapes(cls, dim: int, **options: int) -> tuple[tuple[int, ...], ...]:
        return ((sum(cls._sizes(**options)) + 1, dim),)

    def _check_tensors(self) -> None:
        super()._check_tensors()
        (P,), (a, b) = self.tensors, self._cuts
        beside = P[..., a:-1, :a], P[..., -1, :a], P[..., -1, b:]
        if not P.is_meta and any(t.any() for t in beside):
            raise ValueError(
                f"{type(self).__name__} of dimension {self.dim}, {self.options}: expected zeros left of "
                "the last dense rows, and at both ends of the diagonal; from_dense makes matrices of "
                "dense ones."
            )

    @property
    def _cuts(self) -> tuple[int, int]:
        """Where the second and the third block row begin."""
        k1, k2 = self._sizes(**self.options)
        return k1, self.dim - k2

    @property
    def dense_rows(self) -> Tensor:
        """The first and last rows of H, ``[*batch, k1 + k2, d]``; a view."""
        P = self.tensors[0]
        return P.narrow(-2, 0, P.shape[-2] - 1)

    @property
    def middle(self) -> Tensor:
        r"""The row :math:`(0, \delta, 0)`, ``[*batch, 1, d]``; a view."""
        P = self.tensors[0]
        return P.narrow(-2, P.shape[-2] - 1, 1)

    @property
    def _at(self) -> _Places:
        return _places(self.dim, self._cuts, self.dtype, self.device)

    def _trace(self) -> Tensor:
        diagonal = self.tensors[0].flatten(-2).index_select(-1, self._at.diagonal)
        return diagonal.sum(-1, dtype=accumulator(self.dtype))

    def _square_norm(self) -> Tensor:
        return square_sum(self.tensors[0], (-2, -1))

    def _add_identity(self, alpha: float) -> None:
        self.tensors[0].add_(self._at.identity, alpha=alpha)

    def _held(self) -> Tensor:
        W, (a, b) = self.dense_rows, self._cuts
        out = W.new_zeros(self.shape)
        out[..., :a, :], out[..., b:, :] = W[..., :a, :], W[..., a:, :]
        out.diagonal(dim1=-2, dim2=-1)[..., a:b] = self.tensors[0][..., -1, a:b]
        return out

    @classmethod
    def _hold(cls, M: Tensor, **options: int) -> Sequence[Tensor]:
        a, k2 = cls._sizes(**options)
        d, b = M.shape[-1], M.shape[-1] - k2
        P = M.new_zeros(*M.shape[:-2], a + k2 + 1, d)
        P[..., :a, :], P[..., a:-1, a:] = M[..., :a, :], M[..., b:, a:]
        P[..., -1, a:b] = M.diagonal(dim1=-2, dim2=-1)[..., a:b]
        return [P]

    def _held_matmul(self, X: Tensor, transpose: bool) -> Tensor:
        # one pass with zeros beside the diagonal also makes room for the other rows
        Y, W, (a, b) = self.middle.mT * X, self.dense_rows, self._cuts
        if transpose:
            return add_product_(Y, W.mT, _ends(X, -2, a, b))
        dense = W @ X
        Y[..., :a, :] = dense.narrow(-2, 0, a)
        if b < self.dim:
            Y[..., b:, :] = dense.narrow(-2, a, self.dim - b)
        return Y

    def _held_compose(self, other: _Hierarchical) -> _Hierarchical:
        W, V = self.dense_rows, other.dense_rows
        P = self.tensors[0] * other.middle
        add_product_(P.narrow(-2, 0, P.shape[-2] - 1), _ends(W, -1, *self._cuts), V)
        return self.like((P,))

    @classmethod
    def _project_gram(cls, S: Tensor, scale: float, **options: int) -> _Hierarchical:
        d = S.shape[-2]
        k1, k2 = cls._sizes(**options)
        rows = scaled_product(_ends(S, -2, k1, d - k2), S.mT, scale)
        squares = square_sum(S, -1).mul_(scale).to(S.dtype)
        return cls._of((torch.cat([rows, squares.unsqueeze(-2)], -2),), d, options)._double_unpaired()

    def _held_gram(self, outer: bool) -> _Hierarchical:
        """The same, with anything where there is no entry, which `_double_unpaired` clears."""
        (P,), W, (a, b) = self.tensors, self.dense_rows, self._cuts
        if outer:  # rows of H with rows of H
            out, ends = P * self.middle, W @ W.mT
            rows = out.narrow(-2, 0, W.shape[-2])
            rows[..., :a], rows[..., b:] = ends[..., :a], ends[..., a:]
            return self.like((out,))
        # columns with columns: those at the ends meet dense rows only
        squares = P.to(accumulator(P.dtype)).square().sum(-2, keepdim=True).to(P.dtype)
        return self.like((torch.cat([_ends(W, -1, a, b).mT @ W, squares], -2),))

    def _double_unpaired(self) -> _Hierarchical:
        """The same, and clear what stands for no entry."""
        self.tensors[0].mul_(self._at.counts)
        return self


def _ends(X: Tensor, axis: int, a: int, b: int) -> Tensor:
    """Return the first a entries of an axis, and those from b on."""
    d = X.shape[axis]
    first = X.narrow(axis, 0, a)
    return torch.cat([first, X.narrow(axis, b, d - b)], axis) if b < d else first


class _Places(NamedTuple):
    """What a tensor of `_Hierarchical` holds where.

    Attributes:
        diagonal: Where the entries on the diagonal are in the flat tensor, ``[d]``.
        identity: The tensor of the identity.
        counts: How many entries of a symmetric matrix a number stands for: none, itself, or two.
    """

    diagonal: Tensor
    identity: Tensor
    counts: Tensor


@lru_cache(maxsize=64)
def _places(dim: int, cuts: tuple[int, int], dtype: torch.dtype, device: torch.device) -> _Places:
    a, b = cuts
    k = a + dim - b
    with torch.inference_mode(False), torch.no_grad():
        columns = torch.arange(dim, device=device)
        rows = columns.clamp(max=k)
        rows[a:b], rows[b:] = k, columns[b:] - (b - a)
        diagonal = rows * dim + columns
        identity = torch.zeros((k + 1) * dim, dtype=dtype, device=device)
        identity[diagonal] = 1
        counts = torch.zeros(k + 1, dim, dtype=dtype, device=device)
        counts[:a, :a], counts[:a, a:] = 1, 2
        counts[a:-1, a:b], counts[a:-1, b:] = 2, 1
        counts[-1, a:b] = 1
        return _Places(diagonal, identity.view(k + 1, dim), counts)


class Hierarchical(_Hierarchical):
    """Matrices ``[[A, B1, B2], [0, diag, 0], [0, D, E]]``: dense first and last rows.

    Stored: (k1 + k2 + 1) d numbers, as ``[[A, B1, B2], [0, D, E], [0, diag, 0]]`` of shape
    ``[k1 + k2 + 1, d]``. Where k1 + k2 exceeds d, first k1 is limited to d and then k2 to d - k1.

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

    Stored: (k + 1) d numbers, the rows ``[k, d]`` and below them k zeros and the diagonal. k is limited
    to d.

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
