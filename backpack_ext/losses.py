r"""Losses: their reduction scale, the roots and the diagonal of their Hessian.

A loss is :math:`\ell = r \sum_n \sum_t \ell_{nt}`. Everything here is about one term's Hessian,
without r; `LossRule.scale` is the only place that knows r.

A datum n may own several rows or positions t of the logits (tokens, pixels). An exact root has columns
of its own for each position, as many as the Hessian there has ranks (classes, less one for the
cross-entropy), because columns that positions share would put cross-position terms into every quantity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from backpack_ext.errors import UnsupportedError
from backpack_ext.layout import Layout


class LossRule(ABC):
    """The derivatives of one loss module with respect to its input z (the logits).

    Attributes:
        arguments: Names of the forward's arguments: input, target, and what else may require a gradient.
    """

    arguments: tuple[str, ...] = ("input", "target")
    # whether the Hessian is diagonal
    is_diagonal = False

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

    @abstractmethod
    def diagonal(self, module: nn.Module, z: Tensor, y: Tensor) -> Tensor:
        """Return the diagonal of the Hessian without r, shaped like z."""

    def layerwise_diagonal(self, module: nn.Module, z: Tensor, y: Tensor) -> Tensor:
        """Return what BL89 has in place of it: each elementwise part of the loss counts as a layer."""
        return self.diagonal(module, z, y)

    def other_diagonals(
        self, module: nn.Module, z: Tensor, y: Tensor, others: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the diagonals with respect to the further `arguments`, without r."""
        return ()

    def penultimate(self, module: nn.Module, z: Tensor, y: Tensor, W: Tensor) -> Tensor:
        """Return the exact diagonal, without r, at the input of a linear layer W in front of z."""
        return self.diagonal(module, z, y) @ W.square()

    def check(self, module: nn.Module, z: Tensor, y: Tensor) -> None:
        """Raise if the loss is called in a way that is not covered."""


class _DiagonalRule(LossRule):
    """Losses of which only the Hessian's diagonal is used: there is no root that would make sense."""

    instead = ""

    def columns(self, module, z, y, batch):
        """Refuse."""
        raise self._refusal(module)

    def exact(self, module, z, y, layout, start, stop):
        """Refuse."""
        raise self._refusal(module)

    def sample(self, module, z, y, generator):
        """Refuse."""
        raise self._refusal(module)

    def _refusal(self, module: nn.Module) -> UnsupportedError:
        return UnsupportedError(
            f"{type(module).__name__} has a rule for its Hessian's diagonal, but none for a root of the "
            f"Hessian, which this extension needs. {self.instead}"
        )


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
        if module.weight is None:
            total = y.numel() - _ignored(module, y)
        else:
            total = float(module.weight[y[y != module.ignore_index]].sum())
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
        """(C - 1) T: the Hessian of a position has no larger rank."""
        return z.numel() // batch // z.shape[1] * max(1, z.shape[1] - 1)

    def exact(self, module, z, y, layout, start, stop):
        """Column (t, c): ``sqrt(w q_c) (e_c - q - u (e_C - q))`` at t, C the last class.

        The columns ``S_c = sqrt(q_c) (e_c - q)`` of all classes are a root whose combination with
        ``sqrt(q)`` vanishes. A reflection that maps ``sqrt(q)`` onto the last axis leaves C - 1 of
        them, with ``u = sqrt(q_C) / (1 + sqrt(q_C))``.
        """
        q = layout.split(z.softmax(1).unsqueeze(0))[0]
        w = self._terms(module, z, y, layout)
        classes = z.shape[1]
        column = torch.arange(start, stop, device=z.device)
        t, c = column // max(1, classes - 1), column % max(1, classes - 1)
        q_t = q[:, t]  # [n, v, C]
        size = (w[:, t] * q_t.gather(2, c.expand(len(q), -1).unsqueeze(2)).squeeze(2)).sqrt()
        last = q_t[..., -1:].sqrt()
        last = last / (1 + last)
        vectors = F.one_hot(c, classes).to(q) - q_t * (1 - last)
        vectors[..., -1:] -= last
        vectors *= size.unsqueeze(2)
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
        return S if self._plain(module, y) else S * self.term_factors(module, z, y).sqrt().unsqueeze(1)

    def _plain(self, module: nn.Module, y: Tensor) -> bool:
        """Whether all term factors are 1."""
        return module.weight is None and not y.is_floating_point() and not _ignored(module, y)

    def diagonal(self, module, z, y):
        """``w (q - q^2)``."""
        q = z.softmax(1)
        h = torch.addcmul(q, q, q, value=-1)
        return h if self._plain(module, y) else h * self.term_factors(module, z, y).unsqueeze(1)

    def layerwise_diagonal(self, module, z, y):
        """``w_c t_c (q - q^2)`` with targets t, one-hot for class indices."""
        q, e = z.softmax(1), module.label_smoothing
        if y.is_floating_point():
            t = y.to(q.dtype)
        else:
            kept = (y != module.ignore_index).unsqueeze(1)
            y = y.masked_fill(~kept.squeeze(1), 0)  # may be beyond the classes
            t = F.one_hot(y, z.shape[1]).movedim(-1, 1).to(q.dtype) * kept
            e = e * kept
        t = (1 - e) * t + e / z.shape[1]
        if module.weight is not None:
            t = t * module.weight.to(q).reshape(-1, *[1] * (z.dim() - 2))
        return t * (q - q * q)

    def penultimate(self, module, z, y, W):
        """``w (q (W o W) - (q W)^2)``."""
        q = z.softmax(1)
        h = q @ W.square() - (q @ W).square()
        return h if self._plain(module, y) else h * self.term_factors(module, z, y).unsqueeze(1)


# So many targets are counted faster one by one.
_FEW = 128


def _ignored(module: nn.Module, y: Tensor) -> int:
    """Return how many targets are ignored."""
    if y.numel() <= _FEW:
        return (y if y.dim() == 1 else y.flatten()).tolist().count(module.ignore_index)
    return int((y == module.ignore_index).sum())


class NLLRule(_DiagonalRule):
    """``nn.NLLLoss``: linear in the log-probabilities, whose own rule has the curvature."""

    is_diagonal = True
    instead = "Use CrossEntropyLoss on the logits, which is the same loss."

    def scale(self, module, z, y):
        """1 / sum of the targets' class weights, as for the cross-entropy."""
        return CrossEntropyRule().scale(module, z, y)

    def diagonal(self, module, z, y):
        """0."""
        return torch.zeros_like(z)


class _ElementwiseRule(LossRule):
    """Losses that are sums over the elements of z: the Hessian is diagonal."""

    is_diagonal = True

    def check(self, module, z, y):
        """Refuse targets that broadcast: the terms would not be the logits' elements."""
        if y.shape != z.shape:
            raise _broadcast(module, z, y)

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


class _RobustRule(_ElementwiseRule):
    """Losses that are quadratic near the target and linear beyond."""

    @abstractmethod
    def bend(self, module: nn.Module) -> tuple[float, float]:
        """Return the distance up to which the loss is quadratic, and its second derivative there."""

    def diagonal(self, module, z, y):
        """The second derivative near the target, 0 beyond."""
        delta, height = self.bend(module)
        return ((z - y).abs() < delta).to(z.dtype) * height

    def sample(self, module, z, y, generator):
        """The diagonal's root times a standard normal vector."""
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return self.diagonal(module, z, y).sqrt() * noise


class SmoothL1Rule(_RobustRule):
    """``nn.SmoothL1Loss``: ``1 / beta`` within beta of the target."""

    def bend(self, module):
        """Beta, and 1 / beta."""
        return module.beta, 1 / module.beta if module.beta else 0.0


class HuberRule(_RobustRule):
    """``nn.HuberLoss``: 1 within delta of the target."""

    def bend(self, module):
        """Delta, and 1."""
        return module.delta, 1.0


class GaussianNLLRule(_DiagonalRule):
    """``nn.GaussianNLLLoss`` with mean z and variance ``var``, clamped from below at eps.

    ``1 / var`` for the mean, ``(z - y)^2 / var^3 - 1 / (2 var^2)`` for the variance.
    """

    arguments = ("input", "target", "var")
    instead = "Use MSELoss on the means, weighted by hand."

    def check(self, module, z, y):
        """Refuse targets that broadcast."""
        if y.shape != z.shape:
            raise _broadcast(module, z, y)

    def scale(self, module, z, y):
        """1 / number of elements."""
        return 1.0 if module.reduction == "sum" else 1.0 / z.numel()

    def diagonal(self, module, z, y):
        """Refuse: it depends on the variance, see `other_diagonals`."""
        raise UnsupportedError(
            "GaussianNLLLoss: the Hessian depends on the variance, which no call of the loss module has "
            "told. Extend the loss module, or give the diagonal with backpack_ext.attach_diagonal."
        )

    def other_diagonals(self, module, z, y, others):
        """For the mean, and for the variance, shaped like each."""
        (var,) = others
        clamped = var.clamp(min=module.eps)
        wide = clamped if clamped.dim() == z.dim() else clamped.unsqueeze(-1)
        of_var = (z - y).square() / wide**3 - 0.5 / wide.square()
        return (1 / wide).expand_as(z), of_var.sum_to_size(wide.shape).reshape(var.shape)


class OutputsRule(_ElementwiseRule):
    """Not a loss: the root's columns are unit vectors, one for each output of a datum.

    Args:
        indices: Which of a datum's outputs, counted when flattened; None for all.
    """

    def __init__(self, indices: Sequence[int] | None = None):
        self.indices = indices

    def scale(self, module, z, y):
        """1."""
        return 1.0

    def diagonal(self, module, z, y):
        """1."""
        return torch.ones_like(z)

    def columns(self, module, z, y, batch):
        """One per output that was asked for."""
        outputs = super().columns(module, z, y, batch)
        if self.indices is None:
            return outputs
        if any(not -outputs <= k < outputs for k in self.indices):
            raise ValueError(f"outputs={list(self.indices)}, but each datum has {outputs} outputs.")
        return len(self.indices)

    def exact(self, module, z, y, layout, start, stop):
        """Column d: the unit vector of an output."""
        if self.indices is None:
            return super().exact(module, z, y, layout, start, stop)
        exact, chosen = super().exact, self.indices[start:stop]
        return torch.cat([exact(module, z, y, layout, d, d + 1) for d in chosen])

    def sample(self, module, z, y, generator):
        """A standard normal vector."""
        return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)


LOSSES: dict[type[nn.Module], LossRule] = {
    nn.CrossEntropyLoss: CrossEntropyRule(),
    nn.MSELoss: MSERule(),
    nn.BCEWithLogitsLoss: BCEWithLogitsRule(),
    nn.NLLLoss: NLLRule(),
    nn.GaussianNLLLoss: GaussianNLLRule(),
    nn.SmoothL1Loss: SmoothL1Rule(),
    nn.HuberLoss: HuberRule(),
}


@cache
def loss_rule(cls: type[nn.Module]) -> LossRule | None:
    """Return the rule of a loss module's class, looked up along its MRO.

    None for a class with a forward of its own: it may compute anything.
    """
    known = next((c for c in cls.__mro__ if c in LOSSES), None)
    return LOSSES[known] if known is not None and cls.forward is known.forward else None


def _broadcast(module: nn.Module, z: Tensor, y: Tensor) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__}: input {tuple(z.shape)} and target {tuple(y.shape)} differ in shape. "
        "Broadcast the target yourself (expand_as) so that each element of the input has its own term."
    )


def is_loss(module: nn.Module) -> bool:
    """Whether a module is a loss of torch (or derives from one)."""
    return isinstance(module, _Loss)
