"""Print the time of every method, and the cases where the one chosen was not the fastest."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.__main__ import RESULTS, _threads

PARTS = ("reduce", "expand")
# A choice that takes that much longer than the fastest method is printed.
SLOWER = 1.15


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.conv_factors", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="batches of two, one round")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases so named")
    parser.add_argument("--batch", type=int, default=32, help="images (default: 32)")
    parser.add_argument("--seconds", type=float, default=1.0, help="rounds of a case (default: 1)")
    parser.add_argument("--channels-last", action="store_true", help="memory format of the inputs")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the benchmark.

    Args:
        argv: Command line; that of the process by default.

    Returns:
        The report that is stored.
    """
    args = parse(argv)
    torch.manual_seed(0)
    about = report.machine(args.device)
    print(report.describe(about), end="\n\n")
    found = {"machine": about, "parts": {}}
    with _threads(args.threads):
        for part in args.parts:
            found["parts"][part] = _run(part, args)
    layout = "-channels-last" if args.channels_last else ""
    suffix = "-quick" if args.quick else ""
    path = args.out / f"conv-factors-{args.device.replace(':', '-')}{layout}{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"stored in {path}")
    return found


def _run(part: str, args: argparse.Namespace) -> list[dict]:
    module = import_module(f"benchmarks.conv_factors.{part}")
    rounds = (1, 1) if args.quick else (5, 100)
    batch, seconds = (2, 0.0) if args.quick else (args.batch, args.seconds)
    sync = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    rows = []
    for case in module.CASES:
        if args.cases and not any(text in case.name for text in args.cases):
            continue
        where = {"device": args.device, "channels_last": args.channels_last}
        row = module.run(case, batch, seconds, rounds, sync, **where)
        rows.append(row)
        print(text(row), flush=True)
    print(f"\n{part}: {summary(rows)}\n")
    return rows


def text(row: dict) -> str:
    """Return a case's methods, the fastest first: milliseconds, and how many times the baseline's speed.

    Example:
        >>> seconds = {"unfold": 0.02, "joined": 0.001}
        >>> print(text({"case": "k3", "chosen": "joined", "baseline": "unfold", "seconds": seconds}))
        k3
            joined * 1.00 ms (20.0)
            unfold 20.00 ms (1.0)
    """
    seconds, base = row["seconds"], row["seconds"][row["baseline"]]
    lines = [row["case"]]
    for name in sorted(seconds, key=seconds.__getitem__):
        mark = " *" if name == row["chosen"] else ""
        lines.append(f"    {name}{mark} {1e3 * seconds[name]:.2f} ms ({base / seconds[name]:.1f})")
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """Return where the choice was not the fastest.

    Example:
        >>> seconds = {"unfold": 0.02, "joined": 0.01, "separable": 0.015}
        >>> print(summary([{"case": "k3", "chosen": "separable", "seconds": seconds}]))
        in 1 of 1 cases the choice took more than 1.15 times the fastest one's time:
            k3: separable, 1.50 times joined
    """
    lines = []
    for row in rows:
        seconds = row["seconds"]
        best = min(seconds, key=seconds.__getitem__)
        ratio = seconds[row["chosen"]] / seconds[best]
        if ratio > SLOWER:
            lines.append(f"    {row['case']}: {row['chosen']}, {ratio:.2f} times {best}")
    head = f"in {len(lines)} of {len(rows)} cases the choice took more than {SLOWER} times"
    return "\n".join([f"{head} the fastest one's time{':' if lines else ''}", *lines])


if __name__ == "__main__":
    main()
