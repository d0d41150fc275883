"""In which order the operands of an expression are multiplied, found once per network and sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from torch import Tensor

from backpack_ext.tensor_network.product import product, reduced

try:
    import opt_einsum
except ImportError:
    opt_einsum = None

Legs = tuple[tuple[int, ...], ...]

# Up to that many operands the best order is searched among all of them: 3^n / 2 splits, 0.4 s for 12.
EXHAUSTIVE = 12


@dataclass(frozen=True)
class Step:
    """One product, or one sum, of a plan.

    Args:
        operands: One or two positions: of operands, and behind them of the results of earlier steps.
        legs: Their indices.
        kept: The result's indices.
        cost: Multiply-adds.
        freed: Which positions nobody needs after the step.
    """

    operands: tuple[int, ...]
    legs: Legs
    kept: tuple[int, ...]
    cost: int
    freed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The steps of a contraction, each needed intermediate once.

    Args:
        steps: The steps.
        result: Position of the result.
        legs: The result's indices.
    """

    steps: tuple[Step, ...]
    result: int
    legs: tuple[int, ...]

    @property
    def cost(self) -> int:
        """Multiply-adds, sums included."""
        return sum(step.cost for step in self.steps)

    def run(self, operands: Sequence[Tensor], out: tuple[int, ...], scale: float = 1.0) -> Tensor:
        """Return the contraction times a factor, its axes in the order of `out`."""
        slots: list[Tensor | None] = list(operands)
        for step in self.steps:
            tensors = [slots[k] for k in step.operands]
            if scale != 1 and step is self.steps[-1]:
                # of what is multiplied last the smaller one is smaller than most results
                least = min(range(len(tensors)), key=lambda k: tensors[k].numel())
                tensors[least], scale = tensors[least] * scale, 1.0
            slots.append(
                product(*tensors, *step.legs, step.kept)
                if len(tensors) == 2
                else reduced(*tensors, *step.legs, step.kept)
            )
            for k in step.freed:
                slots[k] = None
        value = slots[self.result].permute([self.legs.index(x) for x in out])
        return value if scale == 1 else value * scale


@lru_cache(maxsize=1024)
def plan(legs: Legs, out: tuple[int, ...], sizes: tuple[int, ...], same: tuple[int, ...]) -> Plan:
    """Return how to contract a network.

    Networks of Kronecker factors and of GGN diagonals contain operands twice; what both copies have
    in common is computed once.

    Args:
        legs: Indices of each operand.
        out: Indices of the result.
        sizes: Size of each index.
        same: For each operand the position of the first one that is the same tensor.
    """
    draft = _Draft(legs, sizes, same)
    result, names = draft.visit(_order(legs, out, sizes, same), out)
    return Plan(tuple(draft.freeing(result)), result, names)


class _Draft:
    """Collects the steps of a tree of operands, leaving out those that were there already."""

    def __init__(self, legs: Legs, sizes: tuple[int, ...], same: tuple[int, ...]):
        self.legs, self.sizes, self.same = legs, sizes, same
        self.steps: list[Step] = []
        self.known: dict[tuple, int] = {}

    def visit(self, tree, needed: Collection[int]) -> tuple[int, tuple[int, ...]]:
        """Return where the result of a tree is, and its indices: of its own those that are needed.

        A product has them in the order of `needed` if that is a tuple: the whole network's result.
        """
        if isinstance(tree, int):
            return self._step(((self.same[tree], self.legs[tree]),), needed)
        one, two = (set().union(*(self.legs[k] for k in _leaves(part))) for part in tree)
        parts = self.visit(tree[0], two.union(needed)), self.visit(tree[1], one.union(needed))
        return self._step(parts, needed)

    def _step(self, parts, needed: Collection[int]) -> tuple[int, tuple[int, ...]]:
        parts = tuple(sorted(parts, key=lambda part: part[0]))
        every = tuple(dict.fromkeys(x for _, legs in parts for x in legs))
        ordered = isinstance(needed, tuple) and len(parts) == 2
        kept = needed if ordered else tuple(x for x in every if x in needed)
        if len(parts) == 1 and kept == every:
            return parts[0]
        # two steps are the same if they treat the same tensors in the same way, whatever the names
        number = {x: k for k, x in enumerate(every)}
        key = (
            tuple((position, tuple(number[x] for x in legs)) for position, legs in parts),
            tuple(number[x] for x in kept),
        )
        if key not in self.known:
            cost = prod(self.sizes[x] for x in every)
            positions, legs = zip(*parts, strict=True)
            self.known[key] = len(self.legs) + len(self.steps)
            self.steps.append(Step(positions, legs, kept, cost))
        return self.known[key], kept

    def freeing(self, result: int) -> list[Step]:
        """Return the steps, each with what is not needed after it."""
        last = {p: k for k, step in enumerate(self.steps) for p in step.operands if p != result}
        freed = [tuple(p for p, at in last.items() if at == k) for k in range(len(self.steps))]
        return [
            replace(step, freed=positions) for step, positions in zip(self.steps, freed, strict=True)
        ]


def _leaves(tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [k for part in tree for k in _leaves(part)]


def _order(legs: Legs, out, sizes, same):
    """Return a tree of operands: a number, or a pair of trees."""
    count = len(legs)
    if count <= 2:
        return (0, 1) if count == 2 else 0
    if opt_einsum is not None:
        return _from_path(legs, out, sizes)
    if count <= EXHAUSTIVE:
        return _best(legs, out, sizes)
    half = count // 2
    if same[:half] == same[half:]:  # a square: each half for itself, the second as the first
        joint = set().union(*legs[half:]) | set(out)
        tree = _order(legs[:half], tuple(joint & set().union(*legs[:half])), sizes, same[:half])
        return tree, _shifted(tree, half)
    return _greedy(legs, out, sizes)


def _shifted(tree, by: int):
    return tree + by if isinstance(tree, int) else tuple(_shifted(part, by) for part in tree)


def _from_path(legs: Legs, out, sizes):
    inputs = [frozenset(x) for x in legs]
    path = opt_einsum.paths.get_path_fn("auto-hq")(inputs, frozenset(out), dict(enumerate(sizes)))
    trees: list = list(range(len(legs)))
    for positions in path:
        parts = [trees[k] for k in positions]
        trees = [t for k, t in enumerate(trees) if k not in positions]
        tree = parts[0]
        for part in parts[1:]:
            tree = (tree, part)
        trees.append(tree)
    tree = trees[0]
    for part in trees[1:]:
        tree = (tree, part)
    return tree


class _Sets:
    """Sets of indices as the bits of integers, with their sizes multiplied."""

    def __init__(self, legs: Legs, out, sizes):
        self.sizes, self.products = sizes, {}
        self.legs = [sum(1 << x for x in each) for each in legs]
        self.out = sum(1 << x for x in out)

    def entries(self, mask: int) -> int:
        """Return the number of entries of a tensor with these indices."""
        if mask not in self.products:
            self.products[mask] = prod(n for x, n in enumerate(self.sizes) if mask >> x & 1)
        return self.products[mask]

    def union(self, chosen: int) -> int:
        """Return the indices of the operands whose bits are set."""
        mask = 0
        for k, legs in enumerate(self.legs):
            if chosen >> k & 1:
                mask |= legs
        return mask


def _best(legs: Legs, out, sizes):
    """Search all orders, by dynamic programming over sets of operands."""
    sets, everything = _Sets(legs, out, sizes), (1 << len(legs)) - 1
    unions = [sets.union(chosen) for chosen in range(everything + 1)]
    left = [
        unions[chosen] & (unions[everything ^ chosen] | sets.out) for chosen in range(everything + 1)
    ]
    cost: list = [0] * (everything + 1)
    tree: list = [None] * (everything + 1)
    for chosen in range(1, everything + 1):
        if chosen & (chosen - 1) == 0:
            tree[chosen] = chosen.bit_length() - 1
            continue
        part, best = (chosen - 1) & chosen, None
        while part > chosen ^ part:  # each split once: the part with the last operand first
            rest = chosen ^ part
            total = cost[part] + cost[rest] + sets.entries(left[part] | left[rest])
            if best is None or total < best[0]:
                best = (total, part)
            part = (part - 1) & chosen
        # what is written counts too, or outer products would be free
        cost[chosen] = best[0] + sets.entries(left[chosen])
        tree[chosen] = (tree[best[1]], tree[chosen ^ best[1]])
    return tree[everything]


def _greedy(legs: Legs, out, sizes):
    """Multiply again and again the two whose product has the fewest entries more than they have."""
    sets = _Sets(legs, out, sizes)
    parts = [(1 << k, k) for k in range(len(legs))]
    everything = (1 << len(legs)) - 1

    def left(chosen: int) -> int:
        return sets.union(chosen) & (sets.union(everything ^ chosen) | sets.out)

    while len(parts) > 1:
        pairs = [(a, b) for k, a in enumerate(parts) for b in parts[:k]]
        joined = [(a, b) for a, b in pairs if left(a[0]) & left(b[0])] or pairs

        def growth(pair) -> int:
            a, b = pair[0][0], pair[1][0]
            return sets.entries(left(a | b)) - sets.entries(left(a)) - sets.entries(left(b))

        a, b = min(joined, key=growth)
        parts = [part for part in parts if part not in (a, b)] + [(a[0] | b[0], (a[1], b[1]))]
    return parts[0][1]
