"""What is made of geometries once and kept, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        most = max((d.size * d.kernel for d in _dimensions(first)), default=0)
        return (small if most <= ENTRIES else large)(first, *args)

    found.caches = small, large
    return found


def _dimensions(of: Geometry | Dimension | tuple) -> Iterable[Dimension]:
    if isinstance(of, Geometry):
        return of.dimensions
    return (of,) if isinstance(of, Dimension) else of
