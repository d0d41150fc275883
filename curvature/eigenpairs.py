r"""Eigenpairs of low-rank curvature, and what each datum contributes along the eigenvectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvature.decomposition import check_damping
from curvature.mixed import Mixed

if TYPE_CHECKING:
    from curvature.lowrank import LowRank

# From gamma [N, K] and lambda [N, K] to dampings [K].
DampingRule = Callable[[Tensor, Tensor], Tensor]


class Eigenvectors(Mixed):
    r"""Orthonormal eigenvectors E ``[P, K]`` of :math:`V V^T`: combinations :math:`V C` of V's columns.

    They are never formed unless `explicit` is called: products go through V.
    :math:`C = U \Lambda^{-1/2}` with eigenvectors U of the Gram matrix :math:`V^T V`.

    Args:
        factor: V ``[P, q]``.
        weights: C ``[q, K]``.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Eigenvectors(K={self.columns}, shapes={[tuple(s) for s in self.shapes]})"

    def project(self, *vectors: Tensor) -> Tensor:
        r"""Return :math:`E^T w`: coordinates ``[k, K]`` of vectors w, one ``[k, *shape]`` per parameter.

        Raises:
            ValueError: If the vectors are not shaped like that.
        """
        shapes = [tuple(s) for s in self.shapes]
        found = [tuple(t.shape) for t in vectors]
        if [s[1:] for s in found] != shapes or len({s[:1] for s in found}) != 1 or () in found:
            raise ValueError(
                f"Eigenvectors.project takes one tensor [k, *shape] per parameter, for shapes {shapes}, "
                f"got {found}. Give a single vector an axis of length 1."
            )
        return super().project(*vectors)

    def apply(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        r"""Return :math:`E c` for the rows c of ``coefficients[k, K]``, ``[k, *shape]`` per parameter.

        Raises:
            ValueError: If the coefficients are not shaped like that.
        """
        if coefficients.dim() != 2 or coefficients.shape[1] != self.columns:
            raise ValueError(
                f"Eigenvectors.apply takes coefficients [k, {self.columns}], one per eigenvector, got "
                f"shape {tuple(coefficients.shape)}."
            )
        return super().apply(coefficients)

    def explicit(self) -> tuple[Tensor, ...]:
        r"""Return all eigenvectors as parameter-shaped tensors ``[K, *shape]``: K P entries."""
        return super().explicit()


class Eigenpairs:
    r"""Some eigenpairs :math:`\lambda_k, e_k` of :math:`M = V V^T`; made by `LowRank.eigh`.

    With eigenvectors u_k of the Gram matrix :math:`V^T V`, :math:`e_k = V u_k / \sqrt{\lambda_k}`.

    Args:
        block: M.
        values: Eigenvalues ``[K]``, descending, all positive; in the units of M.
        coefficients: U ``[q, K]``, the Gram matrix' eigenvectors as columns.

    References:
        Dangel, Tatzel & Hennig (2022), ViViT: Curvature access through the generalized Gauss-Newton's
        low-rank structure.

    Example:
        >>> from curvature import DenseFactor, LowRank
        >>> V = DenseFactor(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))  # one column per datum
        >>> slopes = DenseFactor(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> pairs = LowRank(V, owner=torch.tensor([0, 1]), data=2, slopes=slopes).eigh()
        >>> pairs.directional_curvatures()  # their means are the eigenvalues
        tensor([[18.,  0.],
                [ 0.,  2.]], dtype=torch.float64)
        >>> pairs.newton_step(damping=1.0)[0] + 0  # - 1 / (9 + 1)
        tensor([-0.1000,  0.0000])
    """

    __slots__ = ("_gradients", "_vectors", "block", "coefficients", "values")

    def __init__(self, block: LowRank, values: Tensor, coefficients: Tensor):
        self.block, self.values, self.coefficients = block, values, coefficients
        self._vectors: Eigenvectors | None = None
        self._gradients: Tensor | None = None

    def __len__(self) -> int:
        """Return the number K of pairs."""
        return len(self.values)

    def __repr__(self) -> str:
        size = f"largest {float(self.values[0]):.3g}, " if len(self) else ""
        return f"Eigenpairs(K={len(self)}, {size}P={self.block.dim})"

    @property
    def vectors(self) -> Eigenvectors:
        """The eigenvectors, implicit."""
        if self._vectors is None:
            weights = self.coefficients / self.values.sqrt()
            self._vectors = Eigenvectors(self.block.factor, weights)
        return self._vectors

    def directional_gradients(self) -> Tensor:
        r"""Return the slopes of the data's losses along the eigenvectors, ``[N, K]``.

        .. math:: \gamma_{nk} = e_k^T \nabla \ell_n, \qquad \ell_n = N r \sum_t \ell_{nt}

        whose mean over n is the slope of the total loss (r: the factor of its reduction). No
        eigenvector is formed: :math:`\gamma = (V^T S)^T U \Lambda^{-1/2}` with the gradients S.

        Raises:
            ValueError: If the block has no gradients of the data.
        """
        if self._gradients is None:
            cross = self.block.slope_products("directional_gradients")
            self._gradients = cross.mT @ (self.coefficients / self.values.sqrt())
        return self._gradients.clone()

    def directional_curvatures(self) -> Tensor:
        r"""Return the curvatures of the data's losses along the eigenvectors, ``[N, K]``.

        .. math:: \lambda_{nk} = e_k^T M_n e_k = N \lambda_k \sum_{v} u_{k,vn}^2

        with M_n the curvature of :math:`\ell_n`, so that the mean over n is :math:`\lambda_k`. The sum
        is over the columns of datum n: no further products.

        Raises:
            ValueError: If it is not known which column is whose.
        """
        owner, N = self.block.owner, self.block.data
        if owner is None:
            raise ValueError(
                "Eigenpairs.directional_curvatures needs to know the datum of each column; this LowRank "
                "has owner=None. Build it with owner [q] and data=N (a sum has them if all terms do)."
            )
        shares = self.coefficients.new_zeros(N, len(self))
        shares.index_add_(0, owner, self.coefficients.square())
        return N * self.values * shares

    def newton_step(self, damping: float | Tensor | DampingRule = 0.0) -> tuple[Tensor, ...]:
        r"""Return the damped Newton step in the span of these eigenvectors, one tensor per parameter.

        .. math::
            - \sum_k \frac{\frac1N \sum_n \gamma_{nk}}{\frac1N \sum_n \lambda_{nk} + \delta_k} e_k

        Add it to the parameters. With all eigenpairs, no damping and a gradient g in the range of M
        this is :math:`-M^+ g`.

        Args:
            damping: :math:`\delta`, in the units of M: one number; a tensor ``[K]``; or a function of
                gamma ``[N, K]`` and lambda ``[N, K]`` that returns one, such as `noise_damping`. An
                infinite one means no step in that direction.

        Raises:
            ValueError: If the block has no gradients of the data; if the dampings are negative, not
                numbers, or not K; if a function is given and the columns' data are not known.
        """
        gamma = self.directional_gradients()
        delta = self._dampings(damping, gamma)
        step = -gamma.mean(0) / (self.values + delta)  # the mean of lambda_nk is lambda_k
        return tuple(t[0] for t in self.vectors.apply(step[None]))

    def _dampings(self, damping: float | Tensor | DampingRule, gamma: Tensor) -> Tensor | float:
        owner = "Eigenpairs.newton_step"
        if callable(damping) and not isinstance(damping, Tensor):
            damping = damping(gamma, self.directional_curvatures())
            if not isinstance(damping, Tensor):
                raise ValueError(
                    f"{owner}: the damping function returned {type(damping).__name__}; expected a "
                    f"tensor of {len(self)} numbers, one per eigenvector."
                )
        if not isinstance(damping, Tensor) or damping.dim() == 0:
            return check_damping(owner, damping)
        delta = damping.to(self.values)
        if delta.shape != self.values.shape:
            raise ValueError(
                f"{owner}: dampings of shape {tuple(delta.shape)}; expected one number, or "
                f"[{len(self)}]: one per eigenvector."
            )
        if not bool((delta >= 0).all()):
            raise ValueError(
                f"{owner}: {int((~(delta >= 0)).sum())} of {len(self)} dampings are negative or not a "
                "number; expected numbers >= 0 (infinity for no step)."
            )
        return delta


def noise_damping(base: float = 0.0, strength: float = 1.0) -> DampingRule:
    r"""Return a rule that damps directions in which the data disagree about the slope.

    .. math::
        \delta_k = \text{base} + \text{strength} \cdot \lambda_k
        \frac{\operatorname{Var}_n(\gamma_{nk})}{N (\frac1N \sum_n \gamma_{nk})^2}

    with the unbiased variance: the curvature times the squared relative error of the mean slope. At
    strength 1 a step shrinks by :math:`1 / (1 + \text{noise} / \text{signal})`; where the mean slope
    vanishes the damping is infinite and there is no step.

    Args:
        base: Damping of all directions, in the units of the curvature.
        strength: Weight of the noise, without unit.

    Returns:
        A function of gamma ``[N, K]`` and lambda ``[N, K]``, for `Eigenpairs.newton_step`.

    Raises:
        ValueError: If a number is negative or not finite; when called, if there are fewer than two data.

    Example:
        >>> rule = noise_damping()
        >>> rule(torch.tensor([[1.0, -1.0], [3.0, 1.0]]), torch.tensor([[2.0, 5.0], [2.0, 5.0]]))
        tensor([0.5000,    inf])
    """
    base = check_damping("noise_damping: base", base)
    strength = check_damping("noise_damping: strength", strength)

    def rule(gamma: Tensor, curvatures: Tensor) -> Tensor:
        if len(gamma) < 2:
            raise ValueError(
                f"noise_damping: a variance over {len(gamma)} data is not defined; expected at least "
                "two. Use a larger mini-batch, or a constant damping."
            )
        mean = gamma.mean(0)
        error = (gamma - mean).square().sum(0) / (len(gamma) * (len(gamma) - 1))
        # neither slope nor noise: 0 / 0, no reason to damp; strength 0 ignores infinite ratios
        known = (error > 0) & (strength > 0)
        ratio = torch.where(known, error / mean.square(), torch.zeros_like(error))
        return base + strength * curvatures.mean(0) * ratio

    return rule
