"""``python -m examples.training search``, ``compare`` and ``report``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from examples import training
from examples.training.compare import compare
from examples.training.optimizers import OPTIMIZERS
from examples.training.report import report
from examples.training.search import search
from examples.training.tasks import TASKS
from examples.training.training import DTYPES

RESULTS = Path(__file__).parent / "results"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    what = argparse.ArgumentParser(add_help=False)
    what.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    what.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    what.add_argument("--steps", type=int, help="steps per run (default: by task, 300 or 400)")

    parser = argparse.ArgumentParser(
        "python -m examples.training",
        description=training.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("search", parents=[what, out], help="tune every optimizer")
    command.add_argument("--trials", type=int, default=12, help="per optimizer and task (default: 12)")
    command.add_argument("--processes", type=int, default=os.cpu_count(), help="trials at a time")
    command = commands.add_parser(
        "compare", parents=[what, out], help="train from several seeds, and report"
    )
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    command.add_argument("--seeds", type=int, default=3, help="runs per setting (default: 3)")
    commands.add_parser("report", parents=[out], help="tables and plots of what was compared")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command."""
    args = parse(argv)
    if args.command == "search":
        found = search(args.tasks, args.optimizers, args.trials, args.steps, args.processes, args.out)
        for task in args.tasks:
            for name in args.optimizers:
                choice = found[task][name]
                config = ", ".join(f"{key} {value}" for key, value in choice["config"].items())
                print(
                    f"{task:6s} {name:18s} {choice['loss']:.4f}  {config}  ({choice['failed']} failed)"
                )
        return
    if args.command == "compare":
        compare(args.tasks, args.optimizers, args.dtypes, args.seeds, args.steps, args.out)
    for path in report(args.out):
        print(f"written: {path}")


if __name__ == "__main__":
    main()
