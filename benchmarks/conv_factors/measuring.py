"""The methods of a case, timed in turns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backpack_ext.conv_factors import Geometry
from benchmarks.conv_factors.cases import Case
from benchmarks.timing import Variant, interleave, summary

BASELINE = "unfold"


def drawn(case: Case, batch: int, device: str, channels_last: bool) -> tuple[Tensor, Geometry]:
    """Return a random input of a case, and its geometry.

    Args:
        case: The convolution, which is moved to the device.
        batch: Number of images N.
        device: Where.
        channels_last: Whether the channels are the input's last axis in memory.
    """
    case.module.to(device)
    x = torch.randn(batch, case.channels, *case.sizes, device=device)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with torch.no_grad():
        return x, Geometry.of(case.module, x.shape, case.module(x[:1]).shape)


@torch.no_grad()
def timed(
    case: Case,
    x: Tensor,
    methods: dict[str, Callable[[Tensor], Tensor]],
    chosen: str,
    seconds: float,
    rounds: tuple[int, int],
    sync: Callable[[], None],
) -> dict:
    """Time all methods on a case, interleaved.

    Args:
        case: The convolution.
        x: Its input.
        methods: The ways by name, `BASELINE` among them.
        chosen: The one that is taken by itself.
        seconds: Begin no further round after this time.
        rounds: Smallest and largest number of rounds.
        sync: Waits for the device.

    Returns:
        Name of the case, of the method that was chosen, and the seconds of each (median).
    """
    variants = {name: Variant(lambda method=method: method(x)) for name, method in methods.items()}
    for variant in variants.values():
        variant.warm_up(sync)
    times = interleave(variants, chosen, sync, seconds, rounds)
    return {
        "case": case.name,
        "chosen": chosen,
        "baseline": BASELINE,
        "seconds": {name: summary(values)[1] for name, values in times.items()},
    }
