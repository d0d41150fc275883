"""Spectra, eigenvectors and kernels through Gram matrices, against other packages."""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.__main__ import RESULTS, _threads
from benchmarks.lowrank import kernels, peers, routes, scaling, spectrum, tables
from benchmarks.lowrank.measuring import Length
from benchmarks.models import cnn, mlp, vit

PARTS = ("spectrum", "ntk", "scaling", "routes")
LENGTHS = {
    "spectrum": Length(8.0, (5, 50), 6.0, (3, 10)),
    "ntk": Length(3.0, (5, 30), 8.0, (2, 7)),
    "scaling": Length(1.2, (3, 15)),
    "routes": Length(0.3, (2, 9)),
}
QUICK = Length(0.0, (1, 1), 0.0, (1, 1))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.lowrank", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny problems, one round")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument(
        "--readme",
        type=Path,
        help="measure nothing: write the tables of the stored results into this file",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the benchmark, or write its tables into a file.

    Args:
        argv: Command line; that of the process by default.

    Returns:
        The report that is stored.
    """
    args = parse(argv)
    suffix = "-quick" if args.quick else ""
    path = args.out / f"lowrank-{args.device.replace(':', '-')}{suffix}.json"
    if args.readme:
        found = json.loads(path.read_text())
        tables.insert(args.readme, found)
        return found
    with _threads(args.threads), warnings.catch_warnings():
        # BackPACK's full backward hooks make torch warn about inputs without gradient, vivit warns
        # about small eigenvalues
        warnings.simplefilter("ignore", UserWarning)
        # each round begins with a collection; what is imported by now need not be searched each time
        gc.freeze()
        try:
            return _run(args, path)
        finally:
            gc.unfreeze()


def _run(args: argparse.Namespace, path: Path) -> dict:
    torch.manual_seed(0)
    about, others = report.machine(args.device), peers.installed()
    print(report.describe(about | others), end="\n\n")
    if missing := peers.missing_text(others):
        print(missing, end="\n\n")
    found = {"machine": about, "peers": others, "problems": []}
    for part in args.parts:
        for problem in _measured(part, args):
            found["problems"].append(problem)
            print(tables.text(problem), end="\n\n", flush=True)
            gc.collect()
    found["problems"] = _with_others(found["problems"], args.parts, path)
    if timed := [p for p in found["problems"] if p["part"] == "routes"]:
        found["calibration"] = routes.calibration(timed)
        print(tables.calibration_text(timed), end="\n\n")
    print(tables.rst(found), end="\n\n")
    report.write(found, path)
    print(f"stored in {path}")
    return found


def _with_others(problems: list[dict], parts: Sequence[str], path: Path) -> list[dict]:
    """Keep what an earlier run stored of parts that this one did not measure."""
    stored = json.loads(path.read_text())["problems"] if path.exists() else []
    every = problems + [p for p in stored if p["part"] not in parts]
    return sorted(every, key=lambda p: PARTS.index(p["part"]))


def _measured(part: str, args: argparse.Namespace) -> Iterator[dict]:
    """Measure one part; yield its tables."""
    quick, device = args.quick, args.device
    length = QUICK if quick else LENGTHS[part]
    if part == "spectrum":
        for problem in (
            mlp(4, 16, device=device) if quick else mlp(64, device=device),
            cnn(2 if quick else 32, device),
        ):
            yield spectrum.run(problem, length, device)
    elif part == "ntk":
        for problem in (
            mlp(3, 16, device=device) if quick else mlp(32, 1024, device=device),
            cnn(2 if quick else 32, device),
        ):
            yield kernels.run(problem, length, device)
    elif part == "scaling":
        yield from scaling.run(scaling.QUICK if quick else scaling.AXES, length, device)
    else:
        # in large batches the choice is plain; which one is close depends on the batch
        for N in (2,) if quick else (1, 4, 32):
            for problem in (cnn(N, device), vit(N, device)):
                for fisher in ("exact", "mc"):
                    yield routes.run(problem, fisher, length, device)


if __name__ == "__main__":
    main()
