"""Random search: the same number of trials for every optimizer and task, by validation loss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from random import Random

from tqdm.auto import tqdm

from examples.training.estimate import announce
from examples.training.optimizers import OPTIMIZERS, Config
from examples.training.store import Store
from examples.training.tasks import TASKS
from examples.training.training import Curve, Run, train

SEED = 0  # of data and parameters of all trials; comparisons have others
EVALUATIONS = 20


def trial(task: str, optimizer: str, number: int, steps: int | None) -> Run:
    """Return a trial; its settings depend on task, optimizer and number only."""
    config = OPTIMIZERS[optimizer].draw(Random(f"{task}, {optimizer}, {number}"))
    steps = steps or TASKS[task].steps
    return Run(task, optimizer, config, SEED, "float32", steps, min(EVALUATIONS, steps))


def search(
    tasks: Sequence[str],
    optimizers: Sequence[str],
    trials: int,
    steps: int | None,
    processes: int,
    out: Path,
) -> dict[str, dict[str, dict]]:
    """Run the trials that have not been run, and choose.

    Args:
        tasks: Names of tasks.
        optimizers: Names of optimizers.
        trials: Trials of each optimizer on each task.
        steps: Steps of a trial; each task's own number if None.
        processes: How many trials run at a time, with one thread each.
        out: Folder of the results.

    Returns:
        The choices, by task and optimizer, as in ``found.json``.
    """
    store = Store(out / "search.jsonl")
    # The first trials of all optimizers come first: a search that is stopped has treated all alike.
    runs = [trial(t, o, k, steps) for k in range(trials) for t in tasks for o in optimizers]
    missing = store.missing(runs)
    announce("search", missing, processes)
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc="search", unit="trial") as bar:
        for run, curve in train_all(missing, processes):
            store.add(run, curve)
            bar.set_postfix_str(f"{run.task}, {run.optimizer}: {curve.best:.3g}", refresh=False)
            bar.update()

    path = out / "found.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for task in tasks:
        for optimizer in optimizers:
            tried = [trial(task, optimizer, k, steps) for k in range(trials)]
            best = min(tried, key=lambda run: store[run].best)
            found.setdefault(task, {})[optimizer] = {
                "config": best.config,
                "loss": float(f"{store[best].best:.5g}"),
                "trials": trials,
                "failed": sum(bool(store[run].failure) for run in tried),
                "steps": best.steps,
            }
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def train_all(runs: Sequence[Run], processes: int) -> Iterator[tuple[Run, Curve]]:
    """Train several at a time; yield runs with their curves, as they end."""
    if processes == 1 or not runs:
        yield from ((run, train(run)) for run in runs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train, run): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def configuration(found: dict[str, dict[str, dict]], task: str, optimizer: str) -> Config:
    """Return the settings that were found.

    Raises:
        KeyError: If there are none.
    """
    try:
        return found[task][optimizer]["config"]
    except KeyError:
        raise KeyError(
            f"no settings of {optimizer} on {task} in found.json; first `python -m examples.training "
            f"search --tasks {task} --optimizers {optimizer!r}`."
        ) from None
