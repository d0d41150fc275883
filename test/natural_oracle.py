"""SINGD, INGD, IKFAC and KFAC with dense matrices and plain autograd, slow on purpose.

No code of the packages is in here: only torch, and masks in place of structures. Index letters as
elsewhere: g group, n datum, s shared position, o layer output, i layer input (the last one is the
constant 1 if the bias is joined).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# One backward pass: input, target, and the scale r c of the sum of the data's losses.
Part = tuple[Tensor, Tensor, float]


# -- structures ------------------------------------------------------------------------------------


def kept(name: str, d: int, **options: int) -> Tensor:
    """Return which entries a structure keeps, a boolean ``[d, d]``."""
    i, j = torch.arange(d)[:, None], torch.arange(d)[None]
    if name == "dense":
        return torch.ones(d, d, dtype=torch.bool)
    if name == "diagonal":
        return i == j
    if name == "block-diagonal":
        return i // options["block"] == j // options["block"]
    if name in ("lower-triangular", "lower-toeplitz"):
        return i >= j
    if name in ("upper-triangular", "upper-toeplitz"):
        return i <= j
    if name == "rank-k-upper":
        return (i == j) | (i < options["k"])
    if name == "rank-k-lower":
        return (i == j) | (j < options["k"])
    if name == "hierarchical":  # [[A, B1, B2], [0, diag, 0], [0, D, E]]
        k1 = min(options["k1"], d)
        k2 = min(options["k2"], d - k1)
        return (i == j) | (i < k1) | ((i >= d - k2) & (j >= k1))
    raise ValueError(name)


def restrict(name: str, M: Tensor, **options: int) -> Tensor:
    """Return the matrix of the structure with the entries of ``M[..., d, d]``; no doubling."""
    d = M.shape[-1]
    if "toeplitz" in name:
        means = torch.zeros_like(M)
        for offset in range(-d + 1, d):
            mean = M.diagonal(offset, -2, -1).mean(-1, keepdim=True)
            means.diagonal(offset, -2, -1)[:] = mean
        M = means
    return M * kept(name, d, **options)


def project(name: str, M: Tensor, **options: int) -> Tensor:
    """Return P(M): what is kept, twice where the mirror image is not."""
    keep = kept(name, M.shape[-1], **options)
    return restrict(name, M, **options) * (1 + (keep & ~keep.T).to(M.dtype))


def mean_trace(M: Tensor) -> Tensor:
    """Return the mean of the diagonal, ``[..., 1, 1]``."""
    return M.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


# -- layers ----------------------------------------------------------------------------------------


def inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``a[g,n,s,i]``."""
    if isinstance(module, nn.Embedding):
        a = F.one_hot(x, module.num_embeddings).to(module.weight.dtype)
        if module.padding_idx is not None:
            a = a * (x != module.padding_idx)[..., None]
        return a.reshape(1, len(x), -1, module.num_embeddings)
    if isinstance(module, nn.Conv2d):
        assert module.padding_mode == "zeros"
        options = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
        patches = F.unfold(x, module.kernel_size, **options)
        return patches.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2)
    return x.reshape(1, len(x), -1, x.shape[-1])


def outputs(module: nn.Module, z: Tensor) -> Tensor:
    """Return a tensor shaped like the layer's output as ``[g,n,s,o]``."""
    if isinstance(module, nn.Conv2d):
        return z.flatten(2).unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2)
    return z.reshape(1, len(z), -1, z.shape[-1])


def matrix(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``W[g,o,i]``, the bias its last column if given."""
    groups = getattr(module, "groups", 1)
    W = (
        weight.T[None]
        if isinstance(module, nn.Embedding)
        else weight.reshape(groups, -1, weight[0].numel())
    )
    return W if bias is None else torch.cat([W, bias.reshape(groups, -1, 1)], 2)


def parameters(module: nn.Module, W: Tensor, joint: bool) -> list[Tensor]:
    """Return the weight, and the bias if joined, of ``W[g,o,i]``."""
    weight = W[..., :-1] if joint else W
    weight = weight[0].T if isinstance(module, nn.Embedding) else weight
    return [weight.reshape(module.weight.shape), *([W[..., -1].flatten()] if joint else [])]


def calls(model: nn.Module, x: Tensor) -> tuple[Tensor, list[tuple[str, nn.Module, Tensor, Tensor]]]:
    """Return the output, and name, module, input and output of each call of a layer."""
    found = []

    def hook(name: str) -> Callable:
        def record(module: nn.Module, args: tuple, z: Tensor) -> Tensor:
            z = z if z.requires_grad else z.clone().requires_grad_()
            found.append((name, module, args[0].detach(), z))
            return z.clone()

        return record

    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
    handles = [m.register_forward_hook(hook(name)) for name, m in named]
    output = model(x)
    for handle in handles:
        handle.remove()
    return output, found


def factors(
    model: nn.Module,
    loss: Callable,
    parts: Iterable[Part],
    approx: str,
    joint: Callable[[nn.Module], bool],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``A[g,i,i]`` and ``B[g,o,o]`` of the empirical Fisher for each layer in use.

    Each datum goes through the network alone. ``B = sum_n r c b_n b_n^T`` with the gradient b_n of
    the sum of the datum's terms at the layer's outputs: the scale counts once.

    Args:
        model: The network.
        loss: ``loss(output, target)``, summed over all terms.
        parts: The backward passes of one step.
        approx: "expand" or "reduce".
        joint: Whether a module's bias is joined.
    """
    a, b, modules = {}, {}, {}
    for x, y, scale in parts:
        for n in range(len(x)):
            output, found = calls(model, x[n : n + 1])
            zs = [z for *_, z in found]
            total = loss(output, y[n : n + 1])
            slopes = torch.autograd.grad(total, zs, allow_unused=True) if zs else ()
            own_a, own_b = {}, {}
            for (name, module, x_, _), slope in zip(found, slopes, strict=True):
                if slope is not None:
                    modules[name] = module
                    own_a.setdefault(name, []).append(inputs(module, x_))
                    own_b.setdefault(name, []).append(outputs(module, slope) * scale**0.5)
            for name in own_a:  # calls are further shared positions
                a.setdefault(name, []).append(torch.cat(own_a[name], 2))
                b.setdefault(name, []).append(torch.cat(own_b[name], 2))
    result = {}
    for name, module in modules.items():
        rows, slopes = a[name], b[name]
        if approx == "reduce":
            rows = [t.mean(2, keepdim=True) for t in rows]
            slopes = [t.sum(2, keepdim=True) for t in slopes]
        rows, slopes = torch.cat(rows, 2)[:, 0], torch.cat(slopes, 2)[:, 0]  # [g, rows, i]
        if joint(module):
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], 2)
        result[name] = rows.mT @ rows / rows.shape[1], slopes.mT @ slopes
    return result


# -- updates ---------------------------------------------------------------------------------------


@dataclass
class Options:
    """Options of one layer, named as those of the optimizers; structures as ``(name, options)``.

    ``bias`` has other values of lr, momentum and weight_decay for a joined bias.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    damping: float = 1e-3
    alpha1: float = 0.5
    weight_decay: float = 0.0
    lr_cov: float | Callable[[int], float] = 1e-2
    normalize: bool = False
    K: tuple[str, dict] = ("dense", {})
    C: tuple[str, dict] = ("dense", {})
    # KFAC
    decay: float = 0.95
    inverse: str = "pi"
    bias: dict[str, float] = field(default_factory=dict)

    def columns(self, name: str, W: Tensor) -> Tensor:
        """Return lr, momentum or weight_decay of each column of ``W[g,o,i]``, ``[i]``."""
        values = torch.full(W.shape[-1:], getattr(self, name), dtype=W.dtype)
        values[-1] = self.bias.get(name, values[-1])
        return values


@dataclass
class Layer:
    """What a layer remembers."""

    module: nn.Module
    joint: bool
    state: dict[str, Any] = field(default_factory=dict)
    refreshes: int = 0
    V: Tensor | float = 0.0


def singd_refresh(state: dict, A: Tensor, B: Tensor, o: Options, beta1: float, rule: str) -> None:
    """Change K, C, m_K and m_C as in MATH.md, rule "singd" (with INGD) or "ikfac"."""
    K, C = state["K"], state["C"]
    eye_K, eye_C = torch.eye(K.shape[-1]).to(K), torch.eye(C.shape[-1]).to(C)
    H_K = project(o.K[0], K.mT @ A @ K, **o.K[1])
    H_C = project(o.C[0], C.mT @ B @ C, **o.C[1])
    KK, CC = project(o.K[0], K.mT @ K, **o.K[1]), project(o.C[0], C.mT @ C, **o.C[1])
    if rule == "ikfac":
        m_K = 0.5 * (H_K + o.damping * KK - eye_K)
        m_C = 0.5 * (H_C + o.damping * CC - eye_C)
    else:
        front = 0.5 * (1 - o.alpha1) if o.normalize else 0.5
        damping_K, damping_C = o.damping * mean_trace(C.mT @ C), o.damping * mean_trace(K.mT @ K)
        m_K = o.alpha1 * state["m_K"] + front * (mean_trace(H_C) * H_K + damping_K * KK - eye_K)
        m_C = o.alpha1 * state["m_C"] + front * (mean_trace(H_K) * H_C + damping_C * CC - eye_C)
    for name, m in (("K", m_K), ("C", m_C)):
        norms = m.square().sum((-2, -1), keepdim=True).sqrt()
        step = beta1 / norms.clamp_min(1.0) if o.normalize and rule == "singd" else beta1
        state[name] = state[name] - step * state[name] @ m
        state["m_" + name] = m


def kfac_precondition(state: dict, G: Tensor, o: Options) -> Tensor:
    """Return the damped inverse applied to ``G[g,o,i]``, group by group, solving dense systems."""
    done = []
    for A, B, g in zip(state["A"], state["B"], G, strict=True):
        eye_A, eye_B = torch.eye(len(A)).to(A), torch.eye(len(B)).to(B)
        if o.inverse == "pi":
            pi = (mean_trace(A) / mean_trace(B)).sqrt()
            left = torch.linalg.solve(B + o.damping**0.5 / pi * eye_B, g)
            done.append(torch.linalg.solve(A + pi * o.damping**0.5 * eye_A, left.mT).mT)
        else:
            block = torch.kron(B, A) + o.damping * torch.eye(g.numel()).to(A)
            done.append(torch.linalg.solve(block, g.flatten()).view_as(g))
    return torch.stack(done)


class Natural:
    """The optimizers, one step at a time.

    Args:
        model: The network, changed in place.
        loss: ``loss(output, target)``, summed over all terms.
        rule: "singd", "ikfac" or "kfac".
        options: Those of all layers, or what returns those of a layer by its name (None: the
            fallback trains it).
        approx: "expand" or "reduce".
        interval: Steps between refreshes, or ``interval(step)``.
        inverse_interval: KFAC: steps between inversions; by default that of refreshes.
        joint_bias: Whether biases are joined.
        kl_clip: KFAC: bound of the step.
        maximize: Whether to negate the gradient.
        fallback: What makes the optimizer of the parameters (a list) of no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable,
        rule: str = "singd",
        options: Options | Callable[[str], Options | None] | None = None,
        approx: str = "reduce",
        interval: int | Callable[[int], int] = 1,
        inverse_interval: int | None = None,
        joint_bias: bool = True,
        kl_clip: float | None = None,
        maximize: bool = False,
        fallback: Callable[[list], torch.optim.Optimizer] | None = None,
    ):
        self.model, self.loss, self.rule, self.approx = model, loss, rule, approx
        self.interval = interval if callable(interval) else lambda step: interval
        self.inverse_interval = inverse_interval
        self.joint_bias, self.kl_clip, self.maximize = joint_bias, kl_clip, maximize
        given = options if callable(options) else lambda name: options or Options()
        self.layers: dict[str, Layer] = {}
        self.options: dict[str, Options] = {}
        taken = set()
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                continue
            if not module.weight.requires_grad or given(name) is None:
                continue
            self.options[name] = given(name)
            self.layers[name] = Layer(module, self._joins(module))
            taken |= {id(module.weight)} | ({id(module.bias)} if self._joins(module) else set())
            if isinstance(module, nn.Embedding):
                self.options[name] = Options(**{**vars(given(name)), "K": ("diagonal", {})})
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        self.fallback = fallback(rest) if rest and fallback else None
        assert self.fallback or not rest, "parameters without optimizer"
        self.steps, self.last, self.last_inverse = 0, None, None

    def _joins(self, module: nn.Module) -> bool:
        bias = getattr(module, "bias", None)
        return self.joint_bias and bias is not None and bias.requires_grad

    def due(self) -> bool:
        """Whether the next step refreshes."""
        return self.last is None or self.steps - self.last >= self.interval(self.steps)

    def step(self, parts: list[Part], clip: float | None = None) -> None:
        """Take a step with the gradient, perhaps of limited norm, and the statistics of some passes."""
        self.model.zero_grad()
        sum(scale * self.loss(self.model(x), y) for x, y, scale in parts).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if self.due():
            found = factors(self.model, self.loss, parts, self.approx, self._joins)
            inverts = self.inverse_interval is None or self.last_inverse is None
            inverts = inverts or self.steps - self.last_inverse >= self.inverse_interval
            for name, (A, B) in found.items():
                if name in self.layers:
                    self._refresh(self.layers[name], self.options[name], A, B, inverts)
            self.last = self.steps
            self.last_inverse = self.steps if inverts else self.last_inverse
        with torch.no_grad():
            self._move()
        if self.fallback is not None:
            self.fallback.step()
        self.steps += 1

    def _refresh(self, layer: Layer, o: Options, A: Tensor, B: Tensor, inverts: bool) -> None:
        state = layer.state
        if self.rule == "kfac":
            A, B = restrict(o.K[0], A, **o.K[1]), restrict(o.C[0], B, **o.C[1])
            for name, new in (("A", A), ("B", B)):
                old = state.get(name)
                state[name] = new if old is None else o.decay * old + (1 - o.decay) * new
            if inverts:
                state["inverted"] = {"A": state["A"], "B": state["B"]}
        else:
            self._start(layer)
            beta1 = o.lr_cov(layer.refreshes) if callable(o.lr_cov) else o.lr_cov
            singd_refresh(state, A, B, o, beta1, self.rule)
        layer.refreshes += 1

    @staticmethod
    def _start(layer: Layer) -> None:
        if "K" not in layer.state:
            bias = layer.module.bias if layer.joint else None
            W = matrix(layer.module, layer.module.weight.detach(), bias)
            for name, d in (("K", W.shape[2]), ("C", W.shape[1])):
                layer.state[name] = torch.eye(d, dtype=W.dtype).repeat(len(W), 1, 1)
                layer.state["m_" + name] = torch.zeros_like(layer.state[name])

    def natural_gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the natural gradient and the gradient ``[g,o,i]`` of the layers that have one."""
        found = {}
        for name, layer in self.layers.items():
            module, state = layer.module, layer.state
            if module.weight.grad is None:
                continue
            G = matrix(module, module.weight.grad, module.bias.grad if layer.joint else None)
            G = -G if self.maximize else G
            if self.rule == "kfac":
                N = kfac_precondition(state["inverted"], G, self.options[name])
            else:
                self._start(layer)
                K, C = state["K"], state["C"]
                N = C @ C.mT @ G @ K @ K.mT
            found[name] = N, G
        return found

    def _move(self) -> None:
        found = self.natural_gradients()
        factor = 1.0
        if self.kl_clip is not None:
            terms = [self.options[k].lr ** 2 * (N * G).sum() for k, (N, G) in found.items()]
            factor = (self.kl_clip / sum(terms)).sqrt().clamp_max(1.0)
        for name, (N, _) in found.items():
            layer, o = self.layers[name], self.options[name]
            module = layer.module
            W = matrix(module, module.weight, module.bias if layer.joint else None)
            momentum, decay, lr = (o.columns(k, W) for k in ("momentum", "weight_decay", "lr"))
            layer.V = momentum * layer.V + factor * N + decay * W
            new = parameters(module, W - lr * layer.V, layer.joint)
            module.weight.copy_(new[0])
            if layer.joint:
                module.bias.copy_(new[1])
