"""Products with M M^T."""

from __future__ import annotations

from torch import Tensor

from curvature.structured import StructuredMatrix


class Outer:
    """M M^T, by two products."""

    def __init__(self, M: StructuredMatrix):
        self.M = M

    def matmul(self, X: Tensor) -> Tensor:
        """Return M M^T X."""
        return self.M.matmul(self.M.matmul(X, transpose=True))

    def rmatmul(self, X: Tensor) -> Tensor:
        """Return X M M^T."""
        return self.M.rmatmul(self.M.rmatmul(X), transpose=True)


def outer(M: StructuredMatrix) -> Outer:
    """Return M M^T, ready to be applied."""
    return Outer(M)
