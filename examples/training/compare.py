"""The comparison: the settings that were found, new seeds, both data types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from examples.training.estimate import announce
from examples.training.search import configuration
from examples.training.store import Store
from examples.training.tasks import TASKS
from examples.training.training import Run, train

FIRST_SEED = 1
EVALUATIONS = 40


def compare(
    tasks: Sequence[str],
    optimizers: Sequence[str],
    dtypes: Sequence[str],
    seeds: int,
    steps: int | None,
    out: Path,
) -> None:
    """Run what has not been run, one run at a time: seconds are compared.

    The optimizers take turns, seed by seed, each time another one first: what slows the machine down
    for a while slows all of them down.

    Args:
        tasks: Names of tasks.
        optimizers: Names of optimizers.
        dtypes: Names of data types.
        seeds: Number of seeds.
        steps: Steps of a run; each task's own number if None.
        out: Folder of the results, with ``found.json``.

    Raises:
        FileNotFoundError: If nothing has been searched.
        KeyError: If an optimizer has not been searched on a task.
    """
    path = out / "found.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: run `python -m examples.training search --out {out}` first.")
    found = json.loads(path.read_text())
    store = Store(out / "runs.jsonl")
    runs = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for task in tasks:
            for dtype in dtypes:
                turn = seed % len(optimizers)
                for name in (*optimizers[turn:], *optimizers[:turn]):
                    config, length = configuration(found, task, name), steps or TASKS[task].steps
                    evaluations = min(EVALUATIONS, length)
                    runs.append(Run(task, name, config, seed, dtype, length, evaluations))
    missing = store.missing(runs)
    announce("comparison", missing)
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc="comparison", unit="run") as bar:
        for run in missing:
            bar.set_postfix_str(f"{run.task}, {run.optimizer}, {run.dtype}, seed {run.seed}")
            store.add(run, train(run))
            bar.update()
