"""Two small networks for 8 x 8 digit images, in plain PyTorch: a convolutional one and a ViT."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """Three convolutions with batch norm and in-place ReLU, average pooling, a linear head.

    Args:
        width: Channels of the first convolution; the others have twice as many.
    """

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(2 * width)
        self.norm3 = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 1, 8, 8]`` to logits ``[N, 10]``."""
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x)), inplace=True)
        x = F.max_pool2d(x, 2)
        x = F.relu(self.norm3(self.conv3(x)), inplace=True)
        return self.head(x.mean(dim=(2, 3)))


class Block(nn.Module):
    """A pre-norm transformer block; the attention is functional.

    Args:
        dim: Width of the tokens.
        heads: Number of attention heads.
        causal: Whether a token sees only itself and those before it.
    """

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[N, T, dim]`` to tokens."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attention(self, x: Tensor) -> Tensor:
        """Mix the tokens."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [N, T, 3, heads, dim / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """A vision transformer on 2 x 2 patches with a class token and learned positions.

    Args:
        dim: Width of the tokens.
        heads: Number of attention heads.
        depth: Number of blocks.
    """

    def __init__(self, dim: int = 24, heads: int = 3, depth: int = 2):
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Embedding(17, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 1, 8, 8]`` to logits ``[N, 10]``."""
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.blocks(x + self.positions(torch.arange(17, device=x.device)))
        return self.head(self.norm(x[:, 0]))
