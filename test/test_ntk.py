"""The empirical neural tangent kernel against contractions of dense Jacobians."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from lowrank_oracle import kernel, output_jacobian
from models import CASES, Problem
from oracle import close
from test_bare import BODIES as BARE
from test_bare import build as bare_problem
from test_lowrank_ggn import OTHERS, other
from test_norms import BUILD as NORMS
from test_norms import build as norm_problem
from torch import Tensor, nn

from backpack_ext import NTK, BatchGrad, UnsupportedError, backpack, extend

every_case = pytest.mark.parametrize("name", CASES)
FEW = ("mlp", "cnn", "vit_params", "char_gpt", "functional")
few_cases = pytest.mark.parametrize("name", FEW)


class Packed(nn.Module):
    """The problem `dict_input`, whose model takes a dict and a mask, as a function of one tensor."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        image, extra, mask = x.split([40, 4, 20], dim=1)
        batch = {"image": image.view(-1, 2, 5, 4), "extra": extra}
        return self.inner(batch, mask=mask.view(-1, 5, 4) > 0.5, scale=2.0)


def network(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A model of the registry and its data."""
    problem: Problem = CASES[name](seed=seed, dtype=dtype)
    if name != "dict_input":
        return problem.model, problem.inputs[0]
    batch, mask = problem.inputs[0], problem.kwargs["mask"]
    x = torch.cat([batch["image"].flatten(1), batch["extra"], mask.flatten(1).to(dtype)], dim=1)
    return Packed(problem.model), x


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    return output_jacobian(model, x, trainable(model))


@cache
def references(name: str) -> tuple[Tensor, Tensor]:
    """Jacobians of one model for two mini-batches, the second with one datum less."""
    model, x = network(name)
    _, y = network(name, seed=1)
    return jacobian(model, x), jacobian(model, y[:-1])


def data(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = network(name)
    return model, x, network(name, seed=1)[1][:-1]


# -- the registry ----------------------------------------------------------------------------------


@every_case
def test_full(name: str):
    model, x, y = data(name)
    J1, J2 = references(name)
    ntk = NTK(model)
    K = ntk.gram(x)
    assert K.shape == (len(x), len(x), J1.shape[1], J1.shape[1])
    close(K, kernel(J1, J1))
    K = ntk.gram(x, y)
    assert K.shape == (len(x), len(y), J1.shape[1], J1.shape[1])
    close(K, kernel(J1, J2))
    close(ntk.gram(y, x), K.permute(1, 0, 3, 2))


@every_case
def test_trace(name: str):
    model, x, y = data(name)
    J1, J2 = references(name)
    ntk = NTK(model, outputs="trace")
    for K, expected in (
        (ntk.gram(x), kernel(J1, J1)),
        (ntk.gram(x, y), kernel(J1, J2)),
        (ntk.gram(y, x), kernel(J2, J1)),
    ):
        assert K.shape == expected.shape[:2]
        close(K, expected.diagonal(dim1=2, dim2=3).sum(2))


@pytest.mark.parametrize("outputs", [[0], [1, 0], (0, 1), torch.tensor([1])])
@every_case
def test_chosen_outputs(name: str, outputs: Sequence[int] | Tensor):
    model, x, y = data(name)
    J1, J2 = references(name)
    ntk = NTK(model, outputs=outputs)
    index = list(map(int, outputs))
    close(ntk.gram(x), kernel(J1[:, index], J1[:, index]))
    close(ntk.gram(x, y), kernel(J1[:, index], J2[:, index]))


@every_case
def test_features(name: str):
    """A gram matrix takes data or features, in any combination."""
    model, x, y = data(name)
    J1, J2 = references(name)
    for outputs in ("full", "trace"):
        ntk = NTK(model, outputs=outputs)
        f, g = ntk.features(x), ntk.features(y)
        expected = kernel(J1, J2)
        if outputs == "trace":
            expected = expected.diagonal(dim1=2, dim2=3).sum(2)
        for one, two in ((f, g), (f, y), (x, g)):
            close(ntk.gram(one, two), expected)
        close(ntk.gram(f), ntk.gram(x))


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Move all parameters; return the state before."""
    before = {k: t.detach().clone() for k, t in model.state_dict().items()}
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape).to(p))
    return before


@every_case
def test_two_parameter_states(name: str):
    """`K_tt + K_00 - K_t0 - K_0t` is the Gram matrix of what the Jacobian changed by."""
    model, x, y = data(name)
    J0, J0y = references(name)
    state = moved(model)
    after = {k: p.detach().clone() for k, p in model.named_parameters()}
    Jt, Jty = jacobian(model, x), jacobian(model, y)
    assert (Jt - J0).abs().max() > 1e-3 * J0.abs().max()
    ntk = NTK(model)
    now, then = ntk.features(x), ntk.features(x, parameters=state)
    other_now, other_then = ntk.features(y), ntk.features(y, parameters=state)
    close(ntk.gram(now), kernel(Jt, Jt))
    close(ntk.gram(then), kernel(J0, J0))
    close(ntk.gram(then, now), kernel(J0, Jt))
    close(ntk.gram(now, other_then), kernel(Jt, J0y))
    change = (
        ntk.gram(now, other_now)
        + ntk.gram(then, other_then)
        - ntk.gram(now, other_then)
        - ntk.gram(then, other_now)
    )
    close(change, kernel(Jt - J0, Jty - J0y), 1e-9)
    for k, p in model.named_parameters():
        assert torch.equal(p, after[k])


@few_cases
def test_only_parameters_in_the_state(name: str):
    """Buffers need not be given; nor parameters that did not move."""
    model, x, _ = data(name)
    J0, _ = references(name)
    state = {k: p.detach().clone() for k, p in model.named_parameters()}
    moved(model)
    ntk = NTK(model)
    close(ntk.gram(ntk.features(x, parameters=state)), kernel(J0, J0))


@every_case
def test_nothing_is_touched(name: str):
    model, x, y = data(name)
    model.train(name != "resnet")
    before = {}
    for k, p in model.named_parameters():
        p.grad = torch.randn_like(p)
        before[k] = (p.detach().clone(), p.grad, p.grad.clone(), p.requires_grad, set(vars(p)))
    buffers = {k: t.clone() for k, t in model.named_buffers()}
    mode, state = [m.training for m in model.modules()], torch.get_rng_state()
    ntk = NTK(model)
    ntk.gram(x, y)
    ntk.gram(ntk.features(x, parameters=dict(model.state_dict())), y)
    for k, p in model.named_parameters():
        value, grad, numbers, requires_grad, attributes = before[k]
        assert torch.equal(p, value) and p.grad is grad and torch.equal(grad, numbers)
        assert p.requires_grad == requires_grad and set(vars(p)) == attributes
    assert all(torch.equal(t, buffers[k]) for k, t in model.named_buffers())
    assert [m.training for m in model.modules()] == mode
    assert torch.equal(torch.get_rng_state(), state)
    assert not x.requires_grad


# -- other networks --------------------------------------------------------------------------------


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{f"bare: {name}": lambda name=name: bare_problem(name, 3)[:2] for name in BARE},
    **{
        f"norm: {name}": lambda name=name: (lambda p: (p.model, p.inputs[0]))(norm_problem(name))
        for name in NORMS
    },
    **{
        name: lambda name=name: (lambda p: (p.model, p.inputs[0]))(other(name))
        for name in OTHERS
        if ":" not in name
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks(name: str):
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    J = jacobian(model, x)
    close(NTK(model).gram(x, x[:2]), kernel(J, J[:2]))
    close(NTK(model, "trace").gram(x), kernel(J, J).diagonal(dim1=2, dim2=3).sum(2))


def mlp(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model.to(dtype), torch.randn(6, 4).to(dtype)


def test_one_output():
    """`[N]` and `[N, 1]`."""
    model, x = mlp()
    for head in (nn.Linear(3, 1).double(), nn.Sequential(nn.Linear(3, 1).double(), nn.Flatten(0))):
        whole = nn.Sequential(model, head)
        J = jacobian(whole, x)
        close(NTK(whole).gram(x, x[:1]), kernel(J, J[:1]))
        close(NTK(whole, "trace").gram(x), kernel(J, J)[:, :, 0, 0])


@pytest.mark.parametrize("N, M", [(1, 6), (6, 1), (1, 1), (5, 3)])
def test_batch_sizes(N: int, M: int):
    """Among them some that the network's own axes have."""
    for name in ("functional", "char_gpt", "vit_params"):
        model, x = network(name)
        x = torch.cat([x, network(name, seed=1)[1]])
        J = jacobian(model, x)
        close(NTK(model).gram(x[:N], x[:M]), kernel(J[:N], J[:M]))


def test_frozen_parameters_do_not_count():
    model, x = mlp()
    model[0].weight.requires_grad_(False)
    J = jacobian(model, x)
    close(NTK(model).gram(x), kernel(J, J))
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_gradient_mode(context: type):
    model, x = mlp()
    J = jacobian(model, x)
    with context():
        K = NTK(model).gram(x)
    close(K, kernel(J, J))
    assert not K.requires_grad


def test_symmetric_and_positive():
    model, x = mlp()
    K = NTK(model).gram(x).permute(0, 2, 1, 3).reshape(18, 18)
    close(K, K.T)
    assert torch.linalg.eigvalsh(K)[0] > -1e-12 * K.trace()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_data_types(dtype: torch.dtype, tolerance: float):
    model, x = mlp(dtype)
    K = NTK(model).gram(x)
    J = jacobian(copy.deepcopy(model).double(), x.double())
    close(K.double(), kernel(J, J), tolerance)


@few_cases
def test_of_an_extended_model(name: str):
    """Extended or not, before and after; other quantities are undisturbed."""
    model, x, y = data(name)
    J1, J2 = references(name)
    extend(model)
    ntk = NTK(model)
    close(ntk.gram(x, y), kernel(J1, J2))
    with backpack(BatchGrad()):
        model(x).sum().backward()
    for k, p in model.named_parameters():
        assert p.grad_batch.shape == (len(x), *p.shape), k
    close(ntk.gram(x, y), kernel(J1, J2))


def test_the_gram_matrix_of_a_network_that_moves():
    """Each call sees the parameters of its time; features keep theirs."""
    model, x = mlp()
    ntk = NTK(model)
    J0, f = jacobian(model, x), ntk.features(x)
    moved(model)
    J1 = jacobian(model, x)
    close(ntk.gram(x), kernel(J1, J1))
    close(ntk.gram(f), kernel(J0, J0))
    close(ntk.gram(f, x), kernel(J0, J1))


# -- wrong use -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False)])
@pytest.mark.parametrize("outputs", ["full", "trace", [0]])
def test_training_mode_batch_norm(norm: nn.Module, outputs: str | list[int]):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 3)), torch.randn(6, 4)
    norm.train()
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(UnsupportedError, match=r"couples the data.*eval\(\)"):
        NTK(model, outputs).gram(x)
    norm.load_state_dict(before)
    model.eval()
    J = jacobian(model, x)
    K = NTK(model).gram(x)
    close(K, kernel(J, J), 1e-5)


@pytest.mark.parametrize("outputs", ["diagonal", [], [3], [-4], 1.5, [0.5], None])
def test_wrong_outputs(outputs: object):
    model, x = mlp()
    with pytest.raises((ValueError, TypeError, IndexError), match="outputs"):
        NTK(model, outputs=outputs).gram(x)


def test_wrong_arguments():
    model, x = mlp()
    with pytest.raises(TypeError, match=r"NTK.*[Mm]odule|Instantiate"):
        NTK(nn.Linear)
    ntk = NTK(model)
    with pytest.raises((KeyError, ValueError), match="nowhere"):
        ntk.features(x, parameters={"nowhere": torch.zeros(1)})
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size"):
        ntk.features(x, parameters={"0.weight": torch.zeros(1).double()})
    features = NTK(nn.Linear(4, 3).double()).features(x)
    with pytest.raises(ValueError, match="different parameters"):
        ntk.gram(features, x)


def test_works_after_an_error():
    model, x = mlp()
    ntk = NTK(model)
    with pytest.raises(RuntimeError):
        ntk.gram(x[:, :3])
    J = jacobian(model, x)
    p = model[0].weight
    assert p.grad is None
    close(ntk.gram(x), kernel(J, J))


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_transformers(name: str):
    from test_huggingface import build  # skips without transformers

    class Logits(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).logits

    problem = build(name)
    model, x = Logits(problem.model), problem.inputs[0]
    J = jacobian(model, x)
    close(NTK(model).gram(x, x[:2]), kernel(J, J[:2]), 1e-9)
    close(NTK(model, "trace").gram(x), kernel(J, J).diagonal(dim1=2, dim2=3).sum(2), 1e-9)
