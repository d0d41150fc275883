"""Products in the data type of their factors, also where the caller has autocast switched on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps

import torch


def without_autocast(method: Callable) -> Callable:
    """Decorate a method that computes products: autocast would round them to half precision."""

    @wraps(method)
    def wrapped(*args, **kwargs):
        enabled = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not enabled:
            return method(*args, **kwargs)
        with ExitStack() as stack:
            for kind in enabled:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return method(*args, **kwargs)

    return wrapped
