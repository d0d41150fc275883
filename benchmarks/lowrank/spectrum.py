"""The GGN's spectrum, its leading eigenpairs and what is computed from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import backpack_ext as our
from backpack_ext import LowRankGGN
from benchmarks.floor import Product, Shapes, operands, shapes_of, total_flops
from benchmarks.lowrank import peers
from benchmarks.lowrank.measuring import (
    PLAIN,
    Key,
    Length,
    Measured,
    backward_step,
    clear_of,
    digits,
    measure,
    runner,
)
from benchmarks.models import Problem
from benchmarks.timing import Variant

TOP = 10
DAMPING = 1.0
MATVECS = 10


def _exact(shapes: Shapes) -> list[Product]:
    """Carry a root of the loss's Hessian, which has a column less than classes, to all layers."""
    V = shapes.classes - 1
    return shapes.sweep(V) + shapes.each("gram", V)


@dataclass(frozen=True)
class Row:
    """One quantity.

    Args:
        name: Row head in tables.
        ask: Takes the extension after the backward pass.
        options: Of the extension.
        products: The matrix products needed beyond a plain step; None: not counted.
        goals: Times in plain steps that are aimed at, by problem.
        over: Another row, to which the time is related as well.
    """

    name: str
    ask: Callable[[LowRankGGN], Any]
    options: dict = field(default_factory=dict)
    products: Callable[[Shapes], list[Product]] | None = None
    goals: dict[str, float] = field(default_factory=dict)
    over: str | None = None


def _directional(ggn: LowRankGGN) -> tuple[Tensor, Tensor]:
    pairs = ggn.eigh(TOP)
    return pairs.directional_gradients(), pairs.directional_curvatures()


def _matvecs(ggn: LowRankGGN) -> list[dict]:
    vector = {p: p.detach() for parameters in ggn.parameters.values() for p in parameters}
    return [ggn.matvec(vector) for _ in range(MATVECS)]


PAIRS = f"top {TOP} eigenpairs"
ROWS = (
    Row(
        "exact spectrum",
        lambda ggn: ggn.eigvalsh(),
        {"gradients": False},
        products=_exact,
        goals={"mlp": 10.0, "cnn": 14.0},
    ),
    Row(
        "the same, dtype=float32",
        lambda ggn: ggn.eigvalsh(),
        {"gradients": False, "dtype": torch.float32},
        products=_exact,
    ),
    Row(PAIRS, lambda ggn: ggn.eigh(TOP), products=_exact, goals={"mlp": 12.0, "cnn": 16.0}),
    Row(
        "the same, vectors formed",
        lambda ggn: ggn.eigh(TOP).vectors.explicit(),
        products=lambda s: _exact(s) + s.each("combined", TOP),
    ),
    Row("the same, gamma and lambda", _directional, over=PAIRS, goals={"over": 1.05}),
    Row(
        "Newton step in these",
        lambda ggn: ggn.newton_step(DAMPING, k=TOP),
        products=lambda s: _exact(s) + s.each("weight_product"),
    ),
    Row(f"{MATVECS} products with a vector", _matvecs, {"gradients": False}),
    Row(
        "one MC sample: spectrum",
        lambda ggn: ggn.eigvalsh(),
        {"fisher": "mc", "gradients": False},
        lambda s: s.sweep(1) + s.each("gram", 1),
        {"mlp": 2.2, "cnn": 2.5},
    ),
)
# The rows that peers have, by what they compute. They hand out vectors in parameter space.
PEER_ROWS = {
    "spectrum": "exact spectrum",
    "pairs": "the same, vectors formed",
    "directional": "the same, gamma and lambda",
    "newton": "Newton step in these",
    "mc": "one MC sample: spectrum",
}
# The eigensolvers that a spectrum and eigenpairs end with, alone.
SOLVERS = {
    "eigenvalues of the Gram matrix": torch.linalg.eigvalsh,
    "eigenpairs of the Gram matrix": torch.linalg.eigh,
}
SIDES = ("ours", "vivit", "curvlinops")


def run(problem: Problem, length: Length, device: str) -> dict:
    """Measure one problem.

    Returns:
        A dictionary for JSON: times are quartiles of ratios to the plain step of the same round.
    """
    steps = _steps(problem, device)
    steps |= peers.steps(problem, TOP, PEER_ROWS)
    shapes = shapes_of(copy.deepcopy(problem.model), problem.x)
    products = {row.name: tuple(row.products(shapes)) for row in ROWS if row.products}
    steps |= _floors(products, device)
    measured = measure(steps, length, device)
    rows = [_row(problem, row, products, measured) for row in ROWS]
    rows += [{"name": name, "ours": measured.cell(("ours", name))} for name in SOLVERS]
    return {
        "part": "spectrum",
        "name": problem.name,
        "title": problem.title,
        "about": problem.about,
        "columns": len(problem.x) * (shapes.classes - 1),
        **measured.head(),
        "rows": rows,
    }


def _row(problem: Problem, row: Row, products: dict[str, tuple], measured: Measured) -> dict:
    result: dict = {"name": row.name}
    for side in SIDES:
        if (side, row.name) in measured.peaks:
            result[side] = measured.cell((side, row.name))
    if row.name in products:
        floor = products[row.name]
        ratio = measured.ratio(("floor", str(hash(floor))), offset=1.0)
        result["floor"] = {"time": ratio, "gflop": digits([total_flops(floor) / 1e9])[0]}
    if problem.name in row.goals:
        result["goal"] = row.goals[problem.name]
    if row.over is not None:
        ratio = measured.ratio(("ours", row.name), ("ours", row.over))
        result["over"] = {"row": row.over, "time": ratio, "goal": row.goals.get("over")}
    return result


def ggn_step(problem: Problem, ask: Callable[[LowRankGGN], Any], **options: Any) -> Variant:
    """Return a backward pass with `LowRankGGN`, and what is asked of it."""
    model, loss_fn = our.extend(copy.deepcopy(problem.model)), our.extend(nn.CrossEntropyLoss())
    x, y = problem.x, problem.y

    def step() -> Any:
        ggn = LowRankGGN(**options)
        with our.backpack(ggn):
            loss_fn(model(x), y).backward()
        return ask(ggn)

    return Variant(step, clear_of(model, "low_rank_ggn"))


def _steps(problem: Problem, device: str) -> dict[Key, Variant]:
    plain = copy.deepcopy(problem.model)
    steps = {PLAIN: backward_step(plain, nn.CrossEntropyLoss(), problem.x, problem.y)}
    for row in ROWS:
        steps["ours", row.name] = ggn_step(problem, row.ask, **row.options)
    gram = ggn_step(problem, lambda ggn: ggn.block.gram()).step()
    for name, solver in SOLVERS.items():
        steps["ours", name] = Variant(partial(solver, gram))
    return steps


def _floors(products: dict[str, tuple], device: str) -> dict[Key, Variant]:
    """Return one variant per list of products; rows with the same list share it."""
    source = operands(device)
    return {
        ("floor", str(hash(floor))): Variant(runner([p.prepare(source) for p in floor]))
        for floor in set(products.values())
    }
