"""Layers as an optimizer sees them: which parameters share one preconditioner, and as which matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from backpack_ext.rules import Rule, find_rule
from backpack_ext.rules.affine import EmbeddingRule
from backpack_ext.shards import held
from backpack_ext.unit import Unit
from curvature import Axes


@dataclass(frozen=True)
class Form:
    """How the parameters of a layer form matrices ``[g, o, i]``.

    Attributes:
        groups: Number of matrices g.
        rows: Number of outputs o.
        columns: Number of inputs i, with the column of a joined bias.
        axes: The weight's axes.
        bias_axes: The bias's; None where there is none, or it is not joined.
        one_hot: Whether the inputs select features (embeddings): A is diagonal then.
    """

    groups: int
    rows: int
    columns: int
    axes: Axes
    bias_axes: Axes | None
    one_hot: bool


@dataclass(eq=False)
class Layer:
    """A weight, and maybe its bias as the last column.

    Attributes:
        weight: The parameter that the optimizer was given.
        bias: Likewise; None if it is not joined.
        form: How they form matrices.
    """

    weight: Tensor
    bias: Tensor | None
    form: Form

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The weight, and the bias if it is joined."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``[g,o,i]`` of tensors shaped like the parameters; a view where it can be."""
        W = self.form.axes.to_matrix(weight)
        if bias is None:
            return W
        return torch.cat([W, self.form.bias_axes.to_matrix(bias)], dim=-1)

    def scaled(self, tensors: Sequence[Tensor], rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        """Return tensors like the parameters, rows and columns of their matrix multiplied.

        Args:
            tensors: Shaped like `parameters`.
            rows: Factors ``[g,o]``.
            columns: Factors ``[g,i]``.
        """
        rows, columns = rows.unsqueeze(-1), columns.unsqueeze(-2)
        axes = self.form.axes
        if self.bias is None:
            return (axes.to_parameter((axes.to_matrix(tensors[0]) * rows).mul_(columns)),)
        W = axes.to_parameter((axes.to_matrix(tensors[0]) * rows).mul_(columns[..., :-1]))
        b = self.form.bias_axes.to_matrix(tensors[1]) * rows * columns[..., -1:]
        return W, self.form.bias_axes.to_parameter(b)

    def split(self, M: Tensor) -> tuple[Tensor, ...]:
        """Return views of ``M[g,o,i]`` (copies where axes do not allow) shaped like the parameters."""
        if self.bias is None:
            return (self.form.axes.to_parameter(M),)
        W, b = M[..., :-1], M[..., -1:]
        return self.form.axes.to_parameter(W), self.form.bias_axes.to_parameter(b)


class Layers:
    """The layers of an optimizer's parameters.

    Those of modules with a rule are known from the model; others (attention's projections, weights
    in functional calls) are found as backward passes reach them.

    A weight that is read in two ways, such as an embedding tied to an output head, has no single
    Kronecker product: it is `refused`, for good.

    Args:
        joint_bias: Whether biases are columns of their weights.
    """

    def __init__(self, joint_bias: bool):
        self.joint_bias = joint_bias
        self.wanted: set[Tensor] = set()  # parameters that may have factors
        self._known: dict[Tensor, Layer] = {}
        self._owner: dict[Tensor, Layer] = {}  # of weights and of joined biases
        self.refused: set[Tensor] = set()
        self.version = 0  # grows whenever layers change

    def copy(self) -> Layers:
        """Return a copy that changes on its own."""
        new = Layers(self.joint_bias)
        new.wanted, new.refused = set(self.wanted), set(self.refused)
        new._known, new._owner, new.version = dict(self._known), dict(self._owner), self.version
        return new

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._known.values())

    def owner(self, p: Tensor) -> Layer | None:
        """Return the layer that a parameter belongs to, as its weight or bias."""
        return self._owner.get(p)

    def of_weight(self, weight: Tensor) -> Layer | None:
        """Return the layer of a weight."""
        return self._known.get(weight)

    def look_through(self, model: nn.Module) -> None:
        """Note the layers of a model whose modules have a rule."""
        uses: dict[Tensor, int] = {}
        found: list[tuple[dict[str, nn.Parameter], Rule, nn.Module]] = []
        for module in model.modules():
            rule = find_rule(module)
            if rule is None or rule.elementwise:
                continue
            parameters = rule.parameters(module)
            for p in parameters.values():
                uses[p] = uses.get(p, 0) + 1
            found.append((parameters, rule, module))
        for parameters, rule, module in found:
            weight, bias = parameters.get("weight"), parameters.get("bias")
            if weight not in self.wanted:
                continue
            joined = bias is not None and self.joint_bias and bias in self.wanted
            joined = joined and uses[bias] == uses[weight]
            form = _form(
                weight,
                rule.axes(module, "weight"),
                rule.axes(module, "bias") if joined else None,
                isinstance(rule, EmbeddingRule),
            )
            self.add(Layer(weight, bias if joined else None, form))

    def of_unit(self, unit: Unit, one_hot: bool) -> Layer | None:
        """Return the layer that a backward pass has reached, noting it if it is new.

        None if it has no preconditioner: the weight is frozen, or another optimizer's, or refused.

        Args:
            unit: What was reached.
            one_hot: Whether its inputs are one-hot.
        """
        weight = unit.parameters.get("weight")
        if weight is None:
            return None
        weight = held(weight)
        if weight in self.refused or weight not in self.wanted:
            return None
        site, bias = unit.sites[0], unit.parameters.get("bias")
        joined = bias is not None and self.joint_bias and held(bias) in self.wanted
        joined = joined and unit.part("weight") == unit.part("bias")
        if joined:
            joined = site.uses_of("weight", unit.parameters["weight"]) == site.uses_of("bias", bias)
        layer = self._known.get(weight)
        if layer is not None and layer.bias is not None and bias is None:
            form = _form(unit.parameters["weight"], unit.axes("weight"), None, one_hot)
            if not layer.bias.requires_grad and form == _without_bias(layer.form):
                return layer  # frozen for now: its column stays
        if layer is not None and layer.bias is None and bias is not None:
            joined = False  # what was decided once stays
        form = _form(
            unit.parameters["weight"],
            unit.axes("weight"),
            unit.axes("bias") if joined else None,
            one_hot,
        )
        bias = held(bias) if joined else None
        if layer is not None and layer.form == form and layer.bias is bias:
            return layer
        return self.add(Layer(weight, bias, form))

    def add(self, layer: Layer) -> Layer | None:
        """Note a layer; None if its weight is refused, now or before."""
        weight, bias = layer.weight, layer.bias
        if weight in self.refused:
            return None
        old = self._known.get(weight)
        if old is not None:
            if old.form.axes != layer.form.axes or old.form.one_hot != layer.form.one_hot:
                self.refuse(weight)
                return None
            if old.form == layer.form and old.bias is bias:
                return old
            self._drop(old)
        if bias is not None and self._owner.get(bias) is not None:  # of another weight
            other = self._owner[bias]
            self._drop(other)
            self._put(Layer(other.weight, None, _without_bias(other.form)))
            layer = Layer(weight, None, _without_bias(layer.form))
        return self._put(layer)

    def refuse(self, weight: Tensor) -> None:
        """Leave a weight to the fallback, for good."""
        self.refused.add(weight)
        if weight in self._known:
            self._drop(self._known[weight])

    def _put(self, layer: Layer) -> Layer:
        self.version += 1
        self._known[layer.weight] = layer
        for p in layer.parameters:
            self._owner[p] = layer
        return layer

    def _drop(self, layer: Layer) -> None:
        self.version += 1
        del self._known[layer.weight]
        for p in layer.parameters:
            self._owner.pop(p, None)


def _form(weight: Tensor, axes: Axes, bias_axes: Axes | None, one_hot: bool) -> Form:
    groups, rows, columns = _matrix_shape(axes, weight.shape)
    return Form(groups, rows, columns + (bias_axes is not None), axes, bias_axes, one_hot)


@lru_cache(maxsize=1024)
def _matrix_shape(axes: Axes, shape: torch.Size) -> torch.Size:
    """Return ``(g, o, i)`` of a weight's shape."""
    return axes.to_matrix(torch.empty(shape, device="meta")).shape


def _without_bias(form: Form) -> Form:
    if form.bias_axes is None:
        return form
    return Form(form.groups, form.rows, form.columns - 1, form.axes, None, form.one_hot)
