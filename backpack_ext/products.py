"""Matrix products with a parameter that belongs to no ruled layer: linear layers in all but name.

Attention's and recurrent modules' weights, functional ``linear(x, w, b)``, ``x @ w``, einsum: where a
parameter, or a slice of its rows, enters a matrix product whose other factor has the data along
its rows, the graph holds all that a linear layer's rule would: inputs are saved at the node,
vectors arrive at its output. Such a call has the normal form ``z = W a (+ beta)`` and Kronecker
factors of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from backpack_ext.own_pass import call, in_a_pass_of_its_own
from backpack_ext.reading import Reading
from backpack_ext.rules.affine import PLAIN
from backpack_ext.rules.base import Rule, bias_axes
from backpack_ext.site import Site
from curvature import MATRIX, Axes

# The operations from a cut down to the parameter, the cut first, each after all that read it. Of each
# operation, what it passes on: (its input, output of that input's operation, place of that operation
# in the route); None for the parameter. Numbers only, since what hooks hold must not hold nodes.
Route = tuple[tuple[tuple[int, int, int | None], ...], ...]


def below(route: Route) -> Route:
    """Return the route of the operation after the first, which passes on to it alone."""
    return tuple(
        tuple((i, k, None if place is None else place - 1) for i, k, place in step) for step in route[1:]
    )


class _Factors(NamedTuple):
    """Where a product's node has its factors: inputs of the node, and what it saved of them."""

    left: int
    right: int
    saved_left: str
    saved_right: str


PRODUCTS: dict[str, _Factors] = {
    "MmBackward0": _Factors(0, 1, "_saved_self", "_saved_mat2"),
    "AddmmBackward0": _Factors(1, 2, "_saved_mat1", "_saved_mat2"),
    "BmmBackward0": _Factors(0, 1, "_saved_self", "_saved_mat2"),
}

# Operations that only select and rearrange entries, and what tells two of them apart besides shapes.
SELECTIONS: dict[str, tuple[str, ...]] = {
    "TBackward0": (),
    "TransposeBackward0": ("_saved_dim0", "_saved_dim1"),
    "PermuteBackward0": ("_saved_dims",),
    "ViewBackward0": (),
    "UnsafeViewBackward0": (),
    "ReshapeAliasBackward0": (),
    "UnsqueezeBackward0": ("_saved_dim",),
    "SqueezeBackward0": (),
    "SqueezeBackward1": ("_saved_dim",),
    "SqueezeBackward2": ("_saved_dim",),
    "SliceBackward0": ("_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
    "SelectBackward0": ("_saved_dim", "_saved_index"),
    "SplitBackward0": ("_saved_dim", "_saved_split_size"),
    "SplitWithSizesBackward0": ("_saved_dim", "_saved_split_sizes"),
    "UnsafeSplitBackward0": ("_saved_dim", "_saved_split_size"),
    "UnbindBackward0": ("_saved_dim",),
    "ToCopyBackward0": (),
    "CloneBackward0": (),
    "AliasBackward0": (),
}
# Of these, what leaves the entries where they are (a cast would round the codes that tell entries).
_IDENTITIES = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0")

# Operations between a product and the addition of its bias.
RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")

# Parameters that are several layers of equal size, one above the other, by their module's class.
STACKED: dict[type[nn.Module], dict[str, int]] = {
    nn.MultiheadAttention: {"in_proj_weight": 3, "in_proj_bias": 3},
}


class Selection(NamedTuple):
    """Which rows of a parameter's matrix a product uses.

    Args:
        rows: Number of rows o of the part.
        start: The part's first row.
        lead: How many of the parameter's axes form the matrix's first axis.
        transposed: Whether these are the inputs i, so that the outputs o come last.
    """

    rows: int
    start: int
    lead: int
    transposed: bool


class Product(NamedTuple):
    """A product of a parameter with rows of data.

    Args:
        node: Its node.
        left: Whether the parameter is the left factor, so that the data are columns.
        reading: Where the data are in ``[*rows, o]``, the output with the features last.
        selection: What of the parameter enters; None if more happens to it on the way.
        route: From the node to the parameter.
    """

    node: Node
    left: bool
    reading: Reading
    selection: Selection | None
    route: Route

    def inputs(self) -> Tensor:
        """Return the other factor, ``[*rows, i]``, from what the node has saved."""
        factors = PRODUCTS[self.node.name()]
        x = getattr(self.node, factors.saved_right if self.left else factors.saved_left).detach()
        if self.node.name() == "AddmmBackward0" and self.node._saved_alpha != 1:
            x = x * self.node._saved_alpha
        return x.mT if self.left else x

    @property
    def features(self) -> int:
        """Number of output features."""
        return self.node._input_metadata[0].shape[-2 if self.left else -1]


def find_product(
    node: Node, index: int, reading: Reading, route: Route, p: nn.Parameter, N: int, known: dict
) -> Product | None:
    """Return the product that a cut is, if it is one.

    Args:
        node: The node of the cut.
        index: Which of its outputs; products have one.
        reading: Where the data are in the output.
        route: From the node to the parameter.
        p: The parameter.
        N: Number of data.
        known: Selections that were worked out before; grows.
    """
    factors = PRODUCTS.get(node.name())
    if factors is None or len(route[0]) != 1 or index:
        return None
    entry, output, _ = route[0][0]
    rest = below(route)
    if entry not in (factors.left, factors.right):
        return None
    left, dims = entry == factors.left, len(node._input_metadata[0].shape)
    axis = reading.axis
    if N == 1 and reading.rows is None:
        # A single datum's vectors do not tell where the data are, nor whether they are there at all.
        if _selects_a_parameter(node.next_functions[factors.right if left else factors.left][0]):
            return None  # two parameters met, as for more data
        axis = 1 if left and dims == 2 else 0
    if left and axis >= dims - 2:  # of the transposed output
        axis = 2 * dims - 3 - axis
    if axis == dims - 1:
        return None  # the data are along the features
    reading = reading._replace(axis=axis)
    child = node.next_functions[entry][0]
    shape = torch.Size(child._input_metadata[output].shape)
    key = ("selection", left, shape, *_signature(child, output, rest))
    if None in key:
        return Product(node, left, reading, None, route)
    if key not in known:
        known[key] = _selection(child, output, rest, shape, left, p)
    return Product(node, left, reading, known[key], route)


def _signature(node: Node, index: int, route: Route) -> list:
    """Return what tells routes of selections apart; with a None if there is another operation."""
    found: list = []
    for step in route:
        name = node.name()
        if name == "ExpandBackward0":
            names: tuple[str, ...] = ()
        elif name in SELECTIONS:
            names = SELECTIONS[name]
        else:
            return [None]
        if len(step) != 1:
            return [None]
        values = [getattr(node, n) for n in names]
        found += [name, index, tuple(node._input_metadata[index].shape)]
        found += [tuple(v) if isinstance(v, (list, tuple)) else v for v in values]
        entry, index, _ = step[0]
        node = node.next_functions[entry][0]
    return found


def _selection(
    node: Node, index: int, route: Route, shape: torch.Size, left: bool, p: nn.Parameter
) -> Selection | None:
    """Return which rows of the parameter's matrix arrive in the factor; None if it is not rows.

    The factor's entries are numbered, and the numbers sent back to the parameter.
    """
    o, i = shape[-2:] if left else (shape[-1], shape[-2])
    code = torch.arange(1.0, o * i + 1, dtype=torch.float64, device=p.device).reshape(shape[-2:])
    copies = []
    for k in {0, shape[0] - 1} if len(shape) == 3 else {0}:
        # all matrices of a batch must be copies of one: then each has the same entries
        sent = code.new_zeros(shape)
        (sent[k] if len(shape) == 3 else sent).copy_(code)
        copies.append(_back(node, index, sent, route))
    where = copies[0]
    if len(shape) == 3 and shape[0] > 1 and not _copied(node, route):
        return None
    if any(not torch.equal(where, other) for other in copies) or where.numel() % i:
        return None
    matrix = code if left else code.mT  # [o, i]
    outputs = where.numel() // i
    for transposed, size in ((False, outputs), (True, i)):
        lead = next((k for k in range(p.dim() + 1) if prod(p.shape[:k]) == size), None)
        if lead is None or (p.dim() > 1 and lead in (0, p.dim())):
            continue
        found = where.reshape(i, outputs).mT if transposed else where.reshape(outputs, i)
        start = int((found != 0).any(1).double().argmax())
        part = found[start : start + o]
        if part.shape == matrix.shape and torch.equal(part, matrix) and int((found != 0).sum()) == o * i:
            return Selection(int(o), start, lead, transposed)
    return None


def _selects_a_parameter(node: Node | None) -> bool:
    """Whether a node returns nothing but entries of a parameter."""
    while node is not None and (node.name() in SELECTIONS or node.name() == "ExpandBackward0"):
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _copied(node: Node, route: Route) -> bool:
    """Whether a route contains an expansion."""
    for step in route:
        if node.name() == "ExpandBackward0":
            return True
        node = node.next_functions[step[0][0]][0]
    return False


def _back(node: Node, index: int, g: Tensor, route: Route) -> Tensor:
    """Send numbers from a factor back to the parameter."""
    return in_a_pass_of_its_own(lambda: _sent(node, index, g, route))


def _sent(node: Node, index: int, g: Tensor, route: Route) -> Tensor:
    for step in route:
        entry, k, _ = step[0]
        child = node.next_functions[entry][0]
        if node.name() not in _IDENTITIES:
            arguments: list[Tensor | None] = [None] * len(node._input_metadata)
            arguments[index] = g
            g = call(node, arguments)[entry]
        g = g.reshape(child._input_metadata[k].shape)
        node, index = child, k
    return g


# --------------------------------------------------------------------------- the rule


class ProductRule(Rule):
    """A product as a layer: inputs ``[N, S, i]`` were taken from the graph.

    Args:
        weight: How the weight's axes form its matrices ``[g, o, i]``.
        groups: Number of groups of the bias.
    """

    weight, bias = None, None
    in_graph = True

    def __init__(self, weight: Axes, groups: int):
        self.family = PLAIN if weight == MATRIX else None
        self._axes = {"weight": weight, "bias": bias_axes(groups)}

    def inputs(self, site: Site) -> Tensor:
        """Return ``a[n,s,i]``."""
        return site.input()

    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Return ``b[v,n,s,o]``: the columns of the output that belong to this part."""
        return site.note.vectors(g, site.batch)

    def axes(self, module: nn.Module, role: str) -> Axes:
        """Return how the axes of a (whole) parameter form its matrices."""
        return self._axes[role]


class Note(NamedTuple):
    """How vectors at a product's output become a layer's. It holds no node."""

    left: bool
    reading: Reading
    start: int
    stop: int

    def vectors(self, g: Tensor, N: int) -> Tensor:
        """Bring ``[v, *output.shape]`` to ``[v, N, S, o]``."""
        g = g.mT if self.left else g
        return self.reading.split(g[..., self.start : self.stop], N, 1)


@lru_cache(maxsize=4096)
def rule_for(
    shape: torch.Size, lead: int, transposed: bool, groups: int, bias_groups: int
) -> ProductRule:
    """Return the rule of a parameter's products; equal ones are one object."""
    names = [f"x{k}" for k in range(len(shape))]
    first, second = names[:lead], names[lead:]
    inputs, outputs = (first, second) if transposed else (second, first)
    left = [f"(g {name})" if name == outputs[0] and groups > 1 else name for name in names]
    g = "g" if groups > 1 else "1"
    sizes = tuple(zip(names, shape, strict=True))
    if groups > 1:
        sizes = tuple((n, s // groups if n == outputs[0] else s) for n, s in sizes) + (("g", groups),)
    pattern = f"{' '.join(left)} -> {g} ({' '.join(outputs)}) ({' '.join(inputs)})"
    if len(shape) == 2:  # the frequent case has a pattern that others know
        o, i = ("o", "i") if groups == 1 else ("(g o)", "i")
        pattern = f"{i} {o} -> {g} o i" if transposed else f"{o} {i} -> {g} o i"
        sizes = (("g", groups),) if groups > 1 else ()
    return ProductRule(Axes(pattern, sizes), bias_groups)


# --------------------------------------------------------------------------- biases


class BiasOf(NamedTuple):
    """The addition of a bias to a product.

    Args:
        product: The product's node.
        start: The first entry of the bias that is added, as many as the product has columns.
    """

    product: Node
    start: int


def find_bias(
    node: Node,
    route: Route,
    q: nn.Parameter,
    readers: Mapping[tuple[Node, int], Sequence[Node]],
    known: dict,
) -> BiasOf | None:
    """Return the product to which a cut adds a vector, if it does."""
    if len(route[0]) != 1:
        return None
    entry, output, _ = route[0][0]
    rest = below(route)
    name, child = node.name(), node.next_functions[entry][0]
    if name == "AddmmBackward0" and entry == 0 and node._saved_beta == 1:
        product = node
    elif name == "AddBackward0" and node._saved_alpha == 1:
        product = _below(node, 1 - entry, readers)
    else:
        return None
    shape = tuple(child._input_metadata[output].shape)
    if product is None or len(shape) != 1 or shape[0] != product._input_metadata[0].shape[-1]:
        return None
    key = ("bias", shape, *_signature(child, output, rest))
    if None in key or "ExpandBackward0" in key:
        return None
    if key not in known:
        code = torch.arange(1.0, shape[0] + 1, dtype=torch.float64, device=q.device)
        where = _back(child, output, code, rest).flatten()
        start = int((where != 0).double().argmax())
        same = torch.equal(where[start : start + shape[0]], code) and int((where != 0).sum()) == shape[0]
        known[key] = start if same and q.dim() == 1 else None
    return None if known[key] is None else BiasOf(product, known[key])


def _below(node: Node, entry: int, readers: Mapping[tuple[Node, int], Sequence[Node]]) -> Node | None:
    """Return the product whose output, only reshaped, is an input of a node, and of no other."""
    width = node._input_metadata[0].shape[-1:]
    child, index = node.next_functions[entry]
    while child is not None:
        if (
            index
            or len(readers.get((child, 0), ())) != 1
            or child._input_metadata[0].shape[-1:] != width
        ):
            return None
        if child.name() in PRODUCTS:
            return child
        if child.name() not in RESHAPES:
            return None
        child, index = child.next_functions[0]
    return None
