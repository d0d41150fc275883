"""What the costs should be, two threads, and whether they are.

A limit of time is relative to a plain forward and backward (the gradient is included), or to the
counted floor. Beside it each of these figures should be within 15% of its floor.
"""

from __future__ import annotations

from dataclasses import dataclass

# Each figure that has a goal, over its counted floor.
OVER_FLOOR = 1.15


@dataclass(frozen=True)
class Goal:
    """The largest ratio that meets the goal.

    Args:
        limit: The ratio.
        of_floor: Whether it is relative to the counted floor instead of the plain step.
    """

    limit: float
    of_floor: bool = False

    def met(self, row: dict) -> bool:
        """Return whether a row of results has a ratio, to two decimals, of at most the limit."""
        return round(over_floor(row) if self.of_floor else row["ours"]["time"][1], 2) <= self.limit

    def __str__(self) -> str:
        return f"{self.limit:g}" + (" of floor" if self.of_floor else "")


def _goals(*limits: float | Goal) -> dict[str, Goal]:
    models = ("mlp", "cnn", "resnet", "vit")
    goals = [limit if isinstance(limit, Goal) else Goal(limit) for limit in limits]
    return dict(zip(models, goals, strict=True))


_KFAC = {
    "KFAC expand mc": _goals(1.9, 2.0, 2.0, Goal(1.1, of_floor=True)),
    "KFAC reduce mc": _goals(1.9, 1.35, 1.4, 1.5),
    "KFAC reduce empirical": _goals(1.7, 1.1, 1.15, 1.2),
}
# Factors of few rows are kept as rows; the goals are those of formed ones too.
GOALS: dict[str, dict[str, Goal]] = {
    **_KFAC,
    **{f"{name}, formed": goals for name, goals in _KFAC.items()},
    "SumGradSquared": _goals(1.5, 2.0, 2.5, 2.0),
    "DiagGGN mc": _goals(1.8, 2.2, 2.5, 2.5),
}


def goal_of(problem: str, row: str) -> Goal | None:
    """Return the goal of a row on a problem, by their names; None where there is none."""
    return GOALS.get(row, {}).get(problem)


def over_floor(row: dict) -> float:
    """Return our median time over the median counted floor, both in plain steps."""
    return row["ours"]["time"][1] / row["floor"]["time"][1]


def near_floor(row: dict) -> bool:
    """Return whether our time, to two decimals, is at most `OVER_FLOOR` times the floor."""
    return round(over_floor(row), 2) <= OVER_FLOOR


def summary(problems: list[dict]) -> str:
    """Return how many goals are met, in one line; empty without any."""
    found = [(p, row, goal_of(p["name"], row["name"])) for p in problems for row in p["rows"]]
    found = [(p, row, goal) for p, row, goal in found if goal is not None]
    if not found:
        return ""
    met = sum(goal.met(row) for _, row, goal in found)
    near = sum(near_floor(row) for _, row, _ in found)
    return (
        f"goals met: {met} of {len(found)}; within {OVER_FLOOR:g} of the counted floor: "
        f"{near} of {len(found)}"
    )
