"""Where the data are in a tensor that no module tells about."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """Where the data are in a tensor: along ``axis``, of size k N, as ``[N, k]`` or as ``[k, N]``."""

    axis: int
    first: bool

    def owner(self, size: int, N: int, device: torch.device) -> Tensor:
        """Return the datum of each position along the axis."""
        position = torch.arange(size, device=device)
        return position // (size // N) if self.first else position % N

    def split(self, t: Tensor, N: int, lead: int = 0) -> Tensor:
        """Bring ``[*lead, *rows, f]`` to ``[*lead, N, S, f]``; ``lead`` axes stand before the rows."""
        axis = lead + self.axis
        t = t.unflatten(axis, (N, -1) if self.first else (-1, N))
        t = t.movedim(axis if self.first else axis + 1, lead)
        return t.flatten(lead + 1, -2)
