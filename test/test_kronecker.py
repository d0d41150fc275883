"""Kronecker products that act on a parameter's axes, against `torch.kron`."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from curvature import Axes, Kronecker, KroneckerSum

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
    assert (
        K.to_dense().dtype == K.trace().dtype == K.matvec(torch.ones(3, 2, dtype=dtype)).dtype == dtype
    )


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
    with pytest.raises(ValueError, match="takes one tensor; joint=False"):
        Kronecker(B, A).matvec(torch.ones(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"takes \(weight, bias\); joint=True"):
        Kronecker(B, A, joint=True).matvec(torch.ones(3, 3))
    for shape in ((4, 3), (3, 5), (4,)):
        with pytest.raises((ValueError, RuntimeError)):
            Kronecker(B, A).matvec(torch.ones(shape))
