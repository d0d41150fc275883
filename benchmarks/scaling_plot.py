"""The plot of `benchmarks.scaling`: milliseconds beyond the plain step over each size.

Colours can be told apart by the colour-blind (Okabe and Ito's palette).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.quality_plot import STYLE
from benchmarks.scaling import PLAIN, fitted

COLOURS = {
    PLAIN: "0.3",
    "KFAC expand mc": "#0072B2",
    "KFAC reduce mc": "#56B4E9",
    "SumGradSquared": "#009E73",
    "DiagGGN mc": "#E69F00",
    "KFAC expand exact": "#CC79A7",
    "DiagGGN exact": "#D55E00",
}
COLUMNS = 3


def draw(found: dict, path: Path) -> None:
    """Draw one panel per size: ours solid, floors dashed, exponents in the legend.

    Args:
        found: What `benchmarks.scaling.main` returned.
        path: The file.
    """
    problems = found["problems"]
    columns = min(COLUMNS, len(problems))
    rows = -(-len(problems) // columns)
    with plt.rc_context(STYLE):
        size = (3.7 * columns, 3.0 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for ax, problem in zip(axes.flat, problems, strict=False):
            _panel(ax, problem)
        for ax in axes.flat[len(problems) :]:
            ax.axis("off")
        figure.supylabel("ms beyond the plain step (dashed: floor)", fontsize=9)
        figure.savefig(path)
        plt.close(figure)


def _panel(ax: plt.Axes, problem: dict) -> None:
    ax.set_title(problem["model"])
    ax.set_xlabel(problem["label"])
    ax.set_xscale("log")
    ax.set_yscale("log")
    for row in problem["rows"]:
        name, _, floor = row["name"].partition(": ")
        shown = [(x, y) for x, y in zip(problem["values"], row["ms"], strict=True) if y > 0]
        xs, ys = [x for x, _ in shown], [y for _, y in shown]
        if floor:
            ax.plot(xs, ys, "--", c=COLOURS[name], lw=0.9)
        else:
            ax.plot(xs, ys, "o-", c=COLOURS[name], ms=3, label=f"{name}: {fitted(row)}")
    ax.set_xticks(problem["values"], [str(value) for value in problem["values"]])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=6)
