"""Plots of curvature: spectra, factors, block structure. Needs matplotlib (the extra ``plots``).

Each function draws into ``ax`` (by default the current axes of `matplotlib.pyplot`) and returns it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvature.block import Block
from curvature.decomposition import check_finite, eigh, nonnegative, widen
from curvature.operator import BlockDiagonalOperator
from curvature.structured import StructuredMatrix

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes as Plot
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise ImportError("curvature.plot needs matplotlib: pip install 'backpack-ext[plots]'.") from error


def spectrum(
    matrices: Mapping[str, Block | BlockDiagonalOperator | Tensor],
    ax: Plot | None = None,
    cut: float = 1e-7,
) -> Plot:
    """Draw eigenvalues in falling order, one line per matrix.

    Args:
        matrices: By label: blocks, operators, symmetric matrices ``[d, d]`` or diagonals ``[d]``.
        ax: Where to draw.
        cut: Eigenvalues below this fraction of the largest are left out (rounding in float32).

    Raises:
        ValueError: If a matrix is not finite, not symmetric, or indefinite; or if there are none.

    Example:
        >>> _, ax = plt.subplots()
        >>> ax = spectrum({"A": torch.diag(torch.tensor([1.0, 4.0, 2.0]))}, ax)
        >>> [line.get_ydata().tolist() for line in ax.lines]
        [[4.0, 2.0, 1.0]]
    """
    if not matrices:
        raise ValueError("spectrum: expected at least one matrix.")
    ax = plt.gca() if ax is None else ax
    for label, matrix in matrices.items():
        values = _eigenvalues(label, matrix).flip(0).cpu()
        values = values[values > cut * values[0]]
        ax.semilogy(range(1, len(values) + 1), values.numpy(), label=label)
    ax.set(xlabel="index of the eigenvalue", ylabel="eigenvalue")
    ax.legend()
    return ax


def _eigenvalues(label: str, matrix: Block | BlockDiagonalOperator | Tensor) -> Tensor:
    if not isinstance(matrix, Tensor):
        return matrix.eigenvalues()
    name = f"spectrum: {label}"
    if matrix.dim() == 1:
        check_finite(name, matrix)
        return nonnegative(name, widen(matrix), matrix.dtype).sort().values
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(matrix.shape)}; expected a square matrix or a diagonal."
        )
    return eigh(name, matrix, vectors=False)[0]


def factor(matrix: Tensor, ax: Plot | None = None, size: int = 512) -> Plot:
    """Draw a matrix as a heat map; zero is white, the colours end at the 99th percentile.

    Args:
        matrix: ``[r, c]``, or a diagonal ``[d]``.
        ax: Where to draw.
        size: Larger matrices are drawn as the means of tiles, at most this many along an axis.

    Raises:
        ValueError: If the matrix has other than one or two axes, or is not finite.

    Example:
        >>> image = factor(torch.eye(3), plt.subplots()[1]).images[0]
        >>> image.get_array().shape, image.get_clim()
        ((3, 3), (-1.0, 1.0))
    """
    if matrix.dim() not in (1, 2):
        raise ValueError(f"factor: expected a matrix or a diagonal, got shape {tuple(matrix.shape)}.")
    check_finite("factor: the matrix", matrix)
    values = widen(matrix.detach()).cpu()
    values = values.diag() if values.dim() == 1 else values
    if max(values.shape) > size:
        tiles = [min(d, size) for d in values.shape]
        values = torch.nn.functional.adaptive_avg_pool2d(values[None, None], tiles)[0, 0]
    ax = plt.gca() if ax is None else ax
    entries = values.abs().flatten()
    top = (
        float(entries.kthvalue(max(1, round(0.99 * len(entries)))).values) or float(entries.max()) or 1.0
    )
    image = ax.imshow(values.numpy(), cmap="PuOr", vmin=-top, vmax=top, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, extend="both")
    return ax


def structure(matrix: BlockDiagonalOperator | StructuredMatrix, ax: Plot | None = None) -> Plot:
    """Draw where a matrix has entries.

    For an operator: its blocks along the diagonal, the colour being a block's mean eigenvalue; names
    are written where there is room. For a structured matrix: the entries that it stores.

    Args:
        matrix: What to draw.
        ax: Where to draw.

    Raises:
        TypeError: If it is neither.

    Example:
        >>> from curvature import DiagonalBlock
        >>> blocks = {"w": DiagonalBlock(torch.ones(3)), "b": DiagonalBlock(torch.ones(1))}
        >>> ax = structure(BlockDiagonalOperator(blocks), plt.subplots()[1])
        >>> [(patch.get_xy(), patch.get_width()) for patch in ax.patches]
        [((0, 0), 3), ((3, 3), 1)]
    """
    if isinstance(matrix, StructuredMatrix):
        ones = torch.ones(matrix.dim, matrix.dim)
        pattern = type(matrix).from_dense(ones, **matrix.options).to_dense() != 0
        ax = plt.gca() if ax is None else ax
        ax.imshow(pattern.numpy(), cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
        ax.set_title(f"{type(matrix).__name__}, d = {matrix.dim}")
        return ax
    if not isinstance(matrix, BlockDiagonalOperator):
        raise TypeError(f"structure: expected an operator or a structured matrix, got {matrix!r}.")
    ax = plt.gca() if ax is None else ax
    means = [float(block.trace()) / block.dim for block in matrix.blocks.values()]
    seen = [mean for mean in means if mean > 0] or [1.0]
    norm, colours = LogNorm(min(seen), max(max(seen), 1.001 * min(seen))), plt.get_cmap("viridis")
    at = 0
    for (key, block), mean in zip(matrix.blocks.items(), means, strict=True):
        colour = colours(norm(mean)) if mean > 0 else "none"
        ax.add_patch(
            Rectangle((at, at), block.dim, block.dim, facecolor=colour, edgecolor="black", lw=0.5)
        )
        if block.dim > 0.04 * matrix.dim:
            ax.annotate(", ".join(key), (at + block.dim, at), xytext=(3, -3), textcoords="offset points",
                        va="top", fontsize="small")  # fmt: skip
        at += block.dim
    ax.set(xlim=(0, at), ylim=(at, 0), aspect="equal", xlabel="parameter", ylabel="parameter")
    bar = ax.figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=ax)
    bar.set_label("mean eigenvalue of the block")
    return ax
