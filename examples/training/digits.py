"""Scikit-learn's 1797 digit images, 8 x 8, split into training and validation data by a seed."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from examples.training.data import Batch, Data

TRAINING = 1200


@dataclass(frozen=True)
class Images(Data):
    """Images ``[N, 1, 8, 8]`` with values in [-1, 1], and their classes ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Batch:
        return Batch((self.images[index],), self.labels[index])


def digits(seed: int) -> tuple[Images, Images]:
    """Return training and validation data."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = order[:TRAINING], order[TRAINING:]
    return Images(images[first], labels[first]), Images(images[second], labels[second])
