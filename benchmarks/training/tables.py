"""The results as text and as reStructuredText."""

from __future__ import annotations

from benchmarks import report
from benchmarks.table import aligned, simple

HEAD = ["time / AdamW", "[quartiles]", "refresh", "between", "floor", "singd", "goal"]
MEMORY = ["| state", "singd", "| peak", "singd", "| total", "singd"]


def text(problem: dict) -> str:
    """Return one problem's table: times, then bytes of the state, and memory."""
    plain = report._spread(problem["plain_ms"])
    title = (
        f"{problem['about']}: AdamW's iteration {plain} ms, {problem['plain_mib']:.4g} MiB, "
        f"{problem['rounds']} rounds of {problem['interval']} iterations"
    )
    if problem["plain_ms"][2] > report.DISTURBED * problem["plain_ms"][0]:
        title += "\nDISTURBED: AdamW's time varies; are other processes running?"
    title += report.crossing_text(problem)
    lines = [[HEAD[0], "", *HEAD[1:], *MEMORY]]
    lines += [_line(row) for row in problem["rows"]]
    unsound = [
        f"{row['name']} ({side})"
        for row in problem["rows"]
        for side in ("ours", "torch", "singd")
        if not row.get(side, {}).get("sound", True)
    ]
    if unsound:
        title += f"\nUNSOUND: steps were skipped, or parameters are not finite: {', '.join(unsound)}"
    return "\n".join([title, aligned(lines)])


def _line(row: dict) -> list[str]:
    own, peer = _own(row), row.get("singd")
    low, middle, high = own["time"]
    return [
        row["name"],
        f"{middle:.2f}",
        f"[{low:.2f}, {high:.2f}]",
        f"{own['refresh']:.2f}",
        f"{own['between']:.2f}",
        f"{row['floor']['time'][1]:.2f}" if "floor" in row else "",
        f"{peer['time'][1]:.2f}" if peer else "",
        f"{row['goal']}" if "goal" in row else "",
        f"| {own['state']:.3g}",
        f"{peer['state']:.3g}" if peer else "",
        f"| {own['peak']:.2f}",
        f"{peer['peak']:.2f}" if peer else "",
        f"| {own['total']:.2f}",
        f"{peer['total']:.2f}" if peer else "",
    ]


def _own(row: dict) -> dict:
    return row["ours"] if "ours" in row else row["torch"]


def rst(found: dict) -> str:
    """Return a table for the README: ``ours (singd; floor)`` per problem, state and peak."""
    problems = found["problems"]
    names = list(dict.fromkeys(row["name"] for p in problems for row in p["rows"]))
    head = ["iteration / AdamW's", *(p["title"] for p in problems)]
    head += [f"state, {problems[0]['title']}", f"peak, {problems[0]['title']}"]
    lines = [head]
    for name in names:
        rows = [next(row for row in p["rows"] if row["name"] == name) for p in problems]
        first = rows[0]
        cells = [_with_peer(first, "state"), _with_peer(first, "peak")]
        lines.append([name, *(_time(row) for row in rows), *cells])
    return simple(lines)


def _time(row: dict) -> str:
    others = [f"{row['singd']['time'][1]:.3g}" if "singd" in row else "-"]
    others.append(f"{row['floor']['time'][1]:.2f}" if "floor" in row else "-")
    own = f"{_own(row)['time'][1]:.2f}"
    return own if others == ["-", "-"] else f"{own} ({'; '.join(others)})"


def _with_peer(row: dict, what: str) -> str:
    own = f"{_own(row)[what]:.2f}"
    return f"{own} ({row['singd'][what]:.2f})" if "singd" in row else own
