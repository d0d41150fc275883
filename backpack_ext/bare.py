"""Parameters that no layer's rule covers, through autograd's own vector-Jacobian products.

Class tokens, position embeddings, layer scales, attention's and recurrent layers' weights, home-made
norms: somewhere on its way from the parameter to the loss the graph gains the axis of the data. At
the output of that operation, the *cut*, the cotangents of all data are still apart. From there
back to the parameter they are carried one datum at a time, with the others' rows zeroed. That is
exact for any operation. It costs N vector-Jacobian products of the operations in between: little
for what is broadcast, more than a rule for a matrix.

Where the data are at a candidate cut is not guessed from sizes but tried, the first time: vectors
of some of the data are sent, and must arrive at rows of these data alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from backpack_ext.context import SuspendBackpack
from backpack_ext.errors import UnsupportedError
from backpack_ext.graph import Capture, Reach
from backpack_ext.losses import Layout
from backpack_ext.rules.elementwise import ElementwiseRule
from backpack_ext.sharing import Segments, sharing
from backpack_ext.site import Site, roots
from backpack_ext.sweep import silent

# Entries of the masked cotangents that are formed at once.
CHUNK = 2**24

# How many operations a parameter may pass before it meets the data.
DEPTH = 32


class BareRule(ElementwiseRule):
    """A parameter as its own layer: what arrives are its per-sample vectors ``[v,n,*shape]``."""

    weight, bias = None, None

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


class Reading(NamedTuple):
    """Where the data are in a tensor: along ``axis``, of size k N, as ``[N, k]`` or as ``[k, N]``.

    Or along an axis of ragged rows, by the ``segment``-th segments of the `sharing` block; ``rows`` are
    the data of these rows in the present batch.
    """

    axis: int
    first: bool
    segment: int | None = None
    rows: Tensor | None = None

    def owner(self, size: int, N: int, device: torch.device) -> Tensor:
        """Return the datum of each position along the axis."""
        if self.rows is not None:
            return self.rows.to(device)
        position = torch.arange(size, device=device)
        return position // (size // N) if self.first else position % N


class _Known(NamedTuple):
    """What is known of a parameter after it was met once."""

    module: nn.Module
    name: str
    readings: dict[tuple, Reading | None]
    checks: dict[tuple, int]


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

# Route from a cut down to the parameter: (input of the node, output of that input's node, further
# route); None at the parameter. Numbers only, since what hooks hold must not hold nodes.
Route = tuple[tuple[int, int, "Route | None"], ...]


def add_bare(
    reach: Reach, start: GradientEdge, layout: Layout | None, like: Tensor, made: dict[int, Site]
) -> None:
    """Add Sites for trainable parameters that no recorded call covers, where that can be done.

    Args:
        reach: The graph behind a loss; its batch size is that of its Sites. It grows.
        start: Edge of the loss's input (or of the model's output).
        layout: How the data are laid out there; None if that is not known.
        like: A tensor of that shape, dtype and device.
        made: The Sites made in this backward pass, by the parameter's id. It grows.
    """
    covered = {id(p) for site in reach.sites if site.error is None for p in site.parameters.values()}
    wanted = [p for key, p in reach.parameters.items() if key not in covered]
    if not wanted or not reach.sites:
        return
    some = next(iter(reach.sites))
    N, checked = some.batch, type(some.checks) is dict
    if not N:
        return
    probe = _Probe(start, layout, like) if checked and layout is not None and not reach.coupled else None
    readers = _readers(reach.nodes)
    for p in wanted:
        if p not in _known:
            _known[p] = _Known(*_owner(p), {}, {})
        known, leaf = _known[p], get_gradient_edge(p)
        cuts = _cuts(leaf.node, p, readers, some, known.readings, probe)
        if cuts is None:
            continue
        site = made.get(id(p))
        if site is None:
            checks = known.checks if checked else some.checks
            arguments = (known.module, known.name, BARE, {"parameter": p}, p, N, some.batch_axis)
            site = made[id(p)] = Site(*arguments, p, checks)
            site.broadcast = True
        reach.sites[site] = [
            Capture(edge, vectors=_Vectors(N, reading, route)) for edge, reading, route in cuts
        ]
        reach.sources[site] = leaf


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


def _cuts(
    leaf: Node,
    p: nn.Parameter,
    readers: dict[tuple[Node, int], list[Node]],
    site: Site,
    known: dict[tuple, Reading | None],
    probe: _Probe | None,
) -> list[tuple[GradientEdge, Reading, Route]] | None:
    """Return a cut on each way from a parameter to the loss.

    Args:
        leaf: The parameter's node.
        p: The parameter.
        readers: The graph, downwards.
        site: Any Site: its batch size and axis.
        known: Readings that were tried before; grows.
        probe: Sends vectors of some of the data; None if they cannot be told apart.

    Returns:
        None if some way has none.
    """
    N = site.batch
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
        readings = _readings(found, depth, N, site.batch_axis, known, probe, site.sharing)
        level = []
        for (reader, k), reading in readings.items():
            if reading is not None:
                cuts[reader, k] = reading
            else:
                inside.add((reader, k))
                level.append((reader, k, tuple(reader._input_metadata[k].shape)))
    return None


def _readings(
    found: dict[tuple[Node, int], tuple[int, ...]],
    depth: int,
    N: int,
    axis: int,
    known: dict[tuple, Reading | None],
    probe: _Probe | None,
    context: sharing | None,
) -> dict[tuple[Node, int], Reading | None]:
    """Return which outputs have the data apart, and where; None where they have not.

    Args:
        found: The outputs, each with the shape of what it reads on the way from the parameter.
        depth: How many operations away from the parameter they are.
        N: Batch size.
        axis: Where layers have their data.
        known: Outputs that were tried before; grows by those that told.
        probe: As in `_cuts`; without one, sizes decide.
        context: The `sharing` block of the forward pass, if in one.
    """
    segments = () if context is None else context.segments
    # numbers of ragged rows are other ones in the next batch: if they differ, names stand for them
    lengths = tuple(s.length for s in segments)
    names = {length: -1 - k for k, length in enumerate(lengths)}
    # otherwise equal shapes may be read differently, and each output is tried for itself
    distinct = len({N, *lengths}) > len(lengths)

    def kind(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(names.get(size, size) for size in shape) if names else shape

    shapes = {output: tuple(output[0]._input_metadata[output[1]].shape) for output in found}
    if probe is None:
        _check_lengths(segments, N)
        return {
            output: _guess(inner, shapes[output], N, axis, segments) for output, inner in found.items()
        }
    keys = {
        (reader, k): (depth, reader.name(), k, kind(inner), kind(shapes[reader, k]), N, axis)
        for (reader, k), inner in found.items()
    }
    unknown = [output for output, key in keys.items() if not distinct or key not in known]
    left = {output: _candidates(shapes[output], N, axis, segments) for output in unknown}
    seen = dict.fromkeys(unknown, False)
    for chosen, arrived in probe([GradientEdge(*output) for output in unknown]) if unknown else ():
        for output, g in zip(unknown, arrived, strict=True):
            if g is not None and g.any():
                seen[output] = True
                left[output] = [r for r in left[output] if _apart(g, r, chosen, N)]
    for output in unknown:
        # where only zeros arrived, or too few rows to tell, it is tried again the next time
        if distinct and seen[output] and len(left[output]) < 2:
            # without the rows themselves, which are other ones in the next batch
            known[keys[output]] = left[output][0]._replace(rows=None) if left[output] else None
    return {
        output: next(iter(left[output]), None)
        if output in left and not (distinct and key in known)
        else _bound(known[key], segments)
        for output, key in keys.items()
    }


def _bound(reading: Reading | None, segments: Sequence[Segments]) -> Reading | None:
    """Return a reading with the present batch's rows."""
    if reading is None or reading.segment is None:
        return reading
    return reading._replace(rows=segments[reading.segment].owner)


def _check_lengths(segments: Sequence[Segments], N: int) -> None:
    """Raise if sizes do not tell by what an axis is to be read."""
    lengths = [s.length for s in segments if not (s.length == N and s.plain)]
    if len(lengths) > len(set(lengths)) or N in lengths:
        raise UnsupportedError(
            f"Segments of lengths {lengths} for {N} data: parameters without a rule cannot be told by "
            "sizes which of them, or whether none, holds where they meet the data, and "
            "check_layers=False (or a loss whose rows are unknown) forbids to try. Allow the checks, or "
            "freeze these parameters."
        )


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


def _candidates(
    shape: tuple[int, ...], N: int, axis: int, segments: Sequence[Segments]
) -> list[Reading]:
    """Return the readings that a shape admits, the likeliest first."""
    found = [Reading(a, True) for a, size in enumerate(shape) if size == N]
    found += [
        Reading(a, True, k, s.owner)
        for a, size in enumerate(shape)
        for k, s in enumerate(segments)
        if size == s.length and not (size == N and s.plain)
    ]
    if not segments and shape and shape[0] > N and shape[0] % N == 0:
        found += [Reading(0, True), Reading(0, False)]
    # stable: among equals the order above
    return sorted(found, key=lambda r: (r.axis != axis, not r.first))


def _guess(
    inner: tuple[int, ...], outer: tuple[int, ...], N: int, axis: int, segments: Sequence[Segments]
) -> Reading | None:
    """Return the likeliest reading along an axis that the input has not, by sizes alone."""
    inner = (1,) * (len(outer) - len(inner)) + inner
    for reading in _candidates(outer, N, axis, segments):
        size = inner[reading.axis] if reading.axis < len(inner) else 1
        if N == 1 or (size % N if reading.rows is None else size != outer[reading.axis]):
            return reading
    return None


def _apart(g: Tensor, reading: Reading, chosen: Tensor, N: int) -> bool:
    """Whether only rows of the chosen data are non-zero."""
    owner = reading.owner(g.shape[reading.axis], N, g.device)
    return not g.index_select(reading.axis, (~chosen)[owner].nonzero().squeeze(1)).any()


def _route(node: Node, leaf: Node, inside: set[tuple[Node, int]]) -> Route:
    """Return the way from a cut down to the parameter."""
    return tuple(
        (i, k, None if child is leaf else _route(child, leaf, inside))
        for i, (child, k) in enumerate(node.next_functions)
        if (child, k) in inside
    )


class _Vectors:
    """Turns cotangents at a cut into per-sample vectors of a parameter; it holds no node."""

    def __init__(self, N: int, reading: Reading, route: Route):
        self.N, self.reading, self.route = N, reading, route

    def __call__(self, node: Node, index: int, g: Tensor) -> Tensor:
        """Return ``[v,n,*parameter.shape]`` from ``g[v,*shape]`` at an output of a node."""
        axis = 1 + self.reading.axis
        owner = self.reading.owner(g.shape[axis], self.N, g.device)
        shape = [1] * g.dim()
        shape[axis] = -1
        step = max(1, CHUNK // max(1, prod(g.shape[1:])))
        data = torch.arange(self.N, device=g.device)
        masks = [(owner == part[:, None]).reshape(len(part), *shape[1:]) for part in data.split(step)]
        with torch.no_grad():
            rows = [
                torch.cat([self._products(node, index, mask * column) for mask in masks]) for column in g
            ]
        return torch.stack(rows)

    def _products(self, node: Node, index: int, columns: Tensor) -> Tensor:
        """Return the vector-Jacobian products of columns ``[c,*shape]`` along the route."""

        def product(column: Tensor) -> Tensor:
            return _down(node, index, column, self.route)

        with warnings.catch_warnings():
            # torch loops over the columns by itself where an operation has no batching rule
            warnings.filterwarnings("ignore", message="There is a performance drop")
            try:
                return torch.vmap(product)(columns)
            except RuntimeError:  # an operation that cannot be vectorised at all
                return torch.stack([product(column) for column in columns])


def _down(node: Node, index: int, g: Tensor, route: Route) -> Tensor:
    """Return a cotangent's product with the Jacobian of the route, node by node.

    A nested backward pass would also take ways around the route: an earlier step of a recurrent
    cell reaches the same parameter.
    """
    arguments = [None] * len(node._input_metadata)
    arguments[index] = g
    # C++ nodes are callable, those of a custom autograd.Function have `apply`
    found = node(*arguments) if callable(node) else node.apply(*arguments)
    found = found if isinstance(found, tuple) else (found,)
    parts = []
    for i, k, rest in route:
        if found[i] is not None:
            child = node.next_functions[i][0]
            like = child._input_metadata[k]
            # what the engine does between nodes: undo broadcasting and casts
            cotangent = found[i].sum_to_size(like.shape).to(like.dtype)
            parts.append(cotangent if rest is None else _down(child, k, cotangent, rest))
    if not parts:
        raise RuntimeError(f"{node.name()} returned no gradient for a parameter behind it.")
    return sum(parts)
