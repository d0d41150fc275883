"""Where parameters meet the data: the search for cuts, level by level from the parameters up.

Somewhere on its way from a parameter to the loss the graph gains the axis of the data; there is the
*cut*. Where the data are at a candidate is not guessed from sizes but tried, the first time:
vectors of some of the data are sent, and must arrive at rows of these data alone.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack_ext.context import SuspendBackpack
from backpack_ext.errors import UnsupportedError
from backpack_ext.layout import Layout, probing_vector
from backpack_ext.products import PRODUCTS, SELECTIONS, Route
from backpack_ext.reading import Reading
from backpack_ext.sharing import Segments
from backpack_ext.sweep import silent

# How many operations a parameter may pass before it meets the data.
DEPTH = 32


class Data(NamedTuple):
    """What is known of the data.

    Args:
        N: Their number.
        axis: Where layers have them.
        segments: What ragged rows may be read by.
    """

    N: int
    axis: int
    segments: tuple[Segments, ...] = ()

    @property
    def distinct(self) -> bool:
        """Whether the lengths of ragged rows tell them apart, from each other and from the data."""
        lengths = [s.length for s in self.segments]
        return len({self.N, *lengths}) > len(lengths)

    def kind(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return a shape with names for numbers of ragged rows, which are others in the next batch."""
        if not self.segments:
            return shape
        names = {s.length: -1 - k for k, s in enumerate(self.segments)}
        return tuple(names.get(size, size) for size in shape)


def readers_of(nodes: Collection[Node]) -> dict[tuple[Node, int], list[Node]]:
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


def cuts_of(
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


def answered(
    searches: Sequence[tuple[Generator[_Question, Answer, Cuts | None], dict]],
    data: Data,
    probe: Probe | None,
) -> list[Cuts | None]:
    """Run searches side by side: what several ask at a time is tried in the same passes.

    Args:
        searches: Each with the readings that its parameter is known to have; they grow.
        data: The data.
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
            _check_lengths(data)
            answers = {k: _guesses(question, data) for k, question in questions.items()}
            continue
        tried = _tried(
            {
                output
                for k, question in questions.items()
                for output, key in _keys(question, data).items()
                # equal shapes may have to be read differently: each output is tried for itself
                if not data.distinct or key not in searches[k][1]
            },
            data,
            probe,
        )
        answers = {k: _answer(q, searches[k][1], tried, data) for k, q in questions.items()}
    return results


def _shape(output: Output) -> tuple[int, ...]:
    return tuple(output[0]._input_metadata[output[1]].shape)


def _keys(question: _Question, data: Data) -> dict[Output, tuple]:
    """Return what tells a parameter's outputs apart from pass to pass."""
    found = {}
    for output, inner in question.inner.items():
        node, k = output
        shapes = data.kind(inner), data.kind(_shape(output))
        found[output] = (question.depth, node.name(), k, *shapes, data.N, data.axis)
    return found


def _guesses(question: _Question, data: Data) -> Answer:
    """Answer by sizes alone."""
    # the rows of a product are those of its other factor
    return {
        output: _guess(() if output[0].name() in PRODUCTS else inner, _shape(output), data)
        for output, inner in question.inner.items()
    }


def _tried(
    outputs: Collection[Output], data: Data, probe: Probe
) -> dict[Output, tuple[bool, list[Reading]]]:
    """Return whether anything arrived at outputs, and which readings agree with what did."""
    order = list(outputs)
    left = {output: _candidates(_shape(output), data) for output in order}
    seen = dict.fromkeys(order, False)
    for chosen, arrived in probe([GradientEdge(*output) for output in order]) if order else ():
        for output, g in zip(order, arrived, strict=True):
            if g is not None and g.any():
                seen[output] = True
                left[output] = [r for r in left[output] if _apart(g, r, chosen, data.N)]
    return {output: (seen[output], left[output]) for output in order}


def _answer(question: _Question, known: dict, tried: dict, data: Data) -> Answer:
    """Return which outputs have the data apart, and where; None where they have not."""
    answer: Answer = {}
    for output, key in _keys(question, data).items():
        if data.distinct and key in known:
            answer[output] = _bound(known[key], data)
            continue
        seen, left = tried[output]
        answer[output] = next(iter(left), None)
        # where only zeros arrived, or too few rows to tell, it is tried again the next time
        if data.distinct and seen and len(left) < 2:
            # without the rows themselves, which are others in the next batch
            known[key] = left[0]._replace(rows=None) if left else None
    return answer


def _bound(reading: Reading | None, data: Data) -> Reading | None:
    """Return a reading with the present batch's rows."""
    if reading is None or reading.segment is None:
        return reading
    return reading._replace(rows=data.segments[reading.segment])


def _check_lengths(data: Data) -> None:
    """Raise if sizes do not tell by what an axis is to be read."""
    N = data.N
    lengths = [s.length for s in data.segments if not (s.length == N and s.plain)]
    if len(lengths) > len(set(lengths)) or N in lengths:
        raise UnsupportedError(
            f"Segments of lengths {lengths} for {N} data: parameters without a rule cannot be told by "
            "sizes which of them, or whether none, holds where they meet the data, and "
            "check_layers=False (or a loss whose rows are unknown) forbids to try. Allow the checks, or "
            "freeze these parameters."
        )


class Probe:
    """Sends vectors of half of the data through the graph, so that each pair is told apart once."""

    def __init__(self, start: GradientEdge, layout: Layout, like: Tensor):
        self.start, self.layout, self.vector = start, layout, probing_vector(like)

    def __call__(self, edges: Sequence[GradientEdge]):
        """Yield, for each half, which data were sent, and what arrived at the edges."""
        options = {"retain_graph": True, "allow_unused": True}
        for chosen, seed in self.layout.halves(self.vector):
            with silent(), SuspendBackpack():
                arrived = torch.autograd.grad([self.start], edges, [seed], **options)
            yield chosen, arrived


def _candidates(shape: tuple[int, ...], data: Data) -> list[Reading]:
    """Return the readings that a shape admits, the likeliest first."""
    N, segments = data.N, data.segments
    found = [Reading(a, True) for a, size in enumerate(shape) if size == N]
    found += [
        Reading(a, True, k, s)
        for a, size in enumerate(shape)
        for k, s in enumerate(segments)
        if size == s.length and not (size == N and s.plain)
    ]
    for a, size in enumerate(shape):
        if not segments and size > N and size % N == 0:
            found += [Reading(a, True), Reading(a, False)]
    # stable: among equals the order above
    return sorted(found, key=lambda r: (r.axis != data.axis, not r.first))


def _guess(inner: tuple[int, ...], outer: tuple[int, ...], data: Data) -> Reading | None:
    """Return the likeliest reading along an axis that the input has not, by sizes alone."""
    N = data.N
    inner = (1,) * (len(outer) - len(inner)) + inner
    for reading in _candidates(outer, data):
        if reading.rows is None and reading.axis and outer[reading.axis] != N:
            continue  # k N rows are likely in front only
        size = inner[reading.axis] if reading.axis < len(inner) else 1
        if N == 1 or (size % N if reading.rows is None else size != outer[reading.axis]):
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
