"""Patch means, what KFAC-reduce needs of a convolution's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backpack_ext.conv_factors import Geometry, patch_means
from backpack_ext.conv_factors.cost import WIDE_CHANNELS, cheapest, costs_of, plans_of
from backpack_ext.conv_factors.unfold import patches
from benchmarks.conv_factors.cases import Case, conv, transposed
from benchmarks.conv_factors.measuring import BASELINE, drawn, timed

# The first five are those of the literature.
CASES = (
    conv(64, 56, 3, padding=1),
    conv(64, 56, 3, padding=1, stride=2),
    conv(256, 14, 3, padding=1),
    conv(512, 7, 3, padding=1),
    conv(3, 224, 7, padding=3, stride=2),
    conv(3, 32, 3, padding=1),
    conv(64, 32, 3, padding=1),
    conv(128, 28, 3, padding=1),
    conv(32, 16, 3, padding=1),
    conv(256, 14, 3, padding=1, groups=256),
    conv(96, 28, 5, padding=2, dilation=2),
    conv(64, 56, 1),
    conv(256, 28, 1, stride=2),
    conv(3, 224, 16, stride=16),
    conv(96, 28, 2, stride=2),
    conv(64, 28, 7, padding=3, groups=64),
    conv(32, 40, 3, padding=1, padding_mode="circular"),
    conv(32, 40, 5, padding=2, padding_mode="reflect"),
    conv(32, 30, 29, padding=14),
    conv(64, (1024,), 3, padding=1),
    conv(1, (16000,), 80, stride=4),
    conv(16, (16, 32, 32), 3, padding=1),
    transposed(64, 28, 4, stride=2, padding=1),
)


def methods_of(geometry: Geometry) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways by name: unfolding, and each plan."""
    found = {BASELINE: lambda x: patches(x, geometry).mean(1)}
    for plan in plans_of(geometry):
        found[str(plan)] = lambda x, plan=plan: patch_means(x, geometry, plan)
    return found


def run(case: Case, batch: int, *limits, device: str = "cpu", channels_last: bool = False) -> dict:
    """Time all methods on a case; see `measuring.drawn` and `measuring.timed`."""
    x, geometry = drawn(case, batch, device, channels_last)
    last = channels_last and case.channels >= WIDE_CHANNELS
    costs = costs_of(torch.device(device).type)
    chosen = str(cheapest(geometry, batch * case.channels, costs, last))
    return timed(case, x, methods_of(geometry), chosen, *limits)
