"""What is alive after a forward pass: ``python -m benchmarks.kept``.

A ResNet-18, 3x224x224, batch 8, of which everything is trained, or the head, the biases, the norms.
A layer's hook is to keep nothing that autograd does not keep as well.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import backpack as theirs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backpack_ext import KFAC, backpack, extend
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


class Case(NamedTuple):
    """What is measured.

    Args:
        trained: Which parameters are trained, by name and module.
        training: Mode of the norms.
        how: ``"checkpoint"`` for blocks that are computed again, ``"autocast"`` for bfloat16.
    """

    trained: Callable[[str, nn.Module], bool]
    training: bool = True
    how: str = ""


CASES = {
    "everything": Case(everything),
    "everything, checkpointed": Case(everything, how="checkpoint"),
    "everything, autocast": Case(everything, how="autocast"),
    "head": Case(head),
    "head, eval()": Case(head, training=False),
    "biases": Case(biases),
    "norms": Case(norms),
}

WAYS: dict[str, tuple[Callable, Callable[[], AbstractContextManager]]] = {
    "plain torch": (lambda module: module, nullcontext),
    "ours": (extend, nullcontext),
    "ours, in a block": (extend, lambda: backpack(KFAC(), KFAC("reduce", savefield="reduce"))),
    "BackPACK": (theirs.extend, nullcontext),
}


def kept(case: Case, way: str, width: int, size: int, batch: int, device: str) -> int:
    """Return the bytes that a forward pass leaves behind.

    Args:
        case: What is trained.
        way: Which of `WAYS`.
        width: Channels of the first stage.
        size: Height and width of the images.
        batch: Number of images.
        device: Where.
    """
    hook, context = WAYS[way]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet18(width, checkpointed=case.how == "checkpoint").to(device)
        x = torch.rand(batch, 3, size, size).to(device)
        y = torch.randint(CLASSES, (batch,)).to(device)
    for path, module in model.train(case.training).named_modules():
        for name, p in module.named_parameters(path, recurse=False):
            p.requires_grad_(case.trained(name, module))
    if way == "BackPACK":  # whose hooks refuse operations in place
        model.apply(lambda module: setattr(module, "inplace", False))
    model, loss_fn = hook(model), hook(nn.CrossEntropyLoss())

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, case.how == "autocast"):
            return loss_fn(model(x), y)

    with warnings.catch_warnings(), context():
        warnings.simplefilter("ignore")  # no backward pass comes
        forward()
        return kept_memory(forward, device)


def measure(width: int, size: int, batch: int, device: str) -> dict[str, dict[str, int | None]]:
    """Return the bytes by case and way; None where a forward pass fails."""
    found: dict[str, dict[str, int | None]] = {}
    for name, case in CASES.items():
        row = found[name] = {}
        for way in WAYS:
            try:
                row[way] = kept(case, way, width, size, batch, device)
            except RuntimeError:
                row[way] = None
    return found


def table(found: dict[str, dict[str, int | None]]) -> str:
    """Return a table in reStructuredText, in MB."""
    cells = [["MB alive after the forward", *WAYS]]
    for name, row in found.items():
        cells.append([name, *("-" if n is None else f"{n / 1e6:.2f}" for n in row.values())])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = "  ".join("=" * n for n in widths)
    lines = ["  ".join(c.ljust(n) for c, n in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table; store it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kept", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a narrow network and small images")
    parser.add_argument(
        "--output", type=Path, help="JSON; by default benchmarks/results/kept-DEVICE.json"
    )
    given = parser.parse_args(arguments)
    width, size, batch = (8, 32, 2) if given.quick else (64, 224, 8)
    found = measure(width, size, batch, given.device)
    print(table(found))
    about = f"ResNet-18 of width {width}, batch {batch}, 3x{size}x{size}, cross-entropy"
    result = {"about": about, "machine": machine(given.device), "bytes": found}
    kind = torch.device(given.device).type
    path = given.output or Path(__file__).parent / "results" / f"kept-{kind}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
