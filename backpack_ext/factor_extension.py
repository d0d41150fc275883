"""What extensions have in common that keep the factors of layers."""

from __future__ import annotations

from math import sqrt

import torch

from backpack_ext.extension import Extension
from backpack_ext.factor_store import FactorStore
from backpack_ext.unit import Unit

# Which data to keep (None: all), and what to multiply their vectors with.
Selection = tuple[torch.Tensor | None, float]


class FactorExtension(Extension):
    """Keeps inputs and vectors of all layers, up to a number of bytes.

    A store has the vectors of the sweep in ``"columns"``, the gradient in ``"slopes"``, and in
    ``"bytes"`` what they take. Beyond ``max_memory`` they are let go, and only counted.
    """

    max_memory: float = float("inf")
    # whether to note numbers in ``"marks"`` by which another pass over the same data is recognised
    marked = False

    def selection(self, batch: int) -> Selection:
        """Return which columns to keep of a batch of that size, and their factor."""
        return None, 1.0

    def slope_selection(self, batch: int) -> Selection:
        """Return which gradients to keep, and N: of the data's own losses ``N r sum_t l_nt``."""
        return None, float(batch)

    def absorb(self, store: dict, unit: Unit) -> None:
        """Keep one layer's inputs and vectors."""
        columns = self._store(store, "columns")
        columns.data, columns.scale = self.selection(unit.batch)
        if self.needs_scale:
            columns.scale *= sqrt(unit.inverse_scale)
        self._add(store, "columns", unit)

    def absorb_gradient(self, store: dict, units: list[Unit]) -> None:
        """Keep the gradient at layers."""
        slopes = self._store(store, "slopes")
        for unit in units:
            slopes.data, slopes.scale = self.slope_selection(unit.batch)
            self._add(store, "slopes", unit)

    @staticmethod
    def _store(store: dict, name: str) -> FactorStore:
        if name not in store:
            factors = store[name] = FactorStore()
            store.setdefault("bytes", 0)
            # inputs that both have are held once
            factors.held = store.setdefault("held", factors.held)
        return store[name]

    def _add(self, store: dict, name: str, unit: Unit) -> None:
        other = store.get("slopes" if name == "columns" else "columns")
        store["bytes"] += store[name].add(unit, None if other is None else other.inputs_of(unit))
        if self.marked:
            marks = store.setdefault("marks", {})
            marks[name] = marks.get(name, 0.0) + _size(unit)
        if store["bytes"] > self.max_memory:
            for factors in (store.get("columns"), store.get("slopes")):
                if factors is not None:
                    factors.forget()

    def settle(self, store: dict) -> None:
        """Note the end of a chunk of columns."""
        if "columns" in store:
            store["columns"].close_chunk()

    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Raise: subclasses that can add up batches do.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError


def _size(unit: Unit) -> float:
    """Return a number that depends on all of a layer's inputs and vectors."""
    with torch.no_grad():
        total = sum(float(g.abs().sum(dtype=torch.float64)) for g in unit.cotangents)
        for site in (site for site in unit.sites if site.keeps_input):
            x = site.input()
            total += float(x.abs().sum(dtype=torch.float64)) / x.numel()
    return total
