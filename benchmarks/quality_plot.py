"""The plot of `benchmarks.hessian_quality`: errors over the number of samples.

Colours can be told apart by the colour-blind (Okabe and Ito's palette).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.equal_time import whole
from benchmarks.estimators import BECKER, GGN, HESSCALE, HUTCHINSON, PENULTIMATE, SAMPLED_GGN
from benchmarks.quality_problems import LARGE
from benchmarks.quality_tables import find

LEVELS = {
    HESSCALE: ("#0072B2", "-"),
    PENULTIMATE: ("#56B4E9", "--"),
    BECKER: ("#009E73", "-."),
    GGN: ("0.4", ":"),
}
CURVES = {HUTCHINSON: "#D55E00", SAMPLED_GGN: "#E69F00"}
STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
}
COLUMNS = 4


def draw(found: dict, path: Path) -> None:
    """Draw one panel per setting.

    Args:
        found: What `benchmarks.hessian_quality.main` returned.
        path: The file.
    """
    problems = [p for p in found["problems"] if p["network"] != LARGE]
    times = {entry["network"]: entry for entry in found["times"]}
    columns = min(COLUMNS, len(problems) + 1)
    rows = -(-(len(problems) + 1) // columns)
    with plt.rc_context(STYLE):
        size = (2.3 * columns, 2.0 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
        for ax, problem in zip(axes.flat, problems, strict=False):
            _panel(ax, problem, times[problem["network"]])
        for ax in axes.flat[len(problems) :]:
            ax.axis("off")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        axes.flat[len(problems)].legend(handles, labels, loc="center", frameon=False, fontsize=8)
        figure.supxlabel("samples", fontsize=9)
        figure.supylabel("sum |estimate - H| / sum |H|", fontsize=9)
        figure.savefig(path)
        plt.close(figure)


def _panel(ax: plt.Axes, problem: dict, times: dict) -> None:
    ax.set_title(problem["title"])
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(0.02, 100)  # an exact estimate (the GGN's diagonal without curvature) is below
    for name, (colour, line) in LEVELS.items():
        ax.axhline(find(problem, name)["mean"], c=colour, ls=line, label=name)
    for name, colour in CURVES.items():
        rows = sorted((r for r in problem["rows"] if r["name"] == name), key=lambda r: r["samples"])
        xs, ys = [r["samples"] for r in rows], [r["mean"] for r in rows]
        ax.plot(xs, ys, c=colour, label=name)
        # times were taken with a batch, which is not every panel's
        if problem["batch"] == times["batch"]:
            fit = whole(times[name])
            label = "as long as HesScale" if name == HUTCHINSON else None
            ax.plot(fit, find(problem, name, fit)["mean"], "o", c=colour, ms=5, label=label)
    ax.set_xticks([1, 10, 50], ["1", "10", "50"])
    ax.minorticks_off()
