"""The low-rank GGN of whole networks against the dense definition: spectra, directions, steps."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial

import pytest
import torch
from backpack import extend as theirs_extend
from backpack import extensions as theirs
from lowrank_oracle import (
    Dense,
    centered,
    clusters,
    dense,
    descending,
    newton_step,
    noise_damping,
    outer,
    root,
)
from models import CASES, Problem
from oracle import close, ggn_diag, loss_scale, per_sample_grads
from test_bare import BODIES as BARE
from test_bare import build as bare_problem
from test_losses import LOSSES
from test_lowrank_oracle import of_loss
from test_montecarlo import check_mean
from test_norms import BUILD as NORMS
from test_norms import build as norm_problem
from test_products import build as product_problem
from torch import Tensor, nn

from backpack_ext import (
    KFAC,
    BatchGrad,
    DiagGGN,
    LowRankGGN,
    RecordingError,
    UnsupportedError,
    backpack,
    extend,
)
from backpack_ext import site as site_module
from backpack_ext.dataset import collect
from backpack_ext.loss_call import LossCall

every_case = pytest.mark.parametrize("name", CASES)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
FEW = ("mlp", "cnn", "vit_params", "char_gpt", "functional")
few_cases = pytest.mark.parametrize("name", FEW)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(problem: Problem, *exts, factor: float = 1.0, sequence_first: bool = False) -> None:
    """Extend a problem and do one backward pass."""
    extend(problem.model), extend(problem.loss_fn, batch_axis=int(sequence_first))
    with backpack(*exts):
        loss = problem.loss()
        (loss if factor == 1 else factor * loss).backward()


def low_rank(problem: Problem, factor: float = 1.0, **options) -> LowRankGGN:
    ggn = LowRankGGN(**options)
    run(problem, ggn, factor=factor)
    return ggn


@cache
def computed(name: str, reduction: str = "mean") -> tuple[Problem, LowRankGGN]:
    """A problem of the registry after a pass."""
    problem = CASES[name](reduction=reduction)
    return problem, low_rank(problem)


@cache
def reference(name: str, reduction: str = "mean") -> Dense:
    return dense(CASES[name](reduction=reduction))


@cache
def spectrum(name: str, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """All eigenvalues, descending, and eigenvectors, rows in order of the named parameters."""
    return descending(reference(name, reduction).matrix())


def names_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def of_group(found: Dense, model: nn.Module, ggn: LowRankGGN, group: str | None = None) -> Dense:
    """The dense quantities with their rows in the order of a group's parameters."""
    if group is None:
        (group,) = ggn.parameters
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return found.of(names_of(model, ggn.parameters[group]), shapes)


def rows(tensors: Sequence[Tensor]) -> Tensor:
    """Vectors `[k, *shape]` of several parameters as rows `[k, P]`."""
    return torch.cat([t.reshape(len(t), -1) for t in tensors], dim=1)


def row(tensors: Sequence[Tensor] | Tensor) -> Tensor:
    """Parameter-shaped tensors as one vector `[P]`."""
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    return torch.cat([t.flatten() for t in tensors])


def parts(vectors: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """Rows `[..., P]` as tensors `[..., *shape]`, one per parameter."""
    split = vectors.split([p.numel() for p in parameters], dim=-1)
    return tuple(
        t.unflatten(-1, p.shape) if p.dim() else t.squeeze(-1)
        for t, p in zip(split, parameters, strict=True)
    )


def joined(step: dict[nn.Parameter, Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """What a dict by parameter holds, as one vector."""
    assert {id(p) for p in step} == {id(p) for p in parameters}
    assert all(step[p].shape == p.shape for p in parameters)
    return row([step[p] for p in parameters])


def above(share: float) -> Callable[[Tensor], Tensor]:
    """The criterion that takes eigenvalues above a share of the largest."""
    return lambda values: values > share * values.max()


def same_values(found: Tensor, expected: Tensor, rtol: float = 1e-12, tolerance: float = 1e-10) -> None:
    """Non-zero eigenvalues against all of a dense matrix; at the cut either way may be right."""
    assert (found[:-1] >= found[1:]).all() and (found > 0).all()
    top = expected[0]
    assert (expected > 10 * rtol * top).sum() <= len(found) <= (expected > rtol * top / 10).sum()
    close(found, expected[: len(found)], tolerance)


def same_spaces(E: Tensor, values: Tensor, M: Tensor, tolerance: float = 1e-8) -> None:
    """Eigenvectors as rows `[K, P]` against a dense matrix: projectors of separated groups."""
    expected, vectors = descending(M)
    groups = clusters(expected, 1e-4 * expected[0].item())
    K = len(values)
    for group in groups:
        if group[-1] >= K or expected[group[-1]] < 1e-3 * expected[0]:
            break
        one, two = E[group], vectors[group]
        close(one.T @ one, two.T @ two, tolerance)
    close(E @ M, values[:, None] * E, tolerance)


def check_block(ggn: LowRankGGN, problem: Problem, found: Dense, tolerance: float = 1e-10) -> None:
    """Matrix, spectrum and products of the only block."""
    here, block = of_group(found, problem.model, ggn), ggn.block
    parameters = next(iter(ggn.parameters.values()))
    M = here.matrix()
    assert block.shapes == tuple(p.shape for p in parameters)
    close(block.to_dense(), M, tolerance)
    close(row(block.diagonal()), M.diagonal(), tolerance)
    close(block.trace(), M.trace(), tolerance)
    close(block.norm(), M.norm(), tolerance)
    torch.manual_seed(0)
    v = torch.randn(2, len(M)).to(M)
    close(rows(block.matvec(*parts(v, parameters))), v @ M, tolerance)


# -- the registry ----------------------------------------------------------------------------------


@every_reduction
@every_case
def test_matrix(name: str, reduction: str):
    problem, ggn = computed(name, reduction)
    check_block(ggn, problem, reference(name, reduction))
    trainable = [p for p in problem.model.parameters() if p.requires_grad]
    (parameters,) = ggn.parameters.values()
    assert {id(p) for p in parameters} == {id(p) for p in trainable}
    assert list(ggn.blocks.values()) == [ggn.block]
    assert all(p.low_rank_ggn is ggn.block for p in trainable)


@every_reduction
@every_case
def test_gradient_is_untouched(name: str, reduction: str):
    problem, _ = computed(name, reduction)
    plain = CASES[name](reduction=reduction)
    plain.loss().backward()
    for p, q in zip(problem.model.parameters(), plain.model.parameters(), strict=True):
        close(p.grad, q.grad)
        assert torch.equal(p, q)


@every_reduction
@every_case
def test_eigenvalues(name: str, reduction: str):
    """Those that are not zero, descending; the block knows all."""
    _, ggn = computed(name, reduction)
    expected, _ = spectrum(name, reduction)
    same_values(ggn.eigvalsh(), expected)
    same_values(ggn.block.eigvalsh(), expected)
    values = ggn.block.eigenvalues()
    assert values.shape == expected.shape
    close(values, expected.flip(0).clamp(min=0))


@every_reduction
@every_case
def test_eigenvectors(name: str, reduction: str):
    problem, ggn = computed(name, reduction)
    here = of_group(reference(name, reduction), problem.model, ggn)
    pairs = ggn.eigh(criterion=above(1e-6))
    (parameters,) = ggn.parameters.values()
    explicit = pairs.vectors.explicit()
    K = len(pairs.values)
    assert [t.shape for t in explicit] == [(K, *p.shape) for p in parameters]
    E = rows(explicit)
    close(E @ E.T, torch.eye(K).to(E), 1e-9)
    same_spaces(E, pairs.values, here.matrix())
    U = pairs.coefficients
    close(U.T @ U, torch.eye(K).to(U))
    # without forming them
    c, w = torch.randn(3, K, dtype=E.dtype), torch.randn(2, E.shape[1], dtype=E.dtype)
    close(rows(pairs.vectors.apply(c)), c @ E, 1e-9)
    close(pairs.vectors.project(*parts(w, parameters)), w @ E.T, 1e-9)


@few_cases
def test_the_largest(name: str):
    """`eigh(k)` and `eigenvectors(k)` are the first of all; a criterion may choose by index."""
    _, ggn = computed(name)
    every = ggn.eigh(criterion=above(1e-6))
    E = rows(every.vectors.explicit())
    for k in (1, 3):
        pairs = ggn.eigh(k)
        assert len(pairs.values) == k
        close(pairs.values, every.values[:k])
        found = rows(pairs.vectors.explicit())
        if every.values[k - 1] - every.values[k] > 1e-4 * every.values[0]:
            close(found.T @ found, E[:k].T @ E[:k], 1e-8)
        again = rows(ggn.eigenvectors(k).explicit())
        close(again.T @ again, found.T @ found, 1e-8)
    chosen = ggn.eigh(criterion=lambda values: torch.tensor([0, 2]))
    close(chosen.values, every.values[[0, 2]])
    found = rows(chosen.vectors.explicit())
    close(found.abs(), E[[0, 2]].abs(), 1e-7)


@every_reduction
@every_case
def test_directional_derivatives(name: str, reduction: str):
    """Slopes and curvatures of each datum's own loss along the eigenvectors."""
    problem, ggn = computed(name, reduction)
    here = of_group(reference(name, reduction), problem.model, ggn)
    pairs = ggn.eigh(criterion=above(1e-6))
    E = rows(pairs.vectors.explicit())
    gamma, lam = pairs.directional_gradients(), pairs.directional_curvatures()
    assert gamma.shape == lam.shape == (here.N, len(E))
    close(gamma, here.gradients(E), 1e-9)
    close(gamma.mean(0), E @ here.gradient, 1e-9)
    close(lam, here.curvatures(E), 1e-9)
    close(lam.mean(0), pairs.values)
    first = ggn.eigh(3)
    close(ggn.directional_gradients(3), first.directional_gradients())
    close(ggn.directional_curvatures(3), first.directional_curvatures())
    close(ggn.directional_gradients(3).abs(), gamma[:, :3].abs(), 1e-7)


@every_reduction
@every_case
def test_newton_step(name: str, reduction: str):
    problem, ggn = computed(name, reduction)
    here = of_group(reference(name, reduction), problem.model, ggn)
    pairs = ggn.eigh(criterion=above(1e-6))
    (parameters,) = ggn.parameters.values()
    E, K = rows(pairs.vectors.explicit()), len(pairs.values)
    gamma, lam = here.gradients(E), here.curvatures(E)
    per_direction = torch.linspace(0.1, 2, K).to(E) * pairs.values[0]
    noisy = noise_damping(gamma, lam.mean(0), 0.1, 0.5)
    seen = []

    def callback(g: Tensor, l: Tensor) -> Tensor:
        seen.append((g, l))
        return per_direction

    for damping, delta in (
        (0.3, 0.3),
        (per_direction, per_direction),
        (callback, per_direction),
        (noise(0.1, 0.5), noisy),
    ):
        expected = newton_step(gamma, lam, delta, E)
        close(row(pairs.newton_step(damping)), expected, 1e-7)
        step = ggn.newton_step(damping, criterion=above(1e-6))
        close(joined(step, parameters), expected, 1e-7)
    for g, l in seen:
        close(g.abs(), gamma.abs(), 1e-8)
        close(l, lam, 1e-8)
    # without eigenvectors: on the range of the matrix (the small directions hardly move when damped)
    M, eye = here.matrix(), torch.eye(E.shape[1]).to(E)
    damping = 0.1 * pairs.values[0].item()
    values, vectors = descending(M)
    kept = vectors[values > 1e-11 * values[0]]
    on_range = kept.T @ (kept @ here.gradient)
    step = joined(ggn.newton_step(damping), parameters)
    close(step, -torch.linalg.solve(M + damping * eye, on_range), 1e-5)
    some = joined(ggn.newton_step(damping, k=2), parameters)
    two = rows(ggn.eigh(2).vectors.explicit())
    close(some, newton_step(here.gradients(two), here.curvatures(two), damping, two), 1e-8)


def noise(base: float, strength: float) -> Callable[[Tensor, Tensor], Tensor]:
    from curvature.eigenpairs import noise_damping

    return noise_damping(base, strength)


@every_reduction
@every_case
def test_solve_and_determinant(name: str, reduction: str):
    problem, ggn = computed(name, reduction)
    here = of_group(reference(name, reduction), problem.model, ggn)
    (parameters,) = ggn.parameters.values()
    M = here.matrix()
    top = torch.linalg.eigvalsh(M)[-1].item()
    damped = M + 0.1 * top * torch.eye(len(M)).to(M)
    torch.manual_seed(1)
    v = torch.randn(len(M)).to(M)
    by_parameter = dict(zip(parameters, parts(v, parameters), strict=True))
    close(joined(ggn.matvec(by_parameter), parameters), M @ v)
    expected = torch.linalg.solve(damped, v)
    close(joined(ggn.solve(by_parameter, 0.1 * top), parameters), expected)
    close(row(ggn.block.solve(*parts(v, parameters), damping=0.1 * top)), expected)
    close(ggn.block.logdet(0.1 * top), torch.logdet(damped))
    close(ggn.logdet(0.1 * top), torch.logdet(damped))
    close(ggn.trace(), M.trace())


@few_cases
def test_gram_matrix(name: str):
    """Columns are those of the documented root, ordered with the data fastest."""
    _, ggn = computed(name)
    found = reference(name)
    V = found.columns(root(CASES[name](), found.H)).flatten(0, 1)
    gram = ggn.block.gram()
    assert gram.shape == (len(V), len(V))
    close(gram, V @ V.T)


# -- other networks --------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding tied to the head, between them a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.mix(self.embed(x)).tanh()).sin().mean(1))


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 4, **options), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x).tanh())


class Unused(nn.Module):
    """A parameter and a layer that the loss does not reach."""

    def __init__(self):
        super().__init__()
        self.one, self.head, self.spare = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x).tanh())


def classification(model: nn.Module, x: Tensor, classes: int = 3) -> Problem:
    problem = Problem(model, (x,), nn.CrossEntropyLoss(), torch.randint(classes, (len(x),)))
    return problem.to(torch.float64)


def convolutions() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, dilation=2, padding=2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 4, (3, 2), stride=2, padding=1, groups=2, dilation=(1, 2)),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    x = torch.randn(3, 2, 7, 6)
    model(x)
    return classification(model, x)


def padded() -> Problem:
    model = nn.Sequential(nn.Embedding(6, 3, padding_idx=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    return classification(model, torch.randint(6, (4, 4)))


def stacked_lstm() -> Problem:
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LSTM(4, 3, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)[0][:, -1])

    return classification(Last(), torch.randn(3, 4, 4))


def of_bare(name: str) -> Problem:
    model, x, y = bare_problem(name, 3)
    return Problem(model, (x,), nn.CrossEntropyLoss(), y)


def of_products(name: str) -> Problem:
    model, x, y, target = product_problem(name, 3)
    return Problem(model, (x, y), nn.CrossEntropyLoss(reduction="sum"), target)


OTHERS: dict[str, Callable[[], Problem]] = {
    "tied": lambda: classification(Tied(), torch.randint(7, (4, 3)), 7),
    "padding index": padded,
    "bags, mean": lambda: classification(Bags(mode="mean"), torch.randint(6, (4, 5))),
    "bags, sum, padding index": lambda: classification(
        Bags(mode="sum", padding_idx=2), torch.randint(6, (4, 5))
    ),
    "convolutions": convolutions,
    "unused": lambda: classification(Unused(), torch.randn(4, 4)),
    "stacked LSTM": stacked_lstm,
}
OTHERS |= {f"bare: {name}": partial(of_bare, name) for name in BARE}
OTHERS |= {f"norm: {name}": partial(norm_problem, name) for name in NORMS}
for _name in ("cross", "three inputs", "sequence first", "kdim", "no bias", "bias_kv", "by hand", "GRU"):
    OTHERS[f"product: {_name}"] = partial(of_products, _name)


def other(name: str) -> Problem:
    torch.manual_seed(0)
    return OTHERS[name]()


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(name: str):
    found, problem = dense(other(name)), other(name)
    ggn = low_rank(problem)
    check_block(ggn, problem, found)
    here = of_group(found, problem.model, ggn)
    same_values(ggn.eigvalsh(), descending(here.matrix())[0])
    pairs = ggn.eigh(criterion=above(1e-6))
    E = rows(pairs.vectors.explicit())
    close(E @ E.T, torch.eye(len(E)).to(E), 1e-9)
    close(pairs.directional_gradients(), here.gradients(E), 1e-8)
    close(pairs.directional_curvatures(), here.curvatures(E), 1e-8)


@every_reduction
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, reduction: str):
    """Every layout of logits, with ignored targets, class weights, smoothing and soft targets."""
    problem, plain = of_loss(name, reduction)
    found = dense(plain)
    ggn = LowRankGGN()
    run(problem, ggn, sequence_first=bool(LOSSES[name][3]))
    check_block(ggn, problem, found)
    here = of_group(found, problem.model, ggn)
    pairs = ggn.eigh(criterion=above(1e-6))
    E = rows(pairs.vectors.explicit())
    close(pairs.directional_gradients(), here.gradients(E), 1e-9)
    close(pairs.directional_curvatures(), here.curvatures(E), 1e-9)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@few_cases
def test_factor_of_the_loss(name: str, fisher: str):
    """A quarter of the loss has a quarter of the curvature and of the slopes."""
    problem, whole = CASES[name](), CASES[name]()
    quarter, one = low_rank(problem, factor=0.25, fisher=fisher), low_rank(whole, fisher=fisher)
    close(quarter.block.to_dense(), one.block.to_dense() / 4)
    close(quarter.directional_gradients(2).abs(), one.directional_gradients(2).abs() / 4, 1e-7)


def test_two_losses():
    """They add up, with their factors; so do the slopes."""
    problem = CASES["mlp"]()
    target = problem.target.roll(1)
    swapped = CASES["mlp"]()
    swapped.target = target
    one, two = dense(CASES["mlp"]()), dense(swapped, factor=2.0)
    model, loss_fn, other_fn = extend(problem.model), extend(problem.loss_fn), nn.CrossEntropyLoss()
    extend(other_fn)
    ggn = LowRankGGN()
    with backpack(ggn):
        z = model(*problem.inputs)
        (loss_fn(z, problem.target) + 2 * other_fn(z, target)).backward()
    first, second = (of_group(d, model, ggn) for d in (one, two))
    close(ggn.block.to_dense(), first.matrix() + second.matrix())
    pairs = ggn.eigh(4)
    E = rows(pairs.vectors.explicit())
    close(pairs.directional_gradients(), first.gradients(E) + second.gradients(E), 1e-9)
    close(pairs.directional_curvatures(), first.curvatures(E) + second.curvatures(E), 1e-9)


def test_two_losses_of_several_heads():
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 3).double(), [nn.Linear(3, 2).double(), nn.Linear(3, 4).double()]
    x, y, t = torch.randn(5, 4).double(), torch.randint(2, (5,)), torch.randn(5, 4).double()
    found = []
    for head, loss_fn, target in ((heads[0], nn.CrossEntropyLoss(), y), (heads[1], nn.MSELoss(), t)):
        branch = Problem(nn.Sequential(trunk, nn.Tanh(), head), (x,), loss_fn, target)
        found.append(dense(branch, ["0.weight", "0.bias"]).matrix())
    extend(trunk), [extend(head) for head in heads]
    losses, ggn = (extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())), LowRankGGN()
    groups = [[trunk.weight, trunk.bias]]
    ggn = LowRankGGN(param_groups=groups)
    with backpack(ggn):
        h = trunk(x).tanh()
        (losses[0](heads[0](h), y) + losses[1](heads[1](h), t)).backward()
    close(ggn.block.to_dense(), sum(found))


# -- groups of parameters --------------------------------------------------------------------------


def check_groups(problem: Problem, ggn: LowRankGGN, found: Dense) -> None:
    """Each group's block is the dense one; joined quantities are those of the block diagonal."""
    model = problem.model
    named = dict(model.named_parameters())
    order = [p for group in ggn.parameters.values() for p in group]
    assert len({id(p) for p in order}) == len(order)
    matrices = {}
    for group, parameters in ggn.parameters.items():
        here, block = of_group(found, model, ggn, group), ggn.blocks[group]
        matrices[group] = here.matrix()
        close(block.to_dense(), matrices[group])
        assert all(p.low_rank_ggn is block for p in parameters)
        values = torch.linalg.eigvalsh(matrices[group]).flip(0)
        if len(ggn.blocks) > 1 and values[0] > 0:
            same_values(ggn.eigvalsh()[group], values)
        pairs = ggn.blocks[group].eigh(criterion=above(1e-6)) if values[0] > 0 else None
        if pairs is not None:
            E = rows(pairs.vectors.explicit())
            close(pairs.directional_gradients(), here.gradients(E), 1e-8)
            close(pairs.directional_curvatures(), here.curvatures(E), 1e-8)
    M = torch.block_diag(*matrices.values())
    whole = found.of(names_of(model, order), {k: p.shape for k, p in named.items()})
    torch.manual_seed(0)
    v = torch.randn(len(M)).to(M)
    by_parameter = dict(zip(order, parts(v, order), strict=True))
    damping = 0.1 * M.diagonal().max().item()
    damped = M + damping * torch.eye(len(M)).to(M)
    close(joined(ggn.matvec(by_parameter), order), M @ v)
    close(joined(ggn.solve(by_parameter, damping), order), torch.linalg.solve(damped, v))
    close(ggn.logdet(damping), torch.logdet(damped))
    close(ggn.trace(), M.trace())
    solved, step = [], joined(ggn.newton_step(damping), order)
    for m, g in zip(
        matrices.values(), whole.gradient.split([len(m) for m in matrices.values()]), strict=True
    ):
        values, vectors = descending(m)
        kept = vectors[values > 1e-11 * values[0].clamp(min=1e-300)]
        on_range = kept.T @ (kept @ g)
        solved.append(torch.linalg.solve(m + damping * torch.eye(len(m)).to(m), on_range))
    close(step, -torch.cat(solved), 1e-5)


@pytest.mark.parametrize("groups", ["layers", "parameters"])
@pytest.mark.parametrize("name", ["mlp", "resnet", "vit_params", "char_gpt", "unet"])
def test_named_groups(name: str, groups: str):
    problem = CASES[name]()
    ggn = low_rank(problem, param_groups=groups)
    check_groups(problem, ggn, reference(name))
    trainable = [p for p in problem.model.parameters() if p.requires_grad]
    assert sum(len(group) for group in ggn.parameters.values()) == len(trainable)
    if groups == "parameters":
        assert all(len(group) == 1 for group in ggn.parameters.values())
        return
    found = [set(map(id, group)) for group in ggn.parameters.values()]
    for module in problem.model.modules():
        own = {id(p) for p in module.parameters(recurse=False)}
        if own and name != "char_gpt":  # there, two modules have one weight
            assert own in found


@pytest.mark.parametrize("named", [False, True])
def test_own_groups(named: bool):
    """Any parameters together, in any order, some in none."""
    problem = CASES["vit_params"]()
    model = problem.model
    lists = [
        [model.head.bias, model.pos, model.block.qkv.weight],
        [model.token],
        [model.patch.weight, model.patch.bias, model.norm.weight],
    ]
    groups: list = lists
    if named:
        groups = [{"params": group, "name": name} for group, name in zip(lists, "abc", strict=True)]
        groups[1] = {"params": iter(lists[1])}
    ggn = low_rank(problem, param_groups=groups)
    assert [set(map(id, group)) for group in ggn.parameters.values()] == [
        set(map(id, group)) for group in lists
    ]
    if named:
        names = list(ggn.parameters)
        assert (names[0], names[2]) == ("a", "c") and list(ggn.blocks) == names
    check_groups(problem, ggn, reference("vit_params"))
    assert not hasattr(model.head.weight, "low_rank_ggn")
    with pytest.raises((ValueError, RuntimeError), match="block"):
        ggn.block  # noqa: B018


def test_groups_of_an_optimizer():
    problem = CASES["mlp"]()
    model = problem.model
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1
    )
    ggn = low_rank(problem, param_groups=optimizer.param_groups)
    assert len(ggn.blocks) == 2
    check_groups(problem, ggn, reference("mlp"))


def test_several_groups_are_told_apart():
    """What the only block would answer comes as a dict by group."""
    problem = CASES["mlp"]()
    ggn = low_rank(problem, param_groups="layers")
    for found in (
        ggn.eigvalsh(),
        ggn.eigh(2),
        ggn.eigenvectors(2),
        ggn.directional_gradients(2),
        ggn.directional_curvatures(2),
    ):
        assert list(found) == list(ggn.blocks)
    close(ggn.eigh(2)["0"].values, ggn.blocks["0"].eigvalsh()[:2])


def test_newton_step_of_groups():
    problem = CASES["mlp"]()
    ggn = low_rank(problem, param_groups="layers")
    step = ggn.newton_step(0.1, k=3)
    for group, parameters in ggn.parameters.items():
        here = of_group(reference("mlp"), problem.model, ggn, group)
        E = rows(ggn.blocks[group].eigenvectors(3).explicit())
        expected = newton_step(here.gradients(E), here.curvatures(E), 0.1, E)
        close(row([step[p] for p in parameters]), expected, 1e-9)


@pytest.mark.parametrize("groups", [None, "layers", "parameters"])
def test_frozen_parameters(groups: str | None):
    problem = CASES["cnn"]()
    problem.model[0].weight.requires_grad_(False)
    problem.model[5].bias.requires_grad_(False)
    found = dense(problem)
    ggn = low_rank(problem, param_groups=groups)
    frozen = (problem.model[0].weight, problem.model[5].bias)
    kept = {id(p) for group in ggn.parameters.values() for p in group}
    assert not any(id(p) in kept or hasattr(p, "low_rank_ggn") for p in frozen)
    check_groups(problem, ggn, found)


# -- other vectors ---------------------------------------------------------------------------------


def samples_of(problem: Problem, generator: torch.Generator, count: int) -> Tensor:
    """The samples that a generator gives, `[V, N, D]`, scaled to those of the loss."""
    logits = problem.forward().detach().requires_grad_()
    call = LossCall(problem.loss_fn, logits, problem.target)
    S = torch.stack([call.sample(generator) for _ in range(count)])
    return S.reshape(count, problem.batch_size, -1) * (loss_scale(problem) / count) ** 0.5


@pytest.mark.parametrize("count", [1, 3])
@every_reduction
@every_case
def test_given_samples(name: str, reduction: str, count: int):
    """`V V^T` is the sum of the sampled vectors' outer products."""
    plain, problem = CASES[name](reduction=reduction), CASES[name](reduction=reduction)
    found = reference(name, reduction)
    V = found.columns(samples_of(plain, seeded(), count))
    generator = seeded()
    diagonal = DiagGGN("mc", mc_samples=count, generator=generator)
    ggn = LowRankGGN("mc", mc_samples=count, generator=generator)
    run(problem, ggn, diagonal)
    here = of_group(found, problem.model, ggn)
    V = here.columns(samples_of(plain, seeded(), count))
    close(ggn.block.to_dense(), outer(V))
    (parameters,) = ggn.parameters.values()
    close(row(ggn.block.diagonal()), row([p.diag_ggn_mc for p in parameters]))
    assert len(ggn.eigvalsh()) <= count * problem.batch_size
    close(ggn.block.gram(), V.flatten(0, 1) @ V.flatten(0, 1).T)
    pairs = ggn.eigh(2)
    E = rows(pairs.vectors.explicit())
    close(pairs.directional_gradients(), here.gradients(E), 1e-9)
    close(pairs.directional_curvatures(), here.N * (V @ E.T).square().sum(0), 1e-9)


def test_equal_seeds_give_equal_results():
    problem = CASES["cnn"]()
    found = [low_rank(problem, fisher="mc", generator=seeded(s)).block.to_dense() for s in (3, 3, 4)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    state = torch.get_rng_state()
    low_rank(problem, fisher="mc", mc_samples=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.montecarlo
@pytest.mark.parametrize("name", ["mlp", "mlp_mse", "mlp_bce", "char_gpt"])
def test_samples_average_to_the_exact_matrix(name: str):
    problem, generator = CASES[name](), seeded()
    exts = [LowRankGGN("mc", mc_samples=25, generator=generator) for _ in range(60)]
    found = []
    for ext in exts:
        run(problem, ext)
        found.append(ext.block.to_dense())
    exact = of_group(reference(name), problem.model, exts[0]).matrix()
    check_mean(torch.stack(found), exact)


@every_reduction
@every_case
def test_empirical(name: str, reduction: str):
    problem = CASES[name](reduction=reduction)
    ggn = low_rank(problem, fisher="empirical")
    here = of_group(reference(name, reduction), problem.model, ggn)
    V = here.gradient_columns()
    close(ggn.block.to_dense(), outer(V))
    close(ggn.block.gram(), V[0] @ V[0].T)
    assert len(ggn.eigvalsh()) <= problem.batch_size
    pairs = ggn.eigh(2)
    E = rows(pairs.vectors.explicit())
    close(pairs.directional_gradients(), here.gradients(E), 1e-9)
    close(pairs.directional_curvatures(), here.N * (V @ E.T).square().sum(0), 1e-9)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc"])
@every_reduction
@pytest.mark.parametrize("name", ["mlp", "mlp_mse", "mlp_bce", "cnn", "char_gpt", "vit_params"])
def test_centered(name: str, reduction: str, fisher: str):
    """Columns minus their mean over the data."""
    plain, problem = CASES[name](reduction=reduction), CASES[name](reduction=reduction)
    ggn = low_rank(problem, fisher=fisher, center=True, mc_samples=2, generator=seeded())
    here = of_group(reference(name, reduction), problem.model, ggn)
    if fisher == "empirical":
        V = here.gradient_columns()
    else:
        V = here.columns(root(plain, here.H) if fisher == "exact" else samples_of(plain, seeded(), 2))
    V = centered(V)
    M = outer(V)
    close(ggn.block.to_dense(), M)
    close(row(ggn.block.diagonal()), M.diagonal())
    close(ggn.block.trace(), M.trace())
    same_values(ggn.eigvalsh(), descending(M)[0])
    pairs = ggn.eigh(2)
    E = rows(pairs.vectors.explicit())
    close(E @ E.T, torch.eye(2).to(E))
    close(pairs.directional_gradients(), here.gradients(E), 1e-9)
    close(pairs.directional_curvatures(), here.N * (V @ E.T).square().sum(0), 1e-9)


def test_gradient_covariance():
    """Centred gradients of a mean loss, one term per datum."""
    problem = CASES["mlp"]()
    ggn = low_rank(problem, fisher="empirical", center=True)
    slopes = of_group(reference("mlp"), problem.model, ggn).slopes
    close(ggn.block.to_dense(), torch.cov(slopes.T, correction=0))


@pytest.mark.parametrize("subset", [[0, 2], [1], [0, 1, 2], torch.tensor([1, 2])])
@every_reduction
@pytest.mark.parametrize("name", ["mlp", "cnn", "unet", "char_gpt", "vit_params", "functional"])
def test_subset(name: str, reduction: str, subset: Sequence[int] | Tensor):
    """The columns of some data, scaled; slopes stay those of all."""
    problem = CASES[name](reduction=reduction)
    ggn = low_rank(problem, subsample=subset)
    subset = list(map(int, subset))
    here = of_group(reference(name, reduction), problem.model, ggn)
    M = here.matrix(subset)
    close(ggn.block.to_dense(), M)
    same_values(ggn.eigvalsh(), descending(M)[0])
    pairs = ggn.eigh(criterion=above(1e-6))
    E = rows(pairs.vectors.explicit())
    gamma, lam = here.gradients(E), here.curvatures(E, subset)
    close(pairs.directional_gradients(), gamma, 1e-9)
    close(pairs.directional_curvatures(), lam, 1e-9)
    close(lam.mean(0), pairs.values)
    (parameters,) = ggn.parameters.values()
    step = joined(ggn.newton_step(0.2, criterion=above(1e-6)), parameters)
    close(step, newton_step(gamma, lam, 0.2, E), 1e-8)


def test_order_of_a_subset():
    """Rows of curvatures follow the indices; the matrix does not care."""
    one, other = (low_rank(CASES["mlp"](), subsample=index) for index in ([4, 0], [0, 4]))
    close(one.block.to_dense(), other.block.to_dense())
    close(one.directional_curvatures(2), other.directional_curvatures(2).flip(0))
    last = low_rank(CASES["mlp"](), subsample=[-3, 0])
    close(last.block.to_dense(), one.block.to_dense())


def test_subset_of_gradients():
    problem = CASES["mlp"]()
    ggn = low_rank(problem, fisher="empirical", subsample=[1, 4, 5])
    here = of_group(reference("mlp"), problem.model, ggn)
    V = (7 / 3) ** 0.5 * here.gradient_columns()[:, [1, 4, 5]]
    close(ggn.block.to_dense(), outer(V))


def test_subset_of_samples():
    """The same state of the generator gives the same matrix, of the chosen data only."""
    problem = CASES["mlp"]()
    ggn = low_rank(problem, fisher="mc", mc_samples=2, subsample=[0, 3], generator=seeded())
    again = low_rank(problem, fisher="mc", mc_samples=2, subsample=[0, 3], generator=seeded())
    assert torch.equal(ggn.block.to_dense(), again.block.to_dense())
    assert len(ggn.eigvalsh()) <= 4
    assert ggn.directional_curvatures(1).shape == (2, 1)
    assert ggn.directional_gradients(1).shape == (7, 1)


@pytest.mark.montecarlo
def test_subset_of_samples_is_unbiased():
    problem, generator = CASES["mlp"](), seeded()
    exts = [LowRankGGN("mc", mc_samples=25, subsample=[0, 3], generator=generator) for _ in range(60)]
    found = []
    for ext in exts:
        run(problem, ext)
        found.append(ext.block.to_dense())
    exact = of_group(reference("mlp"), problem.model, exts[0]).matrix([0, 3])
    check_mean(torch.stack(found), exact)


def test_without_slopes():
    problem = CASES["mlp"]()
    ggn = low_rank(problem, gradients=False)
    check_block(ggn, problem, reference("mlp"))
    assert ggn.directional_curvatures(2).shape == (7, 2)
    with pytest.raises((ValueError, RuntimeError), match=r"gradients=True|slopes"):
        ggn.directional_gradients(2)
    with pytest.raises((ValueError, RuntimeError), match=r"gradients=True|slopes"):
        ggn.newton_step(0.1)


# -- numerics --------------------------------------------------------------------------------------


def test_duplicated_data():
    problem = CASES["cnn"]()
    index = [0, 0, 1, 0, 1]
    problem.inputs, problem.target = (problem.inputs[0][index],), problem.target[index]
    found = dense(problem)
    ggn = low_rank(problem)
    here = of_group(found, problem.model, ggn)
    M = here.matrix()
    assert len(ggn.eigvalsh()) == torch.linalg.matrix_rank(M, rtol=1e-12, hermitian=True) == 2 * 4
    same_values(ggn.eigvalsh(), descending(M)[0])
    pairs = ggn.eigh()
    E = rows(pairs.vectors.explicit())
    close(E @ E.T, torch.eye(8).to(E))
    same_spaces(E, pairs.values, M)
    close(pairs.directional_curvatures(), here.curvatures(E))


def test_more_columns_than_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))
    problem = classification(model, torch.randn(40, 2), 4)
    found = dense(problem)
    ggn = low_rank(problem)
    here = of_group(found, problem.model, ggn)
    M = here.matrix()
    assert len(M) == 25 < 160
    check_block(ggn, problem, found)
    same_values(ggn.eigvalsh(), descending(M)[0])
    pairs = ggn.eigh()
    assert len(pairs.values) == torch.linalg.matrix_rank(M, rtol=1e-12, hermitian=True) <= 25
    E = rows(pairs.vectors.explicit())
    close(E @ E.T, torch.eye(len(E)).to(E), 1e-9)
    close(pairs.directional_gradients(), here.gradients(E), 1e-9)
    close(pairs.directional_curvatures(), here.curvatures(E), 1e-9)


@pytest.mark.parametrize("gap", [0.0, 1e-13, 1e-9, 1e-5])
def test_nearly_degenerate_spectrum(gap: float):
    """Least squares: `2 r I (x) X^T X`, where X has singular values 1, 1 + gap, 1, 0.1."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 4).double())[0] for n in (6, 4))
    x = left @ torch.tensor([1, 1 + gap, 1, 0.1], dtype=torch.float64).diag() @ right
    model = nn.Linear(4, 3, bias=False).double()
    problem = Problem(model, (x,), nn.MSELoss(reduction="sum"), torch.randn(6, 3).double())
    found = dense(problem)
    ggn = low_rank(problem)
    pairs = ggn.eigh()
    E = rows(pairs.vectors.explicit())
    close(pairs.values, torch.tensor([2.0] * 9 + [0.02] * 3, dtype=torch.float64), 3 * gap + 1e-12)
    close(E @ E.T, torch.eye(12).to(E), 1e-12)
    same_spaces(E, pairs.values, found.matrix())
    close(pairs.directional_curvatures(), found.curvatures(E))
    close(pairs.directional_gradients(), found.gradients(E))


def test_zero():
    """Without an input there is no curvature: no eigenvalues, no step."""
    model = nn.Linear(3, 2, bias=False).double()
    problem = Problem(model, (torch.zeros(4, 3).double(),), nn.MSELoss(), torch.ones(4, 2).double())
    ggn = low_rank(problem)
    assert ggn.eigvalsh().shape == (0,)
    assert ggn.eigh().values.shape == (0,) and ggn.trace() == 0
    assert not ggn.block.to_dense().any()
    assert not ggn.newton_step(1.0)[model.weight].any()
    assert ggn.directional_gradients(5).shape == (4, 0)
    assert ggn.eigenvectors().explicit()[0].shape == (0, 2, 3)
    torch.testing.assert_close(ggn.logdet(2.0), torch.tensor(6 * math.log(2.0)).double())


@few_cases
def test_single_precision(name: str):
    """Eigenvalues below 1e-6 of the largest are cut; the rest has orthonormal eigenvectors."""
    problem = CASES[name](dtype=torch.float32)
    found = dense(copy.deepcopy(problem).to(torch.float64))
    ggn = low_rank(problem)
    here = of_group(found, problem.model, ggn)
    M = here.matrix()
    expected, _ = descending(M)
    values = ggn.eigvalsh()
    assert (values > 1e-6 * values[0]).all()
    same_values(values.double(), expected, 1e-6, 1e-5)
    pairs = ggn.eigh()
    E = rows(pairs.vectors.explicit())
    assert E.dtype == torch.float32
    close((E @ E.T).double(), torch.eye(len(E)).double(), 1e-3)
    top = ggn.eigh(criterion=above(1e-3))
    E = rows(top.vectors.explicit()).double()
    close(E @ E.T, torch.eye(len(E)).double(), 1e-4)
    close(ggn.block.to_dense().double(), M, 1e-5)
    close(top.directional_gradients().double(), here.gradients(E), 1e-4)
    close(top.directional_curvatures().double(), here.curvatures(E), 1e-4)


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-8])
def test_own_cut(rtol: float):
    problem = CASES["mlp"]()
    ggn = low_rank(problem, rtol=rtol)
    expected, _ = spectrum("mlp")
    assert len(ggn.eigvalsh()) == (expected > rtol * expected[0]).sum()
    close(ggn.eigvalsh(), expected[: len(ggn.eigvalsh())])
    assert len(ggn.eigh().values) == len(ggn.eigvalsh())


def test_half_precision():
    """bfloat16: entries within 3 % of the largest one, the trace within 2 %."""
    for name in ("mlp", "cnn", "char_gpt"):
        problem = CASES[name](dtype=torch.bfloat16)
        found = dense(copy.deepcopy(problem).to(torch.float64))
        ggn = low_rank(problem)
        here = of_group(found, problem.model, ggn)
        M = here.matrix()
        close(ggn.block.to_dense().double(), M, 3e-2)
        close(ggn.trace().double(), M.trace(), 2e-2)
        values = ggn.eigvalsh().double()
        close(values, descending(M)[0][: len(values)], 2e-2)
        pairs = ggn.eigh(3)
        E = rows(pairs.vectors.explicit()).double()
        close(E @ E.T, torch.eye(3).double(), 5e-2)


def test_what_is_not_finite():
    problem = CASES["mlp"]()
    problem.inputs[0][0, 0] = math.nan
    ggn = low_rank(problem)
    with pytest.raises(ValueError, match="finite"):
        ggn.eigvalsh()


# -- memory ----------------------------------------------------------------------------------------


recomputes = pytest.mark.filterwarnings("ignore:.*closure:UserWarning")


def limited(problem: Problem, **options) -> LowRankGGN:
    """With next to no memory, and a closure."""
    return low_rank(problem, max_memory=1, closure=problem.loss, **options)


def same_blocks(one: LowRankGGN, other: LowRankGGN) -> None:
    """All quantities of two extensions on one model."""
    assert list(one.blocks) == list(other.blocks)
    for group, block in other.blocks.items():
        close(one.blocks[group].to_dense(), block.to_dense())
        close(one.blocks[group].gram(), block.gram())
        close(one.blocks[group].eigvalsh(), block.eigvalsh())
        close(row(one.blocks[group].diagonal()), row(block.diagonal()))
        pairs, expected = (b.eigh(criterion=above(1e-6)) for b in (one.blocks[group], block))
        E = rows(expected.vectors.explicit())
        found = rows(pairs.vectors.explicit())
        close(found @ found.T, torch.eye(len(E)).to(E), 1e-8)
        lam, other_lam = pairs.directional_curvatures(), expected.directional_curvatures()
        close(lam.mean(0), other_lam.mean(0))
        step, other_step = row(pairs.newton_step(0.1)), row(expected.newton_step(0.1))
        close(step, other_step, 1e-7)


@recomputes
@every_reduction
@every_case
def test_closure(name: str, reduction: str):
    """Nothing is kept; products are passes through the network."""
    problem, expected = CASES[name](reduction=reduction), CASES[name](reduction=reduction)
    same_blocks(limited(problem), low_rank(expected))


@recomputes
@pytest.mark.parametrize(
    "options",
    [
        {"fisher": "mc", "mc_samples": 2},
        {"fisher": "empirical"},
        {"center": True},
        {"subsample": [0, 2]},
        {"param_groups": "layers"},
        {"fisher": "mc", "mc_samples": 3, "subsample": [1, 2], "param_groups": "parameters"},
    ],
)
@pytest.mark.parametrize("name", ["mlp", "cnn", "char_gpt"])
def test_closure_with_options(name: str, options: dict):
    problem, expected = CASES[name](), CASES[name]()
    one = limited(problem, generator=seeded(), **options)
    same_blocks(one, low_rank(expected, generator=seeded(), **options))


@recomputes
@pytest.mark.parametrize("max_memory", [1000, 3000, 6000, 10000])
def test_closure_in_larger_parts(max_memory: int):
    problem = CASES["mlp"]()
    ggn = low_rank(problem, max_memory=max_memory, closure=problem.loss)
    same_blocks(ggn, low_rank(CASES["mlp"]()))


def test_closure_says_so():
    problem = small()
    with pytest.warns(UserWarning, match="closure"):
        limited(problem).eigvalsh()


@recomputes
def test_closure_that_draws_anew():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    problem = classification(model, torch.randn(6, 4))
    with pytest.raises((RecordingError, ValueError), match="closure"):
        limited(problem).eigvalsh()


@recomputes
def test_closure_leaves_gradients_alone():
    problem = CASES["cnn"]()
    ggn = limited(problem)
    before = [p.grad.clone() for p in problem.model.parameters()]
    ggn.eigenvectors(2).explicit()
    ggn.block.to_dense()
    for p, g in zip(problem.model.parameters(), before, strict=True):
        assert torch.equal(p.grad, g)


def test_memory_without_closure():
    problem = CASES["cnn"]()
    extend(problem.model), extend(problem.loss_fn)
    ggn = LowRankGGN(max_memory=1)
    with pytest.raises(Exception, match="closure"):
        with backpack(ggn):
            problem.loss().backward()
        ggn.eigvalsh()
        ggn.eigenvectors(1).explicit()


@recomputes
@pytest.mark.parametrize("how", ["data", "parameters"])
def test_closure_of_another_loss(how: str):
    problem = CASES["cnn"]()
    moved = copy.deepcopy(problem)
    moved.inputs = (moved.inputs[0] + 1,)

    def closure() -> Tensor:
        if how == "data":
            return problem.loss_fn(problem.model(*moved.inputs), problem.target)
        return problem.loss()

    with pytest.raises((ValueError, RuntimeError), match="closure"):
        ggn = low_rank(problem, max_memory=1, closure=closure)
        if how == "parameters":
            with torch.no_grad():
                problem.model[0].weight.mul_(2)
        ggn.eigvalsh()
        ggn.eigenvectors(1).explicit()


# -- wrong use -------------------------------------------------------------------------------------


TWICE = r"two groups|several groups|more than one|twice|overlap"


def small() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return Problem(model, (torch.randn(6, 4),), nn.CrossEntropyLoss(), torch.randint(3, (6,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "x"}, r"fisher='x'"),
        ({"fisher": "forward"}, r"fisher='forward'"),
        ({"fisher": "mc", "mc_samples": 0}, "mc_samples=0"),
        ({"mc_samples": 1.5, "fisher": "mc"}, "mc_samples=1.5"),
        ({"subsample": []}, "subsample"),
        ({"subsample": [0, 6]}, "subsample"),
        ({"subsample": [-7]}, "subsample"),
        ({"param_groups": "modules"}, "param_groups"),
        ({"param_groups": []}, "param_groups|group"),
        ({"param_groups": [[]]}, "group"),
        ({"param_groups": [{"name": "a"}]}, "params"),
        ({"unsupported": "ignore"}, "unsupported"),
        ({"savefield": "grad"}, "would hide an attribute"),
        ({"rtol": -1.0}, "rtol"),
        ({"max_memory": -1}, "max_memory"),
        ({"closure": 3}, "closure"),
        ({"max_columns": 1}, "max_columns"),
        ({"dtype": torch.int64}, "dtype"),
    ],
)
def test_wrong_options(options: dict, message: str):
    with pytest.raises((ValueError, TypeError, IndexError, KeyError, UnsupportedError), match=message):
        low_rank(small(), **options)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            lambda m: [[m[0].weight], [nn.Parameter(torch.zeros(2))]],
            r"no parameter of|not.*model|foreign",
        ),
        (lambda m: [[m[0].weight, m[2].weight.requires_grad_(False)]], "frozen|requires_grad|trainable"),
        (
            lambda m: [[m[0].weight], [m[0].bias, m[0].weight]],
            TWICE,
        ),
        (lambda m: [[m[0].weight, m[0].weight]], TWICE),
        (lambda m: [m[0].weight.data], "group|Parameter"),
        (
            lambda m: [{"params": [m[0].weight], "name": "a"}, {"params": [m[0].bias], "name": "a"}],
            "name",
        ),
    ],
)
def test_wrong_groups(groups: Callable[[nn.Module], list], message: str):
    problem = small()
    with pytest.raises((ValueError, TypeError, UnsupportedError, RecordingError), match=message):
        low_rank(problem, param_groups=groups(problem.model))


@pytest.mark.parametrize(
    "ask",
    [
        lambda g: g.eigvalsh(),
        lambda g: g.eigh(2),
        lambda g: g.block,
        lambda g: g.newton_step(0.1),
        lambda g: g.trace(),
        lambda g: g.matvec({}),
        lambda g: g.logdet(1.0),
        lambda g: g.directional_gradients(),
    ],
)
def test_before_any_backward(ask: Callable[[LowRankGGN], object]):
    with pytest.raises((RuntimeError, ValueError), match="backward"):
        ask(LowRankGGN())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0|k must|positive"),
        ({"k": -1}, "k=-1|k must|positive"),
        ({"k": 1.5}, "k=1.5|k must|positive"),
        ({"k": 2, "criterion": lambda v: v > 0}, "criterion"),
        ({"criterion": lambda v: v.new_ones(len(v) + 1, dtype=torch.bool)}, "criterion"),
        ({"criterion": lambda v: torch.tensor([10**6])}, "criterion"),
    ],
)
def test_wrong_choice_of_eigenvalues(arguments: dict, message: str):
    ggn = low_rank(small())
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        ggn.eigh(**arguments)
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        ggn.newton_step(0.1, **arguments)


@pytest.mark.parametrize("damping", [-1.0, math.nan, torch.ones(2), lambda g, l: torch.ones(3)])
def test_wrong_damping(damping: float | Tensor | Callable):
    ggn = low_rank(small())
    with pytest.raises(ValueError, match="damping"):
        ggn.newton_step(damping, k=5)


def test_training_mode_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
    problem = Problem(model, (torch.randn(6, 4),), nn.CrossEntropyLoss(), torch.randint(3, (6,)))
    for options in ({}, {"fisher": "mc"}, {"fisher": "empirical"}):
        with pytest.raises(UnsupportedError, match=r"couples the data.*eval\(\)"):
            low_rank(problem, **options)
    model.eval()
    assert len(low_rank(problem).eigvalsh()) > 0


def test_loss_not_extended():
    problem = small()
    for ext in (LowRankGGN(), LowRankGGN("mc"), LowRankGGN("empirical")):
        with pytest.raises(RecordingError, match="Extend the loss module"), backpack(ext):
            extend(problem.model)
            problem.loss().backward()
    assert len(low_rank(problem).eigvalsh()) > 0


def test_model_not_extended():
    """As with other extensions: nothing was recorded, nothing is found."""
    problem = small()
    extend(problem.loss_fn)
    ggn = LowRankGGN()
    with pytest.raises((RecordingError, RuntimeError, UnsupportedError), match=r"extend|backward"):
        with backpack(ggn):
            problem.loss().backward()
        ggn.eigvalsh()


def test_empirical_losses_of_different_scale():
    problem = small()
    extend(problem.model), extend(problem.loss_fn)
    with pytest.raises(UnsupportedError, match="scale"), backpack(LowRankGGN("empirical")):
        (problem.loss() + 2 * problem.loss()).backward()


def test_two_of_one_savefield():
    with pytest.raises(ValueError, match="savefield"):
        backpack(LowRankGGN(), LowRankGGN("mc"))


# -- several passes --------------------------------------------------------------------------------


def batches(problem: Problem, cuts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The data of a problem in pieces."""
    (x,), y = problem.inputs, problem.target
    y = y.view(len(x), -1) if len(y) != len(x) else y
    return list(zip(x.split(list(cuts)), y.split(list(cuts)), strict=True))


def test_blocks_add_up():
    """Of a sum loss over two mini-batches."""
    for name in ("mlp", "cnn", "vit_params"):
        problem = CASES[name](reduction="sum")
        N = problem.batch_size
        found = []
        for x, y in batches(problem, (1, N - 1)):
            part = Problem(problem.model, (x,), problem.loss_fn, y)
            found.append(low_rank(part))
        both = found[0].block + found[1].block
        here = of_group(reference(name, "sum"), problem.model, found[0])
        M = here.matrix()
        close(both.to_dense(), M)
        same_values(both.eigvalsh(), descending(M)[0])
        pairs = both.eigh(criterion=above(1e-6))
        E = rows(pairs.vectors.explicit())
        close(E @ E.T, torch.eye(len(E)).to(E), 1e-9)
        close(pairs.directional_curvatures(), here.curvatures(E), 1e-9)
        close(pairs.directional_gradients(), here.gradients(E), 1e-9)
        close(
            row(pairs.newton_step(0.1)), newton_step(here.gradients(E), here.curvatures(E), 0.1, E), 1e-7
        )


def forward_rows(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    z = model(batch[0])
    return loss_fn(z.flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("groups", [None, "layers"])
@pytest.mark.parametrize("cuts", ["equal", "unequal"])
@every_reduction
@pytest.mark.parametrize("name", ["mlp", "mlp_mse", "cnn", "unet", "vit_params", "char_gpt"])
def test_collect(name: str, reduction: str, cuts: str, groups: str | None):
    """Over a loader, as if all data had been one batch."""
    problem = CASES[name](reduction=reduction)
    N = problem.batch_size
    loader = batches(problem, [1] * N if cuts == "equal" else (1, N - 1))
    ggn, expected = LowRankGGN(param_groups=groups), low_rank(CASES[name](reduction=reduction))
    options = {"forward": forward_rows} if name == "char_gpt" else {}
    results = collect(problem.model, problem.loss_fn, loader, ggn, progress=False, **options)
    found = results["low_rank_ggn"]
    named = dict(problem.model.named_parameters())
    assert found.keys() == named.keys()
    assert not any(hasattr(p, "low_rank_ggn") or p.grad is not None for p in named.values())
    if groups is None:
        (block,) = {id(b): b for b in found.values()}.values()
        close(block.to_dense(), expected.block.to_dense())
        same_values(block.eigvalsh(), spectrum(name, reduction)[0])
        pairs = block.eigh(criterion=above(1e-6))
        E = rows(pairs.vectors.explicit())
        order = [k for k, p in named.items() if p.requires_grad]
        shapes = {k: p.shape for k, p in named.items()}
        there = reference(name, reduction).of(order, shapes)
        if block.shapes == tuple(named[k].shape for k in order):
            close(pairs.directional_curvatures(), there.curvatures(E), 1e-8)
            close(pairs.directional_gradients(), there.gradients(E), 1e-8)
    else:
        for parameter, block in found.items():
            assert block.shapes and named[parameter].shape in block.shapes
        total = sum(b.trace() for b in {id(b): b for b in found.values()}.values())
        close(total, reference(name, reduction).matrix().trace())


@every_reduction
def test_collect_gradients(reduction: str):
    problem = CASES["mlp"](reduction=reduction)
    expected = low_rank(CASES["mlp"](reduction=reduction), fisher="empirical")
    ggn, loader = LowRankGGN("empirical"), batches(problem, (2, 5))
    found = collect(problem.model, problem.loss_fn, loader, ggn, progress=False)
    block = found["low_rank_ggn"]["0.weight"]
    close(block.to_dense(), expected.block.to_dense())


@pytest.mark.parametrize("options", [{"subsample": [0]}, {"center": True}])
def test_collect_refuses_what_belongs_to_one_batch(options: dict):
    problem = CASES["mlp"]()
    loader = batches(problem, (2, 5))
    with pytest.raises((ValueError, UnsupportedError), match=r"one batch|data set"):
        collect(problem.model, problem.loss_fn, loader, LowRankGGN(**options), progress=False)


def test_passes_replace_results():
    problem = CASES["mlp"]()
    ggn = low_rank(problem)
    first = ggn.block
    before = first.to_dense()
    with torch.no_grad():
        problem.model[0].weight.mul_(1.5)
    run(problem, ggn)
    assert ggn.block is not first and problem.model[0].weight.low_rank_ggn is ggn.block
    close(first.to_dense(), before)
    close(ggn.block.to_dense(), of_group(dense(copy.deepcopy(problem)), problem.model, ggn).matrix())


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit_params"])
def test_results_do_not_follow_parameters(name: str):
    problem = CASES[name]()
    ggn = low_rank(problem)
    with torch.no_grad():
        for p in problem.model.parameters():
            p.mul_(2)
    here = of_group(reference(name), problem.model, ggn)
    close(ggn.block.to_dense(), here.matrix())
    close(ggn.directional_gradients(1).abs(), here.gradients(rows(ggn.eigenvectors(1).explicit())).abs())


class Queries(nn.Module):
    """A layer on a parameter: its input is what an optimizer overwrites."""

    def __init__(self):
        super().__init__()
        self.query, self.mix = nn.Parameter(torch.randn(1, 2, 4)), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.mix(self.query.expand(len(x), -1, -1))
        return self.head((q @ x.mT).softmax(-1).matmul(x).tanh().mean(1))


@pytest.mark.parametrize("what", ["inputs", "parameters"])
def test_results_do_not_follow_what_is_overwritten(what: str):
    """A buffer of inputs that is filled anew, a parameter that a layer reads: right, or an error."""
    torch.manual_seed(0)
    problem = classification(Queries(), torch.randn(3, 5, 4)) if what == "parameters" else CASES["mlp"]()
    found = dense(copy.deepcopy(problem))
    ggn = low_rank(problem)
    here = of_group(found, problem.model, ggn)
    with torch.no_grad():
        for t in problem.model.parameters() if what == "parameters" else problem.inputs:
            t.mul_(3)
    try:
        M = ggn.block.to_dense()
    except RuntimeError as error:
        assert "modified" in str(error)
    else:
        close(M, here.matrix())


@pytest.mark.parametrize("name", ["tokens", "attention"])
def test_some_gradients_only(name: str):
    """`backward(inputs=...)` brings no other gradients, but the whole matrix."""
    problem = of_bare(name)
    found, ggn = dense(of_bare(name)), LowRankGGN()
    extend(problem.model), extend(problem.loss_fn)
    with backpack(ggn):
        problem.loss().backward(inputs=[problem.model.head.weight])
    check_block(ggn, problem, found)
    for ask in (ggn.directional_gradients, ggn.newton_step):
        with pytest.raises(RecordingError, match="inputs="):
            ask(k=2)
    assert problem.model.head.bias.grad is None


def test_retained_graph():
    problem = CASES["mlp"]()
    extend(problem.model), extend(problem.loss_fn)
    loss, found = problem.loss(), []
    for retain in (True, False):
        ggn = LowRankGGN()
        with backpack(ggn):
            loss.backward(retain_graph=retain)
        found.append(ggn.block.to_dense())
    close(found[0], found[1])


@few_cases
def test_beside_other_extensions(name: str):
    problem = CASES[name]()
    ggn, empirical = LowRankGGN(), LowRankGGN("empirical", savefield="fisher")
    kfac = KFAC("reduce", "exact", unsupported="skip")
    run(problem, kfac, ggn, BatchGrad(), empirical, DiagGGN())
    check_block(ggn, problem, reference(name))
    G, diagonal = per_sample_grads(CASES[name]()), ggn_diag(CASES[name]())
    for key, p in problem.model.named_parameters():
        close(p.grad_batch, G[key])
        close(p.diag_ggn_exact, diagonal[key])
        assert p.fisher is empirical.block
    close(
        empirical.block.to_dense(),
        outer(of_group(reference(name), problem.model, empirical).gradient_columns()),
    )


def test_beside_backpacks_own_extensions():
    problem = CASES["mlp"]()
    ggn = LowRankGGN()
    theirs_extend(problem.model), theirs_extend(problem.loss_fn)
    run(problem, theirs.DiagGGNExact(), ggn, theirs.Variance())
    check_block(ggn, problem, reference("mlp"))
    (parameters,) = ggn.parameters.values()
    close(row(ggn.block.diagonal()), row([p.diag_ggn_exact for p in parameters]))
    assert all(hasattr(p, "variance") for p in parameters)


# -- what stays alive ------------------------------------------------------------------------------


class Probe:
    """Something that can be referred to weakly."""


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch):
    """Weak references to all Sites made in a test; the collector sleeps."""
    made: list[weakref.ref] = []
    original = site_module.Site.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(site_module.Site, "__init__", spy)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


@pytest.mark.parametrize(
    "options", [{}, {"fisher": "mc"}, {"fisher": "empirical"}, {"param_groups": "layers"}]
)
@pytest.mark.parametrize("name", ["mlp", "cnn", "vit_params", "char_gpt"])
def test_nothing_of_the_tape_is_alive(sites: list, name: str, options: dict):
    problem, ggn = CASES[name](), LowRankGGN(**options)
    extend(problem.model), extend(problem.loss_fn)
    with backpack(ggn):
        loss = problem.loss()
        seen = weakref.ref(loss.grad_fn.metadata.setdefault("probe", Probe()))
        loss.backward()
    del loss
    assert seen() is None
    if name == "vit_params":  # roles of bare parameters hang in a cycle, whatever the extension
        gc.collect()
    assert sites and not any(ref() is not None for ref in sites)
    for block in ggn.blocks.values():
        block.to_dense(), block.eigvalsh()
        assert not any(t.requires_grad for t in block.factors.values())


def test_nothing_is_alive_after_an_error(sites: list):
    problem, ggn = small(), LowRankGGN(subsample=[99])
    extend(problem.model), extend(problem.loss_fn)
    with pytest.raises((ValueError, IndexError)), backpack(ggn):
        problem.loss().backward()
    assert not any(ref() is not None for ref in sites)
    assert len(low_rank(problem).eigvalsh()) > 0


def test_results_die_with_the_model():
    problem = small()
    ggn = low_rank(problem)
    probe = weakref.ref(problem.model[0].weight)
    del problem, ggn
    gc.collect()
    assert probe() is None


# -- models of transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_transformers(name: str):
    from test_huggingface import build  # skips without transformers

    problem, plain = build(name), build(name)
    found = dense(plain)
    ggn = low_rank(problem)
    here = of_group(found, problem.model, ggn)
    V = here.columns(root(plain, here.H)).flatten(0, 1)
    close(ggn.block.gram(), V @ V.T)
    values = torch.linalg.eigvalsh(V @ V.T).flip(0)
    same_values(ggn.eigvalsh(), values)
    pairs = ggn.eigh(criterion=above(1e-6))
    E = rows(pairs.vectors.explicit())
    close(E @ E.T, torch.eye(len(E)).to(E), 1e-9)
    close((E @ V.T) @ V, pairs.values[:, None] * E, 1e-8)
    close(pairs.directional_gradients(), here.gradients(E), 1e-8)
    close(pairs.directional_curvatures(), here.curvatures(E), 1e-8)
