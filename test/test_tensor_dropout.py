"""Randomised contraction and the convolution that trains with it: unbiased, exactly and on average."""

import copy
import itertools
import pickle
from math import prod

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from backpack_ext.tensor_network import Convolution, RandomisedConv, dropped, randomised
from backpack_ext.tensor_network.dropout import drawn, restricted

pytestmark = pytest.mark.usefixtures("double")


def close(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item())
    )


def every(sizes: dict[str, int], counts: dict[str, int]):
    """All subsets of these numbers of values of each index."""
    each = [itertools.combinations(range(sizes[name]), m) for name, m in counts.items()]
    for chosen in itertools.product(*each):
        yield {name: torch.tensor(values) for name, values in zip(counts, chosen, strict=True)}


def networks():
    x, v = torch.randn(3, 2, 4, 5), torch.randn(3, 4, 2, 3)
    conv = Convolution((3, 3), (2, 2), 1, simplify=False)
    pairs = {
        "weight_vjp": conv.weight_vjp(x, v),
        "forward": conv.forward(x, torch.randn(4, 2, 3, 3)),
        "kfac_expand": conv.kfac_expand(x),
        "kfac_reduce": conv.kfac_reduce(x),
        "ggn_diagonal": conv.ggn_diagonal(x, v[None]),
    }
    choices = {
        "weight_vjp": {"n": 2, "i0": 3, "o1": 2},
        "forward": {"c": 1, "k0": 2},
        "kfac_expand": {"n": 2, "o0": 1},
        "kfac_reduce": {"n": 1, "o0": 1, "o0'": 1},
        "ggn_diagonal": {"n": 2},
    }
    return [(pairs[name], choices[name]) for name in pairs]


@pytest.mark.parametrize("which", range(5))
def test_mean_over_all_subsets(which):
    expression, counts = networks()[which]
    exact = expression.contract()
    values = [restricted(expression, chosen).contract() for chosen in every(expression.sizes, counts)]
    assert len(values) > 2 and (values[0] - exact).abs().max() > 1e-3
    close(torch.stack(values).mean(0), exact)


def test_subsets_are_uniform():
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(5, 5)
    for _ in range(4000):
        kept = drawn({"n": 5}, {"n": 0.4}, generator)["n"]
        assert len(kept) == 2 and kept[0] < kept[1]
        counts[kept[0], kept[1]] += 1
    expected = 4000 / 10
    chi = ((counts - expected) ** 2 / expected).triu(1).sum()
    assert chi < 27.9  # 9 degrees of freedom: once in a thousand


@pytest.mark.montecarlo
def test_mean_over_many_draws():
    x, v = torch.randn(6, 3, 5, 5), torch.randn(6, 4, 5, 5)
    exact = Convolution((3, 3), padding=1).weight_vjp(x, v)
    generator, draws = torch.Generator().manual_seed(1), 1500
    values = torch.stack(
        [dropped(exact, {"n": 0.5, "i0": 0.6}, generator).contract() for _ in range(draws)]
    )
    error = (values.mean(0) - exact.contract()) / (values.std(0) / draws**0.5)
    assert error.abs().max() < 4.5 and 0.8 < error.square().mean() < 1.25


def test_all_kept_is_exact():
    expression = networks()[0][0]
    close(dropped(expression, {"n": 1.0, "i0": 1.0}).contract(), expression.contract())
    small = dropped(expression, {"n": 0.01})  # one value at least
    assert small.sizes["n"] == 1 and small.scale == 3 and small.cost() < expression.cost()
    equation, operands, shape = small
    close(torch.einsum(equation, *operands).reshape(shape), small.contract())


def test_wrong_use_of_dropped():
    expression = networks()[0][0]
    with pytest.raises(ValueError, match=r"'c' is no index that is summed over; those are n, i0"):
        dropped(expression, {"c": 0.5})
    empty = Convolution((3,)).weight_vjp(torch.ones(0, 2, 4), torch.ones(0, 3, 2))
    with pytest.raises(ValueError, match="'n' has no values"):
        dropped(empty, {"n": 0.5})
    for p in (0, 1.5, "half", True):
        with pytest.raises(ValueError, match="in \\(0, 1\\]"):
            dropped(expression, {"n": p})


LAYERS = {
    "all indices": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (3, 4, 5, 4), {"n": 2, "c": 1, "i0": 3}),
    "circular": (
        lambda: nn.Conv2d(2, 3, 2, 2, 1, padding_mode="circular"),
        (3, 2, 3, 3),
        {"n": 1, "i1": 3},
    ),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (3, 2, 4), {"n": 2}),
    "data": (lambda: nn.Conv3d(2, 3, (2, 1, 2), dilation=2), (4, 2, 3, 3, 4), {"n": 2}),
    "same, unequal": (
        lambda: nn.Conv1d(4, 6, 2, padding="same", dilation=3),
        (3, 4, 7),
        {"n": 1, "c": 2},
    ),
    "valid": (lambda: nn.Conv1d(4, 2, 2, padding="valid", bias=False), (3, 4, 7), {"c": 3}),
    "3d": (lambda: nn.Conv3d(2, 3, 2, padding="same"), (3, 2, 3, 3, 3), {"i2": 2, "i0": 2}),
    "dense": (lambda: nn.Conv2d(2, 3, 2, 2), (3, 2, 4, 6), {"i1": 2, "n": 2}),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
        (3, 4, 2, 3),
        {"n": 2, "c": 1},
    ),
    "transposed, pixels": (
        lambda: nn.ConvTranspose2d(4, 2, 2, 2),
        (2, 4, 2, 3),
        {"i0": 1, "c": 3, "i1": 2},
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_layer_over_all_subsets(name, monkeypatch):
    """Output and gradients of input and bias are exact; that of the weight is, in the mean."""
    make, shape, counts = LAYERS[name]
    conv = make()
    x = torch.randn(shape, requires_grad=True)
    z, parameters = conv(x), [x, *conv.parameters()]
    v = torch.randn_like(z)
    exact = torch.autograd.grad(z, parameters, v)
    sizes, layer = {}, RandomisedConv(conv, dict.fromkeys(counts, 0.5))
    monkeypatch.setattr(randomised, "drawn", lambda s, *_: sizes.update(s) or {k: s[k] for k in ()})
    close(torch.autograd.grad(layer(x), parameters, v)[1], exact[1])  # nothing dropped
    weights = []
    for chosen in every(sizes, counts):
        monkeypatch.setattr(randomised, "drawn", lambda *_, chosen=chosen: chosen)
        out = layer(x)
        gradients = torch.autograd.grad(out, parameters, v)
        close(out, z)
        for k, (a, b) in enumerate(zip(gradients, exact, strict=True)):
            if k == 1:
                weights.append(a)
            else:
                close(a, b)
    assert len(weights) > 2 and (weights[0] - exact[1]).abs().max() > 1e-3
    close(torch.stack(weights).mean(0), exact[1])


def stored(call) -> int:
    """Return how many entries of tensors a forward pass saves, each storage once."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(sizes.values())


@pytest.mark.parametrize("keep", ({"n": 0.25}, {"c": 0.5}, {"n": 0.5, "i0": 0.5}))
@pytest.mark.parametrize("mode", ("zeros", "circular"))
def test_stores_what_is_kept(keep, mode):
    conv = nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode)
    layer, x = RandomisedConv(conv, keep), torch.randn(8, 6, 10, 10).requires_grad_()
    whole = x.numel() if mode == "zeros" else x.numel() * 144 // 100
    weight = conv.weight.numel()
    assert stored(lambda: conv(x)) == whole + weight
    assert stored(lambda: layer(x)) == prod(keep.values()) * whole + weight
    assert stored(lambda: layer(x.detach())) == prod(keep.values()) * whole  # no input gradient
    layer.eval()
    assert stored(lambda: layer(x)) == whole + weight
    layer.train()
    conv.requires_grad_(False)
    assert stored(lambda: layer(x)) == stored(lambda: conv(x))


def test_modes():
    """Exact in evaluation mode; the generator is not used where no gradient is needed."""
    generator = torch.Generator().manual_seed(0)
    layer, x = RandomisedConv(nn.Conv2d(3, 4, 3), {"n": 0.5}, generator), torch.randn(6, 3, 5, 5)
    state = generator.get_state()
    with torch.no_grad():
        layer(x)
    (exact,) = torch.autograd.grad(layer.eval()(x).square().sum(), layer.conv.weight)
    assert torch.equal(generator.get_state(), state)

    def estimate():
        (g,) = torch.autograd.grad(layer.train()(x).square().sum(), layer.conv.weight)
        return g

    (expected,) = torch.autograd.grad(layer.conv(x).square().sum(), layer.conv.weight)
    close(exact, expected)
    first, second = estimate(), estimate()
    generator.set_state(state)
    assert torch.equal(estimate(), first) and not torch.allclose(first, second)
    assert repr(layer).startswith("RandomisedConv(\n  keep={'n': 0.5}")


@pytest.mark.parametrize("keep", ({"n": 0.5}, {"n": 0.5, "c": 0.5, "i0": 0.6}))
def test_training(keep):
    """A small network learns, and its loss is evaluated exactly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, 8, 8)
    y = (x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))).long()
    model = nn.Sequential(
        RandomisedConv(nn.Conv2d(2, 8, 3, padding=1), keep, generator),
        nn.Tanh(),
        RandomisedConv(nn.Conv2d(8, 8, 2, 2), keep, generator),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(128, 2),
    )
    loss_of = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = loss_of(model.eval()(x), y).item()
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    assert loss_of(model.eval()(x), y).item() < 0.5 * before


def test_second_derivatives_are_refused():
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    layer = RandomisedConv(nn.Conv2d(3, 4, 3), {"n": 0.5})
    for of in (x, layer.conv.weight):
        (g,) = torch.autograd.grad(layer(x).square().sum(), of, create_graph=True)
        with pytest.raises(RuntimeError, match=r"RandomisedConv: .*Call .eval\(\)"):
            g.sum().backward()
    (g,) = torch.autograd.grad(layer.eval()(x).square().sum(), x, create_graph=True)
    g.sum().backward()


@pytest.mark.parametrize("keep", ({"n": 0.5}, {"c": 0.5, "i1": 0.5}))
def test_low_precision(keep):
    """Under autocast and in bfloat16: the same subset's gradient, rounded."""
    x = torch.randn(4, 4, 6, 6)
    layer = RandomisedConv(nn.Conv2d(4, 4, 3, padding=1), keep, torch.Generator().manual_seed(0))
    state = layer.generator.get_state()
    layer(x).sum().backward()
    expected, layer.conv.weight.grad = layer.conv.weight.grad, None
    layer.generator.set_state(state)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x.float())
    z.float().sum().backward()
    assert z.dtype == torch.bfloat16 and layer.conv.weight.grad.dtype == torch.float64
    scale = expected.abs().max()
    assert (layer.conv.weight.grad - expected).abs().max() < 0.02 * scale
    layer.generator.set_state(state)
    layer.bfloat16().zero_grad()
    layer(x.bfloat16()).sum().backward()
    assert layer.conv.weight.grad.dtype == torch.bfloat16
    assert (layer.conv.weight.grad.double() - expected).abs().max() < 0.02 * scale


def test_parametrised_and_empty():
    layer = RandomisedConv(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), {"n": 1.0})
    x, names = torch.randn(4, 3, 6, 6), ("original0", "original1")
    of = [getattr(layer.conv.parametrizations.weight, name) for name in names]
    pairs = [torch.autograd.grad(f(x).square().sum(), of) for f in (layer, layer.conv)]
    for a, b in zip(*pairs, strict=True):
        close(a, b)
    layer(x[:0]).sum().backward()
    assert not of[1].grad.any()


def test_copies_checkpoints_and_state():
    layer, x = RandomisedConv(nn.Conv2d(3, 4, 3), {"n": 0.5}), torch.randn(4, 3, 6, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.keep == layer.keep
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]
    z = torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    z.sum().backward()
    close(layer.conv.bias.grad, torch.full((4,), 64.0))


def test_wrong_use_of_the_layer():
    with pytest.raises(TypeError, match="Linear is no"):
        RandomisedConv(nn.Linear(2, 3), {"n": 0.5})
    with pytest.raises(ValueError, match="'i2' is none of n, c, i0, i1"):
        RandomisedConv(nn.Conv2d(2, 3, 2), {"i2": 0.5})
    with pytest.raises(ValueError, match="in \\(0, 1\\]"):
        RandomisedConv(nn.Conv2d(2, 3, 2), {"n": 0.0})
    with pytest.raises(ValueError, match="lazy"):
        RandomisedConv(nn.LazyConv2d(3, 2), {"n": 0.5})

    class Own(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="Own has a forward of its own"):
        RandomisedConv(Own(2, 3, 2), {"n": 0.5})
    with pytest.raises(ValueError, match="with a batch axis"):
        RandomisedConv(nn.Conv2d(2, 3, 2), {"n": 0.5})(torch.ones(2, 4, 4))


def test_changed_padding():
    x, conv = torch.randn(4, 2, 6, 6), nn.Conv2d(2, 3, 3, padding=1)
    conv.padding = (0, 2)
    close(RandomisedConv(conv, {"n": 0.5})(x), conv(x))


def hooked(kind):
    conv = nn.Conv2d(2, 3, 3)
    if kind == "prune":
        return prune.random_unstructured(conv, "weight", 0.5)
    if kind == "spectral_norm":
        return nn.utils.spectral_norm(conv)
    getattr(conv, f"register_{kind}")(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    "kind",
    ["prune", "spectral_norm", "forward_hook", "forward_pre_hook", "full_backward_hook"],
)
def test_hooks_are_not_bypassed(kind):
    layer, x = RandomisedConv(hooked(kind), {"n": 0.5}), torch.randn(4, 2, 6, 6)
    with pytest.raises(RuntimeError, match="has hooks"):
        layer(x)
    layer.eval()(x)


def test_meta():
    layer = RandomisedConv(nn.Conv2d(2, 3, 3).to("meta"), {"n": 0.5})
    assert layer(torch.empty(4, 2, 6, 6, device="meta")).shape == (4, 3, 4, 4)


def test_wrong_arguments_say_what_is_expected():
    x, v = torch.randn(3, 2, 4), torch.randn(3, 4, 2)
    with pytest.raises(TypeError, match="fraction for each index"):
        dropped(Convolution((3,)).weight_vjp(x, v), ["n"])
    with pytest.raises(ValueError, match="simplify=False"):
        dropped(Convolution((2,), 2).weight_vjp(x, v), {"i0": 0.5})
