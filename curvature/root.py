"""A positive semi-definite factor of low rank, kept as the rows that it is the second moment of."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt

import torch
from torch import Tensor

from curvature.decomposition import check_finite, nonnegative, symmetric_eigh, widen
from curvature.precision import without_autocast


class Root:
    r"""A matrix :math:`A = R^T R`, or :math:`\sigma I - R^T R`, of few rows R.

    With r < i rows, products cost 2 r i instead of i^2, and i^2 numbers need not be kept. `Kronecker`
    takes it in the place of a factor; the second form is that of damped inverses.

    Args:
        rows: R, ``[r, i]``, or ``[g, r, i]`` for one matrix per group.
        shift: sigma, a number as a tensor ``[]``, or ``[g]``; None for the first form.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> A = Root(torch.tensor([[1.0, 2.0, 0.0]]))
        >>> A.dense()
        tensor([[1., 2., 0.],
                [2., 4., 0.],
                [0., 0., 0.]])
        >>> A.inverse(torch.tensor(1.0)).diagonal()  # 1 - 1 / (5 + 1), 1 - 4 / (5 + 1), 1
        tensor([0.8333, 0.3333, 1.0000])
    """

    __slots__ = ("_shown", "rows", "shift")

    def __init__(self, rows: Tensor, shift: Tensor | None = None):
        if rows.dim() not in (2, 3) or (shift is not None and shift.shape != rows.shape[:-2]):
            raise ValueError(
                f"Root: rows of shape {tuple(rows.shape)}, expected [r, i] or [g, r, i]; a shift has "
                f"one number per group, got {None if shift is None else tuple(shift.shape)}."
            )
        self.rows, self.shift = rows, shift
        self._shown: Tensor | None = None  # the matrix that a user has: what is done to it counts

    def __repr__(self) -> str:
        return f"Root(rows={tuple(self.rows.shape)}{'' if self.shift is None else ', shifted'})"

    def __getitem__(self, k: int) -> Root:
        """Return the matrix of a group."""
        return Root(self.rows[k], None if self.shift is None else self.shift[k])

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix, ``[i, i]`` or ``[g, i, i]``."""
        return torch.Size((*self.rows.shape[:-2], self.rows.shape[-1], self.rows.shape[-1]))

    def dim(self) -> int:
        """Return the number of the matrix's axes, as of a tensor."""
        return self.rows.dim()

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the rows."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.rows.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The rows, and the shift if there is one."""
        return {"rows": self.rows} | ({} if self.shift is None else {"shift": self.shift})

    def clone(self) -> Root:
        """Return a copy with memory of its own."""
        return Root(**{name: t.clone() for name, t in self.tensors.items()})

    def to(self, dtype: torch.dtype) -> Root:
        """Return the same in another data type."""
        if dtype == self.dtype:
            return self
        return Root(**{name: t.to(dtype) for name, t in self.tensors.items()})

    @property
    def is_shown(self) -> bool:
        """Whether a user has the matrix, by `show`; it then takes the place of the rows."""
        return self._shown is not None

    def show(self) -> Tensor:
        """Return the matrix for a user, who may change it: the same at each call."""
        if self._shown is None:
            self._shown = self.dense()
        return self._shown

    def dense(self) -> Tensor:
        """Return the matrix in the rows' data type, formed unless a user has it."""
        if self._shown is not None:
            return self._shown
        return self.wide().to(self.dtype)  # so that blocks of several batches or processes have one type

    @without_autocast
    def wide(self) -> Tensor:
        """Return the matrix in float32 or above, for what needs its digits."""
        if self._shown is not None:
            return widen(self._shown)
        rows = widen(self.rows)
        A = rows.mT @ rows
        A = (A + A.mT) / 2  # products of panels need not round alike on both sides
        if self.shift is not None:
            A = torch.diag_embed(self.shift.to(A.dtype)[..., None].expand(A.shape[:-1])) - A
        return A

    def right(self, V: Tensor) -> Tensor:
        """Return ``V A`` of matrices ``V[..., o, i]``, with groups ``V[..., g, o, i]``."""
        product = (V @ self.rows.mT) @ self.rows
        return product if self.shift is None else self.shift[..., None, None] * V - product

    def left(self, V: Tensor) -> Tensor:
        """Return ``A V`` of matrices ``V[..., i, o]``, with groups ``V[..., g, i, o]``."""
        return self.right(V.mT).mT

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``[i]`` or ``[g, i]``."""
        squares = widen(self.rows).square().sum(-2).to(self.dtype)
        return squares if self.shift is None else self.shift[..., None] - squares

    @without_autocast
    def norm(self) -> Tensor:
        """Return the Frobenius norm, ``[]`` or ``[g]``, in float64: that of ``R R^T``."""
        rows = widen(self.rows)
        M = rows @ rows.mT if self.shift is None else self.wide()
        return torch.linalg.vector_norm(M, dim=(-2, -1), dtype=torch.float64)

    @without_autocast
    def eigenvalues(self, name: str) -> Tensor:
        """Return all eigenvalues ``[..., i]``, ascending: those of ``R R^T``, and zeros.

        Only of the first form, with at most i rows.

        Args:
            name: What the matrix is called in messages.

        Raises:
            ValueError: If the matrix is found to be indefinite.
        """
        rows = widen(self.rows)
        if not rows.shape[-2]:
            return rows.new_zeros(self.shape[:-1])
        values, _ = symmetric_eigh(name, rows @ rows.mT, vectors=False)
        values = nonnegative(name, values, self.dtype)
        # below the eigenvalues' rounding they are zero, as they are in `decomposition.eigh`
        noise = 8 * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
        values = values.masked_fill(values <= noise, 0.0)
        return torch.nn.functional.pad(values, (self.shape[-1] - values.shape[-1], 0))

    @without_autocast
    def inverse(self, damping: Tensor) -> Root:
        r"""Return :math:`(R^T R + c I)^{-1} = I / c - Z^T Z`, by the Woodbury identity.

        ``Z = L^{-1} R / \sqrt c`` with ``L L^T = R R^T + c I``. Errors are relative to 1 / c, the
        inverse's norm.

        Args:
            damping: c > 0, ``[]`` or ``[g]``.

        Raises:
            ValueError: If the rows are not finite, or c is too small for them.
        """
        check_finite("Root.inverse", self.rows)
        rows = widen(self.rows)
        c = damping.to(rows.dtype)[..., None, None]
        G = rows @ rows.mT + c * torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
        L, info = torch.linalg.cholesky_ex(G)
        if bool((info != 0).any()):
            raise ValueError(
                f"Root.inverse: with damping {damping.flatten().tolist()} the rows' Gram matrix has no "
                f"Cholesky decomposition (its largest entry is {float(G.abs().max()):.3g}). Pass a "
                "larger damping."
            )
        Z = torch.linalg.solve_triangular(L, rows, upper=False) / c.sqrt()
        return Root(Z, 1 / damping.to(rows.dtype))

    def scaled(self, scale: float | Tensor) -> Root | Tensor:
        """Return a multiple, dense if the number is negative or a tensor."""
        if isinstance(scale, Tensor) or not 0 <= scale < inf:
            return self.dense() * scale  # a tensor's sign is not known, and would have to be waited for
        shift = None if self.shift is None else self.shift * scale
        return Root(self.rows * sqrt(scale), shift)

    def joined(self, other: Root) -> Root | Tensor:
        """Return the sum with another of the first form: all rows, or dense if that is no larger."""
        rows = torch.cat([self.rows, other.rows], dim=-2)
        both = Root(rows.to(torch.promote_types(self.dtype, other.dtype)))
        return both if rows.shape[-2] < rows.shape[-1] else both.dense()

    def mixed(self, other: Root, part: float | Tensor) -> Root | Tensor:
        """Return ``(1 - part) A + part A'``, as `joined`.

        Args:
            other: Of the first form, as this one.
            part: Between 0 and 1; a number, or ``[g, 1, 1]``.
        """
        kept, new = ((p.sqrt() if isinstance(p, Tensor) else sqrt(p)) for p in (1 - part, part))
        return Root(self.rows * kept).joined(Root(other.rows * new))

    @staticmethod
    def stacked(factors: Sequence[Tensor | Root]) -> Root | Tensor:
        """Return the factors of groups as one, a root if all are and have equally many rows."""
        roots = [f for f in factors if isinstance(f, Root) and f.shift is None]
        if len(roots) < len(factors) or len({root.rows.shape for root in roots}) > 1:
            return torch.stack([dense(f) for f in factors])
        return Root(torch.stack([root.rows for root in roots]))


def dense(A: Tensor | Root) -> Tensor:
    """Return a factor as a tensor."""
    return A.dense() if isinstance(A, Root) else A


def wide(A: Tensor | Root) -> Tensor:
    """Return a factor as a tensor, in float32 or above."""
    return A.wide() if isinstance(A, Root) else widen(A)


def shown(A: Tensor | Root) -> Tensor:
    """Return a factor as a tensor, for a user, who may change it."""
    return A.show() if isinstance(A, Root) else A


def current(A: Tensor | Root) -> Tensor | Root:
    """Return a root unless a user has its matrix, else that."""
    return A.dense() if isinstance(A, Root) and A.is_shown else A


def scaled(A: Tensor | Root, scale: float | Tensor) -> Tensor | Root:
    """Return a multiple."""
    return A.scaled(scale) if isinstance(A, Root) else A * scale


@without_autocast
def inner(A: Tensor | Root, other: Tensor | Root) -> Tensor:
    """Return ``tr(A^T A')``, ``[]`` or ``[g]``; of a root ``tr(R A' R^T)``, which forms no matrix."""
    if not _plain(A):
        A, other = other, A
    dtype = torch.promote_types(torch.promote_types(A.dtype, other.dtype), torch.float32)
    other = other.to(dtype)
    if not _plain(A):
        return (wide(A).to(dtype) * wide(other)).sum((-2, -1))
    R = A.rows.to(dtype)
    if _plain(other):
        return (R @ other.rows.mT).square().sum((-2, -1))
    product = other.right(R) if isinstance(other, Root) else R @ other
    return (product * R).sum((-2, -1))


def added(A: Tensor | Root, other: Tensor | Root) -> Tensor | Root:
    """Return the sum, a root where both are and that is no larger."""
    return A.joined(other) if _plain(A, other) else dense(A) + dense(other)


def mixed(A: Tensor | Root, other: Tensor | Root, part: float | Tensor) -> Tensor | Root:
    """Return ``A + part (A' - A)``, a root where both are and that is no larger."""
    if _plain(A, other) and (isinstance(part, Tensor) or 0 <= part <= 1):
        return A.mixed(other, part)
    A, other = dense(A), dense(other)
    if isinstance(part, Tensor) or A.dtype != other.dtype:
        return A + part * (other - A)
    return A.lerp(other, part)


def _plain(*factors: Tensor | Root) -> bool:
    """Whether all are roots of the first form."""
    return all(isinstance(f, Root) and f.shift is None for f in factors)
