"""Data that come in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backpack_ext import sharing


@dataclass(frozen=True)
class Batch:
    """Some data.

    Attributes:
        inputs: Arguments of the network.
        target: Classes ``[N]``, or ``[N T]`` for sequences.
        segments: The datum of each row of the network's layers, if its rows are ragged: one tensor
            ``[R]`` per kind of rows.
    """

    inputs: tuple[Any, ...]
    target: Tensor
    segments: list[Tensor] | None = None

    def to(self, dtype: torch.dtype) -> Batch:
        """Return the batch with floating-point inputs of a data type."""
        inputs = (
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in self.inputs
        )
        return replace(self, inputs=tuple(inputs))

    def sharing(self) -> AbstractContextManager:
        """Return the block in which a forward pass knows whose the rows are.

        The graph network's readout is a sum over nodes, and so is KFAC-reduce's.
        """
        if self.segments is None:
            return nullcontext()
        return sharing(segments=self.segments, num_data=len(self.target), normalize="sum")


def is_floating(x: Any) -> bool:
    """Whether something is a floating-point tensor."""
    return isinstance(x, Tensor) and x.is_floating_point()


class Data(ABC):
    """A data set. Floating-point inputs are float32."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of data."""

    @abstractmethod
    def __getitem__(self, index: Tensor) -> Batch:
        """Return the data with the numbers ``index``, ``[N]``."""

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Yield batches without end; each pass has its own order, and drops what is left over."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self), generator=generator)
            for start in range(0, len(self) - size + 1, size):
                yield self[order[start : start + size]]
