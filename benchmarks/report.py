"""The results as text, as reStructuredText for the README, and as JSON."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch


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
_HEAD = ("time / plain", "ours", "BackPACK", "floor", "| memory: ours", "BackPACK")


def text(result: dict) -> str:
    """Return one problem's table: medians with quartiles, and memory."""
    plain, mib = _spread(result["plain_ms"]), result["plain_mib"]
    title = f"{result['about']}: plain step {plain} ms, {mib:.4g} MiB, {result['rounds']} rounds"
    if result["plain_ms"][2] > DISTURBED * result["plain_ms"][0]:
        title += "\nDISTURBED: the plain step's time varies; are other processes running?"
    cells = [_HEAD, *(_text_row(row) for row in result["rows"])]
    widths = [max(len(line[k]) for line in cells) for k in range(len(_HEAD))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _text_row(row: dict) -> tuple[str, ...]:
    ours, theirs = row["ours"], row.get("backpack")
    return (
        row["name"],
        _spread(ours["time"]),
        _spread(theirs["time"]) if theirs else "-",
        _spread(row["floor"]["time"]),
        f"| {ours['memory']:.2f}",
        f"{theirs['memory']:.2f}" if theirs else "-",
    )


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
        what: ``"time"``, cells ``ours (BackPACK; floor)``, or ``"memory"``, ``ours (BackPACK)``.
        words: Words to choose rows by.
        having: Whether those rows are wanted whose names have one of the words, or the others.

    Returns:
        A simple table in reStructuredText, of medians relative to a plain step.
    """
    cell = {"time": _time_cell, "memory": _memory_cell}[what]
    problems = [
        problem | {"rows": rows}
        for problem in report["problems"]
        if (rows := [r for r in problem["rows"] if any(w in r["name"] for w in words) == having])
    ]
    if not problems:
        return ""
    head = (f"{what} / plain step", *(p["title"] for p in problems))
    names = list(dict.fromkeys(row["name"] for p in problems for row in p["rows"]))
    lines = [head]
    for name in names:
        found = [next((r for r in p["rows"] if r["name"] == name), None) for p in problems]
        lines.append((name, *("" if row is None else cell(row) for row in found)))
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    rule = "  ".join("=" * w for w in widths)
    body = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in (rule, body[0], rule, *body[1:], rule))


def _time_cell(row: dict) -> str:
    theirs = f"{row['backpack']['time'][1]:.2f}" if "backpack" in row else "-"
    return f"{row['ours']['time'][1]:.2f} ({theirs}; {row['floor']['time'][1]:.2f})"


def _memory_cell(row: dict) -> str:
    theirs = f"{row['backpack']['memory']:.2f}" if "backpack" in row else "-"
    return f"{row['ours']['memory']:.2f} ({theirs})"


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
