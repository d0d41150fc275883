"""``Tensor.retain_grad``: gradients that are retained are those of the user's own backward passes.

A nested pass through the user's graph adds what passes a tensor to its ``.grad``: torch's engine runs
the hook of ``retain_grad`` in every pass. Nothing in the graph says where such hooks are, so that
tensors are noted as they get them: ``torch.Tensor.retain_grad`` is wrapped, and so is
``torch.autograd.backward``, whose ``inputs`` get them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_retaining: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_retain_grad, _backward = Tensor.retain_grad, torch.autograd.backward


@wraps(_retain_grad)
def _noting(self: Tensor) -> None:
    _retain_grad(self)
    if self.retains_grad:  # leaves, for which it does nothing, do not
        _retaining[self] = None


@wraps(_backward)
def _noting_inputs(*args, **kwargs) -> None:
    inputs = kwargs.get("inputs", args[5] if len(args) > 5 else None)
    if isinstance(inputs, Iterator):  # `model.parameters()` can be read once
        inputs = tuple(inputs)
        args, kwargs = args[:5], {**kwargs, "inputs": inputs}
    inputs = inputs.values() if isinstance(inputs, Mapping) else inputs
    for t in (inputs,) if isinstance(inputs, Tensor) else inputs or ():
        if isinstance(t, Tensor) and not t.is_leaf:
            _retaining[t] = None
    _backward(*args, **kwargs)


Tensor.retain_grad, torch.autograd.backward = _noting, _noting_inputs


def retained() -> list[tuple[Tensor, Tensor | None]]:
    """Return the tensors that retain their gradients, with what these are now."""
    return [(t, t.grad) for t in list(_retaining)] if _retaining else []


def restore(grads: list[tuple[Tensor, Tensor | None]]) -> None:
    """Take back what was added since `retained`: torch adds out of place."""
    for t, grad in grads:
        t.grad = grad
