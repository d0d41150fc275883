"""Optimizers' statistics of convolutions: sums of patches, projected, are the projections of patches."""

import pytest
import torch
from torch import nn

from backpack_ext import backpack, extend
from optim import IKFAC, KFAC, SINGD
from optim.statistics import Statistics

STRUCTURES = ["dense", "block-diagonal", "lower-toeplitz", "upper-triangular", "hierarchical"]
OPTIMIZERS = {
    **{name: (SINGD, {"structure": name, "lr_cov": 0.3}) for name in STRUCTURES},
    "ikfac": (IKFAC, {"lr_cov": 0.05}),
    "pi": (KFAC, {"inverse": "pi"}),
    "exact": (KFAC, {"inverse": "exact"}),
    "separate": (SINGD, {"structure": "dense", "joint_bias": False}),
}


def trained(name: str, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(3, 4, (2, 3), stride=(1, 2), bias=False), nn.Tanh()),
        *(nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Tanh()),
        *(nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular"), nn.Flatten()),
        nn.Linear(4 * 10 * 4, 3),
    ).double()
    extend(model)
    loss_fn = extend(nn.CrossEntropyLoss())
    cls, options = OPTIMIZERS[name]
    opt = cls(model, lr=0.05, approx="expand", interval=1, damping=1e-2, **options)
    for _ in range(4):
        opt.zero_grad()
        with backpack(*opt.extensions()):
            loss_fn(model(x), y).backward()
        opt.step()
    assert not opt.skipped
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_formed_moments_are_those_of_rows(name: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    x, y = torch.randn(7, 2, 6, 6).double(), torch.randint(3, (7,))
    chosen, formed = Statistics._sums, []

    def sums(self, layer, unit):
        formed.append(chosen(self, layer, unit))
        return formed[-1]

    monkeypatch.setattr(Statistics, "_sums", sums)
    found = trained(name, x, y)
    assert sum(s is not None for s in formed) == 4 * 4  # four convolutions, four passes
    monkeypatch.setattr(Statistics, "_sums", lambda *args: None)
    for p, q in zip(found, trained(name, x, y), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-10)


def test_diagonals_and_few_rows_are_not_formed(monkeypatch: pytest.MonkeyPatch):
    formed, chosen = [], Statistics._sums
    monkeypatch.setattr(Statistics, "_sums", lambda *args: formed.append(chosen(*args)) or formed[-1])
    monkeypatch.setitem(OPTIMIZERS, "diagonal", (SINGD, {"structure": "diagonal"}))
    trained("diagonal", torch.randn(7, 2, 6, 6).double(), torch.randint(3, (7,)))
    assert formed and not any(s is not None for s in formed)
    formed.clear()
    trained("dense", torch.randn(1, 2, 6, 6).double(), torch.randint(3, (1,)))
    assert any(s is None for s in formed[:3])
