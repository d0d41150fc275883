"""The two routes to a layer's Gram matrix, and whether the faster one is taken.

What is taken follows from counted multiplications and from entries that are read and written, which
`backpack_ext.layer_gram.ENTRY` weighs against each other. Both routes are timed on the inputs and
vectors that a backward pass brings to each layer; layers of the same sizes are timed once. Printed
beside: by how much a choice with other weights would be off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from backpack_ext import layer_gram as module
from backpack_ext.layer_factor import LayerFactor
from benchmarks.lowrank.measuring import Length, digits, sync_of
from benchmarks.lowrank.spectrum import ggn_step
from benchmarks.models import Problem
from benchmarks.timing import Variant, interleave, summary
from curvature.factor import Factor, Stacked

ROUTES = ("kernel", "explicit")
# A route that needs this many times the multiplications of the other one is not timed.
HOPELESS = 16
# From this ratio on one route counts as slower than the other: below it is noise.
SLOWER = 1.1
# Weights to try.
ENTRIES = (0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def run(problem: Problem, fisher: str, length: Length, device: str) -> dict:
    """Time both routes for each layer of a model.

    Returns:
        A dictionary for JSON. Each row has a layer's sizes, how many such layers there are, quartiles
        of milliseconds by route (None: hopeless), the route that is taken, and the one that each of
        ``ENTRIES`` would take.
    """
    block = ggn_step(problem, lambda ggn: ggn.block, fisher=fisher).step()
    found: dict[tuple, dict] = {}
    for layer in layers(block.factor):
        row = found.get(sizes := tuple(layer.a.shape) + tuple(layer.b.shape))
        if row is None:
            found[sizes] = _layer(layer, length, device)
        else:
            row["count"] += 1
    return {
        "part": "routes",
        "name": problem.name,
        "title": problem.title,
        "about": problem.about,
        "fisher": fisher,
        "entry": module.ENTRY,
        "rows": list(found.values()),
    }


def layers(factor: Factor) -> Iterator[LayerFactor]:
    """Go through the layers with dense inputs."""
    if isinstance(factor, Stacked):
        for part in factor.parts:
            yield from layers(part)
    elif isinstance(factor, LayerFactor) and isinstance(factor.a, Tensor):
        yield factor


def _layer(layer: LayerFactor, length: Length, device: str) -> dict:
    a, b, bias = layer.a, layer.b, len(layer.shapes) > 1
    (g, v, n, s, o), i = b.shape, a.shape[-1]
    counts = _counts(a, b)
    hopeless = [r for r in ROUTES if counts[r] > HOPELESS * min(counts.values())]
    steps = {r: Variant(_bound(r, a, b, bias)) for r in ROUTES if r not in hopeless}
    return {
        "name": f"V {v}, N {n}, S {s}, {i} -> {o}" + (f", {g} groups" if g > 1 else ""),
        "count": 1,
        **dict.fromkeys(hopeless),
        **_time(steps, length, device),
        "taken": chosen(a, b, module.ENTRY),
        "chosen": {str(entry): chosen(a, b, entry) for entry in ENTRIES},
    }


def _counts(a: Tensor, b: Tensor) -> dict[str, float]:
    """Return the multiplications of each route; half of the pairs are computed."""
    (_, v, n, s, o), i = b.shape, a.shape[-1]
    pairs = (v * n) ** 2 / 2
    return {
        "kernel": (n * s) ** 2 * i + pairs * s * s * o,
        "explicit": pairs * i * o + v * n * s * i * o,
    }


def _bound(route: str, a: Tensor, b: Tensor, bias: bool):
    return lambda: gram_by(route, a, b, bias)


def gram_by(route: str, a: Tensor, b: Tensor, bias: bool) -> Tensor:
    """Return a layer's Gram matrix by one of ``ROUTES``, whichever is cheaper."""
    with _forced(route == "explicit"):
        return module.layer_gram(a, b, bias=bias)


@contextmanager
def _forced(explicit: bool) -> Iterator[None]:
    before = module._explicit_is_cheaper
    module._explicit_is_cheaper = lambda *args: explicit
    try:
        yield
    finally:
        module._explicit_is_cheaper = before


def chosen(a: Tensor, b: Tensor, entry: float) -> str:
    """Return the route that is taken if an entry counts that much."""
    before = module.ENTRY
    module.ENTRY = entry
    try:
        return "explicit" if module._explicit_is_cheaper(a, b, a, b, True) else "kernel"
    finally:
        module.ENTRY = before


def _time(steps: dict[str, Variant], length: Length, device: str) -> dict[str, list[float]]:
    """Return quartiles of the milliseconds of each route."""
    sync = sync_of(device)
    for variant in steps.values():
        variant.warm_up(sync)
    times = interleave(steps, next(iter(steps)), sync, length.seconds, length.rounds)
    return {route: digits(summary([1e3 * t for t in values])) for route, values in times.items()}


# --------------------------------------------------------------------------- what a choice costs


def loss(row: dict, route: str) -> float:
    """Return the time of a route over that of the faster one; infinity if it was hopeless."""
    fastest = min(row[r][1] for r in ROUTES if row[r])
    return row[route][1] / fastest if row[route] else float("inf")


def calibration(problems: list[dict]) -> list[dict]:
    """Return what the choice with each of ``ENTRIES`` costs.

    Returns:
        For each: ``worst`` and ``total``, the time taken over the fastest, of the worst layer and of all
        layers together (None where a hopeless route is taken), and ``slower``, the number of kinds of
        layers where another route is faster by more than a tenth.
    """
    rows = [row for problem in problems for row in problem["rows"]]
    fastest = sum(row["count"] * min(row[r][1] for r in ROUTES if row[r]) for row in rows)
    found = []
    for entry in map(str, ENTRIES):
        losses = [loss(row, row["chosen"][entry]) for row in rows]
        taken = [row["count"] * (row[row["chosen"][entry]] or [0, float("inf")])[1] for row in rows]
        slower = sum(1 for value in losses if value > SLOWER)
        costs = {"worst": _finite(max(losses)), "total": _finite(sum(taken) / fastest)}
        found.append({"entry": int(entry), **costs, "slower": slower})
    return found


def _finite(value: float) -> float | None:
    return None if value == float("inf") else digits([value])[0]
