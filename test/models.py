"""A zoo of tiny problems: one factory per way in which people write models.

`CASES[name](seed=0, dtype=torch.float64, reduction="mean")` builds a `Problem`. The random numbers
are drawn in float32 from `seed` alone, so two dtypes or reductions differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _identity(output: Tensor) -> Tensor:
    return output


def _rows(output: Tensor) -> Tensor:
    """`[N, T, C] -> [N T, C]`, n-major: how language models feed cross-entropy."""
    return output.view(-1, output.shape[-1])


def _convert(value: Any, dtype: torch.dtype | None, device: Any) -> Any:
    """Move the tensors inside `value`; `dtype` reaches the floating-point ones only."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: _convert(entry, dtype, device) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_convert(entry, dtype, device) for entry in value)
    return value


@dataclass
class Problem:
    """A model, its mini-batch and its loss: `loss_fn(readout(model(*inputs, **kwargs)), target)`.

    Attributes:
        model: Any module, its parameters all trainable.
        inputs: Positional arguments of the model; the first one is a tensor `[N, ...]`, or a dict
            whose first value is one.
        loss_fn: A torch loss module.
        target: What `loss_fn` compares the logits with.
        kwargs: Keyword arguments of the model.
        readout: What happens to the model's output before the loss sees it.
        name: Key of the problem in `CASES`.
    """

    model: nn.Module
    inputs: tuple
    loss_fn: nn.Module
    target: Tensor
    kwargs: dict = field(default_factory=dict)
    readout: Callable[[Tensor], Tensor] = _identity
    name: str = ""

    @property
    def batch_size(self) -> int:
        """N, the number of data."""
        first = self.inputs[0]
        return len(next(iter(first.values())) if isinstance(first, dict) else first)

    def forward(self) -> Tensor:
        """The logits as `loss_fn` gets them, `[N, ...]` or `[N T, C]`."""
        return self.readout(self.model(*self.inputs, **self.kwargs))

    def loss(self) -> Tensor:
        """The loss, reduction included, `[]`."""
        return self.loss_fn(self.forward(), self.target)

    def to(self, dtype: torch.dtype | None = None, device: Any = None) -> Problem:
        """Move everything (modules in place) and return the problem."""
        self.model.to(device=device, dtype=dtype)
        self.loss_fn.to(device=device, dtype=dtype)
        for name in ("inputs", "kwargs", "target"):
            setattr(self, name, _convert(getattr(self, name), dtype, device))
        return self


Build = Callable[[str], Problem]
CASES: dict[str, Callable[..., Problem]] = {}


def _make(
    name: str,
    build: Build,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    reduction: str = "mean",
) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        problem = build(reduction)
    problem.name = name
    return problem.to(dtype)


def register(name: str, build: Build) -> Build:
    """Add `build(reduction) -> Problem` to `CASES`."""
    CASES[name] = partial(_make, name, build)
    return build


def case(build: Build) -> Build:
    """Register `build` under its own name."""
    return register(build.__name__, build)


# -- fully connected -------------------------------------------------------------------------------


@case
def mlp(reduction: str) -> Problem:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    return Problem(model, (torch.randn(7, 5),), loss_fn, torch.randint(3, (7,)))


@case
def mlp_mse(reduction: str) -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2))
    return Problem(model, (torch.randn(3, 4),), nn.MSELoss(reduction=reduction), torch.randn(3, 2))


@case
def mlp_bce(reduction: str) -> Problem:
    model = nn.Sequential(nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, 3))
    loss_fn = nn.BCEWithLogitsLoss(
        weight=0.5 + torch.rand(3), pos_weight=0.5 + 2 * torch.rand(3), reduction=reduction
    )
    return Problem(model, (torch.randn(5, 6),), loss_fn, torch.randint(2, (5, 3)).float())


# -- convolutions ----------------------------------------------------------------------------------


@case
def cnn(reduction: str) -> Problem:
    """Stride, groups, dilation, "same" circular padding; class weights and label smoothing."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2, padding="same", padding_mode="circular"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 3 * 2, 5),
    )
    loss_fn = nn.CrossEntropyLoss(weight=0.5 + torch.rand(5), label_smoothing=0.1, reduction=reduction)
    return Problem(model, (torch.randn(3, 2, 11, 8),), loss_fn, torch.randint(5, (3,)))


def _frozen_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm without parameters; its running statistics are random."""
    norm = nn.BatchNorm2d(channels, affine=False)
    norm.running_mean.normal_(std=0.3)
    norm.running_var.uniform_(0.5, 1.5)
    return norm


class Block(nn.Module):
    """`act(norm2(conv2(act(norm1(conv1(x))))) + shortcut(x))`, in place, with a borrowed `act`."""

    def __init__(self, c_in: int, c_out: int, stride: int, act: nn.Module):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _frozen_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = _frozen_norm(c_out)
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        x = self.act(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        x += identity
        return self.act(x)


class ResNet(nn.Module):
    """Residual net in which one in-place ReLU module serves every activation."""

    def __init__(self, classes: int):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = _frozen_norm(4)
        self.block1 = Block(4, 5, 2, self.act)
        self.block2 = Block(5, 5, 1, self.act)
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        return self.head(self.block2(self.block1(x)).mean((2, 3)))


@case
def resnet(reduction: str) -> Problem:
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    target = torch.randint(7, (3,))
    return Problem(ResNet(7).eval(), (torch.randn(3, 2, 8, 6),), loss_fn, target)


@case
def conv_transpose(reduction: str) -> Problem:
    """One-dimensional encoder and decoder, dense output."""
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Tanh(),
        nn.Conv1d(6, 2, 3, padding=1, padding_mode="replicate"),
    )
    loss_fn = nn.MSELoss(reduction=reduction)
    return Problem(model, (torch.randn(3, 2, 9),), loss_fn, torch.randn(3, 2, 10))


class UNet(nn.Module):
    """One level down, one level up, a concatenated skip; asymmetric reflective padding."""

    def __init__(self, classes: int):
        super().__init__()
        self.down = nn.Conv2d(2, 5, 3, padding=1)
        self.middle = nn.Conv2d(5, 6, (2, 3), padding="same", padding_mode="reflect")
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2)
        self.out = nn.Conv2d(5 + 3, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        x = F.silu(self.middle(F.avg_pool2d(skip, 2)))
        return self.out(torch.cat([skip, self.up(x)], dim=1))


@case
def unet(reduction: str) -> Problem:
    """Cross-entropy per pixel: logits `[N, C, H, W]`, targets `[N, H, W]`."""
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    target = torch.randint(4, (3, 6, 4))
    return Problem(UNet(4), (torch.randn(3, 2, 6, 4),), loss_fn, target)


# -- transformers ----------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Pre-norm block: attention `[N, T, d] -> [N, T, d]` and an MLP, each with a residual."""

    def __init__(self, dim: int, heads: int, hidden: int, causal: bool, affine: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=affine)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=affine)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`softmax(q k^T / sqrt(d)) v` per head: torch's own if causal, by hand if not."""
        if self.causal:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        return scores.softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(self.attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer.

    Args:
        classes: Number of classes.
        learned: Class token and position embedding are bare parameters, layer norms are affine and
            the read-out is the token mean. Otherwise the class token is a buffer, there are no
            positions, no norm has parameters and the class token is read out.
    """

    def __init__(self, classes: int, learned: bool, dim: int = 8):
        super().__init__()
        self.learned = learned
        self.patch = nn.Conv2d(2, dim, 2, stride=2)
        if learned:
            self.token = nn.Parameter(torch.randn(1, 1, dim))
            self.pos = nn.Parameter(0.3 * torch.randn(1, 7, dim))
        else:
            self.register_buffer("token", torch.randn(1, 1, dim))
        self.block = Transformer(dim, heads=2, hidden=10, causal=False, affine=learned)
        self.norm = nn.LayerNorm(dim, elementwise_affine=learned)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        if self.learned:
            x = x + self.pos
        x = self.norm(self.block(x))
        return self.head(x.mean(1) if self.learned else x[:, 0])


def _vit(learned: bool, reduction: str) -> Problem:
    model = ViT(5, learned)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.LayerNorm) and learned:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(std=0.3)
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    return Problem(model, (torch.randn(3, 2, 6, 4),), loss_fn, torch.randint(5, (3,)))


register("vit", partial(_vit, False))
register("vit_params", partial(_vit, True))


class CharGPT(nn.Module):
    """Language model `[N, T] -> [N, T, V]`: broadcast positions, head tied to the tokens."""

    def __init__(self, vocabulary: int, dim: int = 6):
        super().__init__()
        self.tok = nn.Embedding(vocabulary, dim)
        self.pos = nn.Embedding(9, dim)
        self.block = Transformer(dim, heads=2, hidden=10, causal=True)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.tok(index) + self.pos(torch.arange(index.shape[1], device=index.device))
        return self.head(self.norm(self.block(x)))


@case
def char_gpt(reduction: str) -> Problem:
    """Cross-entropy over the N T rows of `logits.view(-1, V)`, four of them ignored."""
    index, target = torch.randint(7, (3, 5)), torch.randint(7, (3, 5))
    target[0, 3:] = target[2, 0] = target[1, 2] = -100
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    return Problem(CharGPT(7), (index,), loss_fn, target.view(-1), readout=_rows)


# -- glue ------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Linear modules amid functional calls, einsum, permutes and reshapes, `[N, T, 5] -> [N, C]`.

    `embed` sees flattened tokens `[N T, 5]`; `mix` is called on `[N T, 6]`, then on `[N, T, 6]`;
    `tokens` acts along the token axis.
    """

    def __init__(self, length: int, classes: int):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.mix = nn.Linear(6, 6)
        self.tokens = nn.Linear(length, 2, bias=False)
        self.head = nn.Linear(6 * 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        x = F.relu(self.embed(x.reshape(n * t, -1)))
        x = (x + torch.sigmoid(self.mix(x))).reshape(n, t, -1)
        x = torch.tanh(self.mix(torch.einsum("ntd,nsd,nse->nte", x, x, x) / 10))
        x = self.tokens(x.permute(0, 2, 1))
        return self.head(F.softplus(x).permute(0, 2, 1).reshape(n, -1))


@case
def functional(reduction: str) -> Problem:
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    return Problem(Functional(4, 7), (torch.randn(3, 4, 5),), loss_fn, torch.randint(7, (3,)))


class DictInput(nn.Module):
    """`model({"image": [N, 2, H, W], "extra": [N, 4]}, mask=[N, H, W], scale=...)`."""

    def __init__(self, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.extra = nn.Linear(4, 6)
        self.head = nn.Linear(5 + 6, outputs)

    def forward(self, batch: dict[str, Tensor], *, mask: Tensor, scale: float = 1.0) -> Tensor:
        x = torch.tanh(self.conv(batch["image"])).masked_fill(~mask[:, None], 0.0)
        x = x.sum((2, 3)) / mask.sum((1, 2))[:, None]
        return self.head(torch.cat([scale * x, F.elu(self.extra(batch["extra"]))], dim=1))


@case
def dict_input(reduction: str) -> Problem:
    inputs = {"image": torch.randn(3, 2, 5, 4), "extra": torch.randn(3, 4)}
    mask = torch.rand(3, 5, 4) < 0.7
    loss_fn, target = nn.MSELoss(reduction=reduction), torch.randn(3, 2)
    return Problem(DictInput(2), (inputs,), loss_fn, target, {"mask": mask, "scale": 2.0})


class InPlaceTokens(nn.Module):
    """In-place activations on the outputs of Linear on `[N, T, d]`, which are views."""

    def __init__(self, outputs: int):
        super().__init__()
        self.fc1 = nn.Linear(5, 4)
        self.fc2 = nn.Linear(4, 7)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(7, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.fc1(x))
        return self.head(self.act(self.fc2(x)).mean(1))


@case
def in_place_tokens(reduction: str) -> Problem:
    loss_fn = nn.MSELoss(reduction=reduction)
    return Problem(InPlaceTokens(2), (torch.randn(3, 6, 5),), loss_fn, torch.randn(3, 2))


class Siblings(nn.Module):
    """Two consumers of one activation `h [N, 4, 5]`: a view that starts at its address, and `h`.

    Args:
        view: "slice", "permute" or "flatten": what `branch` reads.
        order: "first" or "last": when `branch` is called, relative to `sibling`, which reads `h`.
        outputs: Number of outputs.
    """

    def __init__(self, view: str, order: str, outputs: int):
        super().__init__()
        self.view, self.order = view, order
        d_in, d_out, d_flat = {"slice": (3, 2, 8), "permute": (4, 2, 10), "flatten": (20, 6, 6)}[view]
        self.trunk = nn.Linear(6, 5)
        self.act = nn.Tanh()
        self.branch = nn.Linear(d_in, d_out)
        self.sibling = nn.Linear(5, 3)
        self.head = nn.Linear(d_flat + 4 * 3, outputs)

    def look(self, h: Tensor) -> Tensor:
        """The view of `h` that `branch` reads."""
        if self.view == "slice":
            return h[:, :, :3]
        return h.permute(0, 2, 1) if self.view == "permute" else h.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.trunk(x))
        if self.order == "first":
            branch, sibling = self.branch(self.look(h)), self.sibling(h)
        else:
            sibling, branch = self.sibling(h), self.branch(self.look(h))
        return self.head(torch.tanh(torch.cat([branch.flatten(1), sibling.flatten(1)], dim=1)))


def _siblings(view: str, order: str, reduction: str) -> Problem:
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    model = Siblings(view, order, 7)
    return Problem(model, (torch.randn(3, 4, 6),), loss_fn, torch.randint(7, (3,)))


for _view in ("slice", "permute", "flatten"):
    for _order in ("first", "last"):
        register(f"siblings_{_view}_{_order}", partial(_siblings, _view, _order))
