"""Timing of steps among which some take a thousand times as long as others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.memory import peak_memory
from benchmarks.timing import Variant, interleave, summary

# Who does it, and what: ("ours", "exact spectrum").
Key = tuple[str, ...]
PLAIN: Key = ("plain",)

# Peers' steps that take longer, in seconds, are in fewer rounds than the others; or in one only.
SLOW, ENDLESS = 0.3, 6.0


@dataclass(frozen=True)
class Length:
    """How long to measure.

    Args:
        seconds: Time for rounds of the short steps.
        rounds: Smallest and largest number of these.
        slow_seconds: Time for rounds with slow steps too (endless ones are in one further round).
        slow_rounds: Smallest and largest number of these.
    """

    seconds: float
    rounds: tuple[int, int]
    slow_seconds: float = 0.0
    slow_rounds: tuple[int, int] = (1, 1)


@dataclass
class Measured:
    """Times by round, peaks by step.

    Args:
        rounds: Seconds of each step, by round; slow steps are missing from some.
        peaks: Bytes.
    """

    rounds: list[dict[Key, float]] = field(default_factory=list)
    peaks: dict[Key, int] = field(default_factory=dict)

    def ratio(self, key: Key, base: Key = PLAIN, offset: float = 0.0, count: int = 1) -> list[float]:
        """Return quartiles of ``offset + count * time / time of base``, each of the same round."""
        rounds = [times for times in self.rounds if key in times and base in times]
        return digits(summary([offset + count * times[key] / times[base] for times in rounds]))

    def ms(self, key: Key) -> list[float]:
        """Return quartiles of the time in milliseconds."""
        return digits(summary([1e3 * times[key] for times in self.rounds if key in times]))

    def cell(self, key: Key, count: int = 1) -> dict:
        """Return the times of ``count`` steps and the memory of one, for JSON."""
        peak, plain = self.peaks[key], max(1, self.peaks[PLAIN])
        memory = {"memory": digits([peak / plain])[0], "mib": digits([peak / 2**20])[0]}
        ms = digits([count * self.ms(key)[1]])[0]
        return {"time": self.ratio(key, count=count), "ms": ms, **memory}

    def head(self) -> dict:
        """Return what is known of the plain step, for JSON."""
        mib = digits([self.peaks[PLAIN] / 2**20])[0]
        return {"rounds": len(self.rounds), "plain_ms": self.ms(PLAIN), "plain_mib": mib}


def measure(steps: dict[Key, Variant], length: Length, device: str, memory: bool = True) -> Measured:
    """Time all steps round by round, and measure their peaks.

    Args:
        steps: What to measure; the plain step among it.
        length: How long.
        device: Where it runs.
        memory: Whether to measure peaks.
    """
    sync = sync_of(device)
    for variant in steps.values():
        variant.warm_up(sync)
    tiers = {key: _tier(key, variant) for key, variant in steps.items()}
    found = Measured()
    if memory:
        peaked = {key: variant for key, variant in steps.items() if key[0] != "floor"}
        found.peaks = {key: _peak(v, tiers[key] > 0, device) for key, v in peaked.items()}
    # the short steps are in all rounds, so that there are ratios to each step
    plans = {0: (length.seconds, length.rounds), 1: (length.slow_seconds, length.slow_rounds)}
    for tier in sorted(set(tiers.values()), reverse=True):
        these = {key: variant for key, variant in steps.items() if tiers[key] <= tier}
        seconds, rounds = plans.get(tier, (0.0, (1, 1)))
        times = interleave(these, PLAIN, sync, seconds, rounds)
        for k in range(len(times[PLAIN])):
            found.rounds.append({key: values[k] for key, values in times.items()})
    return found


def sync_of(device: str) -> Callable[[], None]:
    """Return what waits for a device."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _tier(key: Key, variant: Variant) -> int:
    """Return 0 for short steps and our own, 1 for slow ones, 2 for endless ones."""
    if key[0] in ("plain", "ours", "floor"):
        return 0
    return (variant.seconds > SLOW) + (variant.seconds > ENDLESS)


def _peak(variant: Variant, slow: bool, device: str) -> int:
    """Return the peak over two steps in a row (one, if it is slow): what is not freed is in it."""

    def steps() -> None:
        if not slow:
            variant.step()
            variant.clear()
        variant.step()

    variant.clear()
    peak = peak_memory(steps, device)
    variant.clear()
    return peak


def digits(values: Sequence[float]) -> list[float]:
    """Keep four significant digits: more would be noise that fills the stored file."""
    return [float(f"{value:.4g}") for value in values]


def backward_step(
    model: torch.nn.Module, loss_fn: torch.nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Variant:
    """Return a plain forward and backward."""
    return Variant(lambda: loss_fn(model(x), y).backward(), clear_of(model))


def clear_of(model: torch.nn.Module, *fields: str) -> Callable[[], None]:
    """Return a function that removes gradients and fields from a model's parameters."""

    def clear() -> None:
        for p in model.parameters():
            p.grad = None
            for name in fields:
                p.__dict__.pop(name, None)

    return clear


def runner(calls: Sequence[Callable[[], Any]]) -> Callable[[], list]:
    """Return a function that makes all calls."""
    return lambda: [call() for call in calls]
