"""Diagonal of the generalised Gauss-Newton matrix."""

from __future__ import annotations

import torch

from backpack_ext.extension import Vectors, check_samples
from backpack_ext.first_order import SumGradSquared


class DiagGGN(SumGradSquared):
    r"""Diagonal of the generalised Gauss-Newton (Fisher) matrix, shaped like the parameter.

    .. math::  \operatorname{diag} \sum_n J_n^T H_n J_n = \sum_{vn} \Big(\sum_s b_{vns} a_{ns}\Big)^2

    for the loss as written, reduction included. In ``diag_ggn_exact`` or ``diag_ggn_mc``, as in
    BackPACK.

    Args:
        fisher: ``"exact"`` (all columns of the loss-Hessian root) or ``"mc"`` (samples; unbiased).
        mc_samples: Number of samples for ``"mc"``.
        generator: Random generator for ``"mc"``; a private one by default.
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".
        max_columns: ``fisher="exact"`` refuses beyond that many columns per datum.

    Raises:
        ValueError: If ``fisher`` is neither of the two.

    References:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    """

    power = 1

    def __init__(
        self,
        fisher: str = "exact",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        savefield: str | None = None,
        unsupported: str = "raise",
        max_columns: int = 1000,
    ):
        if fisher not in ("exact", "mc"):
            raise ValueError(f"DiagGGN: fisher={fisher!r}; expected one of ('exact', 'mc').")
        check_samples("DiagGGN", mc_samples)
        super().__init__(savefield or f"diag_ggn_{fisher}", unsupported)
        self._generator = generator
        self.vectors = Vectors(fisher, mc_samples)
        self.max_columns = max_columns
