"""The oracles against each other and against closed forms."""

import pytest
import torch
from models import CASES, Problem
from oracle import (
    LAYERS,
    ggn_block,
    ggn_blocks,
    ggn_diag,
    jacobian,
    kfac_factors,
    kronecker_block,
    layer_calls,
    loss_scale,
    normal_form,
    normal_inputs,
    normal_outputs,
    normal_weight,
    output_hessian,
    per_sample_grads,
    per_sample_losses,
)
from torch import Tensor, nn

REDUCTIONS = ("mean", "sum")
every_case = pytest.mark.parametrize("name", CASES)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp_min(1e-300).item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * max(scale, 1e-3))


def layers(problem: Problem) -> dict[str, nn.Module]:
    return {k: m for k, m in problem.model.named_modules() if isinstance(m, LAYERS)}


@every_case
def test_zoo_is_tiny_and_deterministic(name: str):
    state = torch.get_rng_state()
    problem, again, other = CASES[name](), CASES[name](), CASES[name](seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in problem.model.parameters()) <= 1500
    assert problem.name == name and problem.batch_size >= 3
    assert problem.loss().dtype == torch.float64
    assert torch.equal(problem.loss(), again.loss()) and problem.loss() != other.loss()
    assert problem.loss().item() == pytest.approx(
        CASES[name](dtype=torch.float32).loss().item(), rel=1e-4
    )


@every_reduction
@every_case
def test_per_sample_gradients_sum_to_the_gradient(name: str, reduction: str):
    problem = CASES[name](reduction=reduction)
    close(per_sample_losses(problem).sum(), problem.loss())
    problem.loss().backward()
    grads = per_sample_grads(problem)
    for key, param in problem.model.named_parameters():
        close(grads[key].sum(0), param.grad)


@every_case
def test_diagonal_is_the_diagonal_of_the_blocks(name: str):
    problem = CASES[name]()
    diag, blocks = ggn_diag(problem), ggn_blocks(problem)
    for key, block in blocks.items():
        close(block, block.T)
        close(diag[key].flatten(), block.diagonal())
    first, *_, last = blocks
    joint = ggn_block(problem, [last, first])
    p = len(blocks[last])
    close(joint[:p, :p], blocks[last])
    close(joint[p:, p:], blocks[first])


@every_case
def test_normal_inputs_reproduce_the_layer(name: str):
    with torch.no_grad():
        for call in layer_calls(CASES[name]())[0]:
            z = normal_inputs(call.module, call.x) @ normal_weight(
                call.module, call.module.weight
            ).transpose(1, 2).unsqueeze(1)
            bias = getattr(call.module, "bias", None)
            if bias is not None:
                z = z + bias.view(len(z), 1, 1, -1)
            close(z, normal_outputs(call.module, call.z))


@every_case
def test_normal_form_gives_the_weight_jacobian(name: str):
    """`d f_nd / d W = sum_s J_nds a_ns^T`, over all calls and ties of W."""
    problem = CASES[name]()
    seen: dict[nn.Parameter, Tensor] = {}
    for path, module in layers(problem).items():
        a, J = normal_form(problem, path)
        product = torch.einsum("gndso,gnsi->ndgoi", J, a)
        place = normal_weight(
            module, torch.arange(module.weight.numel()).view(module.weight.shape)
        ).flatten()
        full = torch.empty_like(product.flatten(2))
        full[..., place] = product.flatten(2)
        seen[module.weight] = seen.get(module.weight, 0) + full.view(
            *full.shape[:2], *module.weight.shape
        )
    expected = jacobian(problem)
    for key, param in problem.model.named_parameters():
        if param in seen:
            close(seen[param], expected[key])


@every_reduction
@every_case
def test_reduce_is_exact_for_separate_biases(name: str, reduction: str):
    problem = CASES[name](reduction=reduction)
    blocks = ggn_blocks(problem)
    for path, module in layers(problem).items():
        if getattr(module, "bias", None) is None:
            continue
        B, _ = kfac_factors(problem, "reduce", path)
        B = B.reshape(-1, *B.shape[-2:])
        exact = blocks[f"{path}.bias"].view(len(B), B.shape[1], len(B), B.shape[1])
        for g, block in enumerate(B):
            close(block, exact[g, :, g])


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@every_reduction
def test_linear_regression_is_one_kronecker_product(reduction: str, approx: str):
    """One Linear, MSE: `B = 2 r N I`, `A = X^T X / N`, and the GGN is `B (x) A`."""
    torch.manual_seed(0)
    x, target = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    loss_fn = nn.MSELoss(reduction=reduction)
    problem = Problem(nn.Linear(3, 2).double(), (x,), loss_fn, target)
    assert loss_scale(problem) == pytest.approx(1 if reduction == "sum" else 1 / 10)
    B, A = kfac_factors(problem, approx, "")
    close(B, 2 * loss_scale(problem) * 5 * torch.eye(2).double())
    close(A, x.T @ x / 5)
    close(kronecker_block(problem.model, B, A), ggn_block(problem, ["weight"]))
    B, A = kfac_factors(problem, approx, "", bias="joint")
    close(kronecker_block(problem.model, B, A), ggn_block(problem, ["weight", "bias"]))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_one_datum_without_shared_axis_is_exact(approx: str):
    problem = CASES["mlp"]()
    problem.inputs, problem.target = (problem.inputs[0][:1],), problem.target[:1]
    for path, module in layers(problem).items():
        B, A = kfac_factors(problem, approx, path, bias="joint")
        exact = ggn_block(problem, [f"{path}.weight", f"{path}.bias"])
        close(kronecker_block(module, B, A), exact)


@pytest.mark.parametrize("pool, exact_for", [(False, "expand"), (True, "reduce")])
def test_linear_nets_on_tokens(pool: bool, exact_for: str):
    """Per-token outputs make expand exact and reduce wrong; a token mean the other way round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    x, target = torch.rand(6, 5, 4).double(), torch.rand(6, 5, 2).double()
    readout = (lambda out: out.mean(1)) if pool else (lambda out: out)
    target = target.mean(1) if pool else target
    problem = Problem(model, (x,), nn.MSELoss(reduction="sum"), target, readout=readout)
    exact = ggn_block(problem, ["0.weight", "0.bias"])
    for approx in ("expand", "reduce"):
        B, A = kfac_factors(problem, approx, "0", bias="joint")
        error = (kronecker_block(model[0], B, A) - exact).norm() / exact.norm()
        assert error < 1e-12 if approx == exact_for else error > 0.02


def test_pooled_conv_transpose_is_exact_in_reduce():
    """A grouped layer whose weight is laid out the other way round, no padding, averaged."""
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 6, (3, 2), stride=2, groups=2, bias=False).double()
    x, target = torch.randn(3, 4, 3, 2).double(), torch.randn(3, 6).double()
    loss_fn = nn.MSELoss(reduction="sum")
    problem = Problem(model, (x,), loss_fn, target, readout=lambda out: out.mean((2, 3)))
    B, A = kfac_factors(problem, "reduce", "")
    assert B.shape == (2, 3, 3) and A.shape == (2, 12, 12)
    close(kronecker_block(model, B, A), ggn_block(problem, ["weight"]))


def test_token_loss_has_no_columns_across_positions():
    """Each row of `logits.view(-1, V)` has its own block, an ignored one has none."""
    problem = CASES["char_gpt"]()
    H = output_hessian(problem).view(3, 5, 7, 5, 7)
    kept = problem.target.view(3, 5) != -100
    assert loss_scale(problem) == pytest.approx(1 / kept.sum().item())
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    assert not H.movedim(3, 2)[:, off_diagonal].any()
    assert torch.equal(H.movedim(3, 2).flatten(3).any(-1).diagonal(dim1=1, dim2=2), kept)


def test_embedding_inputs_are_one_hot():
    problem = CASES["char_gpt"]()
    a, J = normal_form(problem, "tok")
    close(a[0], nn.functional.one_hot(problem.inputs[0], 7).double())
    assert J.shape == (1, 3, 35, 5, 6)
    a, _ = normal_form(problem, "pos")
    close(a[0], torch.eye(9).double()[:5].expand(3, 5, 9))


def test_calls_share_one_axis():
    """`mix` is called on `[N T, 6]` and on `[N, T, 6]`: S = 2 T."""
    a, J = normal_form(CASES["functional"](), "mix")
    assert a.shape == (1, 3, 8, 6) and J.shape == (1, 3, 7, 8, 6)
