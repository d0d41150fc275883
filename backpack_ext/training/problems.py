"""Four small networks of the usual kinds, in float64 and extended, each with a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_ext.extend import extend
from backpack_ext.losses import LOSSES, CrossEntropyRule, loss_rule

CLASSES = 3


class Loss(nn.CrossEntropyLoss):
    """Cross-entropy whose samples are drawn in float64, so that all precisions draw the same."""


class _Rule(CrossEntropyRule):
    def sample(self, module: nn.Module, z: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Draw from the probabilities in float64."""
        return super().sample(module, z.double(), y, generator).to(z.dtype)


LOSSES[Loss] = _Rule()
loss_rule.cache_clear()


class Stages(nn.Module):
    """``head(body(stem(x)))``; ``around(body, x)`` says how the middle is called."""

    def __init__(self, stem: nn.Module, body: nn.Module, head: nn.Module):
        super().__init__()
        self.stem, self.body, self.head = stem, body, head
        self.drop = nn.Dropout(0.5)
        self.around: Callable[[nn.Module, Tensor], Tensor] = _call

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``[N, ..., C]``."""
        return self.head(self.around(self.body, self.drop(self.stem(x))))


def _call(body: nn.Module, x: Tensor) -> Tensor:
    return body(x)


class Block(nn.Module):
    """A block of a transformer: attention by hand, or torch's own with a causal mask."""

    def __init__(self, dim: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 5), nn.Linear(5, dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.causal:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, T, d]`` for ``[N, T, d]``."""
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        x = x + self.proj(self._attend(q, k, v).transpose(1, 2).reshape(n, t, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Patches(nn.Module):
    """Patches of an image, a class token and positions, both learned."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(2, dim, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos = nn.Parameter(torch.randn(1, 5, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, T, d]``."""
        x = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.pos


class Tokens(nn.Module):
    """Embedded tokens and positions."""

    def __init__(self, vocabulary: int, dim: int):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocabulary, dim), nn.Embedding(4, dim)

    def forward(self, index: Tensor) -> Tensor:
        """Return ``[N, T, d]``."""
        return self.tok(index) + self.pos(torch.arange(index.shape[1], device=index.device))


class Readout(nn.Module):
    """Layer norm, the class token, linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.linear(self.norm(x)[:, 0])


class Problem:
    """An extended model in evaluation mode, its loss, and a batch of N = 6 data.

    Attributes:
        name: Which network.
        model: The extended model.
        call: What is called in its place: the model itself, compiled maybe.
        loss_fn: The extended loss.
        x: The inputs.
        y: The targets.
    """

    def __init__(self, name: str, model: nn.Module, x: Tensor, y: Tensor):
        self.name, self.model, self.x, self.y = name, model, x, y
        self.call, self.loss_fn = model, extend(Loss())

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """Return the logits of some of the data, ``[R, C]``."""
        z = self.call(self.x[rows])
        return z.flatten(0, -2)

    def loss(self, rows: slice = slice(None)) -> Tensor:
        """Return the mean loss of some of the data."""
        z = self.logits(rows)
        return self.loss_fn(z, self.y[rows].flatten())

    def to(self, dtype: torch.dtype) -> Problem:
        """Move the parameters and inputs."""
        self.model.to(dtype)
        self.x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        return self


def _mlp() -> tuple[nn.Module, Tensor]:
    body = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
    stem, head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, CLASSES)
    return Stages(stem, body, head), torch.randn(6, 4)


def _cnn() -> tuple[nn.Module, Tensor]:
    stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True))
    body = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.GroupNorm(2, 4), nn.SiLU())
    head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, CLASSES))
    return Stages(stem, body, head), torch.randn(6, 2, 5, 5)


def _vit() -> tuple[nn.Module, Tensor]:
    return Stages(Patches(4), Block(4, causal=False), Readout(4)), torch.randn(6, 2, 4, 4)


def _gpt() -> tuple[nn.Module, Tensor]:
    head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, CLASSES, bias=False))
    model = Stages(Tokens(CLASSES, 4), Block(4, causal=True), head)
    return model, torch.randint(CLASSES, (6, 4))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "MLP": _mlp,
    "CNN": _cnn,
    "ViT": _vit,
    "GPT": _gpt,
}


def problem(name: str, seed: int = 0) -> Problem:
    """Return a network and its batch in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x = NETWORKS[name]()
        for p in model.parameters():  # no norm's scale is 1, no bias 0
            p.data += 0.1 * torch.randn_like(p)
        y = torch.randint(CLASSES, x.shape if name == "GPT" else x.shape[:1])
    made = Problem(name, extend(model.double().eval()), x, y)
    return made.to(torch.float64)
