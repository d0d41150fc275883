"""How long runs will take: a few steps of each kind are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

from tqdm.auto import tqdm

from examples.training.training import Run, train

STEPS = 11  # the first, in which layers are checked, is not timed


def estimate(runs: Sequence[Run]) -> float:
    """Return the seconds that runs take one after the other, at most: first steps have most refreshes.

    Each combination of task, optimizer and data type is tried for some steps, which also is the warm-up
    that the first runs of a process need.
    """
    kinds: dict[tuple[str, str, str], float] = {}
    examples = {(run.task, run.optimizer, run.dtype): run for run in runs}
    for kind, run in tqdm(examples.items(), desc="estimate of the time", unit="kind", leave=False):
        start = perf_counter()
        curve = train(replace(run, steps=STEPS, evaluations=STEPS))
        rest = (perf_counter() - start - curve.seconds[-1]) if curve.seconds else 0.0
        step = (curve.seconds[-1] - curve.seconds[0]) / (STEPS - 1) if len(curve.steps) == STEPS else 0.0
        kinds[kind] = step * run.steps + rest * max(1.0, run.evaluations / STEPS)
    return sum(kinds[run.task, run.optimizer, run.dtype] for run in runs)


def announce(what: str, runs: Sequence[Run], processes: int = 1) -> None:
    """Print how long runs will take."""
    if not runs:
        print(f"{what}: all runs are there")
        return
    seconds = estimate(runs) / min(processes, len(runs))
    print(
        f"{what}: {len(runs)} runs, up to {seconds / 60:.1f} minutes by {processes} processes",
        flush=True,
    )
