"""What comes of each way of training with each quantity: right, or refused with which message."""

from __future__ import annotations

import warnings
from functools import cache
from math import sqrt
from typing import NamedTuple

import torch
from torch.autograd.graph import Node

from backpack_ext.training.problems import Problem, problem
from backpack_ext.training.quantities import QUANTITIES, Quantity, Results, step
from backpack_ext.training.ways import WAYS, Elsewhere, Way


class Outcome(NamedTuple):
    """What came of one way, one quantity, one network.

    Attributes:
        kind: ``"right"``, ``"refused"``, ``"wrong"``, ``"-"`` where it makes no sense, or what does
            in place of it.
        text: The error's type and message, or what is wrong.
        error: The largest error relative to what is tolerated.
    """

    kind: str
    text: str = ""
    error: float = 0.0


@cache
def expected(network: str, quantity: str) -> Results:
    """Return what a plain step in float64 finds."""
    return step(problem(network), QUANTITIES[quantity])


@cache
def operations(network: str) -> int:
    """Return how many operations a gradient passes in forward and backward, at most."""
    depths: dict[Node, int] = {}

    def depth(node: Node) -> int:
        if node not in depths:
            children = [child for child, _ in node.next_functions if child is not None]
            depths[node] = 1 + max(map(depth, children), default=0)
        return depths[node]

    return 2 * depth(problem(network).loss().grad_fn)


def tolerance(network: str, quantity: Quantity, dtype: torch.dtype) -> float:
    r"""Return the tolerated error of a result, relative to its norm.

    Each of the K operations on the longest way forward and back rounds its result, by at most half of
    ``eps`` relative to its size. The errors are as good as independent, so they add up to
    :math:`\sqrt K \, \mathrm{eps} / 2`, as many times as the gradient enters the quantity. Cancellation
    makes that larger, hence a factor of 2. Sums are in float32 at least: from float32 on their up to 64
    terms round as well, hence another one of 8. Eigenvectors turn by a rounding error over the gap
    between eigenvalues, at least 1e-3 of them here, in the precision that they are computed in.
    """
    size, eps = quantity.power * sqrt(operations(network)), torch.finfo(dtype).eps
    tolerated = size * eps * (8 if dtype.itemsize >= 4 else 1)
    if quantity.name == "EKFAC":
        wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        return max(tolerated, 1e3 * size * wide)
    return tolerated


def compare(found: Results, wanted: Results, tolerated: float, some: bool) -> Outcome:
    """Compare results with what they should be."""
    if not found:
        return Outcome("wrong", "nothing was found", float("inf"))
    keys = found if some else wanted
    different = set(found) ^ set(wanted) if not some else set(found) - set(wanted)
    if different:
        return Outcome("wrong", f"missing or too much: {sorted(different)}", float("inf"))
    worst, where = 0.0, ""
    for key in keys:
        one, other = found[key].double(), wanted[key].double()
        if one.shape != other.shape:
            return Outcome("wrong", f"{key}: shape {tuple(one.shape)}", float("inf"))
        error = float((one - other).norm() / (tolerated * other.norm()).clamp_min(1e-300))
        if not error <= worst:
            worst, where = error, key
    if worst <= 1:
        return Outcome("right", where, worst)
    return Outcome("wrong", f"{where}: {worst:.2g} times the tolerated error", worst)


# Problems that a way has prepared once for all quantities.
_prepared: dict[tuple[str, str], Problem] = {}


@cache
def outcome(way_name: str, quantity_name: str, network: str) -> Outcome:
    """Try a way with a quantity and a network."""
    way, quantity = WAYS[way_name], QUANTITIES[quantity_name]
    if quantity.make is None and not way.kernel:
        return Outcome("-")
    wanted = expected(network, quantity.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="torch")
        try:
            at = _problem(way, network)
            found = way.run(at, quantity)
        except Elsewhere as other:
            return Outcome(str(other))
        except Exception as error:
            return Outcome("refused", f"{type(error).__name__}: {' '.join(str(error).split())}")
    if isinstance(found, tuple):
        found, wanted = found
    tolerated = tolerance(network, quantity, way.dtype)
    return compare(found, wanted, tolerated, way.some)


def _problem(way: Way, network: str) -> Problem:
    if way.prepare is None:
        return problem(network)
    if all(name != way.name for name, _ in _prepared):
        _prepared.clear()
        torch._dynamo.reset()
    if (way.name, network) not in _prepared:
        made = problem(network)
        way.prepare(made)
        _prepared[way.name, network] = made
    return _prepared[way.name, network]
