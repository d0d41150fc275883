"""The tables of `benchmarks.hessian_quality`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import report
from benchmarks.equal_time import whole
from benchmarks.estimators import EXTENSIONS, HESSCALE, HUTCHINSON, SAMPLED_GGN
from benchmarks.quality_problems import LARGE

SAMPLED = (HUTCHINSON, SAMPLED_GGN)
_SUM = "sum ``|estimate - H|`` / sum ``|H|``"


def find(problem: dict, name: str, samples: int | None = None) -> dict | None:
    """Return an estimate's row, or None."""
    rows = (r for r in problem["rows"] if r["name"] == name and r["samples"] == samples)
    return next(rows, None)


def text(problem: dict) -> str:
    """Return one setting's errors, and those without the last layer."""
    over = f"{problem['entries']} of {problem['parameters']} parameters"
    lines = [f"{problem['title']}: {problem['about']}; {over}, {problem['seeds']} seeds"]
    for row in problem["rows"]:
        name = row["name"] + (f", {row['samples']} sample(s)" if row["samples"] else "")
        cell = _spread(row).ljust(14)
        lines.append(f"{name:34}{cell}without the last layer {number(row['inner'])}")
    return "\n".join(lines)


def times(entry: dict) -> str:
    """Return one network's times of all estimates, relative to a plain step."""
    _, middle, _ = entry["plain_ms"]
    title = f"{entry['about']}, batch {entry['batch']}"
    lines = [f"{title}: plain step {middle:.3g} ms, {entry['rounds']} rounds"]
    if entry["plain_ms"][2] > report.DISTURBED * entry["plain_ms"][0]:
        lines.append("DISTURBED: the plain step's time varies; are other processes running?")
    lines += [f"  {name:30}{_quartiles(ratio)}" for name, ratio in entry["time"].items()]
    for name in SAMPLED:
        of = entry[name]
        more = f"each further sample {of['further']:.3g}; {of['fit']:.3g} fit into HesScale's time"
        lines.append(f"  {name:30}{_quartiles(of['first'])}, {more}")
    return "\n".join(lines)


def rst(found: dict) -> str:
    """Return the table of errors for the README, in two parts."""
    problems = [problem for problem in found["problems"] if problem["network"] != LARGE]
    first = [p for p in problems if p["network"] in ("tanh", "relu")]
    others = [p for p in problems if p not in first]
    title = f"{_SUM}, mean ± standard deviation over {found['seeds']} seeds"
    parts = [(title, first), ("The same for further networks", others)]
    return "\n\n".join(_list_table(head, _errors(part, found)) for head, part in parts if part)


def equal_time(found: dict) -> str:
    """Return the table at equal time for the README: a line per network."""
    columns = ["network", "HesScale", "v*Hv: first, further", "fit", "GGN MC: first, further", "fit"]
    columns += [f"errors, {state}" for state in ("init", "trained")]
    lines = [columns]
    for entry in found["times"]:
        # those of a batch as it was timed: the columns with one datum are another problem
        own = [p for p in found["problems"] if p["network"] == entry["network"]]
        own = [p for p in own if p["batch"] == entry["batch"]]
        line = [f"{entry['about']}; batch {entry['batch']}", f"{entry['time'][HESSCALE][1]:.2f}"]
        for of in map(entry.get, SAMPLED):
            line += [f"{of['first'][1]:.2f}, {of['further']:.2f}", f"{of['fit']:.1f}"]
        for trained in (False, True):
            states = [p for p in own if bool(p["steps"]) == trained]
            line += [_errors_at_equal_time(p, entry) for p in states] or [""]
        lines.append(line)
    return _list_table(
        "Times / plain step; errors of HesScale; of v*Hv; of GGN MC, at HesScale's time", lines
    )


# --------------------------------------------------------------------------- cells


def number(value: float) -> str:
    """Return an error as text: three decimals below 1, two digits above."""
    if value < 5e-4:
        return "0"
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else f"{value:#.3g}".removesuffix(".")


def _spread(row: dict) -> str:
    return number(row["mean"]) + ("" if row["std"] is None else f" ± {number(row['std'])}")


def _cell(problem: dict | None, name: str, samples: int | None = None) -> str:
    row = problem and find(problem, name, samples)
    return _spread(row) if row else ""


def _errors_at_equal_time(problem: dict, entry: dict) -> str:
    rows = [find(problem, HESSCALE), *(find(problem, name, whole(entry[name])) for name in SAMPLED)]
    return "; ".join(number(row["mean"]) for row in rows)


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = values
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _errors(problems: Sequence[dict], found: dict) -> list[list[str]]:
    few, many = found["samples"][0], found["samples"][-1]
    lines = [["estimate", *(p["title"] for p in problems)]]
    for name in EXTENSIONS:
        cells = [_cell(p, name) for p in problems]
        if any(cells):
            lines.append([name, *cells])
    for name in reversed(SAMPLED):
        for count in (few, many):
            samples = f"{count} sample{'s' if count > 1 else ''}"
            lines.append([f"{name}, {samples}", *(_cell(p, name, count) for p in problems)])
    return lines


def _list_table(title: str, table: Sequence[Sequence[str]]) -> str:
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in table:
        lines += [f"   {'*' if k == 0 else ' '} - {cell}".rstrip() for k, cell in enumerate(row)]
    return "\n".join(lines)
