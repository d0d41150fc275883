"""Parameters frozen between forward and backward: as the backward pass, quantities leave them out."""

import gc
import weakref

import pytest
import torch
from torch import nn

from backpack_ext import BL89, EKFAC, KFAC, BatchGrad, DiagGGN, HesScale, LowRankGGN, backpack, extend
from backpack_ext.site import Site
from curvature.block import Block

EXTENSIONS = (
    lambda: KFAC(fisher="exact", bias="joint"),
    lambda: EKFAC(fisher="exact"),
    DiagGGN,
    lambda: HesScale(batch=True),
    BL89,
    BatchGrad,
    lambda: LowRankGGN(param_groups="parameters"),
)


class Net(nn.Module):
    """Layers with a rule, a product without one, and a parameter that is nothing but added."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(2, 3, 2), nn.LayerNorm(4), nn.Linear(4, 2)
        self.product, self.shift = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = torch.tanh(self.conv(x).flatten(1) @ self.product) + self.shift
        return self.head(self.norm(x))


def results(frozen: set[str], late: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, loss_fn = extend(Net()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(5, 2, 5), torch.randint(2, (5,))
    exts = [make() for make in EXTENSIONS]

    def freeze() -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)

    with backpack(*exts):
        if not late:
            freeze()
        loss = loss_fn(model(x), y)
        freeze()
        loss.backward()
    found = {}
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name in frozen)
        for ext in exts:
            if hasattr(p, ext.savefield):
                t = getattr(p, ext.savefield)
                found[f"{name} {ext.savefield}"] = t.to_dense() if isinstance(t, Block) else t
    return found


@pytest.mark.parametrize(
    "frozen",
    [
        {"conv.weight", "norm.bias", "head.bias"},
        {"product", "head.weight"},
        {"shift", "conv.weight", "conv.bias"},
        {name for name, _ in Net().named_parameters()},
    ],
    ids=["one of two", "weights", "a layer", "all"],
)
@pytest.mark.filterwarnings("ignore:(HesScale|BL89) found no parameter")
def test_frozen_late_is_frozen_early(double, frozen):
    if len(frozen) == len(list(Net().parameters())):
        assert not results(frozen, late=True)
        return
    late, early = results(frozen, late=True), results(frozen, late=False)
    assert late.keys() == early.keys()
    assert not any(key.split()[0] in frozen for key in late)
    for key, expected in early.items():
        torch.testing.assert_close(late[key], expected, msg=key)


def test_thawed_again(double):
    model, loss_fn = extend(nn.Sequential(nn.Linear(3, 2))), extend(nn.MSELoss())
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    (layer,) = model
    with backpack(BatchGrad()):
        loss = loss_fn(model(x), y)
        layer.weight.requires_grad_(False)
        loss.backward(retain_graph=True)
        assert not hasattr(layer.weight, "grad_batch") and hasattr(layer.bias, "grad_batch")
        layer.weight.requires_grad_(True)
        loss.backward()
    torch.testing.assert_close(layer.weight.grad_batch.sum(0), layer.weight.grad)


def test_inputs_of_frozen_layers_go(monkeypatch):
    held = weakref.WeakSet()
    create = Site.__init__

    def spy(self, *args, **options):
        create(self, *args, **options)
        held.add(self)

    monkeypatch.setattr(Site, "__init__", spy)
    model, loss_fn = extend(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))), extend(nn.MSELoss())
    with backpack(BatchGrad()):
        loss = loss_fn(model(torch.randn(4, 3)), torch.randn(4, 2))
        model[0].requires_grad_(False)
        loss.backward()
    gc.collect()
    assert held and all(site.x is None for site in held)
