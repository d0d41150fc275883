r"""Symmetric products, of which only about half is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature import openblas
from curvature.structured import scaled_product
from curvature.switches import triton_enabled

# A product is formed in halves if S has d >= ROWS, r >= COLUMNS, and d^2 r multiplications, per thread,
# of at least this number. Below, more and smaller products cost what they save: for 512 x 128 on two
# threads they take 1.1 times as long as the whole, on one thread 0.85 to 1.05 times.
ROWS, COLUMNS, HALVED = 192, 96, 2**25
# Blocks of up to that many rows are not halved again.
LEAF = 256
# On one thread NumPy's product is faster than halves from that many multiplications on, unless the
# matrix has more than 8 times as many rows as columns: what is formed then costs more than the product.
NUMPY, ASPECT = 2**26, 8
# Rows whose lengths in bytes are multiples of this fall into few sets of a cache when read along
# columns: a direct transposed copy of half of 512 x 512 takes 2.2 times as long as two ordered ones.
CONFLICTS = 256


def symmetric_product(S: Tensor, scale: float = 1.0) -> Tensor:
    r"""Return :math:`\text{scale} \; S S^T` as ``[*batch, d, d]`` for ``S[*batch, d, r]``.

    On CPU torch has no symmetric product. Large ones are formed recursively here,

    .. math:: \begin{pmatrix} S_1 \\ S_2 \end{pmatrix} \begin{pmatrix} S_1 \\ S_2 \end{pmatrix}^T
              = \begin{pmatrix} S_1 S_1^T & C \\ C^T & S_2 S_2^T \end{pmatrix}, \quad C = S_1 S_2^T,

    which leaves half of the multiplications, or by NumPy's product of an array and its transpose,
    which is one of BLAS's ``syrk``:

    ================================================== =========================================
    torch's threads                                    large products (see `ROWS` and following)
    ================================================== =========================================
    one, as has NumPy's OpenBLAS (`OMP_NUM_THREADS=1`) NumPy, unless d > 8 r; else halves
    more                                               halves
    ================================================== =========================================

    Beyond one thread NumPy loses, within a step: each library has its own threads, and those of the
    one wait busily while the other's work. ``python -m benchmarks.symmetric`` measures all ways,
    alone and in alternation with torch's products.

    On GPU this is torch's product, or with `curvature.use_triton` a kernel for one triangle. Where
    derivatives are followed, or a function transform runs, it is torch's product everywhere.
    """
    if S.device.type == "cuda" and triton_enabled() and not is_differentiated(S):
        from curvature import triton_gram

        if triton_gram.pays(S):
            return triton_gram.gram(S.mT, scale, S.dtype)
    *batch, d, r = S.shape
    if S.device.type != "cpu" or not is_halved(d, r) or is_differentiated(S):
        return scaled_product(S, S.mT, scale)
    out = S.new_empty(*batch, d, d)
    product = openblas.product if numpy_pays(S) else halves
    for found, rows in zip(out.view(-1, d, d), S.reshape(-1, d, r), strict=True):
        product(rows, found, scale)
    return out


def is_differentiated(S: Tensor) -> bool:
    """Whether derivatives of a tensor are followed, in either direction, or a transform runs."""
    if S.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(S):
        return True
    return torch.autograd.forward_ad.unpack_dual(S).tangent is not None


def is_halved(d: int, r: int) -> bool:
    """Whether the product of ``[d, r]`` with its transpose is formed in halves, or by NumPy."""
    return d >= ROWS and r >= COLUMNS and d * d * r >= HALVED * torch.get_num_threads()


def numpy_pays(S: Tensor) -> bool:
    """Whether NumPy's product is the fastest way, and can be taken."""
    d, r = S.shape[-2:]
    return d * d * r >= NUMPY and d <= ASPECT * r and openblas.can_take(S)


def halves(S: Tensor, out: Tensor, scale: float = 1.0) -> None:
    r"""Write :math:`\text{scale} \; S S^T` for ``S[n, r]``, n > 16, into ``out[n, n]``."""
    n = len(S)
    m = (n // 2 + 15) // 16 * 16  # whole vector registers
    one, two, upper, lower = S[:m], S[m:], out[:m, m:], out[m:, :m]
    if m > LEAF:
        halves(one, out[:m, :m], scale)
        torch.addmm(upper, one, two.mT, beta=0, alpha=scale, out=upper)
    else:  # a wide product is faster than two
        torch.addmm(out[:m], one, S.mT, beta=0, alpha=scale, out=out[:m])
    block = out[m:, m:]
    if n - m > LEAF:
        halves(two, block, scale)
    else:
        torch.addmm(block, two, two.mT, beta=0, alpha=scale, out=block)
    if out.stride(0) * out.element_size() % CONFLICTS:
        lower.copy_(upper.mT)
    else:
        lower.copy_(upper.contiguous().mT.contiguous())
