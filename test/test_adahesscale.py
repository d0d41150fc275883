"""AdaHesScale against its formula, one number at a time; and what an optimizer has to bear."""

import copy
import io
import math
import pickle
import weakref

import pytest
import torch
from optimizers import make_data, make_params, run
from torch import nn

from backpack_ext import DiagGGN, HesScale, backpack, extend
from optim import AdaHesScale, CurvatureOptimizer
from optim.state import by_device_and_dtype


def reference(p, grads, diagonals, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.0, sign=1):
    """Return one number after a step for each of its gradients and second derivatives."""
    m = v = 0.0
    for t, (g, h) in enumerate(zip(grads, diagonals, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * sign * g
        v = beta2 * v + (1 - beta2) * h**2
        p = p - lr * decay * p - lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps)
    return p


def reference_tensor(p, grads, diagonals, **options):
    columns = [[x.double().flatten().tolist() for x in xs] for xs in (grads, diagonals)]
    numbers = [
        reference(x, [g[i] for g in columns[0]], [h[i] for h in columns[1]], **options)
        for i, x in enumerate(p.double().flatten().tolist())
    ]
    return torch.tensor(numbers, dtype=torch.float64).view(p.shape)


def put(p, g=1.0, h=1.0):
    p.grad, p.hesscale = torch.full_like(p, g), torch.full_like(p, h)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def problem():
    """Return an extended model and loss, data, and a function that runs a pass for an optimizer."""
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double())
    loss_fn = extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(2, (6,))

    def loss_of(opt, x=x, y=y, factor=1.0, **options):
        with backpack(*opt.extensions(), **options):
            loss = loss_fn(model(x), y) * factor
            loss.backward()
        return loss

    return model, loss_fn, x, y, loss_of


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-2},
        {"betas": (0.0, 0.0), "eps": 1e-3},
        {"lr": 0.1, "weight_decay": 0.3},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
def test_formula(options, tensor_lr, foreach):
    params = make_params()
    start = [p.detach().clone() for p in params]
    data = make_data(params, steps=4)
    lr = options.get("lr", 1e-3)
    betas = options.get("betas", (0.9, 0.999))
    given = {**options, "lr": torch.tensor([lr], dtype=torch.float64) if tensor_lr else lr}
    run(AdaHesScale(params, foreach=foreach, **given), params, data)
    for i, p in enumerate(params):
        expected = reference_tensor(
            start[i],
            [grads[i] for grads, _ in data],
            [diagonals[i] for _, diagonals in data],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=options.get("eps", 1e-8),
            decay=options.get("weight_decay", 0.0),
            sign=-1 if options.get("maximize") else 1,
        )
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_is_adamw_where_h_is_the_gradient():
    ours, theirs = make_params(), make_params()
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    a = AdaHesScale(ours, lr=0.1, weight_decay=0.2)
    b = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.2)
    for grads, _ in make_data(ours, 5):
        for p, q, g in zip(ours, theirs, grads, strict=True):
            p.grad, p.hesscale, q.grad = g.clone(), g.clone(), g.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_foreach_equals_loop(dtype, tensor_lr):
    one = make_params(dtype)
    all_ = [nn.Parameter(p.detach().clone()) for p in one]
    extra = [nn.Parameter(torch.ones(2)) for _ in range(2)]  # another dtype in the same group
    data = make_data(one, 3)
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    for params, other, foreach in ((one, extra[0], False), (all_, extra[1], True)):
        opt = AdaHesScale([*params, other], lr=lr, weight_decay=0.1, maximize=True, foreach=foreach)
        for i, (grads, diagonals) in enumerate(data):
            put(other, h=0.3)
            if i == 1:  # so that the numbers of steps differ within a group
                other.grad = None
            run(opt, params, [(grads, diagonals)])
    for p, q in zip([*one, extra[0]], [*all_, extra[1]], strict=True):
        assert torch.equal(p, q)


def test_groups_by_dtype():
    a, b, c = torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(2)
    groups = by_device_and_dtype([a, b, c], [1, 2, 3])
    assert [numbers for _, numbers in groups] == [[1, 3], [2]]


def test_param_groups_have_own_options():
    params = make_params(shapes=[(3,), (3,)])
    start = [p.detach().clone() for p in params]
    data = make_data(params, 3)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1}]
    run(AdaHesScale(groups, lr=0.1), params, data)
    own = [{"lr": 0.1}, {"lr": 0.3, "beta1": 0.5, "beta2": 0.6, "eps": 0.1}]
    for i, p in enumerate(params):
        expected = reference_tensor(start[i], [d[0][i] for d in data], [d[1][i] for d in data], **own[i])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_add_param_group():
    p, q = make_params(shapes=[(2,), (2,)])
    opt = AdaHesScale([p], lr=0.1)
    put(p)
    opt.step()
    opt.add_param_group({"params": [q], "lr": 1.0})
    put(p)
    put(q, g=2.0)
    before = q.detach().clone()
    opt.step()  # q's first step, p's second: each has its own bias correction
    torch.testing.assert_close(q.detach(), before - 2.0)
    assert [opt.state[t]["step"].item() for t in (p, q)] == [2, 1]


def test_skips_parameters_without_gradient():
    p, q = make_params(shapes=[(2,), (2,)])
    put(p)
    before = q.detach().clone()
    AdaHesScale([p, q]).step()
    assert torch.equal(q, before)


def test_no_gradient_at_all():
    AdaHesScale(make_params()).step()


def test_bfloat16_keeps_float32_state():
    params = make_params(torch.bfloat16)
    start = [p.detach().clone() for p in params]
    data = make_data(params, 60)
    opt = AdaHesScale(params, lr=1e-2)
    # The parameters are rounded at each step, m and v are not: compare these with the formula.
    run(opt, params, data)
    for i, p in enumerate(params):
        assert p.dtype == torch.bfloat16
        state = opt.state[p]
        m = v = torch.zeros(p.shape, dtype=torch.float64)
        for grads, diagonals in data:
            m = 0.9 * m + 0.1 * grads[i].double()
            v = 0.999 * v + 0.001 * diagonals[i].double() ** 2
        assert state["exp_avg"].dtype == state["exp_avg_hess_sq"].dtype == torch.float32
        torch.testing.assert_close(state["exp_avg"].double(), m, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state["exp_avg_hess_sq"].double(), v, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, start[i])


def test_bfloat16_is_rounded_once():
    """Decay and step are 0.4 spacings each: alone they would be rounded to nothing."""
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    put(p, g=1.0)
    AdaHesScale([p], lr=2**-8 * 0.4, weight_decay=1.0).step()
    assert p.item() == 1 - 2**-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file", [False, True])
def test_checkpoint_continues_exactly(dtype, file):
    params = make_params(dtype)
    opt = AdaHesScale(params, lr=0.1, weight_decay=0.1)
    data = make_data(params, 6)
    run(opt, params, data[:3])
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = AdaHesScale(others)
    state = opt.state_dict()
    if file:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer)  # its safe default
    other.load_state_dict(state)
    for p, q in zip(params, others, strict=True):
        for key, value in opt.state[p].items():
            assert torch.equal(value, other.state[q][key]) and value.dtype == other.state[q][key].dtype
    run(opt, params, data[3:])
    run(other, others, data[3:])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert opt.state[p]["step"] == other.state[q]["step"] == 6


def test_loading_respects_hooks():
    p, q = make_params(torch.bfloat16, shapes=[(2,), (2,)])
    opt, other = AdaHesScale([p]), AdaHesScale([q])
    put(p)
    opt.step()
    seen = []

    def half(_, state):
        entry = {**state["state"][0], "exp_avg": state["state"][0]["exp_avg"] / 3}
        return {**state, "state": {0: entry}}

    other.register_load_state_dict_pre_hook(half)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[q]["exp_avg"].clone()))
    other.load_state_dict(opt.state_dict())
    assert torch.equal(seen[0], opt.state[p]["exp_avg"] / 3) and seen[0].dtype == torch.float32
    assert torch.equal(seen[0], other.state[q]["exp_avg"])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(how):
    p = nn.Parameter(torch.ones(2))
    opt = AdaHesScale([p], gauss_newton=True)
    p.grad, p.hesscale_gn = torch.ones(2), torch.ones(2)
    opt.step()
    other = how(opt)
    (q,) = other.param_groups[0]["params"]
    q.grad, q.hesscale_gn = torch.ones(2), torch.ones(2)
    other.step()
    assert other.state[q]["step"] == 2 and opt.state[p]["step"] == 1
    with pytest.raises(RuntimeError, match="used before"):
        opt.step()  # the original remembers


def test_missing_diagonal():
    p, q = make_params(shapes=[(2,), (3, 1)])
    put(p)
    q.grad = torch.ones_like(q)
    before = p.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"parameter 1 of group 0, of shape \(3, 1\), .*no `hesscale`"
    ):
        AdaHesScale([p, q]).step()
    opt = AdaHesScale([("first", p), ("second", q)])
    with pytest.raises(RuntimeError, match=r"'second' .* `with backpack\(\*opt.extensions\(\)\):`"):
        opt.step()
    assert torch.equal(p, before)
    q.hesscale = torch.ones_like(q)  # nothing was used up by the attempt
    opt.step()
    assert not torch.equal(p, before)


def test_used_diagonal():
    (p,) = make_params(shapes=[(2,)])
    opt = AdaHesScale([p])
    put(p)
    opt.step()
    assert isinstance(p.hesscale, torch.Tensor)  # the user keeps it
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="used before and has not been computed anew"):
        opt.step()
    p.hesscale.mul_(2)  # written anew, in place
    opt.step()
    p.hesscale = p.hesscale.clone()
    opt.step()
    assert opt.state[p]["step"] == 3


@pytest.mark.parametrize(
    "h, error, match",
    [
        (torch.ones(3), ValueError, r"has shape \(3,\); expected that of the parameter, \(2,\)"),
        (torch.ones(5, 2), ValueError, r"shape \(5, 2\).*summed over the batch"),
        ([1.0, 2.0], TypeError, "real tensor .* got list"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "real tensor .* got torch.complex64"),
    ],
)
def test_wrong_diagonal(h, error, match):
    p = nn.Parameter(torch.ones(2))
    p.grad, p.hesscale = torch.ones(2), h
    opt = AdaHesScale([p])
    for call in (opt.step, opt.accumulate):
        with pytest.raises(error, match=match):
            call()


def test_complex_parameter():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad, p.hesscale = torch.ones_like(p), torch.ones(2)
    with pytest.raises(TypeError, match=r"for torch.complex64"):
        AdaHesScale([p]).step()


def test_sparse_gradient():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    embedding.weight.hesscale = torch.ones(5, 2)
    with pytest.raises(RuntimeError, match=r"'weight' has a sparse gradient.*sparse=False"):
        AdaHesScale(embedding).step()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"lr": -1.0}, "lr=-1.0; expected a number >= 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\); expected one element"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\); expected two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\)"),
        ({"extension": DiagGGN(), "savefield": "x"}, "Pass them to DiagGGN"),
        ({"extension": DiagGGN(), "gauss_newton": True}, "Pass them to DiagGGN"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        AdaHesScale(make_params(), **options)


def test_options_of_a_group_out_of_range():
    p, q = make_params(shapes=[(2,), (2,)])
    opt = AdaHesScale([p])
    with pytest.raises(ValueError, match="eps=-1"):
        opt.add_param_group({"params": [q], "eps": -1})
    assert len(opt.param_groups) == 1


def test_savefields():
    p = nn.Parameter(torch.ones(1))
    assert AdaHesScale([p]).extension.savefield == "hesscale"
    assert AdaHesScale([p], gauss_newton=True).extension.savefield == "hesscale_gn"
    assert AdaHesScale([p], savefield="h").extension.savefield == "h"
    (extension,) = AdaHesScale([p], gauss_newton=True).extensions()
    assert isinstance(extension, HesScale) and extension.gauss_newton
    p.grad, p.h, p.hesscale = torch.ones(1), torch.full((1,), 4.0), torch.full((1,), 2.0)
    AdaHesScale([p], lr=1.0, savefield="h").step()
    torch.testing.assert_close(p.data, torch.tensor([0.75]))


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_training_loop(problem, gauss_newton):
    model, *_, loss_of = problem
    opt = AdaHesScale(model, lr=0.1, gauss_newton=gauss_newton)
    assert isinstance(opt, CurvatureOptimizer)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        losses.append(loss_of(opt).item())
        opt.step()
    assert losses[-1] < 0.5 * losses[0]


def test_any_extension_with_diagonals(problem):
    model, *_, loss_of = problem
    opt = AdaHesScale(model, lr=0.1, extension=DiagGGN())
    first = loss_of(opt)
    opt.step()
    opt.zero_grad()
    assert loss_of(opt) < first


def test_backward_outside_of_the_block(problem):
    model, loss_fn, x, y, loss_of = problem
    opt = AdaHesScale(model)
    loss_fn(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' has a gradient but no `hesscale`"):
        opt.step()
    opt.zero_grad()
    loss_of(opt)
    opt.step()
    opt.zero_grad()
    loss_fn(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' was used before"):
        opt.step()


def test_closure(problem):
    model, *_, loss_of = problem
    twin = copy.deepcopy(model)
    opt = AdaHesScale(model, lr=0.1)

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        return loss_of(opt)

    first, second = opt.step(closure), opt.step(closure)
    assert second < first
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["last call left out", "last call made"])
def test_accumulation_over_parts_is_the_sum(problem, last):
    """Two halves, each a mean divided by two, are the whole: the same gradient, the same h."""
    model, _, x, y, loss_of = problem
    opt = AdaHesScale(model, lr=0.1)
    start = copy.deepcopy(model.state_dict())
    loss_of(opt)
    opt.step()
    expected = [p.detach().clone() for p in model.parameters()]
    averages = [opt.state[p]["exp_avg_hess_sq"].clone() for p in model.parameters()]

    model.load_state_dict(start)
    opt = AdaHesScale(model, lr=0.1)
    opt.zero_grad()
    for k, part in enumerate((slice(0, 3), slice(3, 6))):
        loss_of(opt, x[part], y[part], factor=0.5)
        if k == 0 or last:
            opt.accumulate()
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)  # writes to the gradients, by a factor of 1
    opt.step()
    for p, q, v in zip(model.parameters(), expected, averages, strict=True):
        torch.testing.assert_close(opt.state[p]["exp_avg_hess_sq"], v)
        torch.testing.assert_close(p.detach(), q)


def test_accumulation_by_hand():
    p = nn.Parameter(torch.zeros(1))
    opt = AdaHesScale([p], lr=1.0, betas=(0.0, 0.0), eps=0.0)
    parts = []
    for g, h in ((1.0, 2.0), (3.0, 5.0), (4.0, 9.0)):
        p.grad = torch.tensor([g]) if p.grad is None else p.grad.add_(g)
        p.hesscale = torch.tensor([h])
        parts.append(p.hesscale)
        opt.accumulate()
    opt.step()
    torch.testing.assert_close(p.data, torch.tensor([-8.0 / 16.0]))
    assert [h.item() for h in parts] == [2.0, 5.0, 9.0]  # the user's own tensors were not added to
    put(p, g=1.0, h=1.0)
    opt.step()  # and the sum is over
    torch.testing.assert_close(p.data, torch.tensor([-1.5]))


def test_accumulation_where_a_pass_reaches_only_some():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    opt = AdaHesScale([p, q], lr=1.0, betas=(0.0, 0.0), eps=0.0)
    put(p, g=1.0, h=2.0)
    opt.accumulate()
    put(q, g=1.0, h=8.0)  # reaches q, not p
    opt.accumulate()
    opt.step()
    torch.testing.assert_close(torch.cat([p.data, q.data]), torch.tensor([-0.5, -0.125]))


def test_accumulate_raises_outside_of_the_block():
    p = nn.Parameter(torch.zeros(1))
    opt = AdaHesScale([p])
    p.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="no `hesscale`"):
        opt.accumulate()
    p.hesscale = torch.ones(1)
    opt.accumulate()
    p.grad.add_(1.0)  # another pass, which left no new diagonal
    with pytest.raises(RuntimeError, match="used before"):
        opt.accumulate()


def test_zero_grad_forgets_what_was_accumulated():
    p = nn.Parameter(torch.zeros(1))
    opt = AdaHesScale([p], lr=1.0)
    put(p, h=100.0)
    opt.accumulate()
    opt.zero_grad()
    put(p, g=1.0, h=2.0)
    opt.step()
    torch.testing.assert_close(p.data, torch.tensor([-0.5]))


def test_used_diagonals_are_not_kept_alive():
    p = nn.Parameter(torch.zeros(1))
    opt = AdaHesScale([p])
    put(p)
    opt.step()
    old = weakref.ref(p.hesscale)
    del p.hesscale
    assert old() is None


def test_schedulers(problem):
    model, *_, loss_of = problem
    for lr in (0.4, torch.tensor(0.4)):
        opt = AdaHesScale(model, lr=lr)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
        for expected in (0.4, 0.2, 0.1):
            before = model[0].weight.detach().clone()
            opt.zero_grad()
            loss_of(opt)
            opt.step()
            state = opt.state[model[0].weight]
            t = state["step"].item()
            u = state["exp_avg"] / (1 - 0.9**t)
            u = u / ((state["exp_avg_hess_sq"] / (1 - 0.999**t)).sqrt() + 1e-8)
            torch.testing.assert_close(
                model[0].weight.detach(), before - expected * u, rtol=1e-5, atol=1e-8
            )
            scheduler.step()


def test_grad_scaler():
    """The factor is out of the gradient and of h; a gradient that is not finite skips the step."""
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    loss_fn = extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    twin = extend(copy.deepcopy(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opt, plain = AdaHesScale(model, lr=0.1), AdaHesScale(twin, lr=0.1)
    for k in range(4):
        opt.zero_grad()
        with backpack(*opt.extensions(), grad_scaler=scaler):
            scaler.scale(loss_fn(model(x), y)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        if k == 2:
            model[0].weight.grad[0, 0] = float("inf")
        if k % 2:
            scaler.unscale_(opt)  # either way of unscaling
        scaler.step(opt)
        scaler.update()
        if k == 2:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            assert scaler.get_scale() == 2.0**9
            continue
        plain.zero_grad()
        with backpack(*plain.extensions()):
            loss_fn(twin(x), y).backward()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert all(opt.state[p]["step"] == 3 for p in model.parameters())


def test_step_hooks():
    p = nn.Parameter(torch.zeros(1))
    opt, calls = AdaHesScale([p]), []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    put(p)
    opt.step()
    assert calls == ["before", "after"]
