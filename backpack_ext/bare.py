"""Parameters that no layer's rule covers, found in the graph.

Class tokens, position embeddings, layer scales, attention's and recurrent layers' weights, home-made
norms: somewhere on its way from the parameter to the loss the graph gains the axis of the data. At
the output of that operation, the *cut*, the cotangents of all data are still apart.

A cut that is a matrix product is a linear layer in all but name and is treated as one, see
`backpack_ext.products`. From any other cut back to the parameter, cotangents are carried one datum at
a time, with the others' rows zeroed: N vector-Jacobian products of the operations in between, exact
for any operation, and little for what is broadcast.

Where the data are at a candidate cut is not guessed from sizes but tried, the first time: vectors
of some of the data are sent, and must arrive at rows of these data alone.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Generator, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from backpack_ext.context import SuspendBackpack
from backpack_ext.graph import Capture, Reach, sites_at, without_upstream
from backpack_ext.losses import Layout
from backpack_ext.own_pass import in_a_pass_of_its_own
from backpack_ext.product_layers import Found, product_sites
from backpack_ext.products import PRODUCTS, SELECTIONS, Product, Route, below, find_product
from backpack_ext.reading import Reading
from backpack_ext.rules.elementwise import ElementwiseRule
from backpack_ext.site import NoChecks, Site, roots
from backpack_ext.sweep import silent

# Entries of the masked cotangents that are formed at once.
CHUNK = 2**24

# How many operations a parameter may pass before it meets the data.
DEPTH = 32


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
        N, axis, checked = reach.whole
    else:
        N, axis, checked = some.batch, some.batch_axis, type(some.checks) is dict
    if not N:
        return
    probe = _Probe(start, layout, like) if checked and layout is not None and not reach.coupled else None
    readers = _readers(reach.nodes)
    found: dict[int, Found] = {}
    for p in wanted:
        if p not in _known:
            _known[p] = _Known(*_owner(p), {}, {})
    searches = [(_cuts(p, readers), _known[p].readings) for p in wanted]
    for p, cuts in zip(wanted, _answered(searches, N, axis, probe), strict=True):
        if cuts is None:
            continue
        known = _known[p]
        if calls[id(p)]:
            cuts = [cut for cut in cuts if not _recorded(cut[0].node, p, readers)]
        products = [
            find_product(edge.node, edge.output_nr, reading, route, p, known.readings)
            for edge, reading, route in cuts
        ]
        checks = known.checks if checked else NoChecks()
        found[id(p)] = Found(p, known.module, known.name, checks, cuts, products, known.readings)
    layers = product_sites(list(found.values()), readers, N, axis, made)
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


def _recorded(cut: Node, p: nn.Parameter, readers: dict[tuple[Node, int], list[Node]]) -> bool:
    """Whether a cut is within a recorded call of a layer of the parameter."""
    level = [cut]
    for _ in range(8):  # operations within a layer: a product, reshapes, the addition of a bias
        for node in level:
            if any(q is p for site in sites_at(node) for q in site.parameters.values()):
                return True
        level = [r for node in level for r in readers.get((node, 0), ())]
    return False


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


def _readers(nodes: Collection[Node]) -> dict[tuple[Node, int], list[Node]]:
    """Return which nodes read each output of each node."""
    found: dict[tuple[Node, int], list[Node]] = {}
    for node in nodes:
        for child, index in node.next_functions:
            if child is not None:
                found.setdefault((child, index), []).append(node)
    return found


Output = tuple[Node, int]
Cuts = list[tuple[GradientEdge, Reading, Route]]


class _Question(NamedTuple):
    """Outputs at one distance from a parameter: where in them are the data?

    Args:
        depth: How many operations away from the parameter they are.
        inner: The outputs, each with the shape of what it reads on the way from the parameter.
    """

    depth: int
    inner: dict[Output, tuple[int, ...]]


Answer = dict[Output, Reading | None]


def _cuts(
    p: nn.Parameter, readers: dict[Output, list[Node]]
) -> Generator[_Question, Answer, Cuts | None]:
    """Find a cut on each way from a parameter to the loss, level by level.

    Args:
        p: The parameter.
        readers: The graph, downwards.

    Yields:
        What has to be known about the next level.

    Returns:
        The cuts; None if some way has none.
    """
    leaf = get_gradient_edge(p).node
    inside: set[tuple[Node, int]] = {(leaf, 0)}  # outputs between the parameter and the cuts
    cuts: dict[tuple[Node, int], Reading] = {}
    level = [(leaf, 0, tuple(p.shape))]
    for depth in range(DEPTH):
        found: dict[tuple[Node, int], tuple[int, ...]] = {}  # with the size of what they read
        for node, index, shape in level:
            here = readers.get((node, index))
            if not here:
                return None
            for reader in here:
                outputs = range(len(reader._input_metadata))
                used = [k for k in outputs if (reader, k) in readers] or [0]
                for k in used:
                    if (reader, k) not in inside and (reader, k) not in cuts:
                        found[reader, k] = shape
        if not found:
            return [
                (GradientEdge(node, k), reading, _route(node, leaf, inside))
                for (node, k), reading in cuts.items()
            ]
        # what only rearranges the parameter has no data yet, whatever its sizes
        moved = {output for output in found if output[0].name() in SELECTIONS}
        others = {output: inner for output, inner in found.items() if output not in moved}
        readings = dict.fromkeys(moved)
        if others:
            readings.update((yield _Question(depth, others)))
        level = []
        for (reader, k), reading in readings.items():
            if reading is not None:
                cuts[reader, k] = reading
            else:
                inside.add((reader, k))
                level.append((reader, k, tuple(reader._input_metadata[k].shape)))
    return None


def _answered(
    searches: Sequence[tuple[Generator[_Question, Answer, Cuts | None], dict]],
    N: int,
    axis: int,
    probe: _Probe | None,
) -> list[Cuts | None]:
    """Run searches side by side: what several ask at a time is tried in the same passes.

    Args:
        searches: Each with the readings that its parameter is known to have; they grow.
        N: Batch size.
        axis: Where layers have their data.
        probe: Sends vectors of some of the data; None if they cannot be told apart: sizes decide.

    Returns:
        The searches' results.
    """
    results: list[Cuts | None] = [None] * len(searches)
    answers: dict[int, Answer | None] = dict.fromkeys(range(len(searches)))
    while answers:
        questions: dict[int, _Question] = {}
        for k, answer in answers.items():
            try:
                questions[k] = searches[k][0].send(answer)
            except StopIteration as end:
                results[k] = end.value
        if probe is None:
            answers = {k: _guesses(question, N, axis) for k, question in questions.items()}
            continue
        tried = _tried(
            {
                output
                for k, question in questions.items()
                for output, key in _keys(question, N, axis).items()
                if key not in searches[k][1]
            },
            N,
            axis,
            probe,
        )
        answers = {k: _answer(q, searches[k][1], tried, N, axis) for k, q in questions.items()}
    return results


def _shape(output: Output) -> tuple[int, ...]:
    return tuple(output[0]._input_metadata[output[1]].shape)


def _keys(question: _Question, N: int, axis: int) -> dict[Output, tuple]:
    """Return what tells a parameter's outputs apart from pass to pass."""
    return {
        output: (question.depth, output[0].name(), output[1], inner, _shape(output), N, axis)
        for output, inner in question.inner.items()
    }


def _guesses(question: _Question, N: int, axis: int) -> Answer:
    """Answer by sizes alone."""
    # the rows of a product are those of its other factor
    return {
        output: _guess(() if output[0].name() in PRODUCTS else inner, _shape(output), N, axis)
        for output, inner in question.inner.items()
    }


def _tried(
    outputs: Collection[Output], N: int, axis: int, probe: _Probe
) -> dict[Output, tuple[bool, list[Reading]]]:
    """Return whether anything arrived at outputs, and which readings agree with what did."""
    order = list(outputs)
    left = {output: _candidates(_shape(output), N, axis) for output in order}
    seen = dict.fromkeys(order, False)
    for chosen, arrived in probe([GradientEdge(*output) for output in order]) if order else ():
        for output, g in zip(order, arrived, strict=True):
            if g is not None and g.any():
                seen[output] = True
                left[output] = [r for r in left[output] if _apart(g, r, chosen, N)]
    return {output: (seen[output], left[output]) for output in order}


def _answer(question: _Question, known: dict, tried: dict, N: int, axis: int) -> Answer:
    """Return which outputs have the data apart, and where; None where they have not."""
    answer: Answer = {}
    for output, key in _keys(question, N, axis).items():
        if key in known:
            answer[output] = known[key]
            continue
        seen, left = tried[output]
        answer[output] = next(iter(left), None)
        # where only zeros arrived, or too few rows to tell, it is tried again the next time
        if seen and len(left) < 2:
            known[key] = answer[output]
    return answer


class _Probe:
    """Sends vectors of half of the data through the graph, so that each pair is told apart once."""

    def __init__(self, start: GradientEdge, layout: Layout, like: Tensor):
        self.start, self.layout = start, layout
        pattern = torch.arange(like.numel(), device=like.device).reshape(like.shape)
        self.parts = layout.split(((pattern % 7 + 1) * (1 - pattern % 2 * 2)).to(like.dtype)[None])

    def __call__(self, edges: Sequence[GradientEdge]):
        """Yield, for each half, which data were sent, and what arrived at the edges."""
        data = torch.arange(self.layout.batch, device=self.parts.device)
        for bit in range((self.layout.batch - 1).bit_length()):
            for value in (0, 1):
                chosen = (data >> bit) % 2 == value
                seed = self.layout.join(self.parts * chosen[:, None, None])[0]
                with silent(), SuspendBackpack():
                    yield (
                        chosen,
                        torch.autograd.grad(
                            [self.start], edges, [seed], retain_graph=True, allow_unused=True
                        ),
                    )


def _candidates(shape: tuple[int, ...], N: int, axis: int) -> list[Reading]:
    """Return the readings that a shape admits, the likeliest first."""
    found = [Reading(a, True) for a, size in enumerate(shape) if size == N]
    for a, size in enumerate(shape):
        if size > N and size % N == 0:
            found += [Reading(a, True), Reading(a, False)]
    # stable: among equals the order above
    return sorted(found, key=lambda r: (r.axis != axis, not r.first))


def _guess(inner: tuple[int, ...], outer: tuple[int, ...], N: int, axis: int) -> Reading | None:
    """Return the likeliest reading along an axis that the input has not, by sizes alone."""
    inner = (1,) * (len(outer) - len(inner)) + inner
    for reading in _candidates(outer, N, axis):
        if reading.axis and outer[reading.axis] != N:
            continue  # k N rows are likely in front only
        size = inner[reading.axis] if reading.axis < len(inner) else 1
        if N == 1 or size % N:
            return reading
    return None


def _apart(g: Tensor, reading: Reading, chosen: Tensor, N: int) -> bool:
    """Whether only rows of the chosen data are non-zero."""
    owner = reading.owner(g.shape[reading.axis], N, g.device)
    return not g.index_select(reading.axis, (~chosen)[owner].nonzero().squeeze(1)).any()


def _route(cut: Node, leaf: Node, inside: set[tuple[Node, int]]) -> Route:
    """Return the way from a cut down to the parameter."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        for child, k in node.next_functions:
            if (child, k) in inside and child is not leaf and child not in order:
                visit(child)
        order[node] = None

    visit(cut)
    place = {node: k for k, node in enumerate(reversed(order))}
    return tuple(
        tuple(
            (i, k, place.get(child))
            for i, (child, k) in enumerate(node.next_functions)
            if (child, k) in inside
        )
        for node in place
    )


def _vectors(N: int, reading: Reading, route: Route, product: Product | None):
    """Return what turns cotangents at a cut into per-sample vectors of a parameter."""
    if product is None or len(product.node._input_metadata[0].shape) > 2:
        return _Vectors(N, reading, route)
    return _ProductVectors(N, reading, route, product.left, product.reading)


class _Vectors:
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


class _ProductVectors(_Vectors):
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
    """Return a cotangent's product with the Jacobian of the route, node by node.

    A nested backward pass from the cut would also take ways around the route: an earlier step of a
    recurrent cell reaches the same parameter.
    """
    nodes: dict[int, Node] = {0: node}
    arrived: dict[int, dict[int, Tensor]] = {0: {index: g}}
    total = None
    for place, step in enumerate(route):
        if place not in nodes:
            continue  # no gradient arrived
        node, given = nodes[place], arrived.pop(place)
        arguments = [given.get(k) for k in range(len(node._input_metadata))]
        # C++ nodes are callable, those of a custom autograd.Function have `apply`
        found = node(*arguments) if callable(node) else node.apply(*arguments)
        found = found if isinstance(found, tuple) else (found,)
        for i, k, target in step:
            if found[i] is None:
                continue
            child = node.next_functions[i][0]
            like = child._input_metadata[k]
            # what the engine does between nodes: undo broadcasting and casts
            cotangent = found[i].to_dense() if found[i].is_sparse else found[i]
            cotangent = cotangent.sum_to_size(like.shape).to(like.dtype)
            if target is None:
                total = cotangent if total is None else total + cotangent
            else:
                nodes[target], sums = child, arrived.setdefault(target, {})
                sums[k] = sums[k] + cotangent if k in sums else cotangent
    if total is None:
        raise RuntimeError(f"{nodes[0].name()} returned no gradient for a parameter behind it.")
    return total
