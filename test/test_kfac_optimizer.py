"""KFAC as an optimizer against dense systems and plain autograd."""

import copy

import pytest
import torch
from natural_cases import CASES, check, compare, train, twins
from natural_oracle import Natural, Options, factors
from torch import nn

from backpack_ext import backpack, extend
from optim import KFAC

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*extend"),
]

FAST = {"lr": 0.02, "interval": 1}
BLOCK = ("block-diagonal", {"block": 2})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES.keys())
def test_networks(case, approx, reduction):
    compare(KFAC, case, 3, [3], reduction, approx=approx, damping=0.01, **FAST)


@pytest.mark.parametrize("inverse", ["pi", "exact"])
@pytest.mark.parametrize(
    "structure", ["dense", "diagonal", BLOCK, ("diagonal", "dense"), (BLOCK, "diagonal")], ids=str
)
@pytest.mark.parametrize("case", ["mlp", "conv", "embedding"])
def test_structures_and_inverses(case, structure, inverse):
    compare(KFAC, case, 3, [3], structure=structure, inverse=inverse, damping=0.01, **FAST)


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.0},
        {"decay": 0.5},
        {"damping": 2.0},
        {"damping": 1e-6, "inverse": "exact", "lr": 1e-4},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"joint_bias": False},
        {"interval": 3},
        {"interval": lambda step: 1 + step // 2},
        {"inverse_interval": 2},
        {"interval": 2, "inverse_interval": 4},
        {"interval": 2, "inverse_interval": 3},
        {"kl_clip": 1e-4},
        {"kl_clip": 1e4},
        {"kl_clip": 1e-4, "inverse": "exact", "weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
def test_options(options):
    options = {"damping": 0.01, **FAST, **options}
    compare(KFAC, "mlp", 7, [5], **options)


def test_kl_clip_limits_the_step():
    """``lr^2 sum <N, g>`` is at most kl_clip; without it the steps are longer."""
    case, model = CASES["conv"], CASES["conv"].model()
    parts, products = case.parts([4]), []
    start = copy.deepcopy(model)
    for clip in (None, 1e-5):
        m = copy.deepcopy(model)
        opt = KFAC(extend(m), lr=0.1, momentum=0.0, kl_clip=clip, interval=1)
        train(case, m, opt, [parts])
        pairs = list(zip(start.parameters(), m.parameters(), strict=True))
        products.append(0.1 * sum(((p - q) * q.grad).sum().item() for p, q in pairs))
    free, limited = products  # lr^2 <N, g>, the second with N clipped, which enters once
    assert free > 1e-4
    assert abs(limited / free - (1e-5 / free) ** 0.5) < 1e-7


def test_groups_have_own_options():
    case, model = CASES["conv"], CASES["conv"].model()
    own = {
        "0": {"lr": 0.01, "damping": 0.1, "structure": "diagonal"},
        "2": {"momentum": 0.5, "weight_decay": 0.1, "inverse": "exact"},
        "5": {"decay": 0.3, "structure": ("diagonal", "dense")},
    }
    structures = {"0": ("diagonal", "diagonal"), "2": ("dense", "dense"), "5": ("diagonal", "dense")}

    def options(name):
        given = {k: v for k, v in own[name].items() if k != "structure"}
        K, C = structures[name]
        return Options(**{"lr": 0.03, "damping": 0.01, **given}, K=(K, {}), C=(C, {}))

    oracle = Natural(copy.deepcopy(model), case.total, "kfac", options, kl_clip=1e-3)
    modules = dict(model.named_modules())
    groups = [{"params": list(modules[name].parameters()), **o} for name, o in own.items()]
    extend(model)
    opt = KFAC(groups, lr=0.03, damping=0.01, kl_clip=1e-3, interval=1)
    for _ in range(3):
        parts = case.parts([3])
        train(case, model, opt, [parts])
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)


def test_averages_by_hand():
    """The first statistics as they are, then decay times old plus the rest times new."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    steps = [case.parts([4]) for _ in range(3)]
    found = [factors(model, case.total, case.scaled(p), "reduce", lambda _: True)["0"] for p in steps]
    opt = KFAC(extend(model), lr=0.0, decay=0.7, interval=1)
    average = found[0]
    for t, parts in enumerate(steps):
        train(case, model, opt, [parts])
        if t:
            average = tuple(0.7 * old + 0.3 * new for old, new in zip(average, found[t], strict=True))
        ours = opt.factors(model[0].weight)
        torch.testing.assert_close(ours["A"].to_dense(), average[0])
        torch.testing.assert_close(ours["B"].to_dense(), average[1])


def test_step_is_the_damped_newton_step_where_kfac_is_exact():
    """Least squares with one output: ``B (x) A`` of exact vectors is the Hessian, lr = 1 solves."""
    x = torch.randn(8, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.7
    model, loss_fn = extend(nn.Linear(3, 1)), extend(nn.MSELoss())
    opt = KFAC(model, lr=1.0, momentum=0.0, damping=1e-14, inverse="exact", fisher="exact", interval=1)
    with backpack(*opt.extensions()):
        loss_fn(model(x), y).backward()
    opt.step()
    torch.testing.assert_close(
        model.weight.detach(), torch.tensor([[1.0, -2.0, 0.5]]), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(model.bias.detach(), torch.tensor([0.7]), rtol=0, atol=1e-9)


def test_a_layer_without_gradient_signal():
    """B = 0 (all targets met): nothing moves, nothing is divided by zero."""
    case = CASES["regression"]
    model = case.model()
    x = torch.randn(5, 4)
    y = model(x).detach()
    before = copy.deepcopy(model.state_dict())
    for inverse in ("pi", "exact"):
        opt = KFAC(extend(model), lr=0.1, inverse=inverse, interval=1)
        train(case, model, opt, [[(x, y, 1.0)]] * 2)
        for name, p in model.state_dict().items():
            torch.testing.assert_close(p, before[name])


def test_layer_used_first_between_refreshes():
    """It has no statistics yet; it may wait, or go along the gradient, but stays finite."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.use = nn.Linear(4, 3), nn.Linear(4, 3), False

        def forward(self, x):
            return self.one(x) + self.two(x) if self.use else self.one(x)

    case = CASES["mlp"]
    model = extend(Late())
    opt = KFAC(model, lr=0.02, interval=3)
    for t in range(6):
        model.use = t >= 1
        train(case, model, opt, [case.parts([4])])
    assert all(p.isfinite().all() for p in model.parameters())
    assert opt.skipped == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_is_close(dtype):
    case = CASES["conv"]
    model = case.model()
    opt, oracle = twins(KFAC, model, case, {"lr": 0.01, "damping": 0.1, "interval": 1})
    model.to(dtype)
    for _ in range(3):
        parts = case.parts([4])
        train(case, model, opt, [[(x.to(dtype), y, c) for x, y, c in parts]])
        oracle.step(case.scaled(parts))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for p, q in zip(model.parameters(), oracle.model.parameters(), strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=tolerance, atol=tolerance)
