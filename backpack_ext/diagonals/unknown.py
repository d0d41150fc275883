r"""Operations without a rule: random signs and autograd.

With signs r, and u at the operation's inputs,

.. math::

    h^{in} = \big(J^T r \sqrt{|h|}\big) \odot \big(J^T r \, \mathrm{sign}(h) \sqrt{|h|}\big)
             + u \odot \nabla_x \big\langle J(x)^T g, u \big\rangle,

exact wherever no two outputs share an input and the second derivative is diagonal (elementwise
functions, moves, scalings, reductions that are linear), unbiased elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack_ext.context import SuspendBackpack
from backpack_ext.diagonals.rule import Diagonals, Step, call
from backpack_ext.errors import UnsupportedError
from backpack_ext.sweep import silent

# Operations that hide many others, with their parameters: random signs would say next to nothing.
OPAQUE = {
    "CompiledFunctionBackward": "torch.compile: run the model as it is, or with backend='eager'",
    "MkldnnRnnLayerBackward0": "a fused kernel: extend the model, which switches it off",
    "CudnnRnnBackward0": "a fused kernel: extend the model, which switches it off",
    "MiopenRnnBackward0": "a fused kernel: extend the model, which switches it off",
    "CheckpointFunctionBackward": "activation checkpointing: pass use_reentrant=False",
}

Signs = Callable[[Tensor], Tensor]


def check_known(node: Node) -> None:
    """Raise if an operation without a rule cannot be crossed at all."""
    name = node.name()
    if name in OPAQUE:
        raise UnsupportedError(f"No Hessian diagonal can cross {name} ({OPAQUE[name]}).")
    if any(like.dtype.is_complex for like in node._input_metadata):
        raise complex_numbers(name)


def complex_numbers(where: str) -> UnsupportedError:
    """Return the error for complex tensors."""
    return UnsupportedError(
        f"Hessian diagonals are those of functions of real numbers, but {where} computes with complex "
        "ones. Write this part with real tensors, or detach() it from the parameters."
    )


def by_signs(step: Step, signs: Signs, refuse: bool) -> Diagonals:
    """Cross any operation.

    Args:
        step: The operation.
        signs: Returns random signs shaped like a tensor.
        refuse: Whether to raise where there is a second term.
    """
    roots, others = [], []
    for h in step.h:
        root = None if h is None else h.abs().sqrt_() * signs(h)
        roots.append(root)
        others.append(None if h is None else root * h.sign())
    left, right = call(step.node, roots), call(step.node, others)
    if any(t is not None and t.is_complex() for t in left):
        raise complex_numbers(step.node.name())
    out = [None if a is None else a * b for a, b in zip(left, right, strict=True)]
    if step.g is not None:
        for k, more in enumerate(_curvature(step, signs, refuse)):
            if more is not None:
                # the former has the output's shape where the input was broadcast, the latter the input's
                out[k] = more if out[k] is None else out[k].sum_to_size(more.shape) + more
    return out


def _curvature(step: Step, signs: Signs, refuse: bool) -> Diagonals:
    """Return the second term for each input, in its shape; None where it is zero."""
    node = step.node
    out: list[Tensor | None] = []
    edges = [None if child is None else GradientEdge(child, k) for child, k in node.next_functions]
    with torch.enable_grad(), silent(), SuspendBackpack(filter(None, edges)):
        # what does not depend on g either was computed in a way that autograd did not see
        g = [None if g is None else g.detach().requires_grad_() for g in step.g]
        moved = call(node, g)
        for k, (edge, v, need) in enumerate(zip(edges, moved, step.need, strict=True)):
            out.append(None)
            if v is None or not need:
                continue
            try:
                if v.grad_fn is None or v.grad_fn.name() == "torch::autograd::Error":
                    if all(v is not t for t in g) and v.any():
                        raise RuntimeError("its backward is not differentiable")
                    continue
                v = v.sum_to_size(edge.node._input_metadata[edge.output_nr].shape)
                u = signs(v)
                (Hu,) = torch.autograd.grad([v], [edge], [u], retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise UnsupportedError(
                    f"{node.name()} has no rule for Hessian diagonals and cannot be differentiated "
                    f"twice ({error}). Register its derivatives with backpack_ext.register_activation "
                    "or a rule with backpack_ext.register_diagonal_rule, or use gauss_newton=True."
                ) from error
            if Hu is None:
                continue
            if refuse:
                raise UnsupportedError(
                    f"{node.name()} has no rule for Hessian diagonals, and its second derivative "
                    'would be estimated with random signs, which on_curved_glue="raise" refuses. '
                    "Register a rule with backpack_ext.register_diagonal_rule."
                )
            out[k] = (u * Hu).to(step.dtype)
    return out


def twice(step: Step) -> Diagonals:
    """Cross an elementwise operation: exact, whatever the signs."""
    return by_signs(step, torch.ones_like, False)
