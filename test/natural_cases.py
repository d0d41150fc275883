"""Small networks, their data and losses, and training with an optimizer and with the dense oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from natural_oracle import Natural, Options, restrict
from torch import Tensor, nn

from backpack_ext import backpack, extend
from curvature import STRUCTURES
from optim import IKFAC, INGD, KFAC, SINGD

RULES = {SINGD: "singd", INGD: "singd", IKFAC: "ikfac", KFAC: "kfac"}


# -- networks --------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that is called twice, and one that nothing calls."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.last(self.again(self.again(x).tanh()).tanh())


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))


def pooled() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Mean(), nn.Linear(4, 3))


def embedding() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), Mean(), nn.Linear(3, 3)
    )


def vectors(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(n, *shape), torch.randint(3, (n,)))


def per_token(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, 3), torch.randint(3, (n, 4))


def words(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(6, (n, 5)), torch.randint(3, (n,))


def values(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randn(n, 3)


@dataclass
class Case:
    """A network with data.

    Attributes:
        model: Builds it.
        data: Draws inputs and targets of n data.
        squared: Whether the loss is that of regression.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    squared: bool = False

    def loss_fn(self, reduction: str = "mean") -> nn.Module:
        kind = nn.MSELoss if self.squared else nn.CrossEntropyLoss
        return extend(kind(reduction=reduction))

    def flat(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the loss gets: one row per token."""
        if self.squared or output.dim() == 2:
            return output, target
        return output.flatten(0, 1), target.flatten()

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the terms, for the oracle."""
        loss = F.mse_loss if self.squared else F.cross_entropy
        return loss(*self.flat(output, target), reduction="sum")

    def parts(self, sizes: Sequence[int], reduction: str = "mean") -> list[tuple[Tensor, Tensor, float]]:
        """Draw backward passes of one step, with the factors c that make them one batch."""
        whole = sum(sizes)
        return [(*self.data(n), n / whole if reduction == "mean" else 1.0) for n in sizes]

    def scaled(self, parts: list, reduction: str = "mean") -> list:
        """Return the same with the scales ``r c``."""
        r = [1 / y.numel() if reduction == "mean" else 1.0 for _, y, _ in parts]
        return [(x, y, c * r_) for (x, y, c), r_ in zip(parts, r, strict=True)]


CASES = {
    "mlp": Case(mlp, vectors(4)),
    "regression": Case(mlp, values, squared=True),
    "conv": Case(conv, vectors(2, 6, 6)),
    "tokens": Case(tokens, per_token),
    "pooled": Case(pooled, vectors(4, 3)),
    "embedding": Case(embedding, words),
    "twice": Case(Twice, vectors(3)),
}


# -- structures ------------------------------------------------------------------------------------

MANY_STRUCTURES = [
    "dense",
    "diagonal",
    ("block-diagonal", {"block": 2}),
    "lower-triangular",
    "upper-triangular",
    ("hierarchical", {"k1": 1, "k2": 2}),
    ("rank-k-lower", {"k": 2}),
    ("rank-k-upper", {"k": 1}),
    "lower-toeplitz",
    "upper-toeplitz",
]
MIXED_STRUCTURES = [
    ("diagonal", "dense"),
    (("hierarchical", {"k1": 2, "k2": 1}), "upper-toeplitz"),
    ("lower-triangular", ("block-diagonal", {"block": 3})),
]


def pair(structure: Any) -> tuple[tuple[str, dict], tuple[str, dict]]:
    """Return names and options for K and for C."""
    one = isinstance(structure, str) or isinstance(structure[1], dict)
    both = (structure, structure) if one else structure
    K, C = ((s, {}) if isinstance(s, str) else s for s in both)
    return K, C


def factor_names(oracle: Natural, layer: str) -> list[str]:
    """Return the matrices that an optimizer keeps of a layer."""
    if oracle.rule == "kfac":
        return ["A", "B"]
    momentum = oracle.rule == "singd" and oracle.options[layer].alpha1
    return ["K", "C", *(["m_K", "m_C"] if momentum else [])]


def random_state(
    opt: torch.optim.Optimizer, twin: Natural, model: nn.Module, scale: float = 0.3
) -> None:
    """Give optimizer and oracle, after a first step, the same factors, symmetric in no entry."""
    dictionary = opt.state_dict()
    index = {id(p): i for i, p in enumerate(p for g in opt.param_groups for p in g["params"])}
    modules = dict(model.named_modules())
    for name, layer in twin.layers.items():
        if "K" not in layer.state:
            continue
        weight = modules[name].weight
        entries = dictionary["state"][index[id(weight)]]
        for factor, (structure, options) in (("K", twin.options[name].K), ("C", twin.options[name].C)):
            for prefix, start in (("", 1.0), ("m_", 0.0)):
                old = layer.state[prefix + factor]
                M = start * torch.eye(old.shape[-1]) + scale * torch.randn(old.shape)
                M = layer.state[prefix + factor] = restrict(structure, M, **options)
                if prefix + factor not in factor_names(twin, name):
                    continue
                for i, t in enumerate(STRUCTURES[structure].from_dense(M, **options).tensors):
                    key = f"{prefix}{factor}.{i}"
                    assert entries[key].shape == t.shape, (key, entries[key].shape, t.shape)
                    entries[key] = t
    opt.load_state_dict(dictionary)


# -- training --------------------------------------------------------------------------------------


def backward(
    case: Case, model: nn.Module, opt: Any, parts: list, loss_fn: nn.Module, **options: Any
) -> None:
    """Run the backward passes of one step, each in a block of its own."""
    for x, y, c in parts:
        with backpack(*opt.extensions(), **options):
            (c * loss_fn(*case.flat(model(x), y))).backward()


def train(case: Case, model: nn.Module, opt: Any, steps: list, reduction: str = "mean") -> None:
    """Take steps, each a list of parts."""
    loss_fn = case.loss_fn(reduction)
    for parts in steps:
        opt.zero_grad()
        backward(case, model, opt, parts, loss_fn)
        opt.step()


def oracle_options(given: dict) -> dict:
    """Translate options of an optimizer into those of `Options`."""
    names = Options.__dataclass_fields__
    found = {k: v for k, v in given.items() if k in names}
    if "structure" in given:
        found["K"], found["C"] = pair(given["structure"])
    return found


def make_fallback(given: dict) -> Callable[[list], torch.optim.Optimizer]:
    """Return torch's own optimizer as the fallback that options ask for."""
    kind = given.get("fallback", "adamw")
    classes = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    classes["rmsprop"] = torch.optim.RMSprop
    lr = given.get("fallback_lr") or given.get("lr", 1e-3)
    return partial(
        classes.get(kind, kind),
        lr=lr,
        weight_decay=given.get("weight_decay", 0.0),
        maximize=given.get("maximize", False),
        **(given.get("fallback_options") or {}),
    )


def twins(kind: type, model: nn.Module, case: Case, given: dict) -> tuple[Any, Natural]:
    """Return an optimizer of a model, which is extended, and the oracle of a copy."""
    names = ("approx", "interval", "inverse_interval", "joint_bias", "kl_clip", "maximize")
    own = {k: v for k, v in given.items() if k in names}
    options = Options(**oracle_options(given))
    if kind is IKFAC:
        options.alpha1 = 0.0
    oracle = Natural(
        deepcopy(model), case.total, RULES[kind], options, fallback=make_fallback(given), **own
    )
    return kind(extend(model), **given), oracle


def check(model: nn.Module, opt: Any, oracle: Natural, tolerance: float = 1e-10) -> None:
    """Compare parameters and factors."""
    for (name, p), q in zip(model.named_parameters(), oracle.model.parameters(), strict=True):
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    modules = dict(model.named_modules())
    for name, layer in oracle.layers.items():
        if not layer.refreshes:
            continue
        found = opt.factors(modules[name].weight)
        for factor in factor_names(oracle, name):
            M, expected = found[factor], layer.state[factor]
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                M.to_dense(),
                expected,
                rtol=0,
                atol=tolerance * max(1.0, scale),
                msg=lambda m, n=f"{name} {factor}": f"{n}: {m}",
            )


def compare(
    kind: type,
    case: Case | str,
    steps: int = 4,
    sizes: Sequence[int] = (6,),
    reduction: str = "mean",
    start: bool = False,
    prepare: Callable[[nn.Module], Any] | None = None,
    tolerance: float = 1e-10,
    **given: Any,
) -> tuple[nn.Module, Any, Natural]:
    """Train with an optimizer and with the oracle and compare after each step.

    Args:
        kind: Class of the optimizer.
        case: What to train, or its name.
        steps: Number of steps.
        sizes: Numbers of data of the backward passes of a step.
        reduction: Of the loss.
        start: Whether to go on, after the first step, with random factors.
        prepare: Called with the model, before anything else.
        tolerance: Of all comparisons.
        **given: Options of the optimizer.

    Returns:
        The model, the optimizer and the oracle.
    """
    case = CASES[case] if isinstance(case, str) else case
    model = case.model()
    if prepare is not None:
        prepare(model)
    opt, oracle = twins(kind, model, case, given)
    first = deepcopy(model.state_dict())
    for t in range(steps):
        parts = case.parts(sizes, reduction)
        train(case, model, opt, [parts], reduction)
        oracle.step(case.scaled(parts, reduction))
        check(model, opt, oracle, tolerance)
        if start and t == 0:
            random_state(opt, oracle, model)
    assert opt.skipped == 0
    moved = [
        not torch.equal(p, q) for p, q in zip(model.state_dict().values(), first.values(), strict=True)
    ]
    assert any(moved)
    return model, opt, oracle


def same(one: Any, other: Any) -> bool:
    """Whether nested state is bitwise the same."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
