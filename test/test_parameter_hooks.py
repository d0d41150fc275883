"""Hooks on parameters (a clipping of gradients): they are for the user's gradients, nothing else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backpack_ext import BatchGrad, DiagGGN, HesScale, backpack, extend


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return p**3

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return 3 * p**2 * g


class Net(nn.Module):
    """A layer, an unknown operation, two compositions that begin at parameters, two branches."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.p, self.q, self.r = (nn.Parameter(torch.randn(3)) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.layer(x)) * Cube.apply(self.p)
        return x + self.q * torch.sigmoid(self.q) + (self.r.cumsum(0) + self.r.flip(0))


@pytest.mark.filterwarnings("ignore:.*CubeBackward has no rule")
def test_hooks_on_parameters(double):
    exts = BatchGrad(), DiagGGN(), HesScale(cross_terms=True, generator=torch.Generator())
    x, y, found = torch.randn(4, 3), torch.randn(4, 3), []
    for hooked in (False, True):
        torch.manual_seed(0)
        model, loss_fn, calls = Net(), nn.MSELoss(), []
        gradients = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))

        def clip(g, calls=calls):
            calls.append(g)
            return g.clamp(-0.001, 0.001)

        for p in model.parameters() if hooked else ():
            p.register_hook(clip)
        extend(model), extend(loss_fn)
        exts[2]._generator.manual_seed(1)
        with backpack(*exts):
            loss_fn(model(x), y).backward()
        if hooked:
            assert len(calls) == len(gradients)
            gradients = [g.clamp(-0.001, 0.001) for g in gradients]
        for p, g in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, g)
        found.append([getattr(p, ext.savefield) for p in model.parameters() for ext in exts])
    torch.testing.assert_close(*found)
