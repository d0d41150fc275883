"""Second moments of patches, what KFAC-expand needs of a convolution's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backpack_ext.conv_factors import Geometry
from backpack_ext.conv_factors.choice import best_level, seconds
from backpack_ext.conv_factors.moments import moment
from backpack_ext.conv_factors.unfold import patches
from backpack_ext.normal import gram
from benchmarks.conv_factors.cases import Case, conv, transposed
from benchmarks.conv_factors.measuring import BASELINE, drawn, timed

# The first three are those of the literature; then a small CNN and a ResNet-18 on 32 x 32 pixels.
CASES = (
    conv(64, 56, 3, padding=1),
    conv(256, 14, 3, padding=1),
    conv(3, 224, 7, padding=3, stride=2),
    conv(3, 32, 3, padding=1),
    conv(32, 16, 3, padding=1),
    conv(64, 8, 3, padding=1),
    conv(64, 32, 3, padding=1),
    conv(128, 16, 3, padding=1),
    conv(256, 8, 3, padding=1),
    conv(512, 4, 3, padding=1),
    conv(64, 32, 3, padding=1, stride=2),
    conv(128, 16, 3, padding=1, stride=2),
    conv(256, 8, 3, padding=1, stride=2),
    conv(64, 32, 1, stride=2),
    conv(64, 32, 1),
    conv(3, 32, 4, stride=4),
    conv(64, 28, 3, padding=1, groups=4),
    conv(64, 28, 3, padding=1, groups=64),
    conv(32, 28, 5, padding=2, dilation=2),
    conv(32, 28, 3, padding=1, padding_mode="circular"),
    conv(64, (1024,), 3, padding=1),
    conv(1, (4000,), 80, stride=4),
    conv(16, (8, 16, 16), 3, padding=1),
    transposed(64, 14, 4, stride=2, padding=1),
)


def unfolded(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the moment ``[g, (c k), (c k)]`` by forming all patches."""
    parts = patches(x, geometry).chunk(geometry.groups, dim=2)
    return gram(torch.stack([part.flatten(2).flatten(0, 1) for part in parts]))


def methods_of(case: Case, geometry: Geometry) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways by name: unfolding, and each level that is thought of."""
    found = {BASELINE: lambda x: unfolded(x, geometry)}
    for level in range(len(geometry.dimensions) + 2):
        if seconds(1, case.channels, geometry, level) < float("inf"):
            found[f"level {level}"] = lambda x, level=level: moment(x, geometry, level)
    return found


def run(case: Case, batch: int, *limits, device: str = "cpu", channels_last: bool = False) -> dict:
    """Time all methods on a case; see `measuring.drawn` and `measuring.timed`."""
    x, geometry = drawn(case, batch, device, channels_last)
    chosen = f"level {best_level(batch, case.channels, geometry, x.device.type)}"
    return timed(case, x, methods_of(case, geometry), chosen, *limits)
