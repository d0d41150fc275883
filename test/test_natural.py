"""What an optimizer has to bear, tried with all natural-gradient optimizers."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from natural_cases import (
    CASES,
    MANY_STRUCTURES,
    RULES,
    Case,
    backward,
    check,
    compare,
    factor_names,
    mlp,
    same,
    train,
    twins,
    vectors,
)
from natural_oracle import Natural, Options, factors, singd_refresh
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import optim
from backpack_ext import backpack, extend
from optim import IKFAC, INGD, KFAC, SINGD, CurvatureOptimizer

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*extend"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),
]

KINDS = [SINGD, INGD, IKFAC, KFAC]
every_kind = pytest.mark.parametrize("kind", KINDS)


def fast(kind: type, **more) -> dict:
    """Return options with which much happens in a step."""
    own = {"damping": 0.1} if kind is KFAC else {"lr_cov": 0.1}
    return {"lr": 0.02, "interval": 1, **own, **more}


def state_of(opt) -> dict:
    """Return a copy of the state of all parameters."""
    return copy.deepcopy(opt.state_dict()["state"])


def pickled(x):
    return pickle.loads(pickle.dumps(x))


def saved(x):
    """`torch.save` and `torch.load`, the latter with what it holds to be safe."""
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -- layers that stand still, or come and go -------------------------------------------------------


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "0", "2.weight", "2.bias"])
@every_kind
def test_frozen_parameters(kind, frozen):
    """A weight without bias has factors of its own; a bias without weight goes to the fallback."""
    before = []

    def prepare(model):
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
            before.append((name, p.detach().clone()))

    model, *_ = compare(kind, "mlp", 3, [4], prepare=prepare, weight_decay=0.1, **fast(kind))
    for (name, old), p in zip(before, model.parameters(), strict=True):
        assert torch.equal(p, old) == name.startswith(frozen)


@every_kind
def test_frozen_on_the_way(kind):
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt = kind(extend(model), **fast(kind))
    train(case, model, opt, [case.parts([4])])
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    train(case, model, opt, [case.parts([4]) for _ in range(2)])
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]
    model[0].requires_grad_(True)
    train(case, model, opt, [case.parts([4])])
    assert not torch.equal(model[0].weight, before[0])


class Switch(nn.Module):
    """A network whose second layer is not always used."""

    def __init__(self):
        super().__init__()
        self.first, self.maybe, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.use = True

    def forward(self, x):
        x = self.first(x).tanh()
        x = self.maybe(x).tanh() if self.use else x
        return self.last(x)


@pytest.mark.parametrize("zero", [False, True], ids=["gradient None", "gradient zero"])
@every_kind
def test_layers_that_are_not_always_used(kind, zero):
    """Such a layer stays as it is, its factors too; the next time it goes on."""
    case = Case(Switch, vectors(4))
    model = case.model()
    opt, oracle = twins(kind, model, case, fast(kind, weight_decay=0.1))
    for use in (True, False, True, False):
        model.use = oracle.model.use = use
        before = copy.deepcopy(model.maybe.state_dict())
        parts = case.parts([4])
        opt.zero_grad(set_to_none=not zero)
        backward(case, model, opt, parts, case.loss_fn())
        opt.step()
        if zero and not use:  # as in torch, a gradient of zero is one: weight decay and momentum act
            assert model.maybe.weight.grad is not None and not model.maybe.weight.grad.any()
            assert not same(before, dict(model.maybe.state_dict()))
            for name in factor_names(oracle, "maybe"):
                found = opt.factors(model.maybe.weight)[name].to_dense()
                torch.testing.assert_close(found, oracle.layers["maybe"].state[name])
            return
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)
        assert same(before, dict(model.maybe.state_dict())) != use


@every_kind
def test_layers_used_several_times(kind):
    compare(kind, "twice", 3, [3], reduction="sum", approx="expand", **fast(kind, lr=0.005))


# -- several backward passes -----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(3, 3), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@every_kind
def test_accumulated_passes_are_one_batch(kind, approx, sizes, reduction):
    """Equal parts or not; the oracle sees the batch as a whole. Statistics and gradients alike."""
    for case in ("pooled", "conv") if approx == "expand" else ("tokens",):
        options = fast(kind, approx=approx, lr=0.005)
        compare(kind, case, 3, sizes, reduction, **options)


@every_kind
def test_one_block_around_all_passes(kind):
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(kind, model, case, fast(kind))
    loss_fn = case.loss_fn()
    for _ in range(2):
        parts = case.parts([2, 3, 1])
        opt.zero_grad()
        with backpack(*opt.extensions()):
            for x, y, c in parts:
                (c * loss_fn(model(x), y)).backward()
        opt.step()
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)


@every_kind
def test_passes_that_reach_only_some_layers(kind):
    """Two losses, one of which does not see the layer that is not always used."""
    case = Case(Switch, vectors(4))
    model = case.model()
    opt = kind(extend(model), **fast(kind))
    loss_fn = case.loss_fn()
    parts = case.parts([3, 3])
    opt.zero_grad()
    for use, part in zip((True, False), parts, strict=True):
        model.use = use
        backward(case, model, opt, [part], loss_fn)
    before = copy.deepcopy(model.state_dict())
    opt.step()
    # the layer's statistics are those of the pass that reached it
    twin = case.model()
    twin.load_state_dict(before)
    A, B = factors(twin, case.total, case.scaled(parts[:1]), "reduce", lambda _: True)["maybe"]
    found = {name: M.to_dense() for name, M in opt.factors(model.maybe.weight).items()}
    if kind is KFAC:
        torch.testing.assert_close(found["A"], A)
        torch.testing.assert_close(found["B"], B)
    else:
        eye = torch.eye(6), torch.eye(5)
        state = {"K": eye[0][None], "C": eye[1][None], "m_K": 0 * eye[0], "m_C": 0 * eye[1]}
        options = Options(alpha1=0.5 if kind is not IKFAC else 0.0)
        singd_refresh(state, A, B, options, 0.1, RULES[kind])
        torch.testing.assert_close(found["K"], state["K"])
        torch.testing.assert_close(found["C"], state["C"])


@every_kind
def test_zero_grad_forgets_statistics(kind):
    """A batch that was thrown away is in neither."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(kind, model, case, fast(kind))
    opt.zero_grad()
    backward(case, model, opt, case.parts([5]), case.loss_fn())
    parts = case.parts([4])
    train(case, model, opt, [parts])
    oracle.step(case.scaled(parts))
    check(model, opt, oracle)


@every_kind
def test_closure(kind):
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(kind, model, case, fast(kind, interval=2))
    loss_fn = case.loss_fn()
    for _ in range(4):
        ((x, y, _),) = parts = case.parts([5])

        def closure(x=x, y=y):
            assert torch.is_grad_enabled()
            opt.zero_grad()
            with backpack(*opt.extensions()):
                loss = loss_fn(model(x), y)
                loss.backward()
            return loss

        with torch.no_grad():
            expected = loss_fn(model(x), y)
        torch.testing.assert_close(opt.step(closure).detach(), expected)
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)


# -- mixed precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05, 1e9], ids="clip {}".format)
@pytest.mark.parametrize("unscale", [False, True])
@every_kind
def test_grad_scaler(kind, unscale, clip):
    """The scale is in neither gradient nor statistics, also when the gradient is unscaled early."""
    if clip and not unscale:
        pytest.skip("clipping needs the gradient unscaled")
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(kind, model, case, fast(kind, interval=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    loss_fn, scales = case.loss_fn(), []
    for _ in range(4):
        parts = case.parts([2, 4])
        opt.zero_grad()
        backward_scaled(case, model, opt, parts, loss_fn, scaler)
        if unscale:
            scaler.unscale_(opt)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        oracle.step(case.scaled(parts), clip=clip)
        check(model, opt, oracle)
    assert len(set(scales)) > 1


@pytest.mark.parametrize("unscale", [False, True])
@every_kind
def test_grad_scaler_skips(kind, unscale):
    """A gradient that is not finite: nothing changes, the scale falls, and the batch is forgotten."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(kind, model, case, fast(kind, interval=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss_fn = case.loss_fn()
    for t in range(4):
        parts = case.parts([5])
        opt.zero_grad()
        backward_scaled(case, model, opt, parts, loss_fn, scaler)
        before = [p.detach().clone() for p in model.parameters()], state_of(opt)
        if t in (0, 3):
            model[2].bias.grad[1] = float("inf")
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if t in (0, 3):
            assert same(before, ([p.detach() for p in model.parameters()], state_of(opt)))
            assert scaler.get_scale() == (2.0**9 if t == 0 else 2.0**8)
        else:
            oracle.step(case.scaled(parts))
            check(model, opt, oracle)


def backward_scaled(case, model, opt, parts, loss_fn, scaler):
    for x, y, c in parts:
        with backpack(*opt.extensions(), grad_scaler=scaler):
            scaler.scale(c * loss_fn(*case.flat(model(x), y))).backward()


@every_kind
def test_autocast(kind):
    """Half-precision passes of a float32 network: factors and weights in float32, and close."""
    case, model = CASES["conv"], CASES["conv"].model()
    opt, oracle = twins(kind, model, case, fast(kind, lr=0.01))
    model.float()
    loss_fn = case.loss_fn()
    start = [p.detach().double().clone() for p in model.parameters()]
    for _ in range(3):
        parts = case.parts([6])
        opt.zero_grad()
        for x, y, _ in parts:
            with backpack(*opt.extensions()):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_fn(model(x.float()), y)
                loss.backward()
        opt.step()
        oracle.step(case.scaled(parts))
    assert opt.skipped == 0
    for M in opt.factors(model[0].weight).values():
        assert M.dtype == torch.float32
    for p, q, old in zip(model.parameters(), oracle.model.parameters(), start, strict=True):
        assert p.dtype == torch.float32
        error, moved = (p.double() - q).norm(), (q - old).norm()
        assert error < 0.05 * moved


@every_kind
def test_bfloat16_networks(kind):
    """Weights in bfloat16 follow the float64 ones; the factors are float32."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(kind, model, case, fast(kind, lr=0.05))
    model.bfloat16()
    start = [p.detach().double().clone() for p in oracle.model.parameters()]
    for _ in range(4):
        ((x, y, c),) = parts = case.parts([6])
        train(case, model, opt, [[(x.bfloat16(), y, c)]])
        oracle.step(case.scaled(parts))
    assert opt.skipped == 0
    for M in opt.factors(model[0].weight).values():
        assert M.dtype == torch.float32
    for p, q, old in zip(model.parameters(), oracle.model.parameters(), start, strict=True):
        assert p.dtype == torch.bfloat16
        assert (p.double() - q).norm() < 0.1 * (q - old).norm() + 0.01 * q.norm()


@every_kind
def test_dtype_of_factors(kind):
    case, model = CASES["mlp"], CASES["mlp"].model()
    models = [model, copy.deepcopy(model)]
    parts = case.parts([5])
    for m, dtype in zip(models, (None, torch.float32), strict=True):
        opt = kind(extend(m), factor_dtype=dtype, **fast(kind))
        train(case, m, opt, [parts])
        for M in opt.factors(m[0].weight).values():
            assert M.dtype == (dtype or torch.float64)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert p.dtype == q.dtype == torch.float64
        assert not torch.equal(p, q)
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# -- steps that are not taken ----------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("when", [0, 1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_kind
def test_steps_with_gradients_that_are_not_finite_are_skipped(kind, value, when, interval):
    """Weights and state stay bitwise, and a refresh that was due is still due."""
    case, model = CASES["tokens"], CASES["tokens"].model()
    opt = kind(extend(model), **fast(kind, interval=interval, weight_decay=0.1))
    steps = [case.parts([3]) for _ in range(4)]
    train(case, model, opt, steps[:when])
    opt.zero_grad()
    due = len(opt.extensions()) > 0
    backward(case, model, opt, steps[when], case.loss_fn())
    model[0].weight.grad[1, 2] = value
    before = [p.detach().clone() for p in model.parameters()], state_of(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    assert same(before, ([p.detach() for p in model.parameters()], state_of(opt)))
    assert opt.skipped == 1
    assert not due or len(opt.extensions()) > 0
    train(case, model, opt, steps[when:])
    assert opt.skipped == 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(map(torch.equal, before[0], [p.detach() for p in model.parameters()]))


@every_kind
def test_steps_with_statistics_that_are_not_finite_are_skipped(kind):
    """Finite gradients, but A overflows in float32."""
    case = CASES["mlp"]
    model = case.model().float()
    opt = kind(extend(model), **fast(kind))
    good = [[(x.float(), y, c) for x, y, c in case.parts([4])] for _ in range(2)]
    train(case, model, opt, good[:1])
    bad = [(1e21 * good[0][0][0], good[0][0][1], 1.0)]
    opt.zero_grad()
    backward(case, model, opt, bad, case.loss_fn())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()], state_of(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    assert same(before, ([p.detach() for p in model.parameters()], state_of(opt)))
    assert opt.skipped == 1
    train(case, model, opt, good[1:])
    assert opt.skipped == 1 and not torch.equal(model[0].weight, before[0][0])


# -- checkpoints and copies ------------------------------------------------------------------------

VARIANTS = {
    "SINGD": (SINGD, {"structure": ("lower-triangular", "upper-toeplitz"), "lr_cov": 0.1}),
    "SINGD-mc": (SINGD, {"fisher": "mc", "structure": ("hierarchical", {"k1": 1, "k2": 1})}),
    "INGD": (INGD, {"lr_cov": 0.1, "normalize": True}),
    "IKFAC": (IKFAC, {"structure": "diagonal", "weight_decay": 0.1}),
    "IKFAC-mc": (IKFAC, {"fisher": "mc", "mc_samples": 2}),
    "KFAC": (KFAC, {"damping": 0.1, "kl_clip": 1e-3}),
    "KFAC-exact": (KFAC, {"inverse": "exact", "fisher": "mc", "inverse_interval": 6}),
    "KFAC-diagonal": (KFAC, {"structure": "diagonal"}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def make(variant: tuple, model: nn.Module, **more):
    kind, options = variant
    return kind(extend(model), **{"lr": 0.02, "interval": 3, **options, **more})


def trained(variant: tuple, count: int, case: str = "tokens") -> tuple:
    """Return a case, its model, an optimizer that has taken steps, and 5 more steps."""
    case = CASES[case]
    model = case.model()
    opt = make(variant, model)
    train(case, model, opt, [case.parts([3]) for _ in range(count)])
    return case, model, opt, [case.parts([3]) for _ in range(5)]


@pytest.mark.parametrize("count", [2, 3])
@every_variant
def test_checkpoints_continue_bitwise(variant, count):
    """In the middle of an interval, or where a refresh is due."""
    case, model, opt, rest = trained(variant, count)
    state = saved({"model": model.state_dict(), "opt": opt.state_dict()})
    train(case, model, opt, rest)
    other = case.model()
    again = make(variant, other)
    other.load_state_dict(state["model"])
    again.load_state_dict(state["opt"])
    train(case, other, again, rest)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(opt.state_dict()["state"], again.state_dict()["state"])
    # it has to matter
    bare = make(variant, fresh := case.model())
    fresh.load_state_dict(state["model"])
    train(case, fresh, bare, rest)
    assert not same(dict(model.state_dict()), dict(fresh.state_dict()))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("files", [False, True], ids=["torch.save", "dcp"])
@every_variant
def test_checkpoints_by_names_into_something_fresh(variant, files, flat, tmp_path):
    """``torch.distributed.checkpoint``, as torch recommends it: what is new says what it holds."""
    case, model, opt, rest = trained(variant, 2)
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt, options=how)}
    if files:
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    else:
        state = saved(state)
    train(case, model, opt, rest)
    other = case.model()
    again = make(variant, other)
    if files:
        state = {"model": other.state_dict(), "opt": get_optimizer_state_dict(other, again, options=how)}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, again, state["opt"], options=how)
    train(case, other, again, rest)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if files:  # which may change the order of a matrix in memory, and so how products round
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
        else:
            assert torch.equal(p, q)


@every_variant
def test_checkpoints_are_no_views_of_the_optimizer(variant):
    """Training on does not change a dictionary that was loaded, nor the optimizer it came from."""
    case, _, opt, rest = trained(variant, 3)
    other = case.model()
    again = make(variant, other)
    again.load_state_dict(opt.state_dict())
    before = state_of(opt)
    train(case, other, again, rest)
    assert same(before, opt.state_dict()["state"])


@pytest.mark.parametrize("how", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@every_variant
def test_copies(variant, how):
    case, model, opt, rest = trained(variant, 2)
    other, again = how((model, opt))
    before = state_of(opt)
    train(case, other, again, rest)
    assert same(before, opt.state_dict()["state"])
    train(case, model, opt, rest)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(opt.state_dict()["state"], again.state_dict()["state"])


@every_kind
def test_checkpoints_across_dtypes(kind):
    """Factors do not pass through the weights' bfloat16, and widen with the network."""
    case = CASES["mlp"]
    model = case.model().float()
    opt = kind(extend(model), **fast(kind))
    steps = [[(x.float(), y, c) for x, y, c in case.parts([4])] for _ in range(3)]
    train(case, model, opt, steps[:2])
    state = saved(opt.state_dict())
    expected = {k: M.to_dense().clone() for k, M in opt.factors(model[0].weight).items()}
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        other = copy.deepcopy(model).to(dtype)
        again = kind(other, **fast(kind))
        again.load_state_dict(copy.deepcopy(state))
        for name, M in again.factors(other[0].weight).items():
            assert M.dtype == wide
            assert torch.equal(M.to_dense(), expected[name].to(wide))
        train(case, other, again, [[(x.to(dtype), y, c) for x, y, c in steps[2]]])
        assert all(p.isfinite().all() and p.dtype == dtype for p in other.parameters())


@every_kind
def test_moving_the_network_on_the_way(kind):
    """``model.double()`` under a running optimizer, as with any of torch's."""
    case = CASES["mlp"]
    model = case.model().float()
    opt = kind(extend(model), **fast(kind))
    train(case, model, opt, [[(x.float(), y, c) for x, y, c in case.parts([4])]])
    model.double()
    train(case, model, opt, [case.parts([4])])
    assert all(p.isfinite().all() and p.dtype == torch.float64 for p in model.parameters())


MISFITS = {
    "another structure": (SINGD, {"structure": "dense"}, SINGD, {"structure": "diagonal"}, mlp, mlp),
    "another optimizer": (SINGD, {}, KFAC, {}, mlp, mlp),
    "the other way round": (KFAC, {}, IKFAC, {}, mlp, mlp),
    "other options of a structure": (
        SINGD,
        {"structure": ("block-diagonal", {"block": 2})},
        SINGD,
        {"structure": ("block-diagonal", {"block": 3})},
        mlp,
        mlp,
    ),
    "other layers": (
        IKFAC,
        {},
        IKFAC,
        {},
        mlp,
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
    ),
    "other parameters": (SINGD, {}, SINGD, {}, mlp, lambda: nn.Linear(4, 3)),
    "biases not joined": (SINGD, {}, SINGD, {"joint_bias": False}, mlp, mlp),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS.keys())
def test_checkpoints_that_do_not_fit(misfit):
    """An error, which leaves the optimizer as it was."""
    kind, options, other_kind, others, model, other_model = misfit
    case = CASES["mlp"]
    m, o = model(), other_model()
    opt, other = kind(extend(m), **options), other_kind(extend(o), **others)
    train(case, m, opt, [case.parts([4])])
    train(case, o, other, [case.parts([4])])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError):
        other.load_state_dict(opt.state_dict())
    after = other.state_dict()
    assert same(before["state"], after["state"]) and same(before["param_groups"], after["param_groups"])
    train(case, o, other, [case.parts([4])])


# -- the rest of torch's interface -----------------------------------------------------------------


@every_kind
def test_hooks(kind):
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, calls = kind(extend(model), **fast(kind)), []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    opt.register_state_dict_post_hook(lambda o, d: calls.append("saved"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    train(case, model, opt, [case.parts([4])])
    opt.load_state_dict(opt.state_dict())
    assert calls == ["before", "after", "saved", "loaded"]


@every_kind
def test_schedulers(kind):
    """Also one that changes the momentum, and after a checkpoint."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(kind, model, case, fast(kind))
    cycle = torch.optim.lr_scheduler.CyclicLR(
        opt, base_lr=0.01, max_lr=0.05, step_size_up=2, base_momentum=0.5, max_momentum=0.9
    )
    seen = []
    for _ in range(5):
        seen.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
        for o in oracle.options.values():
            o.lr, o.momentum = seen[-1]
        parts = case.parts([4])
        train(case, model, opt, [parts])
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)
        cycle.step()
    assert len(set(seen)) > 2


@every_kind
def test_add_param_group(kind):
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt = kind(extend(model)[0].parameters(), **fast(kind))
    train(case, model, opt, [case.parts([4])])
    before = model[2].weight.detach().clone()
    with pytest.raises(ValueError, match="lr"):
        opt.add_param_group({"params": list(model[2].parameters()), "lr": -1.0})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    train(case, model, opt, [case.parts([4])])
    assert not torch.equal(model[2].weight, before)
    assert opt.param_groups[1]["lr"] == 0.5
    assert opt.factors(model[2].weight)


@every_kind
def test_a_subset_of_the_parameters(kind):
    """The others do not move."""
    case, model = CASES["conv"], CASES["conv"].model()
    opt = kind(extend(model)[5].parameters(), **fast(kind))
    before = copy.deepcopy(model.state_dict())
    train(case, model, opt, [case.parts([4]) for _ in range(2)])
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {"5.weight", "5.bias"}


@every_kind
def test_it_is_an_optimizer(kind):
    model = extend(mlp())
    opt = kind(model)
    assert isinstance(opt, torch.optim.Optimizer) and isinstance(opt, CurvatureOptimizer)
    assert opt.param_groups[0]["lr"] == 1e-3 and opt.param_groups[0]["momentum"] == 0.9
    assert opt.skipped == 0
    assert kind.__name__ in repr(opt)


@pytest.mark.filterwarnings("default")
@every_kind
def test_models_are_extended(kind):
    """A model that is not extended is, and that is said."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    with pytest.warns(UserWarning, match="extend"):
        opt = kind(model, **fast(kind))
    before = model[0].weight.detach().clone()
    train(case, model, opt, [case.parts([4])])
    assert opt.factors(model[0].weight) and not torch.equal(model[0].weight, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(extend(mlp()))


@every_kind
def test_loss_falls(kind):
    case, model = CASES["conv"], CASES["conv"].model()
    opt = kind(extend(model), **fast(kind, lr=0.05))
    ((x, y, _),) = parts = case.parts([12])
    first = case.total(model(x), y).item()
    train(case, model, opt, [parts] * 40)
    assert case.total(model(x), y).item() < 0.5 * first


# -- number of terms of the loss -------------------------------------------------------------------


@every_kind
def test_terms_of_a_loss_that_is_not_extended(kind):
    """They can be given: then any function is a loss."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(kind, model, case, fast(kind))
    opt = kind(model, loss_terms=5, **fast(kind))
    for _ in range(3):
        ((x, y, _),) = parts = case.parts([5])
        opt.zero_grad()
        with backpack(*opt.extensions()):
            torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)


@every_kind
def test_given_terms_are_those_of_all_passes_of_a_step(kind):
    """Two parts of a mean over 5 terms; a scaler's factor is out of them."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    _, oracle = twins(kind, model, case, fast(kind))
    opt = kind(model, loss_terms=5, **fast(kind))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        parts = case.parts([2, 3])
        opt.zero_grad()
        backward_scaled(case, model, opt, parts, torch.nn.functional.cross_entropy, scaler)
        scaler.step(opt)
        scaler.update()
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)


@every_kind
def test_given_terms_count_more_than_those_of_an_extended_loss(kind):
    case, model = CASES["mlp"], CASES["mlp"].model()
    models = [model, copy.deepcopy(model)]
    parts, Bs = case.parts([5]), []
    for m, terms in zip(models, (None, 15), strict=True):
        opt = kind(extend(m), loss_terms=terms, **fast(kind, lr=0.0))
        train(case, m, opt, [parts])
        M = opt.factors(m[2].weight)["B" if kind is KFAC else "C"].to_dense()
        Bs.append(M)
    if kind is KFAC:
        torch.testing.assert_close(Bs[1], 3 * Bs[0])
    else:
        assert not torch.allclose(*Bs)


@every_kind
def test_a_loss_that_is_not_extended(kind):
    """Its number of terms is unknown: an error that says what to do."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt = kind(extend(model), **fast(kind))
    ((x, y, _),) = case.parts([5])
    with pytest.raises(RuntimeError, match=r"extend|loss_terms"):
        with backpack(*opt.extensions()):
            torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.step()


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
@every_kind
def test_a_refresh_without_statistics(kind, steps):
    """The backward pass ran outside of the block. Between refreshes that is as it should be."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt = kind(extend(model), **fast(kind, interval=3))
    loss_fn = case.loss_fn()
    ((x, y, _),) = parts = case.parts([5])
    train(case, model, opt, [parts] * min(steps, 1))
    for _ in range(1, steps):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
    before = [p.detach().clone() for p in model.parameters()], state_of(opt)
    opt.zero_grad()
    loss_fn(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"backpack\(\*opt\.extensions\(\)\)"):
        opt.step()
    assert same(before, ([p.detach() for p in model.parameters()], state_of(opt)))
    train(case, model, opt, [parts])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"momentum": -0.1},
        {"damping": -1e-3},
        {"damping": float("nan")},
        {"weight_decay": -1.0},
        {"interval": 0},
        {"interval": -2},
        {"approx": "both"},
        {"fisher": "none"},
        {"mc_samples": 0},
        {"placement": "nowhere"},
        {"fallback": "adamax2"},
        {"fallback_lr": -1.0},
        {"loss_terms": 0},
        {"factor_dtype": torch.int64},
    ],
    ids=str,
)
@every_kind
def test_options_out_of_range(kind, options):
    ((name, _),) = options.items()
    with pytest.raises((ValueError, TypeError), match=name):
        kind(extend(mlp()), **options)


@pytest.mark.parametrize(
    "kind, options",
    [
        (SINGD, {"alpha1": -0.5}),
        (SINGD, {"alpha1": float("nan")}),
        (SINGD, {"lr_cov": -0.1}),
        (INGD, {"lr_cov": float("inf")}),
        (IKFAC, {"lr_cov": -0.1}),
        (KFAC, {"decay": 1.5}),
        (KFAC, {"decay": -0.1}),
        (KFAC, {"kl_clip": -1.0}),
        (KFAC, {"inverse": "cholesky"}),
        (KFAC, {"inverse_interval": 0}),
    ],
    ids=str,
)
def test_own_options_out_of_range(kind, options):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=name):
        kind(extend(mlp()), **options)


@pytest.mark.parametrize("kind", [SINGD, IKFAC])
def test_unknown_structures(kind):
    """Known ones are listed."""
    for structure in ("banded", ("diagonal", "banded"), ("banded", {"k": 2})):
        with pytest.raises(ValueError, match=r"banded.*") as error:
            kind(extend(mlp()), structure=structure)
        for known in MANY_STRUCTURES:
            assert (known if isinstance(known, str) else known[0]) in str(error.value)
    with pytest.raises((ValueError, TypeError), match="block"):
        kind(extend(mlp()), structure=("block-diagonal", {"width": 2}))
    with pytest.raises((ValueError, TypeError), match="k1"):
        kind(extend(mlp()), structure=("hierarchical", {"k1": -2, "k2": 1}))


def test_structures_without_kfac():
    """Only those whose inverses stay in the structure."""
    for structure in ("lower-triangular", "upper-toeplitz", ("hierarchical", {"k1": 1, "k2": 1})):
        with pytest.raises(ValueError, match="block-diagonal"):
            KFAC(extend(mlp()), structure=structure)


@every_kind
def test_no_parameters(kind):
    with pytest.raises(ValueError):
        kind([])


@pytest.mark.parametrize("kind", [SINGD, KFAC])
def test_weight_and_bias_in_two_groups(kind):
    """Weights decay, biases do not: one matrix, whose last column moves by its own options."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    options = Options(**fast_options(kind), weight_decay=0.3)
    options.bias = {"weight_decay": 0.0, "lr": 0.5, "momentum": 0.2}
    oracle = Natural(copy.deepcopy(model), case.total, RULES[kind], options)
    extend(model)
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.3},
        {"params": [model[0].bias, model[2].bias], **options.bias},
    ]
    opt = kind(groups, **fast(kind))
    for _ in range(3):
        parts = case.parts([4])
        train(case, model, opt, [parts])
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)


def fast_options(kind):
    return {k: v for k, v in fast(kind).items() if k != "interval"}


def test_biases_in_a_group_of_the_fallback():
    """They are not joined: K has no row for them."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(SINGD, model, case, fast(SINGD, joint_bias=False))
    groups = [
        {"params": [model[0].weight, model[2].weight]},
        {"params": [model[0].bias, model[2].bias], "structure": None},
    ]
    opt = SINGD(groups, **fast(SINGD))
    for _ in range(3):
        parts = case.parts([4])
        train(case, model, opt, [parts])
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)
    assert opt.factors(model[0].weight)["K"].dim == 4


def test_memory_formats():
    """Convolutions whose channels come last in memory."""
    for kind in (SINGD, KFAC):
        compare(
            kind,
            "conv",
            3,
            [3],
            prepare=lambda model: model.to(memory_format=torch.channels_last),
            **fast(kind),
        )


@every_kind
def test_gradients_cleared_by_the_model(kind):
    """``model.zero_grad()`` in place of the optimizer's: a step uses up its statistics."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt, oracle = twins(kind, model, case, fast(kind))
    for _ in range(3):
        parts = case.parts([4])
        model.zero_grad()
        backward(case, model, opt, parts, case.loss_fn())
        opt.step()
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)


@every_kind
def test_stochastic_rounding(kind):
    """Steps below half a spacing of bfloat16 are lost, unless they are rounded at random."""
    case, model = CASES["mlp"], CASES["mlp"].model().bfloat16()
    nn.init.ones_(model[2].weight)
    start = copy.deepcopy(model.state_dict())
    ((x, y, c),) = case.parts([6])
    own = {"damping": 1.0} if kind is KFAC else {"lr_cov": 1e-3}
    options = {"lr": 2e-3, "momentum": 0.0, "interval": 1, **own}
    moved = {}
    for rounding in (False, True, None):
        dtype = torch.float64 if rounding is None else torch.bfloat16
        m = copy.deepcopy(model).to(dtype)
        if rounding is not None:
            options["stochastic_rounding"] = rounding
        opt = kind(extend(m), **options)
        train(case, m, opt, [[(x.to(dtype), y, c)]] * 40)
        moved[rounding] = m[2].weight.detach().double() - start["2.weight"].double()
    assert not moved[False].any()
    # sums of steps that are 0 or a spacing, of 2^-7 at most, with the right mean
    deviation = (2**-7 * moved[None].abs().sum()).sqrt()
    assert moved[True].any()
    assert (moved[True] - moved[None]).sum().abs() < 3 * deviation
    assert (moved[True] - moved[None]).abs().mean() < 3 * (2**-7 * moved[None].abs().mean()).sqrt()


# ---------------------------------------------------------------------- what reviews found


def small(seed: int = 0) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return extend(model), extend(nn.CrossEntropyLoss()), torch.randn(8, 4), torch.randint(3, (8,))


def take_steps(opt, model, loss_fn, x, y, count: int, factor: float = 1.0) -> None:
    for _ in range(count):
        opt.zero_grad()
        with backpack(*opt.extensions()):
            (factor * loss_fn(model(x), y)).backward()
        opt.step()


def test_parameters_of_a_model_that_was_not_extended():
    _, loss_fn, x, y = small()
    model = nn.Linear(4, 3)
    opt = optim.SINGD(model.parameters())
    with pytest.raises(RuntimeError, match="met no layer of an extended model"):
        take_steps(opt, model, loss_fn, x, y, 1)


@pytest.mark.parametrize("name", ["SINGD", "IKFAC"])
def test_a_refresh_that_diverges_is_left_out(name):
    model, loss_fn, x, y = small()
    opt = getattr(optim, name)(model, lr=0.0, lr_cov=1e200, interval=1)
    with pytest.warns(UserWarning, match="diverged"):
        take_steps(opt, model, loss_fn, 100 * x, y, 2)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(opt.factors(model[0].weight)["K"].to_dense(), torch.eye(5)[None])


def test_a_forgotten_scaler_is_named():
    model, loss_fn, x, y = small()
    opt = optim.SINGD(model, lr=0.0)
    with pytest.warns(UserWarning, match="grad_scaler=scaler"):
        take_steps(opt, model, loss_fn, x, y, 1, factor=2.0**16)


def one(count: int) -> float:
    return 0.1


def test_functions_of_the_step_size_do_not_turn_into_numbers():
    model, *_ = small()
    one_of_each = optim.SINGD(model, lr_cov=one), optim.SINGD(model, lr_cov=0.1)
    for opt, other in (one_of_each, one_of_each[::-1]):
        with pytest.raises(ValueError, match="lr_cov"):
            opt.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="lr_cov=None"):
        optim.SINGD(model, lr_cov=None)


def test_options_of_the_whole_optimizer_are_none_of_a_group():
    model, *_ = small()
    with pytest.raises(ValueError, match="'interval' in a parameter group"):
        optim.SINGD([{"params": model.parameters(), "interval": 3}])


class Tied(nn.Module):
    """A table that is also the head, in a way that only a backward pass shows."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        return nn.functional.linear(self.mix(self.table(tokens)).tanh(), self.table.weight)


def test_refusals_are_saved():
    torch.manual_seed(0)
    model, loss_fn = extend(Tied()), extend(nn.CrossEntropyLoss())
    tokens, y = torch.randint(6, (8,)), torch.randint(6, (8,))
    opt = optim.SINGD(model, lr=1e-2)
    take_steps(opt, model, loss_fn, tokens, y, 3)
    again = extend(Tied())
    again.load_state_dict(model.state_dict())
    other = optim.SINGD(again, lr=1e-2)
    other.load_state_dict(opt.state_dict())
    assert {"exp_avg", "exp_avg_sq"} < other.state[again.table.weight].keys()
    for o, m in ((opt, model), (other, again)):
        take_steps(o, m, loss_fn, tokens, y, 3)
    assert torch.equal(model.table.weight, again.table.weight)


def test_momenta_begin_when_they_are_asked_for():
    model, *rest = small()
    opt = optim.SINGD(model, alpha1=0.0, interval=1)
    take_steps(opt, model, *rest, 1)
    opt.param_groups[0]["alpha1"] = 0.5
    take_steps(opt, model, *rest, 2)
    assert opt.factors(model[0].weight)["m_K"].norm() > 0


def test_freezing_a_bias_keeps_the_factors():
    model, *rest = small()
    opt = optim.SINGD(model, interval=1, lr_cov=0.1)
    take_steps(opt, model, *rest, 5)
    before = opt.factors(model[0].weight)["K"].to_dense().clone()
    model[0].bias.requires_grad_(False)
    take_steps(opt, model, *rest, 1)
    after = opt.factors(model[0].weight)["K"].to_dense()
    assert after.shape == before.shape and (after - before).norm() < 0.5 * (before - torch.eye(5)).norm()


def test_a_buffer_of_the_fallback_is_no_momentum():
    model, *rest = small()
    model[0].weight.requires_grad_(False)
    opt = optim.SINGD(model, fallback="sgd", fallback_options={"momentum": 0.9}, interval=1)
    take_steps(opt, model, *rest, 3)
    model[0].weight.requires_grad_(True)
    take_steps(opt, model, *rest, 1)
    assert all(opt.state[p]["kind"] > 0 for p in model[2].parameters())
    assert opt.state[model[0].weight]["kind"] == 1


def test_decay_is_not_rounded_to_the_default_data_type():
    model, *rest = small()
    opt = optim.KFAC(model, decay=0.999, interval=1, lr=0.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        take_steps(opt, model, *rest, 1)
        A = opt.factors(model[0].weight)["A"].to_dense().clone()
        take_steps(opt, model, rest[0], 10 * rest[1], rest[2], 1)
    finally:
        torch.set_default_dtype(torch.float32)
    change = (opt.factors(model[0].weight)["A"].to_dense() - A).norm() / A.norm()
    assert 0.01 < change < 0.2
