"""``python -m benchmarks``: measure, print, store."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.models import DIAGONALS, PROBLEMS
from benchmarks.rows import ROWS, Row
from benchmarks.suite import Settings, measure

# Seconds of rounds per problem, and the smallest and largest number of rounds.
LENGTHS = {"quick": (1.0, (1, 3)), "default": (10.0, (3, 15)), "full": (90.0, (10, 100))}
RESULTS = Path(__file__).parent / "results"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--quick", action="store_const", dest="length", const="quick", help="seconds per model"
    )
    length.add_argument(
        "--full", action="store_const", dest="length", const="full", help="minutes per model"
    )
    parser.set_defaults(length="default")
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose name has a TEXT")
    parser.add_argument("--repetitions", type=int, help="number of rounds, instead of a time")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--name", help="name of the JSON file (default: device and length)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the benchmarks.

    Args:
        argv: Command line; that of the process by default.

    Returns:
        The report that was stored.
    """
    args = parse(argv)
    with _threads(args.threads), warnings.catch_warnings():
        # BackPACK's full backward hooks make torch warn about inputs without gradient.
        warnings.filterwarnings("ignore", message=".*backward hook.*")
        return _run(args)


def _run(args: argparse.Namespace) -> dict:
    seconds, rounds = LENGTHS[args.length]
    if args.repetitions is not None:
        seconds, rounds = 0.0, (args.repetitions, args.repetitions)
    settings = Settings(seconds, rounds, args.device)
    about = report.machine(args.device)
    print(report.describe(about), end="\n\n")
    found = {"machine": about, "problems": []}
    for name in args.models:
        result = measure(PROBLEMS[name](args.device), _rows(args.rows), settings)
        found["problems"].append(result)
        print(report.text(result), end="\n\n", flush=True)
    for what in ("time", "memory"):
        print(report.rst(found, what, DIAGONALS, False), end="\n\n")
        print(report.rst(found, what, DIAGONALS, True), end="\n\n")
    suffix = "" if args.length == "default" else f"-{args.length}"
    path = args.out / f"{args.name or args.device.replace(':', '-') + suffix}.json"
    report.write(found, path)
    print(f"stored in {path}")
    return found


def _rows(texts: list[str] | None) -> list[Row]:
    """Return the rows whose names contain one of the texts; all of them without texts."""
    rows = [row for row in ROWS if not texts or any(t.lower() in row.name.lower() for t in texts)]
    if not rows:
        names = ", ".join(row.name for row in ROWS)
        raise SystemExit(f"--rows {' '.join(texts)}: no row has that in its name. There are: {names}.")
    return rows


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
