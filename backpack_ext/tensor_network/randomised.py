"""A convolution that trains with random estimates of its weight's gradient and stores less for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backpack_ext.conv_factors.geometry import padding_widths
from backpack_ext.tensor_network.convolution import Convolution
from backpack_ext.tensor_network.dropout import check_keep, drawn, restricted, selected
from curvature.precision import without_autocast

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_FORWARDS = tuple(cls.forward for cls in _CONVOLUTIONS)


class RandomisedConv(nn.Module):
    r"""A convolution whose weight gradient is an unbiased estimate from a random part of its input.

    The weight's gradient sums over data n and input pixels i, for each input channel c. Of some of these
    indices a random subset is kept at each call, and only the kept part of the input is stored for the
    backward pass:

    .. math:: \nabla_W = \sum_{n i} x_{n c i} \, (\dots)_{n i} \;\approx\;
              \frac{L_n}{m_n} \frac{L_i}{m_i} \sum_{n \in S_n, i \in S_i} x_{n c i} \, (\dots)_{n i}

    and, times L_c / m_c, zeros for input channels that are not kept. The output, and the gradients
    of input and bias, are exact. So is everything in evaluation mode, where nothing is dropped.

    Squares of an estimate are biased, and so are quantities of `backpack_ext.backpack` (GGN diagonals,
    KFAC's blocks, ...) in training mode: take them, and ``torch.func``'s transforms, in evaluation mode.

    What is saved is what *this* layer stores. An activation before it that stores its output (ReLU), or
    another layer that reads the same input, keeps the whole tensor alive for itself.

    Args:
        conv: The convolution, ``nn.Conv1d`` to ``3d`` or ``nn.ConvTranspose1d`` to ``3d``; it stays the
            owner of weight and bias, as ``.conv``.
        keep: For each index that is dropped from the fraction of its values that are kept: ``"n"`` for
            data, ``"c"`` for the input channels (of each group), ``"i0"``, ``"i1"``, ``"i2"`` for the
            input pixels (behind a padding mode other than zeros) along each dimension. With "n" and "c"
            torch's kernels compute the gradient; with pixels a tensor network does, in float32 or wider.
        generator: A generator on the CPU; torch's by default.

    Raises:
        TypeError: If `conv` is no convolution, or has a forward of its own.
        ValueError: If there is no such index, a fraction is not in ``(0, 1]``, `conv` is lazy and was
            not called yet, or the input has no batch axis.
        RuntimeError: In training, if `conv` has hooks; and when its gradient is differentiated.

    References:
        Dangel (2023), Convolutions and more as Einsum, where it is tensor dropout; Oktay et al. (2021),
        Randomized automatic differentiation; Adelman et al. (2021), Faster neural network training with
        approximate tensor operations.

    Example:
        >>> layer = RandomisedConv(nn.Conv2d(4, 6, 3), {"n": 0.25})
        >>> x = torch.rand(8, 4, 10, 10)
        >>> layer(x).sum().backward()  # stored two of the eight images
        >>> layer.conv.weight.grad.shape, torch.equal(layer(x), layer.conv(x))
        (torch.Size([6, 4, 3, 3]), True)
    """

    def __init__(
        self, conv: nn.Module, keep: Mapping[str, float], generator: torch.Generator | None = None
    ):
        super().__init__()
        hyper = Convolution.of(conv)
        if type(conv).forward not in _FORWARDS:
            raise TypeError(
                f"{type(conv).__name__} has a forward of its own, which would not be called."
            )
        if nn.parameter.is_lazy(conv.weight):
            raise ValueError("A lazy convolution has no weight yet: call it once before.")
        names = ("n", "c", *(f"i{axis}" for axis in range(hyper.dims)))
        for name in keep:
            if name not in names:
                raise ValueError(f"keep: {name!r} is none of {', '.join(names)}.")
        check_keep(keep)
        self.conv, self.keep, self.generator = conv, dict(keep), generator

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x[N, C, *I]``, exactly."""
        conv = self.conv
        if self.training and torch.is_grad_enabled():
            _check_hooks(conv)
        estimates = self.training and torch.is_grad_enabled() and conv.weight.requires_grad
        if not (estimates and x.numel()):
            return conv(x)
        hyper = Convolution.of(conv)
        if x.dim() != hyper.dims + 2:
            raise ValueError(
                f"The input has shape {tuple(x.shape)}; expected [N, C, *I], with a batch axis."
            )
        x, hyper = _zero_padded(x, hyper, conv)
        weight, bias = conv.weight, conv.bias
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
        sizes = {"n": len(x), "c": x.shape[1] // conv.groups}
        sizes.update((f"i{axis}", n) for axis, n in enumerate(x.shape[2:]))
        return _Estimated.apply(x, weight, bias, hyper, drawn(sizes, self.keep, self.generator))

    def extra_repr(self) -> str:
        """Return the fractions that are kept."""
        return f"keep={self.keep}"


def _zero_padded(x: Tensor, hyper: Convolution, conv: nn.Module) -> tuple[Tensor, Convolution]:
    """Form the padding that torch's kernels do not know: of other modes, or unequal on the two sides."""
    if hyper.transposed:
        return x, hyper
    widths = padding_widths(conv)  # of "same" and "valid" too
    before, after = tuple(widths[::2][::-1]), tuple(widths[1::2][::-1])
    if hyper.padding_mode == "zeros" and before == after:
        return x, replace(hyper, padding=before)
    mode = "constant" if hyper.padding_mode == "zeros" else hyper.padding_mode
    return F.pad(x, widths, mode=mode), replace(hyper, padding=0, padding_mode="zeros")


def _check_hooks(conv: nn.Module) -> None:
    """Raise if estimates would bypass hooks of a convolution that trains more than its bias.

    Before its first call the weight that a hook makes (`spectral_norm`) may not require a gradient yet.
    """
    if not any(p.requires_grad for name, p in conv.named_parameters() if name != "bias"):
        return
    hooks = [h for h in conv._forward_hooks.values() if not getattr(h, "records_sites", False)]
    others = (conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
    if hooks or any(others):
        raise RuntimeError(
            "RandomisedConv: the convolution has hooks (pruning, weight_norm and spectral_norm of "
            "torch.nn.utils are such), which training would not call. Use "
            "torch.nn.utils.parametrizations in their place, or .eval(), where they are called."
        )


class _Estimated(torch.autograd.Function):
    """A convolution that stores a part of its input."""

    @staticmethod
    def forward(ctx, x, weight, bias, hyper: Convolution, values: dict[str, Tensor]) -> Tensor:
        ctx.hyper, ctx.values, ctx.x_shape, ctx.weight_shape = hyper, values, x.shape, weight.shape
        axes = {"n": 0, "c": 2, **{f"i{axis}": 3 + axis for axis in range(hyper.dims)}}
        part = selected(x.unflatten(1, (hyper.groups, -1)), {axes[k]: v for k, v in values.items()})
        ctx.save_for_backward(part, weight if ctx.needs_input_grad[0] else None)
        return torch.convolution(x, weight, bias, *_numbers(hyper))

    @staticmethod
    def backward(ctx, vector: Tensor):
        with torch.no_grad():
            gradients = without_autocast(_gradients)(ctx, vector)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _Once.apply(vector, *gradients)
        return (*gradients, None, None)


class _Once(torch.autograd.Function):
    """The identity; complains when it is differentiated."""

    @staticmethod
    def forward(ctx, vector, *gradients):
        return tuple(t if t is None else t.view_as(t) for t in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "RandomisedConv: the gradient is an estimate from a part of the input, and has no "
            "derivative. Call .eval() on the layer for second derivatives: there it is exact."
        )


def _numbers(hyper: Convolution) -> tuple:
    h = hyper
    return h.stride, h.padding, h.dilation, h.transposed, h.output_padding, h.groups


def _gradients(ctx, vector: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias."""
    hyper, (part, weight) = ctx.hyper, ctx.saved_tensors
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        x = vector.new_empty(()).expand(ctx.x_shape)  # the input's values do not matter
        of_x = _backward(vector, x, weight, hyper, 0)
    if ctx.needs_input_grad[1]:
        of_weight = _estimate(part, vector, hyper, ctx)
    if ctx.needs_input_grad[2]:
        of_bias = vector.sum([0, *range(2, vector.dim())])
    return of_x, of_weight, of_bias


def _backward(vector: Tensor, x: Tensor, weight: Tensor, hyper: Convolution, which: int) -> Tensor:
    mask = [k == which for k in range(3)]
    numbers = _numbers(hyper)
    return torch.ops.aten.convolution_backward(vector, x, weight, None, *numbers, mask)[which]


def _estimate(part: Tensor, vector: Tensor, hyper: Convolution, ctx) -> Tensor:
    """Return the weight's gradient from the part ``[n, g, c, *i]`` of the input."""
    values, groups, shape = ctx.values, hyper.groups, ctx.weight_shape
    channels = values.get("c")
    c = part.shape[2]
    if any(name not in ("n", "c") for name in values):
        gradient = _of_pixels(part, vector, hyper, ctx).to(vector.dtype)
    else:
        if "n" in values:
            vector = selected(vector, {0: values["n"]})
        small = (groups * c, *shape[1:]) if hyper.transposed else (shape[0], c, *shape[2:])
        weight = vector.new_empty(()).expand(small)  # its values do not matter
        gradient = _backward(vector, part.flatten(1, 2), weight, hyper, 1)
        gradient = gradient * prod(ctx.x_shape[0] / len(v) for k, v in values.items() if k == "n")
    if channels is None:
        return gradient
    whole = gradient.new_zeros(shape).unflatten(0, (groups, -1))
    axis = 1 if hyper.transposed else 2
    part = gradient.unflatten(0, (groups, -1)) * (ctx.x_shape[1] // groups / c)
    return whole.index_copy_(axis, channels.to(whole.device), part).flatten(0, 1)


def _of_pixels(part: Tensor, vector: Tensor, hyper: Convolution, ctx) -> Tensor:
    dtype = torch.promote_types(vector.dtype, torch.float32)
    values = {k: v for k, v in ctx.values.items() if k != "c"}
    shape = (ctx.x_shape[0], hyper.groups * part.shape[2], *ctx.x_shape[2:])
    x = part.new_empty((), dtype=dtype).expand(shape)  # in the place of what was dropped
    network = replace(hyper, simplify=False).weight_vjp(x, vector.to(dtype))
    return restricted(network, values, {0: part.to(dtype)}).simplify().contract()
