"""Vectors that are not handed to the extensions at once."""

from __future__ import annotations

from torch import Tensor

from backpack_ext.site import Site
from backpack_ext.unit import Unit


class Pending:
    """Vectors that wait for others: for further calls of a layer, or for layers of equal shape.

    Small layers are joined because their cost is overhead, and so are those of which a few rows are all
    that is needed: what is made of these is made in a row, by code that stays in the caches, instead of
    between the large products of the backward pass. What waits is bounded.

    Args:
        rows: Whether layers may be brought to rows first, see `Extension.bring_to_rows`.
    """

    SMALL = 2**14  # entries of input and output of a layer that is worth joining
    ROWS = 2**14  # entries of the rows of a layer that is worth joining
    LIMIT = 2**22  # entries that may wait

    def __init__(self, rows: bool = False):
        self.rows = rows
        self.shared: list[tuple[Site, Tensor]] = []
        self.small: dict[tuple, list[tuple[list[Site], list[Tensor]]]] = {}
        self.units: dict[tuple, list[Unit]] = {}
        self.size = 0

    def add_small(self, site: Site, g: Tensor) -> bool:
        """Have a layer's vectors wait for those of layers like it, if the layer is small."""
        # layers in a `sharing` block may be read differently although their shapes are equal
        if site.sharing is not None or (site.x is None and site.keeps_input):
            return False
        size = g.numel() + site.in_shape.numel()
        if size > self.SMALL:
            return False
        shapes = [p.shape for p in site.parameters.values()]
        key = (type(site.module), site.rule, site.in_shape, site.in_dtype, g.shape, g.dtype, g.device)
        key = (*key, site.broadcast, site.batch_axis)
        self.small.setdefault((*key, *shapes, *site.parameters), []).append(([site], [g]))
        self.size += size
        return True

    def add_rows(self, unit: Unit) -> None:
        """Have a layer that was brought to rows wait, for those of equal shape if its rows are few."""
        b, roles = unit.b, tuple(unit.parameters)
        key, size = (unit.rule, roles, b.shape, b.dtype, b.device), b.numel()
        if unit.mean_a is not None:
            key, size = (*key, unit.mean_a.shape, unit.mean_a.dtype), size + unit.mean_a.numel()
        self.units.setdefault(key if size <= self.ROWS else (id(unit),), []).append(unit)
        self.size += size

    @property
    def full(self) -> bool:
        """Whether enough layers wait."""
        return self.size > self.LIMIT

    def take_small(self) -> tuple[list[list[tuple[list[Site], list[Tensor]]]], list[list[Unit]]]:
        """Return what waits, layers of equal shape together, and forget it.

        Returns:
            The small layers, and those that were brought to rows.
        """
        found = list(self.small.values()), list(self.units.values())
        self.small, self.units, self.size = {}, {}, 0
        return found

    def take_shared(self):
        """Return the waiting calls, those of one layer together, and forget them."""
        layers: dict[tuple, tuple[list[Site], list[Tensor]]] = {}
        # recorded calls first: an extension may have a rule of its own for their module
        for site, g in sorted(self.shared, key=_in_graph):
            roles = (*site.parameters, *map(id, site.parameters.values()))
            parts = tuple(site.parts.items())
            family = site.rule if site.rule is None else site.rule.family or site.rule
            sites, gs = layers.setdefault((family, *roles, *parts), ([], []))
            sites.append(site)
            gs.append(g)
        self.shared = []
        return list(layers.values())


def _in_graph(call: tuple[Site, Tensor]) -> bool:
    rule = call[0].rule
    return rule is not None and rule.in_graph
