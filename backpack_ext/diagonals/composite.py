"""Several operations that are crossed as one, because together they are exact.

Crossing them one by one would drop the off-diagonals in between: those of ``x * sigmoid(x)``, where both
factors depend on x, or of ``x * rsqrt(mean(x^2) + eps)`` and ``x / max(norm(x), eps)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack_ext.context import SuspendBackpack
from backpack_ext.diagonals.norms import reduced_axes, root_mean_square
from backpack_ext.diagonals.operation import gradient_edge, made, same, shape_of, turned
from backpack_ext.diagonals.pointwise import ACTIVATIONS, BY_AUTOGRAD, PIECEWISE_LINEAR
from backpack_ext.diagonals.rule import Step, crossed, signed
from backpack_ext.sweep import silent

if TYPE_CHECKING:
    from backpack_ext.diagonals.operation import Edge, Operation

# Elementwise operations of several tensors: a composition ends with one of them.
ENDS = frozenset(
    (
        *("MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0", "MaximumBackward0"),
        *("MinimumBackward0", "WhereBackward0", "AddcmulBackward0", "AddcdivBackward0"),
        *("LerpBackward0", "PowBackward1", "LogaddexpBackward0"),
    )
)
_ELEMENTWISE = frozenset(
    (
        *(*ENDS, *ACTIVATIONS, *PIECEWISE_LINEAR, *BY_AUTOGRAD),
        *(
            "MulBackward1",
            "DivBackward1",
            "AddBackward1",
            "SubBackward1",
            "RsubBackward0",
            "RsubBackward1",
        ),
        *("NegBackward0", "CloneBackward0", "AliasBackward0", "ToCopyBackward0"),
        *("ClampBackward0", "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0"),
        *("MaskedFillBackward0", "BackwardHookFunctionBackward"),
    )
)

# Operations in a composition: far more than any activation has.
_SIZE = 32


class Composite(NamedTuple):
    """Operations that end at one and begin at one tensor.

    Args:
        cross: Maps the last operation's `Step` to h at the tensor.
        start: Where the tensor comes from.
        inside: The operations, without the last one.
    """

    cross: Callable[[Step], Tensor]
    start: Edge
    inside: tuple[Operation, ...]


def composite_of(op: Operation, open_too: bool) -> Composite | None:
    """Return the composition that ends with an operation; None if there is none.

    Args:
        op: The operation.
        open_too: Whether something else may read what is inside. Not where gradients are used: those
            inside are the sum over all that read.
    """
    name = op.name
    if name not in ENDS:
        return None
    inputs = [edge for edge in op.inputs if edge is not None]
    if len(inputs) < 2:
        return None
    found = _elementwise(op, inputs) or _root_mean_square(op, name) or _unit_vectors(op, name)
    return found if found is not None and (open_too or _closed(op, found.inside)) else None


def _elementwise(op: Operation, inputs: list[Edge]) -> Composite | None:
    """Find the tensor of which all inputs are elementwise functions."""
    shape, edges, inside = None, dict.fromkeys(inputs), []
    while len(edges) > 1:
        latest = max(edges, key=made)
        last, place = latest
        if place < 0 or last.name not in _ELEMENTWISE or len(inside) == _SIZE:
            return None
        shape = op.shape(0) if shape is None else shape
        if last.shape(0) != shape:
            return None
        inside.append(last)
        del edges[latest]
        edges.update(dict.fromkeys(edge for edge in last.inputs if edge is not None))
    (start,) = edges
    if shape_of(start) != op.shape(0):
        return None
    return Composite(_by_autograd(start), start, tuple(inside))


def _closed(op: Operation, inside: Iterable[Operation]) -> bool:
    """Whether nothing else reads what is inside: its gradients would be those of others too."""
    by = (op, *inside)
    return all(not o.seeded and _reads(o, by) == o.waiting for o in inside)


def _reads(of: Operation, by: Iterable[Operation]) -> int:
    """Return how often operations read what an operation returns."""
    return sum(edge is not None and edge[0] is of for o in by for edge in o.inputs)


def _by_autograd(start: Edge) -> Callable[[Step], Tensor]:
    """Return the crossing of an elementwise function: autograd's f' and f''."""

    def cross(step: Step) -> Tensor:
        end, edge = GradientEdge(step.node, 0), gradient_edge(start)
        like = step.g[0] if step.g is not None else step.h[0].to(step.node._input_metadata[0].dtype)
        ones = torch.ones_like(like)
        with torch.enable_grad(), silent(), SuspendBackpack([edge]):
            curved = step.g is not None
            (d1,) = torch.autograd.grad([end], [edge], [ones], retain_graph=True, create_graph=curved)
            d2 = None
            if curved and d1.requires_grad:
                options = {"retain_graph": True, "allow_unused": True}
                (d2,) = torch.autograd.grad([d1], [edge], [turned(start, ones)], **options)
        d1, d2 = (t if t is None else turned(start, t.detach()).to(step.dtype) for t in (d1, d2))
        return crossed(step, d1, d2)

    return cross


def _root_mean_square(op: Operation, name: str) -> Composite | None:
    """Find ``x * rsqrt(mean(x^2) + eps)`` or ``x / sqrt(mean(x^2) + eps)``."""
    if name == "MulBackward0":
        orders, root = ((0, 1), (1, 0)), "RsqrtBackward0"
    elif name == "DivBackward0":
        orders, root = ((0, 1),), "SqrtBackward0"
    else:
        return None
    for k, other in orders:
        start = op.inputs[k]
        found = _chain(op.inputs[other], root, start)
        if found is not None and op.shape(0) == shape_of(start):
            inside, axes = found
            cross = _of_root_mean_square(inside[0].node, root, axes, k)
            return Composite(cross, start, tuple(inside))
    return None


def _chain(edge: Edge, root: str, x: Edge) -> tuple[list[Operation], tuple[int, ...]] | None:
    """Return the operations from a root back to x, and the axes of the mean."""
    inside, axes = [], None
    for names in ((root,), ("AddBackward0", "AddBackward1"), ("MeanBackward1",)):
        op, place = edge
        if place < 0:
            return None
        if op.name not in names:
            if "AddBackward0" in names:
                continue  # without eps
            return None
        live = [e for e in op.inputs if e is not None]
        if len(live) != 1:
            return None
        if op.name == "MeanBackward1":
            if not op.node._saved_keepdim:
                return None
            axes = tuple(signed(a) for a in op.node._saved_dim)
        inside.append(op)
        edge = live[0]
    square, place = edge
    if place < 0:
        return None
    power = square.name == "PowBackward0" and float(square.node._saved_exponent) == 2
    if not (power or square.name == "MulBackward0") or not all(same(e, x) for e in square.inputs):
        return None
    inside.append(square)
    return inside, axes


def _of_root_mean_square(
    root: Node, name: str, axes: tuple[int, ...], place: int
) -> Callable[[Step], Tensor]:
    def cross(step: Step) -> Tensor:
        r = root._saved_result.to(step.dtype)
        rrms = r if name == "RsqrtBackward0" else 1 / r
        x = step.saved("self") if place == 0 else step.saved("other")
        return root_mean_square(step.h[0], step.gradient, x * rrms, rrms, axes)

    return cross


def _unit_vectors(op: Operation, name: str) -> Composite | None:
    """Find ``x / max(norm(x), eps)``, as in ``F.normalize``, and ``x / norm(x)``."""
    if name != "DivBackward0":
        return None
    (start, edge), inside, eps = op.inputs, [], 0.0
    while edge[1] >= 0:
        last = edge[0]
        inside.append(last)
        edge = last.inputs[0]
        if last.name == "LinalgVectorNormBackward0":
            norm = last.node
            fits = norm._saved_ord == 2 and norm._saved_keepdim and op.shape(0) == shape_of(start)
            found = Composite(_of_unit_vectors(norm, eps), start, tuple(inside))
            return found if fits and same(edge, start) else None
        if last.name == "ClampMinBackward0":
            eps = float(last.node._saved_min)
        elif last.name != "ExpandBackward0":
            return None
    return None


def _of_unit_vectors(norm: Node, eps: float) -> Callable[[Step], Tensor]:
    def cross(step: Step) -> Tensor:
        r, x, g = norm._saved_result.to(step.dtype), step.saved("self"), step.gradient
        axes = reduced_axes(norm, x.dim())
        D = prod(x.shape[a] for a in axes)
        v = None if g is None else g / D**0.5
        rrms = D**0.5 / r
        h = root_mean_square(step.h[0] / D, v, x * rrms, rrms, axes)
        return torch.where(r < eps, step.h[0] / eps**2, h) if eps else h

    return cross
