"""Sums of tensors over the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def all_reduce(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the sums of tensors over all processes of a group.

    One message per data type and device, however many tensors there are. float16 and bfloat16 are
    summed in float32.

    Args:
        tensors: Of the same shapes on each process.
        group: The process group; all processes by default.

    Returns:
        New tensors, of the given data types.

    Raises:
        RuntimeError: If torch.distributed was not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "all_reduce needs a process group; call torch.distributed.init_process_group first."
        )
    results: list[Tensor | None] = [None] * len(tensors)
    messages: dict[tuple, list[int]] = {}
    for k, t in enumerate(tensors):
        messages.setdefault((_wide(t.dtype), t.device), []).append(k)
    for (dtype, _), members in messages.items():
        message = torch.cat([tensors[k].detach().reshape(-1).to(dtype) for k in members])
        dist.all_reduce(message, group=group)
        parts = message.split([tensors[k].numel() for k in members])
        for k, part in zip(members, parts, strict=True):
            results[k] = part.view(tensors[k].shape).to(tensors[k].dtype)
    return results


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
