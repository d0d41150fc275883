"""The dense oracle of the natural-gradient optimizers against hand-worked numbers and other oracles."""

import pytest
import torch
from natural_cases import CASES, MANY_STRUCTURES, pair
from natural_oracle import Natural, Options, factors, kept, project, restrict
from torch import nn

from backpack_ext import KFAC, backpack, extend
from curvature import STRUCTURES

pytestmark = pytest.mark.usefixtures("double")


def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum()


def one_layer(weight: float, bias: float) -> nn.Linear:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, weight)
    nn.init.constant_(layer.bias, bias)
    return layer


X, ZERO = torch.tensor([[1.0], [2.0]]).double(), torch.zeros(2, 1).double()


def test_projections_by_hand():
    M = torch.tensor([[1.0, 2.0, 3.0], [2.0, 5.0, 4.0], [3.0, 4.0, 6.0]])
    expected = {
        "lower-triangular": [[1, 0, 0], [4, 5, 0], [6, 8, 6]],
        "upper-toeplitz": [[4, 6, 6], [0, 4, 6], [0, 0, 4]],
        "diagonal": [[1, 0, 0], [0, 5, 0], [0, 0, 6]],
    }
    for name, value in expected.items():
        torch.testing.assert_close(project(name, M), torch.tensor(value).double())
    found = project("hierarchical", M, k1=1, k2=1)
    torch.testing.assert_close(found, torch.tensor([[1, 4, 6], [0, 5, 0], [0, 8, 6]]).double())
    found = project("block-diagonal", M, block=2)  # symmetric: nothing is doubled
    torch.testing.assert_close(found, torch.tensor([[1, 2, 0], [2, 5, 0], [0, 0, 6]]).double())


@pytest.mark.parametrize("structure", MANY_STRUCTURES, ids=str)
@pytest.mark.parametrize("d", [1, 3, 6])
def test_projections_are_those_of_the_classes(structure, d):
    (name, options), _ = pair(structure)
    S = torch.randn(2, d, 4)
    found = STRUCTURES[name].project(S @ S.mT, **options).to_dense()
    torch.testing.assert_close(found, project(name, S @ S.mT, **options))
    M = torch.randn(2, d, d)
    torch.testing.assert_close(
        STRUCTURES[name].from_dense(M, **options).to_dense(), restrict(name, M, **options)
    )
    # a Lie algebra: products stay in the structure, and P(M) + P(M)^T = 2 M where the structure
    # keeps an entry or its mirror image
    N = restrict(name, M, **options) @ restrict(name, torch.randn(d, d), **options)
    torch.testing.assert_close(N, restrict(name, N, **options))
    if "toeplitz" not in name:
        keep, P = kept(name, d, **options), project(name, S @ S.mT, **options)
        torch.testing.assert_close(P + P.mT, 2 * (S @ S.mT) * (keep | keep.T))


def test_factors_by_hand():
    """``l_n = (w x_n)^2``: the slopes at the output are 2 w x_n = 2, 4."""
    layer = one_layer(1.0, 0.0)
    for scale, B in ((1.0, 20.0), (0.5, 10.0)):  # a sum; a mean over two terms
        ((A, found),) = factors(layer, squares, [(X, ZERO, scale)], "expand", lambda _: True).values()
        torch.testing.assert_close(A[0], torch.tensor([[2.5, 1.5], [1.5, 1.0]]))
        torch.testing.assert_close(found[0], torch.tensor([[B]]))
    parts = [(X[:1], ZERO[:1], 0.5), (X[1:], ZERO[1:], 0.5)]  # the same batch in two passes
    ((A, found),) = factors(layer, squares, parts, "reduce", lambda _: False).values()
    assert A.item() == 2.5 and abs(found.item() - 10.0) < 1e-12


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_factors_are_those_of_the_extension(case, joint, reduction, approx):
    model = extend(case.model())
    parts = case.parts([5], reduction)
    loss_fn = case.loss_fn(reduction)
    ((x, y, _),) = parts
    ext = KFAC(approx, "empirical", bias="joint" if joint else "separate")
    with backpack(ext):
        loss_fn(*case.flat(model(x), y)).backward()

    def joins(module: nn.Module) -> bool:
        return joint and getattr(module, "bias", None) is not None

    found = factors(model, case.total, case.scaled(parts, reduction), approx, joins)
    modules = dict(model.named_modules())
    assert {f"{name}.weight" for name in found} == {
        f"{name}.weight" for name, m in modules.items() if hasattr(getattr(m, "weight", None), "kfac")
    } - {"1.weight" for m in modules.values() if isinstance(m, nn.LayerNorm)}
    for name, (A, B) in found.items():
        block = modules[name].weight.kfac
        if isinstance(modules[name], nn.Embedding):
            A = A.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(A, block.A.reshape(A.shape), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(B, block.B.reshape(B.shape), rtol=1e-12, atol=1e-14)


def test_a_step_of_singd_by_hand():
    """W = 1, one datum x = 1 without bias: A = 1, B = 4, gradient 2; all matrices are numbers."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    options = Options(lr=0.5, damping=0.1, lr_cov=0.2, alpha1=0.5, weight_decay=0.01, momentum=0.9)
    opt = Natural(layer, squares, "singd", options)
    opt.step([(X[:1], ZERO[:1], 1.0)])
    # m_K = 1/2 (4 * 1 + 0.1 - 1) = 1.55 = m_C with H_K = 1, H_C = 4
    state = opt.layers[""].state
    for name in "KC":
        assert abs(state["m_" + name].item() - 1.55) < 1e-12
        assert abs(state[name].item() - (1 - 0.2 * 1.55)) < 1e-12
    V = 0.69**4 * 2 + 0.01
    assert abs(layer.weight.item() - (1 - 0.5 * V)) < 1e-12
    # second step: the loss and its slope at the new weight
    w, K = layer.weight.item(), 0.69
    opt.step([(X[:1], ZERO[:1], 1.0)])
    B = (2 * w) ** 2
    m = 0.5 * 1.55 + 0.5 * (K**2 * B * K**2 + 0.1 * K**2 * K**2 - 1)
    K = K - 0.2 * K * m
    V = 0.9 * V + K**4 * 2 * w + 0.01 * w
    assert abs(layer.weight.item() - (w - 0.5 * V)) < 1e-12


def test_a_step_of_kfac_by_hand():
    """A = 1, B = 4, gradient 2: pi = 1/2."""
    for inverse, N in (("pi", 2 / (4 + 0.2) / (1 + 0.05)), ("exact", 2 / 4.01)):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, 1.0)
        options = Options(lr=0.5, damping=0.01, momentum=0.0, inverse=inverse)
        opt = Natural(layer, squares, "kfac", options)
        opt.step([(X[:1], ZERO[:1], 1.0)])
        assert abs(layer.weight.item() - (1 - 0.5 * N)) < 1e-12
