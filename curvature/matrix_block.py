"""Blocks that act on a parameter read as a matrix, with or without its bias as the last column."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from curvature.axes import Axes
from curvature.block import Block, Parts, check_vectors, result_dtype
from curvature.precision import without_autocast


class MatrixBlock(Block):
    """A block that acts on matrices ``V[..., g, o, i]``: g groups, o outputs, i inputs.

    Attributes:
        axes: Map from the parameter's axes to ``[g, o, i]``.
        groups: Number of groups.
        joint: Whether the last input feature is the constant 1 that belongs to the bias.
    """

    __slots__ = ()

    axes: Axes
    groups: int
    joint: bool

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int, int]:
        """Sizes g, o and i of the matrices; i counts the bias column."""

    @abstractmethod
    def apply(self, V: Tensor) -> Tensor:
        """Multiply the block with matrices ``V[..., g, o, i]``."""

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the parameters that the block acts on: one, or two (weight and bias)."""
        return _shapes(self.axes, *self.sizes, self.joint)

    @without_autocast
    def matvec(self, *vectors: Tensor) -> Parts:
        """Return ``M v``, shaped like the vectors.

        Args:
            vectors: ``[..., *parameter.shape]``, any number of leading batch axes; for a joint
                block weight and bias.

        Returns:
            The product, shaped like the argument(s), in their data type.

        Raises:
            ValueError: If the vectors are not shaped like the parameters.
        """
        check_vectors(f"{type(self).__name__}.matvec", vectors, self.shapes)
        dtype = torch.promote_types(vectors[0].dtype, self.dtype)
        V = self.apply(self.to_matrix(*vectors).to(dtype))
        return self.to_parameters(V.to(result_dtype(vectors[0], dtype)))

    def to_matrix(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Bring parameter-shaped tensors to ``[..., g, o, i]``, the bias being the last column."""
        V = self.axes.to_matrix(weight)
        if bias is None:
            return V
        return torch.cat([V, bias.reshape(*V.shape[:-1], 1)], dim=-1)

    def to_parameters(self, V: Tensor) -> Parts:
        """Bring ``[..., g, o, i]`` back to the shape(s) of the parameter(s)."""
        if not self.joint:
            return self.axes.to_parameter(V)
        return self.axes.to_parameter(V[..., :-1]), V[..., -1].flatten(-2)

    @without_autocast
    def to_dense(self) -> Tensor:
        """Return the dense matrix ``[p, p]``.

        Rows and columns follow ``parameter.flatten()``; for a block of weight and bias they follow
        ``torch.cat([W, bias[:, None]], 1).flatten()`` with ``W`` the matrix form ``[(g o), i]``.
        """
        g, o, i = self.sizes
        p = g * o * i
        basis = torch.eye(p, dtype=self.dtype, device=self.device).reshape(p, g, o, i)
        product = self.apply(basis).reshape(p, p).mT
        if self.joint:
            return product
        # rows of `product` follow (g, o, i); sort both sides into the parameter's own order
        place = torch.arange(p, device=self.device).reshape(g, o, i)
        order = self.axes.to_parameter(place).flatten()
        return product[order][:, order]

    def _layout(self) -> dict:
        """Return what a state dict says about the matrix form."""
        return {
            "pattern": self.axes.pattern,
            "sizes": [list(size) for size in self.axes.sizes],
            "groups": self.groups,
            "joint": self.joint,
        }


@lru_cache(maxsize=4096)
def _shapes(axes: Axes, g: int, o: int, i: int, joint: bool) -> tuple[torch.Size, ...]:
    """Return the shapes of the parameter(s) that matrices ``[g, o, i]`` stand for."""
    weight = axes.to_parameter(torch.empty(g, o, i - joint, device="meta")).shape
    return (weight, torch.Size([g * o])) if joint else (weight,)


def layout_of(state: dict) -> dict:
    """Return the arguments that `MatrixBlock._layout` wrote down."""
    sizes = tuple((name, size) for name, size in state["sizes"])
    axes = Axes(state["pattern"], sizes)
    return {"axes": axes, "groups": state["groups"], "joint": state["joint"]}


def same_layout(a: MatrixBlock, b: MatrixBlock) -> bool:
    """Whether two blocks read their parameters in the same way."""
    return (a.axes, a.groups, a.joint, a.sizes) == (b.axes, b.groups, b.joint, b.sizes)
