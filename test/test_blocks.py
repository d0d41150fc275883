"""One contract for every kind of curvature block, against a dense matrix built by hand."""

import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from curvature import (
    Axes,
    Block,
    DenseBlock,
    DiagonalBlock,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    Root,
    block_from_state_dict,
)

DELTA = 0.3


def psd(*shape: int) -> Tensor:
    """Positive definite matrices `[..., d, d]`, badly scaled."""
    d = shape[-1]
    root = torch.randn(*shape[:-1], d, d + 2, dtype=torch.float64) * torch.logspace(0, 1, d)[:, None]
    return root @ root.mT / d


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.1


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, shape[-1], dtype=torch.float64)).Q.contiguous()


def grouped(blocks: list[Tensor]) -> Tensor:
    return torch.block_diag(*blocks)


def joint_order(g: int, o: int, i: int) -> Tensor:
    """Where the entries of `cat([weight.flatten(), bias])` are in `(g, o, i)`."""
    place = torch.arange(g * o * i).reshape(g, o, i)
    return torch.cat([place[..., :-1].flatten(), place[..., -1].flatten()])


def plain() -> tuple[Block, Tensor]:
    B, A = psd(3), psd(4)
    return Kronecker(B, A, rows=5), torch.kron(B, A)


def one_by_one() -> tuple[Block, Tensor]:
    B, A = psd(1), psd(1)
    return Kronecker(B, A), torch.kron(B, A)


def bias() -> tuple[Block, Tensor]:
    B = psd(5)
    return Kronecker(B, torch.ones(1, 1).double(), Axes("o -> 1 o 1")), B


def joint() -> tuple[Block, Tensor]:
    B, A = psd(3), psd(5)
    order = joint_order(1, 3, 5)
    return Kronecker(B, A, joint=True), torch.kron(B, A)[order][:, order]


def embedding() -> tuple[Block, Tensor]:
    B, A = psd(3), positive(6)
    return Kronecker(B, A, Axes("i o -> 1 o i")), torch.kron(A.diag(), B)


def both_diagonal() -> tuple[Block, Tensor]:
    B, A = positive(3), positive(2)
    return Kronecker(B, A), torch.kron(B.diag(), A.diag())


def grouped_joint_conv() -> tuple[Block, Tensor]:
    B, A = psd(2, 3), psd(2, 7)
    axes = Axes("(g o) i x y -> g o (i x y)", (("g", 2), ("x", 3), ("y", 2)))
    dense = grouped([torch.kron(b, a) for b, a in zip(B, A, strict=True)])
    order = joint_order(2, 3, 7)
    return Kronecker(B, A, axes, groups=2, joint=True), dense[order][:, order]


def grouped_diagonal() -> tuple[Block, Tensor]:
    B, A = psd(2, 3), positive(2, 4)
    axes = Axes("(g o) i -> g o i", (("g", 2),))
    dense = grouped([torch.kron(b, a.diag()) for b, a in zip(B, A, strict=True)])
    return Kronecker(B, A, axes, groups=2), dense


def rooted() -> tuple[Block, Tensor]:
    B, R = psd(3), orthogonal(4) * torch.logspace(0, 0.5, 4)[:, None]
    return Kronecker(B, Root(R), rows=5), torch.kron(B, R.T @ R)


def rooted_grouped_joint() -> tuple[Block, Tensor]:
    B, R = psd(2, 3), orthogonal(2, 4) * torch.logspace(0, 0.5, 4)[:, None]
    axes = Axes("(g o) i -> g o i", (("g", 2),))
    dense = grouped([torch.kron(b, r.T @ r) for b, r in zip(B, R, strict=True)])
    order = joint_order(2, 3, 4)
    return Kronecker(B, Root(R), axes, groups=2, joint=True), dense[order][:, order]


def eigen() -> tuple[Block, Tensor]:
    Q_B, Q_A, values = orthogonal(3), orthogonal(4), positive(1, 3, 4)
    Q = torch.kron(Q_B, Q_A)
    return KroneckerEigen(Q_B, Q_A, values), Q @ values.flatten().diag() @ Q.T


def eigen_half_diagonal() -> tuple[Block, Tensor]:
    Q_A, values = orthogonal(4), positive(1, 3, 4)
    Q = torch.kron(torch.eye(3).double(), Q_A)
    return KroneckerEigen(None, Q_A, values), Q @ values.flatten().diag() @ Q.T


def eigen_grouped_joint() -> tuple[Block, Tensor]:
    Q_B, Q_A, values = orthogonal(2, 3), orthogonal(2, 4), positive(2, 3, 4)
    axes = Axes("(g o) i -> g o i", (("g", 2),))
    parts = [torch.kron(b, a) for b, a in zip(Q_B, Q_A, strict=True)]
    Q, order = grouped(parts), joint_order(2, 3, 4)
    dense = Q @ values.flatten().diag() @ Q.T
    return KroneckerEigen(Q_B, Q_A, values, axes, 2, True), dense[order][:, order]


def tied() -> tuple[Block, Tensor]:
    one, two = embedding(), (Kronecker(B := psd(6), A := psd(3)), torch.kron(B, A))
    return KroneckerSum((one[0], two[0])), one[1] + two[1]


def dense() -> tuple[Block, Tensor]:
    M = psd(6)
    return DenseBlock(M, (2, 3)), M


def diagonal() -> tuple[Block, Tensor]:
    d = positive(2, 3)
    return DiagonalBlock(d), d.flatten().diag()


MAKE: dict[str, Callable[[], tuple[Block, Tensor]]] = {
    f.__name__: f
    for f in (
        *(plain, one_by_one, bias, joint, embedding, both_diagonal, grouped_joint_conv),
        *(rooted, rooted_grouped_joint),
        *(grouped_diagonal, eigen, eigen_half_diagonal, eigen_grouped_joint, tied, dense, diagonal),
    )
}


@pytest.fixture(params=MAKE)
def pair(request: pytest.FixtureRequest) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    block, M = MAKE[request.param]()
    return block, M.clone()  # no memory in common


def parts(block: Block, flat: Tensor) -> tuple[Tensor, ...]:
    """Parameter-shaped tensors of flat vectors `[..., p]`."""
    cut = flat.split([s.numel() for s in block.shapes], dim=-1)
    return tuple(t.reshape(*flat.shape[:-1], *s) for t, s in zip(cut, block.shapes, strict=True))


def flat(value: Tensor | tuple[Tensor, ...], lead: int = 0) -> Tensor:
    value = (value,) if isinstance(value, Tensor) else value
    return torch.cat([t.flatten(lead) for t in value], dim=-1)


def matrix(block: Block) -> Tensor:
    """The dense matrix, column by column through products."""
    eye = torch.eye(block.dim, dtype=torch.float64)
    return flat(block.matvec(*parts(block, eye)), 1).T


def function(M: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(M)
    return vectors @ f(values).diag() @ vectors.T


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_products(pair: tuple[Block, Tensor]):
    block, M = pair
    close(matrix(block), M)
    v = torch.randn(2, 3, block.dim, dtype=torch.float64)
    close(flat(block.matvec(*parts(block, v)), 2), v @ M)
    assert block.dim == len(M)


def test_dense_form(pair: tuple[Block, Tensor]):
    block, M = pair
    if len(block.shapes) == 1:
        close(block.to_dense(), M)
    else:  # rows follow [W | bias]
        order = joint_order(*block.sizes)
        close(block.to_dense()[order][:, order], M)


def test_numbers(pair: tuple[Block, Tensor]):
    block, M = pair
    close(block.trace(), M.trace())
    close(block.norm(), M.norm())
    close(flat(block.diagonal()), M.diagonal())
    close(block.eigenvalues(), torch.linalg.eigvalsh(M))
    close(block.logdet(DELTA), torch.logdet(M + DELTA * torch.eye(len(M)).double()))
    close(block.logdet(), torch.logdet(M))


@pytest.mark.parametrize("damping", [0.0, DELTA])
@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5, 1.0, 2.0])
def test_powers(pair: tuple[Block, Tensor], exponent: float, damping: float):
    block, M = pair
    expected = function(M, lambda values: (values + damping) ** exponent)
    assert (matrix(block.power(exponent, damping)) - expected).norm() < 1e-10 * expected.norm()


def test_inverses(pair: tuple[Block, Tensor]):
    block, M = pair
    v = torch.randn(2, block.dim, dtype=torch.float64)
    expected = torch.linalg.solve(M + DELTA * torch.eye(len(M)).double(), v.T).T
    close(flat(block.solve(*parts(block, v), damping=DELTA), 1), expected)
    close(flat(block.inverse(DELTA).matvec(*parts(block, v)), 1), expected)


def test_samples_are_the_root_times_noise(pair: tuple[Block, Tensor]):
    block, M = pair
    generator = torch.Generator().manual_seed(1)
    found = flat(block.sample(DELTA, (4,), generator), 1)
    generator.manual_seed(1)
    noise = [torch.randn(4, *s, generator=generator, dtype=torch.float64) for s in block.shapes]
    root = function(M, lambda values: (values + DELTA) ** -0.5)
    close(found, flat(tuple(noise), 1) @ root)


@pytest.mark.montecarlo
def test_covariance_of_samples(pair: tuple[Block, Tensor]):
    block, M = pair
    samples = flat(block.sample(DELTA, (40000,), torch.Generator().manual_seed(0)), 1)
    expected = torch.linalg.inv(M + DELTA * torch.eye(len(M)).double())
    assert (samples.T @ samples / 40000 - expected).norm() < 0.05 * expected.norm()


def test_scaling_and_sums(pair: tuple[Block, Tensor]):
    block, M = pair
    close(matrix(2.5 * block), 2.5 * M)
    close(matrix(block * 2.5 + block * 0.5), 3 * M)


def test_storage(pair: tuple[Block, Tensor]):
    block, M = pair
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    again = block_from_state_dict(torch.load(file))
    assert type(again) is type(block) and again.shapes == block.shapes
    close(matrix(again), M)
    copy = block.clone()
    for t in block.factors.values():
        t.zero_()
    close(matrix(copy), M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(pair: tuple[Block, Tensor], dtype: torch.dtype):
    """Decompositions are those of the rounded factors, in float32; products keep the vectors' type."""
    block, _ = pair
    low = block.to(dtype=dtype)
    assert {t.dtype for t in low.factors.values()} == {low.dtype} == {dtype}
    rounded = low.to(dtype=torch.float64)
    v = parts(block, torch.randn(block.dim, dtype=torch.float64))
    for vectors, out in ((v, torch.float64), (tuple(t.to(dtype) for t in v), dtype)):
        found = flat(low.matvec(*vectors))
        expected = flat(rounded.matvec(*(t.double() for t in vectors)))
        assert found.dtype == out
        assert (found - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()
    if isinstance(block, KroneckerEigen):
        return  # rounded bases are not orthonormal
    inverse = low.inverse(DELTA)
    assert inverse.dtype == torch.float32
    expected = torch.linalg.inv(matrix(rounded) + DELTA * torch.eye(block.dim).double())
    condition = 1 + float(matrix(rounded).norm()) / DELTA
    assert (matrix(inverse) - expected).norm() < 1e-6 * condition * expected.norm()
    assert inverse.power(1.0).to(dtype=torch.float64).dtype == torch.float64


def test_wrong_vectors(pair: tuple[Block, Tensor]):
    block, _ = pair
    vectors = parts(block, torch.zeros(block.dim).double())
    with pytest.raises(ValueError, match=r"matvec takes .* got \d tensors: a joint block acts on"):
        block.matvec(*vectors, vectors[0])
    with pytest.raises(ValueError, match=r"matvec takes .* behind any batch axes, got"):
        block.matvec(*(torch.zeros(*t.shape, 2).double() for t in vectors))


def test_wrong_damping(pair: tuple[Block, Tensor]):
    block, _ = pair
    for damping in (-1.0, float("nan"), float("inf"), "much"):
        with pytest.raises(ValueError, match="expected a finite number >= 0"):
            block.inverse(damping)
    for call in (block.logdet, block.sample, block.solve):
        vectors = parts(block, torch.zeros(block.dim).double()) if call == block.solve else ()
        with pytest.raises(ValueError, match="expected a finite number >= 0"):
            call(*vectors, damping=-1e-3)


def spoiled(block: Block, change: Callable[[Tensor], None]) -> Block:
    """The block with its last factor changed."""
    factors = {k: t.clone() for k, t in block.factors.items()}
    change(factors["values"] if "values" in factors else list(factors.values())[-1])
    return block.replaced(**factors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(pair: tuple[Block, Tensor], bad: float):
    block = spoiled(pair[0], lambda t: t.view(-1)[:1].fill_(bad))
    for call in (block.eigenvalues, block.inverse, block.logdet, block.sample):
        if call == block.eigenvalues and isinstance(block, KroneckerEigen):
            continue  # they are what it consists of
        with pytest.raises(ValueError, match=r"1 entries \(of \d+\)|entries \(of"):
            call()


def test_indefinite(pair: tuple[Block, Tensor]):
    block = spoiled(pair[0], lambda t: t.neg_())
    if isinstance(block, KroneckerSum):
        return  # the other term may outweigh it
    if "A_rows" in block.factors:
        return  # whatever the rows, their second moment is not
    for call in (block.inverse, block.logdet, block.sample, lambda: block.power(0.5)):
        with pytest.raises(ValueError, match="is indefinite"):
            call()


def test_singular(pair: tuple[Block, Tensor]):
    def drop(t: Tensor) -> None:
        """Zero the first row and column, or entry."""
        square = t.dim() > 1 and t.shape[-1] == t.shape[-2]
        (t[..., 0, :] if square else t.view(-1)[:1]).zero_()
        if square:
            t[..., :, 0] = 0

    block = spoiled(pair[0], drop)
    if isinstance(block, KroneckerSum):
        return
    for call in (block.inverse, block.logdet, block.sample):
        with pytest.raises(ValueError, match="singular: its smallest eigenvalue is 0"):
            call()
    damped = matrix(block.inverse(DELTA))
    assert damped.isfinite().all()
    close(
        damped @ (matrix(block) + DELTA * torch.eye(block.dim).double()), torch.eye(block.dim).double()
    )


def test_vectors_that_count(pair: tuple[Block, Tensor]):
    """Integer vectors give products with digits."""
    block, M = pair
    v = torch.arange(block.dim)
    close(flat(block.matvec(*parts(block, v))), M @ v.double())


def test_empty_batches(pair: tuple[Block, Tensor]):
    block, _ = pair
    found = block.matvec(*parts(block, torch.zeros(0, 2, block.dim).double()))
    found = (found,) if isinstance(found, Tensor) else found
    assert [t.shape for t in found] == [(0, 2, *s) for s in block.shapes]


def test_only_numbers_scale(pair: tuple[Block, Tensor]):
    block, M = pair
    close(matrix(block * torch.tensor(2.0)), 2 * M)
    close(matrix(block / 2), M / 2)
    close(matrix(sum([block, block])), 2 * M)
    for wrong in (torch.ones(3), "2"):
        with pytest.raises(TypeError):
            block * wrong


def test_a_missing_gradient(pair: tuple[Block, Tensor]):
    block, _ = pair
    with pytest.raises(TypeError, match="got NoneType"):
        block.matvec(*[None] * len(block.shapes))


def test_results_share_no_memory(pair: tuple[Block, Tensor]):
    block, M = pair
    for t in (block.to_dense(), flat(block.diagonal())):
        t.add_(1)
    close(matrix(block), M)
    (block.diagonal() if len(block.shapes) == 1 else block.diagonal()[0]).add_(1)
    close(matrix(block), M)
    for t in block.state_dict().values():
        if isinstance(t, Tensor):
            t.zero_()
    close(matrix(block), M)


def test_numbers_as_damping(pair: tuple[Block, Tensor]):
    block, _ = pair
    expected = matrix(block.inverse(DELTA))
    close(matrix(block.inverse(torch.tensor(DELTA, dtype=torch.float64))), expected)
    close(matrix(block.inverse(DELTA, method="exact")), expected)
    with pytest.raises(ValueError, match="method='lu'; expected one of"):
        block.inverse(DELTA, method="lu")


def test_the_inverse_of_an_inverse():
    """An inverse keeps its eigenvalues: small ones are not taken for rounding."""
    x, d = torch.randn(20, 40), 1e-6
    D = DenseBlock(x.T @ x / 40)
    twice = D.inverse(d).inverse(d)  # 1 / (1 / (s + d) + d), nearly s
    assert abs(float(twice.norm() / D.norm()) - 1) < 1e-3
    assert D.inverse(d).sample().isfinite().all()


@pytest.mark.parametrize("wide", ["B", "A"])
def test_factors_of_different_types(wide: str):
    B, A = psd(3), psd(4)
    low = {"B": B.float(), "A": A.float()} | {wide: {"B": B, "A": A}[wide]}
    K, M = Kronecker(**low), torch.kron(B, A)
    assert K.dtype == torch.float64 and K.to_dense().dtype == torch.float64
    v = torch.randn(3, 4).double()
    for block in (K.inverse(DELTA), K.inverse(DELTA).to(dtype=torch.float32)):
        expected = torch.linalg.solve(M + DELTA * torch.eye(12).double(), v.flatten())
        close(block.matvec(v).flatten(), expected, 1e-3, 1e-3)
        close(flat(block.diagonal()).double().sum(), block.trace().double(), 1e-3, 1e-3)
    close(K.eigenvalues(), torch.linalg.eigvalsh(M), 1e-4, 1e-4)


def test_products_are_computed_in_the_wider_type():
    block, v = Kronecker(psd(3), psd(4)), torch.randn(3, 4)
    close(block.matvec(v), block.matvec(v.double()).float(), 1e-7, 1e-7)


def test_range_of_low_precision():
    for c in (300.0, 1e-4):
        K = Kronecker(c * torch.eye(2, dtype=torch.float16), c * torch.eye(2, dtype=torch.float16))
        close(K.norm().double(), torch.tensor(2.0 * c**2).double(), 1e-2, 0.0)
        close(K.trace().double(), torch.tensor(4.0 * c**2).double(), 1e-2, 0.0)
    tiny = Kronecker(1e-25 * torch.eye(2), 1e12 * torch.eye(2))
    close(tiny.norm(), torch.tensor(2e-13), 1e-5, 0.0)
    with pytest.raises(ValueError, match="is singular"):
        Kronecker(torch.zeros(2, 2), torch.zeros(2, 2)).logdet(1e-50)
    eigen = Kronecker(torch.eye(40), torch.eye(40)).eigh().to(dtype=torch.bfloat16)
    close(eigen.logdet(1.0), torch.tensor(1600 * 0.6931472), 1e-5, 0.0)


@pytest.mark.parametrize("size, good", [(1e-7, True), (1e-3, False)])
def test_how_symmetric_a_factor_has_to_be(size: float, good: bool):
    A = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    A[0, 1] += size
    if good:
        found = Kronecker(torch.eye(1), A).power(1.0).to_dense()
        close(found, (A + A.T) / 2, 1e-6, 1e-6)
        close(found, found.T, 0.0, 1e-7)
    else:
        with pytest.raises(ValueError, match="factor A is not symmetric"):
            Kronecker(torch.eye(1), A).eigh()


def test_how_indefinite_a_factor_may_be():
    for lowest, good in ((-1e-7, True), (-1e-2, False)):
        K = Kronecker(torch.eye(1), torch.diag(torch.tensor([1.0, lowest])))
        if good:
            assert float(K.eigenvalues()[0]) == 0
        else:
            with pytest.raises(ValueError, match="factor A is indefinite"):
                K.eigenvalues()
    with pytest.raises(ValueError, match="is indefinite"):
        DiagonalBlock(torch.tensor([1.0, -1e-2])).eigenvalues()


def test_rounding_is_no_rank():
    torch.manual_seed(0)
    for d, r in ((3, 2), (20, 19), (60, 10)):
        x = torch.randn(r, d)
        K = Kronecker(torch.eye(2), x.T @ x)
        for method in ("exact", "factored", "cholesky"):
            with pytest.raises(ValueError, match=r"singular|no Cholesky"):
                K.inverse(method=method)


def test_layouts_that_do_not_add_up():
    B, A = psd(3), psd(3)
    for other in (Kronecker(B, A, Axes("i o -> 1 o i")), Kronecker(B, A, joint=True)):
        for what in (Kronecker.__add__, Kronecker.inner, partial(Kronecker.lerp, weight=0.1)):
            with pytest.raises(ValueError, match="one shape and layout"):
                what(Kronecker(B, A), other)


def test_moving_averages():
    K, L = Kronecker(psd(3), psd(4)), Kronecker(psd(3), psd(4))
    M = K.lerp(L, 0.25)
    close(M.B, 0.75 * K.B + 0.25 * L.B)
    close(M.A, 0.75 * K.A + 0.25 * L.A)


def test_low_precision_sums_are_formed_in_single():
    torch.manual_seed(0)
    block, _ = tied()
    low = block.to(dtype=torch.bfloat16)
    expected = low.to(dtype=torch.float64).eigenvalues()
    assert (low.eigenvalues() - expected).abs().max() < 1e-4 * expected.max()
