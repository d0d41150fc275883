"""``python -m benchmarks.overhead``: what is left of the cost where the matrix products are tiny.

Each rung of a ladder does what the one before does and one thing more, so that the differences name the
overhead. Two networks: 41 linear layers of width 32 on 8 data, and the network of a small
reinforcement-learning problem on a single datum.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from torch import nn

from backpack_ext import KFAC, BatchL2Grad, SumGradSquared, backpack, extend
from backpack_ext.extension import Extension, Vectors
from backpack_ext.unit import Unit, stack_inputs, stack_vectors
from benchmarks import report
from benchmarks.models import PROBLEMS, Problem
from benchmarks.timing import Variant, interleave

RESULTS = Path(__file__).parent / "results"
# By name: the rung that it is compared with, and what the difference is.
RUNGS = {
    "empty context": ("plain", "entering and leaving ``backpack()`` with nothing to compute"),
    "records": ("plain", "hooks on modules note each call: input, shapes, node of the output"),
    "hooks on nodes": ("records", "the graph is walked; its nodes hand over what arrives"),
    "normal form": (
        "hooks on nodes",
        "inputs and vectors by datum, position, feature; small layers joined",
    ),
    "BatchL2Grad": ("normal form", "norms, without a product"),
    "SumGradSquared": ("normal form", "products of squares; a tensor for each parameter"),
    "KFAC": ("normal form", "two symmetric products; a ``curvature.Kronecker`` for each parameter"),
}


class Nothing(Extension):
    """Takes the gradient at all layers and makes nothing of it.

    Args:
        forms: Whether to bring inputs and vectors to the normal form.
    """

    vectors = Vectors("gradient")

    def __init__(self, forms: bool):
        super().__init__("nothing")
        self.forms = forms

    def absorb(self, store: dict, unit: Unit) -> None:
        """Look at a layer."""
        if self.forms:
            _ = unit.a, unit.b

    def absorb_all(self, store: dict, units: list[Unit]) -> None:
        """Look at layers of equal shape, joined as the other extensions do."""
        if not self.forms:
            return
        if len(units) == 1:
            self.absorb(store, units[0])
            return
        stack_inputs(units), stack_vectors(units)

    def finish(self, store: dict) -> list:
        """Return no results."""
        return []

    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Add nothing up."""


def variants(problem: Problem) -> dict[str, Variant]:
    """Return the plain step and the rungs."""
    plain, loss = copy.deepcopy(problem.model), nn.CrossEntropyLoss()
    model, extended = extend(copy.deepcopy(problem.model)), extend(nn.CrossEntropyLoss())
    exts = {
        "empty context": [],
        "hooks on nodes": [Nothing(False)],
        "normal form": [Nothing(True)],
        "BatchL2Grad": [BatchL2Grad()],
        "SumGradSquared": [SumGradSquared()],
        "KFAC": [KFAC(fisher="empirical")],
    }
    found = {
        "plain": _variant(problem, plain, loss, nullcontext, ()),
        "records": _variant(problem, model, extended, nullcontext, ()),
    }
    for name, chosen in exts.items():
        found[name] = _variant(problem, model, extended, lambda c=chosen: backpack(*c), chosen)
    return found


def _variant(problem: Problem, model: nn.Module, loss_fn: nn.Module, context: Callable, exts) -> Variant:
    def step() -> None:
        with context():
            loss_fn(model(problem.x), problem.y).backward()

    def clear() -> None:
        for p in model.parameters():
            p.grad = None
            for ext in exts:
                p.__dict__.pop(ext.savefield, None)

    return Variant(step, clear)


def measure(name: str, seconds: float, rounds: tuple[int, int]) -> dict:
    """Time the ladder on one problem.

    Returns:
        Microseconds of a plain step, number of layers, and by rung the median difference to the rung it
        is compared with, in microseconds per layer.
    """
    problem = PROBLEMS[name]("cpu")
    found = variants(problem)
    for variant in found.values():
        variant.warm_up(lambda: None)
    times = interleave(found, "plain", lambda: None, seconds, rounds)
    layers = sum(isinstance(m, nn.Linear) for m in problem.model.modules())
    rungs = {}
    for rung, (other, _) in RUNGS.items():
        more = median(a - b for a, b in zip(times[rung], times[other], strict=True))
        ratio = median(a / b for a, b in zip(times[rung], times["plain"], strict=True))
        rungs[rung] = {"us_per_layer": round(1e6 * more / layers, 1), "ratio": round(ratio, 2)}
    plain = round(1e6 * median(times["plain"]), 1)
    return {"problem": problem.title, "layers": layers, "plain_us": plain, "rungs": rungs}


def table(found: list[dict]) -> str:
    """Return the measurements as a table in reStructuredText."""
    heads = [f"{one['problem']}: us per layer (step / plain)" for one in found]
    lines = [("rung", *heads, "what it adds")]
    plain = [f"{one['plain_us'] / one['layers']:.1f} (1.00)" for one in found]
    lines.append(("plain step", *plain, "forward and backward"))
    for rung, (_, what) in RUNGS.items():
        cells = [
            f"+ {one['rungs'][rung]['us_per_layer']:.1f} ({one['rungs'][rung]['ratio']:.2f})"
            for one in found
        ]
        lines.append((rung, *cells, what))
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    rule = "  ".join("=" * w for w in widths)
    body = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join((rule, body[0], rule, *body[1:], rule))


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure, print, store."""
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="per network")
    parser.add_argument("--rounds", type=int, help="number of rounds, instead of a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args(argv)
    rounds = (20, 2000) if args.rounds is None else (args.rounds, args.rounds)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [measure(name, args.seconds, rounds) for name in ("tiny", "control")]
        about = report.machine("cpu")
    finally:
        torch.set_num_threads(before)
    print(table(found))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "overhead-cpu.json"
    path.write_text(json.dumps({"machine": about, "networks": found}, indent=1) + "\n")
    print(f"stored in {path}")
    return found


if __name__ == "__main__":
    main()
