"""Hessian diagonals of whole networks against the recursion over dense Jacobians.

Each network says twice what it computes: as people write it, and as the modules of the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hesscale_oracle import Graph, Module, bl89_seed, exact_diagonal, forward, penultimate, recursion
from models import Problem
from oracle import close, ggn_diag
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backpack_ext import BL89, KFAC, BatchGrad, HesScale, RecordingError, backpack, extend

pytestmark = pytest.mark.usefixtures("double")
N = 3
REDUCTIONS = ("mean", "sum")
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


# -- networks --------------------------------------------------------------------------------------


class Chain(nn.Sequential):
    def graph(self, g: Graph, x: str) -> str:
        return g.chain(self, x, *self._modules)


class Residual(nn.Module):
    """A tanh network of pre-norm residual blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(4, 5) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(5, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(norm(x))))
        return self.last(x)

    def graph(self, g: Graph, x: str) -> str:
        x = g.layer(self, "first", x)
        for k in range(2):
            z = g(torch.tanh, g.chain(self, x, f"norms.{k}", f"up.{k}"))
            x = g(torch.add, x, g.layer(self, f"down.{k}", z))
        return g.layer(self, "last", x)


def heads(x: Tensor, n_heads: int) -> Tensor:
    """`[N, T, E] -> [N, heads, T, E / heads]`."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """`[N, heads, T, d] -> [N, T, heads d]`."""
    return x.transpose(1, 2).flatten(2)


def part(x: Tensor, k: int, of: int = 3, axis: int = -1) -> Tensor:
    return x.chunk(of, axis)[k]


def attention_graph(g: Graph, q: str, k: str, v: str, causal: bool = False) -> str:
    """Attention of two heads: the scores, and what softmax and values make of them, however written."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        q, k = heads(q, 2), heads(k, 2)
        S = q @ k.mT / math.sqrt(q.shape[-1])
        hidden = ~torch.ones(S.shape[-2:], dtype=torch.bool).tril()
        return S.masked_fill(hidden, -math.inf) if causal else S

    return g(lambda S, v: merged(S.softmax(-1) @ heads(v, 2)), g(scores, q, k), v)


class Transformer(nn.Module):
    """A causal pre-norm block on embedded tokens."""

    def __init__(self, eager: bool):
        super().__init__()
        self.eager = eager
        self.embed, self.position = nn.Embedding(5, 4), nn.Parameter(torch.randn(3, 4))
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.RMSNorm(4)
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (heads(z, 2) for z in self.qkv(x).chunk(3, -1))
        if not self.eager:
            return self.proj(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        hidden = ~torch.ones(3, 3, dtype=torch.bool).tril()
        S = (q @ k.mT / math.sqrt(2)).masked_fill(hidden, -math.inf)
        return self.proj(merged(S.softmax(-1) @ v))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))

    def graph(self, g: Graph, tokens: Tensor) -> str:
        x = g(lambda W: F.embedding(tokens, W), "embed.weight")
        x = g(torch.add, x, "position")
        qkv = g.chain(self, x, "norm1", "qkv")
        q, k, v = (g(partial(part, k=k), qkv) for k in range(3))
        x = g(torch.add, x, g.layer(self, "proj", attention_graph(g, q, k, v, causal=True)))
        z = g(F.gelu, g.chain(self, x, "norm2", "up"))
        x = g(torch.add, x, g.layer(self, "down", z))
        return g.layer(self, "head", g(lambda x: x.mean(1), x))


class Attention(nn.Module):
    """`nn.MultiheadAttention` of x and itself."""

    def __init__(self, need_weights: bool, batch_first: bool = True):
        super().__init__()
        self.options = {"need_weights": need_weights}
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        nn.init.normal_(self.attention.in_proj_bias)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
            return self.head(self.attention(x, x, x, **self.options)[0].mean(0))
        return self.head(self.attention(x, x, x, **self.options)[0].mean(1))

    def graph(self, g: Graph, x: str) -> str:
        qkv = g(F.linear, x, "attention.in_proj_weight", "attention.in_proj_bias")
        q, k, v = (g(partial(part, k=k), qkv) for k in range(3))
        z = attention_graph(g, q, k, v)
        z = g(F.linear, z, "attention.out_proj.weight", "attention.out_proj.bias")
        return g.layer(self, "head", g(lambda z: z.mean(1), z))


class CrossAttention(nn.Module):
    """Queries from the first two tokens, keys from the others, values from all but the first."""

    def __init__(self, need_weights: bool):
        super().__init__()
        self.options = {"need_weights": need_weights}
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z, _ = self.attention(x[:, :2], x[:, 1:3], x[:, 2:], **self.options)
        return self.head(z.mean(1))

    def graph(self, g: Graph, x: str) -> str:
        weight, bias = "attention.in_proj_weight", "attention.in_proj_bias"
        inputs = [g(lambda x, at=at: x[:, at : at + 2], x) for at in range(3)]
        weights = [g(partial(part, k=k, axis=0), weight) for k in range(3)]
        biases = [g(partial(part, k=k, axis=0), bias) for k in range(3)]
        q, k, v = (g(F.linear, *args) for args in zip(inputs, weights, biases, strict=True))
        z = attention_graph(g, q, k, v)
        z = g(F.linear, z, "attention.out_proj.weight", "attention.out_proj.bias")
        return g.layer(self, "head", g(lambda z: z.mean(1), z))


class Encoder(nn.Module):
    """`nn.TransformerEncoderLayer`, which norms after each sum."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[:, 0])

    def graph(self, g: Graph, x: str) -> str:
        at = "layer.self_attn"
        qkv = g(F.linear, x, f"{at}.in_proj_weight", f"{at}.in_proj_bias")
        q, k, v = (g(partial(part, k=k), qkv) for k in range(3))
        z = attention_graph(g, q, k, v)
        z = g(F.linear, z, f"{at}.out_proj.weight", f"{at}.out_proj.bias")
        x = g.layer(self, "layer.norm1", g(torch.add, x, z))
        z = g.layer(self, "layer.linear2", g(F.gelu, g.layer(self, "layer.linear1", x)))
        x = g.layer(self, "layer.norm2", g(torch.add, x, z))
        return g.layer(self, "head", g(lambda x: x[:, 0], x))


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.shared(torch.tanh(x))))

    def graph(self, g: Graph, x: str) -> str:
        x = g.layer(self, "shared", g(torch.tanh, g.layer(self, "first", x)))
        x = g(torch.tanh, g.layer(self, "shared", g(torch.tanh, x)))
        return g.layer(self, "last", x)


class Tied(nn.Module):
    """The embedding's weight reads out the logits, too."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.hidden(self.embed(tokens).mean(1))), self.embed.weight)

    def graph(self, g: Graph, tokens: Tensor) -> str:
        x = g(lambda x: x.mean(1), g(lambda W: F.embedding(tokens, W), "embed.weight"))
        return g(F.linear, g(torch.tanh, g.layer(self, "hidden", x)), "embed.weight")


class Gated(nn.Module):
    """A product of two branches, a quotient, and a learned temperature."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.gate(x)) * self.up(x)) / self.temperature

    def graph(self, g: Graph, x: str) -> str:
        z = g(torch.mul, g(F.silu, g.layer(self, "gate", x)), g.layer(self, "up", x))
        return g(torch.div, g.layer(self, "last", z), "temperature")


CELL = [f"cell.{name}" for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]


class Recurrent(nn.Module):
    """A cell unrolled over two steps of `[N, 2, 3]`."""

    names = CELL

    def __init__(self, cell: type[nn.Module]):
        super().__init__()
        self.cell, self.head = cell(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x[:, 0])
        state = self.cell(x[:, 1], state)
        return self.head(state[0] if isinstance(state, tuple) else state)

    def gates(self, g: Graph, x: str, hidden: str | None) -> tuple[str, str]:
        """What the input and the hidden state contribute; a state that is zero leaves the bias."""
        W_ih, b_ih, W_hh, b_hh = self.names
        if hidden is not None:
            return g(F.linear, x, W_ih, b_ih), g(F.linear, hidden, W_hh, b_hh)
        zeros = torch.zeros(1, 4)
        of_zeros = g(lambda W, b: F.linear(zeros, W, b), W_hh, b_hh)
        return g(F.linear, x, W_ih, b_ih), of_zeros

    def graph(self, g: Graph, x: str) -> str:
        state = None
        for t in range(2):
            state = self.step(g, g(lambda x, t=t: x[:, t], x), state)
        return g.layer(self, "head", state[0])


class RNN(Recurrent):
    def step(self, g: Graph, x: str, state: tuple | None) -> tuple:
        gates = self.gates(g, x, state and state[0])
        return (g(torch.tanh, g(torch.add, *gates)),)


class LSTM(Recurrent):
    def step(self, g: Graph, x: str, state: tuple | None) -> tuple:
        gates = g(torch.add, *self.gates(g, x, state and state[0]))
        i, f, c, o = (g(partial(part, k=k, of=4), gates) for k in range(4))
        new = g(torch.mul, g(torch.sigmoid, i), g(torch.tanh, c))
        if state:  # else the cell is zero, and the forget gate without effect
            new = g(torch.add, new, g(torch.mul, g(torch.sigmoid, f), state[1]))
        return g(torch.mul, g(torch.sigmoid, o), g(torch.tanh, new)), new


class GRU(Recurrent):
    """As torch does it, `h' = (h - n) z + n`: the new gate has two consumers."""

    def step(self, g: Graph, x: str, state: tuple | None) -> tuple:
        of_x, of_h = self.gates(g, x, state and state[0])
        (rx, zx, nx), (rh, zh, nh) = ([g(partial(part, k=k), z) for k in range(3)] for z in (of_x, of_h))
        r, z = (g(torch.sigmoid, g(torch.add, *pair)) for pair in ((rx, rh), (zx, zh)))
        n = g(torch.tanh, g(torch.add, nx, g(torch.mul, nh, r)))
        step = g(torch.sub, state[0], n) if state else g(torch.neg, n)
        return (g(torch.add, g(torch.mul, step, z), n),)


LSTM_LAYER = [f"layer.{name}_l0" for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]


class LSTMLayer(LSTM):
    """`nn.LSTM`, the cell over all steps."""

    names = LSTM_LAYER

    def __init__(self):
        nn.Module.__init__(self)
        self.layer, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Llama(nn.Module):
    """Norms by hand, queries that share a head of keys, a gated MLP; the last token is read out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.q, self.k, self.v = (nn.Linear(4, d, bias=False) for d in (4, 2, 2))
        self.o, self.gate, self.up = (nn.Linear(4, d, bias=False) for d in (4, 5, 5))
        self.down, self.head = nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)

    def norm(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        z = self.norm(x, self.scale1)
        q, k, v = heads(self.q(z), 2), heads(self.k(z), 1), heads(self.v(z), 1)
        A = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(merged(A))
        z = self.norm(x, self.scale2)
        x = x + self.down(F.silu(self.gate(z)) * self.up(z))
        return self.head(x[:, -1])

    def graph(self, g: Graph, x: str) -> str:
        x = g.layer(self, "first", x)
        z = g(self.norm, x, "scale1")
        S = g(self.scores, g.layer(self, "q", z), g.layer(self, "k", z))
        A = g(lambda S, v: merged(S.softmax(-1) @ heads(v, 1)), S, g.layer(self, "v", z))
        x = g(torch.add, x, g.layer(self, "o", A))
        z = g(self.norm, x, "scale2")
        z = g(torch.mul, g(F.silu, g.layer(self, "gate", z)), g.layer(self, "up", z))
        x = g(torch.add, x, g.layer(self, "down", z))
        return g.layer(self, "head", g(lambda x: x[:, -1], x))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        S = heads(q, 2) @ heads(k, 1).mT / math.sqrt(2)
        return S.masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), -math.inf)


class SqueezeExcite(nn.Module):
    """Channels times a gate that their means decide on."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv(x))
        x = x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()
        return self.head(x.amax((2, 3)))

    def graph(self, g: Graph, x: str) -> str:
        x = g(F.gelu, g.layer(self, "conv", x))
        pooled = g(lambda x: x.mean((2, 3), keepdim=True), x)
        x = g(torch.mul, x, g(torch.sigmoid, g.layer(self, "gate", pooled)))
        return g.layer(self, "head", g(lambda x: x.amax((2, 3)), x))


class ReadTwice(nn.Module):
    """A gate that others read, too, so that `x sigmoid(x)` is a module of its own in GN only."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gate = x.sigmoid()
        return self.last(torch.cat([gate, x * gate], 1))

    def graph(self, g: Graph, x: str, whole: bool = False) -> str:
        x = g.layer(self, "first", x)
        gate = g(torch.sigmoid, x)
        product = g(F.silu, x) if whole else g(torch.mul, x, gate)
        z = g(lambda a, b: torch.cat([a, b], 1), gate, product)
        return g.layer(self, "last", z)


class Checkpointed(Residual):
    """Its blocks are computed again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):

            def block(x: Tensor, norm=norm, up=up, down=down) -> Tensor:
                return x + down(torch.tanh(up(norm(x))))

            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


def trained(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return norm.eval()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "MLP": lambda: (
        Chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        torch.randn(N, 3),
    ),
    "ReLU MLP": lambda: (
        Chain(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
        torch.randn(N, 3),
    ),
    "CNN": lambda: (
        Chain(
            *(nn.Conv2d(2, 3, 3, padding=1), trained(nn.BatchNorm2d(3)), nn.Tanh(), nn.MaxPool2d(2)),
            *(nn.Conv2d(3, 4, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.AvgPool2d(2, 1, padding=1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        ),
        torch.randn(N, 2, 5, 7),
    ),
    "in place": lambda: (
        Chain(nn.Linear(3, 4), nn.SiLU(inplace=True), nn.Linear(4, 3), nn.ELU(0.7, inplace=True)),
        torch.randn(N, 3),
    ),
    "batch norm in training": lambda: (
        Chain(
            *(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh()),
            *(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)),
        ),
        torch.randn(N, 3),
    ),
    "residual": lambda: (Residual(), torch.randn(N, 3)),
    "gated": lambda: (Gated(), torch.randn(N, 3)),
    "transformer": lambda: (Transformer(eager=False), torch.randint(5, (N, 3))),
    "eager transformer": lambda: (Transformer(eager=True), torch.randint(5, (N, 3))),
    "attention": lambda: (Attention(need_weights=False), torch.randn(N, 3, 4)),
    "attention, weights": lambda: (Attention(need_weights=True), torch.randn(N, 3, 4)),
    "attention, tokens first": lambda: (Attention(False, batch_first=False), torch.randn(N, 3, 4)),
    "cross-attention": lambda: (CrossAttention(need_weights=False), torch.randn(N, 4, 4)),
    "cross-attention, weights": lambda: (CrossAttention(need_weights=True), torch.randn(N, 4, 4)),
    "encoder": lambda: (Encoder(), torch.randn(N, 3, 4)),
    "one layer twice": lambda: (Twice(), torch.randn(N, 3)),
    "tied": lambda: (Tied(), torch.randint(3, (N, 2))),
    "RNN": lambda: (RNN(nn.RNNCell), torch.randn(N, 2, 3)),
    "LSTM": lambda: (LSTM(nn.LSTMCell), torch.randn(N, 2, 3)),
    "GRU": lambda: (GRU(nn.GRUCell), torch.randn(N, 2, 3)),
    "LSTM, layer": lambda: (LSTMLayer(), torch.randn(N, 2, 3)),
    "Llama": lambda: (Llama(), torch.randn(N, 3, 3)),
    "squeeze-excite": lambda: (SqueezeExcite(), torch.randn(N, 2, 3, 4)),
    "gate read twice": lambda: (ReadTwice(), torch.randn(N, 3)),
    "checkpointed": lambda: (Checkpointed(), torch.randn(N, 3)),
}
COUPLED = ("batch norm in training",)
every_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor], Graph, str]:
    """The model, its input, the leaves by name, and the oracle's modules with their output."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    for p in model.parameters():  # ones and zeros would hide mistakes
        p.data.add_(torch.randn_like(p), alpha=0.2)
    leaves = dict(model.named_parameters())
    if x.is_floating_point():
        x = nn.Parameter(x)
        leaves["x"] = x
    graph = Graph()
    output = model.graph(graph, "x" if "x" in leaves else x)
    close(model(x).detach(), forward(graph.modules, leaves)[output], 1e-13)
    return model, x, leaves, graph, output


def module_of(loss_fn: nn.Module, y: Tensor, output: str) -> Module:
    """A loss as the last module of the oracle."""
    loss_fn = deepcopy(loss_fn)
    return Module("loss", lambda f: loss_fn(f, y), (output,))


def agree(leaves: dict[str, Tensor], field: str, expected: dict[str, Tensor]) -> None:
    assert expected.keys() == leaves.keys()
    for key, leaf in leaves.items():
        found = getattr(leaf, field)
        assert found.shape == expected[key].shape, key
        close(found, expected[key], 1e-12)


@every_reduction
@every_network
def test_network(name: str, reduction: str):
    model, x, leaves, graph, output = network(name)
    loss_fn, y = nn.CrossEntropyLoss(reduction=reduction), torch.randint(3, (N,))
    loss = module_of(loss_fn, y, output)
    logits = forward(graph.modules, leaves)[output]
    seeds = {output: bl89_seed(loss_fn, logits, y)}
    with backpack(HesScale(), HesScale(gauss_newton=True), BL89()):
        extend(loss_fn)(model(x), y).backward()
    agree(leaves, "hesscale", recursion(graph.modules, leaves, loss))
    agree(leaves, "bl89", recursion(graph.modules, leaves, loss, seeds=seeds))
    if isinstance(model, ReadTwice):
        graph = Graph()
        loss = module_of(loss_fn, y, model.graph(graph, "x", whole=True))
    agree(leaves, "hesscale_gn", recursion(graph.modules, leaves, loss, gauss_newton=True))


@every_reduction
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in COUPLED])
def test_each_datum(name: str, reduction: str):
    """The recursion of one datum alone, with the factor of the whole batch's reduction."""
    model, x, leaves, _, _ = network(name)
    leaves.pop("x", None)
    x, y = x.detach(), torch.randint(3, (N,))
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    with backpack(HesScale(), HesScale(batch=True)):
        extend(loss_fn)(extend(model)(x), y).backward()
    factor = 1 / N if reduction == "mean" else 1.0
    rows = []
    for datum, target in zip(x.split(1), y.split(1), strict=True):
        graph = Graph()
        output = model.graph(graph, "x" if x.is_floating_point() else datum)
        loss = Module("loss", lambda f, y=target: factor * F.cross_entropy(f, y), (output,))
        rows.append(recursion(graph.modules, leaves | {"x": datum}, loss))
    agree(leaves, "hesscale_batch", {key: torch.stack([row[key] for row in rows]) for key in leaves})
    agree(leaves, "hesscale", {key: sum(row[key] for row in rows) for key in leaves})


@pytest.mark.parametrize("name", ["CNN", "residual", "transformer", "tied", "checkpointed"])
def test_beside_other_extensions(name: str):
    """An extended model has the same diagonals, the same gradients and the other quantities."""
    model, x, leaves, graph, output = network(name)
    x = x.detach()
    leaves.pop("x", None)
    loss_fn, y = nn.CrossEntropyLoss(), torch.randint(3, (N,))
    expected = recursion(graph.modules, leaves | {"x": x}, module_of(loss_fn, y, output))
    grads = torch.autograd.grad(loss_fn(model(x), y), list(leaves.values()))
    extend(model), extend(loss_fn)
    with backpack(BatchGrad(), HesScale(), KFAC(fisher="exact"), BL89()):
        loss_fn(model(x), y).backward()
    agree(leaves, "hesscale", {key: expected[key] for key in leaves})
    agree(leaves, "grad", dict(zip(leaves, grads, strict=True)))
    assert all(hasattr(leaf, field) for leaf in leaves.values() for field in ("grad_batch", "kfac"))


@pytest.mark.parametrize("name", ["CNN", "residual", "transformer", "LSTM"])
def test_some_parameters_are_frozen(name: str):
    model, x, leaves, graph, output = network(name)
    x = x.detach()
    leaves.pop("x", None)
    frozen = dict(list(leaves.items())[::2])
    for p in frozen.values():
        p.requires_grad_(False)
    loss_fn, y = nn.CrossEntropyLoss(), torch.randint(3, (N,))
    expected = recursion(graph.modules, leaves | {"x": x}, module_of(loss_fn, y, output))
    with backpack(HesScale()):
        extend(loss_fn)(model(x), y).backward()
    trained = {key: leaf for key, leaf in leaves.items() if key not in frozen}
    agree(trained, "hesscale", {key: expected[key] for key in trained})
    assert not any(hasattr(p, "hesscale") for p in frozen.values())


@pytest.mark.parametrize("name", ["CNN", "residual", "eager transformer", "transformer", "Llama", "GRU"])
def test_single_precision(name: str):
    model, x, leaves, graph, output = network(name)
    loss_fn, y = nn.CrossEntropyLoss(), torch.randint(3, (N,))
    expected = recursion(graph.modules, leaves, module_of(loss_fn, y, output))
    model.float()
    x = x.detach().float() if x.is_floating_point() else x
    with backpack(HesScale()):
        extend(loss_fn)(model(x), y).backward()
    for key, p in model.named_parameters():
        assert p.hesscale.dtype == torch.float32
        close(p.hesscale.double(), expected[key], 1e-4)


# -- losses ----------------------------------------------------------------------------------------

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
CE = nn.CrossEntropyLoss
# A loss, and what its targets are.
LOSSES: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "cross-entropy": (CE, "classes"),
    "weights": (partial(CE, weight=CLASS_WEIGHTS), "classes"),
    "smoothing": (partial(CE, label_smoothing=0.3), "classes"),
    "smoothing, weights": (partial(CE, weight=CLASS_WEIGHTS, label_smoothing=0.3), "classes"),
    "ignored": (partial(CE, ignore_index=1), "classes"),
    "all extras": (
        partial(CE, weight=CLASS_WEIGHTS, label_smoothing=0.3, ignore_index=1),
        "classes",
    ),
    "ignored, no class": (partial(CE, weight=CLASS_WEIGHTS, ignore_index=255), "classes, some 255"),
    "probabilities": (partial(CE, weight=CLASS_WEIGHTS), "probabilities"),
    "squared error": (nn.MSELoss, "real"),
    "BCE": (nn.BCEWithLogitsLoss, "binary"),
    "BCE, weights": (
        partial(nn.BCEWithLogitsLoss, weight=CLASS_WEIGHTS, pos_weight=CLASS_WEIGHTS.flip(0)),
        "binary",
    ),
    "smooth L1": (nn.SmoothL1Loss, "real"),
    "smooth L1, beta": (partial(nn.SmoothL1Loss, beta=0.4), "real"),
    "Huber": (partial(nn.HuberLoss, delta=0.6), "real"),
}
POSITIONS = ("cross-entropy", "weights", "smoothing, weights", "ignored", "all extras", "probabilities")


def targets(kind: str, like: Tensor) -> Tensor:
    """Targets of logits `[N, 3, ...]`."""
    if kind.startswith("classes"):
        y = torch.randint(3, (len(like), *like.shape[2:]))
        return y if kind == "classes" else y.index_fill(0, torch.tensor([1]), 255)
    if kind == "probabilities":
        return torch.randn(like.shape).softmax(1)
    return torch.randn(like.shape) if kind == "real" else torch.randint(2, like.shape).double()


def check_loss(model: nn.Module, x: Tensor, name: str, reduction: str, **options) -> None:
    make, kind = LOSSES[name]
    leaves = {"x": nn.Parameter(x), **dict(model.named_parameters())}
    graph = Graph()
    output = model.graph(graph, "x")
    loss_fn = make(reduction=reduction)
    y = targets(kind, forward(graph.modules, leaves)[output])
    loss = module_of(loss_fn, y, output)
    logits = forward(graph.modules, leaves)[output]
    seeds = {output: bl89_seed(loss_fn, logits, y)} if isinstance(loss_fn, CE) else None
    plain = recursion(graph.modules, leaves, loss, seeds=seeds)
    with backpack(HesScale(**options), HesScale(**options, gauss_newton=True), BL89()):
        extend(loss_fn)(model(leaves["x"]), y).backward()
    modules = graph.modules
    if options.get("exact_penultimate"):
        modules, loss = modules[:-1], penultimate(loss, modules[-1])
    agree(leaves, "hesscale", recursion(modules, leaves, loss))
    agree(leaves, "hesscale_gn", recursion(modules, leaves, loss, gauss_newton=True))
    agree(leaves, "bl89", plain)


@every_reduction
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str, reduction: str):
    model = Chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    check_loss(model, torch.randn(6, 4), name, reduction)


@every_reduction
@pytest.mark.parametrize("name", POSITIONS)
def test_loss_of_several_positions(name: str, reduction: str):
    model = Chain(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 2))
    check_loss(model, torch.randn(3, 2, 4), name, reduction)


@every_reduction
@pytest.mark.parametrize("name", LOSSES)
def test_exact_penultimate(name: str, reduction: str):
    model = Chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    check_loss(model, torch.randn(6, 4), name, reduction, exact_penultimate=True)


@pytest.mark.parametrize(
    "name, positions", [*((name, ()) for name in LOSSES), *((name, (3,)) for name in POSITIONS)]
)
def test_each_datum_of_a_loss(name: str, positions: tuple[int, ...]):
    """A datum has the sum of its terms, times the factor of the mean over all terms of the batch."""
    make, kind = LOSSES[name]
    model = Chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if positions:
        model = Chain(nn.Conv1d(4, 5, 1), nn.Tanh(), nn.Conv1d(5, 3, 1))
    x, leaves = torch.randn(6, 4, *positions), dict(model.named_parameters())
    y = targets(kind, torch.empty(6, 3, *positions))
    mean, total = make(), make(reduction="sum")
    r = (mean(model(x), y) / total(model(x), y)).item()
    rows = []
    for datum, target in zip(x.split(1), y.split(1), strict=True):
        graph = Graph()
        loss = Module("loss", lambda f, y=target: r * total(f, y), (model.graph(graph, "x"),))
        rows.append(recursion(graph.modules, leaves | {"x": datum}, loss))
    with backpack(HesScale(batch=True)):
        extend(mean)(extend(model)(x), y).backward()
    agree(leaves, "hesscale_batch", {key: torch.stack([row[key] for row in rows]) for key in leaves})


def test_each_datum_of_flat_tokens():
    """Logits `[N, T, C]`, of which the loss reads all rows; some are ignored."""
    model = Chain(nn.Embedding(5, 4), nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    leaves, x, y = dict(model.named_parameters()), torch.randint(5, (6, 2)), torch.randint(3, (6, 2))
    y[1], y[2, 0] = -100, -100
    rows, r = [], 1 / (y >= 0).sum().item()
    for datum, target in zip(x.split(1), y.split(1), strict=True):
        graph = Graph()
        z = graph(lambda W, datum=datum: F.embedding(datum, W), "0.weight")
        z = graph.chain(model, z, "1", "2", "3", "4")

        def value(f: Tensor, target=target) -> Tensor:
            return r * F.cross_entropy(f.flatten(0, 1), target.flatten(), reduction="sum")

        rows.append(recursion(graph.modules, leaves, Module("loss", value, (z,))))
    with backpack(HesScale(batch=True), HesScale()):
        extend(nn.CrossEntropyLoss())(extend(model)(x).flatten(0, 1), y.flatten()).backward()
    agree(leaves, "hesscale_batch", {key: torch.stack([row[key] for row in rows]) for key in leaves})
    agree(leaves, "hesscale", {key: sum(row[key] for row in rows) for key in leaves})


def test_each_datum_of_a_sequence_first_model():
    model = Chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    leaves, x, y = dict(model.named_parameters()), torch.randn(2, 6, 3), torch.randint(3, (2, 6))
    rows = []
    for n in range(6):
        graph = Graph()

        def value(f: Tensor, n=n) -> Tensor:
            return F.cross_entropy(f.flatten(0, 1), y[:, n], reduction="sum") / 12

        loss = Module("loss", value, (model.graph(graph, "x"),))
        rows.append(recursion(graph.modules, leaves | {"x": x[:, n : n + 1]}, loss))
    extend(model, batch_axis=1)
    with backpack(HesScale(batch=True)):
        extend(nn.CrossEntropyLoss(), batch_axis=1)(model(x).flatten(0, 1), y.flatten()).backward()
    agree(leaves, "hesscale_batch", {key: torch.stack([row[key] for row in rows]) for key in leaves})


@every_reduction
def test_exact_penultimate_without_a_bias(reduction: str):
    model = Chain(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3, bias=False))
    check_loss(model, torch.randn(6, 4), "all extras", reduction, exact_penultimate=True)


@every_reduction
def test_exact_penultimate_of_tokens(reduction: str):
    """Logits `[N, T, C]`, of which the loss reads the rows."""
    model = Chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Flatten(0, 1))
    leaves, graph = {"x": nn.Parameter(torch.randn(3, 2, 4)), **dict(model.named_parameters())}, Graph()
    z = graph.chain(model, "x", "0", "1")
    loss_fn, y = nn.CrossEntropyLoss(CLASS_WEIGHTS, reduction=reduction), torch.randint(3, (6,))
    original = deepcopy(loss_fn)
    loss = Module(
        "loss",
        lambda z, W, b: original(F.linear(z, W, b).flatten(0, 1), y),
        (z, "2.weight", "2.bias"),
    )
    with backpack(HesScale(exact_penultimate=True)):
        extend(loss_fn)(model(leaves["x"]), y).backward()
    agree(leaves, "hesscale", recursion(graph.modules, leaves, loss))


@pytest.mark.parametrize(
    "model",
    [
        Chain(nn.Linear(4, 3), nn.Tanh()),
        Chain(nn.Conv1d(4, 3, 1), nn.Flatten()),
    ],
)
def test_exact_penultimate_wants_a_last_linear_layer(model: nn.Module):
    model.double()
    x = torch.randn(6, 4) if isinstance(model[0], nn.Linear) else torch.randn(6, 4, 1)
    ext = HesScale(exact_penultimate=True)
    with pytest.raises(RecordingError, match="exact_penultimate"), backpack(ext):
        extend(nn.CrossEntropyLoss())(model(x), torch.randint(3, (6,))).backward()


@every_reduction
def test_log_softmax_and_nll_are_cross_entropy(reduction: str):
    body = Chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    losses = (
        (body, nn.CrossEntropyLoss(CLASS_WEIGHTS, reduction=reduction)),
        (Chain(body, nn.LogSoftmax(1)), nn.NLLLoss(CLASS_WEIGHTS, reduction=reduction)),
    )
    found = []
    for model, loss_fn in losses:
        with backpack(HesScale()):
            extend(loss_fn)(model(x), y).backward()
        found.append([p.hesscale.clone() for p in body.parameters()])
    for of_cross_entropy, of_both in zip(*found, strict=True):
        close(of_both, of_cross_entropy, 1e-12)


@pytest.mark.parametrize("full", [False, True])
@every_reduction
def test_gaussian_likelihood(reduction: str, full: bool):
    """A loss of two outputs, a mean and a variance: the diagonals of both, without the mixed terms."""
    model = Chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))
    leaves, graph, y = dict(model.named_parameters()), Graph(), torch.randn(3, 3)
    x = torch.randn(3, 4)
    loss_fn = nn.GaussianNLLLoss(full=full, reduction=reduction)
    output = model.graph(graph, graph(lambda: x))
    mean = graph(partial(part, k=0, of=2), output)
    var = graph(F.softplus, graph(partial(part, k=1, of=2), output))
    original = deepcopy(loss_fn)
    loss = Module("loss", lambda mean, var: original(mean, y, var), (mean, var))
    f = model(x)
    with backpack(HesScale()):
        extend(loss_fn)(f[:, :3], y, F.softplus(f[:, 3:])).backward()
    agree(leaves, "hesscale", recursion(graph.modules, leaves, loss))


# -- several losses, several backwards -------------------------------------------------------------


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.trunk(x))
        return self.one(x), self.two(x)

    def graph(self, g: Graph, x: str) -> tuple[str, str]:
        x = g(torch.tanh, g.layer(self, "trunk", x))
        return g.layer(self, "one", x), g.layer(self, "two", x)


def two_losses(model: TwoHeads) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The leaves, `CE / 2 + 3 MSE` of the heads, and the recursion's diagonals of that."""
    leaves = {"x": nn.Parameter(torch.randn(6, 4)), **dict(model.named_parameters())}
    y, z, graph = torch.randint(3, (6,)), torch.randn(6, 2), Graph()
    loss = Module(
        "loss",
        lambda one, two: 0.5 * F.cross_entropy(one, y) + 3 * F.mse_loss(two, z, reduction="sum"),
        model.graph(graph, "x"),
    )
    one, two = model(leaves["x"])
    ce, mse = extend(nn.CrossEntropyLoss()), extend(nn.MSELoss(reduction="sum"))
    return leaves, ce(one, y) / 2 + 3 * mse(two, z), recursion(graph.modules, leaves, loss)


def test_two_losses_of_two_heads():
    leaves, loss, expected = two_losses(TwoHeads())
    with backpack(HesScale()):
        loss.backward()
    agree(leaves, "hesscale", expected)


class Deep(nn.Module):
    """A loss after each layer; the third one reads what the second one's output is computed from."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        one = torch.tanh(self.a(x))
        z = self.b(one)
        gate = z.sigmoid()
        two = z * gate
        return one, gate, two, self.head(two + one)

    def graph(self, g: Graph, x: str, whole: bool = False) -> tuple[str, ...]:
        """Whether the gate and its product count as one: its output is a loss's input too."""
        one = g(torch.tanh, g.layer(self, "a", x))
        z = g.layer(self, "b", one)
        gate = g(torch.sigmoid, z)
        two = g(F.silu, z) if whole else g(torch.mul, z, gate)
        return one, gate, two, g.layer(self, "head", g(torch.add, two, one))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)])
def test_losses_along_the_way(order: tuple[int, ...]):
    model, graph, y = Deep(), Graph(), torch.randn(4, 6, 3)
    leaves = {"x": nn.Parameter(torch.randn(6, 4)), **dict(model.named_parameters())}
    loss = Module(
        "loss",
        lambda *outputs: sum((k + 1) * F.mse_loss(z, y[k]) for k, z in enumerate(outputs)),
        model.graph(graph, "x"),
    )
    outputs = model(leaves["x"])
    with backpack(HesScale(), HesScale(gauss_newton=True)):
        sum((k + 1) * extend(nn.MSELoss())(outputs[k], y[k]) for k in order).backward()
    agree(leaves, "hesscale", recursion(graph.modules, leaves, loss))
    graph = Graph()
    loss = replace(loss, inputs=model.graph(graph, "x", whole=True))
    agree(leaves, "hesscale_gn", recursion(graph.modules, leaves, loss, gauss_newton=True))


@pytest.mark.parametrize(
    "of", [lambda p: p, lambda p: p.T.mT, lambda p: 2 * p, lambda p: p[:1].expand(4, 3)]
)
def test_the_logits_are_a_parameter(of: Callable[[Tensor], Tensor]):
    p, y = nn.Parameter(torch.randn(4, 3)), torch.tensor([0, 2, 1, 0])
    with backpack(HesScale()):
        extend(nn.CrossEntropyLoss())(of(p), y).backward()
    (expected,) = exact_diagonal(lambda p: F.cross_entropy(of(p), y), [p])
    close(p.hesscale, expected, 1e-13)


def test_two_losses_of_one_output():
    model = Chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y, graph = nn.Parameter(torch.randn(6, 4)), torch.randint(3, (6,)), Graph()
    leaves = {"x": x, **dict(model.named_parameters())}
    loss = Module(
        "loss",
        lambda f: F.cross_entropy(f, y) - 0.1 * F.mse_loss(f, torch.ones(6, 3)),
        (model.graph(graph, "x"),),
    )
    f, ce, mse = model(x), extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    with backpack(HesScale()):
        (ce(f, y) - 0.1 * mse(f, torch.ones(6, 3))).backward()
    agree(leaves, "hesscale", recursion(graph.modules, leaves, loss))


@pytest.mark.parametrize("first", ["ce", "mse"])
def test_two_losses_of_one_output_with_the_penultimate_layer(first: str):
    """What is exact for the one loss adds up with what is for the other, in either order."""
    model = Chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y, ce, mse = torch.randn(6, 4), torch.randint(3, (6,)), extend(CE()), extend(nn.MSELoss())

    def found(*losses: str) -> list[Tensor]:
        with backpack(HesScale(exact_penultimate=True)):
            f = model(x)
            sum(ce(f, y) if loss == "ce" else 0.3 * mse(f, x[:, :3]) for loss in losses).backward()
        return [p.hesscale for p in model.parameters()]

    second = "mse" if first == "ce" else "ce"
    for both, one, other in zip(found(first, second), found("ce"), found("mse"), strict=True):
        close(both, one + other, 1e-12)


def test_two_losses_of_a_deep_network():
    """The second loss reads what the recursion of the first one may have crossed already."""
    model = nn.Sequential(*(m for _ in range(700) for m in (nn.Linear(2, 2), nn.ReLU())))
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    x, z, found = torch.rand(3, 2), torch.randn(2, 3, 2), []
    for apart in (False, True):
        f = model(x)
        losses = [extend(nn.MSELoss())(f, z[0]), extend(nn.MSELoss())(f * 2, z[1])]
        total = [torch.zeros_like(p) for p in model.parameters()]
        for k, loss in enumerate(losses if apart else [sum(losses)]):
            with backpack(HesScale()):
                loss.backward(retain_graph=apart and k == 0)
            total = [t + p.hesscale for t, p in zip(total, model.parameters(), strict=True)]
        found.append(total)
    for together, one_by_one in zip(*found, strict=True):
        close(together, one_by_one, 1e-12)


@pytest.mark.parametrize("factor", [3.0, -0.5])
@pytest.mark.parametrize("batch", [False, True])
def test_a_scaled_loss(factor: float, batch: bool):
    model = Chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y, found = torch.randn(6, 4), torch.randint(3, (6,)), []
    field = "hesscale_batch" if batch else "hesscale"
    for scale in (1.0, factor):
        with backpack(HesScale(batch=batch)):
            (scale * extend(nn.CrossEntropyLoss())(extend(model)(x), y)).backward()
        found.append([getattr(p, field).clone() for p in model.parameters()])
    for plain, scaled in zip(*found, strict=True):
        close(scaled, factor * plain, 1e-12)


def test_a_second_backward():
    """Nothing adds up over backwards, and the first one leaves nothing behind."""
    leaves, loss, expected = two_losses(TwoHeads())
    with backpack(HesScale(), BL89()):
        loss.backward(retain_graph=True)
    agree(leaves, "hesscale", expected)
    first = {key: leaf.bl89.clone() for key, leaf in leaves.items()}
    for leaf in leaves.values():
        del leaf.hesscale, leaf.bl89
    with backpack(HesScale(), BL89()):
        loss.backward(retain_graph=True)
        loss.backward()
    agree(leaves, "hesscale", expected)
    agree(leaves, "bl89", first)


def test_a_backward_without_the_extension_leaves_no_diagonal():
    leaves, loss, _ = two_losses(TwoHeads())
    loss.backward()
    assert not any(hasattr(leaf, "hesscale") for leaf in leaves.values())


# -- what is always true ---------------------------------------------------------------------------


def exact(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The exact diagonals of the model's parameters, of `loss(model)`'s output."""
    names = [name for name, _ in model.named_parameters()]
    copy = deepcopy(model)

    def value(*parameters: Tensor) -> Tensor:
        return loss(partial(torch.func.functional_call, copy, dict(zip(names, parameters, strict=True))))

    return dict(zip(names, exact_diagonal(value, list(model.parameters()), vectorize=True), strict=True))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
def test_the_last_layer_is_exact(activation: type[nn.Module]):
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3))
    x, y = torch.randn(6, 2, 4), torch.randint(3, (6, 2))
    expected = exact(model, lambda f: F.cross_entropy(f((x,)).transpose(1, 2), y))
    with backpack(HesScale()):
        extend(nn.CrossEntropyLoss())(model(x).transpose(1, 2), y).backward()
    close(model[4].weight.hesscale, expected["4.weight"], 1e-12)
    close(model[4].bias.hesscale, expected["4.bias"], 1e-12)
    error = (model[0].weight.hesscale - expected["0.weight"]).abs().sum()
    assert error > 1e-3 * expected["0.weight"].abs().sum()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Softplus])
@pytest.mark.parametrize("name", ["squared error", "BCE, weights", "Huber"])
def test_one_hidden_layer_is_exact(name: str, activation: type[nn.Module]):
    """Where the loss has a diagonal Hessian at the output."""
    make, kind = LOSSES[name]
    model, x = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)), torch.randn(6, 4)
    loss_fn = make()
    y, original = targets(kind, torch.empty(6, 3)), deepcopy(loss_fn)
    expected = exact(model, lambda f: original(f((x,)), y))
    with backpack(HesScale()):
        extend(loss_fn)(model(x), y).backward()
    agree(dict(model.named_parameters()), "hesscale", expected)


def test_one_hidden_layer_is_exact_with_the_penultimate_one():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    expected = exact(model, lambda f: F.cross_entropy(f((x,)), y))
    with backpack(HesScale(exact_penultimate=True)):
        extend(nn.CrossEntropyLoss())(model(x), y).backward()
    agree(dict(model.named_parameters()), "hesscale", expected)


# A network 20-32-32-32-10 on labels that a tanh network draws, and ways to estimate its diagonal.
WIDTHS = (20, 32, 32, 32, 10)
METHODS = {
    "HesScale": HesScale(),
    "penultimate": HesScale(exact_penultimate=True, savefield="penultimate"),
    "GN": HesScale(gauss_newton=True),
    "BL89": BL89(),
}


@cache
def errors(activation: type[nn.Module], n: int, seed: int) -> dict[str, float]:
    """`sum |estimate - H| / sum |H|` over all parameters at initialisation, of each method."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 10))
    layers = [nn.Linear(i, o) for i, o in pairwise(WIDTHS)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, activation())))[:-1]
    x = torch.randn(n, 20)
    for p in teacher.parameters():
        p.data.mul_(3)
    y = torch.distributions.Categorical(logits=teacher(x)).sample()
    problem = Problem(deepcopy(model), (x,), nn.CrossEntropyLoss(), y)
    H = exact(model, lambda f: F.cross_entropy(f((x,)), y))
    estimates = {"GGN": ggn_diag(problem)}
    with backpack(*METHODS.values()):
        extend(nn.CrossEntropyLoss())(model(x), y).backward()
    for method, ext in METHODS.items():
        estimates[method] = {key: getattr(p, ext.savefield) for key, p in model.named_parameters()}
    scale = sum(h.abs().sum() for h in H.values())
    return {
        method: (sum((found[key] - H[key]).abs().sum() for key in H) / scale).item()
        for method, found in estimates.items()
    }


# What a table of ten seeds says of ten seeds at initialisation, and how far three seeds may be from it.
TABLE = {
    (nn.Tanh, 32): {"HesScale": 0.073, "penultimate": 0.058, "GN": 0.648, "BL89": 0.511, "GGN": 0.640},
    (nn.Tanh, 1): {"HesScale": 0.036, "penultimate": 0.030, "GN": 0.881, "BL89": 0.199, "GGN": 0.880},
    (nn.ReLU, 32): {"HesScale": 0.056, "penultimate": 0.037, "GN": 0.056, "BL89": 0.899, "GGN": 0.0},
}
SEEDS = range(3)
every_setting = pytest.mark.parametrize("activation, n", TABLE)


@every_setting
def test_the_order_of_the_methods(activation: type[nn.Module], n: int):
    for seed in SEEDS:
        error = errors(activation, n, seed)
        assert error["penultimate"] < error["HesScale"] < error["BL89"] < 1
        if activation is nn.Tanh:
            assert error["HesScale"] < error["GGN"] and error["HesScale"] < error["GN"]
        else:  # without curvature inside, the GGN is the Hessian, and HesScale its own GN
            assert error["GGN"] < 1e-12
            assert error["HesScale"] == pytest.approx(error["GN"], rel=1e-12)


@every_setting
def test_the_errors_of_the_table(activation: type[nn.Module], n: int):
    for method, expected in TABLE[activation, n].items():
        mean = sum(errors(activation, n, seed)[method] for seed in SEEDS) / len(SEEDS)
        tolerance = 0.02 if expected < 0.1 else 0.2 * expected
        assert mean == pytest.approx(expected, abs=tolerance), method


def test_without_curvature_inside_nothing_is_dropped():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.LeakyReLU(), nn.Linear(4, 3))
    with backpack(HesScale(), HesScale(gauss_newton=True)):
        extend(nn.CrossEntropyLoss())(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
    for p in model.parameters():
        close(p.hesscale, p.hesscale_gn, 1e-14)
