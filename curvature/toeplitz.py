r"""Triangular Toeplitz matrices: one number per diagonal, products by Fourier transforms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvature.mirrored import MirroredMatrix
from curvature.structured import accumulator, scaled_product

# Up to this dimension products form the dense matrix, which is faster. Measured on two CPU cores in
# float32, dense / Fourier: 0.4 at d = 128, 0.8 at 256, 1.4 at 512 (256 columns; alike for 16).
DIRECT = 256


class _Toeplitz(MirroredMatrix):
    r"""The lower triangular Toeplitz matrix :math:`H_{ij} = c_{i-j}` of ``c[d]``, zero for i < j.

    A product with a column is the first d entries of a convolution with c. In Fourier space it
    is an entrywise product of transforms of length n >= 2 d - 1, so that nothing wraps around.
    """

    @classmethod
    def _shapes(cls, dim: int, **options: int) -> tuple[tuple[int, ...], ...]:
        return ((dim,),)

    def _held(self) -> Tensor:
        (c,) = self.tensors
        d = self.dim
        # windows[i, j] = c[i + j - (d - 1)], zero for negative indices
        windows = pad(c, (d - 1, 0)).unfold(-1, d, 1)
        return windows.flip(-1)

    @classmethod
    def _hold(cls, M: Tensor, **options: int) -> Sequence[Tensor]:
        return [_diagonal_means(M)]

    def _trace(self) -> Tensor:
        return self.tensors[0][..., 0].to(accumulator(self.dtype)) * self.dim

    def _square_norm(self) -> Tensor:
        c = self.tensors[0].to(accumulator(self.dtype))
        return c.square() @ _lengths(c)

    def _add_identity(self, alpha: float) -> None:
        self.tensors[0][..., 0] += alpha

    def _held_matmul(self, X: Tensor, transpose: bool) -> Tensor:
        if self.dim <= DIRECT:
            H = self._held()
            return (H.mT if transpose else H) @ X
        dtype = accumulator(self.dtype)
        n = _transform_length(2 * self.dim - 1)
        f = torch.fft.rfft(self.tensors[0].to(dtype), n).unsqueeze(-1)
        Y = torch.fft.rfft(X.to(dtype), n, dim=-2)
        Y = Y * (f.conj() if transpose else f)
        return torch.fft.irfft(Y, n, dim=-2)[..., : self.dim, :].to(X.dtype)

    def _held_compose(self, other: _Toeplitz) -> _Toeplitz:
        # the first column of the product says it all
        return self.like([self._held_matmul(other.tensors[0].unsqueeze(-1), False).squeeze(-1)])

    @classmethod
    def _project_gram(cls, S: Tensor, scale: float, **options: int) -> _Toeplitz:
        d = S.shape[-2]
        if d <= DIRECT:
            c = _diagonal_means(scaled_product(S, S.mT, scale))
        else:  # sums over the diagonals of S S^T are autocorrelations of the columns of S
            wide = S.to(accumulator(S.dtype))
            n = _transform_length(2 * d - 1)
            f = torch.view_as_real(torch.fft.rfft(wide, n, dim=-2)).flatten(-2)
            power = torch.linalg.vector_norm(f, dim=-1).square_()
            sums = torch.fft.irfft(power, n)[..., :d]
            c = (sums * scale / _lengths(sums)).to(S.dtype)
        return cls._of([c], d, options)._double_unpaired()

    def _held_gram(self, outer: bool) -> _Toeplitz:
        r"""Hold the means of the diagonals of ``H^T H``; those of ``H H^T`` are the same.

        .. math::  \sum_i (H^T H)_{i, i-k} = \sum_v (d - v) c_v c_{v-k} = (H^T w)_k, \quad
                   w_v = (d - v) c_v,

        and with the reversal J, :math:`J H J = H^T`, so :math:`H H^T = J H^T H J`.
        """
        c = self.tensors[0].to(accumulator(self.dtype))
        lengths = _lengths(c)
        H = self.like([c])
        sums = H._held_matmul((c * lengths).unsqueeze(-1), True).squeeze(-1)
        return self.like([(sums / lengths).to(self.dtype)])

    def _double_unpaired(self) -> _Toeplitz:
        self.tensors[0][..., 1:].mul_(2)
        return self


class LowerToeplitz(_Toeplitz):
    """Lower triangular Toeplitz matrices. Stored: d numbers, the first column ``[d]``.

    Their products cost d log d operations per column. From half types they are computed in float32.

    Example:
        >>> A = LowerToeplitz.from_dense(torch.tensor([[1.0, 9.0], [2.0, 3.0]]))
        >>> A.to_dense()
        tensor([[2., 0.],
                [2., 2.]])
        >>> (A @ A).to_dense()
        tensor([[4., 0.],
                [8., 4.]])
    """

    name = "lower-toeplitz"


class UpperToeplitz(_Toeplitz):
    """Upper triangular Toeplitz matrices. Stored: d numbers, the first row ``[d]``.

    Example:
        >>> UpperToeplitz.from_dense(torch.tensor([[1.0, 9.0], [2.0, 3.0]])).to_dense()
        tensor([[2., 9.],
                [0., 2.]])
    """

    name = "upper-toeplitz"
    mirrored = True


def _lengths(c: Tensor) -> Tensor:
    """Return the lengths d, d - 1, ..., 1 of the diagonals."""
    return torch.arange(c.shape[-1], 0, -1, dtype=c.dtype, device=c.device)


def _diagonal_means(M: Tensor) -> Tensor:
    """Return the means ``[*batch, d]`` of the main diagonal of ``M[*batch, d, d]`` and those below."""
    d = M.shape[-1]
    # d zeros to the right of each row, then rows cut after 2 d - 1 numbers instead of 2 d: each row
    # moves one place to the right against the one above, so that antidiagonals become columns
    wide = pad(M.flip(-2), (0, d)).flatten(-2)[..., : d * (2 * d - 1)]
    sums = wide.unflatten(-1, (d, 2 * d - 1))[..., :d].flip(-1)
    sums = sums.sum(-2, dtype=accumulator(M.dtype))
    return (sums / _lengths(sums)).to(M.dtype)


@lru_cache(maxsize=256)
def _transform_length(least: int) -> int:
    """Return the smallest length from ``least`` on without prime factors above 5.

    Transforms of other lengths take several times longer.
    """
    n = least
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
