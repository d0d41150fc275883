"""A weight that several calls use: their axes are one shared axis, and where that is exact.

Squared error summed over all outputs, joint weight and bias, exact Fisher, float64. Calls whose
outputs have terms of their own are exact in "expand", calls whose outputs are added up in "reduce",
as positions of one call are.
"""

from collections.abc import Callable

import pytest
import torch
from oracle import close
from torch import Tensor, nn
from torch.nn import functional as F

from backpack_ext import KFAC, BatchGrad, backpack, extend
from curvature import Kronecker

K, I, O, N = 3, 4, 2, 6


class Calls(nn.Module):
    """Calls of one linear map on different inputs, made in different ways.

    Args:
        way: How: one module in a loop, modules that share parameters, by hand, or both.
        read: What is done with the outputs: "stack", "sum" or "mean".
    """

    def __init__(self, way: str, read: str):
        super().__init__()
        self.way, self.read = way, read
        self.layers = nn.ModuleList(nn.Linear(I, O) for _ in range(K))
        for layer in self.layers[1:]:
            layer.weight, layer.bias = self.layers[0].weight, self.layers[0].bias

    def call(self, k: int, x: Tensor) -> Tensor:
        if self.way == "by hand" or (self.way == "mixed" and k == 1):
            return F.linear(x, self.layers[0].weight, self.layers[0].bias)
        return self.layers[k if self.way == "modules" else 0](x)

    def forward(self, x: Tensor) -> Tensor:  # [N, K, ..., I]
        outputs = torch.stack([self.call(k, x[:, k]) for k in range(K)], 1)
        return outputs if self.read == "stack" else getattr(outputs, self.read)(1)


def exact_block(model: nn.Module, x: Tensor) -> Tensor:
    """Return ``2 J^T J`` over ``[W | b]``, row by row."""
    layer = model.layers[0]

    def output(weight: Tensor, bias: Tensor) -> Tensor:
        # parameters have several names: each is replaced under all of them
        names = {"weight": weight, "bias": bias}
        values = {f"layers.{k}.{name}": p for k in range(K) for name, p in names.items()}
        return torch.func.functional_call(model, values, (x,), tie_weights=False).flatten()

    jacobians = torch.func.jacrev(output, (0, 1))(layer.weight.detach(), layer.bias.detach())
    J = torch.cat([jacobians[0], jacobians[1].unsqueeze(2)], 2).flatten(1)
    return 2 * J.T @ J


def error(model: nn.Module, x: Tensor, approx: str) -> float:
    """Return the relative distance between the Kronecker product and the exact block."""
    exact = exact_block(model, x)
    loss_fn = extend(nn.MSELoss(reduction="sum"))
    extend(model)
    with backpack(KFAC(approx, "exact", bias="joint")):
        out = model(x)
        loss_fn(out, torch.zeros_like(out)).backward()
    block = model.layers[0].weight.kfac
    assert isinstance(block, Kronecker) and block is model.layers[0].bias.kfac
    return ((block.to_dense() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("read", ["stack", "sum", "mean"])
@pytest.mark.parametrize("way", ["loop", "modules", "by hand", "mixed"])
def test_calls_are_positions(way: str, read: str):
    torch.manual_seed(0)
    model, x = Calls(way, read).double(), torch.rand(N, K, I).double()
    errors = {approx: error(model, x, approx) for approx in ("expand", "reduce")}
    good, bad = ("expand", "reduce") if read == "stack" else ("reduce", "expand")
    assert errors[good] <= 1e-12 and errors[bad] > 0.01


@pytest.mark.parametrize("way", ["loop", "modules", "by hand", "mixed"])
def test_calls_and_positions_are_one_axis(way: str):
    """Tokens in each call: summing over calls and tokens is exact in "reduce"."""
    torch.manual_seed(0)
    model, x = Calls(way, "sum").double(), torch.rand(N, K, 5, I).double()

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.inner = model.layers, model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(1)

    pooled = Pooled().double()
    exact = exact_block(model, x.mean(2))  # the map is linear
    loss_fn = extend(nn.MSELoss(reduction="sum"))
    extend(pooled)
    with backpack(KFAC("reduce", "exact", bias="joint")):
        out = pooled(x)
        loss_fn(out, torch.zeros_like(out)).backward()
    close(model.layers[0].weight.kfac.to_dense(), exact)


def test_calls_by_hand_beside_a_module():
    """They are found in the graph, and are calls of the module's layer."""
    torch.manual_seed(0)
    model, x = Calls("mixed", "sum").double(), torch.rand(N, K, I).double()
    out = model(x)
    weight = model.layers[0].weight
    rows = [torch.autograd.grad(o.square().sum(), weight, retain_graph=True)[0] for o in out]
    loss_fn = extend(nn.MSELoss(reduction="sum"))
    extend(model)
    with backpack(KFAC(fisher="exact"), BatchGrad()):
        out = model(x)
        loss_fn(out, torch.zeros_like(out)).backward()
    close(weight.grad_batch, torch.stack(rows))
    assert isinstance(weight.kfac, Kronecker)


@pytest.mark.parametrize("first", ["module", "hand"])
def test_by_hand_before_and_behind_the_module(first: str):
    """Each recorded call has one use of the weight to itself, the nearest."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.square = nn.Linear(I, I)

        def forward(self, x: Tensor) -> Tensor:
            steps = [self.square, lambda z: F.linear(z, self.square.weight)]
            for step in steps if first == "module" else steps[::-1]:
                x = step(x).tanh()
            return x

    torch.manual_seed(0)
    model, x = Chain().double(), torch.rand(N, I).double()
    weight, out = model.square.weight, model(x)
    rows = [torch.autograd.grad(o.square().sum(), weight, retain_graph=True)[0] for o in out]
    loss_fn = extend(nn.MSELoss(reduction="sum"))
    extend(model)
    for _ in range(2):
        with backpack(BatchGrad()):
            out = model(x)
            loss_fn(out, torch.zeros_like(out)).backward()
        close(weight.grad_batch, torch.stack(rows))


class Unrolled(nn.Module):
    """A linear recurrent cell in a Python loop: ``h_t = W_i x_t + W_h h_(t-1)``, read out at the end."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.inner = make()

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), O)
        for t in range(x.shape[1]):
            h = self.inner(x[:, t], h)
        return h


class LinearCell(nn.Module):
    """The identity instead of a nonlinearity, with one step of memory that is switched off."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(I, O)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(x) + h


def test_a_cell_in_a_loop():
    """An integrator adds up what its input layer gives over time: exact in "reduce", not in "expand"."""
    torch.manual_seed(0)
    model, x = Unrolled(LinearCell).double(), torch.rand(N, K, I).double()
    a = torch.cat([x, torch.ones(N, K, 1)], 2).sum(1)
    exact = torch.kron(2 * torch.eye(O).double(), a.T @ a)
    loss_fn = extend(nn.MSELoss(reduction="sum"))
    extend(model)
    kfacs = [
        KFAC(approx, "exact", bias="joint", savefield=f"k_{approx}") for approx in ("expand", "reduce")
    ]
    with backpack(*kfacs):
        out = model(x)
        loss_fn(out, torch.zeros_like(out)).backward()
    p = model.inner.cell.weight
    close(p.k_reduce.to_dense(), exact)
    assert (p.k_expand.to_dense() - exact).norm() > 0.1 * exact.norm()
