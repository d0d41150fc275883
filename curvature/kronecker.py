r"""Kronecker products :math:`B \otimes A` that know which axes of a parameter they act on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvature.axes import MATRIX, Axes
from curvature.block import Parts, check_method, damped
from curvature.decomposition import (
    check_damping,
    check_finite,
    cholesky_inverse,
    eigh,
    nonnegative,
    widen,
)
from curvature.eigen import KroneckerEigen
from curvature.matrix_block import MatrixBlock, layout_of, same_layout
from curvature.root import Root, added, current, dense, inner, mixed, scaled, shown, wide


class Kronecker(MatrixBlock):
    r"""A Kronecker-factored curvature block :math:`B \otimes A`.

    .. math::  (B \otimes A) \operatorname{vec}(V) = \operatorname{vec}(B V A^T)

    for row-major ``vec`` and the parameter read as a matrix :math:`V \in R^{o \times i}`. It unpacks
    as ``B, A = kronecker``.

    Args:
        B: Factor of the layer's outputs, ``[o, o]``; ``[o]`` if diagonal. With ``groups > 1`` both
            factors have a leading group axis.
        A: Factor of the layer's inputs, ``[i, i]``; ``[i]`` if diagonal (one-hot inputs). Either may be
            a `Root`, the rows that it is the second moment of: products, traces, sums, eigenvalues and
            factored inverses then work with the rows, and the factor is formed where it is asked for
            (`A`, `B`, unpacking, eigenvectors, `all_reduce`).
        axes: Map from the parameter's axes to ``[g, o, i]``.
        groups: Number of groups; the block is block-diagonal over them.
        joint: Whether the last input feature is the constant 1 that belongs to the bias. The
            block then acts on ``[weight | bias]``, the bias being the last column.
        rows: Number of rows (data, or data times positions) that A is the mean of: its weight when
            batches are added. One number per group where the groups' numbers differ.

    Raises:
        ValueError: If a factor is neither square nor a diagonal.

    Example:
        For least squares with a sum loss the block is exact: ``2 I (x) X^T X / N * N``.

        >>> import torch
        >>> K = Kronecker(B=2.0 * torch.eye(2), A=torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
        >>> K.to_dense()
        tensor([[4., 2., 0., 0.],
                [2., 2., 0., 0.],
                [0., 0., 4., 2.],
                [0., 0., 2., 2.]])
        >>> K.trace()
        tensor(12.)
        >>> K.matvec(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[4., 2.],
                [2., 2.]])
    """

    __slots__ = ("_given_A", "_given_B", "axes", "groups", "joint", "rows")

    def __init__(
        self,
        B: Tensor | Root,
        A: Tensor | Root,
        axes: Axes = MATRIX,
        groups: int = 1,
        joint: bool = False,
        rows: float | tuple[float, ...] = 1.0,
    ):
        self._given_B, self._given_A, self.axes = B, A, axes
        self.groups, self.joint, self.rows = groups, joint, rows
        b, a = B.shape, A.shape
        if groups == 1 and len(b) == len(a) == 2 and b[0] == b[1] and a[0] == a[1]:
            return  # the common case, at little cost
        lead = 1 if groups > 1 else 0
        for name, factor in (("B", B), ("A", A)):
            dims = factor.dim() - lead
            square = dims == 1 or (dims == 2 and factor.shape[-1] == factor.shape[-2])
            if not square or (lead and factor.shape[0] != self.groups):
                raise ValueError(
                    f"Kronecker: factor {name} has shape {tuple(factor.shape)}; expected a square "
                    f"matrix or a diagonal{f', {self.groups} of them' if lead else ''}."
                )

    @property
    def B(self) -> Tensor:
        """Factor of the outputs."""
        return shown(self._given_B)

    @property
    def A(self) -> Tensor:
        """Factor of the inputs."""
        return shown(self._given_A)

    @property
    def _B(self) -> Tensor | Root:
        return current(self._given_B)

    @property
    def _A(self) -> Tensor | Root:
        return current(self._given_A)

    @property
    def roots(self) -> dict[str, Root]:
        """The factors that are still kept as rows, by the names "B" and "A"."""
        return {k: f for k, f in (("B", self._B), ("A", self._A)) if isinstance(f, Root)}

    def __iter__(self) -> Iterator[Tensor]:
        """Unpack as ``B, A``."""
        return iter((self.B, self.A))

    def __repr__(self) -> str:
        kind = ", joint" if self.joint else ""
        return f"Kronecker(B={tuple(self._B.shape)}, A={tuple(self._A.shape)}{kind})"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Sizes g, o and i of the matrices; i counts the bias column."""
        return self.groups, self._B.shape[-1], self._A.shape[-1]

    @property
    def factors(self) -> dict[str, Tensor]:
        """B and A; of a root its ``A_rows``, and ``A_shift`` if it has one."""
        found = {}
        for name, factor in (("B", self._B), ("A", self._A)):
            if isinstance(factor, Root):
                found.update({f"{name}_{part}": t for part, t in factor.tensors.items()})
            else:
                found[name] = factor
        return found

    def replaced(self, **factors: Tensor) -> Kronecker:
        """Return the same with other factors."""
        return self._with(**_kept(factors))

    def _with(self, **changes) -> Kronecker:
        """Return the same with other arguments."""
        same = {"B": self._B, "A": self._A, "axes": self.axes, "groups": self.groups}
        return Kronecker(**{**same, "joint": self.joint, "rows": self.rows, **changes})

    def _factor(self, name: str) -> Tensor | Root:
        return self._B if name == "B" else self._A

    def is_diagonal(self, name: str) -> bool:
        """Whether factor "B" or "A" is stored as its diagonal."""
        return self._factor(name).dim() == (2 if self.groups > 1 else 1)

    # ------------------------------------------------------------------ plain algebra

    def apply(self, V: Tensor) -> Tensor:
        """Multiply the block with matrices ``V[..., g, o, i]``."""
        B, A = self._B.to(V.dtype), self._A.to(V.dtype)
        if self.groups == 1:
            B, A = (f if isinstance(f, Root) else f[None] for f in (B, A))
        if isinstance(B, Root):
            V = B.left(V)
        else:
            V = B[..., None] * V if self.is_diagonal("B") else B @ V
        if isinstance(A, Root):
            return A.right(V)
        return V * A[..., None, :] if self.is_diagonal("A") else V @ A.mT

    def transpose(self) -> Kronecker:
        r"""Return :math:`B^T \otimes A^T`: another matrix only if the factors are not symmetric.

        Example:
            >>> K = Kronecker(torch.eye(1), torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
            >>> K.transpose().to_dense()
            tensor([[0., 0.],
                    [1., 0.]])
        """
        turned = {k: t if self.is_diagonal(k) else t.mT for k, t in self.factors.items() if k in "BA"}
        return self._with(**turned)  # a root is symmetric

    def trace(self) -> Tensor:
        r"""Return :math:`\sum_g \operatorname{tr} B_g \operatorname{tr} A_g`."""
        return (widen(self._diagonal("B")).sum(-1) * widen(self._diagonal("A")).sum(-1)).sum()

    def diagonal(self) -> Parts:
        """Return the diagonal, shaped like the parameter(s).

        Example:
            >>> Kronecker(torch.diag(torch.tensor([1.0, 2.0])), 3.0 * torch.eye(2)).diagonal()
            tensor([[3., 3.],
                    [6., 6.]])
        """
        B, A = self._diagonal("B"), self._diagonal("A")
        V = B[..., :, None] * A[..., None, :]
        return self.to_parameters(V if self.groups > 1 else V[None])

    def norm(self) -> Tensor:
        r"""Return the Frobenius norm, :math:`\|B\|_F \|A\|_F`.

        Example:
            >>> Kronecker(2.0 * torch.eye(4), 3.0 * torch.eye(1)).norm()  # sqrt(4 * 36)
            tensor(12.)
        """
        # product of norms: squares of small or large factors might leave the range of their type
        norms = [
            factor.norm()
            if isinstance(factor, Root)
            else torch.linalg.vector_norm(factor, dim=dims, dtype=torch.float64)
            for factor, dims in (
                (f, None if self.groups == 1 else tuple(range(1, f.dim()))) for f in (self._B, self._A)
            )
        ]
        dtype = torch.promote_types(self._B.dtype, torch.float32)
        return torch.linalg.vector_norm(norms[0] * norms[1]).to(dtype)

    def inner(self, other: Kronecker) -> Tensor:
        r"""Return :math:`\langle M, M' \rangle_F = \operatorname{tr}(B^T B') \operatorname{tr}(A^T A')`.

        Raises:
            ValueError: If the two act on parameters of other shape or layout.

        Example:
            >>> K, L = (Kronecker(c * torch.eye(2), torch.eye(3)) for c in (1.0, 2.0))
            >>> K.inner(L)  # 6 entries of 1 * 2
            tensor(12.)
        """
        self._check_same(other, "inner")
        total = 1.0
        for name in ("B", "A"):
            if self.is_diagonal(name) or other.is_diagonal(name):
                total = total * (widen(self._diagonal(name)) * widen(other._diagonal(name))).sum(-1)
            else:
                total = total * inner(self._factor(name), other._factor(name))
        return total.sum()

    def _diagonal(self, name: str) -> Tensor:
        factor = self._factor(name)
        if isinstance(factor, Root):
            return factor.diagonal()
        return factor if self.is_diagonal(name) else factor.diagonal(dim1=-2, dim2=-1)

    # ------------------------------------------------------------------ groups

    @classmethod
    def of_groups(cls, blocks: Sequence[Kronecker], axes: Axes) -> Kronecker:
        """Join the blocks of a parameter's groups into one that is block-diagonal over them.

        Args:
            blocks: One per group, without groups of their own, with factors of equal shapes.
            axes: Map from the axes of the whole parameter to ``[g, o, i]``.

        Raises:
            ValueError: If they differ in shape, or some are joint and others are not.

        Example:
            >>> blocks = [Kronecker(b * torch.eye(2), torch.eye(1)) for b in (1.0, 2.0)]
            >>> Kronecker.of_groups(blocks, Axes("(g o) i -> g o i", (("g", 2),))).diagonal().flatten()
            tensor([1., 1., 2., 2.])
        """
        kinds = {(K._B.shape, K._A.shape, K.joint, K.groups) for K in blocks}
        if len(kinds) != 1 or blocks[0].groups != 1:
            raise ValueError(f"Kronecker.of_groups: expected blocks of one shape, got {list(blocks)}.")
        if len(blocks) == 1:
            return blocks[0]._with(axes=axes)
        rows = tuple(K.rows for K in blocks)
        return cls(
            Root.stacked([K._B for K in blocks]),
            Root.stacked([K._A for K in blocks]),
            axes,
            len(blocks),
            blocks[0].joint,
            rows[0] if len(set(rows)) == 1 else rows,
        )

    # ------------------------------------------------------------------ batches

    def __add__(self, other: Kronecker) -> Kronecker:
        """Accumulate the block of further data: B adds up, A is averaged by its number of rows.

        The sum is the Kronecker product of the sum of the two losses, as gradients accumulate. It
        is not the sum of the two matrices: that is a `KroneckerSum`. For the mean over batches of a
        mean loss weight them, ``(n * K + m * L) * (1 / (n + m))``.

        Raises:
            ValueError: If the two act on parameters of other shape or layout.

        Example:
            >>> K = Kronecker(torch.eye(1), torch.eye(1), rows=3)
            >>> L = Kronecker(torch.eye(1), 5.0 * torch.eye(1), rows=1)
            >>> (K + L).B, (K + L).A  # 1 + 1, (3 * 1 + 1 * 5) / 4
            (tensor([[2.]]), tensor([[2.]]))
        """
        if not isinstance(other, Kronecker):
            return NotImplemented
        self._check_same(other, "+")
        mine, theirs = self.rows, other.rows
        if isinstance(mine, tuple) or isinstance(theirs, tuple):
            mine, theirs = self._rows(), other._rows()
        part, rows = theirs / (mine + theirs), mine + theirs
        if isinstance(rows, Tensor):
            part, rows = part.to(self._A.dtype), _numbers(rows)
        return self._with(B=added(self._B, other._B), A=mixed(self._A, other._A, part), rows=rows)

    def _rows(self) -> Tensor:
        """Return the rows in float64, shaped so that A can be multiplied with them."""
        rows = torch.tensor(self.rows, dtype=torch.float64, device=self.device)
        return rows.reshape(-1, *[1] * (self._A.dim() - 1)) if rows.dim() else rows

    def scaled(self, scale: float | Tensor) -> Kronecker:
        """Return a multiple of the matrix (that is, of B): the block of a scaled loss."""
        return self._with(B=scaled(self._B, scale))

    def lerp(self, other: Kronecker, weight: float) -> Kronecker:
        """Move both factors towards another block's: ``factor + weight (other - factor)``.

        This is the moving average of KFAC optimizers. ``+`` is none: there A is the mean over all
        rows so far, which never forgets.

        Raises:
            ValueError: If the two act on parameters of other shape or layout.

        Example:
            >>> K, L = (Kronecker(b * torch.eye(1), torch.eye(1)) for b in (1.0, 3.0))
            >>> K.lerp(L, 0.1).B
            tensor([[1.2000]])
        """
        self._check_same(other, "lerp")
        return self._with(B=mixed(self._B, other._B, weight), A=mixed(self._A, other._A, weight))

    def _check_same(self, other: Kronecker, what: str) -> None:
        diagonals = [K.is_diagonal(name) for K in (self, other) for name in ("B", "A")]
        if same_layout(self, other) and (what == "inner" or diagonals[:2] == diagonals[2:]):
            return
        raise ValueError(
            f"Kronecker: {what} needs two blocks of one shape and layout, got {self} and {other}."
        )

    def numerators(self) -> list[Tensor]:
        """Return B, A times its rows, and the rows."""
        rows = self._rows()
        if self.groups > 1 and not rows.dim():  # another process's groups may differ in rows
            rows = rows.expand(self.groups, *[1] * (self._A.dim() - 1)).contiguous()
        A = wide(self._A)
        return [dense(self._B), (A * rows).to(A.dtype), rows]

    def from_numerators(self, summed: list[Tensor], scale: float) -> Kronecker:
        """Return the block with the accumulated factors."""
        B, A, rows = summed
        return self._with(B=B * scale, A=(A / rows).to(self._A.dtype), rows=_numbers(rows))

    # ------------------------------------------------------------------ functions of the matrix

    def eigh(self) -> KroneckerEigen:
        r"""Decompose both factors: :math:`\lambda_B \otimes \lambda_A` in the basis :math:`Q_B \otimes Q_A`.

        Keep the result where several functions of one block are wanted (dampings, powers): each
        function of the result is cheap. Computed in float32 or above.

        Raises:
            ValueError: If a factor is not finite, not symmetric, or indefinite.

        Example:
            >>> K = Kronecker(2.0 * torch.eye(1), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
            >>> E = K.eigh()
            >>> E.values.round(decimals=3), [E.logdet(d).round(decimals=3) for d in (0.0, 1.0)]
            (tensor([[[2., 6.]]]), [tensor(2.4850), tensor(3.0450)])
        """  # noqa: E501
        (b, Q_B), (a, Q_A) = (self._spectrum(name, vectors=True) for name in ("B", "A"))
        return KroneckerEigen(Q_B, Q_A, self._outer(b, a), self.axes, self.groups, self.joint)

    def spectrum(self) -> Tensor:
        """Return all eigenvalues ``[p]``, in any order.

        Raises:
            ValueError: As for `eigh`.

        Example:
            >>> Kronecker(2.0 * torch.eye(1), torch.diag(torch.tensor([3.0, 1.0]))).eigenvalues()
            tensor([2., 6.])
        """
        (b, _), (a, _) = (self._spectrum(name, vectors=False) for name in ("B", "A"))
        return self._outer(b, a).flatten()

    def power(self, exponent: float, damping: float = 0.0) -> KroneckerEigen:
        r"""Return :math:`(B \otimes A + \delta I)^{e}` through both eigendecompositions.

        Args:
            exponent: e, any number: -1 inverts, -1/2 maps white noise to samples.
            damping: The number added to all eigenvalues.

        Raises:
            ValueError: If a factor is not finite, not symmetric or indefinite; if the damping is
                negative; if ``exponent`` is negative and the damped matrix is singular.

        Example:
            >>> K = Kronecker(2.0 * torch.eye(1), torch.diag(torch.tensor([4.0, 1.5])))
            >>> K.power(-0.5, damping=1.0).diagonal()  # 1 / sqrt(8 + 1), 1 / sqrt(3 + 1)
            tensor([[0.3333, 0.5000]])
        """
        damping = check_damping("Kronecker.power", damping)
        (b, Q_B), (a, Q_A) = (self._spectrum(name, vectors=True) for name in ("B", "A"))
        if exponent < 0 and damping == 0:
            for name, values in (("B", b), ("A", a)):
                damped(f"Kronecker.power: factor {name}", values, damping, positive=True)
        eigen = KroneckerEigen(Q_B, Q_A, self._outer(b, a), self.axes, self.groups, self.joint)
        return eigen.power(exponent, damping)

    def inverse(self, damping: float = 0.0, method: str = "exact") -> Kronecker | KroneckerEigen:
        r"""Return the inverse of the damped block.

        ============== =================================================== =====================
        method         matrix                                              through
        ============== =================================================== =====================
        ``"exact"``    :math:`(B \otimes A + \delta I)^{-1}`               both eigenbases
        ``"factored"`` :math:`(B + \sqrt\delta / \pi I)^{-1} \otimes
                       (A + \pi \sqrt\delta I)^{-1}`                       both eigenbases
        ``"cholesky"`` the same                                            Cholesky: cheaper
        ============== =================================================== =====================

        with :math:`\pi^2 = \operatorname{tr}(A) \dim(B) / (\operatorname{tr}(B) \dim(A))`, and 1 where
        a factor is zero. Without damping all three are the same matrix.

        Args:
            damping: delta.
            method: As above.

        Raises:
            ValueError: If ``method`` is none of these; if a factor is not finite, not symmetric or
                indefinite (``"cholesky"``: with its damping); if the damping is negative, or too
                small to make the matrix regular.

        References:
            Martens & Grosse (2015), section 6.3 (factored Tikhonov damping).

        Example:
            >>> K = Kronecker(torch.tensor([[4.0]]), torch.tensor([[1.0]]))
            >>> K.inverse(damping=1.0).to_dense()  # 1 / (4 + 1)
            tensor([[0.2000]])
            >>> K.inverse(damping=1.0, method="cholesky").to_dense()  # 1 / ((4 + 2) (1 + 1/2))
            tensor([[0.1111]])
        """
        if method == "exact":
            return self.power(-1.0, damping)
        check_method("Kronecker", method)
        pi, root = self.pi(), check_damping("Kronecker.inverse", damping) ** 0.5
        factors = {
            name: self._inverse_factor(name, shift, method)
            for name, shift in (("B", root / pi), ("A", root * pi))
        }
        return self._with(**factors)

    def pi(self) -> Tensor:
        r"""Return :math:`\pi` of the factored damping, ``[g, 1]`` with groups, else a scalar.

        The damping is split such that the factors' mean eigenvalues are damped in proportion.

        Example:
            >>> Kronecker(torch.eye(2), 4.0 * torch.eye(3)).pi()  # sqrt(4 / 1)
            tensor(2.)
        """
        ratio = widen(self._diagonal("A")).mean(-1) / widen(self._diagonal("B")).mean(-1)
        pi = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio)).sqrt()
        return pi[:, None] if self.groups > 1 else pi

    def _inverse_factor(self, name: str, shift: Tensor, method: str) -> Tensor | Root:
        owner, factor = f"Kronecker.inverse: factor {name}", self._factor(name)
        if isinstance(factor, Root) and factor.shift is None and bool((shift > 0).all()):
            return factor.inverse(shift[..., 0] if self.groups > 1 else shift)
        factor = wide(factor)
        if self.is_diagonal(name) or method == "factored":
            values, basis = self._spectrum(name, vectors=True)
            values = values + shift
            damped(owner, values, 0.0, positive=True)
            if basis is None:
                return 1 / values
            return (basis / values[..., None, :]) @ basis.mT
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        shift = shift[..., None] if self.groups > 1 else shift
        if not bool((shift > 0).all()):
            # pivots do not tell a singular matrix from its rounding; eigenvalues do
            damped(owner, self._spectrum(name, vectors=False)[0], 0.0, positive=True)
        return cholesky_inverse(owner, factor + shift * eye)

    def _spectrum(self, name: str, vectors: bool) -> tuple[Tensor, Tensor | None]:
        """Return a factor's eigenvalues ``[d]`` (``[g, d]``) and eigenvectors, None if diagonal."""
        factor, label = self._factor(name), f"Kronecker: factor {name}"
        if self.is_diagonal(name):
            check_finite(label, factor)
            return nonnegative(label, widen(factor), factor.dtype), None
        if isinstance(factor, Root):
            check_finite(label, factor.rows)
            few = factor.shift is None and factor.rows.shape[-2] <= factor.shape[-1]
            if few and not vectors:
                return factor.eigenvalues(label), None
            factor = factor.wide()
        return eigh(label, factor, vectors)

    def _outer(self, b: Tensor, a: Tensor) -> Tensor:
        """Return the products of eigenvalues as ``[g, o, i]``."""
        dtype = torch.promote_types(b.dtype, a.dtype)
        values = b.to(dtype)[..., :, None] * a.to(dtype)[..., None, :]
        return values if self.groups > 1 else values[None]

    # ------------------------------------------------------------------ storage

    def state_dict(self) -> dict:
        """Return tensors, numbers and strings that `from_state_dict` makes a block of."""
        rows = list(self.rows) if isinstance(self.rows, tuple) else self.rows
        return {"kind": "Kronecker", **self._tensors(), **self._layout(), "rows": rows}

    @classmethod
    def from_state_dict(cls, state: dict) -> Kronecker:
        """Make a block of what `state_dict` returned."""
        rows = tuple(state["rows"]) if isinstance(state["rows"], list) else state["rows"]
        names = ("B", "A", "B_rows", "B_shift", "A_rows", "A_shift")
        factors = _kept({name: state[name] for name in names if name in state})
        return cls(**factors, **layout_of(state), rows=rows)


def _kept(factors: dict[str, Tensor]) -> dict[str, Tensor | Root]:
    """Return factors by name, those given as ``A_rows`` and ``A_shift`` as roots."""
    kept = {name: t for name, t in factors.items() if name in "BA"}
    for name in "BA":
        if f"{name}_rows" in factors:
            kept[name] = Root(factors[f"{name}_rows"], factors.get(f"{name}_shift"))
    return kept


def _numbers(rows: Tensor) -> float | tuple[float, ...]:
    """Return one number, or one per group where they differ."""
    found = tuple(rows.flatten().tolist())
    return found[0] if len(set(found)) == 1 else found
