"""What one call of a loss leaves behind for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.graph import edge_of
from backpack_ext.layout import Layout
from backpack_ext.losses import LOSSES, CrossEntropyRule, NLLRule, loss_rule
from backpack_ext.saved_input import saves_by_hooks
from curvature.decomposition import widen

if TYPE_CHECKING:
    from backpack_ext.sharing import sharing


class LossCall:
    """One call of a loss: its detached input, target, and the edge that a sweep starts from.

    It is held by a tensor hook on the loss's value and holds only what lies upstream of it. Of the
    cross-entropy's logits autograd keeps the logarithms of their softmax, which differ by a constant per
    row that no quantity sees: where these are found, the logits are not held beside them.

    Args:
        module: The loss module.
        z: Its input (the logits).
        y: Its target.
        batch_axis: 0; 1 if rows are to be read sequence-first.
        others: What else it was called with that may require a gradient.
        value: What it returned.
    """

    def __init__(
        self,
        module: nn.Module,
        z: Tensor,
        y: Tensor,
        batch_axis: int = 0,
        others: Sequence[Tensor] = (),
        value: Tensor | None = None,
    ):
        self.module, self.batch_axis = module, batch_axis
        self.rule = loss_rule(type(module))
        self.others = self.other_edges = ()
        if others:
            self.others = tuple(t.detach() for t in others)
            self.other_edges = tuple(edge_of(t) if t.requires_grad else None for t in others)
        self.y, self._y_version = y.detach(), y._version
        self.target_requires_grad = y.requires_grad
        self.start: GradientEdge | None = edge_of(z)
        self._log_softmax = None
        if value is not None and type(self.rule) is CrossEntropyRule and not saves_by_hooks():
            self._log_softmax = _log_softmax_of(z, value)
        self._z = z.detach() if self._log_softmax is None else None
        self._z_version, self._dtype = z._version, z.dtype
        # the block in which the layers behind the loss were called, known in the backward pass
        self.sharing: sharing | None = None

    @property
    def label(self) -> str:
        """The loss's class name, for messages."""
        return type(self.module).__name__

    @property
    def z(self) -> Tensor | None:
        """The detached input, or logits with the same softmax; None once released."""
        if self._z is None and self._log_softmax is not None:
            self._z = self._log_softmax._saved_result.detach().to(self._dtype)
        return self._z

    def check(self) -> None:
        """Raise if the loss's Hessian root cannot be had.

        Raises:
            UnsupportedError: For a loss without a rule, or a target that requires a gradient.
            ValueError: For ``reduction="none"``, or hyper-parameters without a real root.
            RecordingError: If the logits or targets were overwritten since.
        """
        if self.rule is None:
            known = ", ".join(cls.__name__ for cls in LOSSES)
            raise UnsupportedError(
                f"{self.label} has no rule for its Hessian; losses with one: {known}, and subclasses "
                "with the same forward. For another loss, tie its value to one of these with "
                "backpack_ext.attach_loss."
            )
        if self.module.reduction not in ("mean", "sum"):
            raise ValueError(
                f"{self.label} has reduction={self.module.reduction!r}: the scale of the total is "
                'unknown. Use "mean" or "sum", or tie your total to a loss with '
                "backpack_ext.attach_loss."
            )
        if self.target_requires_grad:
            raise UnsupportedError(
                f"{self.label}: the target requires a gradient, but only the curvature with respect "
                "to the input is computed. Detach the target."
            )
        changed = self._log_softmax is None and self._z._version != self._z_version
        if changed or self.y._version != self._y_version:
            raise RecordingError(
                f"{self.label}: the logits or targets were modified in place after the loss had "
                "read them. Use out-of-place operations there."
            )
        self.rule.check(self.module, self.z, self.y)

    @property
    def released(self) -> bool:
        """Whether the graph was freed by an earlier backward pass."""
        return self.start is None

    def scale(self) -> float:
        """Return r."""
        return self.rule.scale(self.module, self._logits(), self.y)

    def diagonals(self, layerwise: bool = False) -> list[tuple[GradientEdge, Tensor]]:
        """Return the diagonal of the loss's Hessian at each of its inputs, without r.

        Args:
            layerwise: Whether to have BL89's in its place.
        """
        z, rule = self._logits(), self.rule
        if not self.other_edges:
            find = rule.layerwise_diagonal if layerwise else rule.diagonal
            return [(self.start, find(self.module, z, self.y))]
        found = rule.other_diagonals(self.module, z, self.y, [widen(t) for t in self.others])
        edges = zip((self.start, *self.other_edges), found, strict=True)
        return [(edge, h) for edge, h in edges if edge is not None]

    def penultimate(self, W: Tensor) -> Tensor:
        """Return the exact diagonal at the input of a linear layer with weight W before z, without r."""
        z = self._logits()
        return self.rule.penultimate(self.module, z, self.y, W.to(z.dtype))

    def gradient(self) -> Tensor:
        """Return the loss's gradient with respect to its input: zero where no term counts."""
        with torch.enable_grad():
            z = self._logits().clone().requires_grad_()
            # not through the module's hooks: this is no call of the user's
            return torch.autograd.grad(self.module.forward(z, self.y, *self.others).sum(), z)[0]

    def _logits(self) -> Tensor:
        """Logits in float32 or above: roots of probabilities need the digits."""
        return widen(self.z if self._log_softmax is None else self._log_softmax._saved_result.detach())

    def layout(self, batch: int) -> Layout:
        """Return how the data are laid out in the logits."""
        class_axis = 1 if isinstance(self.rule, (CrossEntropyRule, NLLRule)) else None
        segments = None
        if self.sharing is not None:
            size = self.z.shape[:1].numel()
            segments = self.sharing.of_loss(size, batch, self.batch_axis)
        return Layout(self.z.shape, batch, self.batch_axis, class_axis, segments)

    def columns(self, batch: int) -> int:
        """Return the number of columns of the exact root."""
        segments = self.layout(batch).segments
        if segments is None:
            return self.rule.columns(self.module, self.z, self.y, batch)
        # those of a single row, for each row of the datum that has most
        return segments.width * self.rule.columns(self.module, self.z, self.y, segments.length)

    def exact(self, batch: int, start: int, stop: int) -> Tensor:
        """Return columns of the exact root, ``[v, *z.shape]``, without r."""
        S = self.rule.exact(self.module, self._logits(), self.y, self.layout(batch), start, stop)
        return S.to(self.z.dtype)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return one random column shaped like z, without r."""
        S = self.rule.sample(self.module, self._logits(), self.y, generator)
        return S.to(self.z.dtype)

    def release(self) -> None:
        """Let go of the logits and the graph."""
        self._z = self._log_softmax = self.y = self.start = None
        self.others = self.other_edges = ()


def _log_softmax_of(z: Tensor, value: Tensor) -> Node | None:
    """Return the operation that took the logarithms of the softmax of z over axis 1, if one is found.

    Its result must have float32's digits: roots of probabilities need them.
    """
    node = value.grad_fn
    for _ in range(8):  # smoothing, class weights, reduction
        if node is None or not node.next_functions:
            return None
        before = node.next_functions[0][0]
        if node.name() == "LogSoftmaxBackward0":
            cast = before is not z.grad_fn and before is not None and before.name() == "ToCopyBackward0"
            source = before.next_functions[0] if cast else node.next_functions[0]
            found = source == (z.grad_fn, z.output_nr) and node._saved_dim == 1
            wide = node._saved_result.itemsize >= 4 and node._saved_result.shape == z.shape
            return node if found and wide else None
        node = before
    return None


class KnownDiagonal:
    """A scalar whose Hessian diagonal was given.

    Args:
        seeds: The edges of what it is a function of, each with the diagonal there.
    """

    label = "attach_diagonal"

    def __init__(self, seeds: list[tuple[GradientEdge, Tensor]]):
        self.seeds = seeds

    @property
    def released(self) -> bool:
        """Whether the graph was freed by an earlier backward pass."""
        return not self.seeds

    def diagonals(self, layerwise: bool = False) -> list[tuple[GradientEdge, Tensor]]:
        """Return copies of the diagonals, in float32 or above: results may be views of them."""
        return [(edge, widen(h.clone())) for edge, h in self.seeds]

    def release(self) -> None:
        """Let go of the graph."""
        self.seeds = []
