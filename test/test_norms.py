"""Scale and shift of norms: every quantity against dense autograd oracles, no approximation."""

from collections.abc import Callable

import pytest
import torch
from models import CASES, Problem
from oracle import ggn_blocks, ggn_diag, loss_scale, per_sample_grads
from torch import Tensor, nn

from backpack_ext import (
    EKFAC,
    KFAC,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    RecordingError,
    SumGradSquared,
    UnsupportedError,
    Variance,
    backpack,
    extend,
    register_rule,
)
from backpack_ext.dataset import collect
from backpack_ext.rules import RULES, ElementwiseRule
from backpack_ext.rules.elementwise import BatchNormRule
from curvature import DenseBlock, DiagonalBlock

N, C = 5, 4


def close(actual: Tensor, expected: Tensor) -> None:
    """Compare absolutely too: some gradients vanish, that of a norm of one feature's scale, say."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def channels(norm: nn.Module, *pixels: int) -> tuple[nn.Module, Tensor]:
    # no bias: behind an instance norm its gradient is zero, and only rounding would be compared
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(pixels)](2, C, 2, bias=False)
    x = torch.randn(N, 2, *pixels)
    out = nn.Sequential(conv, norm, nn.Tanh(), nn.Flatten())(x)
    return nn.Sequential(conv, norm, nn.Tanh(), nn.Flatten(), nn.Linear(out.shape[1], 3)), x


def tokens(norm: nn.Module, d: int = C) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(3, d), norm, nn.Tanh(), nn.Flatten(), nn.Linear(6 * d, 3))
    return model, torch.randn(N, 6, 3)


class TwoAxes(nn.Module):
    """A LayerNorm over the last two axes of `[N, T, 3, 4]`."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.linear(x)).tanh().flatten(1))


class Reused(nn.Module):
    """A norm called twice, once on a view, with an in-place activation behind it."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, C), norm, nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu_()
        x = self.norm((x + 0.3 * torch.arange(C)).flatten(0, 1)).view_as(x)
        return self.b(x.mean(1))


class Shared(nn.Module):
    """Two norms with one weight between them and shifts of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.one, self.two, self.b = (
            nn.Linear(3, C),
            nn.LayerNorm(C),
            nn.LayerNorm(C),
            nn.Linear(C, 3),
        )
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.two(self.one(self.a(x)).tanh() + x.mean(-1, keepdim=True)).mean(1))


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, C), nn.LayerNorm(C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:  # [T, N, 3]
        return self.b(self.norm(self.a(x)).tanh().mean(0))


def trained(norm: nn.Module) -> nn.Module:
    """A norm in eval mode, with running statistics that are not trivial."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


BUILD: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "layer": lambda: tokens(nn.LayerNorm(C)),
    "layer without bias": lambda: tokens(nn.LayerNorm(C, bias=False)),
    "layer over two axes": lambda: (TwoAxes(), torch.randn(N, 2, 3, 4)),
    "layer, one feature": lambda: tokens(nn.LayerNorm(1), 1),
    "RMS": lambda: tokens(nn.RMSNorm(C)),
    "RMS with eps": lambda: tokens(nn.RMSNorm(C, eps=0.1)),
    "group": lambda: channels(nn.GroupNorm(2, C), 3, 4),
    "group of vectors": lambda: (
        nn.Sequential(nn.Linear(3, C), nn.GroupNorm(2, C), nn.Tanh(), nn.Linear(C, 3)),
        torch.randn(N, 3),
    ),
    "batch of vectors": lambda: (
        nn.Sequential(nn.Linear(3, C), trained(nn.BatchNorm1d(C)), nn.Tanh(), nn.Linear(C, 3)),
        torch.randn(N, 3),
    ),
    "batch 1d": lambda: channels(trained(nn.BatchNorm1d(C)), 5),
    "batch 2d": lambda: channels(trained(nn.BatchNorm2d(C, eps=0.1)), 3, 4),
    "batch 3d": lambda: channels(trained(nn.BatchNorm3d(C)), 3, 4, 2),
    "instance 1d": lambda: channels(nn.InstanceNorm1d(C, affine=True), 5),
    "instance 2d": lambda: channels(nn.InstanceNorm2d(C, affine=True, eps=0.1), 3, 4),
    "instance 3d": lambda: channels(nn.InstanceNorm3d(C, affine=True), 3, 4, 2),
    "instance, running": lambda: channels(
        trained(nn.InstanceNorm2d(C, affine=True, track_running_stats=True)), 3, 4
    ),
    "layer, reused": lambda: (Reused(nn.LayerNorm(C)), torch.randn(N, 6, 3)),
    "RMS, reused": lambda: (Reused(nn.RMSNorm(C)), torch.randn(N, 6, 3)),
}
every = pytest.mark.parametrize("name", BUILD)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def build(name: str, reduction: str = "mean") -> Problem:
    torch.manual_seed(0)
    model, x = BUILD[name]()
    for m in model.modules():
        if isinstance(m, NORMS):  # ones and zeros would hide mistakes
            for p in m.parameters():
                nn.init.normal_(p, 1.0, 0.5)
    problem = Problem(model, (x,), nn.CrossEntropyLoss(reduction=reduction), torch.randint(3, (N,)))
    return problem.to(torch.float64)


def run(problem: Problem, *exts, **options) -> Problem:
    extend(problem.model, **options), extend(problem.loss_fn)
    with backpack(*exts):
        problem.loss().backward()
    return problem


def norm_parameters(problem: Problem) -> dict[str, nn.Parameter]:
    inside = {id(p) for m in problem.model.modules() if isinstance(m, NORMS) for p in m.parameters()}
    return {k: p for k, p in problem.model.named_parameters() if id(p) in inside}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@every
def test_per_sample_quantities(name: str, reduction: str):
    exts = (BatchGrad, BatchL2Grad, BatchDotGrad, SumGradSquared, Variance, DiagGGN)
    problem = run(build(name, reduction), *(ext() for ext in exts))
    reference = build(name, reduction)
    G, diagonal = per_sample_grads(reference), ggn_diag(reference)
    assert norm_parameters(problem)
    for key, p in problem.model.named_parameters():
        g = G[key]
        close(p.grad_batch, g)
        close(p.batch_l2, g.square().flatten(1).sum(1))
        close(p.batch_dot, g.flatten(1) @ g.flatten(1).T)
        close(p.sum_grad_squared, g.square().sum(0))
        close(p.variance, g.var(0, correction=0))
        close(p.diag_ggn_exact, diagonal[key])


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@every
def test_dense_blocks_are_exact(name: str, approx: str, bias: str):
    options = {"approx": approx, "fisher": "exact", "bias": bias}
    problem = run(
        build(name),
        KFAC(**options),
        KFAC(**options, norm="diagonal", savefield="kfac_diagonal"),
        EKFAC(**options),
    )
    blocks = ggn_blocks(build(name))
    for key, p in norm_parameters(problem).items():
        assert isinstance(p.kfac, DenseBlock) and isinstance(p.kfac_diagonal, DiagonalBlock)
        close(p.kfac.to_dense(), blocks[key])
        close(p.ekfac.to_dense(), blocks[key])
        close(p.kfac_diagonal.to_dense().diagonal(), blocks[key].diagonal())
        close(p.kfac.matvec(p.detach()).flatten(), blocks[key] @ p.detach().flatten())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@every
def test_empirical_blocks(name: str, reduction: str):
    problem = run(build(name, reduction), KFAC(fisher="empirical"))
    reference = build(name, reduction)
    G, r = per_sample_grads(reference), loss_scale(reference)
    for key, p in norm_parameters(problem).items():
        g = G[key].flatten(1)
        close(p.kfac.to_dense(), g.T @ g / r)


@pytest.mark.montecarlo
@pytest.mark.parametrize("name", ["layer", "batch 2d"])
def test_sampled_blocks(name: str):
    generator = torch.Generator().manual_seed(0)
    problem = run(build(name), KFAC(fisher="mc", mc_samples=4000, generator=generator))
    blocks = ggn_blocks(build(name))
    for key, p in norm_parameters(problem).items():
        assert (p.kfac.to_dense() - blocks[key]).norm() < 0.1 * blocks[key].norm()


def test_no_vectors():
    """The identity for the outputs' curvature: mean squared normalised inputs, and ones."""
    for approx in ("expand", "reduce"):
        problem = run(build("layer"), KFAC(approx, "forward"))
        (x,), norm = problem.inputs, problem.model[1]
        a = nn.functional.layer_norm(problem.model[0](x).detach(), (C,))
        a = a.flatten(0, 1) if approx == "expand" else a.mean(1)
        close(norm.weight.kfac.diagonal(), a.square().mean(0))
        close(norm.bias.kfac.diagonal(), torch.ones(C).double())


@pytest.mark.parametrize("fisher", ["exact", "empirical", "forward"])
def test_over_a_data_set(fisher: str):
    whole, parts = run(build("layer"), KFAC(fisher=fisher), EKFAC(fisher="exact")), build("layer")
    (x,), y = parts.inputs, parts.target
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = collect(parts.model, parts.loss_fn, batches, KFAC(fisher=fisher), progress=False)["kfac"]
    for key, p in whole.model.named_parameters():
        close(found[key].to_dense(), p.kfac.to_dense())
    if fisher == "exact":
        named = dict(parts.model.named_parameters())
        basis = {named[k]: K for k, K in found.items() if not isinstance(K, DenseBlock)}
        ext = EKFAC(fisher="exact", basis=basis)
        found = collect(parts.model, parts.loss_fn, batches, ext, progress=False)["ekfac"]
        for key, p in whole.model.named_parameters():
            close(found[key].to_dense(), p.ekfac.to_dense())


def test_one_weight_in_two_norms():
    """Per-sample gradients have both roles; KFAC adds the roles' blocks, without cross terms."""
    torch.manual_seed(0)
    model, x, y = Shared(), torch.randn(N, 6, 3), torch.randint(3, (N,))
    problem = Problem(model, (x,), nn.CrossEntropyLoss(), y).to(torch.float64)
    G = per_sample_grads(problem)["one.weight"]
    apart = Problem(Shared(), (x,), nn.CrossEntropyLoss(), y).to(torch.float64)
    apart.model.load_state_dict(model.state_dict())
    apart.model.two.weight = nn.Parameter(model.one.weight.detach().clone())
    blocks = ggn_blocks(apart)
    run(problem, BatchGrad(), KFAC(fisher="exact"))
    close(problem.model.one.weight.grad_batch, G)
    expected = blocks["one.weight"] + blocks["two.weight"]
    close(problem.model.one.weight.kfac.to_dense(), expected)


def test_sequence_first():
    torch.manual_seed(0)
    model, x, y = SequenceFirst(), torch.randn(6, N, 3), torch.randint(3, (N,))
    problem = Problem(model, (x,), nn.CrossEntropyLoss(), y).to(torch.float64)
    run(problem, BatchGrad(), batch_axis=1)
    for key, p in problem.model.named_parameters():
        rows = []
        for n in range(N):
            out = problem.model(problem.inputs[0][:, n : n + 1])
            loss = nn.functional.cross_entropy(out, y[n : n + 1]) / N
            rows.append(torch.autograd.grad(loss, p)[0])
        close(p.grad_batch, torch.stack(rows)), key


def test_statistics_that_changed_are_found():
    """Autograd takes those of the backward, whatever the forward used: no number is right."""
    problem = build("batch 2d")
    extend(problem.model), extend(problem.loss_fn)
    with pytest.raises(RecordingError, match="running statistics changed"), backpack(BatchGrad()):
        loss = problem.loss()
        with torch.no_grad():
            problem.model.train()(problem.inputs[0] + 3)
        loss.backward()
    problem.model.eval()
    run(problem, BatchGrad())


class Doubled(nn.BatchNorm2d):
    """A batch norm with twice the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) - self.bias[:, None, None]


class DataBehind(nn.Module):
    """A batch norm whose data are on the last axis, behind as many positions."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, C), trained(nn.BatchNorm1d(C)), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:  # [T, N, 3]
        x = self.norm(self.a(x).transpose(1, 2).contiguous())
        x = torch.full((C, C), 0.5, dtype=x.dtype) @ x.tanh()  # its gradient is contiguous
        return self.b(x.transpose(1, 2).cumsum(0).tanh().mean(0))


def test_batch_norms_with_data_on_another_axis():
    torch.manual_seed(0)
    model, loss_fn, x, y = DataBehind(), nn.CrossEntropyLoss(), torch.randn(N, N, 3), torch.arange(N) % 3
    model, x = model.double(), x.double()
    norm, single = model.norm, []
    for n in range(N):
        grads = torch.autograd.grad(loss_fn(model(x[:, n : n + 1]), y[n : n + 1]), norm.parameters())
        single.append([g / N for g in grads])
    extend(model, batch_axis=1), extend(loss_fn)
    with backpack(BatchGrad()):
        loss_fn(model(x), y).backward()
    for p, expected in zip(norm.parameters(), zip(*single, strict=True), strict=True):
        close(p.grad_batch, torch.stack(expected))


class DoubledRule(BatchNormRule):
    def normalized(self, site, x):
        return 2 * super().normalized(site, x)


@pytest.mark.parametrize("kind", ["contiguous", "channels last", "subclass"])
@pytest.mark.parametrize("extension", [BatchGrad, DiagGGN])
def test_batch_norms_in_one_pass(extension: type, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Gradients of a datum are those of one datum of N C channels, where memory and rule allow it."""
    torch.manual_seed(0)
    monkeypatch.setitem(RULES, Doubled, DoubledRule())
    norm = (Doubled if kind == "subclass" else nn.BatchNorm2d)(C, eps=0.1)
    model, x = channels(trained(norm), 5, 6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    if kind == "channels last":
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    problem = Problem(model, (x,), nn.CrossEntropyLoss(), torch.randint(3, (N,)))
    problem.to(torch.float64)
    exact = per_sample_grads if extension is BatchGrad else ggn_diag
    expected = exact(problem)
    known, sums = [], BatchNormRule.sums
    monkeypatch.setattr(BatchNormRule, "sums", lambda *args: known.append(sums(*args)) or known[-1])
    run(problem, extension())
    for name, p in model.named_parameters():
        close(getattr(p, extension().savefield), expected[name])
    assert [found is not None for found in known] == [kind == "contiguous"] * len(known)
    assert known and (kind != "contiguous" or (len(known[0][0]) > 1) == (extension is DiagGGN))


def test_training_mode():
    """Quantities per datum are undefined; KFAC with one sampled vector per batch is not."""
    problem = build("batch 2d")
    problem.model.train()
    extend(problem.model), extend(problem.loss_fn)
    for ext in (BatchGrad(), DiagGGN(), KFAC(fisher="exact"), EKFAC(fisher="empirical")):
        with pytest.raises(UnsupportedError, match="batch norm in training mode"), backpack(ext):
            problem.loss().backward()
    with backpack(KFAC(fisher="mc"), KFAC(fisher="empirical", savefield="empirical")):
        problem.loss().backward()
    conv, norm = problem.model[:2]
    z = conv(problem.inputs[0]).detach().requires_grad_()
    out = norm(z)
    (g,) = torch.autograd.grad(problem.loss_fn(problem.model[2:](out), problem.target), out)
    a = nn.functional.batch_norm(z.detach(), None, None, training=True, eps=norm.eps)
    G = (g * a).sum((2, 3))
    close(norm.weight.empirical.to_dense(), G.T @ G * N)
    assert norm.weight.kfac.to_dense().isfinite().all()


def test_only_some_parameters_are_trained():
    problem = build("layer")
    for key, p in problem.model.named_parameters():
        p.requires_grad_(key == "1.bias")
    run(problem, BatchGrad(), KFAC(fisher="exact"))
    close(problem.model[1].bias.grad_batch, per_sample_grads(problem)["1.bias"])
    assert not hasattr(problem.model[1].weight, "kfac")


@pytest.mark.parametrize("name", ["layer", "RMS", "group", "batch 2d", "instance 2d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(name: str, dtype: torch.dtype):
    problem, reference = build(name).to(dtype), build(name).to(dtype)
    run(problem, KFAC(fisher="exact"))
    reference.to(torch.float64)
    blocks = ggn_blocks(reference)
    for key, p in norm_parameters(problem).items():
        assert p.kfac.dtype == torch.float32
        error = (p.kfac.to_dense() - blocks[key]).norm() / blocks[key].norm()
        assert error < (0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_default_eps_of_small_inputs(dtype: torch.dtype):
    """The rule's normalised inputs are the layer's own output where its weight is one."""
    norm, x = nn.RMSNorm(C).to(dtype), (1e-3 * torch.randn(N, C)).to(dtype).requires_grad_()
    extend(norm)
    with backpack(BatchGrad()):
        norm(x).sum().backward()
    torch.testing.assert_close(norm.weight.grad_batch.to(dtype), norm(x).detach(), rtol=0.01, atol=1e-3)


def test_large_blocks():
    problem = build("layer")
    problem.model[0].requires_grad_(False)
    problem.model[4].requires_grad_(False)
    extend(problem.model), extend(problem.loss_fn)
    with pytest.raises(UnsupportedError, match=r"block of 1 \(LayerNorm\) would be 4 x 4"):
        run(problem, KFAC(fisher="empirical", max_dim=3))
    run(problem, KFAC(fisher="empirical", max_dim=3, oversize="diagonal"))
    assert isinstance(problem.model[1].weight.kfac, DiagonalBlock)
    with pytest.raises(ValueError, match="norm='full'"):
        KFAC(norm="full")


class HomeMade(nn.Module):
    """A norm that computes in float32 and calls its weight `scale`."""

    def __init__(self, d: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt())


def test_a_home_made_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, C), HomeMade(C), nn.Tanh(), nn.Linear(C, 3))
    problem = Problem(model, (torch.randn(N, 3),), nn.CrossEntropyLoss(), torch.randint(3, (N,)))
    problem.to(torch.float64)
    blocks = ggn_blocks(problem)
    run(problem, KFAC(fisher="exact"))  # without a rule autograd carries one datum at a time
    close(problem.model[1].scale.kfac.to_dense(), blocks["1.scale"])

    @register_rule(HomeMade)
    class HomeMadeRule(ElementwiseRule):
        weight, bias = "scale", None

        def normalized(self, site, x):
            return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()

    try:
        run(problem, KFAC(fisher="exact"))
        close(problem.model[1].scale.kfac.to_dense(), blocks["1.scale"])
    finally:
        register_rule(HomeMade, overwrite=True)(HomeMadeRule)
        del RULES[HomeMade]


def test_a_wrong_rule_is_found():
    class Wrong(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    problem = build("layer")
    problem.model[1] = Wrong(C).double()
    with pytest.raises(
        UnsupportedError, match="put together from the recorded calls, is not autograd's"
    ):
        run(problem, BatchGrad())


class ChannelsFirst(nn.LayerNorm):
    """As ConvNeXts have it: `[N, C, H, W]`, the channels normalised."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("pixels", [1, 3])
def test_a_layer_norm_of_another_layout(pixels: int):
    """The rule of its base class does not fit; autograd carries one datum at a time instead."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, C, 3, padding=1),
        nn.AdaptiveAvgPool2d(pixels),
        ChannelsFirst(C),
        nn.Flatten(),
        nn.Linear(C * pixels**2, 3),
    )
    loss_fn, y = nn.CrossEntropyLoss(), torch.randint(3, (N,))
    problem = Problem(model, (torch.randn(N, 2, 6, 6),), loss_fn, y).to(torch.float64)
    blocks, G = ggn_blocks(problem), per_sample_grads(problem)
    run(problem, KFAC(fisher="exact"), BatchGrad())
    for key in ("2.weight", "2.bias"):
        p = problem.model.get_parameter(key)
        close(p.grad_batch, G[key])
        close(p.kfac.to_dense(), blocks[key])


@pytest.mark.parametrize("name", ["vit_params", "char_gpt"])
def test_transformers_of_the_zoo(name: str):
    problem = run(CASES[name](reduction="mean"), BatchGrad())
    G = per_sample_grads(CASES[name](reduction="mean"))
    found = norm_parameters(problem)
    assert found or name == "char_gpt"
    for key, p in found.items():
        close(p.grad_batch, G[key])


def test_many_rows_in_half_precision():
    """On CPU torch adds up a norm's bfloat16 gradients row by row; that is no other layer."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = extend(nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 10)).bfloat16())
        loss_fn, x = extend(nn.CrossEntropyLoss()), torch.randn(64, 17, 16, dtype=torch.bfloat16)
        with backpack(SumGradSquared()):
            loss_fn(model(x).mean(1), torch.randint(0, 10, (64,))).backward()
        assert model[1].bias.sum_grad_squared.isfinite().all()
