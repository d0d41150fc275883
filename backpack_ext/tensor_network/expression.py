"""An einsum expression: named indices, operands, the result's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from string import ascii_letters

from torch import Tensor

from backpack_ext.tensor_network.pattern import Pattern
from backpack_ext.tensor_network.plan import Plan, plan
from backpack_ext.tensor_network.simplification import simplified
from curvature.precision import without_autocast

# Symbols of the equation's indices behind the 52 letters: Unicode letters, as opt_einsum reads them.
_MORE = 0xC0


@dataclass(frozen=True, eq=False)
class Expression:
    r"""A tensor network: a product of tensors, summed over all indices that the result has not.

    It unpacks as ``equation, operands, shape``, and its value is

    .. math:: \texttt{einsum(equation, *operands).reshape(shape)}

    Indices have names, which `Convolution` lists; ``equation`` writes them as letters, in the order in
    which they first occur. There may be any number of them: from the 53rd on they are Unicode letters,
    which ``opt_einsum.contract`` takes and ``torch.einsum`` does not. `contract` multiplies two
    tensors at a time and needs no letters. (A torch tensor has at most 64 axes.)

    Args:
        legs: Names of the indices of each tensor.
        out: Names of the result's indices.
        tensors: The operands; a `Pattern` where the connectivity of a convolution is known.
        shape: Shape of the result, whose axes are one index or several.
        scale: Factor of the result; if it is not 1, the last of the operands.

    Raises:
        ValueError: If indices do not fit to the operands, to each other or to the shape.

    Example:
        >>> import torch
        >>> from backpack_ext.tensor_network import Convolution
        >>> conv = Convolution((3, 3), padding=1)
        >>> equation, operands, shape = conv.forward(torch.rand(2, 4, 8, 8), torch.rand(5, 4, 3, 3))
        >>> equation, shape
        ('abcd,cef,dgh,ibfh->aieg', (2, 5, 8, 8))
    """

    legs: tuple[tuple[str, ...], ...]
    out: tuple[str, ...]
    tensors: tuple[Tensor | Pattern, ...]
    shape: tuple[int, ...]
    scale: float = 1.0

    def __post_init__(self):
        legs, shapes = self.legs, [tuple(t.shape) for t in self.tensors]
        if any(len(set(x)) < len(x) for x in (*legs, self.out)):
            raise ValueError(f"An index is twice in one of {legs} or in the result {self.out}.")
        if [len(x) for x in legs] != [len(x) for x in shapes]:
            raise ValueError(f"Operands of shapes {shapes} have not the indices {legs}.")
        sizes = self.sizes
        for names, shape in zip(legs, shapes, strict=True):
            if any(sizes[x] != n for x, n in zip(names, shape, strict=True)):
                raise ValueError(f"Indices {legs} have several sizes in operands of shapes {shapes}.")
        if not set(self.out) <= set(sizes):
            raise ValueError(f"No operand has an index of the result {self.out}; they have {legs}.")
        if prod(sizes[x] for x in self.out) != prod(self.shape):
            raise ValueError(f"The result has indices of other sizes than the shape {self.shape}.")

    def __iter__(self) -> Iterator:
        return iter((self.equation, self.operands, self.shape))

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each index."""
        pairs = zip(self.legs, self.tensors, strict=True)
        return {x: n for legs, t in pairs for x, n in zip(legs, t.shape, strict=True)}

    @property
    def summed(self) -> tuple[str, ...]:
        """Names of the indices that are summed over."""
        return tuple(x for x in self.sizes if x not in self.out)

    @property
    def equation(self) -> str:
        """The einsum equation."""
        symbols = {x: _symbol(k) for k, x in enumerate(self.sizes)}
        each = ["".join(symbols[x] for x in legs) for legs in (*self.legs, self.out)]
        scale = [] if self.scale == 1 else [""]
        return ",".join(each[:-1] + scale) + "->" + each[-1]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The operands as tensors; patterns are copies of the caller's own."""
        tensors = self._dense(Pattern.tensor)
        return tensors if self.scale == 1 else (*tensors, tensors[0].new_tensor(self.scale))

    def _dense(self, made: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        given = [t for t in self.tensors if not isinstance(t, Pattern)]
        dtype, device = given[0].dtype, given[0].device
        return tuple(made(t, dtype, device) if isinstance(t, Pattern) else t for t in self.tensors)

    def _plan(self, tensors: tuple[Tensor | Pattern, ...]) -> tuple[Plan, tuple[int, ...]]:
        sizes = self.sizes
        number = {x: k for k, x in enumerate(sizes)}
        legs = tuple(tuple(number[x] for x in each) for each in self.legs)
        out = tuple(number[x] for x in self.out)
        # patterns are equal where their tensors are the same
        keys = [t if isinstance(t, Pattern) else id(t) for t in tensors]
        return plan(legs, out, tuple(sizes.values()), tuple(keys.index(key) for key in keys)), out

    @without_autocast
    def contract(self) -> Tensor:
        """Return the value, of shape `shape`; differentiable by all operands.

        The order of the products comes from opt_einsum if that is installed, else from a search of
        our own (all orders up to 12 operands, greedily beyond), once per network and sizes. An
        intermediate that is needed twice is computed once. In the operands' data type, under
        autocast too; the result shares no memory with them.
        """
        steps, out = self._plan(self.tensors)
        tensors = self._dense(cache(Pattern.shared))
        value = steps.run(tensors, out, self.scale).reshape(self.shape)
        return value if steps.steps or self.scale != 1 else value.clone()  # not a view of an operand

    def cost(self) -> int:
        """Return the multiply-adds of `contract`, sums included, the reshape and the scale not."""
        return self._plan(self.tensors)[0].cost

    def simplify(self) -> Expression:
        """Return an expression of the same value without operands that structure makes superfluous.

        See `backpack_ext.tensor_network.simplification` for what is simplified.
        """
        return simplified(self)

    def replace(self, **changes) -> Expression:
        """Return the expression with other fields."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        legs = [f"{' '.join(x)} {list(t.shape)}" for x, t in zip(self.legs, self.tensors, strict=True)]
        count = prod(self.shape)
        return (
            f"Expression({'; '.join(legs)} -> {' '.join(self.out)}; {list(self.shape)}, {count} entries)"
        )


def _symbol(k: int) -> str:
    letters = len(ascii_letters)
    if k < letters:
        return ascii_letters[k]
    return [c for c in map(chr, range(_MORE, _MORE + 3 * k)) if c.isalpha()][k - letters]
