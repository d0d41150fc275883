"""What trains the parameters that have no Kronecker factors: an optimizer of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NAMES: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}


class Fallback:
    """An optimizer of torch's that works on the state of another one.

    Its parameters are given step by step. Their learning rate and weight decay are those of the groups
    that they belong to.

    Args:
        owner: Name of the other optimizer, for messages.
        kind: A name in `NAMES`, or a class of optimizers.
        options: Its options, without ``lr``.
        maximize: Whether to follow the gradient upwards.

    Raises:
        ValueError: If the name or an option is unknown, or out of range.
        TypeError: If the class is none of optimizers.
    """

    def __init__(
        self, owner: str, kind: str | type[Optimizer], options: Mapping[str, Any] | None, maximize: bool
    ):
        if isinstance(kind, str):
            if kind not in NAMES:
                known = ", ".join(map(repr, NAMES))
                raise ValueError(
                    f"{owner}: fallback={kind!r}; expected {known}, or a subclass of "
                    "torch.optim.Optimizer."
                )
            kind = NAMES[kind]
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise TypeError(f"{owner}: fallback={kind!r}; expected a subclass of torch.optim.Optimizer.")
        self.kind, self.options = kind, dict(options or {})
        if "lr" in self.options:
            raise ValueError(f"{owner}: fallback_options has an lr; pass it as fallback_lr.")
        if maximize:
            self.options["maximize"] = True
        known = inspect.signature(kind.__init__).parameters
        unknown = [name for name in self.options if name not in known]
        if unknown:
            raise ValueError(
                f"{owner}: fallback_options has {unknown[0]!r}, which {kind.__name__} does not take."
            )
        self._decays = "weight_decay" in known and "weight_decay" not in self.options
        self._optimizer = self._new([torch.nn.Parameter(torch.zeros(1))], 1e-3, 0.0)  # checks options
        self._optimizer.param_groups.clear()

    def _new(self, params: list[Tensor], lr: float, weight_decay: float) -> Optimizer:
        decay = {"weight_decay": weight_decay} if self._decays else {}
        return self.kind(params, lr=lr, **decay, **self.options)

    def step(self, state: dict, groups: list[tuple[list[Tensor], float, float]]) -> None:
        """Take a step.

        Args:
            state: The state of the other optimizer, to which that of these parameters is added.
            groups: Parameters, with their learning rate and weight decay.
        """
        inner = self._optimizer
        inner.state = state
        inner.param_groups = []
        for params, lr, weight_decay in groups:
            if params:
                options = {**inner.defaults, "lr": lr}
                if self._decays:
                    options["weight_decay"] = weight_decay
                inner.param_groups.append({**options, "params": params})
        if inner.param_groups:
            inner.step()
        inner.param_groups, inner.state = [], {}
