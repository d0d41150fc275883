"""One problem, all optimizers: time of periods, memory, floors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median

from benchmarks.cores import crossing
from benchmarks.floor import operands, shapes_of, total_flops
from benchmarks.lowrank.measuring import Length, digits, runner, sync_of
from benchmarks.memory import peak_memory
from benchmarks.models import Problem
from benchmarks.timing import Variant, interleave, summary
from benchmarks.training.contenders import ADAMW, INTERVAL, SGD, Contender, Training
from benchmarks.training.floors import Work

PLAIN = ("torch", ADAMW)
MOMENTUM = ("torch", SGD)
FLOOR = "floor"
Key = tuple


def measure(problem: Problem, contenders: list[Contender], length: Length, device: str) -> dict:
    """Measure one problem.

    Args:
        problem: The model and its batch.
        contenders: The optimizers, torch's among them.
        length: How long to measure.
        device: Where it runs.

    Returns:
        A dictionary for JSON. For each row and side: ``time``, quartiles of ratios of periods to those
        of AdamW in the same round; ``refresh`` and ``between``, ratios of medians for the iteration with
        a refresh and for each other one; ``state``, bytes of the optimizer's state relative to the
        parameters'; ``peak``, ratio to AdamW of what an iteration allocates at once; ``total``, the
        same of parameters, state and peak together. ``crossing`` is what `benchmarks.cores.crossing`
        says before and after.
    """
    sync = sync_of(device)
    # one after the other: what is built holds memory, but does nothing between its visits
    trainings = {(c.side, c.name): Training(c, problem) for c in contenders}
    once = {(c.side, c.name) for c in contenders if c.endless}
    variants: dict = {}
    for key, training in trainings.items():
        variants[key] = Variant(training.period)
        if key not in once:
            variants[key].warm_up(sync)
            training.laps.clear()
    shapes = shapes_of(copy.deepcopy(problem.model), problem.x)
    works = {c.name: c.work(shapes) for c in contenders if c.work is not None}
    variants |= _floors(works, device)
    short = {key: variant for key, variant in variants.items() if key not in once}
    before = crossing(device)
    times = interleave(short, PLAIN, sync, length.seconds, length.rounds)
    after = crossing(device)
    for key in once:
        variants[key].time(sync)
        first, other = trainings[key].laps[-1]
        times[key] = [first + (INTERVAL - 1) * other] * len(times[PLAIN])
    peaks = {key: _peak(training, device) for key, training in trainings.items()}
    weights = sum(p.nbytes for p in problem.model.parameters())
    states = {key: training.state_bytes for key, training in trainings.items()}
    plain_lap = median(lap[1] for lap in trainings[PLAIN].laps)

    def cell(key: Key) -> dict:
        first, other = map(median, zip(*trainings[key].laps, strict=True))
        ratios = [t / plain for t, plain in zip(times[key], times[PLAIN], strict=True)]
        total = weights + states[key] + peaks[key]
        found = {
            "time": digits(summary(ratios)),
            "refresh": digits([first / plain_lap])[0],
            "between": digits([other / plain_lap])[0],
            "state": digits([states[key] / weights])[0],
            "peak": digits([peaks[key] / peaks[PLAIN]])[0],
            "total": digits([total / (weights + states[PLAIN] + peaks[PLAIN])])[0],
        }
        return found if trainings[key].is_sound else found | {"sound": False}

    rows = {}
    for c in contenders:
        row = rows.setdefault(c.name, {"name": c.name})
        row[c.side] = cell((c.side, c.name))
        if c.name in works:
            row[FLOOR] = _floor(works[c.name], times)
        if problem.name in c.goals:
            row["goal"] = c.goals[problem.name]
    return {
        "name": problem.name,
        "title": problem.title,
        "about": problem.about,
        "batch": len(problem.x),
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "interval": INTERVAL,
        "rounds": len(times[PLAIN]),
        "plain_ms": digits([1e3 * t / INTERVAL for t in summary(times[PLAIN])]),
        "plain_mib": digits([peaks[PLAIN] / 2**20])[0],
        "crossing": [before, after],
        "rows": list(rows.values()),
    }


def _floors(works: dict[str, Work], device: str) -> dict[Key, Variant]:
    """Return one variant per list of products: those of a period."""
    source = operands(device)
    found = {}
    for work in works.values():
        if (FLOOR, work) not in found:
            step = runner([p.prepare(source) for p in work.step])
            refresh = runner([p.prepare(source) for p in work.refresh])
            found[FLOOR, work] = variant = Variant(_period(step, refresh))
            variant.warm_up(lambda: None)
    return found


def _period(step: Callable[[], list], refresh: Callable[[], list]) -> Callable[[], None]:
    def run() -> None:
        refresh()
        for _ in range(INTERVAL):
            step()

    return run


def _floor(work: Work, times: dict) -> dict:
    rounds = zip(times[FLOOR, work], times[MOMENTUM], times[PLAIN], strict=True)
    gflop = (total_flops(list(work.step)) + total_flops(list(work.refresh)) / INTERVAL) / 1e9
    return {
        "time": digits(summary([(extra + sgd) / plain for extra, sgd, plain in rounds])),
        "gflop": digits([gflop])[0],
    }


def _peak(training: Training, device: str) -> int:
    """Return the peak over a refresh and the iteration after it; the period is completed."""

    def two() -> None:
        training.iteration()
        training.iteration()

    peak = peak_memory(two, device)
    for _ in range(training.interval - 2):
        training.iteration()
    return peak
