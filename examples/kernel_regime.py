"""Does a network of practical width train like its linearisation? Kernels before and after training.

A network of infinite width in NTK parametrisation keeps its neural tangent kernel during training, and
learns what kernel regression with that kernel learns: it equals its linearisation at the start (Jacot et
al. 2018; Lee et al. 2019). Here networks of finite width, in NTK and in standard parametrisation, are
trained on scikit-learn's real scans of digits by gradient descent on half the squared error. For each:

* |K_t - K_0| / |K_0| and 1 - cos(K_0, K_t): how far the kernel moved;
* C' = 3 |J_t - J_0| / sqrt(lambda_min(K_0)): while it is at most one, K_0 vouches for convergence;
* the alignment of the kernel with the labels, before and after: what features the network learned;
* the test error of the network and of its linearisation after the same time, and how far their outputs
  are apart, relative to how far the network's moved.

What to expect: for wide networks the kernel's change shrinks about like width^(-1/2), the bound that
Lee et al. (2019) prove for smooth activations, in both parametrisations: they differ in how fast layers
learn. But at widths in practical use the kernel changes by a good part of its norm and aligns with the
labels, the network does better than its linearisation, and C' is far above one.

Run it with ``python examples/kernel_regime.py --out out``; two minutes, ``--quick`` seconds.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from math import inf, isfinite, log
from pathlib import Path

import torch
from digits import load, table
from digits_plots import BLUE, RED, STYLE, plt
from ntk_networks import NETWORKS, PARAMETRISATIONS
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from backpack_ext import NTK
from curvature.kernel import (
    convergence_constant,
    cosine_distance,
    relative_distance,
    target_alignment,
)
from curvature.kernel_regression import KernelRegression

MOMENTUM = 0.9
# Of the networks' training, half the mean over data of the squared error; targets are one-hot.
SMALL_LOSS = 1e-3
DEFAULT_WIDTHS = {"mlp": [32, 128, 512, 2048], "cnn": [4, 8, 16, 32]}
COLORS = {"standard": RED, "ntk": BLUE}

# Headers of the table's columns by what `measure` returns.
COLUMNS = {
    "loss": "loss",
    "change": "|dK|/|K|",
    "cosine": "1-cos",
    "constant": "C'",
    "before": "before",
    "after": "after",
    "network": "network",
    "linear": "linearised",
    "apart": "apart",
}
GROUPS = {
    "": ["loss"],
    "change of the kernel": ["change", "cosine", "constant"],
    "alignment": ["before", "after"],
    "test error": ["network", "linear"],
    "outputs": ["apart"],
}


def train(network: nn.Module, x: Tensor, targets: Tensor, lr: float, steps: int) -> tuple[int, float]:
    """Train by gradient descent with momentum until the loss is small.

    Args:
        network: The network.
        x: All images; there are no mini-batches.
        targets: One-hot labels.
        lr: Step size for half the *sum* of squares.
        steps: At most so many steps.

    Returns:
        The number of steps, and half the mean over data of the squared error.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=MOMENTUM)
    count, loss = 0, torch.tensor(inf)
    while count < steps and loss.item() >= SMALL_LOSS * len(x):
        optimizer.zero_grad()
        loss = (network(x) - targets).square().sum() / 2
        loss.backward()
        optimizer.step()
        count += 1
    return count, loss.item() / len(x)


def measure(network: nn.Module, data: Sequence[Tensor], rate: float, steps: int) -> dict[str, float]:
    """Train a network; compare its kernels, and itself with its linearisation.

    Args:
        network: Is trained in float32 and measured in float64.
        data: Training images and labels, test images and labels.
        rate: Step size in units of one over the largest eigenvalue of the initial kernel.
        steps: At most so many steps.

    Returns:
        Numbers by the names of `COLUMNS`.
    """
    x, labels, x_test, labels_test = data
    x, x_test = x.double(), x_test.double()
    targets = F.one_hot(labels, 10).double()
    ntk = NTK(network.double())
    start = ntk.features(x)
    K00, cross = ntk.gram(start), ntk.gram(ntk.features(x_test), start)
    with torch.no_grad():
        prior, prior_test = network(x), network(x_test)
    linearised = KernelRegression(K00, targets, prior=prior)
    lr = rate / float(linearised.values[-1])

    count, loss = train(network.float(), x.float(), targets.float(), lr, steps)

    network.double()
    end = ntk.features(x)
    Ktt, Kt0 = ntk.gram(end), ntk.gram(end, start)
    with torch.no_grad():
        outputs = network(x_test)
    # with momentum beta, gradients count 1 / (1 - beta) times
    time = lr * count / (1 - MOMENTUM)
    linear = linearised.predict(cross, prior_test, time=time)
    return {
        "loss": loss,
        "change": float(relative_distance(K00, Ktt)),
        "cosine": float(cosine_distance(K00, Ktt)),
        "constant": float(convergence_constant(K00, Ktt, Kt0)),
        "before": float(target_alignment(over_outputs(K00), targets, center=True)),
        "after": float(target_alignment(over_outputs(Ktt), targets, center=True)),
        "network": error(outputs, labels_test),
        "linear": error(linear, labels_test),
        "apart": float((linear - outputs).norm() / (outputs - prior_test).norm()),
    }


def over_outputs(K: Tensor) -> Tensor:
    """Return the sum ``[N, N]`` of a full kernel over its outputs."""
    return torch.einsum("nmcc->nm", K)


def error(outputs: Tensor, labels: Tensor) -> float:
    """Return the share of wrong predictions."""
    return float((outputs.argmax(1) != labels).double().mean())


def slope(widths: Sequence[int], values: Tensor) -> float:
    """Return the exponent p of a least-squares fit ``values ~ width^p``."""
    x = torch.tensor([log(w) for w in widths], dtype=torch.float64)
    x, y = x - x.mean(), values.log()
    return float(x @ y / x.square().sum())


def show(results: dict[tuple[str, int], dict[str, Tensor]], seeds: int) -> None:
    """Print means over seeds, and standard deviations of some."""
    rows = []
    for (parametrisation, width), found in results.items():
        cells = [f"{parametrisation} {width}"]
        for name in (name for group in GROUPS.values() for name in group):
            mean, spread = float(found[name].mean()), float(found[name].std(correction=int(seeds > 1)))
            if name in ("loss", "cosine"):
                cells.append(f"{mean:.1e}")
            elif name == "constant":
                cells.append(f"{mean:.3g}")
            elif name in ("before", "after"):
                cells.append(f"{mean:.3f}")
            else:
                cells.append(f"{mean:.3f} ({spread:.3f})")
        rows.append(cells)
    header = {group: [COLUMNS[name] for name in names] for group, names in GROUPS.items()}
    header[""].insert(0, "network")
    print(f"\nMean (standard deviation) over {seeds} seeds; both parametrisations start as one function")
    table(header, rows)


def show_slopes(results: dict[tuple[str, int], dict[str, Tensor]], widths: Sequence[int]) -> None:
    """Print powers of the width, and what the numbers say about the kernel regime."""
    print("\nPowers of the width, fitted to the means of the wider half (and to all)")
    half = widths[-max(2, len(widths) // 2) :]
    for parametrisation in PARAMETRISATIONS:
        cells = []
        for name in ("change", "constant", "apart"):
            means = [results[parametrisation, w][name].mean() for w in widths]
            upper, all_ = means[-len(half) :], means
            wide, fit = (
                f"{slope(widths[-len(v) :], torch.stack(v)):+.2f}" if all(map(isfinite, v)) else "-"
                for v in (upper, all_)
            )
            cells.append(f"{COLUMNS[name]} {wide} ({fit})")
        print(f"  {parametrisation:8}  " + "  ".join(cells))
    smallest = min(float(found["constant"].min()) for found in results.values())
    verdict = "none satisfies" if smallest > 1 else "some satisfy"
    print(f"  The smallest C' is {smallest:.3g}: {verdict} the condition C' <= 1.")


def draw(
    results: dict[tuple[str, int], dict[str, Tensor]], widths: Sequence[int], network: str, out: Path
) -> Path:
    """Draw change of kernel, constant, alignment and test error against width."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), sharex=True)
        for parametrisation, color in COLORS.items():
            found = {w: results[parametrisation, w] for w in widths}

            def line(axis, name, style, label, color=color, found=found):
                values = torch.stack([found[w][name] for w in widths])
                mean = values.mean(1)
                axis.plot(widths, mean, style, color=color, label=label, markersize=4)
                axis.fill_between(widths, values.amin(1), values.amax(1), color=color, alpha=0.15, lw=0)

            title = {"ntk": "NTK", "standard": "standard"}[parametrisation]
            line(axes[0, 0], "change", "o-", title)
            line(axes[0, 1], "constant", "o-", title)
            line(axes[1, 0], "before", "o:", f"{title}, before")
            line(axes[1, 0], "after", "o-", f"{title}, after training")
            line(axes[1, 1], "network", "o-", f"{title}, network")
            line(axes[1, 1], "linear", "s:", f"{title}, linearisation")
        last = results["ntk", widths[-1]]["change"].mean()
        axes[0, 0].plot(
            widths,
            [last * (widths[-1] / w) ** 0.5 for w in widths],
            "--",
            color="0.5",
            lw=1,
            label="width$^{-1/2}$",
        )
        axes[0, 1].axhline(1, color="0.5", ls="--", lw=1, label="kernel regime below")
        axes[0, 0].set(xscale="log", yscale="log", title="change of the kernel, relative")
        axes[0, 1].set(yscale="log", title="$C' = 3\\,\\|J_t - J_0\\| / \\lambda_{min}(K_0)^{1/2}$")
        axes[1, 0].set(title="alignment of the kernel with the labels", xlabel="width")
        axes[1, 1].set(title="test error", xlabel="width")
        axes[1, 1].set_xticks(widths, [str(w) for w in widths])
        axes[1, 1].minorticks_off()
        low, high = axes[1, 1].get_ylim()
        axes[1, 1].set_ylim(low, high + 0.4 * (high - low))  # room for the legend
        for axis in axes.flat:
            axis.legend(frameon=False, fontsize=8)
        figure.suptitle(f"{network.upper()}s on digits: kernels before and after training")
        path = out / f"kernel_regime_{network}.png"
        figure.savefig(path)
        plt.close(figure)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    parser.add_argument("--network", choices=list(NETWORKS), default="mlp")
    parser.add_argument("--widths", type=int, nargs="+", help="neurons, or channels, of hidden layers")
    parser.add_argument("--seeds", type=int, default=3, help="initialisations per width")
    parser.add_argument("--images", type=int, default=100, help="of the training set")
    parser.add_argument("--steps", type=int, default=2000, help="of gradient descent, at most")
    parser.add_argument("--rate", type=float, default=1.0, help="step size over 1 / lambda_max(K_0)")
    parser.add_argument("--quick", action="store_true", help="narrow networks, hardly trained")
    args = parser.parse_args(argv)
    widths = sorted(set(args.widths or DEFAULT_WIDTHS[args.network]))
    if args.quick:
        widths, args.seeds, args.images, args.steps = widths[:2], 2, 30, 100
    args.out.mkdir(parents=True, exist_ok=True)

    training, test = load()
    data = (*(t[: args.images] for t in training.tensors), *test.tensors)
    results = {}
    settings = list(product(PARAMETRISATIONS, widths))
    with tqdm(total=len(settings) * args.seeds, desc="training", unit="network") as bar:
        for parametrisation, width in settings:
            found = []
            for seed in range(args.seeds):
                bar.set_postfix_str(f"{parametrisation} {width}")
                torch.manual_seed(seed)
                network = NETWORKS[args.network](width, parametrisation)
                found.append(measure(network, data, args.rate, args.steps))
                bar.update()
            results[parametrisation, width] = {
                name: torch.tensor([run[name] for run in found], dtype=torch.float64) for name in COLUMNS
            }

    show(results, args.seeds)
    show_slopes(results, widths)
    print(f"\nPlot:\n  {draw(results, widths, args.network, args.out)}")


if __name__ == "__main__":
    main()
