"""Chains of operations, each of which reads one other: most of the speed of small networks.

Nothing can join there, and nothing has to be known in advance: the graph is looked at as h moves on.
"""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor
from torch.autograd.graph import Node

from backpack_ext.diagonals.arrival import Arrival
from backpack_ext.diagonals.operation import LEAF, TURNED, Edge, Results, collect, has_hooks, leaf_edge
from backpack_ext.diagonals.rule import DiagonalRule, Diagonals, Step, rule_of

# A node, which of its outputs, and h there.
Place = tuple[Node, int, Tensor]

# An operation of a chain: its node and rule; where its inputs come from, None where nothing is wanted;
# for which of them h is wanted, as in `Step`; the one that is no parameter, None at the chain's end.
Link = tuple[
    Node,
    DiagonalRule,
    list["Edge | tuple[Node, int] | None"],
    list[bool],
    "tuple[Node, int] | None",
]


class Chain:
    """What of a recursion needs no look ahead.

    Args:
        gauss_newton: Whether second derivatives are left out.
        arrival: Brings gradients.
        results: Where the parameters' diagonals are collected.

    Attributes:
        held: The links that wait for gradients, with the diagonals at their outputs.
        passed: The nodes that were met.
    """

    __slots__ = ("arrival", "gauss_newton", "held", "passed", "results")

    def __init__(self, gauss_newton: bool, arrival: Arrival, results: Results):
        self.gauss_newton, self.arrival, self.results = gauss_newton, arrival, results
        self.held: dict[Node, tuple[Link, Tensor]] = {}
        self.passed: set[Node] = set()

    def follow(self, place: Place | None, known: Container[Node]) -> Place | None:
        """Carry h as far as there is a chain.

        Args:
            place: Where to begin.
            known: Nodes that belong to no chain.

        Returns:
            Where the chain ends and the graph does not; None if h waits for a gradient.
        """
        while place is not None:
            node, output, h = place
            link = None if output or node in known else _link(node)
            if link is None:
                return place
            self.passed.add(node)
            rule = link[1]
            if rule.curved and not self.gauss_newton and rule.curves(link[2]):
                if node in self.held:
                    h = self.held[node][1] + h
                else:
                    self.arrival.bring(node)
                self.held[node] = link, h
                return None
            place = self.cross(link, h, None)
        return None

    def cross(self, link: Link, h: Tensor, grads: Diagonals | None) -> Place | None:
        """Cross an operation; return what follows."""
        node, rule, inputs, need, onward = link
        found = None
        for edge, t in zip(inputs, rule.cross(Step(node, (h,), grads, need)), strict=False):
            if t is None or edge is None:
                continue
            if edge is onward:
                found = t
            else:
                collect(self.results, edge, t, rule.turns)
        if onward is None:
            return None
        child, output = onward
        if found is None or not rule.shaped:
            shape = child._input_metadata[output].shape
            if found is None:  # no curvature is left, but there may be some behind
                found = h.new_zeros(shape)
            elif found.shape != shape:
                found = found.sum_to_size(shape)
        return child, output, found


def _link(node: Node) -> Link | None:
    """Return an operation of a chain; None if it is no such."""
    rule = rule_of(node)
    if rule is None or rule.several or has_hooks(node):
        return None
    inputs, need, onward = [], [], None
    for edge in node.next_functions:
        wanted, leaf = True, leaf_edge(edge[0])
        if leaf is True:
            edge, wanted = None, False
        elif leaf:
            edge, wanted = leaf, leaf[1] == LEAF or TURNED
        elif onward is None:
            onward = edge
        else:
            return None
        inputs.append(edge)
        need.append(wanted)
    if rule.joins and rule.may_join(inputs):
        return None
    return node, rule, inputs, need, onward
