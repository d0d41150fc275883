"""Walking the autograd graph: which Sites, parameters and couplings a loss reaches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack_ext import data_parallel
from backpack_ext.site import Site

if TYPE_CHECKING:
    from backpack_ext.sharing import sharing

# Key under which a node's metadata lists the Sites whose output the node produced.
TAG = "backpack_ext.sites"

# Key under which the metadata of a model's output says how its data are laid out.
WHOLE = "backpack_ext.whole"

# Nodes that pass a cotangent on unchanged (up to a factor), summed over axes that were broadcast.
_SUMS = ("AddBackward0", "SubBackward0")


@dataclass(eq=False, slots=True)
class Capture:
    """Where a Site's vectors are taken: an edge, and the factor between the two.

    Args:
        edge: Usually the edge of the layer's own output.
        factor: Multiplies what arrives there.
        vectors: Maps ``(node, output number, what arrived)`` to the Site's vectors, where these
            are not what arrives: for parameters outside of layers.
    """

    edge: GradientEdge
    factor: float = 1.0
    vectors: Callable[[Node, int, Tensor], Tensor] | None = None


class Whole(NamedTuple):
    """What the call of a whole model says: needed where no call of a layer was recorded.

    Args:
        batch: Number of data N.
        batch_axis: Axis that counts them.
        checked: Whether readings are to be checked.
        block: The `sharing` block that it ran in, if in one.
    """

    batch: int
    batch_axis: int
    checked: bool
    block: sharing | None


@dataclass(eq=False)
class Reach:
    """What the graph behind a tensor consists of.

    Attributes:
        sites: The Sites, each with the places where its vectors are taken.
        sources: Those Sites that have no Site upstream. Differentiating with respect to their
            outputs visits all others on the way.
        parameters: Leaf parameters by id, those that were frozen after the forward pass left out.
        uses: How many nodes read each leaf parameter, by id.
        coupled: Names of nodes that couple samples (training-mode batch norm).
        nodes: All nodes that were visited.
        whole: What the model's call said.
        wrappers: Nodes that processes share, see `backpack_ext.data_parallel`.
        frozen: Sites of which nothing is trained any more.
    """

    sites: dict[Site, list[Capture]] = field(default_factory=dict)
    sources: dict[Site, GradientEdge] = field(default_factory=dict)
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    uses: dict[int, int] = field(default_factory=dict)
    coupled: list[str] = field(default_factory=list)
    nodes: Collection[Node] = ()
    whole: Whole | None = None
    wrappers: list[Node] = field(default_factory=list)
    frozen: list[Site] = field(default_factory=list)


# Types of nodes that were tagged: reading the metadata of a node makes a dict for it.
_tagged: set[type] = set()


def tag(node: Node, site: Site) -> None:
    """Mark a node as the producer of a Site's output."""
    _tagged.add(type(node))
    node.metadata.setdefault(TAG, []).append(site)


def tag_whole(node: Node, whole: Whole) -> None:
    """Mark a node as the producer of a model's output."""
    _tagged.add(type(node))
    node.metadata[WHOLE] = whole


def walk(start: Node) -> Reach:
    """Collect what lies upstream of a node, in one depth-first pass.

    Args:
        start: The node that a loss's input, or a model's output, came from.

    Returns:
        What was found.
    """
    reach = Reach()
    behind: dict[Node, bool] = {}  # is a Site at this node or upstream of it?
    consumers: dict[Node, list[tuple[Node, int]]] = {}  # of watched nodes only
    leaves: dict[Node, int] = {}
    stack: list[tuple[Node, tuple | None]] = [(start, None)]
    while stack:
        node, children = stack.pop()
        if children is None:  # going up
            if node in behind:
                continue
            behind[node] = False
            children = node.next_functions
            if children:
                stack.append((node, children))
                for child, _ in children:
                    if child is not None and child not in behind:
                        stack.append((child, None))
            else:
                variable = getattr(node, "variable", None)
                if isinstance(variable, nn.Parameter) and variable.requires_grad:
                    leaves[node] = id(variable)
                    reach.parameters[id(variable)] = variable
                    reach.uses[id(variable)] = 0
            continue
        upstream = False  # coming back
        for child, _ in children:
            if child in leaves:
                reach.uses[leaves[child]] += 1
            elif child is not None and behind[child]:
                upstream = True
        if consumers:
            for index, (child, _) in enumerate(children):
                if child in consumers:
                    consumers[child].append((node, index))
                    if node.name() in _SUMS or node.name() in _RESHAPES:
                        consumers.setdefault(node, [])
        sites = None
        if type(node) in _tagged:
            metadata = node.metadata
            sites = metadata.get(TAG)
            if WHOLE in metadata:
                reach.whole = metadata[WHOLE]
        if sites:
            trained = [site for site in sites if site.leave_out_frozen()]
            if len(trained) < len(sites):
                reach.frozen += set(sites).difference(trained)
            sites = trained
        if sites:
            for site in sites:
                edge = GradientEdge(node, site.output_nr)
                reach.sites[site] = [Capture(edge)]
                if not site.depends_on_parameters:
                    consumers.setdefault(node, [])
                if not upstream:
                    reach.sources[site] = edge
            behind[node] = True
        else:
            behind[node] = upstream
        if hasattr(node, "_saved_training") and _couples(node):
            reach.coupled.append(node.name())
        if type(node) in (data_parallel.SINK, data_parallel.SYNC):
            reach.wrappers.append(node)
    reach.nodes = behind.keys()
    for site, captures in reach.sites.items():
        if not site.depends_on_parameters:
            _find_broadcast(site, captures, consumers)
    return reach


def without_upstream(start: Node, marked: Collection[Node]) -> set[Node]:
    """Return those of some nodes that have none of the others upstream."""
    found: set[Node] = set()
    behind: dict[Node, bool] = {}
    stack: list[tuple[Node, bool]] = [(start, False)]
    while stack:
        node, back = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if not back:
            if node not in behind:
                behind[node] = False
                stack.append((node, True))
                stack.extend((child, False) for child in children if child not in behind)
            continue
        upstream = any(behind[child] for child in children)
        if node in marked and not upstream:
            found.add(node)
        behind[node] = upstream or node in marked
    return found


def executes(children: Sequence[tuple[Node | None, int]]) -> bool:
    """Whether the running backward pass executes a node, rather than capture what arrives at it.

    ``torch.autograd.grad(loss, z)`` ends at the operation that z came from: of this one torch says that
    it will be executed, but it is not, and what it has saved stays.

    Args:
        children: The node's ``next_functions``.
    """
    for child, _ in children:
        if child is not None:
            try:
                if torch._C._will_engine_execute_node(child):
                    return True
            except RuntimeError:  # a leaf whose gradient `torch.autograd.grad` captures
                return True
    return False


def new_sites(start: Node, seen: set[Node]) -> Iterator[tuple[Site, Sequence]]:
    """Yield the Sites at and upstream of a node, with their nodes' ``next_functions``.

    Args:
        start: The node.
        seen: Nodes that are passed over, with what lies upstream of them; it grows.
    """
    stack = [start]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        children = node.next_functions
        if type(node) in _tagged:
            for site in node.metadata.get(TAG, ()):
                yield site, children
        stack.extend(child for child, _ in children if child is not None)


def parameter_behind(start: Node, known: Collection[Node]) -> nn.Parameter | None:
    """Return a parameter upstream of a node that is reached without passing known nodes."""
    stack, seen = [start], set(known)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        trained = isinstance(variable, nn.Parameter) and variable.requires_grad
        if trained and executes(((node, 0),)):
            return variable
        stack.extend(child for child, _ in node.next_functions if child is not None)
    return None


def _couples(node: Node) -> bool:
    """Whether a node is a batch norm in training mode."""
    if "BatchNorm" not in node.name() or not node._saved_training:
        return False
    # an instance norm is a batch norm of one datum with N C channels
    return node._input_metadata[0].shape[0] > 1


# Nodes that only reshape or cast, and those that add axes in front.
_RESHAPES = (
    "UnsqueezeBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ToCopyBackward0",
    "AliasBackward0",
    "CloneBackward0",
)
_EXPANSIONS = (*_SUMS, "ExpandBackward0")


def _find_broadcast(site: Site, captures: list[Capture], consumers: dict) -> None:
    """Take the vectors of an output that all data share behind the broadcast.

    A position embedding, say, is added to every datum: at its own output the cotangents of all data
    arrive summed up, at the output of the addition they are still apart.
    """
    if site.batch == 1 or site.batch_axis != 0:
        return
    numel, context = site.out_shape.numel(), site.sharing
    sizes = {site.batch} if context is None else {site.batch, *context.sizes}
    vectors = partial(context.sum_rows, site.name) if context is not None and context.sizes else None
    found, rest = [], []
    pending = [(captures[0].edge.node, 1.0)]
    while pending:
        node, factor = pending.pop()
        for consumer, index in consumers.get(node, ()):
            name = consumer.name()
            inner, outer = node._input_metadata[0].shape, consumer._input_metadata[0].shape
            aligned = [1] * (len(outer) - len(inner)) + list(inner)
            over_data = outer and aligned[0] == 1 and outer[0] in sizes
            here = factor
            if name in _SUMS and index == 1:
                here *= consumer._saved_alpha * (-1 if name == "SubBackward0" else 1)
            if name in _EXPANSIONS and over_data and aligned[1:] == list(outer[1:]):
                found.append(Capture(GradientEdge(consumer, 0), float(here), vectors))
            elif torch.Size(outer).numel() == numel and name in (*_SUMS, *_RESHAPES):
                pending.append((consumer, here))
            else:
                rest.append(name)
    site.broadcast = bool(found) and not rest
    if site.broadcast:
        captures[:] = found
    elif found or site.out_shape[:1] == (1,) or _is_for_all_data(site):
        site.error = (
            f"its output of shape {tuple(site.out_shape)} is shared by all {site.batch} data, and "
            f"the vectors of the single datum cannot be told apart behind {sorted(set(rest))}. "
            "Only outputs that are added to per-datum tensors can be treated"
        )


def _is_for_all_data(site: Site) -> bool:
    """Whether an embedding was looked up for all data together (relative positions ``[T, T]``, say)."""
    if site.sharing is not None and site.sharing.kind == "segments":
        return False  # rows are read by segments, or not at all
    return site.looked_up and bool(site.out_shape) and site.out_shape[0] % site.batch != 0


def edge_of(t: Tensor) -> GradientEdge:
    """Return the gradient edge of a tensor, looking through BackPACK's identity hook nodes."""
    node = t.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):  # which no object of Python's keeps
        edge = torch.autograd.graph.get_gradient_edge(t)
    else:
        edge = GradientEdge(node, t.output_nr)
    while edge.node.name() == "BackwardHookFunctionBackward":
        edge = GradientEdge(*edge.node.next_functions[edge.output_nr])
    return edge


def anchor_of(view: Tensor) -> tuple[Tensor, str | None]:
    """Return the tensor whose edge stays right under later in-place operations on a view.

    An in-place operation on a view rewrites the view's history, and a tag on it is lost; the base
    of the view keeps it.

    Returns:
        The base, and what is wrong with it if the view covers only a part of it.
    """
    base = view._base
    if base is None or base.grad_fn is None:
        return view, None
    if base.numel() == view.numel() and base.is_contiguous() and view.is_contiguous():
        return base, None
    return base, (
        f"its output is a view of shape {tuple(view.shape)} that does not cover its base of shape "
        f"{tuple(base.shape)} in the same order. Return a tensor of its own, `output.clone()` for "
        "instance"
    )
