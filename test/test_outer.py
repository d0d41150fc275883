"""Products M M^T that are held to be applied many times, against dense float64 matrices."""

import warnings

import pytest
import torch
from test_structured import PackedLower, Scalar, TransposedHierarchical

from curvature import outer as module
from curvature.outer import Dense, Fourier, Outer, TwoProducts, outer
from curvature.panels import symmetric_product
from curvature.structured import NaiveWarning
from curvature.structures import STRUCTURES
from curvature.toeplitz import Convolution, transform_length

S = STRUCTURES
SMALL = {"TOEPLITZ_DENSE": 0, "CHUNK": 1}  # small matrices take the route of large ones, row by row
CASES = [(cls, {}, {}) for cls in STRUCTURES.values()] + [
    (S["lower-toeplitz"], {}, SMALL),
    (S["upper-toeplitz"], {}, SMALL),
    (S["lower-toeplitz"], {}, {"TOEPLITZ_DENSE": 0}),
    (S["block-diagonal"], {"block": 1}, {}),
    (S["block-diagonal"], {"block": 3}, {}),
    (S["hierarchical"], {"k1": 2, "k2": 3}, {}),
    (S["hierarchical"], {"k1": 0, "k2": 3}, {}),
    (S["hierarchical"], {"k1": 3, "k2": 0}, {}),
    (S["hierarchical"], {"k1": 4, "k2": 4}, {}),  # k1 + k2 > 5
    (S["hierarchical"], {"k1": 0, "k2": 0}, {}),
    (TransposedHierarchical, {"k1": 2, "k2": 3}, {}),
    (S["rank-k-lower"], {"k": 0}, {}),
    (S["rank-k-lower"], {"k": 2}, {}),
    (S["rank-k-upper"], {"k": 2}, {}),
    (PackedLower, {}, {}),
    (Scalar, {}, {}),
]


@pytest.fixture(
    params=CASES, ids=lambda case: " ".join([case[0].__name__, *map(str, (case[1] | case[2]).values())])
)
def case(request, monkeypatch):
    """A structure and its options; those of the package may not warn that they are naive."""
    cls, options, constants = request.param
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if cls.name else "ignore", NaiveWarning)
        yield cls, options


def make(case, d, batch, dtype=torch.float64) -> tuple[Outer, torch.Tensor]:
    cls, options = case
    M = cls.from_dense(torch.randn(*batch, d, d).to(dtype), **options)
    D = M.to_dense().double()
    return outer(M), D @ D.mT


def close(actual, expected, tolerance=1e-12):
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("d", [1, 5, 300])
def test_equals_dense(case, d, batch):
    if d == 300 and module.CHUNK == 1:
        pytest.skip("row by row takes long")
    N, expected = make(case, d, batch)
    close(N.to_dense(), expected)
    X, Y = torch.randn(*batch, d, 7).double(), torch.randn(*batch, 7, d).double()
    for left, right in ((X, Y), (Y.mT, X.mT), (X[..., :1], Y[..., :1, :]), (X[..., :0], Y[..., :0, :])):
        before = left.clone(), right.clone()
        close(N.matmul(left), expected @ left)
        close(N.rmatmul(right), right @ expected)
        assert torch.equal(left, before[0]) and torch.equal(right, before[1])
    assert all(t.shape[: len(batch)] == batch for t in N.tensors)


def test_broadcast(case):
    for own, other in [((), (3,)), ((3,), ()), ((3,), (2, 1)), ((2, 1), (1, 3))]:
        N, expected = make(case, 7, own)
        X = torch.randn(*other, 7, 2).double()
        close(N.matmul(X), expected @ X)
        close(N.rmatmul(X.mT), X.mT @ expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float32, 5e-6)])
def test_other_types(case, dtype, tolerance):
    for d, batch in ((5, (2,)), (300, ())):
        if d == 300 and module.CHUNK == 1:
            continue
        N, expected = make(case, d, batch, dtype)
        X = torch.randn(*batch, d, 4).to(dtype)
        left, right = N.matmul(X), N.rmatmul(X.mT)
        assert left.dtype == right.dtype == N.to_dense().dtype == dtype
        close(left, expected @ X.double(), tolerance)
        close(right, X.mT.double() @ expected, tolerance)


def test_later_changes_do_not_show(case):
    cls, options = case
    M = cls.from_dense(torch.randn(5, 5), **options)
    N = outer(M)
    before = N.to_dense().clone()
    M.mul_(2.0)
    assert torch.equal(N.to_dense(), before)


def test_forms():
    """Which form large matrices take; a user's structure can be given one."""
    for name, form in (("lower-toeplitz", Fourier), ("upper-triangular", Dense)):
        assert type(outer(STRUCTURES[name].eye(700))) is form
    assert type(outer(STRUCTURES["lower-toeplitz"].eye(600))) is Dense
    assert type(outer(PackedLower([torch.ones(6)], 3))) is TwoProducts


@pytest.mark.parametrize("name", ["lower-toeplitz", "upper-toeplitz"])
@pytest.mark.parametrize("d", [5, 6, 7, 257])
def test_ends_of_convolutions(name, d, monkeypatch):
    """They meet in one number for d = 5, 257, and not for 6; no vectors at all are fine, too."""
    monkeypatch.setattr("curvature.toeplitz.DIRECT", 4)
    M = STRUCTURES[name]([torch.randn(2, d).double()], d)
    D, X = M.to_dense(), torch.randn(2, 3, d).double()
    meets = Convolution(M.tensors[0]).length == 2 * d - 2
    assert meets == (d in (5, 257))
    N = Fourier(M)
    close(N.rmatmul(X), X @ D @ D.mT)
    close(N.matmul(X.mT), D @ D.mT @ X.mT)
    close(M @ X.mT, D @ X.mT)
    close(M.matmul(X.mT, transpose=True), D.mT @ X.mT)
    close(X @ M, X @ D)
    close((M @ M).to_dense(), D @ D)
    close(type(M).project_gram(X.mT).to_dense(), type(M).project(X.mT @ X).to_dense())
    none = X[:, :0]
    assert N.rmatmul(none).shape == (none @ M).shape == none.shape
    assert not type(M).project_gram(none.mT).to_dense().any()


def test_transform_lengths():
    """The shortest one is not always the fastest: 1050 and 1620 take half as long again as these."""
    pairs = ((1, 1), (2, 2), (1024, 1024), (1025, 1152), (1569, 1600), (1601, 2048), (1100, 1152))
    assert all(transform_length(least) == n for least, n in pairs)


@pytest.mark.parametrize("name", ["hierarchical", "rank-k-lower", "block-diagonal", "lower-toeplitz"])
def test_no_dense_matrix_is_held(name):
    N = outer(STRUCTURES[name].eye(1000))
    assert sum(t.numel() for t in N.tensors) <= 70 * 1000


@pytest.mark.parametrize(("d", "r"), [(1, 1), (5, 3), (300, 400), (461, 1025), (800, 128)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_symmetric_product(d, r, batch, transposed):
    R = torch.randn(*batch, r, d).double().mT if transposed else torch.randn(*batch, d, r).double()
    product = symmetric_product(R, 0.3)
    close(product, 0.3 * (R @ R.mT))
    close(symmetric_product(R.bfloat16()), R.bfloat16().double() @ R.bfloat16().mT.double(), 1e-2)
