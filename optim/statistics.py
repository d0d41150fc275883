"""What an optimizer gathers in a backward pass: moments of inputs and vectors."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from backpack_ext import Extension, UnsupportedError
from backpack_ext.extension import Vectors, check_samples
from backpack_ext.factor_rows import APPROX, FactorRows, append_row
from backpack_ext.rules.base import InputMoment
from backpack_ext.unit import Unit, stack_vectors
from curvature import StructuredMatrix
from optim.layers import Layer, Layers

if TYPE_CHECKING:
    from backpack_ext.site import Site

_numbers = itertools.count()

FISHER = ("empirical", "mc", "exact")


class Moments:
    """What backward passes have brought of one layer.

    Attributes:
        layer: The layer.
        A: Moment of the inputs, a mean over ``rows``, ``[g,i,i]``; None before the first.
        B: Moment of the vectors, a sum, ``[g,o,o]``; None before the first.
        rows: How many rows A is the mean of; ``[g]`` where that differs between the parts of a weight.
    """

    def __init__(self, layer: Layer):
        self.layer = layer
        self.A: StructuredMatrix | None = None
        self.B: StructuredMatrix | None = None
        self.rows: int | Tensor = 0

    def add(self, other: Moments) -> None:
        """Add those of another batch, whose loss is a further term of the total."""
        self.add_A(other.A, other.rows)
        self.add_B(other.B)

    def add_A(self, A: StructuredMatrix | None, rows: int | Tensor) -> None:
        """Average A with that of further rows."""
        if A is None:
            return
        total = self.rows + rows
        if self.A is not None:
            part = rows / (total.clamp(min=1) if isinstance(total, Tensor) else max(1, total))
            A = self.A + (A - self.A) * part
        self.A, self.rows = A, total

    def add_B(self, B: StructuredMatrix | None) -> None:
        """Add to B."""
        if B is not None:
            self.B = B if self.B is None else self.B + B


def _whole(layer: Layer, calls: dict[int | None, _Call]) -> Moments | None:
    """Return the moments of a layer, put together if it was called part by part; None if parts miss."""
    if None in calls:
        return calls[None].moments
    if len(calls) < layer.form.groups:
        return None
    parts = [calls[k].moments for k in range(layer.form.groups)]
    if any(m.A is None or m.B is None for m in parts):
        return None
    whole = Moments(layer)
    whole.A, whole.B = _joined_parts([m.A for m in parts]), _joined_parts([m.B for m in parts])
    rows = [float(m.rows) for m in parts]
    whole.rows = torch.tensor(rows, dtype=torch.float32, device=whole.A.device)
    return whole


def _joined_parts(parts: list[StructuredMatrix]) -> StructuredMatrix:
    """Concatenate matrices ``[1,d,d]`` to ``[g,d,d]``."""
    first = parts[0]
    tensors = [torch.cat(ts) for ts in zip(*(m.tensors for m in parts), strict=True)]
    return type(first)(tensors, first.dim, **first.options)


class _Call:
    """Moments of one use of a weight: of the whole, or of one part of it."""

    def __init__(self, layer: Layer, key: tuple, part: int | None):
        self.moments, self.key, self.part = Moments(layer), key, part
        self.sites: dict[Site, None] = {}
        self.later: Unit | None = None

    def is_new(self, unit: Unit) -> bool:
        """Note a unit's calls; whether some were not known."""
        known = len(self.sites)
        self.sites.update(dict.fromkeys(unit.sites))
        return len(self.sites) > known


class Statistics(Extension):
    r"""Gathers :math:`A` and :math:`B` of layers, as an optimizer wants them.

    A and B are those of `backpack_ext.KFAC`, but hardly ever formed: a layer's rows go to the
    optimizer's ``moment`` at once, which projects them, :math:`P(K^T A K)` for example, and they are
    forgotten. Where A can be summed with less work than its rows can be listed (KFAC-expand of
    convolutions), it goes to ``formed_moment(layer, factor, A, part)``, if
    ``forms_moment(layer, factor, rows)`` says so.
    Nothing is left on the parameters. What several backward passes bring adds up until `take` or
    `forget` is called.

    Args:
        owner: The optimizer's name, for messages.
        source: The optimizer, which has ``moment(layer, factor, x, scale, part)``: it returns what to
            keep of the moment ``scale sum_r x_r x_r^T`` of ``x[g,r,d]``, or of the diagonal
            ``scale x[g,d]`` of one, as ``[g,d,d]``. ``factor`` is ``"A"`` or ``"B"``, ``part`` None or
            which of the layer's matrices is meant.
        layers: The layers that the optimizer knows of.
        approx: ``"expand"`` or ``"reduce"``.
        fisher: ``"empirical"``, ``"mc"`` or ``"exact"``.
        mc_samples: Number of samples for ``"mc"``.
        loss_terms: Number of terms that a mean loss is taken over, for ``"empirical"``; read from the
            loss if None.
        dtype: Data type of the moments; float32 or the network's own if that is wider if None.
        generator: For ``"mc"``.

    Raises:
        ValueError: If an option is none of those listed.
    """

    def __init__(
        self,
        owner: str,
        source: Any,
        layers: Layers,
        approx: str,
        fisher: str,
        mc_samples: int,
        loss_terms: float | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ):
        for name, value, allowed in (("approx", approx, APPROX), ("fisher", fisher, FISHER)):
            if value not in allowed:
                raise ValueError(f"{owner}: {name}={value!r}; expected one of {allowed}.")
        check_samples(owner, mc_samples)
        if loss_terms is not None and not 0 < loss_terms < float("inf"):
            raise ValueError(f"{owner}: loss_terms={loss_terms!r}; expected a number > 0.")
        # nothing lands there, but two optimizers in one block need names of their own
        super().__init__(f"{owner.lower()}_statistics_{next(_numbers)}", "skip", generator)
        self.source, self.layers = source, layers
        self.fisher, self.loss_terms = fisher, loss_terms
        self.rows = FactorRows(approx, dtype)
        self.vectors = Vectors("gradient" if fisher == "empirical" else fisher, mc_samples)
        # one column for all data mixes them where a layer couples them; independent samples do not
        self.needs_independent_samples = fisher == "exact"
        self.max_columns = 1000
        self.reached = False  # whether it has met a layer, of whatever kind
        self.ran = False  # whether a pass ended since the last `take` or `forget`
        self._pending: dict[Tensor, Moments] = {}
        if self.needs_scale:
            self.without_loss = (
                f" Or tell {owner} the number of terms that the loss is a mean over, loss_terms=."
            )

    @property
    def needs_scale(self) -> bool:
        """The gradient of a loss carries r c; outer products of it are to carry it once."""
        return self.fisher == "empirical" and self.loss_terms is None

    # ------------------------------------------------------------------ what has been gathered

    def take(self) -> list[Moments]:
        """Return what all passes since the last call have brought, and begin anew."""
        found = [m for w, m in self._pending.items() if self.layers.of_weight(w) is m.layer]
        self.forget()
        return [m for m in found if m.A is not None and m.B is not None]

    def forget(self) -> None:
        """Begin anew."""
        self.ran = self.reached = False
        self._pending.clear()

    # ------------------------------------------------------------------ a backward pass

    def absorb(self, store: dict, unit: Unit) -> None:
        """Take the inputs and vectors of one layer."""
        call = self._call(store, unit)
        if call is None:
            return
        divisors = self._divisors(call, unit) if self.rows.averages_vectors(unit) else None
        b = self.rows.vectors(unit.b, divisors)
        call.moments.add_B(self._moment(call, "B", b, self._factor(unit)))
        if call.is_new(unit):
            if unit.sites[0].shared:  # calls may arrive from several losses: joined at the end
                call.later = unit
            else:
                self._add_inputs(call, unit)

    def _divisors(self, call: _Call, unit: Unit) -> Tensor | None:
        """Return the number of positions per datum if B takes the mean over them; None otherwise."""
        joined = Unit(list(dict.fromkeys([*call.sites, *unit.sites])), (), unit.rule)
        divisors = self.rows.divisors(joined)
        if divisors is not None and call.moments.B is not None and len(joined.sites) > len(call.sites):
            raise UnsupportedError(
                f'{unit.sites[0].label}: in sharing(normalize="sum") its calls reach different losses '
                'of one backward pass. Use normalize="mean", or one backward pass per loss.'
            )
        return divisors

    def absorb_all(self, store: dict, units: list[Unit]) -> None:
        """Take layers of equal shape, in single products where their structures are equal too."""
        unit, self.reached = units[0], True
        together = len(units) > 1 and not (unit.sites[0].shared or unit.rule.elementwise)
        calls = [self._call(store, u) for u in units] if together else []
        if not together or None in calls or not self._stackable(calls, units):
            for u in units:
                self.absorb(store, u)
            return
        layers = [call.moments.layer for call in calls]
        b = self.rows.vectors(stack_vectors(units))
        for call, B in zip(calls, self.source.moments(layers, "B", b, self._factor(unit)), strict=True):
            call.moments.add_B(B)
        new = [(call, u) for call, u in zip(calls, units, strict=True) if call.is_new(u)]
        if new:
            a = self.rows.inputs_of([u for _, u in new])
            x = self._joined(new[0][0].moments.layer, a, unit)
            layers = [call.moments.layer for call, _ in new]
            found = self.source.moments(layers, "A", x, 1 / x.shape[1])
            for (call, _), A in zip(new, found, strict=True):
                call.moments.add_A(A, x.shape[1])

    def _stackable(self, calls: list[_Call], units: list[Unit]) -> bool:
        unit = units[0]
        layers = [call.moments.layer for call in calls]
        return (
            len({id(layer) for layer in layers}) == len(layers)
            and not any(u.sites[0].parts or self.rows.is_one_hot(u) for u in units)
            and not (self.rows.approx == "expand" and unit.moment_shape is not None)
            and all(u.existing is None for u in units)
            and self.source.stackable(layers)
        )

    def _call(self, store: dict, unit: Unit) -> _Call | None:
        """Return what is known of a unit's calls; None if they are to be ignored."""
        if unit.rule.elementwise:
            return None
        layer = self.layers.of_unit(unit, self.rows.is_one_hot(unit))
        if layer is None:
            return None
        part = unit.part("weight")
        part = None if part is None else part[0]
        calls = store.setdefault(layer.weight, {})
        # what tells uses of a weight apart: the rule, and the parameters in their roles
        key = (*unit.key[: 1 + 2 * len(unit.parameters)], part is None)
        if any(call.key != key or call.moments.layer is not layer for call in calls.values()):
            self.layers.refuse(layer.weight)  # it is read in two ways: no Kronecker product
            return None
        if part not in calls:
            calls[part] = _Call(layer, key, part)
        return calls[part]

    def _add_inputs(self, call: _Call, unit: Unit) -> None:
        layer = call.moments.layer
        if self.rows.is_one_hot(unit):
            x, count = self.rows.one_hot_moment(unit, self.rows.dtype_of(unit.module.weight))
            call.moments.add_A(self._moment(call, "A", x, 1.0), count)
            return
        sums = self._sums(layer, unit)
        if sums is not None:
            A, last = sums.means()
            A = A if last is None else append_row(A, last)
            call.moments.add_A(self.source.formed_moment(layer, "A", A, call.part), sums.rows)
            return
        x = self._joined(layer, self.rows.inputs_of([unit]), unit)
        call.moments.add_A(self._moment(call, "A", x, 1 / max(1, x.shape[1])), x.shape[1])

    def _sums(self, layer: Layer, unit: Unit) -> InputMoment | None:
        """Return sums over a layer's rows where that is less work than to list them."""
        if self.rows.approx != "expand" or unit.moment_shape is None:
            return None
        rows = sum(s.out_shape.numel() for s in unit.sites) // (layer.form.rows * layer.form.groups)
        if not self.source.forms_moment(layer, "A", rows):
            return None
        return unit.input_moment(self.rows.dtype, with_sum=layer.bias is not None)

    def _joined(self, layer: Layer, a: Tensor, unit: Unit) -> Tensor:
        """Append the inputs of a joined bias to rows ``a[g,r,i]``."""
        if layer.bias is None:
            return a
        ones = self.rows.constants(a, unit)[:, None].expand(len(a), -1, 1)
        return torch.cat([a, ones], dim=2)

    def _moment(self, call: _Call, factor: str, x: Tensor, scale: float) -> StructuredMatrix:
        """Return a layer's moment, or that of the part of it that a call is."""
        return self.source.moment(call.moments.layer, factor, x, scale, call.part)

    def _factor(self, unit: Unit) -> float:
        """What outer products of vectors are multiplied with."""
        if self.fisher != "empirical":
            return 1.0
        return unit.inverse_scale if self.loss_terms is None else float(self.loss_terms)

    def finish(self, store: dict) -> list[tuple[nn.Parameter, Any]]:
        """Add what one backward pass has brought to what is waiting for the step; return nothing."""
        self.ran = True
        for weight, calls in store.items():
            layer = self.layers.of_weight(weight)
            if layer is None or any(call.moments.layer is not layer for call in calls.values()):
                continue  # refused
            for call in calls.values():
                if call.later is not None:
                    self._add_inputs(call, Unit(list(call.sites), (), call.later.rule))
            moments = _whole(layer, calls)
            if moments is None:
                continue
            waiting = self._pending.get(weight)
            if waiting is None or waiting.layer is not layer:
                self._pending[weight] = moments
            else:
                waiting.add(moments)
        return []

    # ------------------------------------------------------------------ what a sum of ours is not

    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Refuse: what an optimizer gathers belongs to its step.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "An optimizer's statistics belong to its step, not to a data set. Collect backpack_ext.KFAC."
        )

    def check_processes(self) -> None:
        """Refuse: the optimizer itself averages over processes, at its step.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "An optimizer averages its statistics itself. Pass process_group to the optimizer, and none "
            "to backpack(...)."
        )
