"""One contract for every kind of curvature block, against a dense matrix built by hand."""

import io
from collections.abc import Callable

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
