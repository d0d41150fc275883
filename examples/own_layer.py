"""A rule for one's own layer, for one extension and for all of them, checked against autograd."""

import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from backpack_ext import KFAC, BatchGrad, Rule, backpack, extend, register_rule
from curvature import Axes


class KernelLinear(nn.Module):
    """An affine layer with an equalised learning rate: its matrix is a multiple of what it stores.

    It stores the matrix transposed, under names of its own.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))
        self.offset = nn.Parameter(torch.zeros(outputs))
        self.gain = inputs**-0.5

    def forward(self, x):
        """Map ``[N, ..., inputs]`` to ``[N, ..., outputs]``."""
        return x @ (self.gain * self.kernel) + self.offset


class KernelLinearRule(Rule):
    """The layer in normal form, which every extension is written for."""

    weight, bias = "kernel", "offset"  # what the layer calls its matrix and its bias

    def inputs(self, site):
        """Return what the kernel is multiplied with, ``[n, s, i]``: data, shared positions, features."""
        return site.module.gain * site.rows(site.input(), features=1)

    def cotangents(self, site, g):
        """Return vectors ``[v, *output.shape]`` at the output as ``[v, n, s, o]``."""
        return site.vector_rows(g, features=1)

    def weight_axes(self, module):
        """Return how the kernel's axes form the matrix ``[group, o, i]``."""
        return Axes("i o -> 1 o i")


torch.manual_seed(0)
X, y = torch.randn(8, 5), torch.randint(3, (8,))
model = extend(nn.Sequential(KernelLinear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
loss_fn, kernel = extend(nn.CrossEntropyLoss()), model[0].kernel

with backpack(KFAC(fisher="exact")):
    loss_fn(model(X), y).backward()
shape = tuple(kernel.kfac.matrix.shape)
print(f"Without a rule: {type(kernel.kfac).__name__} {shape}, no Kronecker factors")

batch_grad = BatchGrad()
batch_grad.set_module_extension(KernelLinear, KernelLinearRule())  # for this extension only
with backpack(batch_grad):
    loss_fn(model(X), y).backward()
share = grad(lambda p, x, t: loss_fn(functional_call(model, p, x), t) / len(X))  # of a mean loss
G = vmap(share, (None, 0, 0))(dict(model.named_parameters()), X, y)["0.kernel"]
same = torch.allclose(kernel.grad_batch, G, atol=1e-6)
print(f"BatchGrad{tuple(G.shape)} agrees with autograd: {same}")

register_rule(KernelLinear)(KernelLinearRule)  # for all extensions; works as a decorator, too
with backpack(KFAC(fisher="exact")):
    loss_fn(model(X), y).backward()
J, q = vmap(jacrev(model[1:]))(model[0](X)), model(X).softmax(dim=1)
H = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]  # Hessian of the cross-entropy
(B, A), B_autograd, A_input = kernel.kfac, (J.mT @ H @ J).mean(0), X.T @ X / 5 / len(X)
same = torch.allclose(B, B_autograd, atol=1e-6) and torch.allclose(A, A_input, atol=1e-6)
print(f"{kernel.kfac} agrees with autograd: {same}")
