"""Symmetric products of the normal form."""

import pytest
import torch

from backpack_ext.normal import gram


@pytest.mark.parametrize(("g", "r", "i"), [(1, 1025, 461), (1, 1024, 300), (1, 5, 3), (3, 4, 6)])
def test_gram(g, r, i):
    x = torch.randn(g, r, i, dtype=torch.float64)
    expected = 0.3 * torch.einsum("gri,grj->gij", x, x)
    torch.testing.assert_close(gram(x, 0.3), expected)
    torch.testing.assert_close(gram(x), gram(x).mT)
