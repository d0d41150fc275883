"""Policy losses: values, and diagonals against double backward; networks against the recursion."""

from collections.abc import Callable

import pytest
import torch
from hesscale_oracle import Graph, Module, exact_diagonal, recursion
from torch import Tensor, nn
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Normal
from torch.nn import functional as F

from backpack_ext import (
    BL89,
    HesScale,
    RecordingError,
    UnsupportedError,
    attach_diagonal,
    backpack,
    extend,
    loss_diagonal,
    policy,
)
from backpack_ext.policy import Categorical, Gaussian, clipped_loss, entropy, log_prob_loss

pytestmark = pytest.mark.usefixtures("double")
N, C, D = 5, 4, 3

# -- what torch says -------------------------------------------------------------------------------


def reference(heads: tuple[Tensor, ...]) -> tuple[Callable, Callable]:
    """Log-probability and entropy, `[N]`, by torch.distributions."""
    if len(heads) == 1:
        q = TorchCategorical(logits=heads[0])
        return q.log_prob, q.entropy
    q = Normal(heads[0], heads[1].exp().expand_as(heads[0]))
    return lambda a: q.log_prob(a).sum(-1), lambda: q.entropy().sum(-1)


def total(terms: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    terms = terms if weights is None else terms * weights
    return terms.mean() if reduction == "mean" else terms.sum()


class Batch:
    """Heads, actions, advantages; ratios on both sides of both bounds."""

    def __init__(self, kind: str, leading: tuple[int, ...] = (N,)):
        mean = torch.randn(*leading, D)
        self.heads = {
            "categorical": (2 * torch.randn(*leading, C),),
            "gaussian": (mean, 0.5 * torch.randn(*leading, D)),
            "gaussian, shared std": (mean, 0.5 * torch.randn(D)),
            "gaussian, std of each datum": (mean, 0.5 * torch.randn(*leading, 1)),
            "gaussian, one std": (mean, torch.tensor(0.3)),
        }[kind]
        self.make = Categorical if len(self.heads) == 1 else Gaussian
        self.actions = self.make(*self.heads).sample()
        self.advantages = torch.randn(leading)
        self.weights = torch.rand(leading) + 0.5
        shift = torch.linspace(-0.5, 0.5, self.advantages.numel()).view(leading)
        self.old = reference(self.heads)[0](self.actions) + shift

    def losses(self, weights: Tensor | None, reduction: str) -> dict[str, tuple[Callable, Callable]]:
        """By name: our loss and the plain one, functions of the heads."""
        a, A, old = self.actions, self.advantages, self.old
        options = {"weights": weights, "reduction": reduction}

        def clipped(*heads: Tensor) -> Tensor:
            ratio = (reference(heads)[0](a) - old).exp()
            return total(-torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A), weights, reduction)

        return {
            "log_prob": (
                lambda *z: log_prob_loss(self.make(*z), a, A, **options),
                lambda *z: total(-A * reference(z)[0](a), weights, reduction),
            ),
            "clipped": (lambda *z: clipped_loss(self.make(*z), a, A, old, **options), clipped),
            "entropy": (
                lambda *z: entropy(self.make(*z), **options),
                lambda *z: total(reference(z)[1](), weights, reduction),
            ),
        }


def hesscale(loss: Callable, tensors: tuple[Tensor, ...], **options) -> list[Tensor]:
    """The diagonals that arrive at parameters which are the loss's arguments; zero if none does."""
    leaves = [nn.Parameter(t.clone()) for t in tensors]
    with backpack(HesScale(**options)):
        loss(*leaves).backward()
    return [getattr(p, "hesscale", torch.zeros_like(p)) for p in leaves]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


KINDS = (
    "categorical",
    "gaussian",
    "gaussian, shared std",
    "gaussian, std of each datum",
    "gaussian, one std",
)
LOSSES = ("log_prob", "clipped", "entropy")

# -- the diagonals at the heads --------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(N,), (1,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("reduction", policy.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_heads(kind, loss, weighted, reduction, leading):
    batch = Batch(kind, leading)
    ours, plain = batch.losses(batch.weights if weighted else None, reduction)[loss]
    leaves = [nn.Parameter(z.clone()) for z in batch.heads]
    assert_close(ours(*leaves), plain(*leaves))
    for g, expected in zip(
        torch.autograd.grad(ours(*leaves), leaves, materialize_grads=True, allow_unused=True),
        torch.autograd.grad(plain(*leaves), leaves, materialize_grads=True, allow_unused=True),
        strict=True,
    ):
        assert_close(g, expected)
    for found, expected in zip(
        hesscale(ours, batch.heads), exact_diagonal(plain, list(batch.heads)), strict=True
    ):
        assert_close(found, expected)


def test_ratios_are_on_both_sides():
    batch = Batch("categorical", (40,))
    (h,) = hesscale(batch.losses(None, "sum")["clipped"][0], batch.heads)
    ratios = (batch.make(*batch.heads).log_prob(batch.actions) - batch.old).exp()
    A = batch.advantages
    clipped = ((A > 0) & (ratios > 1.2)) | ((A < 0) & (ratios < 0.8))
    assert 0 < clipped.sum() < len(A)
    assert torch.equal(h.abs().sum(1) == 0, clipped)


def test_diagonals_may_be_negative():
    z, a = torch.zeros(1, 2), torch.tensor([0])
    (h,) = hesscale(lambda z: log_prob_loss(Categorical(z), a, torch.tensor([-1.0])), (z,))
    assert_close(h, torch.full((1, 2), -0.25))
    (h,) = hesscale(lambda z: entropy(Categorical(z)), (z,))
    assert_close(h, torch.full((1, 2), -0.25))


@pytest.mark.parametrize("loss", LOSSES)
def test_actions_that_are_not_available(loss):
    batch = Batch("categorical")
    z = batch.heads[0].index_fill(1, torch.tensor([2]), -torch.inf)
    batch.actions = batch.actions.where(batch.actions != 2, 0)
    batch.old = batch.old.clamp(min=-3)
    ours, _ = batch.losses(None, "mean")[loss]
    kept = [0, 1, 3]
    index = torch.tensor([0, 1, -1, 2])[batch.actions]

    smaller = Batch("categorical")
    smaller.actions, smaller.advantages, smaller.old = index, batch.advantages, batch.old
    _, plain = smaller.losses(None, "mean")[loss]
    leaf = nn.Parameter(z)
    with backpack(HesScale()):
        value = ours(leaf)
        value.backward()
    (expected,) = exact_diagonal(plain, [z[:, kept]])
    assert_close(value, plain(z[:, kept]))
    assert_close(leaf.hesscale[:, kept], expected)
    assert torch.equal(leaf.hesscale[:, 2], torch.zeros(N))
    assert torch.equal(leaf.grad[:, 2], torch.zeros(N))


@pytest.mark.parametrize("kind", KINDS)
def test_halves_compute_in_float32(kind):
    batch = Batch(kind)
    halves = tuple(z.half() for z in batch.heads)
    batch.advantages, batch.old = batch.advantages.half(), batch.old.half()
    if kind != "categorical":
        batch.actions = batch.actions.half()
    for ours, plain in batch.losses(None, "mean").values():
        found = hesscale(ours, halves)
        expected = exact_diagonal(plain, [z.double() for z in halves])
        for h, e in zip(found, expected, strict=True):
            torch.testing.assert_close(h.double(), e, rtol=1e-2, atol=1e-3)


def test_what_is_fixed_needs_no_gradient():
    mean, a, A = torch.randn(N, D), torch.randn(N, D), torch.randn(N)
    (h,) = hesscale(lambda mean: log_prob_loss(Gaussian(mean, torch.zeros(D)), a, A), (mean,))
    assert_close(h, (A / N).unsqueeze(1).expand(N, D))
    (h,) = hesscale(lambda s: log_prob_loss(Gaussian(mean, s), a, A), (torch.zeros(D),))
    assert_close(h, (A.unsqueeze(1) * 2 * (a - mean) ** 2).mean(0))
    assert not entropy(Gaussian(nn.Parameter(mean), torch.zeros(D))).requires_grad


def test_without_gradients_the_values_are_numbers():
    pi, a, A = Gaussian(nn.Parameter(torch.zeros(N, D)), torch.zeros(D)), torch.ones(N, D), torch.ones(N)
    with torch.no_grad():
        old = pi.log_prob(a)
        losses = log_prob_loss(pi, a, A), clipped_loss(pi, a, A, old), entropy(pi)
    assert not any(value.requires_grad for value in losses)
    assert_close(losses[1], torch.tensor(-1.0))


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_samples(kind):
    batch = Batch(kind)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    a, b = (batch.make(*batch.heads).sample(generator) for generator in generators)
    assert torch.equal(a, b) and not a.requires_grad
    z = [torch.tensor([0.0, 1.0, -1.0]).expand(20_000, 3).contiguous() for _ in batch.heads]
    many = batch.make(*z).sample(torch.Generator().manual_seed(0))
    if kind == "categorical":
        assert torch.allclose(torch.bincount(many) / len(many), z[0][0].softmax(0), atol=0.01)
    else:
        assert torch.allclose(many.mean(0), z[0][0], atol=0.05)
        assert torch.allclose(many.std(0), z[1][0].exp(), rtol=0.02)


# -- networks --------------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """A shared trunk, a head for the policy and one for the value."""

    def __init__(self, kind: str):
        super().__init__()
        self.trunk1, self.trunk2 = nn.Linear(3, 6), nn.Linear(6, 5)
        self.tanh = nn.Tanh()
        self.policy, self.value = nn.Linear(5, C if kind == "categorical" else D), nn.Linear(5, 1)
        if kind != "categorical":
            self.log_std = nn.Parameter(0.1 * torch.randn(D))

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        x = self.trunk2(self.tanh(self.trunk1(x))).tanh()
        head = self.policy(x)
        return ((head, self.log_std) if hasattr(self, "log_std") else (head,)), self.value(x)


def graph_of(model: ActorCritic) -> tuple[list[Module], list[str]]:
    """The network as modules, and the names of heads and value."""
    graph = Graph()
    x = graph.layer(model, "trunk1", "x")
    x = graph.layer(model, "trunk2", graph(torch.tanh, x))
    x = graph(torch.tanh, x)
    heads = [graph.layer(model, "policy", x)]
    heads += ["log_std"] if hasattr(model, "log_std") else []
    return graph.modules, [*heads, graph.layer(model, "value", x)]


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("loss", ["log_prob", "clipped"])
@pytest.mark.parametrize("kind", ["categorical", "gaussian, shared std"])
def test_actor_critic_in_one_backward_pass(kind, loss, extended, gauss_newton):
    model, x, returns = ActorCritic(kind), torch.randn(N, 3), torch.randn(N, 1)
    batch = Batch(kind)
    with torch.no_grad():
        batch.heads = model(x)[0]
        batch.old = reference(batch.heads)[0](batch.actions) + torch.linspace(-0.5, 0.5, N)
    losses = batch.losses(None, "mean")
    modules, names = graph_of(model)

    def plain(*outputs: Tensor) -> Tensor:
        *heads, values = outputs
        policy_loss, bonus = losses[loss][1](*heads), losses["entropy"][1](*heads)
        return policy_loss + 0.5 * F.mse_loss(values, returns) - 0.01 * bonus

    leaves = {"x": x, **dict(model.named_parameters())}
    expected = recursion(modules, leaves, Module("loss", plain, tuple(names)), gauss_newton)

    mse = extend(nn.MSELoss())
    model = extend(model) if extended else model
    with backpack(HesScale(gauss_newton=gauss_newton, savefield="h")):
        heads, values = model(x)
        total = (
            losses[loss][0](*heads) + 0.5 * mse(values, returns) - 0.01 * losses["entropy"][0](*heads)
        )
        total.backward()
    for name, p in model.named_parameters():
        assert_close(p.h, expected[name])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_last_layers_are_exact(kind, loss):
    """One linear layer from the data to each head: nothing is dropped on the way."""
    batch, x = Batch(kind), torch.randn(N, 3)
    ours, plain = batch.losses(None, "mean")[loss]
    weights = [torch.randn(z.shape[-1], 3) if z.dim() == 2 else z for z in batch.heads]

    def through(loss: Callable) -> Callable:
        return lambda *ps: loss(*(F.linear(x, p) if p.dim() == 2 else p for p in ps))

    found = hesscale(through(ours), weights)
    for h, expected in zip(found, exact_diagonal(through(plain), weights), strict=True):
        assert_close(h, expected)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "entropy"])
def test_one_hidden_layer_is_exact_where_the_hessian_is_diagonal(loss):
    """A mean of known variance: its Hessian is diagonal for the log-probability, D = 1 for all."""
    batch, x = Batch("gaussian, shared std"), torch.randn(N, 2)
    size = D if loss == "log_prob" else 1
    batch.actions, std = batch.actions[:, :size], torch.zeros(size)
    ours, plain = batch.losses(None, "mean")[loss]
    weights = [torch.randn(4, 2), torch.randn(size, 4)]

    def through(loss: Callable) -> Callable:
        return lambda V, W: loss(F.linear(F.linear(x, V).tanh(), W), std + 0 * W.sum())

    found = hesscale(lambda V, W: ours(F.linear(F.linear(x, V).tanh(), W), std + 0), weights)
    for h, expected in zip(found, exact_diagonal(through(plain), weights), strict=True):
        assert_close(h, expected)


def test_diagonals_of_each_datum():
    class Actor(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.log_std = nn.Linear(3, D), nn.Parameter(0.1 * torch.randn(D))

        def forward(self, x):
            return self.mean(x), self.log_std.expand(len(x), D)

    model, x = extend(Actor()), torch.randn(N, 3)
    a, A = torch.randn(N, D), torch.randn(N)
    with backpack(HesScale(batch=True), HesScale()):
        log_prob_loss(Gaussian(*model(x)), a, A).backward()
    for p in model.parameters():
        assert_close(p.hesscale_batch.sum(0), p.hesscale)
        assert p.hesscale_batch.shape == (N, *p.shape)


def test_bl89_starts_from_the_same_diagonal():
    layer, x = nn.Linear(3, C), torch.randn(N, 3)
    a, A = torch.randint(C, (N,)), torch.randn(N)
    with backpack(HesScale(), BL89()):
        log_prob_loss(Categorical(layer(x)), a, A).backward()
    assert_close(layer.weight.bl89, layer.weight.hesscale)


def test_factors_of_a_loss():
    z, a, A = torch.randn(N, C), torch.randint(C, (N,)), torch.randn(N)
    (h,) = hesscale(lambda z: log_prob_loss(Categorical(z), a, A), (z,))
    (scaled,) = hesscale(lambda z: -3 * log_prob_loss(Categorical(z), a, A), (z,))
    assert_close(scaled, -3 * h)


# -- wrong use -------------------------------------------------------------------------------------

LOGITS, ACTIONS, ONES = torch.zeros(N, C), torch.zeros(N, dtype=torch.long), torch.ones(N)
MEAN = torch.zeros(N, D)
WRONG = {
    "logits": (lambda: Categorical(torch.tensor(1.0)), ValueError, "logits are a scalar"),
    "mean": (lambda: Gaussian(torch.tensor(1.0), ONES), ValueError, "mean is a scalar"),
    "std": (lambda: Gaussian(MEAN, torch.zeros(2)), ValueError, r"log_std of shape \(2,\)"),
    "indices": (lambda: log_prob_loss(Categorical(LOGITS), ONES, ONES), TypeError, "integers"),
    "actions": (
        lambda: log_prob_loss(Categorical(LOGITS), ACTIONS[:, None], ONES),
        ValueError,
        r"actions of shape \(5, 1\) .* expected \(5,\)",
    ),
    "columns": (
        lambda: log_prob_loss(Gaussian(MEAN, ONES[:D]), ONES, ONES),
        ValueError,
        r"actions of shape \(5,\) for means of shape \(5, 3\)",
    ),
    "reparametrized": (
        lambda: log_prob_loss(Gaussian(MEAN, ONES[:D]), nn.Parameter(MEAN), ONES),
        ValueError,
        "actions require a gradient.*Detach",
    ),
    "advantages": (
        lambda: log_prob_loss(Categorical(LOGITS), ACTIONS, ONES[:, None]),
        ValueError,
        r"advantages of shape \(5, 1\); expected one for each action, \(5,\)",
    ),
    "attached advantages": (
        lambda: log_prob_loss(Categorical(LOGITS), ACTIONS, nn.Parameter(ONES)),
        ValueError,
        "advantages require a gradient.*Detach",
    ),
    "weights": (
        lambda: entropy(Categorical(LOGITS), weights=ONES[:2]),
        ValueError,
        r"entropy: weights of shape \(2,\)",
    ),
    "old": (
        lambda: clipped_loss(Categorical(LOGITS), ACTIONS, ONES, nn.Parameter(ONES)),
        ValueError,
        "old_log_probs require a gradient",
    ),
    "clip": (
        lambda: clipped_loss(Categorical(LOGITS), ACTIONS, ONES, ONES, clip=0.0),
        ValueError,
        "clip=0.0; expected a number > 0",
    ),
    "reduction": (
        lambda: log_prob_loss(Categorical(LOGITS), ACTIONS, ONES, reduction="none"),
        ValueError,
        "reduction='none'; expected one of",
    ),
    "empty": (
        lambda: log_prob_loss(Categorical(LOGITS[:0]), ACTIONS[:0], ONES[:0]),
        ValueError,
        "the batch is empty",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_policy_without_an_entropy():
    class Own(policy.Policy):
        heads = (LOGITS,)

        def log_prob(self, actions):
            return self.heads[0].sum(-1)

        def derivatives(self, actions):
            return [(torch.ones(N, C), torch.zeros(N, C))]

    with pytest.raises(UnsupportedError, match="Own defines no entropy"):
        entropy(Own())


def test_a_head_that_no_loss_reaches():
    """A value head without a loss of its own is named by the pass."""
    head, x = extend(nn.Sequential(nn.Linear(3, C))), torch.randn(N, 3)
    with pytest.raises(RecordingError, match="attach_diagonal"), backpack(HesScale()):
        pi = Categorical(head(x))
        (log_prob_loss(pi, ACTIONS, ONES) + head(x).sum()).backward()


# -- losses without a closed form ------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_products_give_the_same(kind, loss):
    batch = Batch(kind, (N, 2))
    ours, plain = batch.losses(batch.weights, "mean")[loss]
    found = loss_diagonal(plain, *batch.heads)
    for h, expected in zip(found, hesscale(ours, batch.heads), strict=True):
        assert_close(h, expected)


def test_products_of_arguments_that_interact():
    def function(a: Tensor, b: Tensor) -> Tensor:
        return (a.sin().prod(1) * b.square().sum(1)).sum() + (a[:, 0] ** 3).sum()

    a, b = torch.randn(N, 3), torch.randn(N, 2)
    for h, expected in zip(loss_diagonal(function, a, b), exact_diagonal(function, [a, b]), strict=True):
        assert_close(h, expected)


def test_products_cost_one_for_each_column(monkeypatch):
    calls, plain = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    loss_diagonal(lambda z: z.exp().sum(), torch.randn(50, C), check=False)
    assert len(calls) == 1 + C
    loss_diagonal(lambda z: z.exp().sum(), torch.randn(50, C))
    assert len(calls) == 2 * (1 + C) + 2


def test_products_within_a_pass():
    layer, x = nn.Linear(3, C), torch.randn(N, 3)

    def function(z: Tensor) -> Tensor:
        return z.logsumexp(1).square().mean()

    with backpack(HesScale()):
        z = layer(x)
        attach_diagonal(z, loss_diagonal(function, z), function(z)).backward()
    expected = exact_diagonal(
        lambda W, b: function(F.linear(x, W, b)), [layer.weight.detach(), layer.bias.detach()]
    )
    assert_close(layer.weight.hesscale, expected[0])
    assert_close(layer.bias.hesscale, expected[1])


def test_products_of_no_curvature():
    unused, linear, empty = torch.randn(N, 2), torch.randn(N, 3), torch.randn(0, 3)
    for h in loss_diagonal(lambda u, z, e: z.sum() + e.sum(), unused, linear, empty):
        assert torch.equal(h, torch.zeros_like(h))


COUPLED = {
    "batch norm": lambda z: F.batch_norm(z, None, None, training=True).exp().sum(),
    "square of the sum": lambda z: z.sum().square(),
    "neighbours": lambda z: (z[1:] * z[:-1]).sum(),
}


@pytest.mark.parametrize("function", COUPLED.values(), ids=COUPLED)
def test_rows_that_interact(function):
    with pytest.raises(ValueError, match="rows of argument 0 interact"):
        loss_diagonal(function, torch.randn(N, C))


def test_wrong_arguments_of_products():
    z = torch.randn(N, C)
    with pytest.raises(ValueError, match=r"returned shape \(5,\); expected a scalar"):
        loss_diagonal(lambda z: z.sum(1), z)
    with pytest.raises(ValueError, match=r"expected rows, \[N, ...\]"):
        loss_diagonal(lambda z: z, torch.tensor(1.0))
    with pytest.raises(TypeError, match="int64; expected a real tensor"):
        loss_diagonal(lambda z: z.sum(), torch.arange(3))
