"""``python -m benchmarks``: measure, print, store.

Each quantity's time and peak memory relative to a plain forward and backward, beside BackPACK and
curvlinops where they have it, the counted floor, and the goals. By default those quantities that have
goals, on the small models that have, which takes about a minute. Models that are named, or all with
``--models all``, are measured in every row. Problems that a run does not measure keep their earlier
results, if those are from the same machine.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import goals, peers, report, table
from benchmarks.models import DIAGONALS, MODELS, PROBLEMS
from benchmarks.rows import HEADLINES, ROWS, Row
from benchmarks.suite import Settings, measure

# Seconds of rounds per problem, and the smallest and largest number of rounds.
LENGTHS = {"quick": (1.0, (1, 3)), "default": (10.0, (3, 15)), "full": (90.0, (10, 100))}
RESULTS = Path(__file__).parent / "results"
# What has to agree for results of two runs to stand in one table.
SAME = ("cpu", "threads", "torch", "device", "gpu")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--quick", action="store_const", dest="length", const="quick", help="seconds per model"
    )
    length.add_argument(
        "--full", action="store_const", dest="length", const="full", help="minutes per model"
    )
    parser.set_defaults(length="default")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=(*PROBLEMS, "all"),
        help=f"default: {' '.join(MODELS)}; with --full all",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="TEXT",
        help="only rows whose name has a TEXT; default: all of named models, else those with goals",
    )
    parser.add_argument("--repetitions", type=int, help="number of rounds, instead of a time")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument(
        "--name", help="name of the JSON file (default: device, length, 'some' if not of all rows)"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        help="measure nothing: write the tables of the stored results into this file",
    )
    args = parser.parse_args(argv)
    if args.models is None and args.length == "full":
        args.models = ["all"]
    if args.models is None:
        args.models, args.rows = list(MODELS), args.rows or list(HEADLINES)
    if "all" in args.models:
        args.models = list(PROBLEMS)
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the benchmarks.

    Args:
        argv: Command line; that of the process by default.

    Returns:
        The report that was stored; with ``--readme`` the one that was stored before.
    """
    args = parse(argv)
    if args.readme:
        found = json.loads(_path(args).read_text())
        for (begin, end), body in report.blocks(found).items():
            table.insert(args.readme, begin, end, body)
        return found
    with _threads(args.threads), warnings.catch_warnings():
        # BackPACK's full backward hooks make torch warn about inputs without gradient.
        warnings.filterwarnings("ignore", message=".*backward hook.*")
        # It also does about containers that it does not know, whose layers it does.
        warnings.filterwarnings("ignore", message="Extension saving to")
        return _run(args)


def _run(args: argparse.Namespace) -> dict:
    seconds, rounds = LENGTHS[args.length]
    if args.repetitions is not None:
        seconds, rounds = 0.0, (args.repetitions, args.repetitions)
    settings = Settings(seconds, rounds, args.device)
    about, others = report.machine(args.device), peers.installed()
    print(report.describe(about | others), end="\n\n")
    if not others:
        print(f"Not installed, so its cells are left out: {peers.CURVLINOPS} (extra: peers).\n")
    found = {"machine": about, "peers": others, "problems": []}
    for name in args.models:
        result = measure(PROBLEMS[name](args.device), _rows(args.rows), settings)
        found["problems"].append(result)
        print(report.text(result), end="\n\n", flush=True)
    path = _path(args)
    found["problems"] = _with_others(found, path)
    for having in (False, True):
        for what in ("time", "floor", "goals", "memory"):
            if printed := report.rst(found, what, DIAGONALS, having):
                print(printed, end="\n\n")
    if counts := goals.summary(found["problems"]):
        print(counts, end="\n\n")
    report.write(found, path)
    print(f"stored in {path}")
    return found


def _path(args: argparse.Namespace) -> Path:
    """Return where the results are stored: those of some rows do not replace those of all."""
    parts = [args.device.replace(":", "-"), *([] if args.length == "default" else [args.length])]
    parts += ["some"] if args.rows and not args.readme else []
    return args.out / f"{args.name or '-'.join(parts)}.json"


def _with_others(found: dict, path: Path) -> list[dict]:
    """Add what an earlier run on the same machine stored of problems that this one did not measure."""
    stored = json.loads(path.read_text()) if path.exists() else {"problems": []}
    names = {problem["name"] for problem in found["problems"]}
    others = [p for p in stored["problems"] if p["name"] not in names]
    changed = [k for k in SAME if others and stored["machine"].get(k) != found["machine"].get(k)]
    if changed:
        gone = ", ".join(p["name"] for p in others)
        print(f"Not kept, because {', '.join(changed)} differ: earlier results of {gone}.\n")
        others = []
    order = list(PROBLEMS)
    return sorted(found["problems"] + others, key=lambda p: order.index(p["name"]))


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
