"""Low-rank curvature and the neural tangent kernel by their dense definitions, by plain autograd.

Rows of matrices follow the named parameters, each flattened row-major. The loss is `c r sum_nt l_nt`
with a factor c that the user may have put in front of it. Datum n's own loss, `l_n := N c r sum_t l_nt`,
is scaled so that the mean over n is the total.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from oracle import _jacobian, jacobian, loss_scale, output_hessian, per_sample_grads
from torch import Tensor, nn

if TYPE_CHECKING:
    from models import Problem


@dataclass
class Dense:
    """What a generalised Gauss-Newton matrix is made of.

    Attributes:
        names: Names of the parameters.
        J: Jacobian of each datum's logits, `[N, D, P]`.
        H: Hessian of the loss with respect to each datum's logits, reduction included, `[N, D, D]`.
        slopes: Gradients of `l_n`, `[N, P]`; their mean is the gradient of the loss.
        scale: `c r`.
    """

    names: list[str]
    J: Tensor
    H: Tensor
    slopes: Tensor
    scale: float

    @property
    def N(self) -> int:
        """Number of data."""
        return len(self.J)

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss, `[P]`."""
        return self.slopes.mean(0)

    def matrix(self, subset: Sequence[int] | None = None) -> Tensor:
        """`sum_n J_n^T H_n J_n`, of some data times `N / |subset|`, `[P, P]`."""
        data = list(range(self.N)) if subset is None else list(subset)
        total = sum(self.J[n].T @ self.H[n] @ self.J[n] for n in data)
        return self.N / len(data) * total

    def curvatures(self, E: Tensor, subset: Sequence[int] | None = None) -> Tensor:
        """`e_k^T (N G_n) e_k` for the rows of `E[K, P]`; G_n is datum n's share; `[|subset|, K]`."""
        data = list(range(self.N)) if subset is None else list(subset)
        JE = torch.einsum("ndp,kp->nkd", self.J[data], E)
        return self.N * torch.einsum("nkd,nde,nke->nk", JE, self.H[data], JE)

    def gradients(self, E: Tensor) -> Tensor:
        """`e_k . grad l_n` for the rows of `E[K, P]`, `[N, K]`."""
        return self.slopes @ E.T

    def columns(self, S: Tensor) -> Tensor:
        """`J_n^T S_vn` for a root or samples `S[V, N, D]`, `[V, N, P]`."""
        return torch.einsum("vnd,ndp->vnp", S, self.J)

    def gradient_columns(self) -> Tensor:
        """Columns of the empirical Fisher `c r sum_n g_n g_n^T`, g_n of `sum_t l_nt`; `[1, N, P]`."""
        unscaled = self.slopes / (self.N * self.scale)
        return self.scale**0.5 * unscaled[None]

    def of(self, names: Sequence[str], shapes: dict[str, torch.Size]) -> Dense:
        """The same for some of the parameters, in order of `names`."""
        sizes = [shapes[name].numel() for name in self.names]
        rows = dict(zip(self.names, torch.arange(sum(sizes)).split(sizes), strict=True))
        index = torch.cat([rows[name] for name in names])
        return replace(self, names=list(names), J=self.J[..., index], slopes=self.slopes[:, index])


def _rows(t: Tensor, lead: int) -> Tensor:
    """A tensor whose axes behind the first few, maybe none, are one."""
    return t.reshape(*t.shape[:lead], -1)


def dense(problem: Problem, names: Sequence[str] | None = None, factor: float = 1.0) -> Dense:
    """The dense quantities of a problem.

    Args:
        problem: The problem, not extended.
        names: Names of the parameters; all trainable ones by default.
        factor: The loss is multiplied with it.
    """
    names = list(names or [k for k, p in problem.model.named_parameters() if p.requires_grad])
    J, grads = jacobian(problem, names), per_sample_grads(problem)
    return Dense(
        names,
        torch.cat([_rows(J[name], 2) for name in names], dim=2).detach(),
        factor * output_hessian(problem),
        factor * problem.batch_size * torch.cat([_rows(grads[name], 1) for name in names], dim=1),
        factor * loss_scale(problem),
    )


def root(problem: Problem, H: Tensor) -> Tensor:
    """The documented root `H_n = sum_v S_vn S_vn^T`, `[V, N, D]`, of the Hessian of a problem's loss.

    Otherwise than for cross-entropy, column d is the root of the diagonal's entry d. Of C classes, the
    columns at position t are `sqrt(w_t q_tc) (e_c - q_t)`, reflected such that the last one vanishes.
    """
    if not isinstance(problem.loss_fn, nn.CrossEntropyLoss):
        return torch.diag_embed(H.diagonal(dim1=1, dim2=2).sqrt()).transpose(0, 1)
    logits, N = problem.forward().detach(), problem.batch_size
    C = logits.shape[1]
    entry = torch.arange(logits.numel()).view(logits.shape).movedim(1, -1).reshape(N, -1, C)
    q = logits.softmax(1).flatten()[entry]  # [N, T, C]
    place = entry - entry.flatten(1).min(1).values[:, None, None]
    eye, k = torch.eye(C).to(q), C - 1
    S = torch.zeros(place.shape[1] * k, N, place[0].numel(), dtype=logits.dtype)
    for n in range(N):
        for t, at in enumerate(place[n]):
            p, block = q[n, t], H[n][at][:, at]
            w = block.trace() / (1 - p.square().sum())
            rows = (w * p).sqrt()[:, None] * (eye - p)
            mirror = p.sqrt() + eye[-1]
            reflected = rows - 2 * mirror.outer(mirror @ rows) / mirror.square().sum()
            S[t * k : (t + 1) * k, n, at] = reflected[:-1]
    return S


def centered(V: Tensor) -> Tensor:
    """Columns `[V, N, P]` minus their mean over the data."""
    return V - V.mean(1, keepdim=True)


def outer(V: Tensor) -> Tensor:
    """`sum_vn` of the outer products of columns `[V, N, P]`, `[P, P]`."""
    rows = V.flatten(0, 1)
    return rows.T @ rows


def descending(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix, descending, and eigenvectors as rows `[K, P]`."""
    values, vectors = torch.linalg.eigh(M)
    return values.flip(0), vectors.T.flip(0)


def clusters(values: Tensor, gap: float) -> list[list[int]]:
    """Indices of descending values that differ by less than `gap` from one to the next, together."""
    found = [[0]] if len(values) else []
    for k in range(1, len(values)):
        if values[k - 1] - values[k] < gap:
            found[-1].append(k)
        else:
            found.append([k])
    return found


def newton_step(gamma: Tensor, curvature: Tensor, delta: float | Tensor, E: Tensor) -> Tensor:
    """`- sum_k mean_n gamma_nk / (mean_n lambda_nk + delta_k) e_k`, `[P]`."""
    return -(gamma.mean(0) / (curvature.mean(0) + delta)) @ E


def noise_damping(gamma: Tensor, values: Tensor, base: float, strength: float) -> Tensor:
    """`base + strength lambda_k Var_n(gamma_nk) / (N mean_n(gamma_nk)^2)`, `[K]`."""
    return base + strength * values * gamma.var(0) / (len(gamma) * gamma.mean(0).square())


# -- the neural tangent kernel ---------------------------------------------------------------------


def output_jacobian(f: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Jacobian of the outputs of each datum, flattened, by parameters, `[N, C, P]`."""
    outputs = f(x)
    rows = _jacobian(outputs.flatten(), list(parameters))
    return torch.cat([_rows(J, 1) for J in rows], dim=1).unflatten(0, (len(outputs), -1)).detach()


def kernel(J1: Tensor, J2: Tensor) -> Tensor:
    """`K[n, m, c, d]` of two Jacobians `[N, C, P]` and `[M, D, P]`."""
    return torch.einsum("ncp,mdp->nmcd", J1, J2)
