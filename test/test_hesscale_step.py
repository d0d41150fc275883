"""Step-size scaling against its formula in plain loops; and an optimizer that wraps another."""

import copy
import io
import math
import pickle

import pytest
import torch
from optimizers import make_data, make_params, put_all, run
from torch import nn

from backpack_ext import DiagGGN, HesScale, backpack, extend
from optim import AdaHesScale, CurvatureOptimizer, HesScaleStep

INNER = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.3, weight_decay=0.2),
    "adamw, one kernel": lambda params: torch.optim.AdamW(params, lr=0.3, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.3),
    "adahesscale": lambda params: AdaHesScale(params, lr=0.3, weight_decay=0.2),
}


def clones(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


class Twin:
    """The bare optimizer on parameters of its own, and the formula number by number."""

    def __init__(self, params, make, delta, beta2):
        self.params, self.delta, self.beta2 = clones(params), delta, beta2
        self.opt = make(self.params)
        self.v = [[0.0] * p.numel() for p in params]
        self.t = 0

    def step(self, grads, diagonals):
        before = [p.detach().flatten().tolist() for p in self.params]
        put_all(self.params, grads, diagonals)
        self.opt.step()
        self.t += 1
        T = 0.0
        for v, p0, p, h in zip(self.v, before, self.params, diagonals, strict=True):
            for j, (a, b, c) in enumerate(
                zip(p0, p.detach().flatten().tolist(), h.flatten().tolist(), strict=True)
            ):
                v[j] = self.beta2 * v[j] + (1 - self.beta2) * c**2
                T += math.sqrt(v[j] / (1 - self.beta2**self.t)) * (a - b) ** 2
        self.factor = min(1.0, math.sqrt(2 * self.delta / T))
        with torch.no_grad():
            for p0, p in zip(before, self.params, strict=True):
                old = torch.tensor(p0, dtype=p.dtype).view(p.shape)
                p.copy_(old - self.factor * (old - p))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def problem():
    """Return an extended model, and a function that runs a pass for an optimizer."""
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double())
    loss_fn = extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(2, (6,))

    def loss_of(opt, part=slice(None), factor=1.0):
        with backpack(*opt.extensions()):
            loss = loss_fn(model(x[part]), y[part]) * factor
            loss.backward()
        return loss

    return model, loss_of


@pytest.mark.parametrize("make", INNER.values(), ids=INNER.keys())
@pytest.mark.parametrize("delta, beta2", [(0.02, 0.999), (0.3, 0.5), (0.1, 0.0), (1e9, 0.9)])
def test_formula(make, delta, beta2):
    params = make_params()
    twin = Twin(params, make, delta, beta2)
    opt = HesScaleStep(make(params), delta, beta2)
    for grads, diagonals in make_data(params, 5):
        put_all(params, grads, diagonals)
        opt.step()
        twin.step(grads, diagonals)
        assert opt.factor.shape == () and opt.factor.item() == pytest.approx(twin.factor)
        for p, q in zip(params, twin.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    # Buffers are those of the whole step: the twin's optimizer was not told either.
    for p, q in zip(params, twin.params, strict=True):
        for key, value in twin.opt.state[q].items():
            torch.testing.assert_close(opt.state[p][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factor_one_changes_no_bit(dtype):
    params = make_params(dtype, shapes=[(100,)])
    bare = clones(params)
    data = make_data(params, 5)
    opt = HesScaleStep(torch.optim.AdamW(params, lr=10.0), delta=1e9)
    run(opt, params, data)
    run(torch.optim.AdamW(bare, lr=10.0), bare, data)
    assert opt.factor == 1
    assert all(torch.equal(p, q) for p, q in zip(params, bare, strict=True))


def test_predicted_change_is_at_most_delta():
    params = make_params()
    before = clones(params)
    ((_, diagonals),) = data = make_data(params, 1)
    opt = HesScaleStep(torch.optim.SGD(params, lr=10.0), delta=0.01, beta2=0.0)
    run(opt, params, data)
    assert opt.factor < 1
    change = sum(
        (h.abs() * (p - q) ** 2).sum() / 2 for p, q, h in zip(params, before, diagonals, strict=True)
    )
    assert change.item() == pytest.approx(0.01)


def test_no_curvature_leaves_the_step_alone():
    (p,) = make_params(shapes=[(3,)])
    before = p.detach().clone()
    opt = HesScaleStep(torch.optim.SGD([p], lr=1.0), delta=1e-6)
    put_all([p], [torch.ones_like(p)], [torch.zeros_like(p)])
    opt.step()
    assert opt.factor == 1
    torch.testing.assert_close(p.detach(), before - 1)


def test_bfloat16():
    params = make_params(torch.bfloat16)
    data = make_data(params, 40)
    opt = HesScaleStep(torch.optim.SGD(params, lr=1.0), delta=0.1)
    run(opt, params, data)
    assert 0 < opt.factor < 1 and opt.factor.dtype == torch.float32
    own = opt.state_dict()["hesscale_step"]["state"]
    for i, p in enumerate(params):
        v = torch.zeros(p.shape, dtype=torch.float64)
        for _, diagonals in data:
            v = 0.999 * v + 0.001 * diagonals[i].double() ** 2
        assert p.dtype == torch.bfloat16 and own[i]["exp_avg_hess_sq"].dtype == torch.float32
        torch.testing.assert_close(own[i]["exp_avg_hess_sq"].double(), v, rtol=1e-4, atol=1e-6)


def test_parameters_of_several_dtypes_share_one_factor():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    for t in (p, q):
        t.grad, t.hesscale = torch.ones_like(t), torch.ones_like(t)
    opt = HesScaleStep(torch.optim.SGD([p, q], lr=1.0), delta=0.5, beta2=0.0)
    opt.step()  # T = 4
    torch.testing.assert_close(opt.factor.double(), torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(p.data, torch.full((2,), 0.5))
    torch.testing.assert_close(q.data, torch.full((2,), 0.5, dtype=torch.float64))


def test_skips_parameters_without_gradient():
    p, q = make_params(shapes=[(2,), (2,)])
    opt = HesScaleStep(torch.optim.SGD([p, q], lr=1.0), delta=1e-3)
    before = q.detach().clone()
    ones = torch.ones_like(p)
    put_all([p], [ones], [ones])
    opt.step()
    assert torch.equal(q, before)
    put_all([p, q], [ones] * 2, [ones] * 2)
    opt.step()
    own = opt.state_dict()["hesscale_step"]["state"]
    assert [own[i]["step"].item() for i in (0, 1)] == [2, 1]


def test_no_gradient_at_all():
    opt = HesScaleStep(torch.optim.SGD(make_params(), lr=1.0), delta=1e-3)
    opt.step()
    assert opt.factor == 1


def test_it_is_an_optimizer():
    params = make_params()
    inner = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    opt = HesScaleStep(inner, delta=1.0)
    assert isinstance(opt, torch.optim.Optimizer) and isinstance(opt, CurvatureOptimizer)
    assert opt.param_groups is inner.param_groups and opt.state is inner.state
    assert opt.defaults is inner.defaults
    (extra,) = make_params(shapes=[(2,)])
    opt.add_param_group({"params": [extra], "lr": 7.0})
    assert [group["lr"] for group in inner.param_groups] == [0.1, 7.0]
    extra.grad = torch.ones_like(extra)
    opt.zero_grad()
    assert extra.grad is None
    extra.grad = torch.ones_like(extra)
    opt.zero_grad(set_to_none=False)
    assert torch.equal(extra.grad, torch.zeros_like(extra))
    assert "delta=1.0" in repr(opt) and "momentum: 0.9" in repr(opt)


@pytest.mark.parametrize("on_wrapper", [True, False])
def test_schedulers(on_wrapper):
    """Also after loading, which gives the wrapped optimizer new groups."""
    (p,) = make_params(shapes=[(2,)])
    opt = HesScaleStep(torch.optim.SGD([p], lr=1.0), delta=1e9)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    scheduler = torch.optim.lr_scheduler.StepLR(opt if on_wrapper else opt.optimizer, 1, gamma=0.5)
    for lr in (1.0, 0.5, 0.25):
        before = p.detach().clone()
        put_all([p], [torch.ones_like(p)], [torch.ones_like(p)])
        opt.step()
        torch.testing.assert_close(p.detach(), before - lr)
        scheduler.step()


def test_one_cycle_changes_momentum():
    params = make_params()
    opt = HesScaleStep(torch.optim.AdamW(params), delta=1.0)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
    assert opt.optimizer.param_groups[0]["betas"][0] == 0.95


@pytest.mark.parametrize("make", INNER.values(), ids=INNER.keys())
@pytest.mark.parametrize("file", [False, True])
def test_checkpoint_continues_exactly(make, file):
    params = make_params()
    opt = HesScaleStep(make(params), delta=1e-3, beta2=0.9)
    data = make_data(params, 6)
    run(opt, params, data[:3])
    others = clones(params)
    other = HesScaleStep(make(others), delta=7.0)
    state = copy.deepcopy(opt.state_dict())
    if file:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer)  # its safe default
    other.load_state_dict(state)
    assert (other.delta, other.beta2) == (1e-3, 0.9)
    run(opt, params, data[3:])
    run(other, others, data[3:])
    assert opt.factor < 1
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_checkpoint_keeps_precision():
    params = make_params(torch.bfloat16)
    opt = HesScaleStep(AdaHesScale(params), delta=0.1)
    run(opt, params, make_data(params, 3))
    others = clones(params)
    other = HesScaleStep(AdaHesScale(others), delta=0.1)
    other.load_state_dict(opt.state_dict())
    for a, b in ((opt.state_dict(), other.state_dict()),):
        for i in range(len(params)):
            for one, two in ((a, b), (a["hesscale_step"], b["hesscale_step"])):
                for key, value in one["state"][i].items():
                    assert torch.equal(value, two["state"][i][key])
                    assert value is not two["state"][i][key] and value.dtype == torch.float32


def test_checkpoint_of_a_bare_optimizer():
    params = make_params()
    bare = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    opt = HesScaleStep(torch.optim.SGD(params, lr=0.1, momentum=0.9), delta=0.1)
    with pytest.raises(ValueError, match=r"no entry 'hesscale_step'.*into `.optimizer`"):
        opt.load_state_dict(bare.state_dict())
    opt.optimizer.load_state_dict(bare.state_dict())
    bare.load_state_dict(opt.state_dict())  # the other way nothing is missing


def test_checkpoint_hooks():
    params = make_params()
    opt = HesScaleStep(torch.optim.SGD(params, lr=0.1), delta=0.1)
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append("saves"))
    opt.register_state_dict_post_hook(lambda o, s: {**s, "mine": 1})
    opt.register_load_state_dict_pre_hook(lambda o, s: calls.append(s["mine"]))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert calls == ["saves", 1, "loaded"]


def test_step_hooks():
    params = make_params()
    opt = HesScaleStep(torch.optim.SGD(params, lr=0.1), delta=0.1)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.optimizer.register_step_post_hook(lambda *_: calls.append("inside"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    run(opt, params, make_data(params, 1))
    assert calls == ["before", "inside", "after"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(how):
    params = make_params()
    opt = HesScaleStep(torch.optim.SGD(params, lr=0.1, momentum=0.9), delta=0.1)
    torch.optim.lr_scheduler.StepLR(opt, 1)  # which puts another step in the way
    data = make_data(params, 4)
    run(opt, params, data[:2])
    other = how(opt)
    others = other.param_groups[0]["params"]
    assert others[0] is not params[0]
    run(opt, params, data[2:])
    run(other, others, data[2:])
    assert opt.factor < 1 and torch.equal(opt.factor, other.factor)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_extensions():
    params = make_params()
    (own,) = HesScaleStep(torch.optim.SGD(params, lr=0.1), delta=1.0).extensions()
    assert isinstance(own, HesScale) and own.savefield == "hesscale"
    inner = AdaHesScale(params)
    opt = HesScaleStep(inner, delta=1.0)
    assert opt.extensions() == (inner.extension,) and opt.extension is inner.extension
    opt = HesScaleStep(inner, delta=1.0, gauss_newton=True)
    assert [e.savefield for e in opt.extensions()] == ["hesscale", "hesscale_gn"]
    opt = HesScaleStep(inner, delta=1.0, extension=DiagGGN(savefield="ggn"))
    assert [e.savefield for e in opt.extensions()] == ["hesscale", "ggn"]
    assert HesScaleStep(opt, delta=1.0).extensions() == opt.extensions()


@pytest.mark.parametrize("make", INNER.values(), ids=INNER.keys())
def test_training_loop(problem, make):
    model, loss_of = problem
    opt = HesScaleStep(make(model.parameters()), delta=0.01)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        losses.append(loss_of(opt).item())
        opt.step()
    assert losses[-1] < 0.7 * losses[0]


def test_closure(problem):
    model, loss_of = problem
    opt = HesScaleStep(torch.optim.SGD(model.parameters(), lr=0.1), delta=0.1)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        opt.zero_grad()
        return loss_of(opt)

    first, second = opt.step(closure), opt.step(closure)
    assert second < first and len(calls) == 2


@pytest.mark.parametrize("make", [INNER["sgd"], INNER["adahesscale"]], ids=["sgd", "adahesscale"])
def test_accumulation_over_parts_is_the_sum(problem, make):
    model, loss_of = problem
    start = copy.deepcopy(model.state_dict())
    opt = HesScaleStep(make(model.parameters()), delta=1e-5)
    loss_of(opt)
    opt.step()
    factor, whole = opt.factor, [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(start)
    opt = HesScaleStep(make(model.parameters()), delta=1e-5)
    opt.zero_grad()
    for part in (slice(0, 3), slice(3, 6)):
        loss_of(opt, part, factor=0.5)
        opt.accumulate()
    opt.step()
    assert factor < 1
    torch.testing.assert_close(opt.factor, factor)
    for p, q in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.detach(), q)


def test_zero_grad_forgets_what_was_accumulated():
    p = nn.Parameter(torch.zeros(1))
    opt = HesScaleStep(AdaHesScale([p], lr=1.0), delta=1e9)
    put_all([p], [torch.ones(1)], [torch.full((1,), 100.0)])
    opt.accumulate()
    opt.zero_grad()
    put_all([p], [torch.ones(1)], [torch.full((1,), 2.0)])
    opt.step()
    torch.testing.assert_close(p.data, torch.tensor([-0.5]))
    torch.testing.assert_close(
        opt.state_dict()["hesscale_step"]["state"][0]["exp_avg_hess_sq"], torch.tensor([0.004])
    )


@pytest.mark.parametrize("make", [INNER["sgd"], INNER["adahesscale"]], ids=["sgd", "adahesscale"])
def test_missing_and_used_diagonals(make):
    (p,) = make_params(shapes=[(2,)])
    before = p.detach().clone()
    opt = HesScaleStep(make([p]), delta=1.0)
    p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError, match=r"HesScaleStep: parameter 0 .* no `hesscale`.*opt.extensions"
    ):
        opt.step()
    assert torch.equal(p, before)
    p.hesscale = torch.ones_like(p)
    opt.step()
    after = p.detach().clone()
    p.grad = torch.ones_like(p)
    for call in (opt.step, opt.accumulate):
        with pytest.raises(RuntimeError, match="used before"):
            call()
    assert torch.equal(p, after)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"delta": 0.0}, "delta=0.0; expected a number > 0"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"delta": 1.0, "beta2": 1.0}, r"beta2=1.0; expected a number in \[0, 1\)"),
        ({"delta": 1.0, "extension": DiagGGN(), "savefield": "x"}, "HesScaleStep: .* to DiagGGN"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        HesScaleStep(torch.optim.SGD(make_params(), lr=0.1), **options)


def test_wraps_nothing_but_optimizers():
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got \[\]"):
        HesScaleStep([], delta=1.0)
    with pytest.raises(TypeError, match="delta"):
        HesScaleStep(torch.optim.SGD(make_params(), lr=0.1))  # there is no default


def test_grad_scaler():
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    loss_fn = extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    twin = extend(copy.deepcopy(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    # The fused AdamW unscales by itself where it is not wrapped.
    opt = HesScaleStep(torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), delta=1e-3)
    plain = HesScaleStep(torch.optim.AdamW(twin.parameters(), lr=0.1), delta=1e-3)
    for k in range(3):
        opt.zero_grad()
        with backpack(*opt.extensions(), grad_scaler=scaler):
            scaler.scale(loss_fn(model(x), y)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        if k == 1:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
        if k == 1:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            continue
        plain.zero_grad()
        with backpack(*plain.extensions()):
            loss_fn(twin(x), y).backward()
        plain.step()
        torch.testing.assert_close(opt.factor, plain.factor, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
