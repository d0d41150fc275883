r"""What preconditioning a gradient costs, in multiply-adds: the gradient itself, or its rows.

The constants were measured on two CPU cores in float32. What counts is that a factor of two between the
two ways is seen as such.
"""

from __future__ import annotations

from functools import lru_cache
from math import log2

from optim.structure import Structure

# What else an entry of a gradient costs when both sides are multiplied with it, as multiply-adds: it is
# joined with the bias, read and written some times.
ENTRY = 80
# What keeping and checking the rows of a large layer costs.
LAYER = 25_000_000
# A Fourier transform's operation takes several times as long as one of a matrix product.
TRANSFORM = 38


@lru_cache(maxsize=1024)
def of_vector(structure: Structure, d: int) -> float:
    """Return multiply-adds of a vector times ``M M^T``, in the forms of `curvature.outer`.

    =============================== ==========================================
    structure                       multiply-adds
    =============================== ==========================================
    dense, triangular               d^2
    diagonal                        d
    block-diagonal                  d block
    hierarchical                    2 (k1 + k2) d
    rank-k                          2 k d
    Toeplitz                        38 d log2(2 d), or d^2 where that is less
    a user's                        2 d^2
    =============================== ==========================================
    """
    options = {**structure.cls.defaults, **dict(structure.options)}
    name = structure.cls.name
    if name in ("dense", "lower-triangular", "upper-triangular"):
        return d * d
    if name in ("lower-toeplitz", "upper-toeplitz"):
        return min(d * d, TRANSFORM * d * log2(2 * d))
    if name == "diagonal":
        return d
    if name == "block-diagonal":
        return d * min(d, options["block"])
    if name in ("hierarchical", "rank-k-upper", "rank-k-lower"):
        return 2 * min(d, sum(options.values())) * d
    return 2 * d * d


def of_gradient(K: Structure, C: Structure, o: int, i: int) -> float:
    r"""Return multiply-adds of :math:`C C^T G K K^T` for ``G[o,i]``."""
    return i * of_vector(C, o) + o * of_vector(K, i) + ENTRY * o * i


def of_rows(K: Structure, C: Structure, o: int, i: int, count: int) -> float:
    r"""Return those of :math:`(g C C^T)^T (a K K^T)` for ``g[r,o]`` and ``a[r,i]``, r = ``count``."""
    return count * (of_vector(C, o) + of_vector(K, i) + o * i) + LAYER


@lru_cache(maxsize=1024)
def rows_are_less(K: Structure, C: Structure, g: int, o: int, i: int, count: int) -> bool:
    """Return whether rows ``[g,r,o]`` and ``[g,r,i]`` cost less than ``G[g,o,i]``, r = ``count``."""
    return of_rows(K, C, o, i, count * g) < g * of_gradient(K, C, o, i)
