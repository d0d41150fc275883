r"""Functions of low-rank matrices: a multiple of the identity plus a matrix of low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.block import Block, Parts, damped, raised
from curvature.decomposition import check_finite
from curvature.eigenpairs import Eigenvectors
from curvature.factor import DenseFactor, Stacked
from curvature.mixed import rebuilt
from curvature.vectors import as_rows, from_rows


class Shifted(Block):
    r"""A matrix :math:`s (I - E E^T) + E \operatorname{diag}(w) E^T` with orthonormal E.

    Its eigenvalues are w along E's K columns and s everywhere else. Functions of `LowRank` matrices with
    damping have this form, and functions of those again.

    Products are of relative accuracy eps times the largest ratio of eigenvalues, s included: both parts
    of a vector come from a difference.

    Args:
        vectors: E ``[P, K]``.
        values: w ``[K]``.
        shift: s; of no meaning, and taken as 0, if K = P.

    Raises:
        ValueError: If there is not one value per eigenvector.

    Example:
        >>> from curvature import DenseFactor, LowRank
        >>> M = LowRank(DenseFactor(torch.tensor([[3.0, 0.0]]))).inverse(damping=1.0)
        >>> M.to_dense()
        tensor([[0.1000, 0.0000],
                [0.0000, 1.0000]])
        >>> M.inverse().eigenvalues()
        tensor([ 1., 10.], dtype=torch.float64)
    """

    __slots__ = ("shift", "values", "vectors")

    def __init__(self, vectors: Eigenvectors, values: Tensor, shift: float):
        if values.shape != (vectors.columns,):
            raise ValueError(
                f"Shifted: values of shape {tuple(values.shape)}; expected [{vectors.columns}], one per "
                "eigenvector."
            )
        self.vectors, self.values = vectors, values
        self.shift = float(shift) if vectors.columns < vectors.dim else 0.0

    def __repr__(self) -> str:
        return f"Shifted(K={len(self.values)}, shift={self.shift:.3g}, P={self.dim})"

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the parameters."""
        return self.vectors.shapes

    @property
    def dtype(self) -> torch.dtype:
        """Data type of products with E."""
        return self.vectors.dtype

    @property
    def factors(self) -> dict[str, Tensor]:
        """The eigenvalues w, and the tensors that define E."""
        return {"values": self.values, **{f"E{k}": t for k, t in enumerate(self.vectors.tensors)}}

    def replaced(self, **factors: Tensor) -> Shifted:
        """Return the same with other tensors."""
        every = {**self.factors, **factors}
        values, *others = every.values()
        return Shifted(rebuilt(self.vectors, self.vectors.tensors, others), values, self.shift)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Shifted:
        """Return the matrix on another device, E's products in another data type."""
        return Shifted(self.vectors.to(device, dtype), self.values.to(device=device), self.shift)

    def matvec(self, *vectors: Tensor) -> Parts:
        """Multiply with one tensor ``[..., *shape]`` per parameter."""
        rows, layout = as_rows(self, "Shifted.matvec", vectors)
        E = self.vectors if rows[0].dtype == self.dtype else self.vectors.to(dtype=rows[0].dtype)
        along = E.apply((self.values - self.shift) * E.project(*rows))
        return from_rows([self.shift * w + a for w, a in zip(rows, along, strict=True)], layout)

    @property
    def _rest(self) -> int:
        return self.dim - len(self.values)

    def _distinct(self) -> Tensor:
        """Return w, and s once if it is an eigenvalue."""
        check_finite("Shifted: the eigenvalues", self.values)
        return torch.cat([self.values, self.values.new_full((min(1, self._rest),), self.shift)])

    def spectrum(self) -> Tensor:
        """Return all eigenvalues ``[P]``, in any order."""
        check_finite("Shifted: the eigenvalues", self.values)
        return torch.cat([self.values, self.values.new_full((self._rest,), self.shift)])

    def power(self, exponent: float, damping: float = 0.0) -> Shifted:
        r"""Return :math:`(M + \delta I)^{e}`, with the same eigenvectors; see `Block.power`."""
        found = raised("Shifted.power", self._distinct(), exponent, damping)
        K = len(self.values)
        return Shifted(self.vectors, found[:K], float(found[K]) if self._rest else 0.0)

    def logdet(self, damping: float = 0.0) -> Tensor:
        r"""Return :math:`\log\det(M + \delta I)`; see `Block.logdet`."""
        logs = damped("Shifted.logdet", self._distinct(), damping, positive=True).log()
        K = len(self.values)
        return logs[:K].sum() + self._rest * logs[K:].sum()

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""
        return self.values.sum() + self._rest * self.shift

    def norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return (self.values.square().sum() + self._rest * self.shift**2).sqrt()

    def diagonal(self) -> Parts:
        """Return the diagonal, shaped like the parameter(s); E is formed in parts."""
        found = [self.shift + t for t in self.vectors.weighted_square_sum(self.values - self.shift)]
        return found[0] if len(found) == 1 else tuple(found)

    def __add__(self, other: Shifted) -> Shifted:
        """Add matrices with the same eigenvectors.

        Raises:
            ValueError: If the eigenvectors are others: then the sum is not of this form.
        """
        if not isinstance(other, Shifted):
            return NotImplemented
        pairs = (self.vectors.tensors, other.vectors.tensors)
        same = self.shapes == other.shapes and len(pairs[0]) == len(pairs[1])
        if not same or not all(a is b or torch.equal(a, b) for a, b in zip(*pairs, strict=True)):
            raise ValueError(
                "Shifted: a sum needs equal eigenvectors. Add the low-rank matrices before taking a "
                "power or an inverse."
            )
        return Shifted(self.vectors, self.values + other.values, self.shift + other.shift)

    def scaled(self, scale: float | Tensor) -> Shifted:
        """Return a multiple of the matrix."""
        return Shifted(self.vectors, self.values * scale, self.shift * float(scale))

    def numerators(self) -> list[Tensor]:
        """Raise: functions of matrices do not add up over processes.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Shifted.all_reduce: a function of a matrix is not a sum over processes, nor are the "
            "eigenvectors the same on each."
        )

    def state_dict(self) -> dict:
        """Return tensors, numbers and strings that `from_state_dict` makes a block of."""
        columns = [t.detach().clone() for t in self.vectors.explicit()]
        values = self.values.detach().clone()
        return {"kind": "Shifted", "vectors": columns, "values": values, "shift": self.shift}

    @classmethod
    def from_state_dict(cls, state: dict) -> Shifted:
        """Make a block of what `state_dict` returned."""
        values = state["values"]
        columns = Stacked([DenseFactor(t) for t in state["vectors"]])
        eye = torch.eye(len(values), dtype=values.dtype, device=values.device)
        return cls(Eigenvectors(columns, eye), values, state["shift"])
