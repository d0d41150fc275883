r"""Gradients as products of rows: what the step preconditions where a batch is smaller than a layer.

The gradient of a layer is :math:`G = g^T a`: of the gradients g at its outputs and its inputs a, one row
for each position of each datum. Where rows are few, :math:`C C^T G K K^T = (g C C^T)^T (a K K^T)` costs
a fraction of products with G itself.

Index letters: g matrices of one shape (groups of a layer, layers of one shape), r rows, o outputs,
i inputs.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from backpack_ext import Extension, UnsupportedError
from backpack_ext.extension import Vectors
from backpack_ext.normal import OneHot
from backpack_ext.shards import held
from backpack_ext.unit import Unit
from optim.layers import Layer

if TYPE_CHECKING:
    from optim.natural import NaturalGradient

_numbers = itertools.count()


class Rows(NamedTuple):
    """The rows of one layer's gradient.

    Attributes:
        layer: The layer.
        a: Inputs ``[g,r,i]``, without the column of a joined bias.
        b: Gradients at the outputs, ``[g,r,o]``.
        eps: The precision that the gradient was computed in, the distance from one to the next number.
    """

    layer: Layer
    a: Tensor
    b: Tensor
    eps: float

    def inputs(self, dtype: torch.dtype) -> Tensor:
        """Return the inputs with the column of a joined bias, ``[g,r,i]``; zeros if it is frozen."""
        a = self.a.to(dtype)
        if self.layer.bias is None:
            return a
        column = (a.new_zeros if self.layer.bias.grad is None else a.new_ones)((*a.shape[:2], 1))
        return torch.cat([a, column], dim=2)


class RowKeeper(Extension):
    """Keeps the rows of layers' gradients from a backward pass to the step.

    Which layers is the optimizer's choice. Nothing is left on the parameters. Rows stand for the
    gradients only if one backward pass brought these: after a second one there are none, until `take`
    or `forget` is called. Nor are there any of gradients in less precision than float32, whose rounding
    could hide what was done to them.

    Args:
        source: The optimizer, which has ``wants_rows(layer, count)``.
    """

    vectors = Vectors("gradient")
    needs_independent_samples = False

    def __init__(self, source: NaturalGradient):
        # nothing lands there, but two optimizers in one block need names of their own
        super().__init__(f"{type(source).__name__.lower()}_rows_{next(_numbers)}", "skip")
        self.source = source
        self.passes = 0  # since the last `take` or `forget`
        self._kept: dict[Tensor, Rows] = {}

    def take(self) -> dict[Tensor, Rows]:
        """Return the rows of layers, by weight, and begin anew."""
        found = self._kept
        self.forget()
        return found

    def forget(self) -> None:
        """Begin anew."""
        self.passes, self._kept = 0, {}

    def absorb(self, store: dict, unit: Unit) -> None:
        """Keep the rows of one layer, if the optimizer wants them."""
        site, weight = unit.sites[0], unit.parameters.get("weight")
        if weight is None or unit.rule.elementwise:
            return
        weight = held(weight)
        if weight in store:  # a second use: the rows of one are not all
            store[weight] = None
            return
        layer = self.source.layer_of(weight)
        if layer is None or layer.form.one_hot:
            return
        if site.shared or site.parts or site.sharing is not None or len(unit.sites) > 1:
            store[weight] = None
            return
        count = unit.cotangents[0].numel() // (layer.form.groups * layer.form.rows)
        if not self.source.wants_rows(layer, count) or isinstance(unit.a, OneHot):
            return
        types = site.input().dtype, unit.cotangents[0].dtype, weight.dtype
        eps = precision(types, unit.cotangents[0].device)
        if eps > torch.finfo(torch.float32).eps:  # rounding could hide a change of the gradient
            return
        dtype = self.source.rows_dtype(layer)
        a, b = unit.a.flatten(1, 2), unit.b.flatten(1, 3)
        columns = layer.form.columns - (layer.bias is not None)
        if (len(a), a.shape[2], b.shape[2]) != (layer.form.groups, columns, layer.form.rows):
            return
        a, b = (t.detach().to(dtype) for t in (a, b))
        store[weight] = Rows(layer, a, b, eps)

    def finish(self, store: dict) -> list[tuple[nn.Parameter, Any]]:
        """Keep what one backward pass has brought until the step; return nothing."""
        self.passes += 1
        self._kept = {}
        if self.passes == 1:
            self._kept = {w: rows for w, rows in store.items() if rows is not None}
        return []

    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Refuse: rows belong to a step.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "An optimizer's rows belong to its step, not to a data set. Collect backpack_ext.BatchGrad."
        )

    def check_processes(self) -> None:
        """Refuse: the rows of one process are not those of all.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "An optimizer averages over processes itself. Pass process_group to the optimizer, and none "
            "to backpack(...)."
        )


def precision(types: tuple[torch.dtype, ...], device: torch.device) -> float:
    """Return the precision of a product: the distance from one to the next number.

    Args:
        types: Data types of what was multiplied, and of the result.
        device: Where.
    """
    eps = _eps(types)
    if torch.float32 in types:
        if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            eps = max(eps, 2.0**-10)
        elif torch.get_float32_matmul_precision() != "highest":
            eps = max(eps, 2.0**-8)
    return eps


@lru_cache(maxsize=64)
def _eps(types: tuple[torch.dtype, ...]) -> float:
    return max(torch.finfo(t).eps for t in types)
