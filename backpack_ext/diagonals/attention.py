r"""Scaled dot-product attention ``O = A V``, ``A = softmax(S)``, ``S = c Q K^T`` with the scale c.

With ``gA = g_O V^T``,

.. math::

    h_V &= (A^2)^T h_O \\
    h_S &= A^2 [h_O (V^2)^T - 2 (h_O O) V^T + \textstyle\sum_c h_O O^2]
           + A (1 - 2A) (gA - \mathrm{rowsum}(A \, gA)) \\
    h_K &= c^2 h_S^T Q^2, \qquad h_Q = c^2 h_S K^2.

The first three are exact. For Q, the off-diagonals of the Hessian of S are dropped. Self-attention
with one shared input also drops the cross terms between Q, K and V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backpack_ext.diagonals.rule import Diagonals, Step
from backpack_ext.diagonals.softmax import softmax_curvature
from backpack_ext.errors import UnsupportedError


def scores(A: Tensor, V: Tensor, h: Tensor, dropped: Tensor | None = None) -> Tensor:
    """Return the first term of ``h_S``.

    Args:
        A: The softmax ``[..., T, M]``.
        V: The values ``[..., M, d]``.
        h: At the output O, ``[..., T, d]``.
        dropped: What the softmax was multiplied with before V, a dropout mask; None without.
    """
    P = A if dropped is None else A * dropped
    O = P @ V
    hO = h * O
    first, second = h @ V.square().mT, hO @ V.mT
    if dropped is not None:
        first, second = first * dropped.square(), second * dropped
    return (first - 2 * second + (hO * O).sum(-1, keepdim=True)) * A.square()


def fused(step: Step) -> Diagonals:
    """Cross torch's fused attention kernels."""
    n, need, (h, *_), g = step.node, step.need, step.h, step.gradient
    if getattr(n, "_saved_dropout_p", 0.0):
        raise UnsupportedError(
            f"{n.name()}: the dropout mask of a fused attention kernel cannot be had. Set its "
            "dropout to 0 or call eval(), or use torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )
    Q, K, V = (step.saved(name) for name in ("query", "key", "value"))
    h, g = (t if t is None else t[..., : V.shape[-1]] for t in (h, g))
    scale = n._saved_scale if n._saved_scale is not None else Q.shape[-1] ** -0.5
    repeats = Q.shape[-3] // K.shape[-3]
    if repeats > 1:  # several query heads share one of keys and values
        K, V = (t.repeat_interleave(repeats, -3) for t in (K, V))
    A = _probabilities(n, Q, K, scale)
    h_V = A.square().mT @ h if need[2] else None
    h_Q = h_K = None
    if need[0] or need[1]:
        h_S = scores(A, V, h)
        if g is not None:
            h_S += softmax_curvature(A, g @ V.mT)
        h_S *= scale**2
        h_Q = h_S @ K.square() if need[0] else None
        h_K = h_S.mT @ Q.square() if need[1] else None
    if repeats > 1:
        h_K, h_V = (t if t is None else t.unflatten(-3, (-1, repeats)).sum(-3) for t in (h_K, h_V))
    return h_Q, h_K, h_V


def _probabilities(n, Q: Tensor, K: Tensor, scale: float) -> Tensor:
    S = scale * (Q @ K.mT)
    mask = None
    for name in ("_saved_attn_mask", "_saved_attn_bias"):
        mask = getattr(n, name, None) if mask is None else mask
    if mask is not None and mask.requires_grad:
        raise UnsupportedError(
            f"{n.name()}: a mask that requires a gradient inside of a fused attention kernel. Use "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )
    if getattr(n, "_saved_is_causal", False):
        T, M = S.shape[-2:]
        seen = torch.ones(T, M, dtype=torch.bool, device=S.device).tril()
        S = S.masked_fill(~seen, -torch.inf)
    if mask is not None:
        S = S.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else S + mask.to(S.dtype)
    # a query that sees no key has no probabilities, as in torch's kernels
    return S.softmax(-1).nan_to_num(0.0)
