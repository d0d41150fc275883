r"""Losses: their reduction scale and the roots of their Hessian.

A loss is :math:`\ell = r \sum_n \sum_t \ell_{nt}`. Everything here is about one term's Hessian,
without r; `LossRule.scale` is the only place that knows r.

A datum n may own several rows or positions t of the logits (tokens, pixels). An exact root has one
column per position and class, ``C T`` of them, because columns that positions share would put
cross-position terms into every quantity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.graph import edge_of

if TYPE_CHECKING:
    from backpack_ext.sharing import Segments, sharing


class LossRule(ABC):
    """The derivatives of one loss module with respect to its input z (the logits)."""

    @abstractmethod
    def scale(self, module: nn.Module, z: Tensor, y: Tensor) -> float:
        """Return r: 1 for reduction "sum", 1 / (number of terms) for "mean"."""

    @abstractmethod
    def columns(self, module: nn.Module, z: Tensor, y: Tensor, batch: int) -> int:
        """Return the number of columns of the exact root."""

    @abstractmethod
    def exact(
        self, module: nn.Module, z: Tensor, y: Tensor, layout: Layout, start: int, stop: int
    ) -> Tensor:
        """Return columns ``start`` to ``stop`` of the exact root, ``[v, *z.shape]``.

        ``sum_v S[v,n] S[v,n]^T`` is the Hessian of datum n's terms, without r.
        """

    @abstractmethod
    def sample(self, module: nn.Module, z: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return one random column shaped like z with ``E[S_n S_n^T]`` = the Hessian, without r."""

    def check(self, module: nn.Module, z: Tensor, y: Tensor) -> None:
        """Raise if the loss is called in a way that is not covered."""


class Layout:
    """How the data are laid out in the logits.

    Args:
        shape: Shape of the logits.
        batch: Number of data N. The leading size is N, or ``k N``, read as ``[N, k]``.
        batch_axis: 0; or 1 for rows that are to be read as ``[k, N]`` (sequence-first).
        class_axis: Axis of the classes, or None when every element is a term.
        segments: The datum of each of the leading rows, where these are ragged. T is then the
            largest number of positions of a datum; the others' missing positions hold zeros.

    Raises:
        UnsupportedError: If the data cannot be found.
    """

    def __init__(
        self,
        shape: torch.Size,
        batch: int,
        batch_axis: int,
        class_axis: int | None,
        segments: Segments | None = None,
    ):
        if not shape or (segments is None and shape[0] % batch):
            raise UnsupportedError(
                f"The loss's input has shape {tuple(shape)}; its leading size is no multiple of the "
                f"batch size {batch} of the model's input, so its rows cannot be told apart by "
                "datum. Keep the data on the leading axis, e.g. logits.view(N * T, C)."
            )
        self.shape, self.batch, self.batch_axis = shape, batch, batch_axis
        self.class_axis, self.segments = class_axis, segments

    def of_terms(self, shape: torch.Size) -> Layout:
        """Return the layout of a tensor without the class axis."""
        return Layout(shape, self.batch, self.batch_axis, None, self.segments)

    @property
    def _rows(self) -> int:
        """The number of (padded) rows of a datum."""
        return self.shape[0] // self.batch if self.segments is None else self.segments.width

    def split(self, t: Tensor) -> Tensor:
        """Bring ``[v, *shape]`` to ``[v, N, T, C]`` (C = 1 without classes)."""
        t = self._lead(t)
        if self.class_axis is None:
            return t.flatten(2).unsqueeze(-1)
        t = t.movedim(2 + self.class_axis, -1)
        return t.flatten(2, -2)

    def join(self, t: Tensor) -> Tensor:
        """Bring ``[v, N, T, C]`` back to ``[v, *shape]``."""
        v, k = t.shape[0], self._rows
        rest = list(self.shape[1:])
        if self.class_axis is not None:
            classes = rest.pop(self.class_axis - 1)
            t = t.reshape(v, self.batch, k, *rest, classes).movedim(-1, 2 + self.class_axis)
        else:
            t = t.reshape(v, self.batch, k, *rest)
        if self.segments is not None:
            return self.segments.unpad(t, 1)
        if self.batch_axis == 1:
            t = t.transpose(1, 2)
        return t.reshape(v, *self.shape)

    def halves(self, t: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield halves of the data, so that each pair is told apart once.

        Args:
            t: ``[*shape]``.

        Yields:
            Which data are chosen, ``[N]``, and ``t`` with the others' entries zeroed.
        """
        parts = self.split(t.unsqueeze(0))
        data = torch.arange(self.batch, device=t.device)
        for bit in range((self.batch - 1).bit_length()):
            for value in (0, 1):
                chosen = (data >> bit) % 2 == value
                yield chosen, self.join(parts * chosen[:, None, None])[0]

    def _lead(self, t: Tensor) -> Tensor:
        if self.segments is not None:
            return self.segments.pad(t, 1)
        k = self._rows
        if self.batch_axis == 1:
            return t.unflatten(1, (k, self.batch)).transpose(1, 2)
        return t.unflatten(1, (self.batch, k))


def probing_vector(like: Tensor) -> Tensor:
    """Return a vector of varied entries, none of them zero, to send through a graph."""
    pattern = torch.arange(like.numel(), device=like.device).reshape(like.shape)
    return ((pattern % 7 + 1) * (1 - pattern % 2 * 2)).to(like.dtype)


class CrossEntropyRule(LossRule):
    r"""``nn.CrossEntropyLoss``: :math:`H = w (\operatorname{diag} q - q q^T)` per term.

    The factor w of a term is the class weight of its target, with label smoothing e
    ``(1 - e) w_y + (e / C) sum_c w_c``, with probability targets ``sum_c w_c t_c``, 0 where ignored.
    """

    def check(self, module, z, y):
        """Refuse unbatched logits and negative class weights."""
        if z.dim() < 2:
            raise UnsupportedError(
                f"CrossEntropyLoss on unbatched logits of shape {tuple(z.shape)}: add a batch axis."
            )
        if module.weight is not None and bool((module.weight < 0).any()):
            raise ValueError("CrossEntropyLoss: negative class weights have no real Hessian root.")

    def scale(self, module, z, y):
        """1 / sum of the targets' class weights; with probability targets 1 / (N T)."""
        if module.reduction == "sum":
            return 1.0
        if y.is_floating_point():
            return z.shape[1] / z.numel()
        kept = y != module.ignore_index
        if module.weight is None:
            total = int(kept.sum())
        else:
            total = float(module.weight[y.clamp(min=0)].masked_fill(~kept, 0).sum())
        if total == 0:
            raise ValueError(
                "CrossEntropyLoss: the targets are all ignored (or have weight zero), so the mean "
                "has no terms and the loss is not a number."
            )
        return 1.0 / total

    def term_factors(self, module: nn.Module, z: Tensor, y: Tensor) -> Tensor:
        """Return w per term, ``[R, *positions]``."""
        classes, e = z.shape[1], module.label_smoothing
        w = z.new_ones(classes) if module.weight is None else module.weight.to(z)
        if y.is_floating_point():
            t = (1 - e) * y.to(z.dtype) + e / classes
            return (t.movedim(1, -1) * w).sum(-1)
        kept = y != module.ignore_index
        factors = (1 - e) * w[y.masked_fill(~kept, 0)] + e / classes * w.sum()
        return factors.masked_fill(~kept, 0)

    def columns(self, module, z, y, batch):
        """C T."""
        return z.numel() // batch

    def exact(self, module, z, y, layout, start, stop):
        """Column (t, c): ``sqrt(w q_c) (e_c - q)`` at position t."""
        q = layout.split(z.softmax(1).unsqueeze(0))[0]
        w = self._terms(module, z, y, layout)
        classes = z.shape[1]
        column = torch.arange(start, stop, device=z.device)
        t, c = column // classes, column % classes
        q_t = q[:, t]  # [n, v, C]
        size = (w[:, t] * q_t.gather(2, c.expand(len(q), -1).unsqueeze(2)).squeeze(2)).sqrt()
        vectors = (F.one_hot(c, classes).to(q) - q_t) * size.unsqueeze(2)
        S = q.new_zeros(len(column), *q.shape)
        S[torch.arange(len(column), device=z.device), :, t] = vectors.transpose(0, 1)
        return layout.join(S)

    def _terms(self, module, z, y, layout):
        """Term factors as ``[N, T]``."""
        factors = self.term_factors(module, z, y)
        return layout.of_terms(factors.shape).split(factors.unsqueeze(0))[0, ..., 0]

    def sample(self, module, z, y, generator):
        """``sqrt(w) (q - e_y)`` with y drawn from q, for each term on its own."""
        q = z.softmax(1)
        cdf = q.movedim(1, -1).cumsum(-1)
        # by inversion: five times faster than torch.multinomial on small batches
        u = torch.rand(cdf.shape[:-1], generator=generator, dtype=z.dtype, device=z.device)
        drawn = torch.searchsorted(cdf, (u.unsqueeze(-1) * cdf[..., -1:]), right=True)
        drawn = drawn.clamp_(max=z.shape[1] - 1).movedim(-1, 1)
        S = q.scatter_add(1, drawn, q.new_full((1,) * z.dim(), -1.0).expand(drawn.shape))
        plain = module.weight is None and not y.is_floating_point()
        if not plain or bool((y == module.ignore_index).any()):
            S = S * self.term_factors(module, z, y).sqrt().unsqueeze(1)
        return S


class _ElementwiseRule(LossRule):
    """Losses that are sums over the elements of z: the Hessian is diagonal."""

    @abstractmethod
    def diagonal(self, module: nn.Module, z: Tensor, y: Tensor) -> Tensor:
        """Return the Hessian's diagonal without r, shaped like z."""

    def check(self, module, z, y):
        """Refuse targets that broadcast: the terms would not be the logits' elements."""
        if y.shape != z.shape:
            raise UnsupportedError(
                f"{type(module).__name__}: input {tuple(z.shape)} and target {tuple(y.shape)} "
                "differ in shape. Broadcast the target yourself (expand_as) so that each element of "
                "the input has its own term."
            )

    def scale(self, module, z, y):
        """1 / number of elements."""
        return 1.0 if module.reduction == "sum" else 1.0 / z.numel()

    def columns(self, module, z, y, batch):
        """One column per element of a datum's output."""
        return z.numel() // batch

    def exact(self, module, z, y, layout, start, stop):
        """Column d: the root of the diagonal's entry d."""
        root = layout.split(self.diagonal(module, z, y).sqrt().unsqueeze(0))[0, ..., 0]
        column = torch.arange(start, stop, device=z.device)
        S = root.new_zeros(len(column), *root.shape, 1)
        S[torch.arange(len(column), device=z.device), :, column, 0] = root[:, column].T
        return layout.join(S)


class MSERule(_ElementwiseRule):
    """``nn.MSELoss``: H = 2 I (no 1/2 in front); samples ``sqrt(2)`` times standard normal."""

    def diagonal(self, module, z, y):
        """2."""
        return torch.full_like(z, 2.0)

    def sample(self, module, z, y, generator):
        """``sqrt(2)`` times a standard normal vector."""
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return sqrt(2.0) * noise


class BCEWithLogitsRule(_ElementwiseRule):
    """``nn.BCEWithLogitsLoss``: ``sigma (1 - sigma) weight (1 + (pos_weight - 1) y)``."""

    def factors(self, module: nn.Module, z: Tensor, y: Tensor) -> Tensor | float:
        """Return ``weight (1 + (pos_weight - 1) y)``."""
        f = 1.0 if module.weight is None else module.weight.to(z)
        if module.pos_weight is not None:
            f = f * (1 + (module.pos_weight.to(z) - 1) * y.to(z))
        return f

    def check(self, module, z, y):
        """Refuse broadcast targets and negative weights."""
        super().check(module, z, y)
        for name in ("weight", "pos_weight"):
            w = getattr(module, name)
            if w is not None and bool((w < 0).any()):
                raise ValueError(f"BCEWithLogitsLoss: a negative {name} has no real Hessian root.")

    def diagonal(self, module, z, y):
        """``sigma (1 - sigma)`` times the term's weights."""
        p = z.sigmoid()
        return p * (1 - p) * self.factors(module, z, y)

    def sample(self, module, z, y, generator):
        """``sqrt(weights) (sigma - e)`` with e drawn from Bernoulli(sigma)."""
        p = z.sigmoid()
        S = p - torch.bernoulli(p, generator=generator)
        factors = self.factors(module, z, y)
        return S * factors.sqrt() if isinstance(factors, Tensor) else S


LOSSES: dict[type[nn.Module], LossRule] = {
    nn.CrossEntropyLoss: CrossEntropyRule(),
    nn.MSELoss: MSERule(),
    nn.BCEWithLogitsLoss: BCEWithLogitsRule(),
}


def is_loss(module: nn.Module) -> bool:
    """Whether a module is a loss of torch (or derives from one)."""
    return isinstance(module, _Loss)


class LossCall:
    """One call of a loss: its detached input, target, and the edge that a sweep starts from.

    It is held by a tensor hook on the loss's value and holds only what lies upstream of it.

    Args:
        module: The loss module.
        z: Its input (the logits).
        y: Its target.
        batch_axis: 0; 1 if rows are to be read sequence-first.
    """

    def __init__(self, module: nn.Module, z: Tensor, y: Tensor, batch_axis: int = 0):
        self.module, self.batch_axis = module, batch_axis
        self.rule = next((LOSSES[c] for c in type(module).__mro__ if c in LOSSES), None)
        self.z, self._z_version = z.detach(), z._version
        self.y, self._y_version = y.detach(), y._version
        self.target_requires_grad = y.requires_grad
        self.start: GradientEdge | None = edge_of(z)
        # the block in which the layers behind the loss were called, known in the backward pass
        self.sharing: sharing | None = None

    @property
    def label(self) -> str:
        """The loss's class name, for messages."""
        return type(self.module).__name__

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
                f"{self.label} has no rule for its Hessian; losses with one: {known}. For another "
                "loss, tie its value to one of these with backpack_ext.attach_loss."
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
        if (self.z._version, self.y._version) != (self._z_version, self._y_version):
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

    def gradient(self) -> Tensor:
        """Return the loss's gradient with respect to its input: zero where no term counts."""
        with torch.enable_grad():
            z = self._logits().clone().requires_grad_()
            # not through the module's hooks: this is no call of the user's
            return torch.autograd.grad(self.module.forward(z, self.y).sum(), z)[0]

    def _logits(self) -> Tensor:
        """Logits in float32 or above: roots of probabilities need the digits."""
        z = self.z
        return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z

    def layout(self, batch: int) -> Layout:
        """Return how the data are laid out in the logits."""
        class_axis = 1 if isinstance(self.rule, CrossEntropyRule) else None
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
        self.z = self.y = self.start = None
