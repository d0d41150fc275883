"""Passes that end early, ``torch.autograd.grad(loss, z)`` or by an error, and what later ones find."""

import pytest
import torch
from torch import nn

from backpack_ext import (
    KFAC,
    BatchGrad,
    DiagGGN,
    HesScale,
    LowRankGGN,
    RecordingError,
    UnsupportedError,
    backpack,
    extend,
)
from curvature.block import Block

EXTENSIONS = {
    "KFAC mc": lambda: KFAC(fisher="mc", generator=torch.Generator().manual_seed(1)),
    "KFAC empirical": lambda: KFAC(fisher="empirical"),
    "DiagGGN": DiagGGN,
    "HesScale": HesScale,
    "HesScale batch": lambda: HesScale(batch=True),
    "BatchGrad": BatchGrad,
    "LowRankGGN": lambda: LowRankGGN(param_groups="parameters"),
}


class Tied(nn.Module):
    """The last layer has the first one's weight."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def hidden(self, x):
        return torch.tanh(self.middle(torch.tanh(self.first(x))))

    def forward(self, x):
        return self.last(self.hidden(x))


class Untied(Tied):
    def __init__(self):
        super().__init__()
        self.last.weight = nn.Parameter(torch.randn(3, 3))


def setting(network=Untied):
    torch.manual_seed(0)
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(5, 3), torch.randint(3, (5,))
    return model, loss_fn, x, y


def results(model, ext):
    found = {n: getattr(p, ext.savefield, None) for n, p in model.named_parameters()}
    return {n: t.to_dense() if isinstance(t, Block) else t for n, t in found.items() if t is not None}


def alone(ext, network=Untied):
    """Return what one whole pass finds."""
    model, loss_fn, x, y = setting(network)
    with backpack(ext):
        loss_fn(model(x), y).backward()
    return results(model, ext)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, msg=name)


@pytest.mark.parametrize("name", EXTENSIONS)
@pytest.mark.parametrize("first_inside", [True, False])
def test_a_second_loss_on_the_same_logits(double, name, first_inside):
    """Legal in torch: nothing of the model was freed."""
    model, loss_fn, x, y = setting()
    ext = EXTENSIONS[name]()
    with backpack(ext):
        z = model(x)
        one, other = loss_fn(z, y), loss_fn(z, y)
        if first_inside:
            torch.autograd.grad(one, z)
    if not first_inside:
        torch.autograd.grad(one, z)
    if ext.vectors.kind == "mc":
        ext._generator.manual_seed(1)
    with backpack(ext):
        other.backward()
    assert_same(results(model, ext), alone(EXTENSIONS[name]()))


def test_no_loss_and_no_layer(double):
    """A pass that reaches no layer needs no loss either."""
    model, loss_fn, x, y = setting()
    ext = EXTENSIONS["KFAC empirical"]()
    with backpack(ext):
        z = model(x)
        (g,) = torch.autograd.grad((z**2).sum(), z)
        assert torch.equal(g, 2 * z) and not results(model, ext)
        loss_fn(z, y).backward()
    assert_same(results(model, ext), alone(EXTENSIONS["KFAC empirical"]()))


@pytest.mark.parametrize("network", [Untied, Tied])
@pytest.mark.parametrize("name", ["HesScale", "HesScale batch", "BatchGrad"])
def test_hidden_layers_gradient(double, name, network):
    """What the pass goes through has results, unless they lack what other calls would add."""
    model, loss_fn, x, y = setting(network)
    ext = EXTENSIONS[name]()
    with backpack(ext):
        h = model.hidden(x)
        torch.autograd.grad(loss_fn(model.last(h), y), h)
        found = results(model, ext).keys()
        if network is Untied:
            assert found == {"last.weight", "last.bias"}
        else:
            assert found <= {"last.bias"}
        loss_fn(model.last(h), y).backward()
    assert_same(results(model, ext), alone(EXTENSIONS[name](), network))


@pytest.mark.parametrize("name", ["KFAC mc", "HesScale", "BatchGrad"])
def test_the_same_loss_again(double, name):
    model, loss_fn, x, y = setting()
    with backpack(EXTENSIONS[name]()):
        z = model(x)
        loss = loss_fn(z, y)
        torch.autograd.grad(loss, z)
        with pytest.raises(RecordingError, match="without retain_graph=True"):
            loss.backward()
    loss = loss_fn(model(x), y)
    torch.autograd.grad(loss, model.last.weight)
    with pytest.raises(RecordingError, match="retain_graph"), backpack(EXTENSIONS["BatchGrad"]()):
        loss.backward()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("KFAC mc", "kfac.KFAC.absorb_all"),
        ("KFAC empirical", "kfac.KFAC.absorb_all"),
        ("HesScale", "diagonals.chain.Chain.cross"),
        ("HesScale batch", "diagonals.recursion.Recursion._cross"),
    ],
)
def test_a_pass_after_one_that_failed(double, monkeypatch, name, where):
    """Its exception is still held, and with it the pass: its hooks serve it alone."""
    model, loss_fn, x, y = setting()
    ext = EXTENSIONS[name]()

    def fail(*args):
        raise UnsupportedError("not now")

    with backpack(ext):
        loss = loss_fn(model(x), y)
        with monkeypatch.context() as patch, pytest.raises(UnsupportedError) as held:
            patch.setattr(f"backpack_ext.{where}", fail)
            loss.backward(retain_graph=True)
        if ext.vectors.kind == "mc":
            ext._generator.manual_seed(1)
        loss.backward()
    assert held.value.__traceback__ is not None
    assert_same(results(model, ext), alone(EXTENSIONS[name]()))
