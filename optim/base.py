"""The base class of optimizers that read curvature from the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch.optim import Optimizer

from backpack_ext import Extension


class CurvatureOptimizer(Optimizer, ABC):
    """An optimizer whose step needs what extensions compute during the backward pass.

    The optimizer says which ones, the training loop activates them:

    .. code-block:: python

        opt.zero_grad()
        with backpack(*opt.extensions()):
            loss_fn(model(x), y).backward()
        opt.step()
    """

    @abstractmethod
    def extensions(self) -> tuple[Extension, ...]:
        """Return what the next backward pass has to run with, for ``backpack(*opt.extensions())``."""

    @abstractmethod
    def accumulate(self) -> None:
        """Add the curvature of the last backward pass to a sum, as that pass did with its gradient.

        To be called after each backward pass whose gradients accumulate. The call after the last one
        may be left out. `SINGD`, `INGD`, `IKFAC` and `KFAC` add up on their own: there it does nothing.
        """
