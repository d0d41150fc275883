"""AdaHesScale beside Adam on real digit images: accuracy after equal epochs, and time per step.

A network of two layers of 64 tanh units learns scikit-learn's digits at several step sizes, from several
random starts, with Adam, with AdaHesScale (``v`` holds the squared Hessian diagonal by HesScale), and
with its Gauss-Newton variant, which leaves out the second derivatives of the activations.

Run it with ``python examples/digits_hesscale.py --out out``; it takes about a minute.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import numpy as np
import torch
from digits import accuracy, load, table
from digits_plots import BLUE, RED, STYLE
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from backpack_ext import backpack, extend
from optim import AdaHesScale

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "AdaHesScale": lambda model, lr: AdaHesScale(model, lr=lr),
    "AdaHesScale-GN": lambda model, lr: AdaHesScale(model, lr=lr, gauss_newton=True),
}
COLORS = dict(zip(OPTIMIZERS, ("0.4", BLUE, RED), strict=True))


def network() -> nn.Module:
    """Return the network."""
    hidden = (nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def train(
    name: str, lr: float, seed: int, data: TensorDataset, test: TensorDataset, epochs: int
) -> tuple[list[float], list[float], list[float]]:
    """Train.

    Returns:
        For each epoch the mean loss of its batches and the accuracy on the test set; for each step
        its seconds (forward and backward pass and update).
    """
    torch.manual_seed(seed)
    model, loss_fn = network(), nn.CrossEntropyLoss()
    opt = OPTIMIZERS[name](model, lr)
    curved = isinstance(opt, AdaHesScale)
    if curved:
        extend(model), extend(loss_fn)
    loader = DataLoader(data, 64, shuffle=True, generator=torch.Generator().manual_seed(seed))
    losses, accuracies, seconds = [], [], []
    for _ in range(epochs):
        total = 0.0
        for x, y in loader:
            start = time.perf_counter()
            opt.zero_grad()
            with backpack(*opt.extensions()) if curved else nullcontext():
                loss = loss_fn(model(x), y)
                loss.backward()
            opt.step()
            seconds.append(time.perf_counter() - start)
            total += loss.item()
        losses.append(total / len(loader))
        accuracies.append(accuracy(model, test))
    return losses, accuracies, seconds


def draw(losses: np.ndarray, accuracies: np.ndarray, lrs: Sequence[float], out: Path) -> Path:
    """Draw loss and accuracy by epoch, one column for each step size.

    Args:
        losses: ``[optimizer, lr, seed, epoch]``.
        accuracies: Likewise.
        lrs: The step sizes.
        out: Folder for the plot.
    """
    x = np.arange(1, losses.shape[-1] + 1)
    with plt.rc_context(STYLE):
        figure, rows = plt.subplots(
            2, len(lrs), figsize=(2.6 * len(lrs) + 1, 4.4), sharex=True, sharey="row", squeeze=False
        )
        for axes, values, label in zip(
            rows, (losses, 1 - accuracies), ("loss", "test error"), strict=True
        ):
            for name, of_optimizer in zip(OPTIMIZERS, values, strict=True):
                for axis, of_lr in zip(axes, of_optimizer, strict=True):
                    axis.plot(x, of_lr.mean(0), color=COLORS[name], label=name)
                    axis.fill_between(
                        x, of_lr.min(0), of_lr.max(0), color=COLORS[name], alpha=0.2, linewidth=0
                    )
                    axis.set_yscale("log")
            axes[0].set_ylabel(label)
        for axis, lr in zip(rows[0], lrs, strict=True):
            axis.set_title(f"lr = {lr:g}")
        for axis in rows[1]:
            axis.set_xlabel("epoch")
        rows[0, 0].legend()
        path = out / "digits_hesscale.png"
        figure.savefig(path)
        plt.close(figure)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=3, help="runs per setting")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="train hardly at all, to try it out")
    args = parser.parse_args(argv)
    if args.quick:
        args.lrs, args.seeds, args.epochs = [1e-3], 1, 2
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # networks this small gain little from more, and lose on a busy machine

    data, test = load()
    # all optimizers of a seed one after the other, so that other load on the machine meets each of them
    order = [(name, lr, seed) for seed, lr, name in product(range(args.seeds), args.lrs, OPTIMIZERS)]
    found = {
        run: train(*run, data, test, args.epochs) for run in tqdm(order, desc="training", unit="run")
    }

    def gather(part: int) -> np.ndarray:
        keys = product(OPTIMIZERS, args.lrs, range(args.seeds))
        shape = len(OPTIMIZERS), len(args.lrs), args.seeds, -1
        return np.array([found[key][part] for key in keys]).reshape(shape)

    losses, accuracies, seconds = map(gather, range(3))
    print(f"\nAfter {args.epochs} epochs, batches of 64 images: mean over {args.seeds} seeds (worst)\n")
    rows = [
        [
            name,
            f"{lr:g}",
            f"{losses[i, j, :, -1].mean():.4f}",
            f"{accuracies[i, j, :, -1].mean():.3f} ({accuracies[i, j, :, -1].min():.3f})",
        ]
        for (i, name), (j, lr) in product(enumerate(OPTIMIZERS), enumerate(args.lrs))
    ]
    table({"": ["optimizer", "lr", "loss", "test accuracy"]}, rows)
    print("\nA step, median\n")
    medians = 1e3 * np.median(seconds.reshape(len(OPTIMIZERS), -1), axis=1)
    rows = [
        [n, f"{ms:.2f}", f"{ms / medians[0]:.1f}"] for n, ms in zip(OPTIMIZERS, medians, strict=True)
    ]
    table({"": ["optimizer", "ms", "relative"]}, rows)
    print(f"\nPlot:\n  {draw(losses, accuracies, args.lrs, args.out)}")


if __name__ == "__main__":
    main()
