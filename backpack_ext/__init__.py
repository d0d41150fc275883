"""Curvature in one backward pass, for any PyTorch model, on top of BackPACK.

.. code-block:: python

    model, loss_fn = extend(model), extend(torch.nn.CrossEntropyLoss())
    with backpack(KFAC(approx="reduce"), BatchL2Grad()):
        loss_fn(model(x), y).backward()
    B, A = model.head.weight.kfac
"""

from backpack_ext import policy, tensor_network
from backpack_ext.attach import attach_diagonal, attach_loss
from backpack_ext.context import backpack
from backpack_ext.diagonals import register_activation, register_diagonal_rule
from backpack_ext.ekfac import EKFAC
from backpack_ext.errors import ProcessGroupError, RecordingError, UnsupportedError
from backpack_ext.extend import extend, unextend
from backpack_ext.extension import Extension
from backpack_ext.first_order import (
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    SumGradSquared,
    Variance,
)
from backpack_ext.ggn import DiagGGN
from backpack_ext.hesscale import BL89, HesScale
from backpack_ext.kfac import KFAC
from backpack_ext.loss_diagonal import loss_diagonal
from backpack_ext.lowrank_ggn import LowRankGGN
from backpack_ext.ntk import NTK
from backpack_ext.rules import Rule, register_rule
from backpack_ext.sharing import sharing

__all__ = [
    "BL89",
    "EKFAC",
    "KFAC",
    "NTK",
    "BatchDotGrad",
    "BatchGrad",
    "BatchL2Grad",
    "DiagGGN",
    "Extension",
    "HesScale",
    "LowRankGGN",
    "ProcessGroupError",
    "RecordingError",
    "Rule",
    "SumGradSquared",
    "UnsupportedError",
    "Variance",
    "attach_diagonal",
    "attach_loss",
    "backpack",
    "extend",
    "loss_diagonal",
    "policy",
    "register_activation",
    "register_diagonal_rule",
    "register_rule",
    "sharing",
    "tensor_network",
    "unextend",
]
