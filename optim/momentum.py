"""Weight decay, momentum and the step: what is done to a parameter once its direction is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optim.sharded import local
from optim.state import state_dtype


def momentum_step(
    p: Tensor,
    n: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    write: Callable[[Tensor, Tensor], None],
) -> None:
    r"""Change a parameter in place by a direction N.

    .. math::  V \leftarrow \mu V + N + w W, \qquad W \leftarrow W - \eta V

    Args:
        p: The parameter W.
        n: The direction N, shaped like it; it is overwritten.
        state: The parameter's state; V is its ``"momentum_buffer"``, in the parameter's data type but
            at least float32, and absent without momentum.
        lr: Step size eta.
        momentum: Decay mu of V.
        weight_decay: Coefficient w.
        write: ``write(target, source)`` overwrites a tensor, rounding to its data type.
    """
    dtype, new = state_dtype(p), momentum and "momentum_buffer" not in state
    if new:
        V = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
        state["momentum_buffer"] = V
    p, n = local(p), local(n).to(dtype)
    if weight_decay:
        n.add_(p, alpha=weight_decay)
    if momentum:
        V = state["momentum_buffer"]
        if V.dtype != dtype or V.device != p.device:  # the model has been moved
            V = state["momentum_buffer"] = V.to(p.device, dtype)
        V = local(V)
        if new:
            V.copy_(n)
        elif V.is_contiguous() and V.dtype == n.dtype:
            torch.add(n, V, alpha=momentum, out=V)  # one pass over V instead of two
        else:
            V.mul_(momentum).add_(n)
        n = V
    if p.dtype == dtype:
        p.add_(n, alpha=-lr)
    else:
        write(p, p.to(dtype).add_(n, alpha=-lr))
