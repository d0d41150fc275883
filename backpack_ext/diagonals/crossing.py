r"""The cross terms of additions, which the recursion drops.

At ``y = u(x) + v(x)`` the exact diagonal at x has, besides the shares of both branches, the term
``2 sum_i h_i J^u_ij J^v_ij``; at a residual connection ``2 h diag(J_f)``. With random signs r it is
estimated by

.. math::

    2 \big(J_u^T r \sqrt{|h|}\big) \odot \big(J_v^T r \, \mathrm{sign}(h) \sqrt{|h|}\big),

exact where both branches are elementwise, unbiased otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backpack_ext.context import SuspendBackpack
from backpack_ext.diagonals.operation import Edge, Operation, gradient_edge, made, same, shape_of, turned
from backpack_ext.diagonals.unknown import Signs
from backpack_ext.sweep import silent


def cross_terms(op: Operation, h: Tensor, signs: Signs) -> Iterator[tuple[Edge, Tensor]]:
    """Yield the tensors that both terms of a sum depend on, with the cross term there.

    Args:
        op: The addition.
        h: The diagonal at its output.
        signs: Returns random signs shaped like a tensor.
    """
    u, v = op.inputs
    if u is None or v is None:
        return
    forks = _forks(u, v)
    if not forks:
        return
    factor = 2 * op.node._saved_alpha * (-1 if op.name == "SubBackward0" else 1)
    root = h.abs().sqrt() * signs(h)
    left, right = _back(u, forks, root), _back(v, forks, root * h.sign())
    for fork, a, b in zip(forks, left, right, strict=True):
        if a is not None and b is not None:
            yield fork, factor * a.to(h.dtype) * b.to(h.dtype)


def _forks(u: Edge, v: Edge) -> list[Edge]:
    """Return the nearest tensors that both edges depend on."""
    if same(u, v):
        return [u]
    sides: dict[Edge, int] = {u: 1, v: 2}
    forks = []
    while {1, 2} <= set(sides.values()):
        latest = max(sides, key=made)
        side = sides.pop(latest)
        if side == 3:
            forks.append(latest)
        elif latest[1] >= 0:
            for edge in latest[0].inputs:
                if edge is not None:
                    sides[edge] = sides.get(edge, 0) | side
    return [*forks, *(edge for edge, side in sides.items() if side == 3)]


def _back(edge: Edge, forks: Sequence[Edge], vector: Tensor) -> list[Tensor | None]:
    """Return the vector-Jacobian products from an edge to the forks."""
    start = gradient_edge(edge)
    vector = vector.sum_to_size(shape_of(edge)).to(start.node._input_metadata[start.output_nr].dtype)
    if len(forks) == 1 and same(edge, forks[0]):
        return [vector]
    ends, options = [gradient_edge(fork) for fork in forks], {"allow_unused": True}
    with torch.enable_grad(), silent(), SuspendBackpack(ends):
        found = torch.autograd.grad([start], ends, [turned(edge, vector)], retain_graph=True, **options)
    return [t if t is None else turned(fork, t) for fork, t in zip(forks, found, strict=True)]
