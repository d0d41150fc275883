"""``python -m benchmarks.by_hand``: our steps beside steps that are written for the MLP alone.

The counted floor has products that are timed again and again, results in the cache. Steps written by
hand compute the same results within a training step, with hooks on five tensors, and know the network:
what they take more than the floor is memory, what ours take more than they is generality. Results are
compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from backpack_ext import KFAC, DiagGGN, SumGradSquared, backpack, extend
from benchmarks.floor import operands, shapes_of
from benchmarks.models import PROBLEMS
from benchmarks.report import machine
from benchmarks.rows import ROWS
from benchmarks.timing import Variant, interleave, summary

PATH = Path(__file__).parent / "results" / "by-hand-cpu.json"
NAMES = (
    *("KFAC expand mc", "KFAC expand mc, formed", "KFAC expand empirical, formed"),
    *("SumGradSquared", "DiagGGN mc"),
)


def _extension(name: str, generator: torch.Generator):
    if name == "SumGradSquared":
        return SumGradSquared()
    if name == "DiagGGN mc":
        return DiagGGN("mc", generator=generator)
    keep = "factor" if name.endswith("formed") else "root"
    fisher = "mc" if " mc" in name else "empirical"
    return KFAC("expand", fisher, keep=keep, generator=generator)


class ByHand:
    """The results of one row for a chain of linear layers and ReLUs, mean cross-entropy.

    Args:
        name: The row.
        model: The network.
        x: The inputs.
        y: The labels.
        sample: Returns the sampled vectors at the logits, ``[N, C]``.
    """

    def __init__(self, name: str, model: nn.Sequential, x: Tensor, y: Tensor, sample: Callable):
        self.name, self.model, self.x, self.y, self.sample = name, model, x, y, sample
        self.loss_fn = nn.CrossEntropyLoss()

    def __call__(self) -> None:
        """Run a step; leave the gradient and the results, ``weight.by_hand`` and ``bias.by_hand``."""
        calls, h = [], self.x
        own = "mc" not in self.name
        for layer in self.model:
            a, h = h, layer(h)
            if isinstance(layer, nn.Linear):
                calls.append((layer, a.detach()))
                if own:
                    h.register_hook(lambda g, layer=layer, a=a: self._leave(layer, a, g))
        self.loss_fn(h, self.y).backward()
        if own:
            return
        with torch.no_grad():
            b = self.sample(h)
            for layer, a in reversed(calls):
                self._leave(layer, a, b)
                if layer is not calls[0][0]:
                    b = (b @ layer.weight).masked_fill_(a == 0, 0)

    @torch.no_grad()
    def _leave(self, layer: nn.Linear, a: Tensor, b: Tensor) -> None:
        weight, bias = layer.weight, layer.bias
        if self.name.startswith("KFAC"):
            if self.name.endswith("formed"):
                scale = len(a) if "empirical" in self.name else 1
                found = (b * scale).T @ b, a.T @ (a / len(a))
            else:
                found = b.clone(), a * len(a) ** -0.5
            weight.by_hand = bias.by_hand = found
        else:
            weight.by_hand, bias.by_hand = b.square().T @ a.square(), b.square().sum(0)


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
        B, A = ours
        if not name.endswith("formed"):
            theirs = tuple(t.T @ t for t in theirs)
        torch.testing.assert_close(B, theirs[0])
        if p.dim() == 2:
            torch.testing.assert_close(A, theirs[1])


def _steps(name: str) -> dict[str, Variant]:
    """Return our step and the one written by hand, once they are known to agree."""
    problem = PROBLEMS["mlp"]("cpu")
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

    step = ByHand(name, hand, x, y, sample)
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


def measure(seconds: float) -> dict:
    """Return the median ratios to a plain step of ours, of the steps by hand, and of the floors."""
    problem, loss_fn = PROBLEMS["mlp"]("cpu"), nn.CrossEntropyLoss()
    shapes = shapes_of(problem.model, problem.x)
    plain = Variant(
        lambda: loss_fn(problem.model(problem.x), problem.y).backward(), lambda: _clear(problem.model)
    )
    variants = {"plain": plain}
    for row in (row for row in ROWS if row.name in NAMES):
        for who, variant in _steps(row.name).items():
            variants[row.name, who] = variant
        products = [p.prepare(operands("cpu")) for p in row.products(shapes)]
        variants[row.name, "floor"] = Variant(lambda products=products: [p() for p in products])
    for variant in variants.values():
        variant.warm_up(lambda: None)
    times = interleave(variants, "plain", lambda: None, seconds, (3, 10_000))
    found = {name: {} for name in NAMES}
    for name, who in (key for key in times if key != "plain"):
        ratios = [t / p for t, p in zip(times[name, who], times["plain"], strict=True)]
        found[name][who] = [round(q + (who == "floor"), 3) for q in summary(ratios)]
    return {"plain_ms": round(1e3 * summary(times["plain"])[1], 3), "rows": found}


def table(found: dict) -> str:
    """Return the medians as a reStructuredText table."""
    rows = [
        (name, *(f"{r[who][1]:.2f}" for who in ("ours", "by hand", "floor")))
        for name, r in found.items()
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
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=PATH, help="JSON")
    given = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    found = measure(given.seconds)
    torch.set_num_threads(threads)
    print(table(found["rows"]))
    about = {**machine("cpu"), "threads": given.threads}
    given.output.write_text(json.dumps({"machine": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
