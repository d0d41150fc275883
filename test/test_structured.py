"""Structured matrices: one contract for all of them, against masks of dense float64 matrices."""

import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import structured as benchmark
from curvature import structured, toeplitz, triangular
from curvature.hierarchical import Hierarchical
from curvature.structured import NaiveWarning, StructuredMatrix
from curvature.structures import STRUCTURES

# ---------------------------------------------------------------------- structures under test


class PackedLower(StructuredMatrix):
    """What a user writes: the two required methods, and nothing else."""

    def to_dense(self) -> Tensor:
        (t,) = self.tensors
        out = t.new_zeros(*t.shape[:-1], self.dim, self.dim)
        i, j = torch.tril_indices(self.dim, self.dim)
        out[..., i, j] = t
        return out

    @classmethod
    def from_dense(cls, M: Tensor) -> "PackedLower":
        i, j = torch.tril_indices(M.shape[-1], M.shape[-1])
        return cls([M[..., i, j]], M.shape[-1])


class Scalar(StructuredMatrix):
    """A user's structure whose stored tensors have no axes but those of the batch."""

    def to_dense(self) -> Tensor:
        (t,) = self.tensors
        return t[..., None, None] * torch.eye(self.dim, dtype=t.dtype)

    @classmethod
    def from_dense(cls, M: Tensor) -> "Scalar":
        return cls([M.diagonal(dim1=-2, dim2=-1).mean(-1)], M.shape[-1])


class TransposedHierarchical(Hierarchical):
    """The package mirrors hierarchical matrices only without last rows; the code is general."""

    mirrored = True


Mask = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class Case:
    """A structure.

    Attributes:
        cls: What is tested.
        mask: Which entries are kept, from row indices, column indices and the dimension.
        stored: The number of stored numbers at dimension d.
        options: Of the structure.
        means: Whether the entries of a diagonal are one number.
        patch: Module attributes to set, so that small matrices take the routes of large ones.
    """

    cls: type[StructuredMatrix]
    mask: Mask
    stored: Callable[[int], int]
    options: dict = field(default_factory=dict)
    means: bool = False
    patch: tuple = ()

    def keep(self, M: Tensor) -> Tensor:
        """Keep the structure's entries of ``M[*batch, d, d]``."""
        d = M.shape[-1]
        i, j = torch.meshgrid(torch.arange(d), torch.arange(d), indexing="ij")
        kept = torch.where(self.mask(i, j, d), M, 0.0)
        if self.means:
            for k in range(1 - d, d):
                diagonal = kept.diagonal(k, -2, -1)
                diagonal.copy_(diagonal.mean(-1, keepdim=True).expand_as(diagonal))
        return kept

    def project(self, M: Tensor) -> Tensor:
        """The map P by hand: entries whose mirror image is not kept count twice."""
        d = M.shape[-1]
        i, j = torch.meshgrid(torch.arange(d), torch.arange(d), indexing="ij")
        twice = self.mask(i, j, d) & ~self.mask(j, i, d)
        return self.keep(M * (1.0 + twice.double()))

    def make(self, d: int, batch: tuple = (), dtype: torch.dtype = torch.float64) -> tuple:
        """A matrix that is not symmetric, and its dense value in float64."""
        M = torch.randn(*batch, d, d, dtype=torch.float64).to(dtype)
        A = self.cls.from_dense(M, **self.options)
        return A, dense(A)


def hierarchical_mask(k1: int, k2: int) -> Mask:
    def mask(i: Tensor, j: Tensor, d: int) -> Tensor:
        start = max(d - k2, min(k1, d))
        return (i < k1) | (i == j) | ((i >= start) & (j >= k1))

    return mask


def hierarchical_count(k1: int, k2: int) -> Callable[[int], int]:
    def count(d: int) -> int:
        a = min(k1, d)
        b = min(k2, d - a)
        return (a + b + 1) * d

    return count


def block_count(k: int) -> Callable[[int], int]:
    def count(d: int) -> int:
        whole, rest = divmod(d, min(k, d))
        return whole * min(k, d) ** 2 + rest**2

    return count


def rank_count(k: int) -> Callable[[int], int]:
    return lambda d: (min(k, d) + 1) * d


def lower(i: Tensor, j: Tensor, d: int) -> Tensor:
    return i >= j


def upper(i: Tensor, j: Tensor, d: int) -> Tensor:
    return i <= j


def diagonal(i: Tensor, j: Tensor, d: int) -> Tensor:
    return i == j


def rank_upper(k: int) -> Mask:
    return lambda i, j, d: (i < k) | (i == j)


def rank_lower(k: int) -> Mask:
    return lambda i, j, d: (j < k) | (i == j)


def triangle(d: int) -> int:
    return d * (d + 1) // 2


S = STRUCTURES
HALVED = ((triangular, "LEAF", 2),)
FOURIER = ((toeplitz, "DIRECT", 0),)
BUILT_IN = {
    "dense": Case(S["dense"], lambda i, j, d: i == i, lambda d: d * d),
    "diagonal": Case(S["diagonal"], diagonal, lambda d: d),
    "block 1": Case(S["block-diagonal"], diagonal, block_count(1), {"block": 1}),
    "block 3": Case(S["block-diagonal"], lambda i, j, d: i // 3 == j // 3, block_count(3), {"block": 3}),
    "lower": Case(S["lower-triangular"], lower, triangle),
    "upper": Case(S["upper-triangular"], upper, triangle),
    "lower, halved": Case(S["lower-triangular"], lower, triangle, patch=HALVED),
    "upper, halved": Case(S["upper-triangular"], upper, triangle, patch=HALVED),
    "hierarchical 2 3": Case(
        S["hierarchical"], hierarchical_mask(2, 3), hierarchical_count(2, 3), {"k1": 2, "k2": 3}
    ),
    "hierarchical 0 2": Case(
        S["hierarchical"], hierarchical_mask(0, 2), hierarchical_count(0, 2), {"k1": 0, "k2": 2}
    ),
    "transposed hierarchical": Case(
        TransposedHierarchical,
        lambda i, j, d: hierarchical_mask(2, 3)(j, i, d),
        hierarchical_count(2, 3),
        {"k1": 2, "k2": 3},
    ),
    "rank 2 upper": Case(S["rank-k-upper"], rank_upper(2), rank_count(2), {"k": 2}),
    "rank 2 lower": Case(S["rank-k-lower"], rank_lower(2), rank_count(2), {"k": 2}),
    "rank 0 lower": Case(S["rank-k-lower"], diagonal, rank_count(0), {"k": 0}),
    "lower Toeplitz": Case(S["lower-toeplitz"], lower, lambda d: d, means=True),
    "upper Toeplitz": Case(S["upper-toeplitz"], upper, lambda d: d, means=True),
    "lower Toeplitz, Fourier": Case(S["lower-toeplitz"], lower, lambda d: d, means=True, patch=FOURIER),
    "upper Toeplitz, Fourier": Case(S["upper-toeplitz"], upper, lambda d: d, means=True, patch=FOURIER),
}
USERS = {
    "a user's": Case(PackedLower, lower, triangle),
    "a user's scalar": Case(Scalar, diagonal, lambda d: 1, means=True),
}
CASES = BUILT_IN | USERS
# dimension and batch shape; block sizes and k divide few of them, some k are too large
SIZES = [(1, ()), (1, (2,)), (2, ()), (3, (2, 1)), (5, (3,)), (8, ()), (11, (2, 3)), (12, (2,))]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=CASES)
def case(request, monkeypatch) -> Iterator[Case]:
    """Each structure; those of the package may not warn that they are naive."""
    case = CASES[request.param]
    for module, name, value in case.patch:
        monkeypatch.setattr(module, name, value)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if request.param in BUILT_IN else "ignore", NaiveWarning)
        yield case


every_type = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).split(".")[1])


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Compare with errors relative to the largest entry of a matrix."""
    assert actual.dtype == dtype
    scale = expected.abs().max().item() if expected.numel() else 0.0
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


def same(actual: StructuredMatrix, expected: StructuredMatrix) -> None:
    """Require equal matrices, bit by bit."""
    assert type(actual) is type(expected) and actual.options == expected.options
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    for t, u in zip(actual.tensors, expected.tensors, strict=True):
        assert torch.equal(t, u)


def dense(A: StructuredMatrix) -> Tensor:
    return A.to_dense().to(torch.float64, copy=True)


def random(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random numbers, and the same ones in float64."""
    x = torch.randn(*shape, dtype=torch.float64).to(dtype)
    return x, x.double()


# ---------------------------------------------------------------------- the contract


@every_type
def test_from_dense_keeps_the_structures_entries(case, dtype):
    for d, batch in SIZES:
        M, M64 = random(*batch, d, d, dtype=dtype)
        A = case.cls.from_dense(M, **case.options)
        close(A.to_dense(), case.keep(M64), dtype)
        assert A.shape == M.shape and A.batch_shape == batch and A.dtype == dtype
        assert A.device == M.device and A.dim == d
        close(A.from_dense(A.to_dense(), **case.options).to_dense(), dense(A), dtype)


def test_from_dense_copies(case):
    for d, batch in SIZES:
        M = torch.randn(*batch, d, d).double()
        A = case.cls.from_dense(M, **case.options)
        before = A.to_dense().clone()
        M.mul_(2)
        assert torch.equal(A.to_dense(), before)


def test_stored_numbers(case):
    for d, batch in SIZES:
        A, _ = case.make(d, batch)
        count = case.stored(d) * max(1, torch.Size(batch).numel())
        assert sum(t.numel() for t in A.tensors) == count
        assert tuple(tuple(t.shape[len(batch) :]) for t in A.tensors) == A.shapes(d, **case.options)


@every_type
def test_zeros_and_eye(case, dtype):
    for d, batch in SIZES:
        arguments = {"batch_shape": batch, "dtype": dtype, "device": "cpu", **case.options}
        zeros, eye = case.cls.zeros(d, **arguments), case.cls.eye(d, **arguments)
        close(zeros.to_dense(), torch.zeros(*batch, d, d).double(), dtype)
        close(eye.to_dense(), torch.eye(d).double().expand(*batch, d, d), dtype)
    assert case.cls.eye(3, **case.options).dtype == torch.get_default_dtype()


@every_type
def test_products_with_dense_matrices(case, dtype):
    for d, batch in SIZES:
        A, D = case.make(d, batch, dtype)
        X, X64 = random(*batch, d, 4, dtype=dtype)
        Y, Y64 = random(*batch, 3, d, dtype=dtype)
        close(A @ X, D @ X64, dtype)
        close(A.matmul(X, transpose=True), D.mT @ X64, dtype)
        close(Y @ A, Y64 @ D, dtype)
        close(A.rmatmul(Y, transpose=True), Y64 @ D.mT, dtype)
        # operands that are transposed in memory
        close(A @ Y.mT, D @ Y64.mT, dtype)
        close(A.matmul(Y.mT, transpose=True), D.mT @ Y64.mT, dtype)
        close(X.mT @ A, X64.mT @ D, dtype)
        close(A.rmatmul(X.mT, transpose=True), X64.mT @ D.mT, dtype)


def test_products_broadcast(case):
    for own, other in [((), (3,)), ((3,), ()), ((3,), (2, 1)), ((2, 1), (1, 3)), ((2,), (1,))]:
        for d in (1, 7):
            A, D = case.make(d, own)
            X = torch.randn(*other, d, 2).double()
            close(A @ X, D @ X)
            close(A.matmul(X, transpose=True), D.mT @ X)
            close(X.mT @ A, X.mT @ D)
            close(A.rmatmul(X.mT, transpose=True), X.mT @ D.mT)


def test_arguments_are_not_changed(case):
    A, D = case.make(7)
    B, _ = case.make(7)
    X = torch.randn(7, 2).double()
    before = X.clone(), A.clone(), B.clone()
    _ = A @ X, A.matmul(X, transpose=True), X.mT @ A, A @ B, A.gram(), A + B, A * 2, A.trace(), A.norm()
    case.cls.project_gram(X, 2.0, **case.options)
    case.cls.project(D, **case.options)
    assert torch.equal(X, before[0])
    same(A, before[1])
    same(B, before[2])
    assert torch.equal(dense(A), D)


@every_type
def test_product_is_in_the_structure(case, dtype):
    for d, batch in SIZES:
        (A, DA), (B, DB) = case.make(d, batch, dtype), case.make(d, batch, dtype)
        AB = A @ B
        assert type(AB) is case.cls and AB.options == A.options
        close(AB.to_dense(), DA @ DB, dtype)
    (A, DA), (B, DB) = case.make(6, (3,), dtype), case.make(6, (), dtype)
    close((A @ B).to_dense(), DA @ DB, dtype)
    close((B @ A).to_dense(), DB @ DA, dtype)


@every_type
def test_projections(case, dtype):
    for d, batch in SIZES:
        M, M64 = random(*batch, d, d, dtype=dtype)
        close(case.cls.project(M, **case.options).to_dense(), case.project(M64), dtype)
        for r in (1, 6):
            S, S64 = random(*batch, d, r, dtype=dtype)
            for scale in (1, 0.3):
                H = case.cls.project_gram(S, scale, **case.options)
                assert type(H) is case.cls
                expected = case.project(scale * S64 @ S64.mT)
                close(H.to_dense(), expected, dtype)
                SST = scale * S64 @ S64.mT
                close(case.cls.project(SST, **case.options).to_dense(), expected)
        A, D = case.make(d, batch, dtype)
        close(A.gram().to_dense(), case.project(D.mT @ D), dtype)


def test_projection_of_a_transposed_factor(case):
    S = torch.randn(4, 9).double()
    H = case.cls.project_gram(S.mT, **case.options)
    close(H.to_dense(), case.project(S.mT @ S))


@every_type
def test_reductions(case, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for d, batch in SIZES:
        A, D = case.make(d, batch, dtype)
        trace = D.diagonal(dim1=-2, dim2=-1).sum(-1)
        square = D.square().sum((-1, -2))
        for actual, expected in (
            (A.trace(), trace),
            (A.square_norm(), square),
            (A.norm(), square.sqrt()),
        ):
            assert actual.dtype == wide and actual.shape == batch
            # a trace is a sum of terms of both signs
            atol = 10 * TOLERANCE[wide] * d
            torch.testing.assert_close(actual.double(), expected, rtol=10 * TOLERANCE[wide], atol=atol)


@every_type
def test_arithmetic(case, dtype):
    for d, batch in SIZES:
        (A, DA), (B, DB) = case.make(d, batch, dtype), case.make(d, batch, dtype)
        close((A + B).to_dense(), DA + DB, dtype)
        close((A - B).to_dense(), DA - DB, dtype)
        close((-A).to_dense(), -DA, dtype)
        for result in (A * 1.5, 1.5 * A, A * torch.tensor(1.5)):
            close(result.to_dense(), 1.5 * DA, dtype)
        close((A / 4).to_dense(), DA / 4, dtype)
        c = torch.rand(batch) + 0.5  # float32 for all: the matrix's data type stays
        factor = c.double()[..., None, None]
        for result in (A * c, c * A):
            close(result.to_dense(), DA * factor, dtype)
        close((A / c).to_dense(), DA / factor, dtype)
    (A, DA), (B, DB) = case.make(3, (4,), dtype), case.make(3, (), dtype)
    close((A + B).to_dense(), DA + DB, dtype)
    close((B - A).to_dense(), DB - DA, dtype)


@every_type
def test_in_place_arithmetic(case, dtype):
    for d, batch in SIZES:
        (A, DA), (B, DB) = case.make(d, batch, dtype), case.make(d, batch, dtype)
        tensors = A.tensors
        assert A.add_(B) is A
        close(A.to_dense(), DA + DB, dtype)
        DA = dense(A)
        A.add_(B, alpha=-0.5)
        close(A.to_dense(), DA - 0.5 * DB, dtype)
        DA, c = dense(A), torch.rand(batch) + 0.5
        A.add_(B, alpha=c)
        close(A.to_dense(), DA + c.double()[..., None, None] * DB, dtype)
        DA = dense(A)
        assert A.add_identity_(-2.0) is A
        close(A.to_dense(), DA - 2 * torch.eye(d).double(), dtype)
        DA = dense(A)
        assert A.mul_(0.5) is A
        close(A.to_dense(), 0.5 * DA, dtype)
        DA = dense(A)
        A.mul_(c)
        close(A.to_dense(), c.double()[..., None, None] * DA, dtype)
        assert A.copy_(B) is A
        same(A, B)
        assert all(t is u for t, u in zip(A.tensors, tensors, strict=True))
    A, B = case.make(3, (4,), dtype)[0], case.make(3, (), dtype)[0]
    close(A.copy_(B).to_dense(), dense(B).expand(4, 3, 3), dtype)


def test_clone_and_to(case):
    for d, batch in SIZES:
        A, D = case.make(d, batch)
        copy = A.clone()
        same(copy, A)
        copy.mul_(2)
        close(A.to_dense(), D)
        for dtype in TOLERANCE:
            B = A.to(dtype)
            close(B.to_dense(), D, dtype)
            same(B.to(device="cpu", dtype=dtype), B)
            same(A.clone().mul_(0).to(dtype).copy_(A), B)  # copy_ converts


def test_stack_and_unstack(case):
    for d, batch in SIZES:
        matrices = [case.make(d, batch)[0] for _ in range(3)]
        stacked = case.cls.stack(matrices)
        assert stacked.shape == (3, *batch, d, d)
        close(stacked.to_dense(), torch.stack([dense(A) for A in matrices]))
        parts = stacked.unstack()
        assert len(parts) == 3
        for A, B in zip(matrices, parts, strict=True):
            same(A, B)
        parts[1].mul_(2)  # the parts are views
        close(stacked.to_dense()[1], 2 * dense(matrices[1]))


@every_type
def test_state_dict(case, dtype):
    for d, batch in SIZES:
        A, _ = case.make(d, batch, dtype)
        state = A.state_dict()
        assert all(isinstance(v, Tensor | int | str) for v in state.values())
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        B = case.cls.from_state_dict(torch.load(file))
        same(B, A)
        C = case.cls.from_state_dict(state)
        C.mul_(2)  # no memory is shared
        same(B, A)


def test_repr(case):
    A, _ = case.make(5, (2,))
    assert repr(A).startswith(f"{case.cls.__name__}(shape=(2, 5, 5)") and "float64" in repr(A)


# ---------------------------------------------------------------------- single properties


def test_table():
    assert all(cls.name == name for name, cls in STRUCTURES.items())
    assert {case.cls for case in BUILT_IN.values()} == {*STRUCTURES.values(), TransposedHierarchical}


def test_defaults():
    """Options of the table without arguments, at a dimension above and one below them."""
    for cls in STRUCTURES.values():
        for d in (5, 70):
            A = cls.eye(d)
            assert torch.equal(A.to_dense(), torch.eye(d))
            assert set(A.options) == set(cls.defaults)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("d", [300, 601])
def test_beyond_the_thresholds(name, d):
    """The routes of large matrices, at the dimensions for which they are meant."""
    torch.manual_seed(0)
    cls = STRUCTURES[name]
    case = next(c for c in BUILT_IN.values() if c.cls is cls)
    A, D = case.make(d)
    B, DB = case.make(d)
    X = torch.randn(d, 3).double()
    close(A @ X, D @ X)
    close(A.matmul(X, transpose=True), D.mT @ X)
    close((A @ B).to_dense(), D @ DB)
    close(A.gram().to_dense(), case.project(D.mT @ D))
    close(cls.project_gram(X, 0.5, **case.options).to_dense(), case.project(0.5 * X @ X.mT))


@pytest.mark.parametrize("name", STRUCTURES)
def test_uninitialised_memory_is_not_read(name, monkeypatch):
    """With deterministic algorithms torch fills new memory with NaN."""
    monkeypatch.setattr(triangular, "LEAF", 2)
    cls = STRUCTURES[name]
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for d in (1, 8, 11):
            A = cls.from_dense(torch.randn(d, d))
            X = torch.randn(d, 2)
            results = [A @ A, A.gram(), cls.project_gram(X, 0.5), cls.project(X @ X.mT)]
            tensors = [t for B in results for t in B.tensors]
            tensors += [A @ X, A.matmul(X, transpose=True), X.mT @ A, A.to_dense()]
            assert all(t.isfinite().all() for t in tensors)
    finally:
        torch.use_deterministic_algorithms(before)


class Largest(TorchDispatchMode):
    """Record the largest number of entries of a result."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


FAST = ["diagonal", "block-diagonal", "hierarchical", "rank-k-lower", "rank-k-upper"]


@pytest.mark.parametrize("name", [*FAST, "lower-toeplitz", "upper-toeplitz"])
def test_no_dense_matrix_is_formed(name):
    d, cls = 512, STRUCTURES[name]
    X = torch.randn(d, 8)
    with Largest() as largest:
        A = cls.eye(d)
        A.add_(cls.project_gram(X, 0.1), alpha=-0.1)
        B = (A @ A + 0.5 * A).gram()
        _ = A @ X, A.matmul(X, transpose=True), X.mT @ A, A.rmatmul(X.mT, transpose=True)
        _ = B.trace(), B.norm(), cls.from_state_dict(B.state_dict()), cls.stack([A, B])
    assert largest.numel <= 80 * d < d * d


@pytest.mark.parametrize("name", ["lower-triangular", "upper-triangular"])
def test_triangles_take_no_dense_square(name):
    """Nothing is larger than what is stored."""
    d, cls = 512, STRUCTURES[name]
    with Largest() as largest:
        A = cls.eye(d)
        _ = A @ A, A.gram(), cls.project_gram(torch.randn(d, 8)), A @ torch.randn(d, 8)
    assert largest.numel == triangle(d)


def test_naive_operations_warn_once(monkeypatch):
    monkeypatch.setattr(structured, "_WARNED", set())
    structured._shapes.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            A = PackedLower.eye(4)
            X = torch.ones(4, 2)
            _ = A @ X, X.mT @ A, A @ A, A.gram(), A.trace(), A.norm()
            _ = A.project(X @ X.mT), A.project_gram(X), A.project_gram(X)
            _ = A + A, 2 * A, A.clone(), A.state_dict(), A.stack([A, A]).unstack()  # never naive
    named = [str(w.message).split(" ")[0] for w in found if w.category is NaiveWarning]
    naive = [
        "shapes",
        "add_identity_",
        "matmul",
        "compose",
        "gram",
        "trace",
        "square_norm",
        "project",
        "project_gram",
    ]
    assert sorted(named) == sorted(f"PackedLower.{name}" for name in naive)


def test_half_types_do_not_overflow_where_the_result_does_not():
    """Sums of squares, and products before they are scaled."""
    for name, cls in STRUCTURES.items():
        S = torch.full((300, 300), 20.0, dtype=torch.float16)  # S S^T = 120000
        H = cls.project_gram(S, 1 / 300)
        assert H.to_dense().max() in (400, 800), name
        large = cls.eye(300, dtype=torch.float16).mul_(300).square_norm()
        torch.testing.assert_close(large.item(), 300.0**3, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------- processes


def reduce(rank: int, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for case in BUILT_IN.values():
        for dtype in (torch.float64, torch.float16):
            torch.manual_seed(0)
            matrices = [case.make(5, (2,), dtype) for _ in range(2)]
            total = matrices[0][1] + matrices[1][1]
            own = matrices[rank][0]
            before = own.clone()
            close(own.all_reduce().to_dense(), total, dtype)
            close(own.all_reduce(dist.group.WORLD, average=True).to_dense(), total / 2, dtype)
            same(own, before)
    large = STRUCTURES["dense"].eye(1, dtype=torch.float16).mul_(40000.0)
    assert large.all_reduce(average=True).tensors[0].item() == 40000  # the sum is above 65504
    dist.destroy_process_group()


def test_all_reduce(tmp_path):
    torch.multiprocessing.spawn(reduce, (str(tmp_path),), nprocs=2)


def test_all_reduce_without_processes():
    with pytest.raises(RuntimeError, match="init_process_group"):
        STRUCTURES["diagonal"].eye(2).all_reduce()


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", STRUCTURES)
def test_errors_of_construction(name):
    cls = STRUCTURES[name]
    for make in (cls.from_dense, cls.project):
        with pytest.raises(ValueError, match=r"square M\[\*batch, d, d\], got shape \(2, 3\)"):
            make(torch.ones(2, 3))
        with pytest.raises(ValueError, match="square"):
            make(torch.ones(3))
        with pytest.raises(TypeError, match=r"floating-point matrix, got shape \(2, 2\), torch.int64"):
            make(torch.ones(2, 2, dtype=torch.int64))
        with pytest.raises(TypeError, match="floating-point matrix, got list"):
            make([[1.0]])
        with pytest.raises(TypeError, match="unknown option 'size'; there are"):
            make(torch.eye(2), size=3)
    with pytest.raises(TypeError, match="floating-point S"):
        cls.project_gram(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"S\[\*batch, d, r\]"):
        cls.project_gram(torch.ones(2))
    with pytest.raises(ValueError, match="dimension of at least 1"):
        cls.eye(0)
    with pytest.raises(TypeError, match="floating-point"):
        cls.eye(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="floating-point type, got"):
        cls.eye(2).to(torch.int32)
    with pytest.raises(ValueError, match="expected tensors of shapes"):
        cls([torch.ones(7, 7)], 3)
    with pytest.raises(ValueError, match="at least one matrix"):
        cls.stack([])
    with pytest.raises(ValueError, match="expected a batch axis"):
        cls.eye(2).unstack()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("block-diagonal", {"block": 0}, "block of at least 1, got 0"),
        ("hierarchical", {"k1": -1}, "k1 of at least 0, got -1"),
        ("hierarchical", {"k2": -2}, "k2 of at least 0, got -2"),
        ("rank-k-lower", {"k": -1}, "k of at least 0, got -1"),
        ("rank-k-upper", {"k": -1}, "k of at least 0, got -1"),
    ],
)
def test_errors_of_options(name, options, message):
    cls = STRUCTURES[name]
    with pytest.raises(ValueError, match=message):
        cls.from_dense(torch.eye(3), **options)
    with pytest.raises(ValueError, match=message):
        cls.eye(3, **options)
    (key,) = options
    for value in (1.0, True, None):
        with pytest.raises(TypeError, match=f"integer for {key}"):
            cls.eye(3, **{key: value})


@pytest.mark.parametrize(
    ("name", "options", "places"),
    [
        ("hierarchical", {"k1": 2, "k2": 1}, [(2, 0), (2, 1), (3, 0), (3, 1), (3, 4)]),
        ("rank-k-upper", {"k": 2}, [(2, 0), (2, 1)]),
        ("rank-k-lower", {"k": 1}, [(1, 0)]),
    ],
)
def test_numbers_that_are_no_entries(name, options, places):
    """They are zero, whatever is done, and have to be at first."""
    cls = STRUCTURES[name]
    A, S = cls.from_dense(torch.randn(5, 5), **options), torch.randn(5, 3)
    some = [A, A @ A, A.gram(), A + A.eye(5, **options), A.project_gram(S, **options), -A * 0.5]
    for M in [*some, A.project(S @ S.mT, **options), A.zeros(5, **options).add_identity_(3.0)]:
        (t,) = M.tensors
        assert [(i, j) for i, j in (t == 0).nonzero().tolist() if (i, j) in places] == places
        cls([t], 5, **options)
    for i, j in places:
        wrong = A.tensors[0].clone()
        wrong[i, j] = 1e-3
        with pytest.raises(ValueError, match="expected zeros left of the last dense rows"):
            cls([wrong], 5, **options)


@pytest.mark.parametrize("name", STRUCTURES)
def test_errors_of_operations(name):
    cls = STRUCTURES[name]
    A = cls.eye(4, (2,))
    stranger = STRUCTURES["dense" if name != "dense" else "diagonal"].eye(4, (2,))
    binary = [
        lambda A, B: A + B,
        lambda A, B: A - B,
        lambda A, B: A @ B,
        lambda A, B: A.add_(B),
        lambda A, B: A.copy_(B),
    ]
    for operation in binary:
        with pytest.raises(TypeError, match=r"same structure; make both dense with to_dense\(\)"):
            operation(A, stranger)
        with pytest.raises(ValueError, match="equal dimensions and options"):
            operation(A, cls.eye(3, (2,)))
        with pytest.raises(ValueError, match=r"leading axes that broadcast.*got \(3,\)"):
            operation(A, cls.eye(4, (3,)))
    for operation in binary[:-1]:
        with pytest.raises(TypeError, match=r"equal data types; convert one with to\(\)"):
            operation(A, A.to(torch.float64))
    for change in (A.add_, A.copy_):
        with pytest.raises(ValueError, match=r"broadcast to \(2,\), got \(3, 2\)"):
            change(cls.eye(4, (3, 2)))
    for X in (torch.ones(3, 4), torch.ones(4)):
        with pytest.raises(ValueError, match=r"X\[\.\.\., d, n\] with d = 4, got shape"):
            A @ X
    with pytest.raises(ValueError, match=r"X\[\.\.\., n, d\] with d = 4"):
        torch.ones(4, 3) @ A
    with pytest.raises(ValueError, match="broadcast"):
        A @ torch.ones(3, 4, 4)
    with pytest.raises(TypeError, match=r"torch.float32, got shape \(4, 4\), torch.float64"):
        A @ torch.eye(4).double()
    with pytest.raises(TypeError, match=r"expected a tensor of .*, got (DenseMatrix|DiagonalMatrix);"):
        A.matmul(stranger)
    for wrong in (torch.ones(3), torch.ones(2, 4)):
        with pytest.raises(ValueError, match="broadcast"):
            A.mul_(wrong)
    for operation in (lambda: A + 1, lambda: A * "2", lambda: A @ 2, lambda: A / A):
        with pytest.raises(TypeError):
            operation()
    with pytest.raises(ValueError, match="equal batch shapes"):
        cls.stack([A, cls.eye(4)])
    with pytest.raises(ValueError, match=f"structure '{name}', got that of 'other'"):
        cls.from_state_dict({**A.state_dict(), "structure": "other"})
    with pytest.raises(ValueError, match=r"expected .*dim, .*tensor0 in the state, got only"):
        cls.from_state_dict({"structure": name})


def test_errors_of_different_options():
    """Options count as far as they make a difference."""
    cls = STRUCTURES["block-diagonal"]
    with pytest.raises(ValueError, match=r"equal dimensions and options; from_dense"):
        cls.eye(4, block=1) + cls.eye(4, block=2)
    same(cls.eye(4, block=5) * 2, cls.eye(4, block=4) + cls.eye(4, block=9))


def test_benchmark(tmp_path):
    found = benchmark.main(["--quick", "--dims", "16", "40", "--threads", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "structured-cpu-quick.json").read_text()) == found
    assert [row["name"] for row in found["growth"]] == list(STRUCTURES)
