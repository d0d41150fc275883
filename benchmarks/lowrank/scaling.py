"""How the exact Gram matrix and its spectrum grow with data, classes and width."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from benchmarks.deep import exponent
from benchmarks.lowrank.measuring import PLAIN, Length, backward_step, digits, measure
from benchmarks.lowrank.spectrum import ggn_step
from benchmarks.models import mlp

GRAM, SPECTRUM = "Gram matrix", "Gram matrix and spectrum"
NAMES = ("plain step", GRAM, SPECTRUM)
# What is varied, and what it is otherwise.
AXES = {
    "N": (8, 16, 32, 64, 128),
    "C": (2, 5, 10, 20, 50),
    "width": (64, 128, 256, 512, 1024, 2048),
}
QUICK = {"N": (2, 4), "C": (2, 3), "width": (8, 16)}
DEFAULT = {"N": 32, "C": 10, "width": 512}
LABELS = {"N": "data N", "C": "classes C", "width": "width"}


def run(axes: dict[str, tuple[int, ...]], length: Length, device: str) -> Iterator[dict]:
    """Measure along each axis.

    Yields:
        A dictionary for JSON per axis: for the plain step, and for what comes on top of it, the
        medians in milliseconds, the exponent of the best power law, and that of the last two points.
    """
    for axis, values in axes.items():
        points = [_point(DEFAULT | {axis: value}, length, device) for value in values]
        rows = []
        for name in NAMES:
            ms = digits([point[name] for point in points])
            rows.append(
                {
                    "name": name,
                    "ms": ms,
                    "exponent": _rounded(exponent(values, ms)),
                    "last": _rounded(exponent(values[-2:], ms[-2:])),
                }
            )
        yield {"part": "scaling", "name": axis, "values": list(values), "rows": rows}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _point(sizes: dict[str, int], length: Length, device: str) -> dict[str, float]:
    """Return the milliseconds of the plain step, and of each quantity beyond it."""
    problem = mlp(sizes["N"], sizes["width"], sizes["C"], device)
    steps = {
        PLAIN: backward_step(copy.deepcopy(problem.model), nn.CrossEntropyLoss(), problem.x, problem.y),
        ("ours", GRAM): ggn_step(problem, lambda ggn: ggn.block.gram()),
        ("ours", SPECTRUM): ggn_step(problem, lambda ggn: ggn.eigvalsh()),
    }
    measured = measure(steps, length, device, memory=False)
    plain = measured.ms(PLAIN)[1]
    extra = {name: measured.ms(("ours", name))[1] - plain for name in (GRAM, SPECTRUM)}
    return {"plain step": plain} | extra
