r"""Scaled dot-product attention ``O = A V``, ``A = softmax(S)``, ``S = c Q K^T`` with the scale c.

With ``gA = g_O V^T``,

.. math::

    h_V &= (A^2)^T h_O \\
    h_S &= A^2 [h_O (V^2)^T - 2 (h_O O) V^T + \textstyle\sum_c h_O O^2]
           + A (1 - 2A) (gA - \mathrm{rowsum}(A \, gA)) \\
    h_K &= c^2 h_S^T Q^2, \qquad h_Q = c^2 h_S K^2.

The first three are exact. For Q, the off-diagonals of the Hessian of S are dropped. Self-attention
with one shared input also drops the cross terms between Q, K and V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from backpack_ext.diagonals.operation import shape_of
from backpack_ext.diagonals.rule import Diagonals, Step, call, signed
from backpack_ext.diagonals.softmax import softmax_curvature
from backpack_ext.errors import UnsupportedError
from backpack_ext.products import RESHAPES

if TYPE_CHECKING:
    from backpack_ext.diagonals.operation import Edge, Operation


# Where the probabilities of an attention may pass on their way to the product with the values.
_RESHAPES = (
    *(*RESHAPES, "ExpandBackward0"),
    *("UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2"),
    *("SqueezeBackward3", "SqueezeBackward4"),
)
_MOVES = ("TransposeBackward0", "PermuteBackward0")
_DROPOUTS = ("MulBackward0", "NativeDropoutBackward0")
_COPIES = ("CloneBackward0", "AliasBackward0", "ToCopyBackward0")
_SOFTMAX = ("SoftmaxBackward0", "SafeSoftmaxBackward0")

# The products that an attention may end with.
PRODUCTS = ("BmmBackward0", "MmBackward0")


class Attention(NamedTuple):
    """A product of probabilities with values.

    Args:
        entry: Which factor the probabilities are.
        softmax: The softmax that they come from.
        way: What they pass in between, backwards.
    """

    entry: int
    softmax: Operation
    way: tuple[Operation, ...]


def attention_of(op: Operation) -> Attention | None:
    """Return the attention that ends with an operation; None if it is something else."""
    if op.name not in PRODUCTS:
        return None
    for entry, axis in ((0, -1), (1, -2)):
        if op.inputs[entry] is not None:
            found = _way(op.inputs[entry], axis)
            if found is not None:
                return Attention(entry, *found)
    return None


def _way(edge: Edge, axis: int) -> tuple[Operation, tuple[Operation, ...]] | None:
    """Return the softmax over an axis of a tensor that it comes from, and what is in between."""
    way, dropout = [], False
    for _ in range(12):
        op, place = edge
        if place < 0:
            return None
        name, live = op.name, [k for k, e in enumerate(op.inputs) if e is not None]
        if len(live) != 1:
            return None
        if name in _SOFTMAX:
            axes = len(op.shape(0))
            fits = signed(op.node._saved_dim) % axes == axis % axes
            return (op, tuple(way)) if fits else None
        if name in _RESHAPES or name in _MOVES:
            axis = _axis_before(op, axis % len(op.shape(0)))
            if axis is None:
                return None
        elif name in _DROPOUTS and not dropout and op.shape(0) == shape_of(op.inputs[live[0]]):
            dropout = True
        elif name not in _COPIES:
            return None
        way.append(op)
        edge = op.inputs[live[0]]
    return None


def _axis_before(op: Operation, axis: int) -> int | None:
    """Return which axis of its input an operation made into an axis of its output."""
    shape, node = op.shape(0), op.node
    if op.inputs[0][1] < 0:
        return None
    before = shape_of(op.inputs[0])
    if op.name == "TransposeBackward0":
        one, other = (signed(d) % len(shape) for d in (node._saved_dim0, node._saved_dim1))
        return {one: other, other: one}.get(axis, axis)
    if op.name == "PermuteBackward0":
        return signed(node._saved_dims[axis]) % len(shape)
    if before.numel() != shape.numel():
        return None
    behind = shape[axis + 1 :].numel()
    for k, size in enumerate(before):
        if size == shape[axis] and before[k + 1 :].numel() == behind:
            return k
    return None


def attention_scores(found: Attention, step: Step) -> Tensor:
    """Return the first term of h at the softmax's input."""
    (h,), A = step.h, step.lifted(found.softmax.node._saved_result)
    P, V = (step.saved(name) for name in (("self", "mat2") if found.entry == 0 else ("mat2", "self")))
    if P is None:  # not saved, because V needs no gradient
        P = A
        for op in reversed(found.way):
            P = _forth(op, P)
    if found.entry == 0:
        terms = _terms(P, V, h)
    else:
        terms = [t.mT for t in _terms(P.mT, V.mT, h.mT)]
    for op in found.way:
        terms = _back(op, terms)
    first, second, third = terms
    return (first - 2 * second + third) * A.square()


def _terms(P: Tensor, V: Tensor, h: Tensor) -> list[Tensor]:
    """Return ``h (V^2)^T``, ``(h O) V^T`` and ``sum_c h O^2``, all shaped like P."""
    O = P @ V
    hO = h * O
    return [h @ V.square().mT, hO @ V.mT, (hO * O).sum(-1, keepdim=True).expand(P.shape)]


def _back(op: Operation, terms: list[Tensor]) -> list[Tensor]:
    """Carry the terms back to the input of an operation that the probabilities pass."""
    if op.name in _DROPOUTS:
        mask = _mask(op).to(terms[0].dtype)
        return [terms[0] * mask.square(), terms[1] * mask, terms[2]]
    if op.name in _COPIES:
        return terms
    return [call(op.node, (t,))[0] for t in terms]


def _forth(op: Operation, P: Tensor) -> Tensor:
    """Carry probabilities through an operation that they pass."""
    if op.name in _DROPOUTS:
        return P * _mask(op).to(P.dtype)
    if op.name in _COPIES:
        return P
    shape = op.shape(0)
    place = torch.arange(shape.numel(), dtype=torch.float64, device=P.device).reshape(shape)
    out = P.new_empty(shape.numel())
    out[call(op.node, (place,))[0].flatten().long()] = P.flatten()
    return out.reshape(shape)


def _mask(op: Operation) -> Tensor:
    """Return what a dropout multiplied its input with."""
    node = op.node
    if op.name == "NativeDropoutBackward0":
        return node._saved_result1 / (1 - node._saved_p)
    return node._saved_other if op.inputs[1] is None else node._saved_self


def fused(step: Step) -> Diagonals:
    """Cross torch's fused attention kernels."""
    n, need, (h, *_), g = step.node, step.need, step.h, step.gradient
    if getattr(n, "_saved_dropout_p", 0.0):
        raise UnsupportedError(
            f"{n.name()}: the dropout mask of a fused attention kernel cannot be had. Set its "
            "dropout to 0 or call eval(), or use torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )
    Q, K, V = (step.saved(name) for name in ("query", "key", "value"))
    h, g = (t if t is None else t[..., : V.shape[-1]] for t in (h, g))
    scale = n._saved_scale if n._saved_scale is not None else Q.shape[-1] ** -0.5
    repeats = Q.shape[-3] // K.shape[-3]
    if repeats > 1:  # several query heads share one of keys and values
        K, V = (t.repeat_interleave(repeats, -3) for t in (K, V))
    A = _probabilities(n, Q, K, scale)
    A2 = A.square()
    h_V = A2.mT @ h if need[2] else None
    h_Q = h_K = None
    if need[0] or need[1]:
        first, second, third = _terms(A, V, h)
        h_S = (first - 2 * second + third) * A2
        if g is not None:
            h_S += softmax_curvature(A, g @ V.mT)
        h_S *= scale**2
        h_Q = h_S @ K.square() if need[0] else None
        h_K = h_S.mT @ Q.square() if need[1] else None
    if repeats > 1:
        h_K, h_V = (t if t is None else t.unflatten(-3, (-1, repeats)).sum(-3) for t in (h_K, h_V))
    return h_Q, h_K, h_V


def _probabilities(n, Q: Tensor, K: Tensor, scale: float) -> Tensor:
    S = scale * (Q @ K.mT)
    mask = None
    for name in ("_saved_attn_mask", "_saved_attn_bias"):
        mask = getattr(n, name, None) if mask is None else mask
    if mask is not None and mask.requires_grad:
        raise UnsupportedError(
            f"{n.name()}: a mask that requires a gradient inside of a fused attention kernel. Use "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )
    if getattr(n, "_saved_is_causal", False):
        T, M = S.shape[-2:]
        seen = torch.ones(T, M, dtype=torch.bool, device=S.device).tril()
        S = S.masked_fill(~seen, -torch.inf)
    if mask is not None:
        S = S.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else S + mask.to(S.dtype)
    # a query that sees no key has no probabilities, as in torch's kernels
    return S.softmax(-1).nan_to_num(0.0)
