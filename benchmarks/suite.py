"""One problem, all rows: build the variants, time them, measure their memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import backpack as their
import torch
from torch import Tensor, nn

import backpack_ext as our
from benchmarks import peers
from benchmarks.cores import crossing
from benchmarks.floor import operands, shapes_of, total_flops
from benchmarks.goals import goal_of, near_floor, over_floor
from benchmarks.memory import peak_memory
from benchmarks.models import Problem
from benchmarks.rows import Row
from benchmarks.timing import Variant, interleave, summary

PLAIN = ("plain",)
SWEEP = ("sweep",)
# Peaks of steps that take longer, in seconds, are those of one step instead of two in a row.
SLOW = 1.0
# What takes so many plain steps is timed in one round: more digits of a hundredfold time say nothing.
FAR = 50
# Who is measured beside us, where it can do a row: keys in the results.
PEERS = ("backpack", "curvlinops")


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        seconds: Time for the rounds of one problem.
        rounds: Smallest and largest number of rounds.
        device: Where to run.
        peers: Whether to measure others beside us.
    """

    seconds: float
    rounds: tuple[int, int]
    device: str = "cpu"
    peers: bool = True

    def sync(self) -> None:
        """Wait until the device has done its work."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(problem: Problem, rows: Sequence[Row], settings: Settings) -> dict:
    """Measure one problem.

    Args:
        problem: The model and its data.
        rows: What to compute.
        settings: How long to measure.

    Returns:
        A dictionary for JSON: times are quartiles ``[lower, median, upper]`` of ratios to the plain
        step of the same round (beyond `FAR` of one round), memory is the ratio of peaks. ``"sweep"`` is
        what `_sweep` takes, ``"crossing"`` what `crossing` says before and after.
    """
    rows = _chosen(problem, rows)
    build = _steps if settings.peers else _our_steps
    steps = build(problem, rows, settings.device)
    products = _products(problem, rows)
    variants = steps | _floors(products, settings.device) | {SWEEP: _sweep(problem)}
    for variant in variants.values():
        variant.warm_up(settings.sync)
    peaks = {key: _peak(variant, settings) for key, variant in steps.items()}
    before = crossing(settings.device)
    far = [key for key, v in variants.items() if v.seconds > FAR * variants[PLAIN].seconds]
    times = interleave(variants, PLAIN, settings.sync, settings.seconds, settings.rounds, once=far)
    sweep = [t / plain for t, plain in zip(times[SWEEP], times[PLAIN], strict=True)]
    return {
        "name": problem.name,
        "title": problem.title,
        "about": problem.about,
        "batch": len(problem.x),
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "rounds": len(times[PLAIN]),
        "plain_ms": _rounded([1e3 * t for t in summary(times[PLAIN])]),
        "plain_mib": _digits(peaks[PLAIN] / 2**20),
        "sweep": _rounded(summary(sweep)),
        "crossing": [before, crossing(settings.device)],
        "rows": [_row(row, products[row.name], times, peaks, problem.name) for row in rows],
    }


def measure_ours(problem: Problem, rows: Sequence[Row], settings: Settings) -> dict:
    """Measure one problem as `measure` does, but neither peers nor floors.

    Returns:
        The problem's name, and for each row its name and our cell.
    """
    rows = _chosen(problem, rows)
    steps = _our_steps(problem, rows, settings.device)
    for variant in steps.values():
        variant.warm_up(settings.sync)
    peaks = {key: _peak(variant, settings) for key, variant in steps.items()}
    times = interleave(steps, PLAIN, settings.sync, settings.seconds, settings.rounds)
    cells = [{"name": row.name, "ours": _cell(("ours", row.name), times, peaks)} for row in rows]
    return {"name": problem.name, "rows": cells}


def _chosen(problem: Problem, rows: Sequence[Row]) -> list[Row]:
    """Return the rows that a problem is meant for."""
    return [row for row in rows if not problem.rows or row.name.startswith(problem.rows)]


def _cell(key: tuple, times: dict, peaks: dict) -> dict:
    # what was timed once was so in the first round
    ratios = [t / plain for t, plain in zip(times[key], times[PLAIN], strict=False)]
    return {"time": _rounded(summary(ratios)), "memory": _digits(peaks[key] / peaks[PLAIN])}


def _row(row: Row, products: tuple, times: dict, peaks: dict, problem: str) -> dict:
    result: dict = {"name": row.name}
    for side in ("ours", *PEERS):
        if (side, row.name) in times:
            result[side] = _cell((side, row.name), times, peaks)
    floor = [1.0] * len(times[PLAIN])
    if products:
        extra = times["floor", products]
        floor = [1 + t / plain for t, plain in zip(extra, times[PLAIN], strict=True)]
    result["floor"] = {
        "time": _rounded(summary(floor)),
        "gflop": _digits(total_flops(products) / 1e9),
    }
    result["over_floor"] = _digits(over_floor(result))
    if goal := goal_of(problem, row.name):
        result["goal"] = {"limit": goal.limit, "of": "floor" if goal.of_floor else "plain step"}
        result["goal"] |= {"met": goal.met(result), "near_floor": near_floor(result)}
    return result


# --------------------------------------------------------------------------- variants


def _our_steps(problem: Problem, rows: Sequence[Row], device: str) -> dict[tuple, Variant]:
    """Build the plain step and ours, on copies of the model."""
    x, y = problem.x, problem.y
    plain = copy.deepcopy(problem.model)
    variants = {PLAIN: _variant(plain, nn.CrossEntropyLoss(), x, y, nullcontext, [])}
    model, loss_fn = our.extend(copy.deepcopy(problem.model)), our.extend(nn.CrossEntropyLoss())
    bare = copy.deepcopy(problem.model)
    for row in rows:
        exts = row.ours(device)
        context = _context(our.backpack, exts) if row.context else nullcontext
        net = model if row.extended else bare
        variants["ours", row.name] = _variant(net, loss_fn, x, y, context, exts)
    return variants


def _steps(problem: Problem, rows: Sequence[Row], device: str) -> dict[tuple, Variant]:
    """Add BackPACK's and curvlinops' steps, on copies of their own."""
    x, y = problem.x, problem.y
    variants = _our_steps(problem, rows, device)
    done = [r for r in rows if r.theirs is not None and (problem.sequential or r.first_order)]
    if done:
        model = their.extend(copy.deepcopy(problem.model))
        loss_fn = their.extend(nn.CrossEntropyLoss())
        for row in done:
            exts = row.theirs()
            context = _context(their.backpack, exts) if row.context else nullcontext
            variants["backpack", row.name] = _variant(model, loss_fn, x, y, context, exts)
    if peers.installed():
        model = copy.deepcopy(problem.model)
        for row in rows:
            if row.curvlinops is not None:
                variants["curvlinops", row.name] = peers.kfac(model, x, y, *row.curvlinops)
    return variants


def _context(backpack: type, exts: list) -> Callable[[], AbstractContextManager]:
    return lambda: backpack(*exts)


def _variant(
    model: nn.Module,
    loss_fn: nn.Module,
    x: Tensor,
    y: Tensor,
    context: Callable[[], AbstractContextManager],
    exts: list,
) -> Variant:
    """Return a forward and backward inside a context; gradients and results are cleared before."""

    def step() -> None:
        with context():
            loss_fn(model(x), y).backward()

    def clear() -> None:
        for p in model.parameters():
            p.grad = None
            for ext in exts:
                if hasattr(p, ext.savefield):
                    delattr(p, ext.savefield)

    return Variant(step, clear)


def _sweep(problem: Problem) -> Variant:
    """Return autograd's own way of one vector per datum from the logits to the layers' outputs.

    What needs vectors of its own (samples of the Fisher) takes at least so long beyond a plain step,
    on top of torch's autograd: the counted floor has the products of it only.
    """
    model, outputs = copy.deepcopy(problem.model), []
    ready: list[tuple[Tensor, list[Tensor], Tensor]] = []
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.register_forward_hook(lambda m, args, z: outputs.append(z))

    def clear() -> None:
        if not ready:
            outputs.clear()
            z = model(problem.x)
            ready.append((z, [t for t in outputs if t.requires_grad], torch.ones_like(z)))

    def step() -> tuple:
        z, places, v = ready.pop()
        return torch.autograd.grad(z, places, v, allow_unused=True)

    return Variant(step, clear)


def _products(problem: Problem, rows: Sequence[Row]) -> dict[str, tuple]:
    """Return each row's floor as a tuple of products."""
    shapes = shapes_of(copy.deepcopy(problem.model), problem.x)
    return {row.name: tuple(row.products(shapes)) for row in rows}


def _floors(products: dict[str, tuple], device: str) -> dict[tuple, Variant]:
    """Return one variant per list of products; rows with the same list share it."""
    source = operands(device)
    floors = {}
    for floor in products.values():
        if floor and ("floor", floor) not in floors:
            floors["floor", floor] = Variant(_runner([p.prepare(source) for p in floor]))
    return floors


def _runner(calls: list[Callable[[], Tensor]]) -> Callable[[], list[Tensor]]:
    return lambda: [call() for call in calls]


def _peak(variant: Variant, settings: Settings) -> int:
    """Return the peak over two steps in a row: what the first fails to free is in it."""

    def steps() -> None:
        if variant.seconds < SLOW:
            variant.step()
            variant.clear()
        variant.step()

    variant.clear()
    peak = peak_memory(steps, settings.device)
    variant.clear()
    return peak


# --------------------------------------------------------------------------- numbers


def _digits(value: float) -> float:
    """Keep four significant digits: more would be noise that fills the stored file."""
    return float(f"{value:.4g}")


def _rounded(values: Sequence[float]) -> list[float]:
    return [_digits(value) for value in values]
