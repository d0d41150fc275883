"""Elementwise operations: their first and second derivatives, the whole table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log, pi, sqrt

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.special import ndtr

from backpack_ext.diagonals.rule import (
    DiagonalRule,
    Diagonals,
    Step,
    Unpacking,
    crossed,
    register_diagonal_rule,
    signed,
)

# Maps a step to f' and f''; None stands for f'' = 0.
Derivatives = Callable[[Step], tuple[Tensor, Tensor | None]]


def _of_tanh(y: Tensor):
    d1 = 1 - y * y
    return d1, d1 * y * -2


def _sigmoid(s: Step):
    y = s.saved("result")
    d1 = torch.addcmul(y, y, y, value=-1)
    return d1, d1 * (1 - 2 * y)


def _gelu(s: Step):
    x = s.saved("self")
    if s.node._saved_approximate == "none":
        phi = torch.exp(-0.5 * x * x) / sqrt(2 * pi)
        return ndtr(x) + x * phi, (2 - x * x) * phi
    a, b = sqrt(2 / pi), 0.044715
    t = torch.tanh(a * (x + b * x**3))
    w, du, ddu = 1 - t * t, a * (1 + 3 * b * x * x), 6 * a * b * x
    d1 = 0.5 * (1 + t) + 0.5 * x * w * du
    return d1, w * du + 0.5 * x * (w * ddu - 2 * t * w * du * du)


def _silu(s: Step):
    x = s.saved("self")
    p = x.sigmoid()
    w = p * (1 - p)
    return p + x * w, w * (2 + x * (1 - 2 * p))


def _mish(s: Step):
    x = s.saved("self")
    p, t = x.sigmoid(), torch.nn.functional.softplus(x).tanh()
    w = 1 - t * t
    return t + x * p * w, w * p * (2 + x * (1 - p - 2 * t * p))


def _softplus(s: Step):
    x, beta = s.saved("self"), s.node._saved_beta
    p = (beta * x).sigmoid()
    smooth = beta * x <= s.node._saved_threshold
    return torch.where(smooth, p, 1), torch.where(smooth, beta * p * (1 - p), 0)


def _log_sigmoid(s: Step):
    p = s.saved("self").sigmoid()
    return 1 - p, -p * (1 - p)


def _elu(s: Step):
    n, x = s.node, s.saved("self")
    below = n._saved_alpha * n._saved_scale * n._saved_input_scale * torch.exp(x * n._saved_input_scale)
    d1 = torch.where(x > 0, n._saved_scale, below)
    return d1, torch.where(x > 0, 0, below * n._saved_input_scale)


def _elu_in_place(s: Step):
    n, y = s.node, s.saved("result")
    below = (y + n._saved_alpha * n._saved_scale) * n._saved_input_scale
    d1 = torch.where(y > 0, n._saved_scale, below)
    return d1, torch.where(y > 0, 0, below * n._saved_input_scale)


def _celu(s: Step):
    x, alpha = s.saved("self"), _number(s.node._saved_alpha)
    below = torch.exp(x / alpha)
    return torch.where(x > 0, 1, below), torch.where(x > 0, 0, below / alpha)


def _celu_in_place(s: Step):
    y, alpha = s.saved("result"), _number(s.node._saved_alpha)
    below = y / alpha + 1
    return torch.where(y > 0, 1, below), torch.where(y > 0, 0, below / alpha)


def _hardswish(s: Step):
    x = s.saved("self")
    inside = (x > -3) & (x < 3)
    return torch.where(inside, x / 3 + 0.5, (x >= 3).to(x)), inside.to(x) / 3


def _pow(s: Step):
    x, p = s.saved("self"), _number(s.node._saved_exponent)
    if p == 2:
        return 2 * x, torch.full_like(x, 2.0)
    d2 = p * (p - 1) * x ** (p - 2) if p not in (0, 1) else torch.zeros_like(x)
    return (p * x ** (p - 1) if p != 0 else torch.zeros_like(x)), d2


def _erf(s: Step):
    x = s.saved("self")
    d1 = 2 / sqrt(pi) * torch.exp(-x * x)
    return d1, -2 * x * d1


def _of_result(derivatives: Callable[[Tensor], tuple[Tensor, Tensor | None]], s: Step):
    return derivatives(s.saved("result"))


def _of_input(derivatives: Callable[[Tensor], tuple[Tensor, Tensor | None]], s: Step):
    return derivatives(s.saved("self"))


def _log(base: float, x: Tensor):
    d1 = 1 / (x * base)
    return d1, -d1 / x


def _hardtanh(attribute: str, s: Step):
    x, n = s.saved(attribute), s.node
    return ((x > n._saved_min_val) & (x < n._saved_max_val)).to(x), None


def _leaky_relu(attribute: str, s: Step):
    x = s.saved(attribute)
    return torch.where(x > 0, 1.0, s.node._saved_negative_slope).to(x), None


def _threshold(s: Step):
    x = s.saved("self")
    return (x > s.node._saved_threshold).to(x), None


def _shrink(s: Step):
    x = s.saved("self")
    return (x.abs() > s.node._saved_lambd).to(x), None


def _rrelu(attribute: str, s: Step):
    x, n = s.saved(attribute), s.node
    if n._saved_training:
        slope = s.saved("noise")
    else:
        slope = (_number(n._saved_lower) + _number(n._saved_upper)) / 2
    return torch.where(x > 0, 1, slope).to(x), None


def _number(value) -> float:
    """Return a scalar that some versions of torch hand out as a tensor."""
    return float(value)


# f' and f'' by operation. What no entry covers, and is elementwise, is differentiated by autograd: see
# `BY_AUTOGRAD`, and `register_activation` for operations of one's own.
ACTIVATIONS: dict[str, Derivatives] = {
    "TanhBackward0": partial(_of_result, _of_tanh),
    "SigmoidBackward0": _sigmoid,
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "MishBackward0": _mish,
    "SoftplusBackward0": _softplus,
    "LogSigmoidBackward0": _log_sigmoid,
    "EluBackward0": _elu,
    "EluBackward1": _elu_in_place,
    "CeluBackward0": _celu,
    "CeluBackward1": _celu_in_place,
    "HardswishBackward0": _hardswish,
    "PowBackward0": _pow,
    "ErfBackward0": _erf,
    "ExpBackward0": partial(_of_result, lambda y: (y, y)),
    "Exp2Backward0": partial(_of_result, lambda y: (log(2) * y, log(2) ** 2 * y)),
    "Expm1Backward0": partial(_of_result, lambda y: (y + 1, y + 1)),
    "SqrtBackward0": partial(_of_result, lambda y: (0.5 / y, -0.25 / y**3)),
    "RsqrtBackward0": partial(_of_result, lambda y: (-0.5 * y**3, 0.75 * y**5)),
    "ReciprocalBackward0": partial(_of_result, lambda y: (-y * y, 2 * y**3)),
    "LogBackward0": partial(_of_input, partial(_log, 1.0)),
    "Log2Backward0": partial(_of_input, partial(_log, log(2))),
    "Log10Backward0": partial(_of_input, partial(_log, log(10))),
    "Log1PBackward0": partial(_of_input, lambda x: (1 / (1 + x), -1 / (1 + x) ** 2)),
    "SinBackward0": partial(_of_input, lambda x: (x.cos(), -x.sin())),
    "CosBackward0": partial(_of_input, lambda x: (-x.sin(), -x.cos())),
}

# The same without a second derivative.
PIECEWISE_LINEAR: dict[str, Derivatives] = {
    "ReluBackward0": partial(_of_result, lambda y: ((y > 0).to(y), None)),
    "ThresholdBackward0": _threshold,
    "ThresholdBackward1": _threshold,
    "HardtanhBackward0": partial(_hardtanh, "self"),
    "HardtanhBackward1": partial(_hardtanh, "result"),
    "LeakyReluBackward0": partial(_leaky_relu, "self"),
    "LeakyReluBackward1": partial(_leaky_relu, "result"),
    "HardsigmoidBackward0": partial(_of_input, lambda x: ((x.abs() < 3).to(x) / 6, None)),
    "HardshrinkBackward0": _shrink,
    "SoftshrinkBackward0": _shrink,
    "RreluWithNoiseBackward0": partial(_rrelu, "self"),
    "RreluWithNoiseBackward1": partial(_rrelu, "result"),
    "AbsBackward0": partial(_of_input, lambda x: (x.sgn(), None)),
}

# Those of them whose derivative is 0 or 1.
KINKS = (
    *("ReluBackward0", "ThresholdBackward0", "ThresholdBackward1", "HardtanhBackward0"),
    *("HardtanhBackward1", "HardshrinkBackward0", "SoftshrinkBackward0"),
)

# Elementwise operations whose derivatives are left to autograd, which is exact for them: see
# `backpack_ext.diagonals.unknown`.
BY_AUTOGRAD = (
    *("PowBackward1", "PowBackward2", "TanBackward0", "SinhBackward0", "CoshBackward0"),
    *("AsinBackward0", "AcosBackward0", "AtanBackward0", "AsinhBackward0", "AcoshBackward0"),
    *("AtanhBackward0", "ErfcBackward0", "ErfinvBackward0", "LgammaBackward0", "DigammaBackward0"),
    *("LogitBackward0", "SincBackward0", "SpecialNdtrBackward0", "SpecialLogNdtrBackward0"),
    *("LogaddexpBackward0", "Logaddexp2Backward0", "Atan2Backward0", "HypotBackward0"),
    *("AddcmulBackward0", "AddcdivBackward0", "LerpBackward0", "LerpBackward1", "LerpBackward2"),
    *("XlogyBackward0", "XlogyBackward1", "XlogyBackward2", "SpecialXlog1PyBackward0"),
    *("RemainderBackward0", "RemainderBackward1", "FmodBackward0", "FmodBackward1", "NanToNumBackward0"),
    *("DivBackward2", "DivBackward3", "CopysignBackward0", "SpecialEntrBackward0", "Rad2DegBackward0"),
    *("I0Backward0", "SpecialI0EBackward0", "SpecialI1Backward0", "PolygammaBackward0"),
)


def tanh(step: Step) -> Diagonals:
    """Cross a tanh y: ``f' (f' h - 2 y g)``, with fewer passes over the data than by the table."""
    node, (h,), g = step.node, step.h, step.gradient
    y = node._saved_result
    if y.dtype != h.dtype or Unpacking.once:
        return (crossed(step, *_of_tanh(step.lifted(y))),)
    inner = node(h)
    if inner is None:  # in a pass that was asked for other gradients only
        return (crossed(step, *_of_tanh(y)),)
    return (node(inner if g is None else inner.addcmul_(y, g, value=-2)),)


def kink(derivatives: Derivatives) -> DiagonalRule:
    """Return the rule of an elementwise operation whose derivative is 0 or 1.

    Then h moves as gradients do, which is one pass over the data, where data types allow.
    """

    def cross(step: Step) -> Diagonals:
        (h,) = step.h
        moved = step.node(h) if step.node._input_metadata[0].dtype == h.dtype else None
        if moved is None:  # or in a pass that was asked for other gradients only
            moved = crossed(step, *derivatives(step))
        return (moved,)

    return DiagonalRule(cross, shaped=True)


def pointwise(derivatives: Derivatives, curved: bool) -> DiagonalRule:
    """Return the rule of an elementwise operation of one tensor."""

    def cross(step: Step) -> Diagonals:
        d1, d2 = derivatives(step)
        return (crossed(step, d1, d2),)

    return DiagonalRule(cross, curved, shaped=True)


def prelu(step: Step) -> Diagonals:
    """Cross ``max(0, x) + w min(0, x)``: exact for x and for w."""
    x, w, (h,) = step.saved("self"), step.saved("weight"), step.h
    return torch.where(x > 0, 1, w * w) * h, torch.where(x > 0, 0, x * x) * h


def glu(step: Step) -> Diagonals:
    """Cross ``a sigma(b)``, a and b the halves of the input."""
    x, dim = step.saved("self"), signed(step.node._saved_dim)
    a, b = x.chunk(2, dim)
    p, (h,), g = b.sigmoid(), step.h, step.gradient
    w = p * (1 - p)
    h_b = (a * w).square() * h
    if g is not None:
        h_b += a * w * (1 - 2 * p) * g
    return (torch.cat((p * p * h, h_b), dim),)


def register_activation(
    operation: str,
    derivatives: Callable[[Node], tuple[Tensor, Tensor | None]],
    overwrite: bool = False,
) -> None:
    """Tell the derivatives of an elementwise operation of one's own.

    Needed for a ``torch.autograd.Function`` that cannot be differentiated twice, and faster for one that
    can. Activations composed of torch's functions need no entry.

    Args:
        operation: Name of the operation's node in the graph, ``output.grad_fn.name()``: for a
            ``torch.autograd.Function`` its class's name with ``Backward`` behind it.
        derivatives: Maps the node, from which what was saved can be read, to f' and f'' at the
            operation's input, shaped like its output; None for f'' if that is zero.
        overwrite: Whether to replace an existing rule.

    Raises:
        ValueError: If the operation has a rule and ``overwrite`` is False.

    Example:
        >>> class Cube(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x**3
        ...     @staticmethod
        ...     def backward(ctx, g):
        ...         return 3 * ctx.saved_tensors[0] ** 2 * g
        >>> def derivatives(node):
        ...     (x,) = node.saved_tensors
        ...     return 3 * x**2, 6 * x
        >>> register_activation("CubeBackward", derivatives)
    """

    def of_step(step: Step) -> tuple[Tensor, Tensor | None]:
        return derivatives(step.node)

    register_diagonal_rule(operation, overwrite=overwrite)(pointwise(of_step, True).cross)
    ACTIVATIONS[operation] = of_step
