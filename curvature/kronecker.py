r"""Kronecker products :math:`B \otimes A` that know which axes of a parameter they act on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Axes:
    """How a parameter's axes form the matrix ``[g, o, i]`` that a Kronecker product acts on.

    ``g`` counts groups (1 unless the layer is grouped), ``o`` output features, ``i`` input
    features. The map is an `einops` pattern, because layers swap roles: a transposed convolution
    stores ``[i, o, k]``, an embedding ``[i, o]``, a grouped convolution ``[(g o), i, k]``.

    Args:
        pattern: `einops` pattern from the parameter to ``g o i``, e.g. ``"(g o) i k -> g o (i k)"``.
        sizes: Sizes of the named axes that the pattern cannot infer, as ``(name, size)`` pairs.

    Example:
        >>> import torch
        >>> Axes("i o -> 1 o i").to_matrix(torch.zeros(3, 2)).shape
        torch.Size([1, 2, 3])
    """

    pattern: str = "o i -> 1 o i"
    sizes: tuple[tuple[str, int], ...] = ()

    def to_matrix(self, t: Tensor) -> Tensor:
        """Bring a (batch of) parameter-shaped tensor(s) ``[..., *shape]`` to ``[..., g, o, i]``."""
        left, right = self.pattern.split("->")
        return self._rearrange(t, left, right, len(_axes(left)))

    def to_parameter(self, m: Tensor) -> Tensor:
        """Bring ``[..., g, o, i]`` back to the parameter's shape, the inverse of `to_matrix`."""
        if self.pattern == MATRIX.pattern:  # by far the most frequent; einops costs 10 us
            return m.squeeze(-3)
        if self.pattern == BIAS.pattern:
            return m.squeeze(-3).squeeze(-1)
        left, right = self.pattern.split("->")
        return self._rearrange(m, right, left, 3)

    def _rearrange(self, t: Tensor, source: str, target: str, dims: int) -> Tensor:
        lead = t.shape[: t.dim() - dims]
        t = t.reshape(prod(lead), *t.shape[t.dim() - dims :])
        t = rearrange(t, f"lead {source} -> lead {target}", **dict(self.sizes))
        return t.reshape(*lead, *t.shape[1:])


MATRIX = Axes()
BIAS = Axes("o -> 1 o 1")


def _axes(side: str) -> list[str]:
    """Split one side of a pattern into its axes; a parenthesised group is one axis."""
    axes, depth = [], 0
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if depth == 0 and token != ")":
            axes.append(token)
        depth += (token == "(") - (token == ")")
    return axes


@dataclass(eq=False, slots=True)
class Kronecker:
    r"""A Kronecker-factored curvature block :math:`B \otimes A`.

    .. math::  (B \otimes A) \operatorname{vec}(V) = \operatorname{vec}(B V A)

    for row-major ``vec`` and the parameter read as a matrix :math:`V \in R^{o \times i}`
    (symmetric factors). It unpacks as ``B, A = kronecker``.

    Args:
        B: Factor of the layer's outputs, ``[o, o]``; ``[o]`` if diagonal. With ``groups > 1`` both
            factors have a leading group axis.
        A: Factor of the layer's inputs, ``[i, i]``; ``[i]`` if diagonal (one-hot inputs).
        axes: Map from the parameter's axes to ``[g, o, i]``.
        groups: Number of groups; the block is block-diagonal over them.
        joint: Whether the last input feature is the constant 1 that belongs to the bias. The
            block then acts on ``[weight | bias]``, the bias being the last column.

    Example:
        For least squares with a sum loss the block is exact: ``2 I (x) X^T X / N * N``.

        >>> import torch
        >>> K = Kronecker(B=2.0 * torch.eye(2), A=torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
        >>> K.to_dense()
        tensor([[4., 2., 0., 0.],
                [2., 2., 0., 0.],
                [0., 0., 4., 2.],
                [0., 0., 2., 2.]])
        >>> K.trace()
        tensor(12.)
    """

    B: Tensor
    A: Tensor
    axes: Axes = MATRIX
    groups: int = 1
    joint: bool = False

    def __post_init__(self):
        b, a = self.B.shape, self.A.shape
        if self.groups == 1 and len(b) == len(a) == 2 and b[0] == b[1] and a[0] == a[1]:
            return  # the common case, at little cost
        lead = 1 if self.groups > 1 else 0
        for name, factor in (("B", self.B), ("A", self.A)):
            dims = factor.dim() - lead
            square = dims == 1 or (dims == 2 and factor.shape[-1] == factor.shape[-2])
            if not square or (lead and factor.shape[0] != self.groups):
                raise ValueError(
                    f"Kronecker: factor {name} has shape {tuple(factor.shape)}; expected a square "
                    f"matrix or a diagonal{f', {self.groups} of them' if lead else ''}."
                )

    def __iter__(self) -> Iterator[Tensor]:
        """Unpack as ``B, A``."""
        return iter((self.B, self.A))

    def __repr__(self) -> str:
        kind = ", joint" if self.joint else ""
        return f"Kronecker(B={tuple(self.B.shape)}, A={tuple(self.A.shape)}{kind})"

    def matvec(self, weight: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        r"""Multiply the block with parameter-shaped tensors.

        Args:
            weight: ``[..., *parameter.shape]``, any number of leading batch axes.
            bias: ``[..., o]``; required by a joint block, refused by any other.

        Returns:
            The product, shaped like the argument(s).

        Raises:
            ValueError: If ``bias`` is missing for a joint block or given for another.
        """
        if self.joint != (bias is not None):
            expected = "takes (weight, bias)" if self.joint else "takes one tensor"
            raise ValueError(f"Kronecker.matvec: this block {expected}; joint={self.joint}.")
        V = self.axes.to_matrix(weight)
        if bias is not None:
            column = bias.reshape(*V.shape[:-1], 1)
            V = torch.cat([V, column], dim=-1)
        V = self._right(self._left(V))
        if bias is None:
            return self.axes.to_parameter(V)
        return self.axes.to_parameter(V[..., :-1]), V[..., -1].reshape(bias.shape)

    def _left(self, V: Tensor) -> Tensor:
        B = self.B if self.groups > 1 else self.B[None]
        return B[..., None] * V if B.dim() == 2 else B @ V

    def _right(self, V: Tensor) -> Tensor:
        A = self.A if self.groups > 1 else self.A[None]
        return V * A[..., None, :] if A.dim() == 2 else V @ A

    def to_dense(self) -> Tensor:
        """Return the dense block ``[p, p]``.

        Rows and columns follow ``parameter.flatten()``; for a joint block they follow
        ``torch.cat([W, bias[:, None]], 1).flatten()`` with ``W`` the matrix form ``[(g o), i]``.
        """
        o, i = self.B.shape[-1], self.A.shape[-1]
        p = self.groups * o * i
        basis = torch.eye(p, dtype=self.B.dtype, device=self.B.device)
        if self.joint:
            return self._right(self._left(basis.reshape(p, self.groups, o, i))).reshape(p, p)
        matrix = self.axes.to_parameter(basis.reshape(p, self.groups, o, i))
        # columns of `basis` follow (g, o, i); sort both sides into the parameter's own order
        order = matrix.reshape(p, p).argmax(dim=1)
        product = self._right(self._left(basis.reshape(p, self.groups, o, i))).reshape(p, p)
        dense = torch.empty_like(product)
        dense[order[:, None], order[None, :]] = product
        return dense

    def trace(self) -> Tensor:
        r"""Return :math:`\operatorname{tr}(B \otimes A) = \sum_g \operatorname{tr} B_g \operatorname{tr} A_g`."""  # noqa: E501
        return (_trace(self.B, self.groups) * _trace(self.A, self.groups)).sum()


def _trace(factor: Tensor, groups: int) -> Tensor:
    diagonal = factor.dim() == (2 if groups > 1 else 1)
    entries = factor if diagonal else factor.diagonal(dim1=-2, dim2=-1)
    return entries.sum(-1)


@dataclass(eq=False)
class KroneckerSum:
    r"""A sum of Kronecker products :math:`\sum_t B_t \otimes A_t` of one parameter.

    This is the block of a parameter that two layers use in different roles, such as a matrix that
    is an embedding and an output head: each role contributes one term, cross terms are dropped.

    Args:
        terms: The Kronecker products, none of them joint.

    Example:
        >>> import torch
        >>> K = Kronecker(torch.eye(1), 3.0 * torch.eye(1))
        >>> KroneckerSum((K, K)).to_dense()
        tensor([[6.]])
    """

    terms: tuple[Kronecker, ...]

    def __iter__(self) -> Iterator[Kronecker]:
        """Iterate over the terms."""
        return iter(self.terms)

    def matvec(self, weight: Tensor) -> Tensor:
        """Multiply with a parameter-shaped tensor ``[..., *parameter.shape]``."""
        return sum(term.matvec(weight) for term in self.terms)

    def to_dense(self) -> Tensor:
        """Return the dense block ``[p, p]`` in the order of ``parameter.flatten()``."""
        return sum(term.to_dense() for term in self.terms)

    def trace(self) -> Tensor:
        """Return the sum of the terms' traces."""
        return sum(term.trace() for term in self.terms)
