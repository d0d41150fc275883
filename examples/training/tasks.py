"""The four tasks."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from examples.digits_models import ConvNet, ViT
from examples.training.data import Data
from examples.training.digits import digits
from examples.training.molecules import GraphNet, molecules
from examples.training.text import GPT, library


@dataclass(frozen=True)
class Task:
    """A network to train.

    Attributes:
        title: For headings.
        network: Makes a network; it maps a batch's inputs to logits ``[N, classes]`` or ``[N T, classes]``.
        data: Makes training and validation data from a seed.
        batch: Data per step.
        steps: Default number of steps.
        approx: KFAC's treatment of shared weights, ``"expand"`` or ``"reduce"``: reduce where one
            prediction is made of all positions, expand where each position makes its own.
    """

    title: str
    network: Callable[[], nn.Module]
    data: Callable[[int], tuple[Data, Data]]
    batch: int
    steps: int
    approx: str


TASKS = {
    "cnn": Task("Convolutional network on digits", ConvNet, digits, 64, 300, "reduce"),
    "vit": Task("ViT on digits", ViT, digits, 64, 400, "reduce"),
    "gpt": Task("Character GPT on the standard library", GPT, library, 16, 400, "expand"),
    "graph": Task("Graph network on molecules", GraphNet, molecules, 64, 400, "reduce"),
}
