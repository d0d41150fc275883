"""Calling operations of a graph, and reading what they saved, without using it up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

T = TypeVar("T")

_START = torch.zeros((), requires_grad=True)


def call(node: Node, arguments: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return an operation's vector-Jacobian product with what arrives at its outputs."""
    # C++ nodes are callable, those of a custom autograd.Function have `apply`
    if callable(node):
        out = node(*arguments)
        return out if isinstance(out, tuple) else (out,)
    out = node.apply(*arguments)
    out = out if isinstance(out, tuple) else (out,)
    if len(out) == len(node.next_functions):
        return out
    # one for each argument of its forward, also for those that are no tensors
    wanted = iter([t for t, need in zip(out, node.needs_input_grad, strict=False) if need])
    return tuple(None if child is None else next(wanted) for child, _ in node.next_functions)


class _Run(torch.autograd.Function):
    """An operation whose backward runs something else."""

    @staticmethod
    def forward(ctx, x: Tensor, run: Callable[[], T], results: list[T]) -> Tensor:
        ctx.run, ctx.results = run, results
        return x.new_empty(())

    @staticmethod
    def backward(ctx, g: Tensor):
        ctx.results.append(ctx.run())
        return None, None, None


def in_a_pass_of_its_own(run: Callable[[], T]) -> T:
    """Call a function from within a nested backward pass, and return its result.

    Activation checkpointing hands out each recomputed tensor once per backward pass: operations that
    we call, or saved tensors that we read, would use up what the main one has yet to ask for. And in
    a pass that was asked for some gradients, ``backward(inputs=...)``, operations compute no others,
    even if we call them.
    """
    results: list[T] = []
    with_graph = torch.is_grad_enabled()

    def run_as_outside() -> T:
        with torch.set_grad_enabled(with_graph):
            return run()

    with torch.enable_grad():
        _Run.apply(_START, run_as_outside, results).backward()
    return results[0]
