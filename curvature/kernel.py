r"""Measures of kernel matrices: how far a neural tangent kernel has moved, and what it favours.

Kernel matrices are ``[N, N]``, or ``[N, N, C, C]`` with the outputs' axes last: ``K[n, m, c, d]`` is
the kernel of output c at datum n and output d at datum m, for the neural tangent kernel
:math:`J_n J_m^T` with the Jacobian :math:`J_n` ``[C, P]``. All computations are in float64.
"""

from __future__ import annotations

from math import inf, pi

import torch
from torch import Tensor

from curvature.decomposition import check_finite, check_symmetric, nonnegative

# ---------------------------------------------------------------------- bringing into form


def as_matrix(K: Tensor) -> Tensor:
    r"""Return a kernel as a matrix: entry ``[n C + c, m C' + d]`` is ``K[n, m, c, d]``.

    Args:
        K: ``[N, M]``, returned as it is, or ``[N, M, C, C']``.

    Returns:
        ``[N C, M C']``: data are slow, outputs fast, as in ``targets[N, C].flatten()``.

    Raises:
        ValueError: If K has another number of axes.

    Example:
        >>> as_matrix(torch.eye(2).expand(3, 4, 2, 2)).shape
        torch.Size([6, 8])
    """
    if K.dim() not in (2, 4):
        raise ValueError(
            f"A kernel of shape {tuple(K.shape)}: expected [N, M], or [N, M, C, C'] with the axes of "
            "the outputs last."
        )
    return K if K.dim() == 2 else K.transpose(1, 2).flatten(2).flatten(0, 1)


def symmetric_matrix(name: str, K: Tensor) -> Tensor:
    """Return the kernel of data with themselves as an exactly symmetric float64 matrix ``[d, d]``.

    Args:
        name: What the kernel is called in messages.
        K: ``[N, N]`` or ``[N, N, C, C]``.

    Raises:
        ValueError: If it is not of that form, not finite, or not symmetric up to the rounding of its
            own data type.
    """
    M = _matrix(name, K)
    if M.shape[0] != M.shape[1]:
        raise ValueError(
            f"{name} is no kernel of data with themselves: its shape is {tuple(K.shape)}; expected "
            "[N, N] or [N, N, C, C]."
        )
    check_symmetric(name, M)
    M = M.double()
    return (M + M.mT) / 2


def eigenvalues(name: str, K: Tensor) -> Tensor:
    """Return the eigenvalues of a kernel, ascending ``[d]``; see `eigenpairs`."""
    return _clean(name, K, torch.linalg.eigvalsh(symmetric_matrix(name, K)))


def eigenpairs(name: str, K: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a kernel in float64.

    Eigenvalues of at most 8 eps times the largest count as zero, with eps that of K's data type: they
    are rounding.

    Args:
        name: What the kernel is called in messages.
        K: ``[N, N]`` or ``[N, N, C, C]``.

    Returns:
        Eigenvalues ``[d]``, ascending, and eigenvectors as columns ``[d, d]``.

    Raises:
        ValueError: If K is not a finite, symmetric and positive semi-definite kernel.
    """
    values, basis = torch.linalg.eigh(symmetric_matrix(name, K))
    return _clean(name, K, values), basis


def _clean(name: str, K: Tensor, values: Tensor) -> Tensor:
    values = nonnegative(name, values, K.dtype)
    return values.masked_fill(values <= 8 * torch.finfo(K.dtype).eps * values[-1], 0.0)


def _matrix(name: str, K: Tensor) -> Tensor:
    """Return a kernel as a matrix in its own data type."""
    if not K.is_floating_point():
        raise ValueError(f"{name} is of {K.dtype}; expected a real floating-point kernel.")
    M = as_matrix(K)
    if M.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(K.shape)}.")
    check_finite(name, M)
    return M


def _pair(K0: Tensor, Kt: Tensor) -> tuple[Tensor, Tensor]:
    """Return two kernels of the same data as float64 matrices, the first not zero."""
    if K0.shape != Kt.shape:
        raise ValueError(
            f"K0 and Kt are kernels of different data or outputs: their shapes are {tuple(K0.shape)} "
            f"and {tuple(Kt.shape)}."
        )
    A, B = _matrix("K0", K0).double(), _matrix("Kt", Kt).double()
    if not bool(A.any()):
        raise ValueError("K0 is zero: nothing can be measured relative to it.")
    return A, B


# ---------------------------------------------------------------------- change


def relative_distance(K0: Tensor, Kt: Tensor) -> Tensor:
    r"""Return :math:`\|K_t - K_0\|_F / \|K_0\|_F`.

    Args:
        K0: Kernel of reference, ``[N, M]`` or ``[N, M, C, C']``: also that of two sets of data.
        Kt: The other one, of the same shape.

    Returns:
        The distance, a number without unit.

    Raises:
        ValueError: If the shapes differ, an entry is not finite, or K0 is zero.

    Example:
        >>> float(relative_distance(torch.eye(3), 3 * torch.eye(3)))
        2.0
    """
    A, B = _pair(K0, Kt)
    return (B - A).norm() / A.norm()


def cosine_distance(K0: Tensor, Kt: Tensor) -> Tensor:
    r"""Return :math:`1 - \langle K_0, K_t \rangle / (\|K_0\|_F \|K_t\|_F)`.

    Unlike `relative_distance` it ignores a change of scale. It is computed as
    :math:`\frac12 \| K_0 / \|K_0\| - K_t / \|K_t\| \|^2`, accurate for small distances too. This is the
    kernel distance of Fort et al., "Deep learning versus kernel learning" (2020).

    Args:
        K0: Kernel of reference, ``[N, M]`` or ``[N, M, C, C']``: also that of two sets of data.
        Kt: The other one, of the same shape.

    Returns:
        The distance, in [0, 1] for positive semi-definite kernels.

    Raises:
        ValueError: If the shapes differ, an entry is not finite, or a kernel is zero.

    Example:
        >>> float(cosine_distance(torch.eye(4), torch.diag(torch.tensor([3.0, 0.0, 0.0, 0.0]))))
        0.5
    """
    A, B = _pair(K0, Kt)
    if not bool(B.any()):
        raise ValueError("Kt is zero: it has no direction.")
    return (A / A.norm() - B / B.norm()).square().sum() / 2


def principal_angles(K0: Tensor, Kt: Tensor, k: int) -> Tensor:
    r"""Return the angles between the spaces that the k leading eigenvectors of two kernels span.

    With orthonormal bases :math:`U_0, U_t` the cosines are the singular values of
    :math:`U_0^T U_t`, and the sines those of :math:`U_t - U_0 U_0^T U_t`; each angle is taken from the
    one that determines it well (Björck & Golub 1973, "Numerical methods for computing angles between
    linear subspaces"): the cosine alone would lose all angles below 1e-8.

    Args:
        K0: A kernel, ``[N, N]`` or ``[N, N, C, C]``.
        Kt: The other one, of the same shape.
        k: Dimension of the spaces.

    Returns:
        k angles in radians, ascending, in [0, pi/2].

    Raises:
        ValueError: If the shapes differ, a kernel is not symmetric positive semi-definite, k is not
            between 1 and the kernels' dimension, or the k-th and the next eigenvalue of a kernel
            agree up to rounding, so that the space is not determined.

    Example:
        >>> K0, Kt = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([3.0, 1.0, 2.0]))
        >>> principal_angles(K0, Kt, k=2)
        tensor([0.0000, 1.5708], dtype=torch.float64)
    """
    _pair(K0, Kt)
    U0, Ut = _leading("K0", K0, k), _leading("Kt", Kt, k)
    inner = U0.mT @ Ut
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(Ut - U0 @ inner).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin()).clamp(max=pi / 2)


def _leading(name: str, K: Tensor, k: int) -> Tensor:
    """Return an orthonormal basis of the k leading eigenvectors, ``[d, k]``."""
    values, basis = eigenpairs(name, K)
    d = len(values)
    if not 1 <= k <= d:
        raise ValueError(f"principal_angles: k={k!r}; expected 1 <= k <= {d}, the kernels' dimension.")
    if k < d:
        above, below = float(values[d - k]), float(values[d - k - 1])
        if above - below <= d * torch.finfo(K.dtype).eps * float(values[-1]):
            raise ValueError(
                f"{name}: eigenvalues {k} and {k + 1} agree up to rounding ({above:.6g}, {below:.6g}), "
                f"so that its {k} leading eigenvectors span no particular space. Choose another k."
            )
    return basis[:, d - k :]


# ---------------------------------------------------------------------- what the kernel favours


def target_alignment(K: Tensor, Y: Tensor, center: bool = False) -> Tensor:
    r"""Return the alignment of a kernel with targets.

    .. math:: \frac{\langle K, Y Y^T \rangle}{\|K\|_F \, \|Y Y^T\|_F}

    (Cristianini et al. 2001, "On kernel-target alignment"). ``center`` replaces K and
    :math:`Y Y^T` by :math:`H K H` and :math:`H Y Y^T H` with :math:`H = I - 1 1^T / N`, over the data
    and separately for each output (Cortes, Mohri & Rostamizadeh 2012, "Algorithms for learning kernels
    based on centered alignment"): a constant in the kernel or in the targets then counts for nothing.

    Args:
        K: Kernel ``[N, N]``, the same for all outputs (or their sum), or ``[N, N, C, C]``. In the
            second case :math:`Y Y^T` is :math:`y y^T` of ``y = Y.flatten()``.
        Y: Targets, ``[N]`` or ``[N, C]``; one-hot vectors for classes.
        center: Whether to centre.

    Returns:
        The alignment, in [0, 1] as K is positive semi-definite: 1 if K is a multiple of
        :math:`Y Y^T`.

    Raises:
        ValueError: If K is not symmetric, the shapes do not fit, Y holds integers, or one of the two
            is zero (after centring).

    Example:
        >>> y = torch.tensor([1.0, -1.0, 1.0])
        >>> round(float(target_alignment(torch.outer(y, y), y)), 6)
        1.0
        >>> round(float(target_alignment(torch.eye(3), y)), 6)  # 1 / sqrt(3)
        0.57735
    """
    M = symmetric_matrix("K", K)
    Y = _targets(K, Y)
    if center:
        C = len(M) // len(K)
        M = _centered(_centered(M, C).mT, C)
        Y = Y - Y.mean(0)
    if K.dim() == 4:
        Y = Y.reshape(-1, 1)
    # <K, Y Y^T> = tr Y^T K Y, and |Y Y^T| = |Y^T Y|: nothing of N x N is formed
    size = M.norm() * (Y.mT @ Y).norm()
    if not float(size) > 0:
        after = " after centring" if center else ""
        raise ValueError(f"target_alignment: the kernel or the targets are zero{after}.")
    return (Y * (M @ Y)).sum() / size


def _targets(K: Tensor, Y: Tensor) -> Tensor:
    """Return the targets of a kernel in float64, ``[N, C]``."""
    if not Y.is_floating_point():
        raise ValueError(
            f"target_alignment: Y is of {Y.dtype}; expected real numbers. Labels of classes have to be "
            "made one-hot vectors: torch.nn.functional.one_hot(labels).double()."
        )
    fits = Y.dim() in (1, 2) and len(Y) == len(K)
    Y2 = Y[:, None] if Y.dim() == 1 else Y
    if not fits or (K.dim() == 4 and Y2.shape[1] != K.shape[2]):
        raise ValueError(
            f"target_alignment: Y has shape {tuple(Y.shape)}, which does not fit the kernel's "
            f"{tuple(K.shape)}; expected [N] or [N, C]."
        )
    check_finite("Y", Y)
    return Y2.double()


def _centered(M: Tensor, C: int) -> Tensor:
    """Subtract the mean over data from the rows of ``[N C, d]``, output by output."""
    M = M.unflatten(0, (-1, C))
    return (M - M.mean(0)).flatten(0, 1)


# ---------------------------------------------------------------------- the kernel regime


def smallest_eigenvalue(K: Tensor) -> Tensor:
    r"""Return :math:`\lambda_{\min}(K)`, the rate of a kernel's slowest direction.

    Under gradient flow on half the sum of squared residuals r, :math:`\dot r = -K r`: the residuals
    fall at least like :math:`e^{-\lambda_{\min} t}` while K stays what it is.

    Args:
        K: Kernel, ``[N, N]`` or ``[N, N, C, C]``.

    Returns:
        The eigenvalue; zero if it is below 8 eps times the largest, with eps that of K's data type
        (a kernel that was computed in float32 has noise of that size), and so always where there are
        more residuals than parameters.

    Raises:
        ValueError: If K is not a finite, symmetric and positive semi-definite kernel.

    Example:
        >>> float(smallest_eigenvalue(torch.tensor([[2.0, 1.0], [1.0, 2.0]])))
        1.0
    """
    return eigenvalues("K", K)[0]


def jacobian_distance(K00: Tensor, Ktt: Tensor, Kt0: Tensor, norm: str = "spectral") -> Tensor:
    r"""Return :math:`\|J_t - J_0\|`, the distance of two Jacobians known by their kernels.

    .. math:: (J_t - J_0) (J_t - J_0)^T = K_{tt} + K_{00} - K_{t0} - K_{t0}^T

    Its largest eigenvalue is the square of the spectral norm, its trace that of the Frobenius norm. The
    right-hand side cancels: distances below :math:`\sqrt\epsilon \|J\|` are rounding (1e-8 relative in
    float64, 3e-4 in float32).

    Args:
        K00: :math:`J_0 J_0^T`, ``[N, N]`` or ``[N, N, C, C]``.
        Ktt: :math:`J_t J_t^T`, of the same shape.
        Kt0: :math:`J_t J_0^T`, of the same shape, in general not symmetric. (It or its transpose: they
            enter alike.)
        norm: "spectral" or "frobenius".

    Returns:
        The distance, in units of outputs per parameter.

    Raises:
        ValueError: If the shapes differ, an entry is not finite, ``norm`` is unknown, or the three are
            not kernels of two Jacobians: the right-hand side is indefinite.

    Example:
        >>> J0, Jt = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> float(jacobian_distance(J0 @ J0.T, Jt @ Jt.T, Jt @ J0.T))
        3.0
    """
    if norm not in ("spectral", "frobenius"):
        raise ValueError(f'jacobian_distance: norm={norm!r}; expected "spectral" or "frobenius".')
    if not K00.shape == Ktt.shape == Kt0.shape:
        raise ValueError(
            "jacobian_distance: the kernels are of different data or outputs; their shapes are "
            f"{tuple(K00.shape)}, {tuple(Ktt.shape)} and {tuple(Kt0.shape)}."
        )
    A, B = symmetric_matrix("K00", K00), symmetric_matrix("Ktt", Ktt)
    cross = _matrix("Kt0", Kt0).double()
    values = torch.linalg.eigvalsh(A + B - cross - cross.mT)
    size = max(float(A.diagonal().sum()), float(B.diagonal().sum()))
    widest = max(torch.finfo(K.dtype).eps for K in (K00, Ktt, Kt0))
    if float(values[0]) < -32 * widest * size:
        raise ValueError(
            "jacobian_distance: Ktt + K00 - Kt0 - Kt0^T is indefinite (its smallest eigenvalue is "
            f"{float(values[0]):.3g}), so Kt0 is not the kernel between the two sets of features."
        )
    return (values[-1] if norm == "spectral" else values.sum()).clamp(min=0).sqrt()


def convergence_constant(K00: Tensor, Ktt: Tensor, Kt0: Tensor, norm: str = "spectral") -> Tensor:
    r"""Return how far the Jacobian moved, relative to what the initial kernel can bear.

    .. math:: C' = 3 \, \|J_t - J_0\| \,/\, \sqrt{\lambda_{\min}(K_{00})}

    What :math:`C' \le 1` means, if it holds *all the way* from 0 to t under gradient flow on half the
    sum of squared residuals r: no singular value of the Jacobian moved by more than a third of the
    smallest initial one :math:`\sigma_0 = \sqrt{\lambda_{\min}(K_{00})}` (Weyl), so
    :math:`\lambda_{\min}(K_{ss}) \ge \frac49 \lambda_{\min}(K_{00})`, and by :math:`\dot r = -K_{ss} r`

    .. math:: \|r_s\| \le e^{-\frac49 \lambda_{\min}(K_{00}) s} \|r_0\|, \qquad
        \|\theta_s - \theta_0\| \le \tfrac{3}{2 \sigma_0} \|r_0\|:

    linear convergence to zero loss close to the start, for which the initial kernel alone vouches. This
    is the *kernel regime* of such proofs: Du et al. 2019, "Gradient descent provably optimizes
    over-parameterized neural networks", keep :math:`\lambda_{\min}` above half its initial value by
    large width; Jacot et al. 2018, "Neural tangent kernel", show that in NTK parametrisation the
    kernel stays constant in the limit of infinite width; Chizat, Oyallon & Bach 2019, "On lazy
    training in differentiable programming", get there at any width by a large scale of the output.

    What it does *not* mean: a value above one proves nothing; networks train well there, but the proof
    by the initial kernel no longer applies. And one value is that of one moment t: it can refute the
    condition, while to establish it one needs the maximum along the path.

    Args:
        K00: :math:`J_0 J_0^T` at the training data, ``[N, N]`` of a single output or
            ``[N, N, C, C]``. (A kernel summed over outputs is that of another problem.)
        Ktt: :math:`J_t J_t^T`, of the same shape.
        Kt0: :math:`J_t J_0^T`, of the same shape.
        norm: "spectral", or "frobenius" for the larger Frobenius norm of the change.

    Returns:
        The constant, a number without unit; infinite if :math:`K_{00}` is singular (see
        `smallest_eigenvalue`): nothing vouches for convergence then.

    Raises:
        ValueError: As `jacobian_distance`.

    Example:
        >>> J0, Jt = 2 * torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 2.5]])
        >>> float(convergence_constant(J0 @ J0.T, Jt @ Jt.T, Jt @ J0.T))
        0.75
    """
    distance = jacobian_distance(K00, Ktt, Kt0, norm)
    lowest = eigenvalues("K00", K00)[0]
    return 3 * distance / lowest.sqrt() if float(lowest) > 0 else torch.full_like(distance, inf)
