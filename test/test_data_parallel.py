"""Curvature over processes equals that of one process with all the data, on 2 and 4 gloo processes."""

import threading
from pathlib import Path

import pytest
import torch
from data_parallel_cases import CASES, work
from torch import multiprocessing as mp
from torch import nn

from backpack_ext import DiagGGN, RecordingError, UnsupportedError, backpack, data_parallel, extend

WORLD = 4

pytestmark = pytest.mark.filterwarnings("ignore:.*the block ended and nothing was computed")


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


def model_and_loss() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    model = extend(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    return model, extend(nn.MSELoss()), torch.ones(4, 3)


def in_a_thread(run) -> Exception | None:
    """Run something in another thread; return what it raised."""
    raised: list[Exception | None] = [None]

    def caught():
        try:
            run()
        except Exception as error:
            raised[0] = error

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    return raised[0]


def test_another_thread_is_refused():
    model, loss_fn, x = model_and_loss()
    recorded = loss_fn(model(x), x)

    def block():
        with backpack(DiagGGN()):
            pass

    def evaluation():
        with torch.no_grad():
            model(x)

    with backpack(DiagGGN()):
        for run in (block, lambda: model(x), recorded.backward):
            error = in_a_thread(run)
            assert isinstance(error, RecordingError)
            assert "while another thread is inside" in str(error)
        assert in_a_thread(evaluation) is None
        loss_fn(model(x), x).backward()
    assert in_a_thread(lambda: loss_fn(model(x), x).backward()) is None


@pytest.mark.parametrize("outside", [False, True])
def test_data_parallel_is_refused(outside):
    """Its replicas are modules without parameters of their own; on a CPU it makes none."""
    model, _, x = model_and_loss()
    wrapper = extend(nn.DataParallel(model)) if outside else nn.DataParallel(model)
    replica = wrapper.module._replicate_for_data_parallel()
    with backpack(DiagGGN()):
        with pytest.raises(UnsupportedError, match="Use DistributedDataParallel"):
            replica(x)
        with torch.no_grad():
            replica(x)


def test_batch_norm_over_processes_is_refused(monkeypatch):
    """The real one runs on GPUs only."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    monkeypatch.setattr(data_parallel, "SYNC", Norm._backward_cls)
    model, loss_fn, x = model_and_loss()
    with backpack(DiagGGN()), pytest.raises(UnsupportedError, match="couples the data of all processes"):
        loss_fn(Norm.apply(model(x)), x).backward()
