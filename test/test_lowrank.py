"""Low-rank blocks against dense matrices formed here from explicit columns."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curvature import (
    BlockDiagonalOperator,
    Centered,
    Concatenated,
    DenseBlock,
    DenseFactor,
    LowRank,
    Mixed,
    Shifted,
    Stacked,
    block_from_state_dict,
    krylov,
    noise_damping,
)

DELTA = 0.3
N = 4


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tall() -> Tensor:
    return randn(30, 8)


def wide() -> Tensor:
    return randn(6, 12)


def square() -> Tensor:
    return randn(8, 8)


def deficient() -> Tensor:
    """Rank 3 of 8."""
    return randn(30, 3) @ randn(3, 8)


def deficient_wide() -> Tensor:
    return randn(9, 3) @ randn(3, 12)


def duplicated() -> Tensor:
    half = randn(30, 4)
    return torch.cat([half, half], dim=1)


def multiple() -> Tensor:
    """Every non-zero eigenvalue four times."""
    return torch.block_diag(*[randn(2, 3)] * 4)[:, :12]


def near() -> Tensor:
    """Eigenvalues that differ by 1e-9."""
    Q = torch.linalg.qr(randn(30, 8)).Q
    return Q * (1 + 1e-9 * torch.arange(8)) @ torch.linalg.qr(randn(8, 8)).Q


def zero() -> Tensor:
    return torch.zeros(30, 8, dtype=torch.float64)


MAKE: dict[str, Callable[[], Tensor]] = {
    f.__name__: f
    for f in (tall, wide, square, deficient, deficient_wide, duplicated, multiple, near, zero)
}


def cut(P: int) -> list[torch.Size]:
    """Shapes of parameters with P entries in all."""
    first = [torch.Size([2, P // 4]), torch.Size([1])]
    return [*first, torch.Size([P - 2 * (P // 4) - 1])]


def factor(V: Tensor, many: bool = True) -> Stacked | DenseFactor:
    """V's columns, over one parameter or several."""
    if not many:
        return DenseFactor(V.T.clone())
    shapes = cut(len(V))
    pieces = V.split([s.numel() for s in shapes])
    return Stacked(
        [DenseFactor(t.T.reshape(-1, *s).clone()) for t, s in zip(pieces, shapes, strict=True)]
    )


def parts(block: LowRank, flat: Tensor) -> tuple[Tensor, ...]:
    """Parameter-shaped tensors of flat vectors `[..., P]`."""
    pieces = flat.split([s.numel() for s in block.shapes], dim=-1)
    return tuple(t.reshape(*flat.shape[:-1], *s) for t, s in zip(pieces, block.shapes, strict=True))


def flat(value: Tensor | tuple[Tensor, ...], lead: int = 0) -> Tensor:
    value = (value,) if isinstance(value, Tensor) else value
    return torch.cat([t.flatten(lead) for t in value], dim=-1)


def matrix(block: LowRank | Shifted) -> Tensor:
    return flat(block.matvec(*parts(block, torch.eye(block.dim, dtype=torch.float64))), 1).T


def explicit(vectors: Mixed) -> Tensor:
    """Columns `[P, K]`."""
    return flat(vectors.explicit(), 1).T


def function(M: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    values, vectors = torch.linalg.eigh(M)
    return vectors @ f(values.clamp(min=0)).diag() @ vectors.T


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def reload(block: LowRank | Shifted) -> LowRank | Shifted:
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    return block_from_state_dict(torch.load(file))


class Case:
    """A block with data and gradients, and the dense matrices it stands for."""

    def __init__(self, V: Tensor, many: bool = True):
        q = V.shape[1]
        self.V, self.M, self.S = V, V @ V.T, randn(len(V), N)
        self.owner = torch.arange(q) % N
        self.block = LowRank(factor(V, many), self.owner, N, factor(self.S, many))
        values, vectors = torch.linalg.eigh(self.M)
        keep = values > 1e-12 * values[-1]
        self.values, self.vectors = values[keep].flip(0), vectors[:, keep].flip(1)

    @property
    def rank(self) -> int:
        return len(self.values)


@pytest.fixture(params=MAKE)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return Case(MAKE[request.param]())


@pytest.fixture
def one() -> Case:
    torch.manual_seed(0)
    return Case(tall())


# ------------------------------------------------------------------ eigenpairs


RANKS = {"deficient": 3, "deficient_wide": 3, "duplicated": 4, "multiple": 8, "zero": 0, "wide": 6}


@pytest.mark.parametrize("name", MAKE)
def test_ranks(name: str):
    torch.manual_seed(0)
    V = MAKE[name]()
    assert len(LowRank(factor(V)).eigvalsh()) == RANKS.get(name, 8)


def test_eigenvalues(case: Case):
    close(case.block.eigvalsh(), case.values)
    close(case.block.eigenvalues(), torch.linalg.eigvalsh(case.M).clamp(min=0))
    assert len(case.block.spectrum()) == len(case.V)


def test_eigenpairs(case: Case):
    pairs = case.block.eigh()
    E, K = explicit(pairs.vectors), case.rank
    close(pairs.values, case.values)
    close(E.T @ E, torch.eye(K).double())
    close(case.M @ E, E * case.values)
    close(E @ E.T, case.vectors @ case.vectors.T)
    U = pairs.coefficients
    close(U.T @ U, torch.eye(K).double())
    close(case.V.T @ case.V @ U, U * case.values)


def test_eigenvectors_are_implicit(case: Case):
    """Products agree with the explicit columns, and need none of them."""
    E = case.block.eigenvectors()
    columns, c, w = explicit(E), randn(3, case.rank), randn(5, len(case.V))
    close(flat(E.apply(c), 1), c @ columns.T)
    close(E.project(*parts(case.block, w)), w @ columns)
    assert [t.shape for t in E.explicit()] == [(case.rank, *s) for s in case.block.shapes]
    # numbers of V, and the coefficients: no column is stored
    assert E.nbytes == case.block.factor.nbytes + 8 * case.V.shape[1] * case.rank


@pytest.mark.parametrize("k", [1, 2, 5, 50])
def test_largest_eigenpairs(case: Case, k: int):
    """Projectors onto groups of equal eigenvalues agree where the k-th group is complete."""
    pairs = case.block.eigh(k)
    E = explicit(pairs.vectors)
    close(pairs.values, case.values[:k])
    assert len(pairs) == min(k, case.rank)
    close(E.T @ E, torch.eye(len(pairs)).double())
    close(case.M @ E, E * case.values[:k])
    if len(pairs) == case.rank or case.values[k - 1] - case.values[k] > 1e-3:
        close(E @ E.T, case.vectors[:, :k] @ case.vectors[:, :k].T)


def test_criteria(one: Case):
    wanted = one.values[3]
    for criterion in (
        lambda values: values >= wanted - 1e-9,
        lambda values: [3, 0, 2, 1],
        lambda values: torch.tensor([0, 1, 2, 3], dtype=torch.int32),
    ):
        close(one.block.eigh(criterion=criterion).values, one.values[:4])
    pairs = one.block.eigh(criterion=lambda values: values.argmin()[None])
    close(pairs.values, one.values[-1:])
    close(one.M @ explicit(pairs.vectors), explicit(pairs.vectors) * one.values[-1])
    for nothing in (lambda values: values < 0, lambda values: []):
        assert len(one.block.eigh(criterion=nothing)) == 0
    close(
        one.block.eigenvectors(criterion=lambda values: [0]).weights, one.block.eigenvectors(1).weights
    )


def test_nothing_is_computed_twice(one: Case, monkeypatch: pytest.MonkeyPatch):
    calls = []
    for module, name in (
        (torch.linalg, "eigh"),
        (torch.linalg, "eigvalsh"),
        (type(one.block.factor), "gram_and"),
    ):
        kept = getattr(module, name)
        wrapped = lambda *args, kept=kept, name=name: (calls.append(name), kept(*args))[1]  # noqa: E731
        monkeypatch.setattr(module, name, wrapped)
    block = one.block
    block.eigvalsh(), block.eigvalsh(), block.logdet(DELTA), block.spectrum()
    assert calls == ["gram_and", "eigvalsh"]  # with the gradients
    block.eigh(), block.eigh(3), block.eigvalsh(), block.power(0.5, DELTA), block.sample(DELTA)
    block.trace(), block.norm(), (2 * block).eigh(), block.to("cpu").eigh(), reload(block).eigh()
    assert calls == ["gram_and", "eigvalsh", "eigh"]


def test_the_rank_is_decided_once(one: Case):
    """An eigenvalue at the cut may differ by rounding between the two decompositions."""
    one.block.eigvalsh()
    one.block._found["values"] = one.block._found["values"][:3]
    assert len(one.block.eigh(5)) == len(one.block.eigh()) == len(one.block.eigvalsh()) == 3


def test_the_smaller_matrix_is_decomposed(monkeypatch: pytest.MonkeyPatch):
    sizes = []
    kept = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: (sizes.append(len(M)), kept(M))[1])
    for V in (tall(), wide()):
        LowRank(factor(V)).eigh()
    assert sizes == [8, 6]


def test_results_are_copies(one: Case):
    for t in (one.block.gram(), one.block.eigvalsh(), flat(one.block.diagonal()), *one.block.diagonal()):
        t.zero_()
    close(one.block.gram(), one.V.T @ one.V)
    close(one.block.eigvalsh(), one.values)
    close(flat(one.block.diagonal()), one.M.diagonal())


# ------------------------------------------------------------------ precision


def low_precision(dtype: torch.dtype, rtol: float | None) -> tuple[Tensor, LowRank]:
    """Columns in low precision whose exact counterparts have rank 10 of 60."""
    torch.manual_seed(0)
    V = (randn(500, 10) @ randn(10, 60)).to(dtype)
    block = LowRank(factor(V), rtol=rtol)
    return V, block


def test_float32_needs_its_cut():
    """Eigenvalues that are rounding cost the eigenvectors their orthogonality."""
    gaps = {}
    for rtol in (None, 1e-12):
        _, block = low_precision(torch.float32, rtol)
        E = explicit(block.eigenvectors()).double()
        gaps[rtol] = float((E.T @ E - torch.eye(E.shape[1]).double()).abs().max())
        assert rtol is not None or E.shape == (500, 10)
    assert gaps[None] < 1e-4 < 1e3 * 1e-4 < gaps[1e-12]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_results_in_low_precision(dtype: torch.dtype, error: float):
    V, block = low_precision(dtype, None)
    M = V.double() @ V.double().T
    v = randn(500)
    assert block.dtype == dtype and block.eigvalsh().dtype == torch.float64
    values = torch.linalg.eigvalsh(M).flip(0)[: len(block.eigvalsh())]
    assert (block.eigvalsh() - values).norm() < error * values.norm()
    delta = 0.1 * float(values[0])
    expected = torch.linalg.solve(M + delta * torch.eye(500).double(), v)
    # products are in the vectors' data type if that is wider, and then as accurate
    assert (flat(block.matvec(*parts(block, v))) - M @ v).norm() < 1e-12 * (M @ v).norm()
    for found in (
        flat(block.solve(*parts(block, v), damping=delta)),
        flat(block.inverse(delta).matvec(*parts(block, v))),
    ):
        assert found.dtype == torch.float64
        assert (found - expected).norm() < error * expected.norm()
    low = flat(block.matvec(*parts(block, v.to(dtype))))
    assert low.dtype == dtype and block.sample(delta)[0].dtype == torch.float32


def test_data_types_decide_the_cut():
    V = tall()
    assert LowRank(factor(V)).rtol == 1e-12
    assert LowRank(factor(V), dtype=torch.float32).rtol == 1e-6
    assert LowRank(factor(V.float())).rtol == 1e-6
    assert LowRank(factor(V.half())).rtol == 1e-2
    assert LowRank(factor(V), rtol=0.0).rtol == 0.0
    assert LowRank(factor(V)).to(dtype=torch.float32).rtol == 1e-6
    block = LowRank(factor(V), dtype=torch.float32)
    assert block.eigh().values.dtype == torch.float32
    close(block.eigvalsh().double(), torch.linalg.eigvalsh(V.T @ V).flip(0), rtol=1e-4)


# ------------------------------------------------------------------ what a block can do


def test_products(case: Case):
    close(matrix(case.block), case.M)
    close(case.block.to_dense(), case.M)
    v = randn(2, 3, len(case.V))
    close(flat(case.block.matvec(*parts(case.block, v)), 2), v @ case.M)
    close(case.block.gram(), case.V.T @ case.V)


def test_numbers(case: Case):
    close(case.block.trace(), case.M.trace())
    close(case.block.norm(), case.M.norm())
    close(flat(case.block.diagonal()), case.M.diagonal())
    close(case.block.logdet(DELTA), torch.logdet(case.M + DELTA * torch.eye(len(case.M)).double()))


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5, 1.0, 2.0])
def test_powers(case: Case, exponent: float):
    found = case.block.power(exponent, DELTA)
    expected = function(case.M, lambda values: (values + DELTA) ** exponent)
    eye = torch.eye(len(case.M)).double()
    close(matrix(found), expected)
    close(flat(found.diagonal()), expected.diagonal())
    close(found.trace(), expected.trace())
    close(found.norm(), expected.norm())
    close(found.eigenvalues(), torch.linalg.eigvalsh(expected))
    close(found.logdet(DELTA), torch.logdet(expected + DELTA * eye))
    close(matrix(found.power(-1.0, DELTA)), torch.linalg.inv(expected + DELTA * eye))
    close(matrix(found + 2 * found), 3 * expected)
    close(matrix(reload(found)), expected)
    close(
        matrix(found.replaced(values=2 * found.values)),
        matrix(Shifted(found.vectors, 2 * found.values, found.shift)),
    )
    assert (exponent == 1.0) == torch.allclose(matrix(found), case.M + DELTA * eye)


def test_powers_without_damping(case: Case):
    close(matrix(case.block.power(1.0)), case.M)
    close(matrix(case.block.power(0.5)), function(case.M, Tensor.sqrt), atol=1e-6)
    close(matrix(case.block.power(0.0)), torch.eye(len(case.M)).double())


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("damping", [DELTA, 1e-3])
def test_solutions(case: Case, known: bool, damping: float):
    """By Cholesky decomposition, and by eigenpairs once they are known."""
    v = randn(2, len(case.V))
    if known:
        case.block.eigh()
    expected = torch.linalg.solve(case.M + damping * torch.eye(len(case.M)).double(), v.T).T
    close(flat(case.block.solve(*parts(case.block, v), damping=damping), 1), expected)
    assert ("U" in case.block._found) == known or not case.rank
    close(flat(case.block.inverse(damping).matvec(*parts(case.block, v)), 1), expected)


def test_a_tiny_damping_goes_through_the_eigenpairs():
    torch.manual_seed(0)
    case = Case(deficient())
    v, tiny = randn(30), 1e-14 * float(case.values[0])
    found = flat(case.block.solve(*parts(case.block, v), damping=tiny))
    assert "U" in case.block._found
    outside = v - case.vectors @ (case.vectors.T @ v)
    assert (found - outside / tiny).norm() < 1e-3 * found.norm()


@pytest.mark.parametrize("make", [wide, square])
def test_full_rank_needs_no_damping(make: Callable[[], Tensor]):
    torch.manual_seed(0)
    case = Case(make())
    v = randn(2, len(case.V))
    close(flat(case.block.solve(*parts(case.block, v)), 1), torch.linalg.solve(case.M, v.T).T, 1e-7)
    close(case.block.logdet(), torch.logdet(case.M))
    close(case.block.inverse().trace(), torch.linalg.inv(case.M).trace(), 1e-7)


def test_singular_matrices_need_damping(case: Case):
    if case.rank == len(case.V):
        return
    vectors = parts(case.block, randn(len(case.V)))
    for call in (case.block.inverse, case.block.logdet, case.block.sample):
        with pytest.raises(ValueError, match="singular: its smallest eigenvalue is 0"):
            call()
    with pytest.raises(ValueError, match="singular: its smallest eigenvalue is 0"):
        case.block.solve(*vectors)


def test_samples_are_the_root_times_noise(case: Case):
    generator = torch.Generator().manual_seed(1)
    found = flat(case.block.sample(DELTA, (4,), generator), 1)
    generator.manual_seed(1)
    noise = [torch.randn(4, *s, generator=generator, dtype=torch.float64) for s in case.block.shapes]
    root = function(case.M, lambda values: (values + DELTA) ** -0.5)
    close(found, flat(tuple(noise), 1) @ root)


def test_one_parameter():
    """Results are tensors, not tuples of one."""
    torch.manual_seed(0)
    case = Case(tall(), many=False)
    v = randn(2, 30)
    close(case.block.matvec(v), v @ case.M)
    close(case.block.solve(v, damping=DELTA), case.block.inverse(DELTA).matvec(v))
    close(case.block.diagonal(), case.M.diagonal())
    close(case.block.inverse(DELTA).diagonal(), matrix(case.block.inverse(DELTA)).diagonal())
    assert case.block.matvec(torch.ones(30).int()).dtype == torch.float64
    assert case.block.matvec(torch.zeros(0, 2, 30)).shape == (0, 2, 30)
    assert case.block.solve(torch.zeros(0, 2, 30), damping=DELTA).shape == (0, 2, 30)


def test_copies(one: Case):
    copy = one.block.clone()
    other = one.block.replaced(**{k: 2 * t for k, t in one.block.factors.items()})
    for t in (*one.block.factor.tensors, *one.block.slopes.tensors, one.block.owner):
        t.zero_()
    close(matrix(copy), one.M)
    close(copy.eigh().directional_gradients().mean(0), one.S.mean(1) @ explicit(copy.eigenvectors()))
    assert torch.equal(copy.owner, torch.arange(8) % N)
    close(matrix(other), 4 * one.M)


def test_other_factors():
    """Nothing depends on the columns being explicit."""
    torch.manual_seed(0)
    V, R = tall(), randn(8, 5)
    for made, expected in (
        (Centered(factor(V), 2), V - V.unflatten(1, (2, 4)).mean(2).repeat_interleave(4, 1)),
        (Concatenated([factor(V), factor(2 * V[:, :3])]), torch.cat([V, 2 * V[:, :3]], 1)),
        (Mixed(factor(V), R), V @ R),
    ):
        block = LowRank(made)
        close(block.eigvalsh(), torch.linalg.svdvals(expected)[: len(block.eigvalsh())] ** 2)
        close(matrix(block), expected @ expected.T)
        close(flat(block.diagonal()), (expected @ expected.T).diagonal())
    mixed = Mixed(factor(V), R)
    close(mixed.gram(factor(V)), R.T @ V.T @ V)
    close(factor(V).gram(mixed), V.T @ V @ R)
    close(explicit(mixed.select(torch.tensor([1, 3]))), (V @ R)[:, [1, 3]])
    close(explicit(mixed.scaled(3.0)), 3 * V @ R)


# ------------------------------------------------------------------ data


def test_directional_gradients(case: Case):
    pairs = case.block.eigh()
    close(pairs.directional_gradients(), case.S.T @ explicit(pairs.vectors))
    close(case.block.eigh(2).directional_gradients(), pairs.directional_gradients()[:, :2])
    assert pairs.directional_gradients().equal(pairs.directional_gradients())


def test_directional_curvatures(case: Case):
    """Those of each datum's own matrix, N times its columns' share."""
    pairs = case.block.eigh()
    E, found = explicit(pairs.vectors), pairs.directional_curvatures()
    for n in range(N):
        own = case.V[:, case.owner == n]
        close(found[n], (E.T @ own).square().sum(1) * N)
    close(found.mean(0), case.values)


def test_more_gradients_than_data():
    """A curvature sub-sample keeps the gradients of all data."""
    torch.manual_seed(0)
    V, S = tall(), randn(30, 7)
    pairs = LowRank(factor(V), torch.arange(8) % N, N, factor(S)).eigh()
    E = explicit(pairs.vectors)
    assert pairs.directional_gradients().shape == (7, 8) and pairs.directional_curvatures().shape == (
        4,
        8,
    )
    step = flat(pairs.newton_step(noise_damping(base=DELTA)))
    gamma = S.T @ E
    noise = pairs.values * gamma.var(0) / (7 * gamma.mean(0) ** 2)
    close(step, -E @ (gamma.mean(0) / (pairs.values + DELTA + noise)))


def test_newton_steps(case: Case):
    pairs, g = case.block.eigh(), case.S.mean(1)
    E, K = explicit(pairs.vectors), case.rank
    for damping, delta in (
        (DELTA, DELTA),
        (torch.tensor(DELTA), torch.tensor(DELTA).double()),
        (torch.arange(K) / 8, torch.arange(K).double() / 8),
        (lambda gamma, lam: gamma.square().mean(0) + lam.square().mean(0), None),
    ):
        if delta is None:
            delta = (case.S.T @ E).square().mean(0) + pairs.directional_curvatures().square().mean(0)
        step = pairs.newton_step(damping)
        assert [t.shape for t in step] == list(case.block.shapes)
        close(flat(step), -E @ ((E.T @ g) / (pairs.values + delta)))
    close(flat(pairs.newton_step()), -torch.linalg.pinv(case.M, rtol=1e-12, hermitian=True) @ g)
    endless = torch.full((K,), float("inf"))
    assert not flat(pairs.newton_step(endless)).any()


def test_newton_step_of_the_pseudo_inverse():
    """With gradients in the range of M the step solves the quadratic problem."""
    torch.manual_seed(0)
    V = deficient()
    S = V @ randn(8, N)
    block = LowRank(factor(V), torch.arange(8) % N, N, factor(S))
    step = flat(block.eigh().newton_step())
    close(step, -torch.linalg.pinv(V @ V.T, rtol=1e-10) @ S.mean(1))
    close(V @ V.T @ step, -S.mean(1))


def test_noise_damping():
    gamma = torch.tensor([[1.0, 2.0, -1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    lam = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    found = noise_damping(base=0.5, strength=3.0)(gamma, lam)
    # variance 2, mean 2, N = 2: noise to signal 1/4
    close(found, torch.tensor([0.5 + 3 * 2 / 4, 0.5, float("inf"), 0.5]))
    close(noise_damping(0.5, 0.0)(gamma, lam), torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="over 1 data is not defined"):
        noise_damping()(gamma[:1], lam[:1])
    with pytest.raises(ValueError, match="strength"):
        noise_damping(strength=-1.0)


# ------------------------------------------------------------------ other losses, storage


def test_sums(one: Case):
    """The gradients' mean is the gradient of the sum, and curvatures belong to the same losses."""
    V, S = randn(30, 6), randn(30, 2)
    other = LowRank(factor(V), torch.tensor([0, 1, 1, 0, 0, 1]), 2, factor(S))
    total = one.block + other
    close(matrix(total), one.M + V @ V.T)
    assert total.data == 6 and total.owner.tolist() == [0, 1, 2, 3] * 2 + [4, 5, 5, 4, 4, 5]
    pairs = total.eigh()
    E = explicit(pairs.vectors)
    gamma, lam = pairs.directional_gradients(), pairs.directional_curvatures()
    close(gamma.mean(0), (one.S.mean(1) + S.mean(1)) @ E)
    # a datum's loss is 6 times its share: so is its gradient, and its curvature
    close(gamma[:4], one.S.T @ E * 6 / 4)
    close(gamma[4:], S.T @ E * 6 / 2)
    close(lam[4], 6 * (E.T @ V[:, [0, 3, 4]]).square().sum(1))
    close(lam.mean(0), pairs.values)
    three = sum([one.block, other, one.block])
    close(matrix(three), 2 * one.M + V @ V.T)
    assert three.data == 10 and len(three.factor.parts) == 3
    close(
        three.eigh(1).directional_gradients().mean(0),
        (2 * one.S.mean(1) + S.mean(1)) @ explicit(three.eigenvectors(1)),
    )


def test_sums_with_less(one: Case):
    bare = LowRank(factor(tall()))
    for total in (one.block + bare, bare + one.block):
        assert total.owner is None and total.data is None and total.slopes is None
    with pytest.raises(ValueError, match="blocks of the same parameters, got shapes"):
        one.block + LowRank(factor(wide()))
    with pytest.raises(TypeError):
        one.block + DenseBlock(one.M)


@pytest.mark.parametrize("decomposed", [False, True])
def test_multiples(one: Case, decomposed: bool):
    """The block of 2.5 times the loss, gradients included."""
    if decomposed:
        one.block.eigh()
    double = 2.5 * one.block
    close(matrix(double), 2.5 * one.M)
    pairs = double.eigh()
    E = explicit(pairs.vectors)
    close(pairs.values, 2.5 * one.values)
    close(2.5 * one.M @ E, E * pairs.values)
    close(pairs.directional_gradients(), 2.5 * one.S.T @ E)
    close(pairs.directional_curvatures().mean(0), pairs.values)
    close(flat(pairs.newton_step()), flat(one.block.eigh().newton_step()))
    close(double.gram(), 2.5 * one.V.T @ one.V)
    nothing = one.block * 0
    assert not matrix(nothing).any() and len(nothing.eigh()) == 0
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite number >= 0"):
            one.block * wrong


def test_storage(case: Case):
    again = reload(case.block)
    assert again.shapes == case.block.shapes and again.data == N
    close(matrix(again), case.M)
    close(again.gram(), case.V.T @ case.V)
    old, new = case.block.eigh(), again.eigh()
    close(new.values, old.values)
    close(explicit(new.vectors), explicit(old.vectors))
    close(new.directional_gradients(), old.directional_gradients())
    close(new.directional_curvatures(), old.directional_curvatures())
    close(flat(new.newton_step(DELTA)), flat(old.newton_step(DELTA)))
    close(flat(again.diagonal()), case.M.diagonal())
    close(matrix(again.inverse(DELTA)), matrix(case.block.inverse(DELTA)))
    # what was read is a block like any other
    total = again + case.block
    close(matrix(total), 2 * case.M)
    close(total.eigh(1).directional_curvatures().mean(0), 2 * case.values[:1])
    close(matrix(reload(2 * again)), 2 * case.M)


def test_storage_without_data():
    torch.manual_seed(0)
    V = tall()
    again = reload(LowRank(factor(V.float()), dtype=torch.float32, rtol=0.1))
    assert again.owner is None and again.slopes is None and again.data is None
    assert again.gram_dtype == torch.float32 and again.rtol == 0.1 and again.dtype == torch.float32
    values = torch.linalg.svdvals(V) ** 2
    close(again.eigvalsh().double(), values[values > 0.1 * values[0]], 1e-4)


def test_other_places(one: Case):
    low = one.block.to(dtype=torch.float32)
    assert {t.dtype for t in (*low.factor.tensors, *low.slopes.tensors)} == {torch.float32}
    close(matrix(low), one.M, 1e-5, 1e-5)
    one.block.eigh()
    assert one.block.to("cpu")._found.keys() == one.block._found.keys()
    shifted = one.block.inverse(DELTA).to(dtype=torch.float32)
    assert shifted.dtype == torch.float32
    close(matrix(shifted), torch.linalg.inv(one.M + DELTA * torch.eye(30).double()), 1e-4, 1e-4)


def test_processes(one: Case):
    for block in (one.block, one.block.inverse(DELTA)):
        with pytest.raises(NotImplementedError, match="all_reduce: "):
            block.all_reduce()


# ------------------------------------------------------------------ operators


def parameters(block: LowRank, order: list[int]) -> list[tuple[str, torch.nn.Parameter]]:
    """Named parameters that hold the block."""
    found = []
    for k in order:
        p = torch.nn.Parameter(torch.zeros(block.shapes[k], dtype=torch.float64))
        p.low_rank = block
        found.append((f"p{k}", p))
    return found


def test_operators(one: Case):
    H = BlockDiagonalOperator.of_parameters(parameters(one.block, [0, 1, 2]), "low_rank")
    assert H.names == ("p0", "p1", "p2") and len(H.blocks) == 1
    eye = torch.eye(30).double()
    close(H.to_dense(), one.M)
    close(H.inverse(DELTA).to_dense(), torch.linalg.inv(one.M + DELTA * eye))
    close(H.eigh().power(-0.5, DELTA).to_dense(), function(one.M, lambda s: (s + DELTA) ** -0.5))
    close(H.eigenvalues(), torch.linalg.eigvalsh(one.M))
    close(H.logdet(DELTA), torch.logdet(one.M + DELTA * eye))
    close(H.diagonal(flat=True), one.M.diagonal())
    close((H + 2 * H).to_dense(), 3 * one.M)
    close(BlockDiagonalOperator.from_state_dict(H.state_dict()).to_dense(), one.M)
    with pytest.raises(NotImplementedError, match="all_reduce"):
        H.all_reduce()


def test_operators_check_the_order(one: Case):
    with pytest.raises(ValueError, match=r"in this order; those that hold it come as \{'p2': \(15,\)"):
        BlockDiagonalOperator.of_parameters(parameters(one.block, [2, 0, 1]), "low_rank")
    with pytest.raises(ValueError, match=r"acts on 3 parameter"):
        BlockDiagonalOperator.of_parameters(parameters(one.block, [0, 1]), "low_rank")


def test_operators_over_two_parameters():
    """A bias may come first: the block's own order counts."""
    torch.manual_seed(0)
    V = randn(7, 3)
    rows = [DenseFactor(V[:1].T.reshape(3, 1)), DenseFactor(V[1:].T.reshape(3, 2, 3))]
    block = LowRank(Stacked(rows))
    H = BlockDiagonalOperator.of_parameters(parameters(block, [0, 1]), "low_rank")
    assert H.names == ("p0", "p1")
    close(H.to_dense(), V @ V.T)


def test_other_eigensolvers():
    """Those of scipy, through products alone, and of torch, on the dense matrix, find the same."""
    linalg = pytest.importorskip("scipy.sparse.linalg")
    torch.manual_seed(0)
    case = Case(randn(60, 20) * torch.logspace(0, 1, 20))
    pairs, k = case.block.eigh(5), 5
    E = explicit(pairs.vectors)
    H = BlockDiagonalOperator.of_parameters(parameters(case.block, [0, 1, 2]), "low_rank")
    values, vectors = (torch.as_tensor(t.copy()) for t in linalg.eigsh(H.to_scipy(), k))
    close(pairs.values, values.flip(0))
    close(E @ E.T, vectors @ vectors.T, 1e-6, 1e-8)
    values, vectors = torch.lobpcg(case.M, k, tol=1e-12, niter=200)
    close(pairs.values, values, 1e-8)
    close(E @ E.T, vectors @ vectors.T, 1e-4, 1e-6)


def test_few_of_many_columns(monkeypatch: pytest.MonkeyPatch):
    """Through the block: the cut, the cache, and both routes."""
    monkeypatch.setattr(krylov, "MIN_SIZE", 100)
    full = []
    kept = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: (full.append(len(M)), kept(M))[1])
    torch.manual_seed(0)
    for P, q in ((520, 500), (500, 520)):
        V = randn(P, 6) @ randn(6, q)
        for early in (False, True):
            block = LowRank(factor(V))
            if early:
                block.eigvalsh()
            pairs = block.eigh(10)
            E = explicit(pairs.vectors)
            assert len(pairs) == 6 and block.eigh(3).values.equal(pairs.values[:3])
            close(E.T @ E, torch.eye(6).double())
            close(V @ (V.T @ E), E * pairs.values, atol=1e-6)
            close(block.eigvalsh(), pairs.values)
            # 14 random vectors and the range's 6 directions are all there is
            assert max(full) <= 20
            close(block.eigh().values, pairs.values)
            assert full[-1] == 500
            full.clear()
    # a spectrum on which it gives up
    V = torch.linalg.qr(randn(520, 500)).Q * torch.linspace(1, 2, 500)
    pairs = LowRank(factor(V)).eigh(4)
    assert full[-1] == 500
    close(pairs.values, torch.linspace(1, 2, 500).double().flip(0)[:4] ** 2, 1e-6)


# ------------------------------------------------------------------ wrong use


def test_wrong_arguments():
    V = tall()
    F, owner = factor(V), torch.arange(8) % N
    wrong = [
        (TypeError, "factor is Tensor; expected a curvature.Factor", lambda: LowRank(V)),
        (TypeError, "slopes is Tensor", lambda: LowRank(F, slopes=V)),
        (ValueError, "over different parameters", lambda: LowRank(F, slopes=factor(V, many=False))),
        (ValueError, "expected both", lambda: LowRank(F, owner)),
        (ValueError, "expected both", lambda: LowRank(F, data=N)),
        (ValueError, "expected both", lambda: LowRank(F, owner, 0)),
        (ValueError, r"int64 tensor \[8\]", lambda: LowRank(F, owner[1:], N)),
        (ValueError, r"int64 tensor \[8\]", lambda: LowRank(F, owner.float(), N)),
        (ValueError, r"0, \.\.\., 2", lambda: LowRank(F, owner, 3)),
        (ValueError, "float32 or torch.float64", lambda: LowRank(F, dtype=torch.bfloat16)),
        (ValueError, r"rtol=1; expected a number in \[0, 1\)", lambda: LowRank(F, rtol=1)),
        (ValueError, r"expected \[8, K\]", lambda: Mixed(F, randn(7, 2))),
        (ValueError, "one per eigenvector", lambda: Shifted(LowRank(F).eigenvectors(), randn(7), 1.0)),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()


def test_wrong_questions(one: Case):
    block, bare = one.block, LowRank(factor(one.V))
    pairs = block.eigh()
    wrong = [
        ("k or criterion, not both", lambda: block.eigh(1, lambda values: values > 0)),
        ("k=0; expected an integer >= 1", lambda: block.eigh(0)),
        ("k=2.0; expected an integer >= 1", lambda: block.eigh(2.0)),
        (r"expected a mask \[8\]", lambda: block.eigh(criterion=lambda values: [8])),
        (r"expected a mask \[8\]", lambda: block.eigh(criterion=lambda values: [True])),
        (r"expected a mask \[8\]", lambda: block.eigh(criterion=lambda values: values)),
        ("owner=None. Build it with owner", lambda: bare.eigh().directional_curvatures()),
        ("slopes=None. Build it with slopes", lambda: bare.eigh().directional_gradients()),
        ("slopes=None. Build it with slopes", lambda: bare.eigh().newton_step()),
        (
            r"dampings of shape \(7,\); expected one number, or \[8\]",
            lambda: pairs.newton_step(randn(7)),
        ),
        ("1 of 8 dampings are negative", lambda: pairs.newton_step(torch.arange(8) - 1.0)),
        ("8 of 8 dampings", lambda: pairs.newton_step(lambda g, c: g.mean(0) * float("nan"))),
        ("function returned float", lambda: pairs.newton_step(lambda g, c: 1.0)),
        ("damping=-1.0; expected a finite number >= 0", lambda: pairs.newton_step(-1.0)),
        (r"takes one tensor \[k, \*shape\] per parameter", lambda: pairs.vectors.project(randn(30))),
        (r"takes coefficients \[k, 8\]", lambda: pairs.vectors.apply(randn(8))),
        ("takes 3 tensors of shape .* got 1 tensors", lambda: block.matvec(randn(30))),
        ("method='lu'", lambda: block.inverse(DELTA, method="lu")),
        (
            "needs equal eigenvectors",
            lambda: block.inverse(DELTA) + LowRank(factor(tall())).inverse(DELTA),
        ),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    vectors = parts(block, randn(30))
    for damping in (-1.0, float("nan"), "much"):
        for call in (
            block.inverse,
            block.logdet,
            block.sample,
            lambda d: block.solve(*vectors, damping=d),
        ):
            with pytest.raises(ValueError, match="expected a finite number >= 0"):
                call(damping)


@pytest.mark.parametrize("make", [tall, wide])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(make: Callable[[], Tensor], bad: float):
    V = make()
    V[0, 0] = bad
    block = LowRank(factor(V))
    vectors = parts(block, randn(len(V)))
    for call in (
        *(block.eigvalsh, block.eigh, block.eigenvalues, lambda: block.logdet(DELTA)),
        *(lambda: block.inverse(DELTA), lambda: block.solve(*vectors, damping=DELTA), block.state_dict),
    ):
        with pytest.raises(ValueError, match=r"the Gram matrix has \d+ entries \(of \d+\) that are inf"):
            call()


def test_parameters_that_are_numbers():
    torch.manual_seed(0)
    V = randn(3, 5)
    block = LowRank(Stacked([DenseFactor(V[0]), DenseFactor(V[1:].T)]))
    for lead in ((), (2,), (0, 2)):
        v = randn(*lead, 3)
        number, vector = block.matvec(v[..., 0], v[..., 1:])
        assert number.shape == lead
        close(torch.cat([number[..., None], vector], -1), v @ (V @ V.T))
    found = block.solve(torch.tensor(1.0), torch.ones(2), damping=DELTA)
    assert [t.shape for t in found] == [(), (2,)]
    assert [t.shape for t in block.inverse(DELTA).diagonal()] == [(), (2,)]
