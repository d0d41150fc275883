"""Whether the cores share a cache: no timing says so by itself, and virtual machines change it.

Where they do not, results that one core writes and another reads cross between caches. A host may move
virtual cores from one state to the other, for seconds or minutes: on the machine of the stored results
a line of cache took 55 or 350 nanoseconds from core to core, a plain step of the MLP 3.0 or 3.7 ms.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

ROUNDS = 21


def crossing(device: str) -> float | None:
    """Return the time of a product on torch's threads relative to one thread.

    The product ``[512, 16] x [16, 4608]`` writes much and computes little, and which core writes what
    differs from pass to pass. About 0.6 for two threads that share a cache, 1.6 for two that do not.

    Returns:
        The ratio; None on other devices than CPUs, and for a single thread.
    """
    threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or threads == 1:
        return None
    a, b, out = torch.randn(512, 16), torch.randn(4608, 16), torch.empty(512, 4608)
    several = _time(a, b, out)
    torch.set_num_threads(1)
    try:
        return round(several / _time(a, b, out), 2)
    finally:
        torch.set_num_threads(threads)


def _time(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    found = []
    for _ in range(ROUNDS):
        start = perf_counter()
        torch.mm(a, b.T, out=out)
        found.append(perf_counter() - start)
    return median(found)
