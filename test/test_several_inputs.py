"""Layers that read more than one tensor, bilinear layers and bags of tokens, against autograd.

Kronecker factors are compared with those of a twin: the same model in which a plain Linear reads the
products of features, or the dense count vectors of the bags.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from models import Problem
from oracle import close, ggn_block, ggn_diag, kfac_factors, per_sample_grads
from torch import Tensor, nn

from backpack_ext import (
    EKFAC,
    KFAC,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    RecordingError,
    SumGradSquared,
    UnsupportedError,
    Variance,
    backpack,
    extend,
    normal,
)
from backpack_ext.dataset import collect
from backpack_ext.normal import Bags, OneHot
from curvature import DenseBlock, KroneckerSum

N, V, D = 4, 7, 3  # data, tokens in the table, features
APPROX = ("expand", "reduce")
REDUCTIONS = ("mean", "sum")


@dataclass
class Batch(Problem):
    """A problem whose first tensor does not say how many data there are."""

    data: int = N

    @property
    def batch_size(self) -> int:
        """N, the number of data."""
        return self.data


class OuterLinear(nn.Module):
    """A bilinear layer as a linear one on all products of features."""

    def __init__(self, layer: nn.Bilinear):
        super().__init__()
        out, one, two = layer.weight.shape
        self.linear = nn.Linear(one * two, out, bias=layer.bias is not None).double()
        self.linear.weight.data = layer.weight.detach().flatten(1)
        if layer.bias is not None:
            self.linear.bias.data = layer.bias.detach()

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return self.linear(torch.einsum("...i,...j->...ij", input1, input2).flatten(-2))


class CountLinear(nn.Module):
    """An embedding, or an embedding bag, as a linear layer on dense (weighted) counts of tokens."""

    def __init__(self, layer: nn.Embedding | nn.EmbeddingBag):
        super().__init__()
        self.layer = [layer]
        self.linear = nn.Linear(*layer.weight.shape, bias=False).double()
        self.linear.weight.data = layer.weight.detach().T

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights=None) -> Tensor:
        layer, shape = self.layer[0], None
        if isinstance(layer, nn.Embedding):
            shape, bags = input.shape, list(input.reshape(-1, 1))
        elif input.dim() == 2:
            bags = list(input)
        else:
            ends = offsets[1:] if layer.include_last_offset else [*offsets[1:], len(input)]
            bags = [input[a:b] for a, b in zip(offsets, ends, strict=False)]
        counts, k = [], 0
        weights = None if per_sample_weights is None else per_sample_weights.flatten()
        for bag in bags:
            row = torch.zeros(layer.num_embeddings).double()
            kept = 0
            for token in bag.tolist():
                if token != layer.padding_idx:
                    kept += 1
                    row = row + torch.eye(len(row)).double()[token] * (
                        1 if weights is None else weights[k]
                    )
                k += 1
            mean = getattr(layer, "mode", "sum") == "mean"
            counts.append(row / max(kept, 1) if mean else row)
        z = self.linear(torch.stack(counts))
        return z if shape is None else z.reshape(*shape, -1)


TWINS = {nn.Bilinear: OuterLinear, nn.EmbeddingBag: CountLinear, nn.Embedding: CountLinear}


def twin(problem: Batch) -> tuple[Batch, dict[str, nn.Module]]:
    """The problem with plain linear layers, and the replaced layers by their path there."""
    model, layers = deepcopy(problem.model), {}
    for path, layer in problem.model.named_modules():
        if type(layer) in TWINS:
            parent = model.get_submodule(path.rpartition(".")[0])
            other = TWINS[type(layer)](layer)
            setattr(parent, path.rpartition(".")[2], other)
            layers[f"{path}.linear"] = layer
    tied = {}  # tables that several layers use stay tied
    for path, layer in layers.items():
        linear = model.get_submodule(path)
        linear.weight = tied.setdefault(id(layer.weight), linear.weight)
    return Batch(model, problem.inputs, problem.loss_fn, problem.target, data=problem.data), layers


def extensions() -> list:
    first_order = (BatchGrad, BatchL2Grad, BatchDotGrad, SumGradSquared, Variance, DiagGGN)
    kron = [
        kind(how, "exact", bias=bias, savefield=f"{kind.__name__.lower()}_{how}_{bias}")
        for kind in (KFAC, EKFAC)
        for how in APPROX
        for bias in ("separate", "joint")
    ]
    return [*(ext() for ext in first_order), *kron]


def check(
    model: nn.Module, inputs: tuple, reduction: str = "mean", data: int = N, **options
) -> nn.Module:
    """Compare everything about a model on one input with the oracles."""
    torch.manual_seed(0)
    model = model.double()
    with torch.no_grad():
        target = torch.randn_like(model(*inputs))
    problem = Batch(model, inputs, nn.MSELoss(reduction=reduction), target, data=data)
    other, layers = twin(problem)
    reference = deepcopy(problem)
    for m in reference.model.modules():
        m.sparse = False  # the oracles stack gradients
    grads, diag = per_sample_grads(reference), ggn_diag(reference)
    factors = {
        (path, how, bias): kfac_factors(other, how, path, bias)
        for path, layer in layers.items()
        for how in APPROX
        for bias in ("separate", "joint")
        if bias == "separate" or trains_bias(layer)
    }
    exact = {key: ggn_block(reference, [key]) for key in grads}
    extend(model, **options), extend(problem.loss_fn)
    with backpack(*extensions()):
        problem.loss().backward()
    for key, g in grads.items():
        p = model.get_parameter(key)
        close(p.grad_batch, g)
        close(p.batch_l2, g.square().flatten(1).sum(1))
        close(p.batch_dot, g.flatten(1) @ g.flatten(1).T)
        close(p.sum_grad_squared, g.square().sum(0))
        close(p.variance, g.var(0, correction=0))
        close(p.diag_ggn_exact, diag[key])
        for how in APPROX:
            closest(exact[key], getattr(p, f"kfac_{how}_separate"), getattr(p, f"ekfac_{how}_separate"))
    for (path, how, bias), (B, A) in factors.items():
        layer = layers[path]
        if not layer.weight.requires_grad:
            close(getattr(layer.bias, f"kfac_{how}_separate").B, B)
            continue
        K, bag = getattr(layer.weight, f"kfac_{how}_{bias}"), not isinstance(layer, nn.Bilinear)
        assert K.A.dim() == (1 if bag else 2)
        close(K.B, B)
        close(K.A, A.diagonal() if bag else A)
        if bias == "joint":
            assert K.joint
        elif bag:  # stored [i, o]
            (i, o), dense = layer.weight.shape, torch.kron(B, A.diagonal().diag())
            close(K.to_dense(), dense.view(o, i, o, i).permute(1, 0, 3, 2).reshape(o * i, o * i))
        else:
            close(K.to_dense(), torch.kron(B, A))
            if trains_bias(layer):
                close(getattr(layer.bias, f"kfac_{how}_separate").to_dense(), B)
    return model


def trains_bias(layer: nn.Module) -> bool:
    """Whether the layer has a bias that is trained."""
    return getattr(layer, "bias", None) is not None and layer.bias.requires_grad


def closest(exact: Tensor, kfac, ekfac) -> None:
    """EKFAC's block is the projection of the exact one on what commutes with KFAC's (see test_ekfac)."""
    K, E, scale = kfac.to_dense(), ekfac.to_dense(), exact.norm()
    assert (E @ K - K @ E).norm() <= 1e-8 * scale * K.norm()
    assert abs(E.trace() - exact.trace()) <= 1e-8 * scale
    assert abs((E * exact).sum() - E.square().sum()) <= 1e-8 * scale**2


class Net(nn.Module):
    """``forward`` is a function of the modules and the inputs; then tanh and a linear head."""

    def __init__(self, forward: Callable, **modules: nn.Module):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.function(self, *inputs)))


def net(forward: Callable, width: int = D, **modules: nn.Module) -> Net:
    torch.manual_seed(1)
    return Net(forward, head=nn.Linear(width, 2), **modules)


# -- bilinear --------------------------------------------------------------------------------------


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(*shape, 2).double(), torch.randn(*shape, 4).double()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 5), (N, 2, 3)])
def test_bilinear(shape: tuple[int, ...], bias: bool, reduction: str):
    check(net(lambda m, x, y: m.two(x, y), two=nn.Bilinear(2, 4, D, bias)), pair(*shape), reduction)


BILINEAR = {
    "keyword arguments": lambda m, x, y: m.two(input2=y, input1=x),
    "one positional": lambda m, x, y: m.two(x, input2=y),
    "first requires a gradient": lambda m, x, y: m.two(m.pre(x), y),
    "second requires a gradient": lambda m, x, y: m.two(x, m.post(y)),
    "both require a gradient": lambda m, x, y: m.two(m.pre(x), m.post(y)),
    "rows": lambda m, x, y: m.two(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2]),
    "one token of each": lambda m, x, y: m.two(x[:, 0], y[:, 1])[:, None],
    "twice": lambda m, x, y: m.two(m.two(x, y)[..., :2].sin(), y),
    "two calls of other lengths": lambda m, x, y: m.two(x, y).sum(1) + m.two(x[:, 0], y[:, 0]),
    "shared by all data": lambda m, x, y: m.pre(x)[..., :1] + m.two(x[0], y[0]),
}


@pytest.mark.parametrize("name", BILINEAR)
def test_calls_of_a_bilinear_layer(name: str):
    x, y = pair(N, 5)
    if name == "shared by all data":  # its inputs must not depend on a datum
        x, y = x[:1].expand_as(x), y[:1].expand_as(y)
    modules = {"two": nn.Bilinear(2, 4, D)}
    if name.startswith(("first", "both", "shared")):
        modules["pre"] = nn.Linear(2, 2)
    if name.startswith(("second", "both")):
        modules["post"] = nn.Linear(4, 4)
    check(net(BILINEAR[name], **modules), (x, y))


@pytest.mark.parametrize("grad", [True, False])
def test_bilinear_of_a_tensor_with_itself(grad: bool):
    def forward(m, x):
        h = m.pre(x) if grad else x
        return m.two(h, h)

    modules = {"pre": nn.Linear(4, 4)} if grad else {}
    check(net(forward, two=nn.Bilinear(4, 4, D), **modules), pair(N, 5)[1:])


@pytest.mark.parametrize("small", [0, 2**14])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_bilinear_layers_of_equal_shape(frozen: str | None, small: int, monkeypatch):
    monkeypatch.setattr("backpack_ext.pending.Pending.SMALL", small)
    a, b, c = (nn.Bilinear(2, 4, D) for _ in range(3))
    model = net(lambda m, x, y: m.a(x, y) * m.b(x, y).sin() + m.c(x, y), a=a, b=b, c=c)
    if frozen:
        getattr(model.b, frozen).requires_grad_(False)
    check(model, pair(N, 5))


@pytest.mark.parametrize("layout", ["axis 1", "rows"])
def test_sequence_first_bilinear_layer(layout: str):
    def forward(m, x, y):
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        if layout == "axis 1":
            return m.two(x, y).transpose(0, 1)
        return m.two(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(0, 1)

    first, last = (
        net(forward, two=nn.Bilinear(2, 4, D)),
        net(BILINEAR["one positional"], two=nn.Bilinear(2, 4, D)),
    )
    same_results(first, last, pair(N, 5), batch_axis={"two": 1})


def same_results(one: nn.Module, other: nn.Module, inputs: tuple, **options) -> None:
    """Compare a model whose layout the twin does not know with one that is checked against it."""
    other.load_state_dict(one.state_dict())
    check(other, inputs)
    target = torch.ones_like(one.double()(*inputs))
    for model, given in ((one, options), (other, {})):
        loss_fn = extend(nn.MSELoss())
        with backpack(*extensions()):
            loss_fn(extend(model, **given)(*inputs), target).backward()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        for ext in extensions():
            a, b = getattr(p, ext.savefield), getattr(q, ext.savefield)
            close(*(t if isinstance(t, Tensor) else t.to_dense() for t in (a, b)))


def site_of(z: Tensor):
    """The recorded call behind a layer's output."""
    (site,) = z.grad_fn.metadata["backpack_ext.sites"]
    return site


@pytest.mark.parametrize("which", [0, 1])
def test_bilinear_input_modified_in_place(which: int):
    inputs = pair(N)
    site = site_of(extend(nn.Bilinear(2, 4, D).double())(*inputs))
    inputs[which].mul_(2)
    site.input(1 - which)
    with pytest.raises(RecordingError, match="modified in place"):
        site.input(which)


@pytest.mark.parametrize("which", [0, 1])
def test_bilinear_lets_go_of_both_inputs(which: int):
    model, loss_fn = extend(nn.Bilinear(2, 4, D).double()), extend(nn.MSELoss())
    inputs = pair(N)
    inputs[which].requires_grad_()
    z = model(*inputs)
    site = site_of(z)
    assert all(torch.equal(site.input(k), x) for k, x in enumerate(inputs))
    assert not any(site.input(k).requires_grad for k in range(2)) and site.depends_on_parameters
    loss_fn(z, torch.zeros(N, D).double()).backward()
    with pytest.raises(RecordingError, match="input is gone"):
        site.input(1)
    assert not site._others


def test_bilinear_with_an_overridden_forward():
    class Self(nn.Bilinear):
        def forward(self, x):
            return super().forward(x, x)

    model, loss_fn = extend(Self(2, 2, D).double()), extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match=r"two inputs.*register a rule"), backpack(BatchGrad()):
        loss_fn(model(pair(N)[0]), torch.zeros(N, D).double()).backward()


# -- bags of tokens --------------------------------------------------------------------------------

# tokens, offsets of N = 4 bags; tokens repeat within bags and between them
FLAT = {
    "plain": ([3, 1, 3, 6, 0, 2, 2, 5, 1, 4], [0, 3, 4, 8]),
    "empty bags": ([3, 1, 3, 2, 2], [0, 0, 5, 5]),
    "empty bag in the middle": ([3, 1, 3, 6, 2, 2], [0, 3, 3, 4]),
    "one token": ([3], [0, 0, 1, 1]),
    "one token each": ([3, 1, 1, 5], [0, 1, 2, 3]),
    "more bags than twice the tokens": ([1, 5], [0, 0, 1, 1]),
}


def bags(mode: str = "sum", **options) -> nn.EmbeddingBag:
    torch.manual_seed(3)
    return nn.EmbeddingBag(V, D, mode=mode, **options)


def flat(name: str, last: bool = False) -> tuple[Tensor, Tensor]:
    tokens, offsets = FLAT[name]
    return torch.tensor(tokens), torch.tensor([*offsets, len(tokens)] if last else offsets)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", FLAT)
def test_bags_with_offsets(name: str, last: bool, mode: str, padding_idx: int | None, reduction: str):
    layer = bags(mode, padding_idx=padding_idx, include_last_offset=last)
    check(net(lambda m, tokens, offsets: m.bag(tokens, offsets), bag=layer), flat(name, last), reduction)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_tokens_behind_the_last_offset(mode: str):
    """Torch counts them to the last bag, also where the last offset says that it ends before."""
    tokens, offsets = torch.tensor([3, 1, 4, 6, 0, 2, 2]), torch.tensor([0, 0, 2, 3, 5])
    model = net(lambda m, *args: m.bag(*args), bag=bags(mode, include_last_offset=True)).double()
    problem = Batch(model, (tokens, offsets), nn.MSELoss(), torch.zeros(N, 2).double())
    grads = per_sample_grads(problem)["bag.weight"]
    extend(model), extend(problem.loss_fn)
    with backpack(BatchGrad()):
        problem.loss().backward()
    close(model.bag.weight.grad_batch, grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("sparse", [False, True])
def test_bags_of_equal_size(sparse: bool, mode: str, padding_idx: int | None, reduction: str):
    torch.manual_seed(2)
    layer = bags(mode, padding_idx=padding_idx, sparse=sparse)
    tokens = torch.randint(V, (N, 5))
    tokens[1] = 2  # a bag of padding, in some cases
    model = check(net(lambda m, tokens: m.bag(tokens), bag=layer), (tokens,), reduction)
    assert model.bag.weight.grad.is_sparse == sparse


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("how", ["constant", "parameter", "function of tokens", "of another input"])
def test_weighted_bags(how: str, padding_idx: int | None):
    """The weights, some of them negative, may require a gradient."""
    torch.manual_seed(2)
    tokens, weights = torch.randint(V, (N, 5)), torch.randn(N, 5).double()
    layer, modules = bags(padding_idx=padding_idx), {}

    def forward(m, tokens, weights):
        if how == "function of tokens":
            weights = m.score(tokens).squeeze(-1)
        elif how == "of another input":
            weights = m.mix(weights)
        elif how == "parameter":
            weights = m.scale.weight.expand(len(tokens), -1)
        return m.bag(tokens, per_sample_weights=weights)

    if how == "function of tokens":
        modules["score"] = nn.Embedding(V, 1)
    elif how == "of another input":
        modules["mix"] = nn.Linear(5, 5)
    elif how == "parameter":
        modules["scale"] = nn.Linear(5, 1, bias=False)
    check(net(forward, bag=layer, **modules), (tokens, weights))


@pytest.mark.parametrize("name", FLAT)
def test_weighted_bags_with_offsets(name: str):
    tokens, offsets = flat(name)
    weights = torch.randn(len(tokens)).double()
    check(net(lambda m, *args: m.bag(*args), bag=bags(padding_idx=3)), (tokens, offsets, weights))


CALLS = {
    "keyword arguments": lambda m, t: m.bag(offsets=None, input=t[:, 0]),
    "rows": lambda m, t: m.bag(t.flatten(0, 1)).unflatten(0, t.shape[:2]).cos().sum(1),
    "rows with offsets": lambda m, t: m.bag(t.flatten(), torch.arange(0, t.numel(), 3)).unflatten(
        0, t.shape[:2]
    ),
    "twice": lambda m, t: m.bag(t[:, 0]) * m.bag(t[:, 1, :2]).sin(),
    "twice, other numbers of rows": lambda m, t: (
        m.bag(t[:, 0]) + m.bag(t.flatten(0, 1)).unflatten(0, t.shape[:2]).cos().sum(1)
    ),
    "shared by all data": lambda m, t: m.pre(t[:, 0, :1].double()) + m.bag(POSITIONS),
    "rows shared by all data": lambda m, t: (m.pre(t[..., :1].double()) + m.bag(POSITIONS_2)).cos(),
}
POSITIONS = torch.tensor([[1, 5, 5]])
POSITIONS_2 = torch.tensor([[1, 5, 5], [2, 2, 1]])


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_of_bags(name: str, mode: str):
    torch.manual_seed(2)
    modules = {"pre": nn.Linear(1, D)} if "shared" in name else {}
    tokens = torch.randint(V, (N, 2, 3))
    check(net(CALLS[name], bag=bags(mode, padding_idx=1), **modules), (tokens,))


@pytest.mark.parametrize("order", ["bag first", "embedding first"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_table_that_embedding_and_bag_share(mode: str, order: str):
    """One layer, whose positions are the tokens of the one and the bags of the other."""

    def forward(m, t):
        one, two = lambda: m.bag(t[:, 0]), lambda: m.embed(t[:, 1]).sin().sum(1)
        return one() * two() if order == "bag first" else two() * one()

    torch.manual_seed(2)
    layer = bags(mode, padding_idx=1)
    model = net(forward, bag=layer, embed=nn.Embedding(V, D))
    model.embed.weight = layer.weight
    model = check(model, (torch.randint(V, (N, 2, 3)),))
    assert not isinstance(layer.weight.kfac_expand_separate, KroneckerSum)


def test_a_table_that_is_an_output_head():
    """Two roles: per-sample quantities of their sum, a sum of Kronecker products."""
    torch.manual_seed(2)
    model = net(
        lambda m, t: nn.functional.linear(m.bag(t), m.mix.weight), bag=bags(), mix=nn.Linear(D, D)
    )
    model.head = nn.Linear(D, V, bias=False)
    model.head.weight = model.bag.weight
    model, tokens = model.double(), torch.randint(V, (N, 3))
    problem = Batch(model, (tokens,), nn.MSELoss(), torch.randn(N, V).double())
    grads, diag = per_sample_grads(problem), ggn_diag(problem)
    extend(model), extend(problem.loss_fn)
    with backpack(BatchGrad(), BatchDotGrad(), DiagGGN(), KFAC("expand", "exact")):
        problem.loss().backward()
    key, p = "head.weight", model.bag.weight  # tied: its first name
    close(p.grad_batch, grads[key])
    close(p.batch_dot, grads[key].flatten(1) @ grads[key].flatten(1).T)
    close(p.diag_ggn_exact, diag[key])
    assert isinstance(p.kfac, KroneckerSum) and len(p.kfac.terms) == 2


def test_sequence_first_bags():
    def forward(m, t):
        t = t.transpose(0, 1)
        return m.bag(t.flatten(0, 1)).unflatten(0, t.shape[:2]).transpose(0, 1)

    torch.manual_seed(2)
    first, last = net(forward, bag=bags()), net(CALLS["rows"], bag=bags())
    last.function = lambda m, t: m.bag(t.flatten(0, 1)).unflatten(0, t.shape[:2])
    same_results(first, last, (torch.randint(V, (N, 2, 3)),), batch_axis={"bag": 1})


@pytest.mark.parametrize("subset", [[2, 0], [-1], [1, 1, 3]])
def test_some_of_the_data(subset: list[int]):
    model, loss_fn = extend(net(lambda m, *args: m.bag(*args), bag=bags("mean"))), extend(nn.MSELoss())
    with backpack(BatchGrad(), BatchGrad(subset, savefield="some")):
        loss_fn(model(*flat("plain")), torch.ones(N, 2)).backward()
    close(model.bag.weight.some, model.bag.weight.grad_batch[subset])


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_over_a_data_set(mode: str):
    """Batches of other numbers of bags, as one pass over all data."""
    model, loss_fn = extend(net(lambda m, t: m.bag(t), bag=bags(mode)).double()), extend(nn.MSELoss())
    torch.manual_seed(2)
    x, y = torch.randint(V, (7, 3)), torch.randn(7, 2).double()
    exts = lambda: [KFAC("expand", "exact"), DiagGGN(), BatchGrad()]  # noqa: E731
    with backpack(*exts()):
        loss_fn(model(x), y).backward()
    p = model.bag.weight
    whole = p.kfac, p.diag_ggn_exact, p.grad_batch
    collect(model, loss_fn, [(x[:3], y[:3]), (x[3:], y[3:])], *exts(), progress=False)
    for one, other in zip((p.kfac.A, p.kfac.B), (whole[0].A, whole[0].B), strict=True):
        close(one, other)
    close(p.diag_ggn_exact, whole[1])
    close(p.grad_batch, whole[2])


def test_low_precision_bags():
    """Counts and means are formed in float32, whatever the network's data type."""
    model, loss_fn = net(lambda m, t: m.bag(t), bag=bags("mean")).bfloat16(), extend(nn.MSELoss())
    extend(model)
    tokens = torch.randint(V, (N, 3))
    with backpack(KFAC("expand", "exact"), BatchGrad(), DiagGGN()):
        loss_fn(model(tokens), torch.ones(N, 2).bfloat16()).backward()
    A = model.bag.weight.kfac.A
    counts = nn.functional.one_hot(tokens, V).sum(1) / 3
    assert A.dtype == torch.float32
    torch.testing.assert_close(A, counts.square().mean(0))


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm(cls: type):
    """The table is rescaled in place before it is read: everything is that of the rescaled one."""
    torch.manual_seed(2)
    layer = cls(V, D, max_norm=0.5)
    shape = (N, 3) if cls is nn.EmbeddingBag else (N,)
    before = layer.weight.detach().clone()
    check(net(lambda m, t: m.layer(t), layer=layer), (torch.randint(V, shape),))
    assert not torch.equal(before.double(), layer.weight.detach())


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_scaled_gradients(cls: type):
    layer, tokens = cls(V, D, scale_grad_by_freq=True), torch.randint(V, (N, 3))
    model, loss_fn = extend(net(lambda m, t: m.layer(t), layer=layer)), extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match="scale_grad_by_freq"), backpack(BatchGrad()):
        loss_fn(model(tokens), torch.ones(*model(tokens).shape)).backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", ["offsets", "2-d"])
def test_maximum_of_bags(form: str, reduction: str):
    """Each feature picks a token of its own: no Kronecker factors, but everything else, exactly."""
    torch.manual_seed(2)
    inputs = flat("empty bag in the middle") if form == "offsets" else (torch.randint(V, (N, 5)),)
    model = net(lambda m, *args: m.bag(*args), bag=bags("max", padding_idx=3)).double()
    problem = Batch(model, inputs, nn.MSELoss(reduction=reduction), torch.randn(N, 2).double())
    grads, diag = per_sample_grads(problem), ggn_diag(problem)
    exact = ggn_block(problem, ["bag.weight"])
    extend(model), extend(problem.loss_fn)
    with backpack(*extensions()):
        problem.loss().backward()
    p, g = model.bag.weight, grads["bag.weight"]
    close(p.grad_batch, g)
    close(p.batch_dot, g.flatten(1) @ g.flatten(1).T)
    close(p.variance, g.var(0, correction=0))
    close(p.diag_ggn_exact, diag["bag.weight"])
    for how in APPROX:
        assert isinstance(p.kfac_expand_separate, DenseBlock)
        close(getattr(p, f"kfac_{how}_separate").to_dense(), exact)
    close(model.head.weight.grad_batch, grads["head.weight"])


class Table(nn.Module):
    """A home-made table, of which autograd makes sparse gradients or dense ones."""

    def __init__(self, function: Callable, sparse: bool):
        super().__init__()
        self.table, self.function, self.sparse = nn.Parameter(torch.randn(V, D)), function, sparse

    def forward(self, tokens: Tensor) -> Tensor:
        return self.function(tokens, self.table, sparse=self.sparse)


SPARSE = {
    "embedding": lambda sparse: nn.Embedding(V, D, sparse=sparse),
    "a home-made embedding": lambda sparse: Table(nn.functional.embedding, sparse),
    "a home-made bag": lambda sparse: Table(nn.functional.embedding_bag, sparse),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients(name: str):
    """Results are those of dense gradients, and dense."""
    tokens = torch.tensor([[1, 2, 2], [3, 3, 1], [0, 1, 5]])
    results, grads = [], []
    for sparse in (False, True):
        torch.manual_seed(2)
        layer = SPARSE[name](sparse)
        model = net(lambda m, t: m.layer(t).reshape(len(t), -1, D).sum(1), layer=layer)
        extend(model), extend(loss_fn := nn.MSELoss())
        with backpack(*extensions()):
            loss_fn(model(tokens), torch.ones(3, 2)).backward()
        (p,) = layer.parameters()
        grads.append(p.grad)
        found = [getattr(p, ext.savefield) for ext in extensions()]
        results.append([t if isinstance(t, Tensor) else t.to_dense() for t in found])
    assert grads[1].is_sparse and not grads[0].is_sparse
    for dense, sparse in zip(*results, strict=True):
        assert not sparse.is_sparse
        close(sparse, dense, 1e-5)


# -- how many data there are -----------------------------------------------------------------------


class Classifier(nn.Module):
    """The usual text classifier: `forward(tokens, offsets)`."""

    def __init__(self, mode: str = "mean", **options):
        super().__init__()
        self.bag, self.head = bags(mode, **options), nn.Linear(D, 2)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(tokens, offsets))


def grads_of(model: nn.Module, *inputs: Tensor, rows: int = N, **kwargs) -> Tensor:
    loss_fn = extend(nn.MSELoss())
    with backpack(BatchGrad()):
        loss_fn(model(*inputs, **kwargs), torch.ones(rows, 2)).backward()
    return model.head.weight.grad_batch


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("frozen", [False, True])
def test_data_are_the_bags(frozen: bool, mode: str, name: str):
    """Whether the table is trained or not, and however many tokens there are."""
    model = extend(Classifier(mode))
    model.bag.weight.requires_grad_(not frozen)
    G = grads_of(model, *flat(name))
    assert G.shape == (N, 2, D)
    close(G.sum(0), model.head.weight.grad, 1e-5)


def test_data_are_the_bags_of_the_last_pass():
    """Each forward counts anew."""
    model = extend(Classifier())
    for name in FLAT:
        assert len(grads_of(model, *flat(name))) == N
    assert len(grads_of(model, torch.tensor([1, 2, 3]), torch.tensor([0, 2]), rows=2)) == 2


@pytest.mark.parametrize("last", [False, True])
def test_model_that_is_called_with_offsets_first(last: bool):
    model = net(lambda m, offsets, tokens: m.bag(tokens, offsets), bag=bags(include_last_offset=last))
    tokens, offsets = flat("plain", last)
    assert len(grads_of(extend(model), offsets, tokens)) == N


def test_bag_that_is_called_on_its_own():
    model = extend(Classifier())
    loss_fn = extend(nn.MSELoss())
    with backpack(BatchGrad()):
        loss_fn(model.bag(*flat("plain")), torch.ones(N, D)).backward()
    assert model.bag.weight.grad_batch.shape == (N, V, D)


class Wide(nn.Module):
    """Looks up tokens before it uses features, and calls the bags twice per datum."""

    def __init__(self):
        super().__init__()
        self.bag, self.dense, self.head = bags(), nn.Linear(5, D), nn.Linear(D, 2)

    def forward(self, tokens: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        h = self.dense(x)
        return self.head(h + self.bag(tokens, offsets).unflatten(0, (len(x), -1)).sum(1))


@pytest.mark.parametrize("per_datum", [1, 2])
def test_argument_that_counts_the_data(per_datum: int):
    tokens, offsets = flat("plain")
    x = torch.randn(N // per_datum, 5)
    with pytest.raises((RecordingError, UnsupportedError), match="batch_argument"):
        grads_of(extend(Wide()), tokens, offsets, x, rows=len(x))
    for how in ("positional", "keyword"):
        model = extend(Wide(), batch_argument="x")
        args, kwargs = ((x,), {}) if how == "positional" else ((), {"x": x})
        G = grads_of(model, tokens, offsets, *args, rows=len(x), **kwargs)
        assert len(G) == len(x)
        close(G.sum(0), model.head.weight.grad, 1e-5)
        close(model.bag.weight.grad_batch.sum(0), model.bag.weight.grad, 1e-5)


def test_number_of_bags_that_may_be_a_multiple_of_the_data():
    """Two data with two bags each, or four data whose tokens the model changed? It is not guessed."""

    def forward(m, ids, tokens, offsets):
        return m.bag(tokens, offsets).unflatten(0, (len(ids), -1)).sum(1)

    model = net(forward, bag=bags())
    ids, (tokens, offsets) = torch.tensor([8, 9]), flat("plain")
    with pytest.raises(RecordingError, match=r"returns 4 bags.*lists 2 integers.*batch_argument"):
        extend(model)(ids, tokens, offsets)
    with torch.no_grad():
        model(ids, tokens, offsets)
    model.forward = lambda ids, tokens, offsets: Net.forward(model, ids, tokens, offsets)
    assert len(grads_of(extend(model, batch_argument="ids"), ids, tokens, offsets, rows=2)) == 2


def test_argument_that_does_not_exist():
    with pytest.raises(ValueError, match=r"batch_argument='text'.*tokens.*offsets"):
        extend(Classifier(), batch_argument="text")


def test_bag_with_an_overridden_forward():
    class Pairs(nn.EmbeddingBag):
        def forward(self, tokens):
            return super().forward(tokens, torch.arange(0, len(tokens), 2))

    def forward(m, x, tokens):
        return m.bag(tokens)

    model = extend(net(forward, bag=Pairs(V, D, mode="sum")), batch_argument="inputs")
    with pytest.raises(UnsupportedError, match=r"with offsets.*register a rule"):
        grads_of(model, torch.zeros(N, 1), torch.randint(V, (2 * N,)))


# -- the contractions ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 30, 2**24])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("s", [1, 3])
def test_contractions_of_bags(s: int, masked: bool, weighted: bool, chunk: int, monkeypatch):
    monkeypatch.setattr(normal, "CHUNK", chunk)
    torch.manual_seed(0)
    v, n, i, o, e = 2, 4, 5, 3, 23
    index, row = torch.randint(i, (e,)), torch.randint(n * s, (e,))
    weight = torch.randn(e).double() if weighted else None
    mask = torch.rand(n, s) < 0.6 if masked else None
    a = OneHot(index, i, mask, Bags(row, (n, s), weight))
    dense = torch.zeros(n * s, i).double()
    for k in range(e):
        dense[row[k], index[k]] += 1 if weight is None else weight[k]
    dense = dense.view(1, n, s, i)
    dense = dense if mask is None else dense * mask[..., None]
    b = torch.randn(1, v, n, s, o).double()
    G = torch.einsum("gvnso,gnsi->vngoi", b, dense)
    close(normal.per_sample(a, b), G)
    close(normal.per_sample_sum(a, b), G.sum((0, 1)))
    close(normal.square_sum(a, b), G.square().sum((0, 1)))
    close(normal.square_norms(a, b), torch.einsum("vngoi->gvn", G.square()))
    close(normal.dots(a, b), torch.einsum("vngoi,vmgoi->gvnm", G, G))
    for chosen in (torch.tensor([2, 0]), torch.tensor([3, -4, 3])):
        close(normal.per_sample(a.select(chosen), b[:, :, chosen]), G[:, chosen])
    close(
        normal.per_sample(a.abs(), b.abs()),
        torch.einsum("gvnso,gnsi->vngoi", b.abs(), _absolute(a, dense)),
    )
    other = OneHot(torch.randint(i, (n, 2)), i, torch.rand(n, 2) < 0.5)
    c = torch.randn(1, v, n, 2, o).double()
    for parts, vectors in (((a, other), (b, c)), ((other, a), (c, b)), ((a, a), (b, b))):
        joined = normal.per_sample(normal.cat_inputs(parts), torch.cat(vectors, 3))
        close(joined, sum(normal.per_sample(*part) for part in zip(parts, vectors, strict=True)))


def _absolute(a: OneHot, dense: Tensor) -> Tensor:
    out = torch.zeros_like(dense).flatten(0, 2)
    for r, i, w in zip(a.rows, a.index, a.weights(torch.float64), strict=True):
        out[r, i] += w.abs()
    return out.view_as(dense)
