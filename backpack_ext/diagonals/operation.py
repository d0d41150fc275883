"""The graph as the recursion sees it: operations, what they read, how many read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack_ext.diagonals.rule import TURNED

if TYPE_CHECKING:
    from backpack_ext.diagonals.attention import Attention
    from backpack_ext.diagonals.composite import Composite
    from backpack_ext.diagonals.rule import DiagonalRule

# The second entry of an edge that ends at a parameter; `TURNED` at a transposed one.
LEAF = -1

# Where an input of an operation comes from: an operation and which of its outputs, or a parameter and
# `LEAF` or `TURNED`; None where nothing is wanted.
Edge = tuple["Operation | nn.Parameter", int]

# Parameters with their diagonals, by the parameters' ids: hashing a tensor is slow.
Results = dict[int, tuple[nn.Parameter, Tensor]]

# The types of the nodes that edges to leaves, and to transposed leaves, end at.
_LEAF = torch.zeros(1, 1, requires_grad=True)
ACCUMULATE = type(_LEAF.t().grad_fn.next_functions[0][0])
TRANSPOSE = type(_LEAF.t().grad_fn)
_SAVED = torch._C._autograd.SavedTensor


class Operation:
    """One node of the graph.

    Attributes:
        node: The node.
        rule: Its rule, None if it has none.
        inputs: Where its inputs come from.
        waiting: How many inputs of operations that are still to be crossed are outputs of this one.
        h: What has been collected, by output.
        grads: The gradients at its outputs, once they are known.
        watched: Whether they are needed.
        extra: h at its input that needs not cross it any more.
        composite: What it is the end of.
        attention: The attention that it is the end of.
        inside: Whether it belongs to another operation's composite.
        seeded: Whether a loss reads it.
        done: Whether it was crossed.
    """

    __slots__ = (
        "attention", "composite", "done", "extra", "grads", "h", "inputs", "inside", "node", "rule",
        "seeded", "waiting", "watched",
    )  # fmt: skip

    def __init__(self, node: Node, rule: DiagonalRule | None):
        self.node, self.rule, self.waiting = node, rule, 0
        self.h: dict[int, Tensor] = {}
        self.inputs: list[Edge | None] = []
        self.done = self.inside = self.seeded = self.watched = False
        self.grads: tuple[Tensor | None, ...] | None = None
        self.extra: Tensor | None = None
        self.composite: Composite | None = None
        self.attention: Attention | None = None

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name()

    def shape(self, output: int) -> torch.Size:
        """Return the shape of an output."""
        return torch.Size(self.node._input_metadata[output].shape)

    def add(self, output: int, h: Tensor) -> None:
        """Collect a share of h at an output."""
        old = self.h.get(output)
        self.h[output] = h if old is None else old + h


def leaf_edge(node: Node | None) -> Edge | bool:
    """Return the edge that ends at a parameter.

    It is True where nothing is wanted (at other tensors, and at parameters that were frozen after the
    forward pass), and False inside of the graph.
    """
    kind, place = type(node), LEAF
    if kind is TRANSPOSE:
        node, place = node.next_functions[0][0], TURNED
        kind = type(node)
    if kind is not ACCUMULATE:
        return node is None
    p = node.variable
    # the type first: asking for instances of Parameter is slow
    wanted = (type(p) is nn.Parameter or isinstance(p, nn.Parameter)) and p.requires_grad
    return (p, place) if wanted else True


def collect(results: Results, edge: Edge, h: Tensor, turned: bool = False) -> None:
    """Add h at a parameter; ``turned`` says that it comes in the layout of the parameter itself."""
    p, place = edge
    if place == LEAF or not turned:
        if place == TURNED:
            h = h.mT
        given, shape = h.shape, p.shape
        if given != shape:
            if given[1:] == shape:  # a bias; faster
                h = h.squeeze(0) if given[0] == 1 else h.sum(0)
            else:
                h = h.sum_to_size(shape)
    key = id(p)
    results[key] = p, (results[key][1] + h if key in results else h)


# For each type of node the names of tensors that it saves.
_saves: dict[type, tuple[str, ...]] = {}


def has_hooks(node: Node) -> bool:
    """Whether saved tensors are unpacked by a hook, as under activation checkpointing."""
    kind = type(node)
    names = _saves.get(kind)
    if names is None:
        names = _saves[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    for name in names:
        saved = getattr(node, name)
        if type(saved) is not _SAVED:  # a custom autograd.Function, for instance, has a tuple of them
            saved = next(iter(saved or ()), None)
        if saved is not None:
            if saved.unpack_hook is not None:
                return True
            # one hook packs all of them, or none does; but this one may have been left out
            if name is not names[-1] and saved.data is not None:
                return False
    return False


def shape_of(edge: Edge) -> torch.Size:
    """Return the shape of the tensor at an edge."""
    target, place = edge
    if place >= 0:
        return target.shape(place)
    return target.shape if place == LEAF else target.shape[::-1]


def made(edge: Edge) -> int:
    """Return when the tensor at an edge was recorded: before whatever reads it. Leaves come first."""
    return -1 if edge[1] < 0 else edge[0].node._sequence_nr()


def gradient_edge(edge: Edge) -> GradientEdge:
    """Return the edge as autograd has it: for a transposed parameter the parameter's, see `turned`."""
    target, place = edge
    return GradientEdge(target.node, place) if place >= 0 else get_gradient_edge(target)


def turned(edge: Edge, t: Tensor) -> Tensor:
    """Bring what belongs to an edge to the layout that autograd has there, or back."""
    return t.mT if edge[1] == TURNED else t


def same(one: Edge | None, other: Edge | None) -> bool:
    """Whether two edges are one; comparing parameters themselves would compare their entries."""
    if one is None or other is None:
        return one is other
    return one[0] is other[0] and one[1] == other[1]
