"""Parameters outside of ruled layers: autograd's own products, one datum at a time, are exact."""

from collections.abc import Callable

import pytest
import torch
from oracle import close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backpack_ext import KFAC, BatchGrad, BatchL2Grad, DiagGGN, UnsupportedError, backpack, extend
from curvature import DenseBlock, DiagonalBlock, Kronecker

C = 3


class Net(nn.Module):
    """Any module, whose output's tokens are averaged, and a head."""

    def __init__(self, body: nn.Module, width: int, axis: int = 1):
        super().__init__()
        self.body, self.head, self.axis = body, nn.Linear(width, C), axis

    def forward(self, *x: Tensor) -> Tensor:
        z = self.body(*x)
        z = z[0] if isinstance(z, tuple) else z
        return self.head(z.mean(self.axis) if z.dim() == 3 else z)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        causal = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        return self.inner(x, x, x, attn_mask=causal, need_weights=False)[0]


class Tokens(nn.Module):
    """A class token, positions, a layer scale, a temperature and a PReLU."""

    def __init__(self):
        super().__init__()
        self.token, self.pos = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(6, 8))
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))
        self.heat, self.slope = nn.Parameter(torch.zeros(())), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.pos
        return x + self.slope(self.linear(x)) * self.scale * self.heat.exp()


class Functional(nn.Module):
    """Weights in functional calls: a product, an einsum, a convolution, two parameters in a sum."""

    def __init__(self):
        super().__init__()
        self.kernel, self.mix = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(4, 2, 4))
        self.conv, self.a, self.b = (nn.Parameter(torch.zeros(s)) for s in ((5, 5, 3), 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x * (self.a * self.b + self.b.exp()), self.conv, padding=1)
        return torch.einsum("nti,ihd->nthd", (x @ self.kernel).tanh(), self.mix).flatten(2)


class Looped(nn.Module):
    """A cell in a Python loop."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g: Tensor):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum((0, 1)).double() if bool(g.isfinite().all()) else None


class WithCustom(nn.Module):
    """A custom function whose backward looks at its values, so that it cannot be vectorised."""

    def __init__(self):
        super().__init__()
        self.linear, self.w = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return Custom.apply(self.linear(x), self.w)


class Tied(nn.Module):
    """A layer's weight, used by hand only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.linear.weight).tanh(), self.linear.weight, self.linear.bias)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(8, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(1))


class FromMask(nn.Embedding):
    """As OPT has it: its argument is no token."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward(mask.cumsum(1).long() - 1)


class Whole(nn.Embedding):
    def forward(self) -> Tensor:
        return self.weight


class Lookups(nn.Module):
    """Embeddings with forwards of their own, and one that is looked up for all data together."""

    def __init__(self):
        super().__init__()
        self.positions, self.more = FromMask(5, 8), Whole(5, 8)
        self.relative = nn.Embedding(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(torch.ones_like(x[..., 0])) + self.more()
        q = x.unflatten(2, (2, 4)).transpose(1, 2)
        index = torch.arange(5)
        bias = self.relative(index - index[:, None] + 4).permute(2, 0, 1).unsqueeze(0)  # as T5 has it
        return ((q @ q.mT + bias).softmax(-1) @ q).transpose(1, 2).flatten(2)


class TiedLookups(Lookups):
    """A weight with a role that a rule covers, and one that none does."""

    def __init__(self):
        super().__init__()
        self.tied = nn.Linear(2, 9)
        self.tied.weight = self.relative.weight

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.tied(x[..., :2])[..., 1:]


class Centred(nn.Module):
    """Couples the data before the parameter's gradient is complete."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        z = x * self.w
        return (z - z.mean(0)).tanh()


def normed(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


BODIES: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "tokens": lambda: (Tokens(), 8),
    "functional": lambda: (Functional(), 8),
    "attention": lambda: (Attention(), 8),
    "attention, extra key": lambda: (Attention(add_bias_kv=True), 8),
    "encoder layer": lambda: (nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True), 8),
    "RNN": lambda: (nn.RNN(8, 4, num_layers=2, batch_first=True), 4),
    "GRU": lambda: (nn.GRU(8, 4, batch_first=True, bidirectional=True), 8),
    "LSTM": lambda: (nn.LSTM(8, 4, batch_first=True, proj_size=3), 3),
    "RNN cell": lambda: (Looped(nn.RNNCell(8, 4)), 4),
    "GRU cell": lambda: (Looped(nn.GRUCell(8, 4)), 4),
    "LSTM cell": lambda: (Looped(nn.LSTMCell(8, 4)), 4),
    "weight norm": lambda: (normed(nn.Linear(8, 8)), 8),
    "orthogonal": lambda: (nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), 8),
    "bilinear": lambda: (Bilinear(), 4),
    "custom function": lambda: (WithCustom(), 8),
    "used by hand": lambda: (Tied(), 8),
    "lookups": lambda: (Lookups(), 8),
    "tied lookups": lambda: (TiedLookups(), 8),
}
# bodies that consist of matrix products only: their blocks have Kronecker factors (test_products.py)
PRODUCTS = ("attention", "used by hand", "RNN", "GRU", "LSTM", "RNN cell", "GRU cell", "LSTM cell")
every = pytest.mark.parametrize("name", BODIES)


def build(name: str, N: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Net(*BODIES[name]()).double()
    for p in model.parameters():
        nn.init.normal_(p, 0.2, 0.5)
    return model, torch.randn(N, 5, 8).double(), torch.randint(C, (N,))


def run(model: nn.Module, x: Tensor, y: Tensor, *exts, **options) -> None:
    loss_fn = extend(nn.CrossEntropyLoss())
    extend(model, **options)
    with backpack(*exts):
        loss_fn(model(x), y).backward()


def per_sample(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One backward pass per datum."""
    named = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) / len(x), named.values())
        for n in range(len(x))
    ]
    return dict(zip(named, map(torch.stack, zip(*rows, strict=True)), strict=True))


def ggn(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Dense blocks of a mean cross-entropy, one datum and logit at a time."""
    named, blocks = dict(model.named_parameters()), {}
    for n in range(len(x)):
        z = model(x[n : n + 1])[0]
        q = z.detach().softmax(0)
        J = [torch.autograd.grad(z[c], named.values(), retain_graph=True) for c in range(C)]
        for k, rows in zip(named, zip(*J, strict=True), strict=True):
            j = torch.stack(rows).reshape(C, -1)
            blocks[k] = blocks.get(k, 0) + j.T @ (q.diag() - q.outer(q)) @ j / len(x)
    return blocks


# 4 and 8 divide sizes of parameters: leading axes that look like data are none
@pytest.mark.parametrize("N", [1, 3, 4, 8])
@every
def test_per_sample_gradients(name: str, N: int):
    model, x, y = build(name, N)
    G = per_sample(model, x, y)
    run(model, x, y, BatchGrad(), BatchL2Grad())
    for key, p in model.named_parameters():
        close(p.grad_batch, G[key])
        close(p.batch_l2, G[key].reshape(N, -1).square().sum(1))


@pytest.mark.parametrize("checked", [True, False])
def test_lookups_that_lead_with_as_many_rows_as_data(checked: bool):
    """Relative positions `[5, 5]` and five data: found out by the check, and remembered."""
    model, x, y = build("lookups", N=5)
    G = per_sample(model, x, y)
    run(model, x, y, BatchGrad(), DiagGGN(), check_layers=checked)
    if checked:
        run_again = extend(nn.CrossEntropyLoss())
        with backpack(BatchGrad(), KFAC()):
            run_again(model(x), y).backward()
        assert isinstance(model.body.relative.weight.kfac, DenseBlock)
    same = [torch.allclose(p.grad_batch, G[key]) for key, p in model.named_parameters()]
    assert all(same) == checked


def test_some_gradients_only():
    """`backward(inputs=...)` computes no other gradients, but all per-sample ones are there."""
    model, x, y = build("tokens")
    G = per_sample(model, x, y)
    extend(model)
    with backpack(BatchGrad()):
        extend(nn.CrossEntropyLoss())(model(x), y).backward(inputs=[model.body.scale])
    close(model.body.scale.grad_batch, G["body.scale"])
    assert model.head.weight.grad is None


class Checkpointed(nn.Module):
    """Any module, whose activations are recomputed."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("name", ["tokens", "functional", "attention", "weight norm", "used by hand"])
def test_activation_checkpointing(name: str):
    """Each recomputed tensor may be asked for once per backward pass."""
    model, x, y = build(name)
    G, blocks = per_sample(model, x, y), ggn(model, x)
    names = list(dict(model.named_parameters()))
    model.body = Checkpointed(model.body)
    run(model, x, y, BatchGrad(), DiagGGN(), KFAC(fisher="mc"))
    for key, p in zip(names, model.parameters(), strict=True):
        close(p.grad_batch, G[key])
        close(p.diag_ggn_exact.flatten(), blocks[key].diagonal())


@every
def test_curvature(name: str):
    """Exact columns go vectorised or one by one; both ways lead through the cuts."""
    model, x, y = build(name)
    blocks = ggn(model, x)
    exts = KFAC(fisher="exact"), DiagGGN(), KFAC(fisher="exact", norm="diagonal", savefield="d")
    run(model, x, y, *exts)
    bare = [k for k, p in model.named_parameters() if isinstance(p.kfac, DenseBlock)]
    assert bare or name in PRODUCTS
    for key, p in model.named_parameters():
        close(p.diag_ggn_exact.flatten(), blocks[key].diagonal())
        if key in bare:
            close(p.kfac.to_dense(), blocks[key])
            assert isinstance(p.d, DiagonalBlock)
            close(p.d.diagonal().flatten(), blocks[key].diagonal())


def test_a_second_pass_and_another_batch_size():
    """What was found out the first time holds, and is found out again for other shapes."""
    for name in ("attention", "LSTM cell", "tokens"):
        model, x, y = build(name, 4)
        for N in (4, 4, 3, 2):
            G = per_sample(model, x[:N], y[:N])
            run(model, x[:N], y[:N], BatchGrad())
            for key, p in model.named_parameters():
                close(p.grad_batch, G[key])


class LowRank(nn.Module):
    """A zero matrix behind another one: at first nothing arrives at the other."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + ((x @ self.down).transpose(0, 1) @ self.up).transpose(0, 1)


def test_nothing_is_concluded_from_zeros():
    torch.manual_seed(0)
    model, x, y = Net(LowRank(), 8).double(), torch.randn(4, 4, 8).double(), torch.randint(C, (4,))
    for _ in range(5):
        run(model, x, y, BatchGrad())
        assert not model.body.down.grad_batch.any()
    nn.init.normal_(model.body.up)
    for _ in range(2):
        G = per_sample(model, x, y)
        run(model, x, y, BatchGrad())
        for key, p in model.named_parameters():
            close(p.grad_batch, G[key])


def test_sequence_first():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.pos = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 1, 8))

        def forward(self, x):  # [T, N, 8]
            return (self.linear(x) + self.pos).tanh()

    torch.manual_seed(0)
    for N in (4, 5):
        model, x = Net(Positions(), 8, axis=0).double(), torch.randn(5, N, 8).double()
        y = torch.randint(C, (N,))
        run(model, x, y, BatchGrad(), batch_axis=1)
        for p in model.parameters():
            rows = [
                torch.autograd.grad(F.cross_entropy(model(x[:, n : n + 1]), y[n : n + 1]) / N, p)[0]
                for n in range(N)
            ]
            close(p.grad_batch, torch.stack(rows))


def test_data_that_are_mixed_behind_the_parameter():
    """The datum's loss depends on the parameter through all data; its gradient is what it is."""
    torch.manual_seed(0)
    model, x, y = Net(Centred(), 8).double(), torch.randn(4, 8).double(), torch.randint(C, (4,))
    nn.init.normal_(model.body.w)
    losses = F.cross_entropy(model(x), y, reduction="none") / 4
    G = [torch.autograd.grad(loss, model.body.w, retain_graph=True)[0] for loss in losses]
    run(model, x, y, BatchGrad())
    close(model.body.w.grad_batch, torch.stack(G))


def test_without_checks_sizes_decide():
    model, x, y = build("tokens", 3)
    G = per_sample(model, x, y)
    run(model, x, y, BatchGrad(), check_layers=False)
    for key, p in model.named_parameters():
        close(p.grad_batch, G[key])


def test_without_a_loss_module():
    model, x, y = build("tokens")
    G = per_sample(model, x, y)
    extend(model)
    with backpack(BatchGrad()):
        F.cross_entropy(model(x), y).backward()
    for key, p in model.named_parameters():
        close(p.grad_batch, G[key])


def test_two_losses():
    model, x, y = build("tokens")
    loss_fn, other = extend(nn.CrossEntropyLoss()), extend(nn.CrossEntropyLoss())
    G = per_sample(model, x, y)
    extend(model)
    with backpack(BatchGrad()):
        z = model(x)
        (loss_fn(z, y) + 2 * other(z, y)).backward()
    for key, p in model.named_parameters():
        close(p.grad_batch, 3 * G[key])


def test_frozen_parameters_cost_nothing():
    model, x, y = build("tokens")
    model.body.token.requires_grad_(False)
    run(model, x, y, BatchGrad())
    assert not hasattr(model.body.token, "grad_batch") and hasattr(model.body.pos, "grad_batch")


def test_large_blocks_are_refused():
    model, x, y = build("functional")
    with pytest.raises(UnsupportedError, match=r"block of body\.conv \(Functional\) would be 75 x"):
        run(model, x, y, KFAC(fisher="exact", max_dim=30))
    run(model, x, y, KFAC(fisher="exact", max_dim=30, oversize="diagonal"))
    assert isinstance(model.body.conv.kfac, DiagonalBlock)
    assert isinstance(model.head.weight.kfac, Kronecker)


class Probe:
    """Something that can be referred to weakly."""


def test_nothing_is_kept_alive():
    import gc
    import weakref

    for ext in (BatchGrad(), KFAC(fisher="exact")):
        model, x, y = build("tokens")
        run(model, x, y, ext)
        loss_fn = extend(nn.CrossEntropyLoss())
        with backpack(ext):
            loss = loss_fn(model(x), y)
            seen = weakref.ref(loss.grad_fn.metadata.setdefault("probe", Probe()))
            loss.backward()
        del loss
        gc.collect()
        assert seen() is None  # the graph is gone
        probe = weakref.ref(model)
        del model
        gc.collect()
        assert probe() is None
