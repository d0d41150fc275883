"""A character GPT, and the source text of Python's standard library, which every machine has."""

import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from examples.digits_models import Block
from examples.training.data import Batch, Data

LENGTH = 32  # characters that are predicted, of a window
CHARACTERS = 96  # 0 stands for line feeds and tabs, the others for the printable ones of ASCII
VALIDATION = 256  # windows


class GPT(nn.Module):
    """A causal transformer over characters.

    Args:
        dim: Width of the tokens.
        heads: Number of attention heads.
        depth: Number of blocks.
    """

    def __init__(self, dim: int = 48, heads: int = 3, depth: int = 2):
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, dim)
        self.positions = nn.Embedding(LENGTH, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters ``[N, T]`` to logits of the next ones ``[N T, 96]``."""
        tokens = self.characters(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(tokens))).flatten(0, 1)


@dataclass(frozen=True)
class Windows(Data):
    """Windows ``[N, T + 1]`` of text; each character but the last is an input, the next its target."""

    windows: Tensor

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Tensor) -> Batch:
        windows = self.windows[index].long()
        return Batch((windows[:, :-1],), windows[:, 1:].flatten())


@lru_cache(maxsize=1)
def modules() -> list[bytes]:
    """Return the source texts of the standard library's modules.

    Raises:
        FileNotFoundError: If there are none, in a Python whose library is in an archive.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    if not texts:
        raise FileNotFoundError(
            f"no sources of the standard library in {folder}; the task `gpt` needs a Python that has "
            "them as files. Leave it out by --tasks."
        )
    return texts


def windows(texts: list[bytes]) -> Tensor:
    """Cut texts into windows ``[N, T + 1]`` that overlap by one character."""
    codes = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).short()
    codes = codes[codes < 128]  # letters beyond ASCII are rare; they are left out
    return (codes - 31).clamp(0, CHARACTERS - 1).to(torch.uint8).unfold(0, LENGTH + 1, LENGTH)


@lru_cache(maxsize=2)
def library(seed: int) -> tuple[Windows, Windows]:
    """Return training and validation data, which are of different modules."""
    texts = list(modules())
    Random(seed).shuffle(texts)
    tenth = len(texts) // 10
    held_out = windows(texts[:tenth])
    chosen = torch.linspace(0, len(held_out) - 1, VALIDATION).long()  # from all modules alike
    return Windows(windows(texts[tenth:])), Windows(held_out[chosen])
