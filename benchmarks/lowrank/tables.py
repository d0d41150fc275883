"""The results as text and as reStructuredText for the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import report, table
from benchmarks.lowrank import kernels, routes, scaling, spectrum
from benchmarks.table import Lines, aligned, simple

# The README's tables are between these lines, one pair per part.
BEGIN = ".. The following tables are written by ``python -m benchmarks.lowrank --readme README.rst``."
END = ".. End of these tables."


def text(problem: dict) -> str:
    """Return the table of one problem, with a line above it."""
    lines = {
        "spectrum": _spectrum_lines,
        "ntk": _ntk_lines,
        "scaling": _scaling_lines,
        "routes": _routes_lines,
    }[problem["part"]]
    return "\n".join([_title(problem), aligned(lines(problem)), *_remarks(problem)])


def _title(problem: dict) -> str:
    if problem["part"] == "scaling":
        fixed = ", ".join(f"{k} {v}" for k, v in scaling.DEFAULT.items() if k != problem["name"])
        return f"Growth with {scaling.LABELS[problem['name']]} ({fixed}): ms beyond the plain step"
    if problem["part"] == "routes":
        kind = f'fisher="{problem["fisher"]}", ENTRY = {problem["entry"]}'
        return f"Routes to layers' Gram matrices, {kind}: {problem['about']}"
    plain = report._spread(problem["plain_ms"])
    what = "NTK" if problem["part"] == "ntk" else f"{problem['columns']} columns"
    size = f"{problem['plain_mib']:.4g} MiB"
    return f"{problem['about']}: {what}; plain step {plain} ms, {size}, {problem['rounds']} rounds"


def _remarks(problem: dict) -> list[str]:
    if problem["part"] == "routes":
        return _mistakes(problem)
    plain = problem.get("plain_ms")
    if plain and plain[2] > report.DISTURBED * plain[0]:
        return ["DISTURBED: the plain step's time varies; are other processes running?"]
    return []


# --------------------------------------------------------------------------- spectrum


def _spectrum_lines(problem: dict) -> Lines:
    lines = [["time / plain", *spectrum.SIDES, "floor", "goal", "| MiB", *spectrum.SIDES[1:]]]
    for row in problem["rows"]:
        times = [_time(row.get(side)) for side in (*spectrum.SIDES, "floor")]
        sizes = [f"{row[side]['mib']:.4g}" if side in row else "-" for side in spectrum.SIDES]
        goal = f"{row['goal']:g}" if "goal" in row else ""
        lines.append([row["name"], *times, goal, f"| {sizes[0]}", *sizes[1:]])
        if "over" in row:
            over = row["over"]
            name = f"  over: {over['row']}"
            lines.append([name, _time(over), "", "", "", f"{over['goal']:g}", "|", "", ""])
    return lines


def _time(cell: dict | None) -> str:
    return report._spread(cell["time"]) if cell else "-"


def spectrum_rst(problems: Sequence[dict], what: str) -> str:
    """Return a table: a cell is ours (vivit; matrix-free; floor), or the first three for memory."""
    names = [row["name"] for row in problems[0]["rows"]]
    lines = [[f"{what} / plain step", *(p["title"] for p in problems)]]
    for k, name in enumerate(names):
        lines.append([name, *(_spectrum_cell(p["rows"][k], what) for p in problems)])
        if what == "time" and "over" in problems[0]["rows"][k]:
            ratios = [f"{p['rows'][k]['over']['time'][1]:.2f}" for p in problems]
            lines.append(["... relative to the eigenpairs", *ratios])
    return simple(lines)


def _spectrum_cell(row: dict, what: str) -> str:
    sides = [*spectrum.SIDES, "floor"] if what == "time" else spectrum.SIDES
    found = []
    for side in sides:
        value = row.get(side, {}).get(what)
        value = value[1] if isinstance(value, list) else value
        found.append("-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}")
    ours, *others = found
    return f"{ours} ({'; '.join(others)})" if any(o != "-" for o in others) else ours


# --------------------------------------------------------------------------- kernels


def _ntk_lines(problem: dict) -> Lines:
    lines = [["NTK: ms", *kernels.SIDES, "ours is faster by", "than products", "goal", "| MiB", *"  "]]
    for row in problem["rows"]:
        cells = [row.get(side) for side in kernels.SIDES]
        ms = [f"{c['ms']:.4g}" if c else "-" for c in cells]
        mib = [f"{c['mib']:.4g}" if c else "-" for c in cells]
        faster = [report._spread(c["speedup"]) if c else "-" for c in cells[1:]]
        goal = f"{row['goal']:g}" if row["goal"] else ""
        lines.append([row["name"], *ms, *faster, goal, f"| {mib[0]}", *mib[1:]])
    return lines


def ntk_rst(problems: Sequence[dict]) -> str:
    """Return a table of milliseconds and MiB: ours (contraction; products)."""
    head = ["NTK"]
    for p in problems:
        head += [f"{p['title']}: ms", "MiB", "faster by"]
    lines = [head]
    for k, row in enumerate(problems[0]["rows"]):
        line = [row["name"]]
        for p in problems:
            cells = [p["rows"][k].get(side) for side in kernels.SIDES]
            for what in ("ms", "mib"):
                ours, *others = [f"{c[what]:.3g}" if c else "-" for c in cells]
                line.append(f"{ours} ({'; '.join(others)})")
            line.append("; ".join(f"{c['speedup'][1]:.3g}" if c else "-" for c in cells[1:]))
        lines.append(line)
    return simple(lines)


# --------------------------------------------------------------------------- growth


def _scaling_lines(problem: dict) -> Lines:
    lines = [["ms", *map(str, problem["values"]), "exponent", "of the last two"]]
    for row in problem["rows"]:
        slopes = ["-" if row[k] is None else f"{row[k]:.2f}" for k in ("exponent", "last")]
        lines.append([row["name"], *(f"{ms:.3g}" for ms in row["ms"]), *slopes])
    return lines


def scaling_rst(problem: dict) -> str:
    """Return the table of one axis."""
    lines = _scaling_lines(problem)
    lines[0][0] = f"extra ms, {scaling.LABELS[problem['name']]} ="
    return simple(lines)


# --------------------------------------------------------------------------- routes


def _routes_lines(problem: dict) -> Lines:
    lines = [["layer", "how many", *(f"{r} ms" for r in routes.ROUTES), "taken", "/ fastest"]]
    for row in problem["rows"]:
        ms = [f"{row[r][1]:.4g}" if row[r] else "hopeless" for r in routes.ROUTES]
        loss = f"{routes.loss(row, row['taken']):.2f}"
        lines.append([row["name"], str(row["count"]), *ms, row["taken"], loss])
    return lines


def _mistakes(problem: dict) -> list[str]:
    wrong = [row for row in problem["rows"] if routes.loss(row, row["taken"]) > routes.SLOWER]
    return [
        f"NOT THE FASTEST: {row['name']}: {row['taken']} is taken, and takes "
        f"{routes.loss(row, row['taken']):.2f} times as long as the other route"
        for row in wrong
    ]


def calibration_text(problems: list[dict]) -> str:
    """Return what other weights of an entry would cost, over all problems."""
    lines = [["ENTRY", "worst layer / fastest", "all / fastest", "layers slower by 10%"]]
    for row in routes.calibration(problems):
        costs = ["hopeless" if row[k] is None else f"{row[k]:.3f}" for k in ("worst", "total")]
        now = " (now)" if row["entry"] == problems[0]["entry"] else ""
        lines.append([f"{row['entry']}{now}", *costs, str(row["slower"])])
    return aligned(lines)


# --------------------------------------------------------------------------- README


def rst(found: dict) -> str:
    """Return all tables that the results have for the README."""
    by_part: dict[str, list[dict]] = {}
    for problem in found["problems"]:
        by_part.setdefault(problem["part"], []).append(problem)
    tables = []
    if "spectrum" in by_part:
        tables += [spectrum_rst(by_part["spectrum"], what) for what in ("time", "memory")]
    if "ntk" in by_part:
        tables.append(ntk_rst(by_part["ntk"]))
    tables += [scaling_rst(problem) for problem in by_part.get("scaling", [])]
    return "\n\n".join(tables)


def insert(readme: Path, found: dict) -> None:
    """Write the tables between the two marker lines of a file.

    Raises:
        ValueError: If a marker is missing.
    """
    table.insert(readme, BEGIN, END, rst(found))
