"""Dense reference values by plain autograd, slow on purpose.

Everything is that of the loss as written, reduction included. Index letters: n datum, s shared
position, o layer output feature, i layer input feature, g group of a convolution, d entry of one
datum's logits. Nothing here changes the problem.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from models import Problem

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVS, *TRANSPOSED)
# Other people's layers, by name, since this file does not import their packages: like nn.Linear, and
# those that compute `x @ W + b`.
OTHER_LINEAR = ("torch_geometric.nn.dense.linear.Linear",)
SWAPPED_LINEAR = ("transformers.pytorch_utils.Conv1D",)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


# -- the loss --------------------------------------------------------------------------------------


def _reduced(problem: Problem, reduction: str) -> nn.Module:
    loss_fn = deepcopy(problem.loss_fn)
    loss_fn.reduction = reduction
    return loss_fn


def loss_scale(problem: Problem) -> float:
    """`r` in `l = r sum_n sum_t l_nt`: 1 for a sum, else the loss "mean" over the loss "sum"."""
    if problem.loss_fn.reduction == "sum":
        return 1.0
    with torch.no_grad():
        logits = problem.forward()
        mean, total = (_reduced(problem, how)(logits, problem.target) for how in ("mean", "sum"))
    return (mean / total).item()


def per_sample_losses(problem: Problem) -> Tensor:
    """`l_n = r sum_t l_nt`, each datum's contribution to the loss, `[N]`; sums to the loss."""
    terms = _reduced(problem, "none")(problem.forward(), problem.target)
    return loss_scale(problem) * terms.reshape(problem.batch_size, -1).sum(1)


def output_hessian(problem: Problem) -> Tensor:
    """`H_n = d^2 l / d f_n^2` with respect to the logits of datum n, `[N, D, D]`.

    Raises:
        AssertionError: If the loss couples the data.
    """
    logits, n = problem.forward().detach(), problem.batch_size

    def loss(flat: Tensor) -> Tensor:
        return problem.loss_fn(flat.view_as(logits), problem.target)

    flat = logits.flatten()
    full = torch.autograd.functional.hessian(loss, flat).view(n, flat.numel() // n, n, -1)
    return _per_datum(full.movedim(2, 1))


def _per_datum(full: Tensor) -> Tensor:
    """The blocks `[n, n, ...]` of `[N, N, ...]`; the others, which couple data, must vanish."""
    n = len(full)
    coupled = full[~torch.eye(n, dtype=torch.bool)]
    assert not coupled.any(), "the data interact"
    return full[torch.arange(n), torch.arange(n)]


# -- parameters ------------------------------------------------------------------------------------


def _parameters(problem: Problem, names: list[str] | None = None) -> dict[str, Tensor]:
    """The trainable parameters by name, in order of `names`; a tied one has its first name."""
    params = {k: p for k, p in problem.model.named_parameters() if p.requires_grad}
    return params if names is None else {name: params[name] for name in names}


def _jacobian(outputs: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """`d outputs[k] / d input` in a loop over k, each `[K, *input.shape]`; unused means zero."""
    rows = [
        torch.autograd.grad(output, inputs, retain_graph=True, materialize_grads=True)
        for output in outputs
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def per_sample_grads(problem: Problem) -> dict[str, Tensor]:
    """Gradient of every `l_n`, `{name: [N, *shape]}`; sums to the gradient of the loss."""
    params = _parameters(problem)
    grads = _jacobian(per_sample_losses(problem), list(params.values()))
    return dict(zip(params, grads, strict=True))


def jacobian(problem: Problem, names: list[str] | None = None) -> dict[str, Tensor]:
    """Jacobian of the logits, read as `[N, D]`, `{name: [N, D, *shape]}`.

    Args:
        problem: The problem.
        names: Parameters to differentiate by; default: all trainable ones.
    """
    params = _parameters(problem, names)
    columns = _jacobian(problem.forward().flatten(), list(params.values()))
    n = problem.batch_size
    return {k: J.unflatten(0, (n, -1)) for k, J in zip(params, columns, strict=True)}


def _ggn(J: Tensor, H: Tensor) -> Tensor:
    """`sum_n J_n^T H_n J_n` of `J [N, D, P]` and `H [N, D, D]`, `[P, P]`."""
    return torch.einsum("ndp,nde,neq->pq", J, H, J)


def ggn_block(problem: Problem, names: list[str]) -> Tensor:
    """`sum_n J_n^T H_n J_n` of several parameters, flattened row-major and concatenated."""
    J = jacobian(problem, names)
    return _ggn(torch.cat([J[name].flatten(2) for name in names], dim=2), output_hessian(problem))


def ggn_blocks(problem: Problem) -> dict[str, Tensor]:
    """`sum_n J_n^T H_n J_n` of each parameter, flattened row-major, `{name: [p, p]}`."""
    H = output_hessian(problem)
    return {name: _ggn(J.flatten(2), H) for name, J in jacobian(problem).items()}


def ggn_diag(problem: Problem) -> dict[str, Tensor]:
    """Diagonal of the GGN, `{name: shape}`."""
    H = output_hessian(problem)
    return {k: torch.einsum("nd...,nde,ne...->...", J, H, J) for k, J in jacobian(problem).items()}


# -- layers ----------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        name: Module path.
        module: The module, in a copy of the problem's model.
        x: Detached input, leading size a multiple of N.
        z: Output before anything overwrites it, in the graph, no view.
    """

    name: str
    module: nn.Module
    x: Tensor
    z: Tensor


def _expand(tensor: Tensor, n: int) -> Tensor:
    """Repeat what is broadcast over the data: `[T, ...]` or `[1, T, ...]` to `[N, T, ...]`."""
    if tensor.shape[0] % n == 0:
        return tensor
    if tensor.shape[0] != 1:
        tensor = tensor[None]
    return tensor.expand(n, *tensor.shape[1:])


def layer_calls(problem: Problem) -> tuple[list[Call], Tensor]:
    """Run the forward on a copy of the model and record each call of an affine layer.

    A layer whose leading size is no multiple of N (positions `self.pos(torch.arange(T))`) counts
    as called on N copies of its input: the result is the same where it is broadcast.

    Returns:
        The calls in order, and the logits of the graph that holds their outputs.
    """
    model, n, calls = deepcopy(problem.model), problem.batch_size, []

    def record(name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        z = _expand(output, n).clone()
        calls.append(Call(name, module, _expand(args[0].detach(), n).clone(), z))
        return z.clone()  # an in-place operation after the layer must not reach z

    def hook(name: str):
        return lambda *args: record(name, *args)

    layers = [(name, m) for name, m in model.named_modules() if is_layer(m)]
    handles = [m.register_forward_hook(hook(name)) for name, m in layers]
    logits = replace(problem, model=model).forward()
    for handle in handles:
        handle.remove()
    return calls, logits


def is_layer(module: nn.Module) -> bool:
    """Whether a module is affine in its weight."""
    return isinstance(module, LAYERS) or _is_linear(module)


def _is_linear(module: nn.Module) -> bool:
    named = _name(module) in OTHER_LINEAR or _is_swapped_linear(module)
    return isinstance(module, nn.Linear) or named


def _is_swapped_linear(module: nn.Module) -> bool:
    return _name(module) in SWAPPED_LINEAR


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _groups(module: nn.Module) -> int:
    return getattr(module, "groups", 1)


def normal_weight(module: nn.Module, weight: Tensor) -> Tensor:
    """A tensor shaped like the module's weight in normal form, `[G, o, i]`.

    Linear `[o, i]`; Conv `[G o, C_in / G, *k]`, i = (C_in / G, *k); ConvTranspose
    `[C_in, C_out / G, *k]`, o = C_out / G, i = (C_in / G, *k); Embedding `[V, d]`, o = d, i = V;
    a swapped Linear `[i, o]`.
    """
    if isinstance(module, nn.Embedding) or _is_swapped_linear(module):
        return weight.T[None]
    if isinstance(module, TRANSPOSED):
        return weight.unflatten(0, (_groups(module), -1)).transpose(1, 2).flatten(2)
    return weight.flatten(1).unflatten(0, (_groups(module), -1))


def normal_outputs(module: nn.Module, z: Tensor) -> Tensor:
    """A tensor shaped like the module's output in normal form, `[G, R, S, o]`.

    R is the leading axis. S: the axes between R and the features of Linear and Embedding, the
    spatial axes of Conv, row-major.
    """
    if isinstance(module, nn.Embedding) or _is_linear(module):
        return z.reshape(1, z.shape[0], -1, z.shape[-1])
    return z.flatten(2).unflatten(1, (_groups(module), -1)).movedim(1, 0).transpose(2, 3)


def normal_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """`a[g,r,s,:] = d z[g,r,s,o] / d W[g,o,:]`, the same for every o: the layer is linear in W.

    Args:
        module: Linear, Embedding, Conv or ConvTranspose of any dimension, padding mode, groups, ...
        x: Its input, the rows leading.

    Returns:
        The layer's input in normal form, `[G, R, S, i]`: `z = a W^T + bias`.
    """

    def first_channels(weight: Tensor) -> Tensor:
        z = torch.func.functional_call(module, {"weight": weight}, (x,))
        return normal_outputs(module, z)[..., 0]

    J = torch.autograd.functional.jacobian(first_channels, module.weight.detach())
    rows = [normal_weight(module, row) for row in J.flatten(0, 2)]
    a = torch.stack(rows).unflatten(0, J.shape[:3])  # [G, R, S, G, o, i]
    return torch.stack([a[g, :, :, g, 0] for g in range(len(a))])


def normal_form(problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    """Inputs of a layer, and the Jacobian of the logits with respect to its outputs.

    The shared axis concatenates all calls of the layer, and of layers that hold the very same
    weight in the same role (not those of an Embedding and a Linear, whose o and i are swapped).
    A leading axis of size k N is read as `[N, k]`, and k becomes shared.

    Args:
        problem: The problem.
        name: Module path of the layer.

    Returns:
        `a [G, N, S, i]` and `J [G, N, D, S, o]`.
    """
    return normal_forms(problem, [name])[name]


def normal_forms(problem: Problem, names: list[str] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """`normal_form` of several layers, by default of all, from one Jacobian."""
    calls, logits = layer_calls(problem)
    named = {call.name: call.module for call in calls if names is None or call.name in names}
    calls = [c for c in calls if any(_same_weight(c.module, layer) for layer in named.values())]
    jacobians = _jacobian(logits.flatten(), [call.z for call in calls])
    pairs = list(zip(calls, jacobians, strict=True))
    return {
        name: _join_calls([(c, J) for c, J in pairs if _same_weight(c.module, layer)], problem)
        for name, layer in named.items()
    }


def _join_calls(pairs: list[tuple[Call, Tensor]], problem: Problem) -> tuple[Tensor, Tensor]:
    n = problem.batch_size
    inputs, outputs = [], []
    for call, J in pairs:
        a = normal_inputs(call.module, call.x)
        inputs.append(a.reshape(a.shape[0], n, -1, a.shape[-1]))
        J = torch.stack([normal_outputs(call.module, row) for row in J], dim=1)  # [G, N D, R, S, o]
        J = J.reshape(J.shape[0], n, -1, n, J.shape[2] // n * J.shape[3], J.shape[4])
        outputs.append(_per_datum(J.permute(1, 3, 0, 2, 4, 5)).transpose(0, 1))
    return torch.cat(inputs, dim=2), torch.cat(outputs, dim=3)


def _same_weight(one: nn.Module, other: nn.Module) -> bool:
    swapped = (nn.Embedding, *TRANSPOSED)
    return one.weight is other.weight and isinstance(one, swapped) == isinstance(other, swapped)


# -- Kronecker factors -----------------------------------------------------------------------------


def kfac_factors(
    problem: Problem, approx: str, name: str, bias: str = "separate"
) -> tuple[Tensor, Tensor]:
    """Exact (GGN) Kronecker factors of a layer; B carries r.

    expand: `A = 1/(N S) sum_ns a_ns a_ns^T`, `B = sum_ns J_ns^T H_n J_ns`;
    reduce: `A = 1/N sum_n abar_n abar_n^T`, `B = sum_n Jhat_n^T H_n Jhat_n` with abar the mean and
    Jhat the sum over the shared positions, of all calls together.

    Args:
        problem: The problem.
        approx: "expand" or "reduce".
        name: Module path of the layer.
        bias: "joint" appends 1 to a (in reduce after the mean), "separate" does not.

    Returns:
        `B [G, o, o]` and `A [G, i, i]`, without the group axis where G = 1.
    """
    return factors_of(*normal_form(problem, name), output_hessian(problem), approx, bias)


def factors_of(
    a: Tensor, J: Tensor, H: Tensor, approx: str, bias: str = "separate"
) -> tuple[Tensor, Tensor]:
    """`kfac_factors` of a `normal_form` and the `output_hessian`."""
    if approx == "reduce":
        a, J = a.mean(2, keepdim=True), J.sum(3, keepdim=True)
    elif approx != "expand":
        raise ValueError(f"approx must be 'expand' or 'reduce', got {approx!r}.")
    if bias == "joint":
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
    A = torch.einsum("gnsi,gnsj->gij", a, a) / (a.shape[1] * a.shape[2])
    B = torch.einsum("gndso,nde,gnesp->gop", J, H, J)
    return (B[0], A[0]) if len(A) == 1 else (B, A)


def kronecker_block(module: nn.Module, B: Tensor, A: Tensor) -> Tensor:
    """`B (x) A` as a dense block over `weight.flatten()`, then the bias if A has a row for it.

    Args:
        module: The layer: says how its weight is laid out.
        B: `[G, o, o]` or `[o, o]`.
        A: `[G, i, i]` or `[i, i]`, or i + 1 with a joint bias.

    Returns:
        `[p, p]`, zero between groups; p counts the weight's entries, and the bias's if joint.
    """
    B, A = B.reshape(-1, *B.shape[-2:]), A.reshape(-1, *A.shape[-2:])
    numel = module.weight.numel()
    place = normal_weight(module, torch.arange(numel).view(module.weight.shape))
    if A.shape[-1] == place.shape[-1] + 1:
        bias = numel + torch.arange(B.shape[0] * B.shape[1]).view(B.shape[0], -1, 1)
        place = torch.cat([place, bias], dim=-1)
    block = torch.zeros(place.numel(), place.numel(), dtype=A.dtype)
    for index, b, a in zip(place.flatten(1), B, A, strict=True):
        block[index[:, None], index] = torch.kron(b, a)
    return block


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Compare in the scale of the largest expected entry."""
    scale = expected.abs().max().clamp_min(1e-100).item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
