"""``python -m benchmarks.compare REV1 [REV2]``: what a change costs or saves, row by row.

Each commit's library is checked out into a temporary folder and measured by this tree's
``benchmarks``, in processes that alternate (first, second, second, first, ...), so that a machine that
slows down does so for both. A process gives one ratio to its own plain step per row; that of the second
commit over that of the first, pair by pair, says what has changed. Without REV2 the second is the
working tree as it is.

A change is marked where the median is off by more than 1% and an exact test of signs flipped at random
gives it a probability of at most 5%, which takes six pairs; of twenty rows without a change one is
marked. ``--files A.json B.json`` compares stored results instead: there only quartiles are known, and
those changes are marked whose quartiles are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import exp, fsum, log
from pathlib import Path
from statistics import median

from benchmarks.models import MODELS, PROBLEMS
from benchmarks.rows import HEADLINES
from benchmarks.table import aligned

ROOT = Path(__file__).parents[1]
SMALLEST, LEVEL = 0.01, 0.05  # of changes that are marked: size, probability by chance
MOST_PAIRS = 16  # the test goes through all 2^pairs signs

# By (problem, row): the ratio to the plain step, and that of peak memory.
Figures = dict[tuple[str, str], tuple[float, float]]


# --------------------------------------------------------------------------- statistics


def chance(logs: Sequence[float]) -> float:
    """Return how probable a mean at least as far from 0 is, if each sign were a coin's.

    The share of all ``2^n`` assignments of signs to the n values whose mean is as far off or farther.
    """
    seen = abs(fsum(logs))
    signs = product((1, -1), repeat=len(logs))
    hits = [abs(fsum(s * v for s, v in zip(one, logs, strict=True))) for one in signs]
    return sum(h >= seen * (1 - 1e-12) for h in hits) / len(hits)


def compared(first: Sequence[Figures], second: Sequence[Figures]) -> list[dict]:
    """Return a row per quantity that both have, from pairs of processes.

    ``time`` is the smallest, the median and the largest ratio of the second to the first.
    """
    rows = []
    for key in first[0]:
        if not all(key in figures for figures in (*first, *second)):
            continue
        logs = [log(b[key][0] / a[key][0]) for a, b in zip(first, second, strict=True)]
        middle, p = median(logs), chance(logs)
        marked = p <= LEVEL and abs(exp(middle) - 1) > SMALLEST
        rows.append(
            {
                **_names(key),
                "before": median(f[key][0] for f in first),
                "after": median(f[key][0] for f in second),
                "time": [exp(min(logs)), exp(middle), exp(max(logs))],
                "chance": p,
                "changed": marked,
                "memory": second[0][key][1] / first[0][key][1],
            }
        )
    return rows


def compared_files(first: dict, second: dict) -> list[dict]:
    """Return a row per quantity that two stored reports have; ``time`` spans what quartiles allow."""
    before, after = (_rows_of(report) for report in (first, second))
    rows = []
    for key in before:
        if key not in after:
            continue
        a, b = before[key], after[key]
        rows.append(
            {
                **_names(key),
                "before": a["time"][1],
                "after": b["time"][1],
                "time": [b["time"][0] / a["time"][2], b["time"][1] / a["time"][1]]
                + [b["time"][2] / a["time"][0]],
                "changed": b["time"][0] > a["time"][2] or b["time"][2] < a["time"][0],
                "memory": b["memory"] / a["memory"],
            }
        )
    return rows


def _names(key: tuple[str, str]) -> dict[str, str]:
    return {"problem": key[0], "name": key[1]}


def _rows_of(report: dict) -> dict[tuple[str, str], dict]:
    """Return our cells by problem and row."""
    return {(p["name"], row["name"]): row["ours"] for p in report["problems"] for row in p["rows"]}


def figures_of(report: dict) -> Figures:
    """Return the medians of one process."""
    return {key: (cell["time"][1], cell["memory"]) for key, cell in _rows_of(report).items()}


def text(rows: Sequence[dict], names: Sequence[str]) -> str:
    """Return the rows as a table."""
    lines = [["problem", "time / plain step", *names, "second / first", "by chance", "memory", ""]]
    for row in rows:
        low, middle, high = row["time"]
        verdict = ("slower" if middle > 1 else "faster") if row["changed"] else ""
        lines.append(
            [
                row["problem"],
                row["name"],
                f"{row['before']:.3f}",
                f"{row['after']:.3f}",
                f"{middle:.3f} [{low:.3f}, {high:.3f}]",
                f"{row['chance']:.2f}" if "chance" in row else "-",
                f"{row['memory']:.3f}",
                verdict,
            ]
        )
    return aligned(lines)


# --------------------------------------------------------------------------- commits


def git(*arguments: str) -> str:
    """Return what git prints in this repository.

    Raises:
        SystemExit: With git's message, if it fails, or if there is no git.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit("Comparing commits needs git, which was not found.") from None
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}, in {ROOT}: {done.stderr.strip()}")
    return done.stdout.strip()


def commit_of(revision: str) -> str:
    """Return the full hash of a commit.

    Raises:
        SystemExit: If this is no git repository, or has no such commit.
    """
    git("rev-parse", "--git-dir")
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except SystemExit:
        raise SystemExit(f"There is no commit {revision!r} in {ROOT}.") from None


@contextmanager
def checked_out(revision: str | None) -> Iterator[Path]:
    """Have a commit in a temporary folder, with this tree's ``benchmarks``; None is the tree itself."""
    if revision is None:
        yield ROOT
        return
    commit = commit_of(revision)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        tree = Path(folder) / "tree"
        try:
            git("worktree", "add", "--detach", "--quiet", str(tree), commit)
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=ignored)
            yield tree
        finally:  # if it was not added there is none to remove, and that is no error of its own
            command = ["git", "worktree", "remove", "--force", str(tree)]
            subprocess.run(command, cwd=ROOT, capture_output=True, check=False)


def run(tree: Path, arguments: Sequence[str]) -> Figures:
    """Measure a tree in a process of its own.

    Raises:
        SystemExit: If the process fails, with the end of what it printed, or imports another library.
    """
    # an installed library must not be found before the tree's
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "benchmarks.ours", *arguments]
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"Measuring {tree} failed:\n{done.stderr[-3000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    if not Path(report["library"]).resolve().is_relative_to(tree.resolve()):
        raise SystemExit(f"Measuring {tree} imported another library, {report['library']}.")
    return figures_of(report)


def compare(revisions: tuple[str, str | None], pairs: int, arguments: Sequence[str]) -> list[dict]:
    """Measure two commits in alternation; return a row per quantity."""
    found: tuple[list[Figures], list[Figures]] = ([], [])
    with checked_out(revisions[0]) as first, checked_out(revisions[1]) as second:
        trees = (first, second)
        for k in range(pairs):
            for side in (0, 1) if k % 2 == 0 else (1, 0):
                found[side].append(run(trees[side], arguments))
            print(f"pair {k + 1} of {pairs}", file=sys.stderr, flush=True)
    return compared(*found)


# --------------------------------------------------------------------------- command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("revisions", nargs="*", metavar="REV", help="one commit or two")
    parser.add_argument("--files", nargs=2, type=Path, metavar="JSON", help="stored results instead")
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=MODELS)
    parser.add_argument(
        *("--rows", "-r"),
        nargs="+",
        metavar="TEXT",
        default=HEADLINES,
        help="rows whose name has a TEXT (default: those with goals, three at once, no context)",
    )
    parser.add_argument("--pairs", type=int, default=6, help="processes per commit (default: 6)")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds per process (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    args = parser.parse_args(argv)
    if args.files is None and len(args.revisions) not in (1, 2):
        parser.error("expected one commit or two, or --files with two files")
    if args.files is not None and args.revisions:
        parser.error("expected either commits or --files, not both")
    if not 1 <= args.pairs <= MOST_PAIRS:
        parser.error(f"--pairs {args.pairs}: expected 1 to {MOST_PAIRS}")
    return args


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Compare two commits or two files; print and return the rows."""
    args = parse(argv)
    if args.files:
        rows = compared_files(*(json.loads(path.read_text()) for path in args.files))
        names = [path.stem for path in args.files]
    else:
        arguments = ["--models", *args.models, "--rows", *args.rows]
        arguments += ["--repetitions", str(args.repetitions)]
        arguments += ["--device", args.device, "--threads", str(args.threads)]
        revisions = (*args.revisions, None)[:2]
        rows = compare(revisions, args.pairs, arguments)
        names = [revision or "working tree" for revision in revisions]
    print(text(rows, names))
    return rows


if __name__ == "__main__":
    main()
