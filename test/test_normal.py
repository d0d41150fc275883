"""Symmetric products of the normal form."""

import pytest
import torch

from backpack_ext import normal
from backpack_ext.normal import gram


@pytest.mark.parametrize(("g", "r", "i"), [(1, 1025, 461), (1, 1024, 300), (1, 5, 3), (3, 4, 6)])
def test_gram(g, r, i):
    x = torch.randn(g, r, i, dtype=torch.float64)
    expected = 0.3 * torch.einsum("gri,grj->gij", x, x)
    torch.testing.assert_close(gram(x, 0.3), expected)
    torch.testing.assert_close(gram(x), gram(x).mT)


@pytest.mark.parametrize("single", [1, 2**60], ids=["datum by datum", "in pieces"])
def test_sums_of_squares_in_half_precision(monkeypatch, single):
    """The sum over data is not what is rounded: 600 equal terms of which each is below its rounding."""
    monkeypatch.setattr(normal, "SINGLE", single)
    monkeypatch.setattr(normal, "PIECE", 12)
    a, b = (
        torch.ones(1, 600, 2, 3, dtype=torch.bfloat16),
        torch.ones(1, 1, 600, 2, 4, dtype=torch.bfloat16),
    )
    found = normal.square_sum(a, b)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), torch.full((1, 4, 3), 2400.0), rtol=1e-2, atol=0)
