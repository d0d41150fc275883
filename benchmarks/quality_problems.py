"""What `benchmarks.hessian_quality` measures on: small networks, at initialisation and trained.

Each network learns what a random one-hidden-layer tanh network says: the inputs are standard normal, the
labels are drawn from the teacher's softmax. The teacher's parameters are 3 times their default, so that
its labels are worth learning.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import CLASSES, Problem, ViT

TRAINED = 1000  # steps of Adam
BATCH, RATE = 32, 1e-3
TEACHER_WIDTH, TEACHER_SCALE = 16, 3


@dataclass(frozen=True)
class Network:
    """An architecture.

    Args:
        title: What tables call it.
        about: Its layers, in a line.
        make: Returns the model with PyTorch's default initialisation.
        shape: Shape of one input.
        batch: Batch size when it is timed.
    """

    title: str
    about: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = BATCH


@dataclass(frozen=True)
class Setting:
    """A column of the table.

    Args:
        network: Key in `NETWORKS`.
        batch: Number N of data, over which the loss is averaged.
        steps: Steps of training before; none is the initialisation.
        entries: How many parameters the errors are over, drawn at random; all of them by default.
    """

    network: str
    batch: int
    steps: int = 0
    entries: int | None = None

    @property
    def state(self) -> str:
        """``"init"`` or ``"trained"``."""
        return "trained" if self.steps else "init"

    @property
    def name(self) -> str:
        """Key of the setting, such as ``"tanh-32-init"``."""
        return f"{self.network}-{self.batch}-{self.state}"

    @property
    def title(self) -> str:
        """Column head."""
        return f"{NETWORKS[self.network].title} N={self.batch} {self.state}"

    def draw(self, seed: int) -> Problem:
        """Return a model and a batch in float64.

        The batch is none of training's. With one seed, all settings of a network have one teacher and
        one initialisation, and those of one batch size also the same batch.
        """
        network = NETWORKS[self.network]
        student, teacher = _networks(self.network, seed, self.steps)
        generator = torch.Generator().manual_seed(seed)
        x, y = _batch(teacher, network.shape, self.batch, generator)
        return Problem(self.name, self.title, network.about, deepcopy(student), x, y)


@cache
def _networks(name: str, seed: int, steps: int) -> tuple[nn.Module, nn.Module]:
    """Return a student after some steps of training, and its teacher."""
    network = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = nn.Sequential(
            *(nn.Flatten(), nn.Linear(prod(network.shape), TEACHER_WIDTH), nn.Tanh()),
            nn.Linear(TEACHER_WIDTH, CLASSES),
        ).double()
        student = network.make().double()
    for p in teacher.parameters():
        p.data.mul_(TEACHER_SCALE)
    generator = torch.Generator().manual_seed(seed + 10**6)  # apart from what `Setting.draw` draws
    optimizer = torch.optim.Adam(student.parameters(), RATE)
    for _ in range(steps):
        x, y = _batch(teacher, network.shape, BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return student, teacher


@torch.no_grad()
def _batch(
    teacher: nn.Module, shape: tuple[int, ...], n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return x, torch.multinomial(teacher(x).softmax(1), 1, generator=generator)[:, 0]


# --------------------------------------------------------------------------- networks


def _mlp(*widths: int, activation: type[nn.Module], norm: bool = False) -> Callable[[], nn.Module]:
    """Return a factory: linear layers with an activation between them, and a layer norm before it."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for i, o in pairwise(widths[:-1]):
            layers += [nn.Linear(i, o), *([nn.LayerNorm(o)] if norm else []), activation()]
        return nn.Sequential(*layers, nn.Linear(*widths[-2:]))

    return make


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 2 * 2, CLASSES)),
    )


NETWORKS: dict[str, Network] = {
    "tanh": Network(
        *("tanh", "MLP 20-32-32-32-10, tanh"),
        *(_mlp(20, 32, 32, 32, CLASSES, activation=nn.Tanh), (20,)),
    ),
    "relu": Network(
        *("ReLU", "MLP 20-32-32-32-10, ReLU"),
        *(_mlp(20, 32, 32, 32, CLASSES, activation=nn.ReLU), (20,)),
    ),
    "norm": Network(
        *("layer norm", "MLP 20-32-32-10, each hidden layer linear, layer norm, tanh"),
        *(_mlp(20, 32, 32, CLASSES, activation=nn.Tanh, norm=True), (20,)),
    ),
    "conv": Network(
        *("conv", "two convolutions 3x3 (8, 16), SiLU, average pools, head; 3x8x8"),
        *(_cnn, (3, 8, 8)),
    ),
    "vit": Network(
        *("ViT", "ViT, one block of width 12, 2 heads, GELU, mean over 16 patches of 3x8x8"),
        *(lambda: ViT(8, 2, 12, 1, 2, affine=True), (3, 8, 8)),
    ),
    "large": Network(
        *("large tanh", "MLP 784-512-512-10, tanh"),
        *(_mlp(784, 512, 512, CLASSES, activation=nn.Tanh), (784,), 128),
    ),
}
# Of the large network the exact diagonal is taken at so many parameters, with so many seeds at most.
LARGE, ENTRIES, LARGE_SEEDS = "large", 256, 3


def settings(steps: int = TRAINED) -> tuple[Setting, ...]:
    """Return the columns of the table.

    Args:
        steps: Steps of training where there is any.
    """
    return (
        *(Setting("tanh", n, k) for n in (32, 1) for k in (0, steps)),
        Setting("relu", 32),
        *(Setting(name, 32, k) for name in ("norm", "conv", "vit") for k in (0, steps)),
        Setting(LARGE, NETWORKS[LARGE].batch, entries=ENTRIES),
    )
