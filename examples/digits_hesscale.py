"""Digits by Adam and by AdaHesScale: accuracy after equal epochs, and the time of a step.

A small convolutional network on scikit-learn's real scans of digits, trained by Adam, by ``AdaHesScale``
(the second moment is that of the Hessian's diagonal instead of the gradient) and by its Gauss-Newton
variant, each with the best of three step sizes.

Run it with ``python examples/digits_hesscale.py --out out``; half a minute, ``--quick`` seconds.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack_ext import backpack, extend
from optim import AdaHesScale

OPTIMIZERS = {
    "Adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "AdaHesScale": lambda model, lr: AdaHesScale(model.parameters(), lr=lr),
    "AdaHesScale-GN": lambda model, lr: AdaHesScale(model.parameters(), lr=lr, gauss_newton=True),
}


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, and those of the test."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def network() -> nn.Module:
    """Return a network of two convolutions, with average pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
    )


def train(name: str, lr: float, seed: int, epochs: int) -> tuple[list[float], float]:
    """Train a network.

    Args:
        name: Key in `OPTIMIZERS`.
        lr: Step size.
        seed: Of the parameters and of the order of the data.
        epochs: Passes over the data.

    Returns:
        The test accuracy after each epoch, and the median time of a step in seconds.
    """
    torch.manual_seed(seed)
    x, y, x_test, y_test = load()
    model, loss_fn = network(), extend(nn.CrossEntropyLoss())  # only the loss has to be extended
    opt = OPTIMIZERS[name](model, lr)
    accuracies, times = [], []
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            start = perf_counter()
            opt.zero_grad()
            with backpack(*opt.extensions()) if hasattr(opt, "extensions") else nullcontext():
                loss_fn(model(x[batch]), y[batch]).backward()
            opt.step()
            times.append(perf_counter() - start)
        with torch.no_grad():
            accuracies.append(float((model(x_test).argmax(1) == y_test).float().mean()))
    return accuracies, median(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Train with each optimizer, print a table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--quick", action="store_true", help="one step size, two seeds, two epochs")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.seeds, args.lrs = 2, 2, [3e-3]
    curves = {}
    print(f"test accuracy after {args.epochs} epochs, {args.seeds} seeds: mean (std)")
    for name in OPTIMIZERS:
        tried = {lr: [train(name, lr, s, args.epochs) for s in range(args.seeds)] for lr in args.lrs}
        best = max(tried, key=lambda lr: mean(run[0][-1] for run in tried[lr]))
        found = [run[0][-1] for run in tried[best]]
        curves[name] = torch.tensor([run[0] for run in tried[best]])
        step = 1e3 * median(run[1] for runs in tried.values() for run in runs)
        print(
            f"{name:15s} lr {best:g}: {mean(found):.4f} ({stdev(found):.4f}), {step:.2f} ms a step; "
            f"all step sizes: {', '.join(f'{mean(r[0][-1] for r in tried[lr]):.4f}' for lr in args.lrs)}"
        )
    print(f"plot: {draw(curves, args.out)}")


def draw(curves: dict[str, Tensor], out: Path) -> Path:
    """Draw the test errors after each epoch, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.2))
    for name, found in curves.items():
        error = 1 - found
        epochs = range(1, found.shape[1] + 1)
        (line,) = axis.semilogy(epochs, error.mean(0), label=name)
        axis.fill_between(epochs, error.amin(0), error.amax(0), color=line.get_color(), alpha=0.15, lw=0)
    axis.set(xlabel="epoch", ylabel="test error")
    axis.legend(frameon=False)
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "digits_hesscale.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
