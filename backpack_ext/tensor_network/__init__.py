r"""Convolutions of any dimension as tensor networks.

`Convolution` holds the hyper-parameters; its methods give the einsum expressions of the convolution, of
its derivatives and of the quantities that second-order methods need. `Expression.contract` evaluates
one, `dropped` estimates it from a random part of the terms, `RandomisedConv` trains with such estimates.

.. code-block:: python

    conv = Convolution.of(module)                       # or Convolution((3, 3), stride=2, padding=1)
    equation, operands, shape = conv.kfac_reduce(x)     # for an einsum of one's own
    A = conv.kfac_reduce(x).contract()

Dangel (2023), Convolutions and more as Einsum: A tensor network perspective with advances for
second-order methods.
"""

from backpack_ext.tensor_network.convolution import Convolution, index_pattern
from backpack_ext.tensor_network.dropout import dropped
from backpack_ext.tensor_network.expression import Expression
from backpack_ext.tensor_network.pattern import Pattern
from backpack_ext.tensor_network.randomised import RandomisedConv

__all__ = ["Convolution", "Expression", "Pattern", "RandomisedConv", "dropped", "index_pattern"]
