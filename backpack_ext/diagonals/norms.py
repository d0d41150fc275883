r"""Norms: normalisation over D elements, then one scale and one shift per feature.

With xh the normalised input, s the standard deviation, ``u = gamma^2 h``, ``v = gamma g`` and sums over
the D elements,

.. math::

    h^{in} = \frac{1}{s^2} \Big[u (1 - \tfrac{2 + 2 \hat x^2}{D})
        + \frac{\sum u + 2 \hat x \sum u \hat x + \hat x^2 \sum u \hat x^2}{D^2}\Big]
        - \frac{1}{s^2 D} \Big[2 \hat x (v - \bar v - \hat x \tfrac{\sum v \hat x}{D})
        + (1 - \tfrac{1 + \hat x^2}{D}) \sum v \hat x\Big].
"""

from __future__ import annotations

from math import inf, prod

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack_ext.diagonals.linear import many_to_one
from backpack_ext.diagonals.rule import Diagonals, Step, signed


def normalised(u: Tensor, v: Tensor | None, xh: Tensor, rstd: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Cross ``(x - mean) / s``, where mean and standard deviation are taken over ``axes``.

    Args:
        u: h at the output.
        v: g there; None to leave the second derivative out.
        xh: The output.
        rstd: 1 / s, broadcast against it.
        axes: The axes of the D elements.
    """
    D = prod(xh.shape[a] for a in axes)

    def total(t: Tensor) -> Tensor:
        return t.sum(axes, keepdim=True)

    uxh, xh2 = u * xh, xh * xh
    h = u * (1 - 2 * (1 + xh2) / D)
    h += (total(u) + 2 * xh * total(uxh) + xh2 * total(uxh * xh)) / D**2
    if v is not None:
        G1 = total(v * xh)
        h -= (2 * xh * (v - total(v) / D - xh * G1 / D) + (1 - (1 + xh2) / D) * G1) / D
    return h.mul_(rstd * rstd)


def root_mean_square(
    u: Tensor, v: Tensor | None, xh: Tensor, rrms: Tensor, axes: tuple[int, ...]
) -> Tensor:
    """Cross ``x / r`` with r the root mean square over ``axes``; arguments as in `normalised`."""
    D = prod(xh.shape[a] for a in axes)
    xh2 = xh * xh
    h = u * (1 - 2 * xh2 / D) + xh2 * (u * xh2).sum(axes, keepdim=True) / D**2
    if v is not None:
        G1 = (v * xh).sum(axes, keepdim=True)
        h -= (2 * xh * (v - xh * G1 / D) + (1 - xh2 / D) * G1) / D
    return h.mul_(rrms * rrms)


def _scaled(step: Step, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``u = gamma^2 h`` and ``v = gamma g``; gamma broadcasts."""
    (h,), g = step.h[:1], step.gradient
    if weight is None:
        return h, g
    return h * weight.square(), None if g is None else g * weight


def layer_norm(step: Step) -> Diagonals:
    """Cross ``nn.LayerNorm``; scale: ``sum h xh^2``, shift: ``sum h``."""
    n, need, x = step.node, step.need, step.saved("input")
    rstd = step.saved("result2")
    xh = (x - step.saved("result1")) * rstd
    axes = tuple(range(-len(n._saved_normalized_shape), 0))
    lead = tuple(range(x.dim() - len(axes)))
    h = step.h[0]
    return (
        normalised(*_scaled(step, step.saved("weight")), xh, rstd, axes) if need[0] else None,
        _summed(h * xh * xh, lead) if need[1] else None,
        _summed(h, lead) if need[2] else None,
    )


def rms_norm(step: Step) -> Diagonals:
    """Cross the fused kernel of ``nn.RMSNorm``."""
    n, need, x = step.node, step.need, step.saved("input")
    rrms = step.saved("result1")
    xh, axes = x * rrms, tuple(range(-len(n._saved_normalized_shape), 0))
    lead = tuple(range(x.dim() - len(axes)))
    return (
        root_mean_square(*_scaled(step, step.saved("weight")), xh, rrms, axes) if need[0] else None,
        _summed(step.h[0] * xh * xh, lead) if need[1] else None,
    )


def group_norm(step: Step) -> Diagonals:
    """Cross ``nn.GroupNorm``."""
    n, need, x = step.node, step.need, step.saved("input")
    N, G, C = n._saved_N, n._saved_group, n._saved_C
    shape = (N, G, C // G, -1)
    rstd = step.saved("result2").reshape(N, G, 1, 1)
    xh = (x.reshape(shape) - step.saved("result1").reshape(N, G, 1, 1)) * rstd
    weight, h = step.saved("weight"), step.h[0].reshape(shape)
    step = Step(n, (h,), None if step.g is None else (step.g[0].reshape(shape),), need)
    if weight is not None:
        weight = weight.reshape(G, C // G, 1)
    return (
        normalised(*_scaled(step, weight), xh, rstd, (2, 3)).reshape(x.shape) if need[0] else None,
        (h * xh * xh).sum((0, 3)).flatten() if need[1] else None,
        h.sum((0, 3)).flatten() if need[2] else None,
    )


def batch_norm(step: Step) -> Diagonals:
    """Cross ``nn.BatchNorm1d`` to ``3d``; in training mode the batch as a whole, exactly.

    Instance norms arrive here as batch norms of one datum with N C channels.
    """
    n, need, x = step.node, step.need, step.saved("input")
    axes = (0, *range(2, x.dim()))
    shape = [1] * x.dim()
    shape[1] = -1
    training = getattr(n, "_saved_training", True)  # cuDNN's kernel saves it only where it may vary
    if training:
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        eps = getattr(n, "_saved_eps", None)
        rstd = (var + (n._saved_epsilon if eps is None else eps)).rsqrt()
    else:
        mean, var = (step.saved(f"running_{k}").reshape(shape) for k in ("mean", "var"))
        rstd = (var + n._saved_eps).rsqrt()
    weight, (h,) = step.saved("weight"), step.h[:1]
    h_in, scale = None, None
    if need[0] or need[1]:
        xh = (x - mean) * rstd
        if need[1]:
            scale = (h * xh * xh).sum(axes)
    if need[0]:
        u, v = _scaled(step, None if weight is None else weight.reshape(shape))
        h_in = normalised(u, v, xh, rstd, axes) if training else u * rstd.square()
    return h_in, scale, h.sum(axes) if need[2] else None


def _summed(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    return t.sum(axes) if axes else t


def vector_norm(step: Step) -> Diagonals:
    r"""Cross a p-norm r over some axes, with ``t = |x| / r`` and zeros where r = 0.

    .. math::  t^{2p-2} h + (p - 1) t^{p-2} (1 - t^p) g / r
    """
    n, x = step.node, step.saved("self")
    p = n._saved_ord if hasattr(n, "_saved_ord") else n._saved_p
    p = 2.0 if p is None else float(p)
    if p in (0, inf, -inf):  # a constant, or one entry of x up to its sign
        return many_to_one(step)
    r, h, g = _kept(step, x.dim(), step.saved("result"), step.h[0], step.gradient)
    t = torch.where(r == 0, 0, x.abs() / r)
    out = h * (t.square() if p == 2 else torch.where(x == 0, 0, t ** (2 * p - 2)))
    if g is None or p == 1:
        return (out,)
    bend = 1 - t.square() if p == 2 else (p - 1) * t ** (p - 2) * (1 - t**p)
    flat = (r == 0) if p >= 2 else (x == 0)  # where it has no second derivative
    return (out + torch.where(flat, 0, bend * g / r),)


def weight_norm(step: Step) -> Diagonals:
    """Cross ``w = g v / r``, where r is the Euclidean norm of each slice of v."""
    n, need, v, r = step.node, step.need, step.saved("v"), step.saved("result1")
    axes = tuple(a for a in range(v.dim()) if a != signed(n._saved_dim) % v.dim())
    u, h = v / r, step.h[0]
    size = prod(v.shape[a] for a in axes) ** 0.5
    scaled = _scaled(step, step.saved("g") / size)
    return (
        root_mean_square(*scaled, u * size, size / r, axes) if need[0] else None,
        (h * u * u).sum(axes, keepdim=True) if need[1] else None,
    )


def variance(step: Step) -> Diagonals:
    """Cross a variance of D entries, and their mean: ``(2 d / C)^2 h + 2 (1 - 1 / D) g / C``.

    d is the distance from the mean, C is D less the correction.
    """
    n, x = step.node, step.saved("self")
    d, D, C = _distance(n, x)
    h, g, mean = _moments(step, x.dim())
    out = torch.zeros_like(x) if h is None else (2 / C * d).square() * h
    if g is not None:
        out = out + 2 * (1 - 1 / D) / C * g
    return (out if mean is None else out + mean / D**2,)


def deviation(step: Step) -> Diagonals:
    """Cross a standard deviation s: ``(d / (C s))^2 h + (1 - 1 / D - d^2 / (C s^2)) g / (C s)``."""
    n, x = step.node, step.saved("self")
    d, D, C = _distance(n, x)
    s = n._saved_result if hasattr(n, "_saved_result") else n._saved_result0
    (s,), (h, g, mean) = _kept(step, x.dim(), step.lifted(s)), _moments(step, x.dim())
    out = torch.zeros_like(x) if h is None else (d / (C * s)).square() * h
    if g is not None:
        out = out + (1 - 1 / D - (d / s).square() / C) * g / (C * s)
    out = torch.where(s == 0, 0, out)
    return (out if mean is None else out + mean / D**2,)


def _distance(n: Node, x: Tensor) -> tuple[Tensor, int, float]:
    """Return the distance from the mean, and by how many entries sums are divided: D and C."""
    axes = reduced_axes(n, x.dim())
    D, correction = prod(x.shape[a] for a in axes), n._saved_correction
    return x - x.mean(axes, keepdim=True), D, D - (1 if correction is None else float(correction))


def _moments(step: Step, dims: int) -> list[Tensor | None]:
    """Return h and g at a variance or deviation, and h at the mean, if it is an output too."""
    g = None if step.g is None or step.g[0] is None else step.lifted(step.g[0])
    return _kept(step, dims, step.h[0], g, step.h[1] if len(step.h) > 1 else None)


def reduced_axes(n: Node, dims: int) -> list[int]:
    """Return the axes of a reduction; by default all."""
    axes = getattr(n, "_saved_dim", None)
    return sorted(a % dims for a in map(signed, axes)) if axes else list(range(dims))


def _kept(step: Step, dims: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """Give tensors at the output of a reduction the axes that it summed over."""
    if getattr(step.node, "_saved_keepdim", False):
        return [*tensors]
    out = []
    for t in tensors:
        for a in reduced_axes(step.node, dims) if t is not None else ():
            t = t.unsqueeze(a)
        out.append(t)
    return out
