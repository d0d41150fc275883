"""The optimizers: how each is made, and the space that random search draws its settings from.

Every space has five dimensions, learning rate, weight decay and schedule among them, and is as wide for
SGD and AdamW as for ours. What is not searched is in the table as well, the same for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, exp, log, pi
from random import Random
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from backpack_ext import extend
from examples.training.tasks import Task
from optim import IKFAC, INGD, KFAC, SINGD
from optim.rootfree import RFAdamW, RFRMSProp, RFShampoo

Config = dict[str, Any]
Make = Callable[[nn.Module, Config, "Task"], Optimizer]


@dataclass(frozen=True)
class Log:
    """A positive number whose logarithm is uniformly distributed."""

    low: float
    high: float

    def draw(self, random: Random) -> float:
        """Return a number, to three digits."""
        return float(f"{exp(random.uniform(log(self.low), log(self.high))):.3g}")


@dataclass(frozen=True)
class One:
    """One of some values, all as probable."""

    values: tuple[Any, ...]

    def draw(self, random: Random) -> Any:
        """Return a value."""
        return random.choice(self.values)


Space = Mapping[str, Log | One]


@dataclass(frozen=True)
class Entry:
    """An optimizer.

    Attributes:
        make: Makes it from a network, its settings without the schedule, and the task.
        space: Where its settings come from.
    """

    make: Make
    space: Space

    def draw(self, random: Random) -> Config:
        """Return settings."""
        return {name: dimension.draw(random) for name, dimension in self.space.items()}


def constant(progress: float) -> float:
    """Return the learning rate's factor after a share of the steps: 1."""
    return 1.0


def cosine(progress: float) -> float:
    """Return the learning rate's factor after a share of the steps: from 1 to 0 along a cosine."""
    return (1 + cos(pi * progress)) / 2


SCHEDULES = {"constant": constant, "cosine": cosine}
WARMUP = 0.05  # share of the steps during which every learning rate rises to its value


def schedule(name: str, steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor by step."""
    rise = max(WARMUP * steps, 1)
    return lambda step: min(1.0, (step + 1) / rise) * SCHEDULES[name](step / steps)


def interval(step: int) -> int:
    """Return the steps between two refreshes: 1 at first, one more every 10 steps, 10 in the end.

    Factors start at the identity, and should be near the curvature early in a run of some hundred steps.
    `optim.schedules.early_frequent` is made for longer runs; it refreshes often all through these.
    """
    return min(1 + step // 10, 10)


# What has no Kronecker factors (norms, class tokens) is trained by AdamW, with one learning rate for all
# tasks.
NATURAL = {"interval": interval, "fallback_lr": 3e-3}


def natural(cls: type[Optimizer], **fixed: Any) -> Make:
    """Return how to make an optimizer with Kronecker factors, of the network's own data type."""

    def make(model: nn.Module, config: Config, task: Task) -> Optimizer:
        dtype = next(model.parameters()).dtype
        options = {"approx": task.approx, "factor_dtype": dtype} | NATURAL | fixed | config
        return cls(extend(model), **options)

    return make


def plain(cls: type[Optimizer], **fixed: Any) -> Make:
    """Return how to make an optimizer that needs nothing but gradients."""

    def make(model: nn.Module, config: Config, task: Task) -> Optimizer:
        return cls(model.parameters(), **(fixed | config))

    return make


def root_free(cls: type[Optimizer], **fixed: Any) -> Make:
    """Return how to make an optimizer that has to know the number of terms of the mean loss."""

    def make(model: nn.Module, config: Config, task: Task) -> Optimizer:
        return cls(model.parameters(), batch_size=task.terms, **(fixed | config))

    return make


LR = Log(1e-3, 1e-1)
# their second moments start at 1/B, so that they begin as SGD does
LR_ROOT_FREE = Log(3e-3, 3e-1)
DAMPING = Log(1e-4, 1e-1)
BETAS = One(tuple((b1, b2) for b1 in (0.8, 0.9, 0.95) for b2 in (0.95, 0.99, 0.999)))
COMMON = {"weight_decay": Log(1e-5, 1e-2), "schedule": One(tuple(SCHEDULES))}
DECOUPLED = COMMON | {"weight_decay": Log(1e-4, 1e-1)}
INVERSE_FREE = {"lr": LR, "damping": DAMPING, "lr_cov": Log(5e-2, 1.0)} | COMMON
NORMALIZED = {"normalize": True}

# SINGD's structures, the same for K and C. Layers have 9 to 145 inputs and 10 to 144 outputs.
STRUCTURES = {
    "dense": "dense",
    "diagonal": "diagonal",
    "block": ("block-diagonal", {"block": 16}),
    "lower": "lower-triangular",
    "upper": "upper-triangular",
    "hierarchical": ("hierarchical", {"k1": 8, "k2": 8}),
    "rank-k": ("rank-k-upper", {"k": 8}),
    "toeplitz": "upper-toeplitz",
}

OPTIMIZERS = {
    "SGD": Entry(
        plain(SGD),
        {"lr": Log(1e-2, 1.0), "momentum": One((0.8, 0.9, 0.95)), "nesterov": One((False, True))}
        | COMMON,
    ),
    "AdamW": Entry(plain(AdamW), {"lr": LR, "betas": BETAS, "eps": Log(1e-10, 1e-6)} | DECOUPLED),
    **{
        f"SINGD {name}": Entry(natural(SINGD, structure=structure, **NORMALIZED), INVERSE_FREE)
        for name, structure in STRUCTURES.items()
    },
    "INGD": Entry(natural(INGD, **NORMALIZED), INVERSE_FREE),
    # not normalized: its steps have to be smaller
    "IKFAC": Entry(natural(IKFAC), INVERSE_FREE | {"lr_cov": Log(3e-3, 1e-1)}),
    "KFAC": Entry(
        natural(KFAC),
        {"lr": LR, "damping": DAMPING, "decay": One((0.5, 0.8, 0.9, 0.95))} | COMMON,
    ),
    "RF-RMSProp": Entry(
        root_free(RFRMSProp, momentum=0.9),
        {"lr": LR_ROOT_FREE, "alpha": One((0.8, 0.9, 0.95, 0.99)), "damping": DAMPING} | COMMON,
    ),
    "RF-AdamW": Entry(
        root_free(RFAdamW), {"lr": LR_ROOT_FREE, "betas": BETAS, "eps": Log(1e-5, 1e-1)} | DECOUPLED
    ),
    "RF-Shampoo": Entry(root_free(RFShampoo, interval=interval), INVERSE_FREE),
}
