"""``python -m benchmarks.blocks``: what functions of Kronecker blocks cost, and EKFAC's two ways.

Two tables. Functions of one block ``B (x) A`` with two factors of size d, in units of one product
``B V A`` with a gradient. Then EKFAC within a training step, in units of a plain forward and backward:
with the eigenbases of the same pass, and with given ones, beside KFAC with the same vectors.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from backpack_ext import EKFAC, KFAC, backpack, extend
from benchmarks import report
from benchmarks.models import PROBLEMS
from benchmarks.timing import Variant, interleave, summary
from curvature import Kronecker

RESULTS = Path(__file__).parent / "results"


def functions(d: int, device: str) -> dict[str, Callable[[], object]]:
    """Return what is timed on a block of two d x d factors; the first is the unit."""
    x, V = torch.randn(2, 2 * d, d, device=device), torch.randn(d, d, device=device)
    B, A = x.mT @ x / d
    K = Kronecker(B, A)
    eigen, kept = K.eigh(), K.inverse(0.1)
    return {
        "matvec": lambda: K.matvec(V),
        "inverse, kept: matvec": lambda: kept.matvec(V),
        "inverse from a kept eigh()": lambda: eigen.inverse(0.1),
        "inverse, exact": lambda: K.inverse(0.1),
        "inverse, factored": lambda: K.inverse(0.1, "factored"),
        "inverse, cholesky": lambda: K.inverse(0.1, "cholesky"),
        "logdet": lambda: K.logdet(0.1),
        "sample": lambda: K.sample(0.1),
        "norm": lambda: K.norm(),
    }


def of_block(dims: Sequence[int], seconds: float, device: str) -> dict[str, dict[int, tuple]]:
    """Time the functions; quartiles of ratios to a product, by name and d."""
    found: dict[str, dict[int, tuple]] = {}
    for d in dims:
        variants = {name: Variant(f) for name, f in functions(d, device).items()}
        ratios = _ratios(variants, "matvec", seconds, device)
        for name, value in ratios.items():
            found.setdefault(name, {})[d] = value
    return found


def of_training(names: Sequence[str], seconds: float, device: str) -> dict[str, dict[str, tuple]]:
    """Time EKFAC within a step; quartiles of ratios to a plain step, by name and problem."""
    found: dict[str, dict[str, tuple]] = {}
    for name in names:
        problem = PROBLEMS[name](device)
        plain, plain_loss = copy.deepcopy(problem.model), nn.CrossEntropyLoss()
        model, loss_fn = extend(copy.deepcopy(problem.model)), extend(nn.CrossEntropyLoss())
        step = _step(model, loss_fn, problem, KFAC(fisher="mc"))
        step()
        basis = {p: p.kfac for p in model.parameters() if hasattr(p, "kfac")}
        variants = {
            "plain": Variant(lambda m=plain, c=plain_loss, q=problem: c(m(q.x), q.y).backward()),
            "KFAC": Variant(step),
            "EKFAC": Variant(_step(model, loss_fn, problem, EKFAC(fisher="mc"))),
            "EKFAC, given bases": Variant(
                _step(model, loss_fn, problem, EKFAC(fisher="mc", basis=basis))
            ),
        }
        for row, value in _ratios(variants, "plain", seconds, device).items():
            found.setdefault(row, {})[problem.title] = value
    return found


def _step(model: nn.Module, loss_fn: nn.Module, problem, ext) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        with backpack(ext):
            loss_fn(model(problem.x), problem.y).backward()

    return step


def _ratios(variants: dict[str, Variant], unit: str, seconds: float, device: str) -> dict[str, tuple]:
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for variant in variants.values():
        variant.warm_up(sync)
    times = interleave(variants, unit, sync, seconds, (3, 30))
    return {
        name: summary([t / u for t, u in zip(values, times[unit], strict=True)])
        for name, values in times.items()
    }


def table(found: dict[str, dict], head: str) -> str:
    """Return medians as a reStructuredText table."""
    columns = list(next(iter(found.values())))
    rows = [[head, *(f"d = {c}" if isinstance(c, int) else c for c in columns)]]
    rows += [[name, *(f"{cells[c][1]:.3g}" for c in columns)] for name, cells in found.items()]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    rule = "  ".join("=" * w for w in widths)
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def main(argv: Sequence[str] | None = None) -> dict:
    """Run both tables, print them, store them as JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.blocks", description=__doc__)
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 512, 1024])
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=["mlp", "cnn", "vit"])
    parser.add_argument("--seconds", type=float, default=8.0, help="time per column (default: 8)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        about = report.machine(args.device)
        print(report.describe(about), end="\n\n")
        block = of_block(args.dims, args.seconds, args.device)
        print(table(block, "time / B V A"), end="\n\n", flush=True)
        training = of_training(args.models, args.seconds, args.device)
        print(table(training, "time / plain step"), end="\n\n")
    finally:
        torch.set_num_threads(before)
    found = {"machine": about, "block": block, "training": training}
    path = args.out / f"blocks-{args.device.replace(':', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"stored in {path}")
    return found


if __name__ == "__main__":
    main()
