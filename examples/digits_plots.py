"""The plots of `digits.py`; colours can be told apart by the colour-blind (Okabe and Ito's palette)."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from curvature import Kronecker

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

BLUE, RED = "#0072B2", "#D55E00"
# Colour and line of a factor's spectrum.
LINES = {
    ("A", "expand"): (BLUE, "-"),
    ("A", "reduce"): ("#56B4E9", "--"),
    ("B", "expand"): (RED, "-"),
    ("B", "reduce"): ("#E69F00", "--"),
}
STYLE = {
    "figure.dpi": 140,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
}
# Eigenvalues this far below the largest are rounding errors of float32.
FLOOR = 1e-7


def draw(results: dict[str, dict], data, out: Path) -> Iterator[Path]:
    """Draw everything, yielding the names of the files.

    Args:
        results: What `digits.study` returned, by network.
        data: The training set.
        out: Folder to write to.
    """
    with plt.rc_context(STYLE):
        figures = {
            f"spectra_{network.lower()}": spectra(network, list(result["errors"]), result["factors"])
            for network, result in results.items()
        }
        figures["blocks"] = blocks(results)
        figures["errors"] = errors(results)
        figures["loudest_images"] = loudest(results, *data.tensors)
        for name, figure in figures.items():
            path = out / f"{name}.png"
            figure.savefig(path)
            plt.close(figure)
            yield path


def spectra(network: str, layers: list[str], factors: dict[str, dict[str, Kronecker]]) -> plt.Figure:
    """Draw the eigenvalues of all layers' factors, one panel per layer and a legend.

    Args:
        network: Its name.
        layers: The layers' names.
        factors: Per flavour, the Kronecker products by parameter name.
    """
    columns = 4 if len(layers) > 4 else len(layers) + 1
    rows = -(-(len(layers) + 1) // columns)
    size = (2.7 * columns, 2.1 * rows + (0.9 if rows == 1 else 0.5))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax, layer in zip(axes.flat, layers, strict=False):
        for (factor, flavour), (colour, line) in LINES.items():
            values = eigenvalues(getattr(factors[flavour][layer + ".weight"], factor))
            label = f"{factor} ({'inputs' if factor == 'A' else 'outputs'}), {flavour}"
            ax.semilogy(range(1, len(values) + 1), values, line, c=colour, label=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        ax.set_title(layer)
    for ax in axes.flat[len(layers) :]:
        ax.axis("off")
    axes.flat[len(layers)].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("index of the eigenvalue", fontsize="medium")
    figure.supylabel("eigenvalue", fontsize="medium")
    figure.suptitle(f"{network}: spectra of the Kronecker factors over the training set")
    return figure


def eigenvalues(factor: Tensor) -> Tensor:
    """Return a factor's eigenvalues in falling order, without those that are rounding errors."""
    values = factor if factor.dim() == 1 else torch.linalg.eigvalsh(factor.double())
    values = values.sort(descending=True).values
    return values[values > FLOOR * values[0]]


def blocks(results: dict[str, dict]) -> plt.Figure:
    """Draw the exact GGN block of one layer per network beside its two approximations."""
    figure, axes = plt.subplots(len(results), 3, figsize=(9.6, 3.1 * len(results)), squeeze=False)
    for row, (network, result) in zip(axes, results.items(), strict=True):
        exact = result["blocks"][0]
        top = float(exact.abs().quantile(0.99))
        errors = result["errors"][result["layer"]]
        titles = (
            f"{network}, {result['layer']}: exact GGN block",
            *(f"KFAC {f}, error {e:.2f}" for f, e in zip(("expand", "reduce"), errors, strict=True)),
        )
        for ax, block, title in zip(row, result["blocks"], titles, strict=True):
            image = ax.imshow(block, cmap="PuOr", vmin=-top, vmax=top, interpolation="nearest")
            ax.set_title(title)
            ax.grid(False)
            ax.set(xlabel="entry of the weight", ylabel="entry of the weight")
            ax.label_outer()
        bar = figure.colorbar(image, ax=row, shrink=0.85, extend="both")
        bar.set_label("entry of the block")
    return figure


def errors(results: dict[str, dict]) -> plt.Figure:
    """Draw how far expand and reduce are from the exact block, by layer."""
    counts = [len(r["errors"]) for r in results.values()]
    figure, axes = plt.subplots(
        len(results), figsize=(6.4, 0.27 * sum(counts) + 1.8), height_ratios=counts, sharex=True
    )
    for ax, (network, result) in zip(axes, results.items(), strict=True):
        names = list(result["errors"])
        expand, reduce = zip(*result["errors"].values(), strict=True)
        ax.hlines(names, expand, reduce, color="0.75", lw=2, zorder=1)
        ax.plot(expand, names, "o", c=BLUE, ms=7, label="expand")
        ax.plot(reduce, names, "D", c=RED, ms=6, label="reduce")
        ax.invert_yaxis()
        ax.margins(y=0.5 / len(names))
        ax.set_title(network, loc="left")
    figure.suptitle("Kronecker products against exact blocks")
    axes[0].legend(loc="lower left", bbox_to_anchor=(0.6, 1), ncols=2, frameon=False, borderaxespad=0.2)
    axes[-1].set_xlim(left=0)
    axes[-1].set_xlabel("relative Frobenius error against the exact GGN block of the weight")
    return figure


def loudest(results: dict[str, dict], images: Tensor, labels: Tensor, count: int = 8) -> plt.Figure:
    """Draw the images whose own gradients are the longest."""
    size = (1.25 * count, 1.75 * len(results) + 0.3)
    figure, axes = plt.subplots(len(results), count, figsize=size, squeeze=False)
    for row, (network, result) in zip(axes, results.items(), strict=True):
        order = result["norms"].argsort(descending=True)[:count]
        for ax, index in zip(row, order, strict=True):
            ax.imshow(images[index, 0], cmap="gray_r", interpolation="nearest")
            label, predicted = int(labels[index]), int(result["predictions"][index])
            colour = "black" if label == predicted else RED
            ax.set_title(
                f"{label}, taken for {predicted}" if label != predicted else f"{label}", c=colour
            )
            ax.set_xlabel(f"norm {result['norms'][index]:.1f}")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
        row[0].set_ylabel(network)
    figure.suptitle("Training images with the largest gradients")
    return figure
