r"""Symmetric products, of which only about half is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.structured import scaled_product

# Rows of a large symmetric product that are formed at once.
PANEL = 192
# Where panels begin to pay: rows of the factor, and columns.
ROWS, COLUMNS = 384, 128


def symmetric_product(S: Tensor, scale: float = 1.0) -> Tensor:
    r"""Return :math:`\text{scale} \; S S^T` as ``[*batch, d, d]`` for ``S[*batch, d, r]``.

    On CPU, where torch has no symmetric product, large ones are formed panel by panel: each panel
    of rows from its diagonal block on, the rest mirrored. That saves up to half of the product.
    """
    *batch, d, r = S.shape
    if d < ROWS or r < COLUMNS or S.device.type != "cpu":
        return scaled_product(S, S.mT, scale)
    out = S.new_empty(*batch, d, d)
    for product, rows in zip(out.view(-1, d, d), S.reshape(-1, d, r), strict=True):
        for k in range(0, d, PANEL):
            panel = product[k : k + PANEL, k:]
            torch.addmm(panel, rows[k : k + PANEL], rows[k:].mT, beta=0, alpha=scale, out=panel)
            product[k : k + PANEL, :k] = product[:k, k : k + PANEL].mT
    return out
