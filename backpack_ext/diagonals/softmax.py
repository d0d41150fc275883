"""Softmax and its relatives."""

from __future__ import annotations

from torch import Tensor

from backpack_ext.diagonals.rule import Diagonals, Step, signed


def softmax(step: Step) -> Diagonals:
    """Cross a softmax p: ``p^2 [(1 - 2p) h + sum p^2 h] + p (1 - 2p) (g - <g, p>)``."""
    p, h, g, dim = step.saved("result"), step.h[0], step.gradient, signed(step.node._saved_dim)
    q, p2 = 1 - 2 * p, p * p
    out = p2 * (q * h + (p2 * h).sum(dim, keepdim=True))
    return (out if g is None else out + softmax_curvature(p, g, dim),)


def softmax_curvature(p: Tensor, g: Tensor, dim: int = -1) -> Tensor:
    """Return the second term of a softmax alone, ``p (1 - 2p) (g - <g, p>)``."""
    return p * (1 - 2 * p) * (g - (g * p).sum(dim, keepdim=True))


def log_softmax(step: Step) -> Diagonals:
    """Cross a log-softmax of probabilities p: ``(1 - 2p) h + p^2 sum h - p (1 - p) sum g``."""
    p, (h,), g = step.saved("result").exp(), step.h, step.gradient
    dim = signed(step.node._saved_dim)
    out = (1 - 2 * p) * h + p * p * h.sum(dim, keepdim=True)
    return (out if g is None else out - p * (1 - p) * g.sum(dim, keepdim=True),)


def logsumexp(step: Step) -> Diagonals:
    """Cross a log-sum-exp with softmax p: ``p^2 h + p (1 - p) g``."""
    n, x, r, (h,), g = step.node, step.saved("self"), step.saved("result"), step.h, step.gradient
    if not n._saved_keepdim:
        for a in sorted(signed(a) % x.dim() for a in n._saved_dim):
            h, g = h.unsqueeze(a), None if g is None else g.unsqueeze(a)
            r = r if r.dim() == x.dim() else r.unsqueeze(a)
    p = (x - r).exp()
    out = p * p * h
    return (out if g is None else out + p * (1 - p) * g,)
