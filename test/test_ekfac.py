"""Eigenvalue-corrected KFAC: the closest matrix to the exact block in KFAC's eigenbasis.

Three facts say so without building the basis: it commutes with KFAC's block, its trace is the exact
block's, and its inner product with the exact block is its own squared norm (it is a projection).
"""

import pytest
import torch
from models import CASES, Problem
from oracle import LAYERS, close, ggn_block, loss_scale, per_sample_grads
from torch import Tensor, nn

from backpack_ext import EKFAC, KFAC, UnsupportedError, backpack, extend
from backpack_ext.dataset import collect
from curvature import BlockDiagonalOperator, Kronecker, KroneckerEigen

APPROX = ("expand", "reduce")
BIAS = ("joint", "separate")
TIED = "char_gpt"  # its token embedding is its head


def run(problem: Problem, *exts) -> Problem:
    extend(problem.model), extend(problem.loss_fn)
    with backpack(*exts):
        problem.loss().backward()
    return problem


def layers(problem: Problem) -> dict[str, nn.Module]:
    """Affine layers by path, each parameter once."""
    found, seen = {}, set()
    for path, m in problem.model.named_modules():
        own = {id(p) for p in m.parameters(recurse=False)}
        if isinstance(m, LAYERS) and not own & seen:
            found[path] = m
        seen |= own
    return found


def dense(module: nn.Module, path: str, field: str, bias: str) -> dict[tuple[str, ...], Tensor]:
    """The layer's dense blocks by parameter names, rows ordered by `cat([weight.flatten(), bias])`."""
    named = {f"{path}.{k}": p for k, p in module.named_parameters()}
    H = BlockDiagonalOperator.of_parameters(named.items(), field)
    return {key: BlockDiagonalOperator({key: block}).to_dense() for key, block in H.blocks.items()}


def check(exact: Tensor, kfac: Tensor, ekfac: Tensor) -> None:
    scale = exact.norm()
    assert (ekfac @ kfac - kfac @ ekfac).norm() <= 1e-8 * scale * kfac.norm()
    assert abs(ekfac.trace() - exact.trace()) <= 1e-8 * scale
    assert abs((ekfac * exact).sum() - ekfac.square().sum()) <= 1e-8 * scale**2
    assert (ekfac - exact).norm() <= (kfac - exact).norm() + 1e-9 * scale


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("approx", APPROX)
@pytest.mark.parametrize("name", [name for name in CASES if name != TIED])
def test_closest_in_the_eigenbasis(name: str, approx: str, bias: str, reduction: str):
    options = {"approx": approx, "fisher": "exact", "bias": bias, "unsupported": "skip"}
    problem = run(CASES[name](reduction=reduction), KFAC(**options), EKFAC(**options))
    for path, module in layers(problem).items():
        kfac, ekfac = (dense(module, path, field, bias) for field in ("kfac", "ekfac"))
        assert kfac.keys() == ekfac.keys()
        for names, K in kfac.items():
            check(ggn_block(CASES[name](reduction=reduction), list(names)), K, ekfac[names])


def test_never_farther_than_kfac_and_often_closer():
    """A convolution with a pixel mean is far from expand's assumptions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    problem = Problem(model, (torch.rand(5, 2, 5, 4),), nn.MSELoss(), torch.randn(5, 3))
    problem.to(torch.float64)
    exact = ggn_block(problem, ["0.weight", "0.bias"])
    options = {"fisher": "exact", "bias": "joint"}
    run(problem, KFAC(**options), EKFAC(**options))
    K, E = (dense(model[0], "0", field, "joint")["0.weight", "0.bias"] for field in ("kfac", "ekfac"))
    # one position's gradient is far from the sum over positions
    assert (E - exact).norm() < 0.1 * (K - exact).norm()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ["mlp", "vit", "cnn"])
def test_empirical(name: str, reduction: str):
    """The exact block is then the sum of outer products of per-sample gradients, with r once."""
    options = {"fisher": "empirical", "unsupported": "skip"}
    problem = run(CASES[name](reduction=reduction), KFAC(**options), EKFAC(**options))
    reference = CASES[name](reduction=reduction)
    G = per_sample_grads(reference)
    for path, module in layers(problem).items():
        kfac, ekfac = (dense(module, path, field, "separate") for field in ("kfac", "ekfac"))
        for (parameter,), K in kfac.items():
            g = G[parameter].flatten(1)
            check(g.T @ g / loss_scale(reference), K, ekfac[parameter,])


def test_same_samples_as_kfac_with_one_generator():
    """Both share one sweep. Without a shared axis a bias's block is the sampled one in both."""
    problem, generator = CASES["mlp"](reduction="mean"), torch.Generator().manual_seed(0)
    options = {"fisher": "mc", "mc_samples": 1, "generator": generator}
    run(problem, KFAC(**options), EKFAC(**options))
    for key, p in problem.model.named_parameters():
        assert isinstance(p.ekfac, KroneckerEigen)
        if key.endswith("bias"):
            close(p.ekfac.to_dense(), p.kfac.to_dense())


def with_kfac(name: str) -> Problem:
    return run(CASES[name](reduction="mean"), KFAC(fisher="exact", bias="joint", unsupported="skip"))


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_bases_of_an_earlier_pass(name: str):
    first = with_kfac(name)
    named = dict(first.model.named_parameters())
    basis = {p: p.kfac for p in named.values() if hasattr(p, "kfac")}
    options = {"fisher": "exact", "bias": "joint", "unsupported": "skip"}
    run(first, EKFAC(**options), EKFAC(**options, basis=basis, savefield="later"))
    for p in basis:
        close(p.later.to_dense(), p.ekfac.to_dense())
        assert p.later.joint == p.kfac.joint
    eigen = {p: p.ekfac for p in basis}
    run(first, EKFAC(fisher="exact", basis=eigen, savefield="again", unsupported="skip"))
    for p in basis:
        close(p.again.to_dense(), p.ekfac.to_dense())


def test_over_a_data_set():
    """First the factors, then the eigenvalues; independent of the cut into batches."""
    problem, whole = CASES["mlp"](reduction="mean"), CASES["mlp"](reduction="mean")
    run(whole, EKFAC(fisher="exact"))
    (x,), y = problem.inputs, problem.target
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    named = dict(problem.model.named_parameters())
    with pytest.raises(UnsupportedError, match="collect KFAC, then collect EKFAC"):
        collect(problem.model, problem.loss_fn, batches, EKFAC(fisher="exact"), progress=False)
    kfac = collect(problem.model, problem.loss_fn, batches, KFAC(fisher="exact"), progress=False)["kfac"]
    basis = {named[name]: K for name, K in kfac.items()}
    ext = EKFAC(fisher="exact", basis=basis)
    found = collect(problem.model, problem.loss_fn, batches, ext, progress=False)["ekfac"]
    for name, p in whole.model.named_parameters():
        close(found[name].to_dense(), p.ekfac.to_dense())


def test_two_roles_of_a_parameter():
    with pytest.raises(
        UnsupportedError, match=r"shares a parameter with a layer that uses it in another role"
    ):
        run(CASES[TIED](reduction="mean"), EKFAC(unsupported="skip"))


def test_only_the_bias_is_trained():
    problem = CASES["mlp"](reduction="mean")
    for key, p in problem.model.named_parameters():
        p.requires_grad_(key.endswith("bias"))
    run(problem, KFAC(fisher="exact"), EKFAC(fisher="exact"))
    for key, p in problem.model.named_parameters():
        if key.endswith("bias"):
            close(p.ekfac.to_dense(), p.kfac.to_dense())  # S = 1: already exact in its own basis


def test_low_precision_network():
    problem = CASES["mlp"](reduction="mean")
    problem.to(torch.bfloat16)
    run(problem, EKFAC(fisher="exact"))
    for p in problem.model.parameters():
        assert p.ekfac.dtype == torch.float32 and bool(p.ekfac.values.isfinite().all())


def test_wrong_options():
    with pytest.raises(ValueError, match='fisher="forward" has no per-sample vectors'):
        EKFAC(fisher="forward")
    with pytest.raises(ValueError, match="approx='both'"):
        EKFAC("both")
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="expected Kronecker or KroneckerEigen"):
        EKFAC(basis={p: torch.eye(2)})


def test_wrong_bases():
    problem = CASES["mlp"](reduction="mean")
    with pytest.raises(UnsupportedError, match=r"`basis` has no block for the weight of"):
        run(problem, EKFAC(basis={}))
    wrong = {p: Kronecker(torch.eye(2), torch.eye(2)) for p in problem.model.parameters()}
    with pytest.raises(ValueError, match=r"block of sizes \(1, 2, 2\) for the weight of .*; expected"):
        run(problem, EKFAC(basis=wrong))


def test_training_mode_batch_norm_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    problem = Problem(model, (torch.randn(5, 3),), nn.MSELoss(), torch.randn(5, 2))
    with pytest.raises(UnsupportedError, match="batch norm in training mode"):
        run(problem, EKFAC(fisher="empirical", unsupported="skip"))


def test_several_losses_add_up():
    problem, twice = CASES["mlp"](reduction="mean"), CASES["mlp"](reduction="mean")
    run(problem, KFAC(fisher="exact"), EKFAC(fisher="exact"))
    basis = {
        p: q.kfac for p, q in zip(twice.model.parameters(), problem.model.parameters(), strict=True)
    }
    extend(twice.model), extend(twice.loss_fn)
    with backpack(EKFAC(fisher="exact", basis=basis), EKFAC(fisher="exact", savefield="own")):
        logits = twice.forward()
        (twice.loss_fn(logits, twice.target) + 2 * twice.loss_fn(logits, twice.target)).backward()
    for p, q in zip(twice.model.parameters(), problem.model.parameters(), strict=True):
        close(p.ekfac.to_dense(), 3 * q.ekfac.to_dense())
        close(p.own.trace(), 3 * q.ekfac.trace())


def test_low_precision_network_in_given_bases():
    problem = CASES["mlp"](reduction="mean")
    problem.to(torch.bfloat16)
    run(problem, KFAC(fisher="exact"))
    basis = {p: p.kfac for p in problem.model.parameters()}
    for dtype in (None, torch.float64):
        run(
            problem,
            EKFAC(fisher="exact", basis=basis, dtype=dtype),
            EKFAC(fisher="exact", savefield="own"),
        )
        for p in problem.model.parameters():
            assert p.ekfac.values.dtype == (dtype or torch.float32)
            assert p.ekfac.matvec(p.detach()).dtype == torch.bfloat16
            close(p.ekfac.values.float(), p.own.values, 1e-3)


def test_results_carry_no_graph():
    problem = CASES["mlp"](reduction="mean")
    extend(problem.model), extend(problem.loss_fn)
    with backpack(EKFAC(fisher="empirical"), KFAC(fisher="empirical")):
        problem.loss().backward(create_graph=True)
    for p in problem.model.parameters():
        assert not p.ekfac.values.requires_grad and not p.kfac.B.requires_grad
        p.grad = None
