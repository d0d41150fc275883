"""Which layers have matrices, in which buckets, and which process refreshes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim.bucket import Bucket, Slot
from optim.labels import labels
from optim.layers import Layer, Layers
from optim.placement import Alone, Group
from optim.structure import DIAGONAL, Structure

if TYPE_CHECKING:
    from optim.natural import NaturalGradient

# What `state[p]["kind"]` says: who trains the parameter.
FALLBACK, WEIGHT, JOINED, REFUSED = 0, 1, 2, 3


class Buckets:
    """The buckets of an optimizer's layers, made anew when layers, groups or the state change.

    Layers have matrices from the moment on that a gradient or statistics reach them.

    Args:
        optimizer: The optimizer, whose state has the matrices' tensors.
        layers: The layers that it knows of.
        placement: The processes.

    Attributes:
        of: The bucket of each layer that has matrices.
        active: The layers that have, or are to have, matrices.
        group_of: The parameter group of each parameter.
    """

    def __init__(self, optimizer: NaturalGradient, layers: Layers, placement: Alone | Group):
        self.optimizer, self.layers, self.placement = optimizer, layers, placement
        self.name = type(optimizer).__name__
        self.of: dict[Layer, Bucket] = {}
        self.active: dict[Layer, None] = {}
        self.group_of: dict[Tensor, dict] = {}
        self.version = -1  # of the layers that buckets were made for

    def outdate(self) -> None:
        """Have the buckets made anew before they are used again."""
        self.version = -1

    def group(self, bucket: Bucket) -> dict:
        """Return the parameter group of a bucket's weights."""
        return self.group_of[bucket.layers[0].weight]

    def activate(self, layers: Iterable[Layer]) -> None:
        """Have matrices for layers from now on."""
        for layer in layers:
            if layer not in self.active:
                self.active[layer] = None
                self.outdate()
        self.make()

    def make(self) -> None:
        """Stack the matrices of active layers, unless that was done already."""
        if self.version == self.layers.version and not self._has_moved():
            return
        self.group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        known = set(self.layers)
        for layer in list(self.active):
            if layer not in known:  # it has changed, or has been refused
                del self.active[layer]
                for p in layer.parameters:
                    owner = self.layers.owner(p)
                    if owner is None or owner.form != layer.form:
                        self.optimizer.state[p].clear()
        for layer in known - self.active.keys():
            if self.optimizer.state.get(layer.weight):  # loaded, or trained by the fallback before
                self._adopt(layer)
        together: dict[tuple, list[Layer]] = {}
        numbers = {id(group): k for k, group in enumerate(self.optimizer.param_groups)}
        ordered = [self.layers.of_weight(p) for p in self.group_of]  # always the same order
        ordered = [layer for layer in ordered if layer in self.active]
        owners = self._owners(ordered)
        for p in (p for layer in ordered for p in layer.parameters):
            if self.optimizer.state.get(p, {}).get("kind") == FALLBACK:  # it has no layer any more
                self.optimizer.state[p].clear()
        for layer in ordered:
            p = layer.weight
            key = (numbers[id(self.group_of[p])], layer.form, self.sides_of(layer))
            together.setdefault((*key, p.dtype, p.device, owners[layer]), []).append(layer)
        self.of = {}
        called = labels(self.optimizer.param_groups)
        for (_, form, structures, *_, owner), layers in together.items():
            group = self.group_of[layers[0].weight]
            states = [self.optimizer.state[layer.weight] for layer in layers]
            names = [called[layer.weight] for layer in layers]
            slots = self.kept(self.optimizer.slots(group, structures), self.placement.keeps(owner))
            bucket = Bucket(layers, form, slots, states, self.dtype_of(layers[0]), names, owner)
            for layer, state in zip(layers, states, strict=True):
                state["kind"] = WEIGHT
                for key, number in self.optimizer.numbers.items():
                    state.setdefault(key, number)
                if self.placement.size == 1:
                    state.pop("owner", None)  # of a state that several processes saved
                self.of[layer] = bucket
            bucket.choice = self.optimizer.choice(group)
        self.version = self.layers.version

    def _has_moved(self) -> bool:
        """Whether parameters have another device or data type, or need other matrices, than before."""
        return any(
            layer.weight.device != bucket.device
            or self.dtype_of(layer) != bucket.dtype
            or self.optimizer.choice(self.group(bucket)) != bucket.choice
            for layer, bucket in self.of.items()
        )

    def _owners(self, layers: list[Layer]) -> dict[Layer, int]:
        """Return which process refreshes each layer; that does not change any more.

        Raises:
            ValueError: If a loaded state was saved by more processes.
        """
        if self.placement.size == 1:
            return dict.fromkeys(layers, 0)
        costs, owners = {}, {}
        for layer in layers:
            group = self.group_of[layer.weight]
            sides = zip((layer.form.columns, layer.form.rows), self.sides_of(layer), strict=True)
            costs[layer] = layer.form.groups * sum(
                dim * sum(map(prod, structure.cls.shapes(dim, **dict(structure.options))))
                for dim, structure in sides
            )
            state = self.optimizer.state.get(layer.weight, {})
            if "owner" in state:
                owners[layer] = state["owner"]
                if owners[layer] >= self.placement.size:
                    raise ValueError(
                        f"{self.name}: the state of parameter "
                        f"{labels([group])[layer.weight]} belongs to process {owners[layer]}, but there "
                        f"are {self.placement.size}. Load it with as many processes as saved it, or "
                        "with one."
                    )
        found = self.placement.assign(costs, owners)
        for layer, owner in found.items():
            self.optimizer.state[layer.weight]["owner"] = owner
        return found

    def _adopt(self, layer: Layer) -> None:
        """Take a layer whose parameters have a state already."""
        kind = self.optimizer.state[layer.weight].get("kind", FALLBACK)
        if kind == FALLBACK:
            for p in layer.parameters:
                self.optimizer.state[p].clear()
        else:
            self.active[layer] = None

    def sort(self, layers: Mapping[Layer, Any]) -> list[tuple[Bucket, dict[Layer, Any]]]:
        """Sort layers, and what belongs to them, by bucket; in the bucket's order."""
        found: dict[int, tuple[Bucket, dict[Layer, Any]]] = {}
        for layer in layers:
            bucket = self.of[layer]
            found.setdefault(id(bucket), (bucket, {}))
        for bucket, members in found.values():
            members.update((layer, layers[layer]) for layer in bucket.layers if layer in layers)
        return list(found.values())

    def sides_of(self, layer: Layer) -> tuple[Structure, Structure]:
        """Return the structures of a layer's two sides; an embedding's inputs have a diagonal."""
        group = self.group_of.get(layer.weight)
        if group is None:
            self.group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}
            group = self.group_of[layer.weight]
        first, second = self.optimizer.sides_of_group(group)
        return (DIAGONAL if layer.form.one_hot else first), second

    def dtype_of(self, layer: Layer) -> torch.dtype:
        """Return the data type of a layer's matrices."""
        return self.optimizer.factor_dtype or torch.promote_types(layer.weight.dtype, torch.float32)

    def kept(self, slots: Mapping[str, Slot], everything: bool) -> dict[str, Slot]:
        """Return the matrices that a process keeps: all, or what its moments are projected with."""
        if everything:
            return dict(slots)
        return {name: slots[name] for name in slots if name in self.optimizer.coordinates.values()}
