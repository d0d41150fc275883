"""Where the data are in the input of a loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backpack_ext.errors import UnsupportedError

if TYPE_CHECKING:
    from backpack_ext.sharing import Segments


class Layout:
    """How the data are laid out in the logits.

    Args:
        shape: Shape of the logits.
        batch: Number of data N. The leading size is N, or ``k N``, read as ``[N, k]``.
        batch_axis: 0; or 1 for rows that are to be read as ``[k, N]`` (sequence-first).
        class_axis: Axis of the classes, or None when every element is a term.
        segments: The datum of each of the leading rows, where these are ragged. T is then the
            largest number of positions of a datum; the others' missing positions hold zeros.

    Raises:
        UnsupportedError: If the data cannot be found.
    """

    def __init__(
        self,
        shape: torch.Size,
        batch: int,
        batch_axis: int,
        class_axis: int | None,
        segments: Segments | None = None,
    ):
        if not shape or (segments is None and shape[0] % batch):
            raise UnsupportedError(
                f"The loss's input has shape {tuple(shape)}; its leading size is no multiple of the "
                f"batch size {batch} of the model's input, so its rows cannot be told apart by "
                "datum. Keep the data on the leading axis, e.g. logits.view(N * T, C)."
            )
        self.shape, self.batch, self.batch_axis = shape, batch, batch_axis
        self.class_axis, self.segments = class_axis, segments

    def of_terms(self, shape: torch.Size) -> Layout:
        """Return the layout of a tensor without the class axis."""
        return Layout(shape, self.batch, self.batch_axis, None, self.segments)

    @property
    def _rows(self) -> int:
        """The number of (padded) rows of a datum."""
        return self.shape[0] // self.batch if self.segments is None else self.segments.width

    def split(self, t: Tensor) -> Tensor:
        """Bring ``[v, *shape]`` to ``[v, N, T, C]`` (C = 1 without classes)."""
        t = self._lead(t)
        if self.class_axis is None:
            return t.flatten(2).unsqueeze(-1)
        t = t.movedim(2 + self.class_axis, -1)
        return t.flatten(2, -2)

    def join(self, t: Tensor) -> Tensor:
        """Bring ``[v, N, T, C]`` back to ``[v, *shape]``."""
        v, k = t.shape[0], self._rows
        rest = list(self.shape[1:])
        if self.class_axis is not None:
            classes = rest.pop(self.class_axis - 1)
            t = t.reshape(v, self.batch, k, *rest, classes).movedim(-1, 2 + self.class_axis)
        else:
            t = t.reshape(v, self.batch, k, *rest)
        if self.segments is not None:
            return self.segments.unpad(t, 1)
        if self.batch_axis == 1:
            t = t.transpose(1, 2)
        return t.reshape(v, *self.shape)

    def halves(self, t: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield halves of the data, so that each pair is told apart once.

        Args:
            t: ``[*shape]``.

        Yields:
            Which data are chosen, ``[N]``, and ``t`` with the others' entries zeroed.
        """
        parts = self.split(t.unsqueeze(0))
        data = torch.arange(self.batch, device=t.device)
        for bit in range((self.batch - 1).bit_length()):
            for value in (0, 1):
                chosen = (data >> bit) % 2 == value
                yield chosen, self.join(parts * chosen[:, None, None])[0]

    def _lead(self, t: Tensor) -> Tensor:
        if self.segments is not None:
            return self.segments.pad(t, 1)
        k = self._rows
        if self.batch_axis == 1:
            return t.unflatten(1, (k, self.batch)).transpose(1, 2)
        return t.unflatten(1, (self.batch, k))


def probing_vector(like: Tensor) -> Tensor:
    """Return a vector of varied entries, none of them zero, to send through a graph."""
    pattern = torch.arange(like.numel(), device=like.device).reshape(like.shape)
    return ((pattern % 7 + 1) * (1 - pattern % 2 * 2)).to(like.dtype)
