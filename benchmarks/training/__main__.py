"""What a whole training iteration costs with each optimizer, relative to AdamW's."""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.__main__ import RESULTS, _threads
from benchmarks.lowrank.measuring import Length
from benchmarks.models import PROBLEMS, mlp
from benchmarks.training import tables
from benchmarks.training.contenders import contenders, peers
from benchmarks.training.measuring import measure

LENGTHS = {
    "quick": Length(0.0, (1, 1)),
    "default": Length(45.0, (5, 40)),
    "full": Length(120.0, (10, 100)),
}
MODELS = ("mlp", "cnn", "vit")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.training", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--quick", action="store_const", dest="length", const="quick", help="a tiny MLP, one round"
    )
    length.add_argument(
        "--full", action="store_const", dest="length", const="full", help="minutes per model"
    )
    parser.set_defaults(length="default")
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose name has a TEXT")
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
    with _threads(args.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of singd, about layers that it does not know
        gc.freeze()  # each round begins with a collection; imports need not be searched each time
        try:
            return _run(args)
        finally:
            gc.unfreeze()


def _run(args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    about, others = report.machine(args.device), peers()
    print(report.describe(about | others), end="\n\n")
    if not others:
        print("Not installed, so its cells are left out: singd.", end="\n\n")
    found = {"machine": about, "peers": others, "problems": []}
    quick = args.length == "quick"
    problems = (
        [mlp(4, 32, device=args.device)] if quick else [PROBLEMS[m](args.device) for m in args.models]
    )
    for problem in problems:
        result = measure(problem, contenders(args.rows), LENGTHS[args.length], args.device)
        found["problems"].append(result)
        print(tables.text(result), end="\n\n", flush=True)
        gc.collect()
    print(tables.rst(found), end="\n\n")
    suffix = "" if args.length == "default" else f"-{args.length}"
    path = args.out / f"training-{args.device.replace(':', '-')}{suffix}.json"
    report.write(found, path)
    print(f"stored in {path}")
    return found


if __name__ == "__main__":
    main()
