"""The counted floor: the matrix products that the mathematics needs beyond a plain step.

With inputs ``a[n,s,i]`` and vectors ``b[v,n,s,o]`` of each layer (N data, S shared positions, V
vectors), a quantity costs the products that carry its vectors backward, if they are not the
gradient, and those that contract ``a`` with ``b``. They are listed here from the layers' shapes
alone and timed on random numbers. Not counted: unfolding a convolution's input, elementwise work,
sums, and the interpreter. So no implementation with general matrix products is below the floor;
half of a symmetric product could be saved by one that knows of the symmetry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from benchmarks.models import SelfAttention

Operands = Callable[..., Tensor]


@dataclass(frozen=True)
class MatMul:
    """``batch`` products ``[m, k] @ [k, n]``.

    Args:
        batch: Number of products.
        m: Rows of the result.
        k: Size of the summed index.
        n: Columns of the result.
        layout: How the factors lie in memory, as in BLAS: ``"t"`` for a stored transpose.
    """

    batch: int
    m: int
    k: int
    n: int
    layout: str = "nn"

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.m * self.k * self.n

    def prepare(self, operands: Operands) -> Callable[[], Tensor]:
        """Return a function that computes the products."""
        left = operands(self.batch, *((self.k, self.m) if self.layout[0] == "t" else (self.m, self.k)))
        right = operands(self.batch, *((self.n, self.k) if self.layout[1] == "t" else (self.k, self.n)))
        left = left.mT if self.layout[0] == "t" else left
        right = right.mT if self.layout[1] == "t" else right
        if self.k == 1:  # an outer product: torch's broadcasting is faster than its bmm
            return lambda: left * right
        if self.batch == 1:
            left, right = left[0], right[0]
        return lambda: left @ right


@dataclass(frozen=True)
class ConvInput:
    """The vector-Jacobian product of a convolution with respect to its input.

    Args:
        in_shape: ``[C_in, *pixels]``, without the batch.
        out_shape: ``[C_out, *pixels]``, without the batch.
        weight_shape: ``[C_out, C_in, *kernel]``.
        stride: Of the convolution.
        padding: Of the convolution.
        batch: Number of vectors.
        dilation: Of the convolution.
        groups: Of the convolution; ``weight_shape`` has the channels of one group.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    batch: int = 1
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @property
    def _options(self) -> dict:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * prod(self.out_shape) * prod(self.weight_shape[1:])

    def prepare(self, operands: Operands) -> Callable[[], Tensor]:
        """Return a function that computes the product."""
        g, weight = operands(self.batch, *self.out_shape), operands(*self.weight_shape)
        size, options = (self.batch, *self.in_shape), self._options
        return lambda: nn.grad.conv2d_input(size, weight, g, **options)


@dataclass(frozen=True)
class ConvWeight(ConvInput):
    """The vector-Jacobian product of a convolution with respect to its weight."""

    def prepare(self, operands: Operands) -> Callable[[], Tensor]:
        """Return a function that computes the product."""
        g, x = operands(self.batch, *self.out_shape), operands(self.batch, *self.in_shape)
        size, options = self.weight_shape, self._options
        return lambda: nn.grad.conv2d_weight(x, size, g, **options)


Product = MatMul | ConvInput


@dataclass(frozen=True)
class Layer:
    """The normal form's shape of one linear layer or convolution.

    Args:
        N: Number of data.
        S: Number of shared positions (tokens, output pixels); 1 for a plain linear layer.
        i: Number of input features of a group (convolution: channels times kernel).
        o: Number of output features of a group.
        upstream: Whether vectors have to travel further, to layers before this one.
        conv: What a convolution does to one datum; None for a linear layer.
        groups: Number of groups, 1 for a linear layer; each has products of its own.
    """

    N: int
    S: int
    i: int
    o: int
    upstream: bool
    conv: ConvInput | None = None
    groups: int = 1

    def vjp(self, V: int) -> list[Product]:
        """Carry V vectors per datum to the layer's input; nothing to do for the first layer."""
        if not self.upstream:
            return []
        if self.conv is None:
            return [MatMul(1, V * self.N * self.S, self.o, self.i)]
        return [replace(self.conv, batch=V * self.N)]

    def weight_product(self) -> list[Product]:
        """Contract inputs with vectors, summed over data and positions, as the gradient does."""
        if self.conv is None:
            return [MatMul(1, self.o, self.N * self.S, self.i, "tn")]
        return [ConvWeight(**vars(replace(self.conv, batch=self.N)))]

    def factors(self, approx: str, V: int, roots: bool = False) -> list[Product]:
        """Form A and B of KFAC-expand or KFAC-reduce; with ``roots`` none of fewer rows than columns."""
        rows = self.N * (self.S if approx == "expand" else 1)
        A = MatMul(self.groups, self.i, rows, self.i, "tn")
        B = MatMul(self.groups, self.o, V * rows, self.o, "tn")
        return [product for product in (A, B) if not (roots and product.k < product.m)]

    def per_sample(self, V: int = 1) -> list[Product]:
        """Form the per-sample vectors ``sum_s b a``."""
        return [MatMul(self.groups * V * self.N, self.o, self.S, self.i, "tn")]

    def square_sum(self, V: int = 1) -> list[Product]:
        """Sum the squared per-sample vectors: without a shared axis one product of squares."""
        if self.S == 1:
            return [MatMul(self.groups, self.o, self.N, self.i, "tn")]
        return self.per_sample(V)

    def norms(self) -> list[Product]:
        """Norms of the per-sample gradients: vector norms, Gram products, or the gradients."""
        if self.S == 1:
            return []
        gram = [MatMul(self.groups * self.N, self.S, d, self.S, "nt") for d in (self.i, self.o)]
        return min(gram, self.per_sample(), key=total_flops)

    def dots(self) -> list[Product]:
        """Pairwise dot products of the per-sample gradients, the cheaper of two ways."""
        return self.gram(1)

    def gram(self, V: int) -> list[Product]:
        """Pairwise dot products of V per-sample vectors per datum, the cheaper of two ways."""
        rows = self.N * self.S
        kernel = [
            MatMul(self.groups, rows, self.i, rows, "nt"),
            MatMul(self.groups, V * rows, self.o, V * rows, "nt"),
        ]
        if self.S == 1:
            return kernel
        columns = V * self.N
        explicit = [
            *self.per_sample(V),
            MatMul(1, columns, self.groups * self.o * self.i, columns, "nt"),
        ]
        return min(kernel, explicit, key=total_flops)

    def combined(self, k: int) -> list[Product]:
        """Form k combinations of the per-sample vectors, as k gradients."""
        return [MatMul(self.groups * k, self.o, self.N * self.S, self.i, "tn")]

    def first_order(self) -> list[Product]:
        """Norms, dots and second moments of the per-sample gradients, formed once for all of them."""
        if self.S == 1:
            return [*self.square_sum(), *self.dots()]
        rows = self.N * self.S
        gram = [MatMul(self.groups, rows, d, rows, "nt") for d in (self.i, self.o)]
        explicit = [MatMul(1, self.N, self.groups * self.o * self.i, self.N, "nt")]
        return [*self.per_sample(), *min(gram, explicit, key=total_flops)]


@dataclass(frozen=True)
class Attention:
    """The shape of an attention between layers: vectors cross it, nothing is extracted.

    Args:
        batch: Data times heads.
        T: Number of tokens.
        d: Dimension of a head.
    """

    batch: int
    T: int
    d: int

    def vjp(self, V: int) -> list[Product]:
        """From the output's vectors to those of values, probabilities, queries and keys."""
        b, T, d = V * self.batch, self.T, self.d
        return [
            MatMul(b, T, T, d, "tn"),
            MatMul(b, T, d, T, "nt"),
            MatMul(b, T, T, d, "nn"),
            MatMul(b, T, T, d, "tn"),
        ]


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model, and the products of a quantity of all its layers.

    Args:
        layers: In the order of the forward pass.
        attentions: In the order of the forward pass.
        classes: Number of columns of the exact loss-Hessian root.
    """

    layers: tuple[Layer, ...]
    attentions: tuple[Attention, ...]
    classes: int

    def sweep(self, V: int) -> list[Product]:
        """Carry V vectors per datum from the logits to the first layer's output."""
        return [p for part in (*self.layers, *self.attentions) for p in part.vjp(V)]

    def each(self, what: str, *args) -> list[Product]:
        """Collect ``Layer.what(*args)`` over the layers."""
        return [p for layer in self.layers for p in getattr(layer, what)(*args)]


def total_flops(products: list[Product]) -> int:
    """Return the multiplications and additions of all products."""
    return sum(p.flops for p in products)


def shapes_of(model: nn.Module, x: Tensor) -> Shapes:
    """Run the model once and note the shapes of its layers.

    Args:
        model: Any model of linear layers, 2d convolutions with zero padding and `SelfAttention`. Other
            layers are passed over: norms and embeddings need no product that counts.
        x: Its input ``[N, ...]``.

    Returns:
        The shapes, in the order of the forward pass.

    Raises:
        ValueError: If a convolution pads with something else than zeros.
    """
    layers: list[Layer] = []
    attentions: list[Attention] = []

    def note(module, args, output):
        if isinstance(module, nn.Linear):
            layers.append(_linear(module, args[0], len(x)))
        elif isinstance(module, nn.Conv2d):
            layers.append(_conv(module, args[0], output))
        elif isinstance(module, SelfAttention):
            N, T, width = args[0].shape
            attentions.append(Attention(N * module.heads, T, width // module.heads))

    handles = [m.register_forward_hook(note) for m in model.modules()]
    try:
        classes = model(x).shape[-1]
    finally:
        for handle in handles:
            handle.remove()
    return Shapes(tuple(layers), tuple(attentions), classes)


def _linear(module: nn.Linear, x: Tensor, N: int) -> Layer:
    S = x.numel() // (N * module.in_features)
    return Layer(N, S, module.in_features, module.out_features, x.requires_grad)


def _conv(module: nn.Conv2d, x: Tensor, output: Tensor) -> Layer:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"The floor is counted for zero padding given as numbers, got {module}.")
    weight, groups = tuple(module.weight.shape), module.groups
    conv = ConvInput(
        *(tuple(x.shape[1:]), tuple(output.shape[1:]), weight),
        *(tuple(module.stride), tuple(module.padding)),
        dilation=tuple(module.dilation),
        groups=groups,
    )
    S, o = output.shape[2:].numel(), weight[0] // groups
    return Layer(len(x), S, prod(weight[1:]), o, x.requires_grad, conv, groups)


def operands(device: str) -> Operands:
    """Return a source of random tensors that hands out the same one for equal shapes."""
    made: dict[tuple[int, ...], Tensor] = {}

    def get(*shape: int) -> Tensor:
        if shape not in made:
            made[shape] = torch.randn(shape, device=device)
        return made[shape]

    return get
