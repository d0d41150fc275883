"""The example's networks: two parametrisations, one function at the start, other derivatives."""

from math import prod, sqrt
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    return pytest.importorskip("ntk_networks")


def draw(networks, kind, parametrisation, width=6, seed=0):
    torch.manual_seed(seed)
    return networks.NETWORKS[kind](width, parametrisation).double()


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_same_function_other_derivatives(networks, kind):
    x = torch.randn(5, 1, 8, 8)
    standard, ntk = (draw(networks, kind, p) for p in networks.PARAMETRISATIONS)
    outputs = standard(x), ntk(x)
    assert outputs[0].shape == (5, 10)
    torch.testing.assert_close(*outputs)
    for found in outputs:
        found.square().sum().backward()
    layers = [[m for m in net if hasattr(m, "weight")] for net in (standard, ntk)]
    scales = [m.scale for m in ntk if isinstance(m, networks.Scale)]
    assert len(scales) == len(layers[0]) == 3
    for k, (s, t, scale) in enumerate(zip(*layers, scales, strict=True)):
        gain = 1 if k == 2 else sqrt(2)
        assert scale == pytest.approx(gain / sqrt(prod(t.weight.shape[1:])))
        torch.testing.assert_close(s.weight, scale * t.weight)
        torch.testing.assert_close(t.weight.grad, scale * s.weight.grad)
        torch.testing.assert_close(t.bias.grad, s.bias.grad)
        assert not s.bias.any() and not t.bias.any()


def test_gain_keeps_the_mean_square(networks):
    x = torch.randn(1, 64)
    found = torch.stack([draw(networks, "mlp", "ntk", 64, seed)(x)[0].detach() for seed in range(300)])
    assert float(found.square().mean()) == pytest.approx(float(x.square().mean()), rel=0.15)


def test_weights_are_standard_normal(networks):
    net = draw(networks, "cnn", "ntk", 32)
    weights = torch.cat([m.weight.flatten() for m in net if isinstance(m, (nn.Conv2d, nn.Linear))])
    weights = weights.detach()
    assert float(weights.mean()) == pytest.approx(0, abs=0.05)
    assert float(weights.std()) == pytest.approx(1, rel=0.05)


def test_unknown_parametrisation(networks):
    with pytest.raises(ValueError, match="parametrisation='mup'"):
        networks.mlp(4, "mup")
