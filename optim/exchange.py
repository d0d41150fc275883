"""What several processes that train one model tell each other at a refresh."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvature import StructuredMatrix
from optim.buckets import Buckets
from optim.labels import labels
from optim.layers import Layer
from optim.placement import Group
from optim.sharded import is_sharded
from optim.statistics import Moments

if TYPE_CHECKING:
    from optim.natural import NaturalGradient


class Exchange:
    """Averages statistics over processes, and spreads what became of them.

    Args:
        optimizer: The optimizer.
        buckets: Its buckets.
        placement: The processes.
    """

    def __init__(self, optimizer: NaturalGradient, buckets: Buckets, placement: Group):
        self.optimizer, self.buckets, self.placement = optimizer, buckets, placement
        self.layers = buckets.layers

    def agree(self, found: dict[Layer, Moments], finite: bool, due: bool) -> bool:
        """Return whether all is finite in all processes, and note what others have reached or refused.

        Gradients are the same in all processes, unless parameters are sharded.

        Args:
            found: What was gathered here; layers that others have reached are added, without moments.
            finite: Whether all is finite here.
            due: Whether something was to be gathered.

        Raises:
            ValueError: If processes read a weight in different ways.
        """
        if not due:
            if not any(map(is_sharded, self.buckets.group_of)):
                return finite
            return self.placement.all(finite, self.optimizer.device)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbers = {p: k for k, p in enumerate(params)}
        known = [
            (numbers[layer.weight], None if layer.bias is None else numbers[layer.bias], layer.form)
            for layer in found
        ]
        refused = [numbers[p] for p in self.layers.refused]
        answers = self.placement.gather((finite, refused, known))
        for number in {k for _, several, _ in answers for k in several}:
            self.layers.refuse(params[number])
        if not all(flag for flag, _, _ in answers):
            return False
        reached: dict[int, tuple] = {}
        for _, _, entries in answers:
            for entry in entries:
                if params[entry[0]] in self.layers.refused:
                    continue
                if reached.setdefault(entry[0], entry) != entry:
                    raise ValueError(
                        f"{self.buckets.name}: processes read the weight of parameter "
                        f"{labels(self.optimizer.param_groups)[params[entry[0]]]} in different ways."
                    )
        own = dict(found)
        found.clear()
        for number in sorted(reached):
            _, bias, form = reached[number]
            weight = params[number]
            layer = self.layers.of_weight(weight)
            if layer is None or layer.form != form:
                layer = self.layers.add(Layer(weight, None if bias is None else params[bias], form))
            found[layer] = own.get(layer) or Moments(layer)
        return True

    def reduced(self, moments: dict[Layer, Moments]) -> dict[Layer, Moments]:
        """Return the moments of all processes together, of the layers that this one refreshes.

        A is the mean over the rows of all, B the mean over processes: that of the mean of their losses.
        For layers of others, what is returned has no meaning.
        """
        sums: dict[Layer, tuple[StructuredMatrix, Tensor, StructuredMatrix]] = {}
        messages: dict[int, list[Tensor]] = {}
        for layer, m in moments.items():
            g = layer.form.groups
            dtype = torch.promote_types(self.buckets.dtype_of(layer), torch.float32)
            like = torch.empty(0, dtype=dtype, device=layer.weight.device)
            first, second = self.buckets.sides_of(layer)
            rows = torch.zeros(g, dtype=dtype, device=like.device) + m.rows
            if m.A is None:
                A = first.zeros(layer.form.columns, (g,), like)
                B = second.zeros(layer.form.rows, (g,), like)
            else:
                A, B = m.A * rows, m.B * (1 / self.placement.size)
            A, B = (M.like(t.contiguous() for t in M.tensors) for M in (A, B))
            sums[layer] = A, rows, B
            owner = self.buckets.of[layer].owner
            messages.setdefault(owner, []).extend((*A.tensors, rows, *B.tensors))
        self.placement.reduce(messages)
        found = {}
        for layer, (A, rows, B) in sums.items():
            found[layer] = m = Moments(layer)
            m.A, m.B, m.rows = A * (1 / rows.clamp(min=1)), B, rows
        return found

    def send_matrices(self, layers: Iterable[Layer]) -> None:
        """Give all processes the matrices that they keep."""
        messages: dict[int, list[Tensor]] = {}
        for layer in layers:
            bucket, state = self.buckets.of[layer], self.optimizer.state[layer.weight]
            kept = self.buckets.kept(bucket.slots, everything=self.placement.keeps(None))
            for name in kept:
                count = len(bucket.matrices[name].tensors)
                messages.setdefault(bucket.owner, []).extend(state[f"{name}.{j}"] for j in range(count))
            bucket.cache.clear()
        self.placement.broadcast(messages)
