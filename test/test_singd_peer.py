"""Agreement with the authors' package ``singd`` where it computes what the paper says.

Where it does not, and what is compared instead:

* Convolutions with groups: it averages the patches over the groups and keeps one K for all of them.
  Each group has inputs of its own, and here factors of its own. Compared: no groups.
* Gradient accumulation: it adds up ``P(K^T A K)`` of m equal passes, although A is a mean, and what it
  adds up for B is 1/m of the batch's, since each pass is rescaled by the square root of its own number
  of data. In SINGD only ``tr(H_C) H_K`` and ``tr(H_K) H_C`` count, where the m cancel, unless the passes
  differ in size; in IKFAC both are wrong. Compared: one pass per step, and `test_accumulation`.
* The number of terms of the loss is an argument, which knows N and N T, not that a mean squared error
  averages over outputs too. Compared: cross-entropy, and squared errors as a sum.
* ``normalize_lr_cov`` divides by the largest entry of m; the norm here is Frobenius's, as in the
  inverse-free Shampoo of the same authors. Compared: where neither exceeds 1, which leaves the
  factor ``1 - alpha1``.
* Toeplitz matrices and others keep what their ``from_dense`` does; only dense and diagonal ones are
  compared.
* A layer that the forward pass does not use raises, and so does a closure.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from natural_cases import Mean
from torch import nn

from backpack_ext import backpack, extend
from optim import IKFAC, SINGD

peer = pytest.importorskip("singd.optim.optimizer")

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*extend"),
]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    )


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 1), bias=False, dilation=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def pooled() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), Mean(), nn.Linear(4, 3))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


# network, shape of a datum, loss_average for a mean
NETWORKS = {
    "mlp": (mlp, (4,), "batch"),
    "conv": (conv, (2, 6, 6), "batch"),
    "pooled": (pooled, (4, 3), "batch"),
    "tokens": (tokens, (4, 3), "batch+sequence"),
}


def data(shape: tuple, average: str, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    size = (n, *shape[:-1]) if average == "batch+sequence" else (n,)
    return torch.randn(n, *shape), torch.randint(3, size)


def compare(
    network: str, theirs: dict, ours: dict, kind=SINGD, reduction="mean", steps=5, **both
) -> tuple:
    """Train a network twice and compare weights and factors after each step."""
    build, shape, average = NETWORKS[network]
    model = build()
    twin = copy.deepcopy(model)
    options = {"lr": 0.02, "damping": 0.05, "lr_cov": 0.1, **both}
    other = peer.SINGD(
        twin, loss_average=average if reduction == "mean" else None, **{"T": 1, **theirs}, **options
    )
    opt = kind(extend(model), **{"interval": 1, **ours}, **options)
    loss_fn = extend(nn.CrossEntropyLoss(reduction=reduction))
    for _ in range(steps):
        x, y = data(shape, average)
        opt.zero_grad()
        with backpack(*opt.extensions()):
            loss_fn(model(x).reshape(-1, 3), y.flatten()).backward()
        opt.step()
        other.zero_grad()
        F.cross_entropy(twin(x).reshape(-1, 3), y.flatten(), reduction=reduction).backward()
        other.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
        for name, module in model.named_modules():
            if name in other.Ks:
                found = opt.factors(module.weight)
                for factor, all_ in (("K", other.Ks), ("C", other.Cs)):
                    dense = found[factor].to_dense()[0]
                    torch.testing.assert_close(dense, all_[name].to_dense(), rtol=1e-10, atol=1e-12)
    return opt, other


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    "structure", [("dense", "dense"), ("diagonal", "diagonal"), ("diagonal", "dense")]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_singd(network, structure, approx, reduction):
    lr = 0.02 if reduction == "mean" else 0.004
    theirs = {"structures": structure, "kfac_approx": approx}
    compare(network, theirs, {"structure": structure, "approx": approx}, reduction=reduction, lr=lr)


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("network", NETWORKS)
def test_ikfac(network, structure):
    theirs = {"structures": (structure, structure), "kfac_like": True, "alpha1": 0.0}
    theirs["kfac_approx"] = "reduce"
    compare(network, theirs, {"structure": structure}, IKFAC)


@pytest.mark.parametrize(
    "both",
    [
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"alpha1": 0.0},
        {"alpha1": 0.8},
        {"damping": 1.0},
        {"lr_cov": lambda k: 0.2 / (k + 1)},  # steps or refreshes: the same with T = 1
    ],
    ids=str,
)
def test_options(both):
    compare("mlp", {"kfac_approx": "reduce"}, {}, **both)


def test_interval():
    compare("conv", {"kfac_approx": "expand", "T": 3}, {"approx": "expand", "interval": 3}, steps=8)


def test_factor_of_normalized_steps():
    opt, other = compare(
        "mlp",
        {"normalize_lr_cov": True, "kfac_approx": "reduce"},
        {"normalize": True},
        lr_cov=0.05,
        steps=3,
    )
    for m in [*other.m_Ks.values(), *other.m_Cs.values()]:
        assert m.to_dense().norm() < 1
    plain, _ = compare("mlp", {"kfac_approx": "reduce"}, {}, lr_cov=0.05, steps=1)
    assert opt.param_groups[0]["normalize"] and not plain.param_groups[0]["normalize"]


@pytest.mark.parametrize("kind", [SINGD, IKFAC])
def test_accumulation(kind):
    """Two passes of half a batch are the batch here, and something else there with IKFAC."""
    build, shape, average = NETWORKS["mlp"]
    x, y = data(shape, average, n=6)
    model, found = build(), []
    loss_fn = extend(nn.CrossEntropyLoss())
    for cuts in ([6], [3, 3]):
        m, twin = extend(copy.deepcopy(model)), copy.deepcopy(model)
        rule = {"kfac_like": True, "alpha1": 0.0} if kind is IKFAC else {}
        other = peer.SINGD(twin, T=1, lr_cov=0.1, kfac_approx="reduce", loss_average="batch", **rule)
        opt = kind(m, interval=1, lr_cov=0.1)
        for a, b in zip(x.split(cuts), y.split(cuts), strict=True):
            with backpack(*opt.extensions()):
                (len(a) / 6 * loss_fn(m(a), b)).backward()
            (len(a) / 6 * F.cross_entropy(twin(a), b)).backward()
        opt.step()
        other.step()
        found.append((opt.factors(m[0].weight)["K"].to_dense()[0], other.Ks["0"].to_dense()))
    (ours, theirs), (ours_cut, theirs_cut) = found
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, ours_cut)
    assert torch.allclose(theirs, theirs_cut, rtol=1e-2) == (kind is SINGD)
