r"""Curvature of low rank over one or many parameters, through its Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from math import sqrt

import torch
from torch import Tensor

from curvature.block import Block, Parts, check_method, damped, join, raised, split
from curvature.decomposition import check_damping, check_finite, symmetric_eigh
from curvature.eigenpairs import Eigenpairs, Eigenvectors
from curvature.factor import Concatenated, DenseFactor, Factor, Stacked, check_same
from curvature.krylov import largest
from curvature.mixed import Mixed, rebuilt
from curvature.shifted import Shifted
from curvature.vectors import as_rows, from_rows

# Eigenvalues below this fraction of the largest one are rounding: measured noise is 1e-7 of it if the
# products are in float32, and one eigenpair of noise costs the eigenvectors their orthogonality.
CUTS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}

# From eigenvalues [K] to a mask [K], or to the indices of those to keep.
Criterion = Callable[[Tensor], Tensor]


class LowRank(Block):
    r"""The matrix :math:`M = V V^T`, over one or many parameters, that is known through V's products.

    With one column of V per datum and output this is the generalized Gauss-Newton matrix. Its non-zero
    eigenvalues are those of the Gram matrix :math:`V^T V` ``[q, q]``, its eigenvectors
    :math:`e_k = V u_k / \sqrt{\lambda_k}`; where V has fewer rows than columns (P < q), the P x P matrix
    :math:`V V^T` is decomposed instead and :math:`u_k = V^T e_k / \sqrt{\lambda_k}`. Neither V nor M is
    formed otherwise.

    Eigenvalues up to ``rtol`` times the largest count as zero, negative ones too. All results follow
    that rule but `solve` with a damping above it, which then needs no eigenvalues.

    The Gram matrix, its decomposition and products with the gradients are kept once computed: do not
    change the factor's tensors in place.

    Args:
        factor: V ``[P, q]``.
        owner: For each column the number of its datum, ``[q]``, in 0, ..., N - 1; a datum may have
            several. None: no notion of data.
        data: N, the number of data that the columns belong to.
        slopes: Gradients over the same parameters, one column per datum: those of
            :math:`\ell_n = N r \sum_t \ell_{nt}` (r: the factor of the loss' reduction), whose mean is
            the gradient of the total loss. There may be more of them than ``data`` if the columns
            belong to a sample of the data.
        dtype: Data type in which the Gram matrix is decomposed, float32 or float64. Products with V
            are computed in V's own.
        rtol: What counts as zero; by the least precise of V's data types and ``dtype`` by default: 1e-12
            in float64, 1e-6 in float32, 1e-2 in bfloat16 and float16.
        keys: What tells the parameters apart, one hashable object each: sums and
            `BlockDiagonalOperator.of_parameters` (which takes the ids of parameters) compare them, where
            shapes alone could be equal.

    References:
        Dangel, Tatzel & Hennig (2022), ViViT: Curvature access through the generalized Gauss-Newton's
        low-rank structure.

    Raises:
        TypeError: If the factor is none.
        ValueError: If the arguments do not fit each other.

    Example:
        >>> from curvature import DenseFactor
        >>> M = LowRank(DenseFactor(torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]])))
        >>> M.eigvalsh()
        tensor([25.,  1.], dtype=torch.float64)
        >>> M.solve(torch.tensor([78.0, 2.0, 104.0]), damping=1.0)
        tensor([3., 1., 4.])
        >>> M.eigh(k=1).vectors.explicit()[0].abs()
        tensor([[0.6000, 0.0000, 0.8000]])
    """

    __slots__ = ("_found", "data", "factor", "gram_dtype", "keys", "owner", "rtol", "slopes")

    def __init__(
        self,
        factor: Factor,
        owner: Tensor | None = None,
        data: int | None = None,
        slopes: Factor | None = None,
        dtype: torch.dtype = torch.float64,
        rtol: float | None = None,
        keys: Sequence[Hashable] | None = None,
    ):
        for name, value in (("factor", factor), ("slopes", slopes)):
            if not isinstance(value, Factor) and not (name == "slopes" and value is None):
                raise TypeError(
                    f"LowRank: {name} is {type(value).__name__}; expected a curvature.Factor, such as "
                    "DenseFactor(rows[q, *shape])."
                )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"LowRank: dtype={dtype}; expected torch.float32 or torch.float64.")
        if rtol is not None and not 0 <= rtol < 1:
            raise ValueError(
                f"LowRank: rtol={rtol!r}; expected a number in [0, 1): eigenvalues up to rtol times the "
                "largest count as zero."
            )
        if slopes is not None:
            check_same(factor, slopes)
        self.factor, self.slopes, self.gram_dtype = factor, slopes, dtype
        self.owner, self.data = _checked(factor, owner, data)
        dtypes = {t.dtype for t in factor.tensors if t.is_floating_point()}
        self.rtol = max(map(CUTS.get, (dtype, *dtypes))) if rtol is None else float(rtol)
        self.keys = None if keys is None else tuple(keys)
        if self.keys is not None and len(set(self.keys)) != len(factor.shapes):
            raise ValueError(
                f"LowRank: keys={self.keys!s:.80}; expected {len(factor.shapes)} different ones, one "
                "per parameter."
            )
        self._found: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        data = "" if self.data is None else f", data={self.data}"
        columns, count = self.factor.columns, len(self.shapes)
        return f"LowRank(P={self.dim}, columns={columns}, {count} parameter(s){data})"

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the parameters."""
        return self.factor.shapes

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the products with V."""
        return self.factor.dtype

    @property
    def factors(self) -> dict[str, Tensor]:
        """The tensors that define V: ``V0``, ``V1``, ..."""
        return {f"V{k}": t for k, t in enumerate(self.factor.tensors)}

    # ------------------------------------------------------------------ Gram matrix

    def gram(self) -> Tensor:
        """Return the Gram matrix ``V^T V``, ``[q, q]``, in ``gram_dtype``."""
        return self._gram().clone()

    def _gram(self) -> Tensor:
        if "gram" not in self._found:
            if self.slopes is None or "cross" in self._found:
                gram = self.factor.gram()
            else:  # little on top: most of the work is shared
                gram, cross = self.factor.gram_and(self.slopes)
                self._found["cross"] = cross.detach().to(self.gram_dtype)
            gram = gram.detach().to(self.gram_dtype)
            self._found["gram"] = (gram + gram.mT) / 2
        return self._found["gram"]

    @property
    def _primal(self) -> bool:
        """Whether V has fewer rows than columns, so that V V^T is the smaller matrix."""
        return self.dim < self.factor.columns

    def _rows(self) -> Tensor:
        """Return V^T itself, ``[q, P]``: only where P < q."""
        if "rows" not in self._found:
            rows = join(self.factor.explicit(), self.shapes).detach()
            self._found["rows"] = rows.to(self.gram_dtype)
        return self._found["rows"]

    def _small(self) -> Tensor:
        """Return the smaller of V^T V and V V^T."""
        if not self._primal:
            return self._gram()
        if "small" not in self._found:
            self._found["small"] = self._rows().mT @ self._rows()
        return self._found["small"]

    def slope_products(self, name: str) -> Tensor:
        """Return ``V^T S`` with the gradients S, ``[q, N]``, in ``gram_dtype``.

        Args:
            name: Who asks, for the message.

        Raises:
            ValueError: If there are no gradients.
        """
        if self.slopes is None:
            raise ValueError(
                f"Eigenpairs.{name} needs the data's gradients; this LowRank has slopes=None. Build it "
                "with slopes, a factor with one column per datum (a sum has them if all terms do)."
            )
        if "cross" not in self._found:
            cross = self.factor.gram(self.slopes).detach()
            self._found["cross"] = cross.to(self.gram_dtype)
        return self._found["cross"]

    # ------------------------------------------------------------------ eigenpairs

    def eigvalsh(self) -> Tensor:
        """Return the non-zero eigenvalues, descending; no eigenvectors are computed.

        Raises:
            ValueError: If the Gram matrix is not finite.
        """
        if "values" not in self._found:
            values, _ = symmetric_eigh("LowRank: the Gram matrix", self._checked_small(), vectors=False)
            self._found["values"] = self._nonzero(values.flip(0))
        return self._found["values"].clone()

    def eigh(self, k: int | None = None, criterion: Criterion | None = None) -> Eigenpairs:
        """Return eigenpairs of non-zero eigenvalues.

        Args:
            k: Number of the largest ones; fewer are returned if fewer are not zero. All by default.
            criterion: Function of the non-zero eigenvalues ``[K]``, descending, that returns a mask
                ``[K]`` or the indices of those wanted.

        Raises:
            ValueError: If the Gram matrix is not finite; if both arguments are given, or one is wrong.

        Example:
            >>> from curvature import DenseFactor
            >>> M = LowRank(DenseFactor(torch.diag(torch.tensor([1.0, 2.0, 3.0]))))
            >>> M.eigh(criterion=lambda values: values > 2).values
            tensor([9., 4.], dtype=torch.float64)
        """
        if k is not None and criterion is not None:
            raise ValueError("LowRank.eigh takes k or criterion, not both.")
        if k is not None:
            if isinstance(k, bool) or not isinstance(k, int) or k < 1:
                raise ValueError(f"LowRank.eigh: k={k!r}; expected an integer >= 1, or None for all.")
            return Eigenpairs(self, *self._largest(k))
        values, U = self._decompose()
        if criterion is not None:
            index = _chosen(criterion(values.clone()), values)
            values, U = values[index], U[:, index]
        return Eigenpairs(self, values, U)

    def eigenvectors(self, k: int | None = None, criterion: Criterion | None = None) -> Eigenvectors:
        """Return the eigenvectors of `eigh`, implicit."""
        return self.eigh(k, criterion).vectors

    def _decompose(self) -> tuple[Tensor, Tensor]:
        """Return all non-zero eigenvalues, descending, and the Gram matrix' eigenvectors ``[q, K]``."""
        if "U" not in self._found:
            values, basis = symmetric_eigh("LowRank: the Gram matrix", self._checked_small())
            values, basis = values.flip(0), basis.flip(1)
            # as many as eigvalsh found, where it came first
            known = len(self._found["values"]) if "values" in self._found else None
            values = self._nonzero(values) if known is None else values[:known]
            self._found["values"], self._found["U"] = values, self._columns(values, basis)
        return self._found["values"].clone(), self._found["U"]

    def _largest(self, k: int) -> tuple[Tensor, Tensor]:
        found = self._found
        if "U" in found:
            return found["values"][:k].clone(), found["U"][:, :k]
        if "top" not in found or len(found["top"]) < k:
            pairs = largest(self._checked_small(), k)
            if pairs is None:
                values, U = self._decompose()
                return values[:k], U[:, :k]
            # the values before the cut: as many as were asked for
            found["top"], found["top_basis"] = pairs
        values = self._nonzero(found["top"])[:k]
        if "values" in found:  # as many as eigvalsh counted as non-zero
            values = values[: len(found["values"])]
        return values, self._columns(values, found["top_basis"])

    def _checked_small(self) -> Tensor:
        small = self._small()
        check_finite("LowRank: the Gram matrix", small)
        return small

    def _nonzero(self, values: Tensor) -> Tensor:
        """Drop from descending eigenvalues what is zero up to rounding."""
        if not len(values) or not float(values[0]) > 0:
            return values[:0]
        return values[: int((values > self.rtol * values[0]).sum())]

    def _columns(self, values: Tensor, basis: Tensor) -> Tensor:
        """Return eigenvectors of the Gram matrix, given those of the smaller one."""
        basis = basis[:, : len(values)]
        return self._rows() @ basis / values.sqrt() if self._primal else basis

    # ------------------------------------------------------------------ the matrix

    def matvec(self, *vectors: Tensor) -> Parts:
        """Multiply with one tensor ``[..., *shape]`` per parameter."""
        rows, layout = as_rows(self, "LowRank.matvec", vectors)
        V = self._factor(rows[0].dtype)
        return from_rows(V.apply(V.project(*rows)) if len(rows[0]) else rows, layout)

    def _factor(self, dtype: torch.dtype) -> Factor:
        return self.factor if dtype == self.dtype else self.factor.to(dtype=dtype)

    def solve(self, *vectors: Tensor, damping: float = 0.0) -> Parts:
        r"""Return :math:`(M + \delta I)^{-1} v = (v - V (V^T V + \delta I)^{-1} V^T v) / \delta`.

        Through the eigenpairs if they are known, or if the damping is so small that rounding matters;
        else by a Cholesky decomposition of the smaller of :math:`V^T V` and :math:`V V^T`.

        The result is of relative accuracy eps times :math:`\lambda_{\max} / \delta`, with the eps of
        V's data type or the vectors', whichever is wider: the formula takes a difference. Pass float64
        vectors for a tiny damping.

        Raises:
            ValueError: As `Block.power`.
        """
        damping = check_damping("LowRank.solve", damping)
        rows, layout = as_rows(self, "LowRank.solve", vectors)
        small = self._small()
        # where something is not finite, the trace is not: then the decomposition raises
        if "U" in self._found or not damping > self.rtol * float(small.trace()):
            return self.inverse(damping).matvec(*vectors)
        if not len(rows[0]):
            return from_rows(rows, layout)
        root, info = torch.linalg.cholesky_ex(
            small + damping * torch.eye(len(small), dtype=small.dtype, device=small.device)
        )
        if bool(info):
            return self.inverse(damping).matvec(*vectors)
        if self._primal:
            flat = join(tuple(rows), self.shapes).to(small.dtype)
            return from_rows(split(torch.cholesky_solve(flat.mT, root).mT, self.shapes), layout)
        V = self._factor(rows[0].dtype)
        coefficients = torch.cholesky_solve(V.project(*rows).to(small.dtype).mT, root).mT
        inside = V.apply(coefficients.to(V.dtype))
        return from_rows([(w - a) / damping for w, a in zip(rows, inside, strict=True)], layout)

    def inverse(self, damping: float = 0.0, method: str = "exact") -> Shifted:
        r"""Return :math:`(M + \delta I)^{-1}`; see `power`.

        Args:
            damping: delta; zero only if M has full rank.
            method: As in `Block.inverse`: there is one way only.

        Raises:
            ValueError: As `power`, or if there is no such method.
        """
        check_method("LowRank", method)
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: float = 0.0) -> Shifted:
        r"""Return :math:`(M + \delta I)^{e} = \delta^e I + E\,[(\Lambda + \delta)^e - \delta^e]\,E^T`.

        Args:
            exponent: e, any number.
            damping: delta.

        Raises:
            ValueError: If the Gram matrix is not finite; if the damping is negative; if ``exponent`` is
                negative and the damped matrix is singular (damping 0, less than full rank).
        """
        check_damping("LowRank.power", damping)
        values, U = self._decompose()
        found = raised("LowRank.power", self._distinct(values), exponent, damping)
        K = len(values)
        # differences of projections need digits
        V = self._factor(torch.promote_types(self.dtype, torch.float32))
        E = Eigenvectors(V, U / values.sqrt())
        return Shifted(E, found[:K], float(found[K]) if self.dim > K else 0.0)

    def _distinct(self, values: Tensor) -> Tensor:
        """Return the non-zero eigenvalues, and zero once if it is one."""
        return torch.cat([values, values.new_zeros(min(1, self.dim - len(values)))])

    def logdet(self, damping: float = 0.0) -> Tensor:
        r"""Return :math:`\log\det(M + \delta I) = P \log \delta + \sum_k \log(1 + \lambda_k / \delta)`.

        Raises:
            ValueError: As `Block.logdet`.
        """
        check_damping("LowRank.logdet", damping)
        values = self.eigvalsh()
        logs = damped("LowRank.logdet", self._distinct(values), damping, positive=True).log()
        K = len(values)
        return logs[:K].sum() + (self.dim - K) * logs[K:].sum()

    def spectrum(self) -> Tensor:
        """Return all eigenvalues ``[P]``: the non-zero ones, descending, then zeros.

        Raises:
            ValueError: If the Gram matrix is not finite.
        """
        values = self.eigvalsh()
        return torch.cat([values, values.new_zeros(self.dim - len(values))])

    def trace(self) -> Tensor:
        """Return the trace: that of the Gram matrix."""
        return self._small().trace()

    def norm(self) -> Tensor:
        """Return the Frobenius norm: that of the Gram matrix."""
        return torch.linalg.matrix_norm(self._small())

    def diagonal(self) -> Parts:
        """Return the diagonal, shaped like the parameter(s)."""
        found = tuple(t.detach().clone() for t in self.factor.square_sum())
        return found[0] if len(found) == 1 else found

    # ------------------------------------------------------------------ other matrices

    def replaced(self, **factors: Tensor) -> LowRank:
        """Return the same with other tensors in V; slopes stay as they are."""
        every = {**self.factors, **factors}
        return self._with(rebuilt(self.factor, self.factor.tensors, tuple(every.values())), self.slopes)

    def _with(self, factor: Factor, slopes: Factor | None) -> LowRank:
        return LowRank(factor, self.owner, self.data, slopes, self.gram_dtype, self.rtol, self.keys)

    def clone(self) -> LowRank:
        """Return a block that shares no memory with this one."""
        tensors = self.factor.tensors + (() if self.slopes is None else self.slopes.tensors)
        # V and the gradients may share tensors, such as a layer's inputs: their copies then do
        copies = list({id(t): t.clone() for t in tensors}.values())
        tensors = list({id(t): t for t in tensors}.values())
        copy = self._with(rebuilt(self.factor, tensors, copies), rebuilt(self.slopes, tensors, copies))
        copy.owner = None if self.owner is None else self.owner.clone()
        return copy

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """Return the block on another device, V in another data type.

        The Gram matrix is still decomposed in ``gram_dtype``; ``rtol`` stays as well, unless the new
        data type has fewer digits than it needs.
        """
        slopes = None if self.slopes is None else self.slopes.to(device, dtype)
        moved = self._with(self.factor.to(device, dtype), slopes)
        if moved.dtype != self.dtype:
            moved.rtol = max(self.rtol, CUTS[moved.dtype])
        else:
            moved._found = {name: t.to(device=device) for name, t in self._found.items()}
        return moved

    def __add__(self, other: LowRank) -> LowRank:
        r"""Add matrices: :math:`V V^T + V' V'^T`, with the columns of both.

        The block of a sum of losses. Data are counted on: those of ``other`` come after this one's.
        The gradients are rescaled so that their mean is the gradient of the sum. A sum has data, or
        gradients, if both terms do.

        Raises:
            ValueError: If the two are over parameters of other shapes.
        """
        if not isinstance(other, LowRank):
            return NotImplemented
        if self.shapes != other.shapes:
            raise ValueError(
                f"LowRank: + needs blocks of the same parameters, got shapes "
                f"{[tuple(s) for s in self.shapes]} and {[tuple(s) for s in other.shapes]}."
            )
        if None not in (self.keys, other.keys) and self.keys != other.keys:
            raise ValueError(
                "LowRank: + needs blocks of the same parameters in the same order; these are over "
                "others, of equal shapes. Did the two passes reach different parameters of the model?"
            )
        owner = data = slopes = None
        if self.owner is not None and other.owner is not None:
            owner = torch.cat([self.owner, other.owner + self.data])
            data = self.data + other.data
        if self.slopes is not None and other.slopes is not None:
            terms = (self.slopes, other.slopes)
            N = sum(term.columns for term in terms)
            slopes = Concatenated([term.scaled(N / term.columns) for term in terms])
        parts = [*_parts(self.factor), *_parts(other.factor)]
        dtype = torch.promote_types(self.gram_dtype, other.gram_dtype)
        rtol, keys = max(self.rtol, other.rtol), self.keys or other.keys
        return LowRank(Concatenated(parts), owner, data, slopes, dtype, rtol, keys)

    def scaled(self, scale: float | Tensor) -> LowRank:
        r"""Return a multiple :math:`c M`: the block of c times the loss. V is scaled by :math:`\sqrt c`.

        Raises:
            ValueError: If c is negative or not finite.
        """
        c = float(scale)
        if not 0 <= c < float("inf"):
            raise ValueError(
                f"LowRank: * takes a finite number >= 0, got {c:g}: V is scaled by its square root."
            )
        slopes = None if self.slopes is None else self.slopes.scaled(c)
        result = self._with(self.factor.scaled(sqrt(c)), slopes)
        if "U" in self._found and c > 0:
            result._found.update(values=c * self._found["values"], U=self._found["U"])
        return result

    def numerators(self) -> list[Tensor]:
        """Raise: the columns of other processes are not gathered.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "LowRank.all_reduce: the sum over processes has the columns of all, which differ in number "
            "and form and are not gathered. Gather the state_dict() of each process "
            "(torch.distributed.all_gather_object) and add the blocks, or all-reduce products with it."
        )

    # ------------------------------------------------------------------ storage

    def state_dict(self) -> dict:
        r"""Return tensors, numbers and strings that `from_state_dict` makes a block of.

        Stored are explicit vectors :math:`\sqrt{\lambda_k} e_k` (K P entries), the coefficients U and
        the slopes along the :math:`e_k`: M up to the cut, the Gram matrix likewise, and all directional
        quantities. What the gradients have outside of the range of M is lost.
        """
        pairs = self.eigh()
        scale = pairs.values.sqrt()
        weighted = Mixed(self.factor, pairs.coefficients)  # V U = E sqrt(lambda)
        gamma = None if self.slopes is None else pairs.directional_gradients()
        return {
            "kind": "LowRank",
            "columns": [t.detach().clone() for t in weighted.explicit()],
            "values": pairs.values.clone(),
            "coefficients": pairs.coefficients.clone(),
            "slopes": None if gamma is None else gamma.mT / scale[:, None],
            "owner": None if self.owner is None else self.owner.clone(),
            "data": self.data,
            "dtype": str(self.gram_dtype).removeprefix("torch."),
            "rtol": self.rtol,
        }

    @classmethod
    def from_state_dict(cls, state: dict) -> LowRank:
        """Make a block of what `state_dict` returned."""
        columns = Stacked([DenseFactor(t) for t in state["columns"]])
        U, slopes = state["coefficients"], state["slopes"]
        V = Mixed(columns, U.mT)  # V U U^T: V up to the cut
        S = None if slopes is None else Mixed(columns, slopes)
        dtype = getattr(torch, state["dtype"])
        block = cls(V, state["owner"], state["data"], S, dtype, state["rtol"])
        block._found.update(values=state["values"], U=U)
        return block


def _parts(factor: Factor) -> Iterable[Factor]:
    return factor.parts if isinstance(factor, Concatenated) else (factor,)


def _checked(factor: Factor, owner: Tensor | None, data: int | None) -> tuple[Tensor | None, int | None]:
    """Return the owners on the factor's device.

    Raises:
        ValueError: If they are not one integer in 0, ..., N - 1 per column.
    """
    if owner is None and data is None:
        return None, None
    q = factor.columns
    if owner is None or isinstance(data, bool) or not isinstance(data, int) or data < 1:
        raise ValueError(
            f"LowRank: owner is {type(owner).__name__} and data={data!r}; expected both: the number of "
            "each column's datum [q], and how many data there are (or neither)."
        )
    integers = isinstance(owner, Tensor) and owner.dtype == torch.int64
    if not integers or owner.shape != (q,) or (q and not 0 <= owner.min() <= owner.max() < data):
        found = f"{tuple(owner.shape)} of {owner.dtype}" if isinstance(owner, Tensor) else repr(owner)
        raise ValueError(
            f"LowRank: owner is {found}; expected a torch.int64 tensor [{q}], one entry per column, "
            f"each in 0, ..., {data - 1}."
        )
    return owner.to(factor.device), data


def _chosen(wanted: Tensor, values: Tensor) -> Tensor:
    """Return the indices that a criterion chose, ascending.

    Raises:
        ValueError: If they are neither a mask nor indices.
    """
    index = torch.as_tensor(wanted, device=values.device)
    if index.dtype == torch.bool and index.shape == values.shape:
        return index.nonzero()[:, 0]
    if not index.numel():
        return index.new_zeros(0, dtype=torch.int64)
    integers = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if not integers or index.dim() != 1 or not 0 <= index.min() <= index.max() < len(values):
        raise ValueError(
            f"LowRank.eigh: the criterion returned {tuple(index.shape)} of {index.dtype}; expected a "
            f"mask [{len(values)}], or indices in 0, ..., {len(values) - 1} of the eigenvalues it got."
        )
    return index.long().unique()
