"""Hessian diagonals that backward passes leave on the parameters: each is used once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from backpack_ext import Extension, HesScale
from optim.labels import called
from optim.state import state_dtype

# A tensor as it was when we looked. The reference is weak: the next pass replaces the diagonal, and
# the old one shall not stay in memory until then.
Mark = tuple[weakref.ref, int]


def mark(t: Tensor) -> Mark:
    """Return what tells a tensor from its successors, and from itself after it was written to."""
    return weakref.ref(t), t._version


def unchanged(t: Tensor, mark: Mark | None) -> bool:
    """Whether a tensor is the one that was marked, and has not been written to since."""
    return mark is not None and mark[0]() is t and mark[1] == t._version


def diagonal_extension(
    owner: str, gauss_newton: bool, savefield: str | None, extension: Extension | None
) -> Extension:
    """Return the extension that computes an optimizer's diagonals.

    Args:
        owner: Name of the optimizer, for messages.
        gauss_newton: Whether `HesScale` shall leave out second derivatives of the modules.
        savefield: Attribute of the parameters for the result; None for the extension's default.
        extension: An extension to use in place of ``HesScale``, or None.

    Raises:
        ValueError: If an extension is given together with options that it would have to be made with.
    """
    if extension is None:
        return HesScale(gauss_newton=gauss_newton, savefield=savefield)
    if gauss_newton or savefield is not None:
        raise ValueError(
            f"{owner}: gauss_newton= and savefield= describe the extension that is made when "
            f"extension= is left out. Pass them to {type(extension).__name__} instead."
        )
    return extension


class Diagonals:
    """The diagonals that belong to the present gradients.

    A gradient is replaced or added to by every backward pass, a diagonal by every pass inside of
    ``with backpack(...)``. So a diagonal that was read before, in a later step, belongs to an older
    gradient: it is an error. The attribute itself is left alone; which tensor was read, and in which
    version, is remembered here.

    Args:
        owner: Name of the optimizer, for messages.
        savefield: Attribute of the parameters that holds the diagonal.
    """

    def __init__(self, owner: str, savefield: str):
        self.owner = owner
        self.savefield = savefield
        # Keyed by the parameters as `Optimizer.state` is.
        self._sums: dict[Tensor, Tensor] = {}
        self._used: dict[Tensor, Mark] = {}
        self._grads: dict[Tensor, Mark] = {}  # at the last `accumulate`

    def accumulate(self, groups: list[dict]) -> None:
        """Add the diagonals of the last backward pass to the sums.

        Args:
            groups: The optimizer's ``param_groups``.

        Raises:
            RuntimeError: If a diagonal is missing, or older than the gradient.
            TypeError: If it is no real tensor.
            ValueError: If it is not shaped like its parameter.
        """
        fresh = {}
        for p, label in with_gradient(groups):
            h = self._present(p, label)
            if h is not None and not unchanged(h, self._used.get(p)):
                fresh[p] = h
            elif h is None:
                raise RuntimeError(self._missing(label))
            elif not unchanged(p.grad, self._grads.get(p)):
                raise RuntimeError(self._stale(label))
            # else the last pass did not reach this parameter: there is nothing to add
        for p, h in fresh.items():
            self._sums[p] = self._with_sum(p, h)
        self._remember(fresh)
        self._grads = {p: mark(p.grad) for p, _ in with_gradient(groups)}

    def read(self, groups: list[dict]) -> dict[Tensor, Tensor]:
        """Return the diagonals of all parameters that have a gradient; changes nothing.

        Args:
            groups: The optimizer's ``param_groups``.

        Returns:
            The diagonal of each parameter: what was accumulated, plus the present one unless that is
            in the sum already.

        Raises:
            RuntimeError: If a diagonal is missing, or older than the gradient.
            TypeError: If it is no real tensor.
            ValueError: If it is not shaped like its parameter.
        """
        diagonals = {}
        for p, label in with_gradient(groups):
            h = self._present(p, label)
            if h is not None and not unchanged(h, self._used.get(p)):
                diagonals[p] = self._with_sum(p, h)
            elif p in self._sums:
                diagonals[p] = self._sums[p]
            elif h is None and frozen(groups, p) and not p.grad.any():
                # a step that changes nothing: how torch.distributed.checkpoint makes empty states
                diagonals[p] = torch.zeros_like(p, dtype=state_dtype(p))
            else:
                raise RuntimeError(self._missing(label) if h is None else self._stale(label))
        return diagonals

    def done(self, params: Iterable[Tensor]) -> None:
        """Note that a step was made with what `read` returned for these parameters."""
        present = {p: getattr(p, self.savefield, None) for p in params}
        self._remember({p: h for p, h in present.items() if h is not None})
        self.forget()

    def forget(self) -> None:
        """Forget the sums: their gradients are gone."""
        self._sums.clear()
        self._grads.clear()

    def _remember(self, diagonals: dict[Tensor, Tensor]) -> None:
        self._used.update({p: mark(h) for p, h in diagonals.items()})

    def _with_sum(self, p: Tensor, h: Tensor) -> Tensor:
        # At least float32, and never in place: the first term is the user's own tensor.
        h = h.to(state_dtype(p))
        return self._sums[p] + h if p in self._sums else h

    def _present(self, p: Tensor, label: str) -> Tensor | None:
        h = getattr(p, self.savefield, None)
        if h is None:
            return None
        if not isinstance(h, Tensor) or h.is_complex() or p.is_complex():
            raise TypeError(
                f"{self.owner}: expected `{self.savefield}` of {label} to be a real tensor like its "
                f"real parameter, got {getattr(h, 'dtype', type(h).__name__)} for {p.dtype}."
            )
        if h.shape != p.shape:
            raise ValueError(
                f"{self.owner}: `{self.savefield}` of {label} has shape {tuple(h.shape)}; expected "
                f"that of the parameter, {tuple(p.shape)}, summed over the batch."
            )
        return h

    def _missing(self, label: str) -> str:
        return (
            f"{self.owner}: {label} has a gradient but no `{self.savefield}`. Run forward and backward "
            "pass of the extended model inside `with backpack(*opt.extensions()):`. A parameter that "
            "the extension skips has to go to another optimizer."
        )

    def _stale(self, label: str) -> str:
        return (
            f"{self.owner}: `{self.savefield}` of {label} was used before and has not been computed "
            "anew. Each backward pass has to run inside `with backpack(*opt.extensions()):`, each "
            "step needs one. A gradient that the pass did not reach has to be cleared, "
            "`opt.zero_grad()`."
        )


def frozen(groups: list[dict], p: Tensor) -> bool:
    """Whether the learning rate of a parameter is zero."""
    return any(group.get("lr") == 0 and any(q is p for q in group["params"]) for group in groups)


def with_gradient(groups: list[dict]) -> Iterator[tuple[Tensor, str]]:
    """Yield each parameter that has a gradient, and what to call it in a message."""
    for k, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            if p.grad is not None:
                yield p, f"parameter {called(k, group, i)}"
