"""Hyper-parameters and input layouts of each layer family, one layer and a squared error each."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from models import Problem
from oracle import LAYERS, close, ggn_diag, kfac_factors, kronecker_block, per_sample_grads
from torch import Tensor, nn

from backpack_ext import (
    KFAC,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    SumGradSquared,
    UnsupportedError,
    Variance,
    backpack,
    extend,
    normal,
    unit,
)
from backpack_ext.normal import OneHot
from backpack_ext.rules.affine import _SpatialRule

N = 3
APPROX = ("expand", "reduce")


def extensions() -> list:
    first_order = (BatchGrad, BatchL2Grad, BatchDotGrad, SumGradSquared, Variance, DiagGGN)
    kfacs = [KFAC(how, "exact", savefield=f"kfac_{how}") for how in APPROX]
    joint = [KFAC(how, "exact", bias="joint", savefield=f"kfac_{how}_joint") for how in APPROX]
    return [*(ext() for ext in first_order), *kfacs, *joint]


def check(make: Callable[[], nn.Module], x: Tensor) -> None:
    """Compare everything about a layer, or each layer of a model, on one input with the oracles."""
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        target = torch.randn_like(model(x))
    problem = Problem(model, (x,), nn.MSELoss(), target)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LAYERS)}
    grads, diag = per_sample_grads(problem), ggn_diag(problem)
    factors = {
        (path, how): kfac_factors(problem, how, path, "joint" if has_bias(module) else "separate")
        for path, module in layers.items()
        for how in APPROX
    }
    extend(problem.model), extend(problem.loss_fn)
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
    for (path, how), (B, A) in factors.items():
        check_factors(layers[path], how, B, A)


def has_bias(module: nn.Module) -> bool:
    """Whether the layer has a bias that is trained."""
    return getattr(module, "bias", None) is not None and module.bias.requires_grad


def check_factors(module: nn.Module, how: str, B: Tensor, A: Tensor) -> None:
    """Compare a layer's factors, separate and joint, with those of the oracle (joint if it can)."""
    if isinstance(module, nn.Embedding):  # which keeps the diagonal only
        A = A * torch.eye(len(A)).double()
    if has_bias(module):
        groups = B if B.dim() == 3 else B[None]
        close(getattr(module.bias, f"kfac_{how}").to_dense(), torch.block_diag(*groups))
    if not module.weight.requires_grad:
        assert not hasattr(module.weight, f"kfac_{how}")
        return
    K, joint = (getattr(module.weight, f"kfac_{how}{end}") for end in ("", "_joint"))
    close(K.B, B)
    close(joint.B, B)
    close(joint.A, A if joint.A.dim() == A.dim() else A.diagonal())
    close(K.to_dense(), kronecker_block(module, B, A[..., :-1, :-1] if has_bias(module) else A))
    assert joint.joint == has_bias(module) and not K.joint


# -- convolutions ----------------------------------------------------------------------------------

# dimensions, input [C, *I], C_out, kernel, further arguments
CONVS = [
    (1, (2, 7), 3, 3, {}),
    (1, (2, 7), 3, 3, {"stride": 2, "padding": 1}),
    (1, (4, 9), 6, 3, {"dilation": 2, "groups": 2, "bias": False}),
    (1, (3, 8), 3, 2, {"groups": 3, "padding": "same"}),
    (1, (2, 7), 4, 4, {"padding": "same", "padding_mode": "replicate"}),
    (1, (2, 7), 4, 3, {"padding": "same", "padding_mode": "circular", "dilation": 3}),
    (1, (2, 7), 3, 3, {"padding": "valid", "stride": 3}),
    (1, (2, 2), 3, 5, {"padding": 2}),
    (1, (2, 5), 3, 1, {"stride": 2}),
    (1, (2, 1), 3, 1, {"stride": 5, "padding": 2}),  # the only pixel lies in the padding
    (2, (2, 5, 6), 3, 3, {"padding": 1}),
    (2, (2, 5, 7), 3, (2, 3), {"stride": (2, 1), "padding": (0, 2), "bias": False}),
    (2, (2, 7, 6), 3, (3, 2), {"dilation": (1, 3), "stride": (3, 2), "padding": (2, 1)}),
    (2, (4, 5, 4), 6, (1, 3), {"groups": 2, "padding": (0, 1)}),
    (2, (3, 5, 4), 6, (3, 2), {"groups": 3, "padding": "same"}),
    (2, (4, 4, 5), 4, 3, {"groups": 4, "stride": 2, "padding": 1, "bias": False}),
    (2, (2, 5, 4), 3, (2, 3), {"padding": "same", "dilation": (3, 1)}),
    (2, (2, 5, 4), 3, (3, 2), {"padding": (2, 1), "padding_mode": "circular", "stride": (1, 2)}),
    (2, (4, 5, 4), 2, (2, 3), {"padding": "same", "padding_mode": "reflect", "groups": 2}),
    (2, (2, 5, 4), 3, (2, 3), {"padding": (1, 2), "padding_mode": "reflect", "bias": False}),
    (2, (2, 4, 3), 3, 2, {"padding": (2, 1), "padding_mode": "replicate", "dilation": 2}),
    (2, (2, 2, 3), 3, (5, 4), {"padding": (2, 1)}),
    (2, (2, 3, 2), 3, (3, 2), {}),
    (2, (3, 4, 5), 2, 1, {"stride": (2, 3)}),
    (2, (2, 4, 3), 3, 1, {"padding": 1}),
    (3, (2, 3, 4, 2), 3, 2, {}),
    (3, (2, 3, 4, 5), 4, (1, 3, 2), {"stride": (1, 2, 2), "padding": (0, 1, 1), "groups": 2}),
    (3, (2, 4, 2, 3), 2, (2, 1, 3), {"padding": "same", "dilation": (2, 1, 1), "groups": 2}),
    (3, (2, 2, 3, 2), 3, (3, 2, 2), {"padding": 1, "padding_mode": "circular", "stride": (1, 2, 3)}),
    (3, (1, 2, 3, 2), 2, 2, {"padding": (0, 2, 1), "padding_mode": "replicate", "bias": False}),
    (3, (1, 2, 3, 4), 2, (2, 3, 2), {"padding": (1, 1, 2), "padding_mode": "reflect", "stride": 2}),
]
TRANSPOSED = [
    (1, (2, 5), 3, 3, {}),
    (1, (2, 4), 3, 3, {"stride": 2, "padding": 1, "output_padding": 1}),
    (1, (4, 4), 6, 2, {"groups": 2, "dilation": 3, "padding": 1, "bias": False}),
    (1, (3, 4), 3, 3, {"groups": 3, "stride": 3, "output_padding": 2}),
    (1, (2, 4), 3, 1, {"stride": 3}),
    (1, (2, 5), 3, 2, {"padding": 2}),
    (1, (2, 4), 3, 2, {"dilation": 3, "output_padding": 2}),
    (
        1,
        (6, 1),
        12,
        1,
        {"padding": 3, "output_padding": 8, "dilation": 9, "groups": 6},
    ),  # none met
    (2, (2, 3, 4), 3, 3, {"padding": 1}),
    (2, (2, 3, 2), 4, (3, 2), {"stride": (2, 1), "output_padding": (1, 0), "padding": (1, 0)}),
    (2, (4, 3, 2), 6, (2, 3), {"groups": 2, "stride": (1, 2), "dilation": (2, 1)}),
    (2, (3, 3, 2), 6, (1, 2), {"groups": 3, "stride": 2, "output_padding": (1, 0), "bias": False}),
    (2, (2, 4, 5), 3, (2, 3), {"padding": (2, 3)}),
    (2, (2, 2, 3), 5, 2, {"stride": 2}),
    (3, (2, 2, 3, 2), 3, 2, {}),
    (3, (2, 2, 2, 3), 4, (1, 2, 3), {"stride": (2, 1, 2), "padding": (0, 1, 2), "groups": 2}),
    (3, (2, 1, 2, 2), 2, (2, 3, 1), {"stride": (3, 2, 2), "output_padding": (1, 0, 1), "bias": False}),
]


def conv_id(row: tuple) -> str:
    dims, x, out, kernel, options = row
    options = " ".join(f"{key}={value}" for key, value in options.items())
    return f"{dims}d {x}->{out} k={kernel} {options}".strip()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("row", CONVS, ids=conv_id)
def test_conv(row: tuple):
    dims, shape, out, kernel, options = row
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(1)
    check(lambda: cls(shape[0], out, kernel, **options), torch.randn(N, *shape).double())


@pytest.mark.parametrize("row", TRANSPOSED, ids=conv_id)
def test_conv_transpose(row: tuple):
    dims, shape, out, kernel, options = row
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    torch.manual_seed(1)
    check(lambda: cls(shape[0], out, kernel, **options), torch.randn(N, *shape).double())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("data_at_once", [1, 2])
@pytest.mark.parametrize("row", CONVS, ids=conv_id)
def test_conv_in_parts(row: tuple, data_at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Patches are formed for some data at a time where nobody needs them whole."""
    dims, shape, out, kernel, options = row
    torch.manual_seed(1)
    model = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](shape[0], out, kernel, **options).double()
    x = torch.randn(N, *shape).double()
    problem = Problem(model, (x,), nn.MSELoss(), torch.randn_like(model(x).detach()))
    G, diag = per_sample_grads(problem)["weight"], ggn_diag(problem)["weight"]
    extend(model), extend(problem.loss_fn)
    pixels = problem.target[0, 0].numel()
    monkeypatch.setattr(unit, "PART", data_at_once * pixels * G[0, 0].numel() * model.groups)
    with backpack(BatchGrad()):
        problem.loss().backward()  # the layer is checked once, which needs the patches
    parts = _SpatialRule.inputs_of
    monkeypatch.setattr(_SpatialRule, "inputs", lambda *args: pytest.fail("formed as a whole"))
    calls = []
    monkeypatch.setattr(_SpatialRule, "inputs_of", lambda *args: calls.append(1) or parts(*args))
    for ext in (SumGradSquared, Variance, BatchL2Grad, DiagGGN):
        calls.clear()
        with backpack(ext()):
            problem.loss().backward()
        assert len(calls) == -(-N // data_at_once), ext
    p = model.weight
    close(p.sum_grad_squared, G.square().sum(0))
    close(p.variance, G.var(0, correction=0))
    close(p.batch_l2, G.square().flatten(1).sum(1))
    close(p.diag_ggn_exact, diag)


@pytest.mark.parametrize("memory_format", [torch.channels_last, "flipped strides"])
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_conv_on_other_memory_layouts(cls: type[nn.Module], memory_format):
    x = torch.randn(N, 4, 5, 3).double()
    if memory_format == torch.channels_last:
        x = x.to(memory_format=memory_format)
    else:
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    check(lambda: cls(4, 2, (2, 3), padding=1, groups=2), x)


@pytest.mark.parametrize("size", [(7, 4), (8, 5), (8, 4)])
def test_output_size_of_a_call(size: tuple[int, int]):
    """`output_size` in the call acts like `output_padding` in the constructor."""

    class Up(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 2), padding=(1, 0), **options)

        def forward(self, x: Tensor, **kwargs) -> Tensor:
            return self.up(x, **kwargs)

    torch.manual_seed(0)
    x = torch.randn(N, 2, 4, 2).double()
    called, built = Up().double(), Up(output_padding=(size[0] - 7, size[1] - 4)).double()
    built.load_state_dict(called.state_dict())
    target = torch.randn(N, 3, *size).double()
    for model, kwargs in ((called, {"output_size": size}), (built, {})):
        loss_fn = extend(nn.MSELoss())
        with backpack(*extensions()):
            loss_fn(extend(model)(x, **kwargs), target).backward()
    for p, q in zip(called.parameters(), built.parameters(), strict=True):
        close(p.grad_batch, q.grad_batch)
        close(p.diag_ggn_exact, q.diag_ggn_exact)
        close(p.kfac_expand.to_dense(), q.kfac_expand.to_dense())
        close(p.kfac_reduce.to_dense(), q.kfac_reduce.to_dense())


# -- linear and embedding --------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 4), (N, 4, 2), (N, 2, 1, 3)])
def test_linear(shape: tuple[int, ...], bias: bool):
    torch.manual_seed(1)
    check(lambda: nn.Linear(5, 2, bias=bias), torch.randn(*shape, 5).double())


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(5, N).T,
        lambda: torch.randn(N, 5, 4).transpose(1, 2),
        lambda: torch.randn(4, N, 5).transpose(0, 1),
        lambda: torch.randn(5, 4, N).permute(2, 1, 0),
        lambda: torch.randn(2 * N, 8, 10)[::2, 1::2, ::2],
        lambda: torch.randn(N, 1, 5).expand(N, 4, 5),
        lambda: torch.randn(2, 4, N, 5).permute(2, 1, 0, 3),
    ],
)
def test_linear_on_non_contiguous_input(view: Callable[[], Tensor]):
    torch.manual_seed(1)
    x = view().double()
    check(lambda: nn.Linear(5, 2), x)


@pytest.mark.parametrize("padding_idx", [None, 0, 4, -1])
@pytest.mark.parametrize("shape", [(N,), (N, 4), (N, 2, 3)])
def test_embedding(shape: tuple[int, ...], padding_idx: int | None):
    torch.manual_seed(1)
    index = torch.randint(5, shape)
    index.flatten()[1] = 4  # the index that is padding, in some cases
    check(lambda: nn.Embedding(5, 2, padding_idx=padding_idx), index)


def test_embedding_of_repeated_tokens():
    check(lambda: nn.Embedding(6, 3), torch.tensor([[2, 2, 2, 0], [0, 0, 1, 2], [5, 5, 5, 5]]))


# -- layers of equal shape -------------------------------------------------------------------------


class Stack(nn.Module):
    """Layers `[N, ...] -> [N, ...]` of equal shape, of which some train only a part."""

    def __init__(self, layer: Callable[..., nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layer(bias=k != 2) for k in range(6))
        self.layers[1].bias.requires_grad_(False)
        self.layers[4].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Embeddings(nn.Module):
    """Two embeddings of the same tokens, and of those tokens in another order."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Embedding(5, 3), nn.Embedding(5, 3, padding_idx=1)

    def forward(self, index: Tensor) -> Tensor:
        return self.one(index) * self.two(index.flip(1))


STACKS = {
    "linear": (lambda: Stack(partial(nn.Linear, 3, 3)), (3,)),
    "linear on tokens": (lambda: Stack(partial(nn.Linear, 3, 3)), (4, 3)),
    "conv": (lambda: Stack(partial(nn.Conv1d, 3, 3, 3, padding=1)), (3, 4)),
    "grouped conv": (lambda: Stack(partial(nn.Conv1d, 6, 6, 3, padding=1, groups=3)), (6, 4)),
    "grouped conv transpose": (
        lambda: Stack(partial(nn.ConvTranspose1d, 4, 4, 3, padding=1, groups=2)),
        (4, 3),
    ),
    "embedding": (Embeddings, None),
}


@pytest.mark.parametrize(
    "setting, value",
    [
        ("backpack_ext.pending.Pending.SMALL", 2**14),
        ("backpack_ext.pending.Pending.SMALL", 0),
        ("backpack_ext.pending.Pending.LIMIT", 0),
        ("backpack_ext.pending.Pending.LIMIT", 100),
        ("backpack_ext.sweep.MAX_BYTES", 1),
        ("backpack_ext.sweep.MAX_BYTES", 3000),
    ],
)
@pytest.mark.parametrize("name", STACKS)
def test_layers_of_equal_shape(name: str, setting: str, value: int, monkeypatch: pytest.MonkeyPatch):
    """They share products where they are small, whatever waits and however columns are cut."""
    make, shape = STACKS[name]
    monkeypatch.setattr(setting, value)
    torch.manual_seed(1)
    x = torch.randint(5, (N, 4)) if shape is None else torch.randn(N, *shape).double()
    check(make, x)


# -- sequence-first --------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    """Two layers on `[T, N, 4]`; returns rows `[T N, 3]`."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).flatten(0, 1)


class Between(TimeFirst):
    """Two layers on `[N, T, 4]`, the first of which sees `[T, N, 4]`."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.transpose(0, 1)).transpose(0, 1)
        return self.last(torch.tanh(h)).flatten(0, 1)


@pytest.mark.parametrize("length", [2, 4, 5])
@pytest.mark.parametrize("data", [2, 4])
@pytest.mark.parametrize("how", ["all", "one layer", "flat rows"])
def test_sequence_first(how: str, data: int, length: int):
    """The same as batch-first, with T a multiple of N or not."""
    torch.manual_seed(0)
    plain = TimeFirst().double()
    other = Between().double() if how == "one layer" else TimeFirst().double()
    other.load_state_dict(plain.state_dict())
    x, y = torch.randn(data, length, 4).double(), torch.randn(data, length, 3).double()
    extend(plain)
    if how == "one layer":
        extend(other, batch_axis={"first": 1})
        loss_fn, x_other, y_other = extend(nn.MSELoss()), x, y
    else:
        extend(other, batch_axis=1)
        loss_fn = extend(nn.MSELoss(), batch_axis=1)
        x_other, y_other = x.transpose(0, 1), y.transpose(0, 1)
    if how == "flat rows":
        other.first.register_forward_pre_hook(lambda module, args: args[0].flatten(0, 1))
        other.first.register_forward_hook(lambda module, args, out: out.unflatten(0, (length, data)))
    with backpack(*extensions()):
        extend(nn.MSELoss())(plain(x), y.flatten(0, 1)).backward()
    with backpack(*extensions()):
        loss_fn(other(x_other), y_other.flatten(0, 1)).backward()
    for p, q in zip(other.parameters(), plain.parameters(), strict=True):
        for field in ("grad", "grad_batch", "batch_l2", "batch_dot", "variance", "diag_ggn_exact"):
            close(getattr(p, field), getattr(q, field))
        for how in (*APPROX, "expand_joint", "reduce_joint"):
            for factor, expected in zip(*(getattr(t, f"kfac_{how}") for t in (p, q)), strict=True):
                close(factor, expected)


@pytest.mark.parametrize("length", [3, 4, 8])
@pytest.mark.parametrize("loss_axis", [0, 1])
def test_sequence_first_logits_that_are_no_rows(loss_axis: int, length: int):
    """Logits `[T, N, D]`: what batch-first gives, or an error, but no other number."""
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3).double(), 4
    x, y = torch.randn(data, length, 4).double(), torch.randn(data, length, 3).double()
    with backpack(*extensions()):
        extend(nn.MSELoss())(extend(model)(x), y).backward()
    diag, B = model.weight.diag_ggn_exact, model.weight.kfac_reduce.B
    extend(model, batch_axis=1)
    loss_fn = extend(nn.MSELoss(), batch_axis=loss_axis)
    try:
        with backpack(*extensions()):
            loss_fn(model(x.transpose(0, 1)), y.transpose(0, 1)).backward()
    except UnsupportedError:
        return
    close(model.weight.diag_ggn_exact, diag)
    close(model.weight.kfac_reduce.B, B)


class Wrong(nn.Module):
    """A layer whose input a function of the model's input."""

    def __init__(self, layer: nn.Module, view: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer, self.view = layer, view

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.view(x)).sum().expand(len(x), 1)


@pytest.mark.parametrize(
    "layer, view, axis",
    [
        (nn.Linear(5, 2), lambda x: x[0, 0], 0),
        (nn.Linear(4, 2), lambda x: x.permute(1, 2, 0), 0),
        (nn.Linear(5, 2), lambda x: x[:, :3].flatten(0, 1)[1:], 0),
        (nn.Linear(5, 2), lambda x: x, 1),
        (nn.Linear(5, 2), lambda x: x[:, :3], 2),
        (nn.Conv1d(7, 2, 3), lambda x: x[0], 0),
        (nn.ConvTranspose1d(7, 2, 3), lambda x: x[0], 0),
    ],
    ids=["no batch", "data last", "odd rows", "axis 1 of 0", "axis 2 of 0", "conv", "conv transpose"],
)
@pytest.mark.parametrize("ext", [BatchGrad(), DiagGGN(), KFAC(), KFAC("reduce", "empirical")])
def test_layouts_without_the_data(ext, layer: nn.Module, view: Callable, axis: int):
    """`[4, 7, 5]` with N = 4; the layer sees something whose data cannot be found."""
    model = extend(Wrong(layer, view), batch_axis={"layer": axis})
    loss_fn = extend(nn.MSELoss())
    with (
        pytest.raises(UnsupportedError, match=r"^layer \(.*(no batch axis|cannot find the 4 data)"),
        backpack(ext),
    ):
        loss_fn(model(torch.randn(4, 7, 5)), torch.zeros(4, 1)).backward()


# -- the contractions themselves -------------------------------------------------------------------

# g groups, v vectors, n data, s positions, i and o features; either side of each cost rule
SIZES = {
    "no shared axis": (1, 2, 3, 1, 4, 5),
    "no shared axis, groups": (2, 3, 4, 1, 5, 3),
    "short": (1, 3, 4, 2, 9, 7),
    "short, groups": (3, 2, 4, 2, 8, 7),
    "long": (1, 2, 3, 11, 2, 4),
    "long, groups": (2, 3, 4, 9, 3, 2),
}


def per_sample(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("gvnso,gnsi->vngoi", b, a)


def gram_pays(name: str) -> bool:
    """Whether the Gram route of `square_norms` and of `dots` needs fewer products."""
    return name.startswith("short")


@pytest.mark.parametrize("name", SIZES)
def test_contractions(name: str):
    g, v, n, s, i, o = SIZES[name]
    torch.manual_seed(0)
    a, b = torch.randn(g, n, s, i).double(), torch.randn(g, v, n, s, o).double()
    G = per_sample(a, b)
    close(normal.per_sample(a, b), G)
    close(normal.per_sample_sum(a, b), G.sum((0, 1)))
    close(normal.square_sum(a, b), G.square().sum((0, 1)))
    close(normal.square_norms(a, b), torch.einsum("vngoi->gvn", G.square()))
    close(normal.dots(a, b), torch.einsum("vngoi,vmgoi->gvnm", G, G))
    close(normal.bias_per_sample(b), torch.einsum("gvnso->vngo", b).unsqueeze(-1))
    rows = a.flatten(1, 2)
    close(normal.gram(rows, 0.5), 0.5 * torch.einsum("gri,grj->gij", rows, rows))


@pytest.mark.parametrize("name", [name for name in SIZES if not name.startswith("no")])
def test_cost_rules(name: str, monkeypatch: pytest.MonkeyPatch):
    """The sizes above lie on both sides: the Gram route does not form per-sample vectors."""
    g, v, n, s, i, o = SIZES[name]
    calls = []
    explicit = normal.per_sample
    monkeypatch.setattr(normal, "per_sample", lambda a, b: calls.append(1) or explicit(a, b))
    a, b = torch.randn(g, n, s, i), torch.randn(g, v, n, s, o)
    for contraction in (normal.square_norms, normal.dots):
        calls.clear()
        contraction(a, b)
        assert (not calls) == gram_pays(name)


@pytest.mark.parametrize("data_at_once", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["long", "long, groups"])
def test_chunks(name: str, data_at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Per-sample vectors are formed for some data at a time."""
    g, v, n, s, i, o = SIZES[name]
    torch.manual_seed(0)
    a, b = torch.randn(g, n, s, i).double(), torch.randn(g, v, n, s, o).double()
    formed = []
    explicit = normal.per_sample
    monkeypatch.setattr(normal, "per_sample", lambda a, b: formed.append(explicit(a, b)) or formed[-1])
    monkeypatch.setattr(normal, "PIECE", data_at_once * g * v * o * i)
    G = per_sample(a, b)
    close(normal.square_sum(a, b), G.square().sum((0, 1)))
    close(normal.square_norms(a, b), torch.einsum("vngoi->gvn", G.square()))
    assert len(formed) == 2 * -(-n // data_at_once)
    assert max(part.numel() for part in formed) <= normal.PIECE


@pytest.mark.parametrize("outputs_at_once", [1, 2])
@pytest.mark.parametrize("name", ["long", "long, groups"])
def test_chunks_of_outputs(name: str, outputs_at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Of large layers, per-sample vectors are formed for some output features at a time."""
    g, v, n, s, i, o = SIZES[name]
    torch.manual_seed(0)
    a, b = torch.randn(g, n, s, i).double(), torch.randn(g, v, n, s, o).double()
    formed = []
    explicit = normal.per_sample
    monkeypatch.setattr(normal, "per_sample", lambda a, b: formed.append(explicit(a, b)) or formed[-1])
    monkeypatch.setattr(normal, "PIECE", outputs_at_once * g * v * i)
    G = per_sample(a, b)
    close(normal.square_sum(a, b), G.square().sum((0, 1)))
    close(normal.square_norms(a, b), torch.einsum("vngoi->gvn", G.square()))
    assert len(formed) == 2 * n * -(-o // outputs_at_once)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("outputs_at_once", [1, 2, 100])
@pytest.mark.parametrize("name", ["long", "long, groups"])
def test_squares_one_by_one(
    name: str, outputs_at_once: int, threads: int, monkeypatch: pytest.MonkeyPatch
):
    """Large per-sample vectors are squared and added up without being formed for several data."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    g, v, n, s, i, o = SIZES[name]
    torch.manual_seed(0)
    a, b = torch.randn(g, n, s, i).double(), torch.randn(g, v, n, s, o).double()
    expected = per_sample(a, b).square().sum((0, 1))
    monkeypatch.setattr(normal, "per_sample", None)
    monkeypatch.setattr(normal, "SINGLE", o * i)
    monkeypatch.setattr(normal, "SHARE", 1)
    monkeypatch.setattr(normal, "BUFFER", outputs_at_once * i)
    close(normal.square_sum(a, b), expected)
    turned = a.mT.contiguous().mT, b.mT.contiguous().mT  # as a convolution's
    close(normal.square_sum(*turned), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("s", [1, 5])
def test_contractions_of_one_hot_inputs(s: int, masked: bool):
    torch.manual_seed(0)
    v, n, i, o = 2, 4, 3, 5
    index, b = torch.randint(i, (n, s)), torch.randn(1, v, n, s, o).double()
    mask = torch.rand(n, s) < 0.6 if masked else None
    dense = nn.functional.one_hot(index, i).double()[None]
    dense = dense if mask is None else dense * mask[..., None]
    a, G = OneHot(index, i, mask), per_sample(dense, b)
    close(normal.per_sample(a, b), G)
    close(normal.per_sample_sum(a, b), G.sum((0, 1)))
    close(normal.square_sum(a, b), G.square().sum((0, 1)))
    close(normal.square_norms(a, b), torch.einsum("vngoi->gvn", G.square()))
    close(normal.dots(a, b), torch.einsum("vngoi,vmgoi->gvnm", G, G))
    chosen = torch.tensor([2, 0])
    close(normal.per_sample(a.select(chosen), b[:, :, chosen]), G[:, chosen])


@pytest.mark.parametrize("masks", [(True, False), (False, False), (True, True)])
def test_joined_inputs(masks: tuple[bool, bool]):
    """Several calls of a layer: their positions one after the other."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, s, 4) for s in (1, 5)]
    assert torch.equal(normal.cat_inputs(parts), torch.cat(parts, 2))
    n, i, b = 3, 4, torch.randn(1, 2, 3, 6, 5).double()
    calls = [
        OneHot(torch.randint(i, (n, s)), i, torch.rand(n, s) < 0.5 if mask else None)
        for s, mask in zip((2, 4), masks, strict=True)
    ]
    joined = normal.per_sample(normal.cat_inputs(calls), b)
    alone = [normal.per_sample(c, part) for c, part in zip(calls, b.split([2, 4], 3), strict=True)]
    close(joined, sum(alone))
