"""The dense oracle of low-rank curvature by second routes: functional Jacobians, finite differences."""

from functools import cache

import pytest
import torch
from lowrank_oracle import (
    Dense,
    clusters,
    dense,
    descending,
    kernel,
    newton_step,
    outer,
    output_jacobian,
    root,
)
from models import CASES, Problem
from oracle import close, ggn_diag
from test_bare import build as bare_problem
from test_losses import LOSSES, N
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

every_case = pytest.mark.parametrize("name", CASES)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@cache
def computed(name: str, reduction: str = "mean") -> tuple[Problem, Dense]:
    problem = CASES[name](reduction=reduction)
    return problem, dense(problem)


def of_loss(name: str, reduction: str) -> tuple[Problem, Problem]:
    """A small network in front of one of `test_losses.LOSSES`: as it is laid out there, and datum-major.

    Both problems share the model; the second is for the oracle.
    """
    make_loss, shape, make_target, sequence_first = LOSSES[name]
    torch.manual_seed(0)
    numel = torch.Size(shape).numel()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, numel // N)).double()
    x, loss_fn, target = torch.randn(N, 4), make_loss(reduction=reduction), make_target()

    def rows(z: Tensor) -> Tensor:
        if sequence_first:
            z = z.view(N, -1, shape[1]).transpose(0, 1)
        return z.reshape(shape)

    problem = Problem(model, (x,), loss_fn, target, readout=rows).to(torch.float64)
    plain = Problem(model, problem.inputs, loss_fn, problem.target, readout=lambda z: z.reshape(shape))
    if sequence_first:
        plain.target = problem.target.unflatten(0, (-1, N)).transpose(0, 1).flatten(0, 1)
    return problem, plain


def logits(problem: Problem, parameters: dict[str, Tensor]) -> Tensor:
    """The logits as a function of the parameters; a tied one is a single argument."""
    return problem.readout(
        functional_call(problem.model, parameters, problem.inputs, problem.kwargs, tie_weights=True)
    )


def flat(tensors: dict[str, Tensor], names: list[str], dims: int) -> Tensor:
    return torch.cat([tensors[name].flatten(dims) for name in names], dim=dims)


@every_case
def test_jacobian_and_matrix_by_functional_calls(name: str):
    problem, found = computed(name)
    parameters = {k: p.detach() for k, p in problem.model.named_parameters()}
    J = jacrev(lambda q: logits(problem, q).reshape(problem.batch_size, -1))(parameters)
    J = flat(J, found.names, 2)
    close(found.J, J)
    z = logits(problem, parameters)
    H = torch.func.hessian(lambda f: problem.loss_fn(f.view_as(z), problem.target))(z.flatten())
    close(found.matrix(), J.flatten(0, 1).T @ H @ J.flatten(0, 1), 1e-9)


@every_case
def test_products_by_differences(name: str):
    """`v^T G v` is the second derivative of the loss of the linearised network."""
    problem, found = computed(name)
    parameters = {k: p.detach() for k, p in problem.model.named_parameters()}
    torch.manual_seed(0)
    v = {k: torch.randn_like(p) for k, p in parameters.items()}
    h = 1e-6
    ahead, behind = (logits(problem, {k: p + a * v[k] for k, p in parameters.items()}) for a in (h, -h))
    z, dz = logits(problem, parameters), (ahead - behind) / (2 * h)
    step = 1e-3 / dz.abs().max()
    loss = [problem.loss_fn(z + a * step * dz, problem.target) for a in (-2, -1, 0, 1, 2)]
    second = (-loss[0] + 16 * loss[1] - 30 * loss[2] + 16 * loss[3] - loss[4]) / (12 * step**2)
    w = flat(v, found.names, 0)
    torch.testing.assert_close(w @ found.matrix() @ w, second, rtol=1e-5, atol=1e-9)


@every_reduction
@every_case
def test_slopes_and_shares_add_up(name: str, reduction: str):
    problem, found = computed(name, reduction)
    problem.model.zero_grad()
    problem.loss().backward()
    grads = {k: p.grad for k, p in problem.model.named_parameters()}
    close(found.gradient, flat(grads, found.names, 0))
    values, E = descending(found.matrix())
    E = E[:5]
    close(found.curvatures(E).mean(0), values[:5])
    close(found.curvatures(E, [0, 2]).mean(0), (E @ found.matrix([0, 2]) * E).sum(1))
    mean, total = (computed(name, how)[1] for how in ("mean", "sum"))
    close(mean.slopes, mean.scale * total.slopes)
    close(mean.matrix(), mean.scale * total.matrix())


@pytest.mark.parametrize("name", ["mlp", "mlp_mse", "mlp_bce"])
def test_slopes_and_curvatures_are_those_of_a_loss_of_one_datum(name: str):
    """Slope and curvature of a mean loss of that datum alone."""
    problem, found = computed(name)
    x, target = problem.inputs[0], problem.target
    _, E = descending(found.matrix())
    for n in range(problem.batch_size):
        one = Problem(problem.model, (x[n : n + 1],), problem.loss_fn, target[n : n + 1])
        alone = dense(one)
        close(alone.gradients(E[:4])[0], found.gradients(E[:4])[n])
        close(alone.curvatures(E[:4])[0], found.curvatures(E[:4])[n])


@every_reduction
@pytest.mark.parametrize("name", CASES)
def test_root(name: str, reduction: str):
    problem, found = computed(name, reduction)
    S = root(problem, found.H)
    close(torch.einsum("vnd,vne->nde", S, S), found.H)
    close(outer(found.columns(S)), found.matrix())


@every_reduction
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, reduction: str):
    """Hessian and gradient of each loss, by one call of it per datum."""
    _, problem = of_loss(name, reduction)
    found = dense(problem)
    S = root(problem, found.H)
    close(torch.einsum("vnd,vne->nde", S, S), found.H)
    problem.loss().backward()
    grads = {k: p.grad for k, p in problem.model.named_parameters()}
    close(found.gradient, flat(grads, found.names, 0))


def test_empirical_columns():
    """Of a mean loss with one term per datum: `1/N sum_n grad l_n grad l_n^T`, times c for `c l`."""
    problem, found = computed("mlp")
    expected = found.slopes.T @ found.slopes / found.N
    close(outer(found.gradient_columns()), expected)
    close(outer(dense(problem, factor=0.25).gradient_columns()), expected / 4)
    close(outer(computed("mlp", "sum")[1].gradient_columns()), found.N * expected)


def test_newton_step_solves():
    """On the range of the matrix."""
    _, found = computed("mlp")
    values, E = descending(found.matrix())
    keep = values > 1e-10 * values[0]
    E = E[keep]
    step = newton_step(found.gradients(E), found.curvatures(E), 0.1, E)
    g = E.T @ (E @ found.gradient)
    close(step, -torch.linalg.solve(found.matrix() + 0.1 * torch.eye(len(g)).double(), g))


def test_rows_of_some_parameters():
    problem, found = computed("mlp")
    shapes = {k: p.shape for k, p in problem.model.named_parameters()}
    names = ["4.bias", "0.weight"]
    some, direct = found.of(names, shapes), dense(problem, names)
    close(some.matrix(), direct.matrix())
    close(some.slopes, direct.slopes)


def test_parameters_without_axes():
    """A temperature, a single number, among others."""
    model, x, y = bare_problem("tokens", 3)
    problem = Problem(model, (x,), nn.CrossEntropyLoss(), y)
    found, diagonal = dense(problem), ggn_diag(problem)
    close(found.matrix().diagonal(), torch.cat([diagonal[name].flatten() for name in found.names]))
    assert found.slopes.shape == (3, len(found.matrix()))


def test_clusters():
    assert clusters(torch.tensor([3.0, 2.0, 1.9999, 1.0]), 0.01) == [[0], [1, 2], [3]]
    assert clusters(torch.tensor([]), 0.01) == []


@pytest.mark.parametrize("name", ["mlp", "cnn", "functional", "char_gpt", "vit_params"])
def test_kernel_by_functional_calls(name: str):
    problem, _ = computed(name)
    parameters = {k: p.detach() for k, p in problem.model.named_parameters()}
    x = problem.inputs[0]

    def one(q: dict[str, Tensor], datum: Tensor) -> Tensor:
        out = functional_call(problem.model, q, (datum[None],), tie_weights=True)
        return out.flatten()

    rows = vmap(jacrev(one), (None, 0))(parameters, x)
    J = torch.cat([t.flatten(2) for t in rows.values()], dim=2)
    direct = output_jacobian(problem.model, x, list(problem.model.parameters()))
    close(direct, J)
    K = kernel(direct[:2], direct)
    close(K, torch.stack([torch.stack([J[n] @ J[m].T for m in range(len(x))]) for n in range(2)]))
    # a step along the gradient of an output moves the others by the kernel
    c, h = 1, 1e-5
    moved, sizes = {}, [p.numel() for p in parameters.values()]
    for sign in (-1, 1):
        state = dict(zip(parameters, direct[0, c].split(sizes), strict=True))
        state = {k: p + sign * h * state[k].view_as(p) for k, p in parameters.items()}
        moved[sign] = functional_call(problem.model, state, (x,), tie_weights=True).flatten(1)
    torch.testing.assert_close((moved[1] - moved[-1]) / (2 * h), K[0, :, c], rtol=1e-5, atol=1e-6)
