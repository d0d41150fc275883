r"""Adaptive optimizers without square root: second-order methods that need nothing but gradients.

RMSProp, AdamW and Shampoo divide by roots of averaged squares of gradients. Without the root, and with
the squares scaled by the number of terms of the loss, these averages are an estimate of its curvature
(the empirical Fisher matrix), and the methods are approximate natural gradient descent.

Lin, Dangel, Eschenhagen, Bae, Turner and Makhzani (2024), Can we remove the square-root in adaptive
gradient methods? A second-order perspective.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from curvature import STRUCTURES, StructuredMatrix
from optim.rootfree_updates import (
    descend,
    rf_adamw,
    rf_rmsprop,
    shampoo_factors_,
    shampoo_momenta,
    shampoo_precondition,
    shampoo_products,
    wide_gradient,
)
from optim.rounding import HALF_TYPES, seeded_generator
from optim.sharded import is_sharded
from optim.state import by_device_and_dtype, exact_loading, state_dtype

# What a checkpoint holds in the place of a function, which torch.load would refuse.
_FUNCTION = "function"


class RootFree(Optimizer, ABC):
    r"""What the square-root-free optimizers share.

    The loss is a **mean**, and ``batch_size`` its number of terms B: the number of data for
    ``nn.CrossEntropyLoss()``, times the length of the sequences if there is a term for each token,
    times the number of outputs for ``nn.MSELoss()``; with gradient accumulation and with data
    parallelism that of all micro-batches and processes together.

    The averages contain B of their own time. So if the last batch is smaller, say so:

    .. code-block:: python

        opt.batch_size = len(x)  # of all groups; opt.param_groups[0]["batch_size"] for one
        opt.step()

    **Gradients that are not finite**, or whose square times B is not, skip the whole step: no
    parameter, no state and no count of steps changes, but for ``skipped``. Finding out waits for the
    device once per step.

    **A step of size zero with zero gradients** creates the state and does nothing else. This is how
    ``torch.distributed.checkpoint`` learns what a new optimizer has to load.

    **Half precision**: state is in float32. Parameters are rounded to the nearest number, or, with
    ``stochastic_rounding``, up or down at random, so that steps below their resolution are not lost. If
    no ``generator`` is given, the random numbers depend only on the numbers of the parameter and the
    step: a run that is resumed continues exactly, and processes with copies of a parameter agree. The
    state of a generator is yours to save, and equal ones in all processes are yours to make.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], generator: Generator | None):
        self.generator = generator
        if isinstance(params, nn.Module):
            params = params.named_parameters()
        super().__init__(params, defaults)

    # ------------------------------------------------------------------ what a subclass defines

    @abstractmethod
    def _check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError if an option of a group is out of its range."""

    @abstractmethod
    def _entries(self, p: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
        """Return what a state holds besides ``"step"``: shapes of tensors, None for numbers."""

    @abstractmethod
    def _create(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Add what is missing in the state of a parameter."""

    @abstractmethod
    def _take(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> bool:
        """Take a step with all groups; return False, and change nothing, if it is not finite."""

    # ------------------------------------------------------------------ options

    @property
    def batch_size(self) -> float:
        """Number of terms of the mean loss; setting it sets that of all groups.

        Raises:
            ValueError: On reading, if groups have different ones; on setting, if it is not positive.
        """
        sizes = {group["batch_size"] for group in self.param_groups}
        if len(sizes) > 1:
            raise ValueError(
                f"{self._name}: groups have batch sizes {sorted(sizes)}; read "
                "param_groups[k]['batch_size']."
            )
        return sizes.pop()

    @batch_size.setter
    def batch_size(self, value: float) -> None:
        self._check_number("batch_size", value, positive=True)
        for group in self.param_groups:
            group["batch_size"] = value

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def skipped(self) -> int:
        """Number of steps that were skipped.

        An entry of every group, which checkpoints of all kinds keep; those of earlier versions have none
        and begin at zero.
        """
        return self.param_groups[0]["skipped"] if self.param_groups else 0

    @skipped.setter
    def skipped(self, value: int) -> None:
        for group in self.param_groups:
            group["skipped"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own.

        Raises:
            TypeError: If a parameter is complex, or an option of a structure is unknown.
            ValueError: If an option is out of its range.
        """
        options = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay"):
            self._check_number(name, options[name])
        self._check_number("batch_size", options["batch_size"], positive=True)
        self._check_options(options)
        super().add_param_group({**param_group, "skipped": self.skipped})

    def _check_number(
        self, name: str, value: Any, positive: bool = False, below: float = math.inf
    ) -> None:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{self._name}: {name} is a tensor of shape {tuple(value.shape)}; expected one element."
            )
        inside = 0 < value < below if positive else 0 <= value < below
        if not inside:
            least = "> 0" if positive else ">= 0"
            most = "finite" if below == math.inf else f"< {below:g}"
            raise ValueError(f"{self._name}: {name}={value!r}; expected a number {least} and {most}.")

    # ------------------------------------------------------------------ steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: Clears the gradients, runs forward and backward pass, and returns the loss; with
                gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a gradient is sparse.
            TypeError: If one is complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            self._check_gradients(params)
            if params:
                work.append((group, params))
        largest = [self._largest(params) for _, params in work]
        for (group, params), values in zip(work, largest, strict=True):
            for p, value in zip(params, values, strict=True):
                limit = torch.finfo(state_dtype(p)).max
                if not group["batch_size"] * value * value <= limit:  # nan too
                    self.skipped += 1
                    return loss
        for group, params in work:
            for p in params:
                state = self.state[p]
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                self._create(p, group, state)
        if not any(map(any, largest)) and all(group["lr"] == 0 for group, _ in work):
            return loss
        if not self._take(work):
            self.skipped += 1
        return loss

    def _check_gradients(self, params: list[Tensor]) -> None:
        for p in params:
            g = p.grad
            if g.layout != torch.strided:
                raise RuntimeError(
                    f"{self._name}: a parameter of shape {tuple(p.shape)} has a sparse gradient; "
                    "expected a dense one. Make its embedding with sparse=False."
                )
            if g.is_complex():
                raise TypeError(
                    f"{self._name}: a parameter of shape {tuple(p.shape)} has a complex gradient; "
                    "expected a real one. Make a parameter of its real and imaginary parts."
                )

    @staticmethod
    def _largest(params: list[Tensor]) -> list[float]:
        """Return the largest magnitude of each gradient; inf or nan if it is not finite."""
        found = [math.nan] * len(params)
        numbers = list(range(len(params)))
        for gs, ks in by_device_and_dtype([p.grad for p in params], numbers):
            if all(g.is_cpu and not is_sharded(g) for g in gs):
                # there, a maximum norm takes fifteen times as long
                extremes = [torch.aminmax(g) for g in gs]
                norms = [torch.maximum(-least, most) for least, most in extremes]
            else:
                norms = torch._foreach_norm(gs, math.inf)
                norms = [n.full_tensor() if is_sharded(n) else n for n in norms]
            for k, value in zip(ks, torch.stack(norms).tolist(), strict=True):
                found[k] = value
        return found

    def _generators(self, group: dict[str, Any], params: list[Tensor]) -> list[Generator | None]:
        """Return for each parameter what rounds it; called before its step is counted."""
        found: list[Generator | None] = [None] * len(params)
        if not group["stochastic_rounding"] or all(p.dtype not in HALF_TYPES for p in params):
            return found
        if self.generator is not None:
            return [self.generator] * len(params)
        everything = chain.from_iterable(group["params"] for group in self.param_groups)
        numbers = {p: k for k, p in enumerate(everything)}
        for k, p in enumerate(params):
            if p.dtype in HALF_TYPES:
                found[k] = seeded_generator(p.device, numbers[p], int(self.state[p]["step"]))
        return found

    def _count(self, params: list[Tensor]) -> None:
        for p in params:
            self.state[p]["step"] += 1

    # ------------------------------------------------------------------ copies and checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned; see `torch.optim.Optimizer.load_state_dict`.

        Raises:
            ValueError: If it belongs to other parameters or structures.
        """
        check = self.register_load_state_dict_pre_hook(_check_checkpoint)
        try:
            with exact_loading(self):
                super().load_state_dict(state_dict)
        finally:
            check.remove()

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint that fits, with functions in their places, or raise ValueError."""
        saved = [dict(group) for group in state_dict["param_groups"]]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            return state_dict  # torch says what is wrong
        for group, own in zip(saved, self.param_groups, strict=True):
            for name, value in group.items():
                if value == _FUNCTION and name in ("interval", "lr_cov"):
                    if not callable(own[name]):
                        raise ValueError(
                            f"{self._name}: {name} was a function when the checkpoint was made, which "
                            f"does not hold it, and is {own[name]!r} now; pass the function again."
                        )
                    group[name] = own[name]
            for index, p in zip(group["params"], own["params"], strict=True):
                if index in state_dict["state"]:
                    self._check_entry(index, p, {**own, **group}, state_dict["state"][index])
        return {**state_dict, "param_groups": saved}

    def _check_entry(self, index: Any, p: Tensor, group: dict[str, Any], state: Mapping) -> None:
        expected = {"step": (), **self._entries(p, group)}
        for name, shape in expected.items():
            if name not in state and name != "momentum_buffer":
                raise ValueError(
                    f"{self._name}: the state of parameter {index} has no entry {name!r}, only "
                    f"{', '.join(map(repr, state)) or 'nothing'}; was it saved by another optimizer, or "
                    "with another structure?"
                )
            if shape is not None and name in state and tuple(state[name].shape) != shape:
                raise ValueError(
                    f"{self._name}: entry {name!r} of parameter {index}, {tuple(p.shape)}, has shape "
                    f"{tuple(state[name].shape)}; expected {shape}."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "generator": self.generator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "skipped"})
        for group in self.param_groups:  # what an earlier version saved, or pickled, has none
            group.setdefault("skipped", state.get("skipped", 0))


def _check_checkpoint(optimizer: RootFree, state_dict: dict[str, Any]) -> dict[str, Any]:
    return optimizer._check_checkpoint(state_dict)


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)


class RFRMSProp(RootFree):
    r"""RMSProp without the square root.

    .. math::
        w &\leftarrow \alpha w + (1 - \alpha) B g^2, \qquad u = \frac{g}{w + \lambda} + \delta p \\
        b &\leftarrow \mu b + u, \qquad p \leftarrow p - \eta b

    elementwise, with w = 1 at first. g is the gradient of a mean over B terms; see `RootFree` for B and
    for all that is common to these optimizers. (The paper has v = w / B.)

    **State**, per parameter: ``step`` (on the CPU), ``curvature`` (w), and with momentum
    ``momentum_buffer`` (b), in the parameter's data type but at least float32.

    Args:
        params: The parameters, their names with them, dictionaries that define groups with own
            options, or a module, for all of its parameters.
        lr: Step size eta, a number or a tensor with one element.
        alpha: Decay rate of w.
        damping: lambda, in the units of the curvature.
        momentum: Decay rate mu of b; 0 for none.
        weight_decay: delta.
        batch_size: Number of terms B of the mean loss.
        maximize: Whether to follow the gradient upwards.
        foreach: Whether to update all parameters by one kernel per operation, at the cost of
            temporary memory of their size. By default on CUDA.
        stochastic_rounding: Whether parameters in half precision are rounded at random.
        generator: Where its random numbers come from, on the device of the parameters.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        w is 0.5 + 0.5 * 4 * 9, the step 3 divided by that and 0.5 in addition:

        >>> p = nn.Parameter(torch.tensor([1.0]))
        >>> opt = RFRMSProp([p], lr=1.0, alpha=0.5, damping=0.5, batch_size=4)
        >>> p.grad = torch.tensor([3.0])
        >>> opt.step()
        >>> opt.state[p]["curvature"], round(1 - p.item(), 4), round(3 / 19, 4)
        (tensor([18.5000]), 0.1579, 0.1579)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        alpha: float = 0.99,
        damping: float = 1e-4,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        batch_size: float,
        maximize: bool = False,
        foreach: bool | None = None,
        stochastic_rounding: bool = False,
        generator: Generator | None = None,
    ):
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "maximize": maximize,
            "foreach": foreach,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, generator)

    def _check_options(self, options: dict[str, Any]) -> None:
        self._check_number("damping", options["damping"])
        self._check_number("momentum", options["momentum"])
        self._check_number("alpha", options["alpha"], below=1)

    def _entries(self, p: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
        names = ["curvature"] + ["momentum_buffer"] * (group["momentum"] != 0)
        return {name: tuple(p.shape) for name in names}

    def _create(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if "curvature" not in state:
            state["curvature"] = _zeros(p).fill_(1)
        if group["momentum"] != 0 and "momentum_buffer" not in state:
            state["momentum_buffer"] = _zeros(p)

    def _take(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> bool:
        for group, params in work:
            states = [self.state[p] for p in params]
            rf_rmsprop(
                params,
                [p.grad for p in params],
                [state["curvature"] for state in states],
                [state["momentum_buffer"] for state in states] if group["momentum"] != 0 else None,
                self._generators(group, params),
                lr=float(group["lr"]),
                alpha=group["alpha"],
                damping=group["damping"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                batch_size=group["batch_size"],
                maximize=group["maximize"],
                foreach=group["foreach"],
            )
            self._count(params)
        return True


class RFAdamW(RootFree):
    r"""AdamW without the square root.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        w \leftarrow \beta_2 w + (1 - \beta_2) B g^2 \\
        p &\leftarrow (1 - \eta \delta) p - \eta \frac{m}{w + \epsilon}

    elementwise, with m = 0 and w = 1 at first and no correction of that bias. g is the gradient of a
    mean over B terms; see `RootFree` for B and for all that is common to these optimizers. (The paper
    has v = w / B.)

    **State**, per parameter: ``step`` (on the CPU), ``exp_avg`` (m), ``curvature`` (w), in the
    parameter's data type but at least float32.

    Args:
        params: The parameters, their names with them, dictionaries that define groups with own
            options, or a module, for all of its parameters.
        lr: Step size eta, a number or a tensor with one element.
        betas: Decay rates beta_1 of m and beta_2 of w.
        eps: Damping, in the units of the curvature.
        weight_decay: Decoupled weight decay delta.
        batch_size: Number of terms B of the mean loss.
        maximize: Whether to follow the gradient upwards.
        foreach: Whether to update all parameters by one kernel per operation, at the cost of
            temporary memory of their size. By default on CUDA.
        stochastic_rounding: Whether parameters in half precision are rounded at random.
        generator: Where its random numbers come from, on the device of the parameters.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> p = nn.Parameter(torch.tensor([1.0]))
        >>> opt = RFAdamW([p], lr=1.0, betas=(0.0, 0.5), eps=0.5, weight_decay=0.1, batch_size=4)
        >>> p.grad = torch.tensor([3.0])
        >>> opt.step()
        >>> round(p.item(), 4), round(0.9 - 3 / 19, 4)
        (0.7421, 0.7421)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 1e-2,
        *,
        batch_size: float,
        maximize: bool = False,
        foreach: bool | None = None,
        stochastic_rounding: bool = False,
        generator: Generator | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "maximize": maximize,
            "foreach": foreach,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, generator)

    def _check_options(self, options: dict[str, Any]) -> None:
        self._check_number("eps", options["eps"])
        if len(options["betas"]) != 2:
            raise ValueError(f"RFAdamW: betas={options['betas']!r}; expected two numbers in [0, 1).")
        for k in (0, 1):
            self._check_number(f"betas[{k}]", options["betas"][k], below=1)

    def _entries(self, p: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
        return {name: tuple(p.shape) for name in ("exp_avg", "curvature")}

    def _create(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if "curvature" not in state:
            state["exp_avg"], state["curvature"] = _zeros(p), _zeros(p).fill_(1)

    def _take(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> bool:
        for group, params in work:
            states = [self.state[p] for p in params]
            rf_adamw(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["curvature"] for state in states],
                self._generators(group, params),
                lr=float(group["lr"]),
                betas=tuple(group["betas"]),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                batch_size=group["batch_size"],
                maximize=group["maximize"],
                foreach=group["foreach"],
            )
            self._count(params)
        return True


Structure = str | tuple[str, Mapping[str, int]]


@dataclass
class _Factors:
    """The structured matrices of a parameter, made of tensors of its state."""

    K: list[StructuredMatrix]
    m: list[StructuredMatrix]
    products: list[StructuredMatrix | None] | None = None
    versions: list[int] | None = None

    def keep_products(self) -> None:
        """Compute K K^T if K has changed, by a refresh or by whoever else wrote to the state."""
        versions = [t._version for K in self.K for t in K.tensors]
        if self.products is None or versions != self.versions:
            self.products, self.versions = shampoo_products(self.K), versions

    def made_of(self, state: Mapping[str, Any]) -> bool:
        """Whether the state has the same tensors still: a checkpoint brings others."""
        return all(state[name] is t for name, t in self.tensors().items())

    def tensors(self) -> dict[str, Tensor]:
        """Return the entries of the state."""
        return {
            f"{letter}{n}.{k}": t
            for letter, matrices in (("K", self.K), ("m", self.m))
            for n, M in enumerate(matrices)
            for k, t in enumerate(M.tensors)
        }


class RFShampoo(RootFree):
    r"""Shampoo without root and without inverse, for parameters with any number of axes.

    A parameter with gradient :math:`G[d_1, \dots, d_N]` has a factor :math:`K_n[d_n, d_n]` for each
    axis. :math:`(K_n K_n^T)^{-1}` tracks that axis's Kronecker factor of the curvature.
    :math:`G_{(n)}` is the gradient unfolded to ``[d_n, rest]``, P the projection to the structure
    (`curvature.StructuredMatrix.project`); first K_n = I and m_n = 0.

    .. math::
        H_n &= \frac{B}{\prod_{j \ne n} d_j} K_n^T G_{(n)}
        \Big(\bigotimes_{j \ne n} K_j K_j^T\Big) G_{(n)}^T K_n \\
        m_n &\leftarrow \alpha_2 m_n + \frac{1 - \alpha_2}{2} \Big[ P(H_n)
        + \lambda \prod_{j \ne n} \frac{\operatorname{tr}(K_j^T K_j)}{d_j} P(K_n^T K_n) - I \Big] \\
        K_n &\leftarrow K_n - \frac{\beta_2}{\max(1, \|m_n\|_F)} K_n m_n

    for all axes at once, in steps with a refresh. Every step multiplies :math:`K_n K_n^T` to all axes of
    G, which gives U, and

    .. math::  b \leftarrow \mu b + U + \delta p, \qquad p \leftarrow p - \eta b

    G is the gradient of a mean over B terms; see `RootFree` for B and for all that is common to these
    optimizers. A number is a parameter with one axis of size 1. A refresh whose m_n is not finite skips
    the step, as a gradient does.

    **State**, per parameter: ``step`` (on the CPU), ``refreshes`` and ``last_refresh`` (integers), with
    momentum ``momentum_buffer`` (b), and the tensors of K_n and m_n as ``K0.0``, ``K0.1``, ...,
    ``m0.0``, all in the parameter's data type but at least float32. `factors` returns matrices.

    **Memory** besides this: :math:`K_n K_n^T` of dense and diagonal factors, as large as K_n, is kept
    between refreshes, since it multiplies in half the time; not if ``interval`` is 1. It is in no
    checkpoint.

    Args:
        params: The parameters, their names with them, dictionaries that define groups with own
            options, or a module, for all of its parameters.
        lr: Step size eta, a number or a tensor with one element.
        momentum: Decay rate mu of b; 0 for none.
        damping: lambda, in the units of the curvature.
        alpha2: Decay rate alpha_2 of m_n, Riemannian momentum.
        weight_decay: delta.
        lr_cov: Step size beta_2 of the factors, or a function of the number of refreshes that the
            parameter has had.
        interval: A parameter's factors are refreshed in its first step, and in each that is this many
            after the last one with a refresh; or a function of the number of steps so far.
        structure: Of the factors: a key of ``curvature.STRUCTURES``, ``(key, options)`` such as
            ``("block-diagonal", {"block": 16})``, or a list of these, one for each axis, whose last one
            also counts for all further axes.
        max_dim: Axes longer than this have diagonal factors.
        batch_size: Number of terms B of the mean loss.
        maximize: Whether to follow the gradient upwards.
        stochastic_rounding: Whether parameters in half precision are rounded at random.
        generator: Where its random numbers come from, on the device of the parameters.

    Raises:
        TypeError: If an option of a structure is unknown or no integer, or a parameter is a distributed
            tensor.
        ValueError: If an option is out of its range or a structure is unknown.

    Example:
        For a number with damping 0, m is (B g^2 - 1) / 2 in the first step:

        >>> p = nn.Parameter(torch.tensor(1.0))
        >>> opt = RFShampoo([p], momentum=0.0, damping=0.0, alpha2=0.0, lr_cov=0.5, batch_size=8)
        >>> p.grad = torch.tensor(0.5)
        >>> opt.step()
        >>> opt.factors(p)["K0"].to_dense()
        tensor([[0.7500]])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        alpha2: float = 0.5,
        weight_decay: float = 0.0,
        *,
        lr_cov: float | Callable[[int], float] = 1e-2,
        interval: int | Callable[[int], int] = 10,
        structure: Structure | Sequence[Structure] = "dense",
        max_dim: int = 4096,
        batch_size: float,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        generator: Generator | None = None,
    ):
        self._matrices: dict[Tensor, _Factors] = {}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "alpha2": alpha2,
            "weight_decay": weight_decay,
            "lr_cov": lr_cov,
            "interval": interval,
            "structure": structure,
            "max_dim": max_dim,
            "batch_size": batch_size,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, generator)

    def factors(self, p: Tensor) -> dict[str, StructuredMatrix]:
        """Return the factors of a parameter, ``{"K0": ..., "K1": ...}``, none before its first step.

        They share memory with the state.
        """
        if "step" not in self.state.get(p, {}):
            return {}
        (group,) = (g for g in self.param_groups if any(p is q for q in g["params"]))
        return {f"K{n}": K for n, K in enumerate(self._factors(p, group).K)}

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in ("damping", "momentum"):
            self._check_number(name, options[name])
        self._check_number("alpha2", options["alpha2"], below=1)
        if not callable(options["lr_cov"]):
            self._check_number("lr_cov", options["lr_cov"])
        if not callable(options["interval"]):
            self._check_count("interval", options["interval"])
        self._check_count("max_dim", options["max_dim"])
        for entry in _listed(options["structure"]):
            cls, its_options = _parsed(entry)
            cls.shapes(1, **its_options)  # says what is wrong with options

    def _check_count(self, name: str, value: Any) -> None:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self._name}: {name}={value!r}; expected an integer >= 1.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own.

        Raises:
            TypeError: If a parameter is a distributed tensor, or an option of a structure is unknown.
            ValueError: If an option is out of its range or a structure is unknown.
        """
        super().add_param_group(param_group)
        if any(is_sharded(p) for p in self.param_groups[-1]["params"]):
            del self.param_groups[-1]
            raise TypeError(
                "RFShampoo: expected parameters that are whole on this process, got a distributed "
                "tensor. RFRMSProp and RFAdamW take these."
            )

    def _entries(self, p: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
        found = {"refreshes": None, "last_refresh": None}
        if group["momentum"] != 0:
            found["momentum_buffer"] = tuple(p.shape)
        for n, (cls, d, options) in enumerate(_axes(p, group)):
            for k, shape in enumerate(cls.shapes(d, **options)):
                found[f"K{n}.{k}"] = found[f"m{n}.{k}"] = shape
        return found

    def _create(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if group["momentum"] != 0 and "momentum_buffer" not in state:
            state["momentum_buffer"] = _zeros(p)
        if "refreshes" in state:
            return
        state["refreshes"], state["last_refresh"] = 0, 0
        like = {"dtype": state_dtype(p), "device": p.device}
        axes = _axes(p, group)
        factors = _Factors(
            [cls.eye(d, **like, **options) for cls, d, options in axes],
            [cls.zeros(d, **like, **options) for cls, d, options in axes],
        )
        state.update(factors.tensors())
        self._matrices[p] = factors

    def _factors(self, p: Tensor, group: dict[str, Any]) -> _Factors:
        """Return the structured matrices of a parameter that has a state."""
        state = self.state[p]
        found = self._matrices.get(p)
        if found is None or not found.made_of(state):
            K, m = (
                [
                    cls([state[f"{a}{n}.{k}"] for k in range(len(cls.shapes(d, **o)))], d, **o)
                    for n, (cls, d, o) in enumerate(_axes(p, group))
                ]
                for a in "Km"
            )
            found = self._matrices[p] = _Factors(K, m)
        return found

    def _is_due(self, state: dict[str, Any], group: dict[str, Any]) -> bool:
        if state["refreshes"] == 0:
            return True
        step, interval = int(state["step"]), group["interval"]
        if callable(interval):
            interval = interval(step)
            self._check_count(f"interval({step})", interval)
        return step - state["last_refresh"] >= interval

    def _step_size(self, state: dict[str, Any], group: dict[str, Any]) -> float:
        lr_cov, count = group["lr_cov"], state["refreshes"]
        if callable(lr_cov):
            lr_cov = lr_cov(count)
            self._check_number(f"lr_cov({count})", lr_cov)
        return float(lr_cov)

    def _take(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> bool:
        refreshed = {}
        for group, params in work:
            for p in params:
                state = self.state[p]
                if self._is_due(state, group):
                    factors = self._factors(p, group)
                    momenta = shampoo_momenta(
                        wide_gradient(p.grad, group["maximize"]),
                        factors.K,
                        factors.m,
                        damping=group["damping"],
                        alpha2=group["alpha2"],
                        batch_size=group["batch_size"],
                    )
                    refreshed[p] = (factors, momenta, self._step_size(state, group))
        if not _all_finite([m for _, momenta, _ in refreshed.values() for m in momenta]):
            return False
        for p, (factors, momenta, lr_cov) in refreshed.items():
            state = self.state[p]
            for m, new in zip(factors.m, momenta, strict=True):
                m.copy_(new)
            shampoo_factors_(factors.K, factors.m, lr_cov)
            state["refreshes"] += 1
            state["last_refresh"] = int(state["step"])
        for group, params in work:
            self._descend(group, params)
            self._count(params)
        return True

    def _descend(self, group: dict[str, Any], params: list[Tensor]) -> None:
        updates = []
        for p in params:
            factors = self._factors(p, group)
            if group["interval"] == 1:
                factors.products = None
            else:
                factors.keep_products()
            g = wide_gradient(p.grad, group["maximize"])
            updates.append(shampoo_precondition(g, factors.K, factors.products).view_as(p))
        states = [self.state[p] for p in params]
        buffers = [state.get("momentum_buffer") for state in states]
        for ps, us, bs, rs in by_device_and_dtype(
            params, updates, buffers, self._generators(group, params)
        ):
            descend(
                ps,
                us,
                bs if group["momentum"] != 0 else None,
                rs,
                lr=float(group["lr"]),
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with ``"function"`` in the place of functions: pass these again."""
        state = super().state_dict()
        groups = [
            {name: _FUNCTION if callable(value) else value for name, value in group.items()}
            for group in state["param_groups"]
        ]
        return {**state, "param_groups": groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # a copy, or a checkpoint: the matrices are made again of the state
        self._matrices = {}


def _listed(structure: Any) -> list[Structure]:
    """Return the structures of the axes, the last one for all further axes."""
    if isinstance(structure, str) or (
        isinstance(structure, Sequence) and len(structure) == 2 and isinstance(structure[1], Mapping)
    ):
        return [structure]
    if not isinstance(structure, Sequence) or not structure:
        raise ValueError(
            f"RFShampoo: structure={structure!r}; expected a name, (name, options), or a list of these."
        )
    return list(structure)


def _parsed(entry: Any) -> tuple[type[StructuredMatrix], Mapping[str, int]]:
    """Return the class and the options of ``name`` or ``(name, options)``."""
    name, options = (entry, {}) if isinstance(entry, str) else tuple(entry)
    if name not in STRUCTURES:
        raise ValueError(
            f"RFShampoo: unknown structure {name!r}; expected one of {', '.join(STRUCTURES)}."
        )
    return STRUCTURES[name], options


def _axes(
    p: Tensor, group: dict[str, Any]
) -> list[tuple[type[StructuredMatrix], int, Mapping[str, int]]]:
    """Return class, size and options of the factor of each axis."""
    structures = _listed(group["structure"])
    found = []
    for n, d in enumerate(p.shape or (1,)):
        entry = structures[min(n, len(structures) - 1)]
        cls, options = _parsed("diagonal" if d > group["max_dim"] else entry)
        found.append((cls, d, options))
    return found


def _all_finite(matrices: list[StructuredMatrix]) -> bool:
    devices: dict[torch.device, list[Tensor]] = {}
    for m in matrices:
        devices.setdefault(m.device, []).append(m.square_norm().double())
    return all(torch.stack(norms).isfinite().all().item() for norms in devices.values())
