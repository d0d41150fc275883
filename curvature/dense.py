"""Blocks without Kronecker structure: a dense matrix, a diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature.axes import Axes
from curvature.block import Block, check_vectors, join, raised, result_dtype, split
from curvature.decomposition import check_damping, check_finite, eigh, nonnegative, widen
from curvature.eigen import KroneckerEigen
from curvature.precision import without_autocast


@dataclass(eq=False, slots=True)
class DenseBlock(Block):
    r"""A dense matrix that acts on a flattened parameter, in the order of ``parameter.flatten()``.

    Args:
        matrix: ``[p, p]``, symmetric.
        shape: Shape of the parameter; ``(p,)`` by default.

    Raises:
        ValueError: If the matrix is not square, or does not fit the shape.

    Example:
        >>> import torch
        >>> M = DenseBlock(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> M.solve(torch.tensor([3.0, 3.0]), damping=1.0)
        tensor([0.7500, 0.7500])
    """

    matrix: Tensor
    shape: Sequence[int] | None = None

    def __post_init__(self):
        m = self.matrix.shape
        self.shape = torch.Size(m[:1] if self.shape is None else self.shape)
        if len(m) != 2 or m[0] != m[1] or self.shape.numel() != m[0]:
            raise ValueError(
                f"DenseBlock: the matrix has shape {tuple(m)}; expected square, with as many rows as "
                f"a parameter of shape {tuple(self.shape)} has entries."
            )

    def __repr__(self) -> str:
        return f"DenseBlock(matrix={tuple(self.matrix.shape)}, shape={tuple(self.shape)})"

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The parameter's shape, as the only entry."""
        return (self.shape,)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The matrix."""
        return {"matrix": self.matrix}

    def replaced(self, **factors: Tensor) -> DenseBlock:
        """Return the same with another matrix."""
        return replace(self, **factors)

    @without_autocast
    def matvec(self, *vectors: Tensor) -> Tensor:
        """Multiply with a parameter-shaped tensor ``[..., *shape]``."""
        check_vectors("DenseBlock.matvec", vectors, self.shapes)
        dtype = torch.promote_types(vectors[0].dtype, self.dtype)
        flat = join(vectors, self.shapes).to(dtype)
        product = flat @ self.matrix.mT.to(dtype)
        return split(product.to(result_dtype(vectors[0], dtype)), self.shapes)[0]

    def to_dense(self) -> Tensor:
        """Return the matrix ``[p, p]``."""
        return self.matrix.clone()

    def trace(self) -> Tensor:
        """Return the trace."""
        return widen(self.matrix).trace()

    def diagonal(self) -> Tensor:
        """Return the diagonal, shaped like the parameter."""
        return self.matrix.diagonal().clone().reshape(self.shape)

    def norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return torch.linalg.matrix_norm(widen(self.matrix))

    def eigh(self) -> KroneckerEigen:
        """Decompose the matrix; functions of the result are cheap.

        Raises:
            ValueError: If the matrix is not finite, not symmetric, or indefinite.
        """
        values, basis = eigh("DenseBlock: the matrix", self.matrix)
        names = " ".join(f"x{k}" for k in range(len(self.shape)))
        sizes = tuple((f"x{k}", size) for k, size in enumerate(self.shape))
        axes = Axes(f"{names} -> 1 1 ({names})" if names else "-> 1 1 1", sizes)
        return KroneckerEigen(None, basis, values[None, None], axes)

    def spectrum(self) -> Tensor:
        """Return all eigenvalues ``[p]``, in any order.

        Raises:
            ValueError: If the matrix is not finite, not symmetric, or indefinite.
        """
        return eigh("DenseBlock: the matrix", self.matrix, vectors=False)[0]

    def power(self, exponent: float, damping: float = 0.0) -> KroneckerEigen:
        r"""Return :math:`(M + \delta I)^{e}` through the eigendecomposition; see `Block.power`."""
        check_damping("DenseBlock.power", damping)
        return self.eigh().power(exponent, damping)

    def __add__(self, other: DenseBlock) -> DenseBlock:
        """Add matrices: the block of a sum of losses."""
        if not isinstance(other, DenseBlock):
            return NotImplemented
        _check_same(self, other)
        return replace(self, matrix=self.matrix + other.matrix)

    def scaled(self, scale: float | Tensor) -> DenseBlock:
        """Return a multiple of the matrix."""
        return replace(self, matrix=self.matrix * scale)

    def state_dict(self) -> dict:
        """Return tensors, numbers and strings that `from_state_dict` makes a block of."""
        return {"kind": "DenseBlock", **self._tensors(), "shape": list(self.shape)}

    @classmethod
    def from_state_dict(cls, state: dict) -> DenseBlock:
        """Make a block of what `state_dict` returned."""
        return cls(state["matrix"], state["shape"])


@dataclass(eq=False, slots=True)
class DiagonalBlock(Block):
    r"""A diagonal matrix, stored in the parameter's shape.

    Args:
        entries: The diagonal, ``[*shape]``: a GGN diagonal, say.

    Example:
        >>> import torch
        >>> DiagonalBlock(torch.tensor([1.0, 3.0])).inverse(damping=1.0).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """

    entries: Tensor

    def __repr__(self) -> str:
        return f"DiagonalBlock(entries={tuple(self.entries.shape)})"

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The parameter's shape, as the only entry."""
        return (self.entries.shape,)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The diagonal."""
        return {"entries": self.entries}

    def replaced(self, **factors: Tensor) -> DiagonalBlock:
        """Return another diagonal."""
        return replace(self, **factors)

    def matvec(self, *vectors: Tensor) -> Tensor:
        """Multiply with a parameter-shaped tensor ``[..., *shape]``."""
        check_vectors("DiagonalBlock.matvec", vectors, self.shapes)
        return (self.entries * vectors[0]).to(result_dtype(vectors[0], self.dtype))

    def trace(self) -> Tensor:
        """Return the sum of the entries."""
        return widen(self.entries).sum()

    def diagonal(self) -> Tensor:
        """Return a copy of the entries."""
        return self.entries.clone()

    def norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return torch.linalg.vector_norm(widen(self.entries))

    def spectrum(self) -> Tensor:
        """Return the entries ``[p]``.

        Raises:
            ValueError: If an entry is not finite, or negative.
        """
        return self._spectrum().flatten()

    def power(self, exponent: float, damping: float = 0.0) -> DiagonalBlock:
        r"""Return :math:`(M + \delta I)^{e}`; see `Block.power`."""
        return DiagonalBlock(raised("DiagonalBlock.power", self._spectrum(), exponent, damping))

    def _spectrum(self) -> Tensor:
        check_finite("DiagonalBlock: the diagonal", self.entries)
        return nonnegative("DiagonalBlock: the diagonal", widen(self.entries), self.entries.dtype)

    def __add__(self, other: DiagonalBlock) -> DiagonalBlock:
        """Add matrices: the block of a sum of losses."""
        if not isinstance(other, DiagonalBlock):
            return NotImplemented
        _check_same(self, other)
        return DiagonalBlock(self.entries + other.entries)

    def scaled(self, scale: float | Tensor) -> DiagonalBlock:
        """Return a multiple of the matrix."""
        return DiagonalBlock(self.entries * scale)

    def state_dict(self) -> dict:
        """Return tensors, numbers and strings that `from_state_dict` makes a block of."""
        return {"kind": "DiagonalBlock", **self._tensors()}

    @classmethod
    def from_state_dict(cls, state: dict) -> DiagonalBlock:
        """Make a block of what `state_dict` returned."""
        return cls(state["entries"])


def _check_same(a: Block, b: Block) -> None:
    if a.shapes != b.shapes:
        raise ValueError(
            f"{type(a).__name__}: + needs blocks of parameters of one shape, got "
            f"{tuple(a.shapes[0])} and {tuple(b.shapes[0])}."
        )
