"""``Tensor.retain_grad``: gradients that are retained are those of the user's own backward passes.

A nested pass through the user's graph adds what passes a tensor to its ``.grad``: torch's engine runs
the hook of ``retain_grad`` in every pass. Nothing in the graph says where such hooks are, so that
tensors are noted as they are asked to retain: ``torch.Tensor.retain_grad`` is wrapped.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_retaining: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_torchs = Tensor.retain_grad


def _retain_grad(self: Tensor) -> None:
    _torchs(self)
    if self.retains_grad:  # leaves, for which it does nothing, do not
        _retaining[self] = None


_retain_grad.__name__, _retain_grad.__doc__ = "retain_grad", _torchs.__doc__
Tensor.retain_grad = _retain_grad


def retained() -> list[tuple[Tensor, Tensor | None]]:
    """Return the tensors that retain their gradients, with what these are now."""
    return [(t, t.grad) for t in list(_retaining)] if _retaining else []


def restore(grads: list[tuple[Tensor, Tensor | None]]) -> None:
    """Take back what was added since `retained`: torch adds out of place."""
    for t, grad in grads:
        t.grad = grad
