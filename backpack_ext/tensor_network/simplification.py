r"""What the connectivity of a convolution makes superfluous in its tensor networks.

A dimension has ``fine = stride coarse + dilation k - padding``; for a convolution the fine index is the
input entry i and the coarse one the output pixel o, for a transposed one they change places.

* **Down-sampling**: if stride and dilation have a common divisor, or k has one value only, the fine
  entries between are met by nothing. They are dropped, and so are those at the end that no kernel
  reaches.
* **Disjoint kernels** (stride at least as wide as the kernel, which it is for 1x1 kernels, too): each
  fine entry is met once at most. So the fine axis is cut into ``(coarse, k)``, a view, or a copy with
  zeros where padding is met, and the pattern vanishes. If the kernels also fill the fine axis (stride =
  kernel, "dense" connectivity, or with gaps that are met by nothing), the same cut serves where the
  result has the fine index (the VJP with respect to the input, a transposed convolution); with gaps a
  small ``[stride, kernel]`` pattern is left.
* **Squares of transposed convolutions** (KFAC-expand): two copies of a pattern with disjoint kernels, of
  which none is cut off, multiply to Kronecker deltas of the input entries and of k.
* **One output pixel**: any stride gives the same. So kernels are disjoint.
* Indices of size 1 are left out.

Dangel (2023), Convolutions and more as Einsum: A tensor network perspective with advances for
second-order methods, treats the dense and the down-sampling case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backpack_ext.conv_factors.geometry import Dimension
from backpack_ext.conv_factors.unfold import window
from backpack_ext.tensor_network.pattern import Pattern

if TYPE_CHECKING:
    from backpack_ext.tensor_network.expression import Expression


def simplified(expression: Expression) -> Expression:
    """Return an expression of the same value with less to multiply."""
    net = _Network(expression)
    for k in range(len(net.tensors)):
        if isinstance(net.tensors[k], Pattern) and net.tensors[k].mode is None:
            net.pattern(k)
    net.squeeze()
    left = [k for k, t in enumerate(net.tensors) if t is not None]
    legs, tensors = tuple(net.legs[k] for k in left), tuple(net.tensors[k] for k in left)
    return replace(expression, legs=legs, out=net.out, tensors=tensors)


class _Network:
    """An expression in the making. Its operands keep their positions, None is one that vanished."""

    def __init__(self, expression: Expression):
        self.legs, self.out = list(expression.legs), expression.out
        self.tensors: list[Tensor | Pattern | None] = list(expression.tensors)
        self.known: dict[tuple, tuple] = {}

    def once(self, t: Tensor | Pattern, how: Callable, *arguments) -> Tensor:
        """Return ``how(t, *arguments)``, the same object for the same arguments: copies stay copies."""
        key = (t if isinstance(t, Pattern) else id(t), how, arguments)
        if key not in self.known:
            self.known[key] = how(t, *arguments), t  # t, so that its id stays its own
        return self.known[key][0]

    def pattern(self, position: int) -> None:
        """Drop, cut or tile what a pattern connects."""
        d, (i, o, k) = self.tensors[position].dimension, self.legs[position]
        fine, coarse = (o, i) if d.transposed else (i, o)
        others = [m for m, x in enumerate(self.legs) if fine in x and m != position]
        if any(not isinstance(self.tensors[m], Tensor) for m in others):
            if len(others) == 1 and fine not in self.out:
                self._square(position, others[0], _Link.of(d))
        elif fine in self.out:
            self._tile(position, _Link.of(d), fine, coarse, k, others)
        elif others and not any(set(self.legs[m]) & {coarse, k} for m in others):
            link = _Link.of(d)
            if link.disjoint:
                for m in others:
                    axis = self.legs[m].index(fine)
                    self.tensors[m] = self.once(self.tensors[m], _cut, axis, link)
                    self.legs[m] = _with(self.legs[m], fine, coarse) + (k,)
                self._remove(position)
            else:
                self._drop(position, link, fine, others)

    def _remove(self, position: int) -> None:
        self.tensors[position], self.legs[position] = None, ()

    def _drop(self, position: int, link: _Link, fine: str, others: list[int]) -> None:
        used, first, step = link.met
        if first >= used:
            return
        for m in others:
            axis = self.legs[m].index(fine)
            self.tensors[m] = self.once(self.tensors[m], _every, axis, first, used, step)
        pattern = self.tensors[position]
        size = len(range(first, used, step))
        name = "out" if pattern.dimension.transposed else "size"
        dimension = replace(
            pattern.dimension,
            stride=link.stride // step,
            dilation=link.dilation // step,
            before=(link.before + first) // step,
            **{name: size},
        )
        self.tensors[position] = Pattern(dimension)

    def _tile(self, position, link: _Link, fine: str, coarse: str, k: str, others: list[int]) -> None:
        width = link.tile
        if width is None or coarse in self.out:
            return
        full = width == link.kernel and k not in self.out
        rest = k if full else f"{fine} of {coarse}"
        self.out = _with(self.out, fine, coarse, rest)
        for m in others:
            axis = self.legs[m].index(fine)
            self.tensors[m] = self.once(self.tensors[m], Tensor.unflatten, axis, (link.coarse, width))
            self.legs[m] = _with(self.legs[m], fine, coarse, rest)
        if full:
            self._remove(position)
        else:
            self._within(position, (rest, k), Dimension(width, 1, link.kernel, 1, link.dilation))

    def _within(self, position: int, legs: tuple[str, str], d: Dimension) -> None:
        """Put a pattern within one kernel, as of a convolution of one pixel."""
        self.tensors[position], self.legs[position] = Pattern(d), (legs[0], "one", legs[1])

    def _square(self, position: int, other: int, link: _Link) -> None:
        """Replace ``sum_fine P[coarse, fine, k] P[coarse', fine, k']`` by two Kronecker deltas."""
        whole = link.before == 0 and link.stride * (link.coarse - 1) + link.span <= link.fine
        if not (whole and link.disjoint and self.tensors[position] == self.tensors[other]):
            return
        axis = 0 if self.tensors[position].dimension.transposed else 1  # of the coarse index
        one, two = ((self.legs[m][axis], self.legs[m][2]) for m in (position, other))
        if two[0] in self.out:
            return
        self._within(position, (one[1], two[1]), Dimension(link.kernel, 1, link.kernel))
        self._remove(other)
        self.legs = [tuple(one[0] if x == two[0] else x for x in legs) for legs in self.legs]

    def squeeze(self) -> None:
        """Leave out indices of size 1."""
        given = next(t for t in self.tensors if isinstance(t, Tensor))
        ones = set()
        for m, t in enumerate(self.tensors):
            axes = () if t is None else tuple(axis for axis, n in enumerate(t.shape) if n == 1)
            if axes:
                ones.update(self.legs[m][axis] for axis in axes)
                self.tensors[m] = self.once(t, _squeezed, axes, given.dtype, given.device)
                self.legs[m] = tuple(x for axis, x in enumerate(self.legs[m]) if axis not in axes)
        self.out = tuple(x for x in self.out if x not in ones)


@dataclass(frozen=True)
class _Link:
    """``fine = stride coarse + dilation k - before``, with the sizes of its three indices."""

    fine: int
    coarse: int
    kernel: int
    stride: int
    dilation: int
    before: int

    @staticmethod
    def of(d: Dimension) -> _Link:
        """Return the link of a dimension."""
        fine, coarse = (d.out, d.size) if d.transposed else (d.size, d.out)
        dilation = d.dilation if d.kernel > 1 else 1  # of one entry any dilation is right
        return _Link(fine, coarse, d.kernel, d.stride, dilation, d.before)

    @property
    def span(self) -> int:
        """How many fine entries a kernel spans."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def disjoint(self) -> bool:
        """Whether each fine entry is met once at most."""
        return self.coarse == 1 or self.span <= self.stride

    @property
    def met(self) -> tuple[int, int, int]:
        """Behind the last fine entry that is met; the first one; and the step between them."""
        last = self.stride * (self.coarse - 1) + self.span - self.before
        step = gcd(self.stride, self.dilation) if self.kernel > 1 else self.stride
        return min(self.fine, last), -self.before % step, step

    @property
    def tile(self) -> int | None:
        """The width of tiles, one per coarse entry, that fill the fine axis; None if there are none."""
        width = self.fine if self.coarse == 1 else self.stride
        fills = self.before == 0 and width * self.coarse == self.fine
        return width if fills and self.span <= width else None


def _with(legs: tuple[str, ...], name: str, *names: str) -> tuple[str, ...]:
    at = legs.index(name)
    return legs[:at] + names + legs[at + 1 :]


def _cut(t: Tensor, axis: int, link: _Link) -> Tensor:
    """Cut an axis into kernels: the coarse index takes its place, that of the kernel is the last."""
    length = link.stride * (link.coarse - 1) + link.span
    t = window(t, axis, [(-link.before, length - link.before)])
    return t.unfold(axis, link.span, link.stride)[..., :: link.dilation]


def _every(t: Tensor, axis: int, first: int, used: int, step: int) -> Tensor:
    return t[(slice(None),) * axis + (slice(first, used, step),)]


def _squeezed(t: Tensor | Pattern, axes: tuple[int, ...], dtype: torch.dtype, device) -> Tensor:
    return (t.shared(dtype, device) if isinstance(t, Pattern) else t).squeeze(axes)
