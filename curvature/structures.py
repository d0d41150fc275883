"""The table of structures."""

from __future__ import annotations

from curvature.block_diagonal import BlockDiagonalMatrix, DenseMatrix, DiagonalMatrix
from curvature.hierarchical import Hierarchical, RankKLower, RankKUpper
from curvature.structured import StructuredMatrix
from curvature.toeplitz import LowerToeplitz, UpperToeplitz
from curvature.triangular import LowerTriangular, UpperTriangular

# Each name is the class's attribute ``name``; options and their defaults are in ``defaults``.
STRUCTURES: dict[str, type[StructuredMatrix]] = {
    "dense": DenseMatrix,
    "diagonal": DiagonalMatrix,
    "block-diagonal": BlockDiagonalMatrix,  # block
    "lower-triangular": LowerTriangular,
    "upper-triangular": UpperTriangular,
    "hierarchical": Hierarchical,  # k1, k2
    "rank-k-lower": RankKLower,  # k
    "rank-k-upper": RankKUpper,  # k
    "lower-toeplitz": LowerToeplitz,
    "upper-toeplitz": UpperToeplitz,
}
