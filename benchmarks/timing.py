"""Interleaved timing: every variant once per round, in shuffled order, in one process."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

# A plain step appears this often in a round; all ratios of the round refer to the median of them,
# so that one disturbed plain step does not shift them all.
PLAIN_PER_ROUND = 3
# Shorter steps are preceded by one that is not timed: after another variant's step the caches and the
# branch predictor are cold, and memory is laid out for that one, which is not what a training loop sees.
# For longer ones it would double the time of a run.
SHORT = 0.1


@dataclass
class Variant:
    """Something to time.

    Args:
        step: What is timed. What it returns is freed outside of the timed stretch.
        clear: Run before each step, untimed.
        seconds: Time of the last warm-up step.
    """

    step: Callable[[], Any]
    clear: Callable[[], None] = lambda: None
    seconds: float = 0.0

    def time(self, sync: Callable[[], None]) -> float:
        """Run one step; return its seconds. ``sync`` waits for the device."""
        self.clear()
        sync()
        start = perf_counter()
        kept = self.step()
        sync()
        seconds = perf_counter() - start
        del kept
        return seconds

    def warm_up(self, sync: Callable[[], None]) -> None:
        """Run a step, so that lazy initialisation is over; a second one where that is cheap."""
        self.seconds = self.time(sync)
        if self.seconds < 2 * SHORT:
            self.seconds = self.time(sync)
        self.clear()


def interleave(
    variants: dict[Hashable, Variant],
    plain: Hashable,
    sync: Callable[[], None],
    seconds: float,
    rounds: tuple[int, int],
    seed: int = 0,
    once: Collection[Hashable] = (),
) -> dict[Hashable, list[float]]:
    """Time all variants round by round.

    Args:
        variants: What to time; to be warmed up.
        plain: Key of the plain step.
        sync: Waits for the device.
        seconds: Begin no further round after this time.
        rounds: Smallest and largest number of rounds.
        seed: Of the order.
        once: What is timed in the first round only.

    Returns:
        For each variant its seconds in each round.
    """
    rng = random.Random(seed)
    times: dict[Hashable, list[float]] = {key: [] for key in variants}
    end = perf_counter() + seconds
    enabled = gc.isenabled()
    gc.disable()  # a collection belongs to no variant; each round begins with one
    try:
        while len(times[plain]) < rounds[0] or (perf_counter() < end and len(times[plain]) < rounds[1]):
            gc.collect()
            order = [key for key in variants if key not in once or not times[key]]
            order += [plain] * (PLAIN_PER_ROUND - 1)
            rng.shuffle(order)
            found: dict[Hashable, list[float]] = {}
            for key in order:
                found.setdefault(key, []).append(_visit(variants[key], sync))
            for key, values in found.items():
                times[key].append(median(values))
    finally:
        if enabled:
            gc.enable()
    return times


def _visit(variant: Variant, sync: Callable[[], None]) -> float:
    if variant.seconds < SHORT:
        variant.time(sync)
    seconds = variant.time(sync)
    variant.clear()
    return seconds


def summary(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high
