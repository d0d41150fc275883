"""``python -m benchmarks.hessian_quality``: how near estimates of the Hessian's diagonal are.

The error is ``sum |estimate - H| / sum |H|`` over all parameters, in float64, against the exact
diagonal by double backward. Then the same at equal time: with as many samples of v * Hv and of the
GGN's diagonal as take the time of a step with HesScale, in float32. Prints tables, stores them as JSON
and draws a plot (the extra ``plots``).

The large network's exact diagonal is taken at some of its parameters, drawn at random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch

from benchmarks import quality_tables, report
from benchmarks.__main__ import RESULTS, _threads
from benchmarks.equal_time import measure, whole
from benchmarks.estimators import (
    EXTENSIONS,
    HUTCHINSON,
    SAMPLED_GGN,
    diagonal,
    error,
    exact_diagonal,
    extensions_for,
    hutchinson,
    sampled_ggn,
)
from benchmarks.models import Problem
from benchmarks.quality_problems import LARGE, LARGE_SEEDS, NETWORKS, TRAINED, Setting, settings

SAMPLES = (1, 2, 5, 10, 20, 50)
# Seconds per network for the times, and the smallest and largest number of rounds.
LENGTHS = {"quick": (0.0, (2, 2)), "default": (6.0, (7, 60))}
QUICK_STEPS, QUICK_SAMPLES = 20, (1, 10)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    names = [setting.name for setting in settings()]
    parser = argparse.ArgumentParser("python -m benchmarks.hessian_quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 steps of training, few samples")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 10; 1 with --quick)")
    parser.add_argument("--settings", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and plot")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (1 if args.quick else 10)
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the benchmark.

    Args:
        argv: Command line; that of the process by default.

    Returns:
        The report that was stored.
    """
    args = parse(argv)
    with _threads(args.threads):
        return _run(args)


def _run(args: argparse.Namespace) -> dict:
    about = report.machine("cpu")
    print(report.describe(about), end="\n\n")
    every = settings(QUICK_STEPS if args.quick else TRAINED)
    chosen = [setting for setting in every if setting.name in args.settings]
    times = _times(chosen, *LENGTHS["quick" if args.quick else "default"])
    fits = {entry["network"]: _fits(entry) for entry in times}
    samples = QUICK_SAMPLES if args.quick else SAMPLES
    found = {"machine": about, "seeds": args.seeds, "samples": samples, "times": times, "problems": []}
    for setting in chosen:
        counts = _counts(samples, fits[setting.network], fits.get(LARGE, {}))
        if setting.network == LARGE:  # a sample takes long: none beyond those at equal time
            counts = _counts((1,), fits[LARGE])
        found["problems"].append(measure_setting(setting, args.seeds, counts))
        print(quality_tables.text(found["problems"][-1]), end="\n\n", flush=True)
    print(quality_tables.rst(found), quality_tables.equal_time(found), sep="\n\n", end="\n\n")
    path = args.out / f"hessian_quality{'-quick' if args.quick else ''}.json"
    report.write(found, path)
    print(f"stored in {path}")
    _plot(found, path.with_suffix(".png"))
    return found


def _plot(found: dict, path: Path) -> None:
    try:
        from benchmarks.quality_plot import draw
    except ImportError:
        print("no plot: matplotlib is missing (the extra `plots`)")
        return
    draw(found, path)
    print(f"drawn in {path}")


# --------------------------------------------------------------------------- measuring


def _times(chosen: Sequence[Setting], seconds: float, rounds: tuple[int, int]) -> list[dict]:
    """Time each network once, at initialisation: times do not depend on the parameters' values."""
    found = []
    for name in dict.fromkeys(setting.network for setting in chosen):
        problem = Setting(name, NETWORKS[name].batch).draw(0)
        found.append({"network": name, **measure(problem, seconds, rounds)})
        print(quality_tables.times(found[-1]), end="\n\n", flush=True)
    return found


def _fits(entry: dict) -> dict[str, int]:
    return {name: whole(entry[name]) for name in (HUTCHINSON, SAMPLED_GGN)}


def _counts(samples: Sequence[int], *fits: dict[str, int]) -> dict[str, list[int]]:
    """Return, per estimate, the numbers of samples: the given ones and those at equal time."""
    return {
        name: sorted({*samples, *(fit[name] for fit in fits if fit)})
        for name in (HUTCHINSON, SAMPLED_GGN)
    }


def measure_setting(setting: Setting, seeds: int, counts: dict[str, list[int]]) -> dict:
    """Measure the errors of all estimates.

    Args:
        setting: The network and its batch.
        seeds: Number of seeds, each with its own network, teacher and batch.
        counts: Numbers of samples, for `HUTCHINSON` and `SAMPLED_GGN`.

    Returns:
        A dictionary for JSON. Per estimate: ``mean`` and ``std``, the standard deviation over seeds, of
        the error, its ``values``, and ``inner``, the mean error over all parameters but the last
        layer's, where HesScale is exact.
    """
    if setting.network == LARGE:
        seeds = min(seeds, LARGE_SEEDS)
    values: dict[tuple[str, int | None], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        problem = setting.draw(seed)
        size = sum(p.numel() for p in problem.model.parameters())
        head = sum(p.numel() for p in list(problem.model.parameters())[-2:])
        drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        drawn = drawn[: setting.entries]
        inner = drawn < size - head
        exact = exact_diagonal(problem, drawn)
        for key, estimate in _estimates(problem, counts, seed).items():
            of = estimate[drawn]
            errors = error(of, exact), error(of[inner], exact[inner])
            values.setdefault(key, []).append(errors)
    return {
        "name": setting.name,
        "title": setting.title,
        "network": setting.network,
        "about": NETWORKS[setting.network].about,
        "batch": setting.batch,
        "steps": setting.steps,
        "parameters": size,
        "entries": setting.entries or size,
        "seeds": seeds,
        "rows": [_row(*key, *zip(*pairs, strict=True)) for key, pairs in values.items()],
    }


def _estimates(
    problem: Problem, counts: dict[str, list[int]], seed: int
) -> dict[tuple[str, int | None], torch.Tensor]:
    """Return all estimates, by name and number of samples."""
    generator = torch.Generator().manual_seed(seed)
    found: dict = {}
    for draw, name in ((hutchinson, HUTCHINSON), (sampled_ggn, SAMPLED_GGN)):
        estimates = draw(problem, counts[name], generator)
        found |= {(name, count): estimate for count, estimate in estimates.items()}
    exact = {(name, None): diagonal(problem, EXTENSIONS[name]()) for name in extensions_for(problem)}
    return exact | found


def _row(name: str, samples: int | None, errors: Sequence[float], inner: Sequence[float]) -> dict:
    return {
        "name": name,
        "samples": samples,
        "mean": _digits(fmean(errors)),
        "std": _digits(stdev(errors)) if len(errors) > 1 else None,
        "inner": _digits(fmean(inner)),
        "values": [_digits(e) for e in errors],
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
