"""Several operations that are crossed as one, because together they are exact.

Crossing them one by one would drop the off-diagonals in between: those of ``x * sigmoid(x)``, where both
factors depend on x, or of ``x * rsqrt(mean(x^2) + eps)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack_ext.context import SuspendBackpack
from backpack_ext.diagonals.attention import scores
from backpack_ext.diagonals.norms import root_mean_square
from backpack_ext.diagonals.operation import same, shape_of
from backpack_ext.diagonals.pointwise import ACTIVATIONS, BY_AUTOGRAD, PIECEWISE_LINEAR
from backpack_ext.diagonals.rule import Step, crossed, signed
from backpack_ext.sweep import silent

if TYPE_CHECKING:
    from backpack_ext.diagonals.operation import Edge, Operation

# Elementwise operations of several tensors: a composition begins at one of them.
_JOINS = frozenset(
    (
        *("MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0", "MaximumBackward0"),
        *("MinimumBackward0", "WhereBackward0", "AddcmulBackward0", "AddcdivBackward0"),
        *("LerpBackward0", "PowBackward1", "LogaddexpBackward0"),
    )
)
_PRODUCTS = ("BmmBackward0", "MmBackward0")

# All operations that a composition or an attention may end with.
ENDS = (*_JOINS, *_PRODUCTS)

_ELEMENTWISE = frozenset(
    (
        *(*_JOINS, *ACTIVATIONS, *PIECEWISE_LINEAR, *BY_AUTOGRAD),
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

# Where the probabilities of an attention may pass on their way to the product with the values.
_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ExpandBackward0")
_SOFTMAX = ("SoftmaxBackward0", "SafeSoftmaxBackward0")


class Composite(NamedTuple):
    """Operations that end at one and begin at one tensor.

    Args:
        cross: Maps the last operation's `Step` to h at the tensor.
        start: Where the tensor comes from.
        inside: The operations, without the last one.
        reads: How many of their inputs the tensor is.
    """

    cross: Callable[[Step], Tensor]
    start: Edge
    inside: tuple[Operation, ...]
    reads: int


def composite_of(op: Operation) -> Composite | None:
    """Return the composition that ends with an operation; None if there is none."""
    name = op.name
    if name not in _JOINS:
        return None
    inputs = [edge for edge in op.inputs if edge is not None]
    if len(inputs) < 2:
        return None
    return _elementwise(op, inputs) or _root_mean_square(op, name)


def _elementwise(op: Operation, inputs: list[Edge]) -> Composite | None:
    """Find the tensor of which all inputs are elementwise functions."""
    shape, edges, inside = None, dict.fromkeys(inputs), []
    while len(edges) > 1:
        latest = max(edges, key=_made)
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
    if shape_of(start) != op.shape(0) or not _closed(op, inside):
        return None
    if start[1] < 0:
        return None  # a function of parameters alone: crossed for itself, once for all data
    edge = GradientEdge(start[0].node, start[1])
    return Composite(_by_autograd(edge), start, tuple(inside), _reads(start, (op, *inside)))


def _made(edge: Edge) -> int:
    """Return when an operation was recorded: before whatever reads it. Leaves come first."""
    return -1 if edge[1] < 0 else edge[0].node._sequence_nr()


def _closed(op: Operation, inside: Iterable[Operation]) -> bool:
    """Whether nothing else reads what is inside: its gradients would be those of others too."""
    return all(_reads((o, 0), (op, *inside)) == o.waiting for o in inside)


def _reads(start: Edge, by: Iterable[Operation]) -> int:
    """Return how often operations read what an edge's operation (or parameter) returns."""
    return sum(edge is not None and edge[0] is start[0] for o in by for edge in o.inputs)


def _by_autograd(edge: GradientEdge) -> Callable[[Step], Tensor]:
    """Return the crossing of an elementwise function: autograd's f' and f''."""

    def cross(step: Step) -> Tensor:
        end = GradientEdge(step.node, 0)
        like = step.g[0] if step.g is not None else step.h[0].to(step.node._input_metadata[0].dtype)
        ones = torch.ones_like(like)
        with torch.enable_grad(), silent(), SuspendBackpack():
            curved = step.g is not None
            (d1,) = torch.autograd.grad([end], [edge], [ones], retain_graph=True, create_graph=curved)
            d2 = None
            if curved and d1.requires_grad:
                options = {"retain_graph": True, "allow_unused": True}
                (d2,) = torch.autograd.grad([d1], [edge], [ones], **options)
        dtype = step.dtype
        return crossed(step, d1.detach().to(dtype), None if d2 is None else d2.to(dtype))

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
            if not _closed(op, inside):
                return None
            cross = _of_root_mean_square(inside[0].node, root, axes, k)
            return Composite(cross, start, tuple(inside), _reads(start, (op, *inside)))
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


class Attention(NamedTuple):
    """A product of probabilities with values.

    Args:
        softmax: The softmax that the probabilities come from.
        dropout: The operation that multiplies them with a mask; None without.
    """

    softmax: Operation
    dropout: Operation | None


def attention_of(op: Operation) -> Attention | None:
    """Return the attention that ends with a matrix product; None if it is something else."""
    if op.name not in _PRODUCTS or op.inputs[0] is None:
        return None
    edge, dropout, numel = op.inputs[0], None, None
    for _ in range(8):
        o, place = edge
        if place < 0:
            return None
        if o.name in (*_SOFTMAX, *_RESHAPES, "MulBackward0") and numel is None:
            numel = o.shape(place).numel()
        if numel is None or o.shape(place).numel() != numel:
            return None
        if o.name in _SOFTMAX:
            axes = len(o.shape(0))
            fits = signed(o.node._saved_dim) % axes == axes - 1
            return Attention(o, dropout) if fits else None
        if o.name == "MulBackward0" and o.inputs[1] is None and dropout is None:
            dropout = o
        elif o.name not in _RESHAPES:
            return None
        edge = o.inputs[0]
    return None


def attention_scores(found: Attention, step: Step) -> Tensor:
    """Return the first term of h at the softmax's input."""
    A = found.softmax.node._saved_result
    V, (h,) = step.saved("mat2"), step.h
    shape = A.shape
    A = A.to(step.dtype).reshape(*V.shape[:-2], *shape[-2:])
    dropped = None
    if found.dropout is not None:
        dropped = found.dropout.node._saved_other.to(step.dtype)
        dropped = dropped.expand(found.dropout.shape(0)).reshape(A.shape)
    return scores(A, V, h, dropped).reshape(shape)
