"""What a store of one process adds to that of all processes: tensors and counts that add up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """A tensor that adds up over processes.

    Attributes:
        tensor: What this process has.
        power: The sum is that of ``tensor * weight**power``, where ``weight`` times the loss of this
            process is its part of the total loss.
        times: A further factor: the number of rows that a mean was taken over.
    """

    tensor: Tensor
    power: int = 0
    times: float = 1.0


@dataclass(eq=False)
class Share:
    """What one entry of a store adds to that of the whole batch, or its sum over all processes.

    Attributes:
        key: What tells entries apart, the same on all processes: names, not ids.
        parameters: Names of the parameters that it belongs to, by role.
        frame: What else it takes to build the entry where there is none; it has a repr, can be
            pickled, and holds no tensor.
        parts: Tensors by name.
        counts: Numbers that add up, by name.
    """

    key: tuple
    parameters: dict[str, str]
    frame: Any = None
    parts: dict[str, Part] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def outline(self) -> Outline:
        """Return what processes compare."""
        return Outline(
            self.key,
            tuple(self.parameters.items()),
            self.frame,
            tuple((name, tuple(p.tensor.shape), p.tensor.dtype) for name, p in self.parts.items()),
            tuple(self.counts),
        )


class Outline(NamedTuple):
    """A `Share` without its values."""

    key: tuple
    parameters: tuple[tuple[str, str], ...]
    frame: Any
    parts: tuple[tuple[str, tuple[int, ...], Any], ...]
    counts: tuple[str, ...]
