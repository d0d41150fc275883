"""Sites for matrix products that no module recorded: which parameters they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack_ext.own_pass import in_a_pass_of_its_own
from backpack_ext.products import (
    STACKED,
    BiasOf,
    Note,
    Product,
    Route,
    find_bias,
    rule_for,
)
from backpack_ext.reading import Reading
from backpack_ext.sharing import sharing
from backpack_ext.site import Site


@dataclass(eq=False)
class Found:
    """A parameter that no layer covers, and where it meets the data.

    Args:
        p: The parameter.
        module: The module that holds it.
        name: Its path.
        checks: See `Site.checks`.
        cuts: Where it meets the data: edge, reading and route.
        products: The cuts as matrix products, None for those that are none.
        known: What was worked out before; grows.
    """

    p: nn.Parameter
    module: nn.Module
    name: str
    checks: dict[tuple, int]
    cuts: list[tuple[GradientEdge, Reading, Route]]
    products: list[Product | None]
    known: dict


@dataclass(eq=False)
class _Layer:
    """One part of a parameter in one product.

    Args:
        owner: The parameter.
        product: The product.
        part: Which part, k.
        start: The part's first column in the product's output.
        size: Its number of output features.
        groups: The number of the parameter's parts.
    """

    owner: Found
    product: Product
    part: int
    start: int
    size: int
    groups: int
    bias: tuple[Found, int, int] | None = None  # the bias's parameter, its part, its number of parts


def product_sites(
    found: Sequence[Found],
    readers: Mapping[tuple[Node, int], Sequence[Node]],
    N: int,
    batch_axis: int,
    context: sharing | None,
    made: dict[tuple, Site],
) -> dict[Site, GradientEdge]:
    """Return a Site for each part of a parameter in each product, with the product's edge.

    Args:
        found: The parameters.
        readers: The graph, downwards.
        N: Number of data.
        batch_axis: Of the model.
        context: The `sharing` block of the forward pass, if in one.
        made: The Sites made in this backward pass, by what they stand for; grows.
    """
    layers: dict[Node, list[_Layer]] = {}
    for owner in found:
        for layer in _parts(owner):
            layers.setdefault(layer.product.node, []).append(layer)
    if not layers:
        return {}
    for owner in found:
        _join_bias(owner, layers, readers)

    def read() -> dict[Node, Tensor]:
        new = [
            parts[0].product
            for parts in layers.values()
            if any(_key(part) not in made for part in parts)
        ]
        return {product.node: product.reading.split(product.inputs(), N) for product in new}

    inputs = in_a_pass_of_its_own(read)
    sites = {}
    for node, parts in layers.items():
        for layer in parts:
            key = _key(layer)
            if key not in made:
                made[key] = _site(layer, inputs[node], N, batch_axis, context)
            sites[made[key]] = GradientEdge(node, 0)
    return sites


def _key(layer: _Layer) -> tuple:
    return layer.product.node, id(layer.owner.p), layer.part


def _site(layer: _Layer, a: Tensor, N: int, batch_axis: int, context: sharing | None) -> Site:
    p, product = layer.owner.p, layer.product
    parameters, parts = {"weight": p}, {}
    if layer.groups > 1:
        parts["weight"] = (layer.part, layer.groups)
    bias_groups = 1
    if layer.bias is not None:
        owner, k, bias_groups = layer.bias
        parameters["bias"] = owner.p
        if bias_groups > 1:
            parts["bias"] = (k, bias_groups)
    selection = product.selection
    rule = rule_for(p.shape, selection.lead, selection.transposed, layer.groups, bias_groups)
    output = torch.empty(product.node._input_metadata[0].shape, device="meta")
    owner = layer.owner
    arguments = (owner.module, owner.name, rule, parameters, a, N, batch_axis, output, owner.checks)
    site = Site(*arguments, parts=parts)
    site.sharing, site.segments = context, product.reading.rows
    if context is not None and context.kind == "mask" and isinstance(owner.module, nn.RNNBase):
        context.refuse_steps(site)
    site.note = Note(product.left, product.reading, layer.start, layer.start + layer.size)
    return site


def _parts(owner: Found) -> list[_Layer]:
    """Return the parts of a parameter in its products; none if it is not such rows everywhere."""
    p, products = owner.p, owner.products
    if not products or any(product is None or product.selection is None for product in products):
        return []
    selections = [product.selection for product in products]
    whole = {s for s in selections if s.start == 0 and s.rows == _outputs(p, s)}
    stacked = next((STACKED[c] for c in type(owner.module).__mro__ if c in STACKED), {})
    groups = stacked.get(owner.name.rpartition(".")[2], 1)
    if groups == 1 and len(whole) == len(set(selections)):  # maybe transposed in some
        return [_Layer(owner, product, 0, 0, product.features, 1) for product in products]
    if len({(s.lead, s.transposed) for s in selections}) > 1:
        return []
    outputs = _outputs(p, selections[0])
    size = outputs // groups if groups > 1 else min(s.rows for s in selections)
    if outputs % size or any(s.start % size or s.rows % size for s in selections):
        return []
    groups = outputs // size
    layers = [
        _Layer(owner, product, product.selection.start // size + k, k * size, size, groups)
        for product in products
        for k in range(product.selection.rows // size)
    ]
    return layers if {layer.part for layer in layers} == set(range(groups)) else []


def _outputs(p: nn.Parameter, selection) -> int:
    """Return the number of rows o of a parameter's matrix."""
    first = p.shape[: selection.lead].numel()
    return p.numel() // first if selection.transposed else first


def _join_bias(
    owner: Found,
    layers: dict[Node, list[_Layer]],
    readers: Mapping[tuple[Node, int], Sequence[Node]],
) -> None:
    """Give a vector to the products it is added to, if that is all that happens to it."""
    q = owner.p
    if q.dim() != 1:
        return
    sums: list[BiasOf] = []
    for edge, _, route in owner.cuts:
        found = find_bias(edge.node, route, q, readers, owner.known)
        if found is None or found.product not in layers:
            return
        sums.append(found)
    chosen: list[tuple[_Layer, int]] = []
    for found in sums:
        for layer in layers[found.product]:
            if layer.product.left or layer.bias is not None or (found.start + layer.start) % layer.size:
                return
            chosen.append((layer, (found.start + layer.start) // layer.size))
    sizes = {layer.size for layer, _ in chosen}
    if len(sizes) != 1 or len({s.product for s in sums}) != len(sums):
        return
    size = sizes.pop()
    groups = q.numel() // size
    if q.numel() % size or {k for _, k in chosen} != set(range(groups)):
        return
    for layer, k in chosen:
        layer.bias = (owner, k, groups)
