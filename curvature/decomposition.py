"""Decompositions of symmetric factors that fail loudly, in float32 or above."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor


def widen(t: Tensor) -> Tensor:
    """Return a tensor in float32 or above, where digits are needed: in decompositions, say."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def check_finite(name: str, t: Tensor) -> None:
    """Raise if a tensor has entries that are infinite or not a number.

    Raises:
        ValueError: If so; it says how many.
    """
    if bool(t.isfinite().all()):
        return
    bad = int((~t.isfinite()).sum())
    raise ValueError(
        f"{name} has {bad} entries (of {t.numel()}) that are infinite or not a number. Look for the "
        "step that produced them: an overflow in low precision, or a loss that is not finite?"
    )


def check_damping(owner: str, damping: float) -> float:
    """Return a damping as a number.

    Raises:
        ValueError: If it is no finite number of at least zero.
    """
    try:
        number = float(damping)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    if not (isfinite(number) and number >= 0) or isinstance(damping, str):
        raise ValueError(
            f"{owner}: damping={damping!r}; expected a finite number >= 0 (it is added to the "
            "eigenvalues)."
        )
    return number


def check_symmetric(name: str, t: Tensor) -> None:
    """Raise if matrices ``[..., d, d]`` are not symmetric up to rounding.

    Raises:
        ValueError: If so; it says by how much.
    """
    gap, size = float((t - t.mT).abs().max()), float(t.abs().max())
    if gap > 32 * torch.finfo(t.dtype).eps * size:
        raise ValueError(
            f"{name} is not symmetric: entries differ from those of its transpose by up to {gap:.3g} "
            f"(the largest entry is {size:.3g}). Only symmetric factors have an orthogonal "
            "eigenbasis; pass (F + F.T) / 2 if the difference is meant to be noise."
        )


def eigh(name: str, factor: Tensor, vectors: bool = True) -> tuple[Tensor, Tensor | None]:
    """Decompose positive semi-definite matrices ``[..., d, d]``.

    Eigenvalues that are zero up to rounding, of either sign, are set to zero. Computed in float32
    or above, and once more in float64 should that fail.

    Args:
        name: What the factor is called in messages.
        factor: The matrices.
        vectors: Whether to compute eigenvectors.

    Returns:
        Eigenvalues ``[..., d]``, ascending, and orthonormal eigenvectors as columns ``[..., d, d]``.

    Raises:
        ValueError: If the factor is not finite, not symmetric, or indefinite.
    """
    check_finite(name, factor)
    check_symmetric(name, factor)
    wide = widen(factor)
    wide = (wide + wide.mT) / 2
    values, basis = symmetric_eigh(name, wide, vectors)
    values = nonnegative(name, values, factor.dtype)
    # where the true eigenvalue is zero, rounding leaves noise of up to 3 eps times the largest one
    # (784 x 784 of rank 128, float32)
    noise = 8 * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    return values.masked_fill(values <= noise, 0.0), basis


def symmetric_eigh(name: str, matrix: Tensor, vectors: bool = True) -> tuple[Tensor, Tensor | None]:
    """Decompose symmetric matrices ``[..., d, d]``, and once more in float64 should that fail.

    Raises:
        ValueError: If that fails too.
    """
    values, basis = _eigh(matrix, vectors)
    if values is None:
        values, basis = _eigh(matrix.double(), vectors)
        if values is None:
            raise ValueError(
                f"{name}: the eigendecomposition did not converge, in float64 either. Entries range up "
                f"to {float(matrix.abs().max()):.3g}; rescale them, or add damping before."
            )
        values, basis = values.to(matrix.dtype), None if basis is None else basis.to(matrix.dtype)
    return values, basis


def _eigh(matrix: Tensor, vectors: bool) -> tuple[Tensor | None, Tensor | None]:
    """Decompose; return None in place of the eigenvalues if that fails."""
    try:
        if vectors:
            values, basis = torch.linalg.eigh(matrix)
        else:
            values, basis = torch.linalg.eigvalsh(matrix), None
    except torch.linalg.LinAlgError:
        return None, None
    good = bool(values.isfinite().all()) and (basis is None or bool(basis.isfinite().all()))
    return (values, basis) if good else (None, None)


def nonnegative(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Set eigenvalues ``[..., d]`` that are negative by rounding to zero.

    Args:
        name: What the factor is called in messages.
        values: The eigenvalues.
        dtype: In which the factor was stored: that rounding too may have made one negative.

    Raises:
        ValueError: If one is more negative than rounding explains.
    """
    lowest, size = float(values.min()), float(values.abs().max())
    noise = 16 * torch.finfo(dtype).eps + values.shape[-1] * torch.finfo(values.dtype).eps
    if lowest < -noise * size:
        raise ValueError(
            f"{name} is indefinite: its smallest eigenvalue is {lowest:.3g}, its largest "
            f"{float(values.max()):.3g}. A curvature factor is positive semi-definite; was it built "
            "from differences, or changed in place?"
        )
    return values.clamp(min=0)


def cholesky_inverse(name: str, factor: Tensor) -> Tensor:
    """Invert positive definite matrices ``[..., d, d]`` by a Cholesky decomposition.

    Computed in float32 or above, and once more in float64 should that fail.

    Raises:
        ValueError: If a matrix is not finite, not symmetric, or not positive definite.
    """
    check_finite(name, factor)
    check_symmetric(name, factor)
    wide = widen(factor)
    root, info = torch.linalg.cholesky_ex(wide)
    if bool((info != 0).any()):
        root, info = torch.linalg.cholesky_ex(wide.double())
        if bool((info != 0).any()):
            lowest = float(torch.linalg.eigvalsh(wide.double()).min())
            raise ValueError(
                f"{name} has no Cholesky decomposition: with its damping the smallest eigenvalue is "
                f"{lowest:.3g}. Pass a larger damping."
            )
    return torch.cholesky_inverse(root).to(wide.dtype)
