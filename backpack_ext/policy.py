r"""Losses of reinforcement learning, with the Hessian diagonals that `HesScale` starts from.

A policy is a distribution of actions given by a network's heads, `Categorical` or `Gaussian`. Losses
of it are scalars with their exact diagonal attached, to be added up like any others:

.. code-block:: python

    from backpack_ext import HesScale, backpack, extend, policy

    mse = extend(nn.MSELoss())
    with backpack(HesScale()):
        logits, values = network(states)  # extended or not
        pi = policy.Categorical(logits)
        loss = policy.log_prob_loss(pi, actions, advantages) - 0.01 * policy.entropy(pi)
        (loss + 0.5 * mse(values, returns)).backward()

===================  =================================================================================
`log_prob_loss`      advantage-weighted log-probability: REINFORCE, actor-critic
`clipped_loss`       the clipped probability ratio of PPO
`entropy`            the entropy, for a bonus
===================  =================================================================================

**Shapes**: leading axes, usually one axis of N data, are written ``[N]``; it may be none or several.
Each entry is one action, with one advantage. **Units**: values and diagonals carry the reduction
(r = 1/N for ``"mean"``, 1 for ``"sum"``), summed over the data. Diagonals may be negative: where
advantages are, the loss is not convex. Without gradients (``torch.no_grad()``) the values are
plain numbers.

Diagonals are exact at the heads. What `HesScale` drops starts there: the entries between the logits
of one datum, and those between a mean and its standard deviation.

**A distribution of your own** is a subclass of `Policy`. Here are actions in the positive numbers,
``log q = log rate - rate a`` with a head for the logarithm z of the rate, so that the derivatives of
log q are ``1 - e^z a`` and ``- e^z a``:

>>> from backpack_ext import HesScale, attach_diagonal, backpack, loss_diagonal
>>> class Exponential(Policy):
...     def __init__(self, log_rate):
...         self.heads = (log_rate,)
...     def log_prob(self, actions):
...         return self.heads[0] - self.heads[0].exp() * actions
...     def derivatives(self, actions):
...         curved = -self.heads[0].detach().exp() * actions
...         return [(1 + curved, curved)]
>>> head, x = torch.nn.Linear(2, 1), torch.tensor([[1.0, 3.0]])
>>> with backpack(HesScale()):
...     pi = Exponential(head(x).squeeze(1))
...     log_prob_loss(pi, torch.tensor([0.5]), torch.tensor([-2.0])).backward()
>>> torch.allclose(head.weight.hesscale, -2 * 0.5 * head(x).exp() * x**2)
True

**A loss of your own**: compute a scalar from tensors of the graph, and tell `attach_diagonal` its
diagonal with respect to them. With the temperature-weighted value ``sum exp(z / T)``, say:

>>> x, T = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), 2.0
>>> with backpack(HesScale()):
...     z = head(x)
...     value = (z / T).exp().sum()
...     attach_diagonal(z, (z / T).exp().detach() / T**2, value).backward()

If the diagonal is not known in closed form, `loss_diagonal` computes it, as exactly, by one
Hessian-vector product for each column of ``z``:

>>> def loss(z):
...     return (z / T).exp().sum()
>>> with backpack(HesScale()):
...     z = head(x)
...     attach_diagonal(z, loss_diagonal(loss, z), loss(z)).backward()
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from backpack_ext.attach import attach_diagonal
from backpack_ext.errors import UnsupportedError
from curvature.decomposition import widen

REDUCTIONS = ("mean", "sum")


class Policy(ABC):
    """A distribution of actions, one for each datum, given by tensors of the graph.

    Attributes:
        heads: The tensors, whose leading axes are the data, ``[N, ...]``. No datum's distribution may
            depend on another's rows.
    """

    heads: tuple[Tensor, ...]

    @abstractmethod
    def log_prob(self, actions: Tensor) -> Tensor:
        """Return ``log q_n(a_n)``, ``[N]``.

        Args:
            actions: One action for each datum.

        Raises:
            ValueError: If their shape does not fit the heads.
        """

    @abstractmethod
    def derivatives(self, actions: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        r"""Return the derivatives of `log_prob` with respect to each entry of each head, detached.

        .. math::
            \frac{\partial \log q_n(a_n)}{\partial z_{nj}}, \qquad
            \frac{\partial^2 \log q_n(a_n)}{\partial z_{nj}^2}

        Args:
            actions: One action for each datum.

        Returns:
            For each head the first and the second derivatives, in the shape of the head.
        """

    def entropy(self) -> Tensor:
        """Return the entropy of each datum's distribution, in nats, ``[N]``.

        Raises:
            UnsupportedError: If the class does not define it.
        """
        raise _no_entropy(self)

    def entropy_diagonals(self) -> Sequence[Tensor]:
        r"""Return :math:`\partial^2 H_n / \partial z_{nj}^2` for each head, in its shape, detached.

        Raises:
            UnsupportedError: If the class does not define it.
        """
        raise _no_entropy(self)


class Categorical(Policy):
    r"""A choice between C actions with probabilities q, the softmax of logits z.

    .. math::
        \frac{\partial \log q_a}{\partial z_j} = [j = a] - q_j, \qquad
        \frac{\partial^2 \log q_a}{\partial z_j^2} = - q_j (1 - q_j), \qquad
        \frac{\partial^2 H}{\partial z_j^2}
        = - q_j \big( (1 - 2 q_j)(\log q_j + H) + 1 - q_j \big)

    Actions that are not available may have a logit of minus infinity.

    Args:
        logits: z, ``[N, C]``.

    Raises:
        ValueError: If they have no axis.

    Example:
        >>> pi = Categorical(torch.tensor([[0.0, 0.0], [0.0, 9.0]]))
        >>> pi.log_prob(torch.tensor([1, 1])).exp()
        tensor([0.5000, 0.9999])
    """

    def __init__(self, logits: Tensor):
        if logits.dim() == 0:
            raise ValueError("Categorical: the logits are a scalar; expected [N, C].")
        self.heads = (logits,)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return a random action for each datum, integers ``[N]``."""
        q = self.heads[0].detach().softmax(-1)
        drawn = torch.multinomial(q.reshape(-1, q.shape[-1]), 1, generator=generator)
        return drawn.view(q.shape[:-1])

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return ``log q_a``, ``[N]``.

        Args:
            actions: Indices of the actions, integers ``[N]``.

        Raises:
            TypeError: If they are no integers.
            ValueError: If they have another shape.
        """
        self._check(actions)
        logits = widen(self.heads[0])
        return logits.log_softmax(-1).gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def derivatives(self, actions: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the derivatives of `log_prob` with respect to the logits, ``[N, C]`` each."""
        self._check(actions)
        q = widen(self.heads[0].detach()).softmax(-1)
        first = -q
        first.scatter_add_(-1, actions.long().unsqueeze(-1), torch.ones_like(q[..., :1]))
        return [(first, q.square() - q)]

    def entropy(self) -> Tensor:
        """Return ``H = - sum_c q_c log q_c``, ``[N]``."""
        q, log_q = self._log_probabilities(self.heads[0])
        return -(q * log_q).sum(-1)

    def entropy_diagonals(self) -> Sequence[Tensor]:
        """Return the second derivatives of H with respect to the logits, ``[N, C]``."""
        q, log_q = self._log_probabilities(self.heads[0].detach())
        H = -(q * log_q).sum(-1, keepdim=True)
        return [-q * ((1 - 2 * q) * (log_q + H) + 1 - q)]

    def _log_probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = widen(logits).log_softmax(-1)
        # 0 log 0 = 0, also in the derivatives
        return log_q.exp(), log_q.clamp(min=torch.finfo(log_q.dtype).min)

    def _check(self, actions: Tensor) -> None:
        logits = self.heads[0]
        if actions.is_floating_point() or actions.dtype == torch.bool:
            raise TypeError(f"Categorical: actions are {actions.dtype}; expected indices, integers.")
        if actions.shape != logits.shape[:-1]:
            raise ValueError(
                f"Categorical: actions of shape {tuple(actions.shape)} for logits of shape "
                f"{tuple(logits.shape)}; expected {tuple(logits.shape[:-1])}."
            )


class Gaussian(Policy):
    r"""Independent normal distributions with mean mu and standard deviation ``sigma = exp(s)``.

    .. math::
        u = \frac{a - \mu}{\sigma}, \qquad
        \log q_a = - \sum_d \Big( \frac{u_d^2}{2} + s_d + \frac{\log 2 \pi}{2} \Big)

    with the derivatives

    .. math::
        \frac{\partial \log q_a}{\partial \mu} = \frac{u}{\sigma}, \quad
        \frac{\partial^2 \log q_a}{\partial \mu^2} = - \frac{1}{\sigma^2}, \quad
        \frac{\partial \log q_a}{\partial s} = u^2 - 1, \quad
        \frac{\partial^2 \log q_a}{\partial s^2} = - 2 u^2 .

    The entropy :math:`\sum_d (s_d + \log(2 \pi e) / 2)` is linear: its diagonal is zero.

    If actions are squashed afterwards, ``tanh(a)``, give the losses ``a``: the density differs by a
    factor that does not depend on the heads. (The entropy is that of a.)

    Args:
        mean: mu, ``[N, D]``.
        log_std: s, ``[N, D]``; or what broadcasts to it: ``[N, 1]``, a parameter ``[D]``, one of
            shape ``[]``. Parameters' diagonals are summed over the data then.

    Raises:
        ValueError: If ``log_std`` does not broadcast to the shape of ``mean``, or that has no axis.

    Example:
        >>> pi = Gaussian(torch.zeros(4, 2), log_std=torch.zeros(2))
        >>> pi.log_prob(torch.zeros(4, 2)).exp()  # 1 / (2 pi)
        tensor([0.1592, 0.1592, 0.1592, 0.1592])
    """

    def __init__(self, mean: Tensor, log_std: Tensor):
        if mean.dim() == 0:
            raise ValueError("Gaussian: the mean is a scalar; expected [N, D].")
        shared = log_std.dim() == 0 or log_std.shape[-1] == 1  # by all D
        shape = (*mean.shape[:-1], 1 if shared else mean.shape[-1])
        if log_std.shape != shape:
            try:
                log_std = log_std.expand(shape)
            except RuntimeError:
                raise ValueError(
                    f"Gaussian: log_std of shape {tuple(log_std.shape)} does not broadcast to that of "
                    f"the mean, {tuple(mean.shape)}; expected the same or {tuple(mean.shape[-1:])}."
                ) from None
        # the expanded tensor is the head: it has a diagonal of each datum, which is summed behind it
        self.heads = (mean, log_std)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return a random action for each datum, ``[N, D]``."""
        mean, log_std = (z.detach() for z in self.heads)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + log_std.exp() * noise

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the logarithm of the density, summed over D, ``[N]``.

        Args:
            actions: ``[N, D]``.

        Raises:
            ValueError: If they have another shape than the mean, or require a gradient.
        """
        mean, log_std = map(widen, self.heads)
        square = self._u(mean, log_std, actions).square()
        return -(square / 2 + log_std + math.log(2 * math.pi) / 2).sum(-1)

    def derivatives(self, actions: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the derivatives of `log_prob` with respect to each entry of both heads."""
        mean, log_std = (widen(z.detach()) for z in self.heads)
        u, precision = self._u(mean, log_std, actions), (-2 * log_std).exp()
        square = u.square()
        of_log_std = tuple(t.sum_to_size(log_std.shape) for t in (square - 1, -2 * square))
        return [(u * (-log_std).exp(), -precision.expand_as(mean)), of_log_std]

    def entropy(self) -> Tensor:
        """Return ``sum_d (s_d + log(2 pi e) / 2)``, ``[N]``."""
        log_std = widen(self.heads[1]).expand_as(self.heads[0])
        return (log_std + math.log(2 * math.pi * math.e) / 2).sum(-1)

    def entropy_diagonals(self) -> Sequence[Tensor]:
        """Return zeros: the entropy is linear in log_std, and does not depend on the mean."""
        return [torch.zeros_like(z) for z in self.heads]

    def _u(self, mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
        if actions.shape != mean.shape:
            raise ValueError(
                f"Gaussian: actions of shape {tuple(actions.shape)} for means of shape "
                f"{tuple(mean.shape)}; expected the same."
            )
        _check_detached("Gaussian", "actions", actions)
        return (actions - mean) * (-log_std).exp()


def log_prob_loss(
    policy: Policy,
    actions: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Advantage-weighted log-probability: the loss of REINFORCE and actor-critic methods.

    .. math::
        - r \sum_n w_n A_n \log q_n(a_n), \qquad
        h_{nj} = - r w_n A_n \frac{\partial^2 \log q_n(a_n)}{\partial z_{nj}^2}

    For a `Categorical` policy the latter is :math:`r w_n A_n q_{nj} (1 - q_{nj})`.

    Args:
        policy: What the network says about each datum.
        actions: The actions a that were taken, ``[N]`` or ``[N, D]``.
        advantages: A, ``[N]``; constants.
        weights: w, ``[N]``; constants. The mean divides by N all the same.
        reduction: ``"mean"`` (r = 1/N) or ``"sum"`` (r = 1).

    Returns:
        A scalar, with its diagonal attached.

    Raises:
        TypeError: If actions of a categorical policy are no integers.
        ValueError: If shapes do not fit, advantages or weights require a gradient, ``reduction`` is
            neither of the two, or there are no data.

    References:
        Williams (1992), Simple statistical gradient-following algorithms for connectionist reinforcement
        learning; Mnih et al. (2016), Asynchronous methods for deep reinforcement learning.

    Example:
        >>> from backpack_ext import HesScale, backpack
        >>> layer = torch.nn.Linear(3, 2)
        >>> with backpack(HesScale()):
        ...     pi = Categorical(layer(torch.ones(1, 3)))
        ...     log_prob_loss(pi, torch.tensor([1]), torch.tensor([-4.0])).backward()
        >>> q = pi.heads[0].softmax(-1)
        >>> torch.allclose(layer.bias.hesscale, -4 * (q - q**2))
        True
    """
    log_probs = policy.log_prob(actions)
    coefficients = _constant("log_prob_loss", "advantages", advantages, log_probs)
    if weights is not None:
        coefficients = coefficients * _constant("log_prob_loss", "weights", weights, log_probs)
    coefficients = coefficients * -_scale("log_prob_loss", log_probs, reduction)
    value = (coefficients * log_probs).sum()

    def diagonal(first: Tensor, second: Tensor) -> Tensor:
        return _over(coefficients, second) * second

    return _attach(policy, [diagonal(*d) for d in policy.derivatives(actions)], value)


def clipped_loss(
    policy: Policy,
    actions: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    clip: float = 0.2,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""The clipped probability ratio of proximal policy optimization (PPO).

    .. math::
        \rho_n = \frac{q_n(a_n)}{q^{old}_n(a_n)}, \quad
        - r \sum_n w_n \min\big(\rho_n A_n, \; \mathrm{clip}(\rho_n, 1 - \epsilon, 1 + \epsilon) A_n\big)

    and, where the first of the two is the smaller or they are equal,

    .. math::
        h_{nj} = - r w_n A_n \rho_n \Big[
        \Big( \frac{\partial \log q_n}{\partial z_{nj}} \Big)^2
        + \frac{\partial^2 \log q_n}{\partial z_{nj}^2} \Big],

    zero elsewhere. For a `Categorical` policy the bracket is
    :math:`([j = a_n] - q_{nj})^2 - q_{nj} (1 - q_{nj})`.

    Args:
        policy: What the network says about each datum.
        actions: The actions a that were taken, ``[N]`` or ``[N, D]``.
        advantages: A, ``[N]``; constants.
        old_log_probs: ``policy.log_prob(actions)`` when they were taken, ``[N]``; constants.
        clip: epsilon.
        weights: w, ``[N]``; constants. The mean divides by N all the same.
        reduction: ``"mean"`` (r = 1/N) or ``"sum"`` (r = 1).

    Returns:
        A scalar, with its diagonal attached.

    Raises:
        TypeError: If actions of a categorical policy are no integers.
        ValueError: If shapes do not fit, advantages, old log-probabilities or weights require a
            gradient, ``clip`` is not positive, ``reduction`` is neither of the two, or there are no
            data.

    References:
        Schulman, Wolski, Dhariwal, Radford and Klimov (2017), Proximal policy optimization algorithms,
        eq. 7.
    """
    if not clip > 0:
        raise ValueError(f"clipped_loss: clip={clip!r}; expected a number > 0.")
    log_probs = policy.log_prob(actions)
    A = _constant("clipped_loss", "advantages", advantages, log_probs)
    old = _constant("clipped_loss", "old_log_probs", old_log_probs, log_probs)
    scale = -_scale("clipped_loss", log_probs, reduction)
    if weights is not None:
        scale = scale * _constant("clipped_loss", "weights", weights, log_probs)
    ratios = (log_probs - old).exp()
    free, clipped = ratios * A, ratios.detach().clamp(1 - clip, 1 + clip) * A
    active = free.detach() <= clipped
    value = (scale * torch.where(active, free, clipped)).sum()
    coefficients = scale * free.detach() * active

    def diagonal(first: Tensor, second: Tensor) -> Tensor:
        return _over(coefficients, second) * (first.square() + second)

    return _attach(policy, [diagonal(*d) for d in policy.derivatives(actions)], value)


def entropy(policy: Policy, weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
    r"""The entropy of a policy; subtract a small multiple of it from a loss to keep exploring.

    .. math::
        r \sum_n w_n H_n, \qquad h_{nj} = r w_n \frac{\partial^2 H_n}{\partial z_{nj}^2}

    Args:
        policy: What the network says about each datum.
        weights: w, ``[N]``; constants. The mean divides by N all the same.
        reduction: ``"mean"`` (r = 1/N) or ``"sum"`` (r = 1).

    Returns:
        A scalar in nats, with its diagonal attached.

    Raises:
        UnsupportedError: If the policy does not define its entropy.
        ValueError: If weights have another shape or require a gradient, ``reduction`` is neither of
            the two, or there are no data.

    References:
        Mnih et al. (2016), Asynchronous methods for deep reinforcement learning, sec. 4.
    """
    entropies = policy.entropy()
    scale = torch.full_like(entropies, _scale("entropy", entropies, reduction), requires_grad=False)
    if weights is not None:
        scale = scale * _constant("entropy", "weights", weights, entropies)
    diagonals = [_over(scale, h) * h for h in policy.entropy_diagonals()]
    return _attach(policy, diagonals, (scale * entropies).sum())


def _attach(policy: Policy, diagonals: Sequence[Tensor], value: Tensor) -> Tensor:
    """Attach the diagonals of those heads that are trained."""
    if not value.requires_grad:
        return value
    trained = [(z, h) for z, h in zip(policy.heads, diagonals, strict=True) if z.requires_grad]
    return attach_diagonal(*zip(*trained, strict=True), value)


def _over(coefficients: Tensor, head: Tensor) -> Tensor:
    """Return one coefficient for each datum, shaped to multiply a tensor shaped like a head."""
    return coefficients.reshape(coefficients.shape + (1,) * (head.dim() - coefficients.dim()))


def _scale(name: str, terms: Tensor, reduction: str) -> float:
    """Return r."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction={reduction!r}; expected one of {REDUCTIONS}.")
    if terms.numel() == 0:
        raise ValueError(f"{name}: the batch is empty.")
    return 1 / terms.numel() if reduction == "mean" else 1.0


def _constant(name: str, what: str, t: Tensor, terms: Tensor) -> Tensor:
    """Check what is one number for each datum and no function of the network."""
    if t.shape != terms.shape:
        raise ValueError(
            f"{name}: {what} of shape {tuple(t.shape)}; expected one for each action, "
            f"{tuple(terms.shape)}."
        )
    _check_detached(name, what, t)
    return t.to(terms.dtype)


def _check_detached(name: str, what: str, t: Tensor) -> None:
    if t.requires_grad:
        raise ValueError(
            f"{name}: {what} require a gradient, but the Hessian is that of a loss in which they are "
            "constants. Detach them."
        )


def _no_entropy(policy: Policy) -> UnsupportedError:
    return UnsupportedError(
        f"{type(policy).__name__} defines no entropy; expected methods `entropy` and "
        "`entropy_diagonals`."
    )
