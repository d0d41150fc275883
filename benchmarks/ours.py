"""``python -m benchmarks.ours``: our rows relative to a plain step alone, as one line of JSON.

What `benchmarks.compare` runs for each commit: no peers, no floors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import backpack_ext
from benchmarks.__main__ import _rows, _threads
from benchmarks.models import PROBLEMS
from benchmarks.suite import Settings, measure_ours


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print, return: the library's file, and our cells by problem and row."""
    parser = argparse.ArgumentParser("python -m benchmarks.ours", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, required=True)
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose name has a TEXT")
    parser.add_argument("--repetitions", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    args = parser.parse_args(argv)
    settings = Settings(0.0, (args.repetitions, args.repetitions), args.device)
    with _threads(args.threads):
        problems = [
            measure_ours(PROBLEMS[name](args.device), _rows(args.rows), settings) for name in args.models
        ]
    found = {"library": backpack_ext.__file__, "problems": problems}
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
