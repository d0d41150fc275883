"""SINGD, INGD and IKFAC against dense matrices and plain autograd, and what theory says of them."""

import copy
import inspect
from itertools import pairwise

import pytest
import torch
from natural_cases import (
    CASES,
    MANY_STRUCTURES,
    MIXED_STRUCTURES,
    Case,
    check,
    compare,
    same,
    train,
    twins,
    values,
)
from natural_oracle import Natural, Options, factors
from torch import nn

from backpack_ext import KFAC as Factors
from backpack_ext import backpack, extend
from optim import IKFAC, INGD, KFAC, SINGD
from optim.schedules import early_frequent

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*extend"),
]

# large enough that factors are far from where they start, and from symmetric
FAST = {"lr": 0.02, "lr_cov": 0.1, "interval": 1}
RULES = [SINGD, INGD, IKFAC]


# -- step by step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", MANY_STRUCTURES + MIXED_STRUCTURES, ids=str)
@pytest.mark.parametrize("kind", [SINGD, IKFAC])
def test_structures(kind, structure):
    """From random factors, of which no entry is the same as its mirror image."""
    *_, oracle = compare(kind, "mlp", sizes=[5], start=True, structure=structure, damping=0.1, **FAST)
    K = oracle.layers["0"].state["K"]
    if structure != "diagonal" and "diagonal" not in structure:
        assert not torch.allclose(K, K.mT, atol=1e-3)
    assert not torch.allclose(K, torch.eye(5), atol=0.1)


@pytest.mark.parametrize("structure", ["dense", MIXED_STRUCTURES[1], "lower-triangular"], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("alpha1", [0.0, 0.5])
def test_momentum_of_factors_and_normalized_steps(alpha1, normalize, structure):
    """With a loss so large that the norm exceeds 1; groups of a convolution have their own norms."""
    options = {"structure": structure, "alpha1": alpha1, "normalize": normalize}
    *_, oracle = compare(
        SINGD, "conv", steps=3, sizes=[3], reduction="sum", start=True, **options, **FAST
    )
    norms = oracle.layers["0"].state["m_K"].flatten(1).norm(dim=1)
    assert norms.max() > 1 and (norms[0] - norms[1]).abs() > 1e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("case", CASES.keys())
def test_networks(case, kind, approx, reduction):
    if kind is not SINGD and case not in ("conv", "tokens"):
        pytest.skip("the rules differ in the update, not in the networks")
    options = {} if kind is INGD else {"structure": ("lower-triangular", "upper-triangular")}
    compare(kind, case, 3, [3], reduction, approx=approx, lr=0.01, lr_cov=0.03, interval=1, **options)


def test_expand_and_reduce_differ():
    moved = []
    for approx in ("expand", "reduce"):
        torch.manual_seed(0)
        model, *_ = compare(SINGD, "pooled", 2, approx=approx, **FAST)
        moved.append(model[0].weight.detach())
    assert (moved[0] - moved[1]).abs().max() > 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"damping": 0.0},
        {"damping": 3.0},
        {"weight_decay": 0.1},
        {"joint_bias": False},
        {"interval": 3},
        {"interval": lambda step: 1 + step // 2},
        {"lr_cov": lambda refreshes: 0.2 / (1 + refreshes)},
        {"interval": 2, "lr_cov": lambda refreshes: 0.2 / (1 + refreshes)},
        {"maximize": True, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [SINGD, IKFAC])
def test_options(kind, options):
    options = {**FAST, **options}
    *_, oracle = compare(kind, "mlp", 7, [5], structure="lower-triangular", **options)
    if options["interval"] == 3:
        assert oracle.layers["0"].refreshes == 3


def test_interval():
    """Refreshes at steps 0, 3, 6; there is nothing to compute in between."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    opt = SINGD(extend(model), interval=3)
    due, factor = [], []
    for _ in range(7):
        due.append(len(opt.extensions()) > 0)
        train(case, model, opt, [case.parts([4])])
        factor.append(opt.factors(model[0].weight)["K"].to_dense().clone())
    assert due == [True, False, False] * 2 + [True]
    changed = [not torch.equal(a, b) for a, b in pairwise(factor)]
    assert changed == [False, False, True, False, False, True]


def test_frequent_refreshes_at_first():
    """``min(max(floor(log4(t + 1)), 1), T)``."""
    schedule = early_frequent(3)
    assert [schedule(t) for t in (0, 3, 14, 15, 62, 63, 255, 10**6)] == [1, 1, 1, 2, 2, 3, 3, 3]
    compare(SINGD, "mlp", 18, [2], **{**FAST, "interval": early_frequent(3)})


def test_reported_learning_rate_is_that_of_a_schedule():
    """A schedule scales factors' layers and the fallback's parameters alike."""
    case = CASES["tokens"]
    model = case.model()
    opt, oracle = twins(SINGD, model, case, {**FAST, "lr": 0.08})
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for k in range(3):
        lr = 0.08 * 0.5**k
        for o in oracle.options.values():
            o.lr = lr
        oracle.fallback.param_groups[0]["lr"] = lr
        parts = case.parts([3])
        train(case, model, opt, [parts])
        oracle.step(case.scaled(parts))
        scheduler.step()
        check(model, opt, oracle)


# -- parameter groups ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SINGD, IKFAC])
def test_groups_have_own_options(kind):
    case, model = CASES["conv"], CASES["conv"].model()
    own = {
        "0": {"lr": 0.01, "lr_cov": 0.05, "structure": "lower-toeplitz", "momentum": 0.5},
        "2": {"damping": 1.0, "weight_decay": 0.2, "structure": ("diagonal", "dense")},
        "5": {"lr_cov": 0.2},
    }
    if kind is SINGD:
        own["5"] = {"alpha1": 0.2, "normalize": True, "lr_cov": 0.2}
    common = {"lr": 0.03, "structure": "upper-triangular", "lr_cov": 0.1}
    pairs = {"lower-toeplitz": ("lower-toeplitz",) * 2, "upper-triangular": ("upper-triangular",) * 2}

    def options(name):
        given = {**common, **({"alpha1": 0.0} if kind is IKFAC else {}), **own[name]}
        structure = given.pop("structure")
        K, C = pairs.get(structure, structure)
        return Options(**given, K=(K, {}), C=(C, {}))

    oracle = Natural(copy.deepcopy(model), case.total, "ikfac" if kind is IKFAC else "singd", options)
    modules = dict(model.named_modules())
    groups = [{"params": list(modules[name].parameters()), **o} for name, o in own.items()]
    extend(model)
    # groups of bare parameters: the layers are those that the model, which is extended, records
    opt = kind(groups, **common, interval=1)
    for _ in range(3):
        parts = case.parts([3])
        train(case, model, opt, [parts])
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)


def test_a_group_without_structure_is_the_fallback():
    case, model = CASES["mlp"], CASES["mlp"].model()
    oracle = Natural(
        copy.deepcopy(model),
        case.total,
        options=lambda name: Options(lr=0.02, lr_cov=0.1) if name == "0" else None,
        fallback=lambda params: torch.optim.AdamW(params, lr=0.3, weight_decay=0.1),
    )
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "structure": None, "lr": 0.3, "weight_decay": 0.1},
    ]
    extend(model)
    opt = SINGD(groups, lr=0.02, lr_cov=0.1, interval=1)
    for _ in range(3):
        parts = case.parts([5])
        train(case, model, opt, [parts])
        oracle.step(case.scaled(parts))
        check(model, opt, oracle)
    with pytest.raises(KeyError):
        opt.factors(model[2].weight)


def test_add_param_group():
    """A layer that joins later starts at the identity, and may have a structure of its own."""
    case, model = CASES["mlp"], CASES["mlp"].model()
    start = copy.deepcopy(model)
    extend(model)
    opt = SINGD(model[0].parameters(), lr=0.02, lr_cov=0.1, interval=1)
    before = model[2].weight.detach().clone()
    steps = [case.parts([5]) for _ in range(4)]
    train(case, model, opt, steps[:2])
    assert torch.equal(model[2].weight, before)
    diagonal = Options(0.1, lr_cov=0.1, K=("diagonal", {}), C=("diagonal", {}))
    opt.add_param_group({"params": list(model[2].parameters()), "structure": "diagonal", "lr": 0.1})
    train(case, model, opt, steps[2:])

    own = {"0": Options(lr=0.02, lr_cov=0.1), "2": None}
    first = Natural(
        start, case.total, options=own.get, fallback=lambda params: torch.optim.SGD(params, lr=0.0)
    )
    for parts in steps[:2]:
        first.step(case.scaled(parts))
    oracle = Natural(start, case.total, options={**own, "2": diagonal}.get)
    oracle.layers["0"] = first.layers["0"]
    for parts in steps[2:]:
        oracle.step(case.scaled(parts))
    check(model, opt, oracle)
    assert opt.param_groups[1]["structure"] == "diagonal"


@pytest.mark.parametrize("kind", [SINGD, IKFAC, KFAC])
def test_the_structure_of_a_group_stays(kind):
    """Another way to write it is fine, also after loading and in copies."""
    case = CASES["mlp"]
    model = extend(case.model())
    opt = kind(model, structure=("block-diagonal", {"block": 2}), fisher="empirical")
    train(case, model, opt, [case.parts([4])] * 2)
    other = kind(model, structure=("block-diagonal", {"block": 2}), fisher="empirical")
    other.load_state_dict(opt.state_dict())
    for found in (opt, other, copy.deepcopy(opt)):
        group = found.param_groups[0]
        group["structure"] = [("block-diagonal", {"block": 2})] * 2
        found.extensions()
        for value in (("block-diagonal", {"block": 3}), "diagonal", None):
            group["structure"] = value
            for call in (found.extensions, found.step):
                with pytest.raises(
                    ValueError, match=f"{kind.__name__}: the structure of parameter group 0"
                ):
                    call()
        group["structure"] = ("block-diagonal", {"block": 2})
        group["structure"][1]["block"] = 3  # in place
        with pytest.raises(ValueError, match="was changed from"):
            found.step()


@pytest.mark.parametrize("kind", [INGD, IKFAC, KFAC])
def test_shared_options_are_visible(kind):
    """In the signature, with the defaults that they have, and in the docstring."""
    ours, theirs = (inspect.signature(cls).parameters for cls in (kind, SINGD))
    assert "shared" not in ours and "shared" not in kind.__doc__
    assert all(f"\n        {name}: " in kind.__doc__ for name in ours)
    missing = theirs.keys() - ours.keys()
    assert missing <= {"lr_cov", "alpha1", "structure", "normalize"}
    assert all(ours[name].default == p.default for name, p in theirs.items() if name in ours)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        kind(extend(nn.Linear(2, 2)), colour="red")


# -- fallback --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"fallback": "sgd", "fallback_options": {"momentum": 0.9}},
        {"fallback": "adam", "fallback_lr": 0.005, "weight_decay": 0.1},
        {"fallback": "rmsprop", "maximize": True},
        {"fallback": torch.optim.Adagrad, "joint_bias": False},
    ],
    ids=str,
)
def test_fallback_is_torchs(options):
    """It trains the norm's scale and shift, and biases that are not joined."""
    compare(SINGD, "tokens", 4, [3], structure="diagonal", **options, **FAST)


def test_schedules_scale_a_separate_learning_rate_of_the_fallback_too():
    case, model = CASES["tokens"], CASES["tokens"].model()
    opt, oracle = twins(SINGD, model, case, {**FAST, "fallback": "sgd", "fallback_lr": 0.2})
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for k in range(3):
        for o in oracle.options.values():
            o.lr = FAST["lr"] * 0.5**k
        oracle.fallback.param_groups[0]["lr"] = 0.2 * 0.5**k
        parts = case.parts([3])
        train(case, model, opt, [parts])
        oracle.step(case.scaled(parts))
        scheduler.step()
        check(model, opt, oracle)


# -- what theory says ------------------------------------------------------------------------------


def test_ingd_is_singd_with_dense_matrices():
    case, model = CASES["pooled"], CASES["pooled"].model()
    steps = [case.parts([4]) for _ in range(3)]
    models = [model, copy.deepcopy(model)]
    for m, kind in zip(models, (INGD, SINGD), strict=True):
        train(case, m, kind(extend(m), **FAST), steps)
    assert same(models[0].state_dict(), models[1].state_dict())


def test_ways_to_say_diagonal():
    case, model = CASES["conv"], CASES["conv"].model()
    steps, found = [case.parts([3]) for _ in range(4)], []
    for structure in (
        "diagonal",
        ("block-diagonal", {"block": 1}),
        ("hierarchical", {"k1": 0, "k2": 0}),
        ("rank-k-lower", {"k": 0}),
    ):
        m = copy.deepcopy(model)
        train(case, m, SINGD(extend(m), structure=structure, damping=0.1, **FAST), steps)
        found.append(m)
    for m in found[1:]:
        for p, q in zip(found[0].parameters(), m.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_ways_to_say_dense():
    case, model = CASES["mlp"], CASES["mlp"].model()
    steps, found = [case.parts([3]) for _ in range(4)], []
    for structure in ("dense", ("block-diagonal", {"block": 6}), ("hierarchical", {"k1": 6, "k2": 6})):
        m = copy.deepcopy(model)
        train(case, m, SINGD(extend(m), structure=structure, **FAST), steps)
        found.append(m)
    for m in found[1:]:
        for p, q in zip(found[0].parameters(), m.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def layer_case() -> Case:
    return Case(lambda: nn.Sequential(nn.Linear(4, 3)), values, squared=True)


@pytest.mark.parametrize("structure", ["dense", "lower-triangular", "upper-triangular"])
def test_ikfac_tracks_kfac(structure):
    """``(K K^T)^-1`` is the moving average of ``A + damping I`` up to an error of order beta1.

    The weights stand still, so that the statistics are those of KFAC at every step. Without the
    doubling in P the triangular ones would not track.
    """
    case = layer_case()
    torch.manual_seed(3)
    model = case.model()
    damping, errors = 0.1, []
    data = [case.parts([8]) for _ in range(50)]
    statistics = [
        factors(model, case.total, case.scaled(p), "reduce", lambda _: True)["0"] for p in data
    ]
    for beta, count in ((1e-1, 10), (1e-2, 100), (1e-3, 1000)):
        m = copy.deepcopy(model)
        opt = IKFAC(extend(m), lr=0.0, damping=damping, lr_cov=beta, structure=structure, interval=1)
        train(case, m, opt, [data[t % 50] for t in range(count)])
        found = {name: M.to_dense()[0] for name, M in opt.factors(m[0].weight).items()}
        worst = 0.0
        for name, index in (("K", 0), ("C", 1)):
            average = torch.eye(len(found[name]))
            for t in range(count):
                new = statistics[t % 50][index][0] + damping * torch.eye(len(average))
                average = (1 - beta) * average + beta * new
            inverse = torch.linalg.inv(found[name] @ found[name].T)
            worst = max(worst, ((inverse - average).norm() / average.norm()).item())
        errors.append(worst)
    assert errors[0] < 0.15
    assert 6 < errors[0] / errors[1] < 20 and 8 < errors[1] / errors[2] < 12, errors


def test_ingd_at_its_fixed_point_is_the_inverse_curvature():
    """``K K^T (x) C C^T = (B (x) A)^-1``, without damping, on one batch."""
    case = layer_case()
    model = case.model()
    parts = case.parts([20])
    opt = INGD(extend(model), lr=0.0, damping=0.0, lr_cov=0.2, alpha1=0.0, normalize=True, interval=1)
    train(case, model, opt, [parts] * 400)
    ((A, B),) = factors(model, case.total, case.scaled(parts), "reduce", lambda _: True).values()
    found = {name: M.to_dense()[0] for name, M in opt.factors(model[0].weight).items()}
    inverse = torch.kron(found["C"] @ found["C"].T, found["K"] @ found["K"].T)
    block = torch.kron(B[0], A[0])
    torch.testing.assert_close(inverse @ block, torch.eye(len(block)), rtol=0, atol=1e-8)


def test_kfac_and_ikfac_take_the_same_direction_in_the_end():
    """Where IKFAC has converged, its step is KFAC's with factored damping of equal parts."""
    case = layer_case()
    model = case.model()
    parts = case.parts([20])
    opt = IKFAC(extend(model), lr=0.0, damping=0.05, lr_cov=0.2, interval=1)
    train(case, model, opt, [parts] * 300)
    A, B = factors(model, case.total, case.scaled(parts), "reduce", lambda _: True)["0"]
    for name, M in (("K", A[0]), ("C", B[0])):
        K = opt.factors(model[0].weight)[name].to_dense()[0]
        inverse = torch.linalg.inv(M + 0.05 * torch.eye(len(M)))
        torch.testing.assert_close(K @ K.T, inverse, rtol=1e-6, atol=1e-8)


def test_embedding_has_a_diagonal_factor():
    """K holds a number per word, whatever the structure; C is as asked."""
    model, opt, _ = compare(SINGD, "embedding", structure="dense", **FAST)
    found = opt.factors(model[0].weight)
    assert [t.numel() for t in found["K"].tensors] == [6]
    assert [t.numel() for t in found["C"].tensors] == [16]
    ours = SINGD(model, structure="upper-toeplitz", **FAST)
    case = CASES["embedding"]
    train(case, model, ours, [case.parts([3])])
    assert [t.numel() for t in ours.factors(model[0].weight)["K"].tensors] == [6]
    assert [t.numel() for t in ours.factors(model[0].weight)["C"].tensors] == [4]


def test_padding_of_an_embedding_stays():
    case = CASES["embedding"]

    def prepare(model):
        model[0] = nn.Embedding(6, 4, padding_idx=2)

    model, *_ = compare(SINGD, case, prepare=prepare, structure="diagonal", approx="expand", **FAST)
    assert not model[0].weight[2].any()


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_other_vectors(fisher):
    """One refresh from the identity shows the statistics: those of the extension."""
    case, model = CASES["mlp"], extend(CASES["mlp"].model())
    loss_fn, ((x, y, _),) = case.loss_fn(), case.parts([6])
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    options = {"generator": generators[0], "mc_samples": 2} if fisher == "mc" else {}
    ext = Factors("reduce", fisher, bias="joint", **options)
    with backpack(ext):
        loss_fn(model(x), y).backward()
    block = model[0].weight.kfac
    options = {"generator": generators[1], "mc_samples": 2} if fisher == "mc" else {}
    opt = IKFAC(model, lr_cov=0.1, damping=0.0, fisher=fisher, interval=1, **options)
    train(case, model, opt, [[(x, y, 1.0)]])
    found = opt.factors(model[0].weight)
    for name, M in (("K", block.A), ("C", block.B)):
        eye = torch.eye(len(M))
        torch.testing.assert_close(found[name].to_dense()[0], eye - 0.05 * (M - eye))


def test_optimizers_of_one_family_are_told_apart():
    assert len({SINGD, INGD, IKFAC, KFAC}) == 4
    model = extend(CASES["mlp"].model())
    with pytest.raises(TypeError):
        IKFAC(model, alpha1=0.5)
    with pytest.raises(TypeError):
        INGD(model, structure="diagonal")
    with pytest.raises(TypeError):
        KFAC(model, lr_cov=0.1)
