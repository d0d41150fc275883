"""Tables in the README that are made by asking the library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def markers(command: str) -> tuple[str, str]:
    """Return the lines between which a table stands that ``python -m command`` prints."""
    return f".. The following table is written by ``python -m {command}``.\n", ".. End of the table.\n"


def list_table(rows: Iterable[Sequence[str]]) -> str:
    """Return a table in reStructuredText, its header first."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        lines += [f"   {'*' if k == 0 else ' '} - {cell}" for k, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def insert(text: str, command: str, table: str) -> str:
    """Return a text with a table between its two markers.

    Raises:
        ValueError: If a marker is missing.
    """
    begin, end = markers(command)
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise ValueError(f"Expected the lines {begin!r} and {end!r}.")
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"


def main(command: str, table: Callable[[], str]) -> None:
    """Print a table, or put it into the file that is named on the command line."""
    if sys.argv[1:]:
        path = Path(sys.argv[1])
        path.write_text(insert(path.read_text(), command, table()))
    else:
        sys.stdout.write(table())
