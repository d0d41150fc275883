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
            torch.add(part.scaled(self.scale), view, alpha=factor, out=view)
            part.add_rest_(view, self.scale)


class Part:
    """`TwoSided` for one matrix.

    Args:
        C: Its left side, :math:`S_C`.
        K: Its right side.
        G: The weight's gradient, ``[o, i]`` without the column of the bias.
        bias: The bias's gradient, ``[o, 1]``; None if it is not joined.

    Attributes:
        G: As above.
        bias: The preconditioned gradient of the bias, ``[o, 1]``; None without one.
    """

    def __init__(self, C: DiagonalPlus, K: DiagonalPlus, G: Tensor, bias: Tensor | None):
        n = G.shape[1]
        self.G, self.bias = G, None
        self.left, self.right = C.epsilon.unsqueeze(-1), K.epsilon[:n]
        self.C_cuts, self.K_cuts = C.cuts, K.cuts
        few, dense = K.meet_right(G, bias)  # G B^T, G R^T
        N, count = C.matmul(torch.cat([few, dense], dim=1)), few.shape[1]
        self.columns = N[:, count:]
        if bias is not None and n in K.ends:
            self.bias = self.columns[:, -1:]
        elif bias is not None:
            self.bias = C.matmul(bias * K.epsilon[n:] + few @ K.A[:, n:])
        few, dense = C.meet_left(G)  # B G, R G
        self.rows = dense * self.right
        self.low_rank = (C.A.mT, few * self.right), (N[:, :count], K.A[:, :n])

    def scaled(self, scale: float) -> Tensor:
        """Return ``scale D_C G D_K`` in new memory."""
        return (self.G * (self.left * scale)).mul_(self.right)

    def add_rest_(self, T: Tensor, scale: float) -> Tensor:
        """Add ``scale`` times all the other terms."""
        for pair in self.low_rank:  # joining them takes longer than a second pass over T
            T.addmm_(*pair, alpha=scale)
        n, (a, b) = T.shape[1], self.C_cuts
        if len(self.rows):
            T[:a].add_(self.rows[:a], alpha=scale)
            T[b:].add_(self.rows[a:], alpha=scale)
        if self.columns.shape[1]:
            a, b = self.K_cuts
            first = min(a, n)
            T[:, :first].add_(self.columns[:, :first], alpha=scale)
            if b < n:
                T[:, b:].add_(self.columns[:, a : a + n - b], alpha=scale)
        return T
