"""Fixtures that several test files use."""

import pytest
import torch

from backpack_ext import check


@pytest.fixture
def double():
    """Seed, and compute in float64 by default."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def check_passes(monkeypatch):
    """A list that grows by one with each pass that the checks of layers run."""
    passes = []
    stream = check.stream

    def counted(*args, **options):
        passes.append(1)
        return stream(*args, **options)

    monkeypatch.setattr(check, "stream", counted)
    return passes
