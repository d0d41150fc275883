"""Computations that autograd does not record and autocast does not round."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor


class Quiet:
    """Makes contexts without gradients and without autocast, whatever the caller has switched on."""

    __slots__ = ("autocast", "needed")

    def __init__(self):
        on = torch.is_autocast_enabled
        self.autocast = {"cpu": on("cpu"), "cuda": on("cuda")}
        self.needed = torch.is_grad_enabled() or any(self.autocast.values())

    def __call__(self, like: Tensor | None) -> AbstractContextManager:
        """Return a context for computations where a tensor is (on the CPU without one)."""
        if not self.needed:
            return _NOTHING
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        kind = "cpu" if like is None else like.device.type
        if self.autocast.get(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack


_NOTHING = nullcontext()
