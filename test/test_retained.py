"""Nested passes leave ``retain_grad``'s gradients alone, and are the only ones to be undone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backpack_ext import (
    EKFAC,
    KFAC,
    BatchGrad,
    DiagGGN,
    HesScale,
    LowRankGGN,
    backpack,
    extend,
    sweep,
)


class Net(nn.Module):
    """A residual connection, a home-made activation, a parameter outside of layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.randn(4))
        self.kept = []

    def keep(self, t):
        t.retain_grad()
        self.kept.append(t)
        return t

    def forward(self, x):
        x = self.keep(self.first(x))
        x = self.keep(x + x * torch.sigmoid(x) * self.scale)
        x = self.keep(F.softplus(x, beta=2)).mul_(2)
        return self.keep(self.last(x))


def grads(exts, passes=1, extended=True):
    torch.manual_seed(0)
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    if extended:
        extend(model), extend(loss_fn)
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    with backpack(*exts):
        loss = loss_fn(model(x), y)
        for k in range(passes):
            loss.backward(retain_graph=k + 1 < passes)
    return [t.grad for t in model.kept]


@pytest.mark.parametrize("small", [sweep.SMALL, 0], ids=["vectorised", "one by one"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "exts",
    [
        [],
        [BatchGrad()],  # whose layers are checked
        [KFAC(fisher="mc"), EKFAC(fisher="exact", approx="reduce")],
        [DiagGGN(), LowRankGGN()],
        [HesScale(), HesScale(cross_terms=True, batch=True, savefield="per_datum")],
    ],
    ids=lambda exts: " ".join(type(ext).__name__ for ext in exts),
)
@pytest.mark.filterwarnings("ignore:.*has no rule")
def test_as_torch_leaves_them(double, monkeypatch, exts, passes, small):
    monkeypatch.setattr(sweep, "SMALL", small)
    for found, plain in zip(grads(exts, passes), grads([], passes, extended=False), strict=True):
        assert torch.equal(found, plain)


def test_leaves_and_passes_of_the_users_own():
    x = torch.ones(2, requires_grad=True)
    x.retain_grad()
    y = 3 * x
    y.retain_grad()
    (y**2).sum().backward()
    assert x.grad.tolist() == [18, 18] and y.grad.tolist() == [6, 6]
    with pytest.raises(RuntimeError, match="requires_grad=False"):
        torch.ones(2).retain_grad()


@pytest.mark.parametrize(
    "given", [lambda h: h, lambda h: [h], lambda h: iter([h])], ids=["tensor", "list", "iterator"]
)
def test_inputs_of_backward(double, given):
    """They retain their gradients without being asked to by name."""
    torch.manual_seed(0)
    model, loss_fn = extend(Net()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    with backpack(KFAC(fisher="mc")):
        h = model.first(x)
        loss = loss_fn(model.last(h.tanh()), y)
        loss.backward(inputs=given(h), retain_graph=True)
        found = h.grad
        torch.autograd.backward(loss, None, None, False, None, given(h))
    assert torch.equal(h.grad, 2 * found)
    h = h.detach().requires_grad_()
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model.last(h.tanh()), y), h)
    assert torch.equal(found, expected)
