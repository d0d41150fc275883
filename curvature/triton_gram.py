r"""A Triton kernel for :math:`X^T X` that computes one triangle and writes both."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# From that many columns, rows and tiles on (see `pays`). Not measured: chosen such that a GPU's about
# 100 processors have more than one tile each. torch's product divides the sum over rows among
# processors where there are few tiles; this kernel does not.
COLUMNS, ROWS, TILES = 1024, 512, 256
# Triton's interpreter (TRITON_INTERPRET=1) holds bfloat16 as integers, and would multiply those.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _triangle(
    x, out, r, d, scale,
    x_matrix, x_row, x_column, out_matrix, out_row,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute tile (i, j <= i) of one matrix, ``sum_r x[r,i] x[r,j]``, and write it and its mirror.

    Tiles are counted row by row of the triangle: number i (i + 1) / 2 + j.
    """
    tile = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # the root may be rounded to the next row's
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    at_i = i * BLOCK + tl.arange(0, BLOCK)
    at_j = j * BLOCK + tl.arange(0, BLOCK)
    x += matrix * x_matrix
    columns_i = x + at_i[None, :].to(tl.int64) * x_column
    columns_j = x + at_j[None, :].to(tl.int64) * x_column
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, r, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        offsets = rows[:, None].to(tl.int64) * x_row
        exists = rows[:, None] < r
        a = tl.load(columns_i + offsets, mask=exists & (at_i[None, :] < d), other=0.0)
        b = tl.load(columns_j + offsets, mask=exists & (at_j[None, :] < d), other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    total = (total * scale).to(out.dtype.element_ty)
    out += matrix * out_matrix
    inside = (at_i[:, None] < d) & (at_j[None, :] < d)
    tl.store(out + at_i[:, None].to(tl.int64) * out_row + at_j[None, :], total, mask=inside)
    if i != j:
        mirrored = (at_j[:, None] < d) & (at_i[None, :] < d)
        place = out + at_j[:, None].to(tl.int64) * out_row + at_i[None, :]
        tl.store(place, tl.trans(total), mask=mirrored)


def block_of(d: int) -> int:
    """Return the number of rows and columns of a tile."""
    return 128 if d >= 2048 else 64


def pays(S: Tensor) -> bool:
    """Whether a product of ``S[*batch, d, r]`` with its transpose is left to the kernel.

    That is where it has a float32 or half type, needs no gradient, and has `ROWS`, `COLUMNS` and
    `TILES` at least. See there: these have not been measured.
    """
    if S.requires_grad and torch.is_grad_enabled():
        return False
    d, r = S.shape[-2:]
    if type(S) is not Tensor or S.dtype not in DTYPES or d < COLUMNS or r < ROWS:
        return False
    return S.shape[:-2].numel() * _tiles(d) >= TILES


def gram(x: Tensor, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Return :math:`\text{scale} \; X^T X` as ``[*batch, d, d]`` for ``x[*batch, r, d]``.

    Sums are accumulated in float32. Only tiles on and below the diagonal are computed; each is written
    to both of its places, so that the result is symmetric exactly. It is not differentiated.

    Args:
        x: float32, bfloat16 or float16, of any strides. float32 is multiplied as
            ``torch.backends.cuda.matmul.fp32_precision`` says: rounded to TF32, or as it is.
        scale: A factor.
        dtype: Data type of the result.

    Raises:
        TypeError: If ``x`` has another data type.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"gram: x is {x.dtype}; expected one of {', '.join(map(str, DTYPES))}.")
    *batch, r, d = x.shape
    x = x.reshape(prod(batch), r, d)
    out = torch.empty(len(x), d, d, dtype=dtype, device=x.device)
    if out.numel():
        block = block_of(d)
        widen = INTERPRETED and x.dtype == torch.bfloat16
        # at most 65535 matrices at once: the grid's limit along its second axis
        with torch.cuda.device_of(x):  # kernels run on the current device
            for some, found in zip(x.split(2**15), out.split(2**15), strict=True):
                _triangle[(_tiles(d), len(some))](
                    some, found, r, d, scale, *some.stride(), *found.stride()[:2],
                    BLOCK=block, DEPTH=32, PRECISION=_precision(x.dtype), WIDEN=widen,
                    num_warps=8 if block == 128 else 4,
                )  # fmt: skip
    return out.reshape(*batch, d, d)


def _tiles(d: int) -> int:
    """Return the number of tiles on and below the diagonal."""
    count = triton.cdiv(d, block_of(d))
    return count * (count + 1) // 2


def _precision(dtype: torch.dtype) -> str:
    """Return how factors are rounded before they are multiplied."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
