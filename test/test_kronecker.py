"""Kronecker products that act on a parameter's axes, against `torch.kron`."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from curvature import (
    Axes,
    DenseBlock,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    block_from_state_dict,
)

K2D = (("x", 2), ("y", 3))


@dataclass
class Layout:
    """A parameter's layout.

    Attributes:
        axes: What is tested.
        shape: Shape of the parameter.
        sizes: g, o, i.
        to_matrix: The same map by hand, `[*shape]` to `[g, o, i]`.
    """

    axes: Axes
    shape: tuple[int, ...]
    sizes: tuple[int, int, int]
    to_matrix: Callable[[Tensor], Tensor]


LAYOUTS = {
    "linear": Layout(Axes(), (3, 4), (1, 3, 4), lambda w: w[None]),
    "one output": Layout(Axes(), (1, 4), (1, 1, 4), lambda w: w[None]),
    "bias": Layout(Axes("o -> 1 o 1"), (5,), (1, 5, 1), lambda w: w[None, :, None]),
    "grouped bias": Layout(
        Axes("(g o) -> g o 1", (("g", 2),)), (6,), (2, 3, 1), lambda w: w.view(2, 3, 1)
    ),
    "embedding": Layout(Axes("i o -> 1 o i"), (5, 3), (1, 3, 5), lambda w: w.T[None]),
    "conv": Layout(
        Axes("(g o) i x y -> g o (i x y)", (("g", 1), *K2D)),
        (4, 2, 2, 3),
        (1, 4, 12),
        lambda w: w.reshape(1, 4, 12),
    ),
    "grouped conv": Layout(
        Axes("(g o) i x y -> g o (i x y)", (("g", 3), *K2D)),
        (6, 2, 2, 3),
        (3, 2, 12),
        lambda w: w.reshape(3, 2, 12),
    ),
    "conv transpose": Layout(
        Axes("(g i) o x y -> g o (i x y)", (("g", 1), *K2D)),
        (4, 5, 2, 3),
        (1, 5, 24),
        lambda w: w.transpose(0, 1).reshape(1, 5, 24),
    ),
    "grouped conv transpose": Layout(
        Axes("(g i) o x -> g o (i x)", (("g", 2), ("x", 3))),
        (4, 5, 3),
        (2, 5, 6),
        lambda w: w.reshape(2, 2, 5, 3).transpose(1, 2).reshape(2, 5, 6),
    ),
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_kind = pytest.mark.parametrize("diagonal", ["", "A", "B", "AB"])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def factor(groups: int, size: int, diagonal: bool) -> Tensor:
    """A random symmetric matrix per group, or its diagonal; no group axis for one group."""
    x = torch.randn(groups, size, size).double()
    x = x.diagonal(dim1=1, dim2=2) if diagonal else x + x.mT
    return x if groups > 1 else x[0]


def definite(groups: int, size: int, diagonal: bool) -> Tensor:
    """The same, positive definite."""
    x = factor(groups, size, diagonal)
    return x.abs() + 0.1 if diagonal else x @ x.mT + 0.1 * torch.eye(size).double()


def build(name: str, diagonal: str = "", joint: bool = False) -> Kronecker:
    torch.manual_seed(0)
    layout = LAYOUTS[name]
    g, o, i = layout.sizes
    B, A = factor(g, o, "B" in diagonal), factor(g, i + joint, "A" in diagonal)
    return Kronecker(B, A, layout.axes, g, joint)


def blocks(K: Kronecker) -> list[Tensor]:
    """`B (x) A` of each group."""
    grouped = [f if K.groups > 1 else f[None] for f in K]
    B, A = (f.diag_embed() if f.dim() == 2 else f for f in grouped)
    return [torch.kron(*pair) for pair in zip(B, A, strict=True)]


def dense(name: str, K: Kronecker) -> Tensor:
    """The block over the parameter's own order."""
    layout = LAYOUTS[name]
    index = torch.arange(torch.Size(layout.shape).numel()).view(layout.shape)
    place = layout.to_matrix(index).flatten()
    out = torch.zeros(len(place), len(place)).double()
    out[place[:, None], place] = torch.block_diag(*blocks(K))
    return out


@every_layout
def test_axes(name: str):
    layout = LAYOUTS[name]
    for lead in ((), (2,), (2, 3)):
        w = torch.randn(*lead, *layout.shape)
        m = layout.axes.to_matrix(w)
        assert m.shape == (*lead, *layout.sizes)
        assert torch.equal(layout.axes.to_parameter(m), w)
    assert torch.equal(layout.axes.to_matrix(w)[1, 2], layout.to_matrix(w[1, 2]))


@every_kind
@every_layout
def test_dense_block(name: str, diagonal: str):
    K = build(name, diagonal)
    expected = dense(name, K)
    close(K.to_dense(), expected)
    close(K.trace(), expected.trace())
    B, A = K
    assert B is K.B and A is K.A


@every_kind
@every_layout
def test_product_with_a_vector(name: str, diagonal: str):
    K, shape = build(name, diagonal), LAYOUTS[name].shape
    expected = dense(name, K)
    for lead in ((), (4,), (2, 3), (0,)):
        w = torch.randn(*lead, *shape).double()
        product = K.matvec(w)
        assert product.shape == w.shape
        close(product, (w.reshape(*lead, len(expected)) @ expected).view_as(w))


@pytest.mark.parametrize("name", ["linear", "one output", "conv", "grouped conv", "conv transpose"])
@every_kind
def test_joint_bias(name: str, diagonal: str):
    """The bias is the last column of the matrix form `[(g o), i + 1]`."""
    K, layout = build(name, diagonal, joint=True), LAYOUTS[name]
    g, o, i = layout.sizes
    expected = torch.block_diag(*blocks(K))
    close(K.to_dense(), expected)
    close(K.trace(), expected.trace())
    assert len(expected) == g * o * (i + 1)

    def flat(w: Tensor, b: Tensor) -> Tensor:
        rows = zip(w.reshape(-1, *layout.shape), b.reshape(-1, g, o, 1), strict=True)
        return torch.stack([torch.cat([layout.to_matrix(w), b], dim=2).flatten() for w, b in rows])

    for lead in ((), (4,), (2, 3)):
        w, b = torch.randn(*lead, *layout.shape).double(), torch.randn(*lead, g * o).double()
        product = K.matvec(w, b)
        assert [t.shape for t in product] == [w.shape, b.shape]
        close(flat(*product), flat(w, b) @ expected)


def test_separate_and_joint_blocks_agree_on_the_weight():
    torch.manual_seed(0)
    B, A = factor(1, 3, False), factor(1, 5, False)
    joint, weight = Kronecker(B, A, joint=True), Kronecker(B, A[:-1, :-1])
    w = torch.randn(3, 4).double()
    close(joint.matvec(w, torch.zeros(3).double())[0], weight.matvec(w))
    close(joint.to_dense().view(3, 5, 3, 5)[:, :4, :, :4].reshape(12, 12), weight.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_data_type_is_kept(dtype: torch.dtype):
    K = Kronecker(torch.eye(3, dtype=dtype), torch.ones(2, dtype=dtype))
    assert K.to_dense().dtype == K.matvec(torch.ones(3, 2, dtype=dtype)).dtype == dtype
    assert K.trace().dtype == K.norm().dtype == torch.float32  # sums leave the range of low precision


def test_sum_of_two_roles():
    """An embedding `[V, d]` (diagonal A) tied to a head `[V, d]` (dense)."""
    torch.manual_seed(0)
    V, d = 5, 3
    embedding = Kronecker(factor(1, d, False), factor(1, V, True), Axes("i o -> 1 o i"))
    head = Kronecker(factor(1, V, False), factor(1, d, False))
    K = KroneckerSum((embedding, head))
    expected = torch.kron(embedding.A.diag(), embedding.B) + torch.kron(head.B, head.A)
    close(K.to_dense(), expected)
    close(K.trace(), expected.trace())
    w = torch.randn(2, 4, V, d).double()
    close(K.matvec(w), (w.flatten(2) @ expected).view_as(w))
    assert tuple(K) == K.terms == (embedding, head)


@pytest.mark.parametrize(
    "B, A, groups, message",
    [
        ((2, 3), (4, 4), 1, "factor B has shape (2, 3)"),
        ((3, 3), (4, 2), 1, "factor A has shape (4, 2)"),
        ((3, 3), (2, 4, 4), 1, "factor A has shape (2, 4, 4)"),
        ((), (4, 4), 1, "factor B has shape ()"),
        ((3, 3), (4, 4), 2, "2 of them"),
        ((2, 3, 3), (3, 4, 4), 2, "factor A has shape (3, 4, 4)"),
        ((2, 3, 4), (2, 4, 4), 2, "factor B has shape (2, 3, 4)"),
        ((2,), (2, 4, 4), 2, "factor B has shape (2,)"),
    ],
)
def test_wrong_shapes(B: tuple, A: tuple, groups: int, message: str):
    with pytest.raises(ValueError) as error:
        Kronecker(torch.zeros(B), torch.zeros(A), groups=groups)
    assert message in str(error.value)


def test_wrong_arguments_of_a_product():
    B, A = torch.eye(3), torch.eye(4)
    with pytest.raises(ValueError, match=r"one tensor of shape \(3, 4\), got 2 tensors"):
        Kronecker(B, A).matvec(torch.ones(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(weight, bias\) of shape \(3, 3\), \(3,\), got 1 tensors"):
        Kronecker(B, A, joint=True).matvec(torch.ones(3, 3))
    for shape in ((4, 3), (3, 5), (4,)):
        with pytest.raises(ValueError, match="behind any batch axes"):
            Kronecker(B, A).matvec(torch.ones(shape))


def test_factors_need_not_be_symmetric():
    torch.manual_seed(0)
    B, A = torch.randn(3, 3).double(), torch.randn(4, 4).double()
    K, V = Kronecker(B, A), torch.randn(2, 3, 4).double()
    dense = torch.kron(B, A)
    close(K.to_dense(), dense)
    close(K.matvec(V), (V.flatten(1) @ dense.T).view_as(V))
    close(K.transpose().to_dense(), dense.T)
    with pytest.raises(ValueError, match=r"factor B is not symmetric: entries differ .* by up to"):
        K.eigh()


def test_transpose_of_diagonals():
    K = Kronecker(torch.rand(2, 3), torch.rand(2, 4), Axes("(g o) i -> g o i", (("g", 2),)), groups=2)
    close(K.transpose().to_dense(), K.to_dense())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("method", ["factored", "cholesky"])
def test_factored_damping(method: str, diagonal: bool, groups: int):
    torch.manual_seed(0)
    B, A = definite(groups, 3, False), 5 * definite(groups, 4, diagonal)
    axes = Axes("(g o) i -> g o i", (("g", groups),))
    found = Kronecker(B, A, axes, groups).inverse(0.09, method).to_dense()
    blocks = []
    for b, a in zip(B.reshape(groups, 3, 3), A.reshape(groups, 4, -1), strict=True):
        a = a.flatten().diag() if diagonal else a
        pi = (a.trace() * 3 / (b.trace() * 4)).sqrt()
        b = b + 0.3 / pi * torch.eye(3).double()
        a = a + 0.3 * pi * torch.eye(4).double()
        blocks.append(torch.kron(torch.linalg.inv(b), torch.linalg.inv(a)))
    close(found, torch.block_diag(*blocks))


def test_methods_agree_without_damping():
    torch.manual_seed(0)
    K = Kronecker(definite(1, 3, False), definite(1, 4, False))
    expected = torch.linalg.inv(K.to_dense())
    for method in ("exact", "factored", "cholesky"):
        close(K.inverse(method=method).to_dense(), expected)
    with pytest.raises(ValueError, match="method='lu'; expected one of"):
        K.inverse(method="lu")


def test_a_zero_factor_can_be_damped():
    K = Kronecker(torch.zeros(2, 2), torch.eye(3))
    for method in ("exact", "factored", "cholesky"):
        assert K.inverse(1.0, method).to_dense().isfinite().all()


def test_singular_factors_are_named():
    K = Kronecker(torch.eye(2), torch.ones(3, 3))
    for method in ("exact", "factored"):
        with pytest.raises(ValueError, match="factor A: the matrix is singular"):
            K.inverse(method=method)
    with pytest.raises(ValueError, match="factor A has no Cholesky decomposition"):
        Kronecker(torch.eye(2), -torch.eye(3)).inverse(0.1, method="cholesky")


def test_a_small_rank_deficient_factor_is_found():
    """Rounding noise is not taken for eigenvalues."""
    torch.manual_seed(0)
    x = torch.randn(10, 40)
    with pytest.raises(ValueError, match="factor A: the matrix is singular"):
        Kronecker(torch.eye(2), x.T @ x).inverse()


@pytest.mark.parametrize("name", ["eigh", "eigvalsh", "cholesky_ex"])
def test_retry_in_double_precision(name: str, monkeypatch: pytest.MonkeyPatch):
    original, seen = getattr(torch.linalg, name), []

    def fails_in_single(M: Tensor):
        seen.append(M.dtype)
        if M.dtype != torch.float64:
            if name == "cholesky_ex":
                return M, torch.ones(M.shape[:-2], dtype=torch.int32)
            raise torch.linalg.LinAlgError("did not converge")
        return original(M)

    monkeypatch.setattr(torch.linalg, name, fails_in_single)
    K = Kronecker(2 * torch.eye(2), 3 * torch.eye(3))
    if name == "eigvalsh":
        close(K.eigenvalues(), torch.full((6,), 6.0))
    else:
        inverse = K.inverse(1.0, "exact" if name == "eigh" else "cholesky")
        assert inverse.dtype == torch.float32
    assert seen == [torch.float32, torch.float64] * 2


def test_no_convergence_at_all(monkeypatch: pytest.MonkeyPatch):
    def fails(M: Tensor):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(ValueError, match="factor B: the eigendecomposition did not converge"):
        Kronecker(torch.eye(2), torch.eye(3)).eigh()


def test_inner_product():
    torch.manual_seed(0)
    for diagonal in (False, True):
        K = Kronecker(factor(2, 3, False), factor(2, 4, False), Axes("(g o) i -> g o i", (("g", 2),)), 2)
        L = Kronecker(factor(2, 3, False), factor(2, 4, diagonal), K.axes, 2)
        close(K.inner(L), (K.to_dense() * L.to_dense()).sum())
    with pytest.raises(ValueError, match="inner needs two blocks of one shape and layout"):
        K.inner(Kronecker(torch.eye(3), torch.eye(4)))


def test_batches_are_weighted_by_their_rows():
    torch.manual_seed(0)
    b, a = torch.randn(7, 3).double(), torch.randn(7, 4).double()
    parts = [
        Kronecker(b[k].T @ b[k], a[k].T @ a[k] / len(a[k]), rows=len(a[k]))
        for k in ([0, 1], [2, 3, 4, 5, 6])
    ]
    total = parts[0] + parts[1]
    close(total.B, b.T @ b)
    close(total.A, a.T @ a / 7)
    assert total.rows == 7
    with pytest.raises(ValueError, match=r"\+ needs two blocks of one shape and layout"):
        total + Kronecker(torch.eye(3), torch.eye(5))
    with pytest.raises(ValueError, match=r"\+ needs two blocks of one shape and layout"):
        total + Kronecker(torch.eye(3), torch.ones(4))


def test_eigenvalues_of_different_bases_do_not_add_up():
    K = Kronecker(torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="a sum needs equal eigenbases"):
        K.eigh() + Kronecker(torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 3.0]])).eigh()


@pytest.mark.parametrize(
    "Q_B, Q_A, values, groups, message",
    [
        ((3, 3), (4, 4), (3, 4), 1, "values have shape (3, 4); expected [1, o, i]"),
        ((3, 3), (4, 4), (1, 3, 4), 2, "expected [2, o, i]"),
        ((3, 2), (4, 4), (1, 3, 4), 1, "Q_B has shape (3, 2); expected (3, 3)"),
        ((3, 3), (3, 3), (1, 3, 4), 1, "Q_A has shape (3, 3); expected (4, 4)"),
        ((2, 3, 3), (4, 4), (2, 3, 4), 2, "Q_A has shape (4, 4); expected (2, 4, 4)"),
    ],
)
def test_wrong_shapes_of_an_eigenform(Q_B, Q_A, values, groups, message: str):
    with pytest.raises(ValueError) as error:
        KroneckerEigen(torch.zeros(Q_B), torch.zeros(Q_A), torch.zeros(values), groups=groups)
    assert message in str(error.value)


def test_a_large_sum_has_no_inverse(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("curvature.block.MAX_DENSE", 5)
    K = KroneckerSum((Kronecker(torch.eye(2), torch.eye(3)), Kronecker(torch.eye(2), torch.eye(3))))
    close(K.matvec(torch.ones(2, 3)), 2 * torch.ones(2, 3))
    for call in (K.inverse, K.eigenvalues, K.norm, K.logdet):
        with pytest.raises(ValueError, match="needs the dense matrix of 6 x 6 entries, more than"):
            call()


def test_wrong_terms_of_a_sum():
    K = Kronecker(torch.eye(2), torch.eye(3))
    for terms in ((), (K, Kronecker(torch.eye(3), torch.eye(2))), (Kronecker(K.B, K.A, joint=True),)):
        with pytest.raises(ValueError, match="expected Kronecker products of one parameter"):
            KroneckerSum(terms)
    with pytest.raises(ValueError, match="sums of equally many terms"):
        KroneckerSum((K, K)) + KroneckerSum((K,))


def test_unknown_state():
    with pytest.raises(ValueError, match="kind='Matrix'; expected one of"):
        block_from_state_dict({"kind": "Matrix"})


def test_dense_blocks_of_other_shapes():
    with pytest.raises(ValueError, match="expected square, with as many rows as"):
        DenseBlock(torch.eye(3), (2, 2))
    with pytest.raises(ValueError, match=r"blocks of parameters of one shape, got \(3,\) and \(4,\)"):
        DenseBlock(torch.eye(3)) + DenseBlock(torch.eye(4))
