"""Optimizers that use what a backward pass computes with ``backpack_ext``'s extensions.

.. code-block:: python

    opt = AdaHesScale(model, lr=1e-3)
    for x, y in loader:
        opt.zero_grad()
        with backpack(*opt.extensions()):
            loss_fn(model(x), y).backward()
        opt.step()

Each is a ``torch.optim.Optimizer``: parameter groups, schedulers, closures, checkpoints and
``GradScaler`` work as usual.

* `SINGD`, `INGD`, `IKFAC`, `KFAC`: Kronecker-factored preconditioners, the first three without inverses;
* `RFRMSProp`, `RFAdamW`, `RFShampoo`: adaptive methods without the square root, from gradients alone;
* `AdaHesScale`: Adam with Hessian diagonals; `HesScaleStep` wraps any optimizer and shortens its steps.
"""

from optim.adahesscale import AdaHesScale, adahesscale
from optim.base import CurvatureOptimizer
from optim.hesscale_step import HesScaleStep
from optim.kfac import KFAC
from optim.rootfree import RFAdamW, RFRMSProp, RFShampoo
from optim.singd import IKFAC, INGD, SINGD

__all__ = [
    "IKFAC",
    "INGD",
    "KFAC",
    "SINGD",
    "AdaHesScale",
    "CurvatureOptimizer",
    "HesScaleStep",
    "RFAdamW",
    "RFRMSProp",
    "RFShampoo",
    "adahesscale",
]
