"""KFAC with moving averages and damped inverses: what the inverse-free optimizers are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from curvature import DiagonalMatrix, StructuredMatrix
from optim.bucket import Bucket, Slot
from optim.directions import Direction
from optim.inverses import INVERTIBLE, damped_inverse, eigenbasis, pi_ratio
from optim.layers import Layer
from optim.natural import NaturalGradient
from optim.schedules import Interval, check_interval, check_number, interval_at
from optim.sharded import is_sharded, whole
from optim.shared import shows_options
from optim.singd import SINGD
from optim.structure import DIAGONAL, Structure
from optim.updates import projected_matrix, projected_moment

INVERSES = ("pi", "exact")


@shows_options(NaturalGradient, SINGD)
class KFAC(NaturalGradient):
    r"""Gradient descent preconditioned by KFAC's damped inverse.

    Moving averages of a layer's factors, :math:`A \leftarrow \rho A + (1 - \rho) A_t` every ``interval``
    steps and B alike (the first is taken as it is), and in each step

    .. math::
        N = \Big(B + \tfrac{\sqrt{\lambda}}{\pi} I\Big)^{-1} \nabla_W \ell \,
            \big(A + \pi \sqrt{\lambda} I\big)^{-1}, \qquad
        \pi^2 = \frac{\operatorname{tr}(A) / \dim A}{\operatorname{tr}(B) / \dim B},

    or with ``inverse="exact"`` :math:`N = (B \otimes A + \lambda I)^{-1} \nabla_W \ell` through both
    eigendecompositions; then :math:`V \leftarrow \mu V + \nu N + w W`, :math:`W \leftarrow W - \eta V`.
    With ``kl_clip`` :math:`\kappa`, over all layers with factors,

    .. math::  \nu = \min\Big(1, \sqrt{\kappa \,/\, (\eta^2 \textstyle\sum \langle N, \nabla \ell
               \rangle)}\Big).

    A and B are those of `backpack_ext.KFAC`. Inverses are computed in float32 or above, whatever the
    factors are kept in; what rounding has made indefinite there counts as singular. What is trained,
    accumulation, mixed precision and data parallelism: see `SINGD`.

    State, per weight: ``A.0``, ``B.0``, and ``inverse_A.0``, ``inverse_B.0``, or ``basis_A.0``,
    ``values_A.0``, ... for ``inverse="exact"``.

    Args:
        model_or_params: As for `SINGD`.
        lr: Step size eta.
        momentum: Decay mu of V.
        damping: :math:`\lambda`, in the units of the curvature.
        decay: Decay :math:`\rho` of A and B.
        weight_decay: Coefficient w.
        interval: Steps between updates of A and B, or a function of the step.
        inverse_interval: Least number of steps between inversions, or a function of the step; they
            happen when A and B change. By default each time.
        structure: ``"dense"``, ``"block-diagonal"`` or ``"diagonal"``, as for `SINGD`.
        inverse: ``"pi"`` or ``"exact"``.
        kl_clip: Bound :math:`\kappa` on the predicted squared step; None for none.
        **shared: As for `SINGD`: ``approx`` to ``precondition``.

    Raises:
        ValueError: If an option is out of its range, or a structure has no inverse.

    References:
        Martens & Grosse (2015), Optimizing neural networks with Kronecker-factored approximate
        curvature. Grosse & Martens (2016) for convolutions. Ba et al. (2017), Distributed second-order
        optimization using Kronecker-factored approximations, for ``kl_clip``.

    Example:
        With exact damping and no momentum, the first step on least squares is Newton's:

        >>> from backpack_ext import backpack, extend
        >>> model, loss_fn = extend(nn.Linear(2, 1, bias=False)), extend(nn.MSELoss(reduction="sum"))
        >>> opt = KFAC(model, lr=1.0, momentum=0.0, damping=1e-8, inverse="exact", fisher="exact")
        >>> X, y = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[1.0], [5.0]])
        >>> with backpack(*opt.extensions()):
        ...     loss_fn(model(X), y).backward()
        >>> opt.step()
        >>> model.weight.data.round(decimals=3)
        tensor([[1., 1.]])
    """

    structures = INVERTIBLE
    # how often the factors were updated, and in which step they were inverted last
    numbers = {"updates": 0, "inverted": -1}
    copied = (*NaturalGradient.copied, "inverse_interval", "kl_clip")

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        decay: float = 0.95,
        weight_decay: float = 0.0,
        *,
        interval: Interval = 10,
        inverse_interval: Interval | None = None,
        structure: Any = "dense",
        inverse: str = "pi",
        kl_clip: float | None = None,
        **shared: Any,
    ):
        if inverse_interval is not None:
            check_interval("KFAC", "inverse_interval", inverse_interval)
        if kl_clip is not None:
            check_number("KFAC", "kl_clip", kl_clip)
            if kl_clip == 0:
                raise ValueError(
                    "KFAC: kl_clip=0; expected a number > 0, or None: no step would be taken."
                )
        self.inverse_interval, self.kl_clip = inverse_interval, kl_clip
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "decay": decay,
            "weight_decay": weight_decay,
            "structure": structure,
            "inverse": inverse,
        }
        super().__init__(model_or_params, defaults, interval=interval, **shared)

    def slots(self, group: dict, structures: tuple[Structure, Structure]) -> dict[str, Slot]:
        """Return A and B, and what their inverses need."""
        slots = {}
        for side, structure in zip("AB", structures, strict=True):
            slots[side] = Slot(side, structure)
            # without statistics a layer's gradient is used as it is
            if group["inverse"] == "pi":
                slots[f"inverse_{side}"] = Slot(side, structure, True)
            else:
                slots[f"basis_{side}"] = Slot(side, structure, True)
                slots[f"values_{side}"] = Slot(side, DIAGONAL, True)
        return slots

    def choice(self, group: dict) -> str:
        """Return how factors are inverted."""
        return group["inverse"]

    def _project(
        self, M: StructuredMatrix | None, x: Tensor, scale: float, structure: Structure
    ) -> StructuredMatrix:
        return projected_moment(None, x, scale, structure)  # P keeps symmetric structures as they are

    def _project_formed(
        self, M: StructuredMatrix | None, A: Tensor, structure: Structure
    ) -> StructuredMatrix:
        return projected_matrix(None, A, structure)

    def _refresh(
        self,
        bucket: Bucket,
        group: dict,
        plans: dict[Layer, tuple[bool, bool]],
        A: StructuredMatrix,
        B: StructuredMatrix,
    ) -> None:
        decays = [0.0 if first else group["decay"] for first, _ in plans.values()]
        keep = torch.tensor(decays, dtype=A.dtype, device=bucket.device).repeat_interleave(
            bucket.form.groups
        )
        keep = keep[0] if bucket.single else keep
        rows = bucket.rows_of(list(plans))
        for side, new in (("A", A), ("B", B)):
            old = bucket.get(side, rows).to(new.dtype)
            bucket.put(side, new + (old - new) * keep.to(new.dtype), rows, self._write)
        self._invert(bucket, group, [layer for layer, (_, inverts) in plans.items() if inverts])

    def _plan(self, layer: Layer) -> tuple[bool, bool]:
        """Return whether a layer's factors are its first, and whether they are to be inverted."""
        state, now = self.state[layer.weight], self._clock["step"]
        first = state["updates"] == 0
        state["updates"] += 1
        if self.inverse_interval is not None and state["inverted"] >= 0:
            interval = interval_at("KFAC", "inverse_interval", self.inverse_interval, now)
            if now - state["inverted"] < interval:
                return first, False
        state["inverted"] = now
        return first, True

    def _invert(self, bucket: Bucket, group: dict, layers: list[Layer]) -> None:
        """Compute the inverses, or eigenbases, of some layers' factors."""
        if not layers:
            return
        rows, damping = bucket.rows_of(layers), group["damping"]
        wide = torch.promote_types(bucket.dtype, torch.float32)
        A, B = (bucket.get(side, rows).to(wide) for side in "AB")
        if group["inverse"] == "pi":
            pi, root = pi_ratio(A, B), damping**0.5
            found = {
                "inverse_A": damped_inverse(A, pi * root),
                "inverse_B": damped_inverse(B, root / pi),
            }
        else:
            found = {}
            for side, M in (("A", A), ("B", B)):
                basis, values = eigenbasis(M)
                found |= {f"basis_{side}": basis, f"values_{side}": DiagonalMatrix([values], M.dim)}
        for name, M in found.items():
            bucket.put(name, M, rows, self._write)

    def _precondition(self, bucket: Bucket, group: dict, G: Tensor) -> Tensor:
        M = bucket.matrices
        if group["inverse"] == "pi":
            return M["inverse_A"].rmatmul(M["inverse_B"].matmul(G))
        values_B, values_A = (M[f"values_{side}"].tensors[0] for side in "BA")
        Y = M["basis_A"].rmatmul(M["basis_B"].matmul(G, transpose=True))
        Y = Y / (values_B.unsqueeze(-1) * values_A.unsqueeze(-2) + group["damping"])
        return M["basis_A"].rmatmul(M["basis_B"].matmul(Y), transpose=True)

    def _precondition_rows(
        self, bucket: Bucket, group: dict, b: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor]:
        M = bucket.matrices
        return M["inverse_B"].rmatmul(b, transpose=True), M["inverse_A"].rmatmul(a)

    def _takes_rows(self, group: dict) -> bool:
        return group["inverse"] == "pi"

    def _directions(self, layers: Iterable[Layer]) -> Iterator[list[tuple[Tensor, Tensor | Direction]]]:
        """Yield parameters with preconditioned gradients, shortened as ``kl_clip`` says."""
        found = super()._directions(layers)
        if self.kl_clip is None:
            yield from found
            return
        buckets = [
            [(p, n.tensor() if isinstance(n, Direction) else n) for p, n in directions]
            for directions in found
        ]
        terms = [
            float(self._buckets.group_of[p]["lr"]) ** 2 * _dot(n, p.grad.to(n.dtype))
            for directions in buckets
            for p, n in directions
        ]
        if terms:
            dtype = reduce(torch.promote_types, (t.dtype for t in terms))
            total = torch.stack([t.to(terms[0].device, dtype) for t in terms]).sum().abs()
            factor = (self.kl_clip / total).sqrt().clamp(max=1)
            for directions in buckets:
                for _, n in directions:
                    n.mul_(factor.to(n.dtype))
        yield from buckets

    def _check_group(self, group: dict) -> None:
        for key in ("lr", "damping", "weight_decay"):
            check_number("KFAC", key, group[key])
        check_number("KFAC", "momentum", group["momentum"], 0.0, 1.0, open_=True)
        check_number("KFAC", "decay", group["decay"], 0.0, 1.0, open_=True)
        if group["damping"] == 0:
            raise ValueError("KFAC: damping=0; expected a number > 0, as factors may be singular.")
        if group["inverse"] not in INVERSES:
            raise ValueError(f"KFAC: inverse={group['inverse']!r}; expected one of {INVERSES}.")
        if self.precondition == "rows" and not self._takes_rows(group):
            raise ValueError(
                f'KFAC: precondition="rows" with inverse={group["inverse"]!r}, which is no product of '
                'two sides; expected inverse="pi", or precondition="auto".'
            )


def _dot(n: Tensor, g: Tensor) -> Tensor:
    """Return the inner product of two tensors of one shape."""
    return whole((n * g).sum()) if is_sharded(n) else torch.vdot(n.flatten(), g.flatten())
