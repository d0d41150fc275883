"""Where the data are in a tensor that no module tells about."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from backpack_ext.sharing import Segments


class Reading(NamedTuple):
    """Where the data are in a tensor: along ``axis``, of size k N, as ``[N, k]`` or as ``[k, N]``.

    Or along an axis of ragged rows, by the ``segment``-th segments of the `sharing` block, which for the
    present batch are ``rows``.
    """

    axis: int
    first: bool
    segment: int | None = None
    rows: Segments | None = None

    def owner(self, size: int, N: int, device: torch.device) -> Tensor:
        """Return the datum of each position along the axis."""
        if self.rows is not None:
            return self.rows.owner.to(device)
        position = torch.arange(size, device=device)
        return position // (size // N) if self.first else position % N

    def split(self, t: Tensor, N: int, lead: int = 0) -> Tensor:
        """Bring ``[*lead, *rows, f]`` to ``[*lead, N, S, f]``; ``lead`` axes stand before the rows."""
        axis = lead + self.axis
        if self.rows is not None:
            t = self.rows.pad(t, axis).movedim(axis, lead)
        else:
            t = t.unflatten(axis, (N, -1) if self.first else (-1, N))
            t = t.movedim(axis if self.first else axis + 1, lead)
        return t.flatten(lead + 1, -2)
