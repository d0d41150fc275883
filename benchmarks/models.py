"""The problems that are measured: a model, a mini-batch and its labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10

# Words in the names of rows that measure Hessian diagonals.
DIAGONALS = ("HesScale", "BL89")
# With what names of rows begin that are measured where a step takes half a second.
LARGE = ("KFAC expand mc", "KFAC reduce", "SumGradSquared", "DiagGGN mc", "extended")


@dataclass(frozen=True)
class Problem:
    """A model with a batch of data; the loss is the mean cross-entropy.

    Args:
        name: Key in `PROBLEMS`.
        title: Column head in tables.
        about: One line that describes the model and the batch.
        model: The model, not extended.
        x: The inputs, ``[N, ...]``.
        y: The labels, ``[N]``.
        sequential: Whether BackPACK's extensions can treat the model; if not, those of first order,
            which carry no vectors through the graph, still can.
        rows: Words with one of which a row's name must begin to be measured; empty: all rows.
    """

    name: str
    title: str
    about: str
    model: nn.Module
    x: Tensor
    y: Tensor
    sequential: bool = True
    rows: tuple[str, ...] = ()


class SelfAttention(nn.Module):
    """Multi-head attention ``[N, T, d] -> [N, T, d]`` in plain PyTorch.

    Args:
        width: The feature dimension d.
        heads: Number of heads.
        causal: Whether tokens see only those before them.
    """

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended values of all heads, projected."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        width: The feature dimension.
        heads: Number of attention heads.
        hidden: Width of the MLP's hidden layer.
        affine: Whether its norms have parameters.
        causal: Whether tokens see only those before them.
    """

    def __init__(self, width: int, heads: int, hidden: int, affine: bool = False, causal: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=affine)
        self.attention = SelfAttention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=affine)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add the attention's and the MLP's update."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A small vision transformer with fixed position embeddings and mean pooling.

    All trainable parameters belong to linear layers, a convolution and norms, so that each extension
    covers all of them.

    Args:
        size: Height and width of the images (3 channels).
        patch: Height and width of a patch.
        width: The feature dimension.
        depth: Number of blocks.
        heads: Number of attention heads.
        affine: Whether the norms have parameters.
    """

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, affine: bool = False):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.register_buffer("position", _sines((size // patch) ** 2, width))
        self.blocks = nn.ModuleList([Block(width, heads, 4 * width, affine) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of images ``[N, 3, size, size]``."""
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Residual(nn.Module):
    """A basic block of a ResNet: two convolutions 3x3, and a shortcut around them.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        stride: Of the first convolution; the shortcut has a 1x1 convolution where shapes change.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            down = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(down, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions make of the input to the input."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 for small images: a 3x3 stem, four stages of two blocks, the mean over pixels.

    Its batch norms are evaluated with their running statistics (`eval()`): with those of the batch
    there are no per-sample quantities. They have weights and biases, which are covered too.

    Args:
        width: Channels of the first stage; each further one has twice as many at half the size.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width * 2**k for k in range(4)]
        blocks = []
        for stage, (inputs, outputs) in enumerate(zip([width, *widths], widths, strict=False)):
            blocks += [Residual(inputs, outputs, 1 if stage == 0 else 2), Residual(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], CLASSES)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of images ``[N, 3, height, width]``."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class GPT(nn.Module):
    """A small language model with learned position embeddings and a head of its own.

    Args:
        tokens: Number of different tokens.
        length: Number of tokens of a text.
        width: The feature dimension.
        depth: Number of blocks.
        heads: Number of attention heads.
    """

    def __init__(self, tokens: int, length: int, width: int, depth: int, heads: int):
        super().__init__()
        self.embed, self.position = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            [Block(width, heads, 4 * width, affine=True, causal=True) for _ in range(depth)]
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N T, tokens]`` of texts ``[N, T]``."""
        x = self.embed(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).flatten(0, 1)


def _sines(tokens: int, width: int) -> Tensor:
    """Return fixed position embeddings ``[tokens, width]``."""
    rates = torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    angles = torch.arange(tokens)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _mlp(width: int = 512, classes: int = CLASSES) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(784, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, classes),
    )


def _tanh() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(784, 512), nn.Tanh()),
        *(nn.Linear(512, 512), nn.Tanh()),
        nn.Linear(512, CLASSES),
    )


def _control() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, CLASSES)),
    )


def _tiny() -> nn.Module:
    hidden = [layer for _ in range(40) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(32, CLASSES))


def _problem(
    name: str,
    title: str,
    about: str,
    model: Callable,
    shape: tuple,
    sequential: bool = True,
    classes: int = CLASSES,
    rows: tuple[str, ...] = (),
) -> Callable[[str], Problem]:
    """Return a factory: ``factory(device)`` draws parameters and data from a fixed seed."""

    def make(device: str = "cpu") -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net, x = model().to(device), torch.rand(shape).to(device)
            y = torch.randint(classes, shape[:1]).to(device)
        return Problem(name, title, about, net, x, y, sequential, rows)

    return make


PROBLEMS: dict[str, Callable[[str], Problem]] = {
    "mlp": _problem("mlp", "MLP", "MLP 784-512-512-10, ReLU, batch 128", _mlp, (128, 784)),
    "cnn": _problem(
        *("cnn", "CNN", "three convolutions 3x3 (32, 64, 64), ReLU, max-pool, head; 3x32x32, batch 64"),
        *(_cnn, (64, 3, 32, 32)),
    ),
    "resnet": _problem(
        *(
            "resnet",
            "ResNet-18",
            "ResNet-18, 64 to 512 channels, batch norms evaluated; 3x32x32, batch 32",
        ),
        *(ResNet, (32, 3, 32, 32), False),
        rows=LARGE,
    ),
    "vit": _problem(
        *("vit", "ViT", "ViT, 4 blocks of width 64, 4 heads, 64 patches of 3x32x32, batch 32"),
        *(lambda: ViT(32, 4, 64, 4, 4), (32, 3, 32, 32), False),
    ),
    "tiny": _problem(
        *("tiny", "41 tiny layers", "41 linear layers of width 32, ReLU, batch 8: pure overhead"),
        *(_tiny, (8, 32)),
    ),
    "tanh": _problem(
        *("tanh", "tanh MLP", "MLP 784-512-512-10, tanh, batch 128", _tanh, (128, 784)),
        rows=DIAGONALS,
    ),
    "control": _problem(
        *(
            "control",
            "control",
            "MLP 4-64-64-2, tanh, batch 1: reinforcement learning",
            _control,
            (1, 4),
        ),
        classes=2,
        rows=DIAGONALS,
    ),
}


# What a run without ``--models`` measures: those with goals, but for the ResNet, which takes minutes.
MODELS = ("mlp", "cnn", "vit")


def mlp(N: int, width: int = 512, classes: int = CLASSES, device: str = "cpu") -> Problem:
    """Return an MLP with two hidden layers, and a batch of N data."""
    about = f"MLP 784-{width}-{width}-{classes}, ReLU, batch {N}"
    make = _problem("mlp", "MLP", about, lambda: _mlp(width, classes), (N, 784), classes=classes)
    return make(device)


def cnn(N: int, device: str = "cpu") -> Problem:
    """Return the CNN with a batch of N data."""
    about = f"three convolutions 3x3 (32, 64, 64), ReLU, max-pool, head; 3x32x32, batch {N}"
    return _problem("cnn", "CNN", about, _cnn, (N, 3, 32, 32))(device)


def vit(N: int, device: str = "cpu") -> Problem:
    """Return the small vision transformer with a batch of N data."""
    about = f"ViT, 4 blocks of width 64, 4 heads, 64 patches of 3x32x32, batch {N}"
    make = _problem("vit", "ViT", about, lambda: ViT(32, 4, 64, 4, 4), (N, 3, 32, 32), False)
    return make(device)


def vit_of(N: int, tokens: int, depth: int = 4, device: str = "cpu") -> Problem:
    """Return a vision transformer of width 64 on images of ``tokens`` patches, a square number."""
    size = 4 * math.isqrt(tokens)
    if (size // 4) ** 2 != tokens:
        raise ValueError(f"vit_of: expected a square number of tokens, got {tokens}.")
    about = f"ViT, {depth} blocks of width 64, 4 heads, {tokens} patches of 3x{size}x{size}, batch {N}"
    shape = (N, 3, size, size)
    make = _problem("vit", "ViT", about, lambda: ViT(size, 4, 64, depth, 4), shape, False)
    return make(device)


def deep_vit(depth: int, device: str = "cpu", quick: bool = False) -> Problem:
    """Return a vision transformer with norms that have parameters, and a batch of images."""
    size, width, heads, N = (8, 16, 2, 3) if quick else (32, 96, 4, 16)
    about = (
        f"ViT, {depth} blocks of width {width}, {(size // 4) ** 2} patches of 3x{size}x{size}, batch {N}"
    )
    make = _problem(
        *(f"vit-{depth}", f"ViT, {depth} blocks", about),
        *(lambda: ViT(size, 4, width, depth, heads, affine=True), (N, 3, size, size), False),
    )
    return make(device)


def deep_gpt(depth: int, device: str = "cpu", quick: bool = False) -> Problem:
    """Return a language model with a head of its own, and a batch of random texts."""
    tokens, length, width, heads, N = (11, 5, 16, 2, 3) if quick else (256, 64, 96, 4, 16)
    about = f"GPT, {depth} blocks of width {width}, {tokens} tokens, texts of {length}, batch {N}"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(tokens, length, width, depth, heads).to(device)
        x, y = torch.randint(tokens, (2, N, length))
    name, title = f"gpt-{depth}", f"GPT, {depth} blocks"
    return Problem(name, title, about, model, x.to(device), y.flatten().to(device), False)


DEEP: dict[str, Callable[..., Problem]] = {"vit": deep_vit, "gpt": deep_gpt}
