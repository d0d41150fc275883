"""Chains of operations, each of which reads one other: most of the speed of small networks.

Nothing can join there, and nothing has to be known in advance: the graph is looked at as h moves on.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from backpack_ext.diagonals.arrival import Arrival
from backpack_ext.diagonals.operation import (
    ACCUMULATE,
    TRANSPOSE,
    TURNED,
    Edge,
    Results,
    collect,
    has_hooks,
    leaf_edge,
)
from backpack_ext.diagonals.rule import DiagonalRule, Diagonals, Step, rule_of

# A node, which of its outputs, and h there.
Place = tuple[Node, int, Tensor]


class Pattern(NamedTuple):
    """What operations with one rule have in common whose inputs come from the same types of nodes.

    Args:
        rule: Their rule.
        need: For which inputs h is wanted, as in `Step`.
        leaves: The inputs that are parameters.
        onward: The one that is none; None at the end of a chain.
        curved: Whether they have a second derivative.
    """

    rule: DiagonalRule
    need: tuple[bool, ...]
    leaves: tuple[int, ...]
    onward: int | None
    curved: bool


# An operation of a chain, with the inputs that are parameters, and the one that is none.
Link = tuple[Node, Pattern, list[tuple[int, Edge]], "tuple[Node, int] | None"]


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
            if link[1].curved and not self.gauss_newton:
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
        node, (rule, need, _, onward, _), leaves, edge = link
        out = rule.cross(Step(node, (h,), grads, need))
        if len(out) < len(need):  # a rule may leave out the last ones
            out = (*out, *[None] * (len(need) - len(out)))
        for k, leaf in leaves:
            if out[k] is not None:
                collect(self.results, leaf, out[k], rule.turns)
        if edge is None:
            return None
        (child, output), found = edge, out[onward]
        if found is None or not rule.shaped:
            shape = child._input_metadata[output].shape
            if found is None:  # no curvature is left, but there may be some behind
                found = h.new_zeros(shape)
            elif found.shape != shape:
                found = found.sum_to_size(shape)
        return child, output, found


# By the rule of an operation and the types of the nodes that its inputs come from.
_patterns: dict[tuple, Pattern | None] = {}


def _link(node: Node) -> Link | None:
    """Return an operation of a chain; None if it is no such."""
    edges = node.next_functions
    children = [child for child, _ in edges]
    key = (rule_of(node), *map(type, children))
    if key not in _patterns:
        _patterns[key] = _pattern(*key)
    pattern = _patterns[key]
    if pattern is None or has_hooks(node):
        return None
    leaves = []
    for k in pattern.leaves:
        leaf = leaf_edge(children[k])
        if leaf is True or not leaf:  # another tensor than a parameter
            return None
        leaves.append((k, leaf))
    return node, pattern, leaves, None if pattern.onward is None else edges[pattern.onward]


def _pattern(rule: DiagonalRule | None, *kinds: type) -> Pattern | None:
    """Return what is known by the types of the inputs' nodes; None for what is part of no chain."""
    if rule is None or rule.several:
        return None
    leaves = [k for k, kind in enumerate(kinds) if kind in (ACCUMULATE, TRANSPOSE)]
    others = [k for k, kind in enumerate(kinds) if kind is not type(None) and k not in leaves]
    inputs = [None if kind is type(None) else kind for kind in kinds]
    if len(others) > 1 or rule.may_join(inputs):
        return None
    need = tuple(TURNED if kind is TRANSPOSE else kind is not None for kind in inputs)
    return Pattern(rule, need, tuple(leaves), others[0] if others else None, rule.curves(inputs))
