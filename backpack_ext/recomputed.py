"""Factors that are too large to be kept: each product runs the backward pass again, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isclose

import torch
from torch import Tensor, nn

from backpack_ext.context import backpack
from backpack_ext.errors import RecordingError
from backpack_ext.extension import Vectors
from backpack_ext.factor_extension import FactorExtension, Selection
from curvature.factor import Factor, totals


class LowRankGGNPart(FactorExtension):
    """Keeps the factors of some of the data of one pass, and its mark.

    Args:
        vectors: Which vectors.
        scaled: Whether the gradient's outer products are to carry r c once (empirical Fisher).
        selection: The data, and the factor of their vectors.
        max_columns: As for the extension that asks.
    """

    def __init__(self, vectors: Vectors, scaled: bool, selection: Selection, max_columns: int):
        super().__init__("_part", unsupported="skip")
        self.vectors, self.scaled, self.max_columns = vectors, scaled, max_columns
        self._selection = selection
        self.found, self.mark = None, 0.0

    marked = True

    @property
    def needs_scale(self) -> bool:
        """The gradient of a loss carries r c; outer products of it are to carry it once."""
        return self.scaled

    def selection(self, batch: int) -> Selection:
        """Return what was asked for."""
        return self._selection

    def finish(self, store: dict) -> list:
        """Keep the store; nothing lands on parameters."""
        self.found, self.mark = store.get("columns"), store.get("marks", {}).get("columns", 0.0)
        return []


@dataclass(eq=False)
class Recomputation:
    """How to have a factor again, some data at a time.

    Args:
        closure: Returns the loss of the mini-batch.
        vectors: Which vectors are the columns.
        scaled: See `LowRankGGNPart`.
        data: The data whose columns there are, ``[n]``.
        scale: The factor of the vectors.
        slots: Number of columns per datum.
        chunk: How many data at a time.
        parameters: All parameters that vectors arrive at.
        random: State of the random generator before the first pass; None if nothing is random.
        max_columns: See `LowRankGGNPart`.
        like: A tensor of the factors' data type and device.
        mark: What a pass over the same data is recognised by.
        versions: The parameters' versions in the first pass.
    """

    closure: Callable[[], Tensor]
    vectors: Vectors
    scaled: bool
    data: Tensor
    scale: float
    slots: int
    chunk: int
    parameters: Sequence[nn.Parameter]
    random: Tensor | None
    max_columns: int
    like: Tensor
    mark: float
    versions: Sequence[int]

    def chunks(self) -> Iterator[Tensor]:
        """Yield the places, among the data, of each part."""
        yield from torch.arange(len(self.data)).split(self.chunk)

    def run(self, places: Tensor, parameters: Sequence[nn.Parameter]) -> Factor:
        """Return the factor of some data's columns over some parameters.

        Raises:
            RecordingError: If the closure computes something else than the first pass, or parameters
                changed since.
        """
        if [p._version for p in self.parameters] != list(self.versions):
            raise RecordingError(
                "LowRankGGN: parameters were changed in place since the backward pass, so that the "
                "closure would compute another curvature. Ask before optimizer.step(), or raise "
                "max_memory so that nothing has to be recomputed."
            )
        part = LowRankGGNPart(
            self.vectors, self.scaled, (self.data[places], self.scale), self.max_columns
        )
        if self.random is not None:
            part._generator = torch.Generator(self.like.device)
            part._generator.set_state(self.random)
        with torch.enable_grad(), backpack(part):
            loss = self.closure()
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise RecordingError(
                    "LowRankGGN: the closure must return the loss of the mini-batch, a scalar that "
                    f"requires a gradient, without calling backward; it returned {loss!r:.80}."
                )
            torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if part.found is None:
            raise RecordingError("LowRankGGN: the closure's loss reaches no layer of the model.")
        if not isclose(part.mark, self.mark, rel_tol=1e-6):
            raise RecordingError(
                "LowRankGGN: the closure computed something else than the backward pass did (its "
                f"inputs and vectors add up to {part.mark:.9g}, not to {self.mark:.9g}). It must "
                "compute the same loss of the same data with the same parameters: no dropout, no next "
                "mini-batch, no optimizer step in between."
            )
        return part.found.factor(parameters)


class RecomputedFactor(Factor):
    """A factor V that is formed again for each product, some data at a time.

    Args:
        recomputation: How.
        parameters: The parameters that it is over.
        scale: A factor of its columns.
        like: A tensor of its data type and device; those of the layers' factors by default.
    """

    __slots__ = ("like", "parameters", "recomputation", "scale")

    def __init__(
        self,
        recomputation: Recomputation,
        parameters: Sequence[nn.Parameter],
        scale: float = 1.0,
        like: Tensor | None = None,
    ):
        self.recomputation, self.parameters, self.scale = recomputation, tuple(parameters), scale
        self.like = recomputation.like if like is None else like

    def _parts(self) -> Iterator[tuple[Tensor, Factor]]:
        """Yield the columns of each part, and their factor."""
        again = self.recomputation
        slots = torch.arange(again.slots)[:, None] * len(again.data)
        for places in again.chunks():
            part = again.run(places, self.parameters)
            if part.dtype != self.like.dtype:
                part = part.to(dtype=self.like.dtype)
            yield (slots + places).flatten(), part if self.scale == 1 else part.scaled(self.scale)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the parameters."""
        return tuple(p.shape for p in self.parameters)

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.recomputation.slots * len(self.recomputation.data)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """A tensor without entries: nothing is held."""
        return (self.like,)

    def _own_gram(self) -> Tensor:
        out = self._zeros(self.columns, self.columns)
        for k, (here, part) in enumerate(self._parts()):
            out[here[:, None], here] = part.gram()
            for there, other in islice(self._parts(), k):
                block = part.gram(other)
                out[here[:, None], there] = block
                out[there[:, None], here] = block.mT
        return out

    def _gram_with(self, other: Factor) -> Tensor:
        out = self._zeros(self.columns, other.columns)
        for here, part in self._parts():
            out[here] = part.gram(other)
        return out

    def _gram_from(self, one: Factor) -> Tensor | None:
        if isinstance(one, RecomputedFactor):
            return None  # its parts, not these, are to be the outer loop: they are the dearer ones
        out = self._zeros(one.columns, self.columns)
        for here, part in self._parts():
            out[:, here] = one.gram(part)
        return out

    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Return ``V c``; see `Factor.apply`."""
        return totals(part.apply(coefficients[:, here]) for here, part in self._parts())

    def project(self, *vectors: Tensor) -> Tensor:
        """Return ``V^T w``; see `Factor.project`."""
        out = self._zeros(len(vectors[0]), self.columns)
        for here, part in self._parts():
            out[:, here] = part.project(*vectors)
        return out

    def square_sum(self) -> tuple[Tensor, ...]:
        """Return the diagonal of ``V V^T``."""
        return totals(part.square_sum() for _, part in self._parts())

    def select(self, index: Tensor) -> Factor:
        """Return the factor of some columns, which it keeps."""
        return self.formed(index)

    def scaled(self, scale: float) -> Factor:
        """Return a multiple of the factor."""
        scale = self.scale * scale
        return RecomputedFactor(self.recomputation, self.parameters, scale, self.like)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """Return the factor itself: it holds no tensors."""
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factor:
        """Return the factor with its products in another data type.

        Raises:
            TypeError: If it is to be on another device than the model.
        """
        if device is not None and torch.device(device).type != self.device.type:
            raise TypeError(
                f"The factor is recomputed by the model, on {self.device}, and cannot be had on "
                f"{device}. Move the results, or raise max_memory so that the factor is kept."
            )
        like = self.like if dtype is None else self.like.to(dtype)
        return RecomputedFactor(self.recomputation, self.parameters, self.scale, like)

    def _zeros(self, *shape: int) -> Tensor:
        return self.like.new_zeros(shape)
