"""What the plots show, read back from the drawing."""

import pytest
import torch

from curvature import BlockDiagonalOperator, DiagonalBlock, Kronecker

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")
plot = pytest.importorskip("curvature.plot")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_spectra_of_all_kinds():
    torch.manual_seed(0)
    x = torch.randn(9, 4).double()
    K = Kronecker(x.T @ x, torch.eye(2).double())
    H = BlockDiagonalOperator({"w": K, "b": DiagonalBlock(torch.rand(3).double() + 1)})
    ax = plot.spectrum({"factor": K.B, "block": K, "model": H, "diagonal": torch.tensor([1.0, 3.0])})
    for line, values in zip(
        ax.lines, (K.eigenvalues()[::2], K.eigenvalues(), H.eigenvalues()), strict=False
    ):
        torch.testing.assert_close(torch.tensor(line.get_ydata()), values.flip(0))
    assert ax.lines[3].get_ydata().tolist() == [3, 1]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "factor",
        "block",
        "model",
        "diagonal",
    ]


def test_rounding_is_not_drawn():
    x = torch.randn(3, 8)
    assert len(plot.spectrum({"A": x.T @ x}).lines[0].get_ydata()) == 3


def test_large_factors_are_pooled():
    A = torch.randn(700, 70)
    ax = plot.factor(A, plt.subplots()[1], size=70)
    found = torch.tensor(ax.images[0].get_array())
    torch.testing.assert_close(found, A.reshape(70, 10, 70).mean(1))
    assert plot.factor(torch.zeros(2, 2), plt.subplots()[1]).images[0].get_clim() == (-1, 1)
    assert (
        plot.factor(torch.tensor([1.0, 2.0]).bfloat16(), plt.subplots()[1]).images[0].get_array()[0, 1]
        == 0
    )


def test_structure_of_a_model():
    blocks = {
        ("w", "b"): Kronecker(torch.eye(2), torch.eye(3), joint=True),
        "c": DiagonalBlock(torch.zeros(1)),
    }
    ax = plot.structure(BlockDiagonalOperator(blocks))
    assert [(p.get_xy(), p.get_width()) for p in ax.patches] == [((0, 0), 6), ((6, 6), 1)]
    assert [t.get_text() for t in ax.texts] == ["w, b", "c"]
    with pytest.raises(TypeError, match="expected an operator or a structured matrix"):
        plot.structure(torch.eye(2))


def test_bad_matrices():
    for bad, message in (
        (torch.ones(2, 3), "expected a square matrix or a diagonal"),
        (-torch.eye(2), "is indefinite"),
        (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "is not symmetric"),
        (torch.full((2, 2), torch.nan), "not a number"),
    ):
        with pytest.raises(ValueError, match=message):
            plot.spectrum({"A": bad})
    with pytest.raises(ValueError, match="not a number"):
        plot.factor(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"got shape \(1, 2, 2\)"):
        plot.factor(torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="at least one matrix"):
        plot.spectrum({})
