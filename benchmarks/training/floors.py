"""Counted floors of preconditioned training, and bytes of an optimizer's state.

The floor of an iteration is SGD's, which has the same momentum and writes the parameters once, and the
matrix products that the mathematics needs beyond: those of each step, and a tenth of those of a refresh.
K and C are joint over weight and bias, A and B have one row per datum (KFAC-reduce, empirical). As in
`benchmarks.floor`: general products, nothing elementwise; one that knows of a symmetric result could
save half of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.floor import Layer, MatMul, Operands, Product, Shapes


@dataclass(frozen=True)
class Inverse:
    """The inverse of a symmetric positive definite matrix of size d, through Cholesky."""

    d: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return self.d**3

    def prepare(self, operands: Operands) -> Callable[[], Tensor]:
        """Return a function that computes the inverse."""
        X = operands(self.d, self.d)
        M = X @ X.mT + self.d * torch.eye(self.d, device=X.device)
        return lambda: torch.cholesky_inverse(torch.linalg.cholesky(M))


@dataclass(frozen=True)
class Work:
    """Products beyond SGD's iteration.

    Args:
        step: Of each step.
        refresh: Of each refresh.
    """

    step: tuple[Product, ...]
    refresh: tuple[Product | Inverse, ...]


def _work(
    shapes: Shapes,
    step: Callable[[Layer, int, int], list],
    refresh: Callable[[Layer, int], list],
) -> Work:
    """Collect the products of layers; ``refresh`` has those of one side of dimension d."""
    steps, refreshes = [], []
    for layer in shapes.layers:
        if layer.groups != 1:
            raise ValueError(f"The floor of training is counted for ungrouped layers, got {layer}.")
        o, i = layer.o, layer.i + 1
        steps += step(layer, o, i)
        refreshes += refresh(layer, i) + refresh(layer, o)
    return Work(tuple(steps), tuple(refreshes))


def dense(shapes: Shapes) -> Work:
    """``(C C^T) G (K K^T)`` with kept Gram matrices; for K: ``a K``, its Gram, K^T K, K m, K K^T."""
    return _work(
        shapes,
        lambda layer, o, i: [MatMul(1, o, o, i), MatMul(1, o, i, i)],
        lambda layer, d: [
            MatMul(1, layer.N, d, d),
            MatMul(1, d, layer.N, d, "tn"),
            MatMul(1, d, d, d, "tn"),
            MatMul(1, d, d, d),
            MatMul(1, d, d, d, "nt"),
        ],
    )


def kfac(shapes: Shapes) -> Work:
    """``B^-1 G A^-1``; for A: the Gram of a, and an inverse."""
    return _work(
        shapes,
        lambda layer, o, i: [MatMul(1, o, o, i), MatMul(1, o, i, i)],
        lambda layer, d: [MatMul(1, d, layer.N, d, "tn"), Inverse(d)],
    )


def block_diagonal(block: int) -> Callable[[Shapes], Work]:
    """As `dense`, for each block; the ragged last one counts as part of one."""

    def blocks(d: int) -> tuple[int, int]:
        b = min(block, d)
        return max(1, d // b), b

    def step(layer: Layer, o: int, i: int) -> list:
        (m, b), (n, c) = blocks(o), blocks(i)
        return [MatMul(m, b, b, i), MatMul(n, o, c, c)]

    def refresh(layer: Layer, d: int) -> list:
        m, b = blocks(d)
        squares = [MatMul(m, b, b, b, layout) for layout in ("tn", "nn", "nt")]
        return [MatMul(m, layer.N, b, b), MatMul(m, b, layer.N, b, "tn"), *squares]

    return lambda shapes: _work(shapes, step, refresh)


def hierarchical(k1: int, k2: int) -> Callable[[Shapes], Work]:
    """``C C^T G K K^T`` from right to left: four products with borders; for K: ``a K``, its Gram."""

    def borders(d: int, n: int) -> list:
        first = min(k1, d)
        second = min(k2, d - first)
        found = [MatMul(1, first, d, n), MatMul(1, second, d - first, n)]
        return [p for p in found if p.m]

    def step(layer: Layer, o: int, i: int) -> list:
        return 2 * borders(o, i) + 2 * borders(i, o)

    def refresh(layer: Layer, d: int) -> list:
        return [*borders(d, layer.N), *(MatMul(1, p.m, p.n, p.k, "nt") for p in borders(d, layer.N))]

    return lambda shapes: _work(shapes, step, refresh)


# --------------------------------------------------------------------------- bytes


def bytes_within(root: Any, model: nn.Module) -> int:
    """Return the bytes of all tensors that can be reached from an object, each storage once.

    Parameters, buffers and gradients of the model do not count, and modules and functions are not
    entered.
    """
    own = [*model.parameters(), *model.buffers()]
    own += [p.grad for p in model.parameters() if p.grad is not None]
    skipped = {t.untyped_storage().data_ptr() for t in own}
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, FunctionType, nn.Module)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in skipped:
                found[storage.data_ptr()] = storage.nbytes()
        else:
            stack.extend(gc.get_referents(thing))
    return sum(found.values())
