"""Tying a scalar that no loss module computed to what its Hessian is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backpack_ext.context import tying
from backpack_ext.engine import on_loss
from backpack_ext.errors import RecordingError
from backpack_ext.graph import edge_of
from backpack_ext.loss_call import KnownDiagonal, LossCall


def attach_loss(
    loss_module: nn.Module,
    logits: Tensor,
    targets: Tensor,
    value: Tensor,
    check: bool = True,
    batch_axis: int = 0,
) -> Tensor:
    """Tie a scalar that no loss module computed to a loss definition.

    For models that compute their loss inside, and for losses written by hand. From then on
    ``value`` acts like the output of ``loss_module(logits, targets)`` in an extended model.

    Args:
        loss_module: Defines the Hessian with respect to the logits, and the reduction.
        logits: What the loss is a function of; any tensor of the graph that ``value`` comes from.
        targets: The targets.
        value: The scalar that ``backward()`` will start from, or a part of it.
        check: Whether to compare ``value`` with ``loss_module(logits, targets)``. Switch it off
            where the loss module stands for another loss on purpose (a policy loss, say).
        batch_axis: 0, or 1 if the rows of the logits are ordered sequence-first.

    Returns:
        ``value``.

    Raises:
        RecordingError: If ``logits`` or ``value`` require no gradient, or ``value`` is a leaf.
        ValueError: If ``value`` differs from what the loss module gives.

    Example:
        >>> from torch.nn import functional as F
        >>> from backpack_ext import extend
        >>> model = extend(nn.Linear(3, 2))
        >>> out, y = model(torch.ones(4, 3)), torch.tensor([0, 1, 1, 0])
        >>> value = attach_loss(nn.CrossEntropyLoss(), out, y, F.cross_entropy(out, y))
    """
    if not (logits.requires_grad and value.requires_grad) or value.grad_fn is None:
        raise RecordingError(
            "attach_loss: `logits` and `value` must require a gradient and `value` must have been "
            "computed from parameters; was it detached, or computed under no_grad?"
        )
    if check:
        with torch.no_grad():
            expected = loss_module(logits.detach(), targets)
        tolerance = 1e-2 if min(value.element_size(), logits.element_size()) < 4 else 1e-4
        if expected.shape != value.shape or not torch.allclose(
            expected.to(value.dtype), value.detach(), rtol=tolerance, atol=tolerance
        ):
            raise ValueError(
                f"attach_loss: the value is {value.detach()}, but {loss_module} of these logits and "
                f"targets gives {expected}. Pass the loss that was computed, or check=False if it "
                "stands for another one on purpose."
            )
    tie(value, LossCall(loss_module, logits, targets, batch_axis, value=value))
    return value


def tie(value: Tensor, call: LossCall | KnownDiagonal) -> None:
    """Have a backward pass that reaches a scalar know what it is."""
    place = value.output_nr

    def arrive(grads: tuple[Tensor | None, ...]) -> None:
        if grads[place] is not None:
            on_loss(call, grads[place])

    value.grad_fn.register_prehook(arrive)  # cheaper than a hook on the tensor


def attach_diagonal(
    outputs: Tensor | Sequence[Tensor], diagonals: Tensor | Sequence[Tensor], value: Tensor
) -> Tensor:
    r"""Tell the Hessian diagonal of a scalar that no loss module computed.

    For losses without a rule, policy losses for instance: see `backpack_ext.policy`. `HesScale` and
    `BL89` start from

    .. math::  h_i = \frac{\partial^2 \mathrm{value}}{\partial z_i^2}

    and whatever factor ``value`` enters the total with is taken into account. It may be negative.

    Args:
        outputs: What the scalar is a function of: tensors of the graph that ``value`` comes from, the
            heads of an actor-critic network for instance.
        diagonals: For each of them the diagonal, of the same shape, reduction (1/N) included.
        value: The scalar that ``backward()`` will start from, or a part of it.

    Returns:
        ``value``.

    Raises:
        RecordingError: If outputs or ``value`` require no gradient.
        ValueError: If shapes differ, or ``value`` is no scalar.

    Example:
        >>> from backpack_ext import HesScale, backpack
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 3.0]])
        >>> z = layer(x)
        >>> with backpack(HesScale()):
        ...     attach_diagonal(z, 12 * z.detach() ** 2, (z**4).sum()).backward()
        >>> torch.allclose(layer.weight.hesscale, 12 * z**2 * x**2)
        True
    """
    outputs, diagonals = ((t,) if isinstance(t, Tensor) else tuple(t) for t in (outputs, diagonals))
    if value.grad_fn is None or not all(z.requires_grad for z in outputs):
        raise RecordingError(
            "attach_diagonal: `outputs` and `value` must require a gradient and `value` must have been "
            "computed from parameters; was it detached, or computed under no_grad?"
        )
    if value.numel() != 1:
        raise ValueError(f"attach_diagonal: `value` has shape {tuple(value.shape)}; expected a scalar.")
    shapes = [tuple(z.shape) for z in outputs], [tuple(h.shape) for h in diagonals]
    if shapes[0] != shapes[1]:
        raise ValueError(f"attach_diagonal: outputs of shapes {shapes[0]}, diagonals of {shapes[1]}.")
    if tying():
        seeds = [(edge_of(z), h.detach()) for z, h in zip(outputs, diagonals, strict=True)]
        tie(value, KnownDiagonal(seeds))
    return value
