"""Validation loss against steps and against seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from examples.digits_plots import BLUE, RED, STYLE
from examples.training.optimizers import OPTIMIZERS
from examples.training.tasks import TASKS
from examples.training.training import Curve


def looks() -> dict[str, dict]:
    """Return colours and lines: SINGD's structures by one palette, the other families by dashes."""
    singd = [name for name in OPTIMIZERS if name.startswith("SINGD")]
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(singd)))
    found: dict[str, dict] = {name: {"color": c} for name, c in zip(singd, colours, strict=True)}
    found["SGD"] = {"color": "0.55", "linewidth": 2.5}
    found["AdamW"] = {"color": "black", "linewidth": 2.5}
    for name, colour in zip(("INGD", "IKFAC", "KFAC"), (BLUE, "#E69F00", RED), strict=True):
        found[name] = {"color": colour, "linestyle": "--"}
    for name, colour in zip(
        ("RF-RMSProp", "RF-AdamW", "RF-Shampoo"), ("#CC79A7", "#882255", "0.3"), strict=True
    ):
        found[name] = {"color": colour, "linestyle": ":"}
    return found


def average(curves: Mapping[int, Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return steps, mean seconds and mean losses of the runs that did not diverge; None if all did."""
    whole = [curve for curve in curves.values() if not curve.failure]
    if not whole:
        return None
    return tuple(
        np.mean([getattr(c, what) for c in whole], axis=0) for what in ("steps", "seconds", "loss")
    )


def draw(
    task: str, steps: int, found: Mapping[str, Mapping[str, Mapping[int, Curve]]], out: Path
) -> Path:
    """Draw a task: a row of panels per data type.

    Args:
        task: Name of the task.
        steps: Number of steps of the runs, which the file's name has unless it is the task's own.
        found: Curves by data type, optimizer and seed.
        out: Folder to write to.

    Returns:
        The file.
    """
    lines = looks()
    with plt.rc_context(STYLE):
        size = (9, 3.2 * len(found) + 0.3)
        figure, axes = plt.subplots(len(found), 2, figsize=size, squeeze=False, sharey=True)
        for (dtype, group), row in zip(found.items(), axes, strict=True):
            for name, curves in group.items():
                if (means := average(curves)) is None:
                    continue
                for axis, x in zip(row, means, strict=False):
                    axis.semilogy(x, means[2], label=name, **{"linewidth": 1.2} | lines[name])
            row[0].set(xlabel="steps", ylabel="validation loss", title=f"{TASKS[task].title}, {dtype}")
            row[1].set(xlabel="seconds", title="the same against time")
        shown = {line.get_label(): line for axis in axes[::-1, 0] for line in axis.get_lines()}
        handles = [shown[name] for name in OPTIMIZERS if name in shown]
        figure.legend(handles=handles, loc="outside right upper", fontsize=7)
        suffix = "" if steps == TASKS[task].steps else f"_{steps}"
        path = out / f"{task}{suffix}.png"
        figure.savefig(path)
        plt.close(figure)
    return path
