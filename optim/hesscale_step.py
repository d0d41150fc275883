r"""Steps of any optimizer, shortened where the Hessian's diagonal says that they are too long."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from backpack_ext import Extension
from optim.base import CurvatureOptimizer
from optim.diagonals import Diagonals, diagonal_extension
from optim.state import by_device_and_dtype, loaded, state_dtype


class HesScaleStep(CurvatureOptimizer):
    r"""Step-size scaling: the step u of any optimizer, times a factor of at most one.

    .. math::
        v \leftarrow \beta_2 v + (1 - \beta_2) h^2, \qquad
        \bar h = \sqrt{v / (1 - \beta_2^t)}, \qquad
        T = \sum_{\text{all parameters}} \bar h u^2, \qquad
        p \leftarrow p - \min\Big(1, \sqrt{2 \delta / T}\Big) u

    h is the Hessian's diagonal that the extension `backpack_ext.HesScale` left on the parameter, t
    the number of steps that the parameter has taken. So the second-order change of the loss that the
    diagonal predicts, :math:`\tfrac12 \sum \bar h (c u)^2` for a factor c, is at most delta.

    .. code-block:: python

        opt = HesScaleStep(torch.optim.AdamW(model.parameters(), lr=1e-3), delta=0.01)
        for x, y in loader:
            opt.zero_grad()
            with backpack(*opt.extensions()):
                loss_fn(model(x), y).backward()
            opt.step()

    **u is everything that the wrapped optimizer does to the parameter**: the difference of the
    parameter before and after its step, with lr, momentum, bias corrections and decoupled weight decay.
    Its buffers are those of the whole step. It must keep no parameters of its own, as averaging
    optimizers do, and its step must not need a closure, as that of LBFGS does.

    **It is an optimizer**: ``param_groups``, ``state`` and ``defaults`` are those of the wrapped one,
    also after ``load_state_dict``, so a scheduler on either acts on both. Use only the wrapper's
    ``step`` and ``zero_grad``. Its ``state_dict()`` is that of the wrapped one with an entry
    ``"hesscale_step"``, which holds v, t, delta and beta2; loading sets all of them. v is in the dtype
    of the parameter, but at least float32.

    **Around AdaHesScale**, or any optimizer of this package with an extension that saves to the same
    field, both use one h. What `AdaHesScale` says on missing and used diagonals, accumulation, mixed
    precision and data parallelism holds here as well.

    Args:
        optimizer: The optimizer that makes the steps.
        delta: Bound delta on the predicted second-order change, in the units of the loss. There is no
            default, because the loss may have any scale. If the loss is a mean cross-entropy, the bound
            is roughly one on the Kullback-Leibler divergence between the predictions before and after,
            for which 0.01 is usual in reinforcement learning (Schulman et al.). Watch ``factor``: delta
            is chosen well if most steps have 1.
        beta2: Decay rate beta_2 of v; 0 for h of the present batch alone.
        gauss_newton: Whether h leaves out second derivatives of the modules (HesScale-GN).
        savefield: Attribute of the parameters that holds h. By default the extension's,
            ``"hesscale"`` or ``"hesscale_gn"``.
        extension: Another extension, whose results are shaped like the parameters; instead of
            ``gauss_newton`` and ``savefield``.

    Attributes:
        factor: The factor of the last step, a scalar on the parameters' device; 1 before the first.

    Raises:
        TypeError: If ``optimizer`` is none.
        ValueError: If ``delta`` or ``beta2`` is out of its range.

    References:
        Elsayed, Farrahi, Dangel and Mahmood (2024), Revisiting scalable Hessian diagonal
        approximations for applications in reinforcement learning; Schulman, Levine, Moritz, Jordan and
        Abbeel (2015), Trust region policy optimization.

    Example:
        The loss 4 p^2 at 1, whose gradient step with lr = 1 would land at -7. Its second-order change is
        4 (8)^2 = 256. One of 1 is allowed, so the step is a sixteenth of that:

        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> opt = HesScaleStep(torch.optim.SGD([p], lr=1.0), delta=1.0)
        >>> p.grad, p.hesscale = torch.tensor([8.0]), torch.tensor([8.0])
        >>> opt.step()
        >>> p.data, opt.factor
        (tensor([0.5000]), tensor(0.0625))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        delta: float,
        beta2: float = 0.999,
        *,
        gauss_newton: bool = False,
        savefield: str | None = None,
        extension: Extension | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"HesScaleStep: expected a torch.optim.Optimizer, got {optimizer!r}.")
        if not delta > 0:
            raise ValueError(f"HesScaleStep: delta={delta!r}; expected a number > 0.")
        if not 0 <= beta2 < 1:
            raise ValueError(f"HesScaleStep: beta2={beta2!r}; expected a number in [0, 1).")
        self.optimizer = optimizer
        self.delta = delta
        self.beta2 = beta2
        self.factor = torch.ones(())
        self.extension = diagonal_extension("HesScaleStep", gauss_newton, savefield, extension)
        for inner in self._inner_extensions():
            if inner.savefield == self.extension.savefield:
                self.extension = inner
        self._averages: dict[Tensor, dict[str, Tensor]] = {}
        self._set_up()

    def _set_up(self) -> None:
        self._diagonals = Diagonals("HesScaleStep", self.extension.savefield)
        # Not Optimizer.__init__, which would make groups of our own. What it does besides, hooks and
        # profiling, it also does for a copy that has none of them.
        super().__setstate__({})

    # What torch and schedulers look at belongs to the wrapped optimizer. These are properties because
    # `load_state_dict` puts other objects in their places.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the wrapped optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state of the wrapped optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, value: dict[Tensor, Any]) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options of the wrapped optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def _inner_extensions(self) -> tuple[Extension, ...]:
        inner = self.optimizer
        return inner.extensions() if isinstance(inner, CurvatureOptimizer) else ()

    def extensions(self) -> tuple[Extension, ...]:
        """Return the wrapped optimizer's extensions and, if it is none of them, the one of h."""
        inner = self._inner_extensions()
        return inner if self.extension in inner else (*inner, self.extension)

    def accumulate(self) -> None:
        """Add the diagonals of the last backward pass to a sum; see `AdaHesScale.accumulate`.

        Raises:
            RuntimeError: If a diagonal is missing, or was not computed by the pass that changed the
                gradient.
            TypeError: If it is no real tensor.
            ValueError: If it is not shaped like its parameter.
        """
        if isinstance(self.optimizer, CurvatureOptimizer):
            self.optimizer.accumulate()
        self._diagonals.accumulate(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer take its step, and shorten it.

        Args:
            closure: Clears the gradients, runs forward and backward pass inside of ``with
                backpack(*opt.extensions())``, and returns the loss; with gradients enabled. It is called
                once; the wrapped optimizer gets none.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a diagonal is missing or was used before.
            TypeError: If a diagonal is no real tensor.
            ValueError: If it is not shaped like its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        diagonals = self._diagonals.read(self.param_groups)
        params = list(diagonals)
        before = [p.clone() for p in params]
        self.optimizer.step()
        averages = [self._average_of(p) for p in params]
        for average in averages:
            average["step"] += 1
        groups = by_device_and_dtype(
            params,
            before,
            list(diagonals.values()),
            [average["exp_avg_hess_sq"] for average in averages],
            [average["step"].item() for average in averages],
        )
        terms = [self._predicted(*group) for group in groups]
        if terms:
            T = torch.stack([term.to(terms[0].device) for term in terms]).sum()
            self.factor = (2 * self.delta / T).sqrt().clamp(max=1)
            for p, p0, *_ in groups:
                _shorten(p, p0, self.factor)
        self._diagonals.done(diagonals)
        return loss

    def _predicted(self, ps, befores, hs, vs, ts) -> Tensor:
        """Update v, and return T of parameters that share device and dtype."""
        torch._foreach_mul_(vs, self.beta2)
        torch._foreach_addcmul_(vs, hs, hs, value=1 - self.beta2)
        products = torch._foreach_sqrt(vs)
        torch._foreach_div_(products, [sqrt(1 - self.beta2**t) for t in ts])
        us = [p0.to(v.dtype) - p for p, p0, v in zip(ps, befores, vs, strict=True)]
        torch._foreach_mul_(products, us)
        torch._foreach_mul_(products, us)
        return torch.stack([product.sum() for product in products]).sum()

    def _average_of(self, p: Tensor) -> dict[str, Tensor]:
        if p not in self._averages:
            v = torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)
            step = torch.zeros((), dtype=torch.float32)
            self._averages[p] = {"step": step, "exp_avg_hess_sq": v}
        return self._averages[p]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the diagonals accumulated with them."""
        self.optimizer.zero_grad(set_to_none)
        self._diagonals.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped optimizer, with an entry ``"hesscale_step"`` for ours.

        ``state_dict()["hesscale_step"]["state"]`` maps indices of parameters, as torch's does, to their
        ``step`` and ``exp_avg_hess_sq``.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        own = {i: dict(self._averages[p]) for i, p in enumerate(self._params()) if p in self._averages}
        state = self.optimizer.state_dict()
        state["hesscale_step"] = {"state": own, "delta": self.delta, "beta2": self.beta2}
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, state)
            state = state if result is None else result
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, delta and beta2 with it.

        Raises:
            ValueError: If it has no entry ``"hesscale_step"``, being that of a bare optimizer, or if
                groups have other sizes.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        if "hesscale_step" not in state_dict:
            raise ValueError(
                "HesScaleStep: the state has no entry 'hesscale_step'; expected what its own "
                "state_dict() returned. Load that of a bare optimizer into `.optimizer`: the averages "
                "of h then start anew."
            )
        own = state_dict.pop("hesscale_step")
        self.optimizer.load_state_dict(state_dict)
        self.delta, self.beta2 = own["delta"], own["beta2"]
        self._averages = {
            p: {key: loaded(value, p, key) for key, value in own["state"][i].items()}
            for i, p in enumerate(self._params())
            if i in own["state"]
        }
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "delta", "beta2", "factor", "extension", "_averages")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def __repr__(self) -> str:
        return f"HesScaleStep(delta={self.delta}, beta2={self.beta2}, {self.optimizer!r})"


def _shorten(ps: list[Tensor], befores: list[Tensor], factor: Tensor) -> None:
    """Move parameters to ``before + factor (p - before)``, in place."""
    factor = factor.to(ps[0].device)
    for p, p0 in zip(ps, befores, strict=True):
        # lerp returns p itself for a factor of one, which p0 - (p0 - p) would not.
        dtype = state_dtype(p)
        p.copy_(torch.lerp(p0.to(dtype), p.to(dtype), factor.to(dtype)))
