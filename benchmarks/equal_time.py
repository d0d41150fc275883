"""The time of estimates of a Hessian's diagonal, and how many samples fit into that of HesScale."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from math import ceil
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from backpack_ext import DiagGGN, backpack, extend
from backpack_ext.extension import Extension
from benchmarks.estimators import (
    EXTENSIONS,
    HESSCALE,
    HUTCHINSON,
    SAMPLED_GGN,
    extensions_for,
    hutchinson,
)
from benchmarks.models import Problem
from benchmarks.timing import Variant, interleave, summary

PLAIN = "plain"
FEW, MANY = 1, 6  # samples whose times give that of the first one and of each further one


def measure(problem: Problem, seconds: float, rounds: tuple[int, int]) -> dict:
    """Time a step with each estimate, in float32.

    Args:
        problem: The model and its batch.
        seconds: Time for the rounds.
        rounds: Smallest and largest number of rounds.

    Returns:
        A dictionary for JSON. Times are quartiles of ratios to the plain step of the same round, under
        the estimates' names. For those with samples there are ``first``, the time of a step with one
        sample, ``further``, that of each further one, and ``fit``, how many of them take as long as a
        step with HesScale; it is below 1 where one sample takes longer.
    """
    model = deepcopy(problem.model).float()
    problem = replace(problem, model=model, x=problem.x.float())
    variants = {key: Variant(step) for key, step in _steps(problem).items()}
    for variant in variants.values():
        variant.warm_up(_sync)
    times = interleave(variants, PLAIN, _sync, seconds, rounds)
    ratios = {key: [t / p for t, p in zip(times[key], times[PLAIN], strict=True)] for key in times}
    return {
        "name": problem.name,
        "about": problem.about,
        "batch": len(problem.x),
        "parameters": sum(p.numel() for p in model.parameters()),
        "rounds": len(times[PLAIN]),
        "plain_ms": _digits([1e3 * t for t in summary(times[PLAIN])]),
        "time": {key: _digits(summary(ratios[key])) for key in extensions_for(problem)},
        **{name: _samples(name, ratios) for name in (HUTCHINSON, SAMPLED_GGN)},
    }


def whole(samples: dict) -> int:
    """Return the number of samples at equal time: rounded up, in their favour."""
    return max(1, ceil(samples["fit"]))


def _samples(name: str, ratios: dict) -> dict:
    first, many = ratios[name, FEW], ratios[name, MANY]
    # from differences within a round, so that what disturbs a round disturbs both
    further = median([(b - a) / (MANY - FEW) for a, b in zip(first, many, strict=True)])
    room = median(ratios[HESSCALE]) - median(first)
    fit = 1 + room / further if room > 0 else median(ratios[HESSCALE]) / median(first)
    return {
        "first": _digits(summary(first)),
        "further": float(f"{further:.4g}"),
        "fit": float(f"{fit:.4g}"),
    }


def _steps(problem: Problem) -> dict:
    """Return what is timed: each step computes the gradient as well."""
    plain = deepcopy(problem.model)
    ours = replace(problem, model=extend(deepcopy(problem.model)))
    loss_fn = extend(nn.CrossEntropyLoss())

    def step() -> None:
        plain.zero_grad()
        F.cross_entropy(plain(problem.x), problem.y).backward()

    def extended(extension: Extension) -> Callable[[], None]:
        def run() -> None:
            ours.model.zero_grad()
            with backpack(extension):
                loss_fn(ours.model(ours.x), ours.y).backward()

        return run

    def products(count: int) -> Callable[[], object]:
        other = replace(problem, model=deepcopy(problem.model))
        generator = torch.Generator().manual_seed(0)
        return lambda: hutchinson(other, [count], generator)

    steps: dict = {PLAIN: step}
    for key in extensions_for(problem):
        steps[key] = extended(EXTENSIONS[key]())
    for count in (FEW, MANY):
        steps[SAMPLED_GGN, count] = extended(DiagGGN("mc", mc_samples=count))
        steps[HUTCHINSON, count] = products(count)
    return steps


def _sync() -> None:
    """All of it runs on the CPU."""


def _digits(values) -> list[float]:
    return [float(f"{v:.4g}") for v in values]
