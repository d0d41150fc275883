"""Blocks from what their ``state_dict`` returned."""

from __future__ import annotations

from curvature.block import Block
from curvature.dense import DenseBlock, DiagonalBlock
from curvature.eigen import KroneckerEigen
from curvature.kronecker import Kronecker
from curvature.kronecker_sum import KroneckerSum
from curvature.lowrank import LowRank
from curvature.shifted import Shifted

KINDS = {
    cls.__name__: cls
    for cls in (
        *(Kronecker, KroneckerEigen, KroneckerSum, DenseBlock, DiagonalBlock),
        *(LowRank, Shifted),
    )
}


def block_from_state_dict(state: dict) -> Block:
    """Make a block of what its ``state_dict`` returned.

    Args:
        state: As read by ``torch.load``.

    Raises:
        ValueError: If it is no block's.

    Example:
        >>> import torch
        >>> K = Kronecker(torch.eye(2), torch.ones(1, 1))
        >>> block_from_state_dict(K.state_dict())
        Kronecker(B=(2, 2), A=(1, 1))
    """
    kind = state.get("kind")
    if kind not in KINDS:
        raise ValueError(f"block_from_state_dict: kind={kind!r}; expected one of {tuple(KINDS)}.")
    return KINDS[kind].from_state_dict(state)
