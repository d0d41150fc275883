"""Hessian diagonals by dense Jacobians, slow on purpose, and the recursion that approximates them.

A network is a list of modules in topological order, each a function of one or more tensors of the
whole batch; parameters are arguments like any other. With g = dl/dz and h ~ diag d^2 l / dz^2 at its
output z = F(x, ...), a module adds to each of its arguments

    h_x[j] += sum_i J_ij^2 h_i + sum_i g_i d^2 F_i / d x_j^2,    J = dF/dx,

where i runs over all entries of the output and j over those of the argument. This is exact for one
module with a diagonal Hessian at its output; what is dropped is every off-diagonal. The loss is the
last module, a scalar with g = 1 and h = 0, so that its arguments get the exact diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev


def exact_diagonal(
    loss_fn: Callable[..., Tensor], tensors: list[Tensor], vectorize: bool = False
) -> list[Tensor]:
    """`d^2 l / d t_j^2` of every entry of every tensor, by double backward.

    Args:
        loss_fn: A scalar function of the tensors; each is one argument.
        tensors: Where to evaluate.
        vectorize: Whether all entries of a tensor share one backward: faster, needs batching rules.

    Returns:
        One diagonal for each tensor, in its shape.
    """
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = loss_fn(*leaves)
    grads = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    return [
        _diagonal_of_jacobian(g, t, vectorize).view_as(t) for g, t in zip(grads, leaves, strict=True)
    ]


def _diagonal_of_jacobian(g: Tensor, t: Tensor, vectorize: bool) -> Tensor:
    """`d g_j / d t_j`, `[numel]`; zero where g does not depend on t."""
    if not g.requires_grad:
        return torch.zeros_like(t).flatten().detach()
    eye = torch.eye(t.numel(), dtype=t.dtype).view(-1, *t.shape)
    options = {"retain_graph": True, "materialize_grads": True}
    if vectorize:
        (rows,) = torch.autograd.grad(g, t, eye, is_grads_batched=True, **options)
        return rows.flatten(1).diagonal()
    rows = [torch.autograd.grad(g, t, e, **options)[0].flatten()[j] for j, e in enumerate(eye)]
    return torch.stack(rows)


# -- networks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """`name = fn(*inputs)`.

    Attributes:
        name: Of the output.
        fn: A function of tensors that torch.func can differentiate twice; returns one tensor.
        inputs: Names of leaves or of outputs of earlier modules, each once.
    """

    name: str
    fn: Callable[..., Tensor]
    inputs: tuple[str, ...]


@dataclass
class Graph:
    """Modules in the order in which they were called; a call returns the name of its output.

    Attributes:
        modules: What was called.
    """

    modules: list[Module] = field(default_factory=list)

    def __call__(self, fn: Callable[..., Tensor], *inputs: str) -> str:
        assert len(set(inputs)) == len(inputs), "a tensor that is used twice is one argument"
        name = f"output {len(self.modules)}"
        self.modules.append(Module(name, fn, inputs))
        return name

    def layer(self, model: nn.Module, name: str, *inputs: str) -> str:
        """Call a submodule of the model as one module, its parameters being further arguments."""
        parameters = [f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters()]
        return self(as_function(model.get_submodule(name), len(inputs)), *inputs, *parameters)

    def chain(self, model: nn.Module, name: str, *names: str) -> str:
        """Call the submodules `names` of the model one after the other, on the tensor `name`."""
        for layer in names:
            name = self.layer(model, layer, name)
        return name


def as_function(module: nn.Module, n_inputs: int = 1) -> Callable[..., Tensor]:
    """A copy of the module as a function of its inputs, followed by its parameters; not in place."""
    module = deepcopy(module)
    for m in module.modules():
        if hasattr(m, "inplace"):
            m.inplace = False
    names = [name for name, _ in module.named_parameters()]

    def fn(*args: Tensor) -> Tensor:
        parameters = dict(zip(names, args[n_inputs:], strict=True))
        return functional_call(module, parameters, args[:n_inputs])

    return fn


def forward(modules: list[Module], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the network by name, detached."""
    values = {name: leaf.detach() for name, leaf in leaves.items()}
    for m in modules:
        values[m.name] = m.fn(*(values[name] for name in m.inputs)).detach()
    return values


def recursion(
    modules: list[Module],
    leaves: dict[str, Tensor],
    loss: Module,
    gauss_newton: bool = False,
    seeds: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The diagonals of all leaves that the loss reaches, in their shapes, summed over the batch.

    Args:
        modules: The network, in topological order.
        leaves: Inputs and parameters.
        loss: A scalar function of some tensors of the network.
        gauss_newton: Whether the second term is dropped, that of the loss excepted.
        seeds: Diagonals at the loss's arguments that replace the exact ones (BL89).

    Returns:
        `{name of a leaf: diagonal}`.
    """
    values = forward(modules, leaves)
    args = [values[name] for name in loss.inputs]
    h = dict(zip(loss.inputs, exact_diagonal(loss.fn, args), strict=True)) | (seeds or {})
    g = {name: grad(loss.fn, argnums=k)(*args) for k, name in enumerate(loss.inputs)}
    for m in reversed(modules):
        if m.name not in g:
            continue
        g_out, h_out = g.pop(m.name), h.pop(m.name)
        args = [values[name] for name in m.inputs]
        for k, name in enumerate(m.inputs):
            g_in, h_in = _through(m.fn, args, k, g_out, h_out, gauss_newton)
            g[name] = g.get(name, 0) + g_in
            h[name] = h.get(name, 0) + h_in
    return h


def _through(
    fn: Callable[..., Tensor], args: list[Tensor], k: int, g: Tensor, h: Tensor, gauss_newton: bool
) -> tuple[Tensor, Tensor]:
    """Gradient and diagonal at argument k of a module, from those at its output."""

    def of_argument(x: Tensor) -> Tensor:
        return fn(*args[:k], x, *args[k + 1 :])

    x = args[k]
    J = jacrev(of_argument)(x).reshape(g.numel(), x.numel())
    h_in = h.flatten() @ J.square()
    if not gauss_newton:
        hessian = jacrev(grad(lambda x: (g * of_argument(x)).sum()))(x)
        h_in = h_in + hessian.reshape(x.numel(), x.numel()).diagonal()
    return (g.flatten() @ J).view_as(x), h_in.view_as(x)


# -- losses ----------------------------------------------------------------------------------------


def bl89_seed(loss_fn: nn.CrossEntropyLoss, logits: Tensor, target: Tensor) -> Tensor:
    """`h_c = t_c w_c (q_c - q_c^2) r`: the softmax as one more elementwise layer.

    With class indices `t = (1 - e) onehot(y) + e / C`, e the label smoothing.

    Args:
        loss_fn: Its reduction, class weights w, label smoothing and ignored index.
        logits: `[N, C]` or `[N, C, ...]`.
        target: Class indices, `[N]` or `[N, ...]`, or probabilities, shaped like the logits.
    """
    C, q = logits.shape[1], logits.softmax(1)
    weight = torch.ones(C) if loss_fn.weight is None else loss_fn.weight
    w = weight.to(q).view(-1, *[1] * (q.dim() - 2))
    if target.is_floating_point():
        t, terms = target, target[:, 0].numel()
    else:
        kept = target != loss_fn.ignore_index
        t = nn.functional.one_hot(target.where(kept, 0), C).movedim(-1, 1) * kept.unsqueeze(1)
        terms = (t * w).sum()
        t = (1 - loss_fn.label_smoothing) * t + loss_fn.label_smoothing / C * kept.unsqueeze(1)
    r = 1 / terms if loss_fn.reduction == "mean" else 1.0
    return t * w * (q - q.square()) * r


def penultimate(loss: Module, last: Module) -> Module:
    """The last layer and the loss of its output as one module: exact one layer further down."""
    assert loss.inputs == (last.name,)
    return Module(loss.name, lambda *args: loss.fn(last.fn(*args)), last.inputs)
