"""Curvature of two small networks on real digit images, a convolutional network and a ViT.

For each network: train a moment, compute five quantities in one backward pass, tabulate them by
layer, measure what they cost, compare the Kronecker factors with exact blocks, and draw plots.

Run it with ``python examples/digits.py --out out``; it takes less than a minute.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from digits_curvature import (
    FACTOR_HEADER,
    NOISE_HEADER,
    bias_error,
    costs,
    errors,
    extensions,
    factor_rows,
    kronecker,
    noise_rows,
    other_rows,
)
from digits_models import ConvNet, ViT
from digits_plots import draw
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from backpack_ext import BatchL2Grad, backpack, extend
from backpack_ext.dataset import collect


def load() -> tuple[TensorDataset, TensorDataset]:
    """Return scikit-learn's 1797 digit images, shuffled, as training and test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440], order[1440:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train(model: nn.Module, data: TensorDataset, epochs: int, lr: float) -> None:
    """Train with Adam, as one would without this library."""
    loader = DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    with tqdm(total=epochs * len(loader), desc=f"training {type(model).__name__}", unit="step") as bar:
        for _ in range(epochs):
            for x, y in loader:
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, data: TensorDataset) -> Tensor:
    """Return the predicted labels."""
    return model(data.tensors[0]).argmax(dim=1)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of images whose label is predicted."""
    return float((predict(model, data) == data.tensors[1]).float().mean())


def table(header: dict[str, list[str]], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header; the first column is flush left.

    Args:
        header: The columns' names by groups of columns.
        rows: The cells.
    """
    names = [name for group in header.values() for name in group]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    groups, start = [], 0
    for label, columns in header.items():
        width = sum(widths[start : start + len(columns)]) + 2 * (len(columns) - 1)
        groups.append(f" {label} ".center(width, "-") if label else " " * width)
        start += len(columns)
    if any(header):
        print("  " + "  ".join(groups).rstrip())
    for row in (names, *rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  " + "  ".join((row[0].ljust(widths[0]), *cells)))


def show_layers(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> None:
    """Run the one backward pass and print tables of what it computed."""
    model.zero_grad()
    with backpack(*extensions(torch.Generator().manual_seed(0))):
        loss_fn(model(x), y).backward()

    print(f"\nOne backward pass over {len(x)} images: Kronecker factors (KFAC, one sample)\n")
    table(FACTOR_HEADER, factor_rows(model))
    print("\nParameters without Kronecker structure have exact blocks of the sampled vectors\n")
    table({"": ["parameter", "shape", "block", "trace"]}, other_rows(model))
    print("\nThe same pass: diagonal (DiagGGN, same sample) and noise (Variance, BatchL2Grad)\n")
    table(NOISE_HEADER, noise_rows(model, len(x)))
    print(
        "\n  noise scale: the batch size at which a gradient's noise is as large as the gradient"
        "\n  largest/mean: of the norms of the images' own gradients"
    )


def show_costs(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, repetitions: int) -> None:
    """Print what the quantities cost, relative to a plain step."""
    seconds = costs(model, loss_fn, x, y, repetitions)
    plain = next(iter(seconds.values()))
    print(f"\nCost of a step (forward and backward, {len(x)} images), median of {repetitions}\n")
    rows = [[name, f"{1e3 * s:.1f}", f"{s / plain:.2f}"] for name, s in seconds.items()]
    table({"": ["computed", "ms", "relative"]}, rows)


def show_errors(found: dict[str, tuple[float, float]], images: int) -> None:
    """Print how far the Kronecker products are from the exact blocks."""
    print(f"\nRelative error against exact GGN blocks ({images} images, exact Fisher, Frobenius norm)\n")
    rows = [[layer, f"{e:.3f}", f"{r:.3f}"] for layer, (e, r) in found.items()]
    table({"": ["layer", "expand", "reduce"]}, rows)


def study(
    model: nn.Module, layer: str, data: TensorDataset, test: TensorDataset, args: argparse.Namespace
) -> dict:
    """Print everything about one trained network; return what the plots show."""
    images, labels = (t[: args.batch] for t in data.tensors)
    print(f"  accuracy: train {accuracy(model, data):.3f}, test {accuracy(model, test):.3f}")
    extend(model)
    loss_fn = extend(nn.CrossEntropyLoss())

    show_layers(model, loss_fn, images, labels)
    show_costs(model, loss_fn, images, labels, args.repetitions)

    x, y = images[: args.exact], labels[: args.exact]
    found, blocks = errors(model, loss_fn, x, y, layer)
    in_biases = bias_error(model, x)
    show_errors(found, len(x))
    print(f"\n  reduce's blocks of the biases are exact: error {in_biases:.0e} or less")

    print(f"\nOver all {len(data)} training images, as if they were one batch")
    loader = DataLoader(data, batch_size=args.batch)
    generator = torch.Generator().manual_seed(0)
    quantities = (*kronecker("mc", generator), BatchL2Grad())
    whole = collect(model, loss_fn, loader, *quantities)
    norms = sum(whole["batch_l2"].values()).sqrt() * len(data)  # without the mean loss's 1/N
    print(f"  norms of the images' gradients: median {norms.median():.2g}, largest {norms.max():.2g}")
    return {
        "errors": found,
        "blocks": blocks,
        "layer": layer,
        "factors": {flavour: whole[f"kfac_{flavour}"] for flavour in ("expand", "reduce")},
        "norms": norms,
        "predictions": predict(model, data),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plots")
    parser.add_argument("--quick", action="store_true", help="train hardly at all, to try it out")
    args = parser.parse_args(argv)
    args.batch, args.exact, args.repetitions = (128, 32, 2) if args.quick else (256, 256, 15)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # networks this small gain little from more, and lose on a busy machine

    data, test = load()
    results = {}
    for kind, layer, epochs, lr in ((ConvNet, "conv1", 4, 1e-2), (ViT, "patches", 12, 4e-3)):
        torch.manual_seed(0)
        model = kind()
        print(f"\n{kind.__name__}\n{'=' * len(kind.__name__)}")
        train(model, data, 1 if args.quick else epochs, lr)
        results[kind.__name__] = study(model, layer, data, test, args)

    print("\nPlots:")
    for path in draw(results, data, args.out):
        print(f"  {path}")


if __name__ == "__main__":
    main()
