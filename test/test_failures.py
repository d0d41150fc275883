"""What BackPACK 1.7 gets wrong or refuses, and what happens here: the rows of the README's table."""

import copy
import re
from importlib.metadata import version
from pathlib import Path

import backpack as theirs
import pytest
import torch
from backpack import extensions
from backpack.custom_module.branching import Parallel
from backpack.custom_module.permute import Permute
from models import Problem
from oracle import close, ggn_diag, kfac_factors, per_sample_grads
from torch import Tensor, nn

from backpack_ext import KFAC, BatchGrad, BatchL2Grad, DiagGGN, backpack, extend

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.skipif(not version("backpack-for-pytorch").startswith("1.7"), reason="BackPACK 1.7"),
    pytest.mark.filterwarnings("ignore:The output of:UserWarning"),
]

N, C = 4, 3


def problem(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Problem:
    return Problem(model, (x,), nn.CrossEntropyLoss(), torch.randint(C, (len(x),)) if y is None else y)


def of_backpack(p: Problem, ext, total=lambda loss: loss) -> dict[str, Tensor]:
    """Run BackPACK on a copy; the results of parameters that have one."""
    model, loss_fn = theirs.extend(copy.deepcopy(p.model)), theirs.extend(copy.deepcopy(p.loss_fn))
    with theirs.backpack(ext):
        total(loss_fn(model(*p.inputs), p.target)).backward()
    named = dict(model.named_parameters())
    return {k: getattr(q, ext.savefield) for k, q in named.items() if hasattr(q, ext.savefield)}


def of_ours(p: Problem, ext, total=lambda loss: loss) -> dict[str, Tensor]:
    """Run our extension on a copy."""
    model, loss_fn = extend(copy.deepcopy(p.model)), extend(copy.deepcopy(p.loss_fn))
    with backpack(ext):
        total(loss_fn(model(*p.inputs), p.target)).backward()
    return {k: getattr(q, ext.savefield) for k, q in model.named_parameters()}


def ours_agree(p: Problem) -> None:
    """Our per-sample gradients and GGN diagonals are those of plain autograd."""
    for expected, found in (
        (per_sample_grads(p), of_ours(p, BatchGrad())),
        (ggn_diag(p), of_ours(p, DiagGGN())),
    ):
        assert expected.keys() == found.keys()
        for name in expected:
            close(found[name], expected[name])


def wrong(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Name the parameters whose result is off by more than a percent; the others are right."""
    names = []
    for name, value in found.items():
        if (value - expected[name]).norm() > 0.01 * expected[name].norm():
            names.append(name)
        else:
            close(value, expected[name])
    return names


def test_views_of_one_activation():
    """Vectors are kept by the address of a tensor, and a view has the address of its base."""

    def net(*order: int) -> nn.Module:
        branches = nn.Sequential(Permute(0, 2, 1), nn.Linear(4, 4)), nn.Linear(4, 4)
        layers = nn.Linear(3, 4), nn.Tanh(), Parallel(*(branches[k] for k in order))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, C))

    p, q = (problem(net(*order), torch.randn(N, 4, 3)) for order in ((0, 1), (1, 0)))
    assert wrong(of_backpack(p, extensions.DiagGGNExact()), ggn_diag(p)) == ["0.weight", "0.bias"]
    assert not wrong(of_backpack(q, extensions.DiagGGNExact()), ggn_diag(q))  # by luck
    ours_agree(p)
    ours_agree(q)


def test_ignored_targets():
    """Their curvature is counted, and the mean is one over all terms."""
    model, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)), torch.tensor([0, -100, 2, 1])
    p = problem(model, torch.randn(N, 4), y)
    found = of_backpack(p, extensions.DiagGGNExact())
    assert len(wrong(found, ggn_diag(p))) == 4
    assert not wrong(found, ggn_diag(problem(model, *p.inputs, y.clamp(min=0))))
    ours_agree(p)


def test_padding_modes():
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    p = problem(nn.Sequential(conv, nn.Flatten(), nn.Linear(48, C)), torch.randn(N, 2, 4, 4))
    assert wrong(of_backpack(p, extensions.BatchGrad()), per_sample_grads(p)) == ["0.weight"]
    assert wrong(of_backpack(p, extensions.DiagGGNExact()), ggn_diag(p)) == ["0.weight"]
    ours_agree(p)


def test_kronecker_factors_of_convolutions():
    """BackPACK's A is S times expand's, its B is reduce's."""
    p = problem(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, C)), torch.randn(N, 2, 6, 6)
    )
    B, A = of_backpack(p, extensions.KFLR())["0.weight"]
    (B_expand, A_expand), (B_reduce, _) = (kfac_factors(p, how, "0") for how in ("expand", "reduce"))
    close(A, 16 * A_expand)
    close(B, B_reduce)
    assert (B - B_expand).norm() > 0.1 * B.norm()
    for how in ("expand", "reduce"):
        found = of_ours(p, KFAC(how, fisher="exact"))["0.weight"]
        for one, two in zip(found, kfac_factors(p, how, "0"), strict=True):
            close(one, two)


def test_module_that_is_called_twice():
    layer = nn.Linear(4, 4)
    p = problem(nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, C)), torch.randn(N, 4))
    for ext in (extensions.BatchGrad(), extensions.DiagGGNExact()):
        with pytest.raises(AttributeError, match="has no attribute 'output'"):
            of_backpack(p, ext)
    ours_agree(p)


def test_tied_parameters():
    """Each module overwrites what the other one has left."""
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    p = problem(nn.Sequential(one, nn.Tanh(), two, nn.Linear(4, C)), torch.randn(N, 4))
    found, expected = of_backpack(p, extensions.BatchGrad()), per_sample_grads(p)
    assert wrong(found, expected) == ["0.weight"]
    untied = copy.deepcopy(p)
    untied.model[2].weight = nn.Parameter(two.weight.detach().clone())
    close(found["0.weight"], per_sample_grads(untied)["0.weight"])
    ours_agree(p)


def test_activation_in_place():
    layers = nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, C)
    p = problem(nn.Sequential(*layers), torch.randn(N, 4))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        of_backpack(p, extensions.BatchGrad())
    ours_agree(p)


def test_subclass_of_a_layer():
    class Own(nn.Linear):
        pass

    p = problem(nn.Sequential(Own(4, 5), nn.ReLU(), nn.Linear(5, C)), torch.randn(N, 4))
    with pytest.warns(UserWarning, match="does not have an extension for Module"):
        assert list(of_backpack(p, extensions.BatchGrad())) == ["2.weight", "2.bias"]
    with pytest.raises(NotImplementedError, match="does not have an extension for Module"):
        of_backpack(p, extensions.DiagGGNExact())
    ours_agree(p)


def test_factor_of_a_loss():
    """It counts as 1."""
    p = problem(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)), torch.randn(N, 4))
    expected = ggn_diag(p)
    with pytest.warns(UserWarning, match="seems to have been modified"):
        found = of_backpack(p, extensions.DiagGGNExact(), lambda loss: 3 * loss)
    assert not wrong(found, expected)
    for name, value in of_ours(p, DiagGGN(), lambda loss: 3 * loss).items():
        close(value, 3 * expected[name])


def test_two_losses_in_one_backward_pass():
    """Roots of the Hessian are added up, which are then squared: 4 times instead of twice."""
    p = problem(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)), torch.randn(N, 4))
    results = []
    for wrap, context, ext in (
        (theirs.extend, theirs.backpack, extensions.DiagGGNExact()),
        (extend, backpack, DiagGGN()),
    ):
        model = wrap(copy.deepcopy(p.model))
        one, two = wrap(nn.CrossEntropyLoss()), wrap(nn.CrossEntropyLoss())
        with context(ext):
            z = model(*p.inputs)
            (one(z, p.target) + two(z, p.target)).backward()
        results.append({k: q.diag_ggn_exact for k, q in model.named_parameters()})
    for name, value in ggn_diag(p).items():
        close(results[0][name], 4 * value)
        close(results[1][name], 2 * value)


def test_norms_of_grouped_convolutions():
    layers = nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, C)
    p = problem(nn.Sequential(*layers), torch.randn(N, 4, 4, 4))
    expected = {k: G.flatten(1).square().sum(1) for k, G in per_sample_grads(p).items()}
    assert wrong(of_backpack(p, extensions.BatchL2Grad()), expected) == ["0.weight"]
    assert not wrong(of_ours(p, BatchL2Grad()), expected)


def test_readme_names_each_of_them():
    text = (Path(__file__).parent.parent / "README.rst").read_text()
    table = text.split("Where BackPACK fails\n", 1)[1].split("\nLimitations\n", 1)[0]
    tests = [name for name in globals() if name.startswith("test_") and "readme" not in name]
    assert re.findall(r"``(test_\w+)``", table) == tests
