"""Estimates of a Hessian's diagonal, and the exact one. All are flat vectors over all parameters.

There are P parameters, in the order of ``model.parameters()``. All diagonals are those of the mean
cross-entropy over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from backpack_ext import BL89, DiagGGN, HesScale, backpack, extend
from backpack_ext.extension import Extension
from benchmarks.models import Problem

HESSCALE, PENULTIMATE, CROSS = "HesScale", "HesScale + exact penultimate", "HesScale + cross terms"
GAUSS_NEWTON, BECKER, GGN = "HesScale-GN", "BL89", "exact GGN diagonal"
SAMPLED_GGN, HUTCHINSON = "GGN diagonal, MC", "Hutchinson v*Hv"


def _cross_terms() -> Extension:
    return HesScale(cross_terms=True, generator=torch.Generator().manual_seed(0))


# Estimates without samples: how to make the extension.
EXTENSIONS: dict[str, Callable[[], Extension]] = {
    HESSCALE: HesScale,
    PENULTIMATE: lambda: HesScale(exact_penultimate=True),
    CROSS: _cross_terms,
    GAUSS_NEWTON: lambda: HesScale(gauss_newton=True),
    BECKER: BL89,
    GGN: DiagGGN,
}


def extensions_for(problem: Problem) -> list[str]:
    """Return the keys of `EXTENSIONS` that differ on a model: cross terms need a residual branch."""
    plain = isinstance(problem.model, nn.Sequential)
    return [name for name in EXTENSIONS if not (plain and name == CROSS)]


def error(estimate: Tensor, exact: Tensor) -> float:
    """Return ``sum |estimate - exact| / sum |exact|``."""
    return ((estimate - exact).abs().sum() / exact.abs().sum()).item()


# --------------------------------------------------------------------------- one pass


def diagonal(problem: Problem, extension: Extension) -> Tensor:
    """Return what an extension computes in one backward pass, ``[P]``."""
    model, loss_fn = extend(problem.model), extend(nn.CrossEntropyLoss())
    with backpack(extension):
        loss_fn(model(problem.x), problem.y).backward()
    return _flat([getattr(p, extension.savefield) for p in model.parameters()])


def sampled_ggn(
    problem: Problem, counts: Iterable[int], generator: torch.Generator
) -> dict[int, Tensor]:
    """Estimate the GGN's diagonal by labels drawn from the model.

    Args:
        problem: The model and its batch.
        counts: Numbers of samples.
        generator: Draws them.

    Returns:
        For each count the estimate ``[P]`` with so many samples, those of the smaller ones included.
    """
    found, total, done = {}, 0, 0
    for count in sorted(set(counts)):
        extension = DiagGGN("mc", mc_samples=count - done, generator=generator)
        total, done = total + (count - done) * diagonal(problem, extension), count
        found[count] = total / count
    return found


# --------------------------------------------------------------------------- double backward


def hutchinson(problem: Problem, counts: Iterable[int], generator: torch.Generator) -> dict[int, Tensor]:
    """Estimate the Hessian's diagonal by ``v * Hv`` with random signs v, reverse over reverse.

    Args:
        problem: The model and its batch.
        counts: Numbers of samples.
        generator: Draws them.

    Returns:
        For each count the estimate ``[P]`` with so many samples, those of the smaller ones included.
    """
    counts = sorted(set(counts))
    found = {}
    with _twice_differentiable():
        params, grads = _gradient(problem)
        totals = [torch.zeros_like(p) for p in params]
        for k in range(1, counts[-1] + 1):
            signs = [_signs(p, generator) for p in params]
            products = torch.autograd.grad(grads, params, signs, retain_graph=k < counts[-1])
            for total, v, Hv in zip(totals, signs, products, strict=True):
                total.addcmul_(v, Hv)
            if k in counts:
                found[k] = _flat(totals) / k
    return found


def exact_diagonal(problem: Problem, entries: Sequence[int] | None = None, chunk: int = 32) -> Tensor:
    """Return the Hessian's diagonal from its rows, one backward pass through the gradient for each.

    Args:
        problem: The model and its batch.
        entries: Which of the P parameters; all of them by default.
        chunk: Number of rows at a time; with many the intermediate results leave the caches.

    Returns:
        The entries of the diagonal, shaped like ``entries``.
    """
    with _twice_differentiable():
        params, grads = _gradient(problem)
        sizes = [p.numel() for p in params]
        wanted = torch.arange(sum(sizes)) if entries is None else torch.as_tensor(entries)
        found = []
        for rows in wanted.split(chunk):
            units = torch.zeros(len(rows), sum(sizes), dtype=params[0].dtype)
            units.scatter_(1, rows[:, None], 1.0)
            cotangents = [
                u.view(-1, *p.shape) for u, p in zip(units.split(sizes, 1), params, strict=True)
            ]
            H = torch.autograd.grad(grads, params, cotangents, retain_graph=True, is_grads_batched=True)
            flat = torch.cat([h.flatten(1) for h in H], 1)
            found.append(flat.gather(1, rows[:, None])[:, 0])
    return torch.cat(found)


def _twice_differentiable() -> AbstractContextManager:
    """Torch's fused attention has no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def _gradient(problem: Problem) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    params = list(problem.model.parameters())
    loss = F.cross_entropy(problem.model(problem.x), problem.y)
    return params, torch.autograd.grad(loss, params, create_graph=True)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=like.dtype)
    return bits.mul_(2).sub_(1)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
