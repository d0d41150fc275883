"""What `digits.py` computes: one backward pass with five extensions, its cost, exact GGN blocks."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from backpack_ext import (
    KFAC,
    BatchL2Grad,
    DiagGGN,
    Extension,
    Variance,
    backpack,
    unextend,
)
from curvature import Kronecker


def kronecker(fisher: str = "mc", generator: torch.Generator | None = None) -> tuple[KFAC, KFAC]:
    """Return both flavours of KFAC; they sample together if they share the generator."""
    options = {"fisher": fisher, "generator": generator}
    return (
        KFAC("expand", savefield="kfac_expand", **options),
        KFAC("reduce", savefield="kfac_reduce", **options),
    )


def extensions(generator: torch.Generator) -> tuple[Extension, ...]:
    """Return the five extensions of the one backward pass; the first three share one sweep."""
    return (
        *kronecker("mc", generator),
        DiagGGN("mc", generator=generator),
        BatchL2Grad(),
        Variance(),
    )


def other_rows(model: nn.Module) -> list[list[str]]:
    """Return one row per parameter without Kronecker structure: norms, tokens, positions."""
    return [
        [
            name,
            "x".join(map(str, p.shape)),
            type(p.kfac_expand).__name__,
            f"{float(p.kfac_expand.trace()):.3g}",
        ]
        for name, p in model.named_parameters()
        if not isinstance(p.kfac_expand, Kronecker)
    ]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the names and weights of the layers that KFAC covered."""
    for name, p in model.named_parameters():
        if name.endswith(".weight") and isinstance(getattr(p, "kfac_expand", None), Kronecker):
            yield name.removesuffix(".weight"), p


def compare(K: Kronecker, L: Kronecker) -> tuple[float, float, float]:
    r"""Compare two blocks in the Frobenius norm, forming neither.

    Returns:
        The ratio of norms |L| / |K|, the cosine between K and L, and the distance |K - L| / |K|.
    """
    KK, KL, LL = (float(x.inner(y)) for x, y in ((K, K), (K, L), (L, L)))
    return (LL / KK) ** 0.5, KL / (KK * LL) ** 0.5, (max(KK - 2 * KL + LL, 0.0) / KK) ** 0.5


def noise_scale(p: nn.Parameter, batch: int) -> float:
    """Return the batch size at which a gradient's noise is as large as the gradient.

    That is the trace of the covariance of the data's own gradients over the squared norm of their
    mean. Under a mean loss, `Variance` is that of the gradients divided by the batch size.
    """
    return float(batch**2 * p.variance.sum() / p.grad.square().sum())


def factor_rows(model: nn.Module) -> list[list[str]]:
    """Return one row per weight: its Kronecker factors and how the two flavours differ."""
    rows = []
    for name, p in layers(model):
        expand, reduce = p.kfac_expand, p.kfac_reduce
        rows.append(
            [
                name,
                "x".join(map(str, p.shape)),
                *("x".join(map(str, f.shape)) + " diagonal" * (f.dim() == 1) for f in expand),
                *(f"{_trace(factor):.3g}" for factor in (*expand, *reduce)),
                *(f"{number:.2f}" for number in compare(expand, reduce)),
            ]
        )
    return rows


FACTOR_HEADER = {
    "": ["layer", "weight", "B", "A"],
    "expand": ["tr B", "tr A"],
    "reduce": ["tr B", "tr A"],
    "expand (E) against reduce (R)": ["|R|/|E|", "cos(E, R)", "|E - R|/|E|"],
}


def noise_rows(model: nn.Module, batch: int) -> list[list[str]]:
    """Return one row per weight: traces of its GGN block, and the noise in its gradient."""
    rows = []
    for name, p in layers(model):
        norms = p.batch_l2.sqrt()
        traces = p.diag_ggn_mc.sum(), p.kfac_expand.trace(), p.kfac_reduce.trace()
        rows.append(
            [
                name,
                *(f"{float(trace):.3g}" for trace in traces),
                f"{float(p.grad.norm()):.3g}",
                f"{noise_scale(p, batch):.0f}",
                f"{float(norms.max() / norms.mean()):.1f}",
            ]
        )
    return rows


NOISE_HEADER = {
    "": ["layer"],
    "trace of the block": ["DiagGGN", "expand", "reduce"],
    "gradient": ["norm", "noise scale", "largest/mean"],
}


def _trace(factor: Tensor) -> float:
    return float(factor.sum() if factor.dim() == 1 else factor.trace())


def costs(
    model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, repetitions: int
) -> dict[str, float]:
    """Return the median seconds of a step (forward and backward), by what is computed.

    The variants take turns in random order, so that changes of the machine's speed hit all of them.
    """
    plain, plain_loss = unextend(deepcopy(model)), unextend(deepcopy(loss_fn))
    generator = torch.Generator().manual_seed(0)
    everything = extensions(generator)
    expand, reduce, diag, norms, variance = everything
    variants: dict[str, Callable[[], None]] = {
        "plain step, model not extended": lambda: _step(plain, plain_loss, x, y),
        "empty backpack()": lambda: _step(model, loss_fn, x, y, ()),
        "BatchL2Grad": lambda: _step(model, loss_fn, x, y, (norms,)),
        "Variance": lambda: _step(model, loss_fn, x, y, (variance,)),
        "DiagGGN, 1 sample": lambda: _step(model, loss_fn, x, y, (diag,)),
        "KFAC expand, 1 sample": lambda: _step(model, loss_fn, x, y, (expand,)),
        "KFAC reduce, 1 sample": lambda: _step(model, loss_fn, x, y, (reduce,)),
        "all five at once": lambda: _step(model, loss_fn, x, y, everything),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    turns = Random(0)
    for repetition in range(repetitions + 2):
        for name in turns.sample(list(variants), len(variants)):
            start = perf_counter()
            variants[name]()
            if repetition >= 2:  # the first two warm up
                times[name].append(perf_counter() - start)
    return {name: median(seconds) for name, seconds in times.items()}


def _step(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, exts=None) -> None:
    model.zero_grad()
    if exts is None:
        loss_fn(model(x), y).backward()
    else:
        with backpack(*exts):
            loss_fn(model(x), y).backward()


def exact_block(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Return the exact GGN block of a parameter for a mean cross-entropy, by autograd's Jacobians.

    Args:
        model: The network, in evaluation mode.
        name: Name of the parameter.
        x: Images ``[N, 1, 8, 8]``.

    Returns:
        The block ``[p, p]`` with p the parameter's number of entries.
    """
    model = unextend(deepcopy(model))

    def logits(p: Tensor, image: Tensor) -> Tensor:
        return functional_call(model, {name: p}, image[None])[0]

    with torch.no_grad():
        q = model(x).softmax(dim=1)
    H = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    p = model.get_parameter(name).detach()
    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernel
        J = vmap(jacrev(logits), (None, 0), chunk_size=64)(p, x).detach().flatten(2)
    return torch.einsum("ncp,ncq->pq", J, H @ J) / len(x)


def errors(
    model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, keep: str
) -> tuple[dict[str, tuple[float, float]], tuple[Tensor, Tensor, Tensor]]:
    """Return how far expand and reduce are from the exact GGN blocks of the same data.

    Args:
        model: The extended network, in evaluation mode.
        loss_fn: The extended loss.
        x: Images.
        y: Labels.
        keep: Layer whose blocks are returned as well.

    Returns:
        Relative Frobenius errors ``(expand, reduce)`` of the weights by layer, and the
        exact, the expand and the reduce block of ``keep``.
    """
    with backpack(*kronecker("exact")):
        loss_fn(model(x), y).backward()
    found, kept = {}, ()
    for name, p in layers(model):
        exact = exact_block(model, name + ".weight", x)
        blocks = p.kfac_expand.to_dense(), p.kfac_reduce.to_dense()
        found[name] = tuple(float((block - exact).norm() / exact.norm()) for block in blocks)
        if name == keep:
            kept = exact, *blocks
    return found, kept


def bias_error(model: nn.Module, x: Tensor) -> float:
    """Return the largest relative error of reduce's blocks of the biases, after `errors`."""
    found = []
    for name, p in model.named_parameters():
        if name.endswith(".bias") and isinstance(getattr(p, "kfac_reduce", None), Kronecker):
            exact = exact_block(model, name, x)
            found.append(float((p.kfac_reduce.to_dense() - exact).norm() / exact.norm()))
    return max(found)
