"""Parameters that no layer's rule covers, found in the graph.

Class tokens, position embeddings, layer scales, attention's and recurrent layers' weights, home-made
norms: somewhere on its way from the parameter to the loss the graph gains the axis of the data. At
the output of that operation, the *cut*, the cotangents of all data are still apart.

A cut that is a matrix product is a linear layer in all but name and is treated as one, see
`backpack_ext.products`. From any other cut back to the parameter, cotangents are carried one datum at
a time, with the others' rows zeroed: N vector-Jacobian products of the operations in between, exact
for any operation, and little for what is broadcast.

Cuts are found by `backpack_ext.cuts`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from math import prod
from operator import add
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from backpack_ext.cuts import Cuts, Data, Probe, answered, cuts_of, readers_of
from backpack_ext.graph import Capture, Reach, without_upstream
from backpack_ext.layout import Layout
from backpack_ext.own_pass import call, in_a_pass_of_its_own
from backpack_ext.product_layers import Found, product_sites
from backpack_ext.products import Product, Route, below, find_product
from backpack_ext.reading import Reading
from backpack_ext.rules.elementwise import ElementwiseRule
from backpack_ext.site import NoChecks, Site, roots

# Entries of the masked cotangents that are formed at once.
CHUNK = 2**24

# What is carried from a cut to a parameter.
V = TypeVar("V")


class BareRule(ElementwiseRule):
    """A parameter as its own layer: what arrives are its per-sample vectors ``[v,n,*shape]``."""

    weight, bias = None, None
    in_graph = True

    def normalized(self, site: Site, x: Tensor) -> Tensor:
        """Return ones: a shift has constant inputs."""
        return torch.ones_like(x)

    def inputs(self, site: Site) -> Tensor:
        """Return ones ``[n,1,d]``."""
        p = site.input()
        return p.new_ones(1, 1, 1).expand(site.batch, 1, p.numel())

    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Return the per-sample vectors as ``[v,n,1,d]``."""
        return g.reshape(*g.shape[:2], 1, -1)


BARE = BareRule()


class _Known(NamedTuple):
    """What is known of a parameter after it was met once."""

    module: nn.Module
    name: str
    readings: dict[tuple, Reading | None]
    checks: dict[tuple, int]


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def add_bare(
    reach: Reach, start: GradientEdge, layout: Layout | None, like: Tensor, made: dict[tuple, Site]
) -> None:
    """Add Sites for uses of trainable parameters that no recorded call covers, where possible.

    Args:
        reach: The graph behind a loss; its batch size is that of its Sites. It grows.
        start: Edge of the loss's input (or of the model's output).
        layout: How the data are laid out there; None if that is not known.
        like: A tensor of that shape, dtype and device.
        made: The Sites made in this backward pass, by what they stand for. It grows.
    """
    _spread_errors(reach.sites)
    calls = Counter(
        id(p) for site in reach.sites if site.error is None for p in site.parameters.values()
    )
    wanted = [p for key, p in reach.parameters.items() if reach.uses[key] > calls[key]]
    some = next(iter(reach.sites), None)
    if not wanted or (some is None and reach.whole is None):
        return
    if some is None:
        N, axis, checked, context = reach.whole
    else:
        N, axis, checked = some.batch, some.batch_axis, type(some.checks) is dict
        context = some.sharing
    if not N:
        return
    probe = Probe(start, layout, like) if checked and layout is not None and not reach.coupled else None
    data = Data(N, axis, () if context is None else context.segments)
    readers = readers_of(reach.nodes)
    found: dict[int, Found] = {}
    for p in wanted:
        if p not in _known:
            _known[p] = _Known(*_owner(p), {}, {})
    searches = [(cuts_of(p, readers), _known[p].readings) for p in wanted]
    for p, cuts in zip(wanted, answered(searches, data, probe), strict=True):
        if cuts is None:
            continue
        known = _known[p]
        if calls[id(p)]:
            cuts = _not_recorded(cuts, p, reach)
        products = [
            find_product(edge.node, edge.output_nr, reading, route, p, N, known.readings)
            for edge, reading, route in cuts
        ]
        checks = known.checks if checked else NoChecks()
        found[id(p)] = Found(p, known.module, known.name, checks, cuts, products, known.readings)
    layers = product_sites(list(found.values()), readers, N, axis, context, made)
    outermost = without_upstream(start.node, {edge.node for edge in layers.values()})
    for site, edge in layers.items():
        reach.sites[site] = [Capture(edge)]
        if edge.node in outermost:
            reach.sources[site] = edge
    treated = {id(p) for site in layers for p in site.parameters.values()}
    for key, f in found.items():
        if key in treated or calls[key]:
            continue
        site = made.get((key,))
        if site is None:
            arguments = (f.module, f.name, BARE, {"parameter": f.p}, f.p, N, axis)
            site = made[(key,)] = Site(*arguments, f.p, f.checks)
            site.broadcast = True
        reach.sites[site] = [
            Capture(edge, vectors=_vectors(N, reading, route, product))
            for (edge, reading, route), product in zip(f.cuts, f.products, strict=True)
        ]
        reach.sources[site] = get_gradient_edge(f.p)


def _not_recorded(cuts: Cuts, p: nn.Parameter, reach: Reach) -> Cuts:
    """Return the cuts that belong to no recorded call: each call has the one nearest to its output."""
    left = {edge.node for edge, _, _ in cuts}
    for site, captures in reach.sites.items():
        if all(q is not p for q in site.parameters.values()):
            continue
        level = [captures[0].edge.node]
        for _ in range(8):  # operations within a layer: a product, reshapes, the addition of a bias
            own = left.intersection(level)
            if own:
                left -= own
                break
            level = [child for node in level for child, _ in node.next_functions if child is not None]
    return [cut for cut in cuts if cut[0].node in left]


def _spread_errors(sites: Collection[Site]) -> None:
    """Have no rule treat a part of the calls that use a parameter: the others would be missing."""
    broken = [site for site in sites if site.error is not None]
    while broken:
        bad = {id(p): site for site in broken for p in site.parameters.values()}
        broken = []
        for site in sites:
            other = next((bad[id(p)] for p in site.parameters.values() if id(p) in bad), None)
            if site.error is None and other is not None and not site.rule.in_graph:
                site.error = f"it is also used by {other.label}: {other.error}"
                broken.append(site)


def _owner(p: nn.Parameter) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, and the parameter's path."""
    for model in roots:
        for path, module in model.named_modules():
            for name, q in module._parameters.items():
                if q is p:
                    return module, f"{path + '.' if path else ''}{name}"
    return nn.Module(), "a parameter of no extended module"


def _vectors(N: int, reading: Reading, route: Route, product: Product | None):
    """Return what turns cotangents at a cut into per-sample vectors of a parameter."""
    if product is None or len(product.node._input_metadata[0].shape) > 2:
        return RouteVectors(N, reading, route)
    return _ProductVectors(N, reading, route, product.left, product.reading)


class RouteVectors:
    """Turns cotangents at a cut into per-sample vectors of a parameter; it holds no node."""

    def __init__(self, N: int, reading: Reading, route: Route):
        self.N, self.reading, self.route = N, reading, route

    def __call__(self, node: Node, index: int, g: Tensor) -> Tensor:
        """Return ``[v,n,*parameter.shape]`` from ``g[v,*shape]`` at an output of a node."""
        axis, (v, N) = 1 + self.reading.axis, (len(g), self.N)
        owner = self.reading.owner(g.shape[axis], N, g.device)
        shape = [1] * g.dim()
        shape[axis] = -1
        step = max(1, CHUNK // max(1, prod(g.shape[1:])))
        rows = []
        with torch.no_grad():
            for part in torch.arange(v * N, device=g.device).split(step):
                mask = (owner == (part % N)[:, None]).reshape(len(part), *shape[1:])
                rows.append(self._each(node, index, g[part // N].mul_(mask), self.route))
        return torch.cat(rows).unflatten(0, (v, N))

    @staticmethod
    def _each(node: Node, index: int, columns: Tensor, route: Route) -> Tensor:
        """Return the vector-Jacobian products of columns ``[c,*shape]`` along the route."""

        def product(column: Tensor) -> Tensor:
            return _down(node, index, column, route)

        with warnings.catch_warnings():
            # torch loops over the columns by itself where an operation has no batching rule
            warnings.filterwarnings("ignore", message="There is a performance drop")
            try:
                return in_a_pass_of_its_own(lambda: torch.vmap(product)(columns))
            except RuntimeError:  # an operation that cannot be vectorised at all
                return torch.stack([in_a_pass_of_its_own(partial(product, c)) for c in columns])


class _ProductVectors(RouteVectors):
    """The same where the cut is a matrix product: its own part costs one product, not N."""

    def __init__(self, N: int, reading: Reading, route: Route, left: bool, rows: Reading):
        super().__init__(N, reading, route)
        self.left, self.rows = left, rows

    def __call__(self, node: Node, index: int, g: Tensor) -> Tensor:
        """Return ``[v,n,*parameter.shape]`` from ``g[v,*shape]`` at the product's output."""
        entry, output, _ = self.route[0][0]
        product = Product(node, self.left, self.rows, None, self.route)
        a = self.rows.split(in_a_pass_of_its_own(product.inputs), self.N)
        b = self.rows.split(g.mT if self.left else g, self.N, 1)
        child, rest = node.next_functions[entry][0], below(self.route)
        step = max(1, CHUNK // max(1, a.shape[-1] * b.shape[-1]))
        with torch.no_grad():
            rows = []
            for column in b:
                parts = []
                for k in range(0, self.N, step):
                    G = column[k : k + step].mT @ a[k : k + step]  # [n, o, i]
                    G = G if self.left else G.mT
                    parts.append(self._each(child, output, G, rest) if rest else G)
                rows.append(torch.cat(parts))
        return torch.stack(rows)


def _down(node: Node, index: int, g: Tensor, route: Route) -> Tensor:
    """Return a cotangent's product with the Jacobian of the route."""

    def cross(node: Node, given: dict[int, Tensor], _) -> Sequence[Tensor | None]:
        return call(node, [given.get(k) for k in range(len(node._input_metadata))])

    total = down(node, index, g, route, cross, between, add)
    if total is None:
        raise RuntimeError(f"{node.name()} returned no gradient for a parameter behind it.")
    return total


def between(cotangent: Tensor, like) -> Tensor:
    """Do what the engine does between operations: undo broadcasting and casts.

    Args:
        cotangent: What an operation returned.
        like: What autograd knows of the tensor that it belongs to.
    """
    cotangent = cotangent.to_dense() if cotangent.is_sparse else cotangent
    return cotangent.sum_to_size(like.shape).to(like.dtype)


def down(
    node: Node,
    index: int,
    value: V,
    route: Route,
    cross: Callable[[Node, dict[int, V], Sequence[int]], Sequence[V | None]],
    fit: Callable[[V, Any], V],
    add: Callable[[V, V], V],
) -> V | None:
    """Carry a value from a cut to the parameter, node by node.

    A nested backward pass from the cut would also take ways around the route: an earlier step of a
    recurrent cell reaches the same parameter.

    Args:
        node: The cut.
        index: Which of its outputs the value is at.
        value: The value.
        route: The way.
        cross: Maps a node, the values at its outputs, and which of its inputs are on the way, to the
            values at its inputs; None where there is none.
        fit: Brings a value to a tensor, as `between` does.
        add: Adds two values up.

    Returns:
        The value at the parameter; None if nothing arrived there.
    """
    nodes, arrived, total = {0: node}, {0: {index: value}}, None
    for place, step in enumerate(route):
        if place not in nodes:
            continue  # nothing arrived
        node = nodes[place]
        found = cross(node, arrived.pop(place), [entry for entry, _, _ in step])
        for entry, k, target in step:
            if found[entry] is None:
                continue
            child = node.next_functions[entry][0]
            part = fit(found[entry], child._input_metadata[k])
            if target is None:
                total = part if total is None else add(total, part)
            else:
                nodes[target], sums = child, arrived.setdefault(target, {})
                sums[k] = add(sums[k], part) if k in sums else part
    return total
