"""Runs and what came of them, in a file with one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from examples.training.training import Curve, Run


class Store:
    """A file of runs. Each is appended as it ends, so that nothing is lost, and nothing is run twice.

    Args:
        path: The file; it and its folder may not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.curves: dict[str, Curve] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.curves[key(Run(**entry["run"]))] = Curve(**entry["curve"])

    def __getitem__(self, run: Run) -> Curve:
        return self.curves[key(run)]

    def __contains__(self, run: Run) -> bool:
        return key(run) in self.curves

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Return the runs that are not in the file."""
        return [run for run in runs if run not in self]

    def runs(self) -> Iterator[tuple[Run, Curve]]:
        """Yield all runs, in the order in which they ended."""
        for text, curve in self.curves.items():
            yield Run(**json.loads(text)), curve

    def add(self, run: Run, curve: Curve) -> None:
        """Append a run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"run": asdict(run), "curve": curve.as_dict()}) + "\n")
        self.curves[key(run)] = curve


def key(run: Run) -> str:
    """Return a text that is the same for equal runs, also for those read from a file."""
    return json.dumps(asdict(run), sort_keys=True)
