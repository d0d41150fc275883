r"""Directions of steps that are not formed yet: each is added where it is needed, in few passes.

Index letters: g matrices of one layer, r rows, o outputs, i inputs, with the column of a joined bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvature import Axes
from curvature.outer import DiagonalPlus

# Few columns are filled up with zeros to multiples of this: products on CPU take longer with 30 columns
# than with 32 (512 x 784 by 784 x 30: 250 and 150 us).
LANES = 16


class Direction(ABC):
    """A direction N of one parameter.

    Args:
        axes: How the parameter's axes form ``[g,o,i]``.
        dtype: The data type that N is computed in.
        device: Where.

    Attributes:
        scale: A factor of N that can be changed.
    """

    def __init__(self, axes: Axes, dtype: torch.dtype, device: torch.device, scale: float = 1.0):
        self.axes, self.dtype, self.device, self.scale = axes, dtype, device, scale

    def neg_(self) -> Direction:
        """Change the sign, in place."""
        self.scale = -self.scale
        return self

    @abstractmethod
    def tensor(self) -> Tensor:
        """Return N in new memory, shaped like the parameter."""

    def add_to_(self, V: Tensor, factor: float) -> bool:
        r"""Change V, shaped like the parameter, to :math:`\text{factor}\, V + N`.

        Returns:
            Whether its memory is laid out for that. If not, nothing has changed.
        """
        views = self.axes.matrices(V)
        if V.dtype != self.dtype or V.device != self.device or views[0].data_ptr() != V.data_ptr():
            return False
        self._add_to(views, factor)
        return True

    @abstractmethod
    def _add_to(self, views: Sequence[Tensor], factor: float) -> None:
        """The same for views ``[o,i]`` of V, group by group."""


class Product(Direction):
    r"""The product of a layer's rows, :math:`N = s\, b^T a`.

    Args:
        b: ``[g,r,o]``.
        a: ``[g,r,i]``.
        scale: The factor s.
        axes: How the parameter's axes form ``[g,o,i]``.
    """

    def __init__(self, b: Tensor, a: Tensor, scale: float, axes: Axes):
        super().__init__(axes, b.dtype, b.device, scale)
        self.b, self.a = b, a

    def tensor(self) -> Tensor:
        """Return N in new memory, shaped like the parameter."""
        b = self.b if self.scale == 1 else self.b * self.scale
        # for a single matrix a plain product is faster than a batched one
        N = (b[0].mT @ self.a[0]).unsqueeze(0) if len(b) == 1 else b.mT @ self.a
        return self.axes.to_parameter(N)

    def _add_to(self, views: Sequence[Tensor], factor: float) -> None:
        for view, b, a in zip(views, self.b, self.a, strict=True):
            view.addmm_(b.mT, a, beta=factor, alpha=self.scale)


class TwoSided(Direction):
    r"""The preconditioned gradient of a weight, :math:`N = S_C\, G\, S_K`, without that of the bias.

    Both sides are a diagonal plus products with few vectors, :math:`S = D + A^T B + E^T R`, see
    `DiagonalPlus`. With the two products of these vectors with G that are as large as it, N is a scaled
    gradient plus two products of low rank, and rows and columns that are written over it:

    .. math::
        N = D_C G D_K + A_C^T (B_C G D_K) + (S_C G B_K^T) A_K + E_C^T (R_C G D_K) + (S_C G R_K^T) E_K

    Args:
        parts: One for each matrix of the layer.
        axes: The weight's axes.
    """

    def __init__(self, parts: Sequence[Part], axes: Axes):
        G = parts[0].G
        super().__init__(axes, G.dtype, G.device)
        self.parts = parts

    def tensor(self) -> Tensor:
        """Return N in new memory, shaped like the parameter."""
        matrices = []
        for part in self.parts:
            T, low_rank = part.terms()
            for pair in low_rank:
                T.addmm_(*pair)
            matrices.append(T if self.scale == 1 else T.mul_(self.scale))
        N = matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)
        return self.axes.to_parameter(N)

    def _add_to(self, views: Sequence[Tensor], factor: float) -> None:
        for view, part in zip(views, self.parts, strict=True):
            T, low_rank = part.terms()
            if self.scale == 1:
                torch.add(T, view, alpha=factor, out=view)  # one pass instead of two
            else:
                view.mul_(factor).add_(T, alpha=self.scale)
            for pair in low_rank:  # joining them takes longer than a second pass over the matrix
                view.addmm_(*pair, alpha=self.scale)


class Sides:
    """Both sides of `TwoSided` for one matrix, and what is cut of them, once for as long as they stay.

    Args:
        C: The left side, :math:`S_C`.
        K: The right side, :math:`S_K`.
        n: Number of columns of gradients, without that of a bias.
    """

    def __init__(self, C: DiagonalPlus, K: DiagonalPlus, n: int):
        self.C, self.K = C, K
        self.left, self.right = C.epsilon.unsqueeze(-1), K.epsilon[:n]
        self.A_left, self.A_right = C.A.mT, K.A[:, :n]
        self.rank = K.A.shape[-2]
        # the rows of S_C that are not in the other terms
        self.ends = _ends(C.dim, C.cuts, self.left.device)

        # few vectors that meet gradients: B, unless that only selects, and R
        rows = K.R if K.B is None else K.B
        size = rows.shape[-2]
        self.meets = pad(rows[:, :n], (0, 0, 0, -size % LANES)).mT
        width = self.meets.shape[1]
        self.last = pad(rows[:, n:].mT, (0, width - size)) if n < K.dim else None
        # columns of gradients that E selects, and which of R's rows these are
        (a, b), first = K.cuts, min(K.cuts[0], n)
        self.borders = [(0, first, 0)] * (first > 0) + [(b, n, a)] * (b < n)
        count = sum(end - start for start, end, _ in self.borders)
        joined = n < a or b <= n  # the bias's column is one of them
        self.extra = None if joined or n == K.dim else (K.epsilon[n:], K.A[:, n:])
        self.bias_at = width + count if self.extra is not None else size - 1
        start = width if K.B is None else 0
        self.low_rank = slice(start, start + self.rank)
        total = width + count + (n < K.dim)
        self.filling = C.epsilon.new_zeros(C.dim, -total % LANES)


@lru_cache(maxsize=256)
def _ends(dim: int, cuts: tuple[int, int], device: torch.device) -> Tensor:
    """Return which entries E selects."""
    return torch.tensor([*range(cuts[0]), *range(cuts[1], dim)], dtype=torch.long, device=device)


class Part:
    """`TwoSided` for one matrix.

    Args:
        sides: Both sides.
        G: The weight's gradient, ``[o, i]`` without the column of the bias.
        bias: The bias's gradient, ``[o, 1]``; None if it is not joined.

    Attributes:
        G: As above.
        bias: The preconditioned gradient of the bias, ``[o, 1]``; None without one.
    """

    def __init__(self, sides: Sides, G: Tensor, bias: Tensor | None):
        self.sides, self.G, self.bias = sides, G, None
        X = G @ sides.meets
        columns = [X, *(G[:, start:end] for start, end, _ in sides.borders)]
        if bias is not None:
            X.addmm_(bias, sides.last)
            if sides.extra is not None:
                epsilon, A = sides.extra
                met = G if sides.K.B is None else X
                bias = torch.addmm(bias * epsilon, met[:, : sides.rank], A)
            columns.append(bias)
        N = self._times_left(torch.cat([*columns, sides.filling], 1))
        if bias is not None:
            self.bias = N[:, sides.bias_at : sides.bias_at + 1]
        self.columns = N

    def _times_left(self, X: Tensor) -> Tensor:
        """Return ``S_C X``."""
        sides, C = self.sides, self.sides.C
        N = X * sides.left
        N.addmm_(sides.A_left, self._met(X))
        return N if C.R is None else N.index_copy_(0, sides.ends, C.R @ X)

    def _met(self, X: Tensor) -> Tensor:
        """Return ``B_C X``."""
        B = self.sides.C.B
        return X.index_select(0, self.sides.ends) if B is None else B @ X

    def terms(self) -> tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]:
        """Return N in new memory without its terms of low rank, and these as pairs of factors."""
        sides, G, N = self.sides, self.G, self.columns
        few = self._met(G).mul_(sides.right)
        # of G itself: reading what passes over whole matrices have just written takes longer
        rows = None if sides.C.R is None else (sides.C.R @ G).mul_(sides.right)
        T = (G * sides.left).mul_(sides.right)
        if rows is not None:
            T.index_copy_(0, sides.ends, rows)
        for start, end, place in sides.borders:
            T[:, start:end].copy_(N[:, place : place + end - start])
        return T, ((sides.A_left, few), (N[:, sides.low_rank], sides.A_right))
