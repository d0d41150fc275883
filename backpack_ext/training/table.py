"""The matrix of ways of training and quantities, made by trying each."""

from __future__ import annotations

import re

from backpack_ext.tables import list_table
from backpack_ext.training.outcomes import Outcome, outcome
from backpack_ext.training.problems import NETWORKS
from backpack_ext.training.quantities import QUANTITIES
from backpack_ext.training.ways import WAYS

COMMAND = "backpack_ext.training"


class Notes:
    """Messages, numbered in the order in which they were met."""

    def __init__(self):
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """Return the number of a message, without the names in it that differ between cells."""
        return self.numbers.setdefault(text, len(self.numbers) + 1)

    def lines(self) -> str:
        """Return all of them."""
        return "".join(f"[{number}] {text}\n\n" for text, number in self.numbers.items())


def brief(message: str) -> str:
    """Return the first two sentences of an error's message, without the names of a cell."""
    kind, text = message.split(": ", 1)
    text = re.sub(r"^\S+ \(\w+\): ", "", text)  # a layer
    text = re.sub(r"\[torch\.\w+ \[[\d, ]*\]\],.*", "...", text)  # a tensor
    extensions = {name.split()[0] for name in QUANTITIES}
    text = re.sub(rf"\b({'|'.join(sorted(extensions))})\b", "...", text, count=1)
    sentences = re.split(r"(?<=[.!]) (?=[A-Z])", text)[:2]
    return f"``{kind}``: {' '.join(sentences)}".replace("`", "``").replace("````", "``")


def cell(found: dict[str, Outcome], notes: Notes) -> str:
    """Return what to say of the outcomes of several networks."""
    by_text: dict[str, list[str]] = {}
    for network, one in found.items():
        text = f"[{notes.number(brief(one.text))}]" if one.kind == "refused" else one.kind
        if one.kind == "wrong":
            text = f"WRONG: {one.text}"
        by_text.setdefault(text, []).append(network)
    if len(by_text) == 1:
        return next(iter(by_text))
    first, *others = sorted(by_text, key=lambda text: -len(by_text[text]))
    return "; ".join([first, *(f"{', '.join(by_text[text])}: {text}" for text in others)])


def column_names(alike: list[list[str]]) -> list[str]:
    """Return a name for each group of quantities: without variants where all are in the group."""
    names = []
    for group in alike:
        shown: dict[str, None] = {}
        for name in group:
            word = name.split()[0]
            every = all(q in group for q in QUANTITIES if q.split()[0] == word)
            shown[word if every else name] = None
        names.append(", ".join(shown))
    return names


def table() -> str:
    """Return the table in reStructuredText; ways, and quantities, that fare alike share one place."""
    notes = Notes()
    cells = {
        way: {q: cell({n: outcome(way, q, n) for n in NETWORKS}, notes) for q in QUANTITIES}
        for way in WAYS
    }
    columns: dict[tuple[str, ...], list[str]] = {}
    for q in QUANTITIES:
        columns.setdefault(tuple(cells[way][q] for way in WAYS), []).append(q)
    alike = list(columns.values())
    rows: dict[tuple[str, ...], list[str]] = {}
    for way in WAYS:
        rows.setdefault(tuple(cells[way][group[0]] for group in alike), []).append(way)
    header = ("way of training", *column_names(alike))
    text = list_table([header, *(("; ".join(ways), *row) for row, ways in rows.items())])
    return text + "\n" + notes.lines()
