r"""Matrices that are diagonal in a Kronecker-factored eigenbasis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature.axes import MATRIX, Axes
from curvature.block import Parts, raised
from curvature.decomposition import check_finite
from curvature.matrix_block import MatrixBlock, layout_of, same_layout


@dataclass(eq=False, slots=True)
class KroneckerEigen(MatrixBlock):
    r"""A matrix :math:`(Q_B \otimes Q_A) \operatorname{diag}(s) (Q_B \otimes Q_A)^T`.

    Three things have this form: the eigendecomposition of a Kronecker product
    (:math:`s = \lambda_B \otimes \lambda_A`), every function of it, damping included, and its
    eigenvalue correction (EKFAC), whose s are second moments of per-sample gradients projected into
    the basis.

    Args:
        Q_B: Orthonormal columns ``[o, o]`` (``[g, o, o]`` with groups); None for the identity.
        Q_A: Orthonormal columns ``[i, i]`` (``[g, i, i]``); None for the identity.
        values: Eigenvalues s, ``[g, o, i]``.
        axes: Map from the parameter's axes to ``[g, o, i]``.
        groups: Number of groups.
        joint: Whether the last input feature is the constant 1 that belongs to the bias.

    References:
        George et al. (2018), Fast approximate natural gradient descent in a Kronecker-factored
        eigenbasis (EKFAC).

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> M = KroneckerEigen(None, None, torch.tensor([[[1.0, 3.0]]]))
        >>> M.inverse(damping=1.0).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
        >>> M.logdet(damping=1.0).exp()
        tensor(8.)
    """

    Q_B: Tensor | None
    Q_A: Tensor | None
    values: Tensor
    axes: Axes = MATRIX
    groups: int = 1
    joint: bool = False

    def __post_init__(self):
        if self.values.dim() != 3 or self.values.shape[0] != self.groups:
            raise ValueError(
                f"KroneckerEigen: values have shape {tuple(self.values.shape)}; expected "
                f"[{self.groups}, o, i]: groups, output and input features."
            )
        lead = (self.groups,) if self.groups > 1 else ()
        for name, basis, d in (("Q_B", self.Q_B, 1), ("Q_A", self.Q_A, 2)):
            wanted = (*lead, self.values.shape[d], self.values.shape[d])
            if basis is not None and basis.shape != wanted:
                raise ValueError(
                    f"KroneckerEigen: {name} has shape {tuple(basis.shape)}; expected {wanted} for "
                    f"values of shape {tuple(self.values.shape)}, or None for the identity."
                )

    def __repr__(self) -> str:
        kind = ", joint" if self.joint else ""
        return f"KroneckerEigen(values={tuple(self.values.shape)}{kind})"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Sizes g, o and i of the matrices; i counts the bias column."""
        return tuple(self.values.shape)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The eigenvalues, and the bases that are not the identity."""
        every = {"values": self.values, "Q_B": self.Q_B, "Q_A": self.Q_A}
        return {name: t for name, t in every.items() if t is not None}

    def replaced(self, **factors: Tensor) -> KroneckerEigen:
        """Return the same with other tensors."""
        return replace(self, **factors)

    def project(self, V: Tensor) -> Tensor:
        """Return ``Q_B^T V Q_A`` of matrices ``V[..., g, o, i]``."""
        if self.Q_B is not None:
            V = self.Q_B.mT @ V
        return V if self.Q_A is None else V @ self.Q_A

    def unproject(self, V: Tensor) -> Tensor:
        """Return ``Q_B V Q_A^T`` of matrices ``V[..., g, o, i]``."""
        if self.Q_B is not None:
            V = self.Q_B @ V
        return V if self.Q_A is None else V @ self.Q_A.mT

    def apply(self, V: Tensor) -> Tensor:
        """Multiply the block with matrices ``V[..., g, o, i]``."""
        own = self.to(dtype=V.dtype)
        return own.unproject(own.values * own.project(V))

    def group(self, k: int) -> KroneckerEigen:
        """Return the part of one group, with the matrix form's own axes."""
        bases = [None if Q is None or self.groups == 1 else Q[k] for Q in (self.Q_B, self.Q_A)]
        if self.groups == 1:
            bases = [self.Q_B, self.Q_A]
        return KroneckerEigen(*bases, self.values[k : k + 1], MATRIX, 1, self.joint)

    @classmethod
    def of_groups(cls, blocks: Sequence[KroneckerEigen], axes: Axes) -> KroneckerEigen:
        """Join the blocks of a parameter's groups, as `Kronecker.of_groups` does.

        Raises:
            ValueError: If they differ in shape, or in which bases are the identity.
        """
        first = blocks[0]
        kinds = {(M.sizes, M.Q_B is None, M.Q_A is None, M.joint, M.groups) for M in blocks}
        if len(kinds) != 1 or first.groups != 1:
            raise ValueError(f"KroneckerEigen.of_groups: expected blocks of one shape, got {blocks}.")
        if len(blocks) == 1:
            return replace(first, axes=axes)
        bases = [
            None if getattr(first, name) is None else torch.stack([getattr(M, name) for M in blocks])
            for name in ("Q_B", "Q_A")
        ]
        values = torch.cat([M.values for M in blocks])
        return cls(*bases, values, axes, len(blocks), first.joint)

    def corrected(self, values: Tensor) -> KroneckerEigen:
        """Return the matrix with the same eigenbasis and other eigenvalues ``[g, o, i]``."""
        return replace(self, values=values)

    def spectrum(self) -> Tensor:
        """Return all eigenvalues ``[p]``, in any order."""
        check_finite("KroneckerEigen: the eigenvalues", self.values)
        return self.values.flatten()

    def power(self, exponent: float, damping: float = 0.0) -> KroneckerEigen:
        r"""Return :math:`(M + \delta I)^{e}`, in the same eigenbasis.

        Args:
            exponent: e, any number.
            damping: The number added to all eigenvalues.

        Raises:
            ValueError: If an eigenvalue is negative or not finite; if the damping is negative; if
                ``exponent`` is negative and the damped matrix is singular.
        """
        return replace(self, values=raised("KroneckerEigen.power", self.values, exponent, damping))

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""
        return self.values.sum()

    def norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return torch.linalg.vector_norm(self.values)

    def diagonal(self) -> Parts:
        """Return the diagonal, shaped like the parameter(s)."""
        own = self.to(dtype=self.dtype)
        squares = {k: t.square() for k, t in own.factors.items() if k != "values"}
        return self.to_parameters(replace(own, **squares).unproject(own.values))

    def __add__(self, other: KroneckerEigen) -> KroneckerEigen:
        """Accumulate eigenvalues in one basis.

        Raises:
            ValueError: If the bases differ: then the sum is not of this form.
        """
        if not isinstance(other, KroneckerEigen):
            return NotImplemented
        same = same_layout(self, other) and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in ((self.Q_B, other.Q_B), (self.Q_A, other.Q_A))
        )
        if not same:
            raise ValueError(
                "KroneckerEigen: a sum needs equal eigenbases and layouts. Accumulate eigenvalues in "
                "one basis (EKFAC's argument `basis`), or add the Kronecker products before eigh()."
            )
        return replace(self, values=self.values + other.values)

    def scaled(self, scale: float | Tensor) -> KroneckerEigen:
        """Return a multiple of the matrix."""
        return replace(self, values=self.values * scale)

    def numerators(self) -> list[Tensor]:
        """Return the eigenvalues, and what tells whether all processes have the same basis."""
        bases = [t.double().flatten() for k, t in self.factors.items() if k != "values"]
        marks = [t @ torch.arange(1.0, len(t) + 1).to(t).sin() for t in bases]
        marks = torch.stack([self.values.new_ones((), dtype=torch.float64), *marks])
        return [self.values, marks, marks.square()]

    def from_numerators(self, summed: list[Tensor], scale: float) -> KroneckerEigen:
        """Return the matrix with the accumulated eigenvalues.

        Raises:
            ValueError: If the processes' bases differ.
        """
        values, marks, squares = summed
        # equal numbers x have (sum x)^2 = n sum x^2; here n is the first entry
        if not torch.allclose(marks.square(), squares[0] * squares, rtol=1e-8, atol=1e-12):
            raise ValueError(
                "KroneckerEigen.all_reduce: the processes have different eigenbases, so their "
                "eigenvalues do not add up. All-reduce the Kronecker products before eigh()."
            )
        return replace(self, values=values * scale)

    def state_dict(self) -> dict:
        """Return tensors, numbers and strings that `from_state_dict` makes a block of."""
        return {"kind": "KroneckerEigen", **self._tensors(), **self._layout()}

    @classmethod
    def from_state_dict(cls, state: dict) -> KroneckerEigen:
        """Make a block of what `state_dict` returned."""
        return cls(state.get("Q_B"), state.get("Q_A"), state["values"], **layout_of(state))
