"""Tensor networks of convolutions, against torch's convolutions and direct definitions."""

import random
from itertools import product
from math import prod

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backpack_ext import KFAC, backpack, extend
from backpack_ext.conv_factors.geometry import Dimension
from backpack_ext.tensor_network import Convolution, Expression, Pattern, index_pattern, pattern, plan

FUZZ = 160


pytestmark = pytest.mark.usefixtures("double")


def close(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def draw(rng: random.Random) -> tuple[nn.Module, torch.Tensor]:
    """Return a random convolution of one to three dimensions and an input of two data for it."""
    dims = rng.choice([1, 2, 2, 3])

    def numbers(low, high):
        return tuple(rng.randint(low, high) for _ in range(dims))

    kernel, stride, dilation = numbers(1, 3), numbers(1, 4), numbers(1, 3)
    padding, groups = numbers(0, 3), rng.choice([1, 1, 2])
    channels = groups * rng.randint(1, 2), groups * rng.randint(1, 3)
    options = {}
    if rng.random() < 0.3:
        name = f"ConvTranspose{dims}d"
        most = map(max, stride, dilation)
        options["output_padding"] = tuple(rng.randint(0, n - 1) for n in most)
    else:
        name = f"Conv{dims}d"
        options["padding_mode"] = rng.choice(["zeros"] * 3 + ["circular", "reflect", "replicate"])
        word = rng.choice(["same", "valid", None, None])
        padding = word or padding
        stride = 1 if word == "same" else stride
    if rng.random() < 0.2:
        kernel, padding, dilation = stride if isinstance(stride, tuple) else kernel, 0, 1  # dense
    module = getattr(nn, name)(
        *channels, kernel, stride, padding, dilation=dilation, groups=groups, bias=False, **options
    )
    return module, torch.randn(2, channels[0], *numbers(1, 8 if dims < 3 else 5))


def cases(count: int):
    rng, found = random.Random(0), 0
    while found < count:
        module, x = draw(rng)
        try:
            z = module(x)
        except RuntimeError:
            continue  # no output, or more padding than the mode allows
        if z.numel():
            found += 1
            yield module, x, z


def one_hot(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the unfolded input ``[N, C K, O]``: torch's convolution with all one-hot kernels."""
    m, C, K = module, x.shape[1], module.kernel_size
    kernels = torch.eye(C * prod(K)).reshape(C * prod(K), C, *K)
    if m.transposed:
        f = getattr(F, f"conv_transpose{len(K)}d")
        kernels = kernels.transpose(0, 1)
        z = f(x, kernels, None, m.stride, m.padding, m.output_padding, 1, m.dilation)
    else:
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        padded = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
        z = getattr(F, f"conv{len(K)}d")(padded, kernels, None, m.stride, 0, m.dilation)
    return z.flatten(2)


def gram(a: torch.Tensor, groups: int) -> torch.Tensor:
    """Return ``sum_n a_n a_n^T`` of ``a[n, g, :]`` without an axis of one group."""
    A = torch.einsum("nga,ngb->gab", a, a)
    return A[0] if groups == 1 else A


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_fuzz():
    """All networks of random convolutions, simplified and not."""
    simpler = 0
    for module, x, z in cases(FUZZ):
        groups, weight = module.groups, module.weight
        v, S = torch.randn_like(z), torch.randn(2, *z.shape)
        of_x = x.clone().requires_grad_()
        gx, gw = torch.autograd.grad(module(of_x), (of_x, weight), v)
        U = one_hot(module, x)
        rows = U.reshape(2, groups, -1, U.shape[2])
        every = rows.permute(0, 3, 1, 2).flatten(0, 1)
        squares, each = torch.zeros_like(weight), []
        for n in range(2):
            z_n = module(x[n : n + 1])
            each += torch.autograd.grad(z_n, weight, v[n : n + 1], retain_graph=True)
            for s in S:
                squares += torch.autograd.grad(z_n, weight, s[n : n + 1], retain_graph=True)[0] ** 2
        w, z = weight.detach(), z.detach()
        plain, simple = Convolution.of(module, simplify=False), Convolution.of(module)
        for conv in (plain, simple):
            close(conv.forward(x, w).contract(), z)
            close(conv.unfold(x).contract(), U)
            close(conv.input_vjp(v, w, x.shape[2:]).contract(), gx)
            close(conv.weight_vjp(x, v).contract(), gw)
            close(conv.weight_vjp(x, v, per_datum=True).contract(), torch.stack(each))
            close(conv.kfac_expand(x).contract(), gram(every, groups) / len(every))
            close(conv.kfac_reduce(x).contract(), gram(rows.mean(3), groups) / 2)
            close(conv.ggn_diagonal(x, S).contract(), squares)
        assert plain.output_sizes(x.shape[2:]) == z.shape[2:]
        left = [len(conv.kfac_expand(x).tensors) for conv in (plain, simple)]
        assert left[1] <= left[0]
        simpler += left[1] < left[0]
    assert simpler > FUZZ // 2


@pytest.mark.parametrize("transposed", (False, True))
def test_jvp(transposed):
    x, w = torch.randn(2, 4, 5, 6), torch.randn(4, 4, 3, 2)
    dx, dw = torch.randn_like(x), torch.randn_like(w)
    f = F.conv_transpose2d if transposed else F.conv2d
    conv = Convolution((3, 2), (2, 1), padding=1, transposed=transposed)
    for of, tangents in (("input", (dx, torch.zeros_like(w))), ("weight", (torch.zeros_like(x), dw))):
        _, expected = torch.func.jvp(lambda x, w: f(x, w, stride=(2, 1), padding=1), (x, w), tangents)
        a, b = (dx, w) if of == "input" else (x, dw)
        close(getattr(conv, f"{of}_jvp")(a, b).contract(), expected)


def test_unfold_as_torch():
    x = torch.randn(2, 3, 7, 6)
    conv = Convolution((3, 2), (2, 1), padding=(1, 2), dilation=(1, 2))
    close(conv.unfold(x).contract(), F.unfold(x, (3, 2), (1, 2), (1, 2), (2, 1)))


def direct(x, weight, stride, padding):
    """A convolution of any number of dimensions by its definition, one kernel entry after the other."""
    K, dims = weight.shape[2:], x.dim() - 2
    x = F.pad(x, (padding, padding) * dims)
    outs = [(n - k) // stride + 1 for n, k in zip(x.shape[2:], K, strict=True)]
    z = torch.zeros(len(x), len(weight), *outs)
    for entry in product(*map(range, K)):
        met = tuple(slice(k, k + stride * o, stride) for k, o in zip(entry, outs, strict=True))
        part = x[(slice(None), slice(None), *met)]
        z += torch.einsum("nc...,dc->nd...", part, weight[(slice(None), slice(None), *entry)])
    return z


@pytest.mark.parametrize("simplify", (False, True))
@pytest.mark.parametrize(("dims", "stride", "padding"), [(4, 1, 1), (4, 2, 0), (5, 1, 0), (5, 2, 1)])
def test_more_dimensions_than_torch(dims, stride, padding, simplify):
    sizes = (4, 3, 5, 2, 3)[:dims]
    x, w = torch.randn(2, 3, *sizes), torch.randn(2, 3, *(2, 1, 2, 2, 1)[:dims])
    conv = Convolution(w.shape[2:], stride, padding, simplify=simplify)
    x.requires_grad_()
    w.requires_grad_()
    z = direct(x, w, stride, padding)
    v = torch.randn_like(z)
    gx, gw = torch.autograd.grad(z, (x, w), v)
    x, w = x.detach(), w.detach()
    close(conv.forward(x, w).contract(), z.detach())
    close(conv.input_vjp(v, w, sizes).contract(), gx)
    close(conv.weight_vjp(x, v).contract(), gw)
    eye = torch.eye(w[0].numel()).reshape(-1, *w.shape[1:])
    U = direct(x, eye, stride, padding).flatten(2)
    close(conv.kfac_expand(x).contract(), torch.einsum("nas,nbs->ab", U, U) / (2 * U.shape[2]))
    close(conv.kfac_reduce(x).contract(), gram(U.mean(2, keepdim=True).mT, 1) / 2)


def test_no_limit_of_letters():
    """Nine dimensions: 58 indices, more than there are letters."""
    x = torch.randn(3, 1, *[2] * 9)
    expression = Convolution((2,) * 9, simplify=False).kfac_reduce(x)
    assert len(expression.sizes) > 52 and not expression.equation.isascii()
    assert expression.equation.replace(",", "").replace("->", "").isalpha()
    close(expression.contract(), gram(x.reshape(3, 1, -1), 1) / 3)
    close(expression.simplify().contract(), gram(x.reshape(3, 1, -1), 1) / 3)


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("approx", ("expand", "reduce"))
@pytest.mark.parametrize("cls", (nn.Conv2d, nn.ConvTranspose2d))
def test_factors_as_KFAC_has_them(cls, approx, groups):
    layer = cls(4, 6, (3, 2), (2, 1), 1, groups=groups)
    model, loss_fn = extend(nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))), extend(nn.MSELoss())
    x = torch.randn(3, 4, 5, 6)
    model(x)
    with backpack(KFAC(approx, fisher="empirical")):
        loss_fn(model(x), torch.zeros(3, 3)).backward()
    _, A = layer.weight.kfac
    close(getattr(Convolution.of(layer), f"kfac_{approx}")(x).contract(), A)


# kernel, stride, padding, dilation, size; operands of forward, of the input's VJP, of KFAC-expand: the
# patterns that are left besides input and weight, vector and weight, twice the input and a scale.
CONNECTIVITY = {
    "dense": ((3, 2), (3, 2), 0, 1, (9, 6), 2, 2, 3),
    "dense, pixels left over": ((3, 2), (3, 2), 0, 1, (11, 7), 2, 4, 3),
    "down-sampling": ((2, 2), (3, 4), 0, 1, (9, 8), 2, 4, 3),
    "1x1": ((1, 1), 1, 0, 1, (5, 6), 2, 2, 3),
    "1x1, stride": ((1, 1), 2, 0, 1, (6, 8), 2, 4, 3),
    "1x1, stride, padding": ((1, 1), 2, 1, 1, (6, 7), 2, 4, 3),
    "one output pixel": ((5, 6), 1, 0, 1, (5, 6), 2, 2, 3),
    "patches of padded images": ((3, 3), (3, 4), 1, 1, (7, 8), 2, 4, 3),
    "within a stride, dilated": ((2, 2), (3, 4), 0, 2, (9, 8), 2, 4, 3),
    "one dimension dense": ((2, 3), (2, 1), 0, 1, (8, 8), 3, 3, 5),
    "general": ((3, 3), 2, 1, 1, (7, 8), 4, 4, 7),
}


@pytest.mark.parametrize("name", CONNECTIVITY)
def test_simplifications(name):
    kernel, stride, padding, dilation, sizes, *counts = CONNECTIVITY[name]
    plain = Convolution(kernel, stride, padding, dilation, simplify=False)
    x, w = torch.randn(2, 3, *sizes), torch.randn(4, 3, *kernel)
    v = torch.randn(2, 4, *plain.output_sizes(sizes))
    networks = [plain.forward(x, w), plain.input_vjp(v, w, sizes), plain.kfac_expand(x)]
    assert [len(e.operands) for e in networks] == [4, 4, 7]
    simple = [e.simplify() for e in networks]
    assert [len(e.operands) for e in simple] == counts
    for a, b in zip(networks, simple, strict=True):
        close(b.contract(), a.contract())
        assert b.shape == a.shape
        assert b.cost() < a.cost() if len(b.tensors) < len(a.tensors) else b.cost() <= a.cost()
        equation, operands, shape = b
        close(torch.einsum(equation, *operands).reshape(shape), a.contract())


def test_unused_pixels_are_dropped():
    """Stride and dilation 2 meet every other pixel only; what is left has stride and dilation 1."""
    x = torch.randn(2, 3, 14)
    plain = Convolution((3,), 2, 1, 2, simplify=False).unfold(x)
    simple = plain.simplify()
    assert plain.sizes["i0"] == 14 and simple.sizes["i0"] == 7
    close(simple.contract(), plain.contract())
    assert Convolution((3,), 2).unfold(x).sizes["i0"] == 13  # the last one is out of reach


def test_squares_of_transposed_patches():
    x = torch.randn(2, 3, 4, 5)
    plain = Convolution((2, 2), 2, transposed=True, simplify=False).kfac_expand(x)
    simple = plain.simplify()
    assert len(plain.tensors) == 6 and len(simple.tensors) == 4 and simple.cost() < plain.cost() / 5
    close(simple.contract(), plain.contract())


def test_simplified_views():
    """Nothing is copied where no padding is met."""
    x = torch.randn(2, 3, 9, 8)
    cut = Convolution((3, 2), (3, 4)).unfold(x).tensors[0]
    assert cut.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_index_pattern():
    P = index_pattern(7, 3, stride=2, padding=1, dilation=2, dtype=torch.int64)
    expected = torch.zeros(7, 3, 3, dtype=torch.int64)
    for o, k in product(range(3), range(3)):
        if 0 <= 2 * o + 2 * k - 1 < 7:
            expected[2 * o + 2 * k - 1, o, k] = 1
    assert torch.equal(P, expected)
    circular = index_pattern(3, 3, padding=1, padding_mode="circular", dtype=torch.int64)
    assert torch.equal(circular[:, 0], torch.eye(3, dtype=torch.int64).roll(-1, 0))
    assert torch.equal(
        index_pattern(3, 2, stride=2, transposed=True), index_pattern(6, 2, stride=2).transpose(0, 1)
    )


def test_patterns_are_cached():
    P, double, cpu = Pattern(Dimension(9, 4, 3, 2)), torch.float64, torch.device("cpu")
    assert P.shared(double, cpu) is Pattern(Dimension(9, 4, 3, 2)).shared(double, cpu)
    assert P.shared(double, cpu) is not P.shared(torch.float32, cpu)
    large = Pattern(Dimension(600, 592, 9))  # by size, not by count
    before = pattern._kept.cache_info().currsize
    assert large.shared(double, cpu) is not large.shared(double, cpu)
    assert pattern._kept.cache_info().currsize == before
    assert plan.plan.cache_info().maxsize


def test_patterns_handed_out_are_the_callers():
    x, w = torch.randn(2, 1, 4), torch.randn(3, 1, 2)
    conv, expected = Convolution((2,)), F.conv1d(x, w)
    _, operands, _ = conv.forward(x, w)
    operands[1].zero_()
    conv.forward(x, w).operands[1].requires_grad_()
    index_pattern(4, 2, dtype=torch.float64).zero_()
    close(conv.forward(x, w).contract(), expected)
    assert not conv.unfold(x).contract().requires_grad


@pytest.mark.parametrize("stride", [1, 2])
def test_values_are_no_views_of_the_input(stride):
    x = torch.ones(2, 3, 4)
    Convolution((stride,), stride=stride).unfold(x).contract().zero_()
    assert x.eq(1).all()


@pytest.mark.parametrize("kernel, stride, padding, size", [(1, 5, 2, 1), (2, 20, 5, 3), (2, 9, 5, 3)])
def test_kernels_in_the_padding_only(kernel, stride, padding, size):
    x, w = torch.randn(2, 2, size), torch.randn(3, 2, kernel)
    expected = F.conv1d(x, w, stride=stride, padding=padding)
    close(Convolution((kernel,), stride, padding).forward(x, w).contract(), expected)


def test_changed_attributes():
    x = torch.randn(2, 2, 6, 7)
    for mode in ("zeros", "circular", "reflect", "replicate"):
        module = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, bias=False)
        module.padding = (2, 0)
        close(Convolution.of(module).forward(x, module.weight).contract(), module(x))
    module = nn.Conv2d(2, 3, 2, padding="same", padding_mode="circular")
    module.dilation = (2, 2)
    with pytest.raises(ValueError, match="still pads"):
        Convolution.of(module)


def test_autocast_does_not_round():
    x, w = torch.randn(2, 2, 6).float(), torch.randn(3, 2, 3).float()
    network = Convolution((3,)).forward(x, w)
    expected = network.contract()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.contract(), expected)


def test_sizes_are_integers():
    with pytest.raises(TypeError, match="integers"):
        Convolution((3,)).patterns((5.0,))


def test_cache_outlives_transforms_and_modes():
    """A pattern made within torch.func, inference mode or a fake mode is not of it afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    conv, x, w = Convolution((3,), padding=1), torch.randn(2, 3, 7), torch.randn(4, 3, 3)

    def value(w, x=x):
        return conv.forward(x, w).contract().square().sum()

    def fake(w):
        with FakeTensorMode():
            return value(torch.empty(4, 3, 3), torch.empty(2, 3, 7))

    expected = torch.autograd.functional.jacobian(lambda w: F.conv1d(x, w, padding=1).square().sum(), w)
    for first in (torch.func.grad(value), torch.inference_mode()(value), fake):
        pattern._kept.cache_clear()
        first(w)
        leaf = w.clone().requires_grad_()
        value(leaf, x.clone().requires_grad_()).backward()
        close(leaf.grad, expected)
    close(torch.func.vmap(lambda z: value(w, z[None]))(x).sum(), value(w))
    close(torch.func.hessian(value)(w).diagonal().sum(), torch.func.hessian(value)(w).diagonal().sum())


def test_differentiable():
    x, w = torch.randn(2, 2, 5), torch.randn(3, 2, 2)
    conv = Convolution((2,), 2, padding=1)
    check = torch.autograd.gradcheck
    assert check(lambda x, w: conv.forward(x, w).contract(), (x.requires_grad_(), w.requires_grad_()))
    assert check(lambda x: conv.kfac_expand(x).contract(), (x,))
    assert torch.autograd.gradgradcheck(lambda x: conv.kfac_reduce(x).contract(), (x,))


def test_half_precision_and_integers():
    conv, x = Convolution((2, 2), padding=1), torch.randint(5, (2, 3, 4, 4))
    exact = conv.unfold(x.double()).contract()
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.complex128):
        value = conv.unfold(x.to(dtype)).contract()
        assert value.dtype == dtype and torch.equal(value.to(torch.complex128).real, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_half_types(dtype):
    """Sums leave the range, and lose the digits, of half types: they are float32's."""
    conv, x = Convolution((2, 2), padding=1, groups=2), (100 * torch.rand(3, 4, 5, 5)).to(dtype)
    S = (100 * torch.rand(2, 3, 6, 6, 6)).to(dtype)
    for of in (conv.kfac_expand, conv.kfac_reduce, lambda x: conv.ggn_diagonal(x, S.to(x.dtype))):
        found, exact = of(x).contract(), of(x.double()).contract()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


ORDERS = {"search": 12, "halves, else greedy": 2}


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order, monkeypatch):
    """Every way of finding an order gives the value."""
    monkeypatch.setattr(plan, "opt_einsum", None)
    monkeypatch.setattr(plan, "EXHAUSTIVE", ORDERS[order])
    plan.plan.cache_clear()
    x, S = torch.randn(2, 4, 5, 6), torch.randn(3, 2, 6, 5, 6)
    conv = Convolution((3, 3), padding=1, groups=2)
    reference = [torch.einsum(e, *t).reshape(s) for e, t, s in networks_of(conv, x, S)]
    for expression, expected in zip(networks_of(conv, x, S), reference, strict=True):
        close(expression.contract(), expected)
    plan.plan.cache_clear()


def networks_of(conv, x, S):
    w = torch.ones(6, 2, 3, 3)
    return [
        conv.forward(x, w),
        conv.weight_vjp(x, S[0]),
        conv.kfac_expand(x),
        conv.kfac_reduce(x),
        conv.ggn_diagonal(x, S),
    ]


def test_search_finds_the_best_order(monkeypatch):
    """No other order of a network with four operands costs less."""
    monkeypatch.setattr(plan, "opt_einsum", None)
    expression = Convolution((3, 2), padding=1).weight_vjp(
        torch.ones(3, 2, 7, 5), torch.ones(3, 4, 7, 6)
    )
    legs, sizes = [set(x) for x in expression.legs], expression.sizes

    def cheapest(parts):
        if len(parts) == 1:
            return 0
        costs = []
        for a in range(len(parts)):
            for b in range(a):
                rest = [p for k, p in enumerate(parts) if k not in (a, b)]
                union = parts[a] | parts[b]
                left = union & set(expression.out).union(*rest)
                written = prod(sizes[x] for x in left)
                costs.append(prod(sizes[x] for x in union) + written + cheapest([*rest, left]))
        return min(costs)

    plan.plan.cache_clear()
    steps = expression._plan(expression.tensors)[0].steps
    written = sum(prod(list(sizes.values())[x] for x in s.kept) for s in steps)
    assert sum(s.cost for s in steps) + written == cheapest(legs)
    plan.plan.cache_clear()


def test_what_copies_share_is_computed_once():
    x, S = torch.randn(2, 4, 5, 6), torch.randn(3, 2, 6, 5, 6)
    conv = Convolution((3, 3), padding=1, simplify=False)
    half = conv.weight_vjp(x, S[0], per_datum=True)
    square = conv.ggn_diagonal(x, S)
    positions = [step.operands for step in square._plan(square.tensors)[0].steps]
    assert positions[-1][0] == positions[-1][1]  # a tensor times itself
    assert len(positions) == len(half._plan(half.tensors)[0].steps) + 1
    other = square.replace(tensors=(*square.tensors[:-1], 2 * S.unflatten(2, (1, -1))))
    assert other.cost() > 1.2 * square.cost()  # not if they differ
    close(other.contract(), 2 * square.contract())


def test_different_sums_of_copies_are_told_apart():
    a = torch.randn(3, 3)
    expression = Expression((("i", "j"), ("k", "l")), ("i", "l"), (a, a), (3, 3))
    close(expression.contract(), torch.outer(a.sum(1), a.sum(0)))
    expression = Expression((("i", "j"), ("j", "l"), ("l", "m")), ("i", "m"), (a, a, a), (3, 3))
    close(expression.contract(), a @ a @ a)
    expression = Expression((("i", "j"), ("k", "i")), ("j", "k"), (a, a), (3, 3))
    close(expression.contract(), (a @ a).mT)


def test_opt_einsum_is_used(monkeypatch):
    opt_einsum = pytest.importorskip("opt_einsum")
    calls = []
    get = opt_einsum.paths.get_path_fn
    monkeypatch.setattr(opt_einsum.paths, "get_path_fn", lambda name: calls.append(name) or get(name))
    plan.plan.cache_clear()
    x, S = torch.randn(2, 4, 5, 6), torch.randn(3, 2, 6, 5, 6)
    for expression in networks_of(Convolution((3, 3), padding=1, groups=2), x, S):
        equation, operands, shape = expression
        close(expression.contract(), opt_einsum.contract(equation, *operands).reshape(shape))
    assert calls.count("auto-hq") == 5
    nine = Convolution((2,) * 9, simplify=False).kfac_reduce(torch.randn(3, 1, *[2] * 9))
    equation, operands, shape = nine
    close(opt_einsum.contract(equation, *operands).reshape(shape), nine.contract())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("simplify", (False, True))
def test_einconv(simplify):
    """The einconv package has the same patterns and networks; its KFC factor is not divided by O."""
    pytest.importorskip("einconv")
    from einconv import index_pattern as pattern_of
    from einconv.expressions import (
        convNd_forward,
        convNd_input_vjp,
        convNd_kfac_reduce,
        convNd_kfc,
        convNd_unfold,
        convNd_weight_vjp,
    )

    def same(ours, module, *args, factor=1.0, **kwargs):
        try:
            equation, operands, _ = module.einsum_expression(*args, **kwargs, simplify=simplify)
        except ValueError as error:  # simplified factors of three dimensions
            assert "Ran out of letters" in str(error)
            return 0
        close(ours.contract(), factor * torch.einsum(equation, *operands).reshape(ours.shape))
        return 1

    compared = 0
    for m, x, z in cases(80):
        if m.transposed or m.padding_mode != "zeros":
            continue
        conv, K, g, w, v = (
            Convolution.of(m, simplify),
            m.kernel_size,
            m.groups,
            m.weight.detach(),
            z.detach(),
        )
        few = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation}
        options = {**few, "groups": g}
        for n, p, k, s, d in zip(
            x.shape[2:], conv.patterns(x.shape[2:]), K, m.stride, m.dilation, strict=True
        ):
            padding = m.padding if isinstance(m.padding, str) else p.dimension.before
            close(
                p.tensor(torch.float64, torch.device("cpu")),
                pattern_of(n, k, s, padding, d, dtype=torch.float64).permute(2, 1, 0),
            )
        compared += same(conv.forward(x, w), convNd_forward, x, w, **options)
        compared += same(conv.unfold(x), convNd_unfold, x, K, **few)
        sizes, O = tuple(x.shape[2:]), prod(z.shape[2:])
        compared += same(conv.input_vjp(v, w, sizes), convNd_input_vjp, w, v, sizes, **options)
        compared += same(conv.weight_vjp(x, v), convNd_weight_vjp, x, v, K, **options)
        compared += same(conv.kfac_reduce(x), convNd_kfac_reduce, x, K, **options)
        compared += same(conv.kfac_expand(x), convNd_kfc, x, K, factor=1 / O, **options)
    assert compared > 150


def test_einconv_has_no_letters_for_four_dimensions():
    pytest.importorskip("einconv")
    from einconv.expressions import convNd_kfac_reduce

    x = torch.randn(2, 1, 2, 3, 2, 2)
    with pytest.raises(ValueError):
        convNd_kfac_reduce.einsum_expression(x, 2)
    U = direct(x, torch.eye(16).reshape(16, 1, 2, 2, 2, 2), 1, 0).flatten(2)
    close(Convolution((2,) * 4).kfac_reduce(x).contract(), gram(U.mean(2, keepdim=True).mT, 1) / 2)


@pytest.mark.parametrize("simplify", (False, True))
def test_empty_batch(simplify):
    conv = Convolution((3, 3), 2, 1, simplify=simplify)
    assert conv.forward(X[:0], W).contract().shape == (0, 6, 3, 3)
    assert torch.equal(conv.weight_vjp(X[:0], V[:0, :, :, :3]).contract(), torch.zeros_like(W))
    assert conv.input_vjp(V[:0, :, :, :3], W, (5, 6)).contract().shape == (0, 4, 5, 6)


def test_expression_unpacks_and_prints():
    expression = Convolution((3,), padding=1).kfac_reduce(torch.ones(2, 3, 5))
    equation, operands, shape = expression
    assert isinstance(expression.tensors[1], Pattern) and all(torch.is_tensor(t) for t in operands)
    close(torch.einsum(equation, *operands).reshape(shape), expression.contract())
    assert "i0 o0 k0 [5, 5, 3]" in repr(expression) and "n" in expression.summed
    assert expression.cost() > 0


def test_malformed_networks_raise():
    with pytest.raises(ValueError, match="No operand has"):
        Expression((("a",),), ("b",), (torch.ones(2),), (2,)).contract()
    with pytest.raises(ValueError, match="twice"):
        Expression((("a", "a"),), ("a",), (torch.ones(2, 2),), (2,)).contract()
    with pytest.raises(ValueError, match="several sizes"):
        Expression((("a",), ("a",)), (), (torch.ones(2), torch.ones(3)), ()).contract()


X, W, V = torch.ones(2, 4, 5, 6), torch.ones(6, 4, 3, 3), torch.ones(2, 6, 3, 4)
WRONG = {
    "kernel_size=3": (lambda: Convolution(3), ValueError, "give a tuple"),
    "stride 0": (lambda: Convolution((3,), 0), ValueError, "stride=0: give one number of at least 1"),
    "stride of 3": (lambda: Convolution((3, 3), (1, 1, 1)), ValueError, "or 2 of them"),
    "float": (lambda: Convolution((3,), 1.0), TypeError, "integers"),
    "padding word": (lambda: Convolution((3,), padding="full"), ValueError, '"same" or "valid"'),
    "same, stride": (lambda: Convolution((3,), 2, "same"), ValueError, "stride 1 only"),
    "mode": (lambda: Convolution((3,), padding_mode="mirror"), ValueError, "none of zeros"),
    "transposed same": (
        lambda: Convolution((3,), padding="same", transposed=True),
        ValueError,
        "numbers",
    ),
    "output_padding": (lambda: Convolution((3,), output_padding=1), ValueError, "transposed"),
    "groups": (lambda: Convolution((3,), groups=0), ValueError, "groups=0"),
    "no convolution": (lambda: Convolution.of(nn.Linear(2, 3)), TypeError, "Linear is no"),
    "no output": (lambda: Convolution((3,)).output_sizes((2,)), ValueError, "no output pixel for 2"),
    "sizes": (lambda: Convolution((3,)).output_sizes((2, 3)), ValueError, "2 sizes"),
    "reflect": (
        lambda: Convolution((3,), padding=3, padding_mode="reflect").output_sizes((3,)),
        ValueError,
        "at most 2 of 3",
    ),
    "no batch": (lambda: Convolution((3, 3)).unfold(X[0]), ValueError, r"expected \[N, C, \*I\]"),
    "groups of x": (lambda: Convolution((3, 3), groups=3).unfold(X), ValueError, "3 groups"),
    "weight": (lambda: Convolution((3, 3)).forward(X, W[:, :3]), ValueError, r"expected \[D, 4, 3, 3\]"),
    "kernel": (lambda: Convolution((3, 2)).forward(X, W), ValueError, r"expected \[D, 4, 3, 2\]"),
    "vector": (lambda: Convolution((3, 3)).weight_vjp(X, V[..., :2]), ValueError, r"\[2, D, 3, 4\]"),
    "data": (lambda: Convolution((3, 3)).weight_vjp(X, V[:1]), ValueError, r"\[2, D, 3, 4\]"),
    "vectors": (lambda: Convolution((3, 3)).ggn_diagonal(X, V), ValueError, r"\[v, 2, D, 3, 4\]"),
    "no data": (lambda: Convolution((3, 3)).kfac_expand(X[:0]), ValueError, "needs data"),
    "integers": (lambda: Convolution((3, 3)).kfac_reduce(X.long()), ValueError, "floating point"),
    "vjp": (lambda: Convolution((3, 3)).input_vjp(V, W[:5], (5, 6)), ValueError, r"\[6, C / 1, 3, 3\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
