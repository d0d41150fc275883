"""``python -m benchmarks.scaling``: how the time beyond a plain step grows, and what it grows with.

One size is varied at a time: data, width, depth, tokens, classes, Monte-Carlo samples. Each size is
measured as by ``python -m benchmarks`` (interleaved, relative to the plain step of the same round), and
a power law is fitted to the milliseconds beyond the plain step: its exponent, with the standard error
that the scatter about the line leaves. Where a curve bends, because a fixed part dominates at small
sizes, that error is large; the exponent of the two largest sizes is given beside it.

The results are stored as JSON, and drawn if matplotlib is there (the extra ``plots``).
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from backpack_ext import KFAC, DiagGGN
from benchmarks import report, table
from benchmarks.__main__ import RESULTS, _threads
from benchmarks.fit import power_law
from benchmarks.models import Problem, cnn, deep_vit, mlp, vit_of
from benchmarks.rows import ROWS, Row
from benchmarks.suite import Settings, measure

PLAIN = "plain step"
MAIN = ("KFAC expand mc", "KFAC reduce mc", "SumGradSquared", "DiagGGN mc")
EXACT = ("KFAC expand exact", "DiagGGN exact")
# Seconds of rounds per size, and the smallest and largest number of rounds.
LENGTHS = {"quick": (0.0, (1, 1)), "default": (1.0, (3, 15)), "full": (8.0, (7, 60))}


def rows_called(names: Sequence[str]) -> list[Row]:
    """Return rows of the suite by their names."""
    return [row for row in ROWS if row.name in names]


def sampled_rows(V: int) -> list[Row]:
    """Return the rows with V samples per datum under the names they have with one."""
    return [
        Row(
            "KFAC expand mc",
            lambda device: [KFAC("expand", "mc", mc_samples=V)],
            None,
            lambda s: s.sweep(V) + s.each("factors", "expand", V, True),
        ),
        Row(
            "KFAC reduce mc",
            lambda device: [KFAC("reduce", "mc", mc_samples=V)],
            None,
            lambda s: s.sweep(V) + s.each("factors", "reduce", V, True),
        ),
        Row(
            "DiagGGN mc",
            lambda device: [DiagGGN("mc", mc_samples=V)],
            None,
            lambda s: s.sweep(V) + s.each("square_sum", V),
        ),
    ]


@dataclass(frozen=True)
class Axis:
    """A size to vary.

    Args:
        label: What it is.
        model: The model, and what stays as it is.
        values: The sizes by length of the run.
        make: Returns the problem of a size on a device.
        rows: Returns the rows of a size.
    """

    label: str
    model: str
    values: dict[str, tuple[int, ...]]
    make: Callable[[int, str], Problem]
    rows: Callable[[int], list[Row]] = lambda size: rows_called(MAIN)


def _sizes(quick: tuple[int, ...], default: tuple[int, ...], more: tuple[int, ...]) -> dict:
    return {"quick": quick, "default": default, "full": default + more}


AXES: dict[str, Axis] = {
    "batch": Axis(
        *("data N", "CNN"),
        _sizes((2, 4), (8, 16, 32, 64, 128), (256, 512)),
        lambda N, device: cnn(N, device),
    ),
    "width": Axis(
        *("width", "MLP, batch 128"),
        _sizes((8, 16), (128, 256, 512, 1024), (2048, 4096)),
        lambda width, device: mlp(128, width, device=device),
    ),
    "depth": Axis(
        *("blocks", "ViT of width 96, 64 tokens, batch 16"),
        _sizes((1, 2), (1, 2, 4, 8), (16, 32)),
        lambda depth, device: deep_vit(depth, device),
    ),
    "tokens": Axis(
        *("tokens", "ViT, 2 blocks of width 64, batch 8"),
        _sizes((4, 16), (16, 64, 144, 256), (576, 1024)),
        lambda T, device: vit_of(8, T, depth=2, device=device),
    ),
    "classes": Axis(
        *("classes", "MLP 784-512-512, batch 32"),
        _sizes((2, 5), (10, 30, 100, 300), (1000,)),
        lambda C, device: mlp(32, classes=C, device=device),
        lambda size: rows_called(MAIN + EXACT),
    ),
    "samples": Axis(
        *("MC samples", "CNN, batch 16"),
        _sizes((1, 2), (1, 2, 4, 8, 16), (32, 64)),
        lambda V, device: cnn(16, device),
        sampled_rows,
    ),
}


def run(name: str, values: Sequence[int], settings: Settings) -> dict:
    """Measure along one axis.

    Returns:
        A dictionary for JSON: for the plain step and for what each row takes beyond it, the medians
        in milliseconds, peak memory in MiB, and exponents.
    """
    axis = AXES[name]
    points = []
    for value in values:
        points.append(measure(axis.make(value, settings.device), axis.rows(value), settings))
        gc.collect()
    return {
        "name": name,
        "label": axis.label,
        "model": axis.model,
        "values": list(values),
        "rows": growth(values, points),
    }


def growth(values: Sequence[int], points: Sequence[dict]) -> list[dict]:
    """Return the growth of the plain step, and of ours and the floor beyond it.

    Args:
        values: The sizes.
        points: What `benchmarks.suite.measure` found at each of them, with the same rows.
    """
    plain = [point["plain_ms"][1] for point in points]
    sizes = [point["plain_mib"] for point in points]
    rows = [_grown(PLAIN, values, plain) | _memory(values, sizes)]
    for k, row in enumerate(points[0]["rows"]):
        found = [point["rows"][k] for point in points]
        for side in ("ours", "floor"):
            ratios = [one[side]["time"][1] for one in found]
            extra = [(ratio - 1) * ms for ratio, ms in zip(ratios, plain, strict=True)]
            name = row["name"] + (": floor" if side == "floor" else "")
            rows.append(_grown(name, values, extra))
            if side == "ours":
                mib = [one["ours"]["memory"] * size for one, size in zip(found, sizes, strict=True)]
                rows[-1] |= _memory(values, mib)
    return rows


def _grown(name: str, values: Sequence[int], ms: Sequence[float]) -> dict:
    fit, last = power_law(values, ms), power_law(values[-2:], ms[-2:])
    return {
        "name": name,
        "ms": [float(f"{one:.4g}") for one in ms],
        "exponent": None if fit is None else round(fit.exponent, 3),
        "error": None if fit is None or fit.error is None else round(fit.error, 3),
        "last": None if last is None else round(last.exponent, 3),
    }


def _memory(values: Sequence[int], mib: Sequence[float]) -> dict:
    fit = power_law(values, mib)
    return {
        "mib": [float(f"{one:.4g}") for one in mib],
        "mib_exponent": None if fit is None else round(fit.exponent, 3),
    }


# --------------------------------------------------------------------------- tables


def text(problem: dict) -> str:
    """Return the table of one axis: milliseconds, exponents, memory."""
    head = [f"ms, {problem['label']} =", *map(str, problem["values"])]
    lines = [head + ["exponent", "last two", "MiB at the last", "its exponent"]]
    for row in problem["rows"]:
        memory = [f"{row['mib'][-1]:.4g}", _number(row["mib_exponent"])] if "mib" in row else ["", ""]
        times = [f"{ms:.3g}" for ms in row["ms"]]
        lines.append([row["name"], *times, fitted(row), _number(row["last"]), *memory])
    title = f"Growth with {problem['label']}, {problem['model']}: the plain step, and what comes on top"
    return f"{title}\n{table.aligned(lines)}"


def fitted(row: dict) -> str:
    """Return an exponent with its standard error."""
    if row["exponent"] is None:
        return "-"
    error = "" if row["error"] is None else f" ± {row['error']:.2f}"
    return f"{row['exponent']:.2f}{error}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


BEGIN = ".. Exponents of growth, written by ``python -m benchmarks.scaling --readme README.rst``."
END = ".. End of the exponents of growth."


def rst(found: dict) -> str:
    """Return a table for the README: the exponent of each row's extra time in each size."""
    rows = {(p["name"], row["name"]): row for p in found["problems"] for row in p["rows"]}
    names = dict.fromkeys(name for _, name in rows)
    lines = [["exponent of", *(p["label"] for p in found["problems"])]]
    for name in names:
        cells = [rows.get((p["name"], name)) for p in found["problems"]]
        lines.append([name, *("" if cell is None else fitted(cell) for cell in cells)])
    return table.simple(lines)


# --------------------------------------------------------------------------- command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    length = parser.add_mutually_exclusive_group()
    for name, text_ in (("quick", "tiny sizes, one round"), ("full", "larger sizes, many rounds")):
        length.add_argument(f"--{name}", action="store_const", dest="length", const=name, help=text_)
    parser.set_defaults(length="default")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--seconds", type=float, help="time of rounds per size")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON file and plot")
    parser.add_argument(
        "--readme",
        type=Path,
        help="measure nothing: write the exponents of the stored results into this file",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure all axes, print the tables, store them; or write the stored ones into a file.

    Args:
        argv: Command line; that of the process by default.

    Returns:
        The report that is stored.
    """
    args = parse(argv)
    suffix = "" if args.length == "default" else f"-{args.length}"
    path = args.out / f"scaling-{args.device.replace(':', '-')}{suffix}.json"
    if args.readme:
        found = json.loads(path.read_text())
        table.insert(args.readme, BEGIN, END, rst(found))
        return found
    seconds, rounds = LENGTHS[args.length]
    seconds = seconds if args.seconds is None else args.seconds
    settings = Settings(seconds, rounds, args.device, peers=False)
    with _threads(args.threads):
        about = report.machine(args.device)
        print(report.describe(about), end="\n\n")
        found = {"machine": about, "problems": []}
        for name in args.axes:
            found["problems"].append(run(name, AXES[name].values[args.length], settings))
            print(text(found["problems"][-1]), end="\n\n", flush=True)
    print(rst(found), end="\n\n")
    report.write(found, path)
    print(f"stored in {path}")
    if find_spec("matplotlib"):
        from benchmarks import scaling_plot

        picture = path.with_suffix(".png")
        scaling_plot.draw(found, picture)
        print(f"drawn in {picture}")
    else:
        print("Not drawn: matplotlib is not installed (extra: plots).")
    return found


if __name__ == "__main__":
    main()
