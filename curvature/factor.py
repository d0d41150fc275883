r"""Factors V of low-rank matrices :math:`V V^T`, known through their products.

A factor has one column per vector that was propagated, ``q`` of them, and one row per parameter
entry, ``P`` of them in all. What is asked for are its products; V itself is formed piece by piece, or
never.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.precision import without_autocast

# Entries of a factor's explicit columns that are formed at once.
CHUNK = 2**24

# Terms of a dot product that are added up at once.
TERMS = 2**16


class Factor(ABC):
    r"""A matrix V ``[P, q]`` over one or several parameters.

    Vectors over the parameters are tuples of tensors ``[k, *shape]``, one per parameter; k counts
    vectors. Coefficients of columns are ``[k, q]``.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the parameters."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Number of columns q."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the factor holds."""

    @abstractmethod
    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        r"""Return :math:`V c` for rows c of ``coefficients[k, q]``, ``[k, *shape]`` per parameter."""

    @abstractmethod
    def project(self, *vectors: Tensor) -> Tensor:
        r"""Return :math:`V^T w` for vectors w, one ``[k, *shape]`` per parameter; ``[k, q]``."""

    @abstractmethod
    def square_sum(self) -> tuple[Tensor, ...]:
        r"""Return the diagonal of :math:`V V^T`, shaped like the parameters."""

    @abstractmethod
    def select(self, index: Tensor) -> Factor:
        """Return the factor of some columns: ``index`` holds their numbers, ascending."""

    @abstractmethod
    def scaled(self, scale: float) -> Factor:
        """Return a multiple of the factor."""

    @abstractmethod
    def mapped(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """Return a factor of the same form, with what a function makes of each of the `tensors`."""

    # ------------------------------------------------------------------ products of two factors

    def gram(self, other: Factor | None = None) -> Tensor:
        r"""Return :math:`V^T V'`, ``[q, q']``.

        Args:
            other: V', a factor over the same parameters; V itself by default, whose Gram matrix may cost
                half.

        Raises:
            ValueError: If ``other`` is over parameters of other shapes.
        """
        if other is None or other is self:
            return self._own_gram()
        check_same(self, other)
        found = other._gram_from(self)
        return self._gram_with(other) if found is None else found

    def gram_and(self, other: Factor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`V^T V` and :math:`V^T V'`, which may share work; see `gram`."""
        return self.gram(), self.gram(other)

    def _own_gram(self) -> Tensor:
        return self._gram_with(self)

    def _gram_with(self, other: Factor) -> Tensor:
        """Return ``V^T V'`` for any two factors: some columns at a time are formed and projected."""
        step, rows = max(1, CHUNK // max(1, self.dim)), []
        for part in torch.arange(self.columns, device=self.device).split(step):
            rows.append(other.project(*self.select(part).explicit()))
        return torch.cat(rows)

    def _gram_from(self, one: Factor) -> Tensor | None:
        """Return ``one^T V`` if it is to be put together from parts of this factor."""
        return None

    # ------------------------------------------------------------------ built on these

    @property
    def dim(self) -> int:
        """Number of rows P."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def dtype(self) -> torch.dtype:
        """The widest data type among the tensors that count."""
        first, *rest = (t.dtype for t in self.tensors if t.is_floating_point())
        for dtype in rest:
            first = torch.promote_types(first, dtype)
        return first

    @property
    def device(self) -> torch.device:
        """Device of the first tensor."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the factor holds."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factor:
        """Return the factor on another device, in another data type."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        return self.mapped(move)

    def formed(self, index: Tensor) -> Factor:
        """Return the factor of some columns, explicit ones."""
        c = torch.zeros(len(index), self.columns, dtype=self.dtype, device=self.device)
        c[torch.arange(len(index), device=index.device), index] = 1
        return Stacked([DenseFactor(rows) for rows in self.apply(c)])

    def explicit(self) -> tuple[Tensor, ...]:
        """Return all columns as parameter-shaped tensors ``[q, *shape]``: V itself."""
        return self.apply(torch.eye(self.columns, dtype=self.dtype, device=self.device))


def check_same(one: Factor, other: Factor) -> None:
    """Raise if two factors are over different parameters.

    Raises:
        ValueError: If so.
    """
    if one.shapes != other.shapes:
        raise ValueError(
            f"The factors are over different parameters, of shapes {_text(one.shapes)} and "
            f"{_text(other.shapes)}."
        )


def _text(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)


@dataclass(eq=False, slots=True)
class DenseFactor(Factor):
    """Explicit columns of one parameter.

    Args:
        rows: ``[q, *shape]``: the columns of V as parameter-shaped tensors.

    Example:
        >>> V = DenseFactor(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> V.gram()
        tensor([[25.,  3.],
                [ 3.,  1.]])
    """

    rows: Tensor

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The parameter's shape, as the only entry."""
        return (self.rows.shape[1:],)

    @property
    def columns(self) -> int:
        """Number of columns q."""
        return len(self.rows)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The columns."""
        return (self.rows,)

    @without_autocast
    def _gram_with(self, other: Factor) -> Tensor:
        if isinstance(other, DenseFactor):
            # long sums in float32 would add noise that grows with the number of terms
            pieces = zip(self._flat.split(TERMS, 1), other._flat.split(TERMS, 1), strict=True)
            return _total(a @ b.mT for a, b in pieces)
        return other.project(self.rows)

    @property
    def _flat(self) -> Tensor:
        # -1 would be ambiguous where there are no columns
        return self.rows.reshape(len(self.rows), self.rows.shape[1:].numel())

    @without_autocast
    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Return ``V c``; see `Factor.apply`."""
        flat = coefficients.to(self.rows.dtype) @ self._flat
        return (flat.reshape(len(flat), *self.rows.shape[1:]),)

    @without_autocast
    def project(self, *vectors: Tensor) -> Tensor:
        """Return ``V^T w``; see `Factor.project`."""
        (w,) = vectors
        return w.reshape(len(w), self.dim).to(self.rows.dtype) @ self._flat.mT

    def square_sum(self) -> tuple[Tensor, ...]:
        """Return the diagonal of ``V V^T``."""
        return (self.rows.square().sum(0),)

    def select(self, index: Tensor) -> DenseFactor:
        """Return the factor of some columns."""
        return DenseFactor(self.rows[index])

    def scaled(self, scale: float) -> DenseFactor:
        """Return a multiple of the factor."""
        return DenseFactor(self.rows * scale)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """Return a factor with other tensors; see `Factor.mapped`."""
        return DenseFactor(function(self.rows))


class _Parts(Factor):
    """A factor that is made of others."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Factor]):
        self.parts = tuple(parts)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The parameters' shapes: each part is over all of them."""
        return self.parts[0].shapes

    @property
    def columns(self) -> int:
        """Number of columns q: each part has all of them."""
        return self.parts[0].columns

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all parts."""
        return tuple(t for part in self.parts for t in part.tensors)

    def scaled(self, scale: float) -> Factor:
        """Return a multiple of the factor."""
        return type(self)([part.scaled(scale) for part in self.parts])

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """Return a factor with other tensors; see `Factor.mapped`."""
        return type(self)([part.mapped(function) for part in self.parts])


class Stacked(_Parts):
    """Factors over different parameters with the same columns: the rows of V stacked.

    Args:
        parts: The factors.

    Raises:
        ValueError: If their numbers of columns differ.
    """

    __slots__ = ()

    def __init__(self, parts: Sequence[Factor]):
        super().__init__(parts)
        if len({part.columns for part in self.parts}) > 1:
            raise ValueError(
                "Stacked: the factors must have the same columns, but they have "
                f"{', '.join(str(part.columns) for part in self.parts)}."
            )

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes of all parameters."""
        return tuple(shape for part in self.parts for shape in part.shapes)

    def _own_gram(self) -> Tensor:
        return _total(part.gram() for part in self.parts)

    def _gram_with(self, other: Factor) -> Tensor:
        if self._matches(other):
            return _total(a.gram(b) for a, b in zip(self.parts, other.parts, strict=True))
        return super()._gram_with(other)

    def gram_and(self, other: Factor) -> tuple[Tensor, Tensor]:
        """Return ``V^T V`` and ``V^T V'``; see `Factor.gram_and`."""
        if not self._matches(other):
            return super().gram_and(other)
        pairs = [a.gram_and(b) for a, b in zip(self.parts, other.parts, strict=True)]
        return _total(own for own, _ in pairs), _total(cross for _, cross in pairs)

    def _matches(self, other: Factor) -> bool:
        """Whether another factor is stacked of parts over the same parameters."""
        if not isinstance(other, Stacked):
            return False
        return [part.shapes for part in self.parts] == [part.shapes for part in other.parts]

    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Return ``V c``; see `Factor.apply`."""
        return tuple(t for part in self.parts for t in part.apply(coefficients))

    def project(self, *vectors: Tensor) -> Tensor:
        """Return ``V^T w``; see `Factor.project`."""
        found, start = [], 0
        for part in self.parts:
            stop = start + len(part.shapes)
            found.append(part.project(*vectors[start:stop]))
            start = stop
        return _total(found)

    def square_sum(self) -> tuple[Tensor, ...]:
        """Return the diagonal of ``V V^T``."""
        return tuple(t for part in self.parts for t in part.square_sum())

    def select(self, index: Tensor) -> Factor:
        """Return the factor of some columns."""
        return Stacked([part.select(index) for part in self.parts])


class Sum(_Parts):
    """Factors over the same parameters with the same columns, added up: a weight in several roles.

    Args:
        parts: The factors.
    """

    __slots__ = ()

    def _own_gram(self) -> Tensor:
        total = _total(part.gram() for part in self.parts)
        for k, one in enumerate(self.parts):
            for two in self.parts[k + 1 :]:
                cross = one.gram(two)
                total = total + cross + cross.mT
        return total

    def _gram_with(self, other: Factor) -> Tensor:
        return _total(part.gram(other) for part in self.parts)

    def _gram_from(self, one: Factor) -> Tensor:
        return _total(one.gram(part) for part in self.parts)

    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Return ``V c``; see `Factor.apply`."""
        return totals(part.apply(coefficients) for part in self.parts)

    def project(self, *vectors: Tensor) -> Tensor:
        """Return ``V^T w``; see `Factor.project`."""
        return _total(part.project(*vectors) for part in self.parts)

    def square_sum(self) -> tuple[Tensor, ...]:
        """Return the diagonal of ``V V^T``, column by column."""
        step = max(1, CHUNK // max(1, self.dim))
        pieces = torch.arange(self.columns, device=self.device).split(step)
        return totals([t.square().sum(0) for t in self.select(k).explicit()] for k in pieces)

    def select(self, index: Tensor) -> Factor:
        """Return the factor of some columns."""
        return Sum([part.select(index) for part in self.parts])


class Concatenated(_Parts):
    """Factors over the same parameters side by side: more columns, from several mini-batches.

    Args:
        parts: The factors.

    Raises:
        ValueError: If they are over different parameters.
    """

    __slots__ = ()

    def __init__(self, parts: Sequence[Factor]):
        super().__init__(parts)
        for part in self.parts[1:]:
            check_same(self.parts[0], part)

    @property
    def columns(self) -> int:
        """Number of columns q of all."""
        return sum(part.columns for part in self.parts)

    def _gram_with(self, other: Factor) -> Tensor:
        return torch.cat([part.gram(other) for part in self.parts])

    def _gram_from(self, one: Factor) -> Tensor:
        return torch.cat([one.gram(part) for part in self.parts], dim=1)

    def _own_gram(self) -> Tensor:
        sizes = [part.columns for part in self.parts]
        blocks: list[list[Tensor]] = [[] for _ in sizes]
        for k, one in enumerate(self.parts):
            for j in range(k):
                blocks[k].append(one.gram(self.parts[j]))
            blocks[k].append(one.gram())
        for k in range(len(sizes)):
            blocks[k] += [blocks[j][k].mT for j in range(k + 1, len(sizes))]
        return torch.cat([torch.cat(row, dim=1) for row in blocks])

    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Return ``V c``; see `Factor.apply`."""
        sizes = [part.columns for part in self.parts]
        pieces = zip(self.parts, coefficients.split(sizes, dim=1), strict=True)
        return totals(part.apply(c) for part, c in pieces)

    def project(self, *vectors: Tensor) -> Tensor:
        """Return ``V^T w``; see `Factor.project`."""
        return torch.cat([part.project(*vectors) for part in self.parts], dim=1)

    def square_sum(self) -> tuple[Tensor, ...]:
        """Return the diagonal of ``V V^T``."""
        return totals(part.square_sum() for part in self.parts)

    def select(self, index: Tensor) -> Factor:
        """Return the factor of some columns."""
        chosen, start = [], 0
        for part in self.parts:
            here = (index >= start) & (index < start + part.columns)
            if bool(here.any()):
                chosen.append(part.select(index[here] - start))
            start += part.columns
        return chosen[0] if len(chosen) == 1 else Concatenated(chosen)


class Centered(_Parts):
    r"""A factor minus the mean of its columns, slot by slot: :math:`V_{sn} - \frac1N \sum_m V_{sm}`.

    Args:
        factor: The factor; its columns are ordered with the data fastest.
        slots: Number of columns per datum.
    """

    __slots__ = ("slots",)

    def __init__(self, factor: Factor, slots: int = 1):
        super().__init__([factor])
        self.slots = slots

    def centered(self, t: Tensor) -> Tensor:
        """Subtract the mean over the data along the last axis ``[..., q]``."""
        t = t.unflatten(-1, (self.slots, -1))
        return (t - t.mean(-1, keepdim=True)).flatten(-2)

    def _own_gram(self) -> Tensor:
        return self.centered(self.centered(self.parts[0].gram()).mT).mT

    def _gram_with(self, other: Factor) -> Tensor:
        return self.centered(self.parts[0].gram(other).mT).mT

    def _gram_from(self, one: Factor) -> Tensor:
        return self.centered(one.gram(self.parts[0]))

    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Return ``V c``; see `Factor.apply`."""
        return self.parts[0].apply(self.centered(coefficients))

    def project(self, *vectors: Tensor) -> Tensor:
        """Return ``V^T w``; see `Factor.project`."""
        return self.centered(self.parts[0].project(*vectors))

    def square_sum(self) -> tuple[Tensor, ...]:
        r"""Return the diagonal of :math:`V V^T`: second moments minus those of the means."""
        N = self.columns // self.slots
        slots = torch.eye(self.slots, dtype=self.dtype, device=self.device)
        means = self.parts[0].apply(slots.repeat_interleave(N, dim=1) / N)
        pairs = zip(self.parts[0].square_sum(), means, strict=True)
        return tuple(total - N * m.square().sum(0) for total, m in pairs)

    def select(self, index: Tensor) -> Factor:
        """Return the factor of some columns, minus the means of all."""
        return self.formed(index)

    def scaled(self, scale: float) -> Factor:
        """Return a multiple of the factor."""
        return Centered(self.parts[0].scaled(scale), self.slots)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """Return a factor with other tensors; see `Factor.mapped`."""
        return Centered(self.parts[0].mapped(function), self.slots)


def totals(terms: Iterable[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Add up what there is one tensor of per parameter; terms are let go of one by one."""
    total = None
    for term in terms:
        total = tuple(term) if total is None else tuple(map(torch.add, total, term))
    return total


def _total(terms: Iterable[Tensor]) -> Tensor:
    """Add tensors up, in the widest of their data types."""
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total
