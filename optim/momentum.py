"""Weight decay, momentum and the step: what is done to a parameter once its direction is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optim.directions import Direction
from optim.sharded import local
from optim.state import state_dtype


def momentum_step(
    p: Tensor,
    n: Tensor | Direction,
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
        n: The direction N, shaped like it, which is overwritten; or one that is not formed yet.
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
    if isinstance(n, Direction):
        V = state.get("momentum_buffer")
        if momentum and not new and V.dtype == dtype and n.add_to_(V, momentum):
            if weight_decay:
                V.add_(p, alpha=weight_decay)
            _move(p, V, lr, write)
            return
        n = n.tensor()
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
    _move(p, n, lr, write)


def _move(p: Tensor, n: Tensor, lr: float, write: Callable[[Tensor, Tensor], None]) -> None:
    """Subtract ``lr n`` from a parameter, computed in the data type of n."""
    if p.dtype == n.dtype:
        p.add_(n, alpha=-lr)
    else:
        write(p, p.to(n.dtype).add_(n, alpha=-lr))
