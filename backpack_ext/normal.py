"""Contractions of the normal form: every quantity of an affine layer is one of these.

Index letters: g group, v vector, n and m data, s and t shared positions, i and j input features,
o and p output features. Inputs are ``a[g,n,s,i]``, vectors ``b[g,v,n,s,o]``, and the per-sample
vectors (for the gradient: per-sample gradients) ``G[v,n,g,o,i] = sum_s b[g,v,n,s,o] a[g,n,s,i]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of a per-sample intermediate that is formed at once; larger ones are cut along n.
CHUNK = 2**24

# Columns of a large input whose part of a symmetric product is formed at once.
PANEL = 192


@dataclass(eq=False)
class OneHot:
    """Inputs that select one of ``size`` features: ``a[n,s,i] = mask[n,s] (index[n,s] == i)``.

    Args:
        index: ``[n, s]``, integers.
        size: Number of input features i.
        mask: ``[n, s]``, False where the input is zero (padding); None if nowhere.
    """

    index: Tensor
    size: int
    mask: Tensor | None = None

    def masked(self, b: Tensor) -> Tensor:
        """Zero the vectors ``b[g,v,n,s,o]`` at masked positions."""
        return b if self.mask is None else b * self.mask[:, :, None]

    def select(self, index: Tensor) -> OneHot:
        """Return the inputs of some of the data."""
        return OneHot(self.index[index], self.size, None if self.mask is None else self.mask[index])


def cat_inputs(parts: Sequence[Tensor | OneHot]) -> Tensor | OneHot:
    """Concatenate inputs along s."""
    if not isinstance(parts[0], OneHot):
        return torch.cat(list(parts), dim=2)
    mask = None
    if any(p.mask is not None for p in parts):
        mask = torch.cat(
            [torch.ones_like(p.index, dtype=torch.bool) if p.mask is None else p.mask for p in parts],
            dim=1,
        )
    return OneHot(torch.cat([p.index for p in parts], dim=1), parts[0].size, mask)


def gram(x: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale sum_r x[g,r,i] x[g,r,j]`` as ``[g,i,j]``.

    On CPU, where torch has no symmetric product, large ones are formed panel by panel: each panel
    of rows from its diagonal block on, the rest mirrored. That saves up to half of the product
    (8192 x 1152: 1.5 times faster), and nothing where x has few rows or columns.
    """
    g, r, i = x.shape
    out = x.new_empty(g, i, i)
    if g > 1:
        return torch.baddbmm(out, x.mT, x, beta=0, alpha=scale, out=out)
    rows, product = x[0], out[0]
    if i < 256 or r < 1024 or x.device.type != "cpu":
        torch.addmm(product, rows.mT, rows, beta=0, alpha=scale, out=product)
        return out
    for k in range(0, i, PANEL):
        panel = product[k : k + PANEL, k:]
        torch.addmm(panel, rows[:, k : k + PANEL].mT, rows[:, k:], beta=0, alpha=scale, out=panel)
        product[k : k + PANEL, :k] = product[:k, k : k + PANEL].mT
    return out


def per_sample(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``G[v,n,g,o,i]``."""
    if isinstance(a, OneHot):
        b = a.masked(b)[0]
        v, n, s, o = b.shape
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


def bias_per_sample(b: Tensor) -> Tensor:
    """Return ``sum_s b``, laid out as ``[v,n,g,o,1]``."""
    return b.sum(3).permute(1, 2, 0, 3).unsqueeze(-1)


def square_sum(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``sum_vn G[v,n,g,o,i]**2`` as ``[g,o,i]``.

    Without a shared axis this is one product of squares; otherwise G is formed chunk by chunk.
    """
    if isinstance(a, OneHot):
        rows, tokens = _token_rows(a, b)
        out = rows.new_zeros(a.size, rows.shape[-1])
        return out.index_add_(0, tokens, rows.square().sum(0)).T.unsqueeze(0)
    if a.shape[2] == 1:
        b2, a2 = b.squeeze(3).square().sum(1), a.squeeze(2).square()
        return (b2[0].mT @ a2[0])[None] if a.shape[0] == 1 else b2.mT @ a2
    g, n, _, i = a.shape
    v, o = b.shape[1], b.shape[-1]
    step = max(1, CHUNK // (g * v * o * i))
    total = b.new_zeros(g, o, i, dtype=torch.promote_types(a.dtype, b.dtype))
    for k in range(0, n, step):
        G = per_sample(a[:, k : k + step], b[:, :, k : k + step])
        total += G.square_().sum((0, 1))
    return total


def square_norms(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``sum_oi G[v,n,g,o,i]**2`` as ``[g,v,n]``.

    The Gram route ``sum_st (a_s . a_t)(b_s . b_t)`` is taken where it needs fewer products than
    forming G, that is for ``s (i + o) < i o``.
    """
    if isinstance(a, OneHot):
        b = a.masked(b)
        same = (a.index[:, :, None] == a.index[:, None, :]).to(b.dtype)
        return ((b @ b.mT) * same).sum((-1, -2))
    g, n, s, i = a.shape
    o = b.shape[-1]
    if s == 1:
        return a.square().sum((2, 3))[:, None] * b.square().sum((3, 4))
    if s * (i + o) < i * o:
        return ((a @ a.mT)[:, None] * (b @ b.mT)).sum((3, 4))
    step = max(1, CHUNK // (g * b.shape[1] * o * i))
    parts = [
        per_sample(a[:, k : k + step], b[:, :, k : k + step]).square().sum((3, 4))
        for k in range(0, n, step)
    ]
    return torch.cat(parts, dim=1).permute(2, 0, 1)


def dots(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``sum_oi G[v,n,g,o,i] G[v,m,g,o,i]`` as ``[g,v,n,m]``.

    With a shared axis, the Gram route costs ``(n s)^2 (i + o)`` products, the explicit one
    ``n o i (s + n)``; the cheaper is taken.
    """
    if isinstance(a, OneHot):
        b = a.masked(b)
        g, v, n, s, o = b.shape
        index = a.index.flatten()
        flat = b.reshape(g, v, n * s, o)
        out = (flat @ flat.mT) * (index[:, None] == index[None, :]).to(b.dtype)
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


def _token_rows(a: OneHot, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the non-zero rows of G per datum, ``[v, rows, o]``, and each row's token."""
    b = a.masked(b)[0]
    datum = torch.arange(len(a.index), device=b.device)[:, None] * a.size
    keys, inverse = torch.unique(datum + a.index, return_inverse=True)
    rows = b.new_zeros(b.shape[0], len(keys), b.shape[-1])
    rows.index_add_(1, inverse.flatten(), b.flatten(1, 2))
    return rows, keys % a.size


def per_sample_sum(a: Tensor | OneHot, b: Tensor) -> Tensor:
    """Return ``sum_vn G[v,n,g,o,i]`` as ``[g,o,i]``: one product, G is not formed."""
    if isinstance(a, OneHot):
        b = a.masked(b)[0].sum(0).flatten(0, 1)
        return b.new_zeros(a.size, b.shape[-1]).index_add_(0, a.index.flatten(), b).T.unsqueeze(0)
    return b.sum(1).flatten(1, 2).mT @ a.flatten(1, 2)
