r"""Directions of steps that are not formed yet: each is added where it is needed, in few passes.

Index letters: g matrices of one layer, r rows, o outputs, i inputs, with the column of a joined bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from curvature import Axes
from curvature.outer import DiagonalPlus


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
        M = self.axes.to_matrix(V)
        if V.dtype != self.dtype or V.device != self.device or M.data_ptr() != V.data_ptr():
            return False
        self._add_to(M, factor)
        return True

    @abstractmethod
    def _add_to(self, M: Tensor, factor: float) -> None:
        """The same for a view ``[g,o,i]`` of V."""


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

    def _add_to(self, M: Tensor, factor: float) -> None:
        for view, b, a in zip(M, self.b, self.a, strict=True):
            view.addmm_(b.mT, a, beta=factor, alpha=self.scale)


class TwoSided(Direction):
    r"""The preconditioned gradient of a weight, :math:`N = S_C\, G\, S_K`, without that of the bias.

    Both sides are a diagonal plus products with few vectors, :math:`S = D + A^T B + E^T R`, see
    `DiagonalPlus`. With the two products of these vectors with G that are as large as it, which are
    taken at once, N is a scaled gradient plus two products of low rank, and a border:

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
        matrices = [part.add_rest_(part.scaled(self.scale), self.scale) for part in self.parts]
        N = matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)
        return self.axes.to_parameter(N)

    def _add_to(self, M: Tensor, factor: float) -> None:
        for view, part in zip(M, self.parts, strict=True):
            # few passes over large matrices, and one in new memory
            view.mul_(factor).addcmul_(part.G * part.sides.left, part.sides.right, value=self.scale)
            part.add_rest_(view, self.scale)


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
        self.ranks = C.A.shape[-2], K.A.shape[-2]
        self.rest = K.epsilon[n:], K.A[:, n:].mT  # what a bias meets
        (a, b), first = K.cuts, min(K.cuts[0], n)
        self.joins_bias = n < a or b <= n  # is the last of K's ends
        # columns of gradients that are K's ends, and where these begin among the ends
        self.borders = [(0, first, 0)] * (first > 0) + [(b, n, a)] * (b < n)


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
        (rank, count), self.bias = sides.ranks, None
        self.sides, self.G = sides, G
        # few vectors are rows throughout: products with few columns take longer on CPU
        X = sides.K.meet_right(G, bias)  # B G^T above R G^T
        if bias is not None and not sides.joins_bias:
            epsilon, A = sides.rest
            X = torch.cat([X, torch.addmm(bias.mT * epsilon, A, X[:count])])
        N = sides.C.rmatmul(X)
        if bias is not None:
            self.bias = N[-1:].mT
        few = sides.C.meet_left(G).mul_(sides.right)  # B G D above R G D
        self.rows, self.columns = few[rank:], N[count:].mT
        self.low_rank = (sides.A_left, few[:rank]), (N[:count].mT, sides.A_right)

    def scaled(self, scale: float) -> Tensor:
        """Return ``scale D_C G D_K`` in new memory."""
        return (self.G * (self.sides.left * scale)).mul_(self.sides.right)

    def add_rest_(self, T: Tensor, scale: float) -> Tensor:
        """Add ``scale`` times all the other terms."""
        for pair in self.low_rank:  # joining them takes longer than a second pass over T
            T.addmm_(*pair, alpha=scale)
        if self.rows.shape[0]:
            a, b = self.sides.C.cuts
            T[:a].add_(self.rows[:a], alpha=scale)
            T[b:].add_(self.rows[a:], alpha=scale)
        for start, end, place in self.sides.borders:
            T[:, start:end].add_(self.columns[:, place : place + end - start], alpha=scale)
        return T
