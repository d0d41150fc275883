"""Second moments of patches, what KFAC-expand needs of a convolution's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backpack_ext.conv_factors.choice import best_level, seconds
from backpack_ext.conv_factors.geometry import Geometry
from backpack_ext.conv_factors.moments import moment
from backpack_ext.normal import gram
from backpack_ext.rules.patches import patches, transposed_patches
from benchmarks.conv_factors.cases import Case, conv, transposed
from benchmarks.timing import Variant, interleave, summary

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


def unfolded(x: Tensor, module: nn.Module) -> Tensor:
    """Return the moment ``[g, (c k), (c k)]`` by forming all patches."""
    m = module
    if m.transposed:
        pixels = m(x[:1]).shape[2:]
        u = transposed_patches(x, m.kernel_size, m.stride, m.padding, m.dilation, pixels)
    else:
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        x = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
        u = patches(x, m.kernel_size, m.stride, m.dilation)
    parts = [part.flatten(2).flatten(0, 1) for part in u.chunk(m.groups, dim=2)]
    return gram(torch.stack(parts) if m.groups > 1 else parts[0].unsqueeze(0))


METHODS = {"unfold": unfolded}


def methods_of(case: Case, geometry: Geometry) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways by name: `METHODS`, and each level that is thought of."""
    found = {name: lambda x, method=method: method(x, case.module) for name, method in METHODS.items()}
    for level in range(len(geometry.dimensions) + 1):
        if seconds(1, case.channels, geometry, level) == float("inf"):
            continue
        found[f"level {level}"] = lambda x, level=level: moment(x, geometry, level)
    return found


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
    chosen = f"level {best_level(batch, case.channels, geometry, x.device.type)}"
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
