"""Directions that are added to momenta before they are formed, against dense float64 matrices."""

import pytest
import torch
from natural_cases import Case, compare
from torch import nn

from curvature import Axes
from curvature.outer import DiagonalPlus, outer
from curvature.structures import STRUCTURES
from optim import SINGD
from optim.directions import Part, Product, Sides, TwoSided

pytestmark = pytest.mark.usefixtures("double")

# Structures of a side: all entries that can be at the ends, none, and the last one (the bias's) or not.
SIDES = [
    ("hierarchical", {"k1": 1, "k2": 2}),
    ("hierarchical", {"k1": 2, "k2": 0}),
    ("hierarchical", {"k1": 0, "k2": 1}),
    ("hierarchical", {"k1": 0, "k2": 0}),
    ("hierarchical", {"k1": 9, "k2": 9}),
    ("hierarchical", {"k1": 3, "k2": 9}),
    ("rank-k-upper", {"k": 2}),
    ("rank-k-lower", {"k": 2}),
    ("rank-k-lower", {"k": 0}),
]
GROUPED = Axes("(g o) i -> g o i", (("g", 2),))


def side(structure, count, d):
    """Return S and its dense matrices, of random structured ones."""
    name, options = structure
    M = STRUCTURES[name].from_dense(torch.randn(count, d, d), **options)
    S, D = outer(M), M.to_dense()
    assert isinstance(S, DiagonalPlus)
    return S, D @ D.mT


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("C", SIDES, ids=str)
@pytest.mark.parametrize("K", SIDES, ids=str)
def test_two_sided(C, K, joint):
    """Weight and bias, added to a momentum and formed, with both signs."""
    torch.manual_seed(0)
    (S_C, D_C), (S_K, D_K) = side(C, 2, 5), side(K, 2, 7)
    G = torch.randn(2, 5, 7)
    n = 6 if joint else 7
    expected = D_C @ G @ D_K
    sides = [Sides(S_C.at(k), S_K.at(k), n) for k in (0, 1)]
    parts = [Part(sides[k], G[k, :, :n], G[k, :, n:] if joint else None) for k in (0, 1)]
    if joint:
        torch.testing.assert_close(torch.stack([part.bias for part in parts]), expected[..., n:])
    found = TwoSided(parts, GROUPED)
    V = torch.randn(10, n)
    for sign in (1, -1):
        formed = sign * expected[..., :n].flatten(0, 1)
        torch.testing.assert_close(found.tensor(), formed)
        moved = V.clone()
        assert found.add_to_(moved, 0.3)
        torch.testing.assert_close(moved, 0.3 * V + formed)
        found.neg_()


def test_memory_that_is_laid_out_otherwise():
    """It is left alone: convolutions in channels-last, other data types."""
    torch.manual_seed(0)
    axes, b, a = Axes("o i k -> 1 o (i k)", (("k", 2),)), torch.randn(1, 3, 4), torch.randn(1, 3, 10)
    S, T = outer(STRUCTURES["rank-k-lower"].eye(4, k=1)), outer(STRUCTURES["rank-k-lower"].eye(10, k=1))
    part = Part(Sides(S, T, 10), torch.randn(4, 10), None)
    for found in (Product(b, a, 1.0, axes), TwoSided([part], axes)):
        V = torch.randn(4, 5, 2)
        last = V.mT.contiguous().mT
        for W in (last, V.float()):
            before = W.clone()
            assert not found.add_to_(W, 0.5) and torch.equal(W, before)
        assert found.add_to_(last.contiguous(), 0.5)
        assert found.tensor().shape == (4, 5, 2)


@pytest.mark.filterwarnings("ignore:.*extend")
@pytest.mark.parametrize("structure", ["lower", "upper", "both", "mixed"])
@pytest.mark.parametrize("case", ["mlp", "conv", "same"])
def test_steps(case, structure, monkeypatch):
    """Of layers that count as large, against the dense oracle; layers of one shape share factors."""
    monkeypatch.setattr("optim.singd.SMALL", 0)
    monkeypatch.setattr("optim.bucket.SMALL", 0)
    formed = []
    monkeypatch.setattr("optim.singd.TwoSided", lambda *args: formed.append(1) or TwoSided(*args))
    if case == "same":
        case = Case(
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4)),
            lambda n: (torch.randn(n, 4), torch.randint(4, (n,))),
        )
    both, lower = ("hierarchical", {"k1": 1, "k2": 1}), ("rank-k-lower", {"k": 2})
    upper = ("rank-k-upper", {"k": 2})
    structure = {"both": both, "lower": lower, "upper": upper, "mixed": (both, lower)}[structure]
    options = {"lr": 0.02, "lr_cov": 0.1, "interval": 2, "maximize": True, "weight_decay": 0.1}
    compare(SINGD, case, 3, sizes=[5], start=True, structure=structure, **options)
    assert formed
