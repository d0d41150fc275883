"""The report: a table for each task and data type, and the curves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from examples.training.optimizers import OPTIMIZERS
from examples.training.plots import draw
from examples.training.store import Store
from examples.training.tasks import TASKS
from examples.training.training import DTYPES, Curve

REFERENCE = "AdamW"
STEPS, SECONDS = 0.75, 1.0  # the goal, as shares of what the reference needs
HEADER = (
    *("optimizer", "validation loss", "accuracy", "steps, %", "time, %", "seconds"),
    *("reached", "goal", "ms a step", "diverged"),
)
LEGEND = f"""\
Smallest validation loss of a run, and the accuracy there, mean (standard deviation) over seeds, of the
runs that did not diverge. Steps, time: until {REFERENCE}'s smallest validation loss on the same seed is
reached, relative to what {REFERENCE} needed, median over seeds (a run that does not reach it counts as
infinitely long); seconds: the same time in seconds. Reached: by how many seeds. Goal: at most
{STEPS:.0%} of the steps, and no more time. Time is that of the training iterations, evaluation left out.
Diverged: runs whose loss ended above where it began, or was not finite, or whose decompositions failed.
"""

# Curves by optimizer and seed.
Group = Mapping[str, Mapping[int, Curve]]


@dataclass(frozen=True)
class Reached:
    """What it took to reach the reference's smallest loss; infinite if that was not reached.

    Attributes:
        steps: Steps, relative to those of the reference.
        time: Seconds, relative to those of the reference.
        seconds: Seconds.
    """

    steps: float
    time: float
    seconds: float


def reach(curve: Curve, reference: Curve) -> Reached:
    """Return what a run took to reach the reference's smallest loss."""
    k = min(range(len(reference.loss)), key=reference.loss.__getitem__)
    target, steps, seconds = reference.loss[k], reference.steps[k], reference.seconds[k]
    there = next((j for j, loss in enumerate(curve.loss) if loss <= target), None)
    if curve.failure or there is None:
        return Reached(*3 * (float("inf"),))
    return Reached(curve.steps[there] / steps, curve.seconds[there] / seconds, curve.seconds[there])


@dataclass(frozen=True)
class Row:
    """One optimizer's row.

    Attributes:
        losses: Smallest validation loss, per run that did not diverge.
        accuracies: The accuracies there.
        reached: What it took to reach the reference, per seed that the reference has finished.
        ms: Milliseconds per step, per run.
        diverged: Number of runs that diverged.
    """

    losses: list[float]
    accuracies: list[float]
    reached: list[Reached]
    ms: list[float]
    diverged: int

    @classmethod
    def of(cls, curves: Mapping[int, Curve], reference: Mapping[int, Curve]) -> Row:
        """Return the row of an optimizer's curves, by seed."""
        whole = [curve for curve in curves.values() if not curve.failure]
        compared = [s for s in curves if s in reference and not reference[s].failure]
        return cls(
            losses=[curve.best for curve in whole],
            accuracies=[curve.accuracy[curve.loss.index(curve.best)] for curve in whole],
            reached=[reach(curves[seed], reference[seed]) for seed in compared],
            ms=[1e3 * curve.seconds[-1] / curve.steps[-1] for curve in whole],
            diverged=len(curves) - len(whole),
        )

    def median(self, name: str) -> float:
        """Return the median over seeds of an attribute of `Reached`."""
        return median(getattr(r, name) for r in self.reached) if self.reached else float("inf")

    @property
    def goal(self) -> bool:
        """Whether few enough steps, and no more time, were enough."""
        return self.median("steps") <= STEPS and self.median("time") <= SECONDS

    def cells(self, name: str) -> list[str]:
        """Return the texts of the row."""
        count = sum(r.steps < float("inf") for r in self.reached)
        return [
            name,
            spread(self.losses, ".4f"),
            spread([100 * a for a in self.accuracies], ".1f"),
            number(100 * self.median("steps"), ".0f"),
            number(100 * self.median("time"), ".0f"),
            number(self.median("seconds"), ".2f"),
            f"{count} of {len(self.reached)}",
            "-" if name == REFERENCE else "yes" if self.goal else "no",
            number(median(self.ms) if self.ms else float("inf"), ".2f"),
            str(self.diverged),
        ]


def number(value: float, form: str) -> str:
    """Return a number's text; a dash if it is infinite."""
    return "-" if value == float("inf") else format(value, form)


def spread(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation."""
    if not values:
        return "-"
    return f"{mean(values):{form}} ({stdev(values) if len(values) > 1 else 0:{form}})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a simple table of reStructuredText."""
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (HEADER, *rows)
    ]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def verdict(rows: Mapping[str, Row]) -> str:
    """Return a sentence: which kinds of SINGD reach the goal."""
    singd = {name: row for name, row in rows.items() if name.startswith("SINGD")}
    if REFERENCE not in rows or not singd:
        return ""
    met = sorted((row.median("steps"), name) for name, row in singd.items() if row.goal)
    if not met:
        return (
            f"No SINGD reaches {REFERENCE}'s smallest loss in {STEPS:.0%} of its steps and in its time."
        )
    found = (f"{name} ({s:.0%} of steps, {singd[name].median('time'):.0%} of time)" for s, name in met)
    return f"These reach the goal: {', '.join(found)}."


def groups(out: Path) -> Iterator[tuple[tuple[str, str, int], Group]]:
    """Yield the runs with the settings of ``found.json``, by task, data type and number of steps."""
    found = json.loads((out / "found.json").read_text())
    groups: dict[tuple[str, str, int], dict] = defaultdict(lambda: defaultdict(dict))
    for run, curve in Store(out / "runs.jsonl").runs():
        choice = found.get(run.task, {}).get(run.optimizer)
        if choice is not None and json.loads(json.dumps(run.config)) == choice["config"]:
            groups[run.task, run.dtype, run.steps][run.optimizer][run.seed] = curve
    for task in TASKS:
        for dtype in DTYPES:
            for key in sorted(k for k in groups if k[:2] == (task, dtype)):
                yield key, {name: groups[key][name] for name in OPTIMIZERS if name in groups[key]}


def report(out: Path) -> list[Path]:
    """Print the tables, write them to ``tables.rst``, and draw; return the files that were written."""
    parts, curves = [LEGEND], defaultdict(dict)
    for (task, dtype, steps), group in groups(out):
        reference = group.get(REFERENCE, {})
        rows = {name: Row.of(found, reference) for name, found in group.items()}
        seeds = max(map(len, group.values()))
        title = f"{TASKS[task].title}, {dtype}, {steps} steps, {seeds} seeds"
        lines = table([row.cells(name) for name, row in rows.items()])
        parts.append(f"{title}\n{'~' * len(title)}\n\n{lines}\n\n{verdict(rows)}".rstrip() + "\n")
        curves[task, steps][dtype] = group
    text = "\n".join(parts)
    print(f"\n{text}")
    path = out / "tables.rst"
    path.write_text(text)
    return [path, *(draw(task, steps, found, out) for (task, steps), found in curves.items())]
