"""Hessian diagonals of each datum: h at the outputs of layers, and what layers make of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack_ext.bare import RouteVectors
from backpack_ext.diagonals.recursion import Recursion
from backpack_ext.diagonals.rule import Diagonals, Step, Unpacking, call, rule_of
from backpack_ext.diagonals.unknown import by_signs, complex_numbers
from backpack_ext.errors import UnsupportedError
from backpack_ext.extension import Extension
from backpack_ext.graph import Capture
from backpack_ext.own_pass import in_a_pass_of_its_own
from backpack_ext.pending import Pending
from backpack_ext.products import Route
from backpack_ext.site import Site
from backpack_ext.unit import Unit


class PerDatum:
    """What the recursion of one extension brings to the layers' outputs.

    The layers' inputs are those that other extensions have, so a layer's diagonal for datum n is
    ``sum_s h a^2``. For parameters outside of layers h is carried on one datum at a time.

    Args:
        sites: The layers' calls, each with the places where its vectors are taken; it may grow.
    """

    def __init__(self, sites: Mapping[Site, list[Capture]]):
        self.sites = sites
        self.places: dict[Node, list[tuple[Site, Capture]]] = {}
        self.known: set[Site] = set()
        self.h: dict[Site, Tensor] = {}
        # weak, because the recursion holds `observe`
        self._recursion: Callable[[], Recursion | None] = lambda: None

    def prepare(self, recursion: Recursion) -> None:
        """Look where to take h, before a recursion starts or goes on."""
        self._recursion = weakref.ref(recursion)
        for site, captures in self.sites.items():
            if site in self.known:
                continue
            self.known.add(site)
            for capture in captures:
                self.places.setdefault(capture.edge.node, []).append((site, capture))
                if isinstance(capture.vectors, RouteVectors):
                    recursion.watched.add(capture.edge.node)

    def observe(self, node: Node, h: Mapping[int, Tensor], grads: Diagonals | None) -> None:
        """Take h at the outputs of an operation."""
        for site, capture in self.places.get(node, ()):
            output = capture.edge.output_nr
            found = h.get(output)
            if found is None:
                continue
            if isinstance(capture.vectors, RouteVectors):
                g = None if grads is None else grads[output]
                v = self._down(site, node, output, found, g, capture.vectors)
            else:
                v = (found * capture.factor**2).unsqueeze(0)
                if capture.vectors is not None:
                    v = capture.vectors(node, output, v)
                elif not site.broadcast:
                    v = v.reshape(1, *site.out_shape)
            self.h[site] = v if site not in self.h else self.h[site] + v

    def finish(self, ext: Extension, multiplier: float) -> dict:
        """Return what the extension makes of it."""
        store, pending = {}, Pending()
        for site in self.sites:
            if site.error is not None:
                continue  # its parameters are treated as outside of layers, or reported
            if site in self.h:
                if self.h[site].is_complex():
                    raise complex_numbers(f"what reads {site.label}")
                pending.shared.append((site, self.h[site] / multiplier))
            elif any(self._is_passed_over(capture.edge.node) for capture in self.sites[site]):
                raise UnsupportedError(
                    f"{type(ext).__name__}(batch=True): {site.label} lies inside of a composition of "
                    "elementwise operations that is crossed as one. Use batch=False."
                )
        self.h = {}
        for sites, hs in pending.take_shared():
            rule = ext.rule_for(sites[0].module, sites[0].rule)
            if rule is not None:  # else reported as uncovered
                ext.absorb(store, Unit(sites, hs, rule))
        return store

    def _is_passed_over(self, node: Node) -> bool:
        return node in self._recursion().inside

    def _down(
        self, site: Site, node: Node, output: int, h: Tensor, g: Tensor | None, vectors: RouteVectors
    ) -> Tensor:
        """Carry h on to a parameter outside of layers, one datum at a time: ``[1,n,*shape]``."""
        reading, N = vectors.reading, vectors.N
        owner = reading.owner(h.shape[reading.axis], N, h.device)
        shape = [1] * h.dim()
        shape[reading.axis] = -1
        rows = []
        for n in range(N):
            mask = (owner == n).reshape(shape)
            parts = h * mask, None if g is None else g * mask
            rows.append(self._cross(site, node, output, parts, vectors.route))
        return torch.stack(rows).unsqueeze(0)

    def _cross(
        self, site: Site, node: Node, output: int, parts: tuple[Tensor, Tensor | None], route: Route
    ) -> Tensor:
        nodes: dict[int, Node] = {0: node}
        arrived: dict[int, dict[int, tuple[Tensor, Tensor | None]]] = {0: {output: parts}}
        total = None
        for place, step in enumerate(route):
            if place not in nodes:
                continue
            node, given = nodes[place], arrived.pop(place)
            if self._is_passed_over(node):
                raise UnsupportedError(
                    f"{site.label}: for batch=True its way to the data must not be part of a "
                    "composition of elementwise operations. Use batch=False."
                )
            outputs = range(len(node._input_metadata))
            hs = [given[k][0] if k in given else None for k in outputs]
            gs = [given[k][1] if k in given else None for k in outputs]
            crossed, moved = self._one(node, hs, gs, [entry for entry, _, _ in step])
            for entry, k, target in step:
                if crossed[entry] is None:
                    continue
                child = node.next_functions[entry][0]
                like = child._input_metadata[k]
                new_h = crossed[entry].sum_to_size(like.shape)
                new_g = moved[entry]
                if new_g is not None:
                    new_g = new_g.sum_to_size(like.shape).to(like.dtype)
                if target is None:
                    total = new_h if total is None else total + new_h
                    continue
                nodes[target], sums = child, arrived.setdefault(target, {})
                if k in sums:
                    new_h = sums[k][0] + new_h
                    new_g = new_g if sums[k][1] is None else sums[k][1] + new_g
                sums[k] = new_h, new_g
        return total

    def _one(
        self, node: Node, hs: Diagonals, gs: Diagonals, entries: Sequence[int]
    ) -> tuple[Diagonals, Diagonals]:
        """Carry h and g across one operation."""
        need = [False] * len(node.next_functions)
        for entry in entries:
            need[entry] = True
        rule, known = rule_of(node), any(g is not None for g in gs)
        step = Step(node, hs, gs if known else None, need)
        recursion = self._recursion()

        def cross() -> Diagonals:
            if rule is None:
                return by_signs(step, recursion.signs, recursion.refuse)
            return rule.cross(step)

        # checkpointed tensors are handed out once per pass, and each datum reads them
        crossed = in_a_pass_of_its_own(cross) if Unpacking.once else cross()
        return crossed, call(node, gs) if known else [None] * len(need)
