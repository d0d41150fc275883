"""Products M M^T that are held to be applied many times, against dense float64 matrices."""

import warnings

import pytest
import torch
from test_structured import PackedLower, TransposedHierarchical

from curvature import outer as module
from curvature.outer import outer
from curvature.structured import NaiveWarning
from curvature.structures import STRUCTURES

CASES = [(cls, {}) for cls in STRUCTURES.values()] + [
    (STRUCTURES["block-diagonal"], {"block": 1}),
    (STRUCTURES["block-diagonal"], {"block": 3}),
    (STRUCTURES["hierarchical"], {"k1": 2, "k2": 3}),
    (STRUCTURES["hierarchical"], {"k1": 0, "k2": 3}),
    (STRUCTURES["hierarchical"], {"k1": 3, "k2": 0}),
    (STRUCTURES["hierarchical"], {"k1": 4, "k2": 4}),
    (TransposedHierarchical, {"k1": 2, "k2": 3}),
    (STRUCTURES["rank-k-lower"], {"k": 0}),
    (STRUCTURES["rank-k-lower"], {"k": 2}),
    (STRUCTURES["rank-k-upper"], {"k": 2}),
    (PackedLower, {}),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__} {case[1]}")
def case(request):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if request.param[0] is PackedLower else "error", NaiveWarning)
        yield request.param


@pytest.mark.parametrize("fourier", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("d", [1, 5, 300, 401])
def test_equals_dense(case, d, batch, fourier, monkeypatch):
    cls, options = case
    if fourier:
        if "Toeplitz" not in cls.__name__:
            pytest.skip("one form")
        monkeypatch.setattr(module, "TOEPLITZ_DENSE", 0)
    M = cls.from_dense(torch.randn(*batch, d, d).double(), **options)
    D = M.to_dense()
    N = outer(M)
    expected = D @ D.mT
    X, Y = torch.randn(*batch, d, 7).double(), torch.randn(*batch, 7, d).double()
    close(N.to_dense(), expected)
    for left, right in ((X, Y), (Y.mT, X.mT), (X[..., :1], Y[..., :1, :])):
        before = left.clone(), right.clone()
        close(N.matmul(left), expected @ left)
        close(N.rmatmul(right), right @ expected)
        assert torch.equal(left, before[0]) and torch.equal(right, before[1])
    assert all(t.shape[: len(batch)] == batch for t in N.tensors)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
