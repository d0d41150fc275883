"""Layers whose output is empty: torch's gradient of their parameters is zero, and so are quantities."""

import pytest
import torch
from torch import nn

from backpack_ext import (
    EKFAC,
    KFAC,
    BatchDotGrad,
    BatchGrad,
    DiagGGN,
    HesScale,
    LowRankGGN,
    Variance,
    backpack,
    extend,
)
from curvature.block import Block

N = 4


class Beside(nn.Module):
    """A linear layer, and one beside it whose output adds nothing."""

    def __init__(self, layer, x):
        super().__init__()
        self.head, self.layer, self.x = nn.Linear(2, 2), layer, x

    def forward(self, x):
        nothing = self.layer(self.x).sum()
        return self.head(x) + nothing


# torch takes the first in float32 only
LAYERS = {
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(2, 4, 3, padding=(2, 1), groups=2), (N, 2, 2, 3)),
    "Linear": lambda: (nn.Linear(2, 3), (N, 0, 2)),
    "Linear, no rows": lambda: (nn.Linear(2, 3), (0, 2)),
    "LayerNorm": lambda: (nn.LayerNorm(2), (N, 0, 2)),
    "Embedding": lambda: (nn.Embedding(3, 2), None),
}


def dense(result):
    return result.to_dense() if isinstance(result, Block) else result


@pytest.mark.parametrize("name", LAYERS)
def test_zeros(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    x = torch.zeros(N, 0, dtype=torch.long) if shape is None else torch.randn(shape)
    model, loss_fn = extend(Beside(layer, x)), extend(nn.MSELoss())
    exts = [
        KFAC(fisher="exact"),
        EKFAC("reduce", fisher="exact"),
        DiagGGN(),
        HesScale(),
        HesScale(batch=True, savefield="per_datum"),
        BatchGrad(),
        BatchDotGrad(),
        Variance(),
        LowRankGGN(param_groups="parameters"),
    ]
    inputs, targets = torch.randn(N, 2), torch.randn(N, 2)
    with backpack(*exts):
        loss_fn(model(inputs), targets).backward()
    head = {
        (k, e.savefield): getattr(p, e.savefield)
        for k, p in enumerate(model.head.parameters())
        for e in exts
    }
    for p in layer.parameters():
        assert not p.grad.any()
        for ext in exts:
            found = dense(getattr(p, ext.savefield))
            assert found.numel() and not found.any(), ext
    with backpack(*exts):  # beside nothing
        loss_fn(model.head(inputs), targets).backward()
    for k, p in enumerate(model.head.parameters()):
        for ext in exts:
            torch.testing.assert_close(dense(head[k, ext.savefield]), dense(getattr(p, ext.savefield)))
