"""Every quantity on every model of the zoo, all from one backward pass, against the oracles."""

from functools import cache

import pytest
import torch
from models import CASES, Problem
from oracle import (
    LAYERS,
    close,
    ggn_blocks,
    ggn_diag,
    kfac_factors,
    kronecker_block,
    loss_scale,
    normal_form,
    per_sample_grads,
)
from torch import Tensor, nn

from backpack_ext import (
    KFAC,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    SumGradSquared,
    Variance,
    backpack,
    extend,
)
from curvature import Kronecker, KroneckerSum

APPROX = ("expand", "reduce")
# arguments of KFAC by the field that it saves to
KFACS = {
    f"{approx}_{fisher}_{bias}": {"approx": approx, "fisher": fisher, "bias": bias}
    for approx in APPROX
    for fisher in ("exact", "empirical", "forward")
    for bias in ("separate", "joint")
}
every_case = pytest.mark.parametrize("name", CASES)
every_reduction = pytest.mark.parametrize("reduction", ("mean", "sum"))
every_approx = pytest.mark.parametrize("approx", APPROX)


@cache
def computed(name: str, reduction: str) -> Problem:
    """The problem after one backward pass with all extensions."""
    problem = CASES[name](reduction=reduction)
    extend(problem.model), extend(problem.loss_fn)
    first_order = (BatchGrad, BatchL2Grad, BatchDotGrad, SumGradSquared, Variance, DiagGGN)
    exts = [ext(unsupported="skip") for ext in first_order]
    exts += [KFAC(savefield=k, unsupported="skip", **options) for k, options in KFACS.items()]
    with backpack(*exts):
        problem.loss().backward()
    return problem


@cache
def reference(name: str, reduction: str) -> Problem:
    """The same problem, never extended."""
    return CASES[name](reduction=reduction)


def layers(problem: Problem) -> dict[str, nn.Module]:
    return {path: m for path, m in problem.model.named_modules() if isinstance(m, LAYERS)}


def covered(problem: Problem) -> dict[str, nn.Parameter]:
    """All parameters, by their first name: of layers, of norms, and bare ones."""
    return dict(problem.model.named_parameters())


def factors(parameter: nn.Parameter, savefield: str, module: nn.Module) -> Kronecker:
    """The Kronecker product of a parameter, of its role in `module` if it has several."""
    found = getattr(parameter, savefield)
    if isinstance(found, KroneckerSum):
        diagonal = isinstance(module, nn.Embedding)
        (found,) = [term for term in found if (term.A.dim() == 1) == diagonal]
    return found


def check_A(module: nn.Module, actual: Tensor, expected: Tensor) -> None:
    """Compare input factors; an embedding keeps the diagonal."""
    close(actual, expected.diagonal() if isinstance(module, nn.Embedding) else expected)


@every_reduction
@every_case
def test_gradient_is_untouched(name: str, reduction: str):
    problem, plain = computed(name, reduction), CASES[name](reduction=reduction)
    plain.loss().backward()
    for p, q in zip(problem.model.parameters(), plain.model.parameters(), strict=True):
        close(p.grad, q.grad)


@every_reduction
@every_case
def test_per_sample_quantities(name: str, reduction: str):
    problem = computed(name, reduction)
    G = per_sample_grads(reference(name, reduction))
    for key, p in covered(problem).items():
        g = G[key]
        close(p.grad_batch, g)
        close(p.batch_l2, g.square().flatten(1).sum(1))
        close(p.batch_dot, g.flatten(1) @ g.flatten(1).T)
        close(p.sum_grad_squared, g.square().sum(0))
        close(p.variance, g.var(0, correction=0))


@every_reduction
@every_case
def test_ggn_diagonal(name: str, reduction: str):
    problem = computed(name, reduction)
    diag = ggn_diag(reference(name, reduction))
    for key, p in covered(problem).items():
        close(p.diag_ggn_exact, diag[key])


@every_approx
@every_reduction
@every_case
def test_exact_factors(name: str, reduction: str, approx: str):
    problem, plain = computed(name, reduction), reference(name, reduction)
    for path, module in layers(problem).items():
        B, A = kfac_factors(plain, approx, path)
        K = factors(module.weight, f"{approx}_exact_separate", module)
        close(K.B, B)
        check_A(module, K.A, A)
        A = A * torch.eye(len(A)).double() if isinstance(module, nn.Embedding) else A
        close(K.to_dense(), kronecker_block(module, B, A))
        bias = getattr(module, "bias", None)
        if bias is not None:
            one = getattr(bias, f"{approx}_exact_separate")
            close(one.B, B)
            assert torch.equal(one.A, torch.ones_like(one.A)) and one.A.shape[-2:] == (1, 1)
            assert one.to_dense().shape == (len(bias), len(bias))


@every_approx
@every_case
def test_exact_factors_with_joint_bias(name: str, approx: str):
    problem, plain = computed(name, "mean"), reference(name, "mean")
    for path, module in layers(problem).items():
        bias = getattr(module, "bias", None)
        if bias is None:
            continue
        B, A = kfac_factors(plain, approx, path, bias="joint")
        K = getattr(module.weight, f"{approx}_exact_joint")
        assert K.joint and getattr(bias, f"{approx}_exact_joint") is K
        close(K.B, B)
        close(K.A, A)


@every_reduction
@every_case
def test_empirical_factors(name: str, reduction: str):
    """`B = 1/r sum g g^T`, g the gradient of the loss at the layer's output, per (n, s) or per n."""
    problem, plain = computed(name, reduction), reference(name, reduction)
    logits = plain.forward().detach().requires_grad_()
    (df,) = torch.autograd.grad(plain.loss_fn(logits, plain.target), logits)
    for path, module in layers(problem).items():
        _, J = normal_form(plain, path)
        per_position = torch.einsum("gndso,nd->gnso", J, df.reshape(plain.batch_size, -1))
        for approx, g in zip(APPROX, (per_position, per_position.sum(2, keepdim=True)), strict=True):
            B = torch.einsum("gnso,gnsp->gop", g, g) / loss_scale(plain)
            for bias in ("separate", "joint"):
                K = factors(module.weight, f"{approx}_empirical_{bias}", module)
                close(K.B, B if len(B) > 1 else B[0])
                close(K.A, factors(module.weight, f"{approx}_exact_{bias}", module).A)


@every_approx
@every_case
def test_forward_factors(name: str, approx: str):
    """B is the identity, A that of the other kinds."""
    problem = computed(name, "mean")
    for module in layers(problem).values():
        for bias in ("separate", "joint"):
            K = factors(module.weight, f"{approx}_forward_{bias}", module)
            exact = factors(module.weight, f"{approx}_exact_{bias}", module)
            assert torch.equal(K.B, torch.ones(exact.B.shape[:-1]).double())
            close(K.A, exact.A)
            assert K.joint == exact.joint


def test_class_token_and_positions():
    """They belong to no layer; their blocks are exact."""
    problem, blocks = computed("vit_params", "mean"), ggn_blocks(reference("vit_params", "mean"))
    others = {k: p for k, p in problem.model.named_parameters() if k in ("token", "pos")}
    assert len(others) == 2
    for key, p in others.items():
        close(p.expand_exact_separate.to_dense(), blocks[key])


def test_tied_weight_has_one_term_per_role():
    model = computed("char_gpt", "mean").model
    assert model.head.weight is model.tok.weight
    for field in ("expand_exact_separate", "reduce_exact_separate"):
        K = getattr(model.tok.weight, field)
        assert isinstance(K, KroneckerSum) and len(K.terms) == 2
        shapes = {(tuple(term.B.shape), tuple(term.A.shape)) for term in K}
        assert shapes == {((6, 6), (7,)), ((7, 7), (6, 6))}
        close(K.to_dense(), sum(term.to_dense() for term in K))
        assert isinstance(getattr(model.pos.weight, field), Kronecker)


@pytest.mark.parametrize(
    "network, asked, expected",
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("fisher", ["exact", "empirical", "forward"])
@every_approx
def test_data_type_of_factors(approx: str, fisher: str, network, asked, expected):
    """Float32 or the network's own if wider, unless one is asked for; values agree roughly."""
    problem = CASES["mlp"](dtype=network)
    extend(problem.model), extend(problem.loss_fn)
    with backpack(KFAC(approx, fisher, dtype=asked)):
        problem.loss().backward()
    exact = computed("mlp", "mean")
    for p, q in zip(problem.model.parameters(), exact.model.parameters(), strict=True):
        for factor, wanted in zip(p.kfac, getattr(q, f"{approx}_{fisher}_separate"), strict=True):
            assert factor.dtype == expected
            error = (factor.double() - wanted).norm() / wanted.norm()
            assert error < (0.1 if network == torch.bfloat16 else 1e-5)
