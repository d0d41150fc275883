"""The same matrix for other packages: scipy and linear_operator, both optional."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from curvature.operator import BlockDiagonalOperator


def to_scipy(operator: BlockDiagonalOperator):
    """Return a `scipy.sparse.linalg.LinearOperator` that multiplies with an operator.

    Raises:
        ImportError: If scipy is missing.
    """
    try:
        import numpy as np
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError("to_scipy needs scipy: pip install scipy.") from error
    block = next(iter(operator.blocks.values()))
    dtype = torch.promote_types(block.dtype, torch.float32)  # numpy has no bfloat16

    def product(columns):  # [P] or [P, k]; the matrix is symmetric
        columns = np.array(columns)  # a copy: torch takes no negative strides, nor what is read-only
        if np.iscomplexobj(columns):
            raise TypeError("to_scipy: the operator is real; multiply real and imaginary part apart.")
        vectors = torch.as_tensor(columns, dtype=dtype, device=block.device)
        with torch.no_grad():
            return operator.matvec(vectors.T if vectors.dim() == 2 else vectors).cpu().numpy().T

    p = operator.dim
    kind = torch.zeros((), dtype=dtype).numpy().dtype
    return LinearOperator(
        (p, p), matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=kind
    )


def to_linear_operator(operator: BlockDiagonalOperator):
    """Return a `linear_operator.LinearOperator` that multiplies with an operator.

    The package's solvers (conjugate gradients, Lanczos) then work on it. It holds the operator's
    blocks, no copies.

    Raises:
        ImportError: If the package is missing.
    """
    try:
        from linear_operator import LinearOperator
    except ImportError as error:
        raise ImportError("to_linear_operator needs `pip install linear-operator`.") from error

    class Wrapped(LinearOperator):
        """A symmetric operator that only knows how to multiply."""

        def __init__(self, factor: Tensor):
            # the package reads data type and device off its arguments: the first factor stands for all
            super().__init__(factor)

        def _matmul(self, rhs: Tensor) -> Tensor:
            if rhs.dim() == 1:
                return operator.matvec(rhs)
            return operator.matvec(rhs.mT).mT

        def _diagonal(self) -> Tensor:
            return operator.diagonal(flat=True)

        def _size(self) -> torch.Size:
            return torch.Size([operator.dim, operator.dim])

        def _transpose_nonbatch(self):
            return self

    block = next(iter(operator.blocks.values()))
    return Wrapped(next(iter(block.factors.values())))
