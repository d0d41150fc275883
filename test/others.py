"""Importing other people's models."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Have torchvision look as if it were not installed.

    It comes along with BackPACK, but its CUDA build cannot be imported beside a CPU build of torch.
    transformers, which torch_geometric imports where it can, looks for it when it is imported itself,
    remembers that, and imports it with its models. None among the loaded modules makes
    `importlib.util.find_spec` find nothing.
    """
    name, missing = "torchvision", object()
    before = sys.modules.get(name, missing)
    sys.modules[name] = None
    try:
        yield
    finally:
        if before is missing:
            del sys.modules[name]
        else:
            sys.modules[name] = before
