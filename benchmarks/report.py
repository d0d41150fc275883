"""The results as text, as reStructuredText for the README, and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.goals import goal_of, near_floor, over_floor
from benchmarks.models import DIAGONALS
from benchmarks.table import aligned, simple


def machine(device: str) -> dict:
    """Describe what the numbers were measured on."""
    about = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backpack": version("backpack-for-pytorch"),
        "date": date.today().isoformat(),
        "device": device,
    }
    if torch.device(device).type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
        about["cuda"] = torch.version.cuda
    return about


def _load() -> float | None:
    """Return the load of the last minute: well above 0 before a run, the times are disturbed."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")  # only there on Linux; elsewhere the architecture has to do
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --------------------------------------------------------------------------- text

# Upper over lower quartile of the plain step beyond which a table is marked as unreliable. Other
# processes on the same cores slow parallel regions down by far more than their share of the time.
DISTURBED = 1.5
# A plain step and, with autograd alone, one vector per datum from the logits to the layers' outputs.
SWEEP = "plain, one more vector"
_HEAD = ["time / plain", "ours", "BackPACK", "curvlinops", "floor", "ours / floor", "goal"]
_HEAD += ["| memory: ours", "BackPACK", "curvlinops"]


def text(result: dict) -> str:
    """Return one problem's table: medians with quartiles, what they should be, and memory."""
    plain, mib = _spread(result["plain_ms"]), result["plain_mib"]
    title = f"{result['about']}: plain step {plain} ms, {mib:.4g} MiB, {result['rounds']} rounds"
    if result["plain_ms"][2] > DISTURBED * result["plain_ms"][0]:
        title += "\nDISTURBED: the plain step's time varies; are other processes running?"
    title += f"\none vector per datum by autograd alone: {_spread(result['sweep'])} of a plain step"
    title += crossing_text(result)
    lines = [_HEAD, *(_text_row(row, result["name"]) for row in result["rows"])]
    return "\n".join([title, aligned(lines)])


def crossing_text(result: dict) -> str:
    """Return a line about what `crossing` said before and after a problem, if it said anything."""
    before, after = result.get("crossing", (None, None))
    if before is None:
        return ""
    found = f"\na product on all threads, before and after: {before}, {after} of one thread's time"
    return found + " (see benchmarks/cores.py)"


def _text_row(row: dict, problem: str) -> list[str]:
    sides = [row.get(side) for side in ("ours", "backpack", "curvlinops")]
    times = [_spread(side["time"]) if side else "-" for side in sides]
    sizes = [f"{side['memory']:.2f}" if side else "-" for side in sides]
    goal, over = goal_of(problem, row["name"]), f"{over_floor(row):.2f}"
    if goal is None:
        verdict = ""
    else:
        verdict = f"{goal} {_verdict(goal.met(row))}"
        over += f" {_verdict(near_floor(row))}"
    floor = _spread(row["floor"]["time"])
    return [row["name"], *times, floor, over, verdict, f"| {sizes[0]}", *sizes[1:]]


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _spread(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def describe(about: dict) -> str:
    """Return the machine in one line."""
    return ", ".join(f"{key} {value}" for key, value in about.items())


# --------------------------------------------------------------------------- reStructuredText


def rst(report: dict, what: str = "time", words: tuple[str, ...] = (), having: bool = False) -> str:
    """Return a table for the README: one row per extension, one column per problem.

    Args:
        report: What `write` stores.
        what: A cell of ``"time"`` is ours (BackPACK; curvlinops; floor), of ``"memory"`` ours (BackPACK;
            curvlinops), of ``"floor"`` ours over the floor, of ``"goals"`` ours, the goal and whether it
            is met; only the last leaves out rows, those without a goal.
        words: Words to choose rows by.
        having: Whether those rows are wanted whose names have one of the words, or the others.

    Returns:
        A simple table in reStructuredText, of medians relative to a plain step; empty without rows.
    """
    head, cell = _CELLS[what]
    cells = {
        (problem["title"], row["name"]): found
        for problem in report["problems"]
        for row in problem["rows"]
        if any(w in row["name"] for w in words) == having and (found := cell(row, problem["name"]))
    }
    if not cells:
        return ""
    titles, names = (list(dict.fromkeys(key[k] for key in cells)) for k in (0, 1))
    body = [[name, *(cells.get((title, name), "") for title in titles)] for name in names]
    if what == "time" and not having:
        sweeps = {p["title"]: f"{1 + p['sweep'][1]:.2f}" for p in report["problems"] if "sweep" in p}
        if sweeps:
            body.append([SWEEP, *(sweeps.get(title, "") for title in titles)])
    return simple([[head, *titles], *body])


def _time_cell(row: dict, problem: str) -> str:
    others = [
        f"{row[side]['time'][1]:.2f}" if side in row else "-" for side in ("backpack", "curvlinops")
    ]
    return f"{row['ours']['time'][1]:.2f} ({'; '.join(others)}; {row['floor']['time'][1]:.2f})"


def _floor_cell(row: dict, problem: str) -> str:
    return f"{over_floor(row):.2f}"


def _goal_cell(row: dict, problem: str) -> str:
    goal = goal_of(problem, row["name"])
    if goal is None:
        return ""
    value = over_floor(row) if goal.of_floor else row["ours"]["time"][1]
    return f"{value:.2f} of {goal}: {'met' if goal.met(row) else 'missed'}"


def _memory_cell(row: dict, problem: str) -> str:
    others = [
        f"{row[side]['memory']:.2f}" if side in row else "-" for side in ("backpack", "curvlinops")
    ]
    return f"{row['ours']['memory']:.2f} ({'; '.join(others)})"


_CELLS: dict[str, tuple[str, Callable[[dict, str], str]]] = {
    "time": ("time / plain step", _time_cell),
    "floor": ("time / floor", _floor_cell),
    "goals": ("time / plain step, goal", _goal_cell),
    "memory": ("memory / plain step", _memory_cell),
}

# The README's tables are between these lines.
_COMMAND = "written by ``python -m benchmarks --readme README.rst``."
COSTS = (f".. Tables of costs, {_COMMAND}", ".. End of the tables of costs.")
DIAGONAL_COSTS = (
    f".. Tables of Hessian diagonals' costs, {_COMMAND}",
    ".. End of the tables of Hessian diagonals' costs.",
)


def blocks(report: dict) -> dict[tuple[str, str], str]:
    """Return what stands between each pair of the README's lines."""
    costs = [rst(report, what, DIAGONALS) for what in ("time", "floor", "goals")]
    diagonals = [rst(report, what, DIAGONALS, True) for what in ("time", "floor")]
    found = {COSTS: costs, DIAGONAL_COSTS: diagonals}
    return {lines: "\n\n".join(filter(None, tables)) for lines, tables in found.items()}


# --------------------------------------------------------------------------- JSON


def write(report: dict, path: Path) -> None:
    """Store the report as JSON, one line per row, so that versions compare line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = ",\n".join(_problem_lines(problem) for problem in report["problems"])
    others = {key: value for key, value in report.items() if key != "problems"}
    heads = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in others.items())
    path.write_text(f'{{{heads}"problems": [\n{problems}\n]}}\n')


def _problem_lines(problem: dict) -> str:
    head = json.dumps({key: value for key, value in problem.items() if key != "rows"})
    rows = ",\n".join("  " + json.dumps(row) for row in problem["rows"])
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}'
