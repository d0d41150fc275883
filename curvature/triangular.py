r"""Triangular matrices, lower and upper, without room for the zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.mirrored import EntrywiseMatrix, MirroredMatrix
from curvature.structured import add_product_, leading_axes, scaled_product, square_sum

# Dense triangles up to this size are multiplied as if they were full; larger ones are halved, which
# saves half of their products. On a CPU core 64 and 128 are equally good for d = 256 to 2048, with
# 256 a product of two triangles takes 1.1 to 1.4 times as long. Not measured on GPUs.
LEAF = 128


class _Triangular(MirroredMatrix, EntrywiseMatrix):
    r"""A lower triangle :math:`H = [[L_1, 0], [N, L_2]]` in exactly d (d + 1) / 2 numbers.

    :math:`L_1` has ``p = ceil(d / 2)`` rows, :math:`L_2` has ``q = floor(d / 2)``. One tensor
    ``F[2 q + 1, p]`` holds :math:`L_1^T` on and above its diagonal, :math:`L_2` below that, and N
    in its last q rows. So the three are views that products read, and add to, in place (the idea
    of LAPACK's rectangular full packed format).
    """

    @classmethod
    def _shapes(cls, dim: int, **options: int) -> tuple[tuple[int, ...], ...]:
        q = dim // 2
        return ((2 * q + 1, dim - q),)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of L1, L2 and N. What is above the diagonals of L1 and L2 is not theirs."""
        (F,) = self.tensors
        p, q = F.shape[-1], self.dim // 2
        return F[..., :p, :].mT, F[..., 1 : q + 1, :q], F[..., q + 1 :, :]

    def _diagonal(self) -> tuple[Tensor, ...]:
        L1, L2, _ = self._parts()
        return L1.diagonal(dim1=-2, dim2=-1), L2.diagonal(dim1=-2, dim2=-1)

    def _held(self) -> Tensor:
        L1, L2, N = self._parts()
        p = L1.shape[-1]
        out = N.new_empty(self.shape)
        out[..., :p, :p], out[..., p:, :p], out[..., p:, p:] = L1, N, L2
        return out.tril_()

    @classmethod
    def _hold(cls, M: Tensor, **options: int) -> Sequence[Tensor]:
        q = M.shape[-1] // 2
        p = M.shape[-1] - q
        F = M.new_zeros(*M.shape[:-2], 2 * q + 1, p)
        F[..., :p, :] = M[..., :p, :p].tril().mT
        F[..., 1 : q + 1, :q] += M[..., p:, p:].tril()
        F[..., q + 1 :, :] = M[..., p:, :p]
        return [F]

    def _held_matmul(self, X: Tensor, transpose: bool) -> Tensor:
        lead = leading_axes(self.tensors[0], X)
        # with the strides of X, so that X A comes out like X as well
        Y = torch.zeros_like(X) if lead == X.shape[:-2] else X.new_zeros(*lead, *X.shape[-2:])
        _add_halves_times(Y, self._parts(), X, transpose)
        return Y

    def _held_compose(self, other: _Triangular) -> _Triangular:
        lead = leading_axes(self.tensors[0], other.tensors[0])
        AB = self._zeros(lead)
        _add_halves_product(AB._parts(), self._parts(), other._parts())
        return AB

    def _held_gram(self, outer: bool) -> _Triangular:
        G = self._zeros(self.batch_shape)
        _add_halves_gram(G._parts(), self._parts(), outer)
        return G

    @classmethod
    def _project_gram(cls, S: Tensor, scale: float, **options: int) -> _Triangular:
        d = S.shape[-2]
        (shape,) = cls._shapes(d)
        H = cls._of([S.new_zeros(*S.shape[:-2], *shape)], d, options)
        G1, G2, N = H._parts()
        p = d - d // 2
        S1, S2 = S[..., :p, :], S[..., p:, :]
        # everything twice but the diagonal, which costs next to nothing
        _add_lower_gram(G1, S1, 2 * scale)
        _add_lower_gram(G2, S2, 2 * scale)
        add_product_(N, S2, S1.mT, 2 * scale)
        squares = square_sum(S, -1).mul_(scale)
        for v, s in zip(H._diagonal(), (squares[..., :p], squares[..., p:]), strict=True):
            v.copy_(s)
        return H

    def _double_unpaired(self) -> _Triangular:
        kept = [v.clone() for v in self._diagonal()]  # halving again could meet an overflow
        self.mul_(2)
        for v, k in zip(self._diagonal(), kept, strict=True):
            v.copy_(k)
        return self

    def _zeros(self, batch_shape: Sequence[int]) -> _Triangular:
        (F,) = self.tensors
        return self.like([F.new_zeros(*batch_shape, *F.shape[-2:])])


class LowerTriangular(_Triangular):
    """Lower triangular matrices.

    Stored: d (d + 1) / 2 numbers, as one tensor ``[2 floor(d / 2) + 1, ceil(d / 2)]``. Products cost
    about half of the dense ones for large d.

    Example:
        >>> M = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> LowerTriangular.project(M).to_dense()
        tensor([[2., 0.],
                [2., 2.]])
    """

    name = "lower-triangular"


class UpperTriangular(_Triangular):
    """Upper triangular matrices; the transpose is stored as by `LowerTriangular`.

    Example:
        >>> M = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> UpperTriangular.project(M).to_dense()
        tensor([[2., 2.],
                [0., 2.]])
    """

    name = "upper-triangular"
    mirrored = True


# ---------------------------------------------------------------------- sums of products of triangles
#
# A, B, L and sums C, G are lower triangles in a square array: nothing above their diagonals is read
# or written, since another triangle may live there. Halves are triples (first, second, block below
# the first). All add to a given view, so that no level of the recursion copies results.

_Halves = tuple[Tensor, Tensor, Tensor]


def _halves(L: Tensor) -> _Halves:
    h = L.shape[-1] // 2
    return L[..., :h, :h], L[..., h:, h:], L[..., h:, :h]


def _add_times(Y: Tensor, L: Tensor, X: Tensor, transpose: bool) -> None:
    """``Y += L X``, or ``L^T X``."""
    if L.shape[-1] <= LEAF:
        L = L.tril()
        add_product_(Y, L.mT if transpose else L, X)
    else:
        _add_halves_times(Y, _halves(L), X, transpose)


def _add_halves_times(Y: Tensor, L: _Halves, X: Tensor, transpose: bool) -> None:
    L1, L2, N = L
    h = N.shape[-1]
    X1, X2, Y1, Y2 = X[..., :h, :], X[..., h:, :], Y[..., :h, :], Y[..., h:, :]
    _add_times(Y1, L1, X1, transpose)
    _add_times(Y2, L2, X2, transpose)
    if transpose:
        add_product_(Y1, N.mT, X2)
    else:
        add_product_(Y2, N, X1)


def _add_product(C: Tensor, A: Tensor, B: Tensor) -> None:
    """``C += A B``."""
    if A.shape[-1] <= LEAF:
        C.add_(A.tril() @ B.tril())
    else:
        _add_halves_product(_halves(C), _halves(A), _halves(B))


def _add_halves_product(C: _Halves, A: _Halves, B: _Halves) -> None:
    (C1, C2, CN), (A1, A2, AN), (B1, B2, BN) = C, A, B
    _add_product(C1, A1, B1)
    _add_product(C2, A2, B2)
    _add_times(CN.mT, B1, AN.mT, transpose=True)
    _add_times(CN, A2, BN, transpose=False)


def _add_gram(G: Tensor, L: Tensor, outer: bool) -> None:
    """``G += L^T L``, or ``L L^T`` for ``outer``."""
    if L.shape[-1] <= LEAF:
        L = L.tril()
        G.add_((L @ L.mT if outer else L.mT @ L).tril_())
    else:
        _add_halves_gram(_halves(G), _halves(L), outer)


def _add_halves_gram(G: _Halves, L: _Halves, outer: bool) -> None:
    (G1, G2, GN), (L1, L2, LN) = G, L
    _add_gram(G1, L1, outer)
    _add_gram(G2, L2, outer)
    if outer:
        _add_lower_gram(G2, LN)
        _add_times(GN.mT, L1, LN.mT, transpose=False)
    else:
        _add_lower_gram(G1, LN.mT)
        _add_times(GN, L2, LN, transpose=True)


def _add_lower_gram(G: Tensor, S: Tensor, scale: float = 1.0) -> None:
    """``G += scale S S^T``."""
    n = S.shape[-2]
    if n <= LEAF:
        G.add_(scaled_product(S, S.mT, scale).tril_())
        return
    G1, G2, GN = _halves(G)
    S1, S2 = S[..., : n // 2, :], S[..., n // 2 :, :]
    _add_lower_gram(G1, S1, scale)
    _add_lower_gram(G2, S2, scale)
    add_product_(GN, S2, S1.mT, scale)
