"""The GGN's spectrum per layer while a network trains, and how noisy its leading directions are.

A small convolutional network learns scikit-learn's real scans of digits by momentum SGD. At some epochs
one backward pass on a mini-batch gives, through Gram matrices, the exact eigenvalues of the GGN of
each layer, and the slopes and curvatures of each datum's loss along the leading eigenvectors of the
whole GGN. Their signal-to-noise ratio in the mean over a batch of B data is
``sqrt(B) |mean_n| / std_n``: below 1 (dashed), a step along that direction follows noise.

Run it with ``python examples/digits_spectra.py --out out``; half a minute, ``--quick`` seconds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack_ext import LowRankGGN, backpack, extend


def load() -> tuple[Tensor, Tensor]:
    """Return images ``[N, 1, 8, 8]`` and labels, in random order."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def network() -> nn.Module:
    """Return a network of two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


NAMES = {"0": "conv 1", "3": "conv 2", "7": "linear 1", "9": "linear 2"}


def measure(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, k: int) -> dict:
    """Return what one mini-batch says of the curvature.

    Args:
        model: The network, extended.
        loss_fn: The loss, extended.
        x: Images.
        y: Labels.
        k: Number of leading directions of the whole GGN.

    Returns:
        ``"spectra"``: the eigenvalues by layer, descending; ``"eigenvalues"`` of the k directions,
        ``"slopes"`` and ``"curvatures"`` of each datum along them ``[N, k]``; ``"loss"``.
    """
    layers = LowRankGGN(param_groups="layers", gradients=False, savefield="ggn_layer")
    whole = LowRankGGN()
    with backpack(layers, whole):  # one sweep serves both
        loss = loss_fn(model(x), y)
        loss.backward()
    pairs = whole.eigh(k)
    return {
        "spectra": layers.eigvalsh(),
        "eigenvalues": pairs.values,
        "slopes": pairs.directional_gradients(),
        "curvatures": pairs.directional_curvatures(),
        "loss": float(loss.detach()),
    }


def noise_ratio(t: Tensor) -> Tensor:
    """Return ``sqrt(N) |mean_n| / std_n`` of ``t[n,k]``."""
    return len(t) ** 0.5 * t.mean(0).abs() / t.std(0)


def train(epochs: int, marks: Sequence[int], batch: int, k: int) -> dict[int, dict]:
    """Train the network; return what `measure` says before the epochs in ``marks``."""
    torch.manual_seed(0)
    x, y = load()
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = {}
    for epoch in range(epochs + 1):
        if epoch in marks:
            found[epoch] = measure(model, loss_fn, x[:batch], y[:batch], k)
            row(epoch, found[epoch])
        if epoch < epochs:
            for part in torch.randperm(len(x)).split(64):
                opt.zero_grad()
                with backpack():  # nothing is recorded
                    loss_fn(model(x[part]), y[part]).backward()
                opt.step()
    return found


def row(epoch: int, found: dict) -> None:
    """Print one line: the loss, each layer's largest eigenvalue, the noise of slopes and curvatures."""
    largest = "  ".join(f"{NAMES[name]} {float(v[0]):.3g}" for name, v in found["spectra"].items())
    slopes, curvatures = (noise_ratio(found[what]).median() for what in ("slopes", "curvatures"))
    print(
        f"epoch {epoch:3d}  loss {found['loss']:.4f}  largest eigenvalues: {largest}  "
        f"median signal/noise: slopes {slopes:.2f}, curvatures {curvatures:.2f}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print a table, draw two plots."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plots")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128, help="data of a measurement")
    parser.add_argument("--directions", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two epochs, 32 data")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.batch, args.directions = 2, 32, 5
    marks = sorted({0, 1, 2, 5, 10, args.epochs} & set(range(args.epochs + 1)))
    found = train(args.epochs, marks, args.batch, args.directions)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in draw(found, args.out):
        print(f"plot: {path}")


def draw(found: dict[int, dict], out: Path) -> list[Path]:
    """Draw the spectra of the layers, and signal over noise against the eigenvalues."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = plt.get_cmap("viridis")([0.9 * k / max(1, len(found) - 1) for k in range(len(found))])
    figure, axes = plt.subplots(1, len(NAMES), figsize=(11, 2.8), sharey=True)
    for axis, (name, title) in zip(axes, NAMES.items(), strict=True):
        for colour, (epoch, result) in zip(colours, found.items(), strict=True):
            values = result["spectra"][name]
            axis.loglog(range(1, len(values) + 1), values, color=colour, label=f"epoch {epoch}")
        axis.set(title=title, xlabel="number")
    axes[0].set(ylabel="eigenvalue of the GGN")
    axes[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    paths = [out / "digits_spectra.png", out / "digits_noise.png"]
    figure.savefig(paths[0], dpi=120)

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, what in zip(axes, ("slopes", "curvatures"), strict=True):
        for colour, (epoch, result) in zip(colours, found.items(), strict=True):
            ratio = noise_ratio(result[what])
            axis.loglog(result["eigenvalues"], ratio, "o", ms=3, color=colour, label=f"epoch {epoch}")
        axis.axhline(1, color="0.4", ls="--", lw=1)
        axis.set(title=what, xlabel="eigenvalue of the direction")
    axes[0].set(ylabel="signal / noise of a batch's mean")
    axes[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(paths[1], dpi=120)
    return paths


if __name__ == "__main__":
    main()
