"""What the recursion needs to know about an operation of the graph, and how to tell it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack_ext import own_pass
from backpack_ext.own_pass import in_a_pass_of_its_own

# Diagonals, or gradients, at the outputs (or inputs) of an operation; None where there is none.
Diagonals = Sequence[Tensor | None]


# Marks an input that is a transposed parameter.
TURNED = -2


@dataclass(slots=True, eq=False)
class Step:
    """One operation F on the way of the recursion.

    Args:
        node: The operation's node; it still holds what it saved for its backward.
        h: The Hessian diagonal at each of its outputs, in float32 or above; None where it is zero.
        g: The gradient at each of its outputs; None if the second derivative of F is left out.
        need: For each of its inputs, whether the recursion goes on there; `TURNED` if it is a transposed
            parameter.
    """

    node: Node
    h: Diagonals
    g: Diagonals | None
    need: Sequence[bool]

    def saved(self, name: str) -> Tensor | None:
        """Return a tensor that the operation saved, in the data type of h."""
        t = getattr(self.node, "_saved_" + name)
        return t if t is None else self.lifted(t)

    def lifted(self, t: Tensor) -> Tensor:
        """Return a tensor in the data type of h, if its own is another floating one."""
        h = self.h[0]
        if (h is not None and t.dtype == h.dtype) or not t.is_floating_point():
            return t
        return t.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The data type of h."""
        h = self.h[0]
        return (next(h for h in self.h if h is not None) if h is None else h).dtype

    @property
    def gradient(self) -> Tensor | None:
        """The gradient at the only output, in the data type of h."""
        g = None if self.g is None else self.g[0]
        return g if g is None or g.dtype == self.h[0].dtype else g.to(self.h[0].dtype)


@dataclass(slots=True, eq=False)
class DiagonalRule:
    r"""How a Hessian diagonal crosses an operation F.

    .. math::  h^{in}_j = \sum_i J_{ij}^2 h_i + \sum_i g_i \frac{\partial^2 F_i}{\partial x_j^2}

    Args:
        cross: Maps a `Step` to h at each of the operation's inputs. Where an input was broadcast, h may
            have the output's shape.
        curved: Whether there is a second term, so that gradients are needed; or, given which inputs are
            needed, whether there is one for them.
        joins: With how many wanted inputs, or more, it may be the end of several operations that are
            crossed as one; 0 if it never is.
        turns: Whether h at an input that is a transposed parameter comes in the parameter's own layout.
        shaped: Whether h comes in the inputs' shapes, and needs no sum over axes that were broadcast.
        adds: Whether it adds two tensors up.
        several: Whether h at other outputs than the first counts.
    """

    cross: Callable[[Step], Diagonals]
    curved: bool | Callable[[Sequence[bool]], bool] = False
    joins: int = 0
    several: bool = False
    adds: bool = False
    turns: bool = False
    shaped: bool = False

    def curves(self, inputs: Sequence[object | None]) -> bool:
        """Return whether gradients are needed, given its inputs, None where nothing is wanted."""
        if callable(self.curved):
            return self.curved([edge is not None for edge in inputs])
        return self.curved

    def may_join(self, inputs: Sequence[object | None]) -> bool:
        """Return whether it may be such an end, given its inputs, None where nothing is wanted."""
        return bool(self.joins) and len(inputs) - inputs.count(None) >= self.joins


# Filled by diagonals/__init__.py, where the whole table is in sight, and by `register_diagonal_rule`.
RULES: dict[str, DiagonalRule] = {}


def register_diagonal_rule(
    operation: str, curved: bool = True, overwrite: bool = False
) -> Callable[[Callable[[Step], Diagonals]], Callable[[Step], Diagonals]]:
    r"""Decorate a function that carries a Hessian diagonal across an operation, for all extensions.

    .. math::  h^{in}_j = \sum_i J_{ij}^2 h_i + \sum_i g_i \frac{\partial^2 F_i}{\partial x_j^2}

    Args:
        operation: Name of the operation's node in the graph, ``output.grad_fn.name()``: for a
            ``torch.autograd.Function`` its class's name with ``Backward`` behind it.
        curved: Whether there is a second term. If not, ``step.g`` is None.
        overwrite: Whether to replace an existing rule.

    Raises:
        ValueError: If the operation has a rule and ``overwrite`` is False.

    Example:
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x * x
        ...     @staticmethod
        ...     def backward(ctx, g):
        ...         return 2 * ctx.saved_tensors[0] * g
        >>> @register_diagonal_rule("SquareBackward")
        ... def square(step):
        ...     (x,) = step.node.saved_tensors
        ...     h = 4 * x**2 * step.h[0]
        ...     return [h if step.g is None else h + 2 * step.gradient]
    """

    def decorate(cross: Callable[[Step], Diagonals]) -> Callable[[Step], Diagonals]:
        if operation in RULES and not overwrite:
            raise ValueError(
                f"{operation} already has the rule {RULES[operation]!r}; use overwrite=True."
            )
        RULES[operation] = DiagonalRule(cross, curved)
        found.clear()
        return cross

    return decorate


# Rules by type of node, filled as operations are met. Some types are shared by several operations.
found: dict[type, DiagonalRule] = {}
_SHARED = "CppFunction"


def rule_of(node: Node) -> DiagonalRule | None:
    """Return the rule of a node; None if it has none."""
    kind = type(node)
    rule = found.get(kind)
    if rule is None:
        rule = RULES.get(node.name())
        if kind.__name__ != _SHARED and rule is not None:
            found[kind] = rule
    return rule


class Unpacking:
    """Whether saved tensors come from hooks, which hand out each of them once per backward pass."""

    once = False


def call(node: Node, arguments: Diagonals) -> tuple[Tensor | None, ...]:
    """Return an operation's vector-Jacobian product, in whatever precision it was computed."""
    if not callable(node) and len(arguments) > 1:
        arguments = _materialized(node, arguments)
    k, first = next(((k, t) for k, t in enumerate(arguments) if t is not None), (0, None))
    if first is None or first.dtype == (dtype := node._input_metadata[k].dtype):
        return _call(node, arguments)
    return _widely(node, arguments, dtype)


def _materialized(node: Node, arguments: Diagonals) -> Diagonals:
    """Return the arguments with zeros where there is none, as autograd does for custom functions."""
    like = next(t for t in arguments if t is not None)
    return [
        like.new_zeros(to.shape) if t is None else t
        for t, to in zip(arguments, node._input_metadata, strict=True)
    ]


def _call(node: Node, arguments: Diagonals) -> tuple[Tensor | None, ...]:
    if Unpacking.once or not _asked_for_all(node):
        return in_a_pass_of_its_own(partial(own_pass.call, node, arguments))
    return own_pass.call(node, arguments)


def _asked_for_all(node: Node) -> bool:
    """Whether the running pass wants the gradient of each of an operation's inputs.

    One that was asked for some gradients, ``backward(inputs=...)``, computes no others, and would have h
    end there.
    """
    for child, _ in node.next_functions:
        if child is not None:
            try:
                if not torch._C._will_engine_execute_node(child):
                    return False
            except RuntimeError:  # a leaf whose gradient `torch.autograd.grad` captures: it is wanted
                continue
    return True


# How many numbers of a lower precision make one of float32: three of bfloat16.
_PIECES = 3


def _widely(node: Node, arguments: Diagonals, low: torch.dtype) -> tuple[Tensor | None, ...]:
    """Call an operation in lower precision with arguments in a higher one.

    Some kernels take that, some refuse it, some round the result. For the latter two the arguments are
    cut into pieces of the lower precision, whose results are added up in the higher one.
    """
    wide = next(t.dtype for t in arguments if t is not None)
    try:
        out = _call(node, arguments)
        if all(t is None or t.dtype == wide for t in out):
            return out
    except RuntimeError:  # refused
        pass
    total: list[Tensor | None] = []
    for _ in range(_PIECES):
        pieces = [None if t is None else t.to(low) for t in arguments]
        arguments = [
            None if t is None else t - p.to(wide) for t, p in zip(arguments, pieces, strict=True)
        ]
        out = [None if t is None else t.to(wide) for t in _call(node, pieces)]
        total = [
            a if b is None else b if a is None else a + b
            for a, b in zip(total or [None] * len(out), out, strict=True)
        ]
    return tuple(total)


def crossed(step: Step, d1: Tensor, d2: Tensor | None) -> Tensor:
    """Return ``f'^2 h + f'' g`` of an elementwise function."""
    (h,), g = step.h, step.gradient
    out = d1 * d1
    out *= h
    return out if d2 is None or g is None else out.addcmul_(d2, g)


def signed(axis: int) -> int:
    """Return an axis or index that torch hands out as an unsigned number."""
    return axis - 2**64 if axis >= 2**63 else axis
