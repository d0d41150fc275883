"""NumPy's symmetric product, where its library runs on as few threads as torch: on one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

# What its OpenBLAS calls the function in NumPy's own packages, and elsewhere.
GET_THREADS = (
    "scipy_openblas_get_num_threads64_",
    "scipy_openblas_get_num_threads",
    "openblas_get_num_threads64_",
    "openblas_get_num_threads",
)
DTYPES = (torch.float32, torch.float64)


@lru_cache(maxsize=1)
def _get_threads() -> Callable[[], int] | None:
    """Return OpenBLAS's function that tells its threads; None if NumPy is absent or uses another."""
    try:
        from numpy._core import _multiarray_umath

        library = ctypes.CDLL(_multiarray_umath.__file__)  # which finds what it is linked with
    except (ImportError, OSError):
        return None
    return next((getattr(library, name) for name in GET_THREADS if hasattr(library, name)), None)


def single_threaded() -> bool:
    """Whether torch and NumPy's OpenBLAS both use one thread."""
    if torch.get_num_threads() != 1:
        return False
    threads = _get_threads()
    return threads is not None and threads() == 1


def can_take(S: Tensor) -> bool:
    """Whether `product` serves ``S[*batch, d, r]``: on one thread, not copying it, without gradient."""
    if S.requires_grad and torch.is_grad_enabled():
        return False
    d, r = S.shape[-2:]
    a, b = S.stride()[-2:]
    ordered = (b == 1 and a >= r) or (a == 1 and b >= d)
    plain = type(S) is Tensor and S.dtype in DTYPES and not S.is_neg()
    return plain and ordered and single_threaded()


def product(S: Tensor, out: Tensor, scale: float = 1.0) -> None:
    r"""Write :math:`\text{scale} \; S S^T` for ``S[d, r]`` into ``out[d, d]``; see `can_take`.

    NumPy sees that the one factor is the other's transpose, and calls ``syrk``.
    """
    import numpy as np

    rows, found = S.detach().numpy(), out.detach().numpy()
    np.matmul(rows, rows.T, out=found)
    if scale != 1.0:
        out.mul_(scale)
