"""``python -m benchmarks.by_hand``: our steps beside steps that are written by hand.

The counted floor has products that are timed again and again, results in the cache. Steps written by
hand compute the same results within a training step, with a hook per layer and nothing else, and know
the network (`benchmarks.hand_written`): what they take more than the floor is memory and autograd, what
ours take more than they is generality. Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from backpack_ext import KFAC, DiagGGN, SumGradSquared, backpack, extend
from benchmarks.cores import crossing
from benchmarks.floor import operands, shapes_of
from benchmarks.hand_written import Chain, Graph
from benchmarks.models import PROBLEMS
from benchmarks.report import machine
from benchmarks.rows import ROWS
from benchmarks.timing import Variant, interleave, summary

PATH = Path(__file__).parent / "results" / "by-hand-cpu.json"
NAMES = {
    "mlp": (
        *("KFAC expand mc", "KFAC expand mc, formed", "KFAC expand empirical, formed"),
        *("SumGradSquared", "DiagGGN mc"),
    ),
    "cnn": ("KFAC expand mc", "KFAC reduce mc", "KFAC reduce empirical"),
    "vit": ("KFAC expand mc", "KFAC reduce mc", "KFAC reduce empirical"),
}


def _extension(name: str, generator: torch.Generator):
    if name == "SumGradSquared":
        return SumGradSquared()
    if name == "DiagGGN mc":
        return DiagGGN("mc", generator=generator)
    keep = "factor" if name.endswith("formed") else "root"
    fisher = "mc" if " mc" in name else "empirical"
    approx = "reduce" if "reduce" in name else "expand"
    return KFAC(approx, fisher, keep=keep, generator=generator)


def _same(name: str, model: nn.Module, hand: nn.Module) -> None:
    """Raise unless the two steps left the same results."""
    for p, q in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        field = "kfac" if name.startswith("KFAC") else None
        field = field or ("sum_grad_squared" if name == "SumGradSquared" else "diag_ggn_mc")
        ours, theirs = getattr(p, field), q.by_hand
        if field != "kfac":
            torch.testing.assert_close(ours, theirs)
            continue
        for k, (one, (t, root)) in enumerate(zip(ours, theirs, strict=True)):
            if k == 0 or p.dim() > 1:  # a bias has no A
                torch.testing.assert_close(one, t.T @ t if root else t, rtol=1e-4, atol=1e-6)


def _steps(key: str, name: str) -> dict[str, Variant]:
    """Return our step and the one written by hand, once they are known to agree."""
    problem = PROBLEMS[key]("cpu")
    hand, model = copy.deepcopy(problem.model), extend(problem.model)
    loss_fn, x, y = extend(nn.CrossEntropyLoss()), problem.x, problem.y
    extension = _extension(name, torch.Generator().manual_seed(0))

    def ours() -> None:
        with backpack(extension):
            loss_fn(model(x), y).backward()

    draws = torch.Generator().manual_seed(0)

    def sample(logits: Tensor) -> Tensor:
        q = logits.softmax(1)
        cdf = q.cumsum(1)
        u = torch.rand(len(q), 1, generator=draws)
        drawn = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=q.shape[1] - 1)
        return q.scatter_add(1, drawn, torch.full_like(u, -1.0)).mul_(len(q) ** -0.5)

    step = (Chain if key == "mlp" else Graph)(name, hand, x, y, sample)
    ours()
    step()
    _same(name, model, hand)
    return {
        "ours": Variant(ours, lambda: _clear(model)),
        "by hand": Variant(step, lambda: _clear(hand)),
    }


def _clear(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None
        for field in ("by_hand", "kfac", "sum_grad_squared", "diag_ggn_mc"):
            if hasattr(p, field):
                delattr(p, field)


def measure(key: str, seconds: float) -> dict:
    """Return quartiles of ratios to a plain step: ours, the steps by hand, and the floors."""
    problem, loss_fn = PROBLEMS[key]("cpu"), nn.CrossEntropyLoss()
    shapes = shapes_of(problem.model, problem.x)
    plain = Variant(
        lambda: loss_fn(problem.model(problem.x), problem.y).backward(), lambda: _clear(problem.model)
    )
    variants = {"plain": plain}
    for row in (row for row in ROWS if row.name in NAMES[key]):
        for who, variant in _steps(key, row.name).items():
            variants[row.name, who] = variant
        products = [p.prepare(operands("cpu")) for p in row.products(shapes)]
        variants[row.name, "floor"] = Variant(lambda products=products: [p() for p in products])
    for variant in variants.values():
        variant.warm_up(lambda: None)
    before = crossing("cpu")
    times = interleave(variants, "plain", lambda: None, seconds, (3, 10_000))
    found = {name: {} for name in NAMES[key]}
    for name, who in (key for key in times if key != "plain"):
        ratios = [t / p for t, p in zip(times[name, who], times["plain"], strict=True)]
        found[name][who] = [round(q + (who == "floor"), 3) for q in summary(ratios)]
    return {
        "title": problem.title,
        "plain_ms": round(1e3 * summary(times["plain"])[1], 3),
        "rounds": len(times["plain"]),
        "crossing": [before, crossing("cpu")],
        "rows": found,
    }


def table(found: dict) -> str:
    """Return the medians of all problems as a reStructuredText table."""
    rows = [
        (f"{problem['title']}: {name}", *(f"{r[who][1]:.2f}" for who in ("ours", "by hand", "floor")))
        for problem in found.values()
        for name, r in problem["rows"].items()
    ]
    rows.insert(0, ("time / plain step", "ours", "by hand", "counted floor"))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    rule = "  ".join("=" * w for w in widths)
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, store JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.by_hand", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each of three networks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=PATH, help="JSON")
    given = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    found = {key: measure(key, given.seconds) for key in NAMES}
    about = {**machine("cpu"), "threads": given.threads}
    torch.set_num_threads(threads)
    print(table(found))
    given.output.write_text(json.dumps({"machine": about, "problems": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
