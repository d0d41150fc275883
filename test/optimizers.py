"""Parameters with gradients and diagonals put on them by hand, for tests of optimizers."""

import torch
from torch import Tensor, nn

from optim.state import state_dtype

SHAPES = [(3, 2), (4,), ()]


def make_params(dtype: torch.dtype = torch.float64, shapes: list = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def make_data(params: list[nn.Parameter], steps: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return gradients and diagonals, for each step a list over the parameters."""
    return [
        (
            [torch.randn_like(p) for p in params],
            [torch.randn_like(p, dtype=state_dtype(p)) for p in params],
        )
        for _ in range(steps)
    ]


def put_all(params: list[nn.Parameter], grads: list[Tensor], diagonals: list[Tensor]) -> None:
    for p, g, h in zip(params, grads, diagonals, strict=True):
        p.grad, p.hesscale = g.clone(), h.clone()


def run(opt: torch.optim.Optimizer, params: list[nn.Parameter], data: list) -> None:
    for grads, diagonals in data:
        put_all(params, grads, diagonals)
        opt.step()
