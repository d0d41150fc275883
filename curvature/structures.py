"""The table of structures.

What each operation gives, on matrices that fit into a line:

>>> import torch
>>> L = STRUCTURES["lower-triangular"].from_dense(torch.tensor([[1.0, 9.0], [2.0, 3.0]]))
>>> L.to_dense()
tensor([[1., 0.],
        [2., 3.]])
>>> (L @ L).to_dense()  # a product stays in the structure
tensor([[1., 0.],
        [8., 9.]])
>>> x = torch.tensor([[1.0], [1.0]])
>>> (L @ x).T, (x.T @ L), L.matmul(x, transpose=True).T, L.rmatmul(x.T, transpose=True)
(tensor([[1., 5.]]), tensor([[3., 3.]]), tensor([[3., 3.]]), tensor([[1., 5.]]))
>>> (2 * L + L - L / 2).to_dense()
tensor([[2.5000, 0.0000],
        [5.0000, 7.5000]])
>>> L.trace(), L.square_norm().round(), (L.norm() ** 2).round()
(tensor(4.), tensor(14.), tensor(14.))
>>> S = torch.tensor([[1.0], [2.0]])  # P(S S^T): the triangle, with twice the off-diagonal entry
>>> type(L).project_gram(S).to_dense(), type(L).project(S @ S.T).to_dense()
(tensor([[1., 0.],
        [4., 4.]]), tensor([[1., 0.],
        [4., 4.]]))
>>> L.gram().to_dense()  # P(L^T L), L^T L = [[5, 6], [6, 9]]
tensor([[ 5.,  0.],
        [12.,  9.]])
>>> K = type(L).eye(2)
>>> K.add_(L, alpha=0.5).mul_(2.0).add_identity_(-1.0).to_dense()  # 2 (I + L / 2) - I, in place
tensor([[2., 0.],
        [2., 4.]])
>>> both = type(L).stack([L, K])  # two matrices, one kernel for each operation
>>> both.shape, both.trace(), [A.trace() for A in both.unstack()]
(torch.Size([2, 2, 2]), tensor([4., 6.]), [tensor(4.), tensor(6.)])
>>> low = L.to(torch.bfloat16)
>>> low.dtype, type(L).from_state_dict(L.state_dict()).trace(), type(L).zeros(2).norm()
(torch.bfloat16, tensor(4.), tensor(0.))
"""

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
