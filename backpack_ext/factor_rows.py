"""The rows that Kronecker factors are second moments of: KFAC-expand and KFAC-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack_ext.normal import OneHot
from backpack_ext.rules.base import InputMoment
from backpack_ext.unit import Unit, stack_inputs

APPROX = ("expand", "reduce")


@dataclass(frozen=True)
class FactorRows:
    """Brings a layer's inputs and vectors to rows.

    ======== ======================================== =========================================
    approx   A averages over                          B sums over
    ======== ======================================== =========================================
    expand   ``a[n,s]``, all positions of all data    ``b[v,n,s]``
    reduce   ``mean_s a[n,s]``, one row per datum     ``sum_s b[v,n,s]``
    ======== ======================================== =========================================

    Where some positions do not exist (see `sharing`), only those that do; with ``normalize="sum"`` the
    mean and the sum change places.

    Args:
        approx: ``"expand"`` or ``"reduce"``.
        dtype: Data type of the factors; float32 or the network's own if that is wider by default.
    """

    approx: str
    dtype: torch.dtype | None = None

    def dtype_of(self, t: Tensor) -> torch.dtype:
        """Return the data type of factors that belong to a tensor."""
        return self.dtype or torch.promote_types(t.dtype, torch.float32)

    def cast(self, t: Tensor) -> Tensor:
        """Return a tensor in the factors' data type."""
        dtype = self.dtype_of(t)
        return t if t.dtype == dtype else t.to(dtype)

    def inputs(self, a: Tensor, unit: Unit | None = None) -> Tensor:
        """Return the rows that A averages over, ``[g,r,i]``; only those that exist, if a unit says."""
        a = self.cast(a)
        existing = None if unit is None else unit.existing
        if existing is None:
            return a.flatten(1, 2) if a.shape[2] == 1 or self.approx == "expand" else a.mean(2)
        if self.approx == "expand":
            return a[:, existing]
        counts = existing.sum(1)
        some = counts > 0
        totals = a.sum(2)[:, some]
        return totals if unit.normalize == "sum" else totals / counts[some, None]

    def is_one_hot(self, unit: Unit) -> bool:
        """Whether a layer's inputs are one-hot; nothing is formed that `inputs_of` does not need."""
        if "weight" not in unit.parameters:  # a bias's inputs are ones, and not kept
            return False
        if self.approx == "reduce":
            return unit.mean_a is None and isinstance(unit.a, OneHot)
        return unit.moment_shape is None and isinstance(unit.a, OneHot)

    def inputs_of(self, units: Sequence[Unit]) -> Tensor:
        """Return the rows ``[(L g),r,i]`` of layers of equal shape that share no positions of others."""
        if self.approx == "reduce" and all(u.mean_a is not None for u in units):
            means = [self.cast(u.mean_a) for u in units]
            return means[0] if len(means) == 1 else torch.cat(means)
        if len(units) == 1:
            return self.inputs(units[0].a, units[0])
        return self.inputs(stack_inputs(units))

    def keep(self, unit: Unit) -> bool:
        """Keep a row per datum of a layer only, if that is less; see `Extension.bring_to_rows`."""
        if self.approx == "expand" or unit.sites[0].sharing is not None or unit.b.shape[3] == 1:
            return False
        if self.is_one_hot(unit):
            return False
        means = self.inputs_of([unit]) if "weight" in unit.parameters else None
        unit.keep_rows(means, self.cast(unit.b).sum(3, keepdim=True))
        return True

    def moments_of(self, units: Sequence[Unit], with_sum: bool) -> list[InputMoment] | None:
        """Return sums over the rows of layers of equal shape, where rows are not needed; else None."""
        found = []
        for unit in units:
            part = unit.input_moment(self.dtype, with_sum)
            if part is None:
                return None
            found.append(part)
        return found

    def vectors(self, b: Tensor, divisors: Tensor | None = None) -> Tensor:
        """Return the rows that B sums over, ``[g,r,o]``; ``divisors[n]`` turn sums into means."""
        b = self.cast(b)
        if self.approx == "expand" and b.stride(3) == 1 and b.shape[3] > 1:
            # pixels are last in memory: a copy that leaves them so takes a third of the time
            return b.permute(0, 4, 1, 2, 3).flatten(2).mT
        if b.shape[3] == 1 or self.approx == "expand":
            b = b.flatten(1, 3) if divisors is None else b.squeeze(3)
        else:
            b = b.sum(3)
        if divisors is not None:
            b = b / divisors[:, None]
        return b.flatten(1, -2)

    def averages_vectors(self, unit: Unit) -> bool:
        """Whether B takes the mean over positions, and A the sum."""
        return self.approx == "reduce" and unit.normalize == "sum" and "weight" in unit.parameters

    def divisors(self, unit: Unit) -> Tensor | None:
        """Return the number of positions per datum if B takes the mean over them; None otherwise."""
        if not self.averages_vectors(unit) or unit.existing is None:
            return None
        return unit.existing.sum(1).clamp(min=1)

    def normalize(self, unit: Unit) -> str | None:
        """Return how positions were treated; None if there was one for each datum."""
        if self.approx == "expand" or unit.positions == 1:
            return None
        return "mean" if unit.existing is None else unit.normalize

    def constants(self, a: Tensor, unit: Unit) -> Tensor:
        """Return what a bias's inputs, which are ones, become in the rows of A, ``[r]``."""
        if self.approx == "reduce" and unit.normalize == "sum" and unit.existing is not None:
            counts = unit.existing.sum(1)
            return counts[counts > 0].to(a.dtype)
        return a.new_ones(a.shape[1 if a.dim() == 3 else 0])

    def one_hot_moment(self, unit: Unit, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Return the diagonal of A (in expand the tokens' frequencies) as ``[1,i]``, and rows."""
        a, existing = unit.a, unit.existing
        n, s = a.shape
        expand = self.approx == "expand"
        values, tokens = a.weights(dtype), a.index.flatten()
        count = n * s if expand else n
        if existing is not None:
            count = int((existing if expand else existing.any(1)).sum())
        if a.bags is not None or not expand:  # entries of a row may meet in one feature: they add up
            owner = a.rows if expand else a.data
            keys, inverse = torch.unique(owner * a.size + tokens, return_inverse=True)
            values = values.new_zeros(len(keys)).index_add_(0, inverse, values)
            tokens = keys % a.size
            if not expand:
                values = values / self._positions(unit, s)[keys // a.size]
        squares = values.new_zeros(a.size).index_add_(0, tokens, values.square())
        return squares[None] / max(1, count), count

    def _positions(self, unit: Unit, s: int) -> Tensor:
        """Return what one-hot inputs of each datum are divided by in reduce, ``[n]``."""
        ones = torch.ones(unit.batch, device=unit.a.index.device)
        if unit.existing is None:
            return ones * s
        return ones if unit.normalize == "sum" else unit.existing.sum(1).clamp(min=1)


def append_row(A: Tensor, last: Tensor) -> Tensor:
    """Append a bias's row ``last[g,i+1]``, and its column, to ``A[g,i,i]``, or to a diagonal."""
    if A.dim() == 2:
        return torch.cat([A, last[:, -1:]], dim=1)
    g, d, _ = A.shape
    joined = A.new_empty(g, d + 1, d + 1)
    joined[:, :-1, :-1], joined[:, :-1, -1], joined[:, -1] = A, last[:, :-1], last
    return joined
