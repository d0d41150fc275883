"""Structured curvature matrices: the mathematics of what a backward pass extracts.

This package knows no ``torch.nn.Module``. A `Block` is the curvature of one parameter (or of a weight
with its bias, or of many), a `BlockDiagonalOperator` that of a model. A `StructuredMatrix` is what
optimizers keep in place of a dense one.
"""

from curvature.axes import BIAS, MATRIX, Axes
from curvature.block import Block
from curvature.block_diagonal import BlockDiagonalMatrix, DenseMatrix, DiagonalMatrix
from curvature.dense import DenseBlock, DiagonalBlock
from curvature.eigen import KroneckerEigen
from curvature.eigenpairs import Eigenpairs, Eigenvectors, noise_damping
from curvature.factor import Centered, Concatenated, DenseFactor, Factor, Stacked, Sum
from curvature.hierarchical import Hierarchical, RankKLower, RankKUpper
from curvature.kernel_regression import KernelRegression
from curvature.kronecker import Kronecker
from curvature.kronecker_sum import KroneckerSum
from curvature.lowrank import LowRank
from curvature.mixed import Mixed
from curvature.operator import BlockDiagonalOperator
from curvature.root import Root
from curvature.shifted import Shifted
from curvature.storage import block_from_state_dict
from curvature.structured import NaiveWarning, StructuredMatrix
from curvature.structures import STRUCTURES
from curvature.switches import use_triton
from curvature.toeplitz import LowerToeplitz, UpperToeplitz
from curvature.triangular import LowerTriangular, UpperTriangular

__all__ = [
    "BIAS",
    "MATRIX",
    "STRUCTURES",
    "Axes",
    "Block",
    "BlockDiagonalMatrix",
    "BlockDiagonalOperator",
    "Centered",
    "Concatenated",
    "DenseBlock",
    "DenseFactor",
    "DenseMatrix",
    "DiagonalBlock",
    "DiagonalMatrix",
    "Eigenpairs",
    "Eigenvectors",
    "Factor",
    "Hierarchical",
    "KernelRegression",
    "Kronecker",
    "KroneckerEigen",
    "KroneckerSum",
    "LowRank",
    "LowerToeplitz",
    "LowerTriangular",
    "Mixed",
    "NaiveWarning",
    "RankKLower",
    "RankKUpper",
    "Root",
    "Shifted",
    "Stacked",
    "StructuredMatrix",
    "Sum",
    "UpperToeplitz",
    "UpperTriangular",
    "block_from_state_dict",
    "noise_damping",
    "use_triton",
]
