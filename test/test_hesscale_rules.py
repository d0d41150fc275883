"""Hessian diagonals through one module, which are exact where the Hessian at its output is diagonal.

Every case ends in a sum of separate functions of the outputs, with curvatures of both signs; its
inputs are parameters, too. Where a module has several arguments, each one's diagonal is exact.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hesscale_oracle import Graph, Module, as_function, exact_diagonal, recursion
from oracle import NORMS, close
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backpack_ext import HesScale, UnsupportedError, attach_diagonal, backpack

pytestmark = pytest.mark.usefixtures("double")


@dataclass(frozen=True)
class Case:
    """A module and the shapes of its inputs.

    Attributes:
        make: Makes the module, or the function of its inputs.
        shapes: Of the inputs.
        fixed: Further inputs, which are no parameters.
        reference: What the oracle differentiates, a function of the inputs and then of the
            module's parameters; default: the module itself. For what cannot be differentiated
            twice, or changes its buffers.
        positive: Whether the inputs are.
        train: Whether the module is in training mode.
    """

    make: Callable[[], Callable]
    shapes: tuple[tuple[int, ...], ...]
    fixed: tuple = ()
    reference: Callable | None = None
    positive: bool = False
    train: bool = False


def layer(make: Callable[..., nn.Module], *args, on: tuple, **kwargs) -> Case:
    """The module `make(*args, **kwargs)` on an input of one shape, or on inputs of several."""
    shapes = on if on and isinstance(on[0], tuple) else (on,) if on else ()
    special = {key: kwargs.pop(key) for key in ("fixed", "reference", "train") if key in kwargs}
    return Case(lambda: make(*args, **kwargs), shapes, **special)


def function(fn: Callable, *shapes: tuple[int, ...], **options) -> Case:
    """A function of tensors of these shapes."""
    return Case(lambda: fn, shapes, **options)


def seeded(fn: Callable) -> Callable:
    """A function that draws the same random numbers each time."""

    def again(*args):
        torch.manual_seed(7)
        return fn(*args)

    return again


def flat(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """All outputs of a module in one vector."""
    if isinstance(outputs, Tensor):
        return outputs.flatten()
    return torch.cat([y.flatten() for y in outputs])


def build(case: Case) -> tuple[Callable, list[nn.Parameter], Callable]:
    """The module as a function of no argument, its leaves, and the reference, a function of those."""
    fn = case.make()
    inputs = [nn.Parameter(torch.randn(shape)) for shape in case.shapes]
    if case.positive:
        inputs = [nn.Parameter(x.detach().abs() + 0.1) for x in inputs]
    parameters = {}
    if isinstance(fn, nn.Module):
        fn.train(case.train)
        for m in fn.modules():
            if getattr(m, "running_mean", None) is not None:
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
        parameters = dict(fn.named_parameters())
        for p in parameters.values():
            p.data.add_(torch.randn_like(p), alpha=0.5 if isinstance(fn, NORMS) else 0.1)
    original = deepcopy(fn)

    def reference(*args: Tensor) -> Tensor:
        xs, ps = args[: len(inputs)], args[len(inputs) :]
        if case.reference is not None:
            return flat(seeded(case.reference)(*args))
        if not ps:
            return flat(seeded(original)(*xs, *case.fixed))
        call = torch.func.functional_call
        return flat(seeded(call)(original, dict(zip(parameters, ps, strict=True)), (*xs, *case.fixed)))

    leaves = inputs + list(parameters.values())
    return lambda: seeded(fn)(*inputs, *case.fixed), leaves, reference


def separate(y: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A sum of quadratic functions of each output, and its curvatures, flat."""
    c, b = torch.randn(y.numel()), torch.randn(y.numel())
    return lambda y: (c / 2 * y.square() + b * y).sum(), c


def backward(outputs: Tensor | tuple[Tensor, ...], value: Callable, c: Tensor, *exts) -> None:
    """Backward through `value(outputs)`, whose curvatures with respect to the outputs are c."""
    ys = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    sizes = [y.numel() for y in ys]
    curvatures = [part.view_as(y) for part, y in zip(c.split(sizes), ys, strict=True)]
    loss = value(flat(ys))
    attach_diagonal(outputs, curvatures[0] if isinstance(outputs, Tensor) else curvatures, loss)
    with backpack(*exts):
        loss.backward()


# -- layers with weights ---------------------------------------------------------------------------


def padded(
    x: Tensor, W: Tensor, b: Tensor, widths: tuple[int, ...], mode: str, conv: Callable
) -> Tensor:
    return conv(F.pad(x, widths, mode=mode), W, b)


TOKENS = torch.tensor([[0, 3, 1], [1, 1, 5]])
BAGS = torch.tensor([[0, 3, 4], [3, 2, 5]])
FLAT = torch.tensor([0, 3, 4, 1, 2, 5])
REPEATED = torch.tensor([[0, 3, 3], [1, 2, 2]])


def bags(mode: str, tokens: Tensor, reference: Callable[[Tensor], Tensor]) -> Case:
    return layer(nn.EmbeddingBag, 6, 4, mode=mode, on=(), fixed=(tokens,), reference=reference)


LAYERS = {
    "Linear": layer(nn.Linear, 3, 5, on=(4, 3)),
    "Linear, tokens": layer(nn.Linear, 3, 5, on=(2, 4, 3)),
    "Linear, 4-d, no bias": layer(nn.Linear, 3, 5, bias=False, on=(2, 2, 4, 3)),
    "Linear, one vector": layer(nn.Linear, 3, 5, on=(3,)),
    "Conv1d": layer(nn.Conv1d, 2, 3, 3, on=(2, 2, 7)),
    "Conv1d, without a batch": layer(nn.Conv1d, 2, 3, 3, on=(2, 7)),
    "Conv2d": layer(nn.Conv2d, 2, 3, (2, 3), on=(2, 2, 4, 5)),
    "Conv2d, no bias": layer(nn.Conv2d, 2, 3, 3, padding=1, bias=False, on=(2, 2, 4, 3)),
    "Conv2d, strided": layer(nn.Conv2d, 2, 3, 3, stride=(2, 1), padding=(1, 0), on=(2, 2, 4, 5)),
    "Conv2d, rest of a stride": layer(nn.Conv2d, 2, 3, 2, stride=3, on=(2, 2, 6, 7)),
    "Conv2d, groups": layer(nn.Conv2d, 4, 6, 2, groups=2, dilation=(1, 2), on=(2, 4, 3, 4)),
    "Conv2d, depthwise": layer(nn.Conv2d, 3, 6, 3, groups=3, padding=1, on=(2, 3, 3, 4)),
    "Conv2d, same": layer(nn.Conv2d, 2, 3, (2, 3), padding="same", on=(2, 2, 3, 4)),
    "Conv3d": layer(nn.Conv3d, 2, 3, (2, 1, 2), padding=(0, 1, 0), on=(2, 2, 2, 2, 3)),
    "ConvTranspose1d": layer(nn.ConvTranspose1d, 2, 3, 3, stride=2, on=(2, 2, 4)),
    "ConvTranspose2d": layer(
        nn.ConvTranspose2d,
        4,
        6,
        (2, 3),
        (2, 1),
        padding=1,
        output_padding=(1, 0),
        groups=2,
        on=(2, 4, 3, 4),
    ),
    "ConvTranspose2d, dilated": layer(nn.ConvTranspose2d, 2, 3, 2, dilation=2, on=(2, 2, 3, 2)),
    "ConvTranspose3d": layer(nn.ConvTranspose3d, 2, 3, 2, bias=False, on=(2, 2, 2, 1, 2)),
    "Bilinear": layer(nn.Bilinear, 3, 4, 2, on=((5, 3), (5, 4))),
    "Embedding": layer(nn.Embedding, 6, 4, on=(), fixed=(TOKENS,)),
    "Embedding, padding": layer(nn.Embedding, 6, 4, padding_idx=1, on=(), fixed=(TOKENS,)),
    "EmbeddingBag, sum": bags("sum", BAGS, lambda W: W[BAGS].sum(1)),
    "EmbeddingBag, mean": bags("mean", BAGS, lambda W: W[BAGS].mean(1)),
    "EmbeddingBag, tokens repeated": bags("sum", REPEATED, lambda W: W[REPEATED].sum(1)),
    "EmbeddingBag, mean, tokens repeated": bags("mean", REPEATED, lambda W: W[REPEATED].mean(1)),
    "EmbeddingBag, offsets": function(
        lambda W: F.embedding_bag(FLAT, W, torch.tensor([0, 2]), mode="mean", padding_idx=5),
        (6, 4),
        reference=lambda W: torch.stack([W[[0, 3]].mean(0), W[[4, 1, 2]].mean(0)]),
    ),
}

# -- elementwise -----------------------------------------------------------------------------------

ACTIVATIONS = {
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "GELU": nn.GELU,
    "GELU, tanh": partial(nn.GELU, approximate="tanh"),
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "Softplus": nn.Softplus,
    "Softplus, beta": partial(nn.Softplus, beta=3.0),
    "Softplus, threshold": partial(nn.Softplus, beta=2.0, threshold=0.5),
    "ELU": nn.ELU,
    "ELU, alpha": partial(nn.ELU, alpha=0.6),
    "SELU": nn.SELU,
    "LeakyReLU": partial(nn.LeakyReLU, 0.2),
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "Hardtanh": partial(nn.Hardtanh, -0.5, 0.8),
    "Hardswish": nn.Hardswish,
    "Hardshrink": nn.Hardshrink,
    "Softshrink": nn.Softshrink,
    "Threshold": partial(nn.Threshold, 0.1, 20.0),
    "LogSigmoid": nn.LogSigmoid,
    "Softsign": nn.Softsign,
    "Tanhshrink": nn.Tanhshrink,
    "PReLU": nn.PReLU,
    "RReLU": nn.RReLU,
    "GLU": nn.GLU,
}


def celu(x: Tensor) -> Tensor:
    """As defined: torch's derivative of `F.celu` is that of an alpha rounded to single precision."""
    return x.clamp_min(0) + (0.7 * torch.expm1(x / 0.7)).clamp_max(0)


ELEMENTWISE = {
    **{name: layer(make, on=(3, 4)) for name, make in ACTIVATIONS.items()},
    "Hardsigmoid": layer(nn.Hardsigmoid, on=(3, 4), reference=lambda x: F.relu6(x + 3) / 6),
    "CELU": layer(nn.CELU, 0.7, on=(3, 4), reference=celu),
    "PReLU, channels": layer(nn.PReLU, 3, on=(2, 3, 4)),
    "RReLU, training": layer(nn.RReLU, on=(3, 4), train=True),
    "GLU over channels": layer(nn.GLU, 1, on=(2, 4, 3)),
    "Sigmoid of large inputs": function(lambda x: (30 * x).sigmoid(), (3, 4)),
    "GELU of large inputs": function(lambda x: F.gelu(10 * x), (3, 4)),
    "Softplus of large inputs": function(lambda x: F.softplus(20 * x), (3, 4)),
    "exp": function(torch.exp, (3, 4)),
    "log": function(torch.log, (3, 4), positive=True),
    "log1p": function(torch.log1p, (3, 4), positive=True),
    "sqrt": function(torch.sqrt, (3, 4), positive=True),
    "rsqrt": function(torch.rsqrt, (3, 4), positive=True),
    "reciprocal": function(torch.reciprocal, (3, 4)),
    "square": function(torch.square, (3, 4)),
    "abs": function(torch.abs, (3, 4)),
    "sin": function(torch.sin, (3, 4)),
    "cos": function(torch.cos, (3, 4)),
    "clamp": function(lambda x: x.clamp(-0.5, 0.7), (3, 4)),
    "clamp from below": function(lambda x: x.clamp_min(0.2), (3, 4)),
    "erf": function(torch.erf, (3, 4)),
    "expm1": function(torch.expm1, (3, 4)),
    "pow 2": function(lambda x: x**2, (3, 4)),
    "pow 3": function(lambda x: x.pow(3.0), (3, 4)),
    "pow 1": function(lambda x: x**1, (3, 4)),
    "pow 1.7": function(lambda x: x**1.7, (3, 4), positive=True),
    "pow -1.5": function(lambda x: x**-1.5, (3, 4), positive=True),
    "affine": function(lambda x: 1 - x / 3 + 2 * (-x), (3, 4)),
    "3 / x": function(lambda x: 3 / x, (3, 4)),
    "masked": function(lambda x: x.masked_fill(torch.eye(3, 4) > 0, -1.0), (3, 4)),
    "tril": function(torch.tril, (2, 4, 4)),
}

# -- elementwise, written by hand: one module, however many operations ------------------------------


def gpt2_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


HOME_MADE = {
    "x * sigmoid(x)": function(lambda x: x * x.sigmoid(), (3, 4)),
    "GELU of GPT-2": function(gpt2_gelu, (3, 4)),
    "GELU by erf": function(lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), (3, 4)),
    "quick GELU": function(lambda x: x * torch.sigmoid(1.702 * x), (3, 4)),
    "Mish by hand": function(lambda x: x * F.softplus(x).tanh(), (3, 4)),
    "Hardswish by hand": function(lambda x: x * F.relu6(x + 3) / 6, (3, 4)),
    "squared ReLU": function(lambda x: x.relu() ** 2, (3, 4)),
    "x * x": function(lambda x: x * x, (3, 4)),
    "x * x * x": function(lambda x: x * x * x, (3, 4)),
    "x + tanh(x)": function(lambda x: x + x.tanh(), (3, 4)),
    "x / (1 + abs(x))": function(lambda x: x / (1 + x.abs()), (3, 4)),
    "sin(x) * exp(-x^2)": function(lambda x: x.sin() * (-x.square()).exp(), (3, 4)),
    "Snake": function(lambda x: x + (3 * x).sin() ** 2 / 3, (3, 4)),
    "softplus by hand": function(lambda x: torch.log(1 + x.exp()), (3, 4)),
    "relu(x) * sigmoid(x) + tanh(x)": function(
        lambda x: x.relu() * x.sigmoid() + 0.3 * x.tanh(), (3, 4)
    ),
    "of something else": function(lambda x, W: _swish(F.linear(x, W)), (2, 3, 4), (5, 4)),
    "of one number": function(lambda x: x * x.sin() + 1, ()),
    "twice over": function(lambda x: _swish(_swish(x)), (3, 4)),
    "in two outputs": function(lambda x: (x.sigmoid(), x * x.sigmoid()), (3, 4)),
    "larger of two": function(lambda x: torch.maximum(0.2 * x, x * x), (3, 4)),
    "straight through": function(lambda x: x.tanh() + (x.round() - x.tanh()).detach(), (3, 4)),
    "two branches": function(lambda x: torch.where(x > 0, x * x, x.expm1()), (3, 4)),
}

# -- in place --------------------------------------------------------------------------------------

IN_PLACE = {
    "relu_": function(lambda x, W, b: F.linear(x, W, b).relu_(), (4, 3), (5, 3), (5,)),
    "relu_, tokens": function(lambda x, W, b: F.linear(x, W, b).relu_(), (2, 4, 3), (5, 3), (5,)),
    "tanh_": function(lambda x, W, b: F.linear(x, W, b).tanh_(), (4, 3), (5, 3), (5,)),
    "tanh_, tokens": function(lambda x, W, b: F.linear(x, W, b).tanh_(), (2, 4, 3), (5, 3), (5,)),
    "sigmoid_": function(lambda x, W: F.linear(x, W).sigmoid_(), (4, 3), (5, 3)),
    "sigmoid_, tokens": function(lambda x, W: F.linear(x, W).sigmoid_(), (2, 4, 3), (5, 3)),
    "silu, in place": function(lambda x, W: F.silu(F.linear(x, W), inplace=True), (2, 4, 3), (5, 3)),
    "relu6, in place": function(lambda x: F.relu6(2 * x, inplace=True), (3, 4)),
    "hardtanh, in place": function(lambda x: F.hardtanh(2 * x, inplace=True), (3, 4)),
    "elu, in place": function(lambda x: F.elu(2 * x, 0.6, inplace=True), (3, 4)),
    "selu, in place": function(lambda x: F.selu(2 * x, inplace=True), (3, 4)),
    "celu, in place": function(lambda x: F.celu(x + 0, 0.7, True), (3, 4), reference=celu),
    "leaky_relu, in place": function(lambda x: F.leaky_relu(2 * x, 0.2, inplace=True), (3, 4)),
    "mish, in place": function(lambda x: F.mish(2 * x, inplace=True), (3, 4)),
    "hardswish, in place": function(lambda x: F.hardswish(2 * x, inplace=True), (3, 4)),
    "threshold, in place": function(lambda x: F.threshold(2 * x, 0.1, 20, inplace=True), (3, 4)),
    "dropout, in place": function(lambda x: F.dropout(2 * x, 0.4, inplace=True), (3, 4)),
    "clamp_": function(lambda x: (2 * x).clamp_(-0.5, 0.7), (3, 4)),
    "pow_": function(lambda x: (2 * x).pow_(3), (3, 4)),
    "sqrt_": function(lambda x: (2 * x).sqrt_(), (3, 4), positive=True),
    "div_": function(lambda a, b: (2 * a).div_(b), (3, 4), (3, 4)),
    "assigned rows": function(lambda a, b: _assigned(2 * a, b), (3, 4), (2, 4)),
    "exp_": function(lambda x: (2 * x).exp_(), (3, 4)),
    "mul_": function(lambda a, b: (2 * a).mul_(b), (3, 4), (3, 4)),
    "add_": function(lambda a, b: (2 * a).add_(b), (3, 4), (3, 4)),
    "a view in place": function(lambda x: _view_in_place(2 * x), (3, 4)),
    "a part in place": function(lambda x: _part_in_place(2 * x), (3, 4)),
}


def _view_in_place(z: Tensor) -> Tensor:
    z.view(2, 6).tanh_()
    return z


def _part_in_place(z: Tensor) -> Tensor:
    z[:, 1:3].tanh_()
    return z


def _assigned(z: Tensor, rows: Tensor) -> Tensor:
    z[1:] = rows
    return z


# -- pooling ---------------------------------------------------------------------------------------

POOLING = {
    "MaxPool1d": layer(nn.MaxPool1d, 2, on=(2, 3, 7)),
    "MaxPool2d": layer(nn.MaxPool2d, 2, on=(2, 2, 4, 5)),
    "MaxPool2d, overlapping": layer(nn.MaxPool2d, 3, stride=1, padding=1, on=(2, 2, 4, 5)),
    "MaxPool2d, dilated": layer(nn.MaxPool2d, 2, 1, dilation=(2, 1), ceil_mode=True, on=(2, 2, 4, 5)),
    "MaxPool3d": layer(nn.MaxPool3d, 2, stride=1, on=(2, 2, 3, 2, 3)),
    "AdaptiveMaxPool1d": layer(nn.AdaptiveMaxPool1d, 3, on=(2, 2, 7)),
    "AdaptiveMaxPool2d": layer(nn.AdaptiveMaxPool2d, (2, 3), on=(2, 2, 3, 4)),
    "AdaptiveMaxPool3d": layer(nn.AdaptiveMaxPool3d, 2, on=(2, 2, 3, 2, 3)),
    "AvgPool1d": layer(nn.AvgPool1d, 3, 2, padding=1, on=(2, 2, 6)),
    "AvgPool2d": layer(nn.AvgPool2d, 2, on=(2, 2, 4, 5)),
    "AvgPool2d, overlapping": layer(nn.AvgPool2d, 3, stride=1, padding=1, on=(2, 2, 4, 5)),
    "AvgPool2d, without the padding": layer(
        nn.AvgPool2d, (3, 2), 2, padding=(1, 0), count_include_pad=False, on=(2, 2, 4, 5)
    ),
    "AvgPool2d, ceil": layer(nn.AvgPool2d, 3, 2, ceil_mode=True, on=(2, 2, 4, 6)),
    "AvgPool2d, ceil, without the padding": layer(
        nn.AvgPool2d, 3, 2, padding=1, ceil_mode=True, count_include_pad=False, on=(2, 2, 4, 5)
    ),
    "AvgPool2d, divisor": layer(nn.AvgPool2d, 2, 1, divisor_override=3, on=(2, 2, 3, 4)),
    "AvgPool3d": layer(nn.AvgPool3d, 2, 1, padding=(1, 0, 1), on=(2, 2, 2, 3, 2)),
    "AvgPool3d, divisor": layer(nn.AvgPool3d, (1, 2, 2), divisor_override=5, on=(2, 2, 2, 3, 4)),
    "AdaptiveAvgPool1d": layer(nn.AdaptiveAvgPool1d, 3, on=(2, 2, 7)),
    "AdaptiveAvgPool2d": layer(nn.AdaptiveAvgPool2d, (2, 3), on=(2, 2, 3, 4)),
    "AdaptiveAvgPool2d, global": layer(nn.AdaptiveAvgPool2d, 1, on=(2, 3, 3, 4)),
    "AdaptiveAvgPool2d, more than there is": layer(nn.AdaptiveAvgPool2d, (5, 2), on=(2, 2, 3, 4)),
    "AdaptiveAvgPool3d": layer(nn.AdaptiveAvgPool3d, (2, 1, 2), on=(2, 2, 3, 2, 3)),
}

# -- normalisation ---------------------------------------------------------------------------------


def llama_norm(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1))


def trained_batch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True)


NORMALISATION = {
    "normalize": function(F.normalize, (3, 4)),
    "normalize, axis": function(lambda x: F.normalize(x, dim=0), (3, 2, 4)),
    "normalize, small and large": function(lambda x: F.normalize(x, dim=-1, eps=2.0), (2, 4, 4)),
    "x / norm(x)": function(lambda x: x / x.norm(dim=(0, 2), keepdim=True), (3, 2, 4)),
    "LayerNorm": layer(nn.LayerNorm, 5, on=(3, 5)),
    "LayerNorm, tokens": layer(nn.LayerNorm, 5, eps=0.1, on=(2, 3, 5)),
    "LayerNorm over two axes": layer(nn.LayerNorm, (2, 3), on=(4, 2, 3)),
    "LayerNorm, no bias": layer(nn.LayerNorm, 5, bias=False, on=(3, 5)),
    "LayerNorm, plain": layer(nn.LayerNorm, 5, elementwise_affine=False, on=(3, 5)),
    "GroupNorm": layer(nn.GroupNorm, 2, 4, on=(2, 4, 2, 3)),
    "GroupNorm of vectors": layer(nn.GroupNorm, 2, 6, eps=0.1, on=(3, 6)),
    "GroupNorm, plain": layer(nn.GroupNorm, 3, 3, affine=False, on=(2, 3, 4)),
    "InstanceNorm1d": layer(nn.InstanceNorm1d, 3, affine=True, on=(2, 3, 4)),
    "InstanceNorm2d": layer(nn.InstanceNorm2d, 2, on=(2, 2, 3, 2)),
    "InstanceNorm3d": layer(nn.InstanceNorm3d, 2, affine=True, eps=0.1, on=(2, 2, 2, 2, 2)),
    "InstanceNorm2d, running": layer(
        nn.InstanceNorm2d, 2, affine=True, track_running_stats=True, on=(2, 2, 3, 2)
    ),
    "RMSNorm": layer(nn.RMSNorm, 5, on=(3, 5)),
    "RMSNorm, tokens": layer(nn.RMSNorm, 5, eps=0.1, on=(2, 3, 5)),
    "RMSNorm over two axes": layer(nn.RMSNorm, (2, 3), on=(4, 2, 3)),
    "RMSNorm, plain": layer(nn.RMSNorm, 5, elementwise_affine=False, on=(3, 5)),
    "rms_norm": function(lambda x, w: F.rms_norm(x, (5,), w, 0.1), (3, 5), (5,)),
    "RMSNorm of Llama": function(llama_norm, (2, 3, 5), (5,)),
    "RMSNorm of Llama, hidden": function(lambda x, w: llama_norm(2 * x, w), (2, 3, 5), (5,)),
    "RMSNorm of x * x": function(
        lambda x: x * torch.rsqrt((x * x).mean((1, 2), keepdim=True) + 0.1), (2, 3, 5)
    ),
    "RMSNorm, divided": function(
        lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 0.1), (2, 3, 5)
    ),
    "BatchNorm1d": layer(nn.BatchNorm1d, 3, on=(4, 3)),
    "BatchNorm1d, tokens": layer(nn.BatchNorm1d, 3, affine=False, on=(4, 3, 2)),
    "BatchNorm2d": layer(nn.BatchNorm2d, 3, eps=0.1, on=(2, 3, 3, 2)),
    "BatchNorm3d": layer(nn.BatchNorm3d, 2, on=(2, 2, 2, 1, 3)),
    "BatchNorm1d, training": layer(nn.BatchNorm1d, 3, on=(4, 3), train=True, reference=trained_batch),
    "BatchNorm2d, training": layer(
        nn.BatchNorm2d, 3, on=(2, 3, 2, 2), train=True, reference=trained_batch
    ),
}

# -- softmax, and what draws random numbers --------------------------------------------------------


def _two_values(S: Tensor, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    A = S.softmax(-1)
    return A @ V, A @ W


def _values_and_softmax(S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    A = S.softmax(-1)
    return A, A @ V


SOFTMAX = {
    "Softmax": layer(nn.Softmax, -1, on=(3, 4)),
    "Softmax over channels": layer(nn.Softmax, 1, on=(2, 3, 4)),
    "Softmax2d": layer(nn.Softmax2d, on=(2, 3, 2, 2)),
    "Softmin": layer(nn.Softmin, 1, on=(2, 3, 4)),
    "LogSoftmax": layer(nn.LogSoftmax, 1, on=(3, 4)),
    "softmax and values": function(lambda S, V: S.softmax(-1) @ V, (2, 3, 4), (2, 4, 5)),
    "softmax and two values": function(_two_values, (2, 3, 4), (2, 4, 5), (2, 4, 2)),
    "softmax and values, and itself": function(_values_and_softmax, (2, 3, 4), (2, 4, 5)),
    "bias of the scores": function(
        lambda S, B, V: (S + B).softmax(-1) @ V, (2, 3, 4), (3, 4), (2, 4, 5)
    ),
    "LogSoftmax over channels": layer(nn.LogSoftmax, 1, on=(2, 3, 4)),
}
RANDOM = {
    "Dropout": layer(nn.Dropout, 0.4, on=(4, 5), train=True),
    "Dropout, evaluation": layer(nn.Dropout, 0.4, on=(4, 5)),
    "Dropout, fused": function(lambda x: torch.native_dropout(x, 0.4, True)[0], (4, 5)),
    "softmax, dropout and values": function(
        lambda S, V: torch.native_dropout(S.softmax(-1), 0.4, True)[0] @ V, (2, 3, 4), (2, 4, 5)
    ),
    "Dropout2d": layer(nn.Dropout2d, 0.4, on=(3, 4, 2, 2), train=True),
    "AlphaDropout": layer(nn.AlphaDropout, 0.4, on=(4, 5), train=True),
}

# -- where entries go ------------------------------------------------------------------------------

NUMBERS = torch.linspace(-1, 1, 20, dtype=torch.float64).sin().view(4, 5)
DROPPED = (torch.arange(12).view(4, 3) % 3 > 0) * 1.5
ROWS = torch.tensor([[0, 2, 2, 1], [1, 1, 0, 2]])
PICKED = torch.tensor([2, 0, 0])

SHAPES = {
    "Flatten": layer(nn.Flatten, on=(2, 3, 2)),
    "Unflatten": layer(nn.Unflatten, 1, (2, 3), on=(4, 6)),
    "Identity": layer(nn.Identity, on=(2, 3)),
    "ZeroPad2d": layer(nn.ZeroPad2d, (1, 2, 0, 1), on=(2, 2, 3, 2)),
    "ConstantPad1d": layer(nn.ConstantPad1d, 2, 1.5, on=(2, 2, 3)),
    "ReflectionPad1d": layer(nn.ReflectionPad1d, 2, on=(2, 2, 4)),
    "ReflectionPad2d": layer(nn.ReflectionPad2d, 1, on=(2, 2, 3, 2)),
    "ReplicationPad2d": layer(nn.ReplicationPad2d, (2, 1, 1, 0), on=(2, 2, 3, 2)),
    "CircularPad2d": layer(nn.CircularPad2d, (1, 2, 1, 0), on=(2, 2, 3, 2)),
    "cropping": function(lambda x: F.pad(x, (-1, 2)), (3, 4)),
    "PixelShuffle": layer(nn.PixelShuffle, 2, on=(2, 4, 2, 3)),
    "PixelUnshuffle": layer(nn.PixelUnshuffle, 2, on=(2, 2, 2, 4)),
    "ChannelShuffle": layer(nn.ChannelShuffle, 2, on=(2, 4, 2, 1)),
    "Upsample 1d": layer(nn.Upsample, scale_factor=2, on=(2, 2, 3)),
    "Upsample 2d": layer(nn.Upsample, size=(4, 7), on=(2, 2, 2, 3)),
    "Upsample 3d": layer(nn.Upsample, scale_factor=2, on=(2, 1, 2, 1, 2)),
    "Unfold": layer(nn.Unfold, 2, padding=1, on=(2, 2, 2, 3)),
    "permute": function(lambda x: x.permute(1, 2, 0), (2, 3, 4)),
    "transpose": function(lambda x: x.transpose(1, 2).contiguous().view(2, -1), (2, 3, 4)),
    "reshape": function(lambda x: x.transpose(0, 1).reshape(4, -1), (2, 3, 4)),
    "squeeze": function(lambda x: x.unsqueeze(1).squeeze(2), (2, 1, 3)),
    "slice": function(lambda x: x[1:, ::2], (3, 4)),
    "select": function(lambda x: x[:, -1], (3, 4, 2)),
    "index": function(lambda x: x[:, PICKED], (3, 4)),
    "index, pairs": function(lambda x: x[torch.arange(3), PICKED], (3, 4)),
    "boolean mask": function(lambda x: x[torch.eye(3, 4) > 0], (3, 4)),
    "index_add": function(lambda x, y: x.index_add(0, PICKED, y), (3, 4), (3, 4)),
    "index_add, alpha": function(lambda x, y: x.index_add(0, PICKED, y, alpha=-3), (3, 4), (3, 4)),
    "index_put": function(lambda x, y: x.index_put((PICKED[:2],), y), (3, 4), (2, 4)),
    "scatter": function(lambda x, y: x.scatter(1, ROWS[:, :2], y), (2, 3), (2, 2)),
    "scatter_add": function(lambda x, y: x.scatter_add(1, ROWS, y), (2, 3), (2, 4)),
    "masked_scatter": function(lambda x, y: x.masked_scatter(torch.eye(3, 4) > 0, y), (3, 4), (3,)),
    "fold": function(lambda x: F.fold(x, (3, 3), 2), (2, 4, 4)),
    "median": function(lambda x: x.median(1).values, (3, 5)),
    "norm": function(lambda x: x.norm(dim=-1), (3, 4)),
    "norm over two axes": function(lambda x: x.norm(dim=(0, 2), keepdim=True), (2, 3, 4)),
    "index_select": function(lambda x: x.index_select(0, PICKED), (3, 4)),
    "gather": function(lambda x: x.gather(1, ROWS), (2, 3)),
    "take_along_dim": function(lambda x: x.take_along_dim(ROWS, 1), (2, 3)),
    "cat": function(lambda x, y: torch.cat([x, y], 1), (2, 3), (2, 4)),
    "cat of twice the same": function(lambda x: torch.cat([x, x], 1), (2, 3)),
    "stack": function(lambda x, y: torch.stack([x, y, x], 1), (2, 3), (2, 3)),
    "split": function(lambda x: x.split([1, 3], 1), (3, 4)),
    "chunk": function(lambda x: x.chunk(2, -1), (3, 4)),
    "unbind": function(lambda x: x.unbind(1), (3, 2, 2)),
    "expand": function(lambda x: x.expand(2, 3, 4), (3, 1)),
    "repeat": function(lambda x: x.repeat(2, 3), (3, 2)),
    "repeat_interleave": function(lambda x: x.repeat_interleave(2, 1), (3, 2)),
    "flip": function(lambda x: x.flip(1), (3, 4)),
    "roll": function(lambda x: x.roll(1, 1), (3, 4)),
    "sliding windows": function(lambda x: x.unfold(1, 3, 1), (2, 5)),
    "diagonal": function(lambda x: x.diagonal(dim1=1, dim2=2), (2, 3, 3)),
    "sum": function(lambda x: x.sum(1), (3, 4)),
    "sum, all": function(lambda x: x.sum(), (3, 4)),
    "mean": function(lambda x: x.mean((1, 2), keepdim=True), (2, 3, 4)),
    "mean, all": function(lambda x: x.mean(), (3, 4)),
    "learned exponent": function(torch.pow, (4, 3), (1,), positive=True),
    "learned exponents": function(lambda x, p: (2 * x) ** p, (4, 3), (3,), positive=True),
    "atan2, broadcast": function(torch.atan2, (4, 3), (3,), positive=True),
    "logaddexp, broadcast": function(torch.logaddexp, (4, 1), (2, 1, 3)),
    "addcdiv, broadcast": function(torch.addcdiv, (4, 3), (3,), (3,), positive=True),
    "SiLU by hand of a transposed square": function(
        lambda W: (lambda t: t * t.sigmoid())(W.t()), (3, 3)
    ),
    "SiLU by hand of a transpose": function(lambda W: W.t() * W.t().sigmoid(), (3, 4)),
    "AdaptiveAvgPool3d, one map": layer(nn.AdaptiveAvgPool3d, 3, on=(2, 5, 4, 7)),
    "AvgPool3d, one map": layer(nn.AvgPool3d, 2, padding=1, on=(2, 5, 4, 7)),
    "MaxPool3d, one map": layer(nn.MaxPool3d, 2, on=(2, 5, 4, 7)),
    "softmax @ numbers": function(lambda S: S.softmax(-1) @ NUMBERS, (3, 4)),
    "softmax @ numbers, batched": function(
        lambda S: S.transpose(1, 2).softmax(-1).flatten(0, 1) @ NUMBERS, (2, 4, 3)
    ),
    "numbers @ dropped softmax": function(
        lambda S: NUMBERS.T @ ((S.softmax(0) * DROPPED).T.reshape(3, 4)).mT, (4, 3)
    ),
    "cumsum": function(lambda x: x.cumsum(1), (3, 4)),
    "amax": function(lambda x: x.amax(1), (3, 4)),
    "amax over two axes": function(lambda x: x.amax((1, 2)), (2, 3, 4)),
    "max": function(lambda x: x.max(1).values, (3, 4)),
    "min": function(lambda x: x.min(1, keepdim=True).values, (3, 4)),
    "topk": function(lambda x: x.topk(2, 1).values, (3, 4)),
    "sort": function(lambda x: x.sort(1).values, (3, 4)),
    "var": function(lambda x: x.var(1), (3, 4)),
    "var of all, biased": function(lambda x: x.var(correction=0), (3, 4)),
    "std": function(lambda x: x.std((0, 2), keepdim=True), (2, 3, 4)),
    "var and mean": function(lambda x: torch.cat(torch.var_mean(x, 1)), (3, 4)),
    "std and mean": function(lambda x: torch.cat(torch.std_mean(x, 1)), (3, 4)),
    "norm of all": function(lambda x: x.norm(), (3, 4)),
    "3-norm": function(lambda x: torch.linalg.vector_norm(x, 3, 1), (3, 4)),
    "1-norm": function(lambda x: torch.linalg.vector_norm(x, 1, 1), (3, 4)),
    "largest entry": function(lambda x: torch.linalg.vector_norm(x, math.inf, 1), (3, 4)),
    "prod": function(lambda x: x.prod(1), (3, 4)),
    "index_add, scaled": function(
        lambda a, b: a.index_add(0, torch.tensor([1, 1]), b, alpha=3), (3, 2), (2, 2)
    ),
    "addmv": function(lambda c, A, x: torch.addmv(c, A, x, alpha=2, beta=3), (3,), (3, 4), (4,)),
    "interpolation, linear": layer(nn.Upsample, None, 1.5, "linear", on=(2, 3, 5)),
    "interpolation, bilinear": layer(nn.Upsample, (5, 7), None, "bilinear", True, on=(2, 3, 4, 3)),
    "interpolation, bicubic": layer(nn.Upsample, None, 2, "bicubic", on=(2, 2, 4, 3)),
    "interpolation, trilinear": layer(nn.Upsample, None, 2, "trilinear", on=(1, 2, 2, 3, 2)),
    "logsumexp": function(lambda x: x.logsumexp(1), (3, 4)),
    "logsumexp over two axes": function(lambda x: x.logsumexp((0, 2), keepdim=True), (2, 3, 4)),
}

# -- several arguments, each exact for itself ------------------------------------------------------


def two_matrices(expression: str, *shapes: tuple[int, ...]) -> Case:
    return function(lambda a, b: torch.einsum(expression, a, b), *shapes)


PRODUCTS = {
    "a + b": function(torch.add, (3, 4), (3, 4)),
    "a + b, broadcast": function(lambda a, b: torch.add(a, b, alpha=-2), (3, 4), (4,)),
    "a - b": function(torch.sub, (3, 1), (2, 3, 4)),
    "a * b": function(torch.mul, (3, 4), (3, 4)),
    "a * b, broadcast": function(torch.mul, (2, 3, 4), (3, 1)),
    "a * scalar": function(torch.mul, (3, 4), ()),
    "a / b": function(torch.div, (3, 4), (3, 4)),
    "a / b, broadcast": function(torch.div, (4,), (3, 4)),
    "scalar / b": function(torch.div, (), (3, 4)),
    "maximum": function(torch.maximum, (3, 4), (3, 4)),
    "minimum": function(torch.minimum, (3, 4), (4,)),
    "where": function(lambda a, b: torch.where(torch.eye(3, 4) > 0, a, b), (3, 4), (3, 4)),
    "where, broadcast": function(lambda a, b: torch.where(torch.eye(3, 4) > 0, a, b), (4,), ()),
    "logaddexp": function(torch.logaddexp, (3, 4), (3, 4)),
    "a ** b": function(torch.pow, (3, 4), (3, 4), positive=True),
    "2 ** b": function(lambda b: 2**b, (3, 4)),
    "hypot": function(torch.hypot, (3, 4), (3, 4)),
    "addcmul": function(partial(torch.addcmul, value=0.5), (3, 4), (3, 4), (4,)),
    "addcdiv": function(partial(torch.addcdiv, value=0.5), (3, 4), (3, 4), (3, 4)),
    "lerp": function(torch.lerp, (3, 4), (3, 4), (3, 4)),
    "lerp, fixed": function(lambda a, b: torch.lerp(a, b, 0.3), (3, 4), (3, 4)),
    "gated": function(lambda a, b: a.tanh() * b.sigmoid(), (3, 4), (3, 4)),
    "matrix @ matrix": function(torch.matmul, (3, 4), (4, 2)),
    "matrix @ vector": function(torch.matmul, (3, 4), (4,)),
    "vector @ matrix": function(torch.matmul, (3,), (3, 4)),
    "vector @ vector": function(torch.matmul, (3,), (3,)),
    "matmul, batched": function(torch.matmul, (2, 3, 4), (2, 4, 5)),
    "matmul, broadcast": function(torch.matmul, (2, 3, 2, 4), (4, 3)),
    "matmul, broadcast batches": function(torch.matmul, (2, 1, 2, 4), (3, 4, 3)),
    "bmm": function(torch.bmm, (2, 3, 4), (2, 4, 5)),
    "mm, transposed": function(lambda a, b: a.T @ b.T, (3, 4), (2, 3)),
    "mm, transposed parameters": function(lambda a, b: a.t() @ b.t(), (3, 4), (2, 3)),
    "mm, square, transposed parameters": function(lambda a, b: a.t() @ b.t(), (3, 3), (3, 3)),
    "addmm": function(lambda c, a, b: torch.addmm(c, a, b, beta=2, alpha=-3), (2,), (3, 4), (4, 2)),
    "baddbmm": function(torch.baddbmm, (2, 3, 5), (2, 3, 4), (2, 4, 5)),
    "outer": function(torch.outer, (3,), (4,)),
    "kron": function(torch.kron, (2, 2), (2, 3)),
    "tensordot": function(lambda a, b: torch.tensordot(a, b, 2), (2, 3, 4), (3, 4, 5)),
    "einsum, heads": two_matrices("nihd,njhd->nhij", (2, 3, 2, 4), (2, 5, 2, 4)),
    "einsum, batched": two_matrices("nij,njk->nki", (2, 3, 4), (2, 4, 2)),
    "einsum, outer": two_matrices("ni,nj->nij", (2, 3), (2, 4)),
    "einsum, inner": two_matrices("nd,nd->n", (2, 3), (2, 3)),
    "einsum, shared": two_matrices("nid,de->nie", (2, 3, 4), (4, 5)),
}

# -- reductions, interpolation ----------------------------------------------------------------------


def with_zeros(x: Tensor) -> Tensor:
    """Its first row and some more entries."""
    return x.masked_fill((torch.arange(4) == torch.arange(-1, 2)[:, None]) + EDGE[:, None], 0.0)


EDGE = torch.tensor([True, False, False])
NORM_ORDERS = (2, 1, 3, 1.5, 4, 0.5, math.inf, -math.inf)
REDUCING = {
    **{
        f"{p}-norm": function(lambda x, p=p: torch.linalg.vector_norm(x, p, -1), (2, 3, 4))
        for p in NORM_ORDERS
    },
    "3-norm, axes": function(lambda x: torch.linalg.vector_norm(x, 3, (0, -1), True), (2, 3, 4)),
    "norm": function(torch.norm, (3, 4)),
    "norm, as aten has it": function(lambda x: torch.ops.aten.norm.Scalar(x, 3), (3, 4)),
    # torch's second derivative of the fused operation takes the norms for constants
    **{
        f"weight_norm, axis {dim}": function(
            lambda v, g, dim=dim: torch._weight_norm(v, g, dim),
            *((3, 2, 4), g),
            reference=lambda v, g, axes=axes: g * v / v.square().sum(axes, keepdim=True).sqrt(),
        )
        for dim, g, axes in ((0, (3, 1, 1), (1, 2)), (2, (1, 1, 4), (0, 1)))
    },
    "vdot": function(torch.vdot, (4,), (4,)),
    "diag": function(torch.diag, (3, 4)),
    "pairwise distance": function(F.pairwise_distance, (3, 4), (3, 4)),
    "var": function(lambda x: x.var(1), (3, 4)),
    "var, axes": function(lambda x: x.var((0, -1), correction=0, keepdim=True), (2, 3, 4)),
    "std": function(lambda x: x.std(-1), (3, 4)),
    "std, all": function(torch.std, (3, 4)),
    "var_mean": function(lambda x: torch.var_mean(x, (0, 2)), (2, 3, 4)),
    "var_mean, mean": function(lambda x: torch.var_mean(x, 1)[1], (3, 4)),
    "std_mean": function(lambda x: torch.std_mean(x, 1, correction=0), (3, 4)),
    "std_mean, mean": function(lambda x: torch.std_mean(x, 1)[1].sin(), (3, 4)),
    "std_mean, std": function(lambda x: torch.std_mean(x, 1)[0], (3, 4)),
    "prod": function(torch.prod, (3, 2)),
    "prod, axis": function(lambda x: x.prod(1), (3, 4)),
    "det": function(torch.linalg.det, (2, 3, 3)),
    "aminmax": function(lambda x: tuple(x.aminmax(dim=1)), (3, 4)),
    "mode": function(lambda x: x.mode(1)[0], (3, 4)),
    "cummax": function(lambda x: x.cummax(1)[0], (3, 4)),
    **{
        f"scatter_reduce, {how}": function(
            lambda x, y, how=how: x.scatter_reduce(0, PICKED[:, None].expand(3, 4), y, how),
            *((3, 4), (3, 4)),
        )
        for how in ("sum", "mean", "prod", "amax")
    },
    "index_reduce": function(lambda x, y: x.index_reduce(0, PICKED, y, "mean"), (3, 4), (3, 4)),
}
UPSAMPLING = {
    "nearest, exact": function(partial(F.interpolate, size=(5, 7), mode="nearest-exact"), (2, 1, 3, 4)),
    "linear": function(partial(F.interpolate, scale_factor=1.7, mode="linear"), (2, 2, 4)),
    "bilinear": function(partial(F.interpolate, scale_factor=2, mode="bilinear"), (2, 1, 3, 4)),
    "bilinear, down": function(partial(F.interpolate, size=(2, 5), mode="bilinear"), (1, 2, 3, 4)),
    "bilinear, scaled": function(
        partial(F.interpolate, scale_factor=(0.7, 1.3), mode="bilinear"), (1, 1, 5, 4)
    ),
    "bilinear, corners": function(
        partial(F.interpolate, size=(4, 7), mode="bilinear", align_corners=True), (1, 2, 3, 4)
    ),
    "bicubic": function(partial(F.interpolate, size=(5, 7), mode="bicubic"), (1, 2, 3, 4)),
    "bicubic, corners": function(
        partial(F.interpolate, scale_factor=2, mode="bicubic", align_corners=True), (1, 1, 3, 4)
    ),
    "trilinear": function(partial(F.interpolate, scale_factor=2, mode="trilinear"), (1, 1, 2, 3, 2)),
}

RULES = {
    **LAYERS,
    **REDUCING,
    **UPSAMPLING,
    **ELEMENTWISE,
    **HOME_MADE,
    **IN_PLACE,
    **POOLING,
    **NORMALISATION,
    **SOFTMAX,
    **RANDOM,
    **SHAPES,
    **PRODUCTS,
}


@pytest.mark.parametrize("name", RULES)
def test_one_module(name: str):
    fn, leaves, reference = build(RULES[name])
    names = [f"leaf {k}" for k in range(len(leaves))]
    at = {key: leaf.detach() for key, leaf in zip(names, leaves, strict=True)}
    outputs = fn()
    value, c = separate(flat(outputs))
    exact = exact_diagonal(lambda *args: value(reference(*args)), leaves)
    graph = Graph()
    loss = Module("loss", value, (graph(reference, *names),))
    ggn = recursion(graph.modules, at, loss, gauss_newton=True)
    backward(outputs, value, c, HesScale(), HesScale(gauss_newton=True))
    for key, leaf, expected in zip(names, leaves, exact, strict=True):
        assert leaf.hesscale.shape == leaf.hesscale_gn.shape == leaf.shape
        close(leaf.hesscale, expected, 1e-12)
        close(leaf.hesscale_gn, ggn[key], 1e-12)


@pytest.mark.parametrize("reduce", ["std", "2-norm", "3-norm", "1-norm"])
def test_where_a_norm_has_no_derivative(reduce: str):
    """Autograd says zero there, and so do we, of both derivatives."""
    x = nn.Parameter(with_zeros(torch.randn(3, 4)))
    y = x.std(1) if reduce == "std" else torch.linalg.vector_norm(x, float(reduce[0]), 1)
    value, c = separate(y)
    backward(y, value, c, HesScale())
    assert x.hesscale.isfinite().all() and not x.grad[0].any() and not x.hesscale[0].any()
    assert x.hesscale[1:].count_nonzero() > 5


# -- convolutions with other padding: two modules, exact in the parameters -------------------------

PADDED = {
    "Conv1d, circular": (partial(nn.Conv1d, 2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 4)),
    "Conv2d, reflect": (partial(nn.Conv2d, 2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 3, 4)),
    "Conv2d, replicate": (
        partial(nn.Conv2d, 2, 4, (3, 2), padding=(1, 2), padding_mode="replicate", groups=2),
        (2, 2, 3, 3),
    ),
    "Conv3d, circular": (
        partial(nn.Conv3d, 1, 2, 2, padding=1, padding_mode="circular", bias=False),
        (2, 1, 2, 2, 3),
    ),
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_convolution(name: str):
    make, shape = PADDED[name]
    conv, x = make(), nn.Parameter(torch.randn(shape))
    y = conv(x)
    value, c = separate(y.flatten())
    exact = exact_diagonal(
        lambda *args: value(as_function(conv)(*args).flatten()), [x, *conv.parameters()]
    )
    # the padding, and the convolution of what is padded
    widths, mode = conv._reversed_padding_repeated_twice, conv.padding_mode
    bare = deepcopy(conv)
    bare.padding_mode, bare.padding = "zeros", (0,) * (x.dim() - 2)
    graph = Graph()
    padded = graph(lambda x: F.pad(x, widths, mode=mode), "x")
    output = graph(as_function(bare), padded, *(key for key, _ in conv.named_parameters()))
    loss = Module("loss", lambda y: value(y.flatten()), (output,))
    expected = recursion(graph.modules, {"x": x, **dict(conv.named_parameters())}, loss)
    backward(y, value, c, HesScale())
    close(x.hesscale, expected["x"], 1e-12)
    for p, diagonal in zip(conv.parameters(), exact[1:], strict=True):
        close(p.hesscale, diagonal, 1e-12)


# -- attention: two modules, the scores and what softmax and values make of them -------------------


@dataclass(frozen=True)
class Attention:
    """A way to write attention, and what it computes.

    Attributes:
        attend: Maps `Q [N, heads, queries, D]`, `K [N, heads, keys, D]` and `V [N, heads, keys, d]`
            to `[N, heads, queries, d]`.
        mask: What is added to the scores, or where they count.
        scale: Of the scores.
        kept: What the probabilities are multiplied with.
        heads: Heads of Q.
        key_heads: Heads of K and V, each for several heads of Q.
        values: Size d of the values.
        tolerance: Of the comparison.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    mask: Tensor | None = None
    scale: float = 5**-0.5
    kept: Tensor | float = 1.0
    heads: int = 2
    key_heads: int = 2
    values: int = 5
    tolerance: float = 1e-10

    def scores(self, Q: Tensor, K: Tensor) -> Tensor:
        K = K.repeat_interleave(Q.shape[1] // K.shape[1], 1)
        S = self.scale * Q @ K.mT
        if self.mask is None:
            return S
        boolean = self.mask.dtype == torch.bool
        return S.masked_fill(~self.mask, -math.inf) if boolean else S + self.mask

    def read(self, S: Tensor, V: Tensor) -> Tensor:
        return (S.softmax(-1) * self.kept) @ V.repeat_interleave(S.shape[1] // V.shape[1], 1)


N, HEADS, QUERIES, KEYS, D = 2, 2, 3, 4, 5
CAUSAL = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
SOME = torch.ones(N, 1, QUERIES, KEYS, dtype=torch.bool).tril(1)
BIAS = torch.linspace(-2, 2, QUERIES * KEYS, dtype=torch.float64).view(QUERIES, KEYS)
KEPT = (torch.arange(N * HEADS * QUERIES * KEYS) % 3 > 0).view(N, HEADS, QUERIES, KEYS) / 0.75
SDPA = F.scaled_dot_product_attention


def math_kernel(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return SDPA(Q, K, V, is_causal=True)


def by_einsum(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    S = torch.einsum("nhid,nhjd->nhij", Q, K) / math.sqrt(D)
    return torch.einsum("nhij,nhjd->nhid", S.softmax(-1), V)


def by_baddbmm(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    bias = BIAS.expand(N * HEADS, QUERIES, KEYS)
    S = torch.baddbmm(bias, Q.flatten(0, 1), K.flatten(0, 1).mT, alpha=D**-0.5)
    return torch.bmm(F.softmax(S, -1), V.flatten(0, 1)).unflatten(0, (N, HEADS))


def transposed(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    A = ((K * D**-0.5) @ Q.mT).softmax(-2)
    return (V.mT @ A).mT


def as_transformers_do(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    S = torch.matmul(Q, K.transpose(2, 3)) * D**-0.5 + torch.where(SOME, 0.0, -1e38)
    A = F.dropout(F.softmax(S, dim=-1, dtype=torch.float32).to(Q.dtype), 0.5, training=False)
    return torch.matmul(A, V).transpose(1, 2).contiguous().transpose(1, 2)


def with_dropout(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    return ((Q @ K.mT / math.sqrt(D)).softmax(-1) * KEPT) @ V


ATTENTION = {
    "fused": Attention(SDPA),
    "fused, causal": Attention(partial(SDPA, is_causal=True), CAUSAL),
    "fused, float mask": Attention(partial(SDPA, attn_mask=BIAS), BIAS),
    "fused, boolean mask": Attention(partial(SDPA, attn_mask=SOME), SOME),
    "fused, scale": Attention(partial(SDPA, scale=0.7), scale=0.7),
    "fused, larger values": Attention(SDPA, values=7),
    "fused, shared keys": Attention(partial(SDPA, enable_gqa=True), key_heads=1),
    "fused, two shared keys": Attention(partial(SDPA, enable_gqa=True), heads=4),
    "math kernel": Attention(math_kernel, CAUSAL),
    "einsum": Attention(by_einsum),
    "einsum, small values": Attention(by_einsum, values=2),
    "baddbmm": Attention(by_baddbmm, BIAS),
    "transposed": Attention(transposed),
    "softmax of another precision": Attention(as_transformers_do, SOME, tolerance=1e-5),
    "dropout": Attention(with_dropout, kept=KEPT.double()),
    "dropout, the mask first": Attention(
        lambda Q, K, V: (KEPT * (Q @ K.mT / math.sqrt(D)).softmax(-1)) @ V, kept=KEPT.double()
    ),
    "shared keys": Attention(lambda Q, K, V: (Q @ K.mT / math.sqrt(D)).softmax(-1) @ V, key_heads=1),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str):
    a = ATTENTION[name]
    Q = nn.Parameter(torch.randn(N, a.heads, QUERIES, D))
    K = nn.Parameter(torch.randn(N, a.key_heads, KEYS, D))
    V = nn.Parameter(torch.randn(N, a.key_heads, KEYS, a.values))
    graph, leaves = Graph(), {"Q": Q, "K": K, "V": V}
    graph(a.read, graph(a.scores, "Q", "K"), "V")
    output = a.attend(Q, K, V)
    close(output.detach(), a.read(a.scores(Q, K), V).detach(), a.tolerance)
    value, c = separate(output.flatten())
    loss = Module("loss", lambda y: value(y.flatten()), (graph.modules[-1].name,))
    exact = exact_diagonal(lambda Q, K, V: loss.fn(a.read(a.scores(Q, K), V)), [Q, K, V])
    expected = recursion(graph.modules, leaves, loss)
    ggn = recursion(graph.modules, leaves, loss, gauss_newton=True)
    backward(output, value, c, HesScale(), HesScale(gauss_newton=True))
    close(K.hesscale, exact[1], a.tolerance)
    close(V.hesscale, exact[2], a.tolerance)
    for key, leaf in leaves.items():
        close(leaf.hesscale, expected[key], a.tolerance)
        close(leaf.hesscale_gn, ggn[key], a.tolerance)
    # the off-diagonals of the scores are dropped
    assert (Q.hesscale - exact[0]).abs().sum() > 1e-3 * exact[0].abs().sum()


# -- operations without a rule, and cross terms: random signs ---------------------------------------


DRAWS = 400


def estimates(fn: Callable, x: Tensor, **options) -> tuple[Tensor, Tensor, Module, Tensor]:
    """Many estimates of the diagonal at x, the exact one, the loss, and its curvatures."""
    x = nn.Parameter(x)
    value, c = separate(fn(x).flatten())
    loss = Module("loss", lambda y: value(y.flatten()), ())
    (exact,) = exact_diagonal(lambda x: loss.fn(fn(x)), [x])
    ext, found = HesScale(generator=torch.Generator().manual_seed(0), **options), []
    for _ in range(DRAWS):
        backward(fn(x), value, c, ext)
        found.append(x.hesscale.clone())
    return torch.stack(found), exact, loss, c.view_as(fn(x))


def unbiased(found: Tensor, expected: Tensor) -> bool:
    """Whether the mean of many estimates is within five standard errors in every entry."""
    error = found.std(0) / DRAWS**0.5
    return ((found.mean(0) - expected).abs() <= 5 * error + 1e-10).all().item()


def far(found: Tensor, expected: Tensor) -> bool:
    return ((found - expected).abs().sum() > 0.1 * expected.abs().sum()).item()


random_signs = pytest.mark.filterwarnings("ignore:HesScale:UserWarning")


@random_signs
def test_without_a_rule_random_signs_are_unbiased():
    found, exact, *_ = estimates(lambda x: x.cumprod(1), torch.rand(3, 4) + 0.5)
    assert unbiased(found, exact) and far(found[0], exact)


@random_signs
def test_linear_glue_is_not_refused():
    def upsampled(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", antialias=True)

    found, exact, *_ = estimates(upsampled, torch.randn(1, 1, 2, 3), on_curved_glue="raise")
    assert unbiased(found, exact) and far(found[0], exact)


@random_signs
def test_curved_glue_is_refused():
    x = nn.Parameter(torch.rand(3, 4))
    for fn in (lambda x: x.cumprod(1), lambda x: (2 * x).cumprod(1).tanh()):
        y = fn(x)
        value, c = separate(y.flatten())
        with pytest.raises(UnsupportedError, match="CumprodBackward0"):
            backward(y, value, c, HesScale(on_curved_glue="raise"))
    with pytest.raises(ValueError, match="on_curved_glue"):
        HesScale(on_curved_glue="ignore")


def test_without_a_rule_there_is_one_warning():
    x, ext = nn.Parameter(torch.rand(3, 4)), HesScale()
    for again in (False, True):
        y = x.cumprod(1)
        value, c = separate(y.flatten())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backward(y, value, c, ext)
        said = ["CumprodBackward0 has no rule" in str(w.message) for w in caught]
        assert said == ([] if again else [True])


@pytest.mark.parametrize("combine", [torch.add, partial(torch.sub, alpha=2)])
def test_cross_terms_of_elementwise_branches_are_exact(combine: Callable[[Tensor, Tensor], Tensor]):
    """`3 x + s tanh(x)`, s a parameter: the Hessian's diagonal is `c (3 + s tanh')^2 + g s tanh''`."""
    x, s = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

    def block(x: Tensor, s: Tensor) -> Tensor:
        return combine(3 * x, s * x.tanh())

    value, c = separate(block(x, s).flatten())
    exact = exact_diagonal(lambda x, s: value(block(x, s).flatten()), [x, s])
    backward(block(x, s), value, c, HesScale(), HesScale(cross_terms=True, savefield="crossed"))
    close(x.crossed, exact[0], 1e-12)
    assert far(x.hesscale, exact[0])
    for found in (s.hesscale, s.crossed):
        close(found, exact[1], 1e-12)


def test_cross_terms_of_a_transposed_parameter():
    """`W^T + s tanh(W^T)`, W square and not symmetric, s a parameter per row."""
    W, s = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 1))

    def block(W: Tensor, s: Tensor) -> Tensor:
        t = W.t()
        return t + s * t.tanh()

    value, c = separate(block(W, s).flatten())
    exact = exact_diagonal(lambda W, s: value(block(W, s).flatten()), [W, s])
    backward(block(W, s), value, c, HesScale(cross_terms=True))
    close(W.hesscale, exact[0], 1e-12)
    close(s.hesscale, exact[1], 1e-12)


def test_cross_terms_of_residual_branches_are_unbiased():
    """`2 h diag(J_f)` of a residual branch f, besides what the recursion gives."""
    W, V = torch.randn(5, 4), torch.randn(4, 5)

    def branch(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, W).tanh(), V)

    x = torch.randn(3, 4)
    found, _, loss, c = estimates(lambda x: x + branch(x), x, cross_terms=True)
    graph = Graph()
    z = graph(lambda z: F.linear(z, V), graph(torch.tanh, graph(lambda x: F.linear(x, W), "x")))
    loss = Module("loss", loss.fn, (graph(torch.add, "x", z),))
    J = torch.autograd.functional.jacobian(branch, x).view(12, 12).diagonal().view(3, 4)
    plain = recursion(graph.modules, {"x": x}, loss)["x"]
    assert unbiased(found, plain + 2 * c * J) and not unbiased(found, plain)
