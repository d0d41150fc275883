"""Computations that autograd does not record and autocast does not round."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor


class Quiet:
    """Makes contexts without gradients and without autocast, whatever the caller has switched on."""

    def __init__(self):
        autocast = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        self.autocast, self.needed = autocast, torch.is_grad_enabled() or bool(autocast)

    def __call__(self, like: Tensor | None) -> AbstractContextManager:
        """Return a context for computations where a tensor is (on the CPU without one)."""
        if not self.needed:
            return _NOTHING
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        kind = "cpu" if like is None else like.device.type
        if kind in self.autocast:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack


_NOTHING = nullcontext()
