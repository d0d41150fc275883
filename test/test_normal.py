"""Symmetric products of the normal form."""

import pytest
import torch
from torch import nn

from backpack_ext import KFAC, backpack, extend, normal
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


def test_products_of_each_datum():
    """Of convolutions whose pixels are many against channels; the same as one product of rows."""
    torch.manual_seed(0)
    b = torch.randn(2, 3, 4, 5, 70, dtype=torch.float64).mT
    assert normal.by_datum_pays(b)
    assert not normal.by_datum_pays(b.contiguous()) and not normal.by_datum_pays(b[:, :, :, :9])
    expected = 0.3 * torch.einsum("gvnso,gvnsp->gop", b, b)
    torch.testing.assert_close(normal.gram_by_datum(b, 0.3), expected)


def test_kfac_takes_them(monkeypatch):
    asked = []
    pays = normal.by_datum_pays
    monkeypatch.setattr("backpack_ext.kfac.by_datum_pays", lambda b: asked.append(pays(b)) or asked[-1])
    torch.manual_seed(0)
    conv, loss_fn = nn.Conv2d(2, 4, 3, padding=1).double(), nn.MSELoss(reduction="sum")
    x, y = torch.randn(3, 2, 8, 9).double(), torch.randn(3, 4, 8, 9).double()
    vectors = 2 * (conv(x) - y).detach().flatten(2)
    expected = torch.einsum("nos,nps->op", vectors, vectors)
    extend(conv), extend(loss_fn)
    with backpack(KFAC(fisher="empirical")):
        loss_fn(conv(x), y).backward()
    assert asked == [True]
    torch.testing.assert_close(conv.weight.kfac.B, expected)
