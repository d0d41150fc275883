r"""Linear combinations of a factor's columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvature import factor as factors
from curvature.factor import Factor


class Mixed(Factor):
    r"""A factor :math:`V R`, whose K columns are linear combinations of V's q.

    Args:
        factor: V ``[P, q]``.
        weights: R ``[q, K]``. It may have more digits than V: products with it are computed in the
            wider data type, and `to` leaves its data type alone.

    Raises:
        ValueError: If R has not one row per column of V.

    Example:
        >>> from curvature import DenseFactor
        >>> V = DenseFactor(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> Mixed(V, torch.tensor([[1.0], [2.0]])).explicit()[0]
        tensor([[5., 4.]])
    """

    __slots__ = ("factor", "weights")

    def __init__(self, factor: Factor, weights: Tensor):
        if weights.dim() != 2 or len(weights) != factor.columns:
            raise ValueError(
                f"{type(self).__name__}: the weights have shape {tuple(weights.shape)}; expected "
                f"[{factor.columns}, K], one row per column of the factor."
            )
        self.factor = factor
        self.weights = weights

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The parameters' shapes."""
        return self.factor.shapes

    @property
    def columns(self) -> int:
        """Number of columns K."""
        return self.weights.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the factor, and the weights."""
        return (*self.factor.tensors, self.weights)

    @property
    def dtype(self) -> torch.dtype:
        """The factor's data type: that of explicit columns."""
        return self.factor.dtype

    def _wide(self, t: Tensor) -> Tensor:
        return t.to(torch.promote_types(t.dtype, self.weights.dtype))

    def _own_gram(self) -> Tensor:
        return self.weights.mT @ self._wide(self.factor.gram()) @ self.weights

    def _gram_with(self, other: Factor) -> Tensor:
        products = self._wide(self.factor.gram(other))
        return self.weights.mT.to(products.dtype) @ products

    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Return ``V R c``; see `Factor.apply`."""
        if 0 in coefficients.shape:
            like = {"dtype": self.dtype, "device": self.device}
            return tuple(torch.zeros((len(coefficients), *s), **like) for s in self.shapes)
        mixed = coefficients.to(self.weights.dtype) @ self.weights.mT
        return self.factor.apply(mixed.to(self.dtype))

    def project(self, *vectors: Tensor) -> Tensor:
        """Return ``R^T V^T w``, in the weights' data type or above; see `Factor.project`."""
        if 0 in self.weights.shape or not len(vectors[0]):
            return self.weights.new_zeros(len(vectors[0]), self.columns)
        found = self._wide(self.factor.project(*vectors))
        return found @ self.weights.to(found.dtype)

    def square_sum(self) -> tuple[Tensor, ...]:
        r"""Return the diagonal of :math:`V R R^T V^T`, from some columns at a time."""
        return self.weighted_square_sum(self.weights.new_ones(self.columns))

    def weighted_square_sum(self, weights: Tensor) -> tuple[Tensor, ...]:
        r"""Return the diagonal of :math:`V R \operatorname{diag}(w) R^T V^T` for ``weights[K]``."""
        totals = [torch.zeros(s, dtype=self.dtype, device=self.device) for s in self.shapes]
        step = max(1, factors.CHUNK // max(1, self.dim))
        for part in torch.arange(self.columns, device=self.device).split(step):
            w = weights[part].to(self.dtype)
            for total, rows in zip(totals, self.select(part).explicit(), strict=True):
                total += torch.tensordot(w, rows.square(), dims=1)
        return tuple(totals)

    def select(self, index: Tensor) -> Factor:
        """Return the factor of some columns."""
        return Mixed(self.factor, self.weights[:, index])

    def scaled(self, scale: float) -> Factor:
        """Return a multiple of the factor."""
        return Mixed(self.factor, self.weights * scale)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factor:
        """Return the factor on another device, V in another data type."""
        return type(self)(self.factor.to(device, dtype), self.weights.to(device=device))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """Return a factor with other tensors; see `Factor.mapped`."""
        return type(self)(self.factor.mapped(function), function(self.weights))


def rebuilt(factor: Factor | None, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Factor | None:
    """Return a factor of the same form with ``others`` in the places of ``tensors``."""
    places = {id(t): new for t, new in zip(tensors, others, strict=True)}
    return None if factor is None else factor.mapped(lambda t: places.get(id(t), t))
