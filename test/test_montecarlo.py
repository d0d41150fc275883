"""Monte-Carlo curvature: what the samples are, that they average to the exact curvature, and how fast.

Averages must lie within five standard errors, as estimated from the samples themselves.
"""

from collections.abc import Callable

import pytest
import torch
from models import CASES, Problem
from oracle import LAYERS, close, jacobian, loss_scale, normal_form
from test_losses import LOSSES, build, by_datum, hessian
from torch import Tensor, nn

from backpack_ext import KFAC, DiagGGN, UnsupportedError, backpack, extend
from backpack_ext.loss_call import LossCall

pytestmark = pytest.mark.montecarlo

APPROX = ("expand", "reduce")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_mean(samples: Tensor, expected: Tensor) -> None:
    """Compare the mean over the first axis; what never varies must be right as it is."""
    error = (samples.mean(0) - expected).abs()
    standard_error = samples.std(0) / len(samples) ** 0.5
    noise = 1e-12 * expected.abs().max()
    assert (error <= 5 * standard_error + noise).all(), (error / (standard_error + noise)).max()


def extensions(samples: int, generator: torch.Generator) -> list:
    """KFAC and the GGN diagonal on the same samples, all in one sweep."""
    options = {"mc_samples": samples, "generator": generator, "unsupported": "skip"}
    kfacs = [KFAC(how, "mc", savefield=f"kfac_{how}", **options) for how in APPROX]
    return [*kfacs, DiagGGN("mc", **options)]


def extended(make: Callable[..., Problem], reduction: str = "mean") -> Problem:
    problem = make(reduction=reduction)
    extend(problem.model), extend(problem.loss_fn)
    return problem


def results(problem: Problem, *exts) -> dict[str, Tensor]:
    """Run a pass; return B of each KFAC and the diagonal, for each parameter."""
    with backpack(*exts):
        problem.loss().backward()
    found = {}
    for name, p in problem.model.named_parameters():
        for ext in exts:
            value = getattr(p, ext.savefield, None)
            if value is None:
                continue
            if isinstance(ext, DiagGGN):
                found[f"{name} diagonal"] = value
                continue
            for k, term in enumerate(getattr(value, "terms", (value,))):
                found[f"{name} {ext.approx} {k}"] = term.B if hasattr(term, "B") else term.matrix
    return found


# -- the loss alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_samples_average_to_the_hessian(name: str):
    """Over all data at once: samples of different data, and of different terms, are independent."""
    loss_fn, z, y, batch_axis = build(name, "mean")
    z = (0.3 * z).detach().requires_grad_()  # no class is so rare that it spoils the standard error
    call, generator = LossCall(loss_fn, z, y, batch_axis), seeded()
    S = torch.stack([call.sample(generator) for _ in range(2000)])
    S = by_datum(S * call.scale() ** 0.5, z.shape, batch_axis).flatten(1)
    H = hessian(loss_fn, z, y, batch_axis).reshape(S.shape[1], S.shape[1])
    check_mean(S[:, :, None] * S[:, None, :], H)
    check_mean(S, torch.zeros_like(S[0]))


def test_a_sample_is_a_label():
    """`sqrt(w_y) (q - e)` with a one-hot e, drawn for each term on its own."""
    loss_fn, z, y, _ = build("ce weight", "mean")
    generator, q = seeded(), z.softmax(1)
    drawn = []
    for _ in range(20):
        S = LossCall(loss_fn, z, y).sample(generator)
        e = q - S / loss_fn.weight[y].sqrt()[:, None]
        torch.testing.assert_close(e, nn.functional.one_hot(e.argmax(1), e.shape[1]).double())
        drawn.append(e.argmax(1))
    drawn = torch.stack(drawn, 1)
    assert all(not torch.equal(one, other) for one, other in zip(drawn, drawn.roll(1, 0), strict=True))


def test_an_ignored_target_has_no_samples():
    loss_fn, z, y, _ = build("ce ignore", "sum")
    S = LossCall(loss_fn, z, y).sample(seeded())
    assert torch.equal(S.any(1), y != -100)


# -- one sample ------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("siblings")])
def test_quantities_of_given_samples(name: str, reduction: str, samples: int):
    """The very samples that the generator gives, sent through dense Jacobians."""
    make = CASES[name]
    plain, problem = make(reduction=reduction), extended(make, reduction)
    logits, generator, n = plain.forward().detach(), seeded(), plain.batch_size
    call = LossCall(plain.loss_fn, logits.requires_grad_(), plain.target)
    S = torch.stack([call.sample(generator) for _ in range(samples)])
    S = S.reshape(samples, n, -1) * (loss_scale(plain) / samples) ** 0.5
    exts = extensions(samples, seeded())
    results(problem, *exts)
    J = jacobian(plain)
    for key, p in problem.model.named_parameters():
        if hasattr(p, "diag_ggn_mc"):
            G = torch.einsum("vnd,nd...->vn...", S, J[key])
            close(p.diag_ggn_mc, G.square().sum((0, 1)))
    layers = {k: m for k, m in problem.model.named_modules() if isinstance(m, LAYERS)}
    for path, module in layers.items():
        _, J = normal_form(plain, path)
        b = torch.einsum("gndso,vnd->gvnso", J, S)
        for how, rows in zip(APPROX, (b, b.sum(3, keepdim=True)), strict=True):
            B = torch.einsum("gvnso,gvnsp->gop", rows, rows)
            K = getattr(module.weight, f"kfac_{how}")
            terms = [K] if not hasattr(K, "terms") else K.terms
            found = [term.B for term in terms if term.B.shape[-1] == B.shape[-1]]
            close(found[0], B if len(B) > 1 else B[0])
            if getattr(module, "bias", None) is not None:
                assert torch.equal(getattr(module.bias, f"kfac_{how}").B, found[0])


@pytest.mark.parametrize("name", CASES)
def test_reduce_and_the_diagonal_share_samples(name: str):
    """Given one generator: the diagonal of reduce's bias block is the bias's GGN diagonal."""
    problem = extended(CASES[name])
    results(problem, *extensions(2, seeded()))
    biases = [m.bias for m in problem.model.modules() if isinstance(m, LAYERS) and hasattr(m, "bias")]
    for bias in biases:
        if bias is not None:
            close(bias.kfac_reduce.B.diagonal(dim1=-2, dim2=-1).flatten(), bias.diag_ggn_mc)


@pytest.mark.parametrize("samples", [1, 4])
def test_one_datum_without_shared_axis(samples: int):
    """The weight's diagonal is `diag(B) (x) a^2`, and expand is reduce."""
    torch.manual_seed(0)
    layer, loss_fn = extend(nn.Linear(3, 4)), extend(nn.CrossEntropyLoss())
    a = torch.randn(1, 3)
    with backpack(*extensions(samples, seeded())):
        loss_fn(layer(a), torch.tensor([1])).backward()
    B = layer.weight.kfac_expand.B
    torch.testing.assert_close(layer.weight.diag_ggn_mc, B.diagonal()[:, None] * a.square())
    assert torch.equal(B, layer.weight.kfac_reduce.B)
    assert torch.linalg.matrix_rank(B) <= samples


# -- averages --------------------------------------------------------------------------------------


def weighted_gpt(reduction: str = "mean") -> Problem:
    """Rows `[N T, V]`, some ignored, with class weights and label smoothing."""
    problem = CASES["char_gpt"](reduction=reduction)
    weight = torch.linspace(0.5, 2, 7).double()
    problem.loss_fn = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=0.2)
    return problem


PROBLEMS = {name: CASES[name] for name in ("mlp", "mlp_mse", "mlp_bce", "cnn", "conv_transpose", "unet")}
PROBLEMS |= {"char_gpt": CASES["char_gpt"], "weighted_gpt": weighted_gpt}


@pytest.mark.parametrize("name", PROBLEMS)
def test_average_is_exact_and_the_variance_falls(name: str):
    """4000 samples; with 100 per pass the variance is a 25th of that with 4 per pass."""
    problem = extended(PROBLEMS[name])
    exts = [KFAC(how, "exact", savefield=f"kfac_{how}") for how in APPROX]
    exact = results(problem, *exts, DiagGGN(savefield="diag_ggn_mc"))
    A = {p: {how: [t.A for t in terms(p, how)] for how in APPROX} for p in problem.model.parameters()}
    variances = []
    for samples in (4, 100):
        exts = extensions(samples, seeded(samples))
        passes = [results(problem, *exts) for _ in range(40)]
        assert passes[0].keys() == exact.keys()
        for key, expected in exact.items():
            check_mean(torch.stack([found[key] for found in passes]), expected)
        variances.append({key: torch.stack([f[key] for f in passes]).var(0).sum() for key in exact})
    for p, factors in A.items():
        for how in APPROX:
            for term, factor in zip(terms(p, how), factors[how], strict=True):
                assert torch.equal(term.A, factor)
    ratios = torch.stack([variances[0][key] / variances[1][key] for key in exact])
    assert 25 / 1.5 < ratios.log().mean().exp() < 25 * 1.5


def terms(p: nn.Parameter, how: str) -> tuple:
    K = getattr(p, f"kfac_{how}")
    return getattr(K, "terms", (K,))


# -- generators ------------------------------------------------------------------------------------


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_equal_seeds_give_equal_results():
    problem = extended(CASES["cnn"])
    ext, again, other = (extensions(2, seeded(seed)) for seed in (3, 3, 4))
    first = results(problem, *ext)
    assert same(first, results(problem, *again))
    assert not same(first, results(problem, *other))
    assert not same(first, results(problem, *ext))  # the generator moves on


def test_samples_of_one_pass_or_of_several():
    """One pass with five samples is the mean of five passes with one each."""
    problem = extended(CASES["unet"])
    exts = extensions(1, seeded())
    passes = [results(problem, *exts) for _ in range(5)]
    together = results(problem, *extensions(5, seeded()))
    for key, value in together.items():
        close(torch.stack([found[key] for found in passes]).mean(0), value)


def test_private_generators():
    """By default each extension has its own: other samples, and nobody else's are disturbed."""
    problem = extended(CASES["mlp"])
    exts = [KFAC(mc_samples=5, savefield=name) for name in ("one", "two")] + [DiagGGN("mc"), KFAC()]
    state = torch.get_rng_state()
    found = results(problem, *exts)
    assert torch.equal(torch.get_rng_state(), state)
    one, two = problem.model[0].weight.one, problem.model[0].weight.two
    assert not torch.equal(one.B, two.B) and torch.equal(one.A, two.A)
    assert not same(found, results(problem, *exts))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["mlp", "mlp_mse", "mlp_bce"])
def test_given_generators_leave_the_global_one_alone(name: str):
    problem, generator = extended(CASES[name]), seeded()
    before = generator.get_state()
    state = torch.get_rng_state()
    results(problem, *extensions(3, generator))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generator.get_state(), before)


def test_state_of_the_generator_can_be_restored():
    problem = extended(CASES["mlp"])
    ext, other = KFAC(savefield="one"), KFAC(savefield="one")
    assert list(ext.state_dict()) == ["generator"]
    results(problem, ext)
    state = ext.state_dict()
    expected = results(problem, ext)
    other.load_state_dict(state)
    assert same(expected, results(problem, other))
    ext.load_state_dict(state)
    assert same(expected, results(problem, ext))


def test_losses_without_a_rule_cannot_be_sampled():
    layer, loss_fn = extend(nn.Linear(2, 3)), extend(nn.L1Loss())
    with pytest.raises(UnsupportedError, match="attach_loss"), backpack(KFAC()):
        loss_fn(layer(torch.ones(4, 2)), torch.zeros(4, 3)).backward()
