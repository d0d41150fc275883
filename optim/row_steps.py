"""Steps by gradients that are products of rows: which layers', whether they still are, and what follows.

See `optim.rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.bucket import Bucket
from optim.buckets import Buckets
from optim.costs import rows_are_less
from optim.directions import Direction, Product
from optim.layers import Layer, Layers
from optim.matching import Match, probe, scales_of
from optim.placement import Alone, Group
from optim.rows import Rows
from optim.sharded import is_sharded
from optim.structure import DIAGONAL

PRECONDITION = ("auto", "gradient", "rows")

# Rows b and a, and the s of a gradient s b^T a.
Factors = tuple[Tensor, Tensor, float]


class RowSteps:
    """What optimizers with Kronecker factors do about rows: a part of `NaturalGradient`.

    Subclasses say how their matrices act on rows (`_precondition_rows`), and whether they do
    (`_takes_rows`).
    """

    param_groups: list[dict[str, Any]]
    precondition: str
    placement: Alone | Group
    _buckets: Buckets
    _layers: Layers

    def _precondition_rows(
        self, bucket: Bucket, group: dict, b: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return rows whose product is the preconditioned product ``b^T a``, where `_takes_rows`.

        Args:
            bucket: The bucket.
            group: Its layers' parameter group.
            b: ``[(L g), r, o]``, without the axis for a single one.
            a: ``[(L g), r, i]``, likewise.
        """
        raise NotImplementedError

    def _takes_rows(self, group: dict) -> bool:
        """Whether `_precondition` multiplies from the left and from the right, and no more."""
        return True

    def _may_have_rows(self) -> bool:
        """Whether some layers' gradients may be preconditioned as rows."""
        if self.precondition == "gradient" or self.placement.size > 1:
            return False
        for group in self.param_groups:
            sides = self.sides_of_group(group)
            if sides is None or not self._takes_rows(group):
                continue
            if self.precondition == "rows" or sides != (DIAGONAL, DIAGONAL):
                return True
        return False

    def wants_rows(self, layer: Layer, count: int) -> bool:
        """Return whether to precondition a layer's gradient as the product of so many rows."""
        K, C = self._buckets.sides_of(layer)
        group = self._buckets.group_of[layer.weight]
        if not self._takes_rows(group) or any(map(is_sharded, layer.parameters)):
            return False
        if self.precondition == "rows":
            return True
        if K == C == DIAGONAL:
            return False
        g, o, i = layer.form.groups, layer.form.rows, layer.form.columns
        return rows_are_less(K, C, g, o, i, count)

    def layer_of(self, weight: Tensor) -> Layer | None:
        """Return the layer of a weight, if it has one."""
        return self._layers.of_weight(weight)

    def rows_dtype(self, layer: Layer) -> torch.dtype:
        """Return the data type in which rows are kept, and checked: the weight's, or the factors'."""
        return torch.promote_types(self._buckets.dtype_of(layer), layer.weight.dtype)

    def _checked(self, kept: Mapping[Tensor, Rows]) -> tuple[dict[Layer, Factors], int]:
        """Return rows b and a, and a factor, of the layers whose gradients are these products.

        Also how many others there are. What is not finite is no product.
        """
        kept = {
            rows.layer: rows
            for weight, rows in kept.items()
            if self._layers.of_weight(weight) is rows.layer and weight.grad is not None
        }
        if not kept:
            return {}, 0
        found, matches, probes = {}, [], {}
        longest = max(layer.form.columns for layer in kept)
        for layer, rows in kept.items():
            a, b = rows.inputs(rows.b.dtype), rows.b
            like = b.dtype, b.device
            if like not in probes:
                probes[like] = probe(longest, b, self._clock["step"])
            grads = [self._grad(p) for p in layer.parameters]
            matches.append(Match(rows, grads, a, b, probes[like][:, : layer.form.columns]))
            found[layer] = b, a
        scales = dict(zip(found, scales_of(matches), strict=True))
        right = {layer: (*pair, s) for layer, pair in found.items() if (s := scales[layer]) is not None}
        return right, len(found) - len(right)

    def _multiplied(
        self, bucket: Bucket, products: Sequence[Factors]
    ) -> Iterator[tuple[Tensor | Direction, ...]]:
        """Yield preconditioned gradients from rows, layer by layer, weight and bias apart."""
        b, a = (
            (ts[0] if len(ts) == 1 else torch.cat(ts)).to(bucket.dtype)
            for ts in ([p[k] for p in products] for k in (0, 1))
        )
        if bucket.single:
            b, a = b.squeeze(0), a.squeeze(0)
        b, a = self._precondition_rows(bucket, self._buckets.group(bucket), b, a)
        if bucket.single:
            b, a = b.unsqueeze(0), a.unsqueeze(0)
        g = bucket.form.groups
        for k, (layer, (_, _, scale)) in enumerate(zip(bucket.layers, products, strict=True)):
            left, right, form = b[k * g : (k + 1) * g], a[k * g : (k + 1) * g], layer.form
            if layer.bias is None:
                yield (Product(left, right, scale, form.axes),)
                continue
            column = Product(left, right[..., -1:], scale, form.bias_axes).tensor()
            yield Product(left, right[..., :-1], scale, form.axes), column
