"""Matrix products that no module records: attention's, recurrent and functional weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from oracle import close
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
    UnsupportedError,
    Variance,
    backpack,
    dataset,
    extend,
    sharing,
)
from curvature import Axes, DenseBlock, Kronecker, KroneckerEigen, KroneckerSum

C = 3

# What an independent forward pass leaves of a product: its inputs ``a[n,s,i]`` and outputs
# ``z[n,s,o]`` by the names of its weight and bias, and which part of them it is.
Trace = list[tuple[str, str | None, int, Tensor, Tensor]]


# -- models, and their forward passes written out --------------------------------------------------


class Net(nn.Module):
    """A body on tokens ``[N, T, d]``, a mean, and a head."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, C)

    def forward(self, *x: Tensor) -> Tensor:
        return self.head(self.body(*x).mean(1))


class Attention(nn.Module):
    """Attention of 4 queries to 5 keys and values, or of 5 tokens to themselves."""

    def __init__(self, kind: str, batch_first: bool = True, **options):
        super().__init__()
        self.kind, self.first = kind, batch_first
        self.inner = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options)

    def operands(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "self":
            return x, x, x
        return (x[:, :4], y, y) if self.kind == "cross" else (x[:, :4], y, y.flip(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.operands(x, y)
        if not self.first:
            same = k is v
            q, k = q.transpose(0, 1), k.transpose(0, 1)
            v = k if same else v.transpose(0, 1)
            q = k if self.kind == "self" else q
        z = self.inner(q, k, v, need_weights=False)[0]
        return z if self.first else z.transpose(0, 1)

    def traced(self, x: Tensor, y: Tensor) -> tuple[Tensor, Trace]:
        m, trace = self.inner, []
        E, heads = m.embed_dim, m.num_heads
        biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
        names = ["in_proj_weight"] * 3
        weights = [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
        if m.in_proj_weight is not None:
            weights = list(m.in_proj_weight.chunk(3))
        else:
            names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        z = []
        for part, (a, w, b) in enumerate(zip(self.operands(x, y), weights, biases, strict=True)):
            z.append(F.linear(a, w, b))
            bias = None if b is None else "inner.in_proj_bias"
            trace.append(("inner." + names[part], bias, part, a, z[-1]))
        if m.bias_k is not None:
            z[1] = torch.cat([z[1], m.bias_k.expand(len(x), 1, E)], 1)
            z[2] = torch.cat([z[2], m.bias_v.expand(len(x), 1, E)], 1)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in z)
        p = (q @ k.mT / math.sqrt(E // heads)).softmax(-1)
        a = (p @ v).transpose(1, 2).flatten(2)
        out = F.linear(a, m.out_proj.weight, m.out_proj.bias)
        bias = None if m.out_proj.bias is None else "inner.out_proj.bias"
        trace.append(("inner.out_proj.weight", bias, 0, a, out))
        return out, trace


class Recurrent(nn.Module):
    """One recurrent layer, or a cell in a loop."""

    def __init__(self, kind: str, cell: bool, **options):
        super().__init__()
        make = getattr(nn, kind + "Cell" if cell else kind)
        self.kind, self.cell = kind, cell
        self.inner = make(6, 4, **options) if cell else make(6, 4, batch_first=True, **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.cell:
            return self.inner(x)[0]
        state, found = None, []
        for t in range(x.shape[1]):
            state = self.inner(x[:, t], state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1)

    def traced(self, x: Tensor, y: Tensor) -> tuple[Tensor, Trace]:
        end = "" if self.cell else "_l0"
        p = {k.removesuffix(end): v for k, v in self.inner.named_parameters()}
        h = c = x.new_zeros(len(x), 4)
        ih, hh, found, inner = [], [], [], "inner."
        for t in range(x.shape[1]):
            i = F.linear(x[:, t : t + 1], p["weight_ih"], p.get("bias_ih"))
            g = F.linear(h[:, None], p["weight_hh"], p.get("bias_hh"))
            ih.append((x[:, t : t + 1], i))
            hh.append((h[:, None], g))
            i, g = i[:, 0], g[:, 0]
            if self.kind == "RNN":
                h = (i + g).tanh()
            elif self.kind == "LSTM":
                u, f, w, o = (i + g).chunk(4, 1)
                c = f.sigmoid() * c + u.sigmoid() * w.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (ir, iz, i_n), (gr, gz, gn) = i.chunk(3, 1), g.chunk(3, 1)
                z, n = (iz + gz).sigmoid(), (i_n + (ir + gr).sigmoid() * gn).tanh()
                h = (1 - z) * n + z * h
            found.append(h)
        trace = []
        for name, calls in (("ih", ih), ("hh", hh)):
            bias = f"{inner}bias_{name}{end}" if "bias_ih" in p else None
            for a, z in calls:
                trace.append((f"{inner}weight_{name}{end}", bias, 0, a, z))
        return torch.stack(found, 1), trace


class ByHand(nn.Module):
    """Bare weights on either side of a product, with and without a bias, rows of one in two products."""

    def __init__(self):
        super().__init__()
        sizes = {"w": (4, 6), "b": (4,), "t": (4, 5), "l": (7, 5), "s": (6, 7), "e": (6, 2, 3)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.traced(x, y)[0]

    def traced(self, x: Tensor, y: Tensor) -> tuple[Tensor, Trace]:
        trace: Trace = []
        z = F.linear(x, self.w, self.b)
        trace.append(("w", "b", 0, x, z))
        a = z.tanh()
        z = a @ self.t
        trace.append(("t", None, 0, a, z))
        a = z.sin()
        z = (self.l @ a.flatten(0, 1).T).T.unflatten(0, a.shape[:2])  # on the left
        trace.append(("l", None, 0, a, z))
        a = z.tanh()
        one, two = F.linear(a, self.s[:3]), F.linear(a[:, 1:], self.s[3:])  # 5 and 4 positions
        trace += [("s", None, 0, a, one), ("s", None, 1, a[:, 1:], two)]
        a = torch.cat([one, two.sum(1, keepdim=True).expand_as(one)], 2).sin()
        z = torch.einsum("nti,ihd->nthd", a, self.e).flatten(2)
        trace.append(("e", None, 0, a, z))
        return z, trace


BODIES = {
    "self": lambda: (Attention("self"), 6),
    "cross": lambda: (Attention("cross"), 6),
    "three inputs": lambda: (Attention("three"), 6),
    "sequence first": lambda: (Attention("self", batch_first=False), 6),
    "cross, sequence first": lambda: (Attention("cross", batch_first=False), 6),
    "kdim": lambda: (Attention("cross", kdim=4, vdim=4), 6),
    "no bias": lambda: (Attention("self", bias=False), 6),
    "bias_kv": lambda: (Attention("cross", add_bias_kv=True), 6),
    "by hand": lambda: (ByHand(), 6),
}
for _kind in ("RNN", "LSTM", "GRU"):
    BODIES[_kind] = lambda kind=_kind: (Recurrent(kind, False), 4)
    BODIES[_kind + " cell"] = lambda kind=_kind: (Recurrent(kind, True), 4)
BODIES["LSTM, no bias"] = lambda: (Recurrent("LSTM", False, bias=False), 4)
every = pytest.mark.parametrize("name", BODIES)


def build(name: str, N: int = 4, dtype=torch.float64) -> tuple[Net, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Net(*BODIES[name]()).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, 0.1, 0.4)
    other = 4 if name == "kdim" else 6
    x, y = torch.randn(N, 5, 6).to(dtype), torch.randn(N, 5, other).to(dtype)
    return model, x, y, torch.randint(C, (N,))


def run(model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor, *exts, **options) -> None:
    """One backward pass of a summed loss."""
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))
    extend(model, **options)
    with backpack(*exts):
        loss_fn(model(*inputs), target).backward()


# -- references ------------------------------------------------------------------------------------


def root(z: Tensor) -> Tensor:
    """Return the exact root of the summed loss's Hessian, ``[N, C, v]``."""
    q = z.detach().softmax(1)
    return torch.diag_embed(q.sqrt()) - q[:, :, None] * q.sqrt()[:, None, :]


def reference(model: Net, x: Tensor, y: Tensor, approx: str, bias: str) -> dict[str, Tensor]:
    """Return the dense blocks ``B (x) A`` of all traced parameters (of weight and bias if joint)."""
    body, trace = model.body.traced(x, y)
    logits = model.head(body.mean(1))
    columns = [
        torch.autograd.grad(logits, [t[-1] for t in trace], S, retain_graph=True)
        for S in root(logits).unbind(2)
    ]
    b = [torch.stack(parts) for parts in zip(*columns, strict=True)]  # [v, n, s, o] per product
    layers: dict[tuple, tuple[list, list]] = {}
    for (weight, beta, part, a, _), g in zip(trace, b, strict=True):
        inputs, vectors = layers.setdefault((weight, beta, part), ([], []))
        inputs.append(a)
        vectors.append(g)
    found: dict[str, dict[int, Tensor]] = {}
    for (weight, beta, part), (inputs, vectors) in layers.items():
        a, g = torch.cat(inputs, 1).detach(), torch.cat(vectors, 2)
        if approx == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
        if bias == "joint" and beta is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        A = torch.einsum("nsi,nsj->ij", a, a) / a.shape[:2].numel()
        B = torch.einsum("vnso,vnsp->op", g, g)
        found.setdefault(weight, {})[part] = torch.kron(B, A)
        if beta is not None and bias == "separate":
            found.setdefault(beta, {})[part] = B
    return {
        f"body.{name}": torch.block_diag(*[parts[k] for k in sorted(parts)])
        for name, parts in found.items()
    }


def in_rows(block: Kronecker, p: nn.Parameter) -> Tensor:
    """Return a block's dense matrix in the order of the matrices ``[(g o), i]``."""
    dense = block.to_dense()
    if block.joint:
        return dense
    order = block.axes.to_matrix(torch.arange(p.numel()).reshape(p.shape)).flatten()
    return dense[order][:, order]


def ggn_blocks(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Return dense GGN blocks of the summed loss."""
    named = dict(model.named_parameters())
    logits = model(*inputs)
    rows = []
    for S in root(logits).unbind(2):
        for n in range(len(logits)):
            rows.append(torch.autograd.grad(logits[n], named.values(), S[n], retain_graph=True))
    J = [torch.stack(column).flatten(1) for column in zip(*rows, strict=True)]
    return {name: j.T @ j for name, j in zip(named, J, strict=True)}


# -- Kronecker factors -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@every
def test_factors(name: str, approx: str, bias: str):
    model, x, y, target = build(name)
    if bias == "joint" and name == "kdim":
        with pytest.raises(UnsupportedError, match="one parameter for several weights"):
            run(model, (x, y), target, KFAC(approx, "exact", bias=bias))
        return
    expected = reference(model, x, y, approx, bias)
    run(model, (x, y), target, KFAC(approx, "exact", bias=bias))
    named = dict(model.named_parameters())
    scale = max(block.abs().max() for block in expected.values())
    for key, block in expected.items():
        assert isinstance(named[key].kfac, Kronecker), key
        # in reduce, the block of attention's keys vanishes
        close(in_rows(named[key].kfac, named[key]) / scale + 1, block / scale + 1)
    left = [k for k, p in named.items() if k not in expected and isinstance(p.kfac, DenseBlock)]
    assert left == (["body.inner.bias_k", "body.inner.bias_v"] if name == "bias_kv" else [])


@every
def test_reduce_of_a_bias_is_exact(name: str):
    """Whatever the network; blocks between groups are left out."""
    model, x, y, target = build(name)
    exact = ggn_blocks(model, x, y)
    run(model, (x, y), target, KFAC("reduce", "exact"))
    for key, p in model.named_parameters():
        if "bias" in key and isinstance(p.kfac, Kronecker):
            g = p.kfac.groups
            blocks = exact[key].unflatten(0, (g, -1)).unflatten(2, (g, -1))
            close(p.kfac.to_dense(), torch.block_diag(*[blocks[k, :, k] for k in range(g)]))


@pytest.mark.parametrize("N", [1, 2, 4, 5, 6])  # among them sizes that other axes have too
@every
def test_per_sample_quantities(name: str, N: int):
    model, x, y, target = build(name, N)
    losses = F.cross_entropy(model(x, y), target, reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    exts = BatchGrad(), BatchL2Grad(), BatchDotGrad(), SumGradSquared(), Variance(), DiagGGN()
    exact = ggn_blocks(model, x, y)
    run(model, (x, y), target, *exts)
    for (key, p), column in zip(model.named_parameters(), zip(*rows, strict=True), strict=True):
        G = torch.stack(column)
        close(p.grad_batch, G)
        close(p.batch_l2, G.flatten(1).square().sum(1))
        close(p.batch_dot, G.flatten(1) @ G.flatten(1).T)
        close(p.sum_grad_squared, G.square().sum(0))
        if N > 1:
            close(p.variance, G.var(0, correction=0))
        close(p.diag_ggn_exact.flatten(), exact[key].diagonal())


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("name", ["self", "three inputs", "GRU", "by hand"])
def test_eigenvalue_correction(name: str, bias: str):
    """In KFAC's basis, the second moments of per-sample vectors; never farther from the exact block."""
    model, x, y, target = build(name)
    exact = ggn_blocks(model, x, y)
    exts = KFAC(fisher="exact", bias=bias), EKFAC(fisher="exact", bias=bias)
    run(model, (x, y), target, *exts)
    given = copy.deepcopy({k: p.kfac for k, p in model.named_parameters()})
    basis = {p: given[k] for k, p in model.named_parameters()}
    run(model, (x, y), target, EKFAC(fisher="exact", bias=bias, basis=basis, savefield="again"))
    for key, p in model.named_parameters():
        if not isinstance(p.kfac, Kronecker) or p.kfac.joint:
            continue
        assert isinstance(p.ekfac, KroneckerEigen) and p.ekfac.groups == p.kfac.groups
        K, E, G = p.kfac.to_dense(), p.ekfac.to_dense(), exact[key]
        close(E.trace(), G.trace())
        close((E * G).sum(), E.square().sum())
        assert (E - G).norm() <= (K - G).norm() + 1e-12
        close(p.again.to_dense(), E)
    for p in model.parameters():
        if p.kfac.joint if isinstance(p.kfac, Kronecker) else False:
            close(p.again.to_dense(), p.ekfac.to_dense())


@every
def test_other_vectors(name: str):
    """Samples and the gradient itself arrive where the exact columns do."""
    model, x, y, target = build(name)
    run(model, (x, y), target, KFAC("reduce", "empirical"), BatchGrad())
    for key, p in model.named_parameters():
        if "bias" in key and isinstance(p.kfac, Kronecker) and p.kfac.groups == 1:
            close(p.kfac.to_dense(), p.grad_batch.T @ p.grad_batch)
    before = {k: p.kfac.A for k, p in model.named_parameters() if isinstance(p.kfac, Kronecker)}
    run(model, (x, y), target, KFAC("reduce", "mc", mc_samples=3))
    for key, A in before.items():
        close(model.get_parameter(key).kfac.A, A)
    run(model, (x, y), target, KFAC("reduce", "forward"))
    for key, A in before.items():
        block = model.get_parameter(key).kfac
        close(block.A, A)
        assert bool((block.B == 1).all()) and block.is_diagonal("B")


# -- how parameters are used -----------------------------------------------------------------------


class TiedByHand(nn.Module):
    """An embedding whose weight is also the head, in a functional call, with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.zeros(7))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return F.linear((h + self.mix(h).tanh()).mean(1), self.embed.weight, self.bias)


def test_a_layers_weight_used_by_hand_too():
    torch.manual_seed(0)
    model, tokens = TiedByHand().double(), torch.randint(7, (4, 5))
    target = torch.randint(7, (4,))
    losses = F.cross_entropy(model(tokens), target, reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    exact = ggn_blocks(model, tokens)
    for _ in range(2):
        run(model, (tokens,), target, BatchGrad(), BatchL2Grad(), DiagGGN(), KFAC(fisher="exact"))
        for (key, p), column in zip(model.named_parameters(), zip(*rows, strict=True), strict=True):
            close(p.grad_batch, torch.stack(column))
            close(p.batch_l2, torch.stack(column).flatten(1).square().sum(1))
            close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
        assert isinstance(model.embed.weight.kfac, KroneckerSum)
        close(model.bias.kfac.to_dense(), exact["bias"])


class Twice(nn.Module):
    """A layer's weight, also used transposed and by hand."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.linear(self.linear(x).tanh(), self.linear.weight.T).sin() @ self.linear.weight.T


def test_calls_by_hand_join_those_of_the_layer():
    """``h @ W.T`` is a further call of the layer in the same role."""
    torch.manual_seed(0)
    model = Net(Twice(), 6).double()
    x, target = torch.randn(4, 5, 6).double(), torch.randint(C, (4,))
    exact = ggn_blocks(model, x, x)
    run(model, (x, x), target, DiagGGN(), KFAC("reduce", "exact"))
    for key, p in model.named_parameters():
        close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
    assert isinstance(model.body.linear.weight.kfac, KroneckerSum)
    close(model.body.linear.bias.kfac.to_dense(), exact["body.linear.bias"])


def test_weight_norm_costs_one_product_per_datum():
    """Behind the product, the parametrisation is passed one datum at a time."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = Net(nn.Sequential(layer), 6).double()
    x, target = torch.randn(4, 5, 6).double(), torch.randint(C, (4,))
    exact = ggn_blocks(model, x)
    run(model, (x,), target, DiagGGN(), KFAC(fisher="exact"))
    for key, p in model.named_parameters():
        close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
    assert isinstance(layer.parametrizations.weight.original1.kfac, DenseBlock)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_fused_kernels_are_off_while_recording(kind: str):
    """In float32 an LSTM would be one node; the output stays the same, and so does the flag."""
    model, x, y, target = build(kind, dtype=torch.float32)
    plain = model(x, y)
    run(model, (x, y), target, KFAC(fisher="exact"))
    close(model(x, y), plain, 1e-5)
    assert torch.backends.mkldnn.set_flags(_enabled=True)[0] and torch.backends.cudnn.enabled
    for p in model.parameters():
        assert isinstance(p.kfac, Kronecker)
    reference_model = copy.deepcopy(model).double()
    expected = reference(reference_model, x.double(), y.double(), "expand", "separate")
    for key, block in expected.items():
        close(model.get_parameter(key).kfac.to_dense().double(), block, 1e-4)


def test_fused_kernels_are_on_again_after_an_error():
    model, x, *_ = build("LSTM")
    extend(model)
    with pytest.raises(RuntimeError):
        model.body.inner(x[..., :2])
    assert torch.backends.mkldnn.set_flags(_enabled=True)[0]


def test_stacked_and_bidirectional():
    torch.manual_seed(0)

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "proj_size": 3}
            self.inner = nn.LSTM(6, 4, **options)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    model = Net(Deep(), 6).double()
    x, target = torch.randn(4, 5, 6).double(), torch.randint(C, (4,))
    exact = ggn_blocks(model, x)
    run(model, (x,), target, DiagGGN(), KFAC("reduce", "exact"))
    for key, p in model.named_parameters():
        close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
        assert isinstance(p.kfac, Kronecker)
        if "bias" in key:
            close(p.kfac.to_dense(), exact[key])


@pytest.mark.parametrize("whole", [False, True])
def test_packed_sequences(whole: bool):
    """The data are apart behind the module only: dense blocks, and exact."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, C)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            options = {"batch_first": True, "enforce_sorted": False}
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, **options)
            states, last = self.inner(packed)
            if whole:
                states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
                return self.head(states.sum(1))
            return self.head(last[-1])

    torch.manual_seed(0)
    model, x, lengths = Packed().double(), torch.randn(4, 5, 6).double(), torch.tensor([5, 2, 4, 4])
    target = torch.randint(C, (4,))
    losses = F.cross_entropy(model(x, lengths), target, reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    exact = ggn_blocks(model, x, lengths)
    run(model, (x, lengths), target, BatchGrad(), DiagGGN(), KFAC(fisher="exact"))
    for (key, p), column in zip(model.named_parameters(), zip(*rows, strict=True), strict=True):
        close(p.grad_batch, torch.stack(column))
        close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
        if "inner" in key:
            close(p.kfac.to_dense(), exact[key])


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers(norm_first: bool):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(6, 2, 8, **options)
            self.decoder = nn.TransformerDecoderLayer(6, 2, 8, **options)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[0, 3:] = True
            causal = nn.Transformer.generate_square_subsequent_mask(y.shape[1], dtype=x.dtype)
            memory = self.encoder(x, src_key_padding_mask=padding)
            return self.decoder(y, memory, tgt_mask=causal, memory_key_padding_mask=padding)

    model = Net(Both(), 6).double()
    x, y = torch.randn(4, 5, 6).double(), torch.randn(4, 3, 6).double()
    target = torch.randint(C, (4,))
    for train in (True, False):  # in eval mode, the fused inference path is not taken
        model.train(train)
        exact = ggn_blocks(model, x, y)
        run(model, (x, y), target, DiagGGN(), KFAC("reduce", "exact"))
        for key, p in model.named_parameters():
            close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
            if "norm" in key:
                close(p.kfac.to_dense(), exact[key])
            else:
                assert isinstance(p.kfac, Kronecker)
            if "bias" in key and "in_proj" not in key:
                close(p.kfac.to_dense(), exact[key])


def test_activation_checkpointing():
    """Saved inputs are read in a pass of their own: each may be unpacked once per pass."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return checkpoint(self.inner, x, y, use_reentrant=False)

    model, x, y, target = build("self")
    run(model, (x, y), target, KFAC(fisher="exact"), BatchGrad())
    other = Net(Checkpointed(copy.deepcopy(model.body)), 6).double()
    other.head.load_state_dict(model.head.state_dict())
    run(other, (x, y), target, KFAC(fisher="exact"), BatchGrad())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(q.grad_batch, p.grad_batch)
        close(q.grad, p.grad)
        close(q.kfac.to_dense(), p.kfac.to_dense())


def test_two_passes_over_a_kept_graph():
    model, x, y, target = build("GRU")
    loss_fn, ext = extend(nn.CrossEntropyLoss()), BatchGrad()
    extend(model)
    with backpack(ext, retain_graph=True):
        loss = loss_fn(model(x, y), target)
        loss.backward(retain_graph=True)
        first = {k: p.grad_batch for k, p in model.named_parameters()}
        loss.backward()
    for key, p in model.named_parameters():
        close(p.grad_batch, first[key])


def test_autocast():
    model, x, y, target = build("self", dtype=torch.float32)
    G = reference(model.double(), x.double(), y.double(), "expand", "separate")
    model.float()
    extend(model)
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack(KFAC(fisher="exact"), BatchGrad()):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x, y)
        loss_fn(logits.float(), target).backward()
    for key, block in G.items():
        p = model.get_parameter(key)
        assert isinstance(p.kfac, Kronecker) and p.kfac.dtype == torch.float32
        close(in_rows(p.kfac, p).double(), block, 0.05)
        close(p.grad_batch.sum(0), p.grad, 0.05)


# -- groups ----------------------------------------------------------------------------------------


def test_blocks_of_groups_with_different_rows_accumulate():
    """Attention's queries and keys may differ in number, and differently from batch to batch."""
    model, x, y, target = build("three inputs")
    blocks = []
    for T in (5, 3):
        run(model, (x, y[:, :T]), target, KFAC(fisher="exact"))
        blocks.append(model.body.inner.in_proj_weight.kfac)
    assert blocks[0].rows == (16, 20, 20) and blocks[1].rows == (16, 12, 12)
    total = blocks[0] + blocks[1]
    for k, rows in enumerate(zip(blocks[0].rows, blocks[1].rows, strict=True)):
        expected = sum(r * K.A[k] for r, K in zip(rows, blocks, strict=True)) / sum(rows)
        close(total.A[k], expected)
    close(total.B, blocks[0].B + blocks[1].B)
    again = Kronecker.from_state_dict(total.state_dict())
    assert again.rows == total.rows == (32, 32, 32) or again.rows == total.rows
    values = total.numerators()
    close(total.from_numerators([2 * t for t in values], 0.5).A, total.A)


def test_groups_are_checked():
    axes = Axes("(g o) i -> g o i", (("g", 2),))
    K, L = Kronecker(torch.eye(2), torch.eye(3)), Kronecker(torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match="blocks of one shape"):
        Kronecker.of_groups([K, L], axes)
    with pytest.raises(ValueError, match="blocks of one shape"):
        KroneckerEigen.of_groups([K.eigh(), L.eigh()], axes)
    M = KroneckerEigen.of_groups([K.eigh(), (2.0 * K).eigh()], axes)
    close(M.to_dense(), torch.block_diag(torch.eye(6), 2 * torch.eye(6)))
    close(M.group(1).to_dense(), 2 * torch.eye(6))


def test_a_model_without_a_ruled_layer():
    """Its call says how many data there are."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.c = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.zeros(8))
            self.w, self.b = nn.Parameter(torch.randn(C, 8)), nn.Parameter(torch.zeros(C))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear((F.linear(x, self.v) + self.c).tanh().mean(1), self.w, self.b)

    torch.manual_seed(0)
    model, x, target = Bare().double(), torch.randn(4, 5, 6).double(), torch.randint(C, (4,))
    exact = ggn_blocks(model, x)
    losses = F.cross_entropy(model(x), target, reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    run(model, (x,), target, BatchGrad(), DiagGGN(), KFAC("reduce", "exact"))
    for (key, p), column in zip(model.named_parameters(), zip(*rows, strict=True), strict=True):
        close(p.grad_batch, torch.stack(column))
        close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
        assert isinstance(p.kfac, Kronecker)
    close(model.c.kfac.to_dense(), exact["c"])
    extend(model, check_layers=False)
    with backpack(BatchGrad()):  # without a loss module
        F.cross_entropy(model(x), target, reduction="sum").backward()
    close(model.v.grad_batch, torch.stack([row[0] for row in rows]))


# -- almost products -------------------------------------------------------------------------------


class Few(nn.Module):
    """Products that a single datum's sizes and vectors do not tell apart from others."""

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3, 5))
        self.w, self.h = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(C, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = x @ (self.u @ self.v)  # two parameters meet
        z = (self.w @ z.tanh().flatten(0, 1).T).T  # on the left, the data's rows are columns
        return F.linear(z.tanh().unflatten(0, x.shape[:2]).mean(1), self.h)


@pytest.mark.parametrize("cut", [(4, 4, 1), (1, 4, 4), (1,) * 9])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_a_batch_of_one_is_a_part_of_a_data_set(approx: str, cut: tuple[int, ...]):
    """Blocks have the same kind whatever the size of a batch."""
    torch.manual_seed(0)
    model, x, target = Few().double(), torch.randn(9, 5, 6).double(), torch.arange(9) % C
    kfac, exact = KFAC(approx, "exact"), ggn_blocks(model, x)
    run(model, (x,), target, kfac)
    expected = {k: p.kfac for k, p in model.named_parameters()}
    for name in ("u", "v"):
        close(expected[name].to_dense(), exact[name])
    loader = zip(x.split(cut), target.split(cut), strict=True)
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))
    found = dataset.collect(model, loss_fn, loader, kfac, progress=False)["kfac"]
    for key, block in found.items():
        assert type(block) is type(expected[key]) is (DenseBlock if key in "uv" else Kronecker)
        close(block.to_dense(), expected[key].to_dense())


class Scaled(nn.Module):
    """Products with factors in front, and biases with factors of their own."""

    def __init__(self, alpha: float, beta: float, gamma: float):
        super().__init__()
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        sizes = {"w": (6, 4), "b": (4,), "v": (4, 4), "c": (4,)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size)))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.addmm(self.b, x[:, 0], self.w, alpha=self.alpha, beta=self.beta).tanh()
        return torch.add(z @ self.v, self.c, alpha=self.gamma)[:, None]


@pytest.mark.parametrize("factors", [(3.0, 1.0, 1.0), (1.0, 0.5, 1.0), (2.0, 3.0, 1.0), (1.0, 1.0, 0.5)])
@pytest.mark.parametrize("N", [1, 4])
def test_factors_of_products_and_biases(N: int, factors: tuple[float, ...]):
    torch.manual_seed(0)
    model, x = Net(Scaled(*factors), 4).double(), torch.randn(N, 1, 6).double()
    target = torch.arange(N) % C
    losses = F.cross_entropy(model(x), target, reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    exact = ggn_blocks(model, x)
    run(model, (x,), target, BatchGrad(), DiagGGN(), KFAC(fisher="exact"))
    for (key, p), column in zip(model.named_parameters(), zip(*rows, strict=True), strict=True):
        close(p.grad_batch, torch.stack(column))
        close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
        if N == 1 or p.dim() == 1:  # one datum, one position
            close(order_free(p), exact[key])


def order_free(p: nn.Parameter) -> Tensor:
    """Return a parameter's block over ``p.flatten()``, products with unit vectors."""
    return p.kfac.matvec(torch.eye(p.numel(), dtype=p.dtype).unflatten(1, p.shape)).flatten(1)


class Lookalikes(nn.Module):
    """Weights and biases that are almost those of a layer."""

    def __init__(self):
        super().__init__()
        sizes = {"w": (6, 4), "b": (4,), "v": (4, 4), "c": (4,), "h": (2, 2, 3)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size)))

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.w
        z = (z + self.b).tanh() + z.sin()  # the product is read elsewhere too
        z = (z @ self.v + self.c.view(2, 2).T.flatten()).tanh()  # in another order
        # two heads, the same for each of three positions: [(t h), n, 2] @ [(t h), 2, 3]
        heads = z.unflatten(2, (2, 2)).permute(1, 2, 0, 3).flatten(0, 1)
        return torch.bmm(heads, self.h.expand(3, 2, 2, 3).flatten(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("N", [2, 4])
def test_what_is_not_quite_a_layer_has_dense_blocks(N: int):
    torch.manual_seed(0)
    model, x = Net(Lookalikes(), 3).double(), torch.randn(N, 3, 6).double()
    target = torch.arange(N) % C
    losses = F.cross_entropy(model(x), target, reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    exact = ggn_blocks(model, x)
    run(model, (x,), target, BatchGrad(), DiagGGN(), KFAC(fisher="exact"))
    for (key, p), column in zip(model.named_parameters(), zip(*rows, strict=True), strict=True):
        close(p.grad_batch, torch.stack(column))
        close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
        assert isinstance(p.kfac, Kronecker) == (key in ("body.w", "body.v", "head.weight", "head.bias"))
        if isinstance(p.kfac, DenseBlock):
            close(p.kfac.to_dense(), exact[key])


ALMOST = {  # of sizes w [4, 6], v [8, 6], b [4], c [4], e [8]; and which have Kronecker factors
    "added twice": (lambda m, x: F.linear(x, m.w, m.b) + m.b, "w"),
    "two biases": (lambda m, x: F.linear(x, m.w, m.b) + m.c, "wc"),
    "a bias of data": (lambda m, x: (m.w @ x.T + m.b).T, "w"),
    "a part of a weight": (lambda m, x: F.linear(x, m.v[:4], m.b), ""),
    "a part of a bias": (lambda m, x: F.linear(x, m.w, m.e[:4]), "w"),
}


@pytest.mark.parametrize("case", ALMOST)
def test_almost_biases(case: str):
    torch.manual_seed(0)

    class Almost(nn.Module):
        def __init__(self):
            super().__init__()
            for name, size in {"w": (4, 6), "v": (8, 6), "b": (4,), "c": (4,), "e": (8,)}.items():
                self.register_parameter(name, nn.Parameter(torch.randn(size)))

        def forward(self, x: Tensor) -> Tensor:
            return ALMOST[case][0](self, x[:, 0]).tanh()[:, None]

    model, x, target = Net(Almost(), 4).double(), torch.randn(4, 1, 6).double(), torch.arange(4) % C
    named = dict(model.named_parameters())
    losses = F.cross_entropy(model(x), target, reduction="none")
    rows = [
        torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    used = [k for k, g in zip(named, rows[0], strict=True) if g is not None]
    for key in set(named) - set(used):
        named[key].requires_grad_(False)
    run(model, (x,), target, BatchGrad(), KFAC(fisher="exact"))
    for key, column in zip(named, zip(*rows, strict=True), strict=True):
        if key not in used:
            continue
        close(named[key].grad_batch, torch.stack(column))
        found = isinstance(named[key].kfac, Kronecker)
        assert found == (key.startswith("head") or key.removeprefix("body.") in ALMOST[case][1])


# -- ragged data -----------------------------------------------------------------------------------

LENGTHS = (5, 2, 4)


class Encoder(nn.Module):
    """A padded encoder, a mean over the tokens that exist, and a head without a module."""

    def __init__(self):
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, **options)
        self.w, self.b = nn.Parameter(torch.zeros(C, 6)), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z = self.encoder(x, src_key_padding_mask=~mask) * mask[..., None]
        return F.linear(z.sum(1) / mask.sum(1, keepdim=True), self.w, self.b)


class Rows(nn.Module):
    """Rows of several data, their sums, and no ruled layer."""

    def __init__(self):
        super().__init__()
        self.v, self.c = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(8))
        self.u, self.w = nn.Parameter(torch.zeros(8, 7)), nn.Parameter(torch.zeros(C, 7))

    def forward(self, x: Tensor, segments: Tensor) -> Tensor:
        z = F.linear(x, self.v, self.c).tanh() @ self.u
        n = int(segments.max()) + 1
        return F.linear(z.new_zeros(n, 7).index_add(0, segments, z).sin(), self.w)


def padded() -> tuple[nn.Module, tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]], dict]:
    """Return a model, its padded input, each datum's own input, and what `sharing` is told."""
    model, x = Encoder().double(), torch.randn(3, 5, 6).double()
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    each = [(x[n : n + 1, :s], mask[n : n + 1, :s]) for n, s in enumerate(LENGTHS)]
    return model, (x, mask), each, {"mask": mask}


def ragged() -> tuple[nn.Module, tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]], dict]:
    """Likewise for rows in any order."""
    model, x = Rows().double(), torch.randn(sum(LENGTHS), 6).double()
    owner = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))[torch.randperm(len(x))]
    each = [(x[owner == n], torch.zeros(s, dtype=torch.long)) for n, s in enumerate(LENGTHS)]
    return model, (x, owner), each, {"segments": owner}


@pytest.mark.parametrize("build_it", [padded, ragged])
def test_products_of_ragged_data(build_it):
    """Each datum alone, without padding, is the reference."""
    torch.manual_seed(0)
    model, inputs, each, told = build_it()
    for p in model.parameters():
        nn.init.normal_(p, 0.1, 0.4)
    target = torch.randint(C, (3,))
    named = dict(model.named_parameters())
    G, exact, alone = [], dict.fromkeys(named, 0), []
    for n, datum in enumerate(each):
        loss = F.cross_entropy(model(*datum), target[n : n + 1], reduction="sum")
        G.append(torch.autograd.grad(loss, list(named.values())))
        for key, block in ggn_blocks(model, *datum).items():
            exact[key] = exact[key] + block
    kfacs = [KFAC(approx, "exact", savefield=f"k_{approx}") for approx in ("expand", "reduce")]
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))
    extend(model)
    for n, datum in enumerate(each):
        one = {"mask": datum[1]} if "mask" in told else {"segments": datum[1]}
        with backpack(*kfacs), sharing(**one):
            loss_fn(model(*datum), target[n : n + 1]).backward()
        alone.append({key: (p.k_expand, p.k_reduce) for key, p in named.items()})
    with backpack(BatchGrad(), DiagGGN(), *kfacs), sharing(**told):
        loss_fn(model(*inputs), target).backward()
    for (key, p), rows in zip(named.items(), zip(*G, strict=True), strict=True):
        close(p.grad_batch, torch.stack(rows))
        close(p.diag_ggn_exact.flatten(), exact[key].diagonal())
        if "norm" in key:
            continue
        for k, block in enumerate((p.k_expand, p.k_reduce)):
            assert isinstance(block, Kronecker)
            total = alone[0][key][k] + alone[1][key][k] + alone[2][key][k]
            close(block.B, total.B)
            close(block.A, total.A)
            if p.dim() == 2:
                assert block.rows == total.rows
        if p.dim() == 1 and block.groups == 1:
            close(p.k_reduce.to_dense(), exact[key])


def test_steps_are_no_positions_of_a_mask():
    model, x, y, target = build("GRU")
    mask = torch.ones(4, 5, dtype=torch.bool)
    loss_fn = extend(nn.CrossEntropyLoss())
    extend(model)
    message = r"steps a mask does not tell apart.*'body\.inner': None"
    with pytest.raises(UnsupportedError, match=message), backpack(KFAC()), sharing(mask=mask):
        loss_fn(model(x, y), target).backward()
    with backpack(KFAC()), sharing(mask={"": mask, "body.inner": None}):
        loss_fn(model(x, y), target).backward()
    assert isinstance(model.body.inner.weight_hh_l0.kfac, Kronecker)
