"""``python -m benchmarks.structured``: products of structured matrices against dense ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import ceil, log
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch

from benchmarks import report
from benchmarks.__main__ import RESULTS, _threads
from benchmarks.timing import Variant, interleave, summary
from curvature.outer import outer
from curvature.structured import StructuredMatrix
from curvature.structures import STRUCTURES

OPTIONS = {
    "block-diagonal": {"block": 32},
    "hierarchical": {"k1": 16, "k2": 16},
    "rank-k-lower": {"k": 16},
    "rank-k-upper": {"k": 16},
}
COLUMNS = 256  # of X, and of S
# What is timed, by name: each takes a structured matrix A (or A A^T), X[d, n] and S[d, r].
OPERATIONS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], Any]] = {
    "A @ B": lambda A, X, S: A @ A,
    "A @ X": lambda A, X, S: A @ X,
    "P(S S^T)": lambda A, X, S: A.project_gram(S, 0.5, **A.options),
    "P(A^T A)": lambda A, X, S: A.gram(),
    "(A A^T) X": lambda N, X, S: N.matmul(X),
    "X^T (A A^T)": lambda N, X, S: N.rmatmul(X.mT),
}
# Operations on A A^T, which is held; forming it is not timed.
HELD = ("(A A^T) X", "X^T (A A^T)")
# Seconds per dimension and operation, and the smallest and largest number of rounds.
LENGTHS = {"quick": (0.2, (2, 5)), "default": (5.0, (7, 100))}
# Short operations are repeated until a step takes this long: the clock and the loop cost time too.
STEP = 1e-3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.structured", description=__doc__)
    parser.add_argument("--quick", action="store_const", dest="length", const="quick", default="default")
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 512, 2048])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser.parse_args(argv)


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
    torch.manual_seed(0)
    about = report.machine(args.device)
    print(report.describe(about), end="\n\n")
    found = {"machine": about, "columns": COLUMNS, "problems": []}
    for d in args.dims:
        problem = measure(d, args.length, args.device)
        found["problems"].append(problem)
        print(text(problem), end="\n\n", flush=True)
    found["growth"] = growth(found["problems"])
    print(text_growth(found["growth"]), rst(found), sep="\n\n", end="\n\n")
    suffix = "" if args.length == "default" else f"-{args.length}"
    path = args.out / f"structured-{args.device.replace(':', '-')}{suffix}.json"
    report.write(found, path)
    print(f"stored in {path}")
    return found


# --------------------------------------------------------------------------- measuring


def measure(d: int, length: str, device: str) -> dict:
    """Measure all structures at one dimension.

    Args:
        d: The dimension.
        length: Key of ``LENGTHS``.
        device: Where to run.

    Returns:
        A dictionary for JSON. For each structure and operation: quartiles of the ratio to the dense
        one in the same round, and the median in milliseconds. ``spread`` is the upper over the
        lower quartile of the dense times.
    """
    X, S = torch.randn(2, d, COLUMNS, device=device).unbind()
    dense = torch.randn(d, d, device=device) / d**0.5
    matrices = {key: cls.from_dense(dense, **OPTIONS.get(key, {})) for key, cls in STRUCTURES.items()}
    rows = {key: {"name": key, "bytes": sum(t.nbytes for t in A.tensors)} for key, A in matrices.items()}
    rounds, spread = {}, {}
    for name, operation in OPERATIONS.items():
        operands = {key: outer(A) for key, A in matrices.items()} if name in HELD else matrices
        steps = {key: _bind(operation, A, X, S) for key, A in operands.items()}
        if name == "A @ X":
            steps["floor"] = _bind(_toeplitz_floor, matrices["diagonal"], X, S)
        times = _time(steps, length, device)
        rounds[name] = len(times["dense"])
        low, _, high = summary(times["dense"])
        spread[name] = round(high / low, 2)
        for key, row in rows.items():
            row[name] = _against(times[key], times["dense"])
            if key.endswith("toeplitz") and name == "A @ X":
                row["floor"] = _against(times[key], times["floor"])
    return {
        "name": f"d = {d}",
        "dim": d,
        "rounds": rounds,
        "spread": spread,
        "rows": list(rows.values()),
    }


def _toeplitz_floor(diagonal: StructuredMatrix, X: torch.Tensor, S: torch.Tensor) -> Any:
    """A diagonal product and one pair of transforms: what a Toeplitz product cannot do without."""
    n = 2 * len(X)
    return diagonal @ X, torch.fft.irfft(torch.fft.rfft(X, n, dim=-2), n, dim=-2)


def _bind(operation: Callable, *args: Any) -> Callable[[], Any]:
    return lambda: operation(*args)


def _time(steps: dict[str, Callable[[], Any]], length: str, device: str) -> dict[str, list[float]]:
    """Return the seconds of each step in each round."""
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    variants, repeats = {}, {}
    for key, step in steps.items():
        once = Variant(step)
        once.warm_up(sync)
        repeats[key] = count = min(200, ceil(STEP / once.seconds))
        variants[key] = Variant(_repeated(step, count))
        variants[key].warm_up(sync)
    seconds, rounds = LENGTHS[length]
    times = interleave(variants, "dense", sync, seconds, rounds)
    return {key: [t / repeats[key] for t in values] for key, values in times.items()}


def _repeated(step: Callable[[], Any], count: int) -> Callable[[], Any]:
    def run() -> Any:
        for _ in range(count - 1):
            step()
        return step()

    return run


def _against(times: list[float], plain: list[float]) -> dict:
    ratios = [t / p for t, p in zip(times, plain, strict=True)]
    return {
        "ratio": [float(f"{r:.4g}") for r in summary(ratios)],
        "ms": float(f"{1e3 * median(times):.4g}"),
    }


def growth(problems: list[dict]) -> list[dict]:
    """Fit the exponent e of ``time ~ d^e`` for each structure and operation."""
    if len(problems) < 2:
        return []
    logs = [log(p["dim"]) for p in problems]
    found = []
    for rows in zip(*(p["rows"] for p in problems), strict=True):
        row = {"name": rows[0]["name"]}
        for name in OPERATIONS:
            row[name] = round(linear_regression(logs, [log(r[name]["ms"]) for r in rows]).slope, 2)
        row["bytes"] = round(linear_regression(logs, [log(r["bytes"]) for r in rows]).slope, 2)
        found.append(row)
    return found


# --------------------------------------------------------------------------- tables


def text(problem: dict) -> str:
    """Return the table of one dimension: times relative to dense, milliseconds, stored bytes."""
    head = ["time / dense (ms)", *OPERATIONS, "| stored KiB", "A @ X / floor"]
    lines = [head]
    for row in problem["rows"]:
        cells = [f"{row[name]['ratio'][1]:.3g} ({row[name]['ms']:.3g})" for name in OPERATIONS]
        floor = f"{row['floor']['ratio'][1]:.2f}" if "floor" in row else ""
        lines.append([row["name"], *cells, f"| {row['bytes'] / 1024:.4g}", floor])
    counts = sorted(set(problem["rounds"].values()))
    title = f"{problem['name']}, {COLUMNS} columns, rounds: {', '.join(map(str, counts))}"
    disturbed = [name for name, spread in problem["spread"].items() if spread > report.DISTURBED]
    if disturbed:
        title += (
            f"\nDISTURBED: the dense times vary for {', '.join(disturbed)}; are other processes running?"
        )
    return "\n".join([title, _aligned(lines)])


def text_growth(rows: list[dict]) -> str:
    """Return the table of exponents."""
    if not rows:
        return ""
    head = ["time ~ d^e", *OPERATIONS, "| bytes"]
    lines = [
        [r["name"], *(f"{r[name]:.2f}" for name in OPERATIONS), f"| {r['bytes']:.2f}"] for r in rows
    ]
    return _aligned([head, *lines])


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def rst(found: dict) -> str:
    """Return a list table for the README: times relative to dense, one number per dimension."""
    problems = found["problems"]
    dims = ", ".join(str(p["dim"]) for p in problems)
    lines = [
        f".. list-table:: Time relative to a dense matrix, for d = {dims} ({COLUMNS} columns)",
        "   :header-rows: 1",
        "",
    ]
    table = [["structure", *(f"``{name}``" for name in OPERATIONS), f"KiB at d = {problems[-1]['dim']}"]]
    for rows in zip(*(p["rows"] for p in problems), strict=True):
        if rows[0]["name"] == "dense":
            continue
        cells = [", ".join(f"{r[name]['ratio'][1]:.2g}" for r in rows) for name in OPERATIONS]
        table.append([rows[0]["name"], *cells, f"{rows[-1]['bytes'] / 1024:.4g}"])
    for row in table:
        lines += [f"   {'*' if k == 0 else ' '} - {cell}" for k, cell in enumerate(row)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
