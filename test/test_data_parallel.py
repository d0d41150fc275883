"""Curvature over processes equals that of one process with all the data, on 2 and 4 gloo processes."""

from pathlib import Path

import pytest
import torch
from data_parallel_cases import CASES, work
from torch import multiprocessing as mp

WORLD = 4


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    """What each process found; all cases run in one go, because starting processes takes seconds."""
    path: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (WORLD, str(path / "store"), str(path)), nprocs=WORLD)
    return [torch.load(path / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_processes(outcomes, name, size):
    for rank, found in enumerate(outcomes):
        assert found[f"{name} {size}"] is None, f"process {rank}:\n{found[f'{name} {size}']}"
