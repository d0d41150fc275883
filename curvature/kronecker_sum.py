"""Sums of Kronecker products: parameters that several layers use in different roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.block import Block, Parts, check_size
from curvature.dense import DenseBlock
from curvature.eigen import KroneckerEigen
from curvature.kronecker import Kronecker


@dataclass(eq=False, slots=True)
class KroneckerSum(Block):
    r"""A sum of Kronecker products :math:`\sum_t B_t \otimes A_t` of one parameter.

    This is the block of a parameter that two layers use in different roles, such as a matrix that
    is an embedding and an output head: each role contributes one term, cross terms are dropped.
    Products, trace and diagonal are exact and cheap. Eigenvalues, powers and what builds on them have
    no factored form: they go through the dense matrix, and raise where it is too large.

    Args:
        terms: The Kronecker products, none of them joint.

    Raises:
        ValueError: If there are no terms, one is joint, or their parameters differ in shape.

    Example:
        >>> import torch
        >>> K = Kronecker(torch.eye(1), 3.0 * torch.eye(1))
        >>> KroneckerSum((K, K)).to_dense()
        tensor([[6.]])
    """

    terms: tuple[Kronecker, ...]

    def __post_init__(self):
        shapes = {term.shapes for term in self.terms}
        if len(shapes) != 1 or any(term.joint for term in self.terms):
            raise ValueError(
                "KroneckerSum: expected Kronecker products of one parameter without its bias, got "
                f"{list(self.terms)}."
            )

    def __iter__(self) -> Iterator[Kronecker]:
        """Iterate over the terms."""
        return iter(self.terms)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The parameter's shape, as the only entry."""
        return self.terms[0].shapes

    @property
    def factors(self) -> dict[str, Tensor]:
        """All terms' factors: ``B0``, ``A0``, ``B1``, ..."""
        return {f"{k}{n}": t for n, term in enumerate(self.terms) for k, t in term.factors.items()}

    def replaced(self, **factors: Tensor) -> KroneckerSum:
        """Return the same kind of sum with other factors."""
        terms = [
            term.replaced(**{k: factors[f"{k}{n}"] for k in term.factors if f"{k}{n}" in factors})
            for n, term in enumerate(self.terms)
        ]
        return KroneckerSum(tuple(terms))

    def matvec(self, *vectors: Tensor) -> Parts:
        """Multiply with a parameter-shaped tensor ``[..., *parameter.shape]``."""
        return sum(term.matvec(*vectors) for term in self.terms)

    def to_dense(self) -> Tensor:
        """Return the dense block ``[p, p]`` in the order of ``parameter.flatten()``."""
        return sum(term.to_dense() for term in self.terms)

    def trace(self) -> Tensor:
        """Return the sum of the terms' traces."""
        return sum(term.trace() for term in self.terms)

    def diagonal(self) -> Parts:
        """Return the sum of the terms' diagonals."""
        return sum(term.diagonal() for term in self.terms)

    def norm(self) -> Tensor:
        """Return the Frobenius norm, through the dense matrix.

        Raises:
            ValueError: If the dense matrix is too large.
        """
        return self._dense("norm").norm()

    def spectrum(self) -> Tensor:
        """Return all eigenvalues ``[p]``; see `DenseBlock.spectrum`."""
        return self._dense("eigenvalues").spectrum()

    def power(self, exponent: float, damping: float = 0.0) -> KroneckerEigen:
        """Return the power of the damped dense matrix; see `DenseBlock.power`."""
        return self._dense("power").power(exponent, damping)

    def _dense(self, what: str) -> DenseBlock:
        check_size(self, what)
        dtype = torch.promote_types(self.dtype, torch.float32)  # before the terms are added
        return DenseBlock(self.to(dtype=dtype).to_dense(), self.shapes[0])

    def __add__(self, other: KroneckerSum) -> KroneckerSum:
        """Accumulate the block of further data, term by term; see `Kronecker.__add__`.

        Raises:
            ValueError: If the two have other terms.
        """
        if not isinstance(other, KroneckerSum):
            return NotImplemented
        if len(self.terms) != len(other.terms):
            raise ValueError(
                f"KroneckerSum: + needs sums of equally many terms, got {len(self.terms)} and "
                f"{len(other.terms)}."
            )
        return KroneckerSum(tuple(a + b for a, b in zip(self.terms, other.terms, strict=True)))

    def scaled(self, scale: float | Tensor) -> KroneckerSum:
        """Return a multiple of the matrix."""
        return KroneckerSum(tuple(term * scale for term in self.terms))

    def numerators(self) -> list[Tensor]:
        """Return those of all terms."""
        return [t for term in self.terms for t in term.numerators()]

    def from_numerators(self, summed: list[Tensor], scale: float) -> KroneckerSum:
        """Return the sum with the accumulated factors."""
        each = len(summed) // len(self.terms)
        parts = [summed[k : k + each] for k in range(0, len(summed), each)]
        terms = [t.from_numerators(p, scale) for t, p in zip(self.terms, parts, strict=True)]
        return KroneckerSum(tuple(terms))

    def state_dict(self) -> dict:
        """Return tensors, numbers and strings that `from_state_dict` makes a block of."""
        return {"kind": "KroneckerSum", "terms": [term.state_dict() for term in self.terms]}

    @classmethod
    def from_state_dict(cls, state: dict) -> KroneckerSum:
        """Make a block of what `state_dict` returned."""
        return cls(tuple(Kronecker.from_state_dict(term) for term in state["terms"]))
