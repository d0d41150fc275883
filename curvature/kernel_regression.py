r"""Regression with a given kernel: what the linearisation of a network learns."""

from __future__ import annotations

from math import inf, isnan

import torch
from torch import Tensor

from curvature.decomposition import check_finite
from curvature.kernel import as_matrix, eigenpairs, symmetric_matrix

# Eigenvalues below these times the largest count as zero, by the kernel's data type.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class KernelRegression:
    r"""Kernel regression, in the eigenbasis of the training kernel K.

    .. math:: f(x) = f_0(x) + K(x, X) (K + \nu I)^{-1} (y - f_0(X))

    With K the neural tangent kernel of a network at parameters :math:`\theta_0` and :math:`f_0` its
    outputs there, this is the linearised network :math:`f_0(x) + J(x) (\theta - \theta_0)`, fitted by
    least squares with the penalty :math:`\frac\nu2 \|\theta - \theta_0\|^2` on
    :math:`\frac12 \sum_n \|f(x_n) - y_n\|^2`; for :math:`\nu = 0` the interpolation that gradient flow
    from :math:`\theta_0` ends at (Jacot et al. 2018; Lee et al. 2019, "Wide neural networks of any depth
    evolve as linear models under gradient descent"). It is also the posterior mean of a Gaussian process
    with mean :math:`f_0`, covariance K, and noise of variance :math:`\nu`.

    Without noise the inverse is a pseudo-inverse: eigenvalues of at most ``rtol`` times the largest
    count as zero, and targets are not fitted along their eigenvectors. All is computed in float64.

    Args:
        K: Kernel of the training inputs X: ``[N, N]``, the same for all outputs, which then do not
            influence each other; or ``[N, N, C, C]`` (the full neural tangent kernel).
        targets: y, ``[N]`` or ``[N, C]``; ``[N, C]`` if K is full.
        noise: :math:`\nu`, the variance of the noise of a target. Not divided by N: where a loss is a
            mean over N data of half the squares with a penalty :math:`\frac\lambda2 \|.\|^2`, pass
            :math:`N \lambda`.
        prior: :math:`f_0(X)`, shaped like the targets; zero by default.
        rtol: Relative cut for eigenvalues. Default by K's data type: 1e-12 in float64, 1e-6 in float32,
            1e-2 below, the noise of kernels computed in it.

    Attributes:
        values: Eigenvalues of K, ascending, zero where cut; ``[N]`` or ``[N C]``.
        vectors: Eigenvectors as columns.

    Raises:
        ValueError: If K is not a symmetric positive semi-definite kernel, shapes do not fit, entries are
            not finite, targets are integers, or ``noise`` or ``rtol`` is negative.

    Example:
        >>> X, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.5])
        >>> fit = KernelRegression(X @ X.T, y)  # least squares through the origin: slope 6 / 5
        >>> fit.predict(torch.tensor([[10.0]]) @ X.T).float()
        tensor([12.])
    """

    def __init__(
        self,
        K: Tensor,
        targets: Tensor,
        noise: float = 0.0,
        prior: Tensor | None = None,
        rtol: float | None = None,
    ):
        self.noise = _number("noise", noise)
        cut = RTOL.get(K.dtype, 1e-6) if rtol is None else _number("rtol", rtol)
        self.values, self.vectors = eigenpairs("K", K)
        self.values = self.values.masked_fill(self.values <= cut * self.values[-1], 0.0)
        self.outputs = K.shape[2] if K.dim() == 4 else None
        self._data = len(K)
        y = self._outputs("targets", targets, self._data)
        self._shape = y.shape[1:]
        self._has_prior = prior is not None
        if prior is not None:
            y = y - self._like_targets("prior", prior, self._data)
        # the residuals in the eigenbasis, [N, C] or [N C, 1]
        self._residuals = self.vectors.mT @ self._columns(y)

    def predict(
        self,
        K_cross: Tensor,
        prior: Tensor | None = None,
        K_test: Tensor | None = None,
        time: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""Predict at M test inputs.

        With ``time`` t, the outputs after gradient flow on :math:`\frac12 \sum_n \|f(x_n) - y_n\|^2` for
        that time (Lee et al. 2019), the limit :math:`t = \infty` being the default:

        .. math:: f_t(x) = f_0(x) + K(x, X) K^{-1} (I - e^{-K t}) (y - f_0(X)).

        With ``K_test`` the covariance too, that of the Gaussian process with covariance K,

        .. math:: K_{**} - K_{*X} (K + \nu I)^{-1} K_{X*},

        or after time t

        .. math:: K_{**} - K_{*X} K^{-1} (I - e^{-2 K t}) K_{X*}.

        The latter is the covariance of :math:`f_t` over starts :math:`\theta_0 + \delta` with
        :math:`\delta \sim N(0, I)` of the linear model with *fixed* Jacobian, whose outputs at the start
        have covariance K. It is not that over random initialisations of a network: its outputs have
        the covariance of the network's Gaussian process (NNGP), another kernel, and their covariance at
        time t (Lee et al. 2019) needs both kernels.

        Args:
            K_cross: Kernel between test and training inputs, ``[M, N]`` or ``[M, N, C, C]``.
            prior: :math:`f_0` at the test inputs, ``[M]`` or ``[M, C]``; required if the regression has
                a prior.
            K_test: Kernel of the test inputs with themselves, ``[M, M]`` or ``[M, M, C, C]``.
            time: t, at least zero, in units of one over those of K. (Gradient descent with step size h
                on half the *sum* of squares: h times the number of steps, if h is well below
                :math:`2 / \lambda_{\max}(K)`; on a mean over N data divided by N.)

        Returns:
            The means, ``[M]`` or ``[M, C]``; with ``K_test`` also the covariance, shaped like it
            (without noise of new targets). If K is ``[N, N]``, the outputs are independent and share
            the ``[M, M]``.

        Raises:
            ValueError: If shapes do not fit, entries are not finite, only one of regression and
                prediction has a prior, ``time`` is negative, or there is both noise and ``time``.
        """
        g = self._inverse(time)
        cross = self._cross(K_cross) @ self.vectors
        M = len(K_cross)
        mean = (cross @ (g[:, None] * self._residuals)).reshape(M, *self._shape)
        if (prior is not None) != self._has_prior:
            which = "the prediction" if self._has_prior else "the regression"
            raise ValueError(
                f"KernelRegression: {which} lacks a prior. Pass the network's initial outputs both at "
                "the training inputs (to the constructor) and at the test inputs (to predict), or never."
            )
        if prior is not None:
            mean = mean + self._like_targets("prior", prior, M)
        if K_test is None:
            return mean
        return mean, self._covariance(cross, K_test, M, time)

    def _covariance(self, cross: Tensor, K_test: Tensor, M: int, time: float | None) -> Tensor:
        """Return the covariance; ``cross`` is in the eigenbasis."""
        if (K_test.dim() == 4) != (self.outputs is not None) or len(K_test) != M:
            wanted = (
                f"[{M}, {M}]" if self.outputs is None else f"[{M}, {M}, {self.outputs}, {self.outputs}]"
            )
            raise ValueError(
                f"KernelRegression: K_test has shape {tuple(K_test.shape)}; expected {wanted}."
            )
        full = symmetric_matrix("K_test", K_test)
        if len(full) != len(cross):
            raise ValueError(
                f"KernelRegression: K_test has shape {tuple(K_test.shape)}, for another number of "
                f"outputs than {self.outputs}."
            )
        g = self._inverse(None if time is None else 2 * time)
        found = full - (cross * g) @ cross.mT
        found = (found + found.mT) / 2
        if self.outputs is None:
            return found
        C = self.outputs
        return found.reshape(M, C, M, C).transpose(1, 2)

    def _inverse(self, time: float | None) -> Tensor:
        """Return what takes the place of one over the eigenvalues, ``[d]``."""
        if time is None:
            time = inf
        elif self.noise:
            raise ValueError(
                f"KernelRegression: time={time!r} with noise={self.noise!r}; gradient flow is that "
                "without noise."
            )
        else:
            time = _number("time", time, finite=False)
        if self.noise:
            return 1 / (self.values + self.noise)
        # a positive semi-definite kernel of all inputs has nothing in K_cross along eigenvectors of zero
        some = self.values > 0
        v = torch.where(some, self.values, 1.0)
        return torch.where(some, -torch.expm1(-v * time) / v, 0.0)

    # ------------------------------------------------------------------ shapes

    def _cross(self, K: Tensor) -> Tensor:
        """Return the cross kernel as a matrix in float64."""
        C, N = self.outputs, self._data
        tail = (N,) if C is None else (N, C, C)
        if tuple(K.shape[1:]) != tail:
            wanted = ", ".join(["M", *map(str, tail)])
            raise ValueError(
                f"KernelRegression: K_cross has shape {tuple(K.shape)}; expected [{wanted}], test "
                "inputs first."
            )
        check_finite("K_cross", K)
        return as_matrix(K).double()

    def _columns(self, y: Tensor) -> Tensor:
        """Return outputs as columns: ``[N, C]`` for a kernel of all outputs, else ``[N C, 1]``."""
        return y.reshape(len(y), -1) if self.outputs is None else y.reshape(-1, 1)

    def _outputs(self, name: str, y: Tensor, count: int) -> Tensor:
        if not y.is_floating_point():
            raise ValueError(
                f"KernelRegression: {name} are of {y.dtype}; expected real numbers. Labels of classes "
                "have to be made one-hot vectors: torch.nn.functional.one_hot(labels).double()."
            )
        C = self.outputs
        fits = y.dim() in (1, 2) if C is None else y.dim() == 2 and y.shape[1] == C
        if not fits or len(y) != count:
            wanted = f"[{count}] or [{count}, C]" if C is None else f"[{count}, {C}]"
            raise ValueError(
                f"KernelRegression: {name} have shape {tuple(y.shape)}; expected {wanted}, as the "
                "kernel's data and outputs."
            )
        check_finite(name, y)
        return y.double()

    def _like_targets(self, name: str, y: Tensor, count: int) -> Tensor:
        if tuple(y.shape) != (count, *self._shape):
            raise ValueError(
                f"KernelRegression: {name} has shape {tuple(y.shape)}; expected "
                f"{(count, *self._shape)}, like the targets."
            )
        check_finite(name, y)
        return y.double()


def _number(name: str, value: float, finite: bool = True) -> float:
    number = float(value)
    if isnan(number) or number < 0 or (finite and number == inf):
        kind = "a finite number" if finite else "a number"
        raise ValueError(f"KernelRegression: {name}={value!r}; expected {kind} >= 0.")
    return number
