"""Natural-gradient optimizers over processes equal those of one process, on 2 and 4 gloo processes."""

from pathlib import Path

import pytest
import torch
from natural_parallel_cases import RUNS, work
from torch import multiprocessing as mp

WORLD = 4


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    """What each process found; all cases run in one go, because starting processes takes seconds."""
    path: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (WORLD, str(path)), nprocs=WORLD)
    return [torch.load(path / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_processes(outcomes, name, size):
    for rank, found in enumerate(outcomes):
        assert found[f"{name} {size}"] is None, f"process {rank}:\n{found[f'{name} {size}']}"
