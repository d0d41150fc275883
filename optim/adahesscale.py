r"""Adam with Hessian diagonals in place of gradients in the second moment."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from backpack_ext import Extension
from optim.base import CurvatureOptimizer
from optim.diagonals import Diagonals, diagonal_extension, with_gradient
from optim.state import by_device_and_dtype, exact_loading, state_dtype


class AdaHesScale(CurvatureOptimizer):
    r"""Adam whose second moment is that of the Hessian's diagonal h, not of the gradient g.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) h^2 \\
        p &\leftarrow p - \eta \Big( \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
        + \lambda p \Big)

    elementwise, t being the number of steps that the parameter has taken. h is what the extension
    `backpack_ext.HesScale` left on the parameter:

    .. code-block:: python

        opt = AdaHesScale(model, lr=1e-3)
        for x, y in loader:
            opt.zero_grad()
            with backpack(*opt.extensions()):
                loss_fn(model(x), y).backward()
            opt.step()

    It is a damped Newton step with a diagonal Hessian: multiplying the loss by a constant changes
    nothing but the weight of eps.

    **Each diagonal is used once.** ``step`` raises if a parameter with a gradient has no diagonal, or
    one that an earlier step used. The attribute stays on the parameter. Parameters without a gradient
    are skipped.

    **Gradient accumulation**: a backward pass adds to ``p.grad`` but replaces the diagonal. Call
    `accumulate` after each of the passes. The sums are forgotten by ``step`` and by ``zero_grad`` of
    the optimizer (not of the model: a step that ``GradScaler`` skips would leave them).

    **Mixed precision**: with a ``GradScaler``, activate ``backpack(..., grad_scaler=scaler)`` so that
    h is free of its factor, as ``scaler.step(opt)`` makes the gradient. Its check for inf and nan, which
    skips a step, sees gradients only.

    **Data parallelism**: gradients are averaged over the processes, diagonals are not. Average
    ``p.hesscale`` yourself, before ``step`` or ``accumulate`` reads it.

    **State**, per parameter: ``step`` (on the CPU), ``exp_avg`` (m), ``exp_avg_hess_sq`` (v). m and v
    are in the parameter's dtype, but at least float32, and a half-precision parameter is rounded once
    per step. A checkpoint keeps their precision, which torch alone would not.

    Args:
        params: The parameters, their names with them (``model.named_parameters()``), dictionaries
            that define groups with own options, or a module, for all of its parameters.
        lr: Step size eta, a number or a tensor with one element.
        betas: Decay rates beta_1 of m and beta_2 of v.
        eps: Damping of the curvature, in the units of h.
        weight_decay: Decoupled weight decay lambda, as in AdamW.
        gauss_newton: Whether h leaves out second derivatives of the modules (HesScale-GN).
        savefield: Attribute of the parameters that holds h. By default the extension's,
            ``"hesscale"`` or ``"hesscale_gn"``.
        extension: Another extension, whose results are shaped like the parameters (``DiagGGN()``, or
            ``HesScale`` with options); instead of ``gauss_newton`` and ``savefield``.
        maximize: Whether to follow the gradient upwards. h of the negated loss has the same square.
        foreach: Whether to update all parameters by one kernel per operation, at the cost of
            temporary memory of their size. By default on CUDA.

    Raises:
        ValueError: If an option is out of its range.

    References:
        Elsayed, Farrahi, Dangel and Mahmood (2024), Revisiting scalable Hessian diagonal
        approximations for applications in reinforcement learning; Kingma and Ba (2015), Adam;
        Loshchilov and Hutter (2019), Decoupled weight decay regularization.

    Example:
        With constant derivatives and no decay, every step is lr times Newton's, here 3 / 6 and 4 / 1:

        >>> p = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = AdaHesScale([p], lr=0.1)
        >>> p.grad, p.hesscale = torch.tensor([3.0, 4.0]), torch.tensor([6.0, -1.0])
        >>> opt.step()
        >>> p.data
        tensor([2.9500, 3.6000])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gauss_newton: bool = False,
        savefield: str | None = None,
        extension: Extension | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        self.extension = diagonal_extension("AdaHesScale", gauss_newton, savefield, extension)
        self._diagonals = Diagonals("AdaHesScale", self.extension.savefield)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        if isinstance(params, nn.Module):
            params = params.named_parameters()
        super().__init__(params, defaults)

    def extensions(self) -> tuple[Extension, ...]:
        """Return the extension that computes h, for ``backpack(*opt.extensions())``."""
        return (self.extension,)

    def accumulate(self) -> None:
        """Add the diagonals of the last backward pass to a sum, which ``step`` uses.

        .. code-block:: python

            for x, y in parts:
                with backpack(*opt.extensions()):
                    (loss_fn(model(x), y) / len(parts)).backward()
                opt.accumulate()
            opt.step()

        The call after the last pass may be left out.

        Raises:
            RuntimeError: If a diagonal is missing, or was not computed by the pass that changed the
                gradient.
            TypeError: If it is no real tensor.
            ValueError: If it is not shaped like its parameter.
        """
        self._diagonals.accumulate(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: Clears the gradients, runs forward and backward pass inside of ``with
                backpack(*opt.extensions())``, and returns the loss; with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a diagonal is missing or was used before, or if a gradient is sparse.
            TypeError: If a diagonal is no real tensor.
            ValueError: If it is not shaped like its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p, label in with_gradient(self.param_groups):
            if p.grad.is_sparse:
                raise RuntimeError(
                    f"AdaHesScale: {label} has a sparse gradient; expected a dense one. Make its "
                    "embedding with sparse=False."
                )
        diagonals = self._diagonals.read(self.param_groups)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in params]
            adahesscale(
                params,
                [p.grad for p in params],
                [diagonals[p] for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_hess_sq"] for state in states],
                [state["step"] for state in states],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                foreach=group["foreach"],
            )
        self._diagonals.done(diagonals)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the diagonals accumulated with them."""
        super().zero_grad(set_to_none)
        self._diagonals.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own.

        Raises:
            ValueError: If an option is out of its range.
        """
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned; see `torch.optim.Optimizer.load_state_dict`."""
        with exact_loading(self):
            super().load_state_dict(state_dict)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_hess_sq"):
                state[name] = torch.zeros_like(
                    p, dtype=state_dtype(p), memory_format=torch.preserve_format
                )
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "extension": self.extension}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy. Torch comes here as well when it loads a checkpoint: then they are kept.
        if "_diagonals" not in self.__dict__:
            self._diagonals = Diagonals("AdaHesScale", self.extension.savefield)


def check_options(options: dict[str, Any]) -> None:
    """Raise if the options of a parameter group are out of range.

    Raises:
        ValueError: If one of them is.
    """
    if isinstance(options["lr"], Tensor) and options["lr"].numel() != 1:
        shape = tuple(options["lr"].shape)
        raise ValueError(f"AdaHesScale: lr is a tensor of shape {shape}; expected one element.")
    for name in ("lr", "eps", "weight_decay"):
        if not options[name] >= 0:
            raise ValueError(f"AdaHesScale: {name}={options[name]!r}; expected a number >= 0.")
    if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"AdaHesScale: betas={options['betas']!r}; expected two numbers in [0, 1).")


def adahesscale(
    params: list[Tensor],
    grads: list[Tensor],
    diagonals: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_hess_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
    foreach: bool | None = None,
) -> None:
    """Update parameters and state in place by one step of `AdaHesScale`, which has the formula.

    Args:
        params: Parameters.
        grads: Their gradients, each shaped like its parameter.
        diagonals: Hessian diagonals h, likewise.
        exp_avgs: Moving averages m, likewise.
        exp_avg_hess_sqs: Moving averages v, likewise.
        steps: Numbers of steps t so far; scalars on the CPU.
        lr: Step size.
        betas: Decay rates of m and v.
        eps: Damping.
        weight_decay: Decoupled weight decay.
        maximize: Whether to negate the gradients.
        foreach: Whether to use one kernel per operation for all parameters; None to decide.
    """
    # Parameters of other classes (distributed tensors) bring their own operations: one by one.
    if foreach is None:
        foreach = all(p.is_cuda and type(p) in (Tensor, nn.Parameter) for p in params)
    grads = [g.to(m.dtype) for g, m in zip(grads, exp_avgs, strict=True)]
    diagonals = [h.to(v.dtype) for h, v in zip(diagonals, exp_avg_hess_sqs, strict=True)]
    for t in steps:
        t += 1
    counts = [t.item() for t in steps]
    tensors = (params, grads, diagonals, exp_avgs, exp_avg_hess_sqs, counts)
    for group in by_device_and_dtype(*tensors) if foreach else zip(*tensors, strict=True):
        (_update_all if foreach else _update_one)(
            *group,
            lr=lr.squeeze() if isinstance(lr, Tensor) else lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
        )


# m / c_1 / (sqrt(v) / c_2 + eps) = m / (sqrt(v) c_1 / c_2 + eps c_1): both bias corrections are in the
# denominator, and the numerator is m itself. The decay joins the update, so that a parameter in half
# precision is rounded once: lr * weight_decay alone is below what it can resolve.


def _corrections(betas: tuple[float, float], t: float) -> tuple[float, float]:
    """Return ``c_1 = 1 - beta_1^t`` and ``c_2 = sqrt(1 - beta_2^t)``."""
    return 1 - betas[0] ** t, sqrt(1 - betas[1] ** t)


def _update_one(p, g, h, m, v, t, *, lr, betas, eps, weight_decay, maximize) -> None:
    m.lerp_(-g if maximize else g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(h, h, value=1 - betas[1])
    c1, c2 = _corrections(betas, t)
    u = v.sqrt().mul_(c1 / c2).add_(eps * c1)
    torch.div(m, u, out=u)
    if weight_decay != 0:
        u.add_(p, alpha=weight_decay)
    if isinstance(lr, Tensor):
        p.sub_(u.mul_(lr.to(u.device)))
    else:
        p.add_(u, alpha=-lr)


def _update_all(ps, gs, hs, ms, vs, ts, *, lr, betas, eps, weight_decay, maximize) -> None:
    torch._foreach_lerp_(ms, torch._foreach_neg(gs) if maximize else gs, 1 - betas[0])
    torch._foreach_mul_(vs, betas[1])
    torch._foreach_addcmul_(vs, hs, hs, value=1 - betas[1])
    cs = [_corrections(betas, t) for t in ts]
    denominators = torch._foreach_sqrt(vs)
    torch._foreach_mul_(denominators, [c1 / c2 for c1, c2 in cs])
    torch._foreach_add_(denominators, [eps * c1 for c1, _ in cs])
    us = torch._foreach_div(ms, denominators)
    if weight_decay != 0:
        torch._foreach_add_(us, ps, alpha=weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(us, lr.to(us[0].device))
        torch._foreach_sub_(ps, us)
    else:
        torch._foreach_add_(ps, us, alpha=-lr)
