r"""The recursion of Hessian diagonals through the graph of one backward pass.

Every operation of the graph is a module of the recursion: from the loss on, h is collected at the
outputs of an operation from all that read them, crosses it by its rule, and is added at its inputs. A
join of a residual net is an operation like any other, so that time is linear in depth. At a parameter
it arrives as the parameter's own diagonal.

An operation with a second derivative needs the gradient at its output, and waits for the main backward
pass to bring it there. All others are crossed as soon as their h is complete. In any case this is before
the main backward pass executes them, and what they saved is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack_ext.diagonals.arrival import Arrival
from backpack_ext.diagonals.attention import attention_of, attention_scores
from backpack_ext.diagonals.chain import Chain, Place
from backpack_ext.diagonals.composite import composite_of
from backpack_ext.diagonals.crossing import cross_terms
from backpack_ext.diagonals.operation import Edge, Operation, Results, collect, has_hooks, leaf_edge
from backpack_ext.diagonals.rule import (
    TURNED,
    DiagonalRule,
    Diagonals,
    Step,
    Unpacking,
    rule_of,
    signed,
)
from backpack_ext.diagonals.softmax import softmax_curvature
from backpack_ext.diagonals.unknown import by_signs, check_known
from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.graph import executes, walk
from backpack_ext.own_pass import in_a_pass_of_its_own
from backpack_ext.quiet import Quiet
from curvature.decomposition import widen

if TYPE_CHECKING:
    from backpack_ext.hesscale import DiagonalHessian

_ANY = DiagonalRule(lambda step: step.h)


class Recursion:
    """The Hessian diagonals of one extension in one backward pass.

    Args:
        ext: The extension.
        observe: Called with a node, h and, if needed, g at its outputs, before it is crossed.
        keep: Whether the graph outlives the pass, so that hooks have to be removed.
        quiet: Makes contexts without gradients and autocast.

    Attributes:
        results: The parameters and their diagonals, by the parameters' ids.
    """

    def __init__(
        self,
        ext: DiagonalHessian,
        observe: Callable[[Node, dict[int, Tensor], Diagonals | None], None] | None,
        keep: bool,
        quiet: Quiet,
    ):
        self.ext, self.observe, self.quiet = ext, observe, quiet
        self.operations: dict[Node, Operation] = {}
        self.results: Results = {}
        self.arrival = Arrival(self, keep)
        self.chain = Chain(ext.gauss_newton, self.arrival, self.results)
        self.ready: list[Operation] = []
        self.watched: set[Node] = set()  # where gradients are needed for other reasons
        self.inside: set[Node] = set()  # nodes of composites
        self.left = 0  # inputs of operations that are parameters and have got nothing yet
        self.incomplete: set[int] = set()  # ids of parameters that h did not reach on all ways
        self.hooked = False  # do saved tensors come from hooks (activation checkpointing)?

    # ------------------------------------------------------------------ events

    def start(self, seeds: Sequence[tuple[GradientEdge, Tensor]]) -> None:
        """Begin at the inputs of a loss.

        Args:
            seeds: Edges, each with the diagonal of the loss's Hessian there.
        """
        if len(seeds) == 1 and self.observe is None:
            ((edge, h),) = seeds
            self._follow((edge.node, edge.output_nr, h))
        else:
            self._start(seeds)

    def _follow(self, place: Place) -> None:
        place = self.chain.follow(place, self.operations)
        if place is not None:
            node, output, h = place
            self._start([(GradientEdge(node, output), h)])

    def _start(self, seeds: Sequence[tuple[GradientEdge, Tensor]]) -> None:
        new: list[Operation] = []
        starts = []
        for edge, h in seeds:
            leaf = leaf_edge(edge.node)
            if not leaf:
                starts.append((self._explore(edge.node, new), edge.output_nr, h))
            elif leaf is not True:
                collect(self.results, leaf, h)
        for op, _, _ in starts:
            if op.inside:
                self._dissolve(op)
            op.seeded = True
        self._prepare(new)
        for op, output, h in starts:
            if op.done:
                self._reopen(op)
            op.add(output, h)
        for op in dict.fromkeys(op for op, _, _ in starts):
            if not op.waiting:
                self.ready.append(op)
        self.run()

    def arrive(self, node: Node, grads: tuple[Tensor | None, ...]) -> None:
        """Take the gradients at the outputs of an operation that the main pass is about to execute."""
        g = grads[0]
        held = self.chain.held.pop(node, None)
        if held is not None:
            with self.quiet(g):
                place = self.chain.cross(*held, None if g is None else grads)
                if place is not None:
                    self._follow(place)
            return
        op = self.operations.get(node)
        if op is None or op.inside or op.done:
            return
        op.grads = grads
        if op.waiting:
            raise RecordingError(
                f"Hessian diagonals: {op.name} is differentiated before all that reads it was. This is "
                "a defect of backpack_ext, please report it."
            )
        self.ready.append(op)
        with self.quiet(g):
            self.run()

    def end(self) -> None:
        """Let go of hooks; check that nothing is missing."""
        self.arrival.remove()
        left = list(self.chain.held)
        if self.left:
            left += [node for node, op in self.operations.items() if not (op.done or op.inside)]
        self.operations, self.watched, self.chain.held, self.chain.passed = {}, set(), {}, set()
        for node in left:
            if executes(node.next_functions):
                raise RecordingError(
                    f"Hessian diagonals: no gradient arrived at the output of {node.name()}, although "
                    "the loss depends on it. An operation behind it returned none (a custom "
                    "autograd.Function?)."
                )
            # the pass was asked for some gradients and ended here
            self.incomplete.update(walk(node).parameters)
        for key in self.incomplete:
            self.results.pop(key, None)

    # ------------------------------------------------------------------ the graph

    def _explore(self, start: Node, new: list[Operation]) -> Operation:
        """Add what lies behind a node to the operations."""
        operations = self.operations
        first = operations.get(start)
        if first is not None:
            return first
        first = self._operation(start)
        stack = [first]
        while stack:
            op = stack.pop()
            new.append(op)
            inputs = op.inputs
            for node, output in op.node.next_functions:
                if node is None:
                    inputs.append(None)
                    continue
                child = operations.get(node)
                if child is None:
                    leaf = leaf_edge(node)
                    if leaf:
                        if leaf is True:
                            inputs.append(None)
                        else:
                            inputs.append(leaf)
                            self.left += 1
                        continue
                    child = self._operation(node)
                    stack.append(child)
                else:
                    if child.inside:
                        self._dissolve(child)
                    if child.done:
                        self._reopen(child)
                child.waiting += 1
                inputs.append((child, output))
        return first

    def _operation(self, node: Node) -> Operation:
        op = self.operations[node] = Operation(node, rule_of(node))
        held = self.chain.held.pop(node, None)
        if held is not None:  # an earlier loss's chain waits here
            op.add(0, held[1])
            op.watched = op.seeded = True
        return op

    def _prepare(self, new: list[Operation]) -> None:
        """Find what belongs together, and have gradients brought where they are needed."""
        joins = [op for op in new if op.rule is not None and op.rule.may_join(op.inputs)]
        joins.sort(key=_made, reverse=True)  # the outermost first
        for op in joins:
            if op.inside:
                continue
            op.composite = composite_of(op, self.ext.gauss_newton)
            if op.composite is not None:
                self.inside.add(op.node)
                for inner in op.composite.inside:
                    inner.inside = not self.ext.gauss_newton
                    self.inside.add(inner.node)
            else:
                op.attention = attention_of(op)
        for op in new:
            if op.inside:
                continue
            if op.rule is None:
                check_known(op.node)
                self.ext.warn(op.name)
            if not self.hooked and has_hooks(op.node):
                self.hooked = True
            if not self.ext.gauss_newton:
                self._watch(op)

    def _watch(self, op: Operation) -> None:
        """Have the gradient at an operation brought, if it has a second derivative."""
        curved = op.composite is not None or op.rule is None or op.rule.curves(op.inputs)
        if (curved or op.node in self.watched) and not op.watched:
            op.watched = True
            self.arrival.bring(op.node)

    def _reopen(self, op: Operation) -> None:
        """Have an operation crossed once more, by what a further loss brings."""
        op.done, stack = False, [op]
        while stack:
            op = stack.pop()
            for edge in op.inputs:
                if edge is None:
                    continue
                target, place = edge
                if place < 0:
                    self.left += 1
                    continue
                target.waiting += 1
                if target.done:
                    target.done = False
                    stack.append(target)

    def _dissolve(self, inner: Operation) -> None:
        """Take a composite apart, because a further loss reads an operation inside of it.

        Raises:
            UnsupportedError: If it was crossed already, with the gradient that it then had.
        """
        ends = (op for op in self.operations.values() if op.composite is not None)
        end = next(op for op in ends if inner in op.composite.inside)
        if end.done:
            raise UnsupportedError(
                f"Hessian diagonals: a loss reads the output of {inner.name}, which is part of a "
                "composition of elementwise operations, after the backward pass has crossed that. "
                "Compute this loss after the composition, or use one backward pass per loss."
            )
        whole, end.composite = end.composite, None
        for part in (end, *whole.inside):
            part.inside = False
            self.inside.discard(part.node)
            self._watch(part)

    # ------------------------------------------------------------------ crossing

    def run(self) -> None:
        """Cross all operations that wait for nothing."""
        if self.hooked:
            # what checkpointing recomputes is handed out once per pass, and is the main one's
            Unpacking.once = True
            try:
                in_a_pass_of_its_own(self._run)
            finally:
                Unpacking.once = False
        else:
            self._run()

    def _run(self) -> None:
        ready = self.ready
        while ready:
            op = ready.pop()
            if op.watched and op.grads is None:
                continue  # until the gradients arrive
            h, op.h, grads, op.grads, op.done = op.h, {}, op.grads, None, True
            if self.observe is not None and h:
                self.observe(op.node, h, grads)
            self._cross(op, h, grads)

    def _cross(self, op: Operation, h: dict[int, Tensor], grads: Diagonals | None) -> None:
        """Carry h across an operation."""
        known = h.get(0)
        if known is None or len(h) > 1 or op.rule is None or op.rule.several:
            hs = [h.get(k) for k in range(len(op.node._input_metadata))]
        else:
            hs = (known,)
        if grads is not None and all(g is None for g in grads):
            grads = None
        if not h:
            if op.extra is not None:  # probabilities that only a product with values reads
                self._pass_on(op, [self._behind_softmax(op, grads)])
                return
            if grads is None:
                self._pass_on(op, [None] * len(op.inputs))
                return
            # what reads it has no curvature, but it has
            hs = [None if g is None else torch.zeros_like(widen(g)) for g in grads]
        step = Step(op.node, hs, grads, _need(op.inputs))
        if op.composite is not None:
            self._give(op.composite.start, op.composite.cross(step), 0)
            self._pass_on(op, [None] * len(op.inputs))
            return
        if op.attention is not None:
            softmax = op.attention.softmax
            scores = partial(attention_scores, op.attention, step)
            # it reads what the product itself will read again
            found = in_a_pass_of_its_own(scores) if Unpacking.once else scores()
            softmax.extra = found if softmax.extra is None else softmax.extra + found
            step.need[op.attention.entry] = False
        if op.rule is None:
            out = by_signs(step, self.ext.signs, self.ext.refuses_curved_glue)
        else:
            out = op.rule.cross(step)
        if self.ext.cross_terms and op.rule is not None and op.rule.adds:
            for edge, t in cross_terms(op, hs[0], self.ext.signs):
                if edge[1] < 0 and self.observe is not None:
                    raise UnsupportedError(
                        "cross_terms=True with batch=True: two branches that are added up read one "
                        f"parameter, of shape {tuple(edge[0].shape)}. Use batch=False."
                    )
                self._give(edge, t, 0)
        if op.extra is not None:
            out, op.extra = [out[0] + op.extra], None
        rule = op.rule or _ANY
        for edge, t in zip(op.inputs, out, strict=False):
            if edge is not None:
                self._give(edge, t, 1, rule.turns, rule.shaped)

    def _behind_softmax(self, op: Operation, grads: Diagonals | None) -> Tensor:
        found, op.extra = op.extra, None
        if grads is None:
            return found
        p = op.node._saved_result.to(found.dtype)
        dim = signed(op.node._saved_dim)
        return found + softmax_curvature(p, grads[0].to(found.dtype), dim)

    def _pass_on(self, op: Operation, out: Iterable[Tensor | None]) -> None:
        """Add h to the inputs of an operation."""
        for edge, h in zip(op.inputs, out, strict=False):
            if edge is not None:
                self._give(edge, h, 1)

    def _give(
        self, edge: Edge, h: Tensor | None, reads: int, turned: bool = False, shaped: bool = False
    ) -> None:
        """Add h to a tensor, and note that so many of what reads it were crossed."""
        target, place = edge
        if place < 0:
            self.left -= reads
            if h is not None:
                collect(self.results, edge, h, turned)
            return
        if h is not None:
            if not shaped and h.shape != (shape := target.node._input_metadata[place].shape):
                h = h.sum_to_size(shape)
            target.add(place, h)
        target.waiting -= reads
        if not target.waiting and reads:
            self.ready.append(target)


def _made(op: Operation) -> int:
    return op.node._sequence_nr()


def _need(inputs: Sequence[Edge | None]) -> list[bool]:
    """Return for which inputs of an operation h is wanted, as in `Step`."""
    return [edge is not None and (edge[1] != TURNED or TURNED) for edge in inputs]
