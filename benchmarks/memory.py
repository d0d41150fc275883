"""Memory of one step, beyond what is alive before it: its peak, and what it leaves behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

# The profiler announces each of its starts and stops on stderr unless told otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_memory(step: Callable[[], Any], device: str) -> int:
    """Return the largest number of bytes that a step holds at once.

    Only torch's allocator is seen, not the scratch space of BLAS or oneDNN. On the CPU, memory that
    was allocated before the step and is freed in it does not count; on CUDA it counts as negative.

    Args:
        step: The step.
        device: ``"cpu"`` or a CUDA device.

    Returns:
        Bytes beyond those that were allocated when the step began.
    """
    return _measured(step, device)[0]


def kept_memory(step: Callable[[], Any], device: str) -> int:
    """Return the number of bytes that a step has allocated and that are alive when it ends.

    What it returns is alive then; see `peak_memory` for what is seen.

    Args:
        step: The step.
        device: ``"cpu"`` or a CUDA device.
    """
    return _measured(step, device)[1]


def _measured(step: Callable[[], Any], device: str) -> tuple[int, int]:
    """Return a step's peak memory, and what it leaves behind, in bytes."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # or a collection may hide what reference cycles keep alive
    try:
        return _on_cuda(step, device) if torch.device(device).type == "cuda" else _on_cpu(step)
    finally:
        if enabled:
            gc.enable()


def _on_cuda(step: Callable[[], Any], device: str) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    returned = step()
    torch.cuda.synchronize(device)
    kept = torch.cuda.memory_allocated(device) - before
    del returned
    return torch.cuda.max_memory_allocated(device) - before, kept


def _on_cpu(step: Callable[[], Any]) -> tuple[int, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        returned = step()
    events = [
        (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in _events(recorded.profiler.kineto_results.experimental_event_tree())
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu"
    ]
    alive: dict[int, int] = {}
    now = peak = 0
    for _, address, size in sorted(events):
        if size > 0:
            alive[address] = size
            now += size
        else:
            now -= alive.pop(address, 0)
        peak = max(peak, now)
    del returned  # alive while events were recorded
    return peak, now


def _events(tree: list) -> Iterator:
    """Go through the profiler's tree; its depth is unbounded, so no recursion."""
    stack = list(tree)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)
