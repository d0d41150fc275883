"""Time and bytes per step over processes: curvature beside plain DistributedDataParallel, on gloo.

Each process has the same number of data, whatever their number. "Sent" is the size of the messages; a
ring of k processes sends and receives ``2 (k - 1) / k`` times as much per process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from backpack_ext import KFAC, DiagGGN, backpack, extend
from benchmarks import report
from benchmarks.models import PROBLEMS

RESULTS = Path(__file__).parent / "results"

ROWS: dict[str, Callable | None] = {
    "plain DDP": None,
    "KFAC expand mc": lambda: KFAC("expand", "mc"),
    "KFAC reduce mc": lambda: KFAC("reduce", "mc"),
    "DiagGGN mc": lambda: DiagGGN("mc"),
}


def measure(model: nn.Module, x, y, rounds: int) -> list[dict]:
    """Time all rows in turn; return their quartiles in ms, and the bytes that they send per step."""
    model, loss_fn = extend(DistributedDataParallel(model)), extend(nn.CrossEntropyLoss())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    alone = dist.get_world_size() == 1
    blocks = {
        name: backpack() if make is None else backpack(make(), process_group=dist.group.WORLD)
        for name, make in ROWS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for k in range(rounds + 2):  # two to warm up: layers are checked, buckets are made
        for name, block in blocks.items():
            dist.barrier()
            start = perf_counter()
            model.zero_grad()
            with block:
                loss_fn(model(x), y).backward()
            if k >= 2:
                times[name].append(1e3 * (perf_counter() - start))
    found = []
    for name, block in blocks.items():
        ours = 0 if block.processes is None else block.processes.sent / (rounds + 2)
        ms = quantiles(times[name], n=4) if rounds > 1 else 3 * times[name]
        sent = 0 if alone else gradients + ours
        found.append({"name": name, "ms": ms, "sent": sent})
    return found


def work(rank: int, world: int, folder: str, name: str, rounds: int) -> None:
    """Be one of the processes; the first one stores what it measured."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    problem = PROBLEMS[name]("cpu")
    rows = measure(problem.model, problem.x, problem.y, rounds)
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def table(found: list[dict]) -> str:
    """Return times, those relative to plain steps, and bytes, by the number of processes."""
    lines = []
    for problem in found:
        plain = median(problem["rows"][0]["ms"])
        for row in problem["rows"]:
            ms = median(row["ms"])
            lines.append(
                f"{problem['model']:6} {problem['processes']} processes  {row['name']:16} {ms:9.2f} ms "
                f"{ms / plain:6.2f} plain  {row['sent'] / 2**20:8.3f} MiB"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print the table, store it as JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.data_parallel", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny layers, one round, 1 and 2 processes")
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=["mlp", "vit"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.processes, args.rounds = ["tiny"], [1, 2], 1
    found: dict = {"machine": report.machine("cpu") | {"threads": 1}, "problems": []}
    for name in args.models:
        for world in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(work, (world, folder, name, args.rounds), nprocs=world)
                rows = json.loads(Path(folder, f"{world}.json").read_text())
            found["problems"].append({"model": name, "processes": world, "rows": rows})
            print(table(found["problems"][-1:]), flush=True)
    path = args.out / f"data-parallel-cpu{'-quick' if args.quick else ''}.json"
    report.write(found, path)
    print(f"stored in {path}")
    return found


if __name__ == "__main__":
    main()
