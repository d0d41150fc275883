"""``python -m benchmarks.deep``: transformers of growing depth, many quantities in one pass.

The time of a step with all of them relative to a plain forward and backward, beside the counted
floor, and how the time beyond the plain step grows with depth: the exponent of a power law, 1 where
each block costs the same. Depths are measured one after the other; what other processes take in the
meantime shows in the plain step's exponent too, and hardly in that of the ratio to it.

The floor counts linear layers, convolutions and attention. Norms and embeddings are left out: the
products of a norm's block have one row per datum where those of a linear layer have one per token,
and those of an embedding are one product per model; that is below 1% of the floor here.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from backpack_ext import (
    KFAC,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    SumGradSquared,
    Variance,
)
from benchmarks import report
from benchmarks.fit import power_law
from benchmarks.floor import Product, Shapes
from benchmarks.models import DEEP
from benchmarks.rows import ROWS, Row
from benchmarks.suite import Settings, measure
from benchmarks.table import simple

RESULTS = Path(__file__).parent / "results"
DEPTH = 12  # of the models whose ratios are printed; the deepest ones if it is not measured
ALL = "all quantities"
EXTRA = "all and BatchGrad"


def everything(device: str) -> list:
    """KFAC and DiagGGN share one sweep, because they share a generator."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        KFAC("expand", "mc", generator=generator),
        DiagGGN("mc", generator=generator),
        *(BatchL2Grad(), SumGradSquared(), Variance(), BatchDotGrad()),
    ]


def everything_floor(shapes: Shapes) -> list[Product]:
    """One sweep, the factors, the samples' second moments, all of first order at once."""
    samples = shapes.each("factors", "expand", 1) + shapes.each("square_sum")
    return shapes.sweep(1) + samples + shapes.each("first_order")


# BatchGrad keeps what the floor of the others forms anyway (but for the one layer without tokens).
DEEP_ROWS = (
    Row(ALL, everything, None, everything_floor),
    Row(EXTRA, lambda device: [*everything(device), BatchGrad()], None, everything_floor),
    *(row for row in ROWS if row.name in ("KFAC expand mc", "BatchL2Grad", "extended, no context")),
)


def exponent(depths: Sequence[int], values: Sequence[float]) -> float | None:
    """Return the slope of log value over log depth by least squares; None where it has none."""
    fit = power_law(depths, values)
    return None if fit is None else fit.exponent


def growth(problems: Sequence[dict], depths: Sequence[int]) -> list[dict]:
    """Return, per row, the median milliseconds beyond the plain step at each depth, and exponents.

    ``relative`` is the exponent of their ratio to the plain step, 0 where both grow alike.
    """
    plain = [problem["plain_ms"][1] for problem in problems]
    found = [{"name": "plain step", "ms": plain, "exponent": exponent(depths, plain)}]
    for k, row in enumerate(problems[0]["rows"]):
        for side in ("ours", "floor"):
            ratios = [problem["rows"][k][side]["time"][1] for problem in problems]
            if side == "floor" and row["floor"]["gflop"] == 0:
                continue
            extra = [(ratio - 1) * ms for ratio, ms in zip(ratios, plain, strict=True)]
            name = row["name"] if side == "ours" else f"{row['name']}: floor"
            found.append({"name": name, "ms": extra, "exponent": exponent(depths, extra)})
    for entry in found:
        ratios = [ms / one for ms, one in zip(entry["ms"], plain, strict=True)]
        entry["relative"] = exponent(depths, ratios)
        for key in ("exponent", "relative"):  # more digits would be noise
            entry[key] = None if entry[key] is None else round(entry[key], 3)
        entry["ms"] = [float(f"{ms:.4g}") for ms in entry["ms"]]
    return found


# --------------------------------------------------------------------------- tables


def ratios_table(results: dict[str, dict]) -> str:
    """Return time and memory relative to a plain step, as a reStructuredText table."""
    head = ["relative to a plain step"]
    for title in results:
        head += [f"{title}: time", "/ floor", "memory"]
    lines = [head]
    for k, row in enumerate(next(iter(results.values()))["rows"]):
        line = [row["name"]]
        for problem in results.values():
            ours, floor = problem["rows"][k]["ours"], problem["rows"][k]["floor"]["time"][1]
            low, middle, high = ours["time"]
            line += [f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{middle / floor:.2f}"]
            line += [f"{ours['memory']:.2f}"]
        lines.append(line)
    return simple(lines)


def growth_table(title: str, depths: Sequence[int], rows: Sequence[dict]) -> str:
    """Return milliseconds beyond the plain step by depth, as a reStructuredText table."""
    lines = [[f"{title}: extra ms at depth", *map(str, depths), "exponent", "of ratio"]]
    for row in rows:
        slopes = ["-" if row[k] is None else f"{row[k]:.2f}" for k in ("exponent", "relative")]
        lines.append([row["name"], *(f"{ms:.4g}" for ms in row["ms"]), *slopes])
    return simple(lines)


# --------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure all depths of both models, print the tables, store them as JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.deep", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument("--models", nargs="+", choices=DEEP, default=list(DEEP))
    parser.add_argument("--depths", nargs="+", type=int, help="default: 3 6 12 24; 1 2 4 with --quick")
    parser.add_argument("--seconds", type=float, default=20.0, help="time per depth (default: 20)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args(argv)
    depths = sorted(args.depths or ([1, 2, 4] if args.quick else [3, 6, 12, 24]))
    rounds = (1, 1) if args.quick else (3, 15)
    settings = Settings(0.0 if args.quick else args.seconds, rounds, args.device, peers=False)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        about = report.machine(args.device)
        print(report.describe(about), end="\n\n")
        found = {"machine": about, "depths": depths, "growth": {}, "problems": []}
        shown = {}
        for name in args.models:
            problems = []
            for depth in depths:
                problem = DEEP[name](depth, args.device, args.quick)
                problems.append(measure(problem, DEEP_ROWS, settings))
                print(report.text(problems[-1]), end="\n\n", flush=True)
                del problem
                gc.collect()
            found["problems"] += problems
            found["growth"][name] = growth(problems, depths)
            one = problems[depths.index(DEPTH) if DEPTH in depths else -1]
            shown[one["title"]] = one
            print(growth_table(name, depths, found["growth"][name]), end="\n\n", flush=True)
        print(ratios_table(shown), end="\n\n")
    finally:
        torch.set_num_threads(before)
    suffix = "-quick" if args.quick else ""
    path = args.out / f"deep-{args.device.replace(':', '-')}{suffix}.json"
    report.write(found, path)
    print(f"stored in {path}")
    return found


if __name__ == "__main__":
    main()
