r"""Triangular Toeplitz matrices: one number per diagonal, products by Fourier transforms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log2

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvature.mirrored import MirroredMatrix
from curvature.structured import accumulator, leading_axes, scaled_product

# Up to this dimension products form the dense matrix, which is faster. Measured on two CPU cores in
# float32, dense / Fourier: 0.4 at d = 128, 0.8 at 256, 1.4 at 512 (256 columns; alike for 16).
DIRECT = 256


class _Toeplitz(MirroredMatrix):
    r"""The lower triangular Toeplitz matrix :math:`H_{ij} = c_{i-j}` of ``c[d]``, zero for i < j.

    A product with a column is the first d entries of a convolution with c, see `Convolution`.
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
        return Convolution(self.tensors[0]).times(X.mT, transpose).mT.to(X.dtype)

    def _held_compose(self, other: _Toeplitz) -> _Toeplitz:
        # the first column of the product says it all
        return self.like([self._held_matmul(other.tensors[0].unsqueeze(-1), False).squeeze(-1)])

    @classmethod
    def _project_gram(cls, S: Tensor, scale: float, **options: int) -> _Toeplitz:
        d = S.shape[-2]
        if d <= DIRECT:
            c = _diagonal_means(scaled_product(S, S.mT, scale))
        elif S.numel() == 0:  # which MKL does not transform
            c = S.new_zeros(*S.shape[:-2], d)
        else:  # sums over the diagonals of S S^T are autocorrelations of the columns of S
            n = transform_length(2 * d - 1)
            F = torch.fft.rfft(S.mT.to(accumulator(S.dtype)), n)  # of rows, as in `Convolution`
            power = torch.view_as_real(F).flatten(-2).square().sum(-2).unflatten(-1, (-1, 2)).sum(-1)
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


class Convolution:
    r"""Products of rows with the lower triangular Toeplitz matrix of a first column, in Fourier space.

    They are entrywise products of transforms of length n >= 2 d - 2. With n = 2 d - 2 the ends of a
    convolution meet in a single number, which is subtracted: layers of 512 inputs and a bias have
    transforms of length 1024. With more nothing of the first d entries wraps around.

    All is computed in ``accumulator(c.dtype)``.

    Args:
        c: The first column of H, ``[*batch, d]``.
    """

    def __init__(self, c: Tensor):
        self.dim = d = c.shape[-1]
        self.length = n = transform_length(max(1, 2 * d - 2))
        c = c.to(accumulator(c.dtype))
        self.f = torch.fft.rfft(c, n).unsqueeze(-2)
        self.back = self.f.conj().resolve_conj()
        # the factor of what lands on the other end
        self.last = c[..., -1:].clone() if n == 2 * d - 2 else None

    def times(self, X: Tensor, *transposed: bool) -> Tensor:
        """Return ``H x`` for each row x of ``X[*other, r, d]``, or ``H^T x``, or several such products.

        All happen in one memory, of rows that are longer than the result, which is a view. Transforms
        along columns take twice as long as these, with both transpositions.

        Args:
            X: As above.
            *transposed: Of each product, from the first on, whether it is one with the transpose.
        """
        d, dtype, lead = self.dim, self.f.real.dtype, leading_axes(self.f, X)
        Y = X.new_empty(*lead, X.shape[-2], self.length, dtype=dtype)
        Y[..., :d], Y[..., d:] = X, 0
        F = None
        for turned in transposed if Y.numel() else ():  # MKL refuses to transform nothing
            to, source = (d - 1, 0) if turned else (0, d - 1)
            end = None if self.last is None else self.last * Y[..., source]
            F = torch.fft.rfft(Y, out=F)
            torch.fft.irfft(F.mul_(self.back if turned else self.f), self.length, out=Y)
            if end is not None:
                Y[..., to] -= end
            Y[..., d:] = 0
        return Y[..., :d]


# Picoseconds per number and doubling of a real transform of n numbers, by how often 2 divides n.
# Measured on one CPU core in float32; powers of two take 10.
SPEED = (46.0, 20.0, 18.0, 14.0)
FAST, FASTEST = 12.7, 10.3


@lru_cache(maxsize=256)
def transform_length(least: int) -> int:
    """Return the length from ``least`` on, without prime factors above 5, that is transformed fastest.

    Transforms of other lengths take several times longer, and so do those of odd ones.
    """
    found, five = [], 1
    while five < 2 * least:
        odd = five
        while odd < 2 * least:
            found.append(odd << (-(-least // odd) - 1).bit_length())
            odd *= 3
        five *= 5
    return min(found, key=_transform_time)


def _transform_time(n: int) -> float:
    twos = (n & -n).bit_length() - 1
    speed = SPEED[twos] if twos < len(SPEED) else FAST
    return n * log2(n + 1) * (FASTEST if n == 1 << twos else speed)
