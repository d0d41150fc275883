"""Hessian diagonals of each datum: h at the outputs of layers, and what layers make of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack_ext.bare import RouteVectors, between, down
from backpack_ext.diagonals.recursion import Recursion
from backpack_ext.diagonals.rule import Diagonals, Step, Unpacking, call, rule_of
from backpack_ext.diagonals.unknown import by_signs, complex_numbers
from backpack_ext.errors import UnsupportedError
from backpack_ext.extension import Extension
from backpack_ext.graph import Capture
from backpack_ext.own_pass import in_a_pass_of_its_own
from backpack_ext.pending import Pending
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
        incomplete = self._recursion().incomplete
        for site in self.sites:
            if site.error is not None:
                continue  # its parameters are treated as outside of layers, or reported
            if incomplete and any(id(p) in incomplete for p in site.parameters.values()):
                continue
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
        cross = partial(self._cross, site)
        rows = []
        for n in range(N):
            mask = (owner == n).reshape(shape)
            pair = h * mask, None if g is None else g * mask
            found = down(node, output, pair, vectors.route, cross, _between, _add)
            rows.append(h.new_zeros(site.input().shape) if found is None else found[0])
        return torch.stack(rows).unsqueeze(0)

    def _cross(
        self, site: Site, node: Node, given: dict[int, Pair], entries: Sequence[int]
    ) -> list[Pair | None]:
        """Carry h and g across one operation."""
        if self._is_passed_over(node):
            raise UnsupportedError(
                f"{site.label}: for batch=True its way to the data must not be part of a "
                "composition of elementwise operations. Use batch=False."
            )
        nothing = None, None
        hs, gs = zip(*(given.get(k, nothing) for k in range(len(node._input_metadata))), strict=True)
        known = any(g is not None for g in gs)
        need = [k in entries for k in range(len(node.next_functions))]
        step = Step(node, hs, gs if known else None, need)
        rule, ext = rule_of(node), self._recursion().ext

        def cross() -> Diagonals:
            if rule is None:
                return by_signs(step, ext.signs, ext.refuses_curved_glue)
            return rule.cross(step)

        # checkpointed tensors are handed out once per pass, and each datum reads them
        crossed = in_a_pass_of_its_own(cross) if Unpacking.once else cross()
        moved = call(node, gs) if known else [None] * len(need)
        pairs = zip(crossed, moved, strict=False)  # a rule may return less than autograd does
        return [None if new_h is None else (new_h, new_g) for new_h, new_g in pairs]


# h and g at a tensor; None for g where second derivatives are left out.
Pair = tuple[Tensor, Tensor | None]


def _between(pair: Pair, like) -> Pair:
    h, g = pair
    return h.sum_to_size(like.shape), None if g is None else between(g, like)


def _add(one: Pair, other: Pair) -> Pair:
    return one[0] + other[0], other[1] if one[1] is None else one[1] + other[1]
