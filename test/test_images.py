"""Factors of convolutions keep the convolution's input, and form patches while a product needs them."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from math import sqrt

import pytest
import torch
from lowrank_oracle import output_jacobian
from oracle import close
from torch import Tensor, nn

from backpack_ext import (
    NTK,
    DiagGGN,
    LowRankGGN,
    RecordingError,
    UnsupportedError,
    backpack,
    extend,
    layer_factor,
    sharing,
)
from backpack_ext.images import Images
from backpack_ext.layer_factor import LayerFactor
from backpack_ext.rules import RULES, register_rule
from backpack_ext.rules.affine import ConvRule

pytestmark = pytest.mark.usefixtures("double")

N, C = 3, 2


class Net(nn.Module):
    """A convolution with a fixed map behind it, and maybe others before it."""

    def __init__(self, conv: nn.Module, before: nn.Module | None = None):
        super().__init__()
        self.conv, self.before = conv, before

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x if self.before is None else self.before(x)).reshape(len(x), -1).tanh()
        return z @ torch.linspace(-1, 1, C * z.shape[1]).cos().reshape(-1, C)


class Plain(nn.Module):
    """A convolution, whose first entries are the outputs."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)[:, :C]


# A convolution, and the shape of one image.
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4)),
    "no padding": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, padding="same"), (4, 4, 5)),
    "depthwise": (lambda: nn.Conv1d(3, 3, 3, groups=3, padding=1, bias=False), (3, 6)),
    "stride": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 5, 7)),
    "dilation": (lambda: nn.Conv1d(2, 3, 3, dilation=2, padding=2), (2, 7)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 5)),
    "circular": (lambda: nn.Conv1d(4, 4, 5, padding=2, padding_mode="circular", groups=2), (4, 6)),
    "replicate": (lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), (1, 2, 3, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), (2, 3, 4)),
    "transposed, groups": (
        lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2),
        (4, 5),
    ),
}
every_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)


def made(name: str = "plain") -> tuple[Net, Tensor]:
    conv, shape = CONVOLUTIONS[name]
    return Net(conv()), torch.randn(N, *shape)


def factor_of(net: nn.Module, x: Tensor) -> LayerFactor:
    """Its columns are the gradients of the outputs."""
    found = NTK(net).features(x).factor
    assert isinstance(found, LayerFactor)
    return found


def columns(net: nn.Module, x: Tensor) -> Tensor:
    """Gradients of the outputs in the factor's order, ``[(C N), P]``."""
    return output_jacobian(net, x, list(net.parameters())).transpose(0, 1).flatten(0, 1)


def rows(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten(1) for t in parts], 1)


def passed(net: nn.Module, x: Tensor, *others, **options) -> LowRankGGN:
    ggn = LowRankGGN(**options)
    net, loss_fn = extend(net), extend(nn.CrossEntropyLoss())
    with backpack(ggn, *others):
        loss_fn(net(x), torch.arange(len(x)) % C).backward()
    return ggn


# -- what is kept ----------------------------------------------------------------------------------


@every_convolution
def test_the_input_itself_is_kept(name: str):
    net, x = made(name)
    seen = []
    net.conv.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    factor = factor_of(net, x)
    assert isinstance(factor.kept, Images) and torch.equal(factor.kept.x, x)
    # a copy of the mini-batch, which the next one may overwrite; what the network computes as it is
    assert factor.kept.x.data_ptr() != x.data_ptr()
    computed = factor_of(net, (x * torch.ones(1, requires_grad=True)))
    assert computed.kept.x.data_ptr() == seen[1].data_ptr()
    assert factor.tensors[0] is factor.b and factor.tensors[1] is factor.kept.x
    assert factor.nbytes == 8 * (x.numel() + factor.b.numel()) and factor.a.numel() > x.numel()


def test_inputs_within_a_network_are_detached():
    first = nn.Conv2d(1, 2, 3, padding=1)
    net = Net(nn.Conv2d(2, 2, 3, padding=1), nn.Sequential(first, nn.Tanh()))
    parts = NTK(net).features(torch.randn(N, 1, 4, 4)).factor.parts
    kept = [part.kept.x for part in parts]
    assert {t.shape[1] for t in kept} == {1, 2} and not any(t.requires_grad or t.grad_fn for t in kept)


@pytest.mark.parametrize("beside", [False, True])
def test_the_bytes_that_count_are_those_of_images(beside: bool):
    """Those of V and of the gradients together, also where another extension forms patches."""
    net, x = made()
    outputs = net.conv(x).numel()
    size = 8 * (x.numel() + 2 * outputs)  # one vector fewer than classes, and the gradient
    others = (DiagGGN(),) if beside else ()
    block = passed(net, x, *others, max_memory=size, fisher="mc").block
    assert block.factor.kept is block.slopes.kept
    with pytest.raises(UnsupportedError, match="max_memory"):
        passed(net, x, *others, max_memory=size - 1, fisher="mc")


def test_images_that_two_layers_read_are_counted_once():
    net, x = made()
    both = nn.ModuleList([net, copy.deepcopy(net)])
    one = torch.ones(1, requires_grad=True)

    def forward(x):
        h = x * one  # computed, and so not copied
        return both[0](h) - both[1](h)

    both.forward = forward
    size = 8 * (x.numel() + 2 * net.conv(x).numel())
    passed(both, x, max_memory=size, fisher="mc", gradients=False)
    with pytest.raises(UnsupportedError, match="max_memory"):
        passed(both, x, max_memory=size - 1, fisher="mc", gradients=False)


def test_patches_are_let_go_of(monkeypatch):
    """Each product forms them once, whatever it cuts its work into; for two factors as well."""
    net, x = made()
    block = passed(net, x).block
    one, two, formed, patches = block.factor, block.slopes, [], Images.patches

    def noted(images: Images, *args) -> Tensor:
        formed.append(weakref.ref(a := patches(images, *args)))
        return a

    monkeypatch.setattr(Images, "patches", noted)
    monkeypatch.setattr(layer_factor, "CHUNK", 1)
    w = [torch.randn(4, *shape) for shape in one.shapes]
    products = {
        "gram": one.gram,
        "gram_and": lambda: one.gram_and(two),
        "gram with slopes": lambda: one.gram(two),
        "of copies": lambda: (c := block.clone()).factor.gram_and(c.slopes),
        "project": lambda: one.project(*w),
        "apply": lambda: one.apply(torch.randn(4, one.columns)),
        "explicit": one.explicit,
        "square_sum": one.square_sum,
    }
    for name, product in products.items():
        formed.clear()
        result = product()
        gc.collect()
        assert len(formed) == 1, name
        assert formed[0]() is None, name
        del result
    for other in (one.scaled(2.0), one.folded(), one.select(torch.tensor([0, 2]))):
        assert isinstance(other.kept, Images)
    formed.clear()
    assert one.tensors and one.dtype and one.device and one.nbytes and block.clone() and not formed


# -- products --------------------------------------------------------------------------------------


@every_convolution
def test_products(name: str):
    """Against the gradients, one by one."""
    net, x = made(name)
    _, y = made(name)
    y = y[:-1]
    V, W = columns(net, x), columns(net, y)
    one, two = factor_of(net, x), factor_of(net, y)
    close(rows(one.explicit()), V)
    close(one.gram(), V @ V.T)
    close(one.gram(two), V @ W.T)
    own, cross = one.gram_and(two)
    close(own, V @ V.T), close(cross, V @ W.T)
    c, w = torch.randn(4, len(V)), [torch.randn(4, *shape) for shape in one.shapes]
    close(rows(one.apply(c)), c @ V)
    close(one.project(*w), rows(tuple(w)) @ V.T)
    close(torch.cat([t.flatten() for t in one.square_sum()]), V.square().sum(0))
    index = torch.tensor([0, 3, 5])
    close(rows(one.select(index).explicit()), V[index])
    close(one.scaled(3.0).gram(), 9 * V @ V.T)
    folded = V.unflatten(0, (C, N))
    close(one.folded().gram(), torch.einsum("cnp,cmp->nm", folded, folded))


@every_convolution
def test_products_do_not_copy_vectors(name: str):
    """Those of convolutions have pixels last in memory."""
    factor = factor_of(*made(name))
    assert factor._pixels_last and factor._flat_b.data_ptr() == factor.b.data_ptr()
    linear = factor_of(Net(nn.Linear(5, 4)), torch.randn(N, 3, 5))
    assert not linear._pixels_last and linear._flat_b.data_ptr() == linear.b.data_ptr()
    # with both in another order in memory, the products are the same
    swapped = LayerFactor(factor.kept, factor.b.contiguous(), factor.shapes, factor.axes)
    c, w = torch.randn(4, factor.columns), [torch.randn(4, *shape) for shape in factor.shapes]
    assert swapped._pixels_last == (factor.b.shape[4] == 1)
    close(swapped.project(*w), factor.project(*w))
    close(rows(swapped.apply(c)), rows(factor.apply(c)))


@every_convolution
def test_subsets(name: str):
    """Images of the chosen data are kept, in the order asked for."""
    net, x = made(name)
    subset, every = [2, 0], passed(copy.deepcopy(net), x, fisher="empirical").block.factor
    factor = passed(net, x, fisher="empirical", subsample=subset, gradients=False).block.factor
    assert torch.equal(factor.kept.x, x[subset])
    V = rows(every.explicit())[subset] * sqrt(N / len(subset))
    close(factor.gram(), V @ V.T)


def test_a_closure_recomputes_images():
    net, x = made("stride")
    expected = passed(copy.deepcopy(net), x).block
    loss_fn = extend(nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="closure"):
        ggn = passed(
            net, x, max_memory=1, closure=lambda: loss_fn(net(x), torch.arange(N) % C), gradients=False
        )
    close(ggn.block.gram(), expected.gram())


# -- data types, copies, other places --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["groups", "reflect", "transposed, groups"])
def test_half_precision(name: str, dtype: torch.dtype):
    """Patches are those of the input in the type of the vectors, which is what is kept."""
    net, x = made(name)
    net, x = Plain(net.conv).to(dtype), x.to(dtype)
    factor = factor_of(net, x)
    assert isinstance(factor.kept, Images) and torch.equal(factor.kept.x, x.float())
    assert {t.dtype for t in factor.tensors} == {factor.a.dtype} == {factor.dtype} == {torch.float32}
    assert torch.equal(rows(factor.explicit()).double(), columns(net.double(), x.double()))
    x.add_(1)
    assert factor.gram().isfinite().all()  # a copy was kept


def saved(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replaced(block):
    return block.replaced(**{name: t.clone() for name, t in block.factors.items()})


@pytest.mark.parametrize("way", [copy.deepcopy, saved, lambda b: b.clone(), replaced])
@pytest.mark.parametrize("name", ["groups", "reflect", "transposed, groups"])
def test_copies(name: str, way: Callable):
    """They are of the same form, and do not follow the original's images."""
    net, x = made(name)
    x.add_(1)  # of a version above 0
    block = passed(net, x, gradients=way is not replaced).block
    expected = block.to_dense()
    other = way(block)
    x.mul_(2)
    assert isinstance(other.factor.kept, Images)
    assert other.factor.kept.x.data_ptr() != block.factor._a.x.data_ptr()
    assert other.slopes is None or other.slopes.kept.same(other.factor.kept)
    close(other.to_dense(), expected)


def test_other_data_types():
    net, x = made("groups")
    block = passed(net, x).block
    low = block.to(dtype=torch.float32)
    assert low.factor.kept.x.dtype == low.slopes.kept.x.dtype == low.factor.a.dtype == torch.float32
    close(low.to_dense().double(), block.to_dense(), 1e-5)


@pytest.mark.parametrize(
    "ask",
    [
        lambda block: block.gram(),
        lambda block: block.diagonal(),
        lambda block: block.matvec(*(torch.randn(s) for s in block.shapes)),
        lambda block: block.scaled(2.0),
        copy.deepcopy,
        lambda block: block.factors,
    ],
)
def test_images_that_are_overwritten(ask: Callable):
    """Those that the network computed are the network's; of the mini-batch there is a copy."""
    net, x = made()
    block, expected = passed(net, x).block, passed(net, x).block.gram()
    h = x * torch.ones(1, requires_grad=True)
    other = passed(net, h).block
    for t in (x, h.detach()):
        t.copy_(torch.randn_like(t))
    ask(block)
    close(block.gram(), expected)
    with pytest.raises(RecordingError, match="modified in place"):
        ask(other)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
@pytest.mark.parametrize("layer", [lambda: nn.Conv1d(2, 3, 3, padding=1), lambda: nn.Linear(6, 3)])
def test_inputs_that_a_hook_overwrites_in_the_pass(layer: Callable, fisher: str):
    """Columns come before the gradient does: an adversarial step is taken in between."""
    net = nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(C))
    h = torch.randn(N, 2, 6, requires_grad=True) * 1
    net(h)

    def attack(g: Tensor) -> None:
        h.detach().add_(g.sign())

    h.register_hook(attack)
    with pytest.raises(RecordingError, match="modified in place"):
        passed(net, h, fisher=fisher, gradients=False).block.gram()


def test_values_of_a_parameter_that_a_convolution_reads():
    """They are the user's tensors, given for a while; neither they nor the model's own are held."""
    net, x = made()
    net.image = nn.Parameter(torch.randn_like(x))
    net.forward = lambda scale: net.conv(net.image).flatten(1)[:, :C] * scale
    value, ntk, ones = torch.randn_like(x), NTK(net), torch.ones(N, 1)
    features = ntk.features(ones, {"image": value})
    own, expected = ntk.features(ones), ntk.gram(features)
    before = ntk.gram(own)
    value.add_(1)
    close(ntk.gram(features), expected)
    with torch.no_grad():
        net.image.add_(1)
    close(ntk.gram(features), expected)
    close(ntk.gram(own), before)


# -- where patches are kept ------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).tanh()).flatten(1)[:, :C]


class Frames(nn.Module):
    """Two images of each datum."""

    def __init__(self, axis: int):
        super().__init__()
        self.conv, self.axis = nn.Conv1d(1, 2, 3, padding=1), axis
        extend(self, batch_axis={"conv": axis})

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x.movedim(0, self.axis).flatten(0, 1).unsqueeze(1)).square()
        return z.unflatten(0, (-1, 2) if self.axis == 0 else (2, -1)).movedim(self.axis, 0)[:, :, 0, 3]


class Constant(nn.Module):
    """All data have the same image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(torch.linspace(0, 1, 10).reshape(1, 2, 5))
        return (x * z.expand(len(x), -1, -1)).flatten(1).tanh()[:, :C]


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (lambda: Net(nn.Conv2d(2, 3, 1)), (2, 3, 4)),
        (lambda: Net(nn.Conv1d(2, 3, 2, stride=2)), (2, 6)),
        (lambda: Net(nn.Conv1d(2, 3, 2, stride=4)), (2, 9)),
        (Twice, (2, 5)),
        (lambda: Frames(0), (2, 5)),
        (lambda: Frames(1), (2, 5)),
        (Constant, (2, 5)),
    ],
    ids=["1x1", "as many", "few pixels", "called twice", "two images", "data second", "shared by all"],
)
def test_where_patches_are_kept(net: Callable, shape: tuple[int, ...]):
    """There they are no larger than the input, or a row of the input is no datum's image."""
    net, x = net(), torch.randn(N, *shape)
    factor = factor_of(net, x)
    assert isinstance(factor.kept, Tensor) and factor.kept is factor.a
    close(rows(factor.explicit()), columns(net, x))


def test_in_a_sharing_block():
    """Inputs at positions that do not exist count as zeros."""
    lengths = torch.tensor([5, 2, 3])
    exists = torch.arange(5) < lengths[:, None]

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x) * exists[:, None]
            return torch.stack([z.square().flatten(1).sum(1), z.tanh().flatten(1).sum(1)], 1)

    net, x = Masked(), torch.randn(N, 2, 5)
    expected = columns(net, x)
    with sharing(mask=exists):
        factor = factor_of(net, x)
        assert isinstance(factor.kept, Tensor)
        close(rows(factor.explicit()), expected)


def test_a_rule_with_inputs_of_its_own():
    class Doubled(nn.Conv1d):
        """Its weight counts twice."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv1d(2 * x, self.weight, self.bias, padding=1)

    @register_rule(Doubled)
    class DoubledRule(ConvRule):
        def __init__(self):
            super().__init__(1)

        def inputs(self, site):
            return 2 * super().inputs(site)

    try:
        net, x = Net(Doubled(2, 3, 3, padding=1)), torch.randn(N, 2, 5)
        factor = factor_of(net, x)
        assert isinstance(factor.kept, Tensor)
        close(rows(factor.explicit()), columns(net, x))
    finally:
        del RULES[Doubled]
