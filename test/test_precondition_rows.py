"""Gradients preconditioned as products of rows: the same steps, whatever is done to the gradients."""

import copy
import io
from contextlib import contextmanager

import pytest
import torch
from natural_cases import CASES, MANY_STRUCTURES, MIXED_STRUCTURES, Case, compare, same, train
from torch import nn
from torch.nn.functional import cross_entropy

from backpack_ext import backpack, extend
from curvature.outer import Fourier, outer, outer_for_few
from curvature.structures import STRUCTURES
from optim import IKFAC, INGD, KFAC, SINGD
from optim.costs import of_gradient, of_rows, of_vector
from optim.rows import RowKeeper
from optim.structure import Structure

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*extend"),
]

FAST = {"lr": 0.02, "lr_cov": 0.1, "interval": 2, "precondition": "rows"}


def rows_of(opt):
    """Return how many layers' gradients the last step took as rows."""
    return opt.param_groups[0]["rows"]


# -- the same steps as those of dense matrices ------------------------------------------------------


@pytest.mark.parametrize("structure", MANY_STRUCTURES + MIXED_STRUCTURES, ids=str)
def test_structures(structure):
    """Against the dense oracle, from random factors, in steps with and without refresh."""
    *_, opt, _ = compare(SINGD, "mlp", sizes=[6], start=True, structure=structure, **FAST)
    assert rows_of(opt) == 2 and opt.rejected == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SINGD, {"approx": "expand"}),
        (SINGD, {"approx": "reduce", "weight_decay": 0.1}),
        (SINGD, {"momentum": 0.0, "maximize": True}),
        (INGD, {}),
        (IKFAC, {"structure": "lower-triangular"}),
        (KFAC, {"damping": 0.1}),
        (KFAC, {"damping": 0.1, "structure": ("block-diagonal", {"block": 2}), "kl_clip": 1e-4}),
    ],
    ids=lambda v: getattr(v, "__name__", None) or "-".join(map(str, v.values())),
)
@pytest.mark.parametrize(
    ("case", "count"), [("mlp", 2), ("tokens", 2), ("conv", 3), ("embedding", 2), ("twice", 2)]
)
def test_networks(case, count, kind, options):
    """Positions, groups, layers without bias; embeddings and layers used twice have their gradient."""
    given = {k: v for k, v in FAST.items() if kind is not KFAC or k != "lr_cov"} | options
    if kind is KFAC:
        given["fisher"] = "empirical"
    *_, opt, _ = compare(kind, case, sizes=[5], **given)
    assert rows_of(opt) == count and opt.rejected == 0


@pytest.mark.parametrize("case", ["mlp", "tokens"])
def test_separate_bias(case):
    *_, opt, _ = compare(SINGD, case, sizes=[5], joint_bias=False, structure="dense", **FAST)
    assert rows_of(opt) == 2 and opt.rejected == 0


def test_layers_of_one_shape():
    """They are stacked, and each has a factor of its own where gradients were scaled."""
    case = Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        CASES["mlp"].data,
    )
    *_, opt, _ = compare(SINGD, case, sizes=[5], structure="lower-triangular", **FAST)
    assert rows_of(opt) == 3


def test_frozen_bias():
    """Its column stays, as zeros."""

    def prepare(model):
        model[0].bias.requires_grad_(False)

    *_, opt, _ = compare(SINGD, "mlp", sizes=[5], prepare=prepare, **FAST)
    assert rows_of(opt) == 2 and opt.rejected == 0
    model, both = CASES["mlp"].model(), []
    for precondition in ("rows", "gradient"):
        net = extend(copy.deepcopy(model))
        opt = SINGD(net, **FAST | {"precondition": precondition})
        steps = [CASES["mlp"].parts([5]) for _ in range(3)]
        torch.manual_seed(0)
        steps = [CASES["mlp"].parts([5]) for _ in range(3)]
        train(CASES["mlp"], net, opt, steps[:1])
        net[0].bias.requires_grad_(False)  # only now
        train(CASES["mlp"], net, opt, steps[1:])
        both.append(net)
    assert rows_of(opt) == 0
    close(*both)


# -- what is done to gradients -----------------------------------------------------------------------


def close(one, other, tolerance=1e-10):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def pair_of(change, steps=5, case="mlp", passes=(6,), before=lambda net, x, y: None, **given):
    """Train with rows and with the gradient, changing gradients before each step; return both."""
    found = []
    case = CASES[case]
    model = case.model()
    for precondition in ("rows", "gradient"):
        torch.manual_seed(1)
        net, loss_fn = extend(copy.deepcopy(model)), case.loss_fn()
        opt = SINGD(net, structure="dense", **FAST | given | {"precondition": precondition})
        for _ in range(steps):
            opt.zero_grad()
            for n in passes:
                x, y = case.data(n)
                before(net, x, y)
                with backpack(*opt.extensions()):
                    loss_fn(*case.flat(net(x), y)).backward()
            change(net)
            opt.step()
        found.append((net, opt))
    (one, rows), (other, gradient) = found
    assert gradient.rejected == rows_of(gradient) == 0
    close(one, other)
    return one, rows


SCALINGS = {
    "norm": lambda net: nn.utils.clip_grad_norm_(net.parameters(), 1e-2),
    "number": lambda net: [p.grad.mul_(-3.7) for p in net.parameters()],
    "new": lambda net: [setattr(p, "grad", p.grad / 7) for p in net.parameters()],
    "zero": lambda net: [p.grad.zero_() for p in net.parameters()],
    "each": lambda net: [p.grad.mul_(k + 2) for k, m in enumerate(net) for p in m.parameters()],
}


@pytest.mark.parametrize("change", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("case", ["mlp", "tokens"])
def test_multiples(case, change):
    """Clipping by the norm multiplies all; each layer may have a factor of its own."""
    _, opt = pair_of(change, case=case)
    assert rows_of(opt) == 2 and opt.rejected == 0


def noise(net):
    for p in net.parameters():
        p.grad.add_(1e-6 * torch.randn_like(p))


def one_entry(net):
    net[0].weight.grad.data[1, 2] *= 1.001


def decay(net):
    net[2].weight.grad.data.add_(net[2].weight.data, alpha=1e-3)


def of_bias(net):
    net[0].bias.grad[1] += 1e-6


def bias_alone(net):
    net[0].bias.grad *= 2


def some_zeros(net):
    net[2].weight.grad[:, 1] = 0


def clipped_values(net):
    nn.utils.clip_grad_value_(net[0].weight, 1e-3)


CHANGES = {
    f.__name__: f for f in (noise, one_entry, decay, of_bias, bias_alone, some_zeros, clipped_values)
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes(change):
    """Each is found, and counted, for the layer that it was made to: the steps are right."""
    _, opt = pair_of(change)
    layers = 2 if change is noise else 1
    assert rows_of(opt) == 2 - layers
    # where no layer has rows, the next try is at the next refresh: steps 0, 2, 4
    assert opt.rejected == (6 if change is noise else 5)


def zero_columns(net):
    net[-1].weight.grad[:, :2] = 0


def masked_bias(net):
    net[-1].bias.grad.zero_()


def scaled_weight(net):
    net[-1].weight.grad.mul_(10)


def clamped(net):
    for p in net[-1].parameters():
        p.grad.clamp_(-1e-3, 1e-3)


def along(net):
    net[-1].weight.grad += 1e-3 * torch.rand_like(net[-1].weight)


RANK_ONE = (zero_columns, masked_bias, scaled_weight, along, clamped)
ONES = {
    "one output": (lambda: nn.Sequential(nn.Linear(4, 1)), 6),
    "two classes": (lambda: nn.Sequential(nn.Linear(4, 2)), 6),
    "batch of one": (lambda: nn.Sequential(nn.Linear(4, 5)), 1),
    "one live output": (lambda: nn.Sequential(nn.Linear(4, 5)), 6),
}


@pytest.mark.parametrize("change", RANK_ONE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ONES)
def test_changes_of_gradients_of_rank_one(name, change):
    """A single random vector would see multiples only."""
    build, batch = ONES[name]
    torch.manual_seed(0)
    net = extend(build())
    outputs = net[-1].out_features
    opt = SINGD(net, structure="dense", **FAST)
    for k in range(6):
        x, target = torch.randn(batch, 4), torch.randn(batch, outputs)
        opt.zero_grad()
        with backpack(*opt.extensions()):
            if name in ("two classes", "batch of one"):
                y = torch.randint(outputs, (batch,))
                extend(nn.CrossEntropyLoss())(net(x), y).backward()
            else:
                live = name == "one live output"
                y = torch.cat([target[:, :1], net(x).detach()[:, 1:]], dim=1) if live else target
                extend(nn.MSELoss())(net(x), y).backward()
        if k % 2 == 0:
            change(net)
        opt.step()
        assert rows_of(opt) == 0 or k % 2
    assert opt.rejected == 3


def test_changes_show_without_the_check(monkeypatch):
    """The gradients of the tests above do differ from their rows."""
    monkeypatch.setattr("optim.matching.TOLERANCE", 1e300)
    for change in CHANGES.values():
        with pytest.raises(AssertionError):
            pair_of(change)


def test_accumulation():
    """Two backward passes: the rows of one are not all."""
    _, opt = pair_of(lambda net: None, passes=(3, 4))
    assert rows_of(opt) == 0


@pytest.mark.parametrize("where", ["before", "after"])
def test_accumulation_outside(where):
    """A backward pass that the optimizer does not see adds to the gradient."""
    data = {}

    def plain(net, x, y):
        data["x"], data["y"] = x, y
        if where == "before":
            (0.3 * cross_entropy(net(x), y)).backward()

    def change(net):
        if where == "after":
            (0.3 * cross_entropy(net(data["x"]) ** 2, data["y"])).backward()

    def before(net, x, y):
        plain(net, 2 * x, y)

    _, opt = pair_of(change, before=before)
    assert rows_of(opt) == 0 and opt.rejected


def test_rows_of_a_pass_that_was_thrown_away():
    """`zero_grad` of the model, and a pass outside of the optimizer's extensions."""
    case, both = CASES["mlp"], []
    model = case.model()
    (x, y), (u, v) = case.data(5), case.data(5)
    for precondition in ("rows", "gradient"):
        net, loss_fn = extend(copy.deepcopy(model)), case.loss_fn()
        opt = SINGD(net, **FAST | {"interval": 10, "precondition": precondition})
        for plain in (False, True, False):
            for inputs, targets, ends in ((x, y, False), (u, v, True)):
                net.zero_grad()
                with backpack(*(() if plain and ends else opt.extensions())):
                    loss_fn(net(inputs), targets).backward()
            opt.step()
            if plain:  # the rows of the pass before
                assert opt.rejected == (2 if precondition == "rows" else 0)
        both.append(net)
    close(*both)


@pytest.mark.parametrize("same_kind", [True, False])
def test_tied_weights(same_kind):
    """The rows of one use are not all."""

    def build():
        first = nn.Linear(4, 4) if same_kind else nn.Embedding(4, 4)
        net = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 4, bias=same_kind), nn.Linear(4, 3))
        net[2].weight = net[0].weight
        return net

    if same_kind:
        case = Case(build, CASES["mlp"].data)
    else:
        case = Case(build, lambda n: (torch.randint(4, (n,)), torch.randint(3, (n,))))
    model, steps, both = build(), [case.parts([5]) for _ in range(4)], []
    for precondition in ("rows", "gradient"):
        net = extend(copy.deepcopy(model))
        opt = SINGD(net, **FAST | {"precondition": precondition})
        train(case, net, opt, steps)
        both.append(net)
        assert rows_of(opt) == (precondition == "rows") and opt.rejected == 0
    close(*both)


def test_skipped_steps():
    """What is not finite skips the step, and its rows are gone."""
    case = CASES["mlp"]
    net, loss_fn = extend(case.model()), case.loss_fn()
    opt = SINGD(net, **FAST)
    for k in range(4):
        x, y = case.data(5)
        opt.zero_grad()
        with backpack(*opt.extensions()):
            loss_fn(net(x), y).backward()
        if k == 1:
            net[0].weight.grad[0, 0] = float("nan")
        before = [p.clone() for p in net.parameters()]
        opt.step()
        assert (k == 1) == all(map(torch.equal, before, net.parameters()))
        assert not opt.rows._kept and opt.rows.passes == 0
    assert opt.skipped == 1 and rows_of(opt) == 2


# -- precision -----------------------------------------------------------------------------------------


@contextmanager
def single():
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float64)


@pytest.mark.filterwarnings("ignore:.*GradScaler")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_grad_scaler(unscale, known):
    with single():
        case, both = CASES["mlp"], []
        model = case.model()
        for precondition in ("rows", "gradient"):
            torch.manual_seed(0)
            net, loss_fn = extend(copy.deepcopy(model)), case.loss_fn()
            opt = SINGD(net, **FAST | {"precondition": precondition, "normalize": True})
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for _ in range(5):
                x, y = case.data(6)
                opt.zero_grad()
                with backpack(*opt.extensions(), **({"grad_scaler": scaler} if known else {})):
                    scaler.scale(loss_fn(net(x), y)).backward()
                if unscale:
                    scaler.unscale_(opt)
                    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                scaler.step(opt)
                scaler.update()
            both.append((net, opt))
        close(both[0][0], both[1][0], 1e-5)
        assert rows_of(both[0][1]) == 2 and both[0][1].rejected == 0


@pytest.mark.parametrize("count", [1, 16, 300, 2000])
def test_rounding_of_single_precision_is_accepted(count):
    """Also with inputs far from zero, and of gradients that nearly cancel."""
    with single():
        torch.manual_seed(0)
        net = extend(nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 60)))
        loss_fn, opt = extend(nn.MSELoss()), SINGD(net, lr=1e-3, interval=3, precondition="rows")
        for k in range(8):
            x, y = torch.randn(count, 300) + k, torch.randn(count, 60)
            opt.zero_grad()
            with backpack(*opt.extensions()):
                loss_fn(net(x), net(x).detach() + 1e-4 * y).backward()
            opt.step()
            assert rows_of(opt) == 2 and opt.rejected == 0


@pytest.mark.parametrize("change", ["column", "bias"])
def test_changes_of_small_inputs_in_single_precision(change):
    """Of a column, or bias, next to inputs that are a million times as large."""
    with single():
        torch.manual_seed(0)
        net, loss_fn = extend(nn.Sequential(nn.Linear(20, 5))), extend(nn.CrossEntropyLoss())
        opt = KFAC(net, lr=1e-9, fisher="empirical", precondition="rows")
        scales = torch.ones(20)
        scales[0], scales[3], scales[4] = 1e6, 1e-6, 0.0
        for k in range(2):
            opt.zero_grad()
            with backpack(*opt.extensions()):
                loss_fn(net(torch.randn(128, 20) * scales), torch.randint(5, (128,))).backward()
            if k:
                if change == "column":
                    net[0].weight.grad[:, 3] += 1e-9
                else:
                    net[0].bias.grad[2] *= 1.01
            opt.step()
            assert (rows_of(opt), opt.rejected) == (1 - k, k)


def test_columns_of_zeros_have_gradients_of_zero():
    """However small a change, as of weight decay of inputs that never occur."""
    with single():
        torch.manual_seed(0)
        net, loss_fn = extend(nn.Sequential(nn.Linear(20, 5))), extend(nn.CrossEntropyLoss())
        opt = SINGD(net, interval=1, precondition="rows")
        for k in range(2):
            x = torch.randn(32, 20)
            x[:, :5] = 0
            opt.zero_grad()
            with backpack(*opt.extensions()):
                loss_fn(net(x), torch.randint(5, (32,))).backward()
            if k:
                net[0].weight.grad[:, 2] += 1e-12
            opt.step()
            assert (rows_of(opt), opt.rejected) == (1 - k, k)


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "high"])
def test_less_than_single_precision_has_no_rows(how):
    with single():
        torch.manual_seed(0)
        case = CASES["mlp"]
        net, loss_fn = extend(case.model()), case.loss_fn()
        net = net.bfloat16() if how == "bfloat16" else net
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if how == "high" else "highest")
        try:
            opt = SINGD(net, **FAST)
            for _ in range(4):
                x, y = case.data(6)
                opt.zero_grad()
                with backpack(*opt.extensions()):
                    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                        out = net(x.bfloat16() if how == "bfloat16" else x)
                    loss_fn(out.float(), y).backward()
                opt.step()
                assert rows_of(opt) == opt.rejected == 0
        finally:
            torch.set_float32_matmul_precision(before)


def test_factors_of_less_precision_than_the_weight():
    """Rows are checked in the precision of the gradient."""
    net, loss_fn = extend(CASES["mlp"].model()), CASES["mlp"].loss_fn()
    opt = SINGD(net, factor_dtype=torch.float32, **FAST)
    for _ in range(3):
        x, y = CASES["mlp"].data(6)
        opt.zero_grad()
        with backpack(*opt.extensions()):
            loss_fn(net(x), y).backward()
        opt.step()
        assert rows_of(opt) == 2 and opt.rejected == 0


# -- checkpoints ---------------------------------------------------------------------------------------


def test_resume():
    """Between refreshes, bit by bit."""
    case = CASES["mlp"]
    steps = [case.parts([6]) for _ in range(9)]
    model = case.model()
    net = extend(copy.deepcopy(model))
    opt = SINGD(net, **FAST | {"interval": 5})
    train(case, net, opt, steps[:3])
    file = io.BytesIO()
    torch.save((net.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    other = extend(copy.deepcopy(model))
    other.load_state_dict(weights)
    resumed = SINGD(other, **FAST | {"interval": 5})
    resumed.load_state_dict(state)
    assert any(isinstance(e, RowKeeper) for e in resumed.extensions())
    for o, m in ((opt, net), (resumed, other)):
        train(case, m, o, steps[3:])
    assert same(net.state_dict(), other.state_dict()) and same(opt.state_dict(), resumed.state_dict())
    copied = copy.deepcopy(opt)
    assert copied.rows.source is copied and copied.precondition == "rows"


def test_states_without_the_counts_of_rows():
    """Those of earlier versions: the counts begin at zero."""
    case = CASES["mlp"]
    net = extend(case.model())
    opt = SINGD(net, **FAST)
    train(case, net, opt, [case.parts([6])])
    state = opt.state_dict()
    for group in state["param_groups"]:
        del group["rows"], group["rejected"]
    resumed = SINGD(net, **FAST)
    resumed.load_state_dict(state)
    assert rows_of(resumed) == resumed.rejected == 0 and "rows" not in state["param_groups"][0]
    train(case, net, resumed, [case.parts([6])] * 2)
    assert rows_of(resumed) == 2


# -- which layers --------------------------------------------------------------------------------------


def test_auto_counts_costs():
    """Few rows of a large layer; extensions are active between refreshes only then."""
    with single():
        for batch, structure, expected in (
            (8, "dense", 1),
            (2000, "dense", 0),
            (8, "diagonal", 0),
            (8, "lower-toeplitz", 1),
            (64, "hierarchical", 0),
        ):
            net = extend(nn.Sequential(nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 3)))
            loss_fn, opt = extend(nn.CrossEntropyLoss()), SINGD(net, structure=structure, interval=3)
            for k in range(4):
                opt.zero_grad()
                active = opt.extensions()
                assert (opt.statistics in active) == (k in (0, 3))
                looks = structure != "diagonal" and k in (0, 3)
                assert (opt.rows in active) == (bool(expected) or looks)
                with backpack(*active):
                    loss_fn(net(torch.randn(batch, 400)), torch.randint(3, (batch,))).backward()
                opt.step()
                assert rows_of(opt) == expected


def test_gradient_never_looks():
    net = extend(nn.Sequential(nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 3)))
    opt = SINGD(net, precondition="gradient")
    assert opt.extensions() == (opt.statistics,)


def test_costs():
    """In units of multiply-adds, for the MLP of the benchmarks."""
    dense, diagonal, block, border, toeplitz = (
        Structure(STRUCTURES[name], tuple(options.items()))
        for name, options in (
            ("dense", {}),
            ("diagonal", {}),
            ("block-diagonal", {"block": 30}),
            ("hierarchical", {"k1": 15, "k2": 15}),
            ("lower-toeplitz", {}),
        )
    )
    assert of_vector(dense, 10) == 100 and of_vector(diagonal, 10) == 10
    assert of_vector(block, 100) == 3000 and of_vector(border, 100) == 6000
    assert of_vector(border, 10) == 200 and of_vector(toeplitz, 10) == 100
    assert of_vector(toeplitz, 4096) < 4096**2 / 5
    for structure in (dense, toeplitz):
        assert of_rows(structure, structure, 512, 785, 128) < of_gradient(structure, structure, 512, 785)
        assert of_rows(structure, structure, 512, 785, 4096) > of_gradient(
            structure, structure, 512, 785
        )


@pytest.mark.parametrize("name", ["lower-toeplitz", "upper-toeplitz", "dense", "hierarchical"])
@pytest.mark.parametrize("d", [20, 300])
def test_outer_for_few(name, d):
    M = STRUCTURES[name].from_dense(torch.randn(3, d, d))
    few, X = outer_for_few(M), torch.randn(3, 7, d)
    D = M.to_dense()
    torch.testing.assert_close(few.rmatmul(X), X @ D @ D.mT, rtol=1e-9, atol=1e-8)
    assert isinstance(few, Fourier if d > 256 and "toeplitz" in name else type(outer(M)))


@pytest.mark.parametrize("precondition", ["rows", "gradient"])
def test_large_toeplitz_factors_of_few_vectors(precondition):
    """Fourier transforms, for the inputs of a layer with few outputs and the other way round."""
    case = Case(
        lambda: nn.Sequential(
            nn.Linear(270, 3), nn.Tanh(), nn.Linear(3, 270), nn.Tanh(), nn.Linear(270, 3)
        ),
        lambda n: (torch.randn(n, 270), torch.randint(3, (n,))),
    )
    given = FAST | {"precondition": precondition, "structure": "lower-toeplitz"}
    _, opt, _ = compare(SINGD, case, 3, sizes=[5], start=True, **given)
    caches = [b.cache["sides"] for b in opt._buckets.of.values()]
    assert sum(isinstance(side, Fourier) for sides in caches for side in sides) == 3


# -- wrong use -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SINGD, INGD, IKFAC, KFAC])
@pytest.mark.parametrize("value", ["row", None, True])
def test_wrong_value(kind, value):
    with pytest.raises(ValueError, match=f"{kind.__name__}: precondition={value!r}; expected one of"):
        kind(extend(nn.Linear(2, 2)), precondition=value)


def test_exact_damping_has_no_rows():
    net = extend(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="which is no product of two sides"):
        KFAC(net, inverse="exact", precondition="rows")
    assert KFAC(net, inverse="exact").extensions()[1:] == ()
