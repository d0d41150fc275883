r"""Gram matrices of layers' per-sample vectors, from their inputs and vectors.

With inputs ``a[g,n,s,i]`` and vectors ``b[g,v,n,s,o]``, the per-sample vectors are
``G[v,n,g,o,i] = sum_s b a``, and their dot products with those of other data (or the same)

.. math::  K[vn, wm] = \sum_{g,s,t} (a_{gns} \cdot a'_{gmt}) (b_{gvns} \cdot b'_{gwmt})

Two routes lead there: this sum (the *kernel* route), or forming G for some output features at a time
(the *explicit* route). Neither holds G as a whole. The cheaper one is taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from backpack_ext.normal import CHUNK, OneHot, gram

# What an entry that is read and written counts against a multiplication within a matrix product.
ENTRY = 24


def layer_gram(
    a: Tensor | OneHot,
    b: Tensor,
    a2: Tensor | OneHot | None = None,
    b2: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    """Return the dot products of a layer's per-sample vectors with another set, ``[(v n), (w m)]``.

    Args:
        a: Inputs ``[g,n,s,i]``, or one-hot inputs.
        b: Vectors ``[g,v,n,s,o]``.
        a2: Inputs of the other set ``[g,m,t,i]``; the set itself by default.
        b2: Vectors of the other set ``[g,w,m,t,o]``.
        bias: Whether to add the dot products of the bias's per-sample vectors ``sum_s b``; not
            for one-hot inputs.
    """
    same = b2 is None
    if isinstance(a, OneHot):
        b = a.masked(b)
        if same:
            found = _densified(a, b, a, b)
            return _of_tokens(a, b, a, b) if found is None else _of(found[0], b, None, b, False)
        b2 = a2.masked(b2)
        found = _densified(a, b, a2, b2)
        return _of_tokens(a, b, a2, b2) if found is None else _of(found[0], b, found[1], b2, False)
    return _of(a, b, a2, b if same else b2, bias)


def layer_grams(
    a: Tensor | OneHot, b: Tensor, a2: Tensor | OneHot, b2: Tensor, bias: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `layer_gram` of a set with itself and with another set; see there."""
    tokens = isinstance(a, OneHot) or isinstance(a2, OneHot)
    if tokens or not _explicit_is_cheaper(a, b, a, b, True):
        return layer_gram(a, b, bias=bias), layer_gram(a, b, a2, b2, bias=bias)
    (v, n), (w, m) = b.shape[1:3], b2.shape[1:3]
    own, cross = b.new_zeros(v * n, v * n), b.new_zeros(v * n, w * m)
    for G, H in _pieces(a, b, a2, b2):  # one set of vectors serves both
        own += gram(G.mT).sum(0)
        cross += (G @ H.mT).sum(0)
    if bias:
        own, cross = own + _of_biases(b, b), cross + _of_biases(b, b2)
    return own, cross


def _of(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor, bias: bool) -> Tensor:
    """Take the cheaper route; ``a2`` is None for the set itself."""
    if _explicit_is_cheaper(a, b, a if a2 is None else a2, b2, a2 is None):
        return _explicit(a, b, a2, b2, bias)
    other = a if a2 is None else a2
    (g, n, s, i), (m, t) = a.shape, other.shape[1:3]
    A = a.reshape(g, n * s, i) @ other.reshape(g, m * t, i).mT
    return _kernel(A + 1 if bias else A, b, b2, a2 is None)


def _explicit_is_cheaper(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, same: bool) -> bool:
    """Compare the numbers of multiplications, and of entries that are written."""
    (v, n, s, o), i, (w, m, t) = b.shape[1:], a.shape[-1], b2.shape[1:4]
    columns, pairs = (v * n + (0 if same else w * m)), v * n * w * m
    explicit = pairs * i * o + columns * i * o * (max(s, t) + ENTRY)
    half = 0.5 if same and (v > 1 or s > 1) else 1.0
    kernel = n * s * m * t * i + half * pairs * s * t * (o + (ENTRY if s * t > 1 else 1))
    return explicit < kernel


def _kernel(A: Tensor, b: Tensor, b2: Tensor, same: bool) -> Tensor:
    """Return ``sum_gst A[g,(n s),(m t)] (b . b')``, vectors by vectors where positions are shared."""
    (g, v, n, s, o), (_, w, m, t, _) = b.shape, b2.shape
    if s == t == 1:
        x = b.reshape(g, v * n, o)
        B = gram(x.mT) if same else x @ b2.reshape(g, w * m, o).mT
        B = B.reshape(g, v, n, w, m).mul_(A[:, None, :, None, :])
        return (B[0] if g == 1 else B.sum(0)).reshape(v * n, w * m)
    out = b.new_empty(v, n, w, m)
    rows, others = b.reshape(g, v, n * s, o), b2.reshape(g, w, m * t, o)
    step = max(1, min(n, CHUNK // max(1, g * s * m * t)))
    for k in range(v):
        for j in range(w):
            if same and j < k:
                out[k, :, j] = out[j, :, k].mT
                continue
            for start in range(0, n, step):
                part = slice(start * s, (start + step) * s)
                B = (rows[:, k, part] @ others[:, j].mT).mul_(A[:, part])
                B = B.reshape(g, -1, s, m, t)
                out[k, start : start + step, j] = B.sum((0, 2, 4))
    return out.reshape(v * n, w * m)


def _explicit(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor, bias: bool) -> Tensor:
    """Form the per-sample vectors for some output features at a time."""
    v, n, w, m = *b.shape[1:3], *b2.shape[1:3]
    total = b.new_zeros(v * n, w * m)
    for G, H in _pieces(a, b, a2, b2):
        total += gram(G.mT).sum(0) if a2 is None else (G @ H.mT).sum(0)
    return total + _of_biases(b, b2) if bias else total


def _pieces(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the per-sample vectors of both sets (equal if ``a2`` is None), some output features each."""
    (g, v, n, _, o), i, (_, w, m, _, _) = b.shape, a.shape[-1], b2.shape
    step = max(1, min(o, CHUNK // max(1, g * max(v * n, w * m) * i)))
    for k in range(0, o, step):
        G = _rows(a, b[..., k : k + step])
        yield G, G if a2 is None else _rows(a2, b2[..., k : k + step])


def _of_biases(b: Tensor, b2: Tensor) -> Tensor:
    """Return the dot products of the biases' per-sample vectors."""
    x, y = (t.sum(3).flatten(1, 2) for t in (b, b2))
    return (x @ y.mT).sum(0)


def _rows(a: Tensor, b: Tensor) -> Tensor:
    """Return per-sample vectors ``[g, (v n), (o i)]``."""
    (g, v, n, s, o), i = b.shape, a.shape[-1]
    if s == 1:
        return (b.reshape(g, v, n, o, 1) * a.reshape(g, 1, n, 1, i)).reshape(g, v * n, o * i)
    # vector by vector: a product over all of them would copy b, or repeat a
    G = b.new_empty(v, g * n, o, i)
    inputs, vectors = a.reshape(g * n, s, i), b.mT
    for k in range(v):
        torch.bmm(vectors[:, k].reshape(g * n, o, s), inputs, out=G[k])
    return G.reshape(v, g, n, o * i).transpose(0, 1).reshape(g, v * n, o * i)


# --------------------------------------------------------------------------- one-hot inputs


def _densified(a: OneHot, b: Tensor, a2: OneHot, b2: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return dense inputs over the features that occur, if they are small and forming vectors pays.

    Masks are left to the vectors.
    """
    features = torch.cat([a.index.flatten(), a2.index.flatten()]).unique()
    (n, s), (m, t) = a.shape, a2.shape
    bags = a.bags is not None or a2.bags is not None
    if not bags and (n * s + m * t) * len(features) > CHUNK:
        return None
    dense = dense_inputs(a, features, b.dtype), dense_inputs(a2, features, b.dtype)
    if bags or _explicit_is_cheaper(dense[0], b, dense[1], b2, b is b2):
        return dense
    return None


def dense_inputs(a: OneHot, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one-hot inputs over some features (sorted; all that occur) as ``[1,n,s,i]``."""
    n, s = a.shape
    out = torch.zeros(n * s, len(features), dtype=dtype, device=a.index.device)
    column, index = torch.searchsorted(features, a.index.flatten()), a.rows
    weight = a.index.new_ones(len(index), dtype=dtype)
    if a.bags is not None and a.bags.weight is not None:
        weight = a.bags.weight.to(dtype)
    out.index_put_((index, column), weight, accumulate=True)
    return out.reshape(1, n, s, -1)


def _of_tokens(a: OneHot, b: Tensor, a2: OneHot, b2: Tensor) -> Tensor:
    """Take the kernel route: two positions overlap where they select the same feature."""
    A = (a.index.reshape(-1, 1) == a2.index.reshape(1, -1)).to(b.dtype).unsqueeze(0)
    return _kernel(A, b, b2, b is b2)  # inputs may be shared by different vectors
