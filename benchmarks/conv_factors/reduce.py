"""Patch means, what KFAC-reduce needs of a convolution's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backpack_ext.conv_factors import Geometry, patch_means
from backpack_ext.conv_factors.cost import ACCELERATOR, CPU, WIDE_CHANNELS, Plan, cheapest, plans_of
from backpack_ext.rules.patches import patches, transposed_patches
from benchmarks.conv_factors.cases import Case, conv, transposed
from benchmarks.timing import Variant, interleave, summary

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


def unfolded(x: Tensor, module: nn.Module) -> Tensor:
    """Return patch means ``[R, C, K]`` by forming the patches."""
    m = module
    if m.transposed:
        pixels = m(x[:1]).shape[2:]
        return transposed_patches(x, m.kernel_size, m.stride, m.padding, m.dilation, pixels).mean(1)
    mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
    x = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
    return patches(x, m.kernel_size, m.stride, m.dilation).mean(1)


METHODS = {"unfold": unfolded}


def methods_of(case: Case, geometry: Geometry) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways by name: `METHODS`, and each plan."""

    def by(plan: Plan) -> Callable[[Tensor], Tensor]:
        return lambda x: patch_means(x, geometry, plan)

    found = {name: lambda x, method=method: method(x, case.module) for name, method in METHODS.items()}
    return found | {str(plan): by(plan) for plan in plans_of(geometry)}


@torch.no_grad()
def run(
    case: Case,
    batch: int,
    seconds: float,
    rounds: tuple[int, int],
    sync: Callable[[], None],
    device: str = "cpu",
    channels_last: bool = False,
) -> dict:
    """Time all methods on a case, interleaved.

    Args:
        case: The convolution.
        batch: Number of images N.
        seconds: Begin no further round after this time.
        rounds: Smallest and largest number of rounds.
        sync: Waits for the device.
        device: Where.
        channels_last: Whether the channels are the input's last axis in memory.

    Returns:
        Name of the case, of the method that was chosen, and the seconds of each (median).
    """
    case.module.to(device)
    x = torch.randn(batch, case.channels, *case.sizes, device=device)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    geometry = Geometry.of(case.module, x.shape, case.module(x[:1]).shape)
    last = channels_last and case.channels >= WIDE_CHANNELS
    costs = CPU if device == "cpu" else ACCELERATOR
    chosen = str(cheapest(geometry, batch * case.channels, costs, last))
    methods = methods_of(case, geometry)
    variants = {name: Variant(lambda method=method: method(x)) for name, method in methods.items()}
    for variant in variants.values():
        variant.warm_up(sync)
    times = interleave(variants, chosen, sync, seconds, rounds)
    return {
        "case": case.name,
        "chosen": chosen,
        "baseline": "unfold",
        "seconds": {name: summary(values)[1] for name, values in times.items()},
    }
