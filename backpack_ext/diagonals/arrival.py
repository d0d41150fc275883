"""Gradients of the main backward pass, brought to a recursion."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack_ext.sweep import Receiver


class Waiting(Protocol):
    """What gradients are brought to."""

    def arrive(self, node: Node, grads: tuple[Tensor | None, ...]) -> None:
        """Take the gradients at the outputs of a node that is about to be executed."""


class Arrival:
    """A hook on nodes that hands over the gradients at their outputs.

    The nodes own it, so it holds neither them nor, strongly, what it brings gradients to.

    Args:
        to: Where to bring them.
        keep: Whether the graph outlives the pass, so that hooks have to be removed.
    """

    __slots__ = ("handles", "keep", "task", "to")

    def __init__(self, to: Waiting, keep: bool):
        self.to, self.keep = weakref.ref(to), keep
        self.task = torch._C._current_graph_task_id()
        self.handles: list = []

    def bring(self, node: Node) -> None:
        """Have the gradients at a node's outputs brought."""
        handle = node.register_prehook(self)
        if self.keep:
            self.handles.append(handle)

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        """Bring them."""
        # else in a nested pass, or in one after the recursion's own, which failed
        if Receiver.active is None and self.task == torch._C._current_graph_task_id():
            to = self.to()
            if to is not None:
                to.arrive(torch._C._current_autograd_node(), grads)

    def remove(self) -> None:
        """Let go of hooks that would outlive the pass."""
        for handle in self.handles:
            handle.remove()
