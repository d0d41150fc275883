"""Convolutions of any dimension as tensor networks, and what second-order methods need of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from backpack_ext.conv_factors.geometry import Dimension, padding_widths
from backpack_ext.tensor_network.expression import Expression
from backpack_ext.tensor_network.pattern import Pattern
from curvature.decomposition import widen

# Names of indices, and the operand that has them.
Part = tuple[tuple[str, ...], Tensor | Pattern]

MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Convolution:
    r"""Hyper-parameters of a convolution; its methods return tensor networks, `Expression`\ s.

    Indices of the networks, all along:

    ============ ========================================================================
    ``n``        data
    ``v``        vectors, several per datum
    ``g``        groups
    ``c``        input channels of a group; a tensor's channel axis is ``(g c)``
    ``d``        output channels of a group
    ``i0 i1 ..`` input entries of each spatial dimension
    ``o0 o1 ..`` output pixels
    ``k0 k1 ..`` kernel entries
    ``c' i0' ..`` the same in a second copy of a tensor
    ============ ========================================================================

    Each dimension is an operand ``P[i, o, k]`` of zeros and ones, see `index_pattern`, so that

    .. math:: z_{n (g d) o} = \sum_{c i k} x_{n (g c) i} \, W_{(g d) c k} \prod_j P^j_{i_j o_j k_j}

    Tensors have torch's layouts: inputs ``[N, C, *I]``, outputs ``[N, D, *O]``, weights
    ``[D, C / groups, *K]``, of transposed convolutions ``[C, D / groups, *K]``. There may be any
    number of spatial dimensions. A bias is not part of the networks.

    Args:
        kernel_size: Kernel entries of each spatial dimension.
        stride: Stride, one number or one per dimension.
        padding: Entries added on both sides, one number or one per dimension; ``"same"`` or ``"valid"``.
        dilation: Dilation, one number or one per dimension.
        groups: Number of groups.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        transposed: Whether the convolution is a transposed one.
        output_padding: What a transposed convolution adds to its output's size.
        simplify: Whether expressions are simplified where the connectivity allows
            (`Expression.simplify`). Their values are the same; indices may be others.

    Raises:
        TypeError: If a number is no integer, or `of` gets no convolution.
        ValueError: If these are no hyper-parameters of a convolution.

    References:
        Dangel (2023), Convolutions and more as Einsum: A tensor network perspective with advances
        for second-order methods.

    Example:
        >>> conv = Convolution((3, 3), stride=2, padding=1)
        >>> x, weight = torch.rand(2, 4, 8, 8), torch.rand(5, 4, 3, 3)
        >>> z = conv.forward(x, weight).contract()
        >>> torch.allclose(z, nn.functional.conv2d(x, weight, stride=2, padding=1))
        True
        >>> conv.kfac_reduce(x).equation
        'abcd,cef,dgh,aijk,jlm,kno,->bfhimo'
    """

    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0
    simplify: bool = True

    def __post_init__(self):
        if isinstance(self.kernel_size, int) or not len(self.kernel_size):
            raise ValueError(
                f"kernel_size={self.kernel_size!r}: give a tuple, with one number per spatial dimension."
            )
        named = isinstance(self.padding, str)
        least = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0, "output_padding": 0}
        for name, minimum in least.items():
            if not (name == "padding" and named):
                object.__setattr__(self, name, self._numbers(name, minimum))
        if named and self.padding not in ("same", "valid"):
            raise ValueError(f'padding={self.padding!r}: give numbers, "same" or "valid".')
        if self.padding == "same" and max(self.stride) > 1:
            raise ValueError(f'padding="same" is defined for stride 1 only, not {self.stride}.')
        if self.padding_mode not in MODES:
            raise ValueError(f"padding_mode={self.padding_mode!r} is none of {', '.join(MODES)}.")
        if self.transposed and (named or self.padding_mode != "zeros"):
            raise ValueError("A transposed convolution has numbers as padding, and no padding_mode.")
        if not self.transposed and any(self.output_padding):
            raise ValueError(f"output_padding={self.output_padding} is for transposed convolutions.")
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"groups={self.groups!r}: give a number of at least 1.")

    def _numbers(self, name: str, minimum: int) -> tuple[int, ...]:
        value, dims = getattr(self, name), len(self.kernel_size)
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
        if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise TypeError(f"{name}={value!r}: give integers.")
        if len(values) != dims or min(values) < minimum:
            raise ValueError(
                f"{name}={value!r}: give one number of at least {minimum}, or {dims} of them, one per "
                "spatial dimension."
            )
        return values

    @staticmethod
    def of(module: nn.Module, simplify: bool = True) -> Convolution:
        """Return those of an ``nn.Conv1d`` to ``3d`` or ``nn.ConvTranspose1d`` to ``3d``.

        As its forward uses them now: a padding mode other than zeros pads by what ``padding`` said
        when the module was made.
        """
        if not isinstance(module, nn.modules.conv._ConvNd):
            raise TypeError(
                f"{type(module).__name__} is no nn.Conv1d to 3d or nn.ConvTranspose1d to 3d."
            )
        m, padding = module, module.padding
        if m.padding_mode != "zeros":
            widths = padding_widths(m)
            before, after = widths[::2][::-1], widths[1::2][::-1]
            padding = before if before == after else "same"
        numbers = m.kernel_size, m.stride, padding, m.dilation, m.groups, m.padding_mode, m.transposed
        conv = Convolution(*numbers, m.output_padding, simplify)
        if padding == "same" and m.padding_mode != "zeros":
            totals = [d * (k - 1) for d, k in zip(conv.dilation, m.kernel_size, strict=True)]
            if [b + a for b, a in zip(before, after, strict=True)] != totals:
                raise ValueError(
                    f"The module still pads {before} and {after}, by the dilation that it was made "
                    f"with, not {conv.dilation}. Make a new one."
                )
        return conv

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    def patterns(self, sizes: Sequence[int]) -> tuple[Pattern, ...]:
        """Return the pattern of each spatial dimension of an input of these sizes.

        Raises:
            TypeError: If a size is no integer.
            ValueError: If a dimension has no output pixel, or is too small for its padding mode.
        """
        if len(sizes) != self.dims:
            raise ValueError(f"{len(sizes)} sizes {tuple(sizes)} for {self.dims} spatial dimensions.")
        if any(isinstance(n, float) for n in sizes):
            raise TypeError(f"Sizes {tuple(sizes)}: give integers.")
        return tuple(self._pattern(axis, n) for axis, n in enumerate(sizes))

    def output_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the output's spatial sizes for an input of these spatial sizes."""
        return tuple(p.dimension.out for p in self.patterns(sizes))

    def _pattern(self, axis: int, n: int) -> Pattern:
        values = (self.kernel_size[axis], self.stride[axis], self.dilation[axis])
        kernel, stride, dilation = values
        reach = dilation * (kernel - 1)
        if self.padding == "valid":
            before = after = 0
        elif self.padding == "same":
            before, after = reach // 2, reach - reach // 2
        else:
            before = after = self.padding[axis]
        if self.transposed:
            out = (n - 1) * stride - 2 * before + reach + self.output_padding[axis] + 1
        else:
            out = (n + before + after - reach - 1) // stride + 1
        if n < 1 or out < 1:
            raise ValueError(
                f"Spatial dimension {axis}: no output pixel for {n} input entries ({self})."
            )
        if self.padding_mode == "zeros" or before == after == 0:
            return Pattern(Dimension(n, out, kernel, stride, dilation, before, self.transposed))
        most = {"reflect": n - 1, "circular": n}.get(self.padding_mode)
        if most is not None and after > most:
            raise ValueError(
                f"Spatial dimension {axis}: {self.padding_mode} padding adds at most {most} of {n} "
                f"input entries on a side, not {after}."
            )
        dimension = Dimension(n + before + after, out, kernel, stride, dilation)
        return Pattern(dimension, self.padding_mode, before, after)

    def forward(self, x: Tensor, weight: Tensor) -> Expression:
        r"""Return the convolution without its bias.

        Args:
            x: Input ``[N, C, *I]``.
            weight: Weight.

        Returns:
            Expression of ``z[N, D, *O]``.

        Raises:
            ValueError: If shapes do not fit.
        """
        parts = self._unfolded(x)
        w = self._weight(weight, inputs=x.shape[1])
        D = self.groups * w.shape[2 if self.transposed else 1]
        shape = (len(x), D, *self.output_sizes(x.shape[2:]))
        return self._network([*parts, (self._w, w)], ("n", "g", "d", *self._each("o")), shape)

    def unfold(self, x: Tensor) -> Expression:
        """Return the input entries that each output pixel meets, as ``torch.nn.functional.unfold``.

        Args:
            x: Input ``[N, C, *I]``.

        Returns:
            Expression of ``[N, C K, O]``, K and O the products over the dimensions.
        """
        parts = self._unfolded(x)
        pixels = prod(self.output_sizes(x.shape[2:]))
        shape = (len(x), x.shape[1] * prod(self.kernel_size), pixels)
        return self._network(parts, ("n", "g", "c", *self._each("k"), *self._each("o")), shape)

    def input_vjp(self, vector: Tensor, weight: Tensor, sizes: Sequence[int]) -> Expression:
        """Return the product of a vector at the output with the Jacobian for the input.

        Args:
            vector: Vector at the output, ``[N, D, *O]``.
            weight: Weight.
            sizes: The input's spatial sizes, which the output's do not always tell.

        Returns:
            Expression of ``[N, C, *I]``.

        Raises:
            ValueError: If shapes do not fit.
        """
        patterns, z = self._patterns(sizes), self._vector(vector, sizes)
        w = self._weight(weight, outputs=vector.shape[1])
        C = self.groups * w.shape[1 if self.transposed else 2]
        parts = [(("n", "g", "d", *self._each("o")), z), *patterns, (self._w, w)]
        return self._network(parts, ("n", "g", "c", *self._each("i")), (len(vector), C, *sizes))

    def weight_vjp(self, x: Tensor, vector: Tensor, per_datum: bool = False) -> Expression:
        """Return the product of a vector at the output with the Jacobian for the weight.

        Args:
            x: Input ``[N, C, *I]``.
            vector: Vector at the output, ``[N, D, *O]``.
            per_datum: Whether each datum has a result of its own, else they are summed.

        Returns:
            Expression of the weight's shape, with N in front if per datum.

        Raises:
            ValueError: If shapes do not fit.
        """
        parts, z = self._unfolded(x), self._vector(vector, x.shape[2:], len(x))
        out, shape = self._w, self._weight_shape(x.shape[1], vector.shape[1])
        if per_datum:
            out, shape = ("n", *out), (len(x), *shape)
        return self._network([*parts, (("n", "g", "d", *self._each("o")), z)], out, shape)

    def input_jvp(self, tangent: Tensor, weight: Tensor) -> Expression:
        """Return the Jacobian for the input times a tangent.

        Args:
            tangent: Tangent of the input, ``[N, C, *I]``.
            weight: Weight.

        Returns:
            Expression of ``[N, D, *O]``: `forward` is linear in the input.

        Raises:
            ValueError: If shapes do not fit.
        """
        return self.forward(tangent, weight)

    def weight_jvp(self, x: Tensor, tangent: Tensor) -> Expression:
        """Return the Jacobian for the weight times a tangent.

        Args:
            x: Input ``[N, C, *I]``.
            tangent: Tangent of the weight, of its shape.

        Returns:
            Expression of ``[N, D, *O]``: `forward` is linear in the weight.

        Raises:
            ValueError: If shapes do not fit.
        """
        return self.forward(x, tangent)

    def kfac_expand(self, x: Tensor) -> Expression:
        r"""Return the input factor A of KFAC-expand, as `backpack_ext.KFAC` has it.

        .. math:: A = \frac{1}{N O} \sum_{n o} a_{no} a_{no}^T

        with the unfolded inputs a and the number O of output pixels.

        Args:
            x: Input ``[N, C, *I]``.

        Returns:
            Expression of ``[c K, c K]``, with several groups ``[groups, c K, c K]``, at least float32.

        Raises:
            ValueError: If shapes do not fit, or there are no data in floating point.

        References:
            Eschenhagen et al. (2023), Kronecker-factored approximate curvature for modern neural
            network architectures.
        """
        return self._factor(x, shared=self._each("o"), power=1)

    def kfac_reduce(self, x: Tensor) -> Expression:
        r"""Return the input factor A of KFAC-reduce, as `backpack_ext.KFAC` has it.

        .. math:: A = \frac1N \sum_n \bar a_n \bar a_n^T, \quad \bar a_n = \frac1O \sum_o a_{no}

        Args:
            x: Input ``[N, C, *I]``.

        Returns:
            Expression of ``[c K, c K]``, with several groups ``[groups, c K, c K]``, at least float32.

        Raises:
            ValueError: If shapes do not fit, or there are no data in floating point.

        References:
            Eschenhagen et al. (2023), Kronecker-factored approximate curvature for modern neural
            network architectures.
        """
        return self._factor(x, shared=(), power=2)

    def ggn_diagonal(self, x: Tensor, vectors: Tensor) -> Expression:
        r"""Return the diagonal of a generalised Gauss-Newton matrix for the weight.

        .. math:: \sum_{vn} \Big( \frac{\partial z_n}{\partial W}^T s_{vn} \Big)^2

        with vectors s at the output: the columns of a root of the loss's Hessian, carried back to it.
        The gradients of each datum's loss in their place give the sum of squared per-datum gradients.

        Args:
            x: Input ``[N, C, *I]``.
            vectors: Vectors at the output, ``[V, N, D, *O]``.

        Returns:
            Expression of the weight's shape, in float32 or above.

        Raises:
            ValueError: If shapes do not fit.
        """
        s = self._vector(widen(vectors), x.shape[2:], len(x), axes=("v", "n"))
        parts = [*self._unfolded(widen(x)), (("v", "n", "g", "d", *self._each("o")), s)]
        shape = self._weight_shape(x.shape[1], vectors.shape[2])
        return self._network(_twice(parts, ("v", "n", *self._w)), self._w, shape)

    def _each(self, letter: str) -> tuple[str, ...]:
        return tuple(f"{letter}{axis}" for axis in range(self.dims))

    @property
    def _w(self) -> tuple[str, ...]:
        return ("g", *("cd" if self.transposed else "dc"), *self._each("k"))

    def _patterns(self, sizes: Sequence[int]) -> list[Part]:
        names = zip(*map(self._each, "iok"), strict=True)
        return list(zip(names, self.patterns(sizes), strict=True))

    def _unfolded(self, x: Tensor) -> list[Part]:
        """Return the input and the patterns, whose product is the unfolded input."""
        if x.dim() != self.dims + 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected [N, C, *I] with {self.dims} spatial dimensions."
            )
        self._divisible("x", x, 1)
        return [(("n", "g", "c", *self._each("i")), self._grouped(x, 1)), *self._patterns(x.shape[2:])]

    def _vector(self, z: Tensor, sizes: Sequence[int], data: int | None = None, axes=("n",)) -> Tensor:
        """Return vectors at the output, in groups."""
        pixels, channel = self.output_sizes(sizes), len(axes)
        fits = z.dim() == channel + 1 + self.dims and z.shape[channel + 1 :] == pixels
        if not fits or (data is not None and z.shape[channel - 1] != data):
            want = ", ".join([*axes[:-1], "n" if data is None else str(data), "D", *map(str, pixels)])
            raise ValueError(
                f"The vectors at the output have shape {tuple(z.shape)}; expected [{want}]."
            )
        self._divisible("The vectors at the output", z, channel)
        return self._grouped(z, channel)

    def _weight(self, w: Tensor, inputs: int | None = None, outputs: int | None = None) -> Tensor:
        """Return the weight ``[g, d, c, *k]``, of transposed convolutions ``[g, c, d, *k]``."""
        given = (inputs, outputs) if self.transposed else (outputs, inputs)
        per_group = given[1] if given[1] is None else given[1] // self.groups
        fits = w.dim() == self.dims + 2 and w.shape[2:] == self.kernel_size
        if not fits or given[0] not in (None, w.shape[0]) or per_group not in (None, w.shape[1]):
            names = ("C", "D") if self.transposed else ("D", "C")
            first = names[0] if given[0] is None else given[0]
            second = f"{names[1]} / {self.groups}" if per_group is None else per_group
            want = ", ".join(map(str, (first, second, *self.kernel_size)))
            raise ValueError(f"The weight has shape {tuple(w.shape)}; expected [{want}].")
        self._divisible("The weight", w, 0)
        return self._grouped(w, 0)

    def _weight_shape(self, inputs: int, outputs: int) -> tuple[int, ...]:
        first, second = (inputs, outputs) if self.transposed else (outputs, inputs)
        return first, second // self.groups, *self.kernel_size

    def _divisible(self, name: str, t: Tensor, axis: int) -> None:
        if t.shape[axis] % self.groups:
            raise ValueError(
                f"{name}: {t.shape[axis]} channels (shape {tuple(t.shape)}) do not divide into "
                f"{self.groups} groups."
            )

    def _grouped(self, t: Tensor, axis: int) -> Tensor:
        return t.unflatten(axis, (self.groups, -1))

    def _factor(self, x: Tensor, shared: tuple[str, ...], power: int) -> Expression:
        """Return the mean over data of products of two unfolded inputs, over ``pixels ** power``."""
        if not len(x) or not (x.is_floating_point() or x.is_complex()):
            raise ValueError(
                f"The input has shape {tuple(x.shape)} and {x.dtype}; a mean over data needs data, in "
                "floating point."
            )
        parts = self._unfolded(widen(x))  # the sum comes before the mean, and is larger
        once, row = ("n", "g", *shared), ("c", *self._each("k"))
        size = x.shape[1] // self.groups * prod(self.kernel_size)
        shape = (size, size) if self.groups == 1 else (self.groups, size, size)
        scale = 1 / (len(x) * prod(self.output_sizes(x.shape[2:])) ** power)
        return self._network(_twice(parts, once), ("g", *row, *_primed(row, once)), shape, scale)

    def _network(
        self, parts: list[Part], out: tuple[str, ...], shape: tuple[int, ...], scale: float = 1.0
    ) -> Expression:
        legs, tensors = zip(*parts, strict=True)
        expression = Expression(legs, out, tensors, shape, scale)
        return expression.simplify() if self.simplify else expression


def _primed(legs: tuple[str, ...], once: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(x if x in once else x + "'" for x in legs)


def _twice(parts: list[Part], once: tuple[str, ...]) -> list[Part]:
    """Return the parts and a copy of them, which shares the indices `once`."""
    return [*parts, *((_primed(legs, once), t) for legs, t in parts)]


def index_pattern(
    size: int,
    kernel_size: int,
    stride: int = 1,
    padding: int | str = 0,
    dilation: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int = 0,
    dtype: torch.dtype = torch.bool,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Return the index pattern of one dimension of a convolution.

    .. math::
        P_{i,o,k} = [\, i = \text{stride} \; o + \text{dilation} \; k - \text{padding} \,]

    For a transposed convolution i and o change places. A convolution of several dimensions has one
    pattern for each: they multiply.

    Args:
        size: Number of input entries I.
        kernel_size: Number of kernel entries K.
        stride: Stride.
        padding: Entries added on each side, ``"same"`` or ``"valid"``.
        dilation: Dilation.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        transposed: Whether the convolution is a transposed one.
        output_padding: What a transposed convolution adds to its output's size.
        dtype: Data type of the pattern.
        device: Where the pattern is.

    Returns:
        ``P[I, O, K]``.

    Raises:
        ValueError: If these are no hyper-parameters of a convolution, or it has no output.

    Example:
        >>> index_pattern(4, 2, stride=2, dtype=torch.int64).permute(2, 1, 0)  # [k, o, i]
        tensor([[[1, 0, 0, 0],
                 [0, 0, 1, 0]],
        <BLANKLINE>
                [[0, 1, 0, 0],
                 [0, 0, 0, 1]]])
    """
    conv = Convolution(
        (kernel_size,), stride, padding, dilation, 1, padding_mode, transposed, output_padding
    )
    return conv.patterns((size,))[0].tensor(dtype, torch.device(device))
