"""Several columns of ``fisher="exact"`` at a time or one by one: ``python -m benchmarks.columns``.

Processor time of one thread, and peak memory of a step, relative to the choice that `backpack_ext.sweep`
makes; interleaved, medians. A number is a chunk's columns, "v" that they are vectorised.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from backpack_ext import KFAC, DiagGGN, Extension, backpack, extend, sweep
from benchmarks.memory import peak_memory
from benchmarks.models import PROBLEMS
from benchmarks.report import machine

CHUNKS = (1, 2, 3, 5, 9)
ROWS: dict[str, Callable[[], Extension]] = {
    "KFAC expand": lambda: KFAC(fisher="exact"),
    "KFAC reduce": lambda: KFAC("reduce", fisher="exact"),
    "DiagGGN": lambda: DiagGGN("exact"),
}


class Choice:
    """A way to send columns, while it is entered.

    Args:
        columns: How many at a time; None for what `sweep` chooses.
        vectorised: Whether they travel together.
        size: Entries of the cotangents of one column.
    """

    def __init__(self, columns: int | None = None, vectorised: bool = False, size: int = 0):
        self.columns, self.vectorised, self.size = columns, vectorised, size

    def __str__(self) -> str:
        return "chosen" if self.columns is None else f"{self.columns}{'v' * self.vectorised}"

    def __enter__(self) -> None:
        self._saved = sweep.MAX_BYTES, sweep.SMALL, KFAC.gathers
        if self.columns is not None:
            sweep.MAX_BYTES = 8 * self.size * self.columns
            sweep.SMALL, KFAC.gathers = 2**60 if self.vectorised else 0, True

    def __exit__(self, *exc) -> None:
        sweep.MAX_BYTES, sweep.SMALL, KFAC.gathers = self._saved


def measure(problem: str, row: str, seconds: float) -> dict[str, dict[str, float]]:
    """Return milliseconds and megabytes by choice."""
    P = PROBLEMS[problem]("cpu")
    model, loss_fn = extend(P.model), extend(nn.CrossEntropyLoss())
    ext, sizes = ROWS[row](), []
    handles = [
        m.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
        for m in model.modules()
        if any(True for _ in m.parameters(recurse=False))
    ]

    def step() -> None:
        with backpack(ext):
            loss_fn(model(P.x), P.y).backward()

    step()
    for handle in handles:
        handle.remove()
    choices = [Choice(), *(Choice(k, v, sum(sizes)) for v in (False, True) for k in CHUNKS)]
    times: dict[Choice, list[float]] = {choice: [] for choice in choices}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[choices[0]]) < 3:
        for choice, found in times.items():
            with choice:
                begin = time.process_time()
                step()
                found.append(1e3 * (time.process_time() - begin))
    results = {}
    for choice, found in times.items():
        with choice:
            results[str(choice)] = {"ms": median(found), "MB": peak_memory(step, "cpu") / 1e6}
    return results


def main(arguments: list[str] | None = None) -> None:
    """Measure and print tables; store them as JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.columns", description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each network and quantity")
    parser.add_argument("--problems", nargs="*", default=["mlp", "cnn", "vit", "tiny"], choices=PROBLEMS)
    parser.add_argument("--output", type=Path, help="JSON; by default in benchmarks/results")
    given = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for problem in given.problems:
        for row in ROWS:
            results = found[f"{problem}, {row}"] = measure(problem, row, given.seconds)
            chosen = results["chosen"]
            print(f"{problem}, {row}: {chosen['ms']:.0f} ms, {chosen['MB']:.0f} MB", flush=True)
            for name, r in list(results.items())[1:]:
                print(f"  {name:3} {r['ms'] / chosen['ms']:6.2f} {r['MB'] / chosen['MB']:6.2f}")
    torch.set_num_threads(threads)
    path = given.output or Path(__file__).parent / "results" / "columns-cpu.json"
    path.write_text(json.dumps({"machine": machine("cpu"), "columns": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
