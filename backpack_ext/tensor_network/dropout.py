"""Randomised contraction: unbiased estimates from a random part of the terms of a sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from backpack_ext.tensor_network.expression import Expression
from backpack_ext.tensor_network.pattern import Pattern


def dropped(
    expression: Expression, keep: Mapping[str, float], generator: torch.Generator | None = None
) -> Expression:
    r"""Return an expression over a random part of the values of summed indices, unbiased.

    .. math:: \sum_{l=1}^L t_l \approx \frac{L}{m} \sum_{l \in S} t_l

    with a subset S of m values, uniform among those of this size; for several indices they are
    independent. Each value is in S with probability m / L, so the mean over S is the sum. This is
    "tensor dropout", with a fixed number of terms in place of Bernoulli masks: cost and memory do not
    vary, and the variance is smaller.

    Args:
        expression: The expression.
        keep: For each index that is dropped from the fraction p of its values that are kept; m is
            ``max(1, round(p L))``.
        generator: A generator on the CPU; torch's by default.

    Returns:
        An expression of the same shape with smaller operands.

    Raises:
        TypeError: If `keep` is no mapping.
        ValueError: If an index is not summed over (`Expression.summed`), or p not in ``(0, 1]``.

    References:
        Dangel (2023), Convolutions and more as Einsum, where it is tensor dropout; Adelman et al.
        (2021), Faster neural network training with approximate tensor operations.

    Example:
        >>> from backpack_ext.tensor_network import Convolution
        >>> x, vector = torch.ones(8, 2, 5, 5), torch.ones(8, 3, 3, 3)
        >>> exact = Convolution((3, 3)).weight_vjp(x, vector)
        >>> estimate = dropped(exact, {"n": 0.25})
        >>> estimate.sizes["n"], torch.equal(estimate.contract(), exact.contract())  # equal data
        (2, True)
    """
    if not isinstance(keep, Mapping):
        raise TypeError(f"keep={keep!r}: give a fraction for each index, such as {{'n': 0.5}}.")
    sizes, summed = expression.sizes, expression.summed
    for name in keep:
        if name not in summed:
            raise ValueError(
                f"{name!r} is no index that is summed over; those are {', '.join(summed)}. "
                "Convolution(..., simplify=False) keeps those that simplification would remove."
            )
        if not sizes[name]:
            raise ValueError(f"{name!r} has no values to choose from.")
    return restricted(expression, drawn({x: sizes[x] for x in keep}, keep, generator))


def check_keep(keep: Mapping[str, float]) -> None:
    """Raise a ValueError if a fraction is not in ``(0, 1]``."""
    for name, p in keep.items():
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 < p <= 1:
            raise ValueError(f"keep[{name!r}] = {p!r}: give the fraction that is kept, in (0, 1].")


def drawn(
    sizes: Mapping[str, int], keep: Mapping[str, float], generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Draw the values that are kept of each index, in ascending order, on the CPU."""
    check_keep(keep)
    counts = {name: max(1, round(p * sizes[name])) for name, p in keep.items()}
    permutations = {name: torch.randperm(sizes[name], generator=generator) for name in keep}
    return {name: permutations[name][:m].sort().values for name, m in counts.items()}


def restricted(
    expression: Expression, values: Mapping[str, Tensor], done: Mapping[int, Tensor] | None = None
) -> Expression:
    """Return an expression over the given values of some summed indices, times L / m of each.

    Args:
        expression: The expression.
        values: The values of each index that are kept.
        done: In place of the operands at these positions, what is kept of them.
    """
    names, sizes, known = set(values), expression.sizes, {}

    def part(legs: Iterable[str], t: Tensor | Pattern) -> Tensor | Pattern:
        chosen = tuple((axis, x) for axis, x in enumerate(legs) if x in names)
        if not chosen:
            return t
        if isinstance(t, Pattern):
            t = t.shared(given.dtype, given.device)
        key = (id(t), chosen)
        if key not in known:
            known[key] = selected(t, {axis: values[x] for axis, x in chosen})
        return known[key]

    given = next(t for t in expression.tensors if isinstance(t, Tensor))
    pairs = zip(expression.legs, expression.tensors, strict=True)
    done = done or {}
    tensors = tuple(done[k] if k in done else part(legs, t) for k, (legs, t) in enumerate(pairs))
    scale = expression.scale
    for name, kept in values.items():
        scale *= sizes[name] / len(kept)
    return expression.replace(tensors=tensors, scale=scale)


def selected(t: Tensor, values: Mapping[int, Tensor]) -> Tensor:
    """Return a copy of some entries of axes."""
    for axis, kept in values.items():
        t = t.index_select(axis, kept.to(t.device))
    return t
