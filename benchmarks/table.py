"""Tables as text and in reStructuredText, and their place in a file."""

from __future__ import annotations

from pathlib import Path

Lines = list[list[str]]


def aligned(lines: Lines) -> str:
    """Return columns of equal width."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def simple(lines: Lines) -> str:
    """Return a simple table in reStructuredText; the first line is its head."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    rule = "  ".join("=" * w for w in widths)
    body = aligned(lines).split("\n")
    return "\n".join([rule, body[0], rule, *body[1:], rule])


def insert(readme: Path, begin: str, end: str, body: str) -> None:
    """Write a body between two marker lines of a file.

    Args:
        readme: The file.
        begin: The line before the body.
        end: The line after it.
        body: What replaces everything between them.

    Raises:
        ValueError: If a marker is missing, or not unique.
    """
    content = readme.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{readme}: expected the lines {begin!r} and {end!r}, each once.")
    before, rest = content.split(begin)
    readme.write_text(f"{before}{begin}\n\n{body}\n\n{end}{rest.split(end)[1]}")
