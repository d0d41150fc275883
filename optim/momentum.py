"""Weight decay, momentum and the step: what is done to a parameter once its direction is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvature import Axes
from optim.sharded import local
from optim.state import state_dtype


class Product:
    r"""A direction that is not formed yet, :math:`N = s\, b^T a`: it may be added where it is needed.

    Args:
        b: ``[g,r,o]``.
        a: ``[g,r,i]``.
        scale: The factor s.
        axes: How the parameter's axes form ``[g,o,i]``.
    """

    def __init__(self, b: Tensor, a: Tensor, scale: float, axes: Axes):
        self.b, self.a, self.scale, self.axes = b, a, scale, axes

    @property
    def dtype(self) -> torch.dtype:
        """Its data type."""
        return self.b.dtype

    def neg_(self) -> Product:
        """Change the sign, in place."""
        self.scale = -self.scale
        return self

    def tensor(self) -> Tensor:
        """Return N in new memory, shaped like the parameter."""
        b = self.b if self.scale == 1 else self.b * self.scale
        # for a single matrix a plain product is faster than a batched one
        N = (b[0].mT @ self.a[0]).unsqueeze(0) if len(b) == 1 else b.mT @ self.a
        return self.axes.to_parameter(N)

    def add_to_(self, V: Tensor, factor: float) -> bool:
        r"""Change V, shaped like the parameter, to :math:`\text{factor}\, V + N` in one pass.

        Returns:
            Whether its memory is laid out for that. If not, nothing has changed.
        """
        M = self.axes.to_matrix(V)
        if V.dtype != self.dtype or V.device != self.b.device or M.data_ptr() != V.data_ptr():
            return False
        for view, b, a in zip(M, self.b, self.a, strict=True):
            view.addmm_(b.mT, a, beta=factor, alpha=self.scale)
        return True


def momentum_step(
    p: Tensor,
    n: Tensor | Product,
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
        n: The direction N, shaped like it, which is overwritten; or a product that gives it.
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
    if isinstance(n, Product):
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
