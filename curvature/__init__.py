"""Structured curvature matrices: the mathematics of what a backward pass extracts.

This package knows no ``torch.nn.Module``. A `Block` is the curvature of one parameter (or of a weight
with its bias), a `BlockDiagonalOperator` that of a model.
"""

from curvature.axes import BIAS, MATRIX, Axes
from curvature.block import Block
from curvature.dense import DenseBlock, DiagonalBlock
from curvature.eigen import KroneckerEigen
from curvature.kronecker import Kronecker
from curvature.kronecker_sum import KroneckerSum
from curvature.operator import BlockDiagonalOperator
from curvature.storage import block_from_state_dict

__all__ = [
    "BIAS",
    "MATRIX",
    "Axes",
    "Block",
    "BlockDiagonalOperator",
    "DenseBlock",
    "DiagonalBlock",
    "Kronecker",
    "KroneckerEigen",
    "KroneckerSum",
    "block_from_state_dict",
]
