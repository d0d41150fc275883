"""``python -m benchmarks.symmetric``: ways to form ``X^T X``, alone and between torch's products."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.__main__ import RESULTS, _threads
from benchmarks.timing import Variant, interleave, summary
from curvature import openblas
from curvature.panels import halves, is_halved, numpy_pays, symmetric_product

# Rows and columns of X: those of small networks' layers, and of convolutions' patches.
SIZES = (
    (128, 512), (128, 785), (512, 512), (512, 785), (1024, 256), (2048, 576), (2048, 1152),
    (8192, 1152), (256, 2304),
)  # fmt: skip
GPU_SIZES = ((1024, 1024), (4096, 1024), (4096, 2048), (4096, 4096), (16384, 4096), (4096, 8192))
PANEL = 192
# Seconds per size, and the smallest and largest number of rounds.
LENGTHS = {"quick": (0.1, (2, 5)), "default": (0.5, (5, 200))}
STEP = 5e-4  # shorter products are repeated until they take this long
NEAR = 1.05  # what is chosen counts as fastest up to this factor


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.symmetric", description=__doc__)
    parser.add_argument("--quick", action="store_const", dest="length", const="quick", default="default")
    parser.add_argument("--sizes", nargs="+", type=_size, metavar="ROWSxCOLUMNS", help="of X")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser.parse_args(argv)


def _size(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the benchmark.

    Args:
        argv: Command line; that of the process by default.

    Returns:
        The report that was stored.
    """
    args = parse(argv)
    with _threads(args.threads):
        return _run(args)


def _run(args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    about = report.machine(args.device)
    print(report.describe(about), end="\n\n")
    gpu = torch.device(args.device).type == "cuda"
    found = {"machine": about, "problems": []}
    if not gpu:
        threads = openblas._get_threads()
        found["openblas_threads"] = None if threads is None else threads()
        print(f"threads: torch {args.threads}, NumPy's OpenBLAS {found['openblas_threads']}", end="\n\n")
    for rows, columns in args.sizes or (GPU_SIZES if gpu else SIZES):
        for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
            problem = measure(rows, columns, args.length, args.device, dtype)
            found["problems"].append(problem)
            print(text(problem), flush=True)
    suffix = "" if args.length == "default" else f"-{args.length}"
    suffix = "-1-thread" + suffix if args.threads == 1 and not gpu else suffix
    path = args.out / f"symmetric-{args.device.replace(':', '-')}{suffix}.json"
    report.write(found, path)
    print(f"stored in {path}")
    return found


# --------------------------------------------------------------------------- ways


def plain(x: Tensor) -> Tensor:
    """Torch's product of all entries."""
    return x.mT @ x


def in_halves(x: Tensor) -> Tensor:
    """The triangle recursively, in halves (one product where these are small)."""
    if not is_halved(x.shape[1], x.shape[0]):
        return plain(x)
    out = x.new_empty(x.shape[1], x.shape[1])
    halves(x.mT, out)
    return out


def in_panels(x: Tensor) -> Tensor:
    """The triangle in panels of 192 rows."""
    d = x.shape[1]
    out = x.new_empty(d, d)
    for k in range(0, d, PANEL):
        panel = out[k : k + PANEL, k:]
        torch.mm(x[:, k : k + PANEL].mT, x[:, k:], out=panel)
        out[k : k + PANEL, :k] = out[:k, k : k + PANEL].mT
    return out


def by_numpy(x: Tensor) -> Tensor:
    """NumPy's product, on as many threads as its library has."""
    out = x.new_empty(x.shape[1], x.shape[1])
    openblas.product(x.mT, out)
    return out


def by_triton(x: Tensor) -> Tensor:
    """Triton's kernel."""
    from curvature.triton_gram import gram

    return gram(x, 1.0, x.dtype)


def ways(device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways that are timed together, by name."""
    if torch.device(device).type == "cuda":
        return {"plain": plain, "triton": by_triton}
    return {
        "plain": plain,
        "chosen": lambda x: symmetric_product(x.mT),
        "halves": in_halves,
        "panels": in_panels,
    }


def chosen(x: Tensor) -> str:
    """Return what `symmetric_product` does."""
    if x.device.type != "cpu" or not is_halved(x.shape[1], x.shape[0]):
        return "plain"
    return "numpy" if numpy_pays(x.mT) else "halves"


# --------------------------------------------------------------------------- measuring


def measure(rows: int, columns: int, length: str, device: str, dtype: torch.dtype) -> dict:
    """Measure all ways at one size.

    Returns:
        A dictionary for JSON. In each of its rows: quartiles of torch's milliseconds; ``"ratio"``, those
        of the ratio to it in the same round; ``"fast"``, the ratio of lower quartiles, which other
        processes disturb less. The settings are ``"alone"``, and ``"between"`` products of torch of
        a matrix of that size, whose time counts: what a library leaves behind, threads that wait
        busily, is in it.
    """
    x = torch.randn(rows, columns, device=device).to(dtype)
    w = torch.randn(columns, columns, device=device).to(dtype)
    found = []
    name = f"{rows} x {columns}" + ("" if dtype == torch.float32 else f" {str(dtype)[6:]}")
    for setting in ("alone", "between"):
        steps = {key: _step(way, x, w, setting) for key, way in ways(device).items()}
        times = _time(steps, length, device)
        base = times["plain"]
        row = {"setting": setting, "rounds": len(base), "plain_ms": _rounded(1e3 * t for t in base)}
        row["ratio"] = {k: _rounded(_over(values, base)) for k, values in times.items()}
        if "halves" in steps:  # afterwards: its threads would disturb the others
            times |= {"numpy": _time({"plain": _step(by_numpy, x, w, setting)}, length, device)["plain"]}
        row["fast"] = {k: round(summary(t)[0] / summary(base)[0], 2) for k, t in times.items()}
        found.append(row)
    return {"name": name, "size": [rows, columns], "chosen": chosen(x), "rows": found}


def _over(values: list[float], base: list[float]) -> list[float]:
    return [t / p for t, p in zip(values, base, strict=True)]


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{q:.3g}") for q in summary(list(values))]


def _step(way: Callable[[Tensor], Tensor], x: Tensor, w: Tensor, setting: str) -> Callable[[], Tensor]:
    if setting == "alone":
        return lambda: way(x)

    def step() -> Tensor:
        x @ w
        return way(x)

    return step


def _time(steps: dict[str, Callable], length: str, device: str) -> dict[str, list[float]]:
    """Return the seconds of each step in each round."""
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    once = Variant(steps["plain"])
    once.warm_up(sync)
    count = min(100, max(1, ceil(STEP / once.seconds)))
    variants = {name: Variant(_repeated(step, count)) for name, step in steps.items()}
    for variant in variants.values():
        variant.warm_up(sync)
    seconds, rounds = LENGTHS[length]
    times = interleave(variants, "plain", sync, seconds, rounds)
    return {name: [t / count for t in values] for name, values in times.items()}


def _repeated(step: Callable[[], Tensor], count: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        for _ in range(count - 1):
            step()
        return step()

    return run


def text(problem: dict) -> str:
    """Return the lines of one size: torch's milliseconds and times over it, lower quartiles."""
    lines = []
    for row in problem["rows"]:
        low, _, high = row["plain_ms"]
        cells = ", ".join(f"{way} {ratio:.2f}" for way, ratio in row["fast"].items() if way != "plain")
        line = f"{problem['name']:>12} {row['setting']:8} plain {low:.3g} ms; {cells}"
        others = [ratio for way, ratio in row["fast"].items() if way not in ("chosen", "panels")]
        if "chosen" in row["fast"] and row["fast"][problem["chosen"]] > NEAR * min(others):
            line += f"  NOT FASTEST: {problem['chosen']}"
        if high > report.DISTURBED * low:
            line += "  DISTURBED"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
