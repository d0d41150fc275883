"""The factor V of a layer: its per-sample vectors, known through its inputs and vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from backpack_ext.errors import RecordingError
from backpack_ext.images import Images
from backpack_ext.layer_gram import layer_gram, layer_grams
from backpack_ext.normal import CHUNK, Bags, OneHot, bias_per_sample, per_sample, square_sum
from curvature import Axes
from curvature.factor import Factor
from curvature.precision import without_autocast


class LayerFactor(Factor):
    """Columns ``sum_s b a`` of a weight, and ``sum_s b`` of its bias; ordered ``(v n)``, n fastest.

    Args:
        a: Inputs ``[g,n,s,i]``, one-hot inputs, or a convolution's images, whose patches each product
            forms once and lets go of.
        b: Vectors ``[g,v,n,s,o]``.
        shapes: Shape of the weight, and of the bias if it belongs to the factor.
        axes: How the (whole) weight's axes form its matrix, and those of the bias.
        part: Which part ``(k, G)`` of its parameters the layer is; None for the whole.
        versions: Those of the inputs' tensors when they were read; as they are now by default.
    """

    __slots__ = ("_a", "_version", "axes", "b", "part", "shapes_")

    def __init__(
        self,
        a: Tensor | OneHot | Images,
        b: Tensor,
        shapes: Sequence[torch.Size],
        axes: Sequence[Axes],
        part: tuple[int, int] | None = None,
        versions: tuple[int, ...] | None = None,
    ):
        self._a, self.b, self.shapes_, self.axes, self.part = a, b, tuple(shapes), tuple(axes), part
        self._version = versions_of(a) if versions is None else versions

    def __reduce__(self):
        """Have copies note the versions of their own tensors."""
        return LayerFactor, (self.kept, self.b, self.shapes_, self.axes, self.part)

    @property
    def kept(self) -> Tensor | OneHot | Images:
        """The inputs as they are held.

        Raises:
            RecordingError: If they were overwritten since: they may be the user's own mini-batch.
        """
        if versions_of(self._a) != self._version:
            raise RecordingError(
                f"The inputs of a layer with a weight of shape {tuple(self.shapes_[0])} were modified "
                "in place after the backward pass; what is asked for now would be that of other data. "
                "Ask before, or fill another tensor with the next mini-batch."
            )
        return self._a

    @property
    def a(self) -> Tensor | OneHot:
        """Inputs ``[g,n,s,i]``, formed now if images are kept, or one-hot inputs.

        Raises:
            RecordingError: See `kept`.
        """
        kept = self.kept
        return kept.patches() if isinstance(kept, Images) else kept

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shape of the weight, and of the bias."""
        return self.shapes_

    @property
    def columns(self) -> int:
        """Number of columns: vectors times data."""
        return self.b.shape[1] * self.b.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Vectors and inputs, as they are held."""
        return self.b, *_tensors(self.kept)

    @property
    def _bias(self) -> bool:
        return len(self.shapes_) > 1

    # ------------------------------------------------------------------ products

    @without_autocast
    def _own_gram(self) -> Tensor:
        return layer_gram(self.a, self.b, bias=self._bias)

    @without_autocast
    def gram_and(self, other: Factor) -> tuple[Tensor, Tensor]:
        """Return ``V^T V`` and ``V^T V'``; see `Factor.gram_and`."""
        if not isinstance(other, LayerFactor) or (other.axes, other.part) != (self.axes, self.part):
            return super().gram_and(other)
        a, a2 = self._both(other)
        return layer_grams(a, self.b, a2, other.b, bias=self._bias)

    @without_autocast
    def _gram_with(self, other: Factor) -> Tensor:
        if not isinstance(other, LayerFactor) or other.axes != self.axes:
            return super()._gram_with(other)
        if self.part != other.part:
            if self.part is not None and other.part is not None and self.part[1] == other.part[1]:
                return self.b.new_zeros(self.columns, other.columns)  # other rows of the weight
            return super()._gram_with(other)
        if isinstance(self.kept, OneHot) != isinstance(other.kept, OneHot):
            return super()._gram_with(other)
        a, a2 = self._both(other)
        return layer_gram(a, self.b, a2, other.b, bias=self._bias)

    def _both(self, other: LayerFactor) -> tuple[Tensor | OneHot, Tensor | OneHot]:
        """Return both factors' inputs; patches of the same images are formed once."""
        a, kept = self.a, self.kept
        return a, a if isinstance(kept, Images) and kept.same(other.kept) else other.a

    @without_autocast
    def explicit(self) -> tuple[Tensor, ...]:
        """Return all columns, ``[q, *shape]``; see `Factor.explicit`."""
        found = [self._placed(per_sample(self.a, self.b).flatten(0, 1), 0)]
        if self._bias:
            found.append(self._placed(bias_per_sample(self.b).flatten(0, 1), 1))
        return tuple(found)

    @without_autocast
    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Return ``V c``; see `Factor.apply`."""
        _, v, n, s, o = self.b.shape
        step, a = max(1, CHUNK // max(1, self.b.shape[0] * n * s * o)), self.a
        chunks = coefficients.to(self.b.dtype).split(step)
        pieces = [self._apply(a, c.reshape(-1, v, n)) for c in chunks]
        return tuple(ts[0] if len(ts) == 1 else torch.cat(ts) for ts in zip(*pieces, strict=True))

    def _apply(self, a: Tensor | OneHot, c: Tensor) -> tuple[Tensor, ...]:
        g, _, n, s, o = self.b.shape
        # [g, n, k, (o s)] or [g, n, k, (s o)]: the vectors of each datum, combined
        cb = c.permute(2, 0, 1) @ self._flat_b
        cb = cb.unflatten(3, (o, s)) if self._pixels_last else cb.unflatten(3, (s, o)).mT
        if isinstance(a, OneHot):
            W = b_to_tokens(a, cb.mT.transpose(1, 2))
        else:
            W = cb.permute(0, 2, 3, 1, 4).reshape(g, -1, n * s) @ a.reshape(g, n * s, -1)
            W = W.unflatten(1, (len(c), o)).transpose(0, 1)
        found = [self._placed(W, 0)]
        if self._bias:
            found.append(self._placed(cb.sum((1, 4)).transpose(0, 1).unsqueeze(3), 1))
        return tuple(found)

    @property
    def _pixels_last(self) -> bool:
        """Whether positions come last in memory, as in the vectors of convolutions."""
        return self.b.stride(3) == 1

    @property
    def _flat_b(self) -> Tensor:
        """The vectors of each datum as in memory, not copied: ``[g,n,v,(o s)]`` or ``[g,n,v,(s o)]``."""
        return (self.b.mT if self._pixels_last else self.b).transpose(1, 2).flatten(3)

    def _placed(self, m: Tensor, role: int) -> Tensor:
        """Bring ``[k,g,o,i]`` to the parameter's shape."""
        if self.part is not None:
            k, groups = self.part
            whole = m.new_zeros(len(m), groups, *m.shape[2:])
            whole[:, k : k + 1] = m
            m = whole
        return self.axes[role].to_parameter(m)

    def _matrix(self, w: Tensor, role: int) -> Tensor:
        """Bring parameter-shaped tensors to ``[k,g,o,i]``."""
        m = self.axes[role].to_matrix(w.to(self.b.dtype))
        return m if self.part is None else m[:, self.part[0] : self.part[0] + 1]

    @without_autocast
    def project(self, *vectors: Tensor) -> Tensor:
        """Return ``V^T w``; see `Factor.project`."""
        g, _, n, s, o = self.b.shape
        step, a = max(1, CHUNK // max(1, g * n * s * o)), self.a
        pieces = zip(*(w.split(step) for w in vectors), strict=True)
        return torch.cat([self._project(a, *ws) for ws in pieces])

    def _project(self, a: Tensor | OneHot, *vectors: Tensor) -> Tensor:
        g, v, n, s, o = self.b.shape
        W, k = self._matrix(vectors[0], 0), len(vectors[0])
        if isinstance(a, OneHot):
            z = tokens_to_b(a, W)[None].unflatten(2, (n, s)).movedim(4, 2)
        elif self._pixels_last:
            z = W.transpose(0, 1).flatten(1, 2) @ a.reshape(g, n * s, -1).mT
            z = z.reshape(g, k, o, n, s)
        else:
            z = a.reshape(g, 1, n * s, -1) @ W.permute(1, 0, 3, 2)
            z = z.reshape(g, k, n, s, o).movedim(4, 2)
        if self._bias:
            z = z + self._matrix(vectors[1], 1).transpose(0, 1).unsqueeze(4)
        z = z.permute(0, 3, 1, 2, 4)  # [g, n, k, o, s]
        out = ((z if self._pixels_last else z.mT).flatten(3) @ self._flat_b.mT).sum(0)
        return out.permute(1, 2, 0).reshape(k, v * n)

    @without_autocast
    def square_sum(self) -> tuple[Tensor, ...]:
        """Return the diagonal of ``V V^T``."""
        found = [self._placed(square_sum(self.a, self.b)[None], 0)[0]]
        if self._bias:
            squares = self.b.sum(3).square().sum((1, 2))
            found.append(self._placed(squares[None, :, :, None], 1)[0])
        return tuple(found)

    # ------------------------------------------------------------------ other factors

    def select(self, index: Tensor) -> Factor:
        """Return the factor of some columns, one per datum then."""
        v, n = index // self.b.shape[2], index % self.b.shape[2]
        kept = self.kept
        a = kept[:, n] if isinstance(kept, Tensor) else kept.select(n)
        return self._with(a, self.b[:, v, n].unsqueeze(1))

    def folded(self) -> LayerFactor:
        """Return a factor with one column per datum, whose Gram matrix sums over equal vectors v."""
        return self._with(self.kept, self.b.movedim(1, 4).flatten(3).unsqueeze(1))

    def scaled(self, scale: float) -> Factor:
        """Return a multiple of the factor."""
        return self._with(self.kept, self.b * scale)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """Return a factor with other tensors; see `Factor.mapped`."""
        return self._with(_mapped(self.kept, function), function(self.b))

    def _with(self, a: Tensor | OneHot | Images, b: Tensor) -> LayerFactor:
        return LayerFactor(a, b, self.shapes_, self.axes, self.part)


def _tensors(a: Tensor | OneHot | Images) -> tuple[Tensor, ...]:
    """Return the tensors of inputs, which may be the user's."""
    if not isinstance(a, OneHot):
        return (a.x if isinstance(a, Images) else a,)
    every = (a.index, a.mask, a.bags and a.bags.row, a.bags and a.bags.weight)
    return tuple(t for t in every if t is not None)


def versions_of(a: Tensor | OneHot | Images) -> tuple[int, ...]:
    """Return how often the tensors of inputs were modified in place."""
    return tuple(t._version for t in _tensors(a))


def b_to_tokens(a: OneHot, b: Tensor) -> Tensor:
    """Return ``sum_ns b a`` for each vector, ``[v,1,o,i]``, from ``b[1,v,n,s,o]``."""
    entries = a.spread(b)
    out = entries.new_zeros(len(entries), a.size, entries.shape[-1])
    return out.index_add_(1, a.index.flatten(), entries).mT.unsqueeze(1)


def tokens_to_b(a: OneHot, W: Tensor) -> Tensor:
    """Return ``sum_i W a`` for matrices ``W[k,1,o,i]``, ``[k, (n s), o]``."""
    entries = W[:, 0].mT[:, a.index.flatten()]
    entries = entries * a.weights(W.dtype)[:, None]
    if a.bags is None:
        return entries
    n, s = a.shape
    return entries.new_zeros(len(entries), n * s, entries.shape[2]).index_add_(1, a.rows, entries)


def _mapped(
    a: Tensor | OneHot | Images, function: Callable[[Tensor], Tensor]
) -> Tensor | OneHot | Images:
    if not isinstance(a, OneHot):
        return a.mapped(function) if isinstance(a, Images) else function(a)

    def new(t: Tensor | None) -> Tensor | None:
        return t if t is None else function(t)

    bags = a.bags
    if bags is not None:
        bags = Bags(new(bags.row), bags.shape, new(bags.weight))
    return replace(a, index=new(a.index), mask=new(a.mask), bags=bags)
