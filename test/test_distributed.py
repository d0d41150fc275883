"""Accumulation over processes equals accumulation of batches, on two gloo processes."""

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from curvature import Axes, BlockDiagonalOperator, DiagonalBlock, Kronecker, KroneckerSum

WORLD = 2


def blocks(rank: int) -> BlockDiagonalOperator:
    """What one process has: other numbers of rows, a shared eigenbasis, several data types."""
    g = torch.Generator().manual_seed(rank)

    def gram(d: int, lead: tuple = (), dtype: torch.dtype = torch.float64) -> torch.Tensor:
        x = torch.randn(*lead, 9, d, generator=g, dtype=torch.float64)
        return (x.mT @ x).to(dtype)

    K = Kronecker(gram(3), gram(4), rows=3 + 2 * rank)
    grouped = Kronecker(gram(2, (2,)), gram(3, (2,)), Axes("(g o) i -> g o i", (("g", 2),)), 2, rows=7)
    one = torch.eye(3, dtype=torch.float64)
    eigen = Kronecker(one + 1, one + 2).eigh() * (rank + 1.0)
    low = Kronecker(gram(2, dtype=torch.bfloat16), gram(2, dtype=torch.bfloat16), rows=rank + 1)
    return BlockDiagonalOperator(
        {
            "plain": K,
            "grouped": grouped,
            "eigen": eigen,
            "tied": KroneckerSum((K, K)),
            "diagonal": DiagonalBlock(torch.rand(5, generator=g)),
            "low": low,
        }
    )


def work(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    H = blocks(rank)
    found = {"sum": H.all_reduce(average=False), "mean": H.all_reduce()}
    state = {k: v.state_dict() for k, v in found.items()}
    state["alone"] = H["plain"].all_reduce(average=False).state_dict()
    state["alone, mean"] = H["plain"].all_reduce().state_dict()
    basis = Kronecker(torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 2.0 + rank]])).eigh()
    try:
        basis.all_reduce()
    except ValueError as error:
        state["error"] = str(error)
    torch.save(state, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path):
    mp.spawn(work, (str(tmp_path / "store"), str(tmp_path)), nprocs=WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    total = blocks(0) + blocks(1)
    for state in found:
        for how, factor in (("sum", 1.0), ("mean", 0.5)):
            H = BlockDiagonalOperator.from_state_dict(state[how])
            for name in total.names:
                expected = (total[name] * factor).to_dense()
                tolerance = {"rtol": 0.05, "atol": 0.05} if name == "low" else {}
                torch.testing.assert_close(H[name].to_dense(), expected, **tolerance)
            assert (H["plain"].rows, H["low"].rows) == (8, 3)
        assert state["alone"]["rows"] == state["alone, mean"]["rows"] == 8
        torch.testing.assert_close(state["alone, mean"]["B"], total["plain"].B / 2)
        torch.testing.assert_close(state["alone"]["A"], total["plain"].A)
        assert "the processes have different eigenbases" in state["error"]


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        DiagonalBlock(torch.ones(2)).all_reduce()
