"""KFAC's blocks of elementwise layers: what has no Kronecker structure is kept dense or diagonal."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

from torch import Tensor, nn

from backpack_ext.normal import gram
from backpack_ext.share import Part, Share
from backpack_ext.unit import Unit
from curvature import DenseBlock, DiagonalBlock


class ElementwiseLayer:
    r"""The blocks of one norm's scale and shift, ``sum_vn G G^T`` or its diagonal.

    With per-sample vectors ``G[v,n,d]`` the dense block is that of the (generalised) Gauss-Newton, no
    approximation. Without vectors (``fisher="forward"``), the output's curvature counts as the
    identity, and the block is the diagonal of mean squared inputs, for a shift the identity.
    """

    def __init__(self, unit: Unit):
        self.parameters = unit.parameters
        self.dense = True
        self.sums: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self.rows = 0

    def add(self, role: str, G: Tensor, factor: float) -> None:
        """Add ``factor`` times the outer products of ``G[v,n,*shape]``, or their diagonals."""
        if self.dense:
            value = gram(G.reshape(1, G.shape[0] * G.shape[1], -1), factor)[0]
        else:
            value = factor * G.square().sum((0, 1))
        old = self.sums.get(role)
        self.sums[role] = value if old is None else old + value

    def add_inputs(self, role: str, a: Tensor) -> None:
        """Average the squares of inputs ``a[r,*shape]`` with those of further rows."""
        self.rows = len(a)
        self.means[role] = a.square().sum(0) / max(1, len(a))

    def blocks(self) -> list[tuple[nn.Parameter, DenseBlock | DiagonalBlock]]:
        """Return one block per parameter."""
        found = []
        for role, value in (self.sums | self.means).items():
            p = self.parameters[role]
            dense = self.dense and role not in self.means
            found.append((p, DenseBlock(value, p.shape) if dense else DiagonalBlock(value)))
        return found

    def share(self, names: Callable[[nn.Parameter], str]) -> Share:
        """Return what adds up over processes."""
        named = {role: names(p) for role, p in self.parameters.items()}
        share = Share(("elementwise", *named.items()), named, ("elementwise", self.dense))
        for role, value in self.sums.items():
            share.parts[f"sums.{role}"] = Part(value, 1)
        for role, value in self.means.items():
            share.parts[f"means.{role}"] = Part(value, 0, self.rows)
        share.counts["rows"] = self.rows
        return share

    @classmethod
    def of_share(cls, share: Share, parameters: dict[str, nn.Parameter]) -> ElementwiseLayer:
        """Return the layer that has some sums."""
        layer = object.__new__(cls)
        layer.parameters, (_, layer.dense) = parameters, share.frame
        layer.sums, layer.means, layer.rows = {}, {}, int(share.counts["rows"])
        for name, part in share.parts.items():
            kind, role = name.split(".")
            if kind == "sums":
                layer.sums[role] = part.tensor
            else:
                layer.means[role] = part.tensor / max(1, layer.rows)
        return layer

    def merge_into(self, total: dict, key: tuple, weight: float) -> None:
        """Add a batch's blocks, put on the total's scale."""
        other = total.get(key)
        if other is None:
            other = total[key] = copy(self)
            other.sums, other.means, other.rows = {}, {}, 0
        for role, value in self.sums.items():
            old = other.sums.get(role)
            other.sums[role] = weight * value if old is None else old + weight * value
        rows = other.rows + self.rows
        for role, value in self.means.items():
            old = other.means.get(role)
            other.means[role] = value if old is None else old + self.rows / max(1, rows) * (value - old)
        other.rows = rows
