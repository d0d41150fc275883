"""Steps that compute what ours do, written for one network, or for one kind of network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backpack_ext.conv_factors import Geometry, patch_means
from backpack_ext.normal import gram

# Returns the sampled vectors at the logits, [N, C].
Sample = Callable[[Tensor], Tensor]
# A factor as its rows (True), of which it is the second moment, or formed.
Found = tuple[Tensor, bool]


class Chain:
    """The results of one row for a chain of linear layers and ReLUs, mean cross-entropy.

    Args:
        name: The row.
        model: The network.
        x: The inputs.
        y: The labels.
        sample: Draws vectors at the logits.
    """

    def __init__(self, name: str, model: nn.Sequential, x: Tensor, y: Tensor, sample: Sample):
        self.name, self.model, self.x, self.y, self.sample = name, model, x, y, sample
        self.loss_fn = nn.CrossEntropyLoss()

    def __call__(self) -> None:
        """Run a step; leave the gradient and the results, ``weight.by_hand`` and ``bias.by_hand``."""
        calls, h = [], self.x
        own = "mc" not in self.name
        for layer in self.model:
            a, h = h, layer(h)
            if isinstance(layer, nn.Linear):
                calls.append((layer, a.detach()))
                if own:
                    h.register_hook(lambda g, layer=layer, a=a: self._leave(layer, a, g))
        self.loss_fn(h, self.y).backward()
        if own:
            return
        with torch.no_grad():
            b = self.sample(h)
            for layer, a in reversed(calls):
                self._leave(layer, a, b)
                if layer is not calls[0][0]:
                    b = (b @ layer.weight).masked_fill_(a == 0, 0)

    @torch.no_grad()
    def _leave(self, layer: nn.Linear, a: Tensor, b: Tensor) -> None:
        weight, bias = layer.weight, layer.bias
        if not self.name.startswith("KFAC"):
            weight.by_hand, bias.by_hand = b.square().T @ a.square(), b.square().sum(0)
        elif self.name.endswith("formed"):
            scale = len(a) if "empirical" in self.name else 1
            weight.by_hand = bias.by_hand = ((b * scale).T @ b, False), (a.T @ (a / len(a)), False)
        else:
            weight.by_hand = bias.by_hand = (b.clone(), True), (a * len(a) ** -0.5, True)


class Graph:
    """KFAC's factors for any network of linear layers and convolutions, mean cross-entropy.

    A hook on each layer's output, and nothing else: all layers lead with the data, run once, and are
    known by their classes. Patch means and symmetric products are ours.

    Args:
        name: The row.
        model: The network.
        x: The inputs.
        y: The labels.
        sample: Draws vectors at the logits.
    """

    def __init__(self, name: str, model: nn.Module, x: Tensor, y: Tensor, sample: Sample):
        self.model, self.x, self.y, self.sample = model, x, y, sample
        self.reduce, self.draws = "reduce" in name, " mc" in name
        self.loss_fn, self.wanted = nn.CrossEntropyLoss(), False
        self.first: Tensor | None = None
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(self._note)

    def __call__(self) -> None:
        """Run a step; leave the gradient and the factors, ``weight.by_hand`` and ``bias.by_hand``."""
        self.first = None
        z = self.model(self.x)
        if self.draws:
            self.wanted = True
            torch.autograd.grad(z, self.first, self.sample(z.detach()), retain_graph=True)
        self.wanted = not self.draws
        self.loss_fn(z, self.y).backward()

    def _note(self, layer: nn.Module, args: tuple, z: Tensor) -> None:
        x = args[0].detach()
        self.first = z if self.first is None else self.first

        def leave(g: Tensor) -> None:
            if self.wanted:
                with torch.no_grad():
                    layer.weight.by_hand = layer.bias.by_hand = self._factors(layer, x, g)

        z.register_hook(leave)

    def _factors(self, layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Found, Found]:
        rows = _means if self.reduce else _positions
        a, b = rows(layer, x, g)
        return _factor(b, 1 if self.draws else len(x)), _factor(a, 1 / len(a))


def _means(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Conv2d):
        return patch_means(x, Geometry.of(layer, x.shape, g.shape)).flatten(1), g.sum((2, 3))
    return (x, g) if x.dim() == 2 else (x.mean(1), g.sum(1))


def _positions(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Conv2d):
        u = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
        return u.mT.flatten(0, 1), g.flatten(2).mT.flatten(0, 1)
    return x.flatten(0, -2), g.flatten(0, -2)


def _factor(rows: Tensor, scale: float) -> Found:
    """Return a factor as its rows if these are few, formed otherwise."""
    if len(rows) < rows.shape[1]:
        return rows * scale**0.5, True
    return gram(rows[None], scale)[0], False
