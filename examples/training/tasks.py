"""The four tasks."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from examples.digits_models import ConvNet, ViT
from examples.training.data import Data
from examples.training.digits import digits
from examples.training.molecules import GraphNet, molecules
from examples.training.text import GPT, LENGTH, library


@dataclass(frozen=True)
class Task:
    """A network to train.

    Attributes:
        title: For headings.
        network: Makes a network, from a batch's inputs to logits ``[N, classes]`` or ``[N T, classes]``.
        data: Makes training and validation data from a seed.
        batch: Data per step.
        terms: Terms of the mean loss per step; more than data where each position is predicted.
        steps: Default number of steps.
        approx: KFAC's treatment of shared weights, ``"expand"`` or ``"reduce"``: reduce where one
            prediction is made of all positions, expand where each position makes its own.
    """

    title: str
    network: Callable[[], nn.Module]
    data: Callable[[int], tuple[Data, Data]]
    batch: int
    terms: int
    steps: int
    approx: str


TASKS = {
    "cnn": Task("Convolutional network on digits", ConvNet, digits, 64, 64, 300, "reduce"),
    "vit": Task("ViT on digits", ViT, digits, 64, 64, 400, "reduce"),
    "gpt": Task("Character GPT on the standard library", GPT, library, 16, 16 * LENGTH, 400, "expand"),
    "graph": Task("Graph network on molecules", GraphNet, molecules, 64, 64, 400, "reduce"),
}
