"""The dense definitions for a random net, by plain autograd, and the comparison with the library.

Index letters: n datum, m entry of the logits (of all data), r row of a layer's input (of all data,
positions and calls), g group of a convolution, o and i its output and input features.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from unittest.mock import patch

import torch
from fuzz import Case, Loss
from torch import Tensor, nn
from torch.nn import functional as F

from backpack_ext import (
    EKFAC,
    KFAC,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    SumGradSquared,
    Variance,
    attach_loss,
    backpack,
    extend,
)
from backpack_ext.pending import Pending
from curvature import DenseBlock, DiagonalBlock, Kronecker, KroneckerEigen

CONVS = (nn.Conv1d, nn.Conv2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
FIELDS = (
    "grad_batch",
    "batch_l2",
    "batch_dot",
    "sum_grad_squared",
    "variance",
    "diag_ggn_exact",
    "kfac_expand",
    "kfac_reduce",
    "kfac_empirical",
    "kfac_reduce_empirical",
    "ekfac",
)


EMPIRICAL = ("empirical", "reduce_empirical")


class Disagreement(AssertionError):
    """The library and the definitions differ."""


def owners(shape: torch.Size, N: int, axis: int) -> Tensor:
    """Return the datum of each entry of a tensor whose leading axes are data and positions.

    Args:
        shape: `[k N, ...]`, the data first; with `axis` 1 `[T, N, ...]` or `[k N]`, data last.
        N: Number of data.
        axis: 0 or 1.
    """
    if axis == 0:
        owner = torch.arange(shape[0]).div(shape[0] // N, rounding_mode="floor")
    elif len(shape) == 1:
        return torch.arange(shape[0]) % N
    else:
        owner = torch.arange(N).expand(shape[0], N)
    return owner.reshape(*owner.shape, *[1] * (len(shape) - owner.dim())).expand(shape)


@dataclass
class Call:
    """One call of an affine layer.

    Attributes:
        path: Of the module.
        module: The layer.
        a: Its inputs in normal form, `[g, r, i]`.
        owner: The datum of each row.
        z: Its output, in the graph.
    """

    path: str
    module: nn.Module
    a: Tensor
    owner: Tensor
    z: Tensor

    def rows(self, z: Tensor) -> Tensor:
        """Bring tensors shaped like the output, `[m, *z]`, to `[m, g, r, o]`."""
        if isinstance(self.module, (nn.Linear, nn.Embedding)):
            return z.flatten(1, -2).unsqueeze(1)
        groups = self.module.groups
        return z.flatten(3).unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3)

    @property
    def key(self) -> tuple:
        """Calls with one key are one weight-sharing layer."""
        f = self.module
        roles = {"weight": f.weight, "bias": getattr(f, "bias", None)}
        kind = "table" if isinstance(f, nn.Embedding) else "matrix"
        return kind, *((k, id(p)) for k, p in roles.items() if p is not None and p.requires_grad)


def patches(f: nn.Module, x: Tensor) -> Tensor:
    """Return a convolution's inputs `[N, pixels, g, i]`: what one-hot kernels give."""
    transposed, w = isinstance(f, TRANSPOSED), f.weight
    per_group = f.in_channels // f.groups
    one_hot = torch.eye(per_group * w[0, 0].numel())
    if transposed:  # [c, i, *k] per group
        kernel = one_hot.reshape(-1, per_group, *w.shape[2:]).transpose(0, 1)
    else:  # [i, c, *k] per group
        kernel = one_hot.reshape(-1, per_group, *w.shape[2:])
    kernel = torch.cat([kernel] * f.groups)
    probe = deepcopy(f)
    probe.weight, probe.bias = nn.Parameter(kernel), None
    if not transposed:
        probe.out_channels = len(kernel)
    z = probe(x).flatten(2).transpose(1, 2)
    return z.unflatten(2, (f.groups, -1))


class Oracle:
    """Everything about one batch that plain autograd can tell.

    Args:
        case: The case; its net is copied.
        which: 0 or 1, the batch.
    """

    def __init__(self, case: Case, which: int):
        self.case, self.N = case, case.sizes[which]
        self.net = net = deepcopy(case.net)
        for s in net.modules():
            s.checkpointed = False  # the forward would be recorded again and again
        self.calls: list[Call] = []
        handles = [
            f.register_forward_hook(self._hook(path), with_kwargs=True)
            for path, f in net.named_modules()
            if isinstance(f, (nn.Linear, nn.Embedding, *CONVS, *TRANSPOSED))
            and isinstance(f.weight, nn.Parameter)
            and not hasattr(f, "parametrizations")
        ]
        outputs = net(case.batches[which].clone())
        for handle in handles:
            handle.remove()
        self.names = [k for k, p in net.named_parameters() if p.requires_grad]
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.G = [torch.zeros(self.N, *p.shape) for p in self.parameters]
        self.blocks = [torch.zeros(p.numel(), p.numel()) for p in self.parameters]
        layers: dict[tuple, list[Call]] = {}
        for call in self.calls:
            layers.setdefault(call.key, []).append(call)
        self.layers = list(layers.values())
        self.B = {approx: [0] * len(self.layers) for approx in ("expand", "reduce", *EMPIRICAL)}
        for loss, output in zip(case.losses, outputs, strict=True):
            self._add(loss, loss.logits(output), loss.targets[which])

    def _hook(self, path: str):
        def hook(f: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
            if not out.requires_grad or not any(p.requires_grad for p in f.parameters()):
                return None
            x = (args[0] if args else kwargs["input"]).detach()
            N, axis = self.N, self.case.axis_of(path)
            if isinstance(f, nn.Embedding):
                if x.dim() == 1:  # positions: the same for all data
                    x, out = x.expand(N, -1), out.expand(N, *out.shape)
                a = F.one_hot(x, f.num_embeddings).double()
                if f.padding_idx is not None:
                    a = a * (x != f.padding_idx).unsqueeze(-1)
                a, owner = a.flatten(0, -2)[None], owners(x.shape, N, axis).flatten()
            elif isinstance(f, nn.Linear):
                a, owner = x.flatten(0, -2)[None], owners(x.shape[:-1], N, axis).flatten()
            else:
                with torch.no_grad():
                    a = patches(f, x)
                owner = owners(a.shape[:2], N, axis).flatten()
                a = a.flatten(0, 1).transpose(0, 1)
            z = out.clone()
            self.calls.append(Call(path, f, a, owner, z))
            return z.clone()  # an in-place operation after the layer must not reach z

        return hook

    def _add(self, loss: Loss, z: Tensor, target: Tensor) -> None:
        """Add one loss's share of all quantities."""
        N, params = self.N, self.parameters
        none = deepcopy(loss.module)
        none.reduction = "none"
        terms = none(z, target)
        value = loss.module(z, target)
        r = (value / terms.sum()).item() if loss.module.reduction == "mean" else 1.0
        self.scale = r * loss.factor
        # the loss's rows are flat, `[T N]`, where they are sequence-first
        owner = owners(terms.shape[:1], N, loss.axis).repeat_interleave(terms[0].numel())
        per_datum = z.new_zeros(N).index_add(0, owner, loss.factor * r * terms.flatten())
        zs = [call.z for call in self.calls]
        first = [*params, *zs]
        slopes = [torch.zeros_like(z) for z in zs]
        for n in range(N):
            found = torch.autograd.grad(per_datum[n], first, retain_graph=True, materialize_grads=True)
            for G, g in zip(self.G, found, strict=False):
                G[n] += g
            slopes = [a + b for a, b in zip(slopes, found[len(params) :], strict=True)]
        H = torch.autograd.functional.hessian(
            lambda flat: loss.factor * loss.module(flat.view_as(z), target),
            z.detach().flatten(),
            vectorize=True,
        )
        J = jacobian(z.flatten(), first)
        for block, j in zip(self.blocks, J, strict=False):
            j = j.reshape(len(j), -1)
            block += j.T @ H @ j
        # the Jacobian is autograd's, vectorised: it has to agree with the plain gradient
        grads = torch.autograd.grad(value, first, retain_graph=True, materialize_grads=True)
        (slope,) = torch.autograd.grad(value, z, retain_graph=True)
        top = max(g.abs().max() for g in grads)
        for j, g in zip(J, grads, strict=True):
            close(torch.tensordot(slope.flatten(), j, 1), g, "the oracle itself", top)
        at = {id(call): k for k, call in enumerate(self.calls)}
        for k, layer in enumerate(self.layers):
            b = torch.cat([call.rows(J[len(params) + at[id(call)]]) for call in layer], 2)
            e = torch.cat([call.rows(slopes[at[id(call)]][None]) for call in layer], 2)[0]
            self.B["expand"][k] = self.B["expand"][k] + torch.einsum("mgro,mk,kgrp->gop", b, H, b)
            b = b.sum(2)
            self.B["reduce"][k] = self.B["reduce"][k] + torch.einsum("mgo,mk,kgp->gop", b, H, b)
            B = torch.einsum("gro,grp->gop", e, e) / (r * loss.factor)
            self.B["empirical"][k] = self.B["empirical"][k] + B
            owner = torch.cat([call.owner for call in layer])
            e = torch.stack([e[:, owner == n].sum(1) for n in range(self.N)], 1)
            B = torch.einsum("gno,gnp->gop", e, e) / (r * loss.factor)
            self.B["reduce_empirical"][k] = self.B["reduce_empirical"][k] + B

    def A(self, k: int, approx: str, joint: bool) -> Tensor:
        """Return a layer's input factor, `[g, i, i]`."""
        calls = self.layers[k]
        a = torch.cat([call.a for call in calls], 1)
        owner = torch.cat([call.owner for call in calls])
        if approx.startswith("reduce"):
            rows = torch.stack([a[:, owner == n].mean(1) for n in range(self.N)], 1)
        else:
            rows = a
        if joint:
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], 2)
        return rows.mT @ rows / rows.shape[1]


def jacobian(outputs: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return `d outputs[m] / d input`, each `[m, *input.shape]`."""
    options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
    try:
        found = torch.autograd.grad(outputs, inputs, torch.eye(len(outputs)), **options)
        return [
            x.new_zeros(len(outputs), *x.shape) if J is None else J
            for x, J in zip(inputs, found, strict=True)
        ]
    except RuntimeError:  # an operation that torch cannot vectorise
        rows = [
            torch.autograd.grad(out, inputs, retain_graph=True, materialize_grads=True)
            for out in outputs
        ]
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def close(actual: Tensor, expected: Tensor, what: str, scale: Tensor | float) -> None:
    """Compare in the scale of the largest entry.

    Args:
        actual: From the library.
        expected: From the oracle.
        what: Named in the message.
        scale: Of the same quantity in the whole net: gradients may cancel, but not below rounding
            errors of the others.
    """
    if actual.shape != expected.shape:
        raise Disagreement(f"{what}: shape {tuple(actual.shape)} for {tuple(expected.shape)}")
    size = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((actual - expected).abs().max()) if expected.numel() else 0.0
    if not error <= 1e-8 * size + 1e-11 * float(scale):
        raise Disagreement(f"{what}: error {error:.2g} in entries up to {size:.2g}")


def library(
    case: Case, net: nn.Module, which: int, losses: list[nn.Module], *exts, fields: tuple = FIELDS
) -> None:
    """Run one backward pass with extensions; forget what earlier ones left in some fields."""
    x = case.batches[which].clone()
    net.zero_grad()
    for p in net.parameters():
        for name in fields:
            p.__dict__.pop(name, None)
    outside = case.options["outside"]
    context = backpack(*exts)
    total = 0
    with nullcontext() if outside else context:
        outputs = net(x)
        for loss, module, output in zip(case.losses, losses, outputs, strict=True):
            z, y = loss.logits(output), loss.targets[which]
            if case.options["attach"]:
                value = attach_loss(loss.module, z, y, deepcopy(loss.module)(z, y), batch_axis=loss.axis)
            else:
                value = module(z, y)
            total = total + loss.factor * value
        if not outside:
            total.backward()
    if outside:
        with context:
            total.backward()


def compare(case: Case) -> dict[str, int]:
    """Compare the library with the oracle, on both batches in turn.

    Returns:
        How many blocks of each kind were compared.

    Raises:
        Disagreement: If a quantity differs.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return _compare(case)
    finally:
        torch.set_default_dtype(dtype)


def _compare(case: Case) -> dict[str, int]:
    bias, norm, counts = case.options["bias"], case.options["norm"], {}
    net = extend(deepcopy(case.net), batch_axis={"": case.axis, **case.axes})
    losses = [extend(deepcopy(loss.module), batch_axis=loss.axis) for loss in case.losses]
    for which in (0, 1):
        oracle = Oracle(case, which)
        exts = [
            BatchGrad(),
            BatchL2Grad(),
            BatchDotGrad(),
            SumGradSquared(),
            Variance(),
            DiagGGN(),
            KFAC("expand", "exact", bias=bias, norm=norm, savefield="kfac_expand"),
            KFAC("reduce", "exact", bias=bias, norm=norm, savefield="kfac_reduce"),
        ]
        if len(losses) == 1:
            exts.append(KFAC("expand", "empirical", savefield="kfac_empirical"))
        if case.options["ekfac"]:
            exts.append(EKFAC(fisher="exact", bias=bias))
        library(case, net, which, losses, *exts)
        _first_order(oracle, net)
        if len(losses) == 1:
            # alone in a pass, it reduces layers to rows, which wait for others up to a limit
            ext = KFAC("reduce", "empirical", bias=bias, norm=norm, savefield="kfac_reduce_empirical")
            with patch.multiple(Pending, SMALL=0, LIMIT=(Pending.LIMIT, 50)[which]):
                library(case, net, which, losses, ext, fields=("kfac_reduce_empirical",))
            _blocks(oracle, net, "reduce_empirical", bias, counts)
        for approx in ("expand", "reduce", "empirical"):
            if approx != "empirical" or len(losses) == 1:
                _blocks(oracle, net, approx, bias if approx != "empirical" else "separate", counts)
    return counts


def _first_order(oracle: Oracle, net: nn.Module) -> None:
    """Compare gradients, per-sample quantities and GGN diagonals."""
    named, N = dict(net.named_parameters()), oracle.N
    plain = [G.sum(0) for G in oracle.G]
    top = max(float(G.abs().max()) for G in oracle.G)
    diagonal = max(float(block.diagonal().max()) for block in oracle.blocks)
    for name, G, total, block in zip(oracle.names, oracle.G, plain, oracle.blocks, strict=True):
        p = named[name]
        if p.grad is None:
            if G.any() or any(hasattr(p, k) for k in FIELDS):
                raise Disagreement(f"{name}: no gradient")
            continue
        grad = p.grad.to_dense()
        flat = G.reshape(N, -1)
        close(grad, total, f"{name}.grad", top)
        close(p.grad_batch, G, f"{name}.grad_batch", top)
        close(p.batch_l2, flat.square().sum(1), f"{name}.batch_l2", top**2)
        close(p.batch_dot, flat @ flat.T, f"{name}.batch_dot", top**2)
        close(p.sum_grad_squared, G.square().sum(0), f"{name}.sum_grad_squared", top**2)
        variance = G.square().sum(0) / N - (G.sum(0) / N).square()
        close(p.variance, variance, f"{name}.variance", top**2)
        close(p.diag_ggn_exact.flatten(), block.diagonal(), f"{name}.diag_ggn", diagonal)


def _blocks(oracle: Oracle, net: nn.Module, approx: str, bias: str, counts: dict[str, int]) -> None:
    """Compare blocks of KFAC: Kronecker factors of affine layers, exact blocks of the others."""
    named = dict(net.named_parameters())
    exact = dict(zip(oracle.names, oracle.blocks, strict=True))
    G = dict(zip(oracle.names, oracle.G, strict=True))
    path_of = {id(p): name for name, p in oracle.net.named_parameters()}
    scale = max(float(block.abs().max()) for block in oracle.blocks)
    covered: dict[str, list[tuple[Tensor, Tensor, nn.Module, bool]]] = {}
    for k, calls in enumerate(oracle.layers):
        f = calls[0].module
        roles = dict(calls[0].key[1:])
        joint = bias == "joint" and len(roles) == 2
        B = oracle.B[approx][k]
        for role, key in roles.items():
            A = oracle.A(k, approx, joint)
            if role == "bias" and not joint:
                A = torch.ones(len(A), 1, 1)
            covered.setdefault(path_of[key], []).append((B, A, f, role == "bias"))
    for name in oracle.names:
        p, what = named[name], f"{name}.{approx}"
        if p.grad is None:
            continue
        block = getattr(p, f"kfac_{approx}")
        counts[type(block).__name__] = counts.get(type(block).__name__, 0) + 1
        if isinstance(block, (DenseBlock, DiagonalBlock)):
            expected = exact[name]
            if approx in EMPIRICAL:
                rows = G[name].reshape(oracle.N, -1)
                expected = rows.T @ rows / oracle.scale
            if isinstance(block, DenseBlock):
                close(block.to_dense(), expected, what, scale)
            else:
                close(block.diagonal().flatten(), expected.diagonal(), what, scale)
            continue
        layers = covered.get(name)
        if layers is None:
            continue  # a Kronecker block of a composite module
        if len(layers) > 1:
            close(block.to_dense(), sum(dense(*layer) for layer in layers), what, scale)
            continue
        B, A, f, is_bias = layers[0]
        if isinstance(f, nn.Embedding):
            A = A.diagonal(dim1=1, dim2=2)
        top = max(float(t.abs().max()) for t in oracle.B[approx])
        if not isinstance(block, Kronecker):
            raise Disagreement(f"{what}: {type(block).__name__}")
        close(block.B.reshape(B.shape), B, f"{what}.B", top)
        close(block.A.reshape(A.shape), A, f"{what}.A", A.abs().max())
        if is_bias and approx == "reduce" and A.shape[-1] == 1:
            groups, o = B.shape[:2]
            ggn = exact[name].reshape(groups, o, groups, o)
            for g in range(groups):
                close(block.B.reshape(B.shape)[g], ggn[g, :, g], f"{what}: exact", scale)
        if hasattr(p, "ekfac") and approx == "expand" and bias == "separate":
            if not isinstance(p.ekfac, KroneckerEigen):
                raise Disagreement(f"{name}.ekfac: {type(p.ekfac).__name__}")
            near = (p.ekfac.to_dense() - exact[name]).norm()
            far = (block.to_dense() - exact[name]).norm()
            if near > (1 + 1e-6) * far + 1e-9 * scale:
                raise Disagreement(f"{name}.ekfac is farther from the exact block than KFAC")


def dense(B: Tensor, A: Tensor, f: nn.Module, is_bias: bool) -> Tensor:
    """Return `B (x) A` of a layer without groups, over the parameter's entries in their order."""
    if isinstance(f, nn.Embedding):
        return torch.kron(A[0].diagonal().diag(), B[0])
    return torch.kron(B[0], A[0])
