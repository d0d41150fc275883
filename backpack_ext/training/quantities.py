"""The quantities that a way of training is tried with, and how their results are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from backpack_ext.context import backpack
from backpack_ext.ekfac import EKFAC
from backpack_ext.extension import Extension
from backpack_ext.first_order import BatchDotGrad, BatchGrad, BatchL2Grad, SumGradSquared, Variance
from backpack_ext.ggn import DiagGGN
from backpack_ext.hesscale import BL89, HesScale
from backpack_ext.kfac import KFAC
from backpack_ext.lowrank_ggn import LowRankGGN
from backpack_ext.ntk import NTK
from backpack_ext.training.problems import Problem


def _sum(parts: list) -> object:
    return reduce(add, parts)


# Results by parameter, those of the whole model under "".
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Quantity:
    """An extension, and what is known of it.

    Attributes:
        name: What it is called in the table.
        make: Makes the extension; None for `NTK`, which has a backward pass of its own.
        power: Results scale with gradients ** power: how rounding errors grow.
        join: Makes the result of a batch of those of its parts, as documented; None if only
            `backpack_ext.dataset.collect` can.
    """

    name: str
    make: Callable[[], Extension] | None
    power: int = 2
    join: Callable[[list], object] | None = _sum

    def extension(self) -> Extension:
        """Return a new extension; samples of all of them are the same."""
        ext = self.make()
        if ext.vectors.kind == "mc":
            ext._generator = torch.Generator().manual_seed(1)
        return ext


def _kernel(problem: Problem) -> Results:
    return {"": NTK(_Flat(problem.call), outputs="full").gram(problem.x)}


class _Flat(nn.Module):
    """A model whose logits are ``[N, C]``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(1)


def _per_datum(parts: list) -> Tensor:
    return torch.cat(parts)


QUANTITIES: dict[str, Quantity] = {
    q.name: q
    for q in (
        Quantity("BatchGrad", BatchGrad, 1, _per_datum),
        Quantity("BatchL2Grad", BatchL2Grad, 2, _per_datum),
        Quantity("BatchDotGrad", BatchDotGrad, 2, None),
        Quantity("SumGradSquared", SumGradSquared),
        Quantity("Variance", Variance, 2, None),
        Quantity("DiagGGN exact", DiagGGN),
        Quantity("DiagGGN mc", lambda: DiagGGN("mc")),
        Quantity("KFAC expand exact", lambda: KFAC("expand", fisher="exact")),
        Quantity("KFAC expand mc", lambda: KFAC("expand", fisher="mc")),
        Quantity("KFAC reduce mc", lambda: KFAC("reduce", fisher="mc")),
        Quantity("KFAC expand empirical", lambda: KFAC("expand", fisher="empirical")),
        Quantity("KFAC reduce empirical", lambda: KFAC("reduce", fisher="empirical")),
        Quantity("EKFAC", lambda: EKFAC(fisher="exact")),
        Quantity("HesScale", HesScale),
        Quantity("BL89", BL89),
        Quantity("LowRankGGN", LowRankGGN),
        Quantity("NTK", None),
    )
}


def kept(ext: Extension, model: nn.Module) -> dict[str, object]:
    """Return what a pass left on the parameters, by name, as it is."""
    found = {name: getattr(p, ext.savefield, None) for name, p in model.named_parameters()}
    found = {name: value for name, value in found.items() if value is not None}
    if isinstance(ext, LowRankGGN):  # one block for all parameters
        return {"": next(iter(found.values()))} if found else {}
    return found


def dense(found: dict[str, object]) -> Results:
    """Return results as tensors that can be compared."""
    return {k: (v if isinstance(v, Tensor) else v.to_dense()).clone() for k, v in found.items()}


def gradients(model: nn.Module) -> Results:
    """Return the gradients, by name, marked as such."""
    return {f"grad {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def forget(model: nn.Module, ext: Extension) -> None:
    """Clear gradients and results: what is there afterwards is new."""
    for p in model.parameters():
        p.grad = None
        p.__dict__.pop(ext.savefield, None)


def step(
    problem: Problem,
    quantity: Quantity,
    backward: Callable[[Tensor], object] = Tensor.backward,
    **options: object,
) -> Results:
    """Return what a forward and a backward pass give: the quantity, and the gradients.

    Args:
        problem: The problem.
        quantity: The quantity.
        backward: Differentiates a loss.
        options: Of `backpack`.
    """
    if quantity.make is None:
        return _kernel(problem)
    ext = quantity.extension()
    forget(problem.model, ext)
    with backpack(ext, **options):
        backward(problem.loss())
    return dense(kept(ext, problem.model)) | gradients(problem.model)
