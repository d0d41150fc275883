"""Agreement with BackPACK where BackPACK is right; where it is not, see test_failures.py."""

import copy

import backpack as theirs
import pytest
import torch
from backpack import extensions
from torch import nn

from backpack_ext import (
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    SumGradSquared,
    Variance,
    backpack,
    extend,
)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (
        7,
        4,
    )


def cnn():
    layers = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*layers, nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)), (
        5,
        2,
        8,
        8,
    )


def grouped():
    layers = nn.Conv1d(4, 6, 3, groups=2, dilation=2), nn.ReLU()
    return nn.Sequential(
        *layers, nn.ConvTranspose1d(6, 2, 2, stride=2), nn.Flatten(), nn.Linear(12, 3)
    ), (5, 4, 7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [mlp, cnn, grouped])
def test_quantities_on_backpacks_own_nets(make, reduction):
    torch.manual_seed(0)
    model, shape = make()
    model = model.double()
    twin = theirs.extend(copy.deepcopy(model))
    ours, loss_fn = extend(model), nn.CrossEntropyLoss(reduction=reduction)
    x, y = torch.randn(shape).double(), torch.randint(0, 3, shape[:1])
    with backpack(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), DiagGGN()):
        extend(copy.deepcopy(loss_fn))(ours(x), y).backward()
    their = (extensions.BatchGrad(), extensions.BatchL2Grad(), extensions.SumGradSquared())
    with theirs.backpack(*their, extensions.Variance(), extensions.DiagGGNExact()):
        theirs.extend(loss_fn)(twin(x), y).backward()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        if make is grouped:  # its norms for grouped convolutions contradict its own gradients
            q.batch_l2 = q.grad_batch.flatten(1).square().sum(1)
        for field in ("grad_batch", "batch_l2", "sum_grad_squared", "variance", "diag_ggn_exact"):
            torch.testing.assert_close(getattr(p, field), getattr(q, field))


def test_kronecker_factors_of_linear_layers():
    torch.manual_seed(0)
    model, shape = mlp()
    twin = theirs.extend(copy.deepcopy(model))
    loss_fn, x, y = nn.CrossEntropyLoss(), torch.randn(shape), torch.randint(0, 3, shape[:1])
    with backpack(KFAC(fisher="exact")):
        extend(nn.CrossEntropyLoss())(extend(model)(x), y).backward()
    with theirs.backpack(extensions.KFLR()):
        theirs.extend(loss_fn)(twin(x), y).backward()
    for layer, other in zip(model, twin, strict=True):
        if isinstance(layer, nn.Linear):
            for one, two in zip(layer.weight.kfac, other.weight.kflr, strict=True):
                torch.testing.assert_close(one, two)
            torch.testing.assert_close(layer.bias.kfac.B, other.bias.kflr[0])
