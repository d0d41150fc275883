"""The optimizers that are compared: ours, torch's, and those of the package singd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import optim
from backpack_ext import backpack, extend
from benchmarks.floor import Shapes
from benchmarks.models import Problem
from benchmarks.training import floors
from benchmarks.training.floors import Work

INTERVAL = 10  # iterations between refreshes

# Small steps: hundreds of iterations on one batch of random labels are to stay ordinary training.
LR = 1e-4

# Sizes of the structures, for ours as for the package singd, which has no others.
BLOCK, BORDER = 30, 15

ADAMW, SGD = "AdamW", "SGD, momentum"
PEER = "singd"


@dataclass(frozen=True)
class Contender:
    """An optimizer under a name.

    Args:
        name: Of the row.
        make: Returns the optimizer of a model, given the batch size and the interval.
        side: ``"ours"``, ``"torch"`` or ``"singd"``.
        work: The products that the mathematics needs beyond SGD's iteration; None if not counted.
        goals: The largest time that we are content with, by problem.
        endless: Whether a period takes so long that only two iterations are run, once.
        extended: Whether the optimizer reads backward passes through ``backpack(...)``.
    """

    name: str
    make: Callable[[nn.Module, int, int], Optimizer]
    side: str = "ours"
    work: Callable[[Shapes], Work] | None = None
    goals: dict[str, float] = field(default_factory=dict)
    endless: bool = False
    extended: bool = False


class Training:
    """A copy of a problem's model that one optimizer trains.

    Args:
        contender: The optimizer.
        problem: The model and its batch.
    """

    def __init__(self, contender: Contender, problem: Problem):
        self.interval = 2 if contender.endless else INTERVAL
        self.x, self.y = problem.x, problem.y
        self.model, self.loss_fn = copy.deepcopy(problem.model), nn.CrossEntropyLoss()
        if contender.extended:
            self.model, self.loss_fn = extend(self.model), extend(self.loss_fn)
        self.optimizer = contender.make(self.model, len(self.x), self.interval)
        self.iteration = self._extended if contender.extended else self._plain
        self.laps: list[tuple[float, float]] = []

    def _plain(self) -> None:
        self.optimizer.zero_grad()
        self.loss_fn(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def _extended(self) -> None:
        self.optimizer.zero_grad()
        with backpack(*self.optimizer.extensions()):
            self.loss_fn(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def period(self) -> None:
        """Run the iterations from one refresh to the next, and note their seconds.

        In ``laps``: the seconds of the first iteration, and of each other one.
        """
        start = perf_counter()
        self.iteration()
        first = perf_counter()
        for _ in range(self.interval - 1):
            self.iteration()
        self.laps.append((first - start, (perf_counter() - first) / (self.interval - 1)))

    @property
    def is_sound(self) -> bool:
        """Whether the training is what it seems: no step was skipped, nothing has overflown."""
        finite = all(p.isfinite().all() for p in self.model.parameters())
        return finite and not getattr(self.optimizer, "skipped", 0)

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors that the optimizer keeps, wherever, beside parameters and gradients."""
        return floors.bytes_within(self.optimizer, self.model)


# --------------------------------------------------------------------------- ours


def _natural(cls: type[Optimizer], **options: Any) -> Callable[[nn.Module, int, int], Optimizer]:
    return lambda model, batch, interval: cls(model, lr=LR, interval=interval, **options)


def _singd(structure: Any) -> Callable[[nn.Module, int, int], Optimizer]:
    return _natural(optim.SINGD, structure=structure)


def _ours(name: str, make: Callable[[nn.Module, int, int], Optimizer], **options: Any) -> Contender:
    return Contender(name, make, extended=True, **options)


def _rootfree(cls: type[Optimizer]) -> Contender:
    def make(model: nn.Module, batch: int, interval: int) -> Optimizer:
        period = {"interval": interval} if cls is optim.RFShampoo else {}
        return cls(model.parameters(), lr=LR, batch_size=batch, **period)

    return Contender(cls.__name__, make)


OURS = (
    _ours("SINGD diagonal", _singd("diagonal"), goals={"mlp": 1.05, "cnn": 1.05, "vit": 1.05}),
    _ours(
        *("SINGD block-diagonal", _singd(("block-diagonal", {"block": BLOCK}))),
        work=floors.block_diagonal(BLOCK),
    ),
    _ours(
        *("SINGD hierarchical", _singd(("hierarchical", {"k1": BORDER, "k2": BORDER}))),
        work=floors.hierarchical(BORDER, BORDER),
        goals={"mlp": 1.5},
    ),
    _ours("SINGD rank-k", _singd(("rank-k-lower", {"k": BORDER}))),
    _ours("SINGD lower-toeplitz", _singd("lower-toeplitz"), goals={"mlp": 1.6}),
    _ours("SINGD lower-triangular", _singd("lower-triangular"), work=floors.dense),
    _ours(
        *("SINGD dense (INGD)", _singd("dense")),
        work=floors.dense,
        goals={"mlp": 4.5, "cnn": 1.4},
    ),
    _ours("IKFAC dense", _natural(optim.IKFAC), work=floors.dense),
    _ours("KFAC dense", _natural(optim.KFAC), work=floors.kfac),
    _rootfree(optim.RFAdamW),
    _rootfree(optim.RFShampoo),
    _ours("AdaHesScale", lambda model, batch, interval: optim.AdaHesScale(model, lr=LR)),
)

# --------------------------------------------------------------------------- others

TORCH = (
    Contender(ADAMW, lambda m, batch, interval: torch.optim.AdamW(m.parameters(), lr=LR), "torch"),
    Contender(
        *(SGD, lambda m, batch, interval: torch.optim.SGD(m.parameters(), lr=LR, momentum=0.9)),
        "torch",
    ),
)


def _peer(structure: str) -> Callable[[nn.Module, int, int], Optimizer]:
    def make(model: nn.Module, batch: int, interval: int) -> Optimizer:
        from singd.optim.optimizer import SINGD

        structures = (structure, structure)
        options = {"kfac_approx": "reduce", "warn_unsupported": False}
        return SINGD(model, lr=LR, T=interval, structures=structures, **options)

    return make


# Names of rows of ours, and what the package singd calls the same structure.
PEERS = {
    "SINGD diagonal": "diagonal",
    "SINGD block-diagonal": f"block{BLOCK}diagonal",
    "SINGD hierarchical": f"hierarchical{BORDER}_{BORDER}",
    "SINGD lower-toeplitz": "triltoeplitz",
    "SINGD dense (INGD)": "dense",
}


def peers() -> dict[str, str]:
    """Return the version of the package singd, if it is there."""
    try:
        import_module("singd.optim.optimizer")
    except ImportError:
        return {}
    return {PEER: version(PEER)}


def contenders(words: list[str] | None = None) -> list[Contender]:
    """Return all that can be run, those of torch first.

    Args:
        words: Words of which a row's name must have one; all rows if None. Torch's are always there.
    """
    chosen = [c for c in OURS if not words or any(w.lower() in c.name.lower() for w in words)]
    found = [*TORCH, *chosen]
    if peers():
        names = {c.name for c in chosen}
        found += [
            Contender(name, _peer(structure), PEER, endless="toeplitz" in structure)
            for name, structure in PEERS.items()
            if name in names
        ]
    return found
