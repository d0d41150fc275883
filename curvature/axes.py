"""How a parameter's axes form the matrix that a curvature block acts on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

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
        if self.pattern == MATRIX.pattern:  # by far the most frequent; einops costs 10 us
            return t.unsqueeze(-3)
        if self.pattern == BIAS.pattern:
            return t.unsqueeze(-2).unsqueeze(-1)
        left, right = self.pattern.split("->")
        return self._rearrange(t, left, right, len(_axes(left)))

    def matrices(self, t: Tensor) -> Sequence[Tensor]:
        """Return the matrices ``[o, i]`` of a parameter-shaped tensor, group by group."""
        if self.pattern == MATRIX.pattern:
            return (t,)
        if self.pattern == BIAS.pattern:
            return (t.unsqueeze(-1),)
        return self.to_matrix(t).unbind()

    def to_parameter(self, m: Tensor) -> Tensor:
        """Bring ``[..., g, o, i]`` back to the parameter's shape, the inverse of `to_matrix`."""
        if self.pattern == MATRIX.pattern:
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
