"""What is alive after a forward pass: ``python -m benchmarks.kept``.

A ResNet-18, 3x224x224, batch 8, of which everything is trained, or the head, the biases, the norms.
A layer's hook is to keep nothing that autograd does not keep as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import backpack as theirs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backpack_ext import KFAC, BatchGrad, backpack, extend
from benchmarks.memory import kept_memory
from benchmarks.report import machine

CLASSES = 1000


class BasicBlock(nn.Module):
    """Two convolutions 3x3 with norms, and the input added.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.down = nn.Identity()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        z = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(z)) + self.down(x))


class ResNet18(nn.Module):
    """He et al. (2016), Deep residual learning for image recognition: 18 layers.

    Args:
        width: Channels of the first stage.
        classes: Number of classes.
        checkpointed: Whether the blocks' activations are computed again in the backward pass.
    """

    def __init__(self, width: int = 64, classes: int = CLASSES, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)),
        )
        blocks, channels = [], width
        for stage in range(4):
            for k in range(2):
                blocks.append(BasicBlock(channels, width << stage, 2 if stage and not k else 1))
                channels = width << stage
        self.blocks = nn.ModuleList(blocks)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of images ``[N, 3, h, w]``."""
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.pool(x).flatten(1))


def everything(name: str, module: nn.Module) -> bool:
    """Whether a parameter is trained: all are."""
    return True


def head(name: str, module: nn.Module) -> bool:
    """Whether a parameter is the head's."""
    return isinstance(module, nn.Linear)


def biases(name: str, module: nn.Module) -> bool:
    """Whether a parameter is a bias."""
    return name.endswith("bias")


def norms(name: str, module: nn.Module) -> bool:
    """Whether a parameter is a norm's."""
    return isinstance(module, nn.BatchNorm2d)


# What is trained, in which mode of the norms, and how.
CASES = {
    "everything": (everything, True, ""),
    "everything, checkpointed": (everything, True, "checkpoint"),
    "everything, autocast": (everything, True, "autocast"),
    "everything, eval()": (everything, False, ""),
    "head": (head, True, ""),
    "head, eval()": (head, False, ""),
    "biases": (biases, True, ""),
    "biases, eval()": (biases, False, ""),
    "norms": (norms, True, ""),
    "norms, eval()": (norms, False, ""),
}

WAYS: dict[str, tuple[Callable, Callable[[], AbstractContextManager]]] = {
    "plain": (lambda module: module, nullcontext),
    "outside": (extend, nullcontext),
    "KFAC expand": (extend, lambda: backpack(KFAC())),
    "KFAC reduce": (extend, lambda: backpack(KFAC("reduce"))),
    "BatchGrad": (extend, lambda: backpack(BatchGrad())),
    "BackPACK": (theirs.extend, nullcontext),
}


def kept(case: str, way: str, width: int, size: int, batch: int, device: str) -> int:
    """Return the bytes that a forward pass leaves behind."""
    trained, training, how = CASES[case]
    hook, context = WAYS[way]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet18(width, checkpointed=how == "checkpoint").to(device).train(training)
        x = torch.rand(batch, 3, size, size).to(device)
        y = torch.randint(CLASSES, (batch,)).to(device)
    for path, module in model.named_modules():
        for name, p in module.named_parameters(path, recurse=False):
            p.requires_grad_(trained(name, module))
    model, loss_fn = hook(model), hook(nn.CrossEntropyLoss())

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, how == "autocast"):
            return loss_fn(model(x), y)

    with context():
        found = kept_memory(forward, device)
        forward().backward()  # the block's warning is about those that compute nothing
    return found


if __name__ == "__main__":
    import sys, warnings
    warnings.simplefilter("ignore")
    w, s, b = map(int, sys.argv[1:4]) if len(sys.argv) > 3 else (64, 224, 8)
    print(" " * 26, *(f"{way:>12}" for way in WAYS))
    for case in CASES:
        row = []
        for way in WAYS:
            try:
                row.append(kept(case, way, w, s, b, "cpu"))
            except Exception as e:
                row.append(f"{type(e).__name__}")
        print(f"{case:26}", *(f"{r / 1e6:12.3f}" if isinstance(r, int) else f"{r:>12.12}" for r in row), flush=True)
