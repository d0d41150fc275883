"""Contractions of the normal form: every quantity of an affine layer is one of these.

Index letters: g group, v vector, n and m data, s and t shared positions, i and j input features,
o and p output features. Inputs are ``a[g,n,s,i]``, vectors ``b[g,v,n,s,o]``, and the per-sample
vectors (for the gradient: per-sample gradients) ``G[v,n,g,o,i] = sum_s b[g,v,n,s,o] a[g,n,s,i]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil

import torch
from torch import Tensor

from curvature.decomposition import widen
from curvature.panels import symmetric_product

# Entries of a per-sample intermediate that is formed at once; larger ones are cut along n.
CHUNK = 2**24
# Entries of per-sample vectors that are formed at once to be summed over: few enough to stay in a
# processor's cache. Large layers (512 channels, 3x3, 4x4 pixels) are two and a half times faster so.
PIECE = 2**20
# Per-sample vectors of at least SINGLE entries are squared and added up one by one, in one pass, BUFFER
# entries at a time: that takes half of the time of pieces for 512 channels, 3x3.
SINGLE, BUFFER = 2**17, 2**21
# Rows of such a vector that a thread of its own is to have at least.
SHARE = 16


@dataclass(eq=False)
class Bags:
    """Which positions the entries of bags belong to, and with which weights.

    Args:
        row: ``[e]``, the position (n, s) of each entry, counted with s fastest.
        shape: Number of data and of positions, (n, s).
        weight: ``[e]``; None if all are 1.
    """

    row: Tensor
    shape: tuple[int, int]
    weight: Tensor | None = None


@dataclass(eq=False)
class OneHot:
    """Inputs that select one of ``size`` features: ``a[n,s,i] = mask[n,s] (index[n,s] == i)``.

    With ``bags`` a position selects any number of features, with weights:
    ``a[n,s,i] = mask[n,s] sum_e weight[e] (row[e] == (n,s)) (index[e] == i)``.

    Args:
        index: ``[n, s]``, integers; ``[e]``, one per entry, with ``bags``.
        size: Number of input features i.
        mask: ``[n, s]``, False where the input is zero (padding); None if nowhere.
        bags: Where the entries belong; None if each position has one.
    """

    index: Tensor
    size: int
    mask: Tensor | None = None
    bags: Bags | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of data and of positions, (n, s)."""
        return tuple(self.index.shape) if self.bags is None else self.bags.shape

    @property
    def rows(self) -> Tensor:
        """The position (n, s) of each entry, counted with s fastest, ``[e]``."""
        if self.bags is not None:
            return self.bags.row
        return torch.arange(self.index.numel(), device=self.index.device)

    @property
    def data(self) -> Tensor:
        """The datum of each entry, ``[e]``."""
        return self.rows // self.shape[1]

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of each entry, 0 at masked positions, ``[e]``."""
        given = None if self.bags is None else self.bags.weight
        w = self.index.new_ones(self.index.numel(), dtype=dtype) if given is None else given.to(dtype)
        return w if self.mask is None else w * self.mask.flatten()[self.rows]

    def masked(self, b: Tensor) -> Tensor:
        """Zero the vectors ``b[g,v,n,s,o]`` at masked positions."""
        return b if self.mask is None else b * self.mask[:, :, None]

    def spread(self, b: Tensor) -> Tensor:
        """Return what the vectors ``b[g,v,n,s,o]`` add to the feature of each entry, ``[v,e,o]``."""
        b = self.masked(b)[0].flatten(1, 2)
        if self.bags is None:
            return b
        b, weight = b[:, self.bags.row], self.bags.weight
        return b if weight is None else b * weight.to(b.dtype)[:, None]

    def select(self, index: Tensor) -> OneHot:
        """Return the inputs of some of the data."""
        if self.bags is None:
            mask = None if self.mask is None else self.mask[index]
            return OneHot(self.index[index], self.size, mask)
        n, s = self.shape
        return self.at(torch.arange(n * s, device=self.index.device).reshape(n, s)[index])

    def at(self, rows: Tensor) -> OneHot:
        """Return the bags with those numbers (as in `rows`), laid out like ``rows[n,s]``."""
        chosen, row, weight = rows.flatten(), self.bags.row, self.bags.weight
        counts = row.bincount(minlength=self.shape[0] * self.shape[1])
        starts, lengths = counts.cumsum(0) - counts, counts[chosen]
        new = torch.arange(len(chosen), device=row.device).repeat_interleave(lengths)
        within = torch.arange(len(new), device=row.device) - (lengths.cumsum(0) - lengths)[new]
        entries = row.argsort(stable=True)[starts[chosen][new] + within]
        bags = Bags(new, tuple(rows.shape), None if weight is None else weight[entries])
        mask = None if self.mask is None else self.mask.flatten()[rows]
        return OneHot(self.index[entries], self.size, mask, bags)

    def square(self) -> OneHot:
        """Return the inputs squared, entry by entry."""
        if self.bags is None:
            return self
        # a position may have a feature several times: weights add up before they are squared
        given = self.bags.weight
        weight = torch.ones_like(self.index, dtype=torch.float64) if given is None else given
        keys, place = torch.unique(self.bags.row * self.size + self.index, return_inverse=True)
        weight = weight.new_zeros(len(keys)).index_add_(0, place, weight).square()
        bags = Bags(keys // self.size, self.bags.shape, weight)
        return OneHot(keys % self.size, self.size, self.mask, bags)

    def abs(self) -> OneHot:
        """Return the inputs with absolute weights."""
        if self.bags is None or self.bags.weight is None:
            return self
        bags = Bags(self.bags.row, self.bags.shape, self.bags.weight.abs())
        return OneHot(self.index, self.size, self.mask, bags)


def cat_inputs(parts: Sequence[Tensor | OneHot]) -> Tensor | OneHot:
    """Concatenate inputs along s."""
    if not isinstance(parts[0], OneHot):
        return torch.cat(list(parts), dim=2)
    mask = None
    if any(p.mask is not None for p in parts):
        mask = torch.cat(
            [p.index.new_ones(p.shape, dtype=torch.bool) if p.mask is None else p.mask for p in parts],
            dim=1,
        )
    size = parts[0].size
    if all(p.bags is None for p in parts):
        return OneHot(torch.cat([p.index for p in parts], dim=1), size, mask)
    rows, before, positions = [], 0, sum(p.shape[1] for p in parts)
    for p in parts:
        s = p.shape[1]
        rows.append(p.data * positions + before + p.rows % s)
        before += s
    weight, given = None, [p.bags.weight for p in parts if p.bags is not None]
    if any(w is not None for w in given):
        dtype = next(w.dtype for w in given if w is not None)
        weight = torch.cat([p.weights(dtype) for p in parts])
    bags = Bags(torch.cat(rows), (parts[0].shape[0], positions), weight)
    return OneHot(torch.cat([p.index.flatten() for p in parts]), size, mask, bags)


def gram(x: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale sum_r x[g,r,i] x[g,r,j]`` as ``[g,i,j]``."""
    return symmetric_product(x.mT, scale)


def gram_by_datum(b: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale sum_vns b[g,v,n,s,o] b[g,v,n,s,p]`` as ``[g,o,p]``: a product for each v and n."""
    channels = b.mT.flatten(1, 2)
    return (channels @ channels.mT).sum(1).mul_(scale)


def by_datum_pays(b: Tensor) -> bool:
    """Whether `gram_by_datum` is faster than one product of rows.

    A convolution's vectors have pixels last in memory, and one product needs a copy. That costs more
    than small products do where pixels are many against channels; beyond 128 channels the one product
    takes half of the multiplications (`symmetric_product`).
    """
    pixels, channels = b.shape[3:]
    enough = pixels >= max(64, 2 * channels) and 1 < channels <= 128
    return enough and b.stride(3) == 1 and b.device.type == "cpu"


def per_sample(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``G[v,n,g,o,i]``."""
    if isinstance(a, OneHot):
        _, v, n, s, o = b.shape
        if a.bags is not None:
            G = b.new_zeros(v, n * a.size, o)
            G.index_add_(1, a.data * a.size + a.index, a.spread(b))
            return G.unflatten(1, (n, a.size)).transpose(2, 3).unsqueeze(2)
        b = a.masked(b)[0]
        G = b.new_zeros(v, n, a.size, o)
        index = a.index[None, :, :, None].expand(v, n, s, o)
        return G.scatter_add_(2, index, b).transpose(2, 3).unsqueeze(2)
    if a.shape[2] == 1:
        G = b.squeeze(3).unsqueeze(-1) * a[:, None, :, 0, None, :]
    elif b.shape[1] == 1:
        G = (b[:, 0].mT @ a).unsqueeze(1)
    else:  # all vectors of a datum in one product: a broadcast over v would copy a
        g, v, n, s, o = b.shape
        G = b.permute(0, 2, 1, 4, 3).reshape(g, n, v * o, s) @ a
        G = G.unflatten(2, (v, o)).transpose(1, 2)
    return G.permute(1, 2, 0, 3, 4)


def bias_per_sample(b: Tensor, copy: bool = True) -> Tensor:
    """Return ``sum_s b``, laid out as ``[v,n,g,o,1]``; without ``copy`` a view if there is one s."""
    b = b[:, :, :, 0] if b.shape[3] == 1 and not copy else b.sum(3)
    return b.permute(1, 2, 0, 3).unsqueeze(-1)


def square_sum(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``sum_vn G[v,n,g,o,i]**2`` as ``[g,o,i]``.

    Without a shared axis this is one product of squares; otherwise G is formed chunk by chunk.
    """
    if isinstance(a, OneHot):
        rows, keys = _token_rows(a, b)
        out = rows.new_zeros(a.size, rows.shape[-1])
        return out.index_add_(0, keys % a.size, rows.square().sum(0)).T.unsqueeze(0)
    if a.shape[2] == 1:
        b2, a2 = b.squeeze(3).square(), a.squeeze(2).square()
        b2 = b2[:, 0] if b2.shape[1] == 1 else b2.sum(1)  # torch's sum of one term is a copy
        return (b2[0].mT @ a2[0])[None] if a.shape[0] == 1 else b2.mT @ a2
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = widen(a), widen(b)  # sums in half types stop growing after a few hundred data
    wide = torch.promote_types(a.dtype, b.dtype)
    total = b.new_zeros(a.shape[0], b.shape[-1], a.shape[-1], dtype=wide)
    if b.device.type == "cpu" and b.shape[-1] * a.shape[-1] >= SINGLE:
        _add_squares(total, a, b)
        return total.to(dtype)
    for _, outputs, G in _pieces(a, b):
        total[:, outputs] += G.square_().sum((0, 1))
    return total.to(dtype)


def _add_squares(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``G[v,n,g,o,i]**2`` to ``total[g,o,i]``, one v and n at a time in the same memory.

    A batched product of as many parts of the rows as there are threads leaves each part with the thread
    that squares it afterwards. One product's results would move between the cores' caches: 1.1 times as
    long where the cores share a cache, 1.7 to 2.6 times where they do not.
    """
    (g, v, n, s, o), i = b.shape, a.shape[-1]
    rows = max(1, ceil(o / ceil(o * i / BUFFER)))
    threads = torch.get_num_threads()
    piece = total.new_empty(rows, i)
    for k, j in product(range(g), range(0, o, rows)):
        part = total[k, j : j + rows]
        parts = threads if len(part) % threads == 0 and len(part) >= SHARE * threads else 1
        G, part = (t.unflatten(0, (parts, -1)) for t in (piece[: len(part)], part))
        for u, datum in product(range(v), range(n)):
            left = b[k, u, datum, :, j : j + rows].mT.unflatten(0, (parts, -1))
            torch.bmm(left, a[k, datum].expand(parts, s, i), out=G)
            part.addcmul_(G, G)


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield per-sample vectors of some data and output features at a time, to be summed over."""
    (g, v, n, _, o), i = b.shape, a.shape[-1]
    piece = PIECE if b.device.type == "cpu" else CHUNK
    step, rows = max(1, piece // (g * v * o * i)), max(1, min(o, piece // (g * v * i)))
    for k in range(0, n, step):
        data = slice(k, k + step)
        for j in range(0, o, rows):
            outputs = slice(j, j + rows)
            yield data, outputs, per_sample(a[:, data], b[:, :, data, :, outputs])


def square_norms(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``sum_oi G[v,n,g,o,i]**2`` as ``[g,v,n]``.

    The Gram route ``sum_st (a_s . a_t)(b_s . b_t)`` is taken where it needs fewer products than
    forming G, that is for ``s (i + o) < i o``.
    """
    if isinstance(a, OneHot):
        if a.bags is not None:
            rows, keys = _token_rows(a, b)
            out = rows.new_zeros(len(rows), a.shape[0])
            return out.index_add_(1, keys // a.size, rows.square().sum(2)).unsqueeze(0)
        b = a.masked(b)
        same = (a.index[:, :, None] == a.index[:, None, :]).to(b.dtype)
        return ((b @ b.mT) * same).sum((-1, -2))
    g, n, s, i = a.shape
    o = b.shape[-1]
    if s == 1:
        return a.square().sum((2, 3))[:, None] * b.square().sum((3, 4))
    if s * (i + o) < i * o:
        return ((a @ a.mT)[:, None] * (b @ b.mT)).sum((3, 4))
    norms = b.new_zeros(b.shape[1], n, g)
    for data, _, G in _pieces(a, b):
        norms[:, data] += G.square_().sum((3, 4))
    return norms.permute(2, 0, 1)


def dots(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``sum_oi G[v,n,g,o,i] G[v,m,g,o,i]`` as ``[g,v,n,m]``.

    With a shared axis, the Gram route costs ``(n s)^2 (i + o)`` products, the explicit one
    ``n o i (s + n)``; the cheaper is taken.
    """
    if isinstance(a, OneHot):
        b = a.masked(b)
        g, v, n, s, o = b.shape
        flat = b.reshape(g, v, n * s, o)
        out = (flat @ flat.mT) * _overlaps(a, b.dtype)
        return out.reshape(g, v, n, s, n, s).sum((3, 5))
    g, n, s, i = a.shape
    v, o = b.shape[1], b.shape[-1]
    if n * s * s * (i + o) < o * i * (s + n):
        flat_a, flat_b = a.reshape(g, 1, n * s, i), b.reshape(g, v, n * s, o)
        out = (flat_a @ flat_a.mT) * (flat_b @ flat_b.mT)
        return out if s == 1 else out.reshape(g, v, n, s, n, s).sum((3, 5))
    return dots_of(per_sample(a, b))


def dots_of(G: Tensor) -> Tensor:
    """Return ``sum_oi G[v,n,g,o,i] G[v,m,g,o,i]`` as ``[g,v,n,m]``."""
    rows = G.permute(2, 0, 1, 3, 4).flatten(3)
    return rows @ rows.mT


def _overlaps(a: OneHot, dtype: torch.dtype) -> Tensor:
    """Return ``sum_i a[n,s,i] a[m,t,i]`` as ``[(n s),(m t)]``."""
    if a.bags is None:
        index = a.index.flatten()
        return (index[:, None] == index[None, :]).to(dtype)
    tokens, column = a.index.unique(return_inverse=True)
    row, weight, count = a.rows, a.weights(dtype), a.shape[0] * a.shape[1]
    out = weight.new_zeros(count, count)
    step = max(1, CHUNK // count)
    for k in range(0, len(tokens), step):  # the tokens that occur, some at a time
        here = (column >= k) & (column < k + step)
        dense = weight.new_zeros(count, min(step, len(tokens) - k))
        dense.index_put_((row[here], column[here] - k), weight[here], accumulate=True)
        out.addmm_(dense, dense.mT)
    return out


def _token_rows(a: OneHot, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the non-zero rows of G, ``[v, rows, o]``, and of each row ``datum * size + token``."""
    entries = a.spread(b)
    keys, inverse = torch.unique(a.data * a.size + a.index.flatten(), return_inverse=True)
    rows = entries.new_zeros(len(entries), len(keys), entries.shape[-1])
    return rows.index_add_(1, inverse, entries), keys


def per_sample_sum(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``sum_vn G[v,n,g,o,i]`` as ``[g,o,i]``: one product, G is not formed."""
    if isinstance(a, OneHot):
        b = a.spread(b.sum(1, keepdim=True))[0]
        return b.new_zeros(a.size, b.shape[-1]).index_add_(0, a.index.flatten(), b).T.unsqueeze(0)
    return b.sum(1).flatten(1, 2).mT @ a.flatten(1, 2)
