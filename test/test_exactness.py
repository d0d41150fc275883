"""Where Kronecker factors are exact, and where they are not: the block against the dense GGN.

Sum-reduced squared error, joint weight and bias, exact Fisher, float64. "Exact" is a relative error
in the Frobenius norm of at most 1e-12; everything else must be clearly inexact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from models import CASES, Problem
from oracle import LAYERS, ggn_block, ggn_blocks, kronecker_block
from torch import Tensor, nn

from backpack_ext import KFAC, backpack, extend

EXACT = (0.0, 1e-12)
APPROX = ("expand", "reduce")


class Pool(nn.Module):
    """Mean, or sum, over axes."""

    def __init__(self, *axes: int, total: bool = False):
        super().__init__()
        self.axes, self.total = axes, total

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.axes) if self.total else x.mean(self.axes)


def regression(*modules: nn.Module, x: tuple[int, ...]) -> Problem:
    """Layers on uniform inputs, with normal targets of the output's shape."""
    model, inputs = nn.Sequential(*modules), torch.rand(x)
    return Problem(model, (inputs,), nn.MSELoss(reduction="sum"), torch.randn_like(model(inputs)))


def tokens(*after: nn.Module) -> Problem:
    return regression(nn.Linear(4, 3), nn.Linear(3, 2), *after, x=(6, 5, 4))


def pooled_between() -> Problem:
    return regression(nn.Linear(4, 3), Pool(1), nn.Linear(3, 2), x=(6, 5, 4))


def convs(*after: nn.Module, **padding) -> Problem:
    first, last = nn.Conv2d(2, 3, 3, padding=1, **padding), nn.Conv2d(3, 2, 3, padding=1, **padding)
    return regression(first, last, *after, x=(4, 2, 5, 4))


def conv(*after: nn.Module) -> Problem:
    return regression(nn.Conv2d(2, 3, 3, padding=1), *after, x=(4, 2, 5, 4))


def patch_embedding() -> Problem:
    return regression(nn.Conv2d(2, 3, 3, stride=3), nn.Conv2d(3, 4, 1), Pool(2, 3), x=(4, 2, 9, 6))


def tanh_mlp(data: int) -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    return Problem(model, (torch.rand(data, 4),), loss_fn, torch.randint(3, (data,)))


mean_pixels, mean_tokens, sum_tokens = Pool(2, 3), Pool(1), Pool(1, total=True)


@dataclass
class Row:
    """Layers of a network, by path, and the error to expect of them: (lowest, highest)."""

    build: Callable[[], Problem]
    paths: str
    expand: tuple[float, float]
    reduce: tuple[float, float]


ROWS = {
    "linear, per token": Row(tokens, "0 1", EXACT, (0.01, 0.2)),
    "linear, token mean": Row(partial(tokens, mean_tokens), "0 1", (0.7, 0.9), EXACT),
    "linear, token sum": Row(partial(tokens, sum_tokens), "0 1", (0.7, 0.9), EXACT),
    "before the pool": Row(pooled_between, "0", (0.7, 0.9), EXACT),
    "after the pool": Row(pooled_between, "2", EXACT, EXACT),
    "conv, pixel mean": Row(partial(conv, mean_pixels), "0", (0.5, 1), EXACT),
    "two circular convs, pixel mean": Row(
        partial(convs, mean_pixels, padding_mode="circular"), "0 1", (0.5, 1), EXACT
    ),
    "two convs, pixel mean, first": Row(partial(convs, mean_pixels), "0", (0.5, 1), (0.02, 0.3)),
    "two convs, pixel mean, last": Row(partial(convs, mean_pixels), "1", (0.5, 1), EXACT),
    "patch embedding, pixel mean": Row(patch_embedding, "0 1", (0.5, 1), EXACT),
    "conv, per pixel": Row(conv, "0", EXACT, (0.01, 1)),
    "two convs, per pixel, first": Row(convs, "0", (0.5, 1), (0.1, 1)),
    "two convs, per pixel, last": Row(convs, "1", EXACT, (0.05, 1)),
    "tanh MLP, one datum": Row(partial(tanh_mlp, 1), "0 2 4", EXACT, EXACT),
    "tanh MLP, seven data": Row(partial(tanh_mlp, 7), "0 2 4", (1e-3, 0.3), (1e-3, 0.3)),
}


def error(problem: Problem, path: str, approx: str) -> float:
    """Relative distance between a layer's Kronecker product and its dense block."""
    exact = ggn_block(problem, [f"{path}.weight", f"{path}.bias"])
    module = problem.model.get_submodule(path)
    with backpack(KFAC(approx, "exact", bias="joint")):
        problem.loss().backward()
    return ((kronecker_block(module, *module.weight.kfac) - exact).norm() / exact.norm()).item()


def build(row: Row, reduction: str) -> Problem:
    torch.manual_seed(0)
    problem = row.build()
    problem.loss_fn.reduction = reduction
    problem.to(torch.float64)
    extend(problem.model), extend(problem.loss_fn)
    return problem


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("approx", APPROX)
@pytest.mark.parametrize("name", ROWS)
def test_error_of_the_block(name: str, approx: str, reduction: str):
    row = ROWS[name]
    problem = build(row, reduction)
    low, high = getattr(row, approx)
    for path in row.paths.split():
        assert low <= error(problem, path, approx) <= high


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", CASES)
def test_separate_bias_block_of_reduce_is_exact(name: str, reduction: str):
    """For any network and any loss; over groups it is the block-diagonal part."""
    exact = ggn_blocks(CASES[name](reduction=reduction))
    problem = CASES[name](reduction=reduction)
    extend(problem.model), extend(problem.loss_fn)
    inexact = 0
    with backpack(
        KFAC("reduce", "exact", savefield="kfac_reduce", unsupported="skip"),
        KFAC("expand", "exact", savefield="kfac_expand", unsupported="skip"),
    ):
        problem.loss().backward()
    for path, module in problem.model.named_modules():
        if not isinstance(module, LAYERS) or getattr(module, "bias", None) is None:
            continue
        block = exact[f"{path}.bias"]
        group = torch.arange(len(block)) // (len(block) // getattr(module, "groups", 1))
        block = block * (group[:, None] == group)
        assert (module.bias.kfac_reduce.to_dense() - block).norm() <= 1e-12 * block.norm()
        inexact += (module.bias.kfac_expand.to_dense() - block).norm() > 1e-3 * block.norm()
    shared = not name.startswith("mlp")
    assert (inexact > 0) == shared
