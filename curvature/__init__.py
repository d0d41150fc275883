"""Structured curvature matrices: the mathematics of what a backward pass extracts.

This package knows no ``torch.nn.Module``: it holds Kronecker products (and sums of them) together
with the map between a parameter's axes and the matrix they act on.
"""

from curvature.kronecker import BIAS, MATRIX, Axes, Kronecker, KroneckerSum

__all__ = ["BIAS", "MATRIX", "Axes", "Kronecker", "KroneckerSum"]
