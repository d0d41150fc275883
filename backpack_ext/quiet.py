"""Computations that autograd does not record and autocast does not round."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor


class Quiet:
    """Makes contexts without gradients and without autocast, whatever the caller has switched on."""

    __slots__ = ("needed",)

    def __init__(self):
        self.needed = torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()

    def __call__(self, like: Tensor | None) -> AbstractContextManager:
        """Return a context for computations where a tensor is (on the CPU without one)."""
        if not self.needed:
            return _NOTHING
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        kind = "cpu" if like is None else like.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack


_NOTHING = nullcontext()
