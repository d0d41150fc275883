"""What is made of geometries once and kept, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch

from backpack_ext.conv_factors.geometry import Dimension, Geometry

# Input entries times kernel entries of a dimension up to which many results are kept, and how many are
# kept of dimensions below and beyond: signals of many lengths under long kernels would fill the memory.
ENTRIES, MANY, FEW = 2**16, 1024, 4


def kept(function: Callable) -> Callable:
    """Keep results by arguments, of which the first is a geometry, a dimension, or several of these.

    They are made on the CPU and outside of inference mode, whoever asks first.
    """

    @wraps(function)
    def made(*args: Any) -> Any:
        with torch.inference_mode(False), torch.device("cpu"):
            return function(*args)

    small, large = lru_cache(MANY)(made), lru_cache(FEW)(made)

    @wraps(function)
    def found(first: Any, *args: Any) -> Any:
        return (small if _most(first) <= ENTRIES else large)(first, *args)

    found.caches = small, large
    return found


def _most(of: Geometry | Dimension | tuple) -> int:
    """Return the largest number of input entries times kernel entries of a dimension."""
    if isinstance(of, Geometry):
        return of.most
    dimensions = (of,) if isinstance(of, Dimension) else of
    return max((d.size * d.kernel for d in dimensions), default=0)
