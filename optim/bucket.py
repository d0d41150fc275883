"""The factors of layers of one shape, stacked: one kernel serves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature import StructuredMatrix
from optim.layers import Form, Layer
from optim.structure import Structure

# Entries of a weight below which layers of one shape are treated together where they need not be.
SMALL = 2**15


class Slot(NamedTuple):
    """A kind of matrix that belongs to each layer.

    Attributes:
        side: ``"A"`` for ``[i,i]``, ``"B"`` for ``[o,o]``.
        structure: Its structure.
        identity: Whether it starts as the identity, instead of at zero.
    """

    side: str
    structure: Structure
    identity: bool = False


class Bucket:
    """Layers of one shape in one parameter group, with their matrices as ``[(L g), d, d]``.

    A single matrix has no leading axis: plain products are faster than batched ones. The tensors in the
    optimizer's state, ``[g, ...]`` per layer, are views of those here.

    Args:
        layers: The layers L.
        form: The form of each.
        slots: What matrices there are, by name.
        states: The layers' entries in the optimizer's state: what they have is taken over, what they
            have not begins, and all are filled with views.
        dtype: Data type of the matrices.
        labels: What to call the layers' weights in messages.
        owner: Rank of the process that refreshes them.

    Raises:
        ValueError: If a state has some of a matrix's tensors, but not all, or of another shape.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        form: Form,
        slots: Mapping[str, Slot],
        states: Sequence[dict[str, Any]],
        dtype: torch.dtype,
        labels: Sequence[str],
        owner: int,
    ):
        self.layers, self.form, self.slots = list(layers), form, dict(slots)
        self.index = {layer: k for k, layer in enumerate(self.layers)}
        self.dtype, self.device, self.owner = dtype, layers[0].weight.device, owner
        self.matrices: dict[str, StructuredMatrix] = {}
        self.choice: Any = None  # what the optimizer's slots depended on
        self.cache: dict[str, Any] = {}  # what follows from the matrices, made anew when they change
        count = len(self.layers) * form.groups
        like = torch.empty(0, dtype=dtype, device=self.device)
        # one that others have a part of has to be complete here
        whole = ["owner" in state and any("." in key for key in state) for state in states]
        for state in states:  # what others are to keep, or options ask for no more
            for key in [key for key in state if "." in key and key.partition(".")[0] not in self.slots]:
                del state[key]
        for name, slot in self.slots.items():
            matrix = slot.structure.zeros(self.dim(slot.side), (count,), like)
            if slot.identity:
                matrix.add_identity_()
            for k, (state, label, known) in enumerate(zip(states, labels, whole, strict=True)):
                views = [t[k * form.groups : (k + 1) * form.groups] for t in matrix.tensors]
                _take_over(state, name, views, label, known)
            self.matrices[name] = _plain(matrix) if count == 1 else matrix

    def dim(self, side: str) -> int:
        """Return the dimension of a side's matrices."""
        return self.form.columns if side == "A" else self.form.rows

    @property
    def is_small(self) -> bool:
        """Whether layers are several and so small that a kernel for each would cost most of the time."""
        return not self.single and self.form.rows * self.form.columns < SMALL

    @property
    def single(self) -> bool:
        """Whether there is a single matrix, which has no leading axis."""
        return len(self.layers) * self.form.groups == 1

    def empty(self) -> Tensor:
        """Return room for matrices shaped like the layers' weights, ``[(L g),o,i]``."""
        count = len(self.layers) * self.form.groups
        shape = (self.form.rows, self.form.columns)
        return torch.empty(
            shape if self.single else (count, *shape), dtype=self.dtype, device=self.device
        )

    def rows_of(self, layers: Sequence[Layer]) -> Tensor | None:
        """Return the places of some layers' matrices in the stack; None for all."""
        if len(layers) == len(self.layers):
            return None
        g = self.form.groups
        places = [self.index[layer] * g + k for layer in layers for k in range(g)]
        return torch.tensor(places, device=self.device)

    def get(self, name: str, rows: Tensor | None) -> StructuredMatrix:
        """Return matrices, of some layers only if ``rows`` says so (a copy then)."""
        M = self.matrices[name]
        return M if rows is None else M.like(t[rows] for t in M.tensors)

    def put(self, name: str, M: StructuredMatrix, rows: Tensor | None, write) -> None:
        """Write matrices back with ``write(target, source)``."""
        for target, source in zip(self.matrices[name].tensors, M.tensors, strict=True):
            if rows is None:
                write(target, source)
            else:
                new = target[rows]
                write(new, source)
                target[rows] = new
        self.cache.clear()

    def of_layer(self, name: str, layer: Layer) -> StructuredMatrix:
        """Return a view of a layer's matrices, ``[g,d,d]``."""
        M, g, k = self.matrices[name], self.form.groups, self.index[layer]
        if self.single:
            return M.like(t.unsqueeze(0) for t in M.tensors)
        return M.like(t[k * g : (k + 1) * g] for t in M.tensors)

    def stacked(self, matrices: Sequence[StructuredMatrix]) -> StructuredMatrix:
        """Stack matrices ``[g,d,d]`` of layers, in the form of those here."""
        first = matrices[0]
        if self.single:
            return _plain(first)
        if len(matrices) == 1:
            return first
        return first.like(torch.cat(ts) for ts in zip(*(m.tensors for m in matrices), strict=True))


def _plain(matrix: StructuredMatrix) -> StructuredMatrix:
    """Return a stack of one without its axis."""
    return matrix.like(t.squeeze(0) for t in matrix.tensors)


def _take_over(
    state: dict[str, Any], name: str, views: list[Tensor], label: str, complete: bool
) -> None:
    """Fill views from a state where it has their values, and put them into it.

    If it is to be complete it must have them.
    """
    keys = [f"{name}.{j}" for j in range(len(views))]
    known = [key for key in state if key.startswith(f"{name}.")]
    if known:
        shapes = [tuple(view.shape) for view in views]
        found = [tuple(state[key].shape) for key in known]
        if set(known) != set(keys) or [tuple(state[key].shape) for key in keys] != shapes:
            raise ValueError(
                f"The state of parameter {label} has {name} in tensors of shapes {found}; expected "
                f"{shapes}. Was it saved with another structure, or for another model?"
            )
        for key, view in zip(keys, views, strict=True):
            view.copy_(state[key])
    elif complete:
        raise ValueError(
            f"The state of parameter {label} has no {name}. Was it saved by another process, with "
            'placement="memory"? Each process saves, and loads, a state of its own then.'
        )
    state.update(zip(keys, views, strict=True))
