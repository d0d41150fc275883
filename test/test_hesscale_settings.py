"""Hessian diagonals beside other extensions, in low precision, over processes and data sets."""

import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import backpack as their
import pytest
import torch
from backpack import extensions as theirs
from test_hesscale_networks import Chain
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backpack_ext import (
    BL89,
    KFAC,
    BatchGrad,
    HesScale,
    RecordingError,
    UnsupportedError,
    attach_diagonal,
    backpack,
    extend,
    register_activation,
    register_diagonal_rule,
)
from backpack_ext.dataset import collect
from backpack_ext.diagonals import ACTIVATIONS, RULES, chain
from backpack_ext.diagonals.recursion import Recursion
from backpack_ext.diagonals.rule import found as rules_found

CE = nn.CrossEntropyLoss


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


class Block(nn.Module):
    """Tokens, attention, norms, gates: most kinds of operations."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.qkv = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 24)
        self.out, self.rms, self.head = nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)
        self.first = nn.Parameter(torch.randn(8) / 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.first
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = F.silu(self.rms(x)) * x.sigmoid()
        return self.head(x.gather(1, tokens[..., None].expand_as(x) % 2).cumsum(1).mean(1))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten()),
        nn.Linear(4, 3),
    ).eval()


NETWORKS = {
    "mlp": (mlp, lambda: torch.randn(7, 6)),
    "cnn": (cnn, lambda: torch.randn(7, 2, 6, 6)),
    "block": (Block, lambda: torch.randint(9, (7, 5))),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, data = NETWORKS[name]
    return make(), data(), torch.randint(3, (7,))


def fields(model: nn.Module, *names: str) -> dict:
    return {(n, f): getattr(p, f) for n, p in model.named_parameters() for f in names}


def close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = value.abs().max()
        assert (found[key].to(value.dtype) - value).abs().max() <= tolerance * scale, key


@every_network
def test_the_same_pass_as_others(name: str, double):
    model, x, y = problem(name)
    loss_fn = extend(CE())
    with backpack(HesScale(), BL89()):
        loss_fn(model(x), y).backward()
    alone = fields(model, "hesscale", "bl89")
    extend(model)
    with backpack(HesScale(), BL89(), KFAC(fisher="exact"), BatchGrad()):
        loss_fn(model(x), y).backward()
    close(fields(model, "hesscale", "bl89"), alone, 1e-12)
    with backpack(KFAC(fisher="exact"), BatchGrad()):
        loss_fn(model(x), y).backward()
    assert all(len(p.grad_batch) == 7 for p in model.parameters())


def test_the_same_pass_as_extensions_of_backpack(double):
    model, x, y = problem("mlp")
    with backpack(HesScale()):
        extend(CE())(model(x), y).backward()
    alone = fields(model, "hesscale")
    model, loss_fn = their.extend(extend(model)), their.extend(extend(CE()))
    with backpack(HesScale(), theirs.BatchGrad(), theirs.DiagGGNExact()):
        loss_fn(model(x), y).backward()
    close(fields(model, "hesscale"), alone, 1e-12)
    for p in model.parameters():
        assert p.grad_batch.shape == (7, *p.shape) and p.diag_ggn_exact.shape == p.shape


@every_network
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(name: str, autocast: bool):
    model, x, y = problem(name)
    model.to(torch.bfloat16).float()  # round the parameters
    loss_fn = extend(CE())
    x = x.bfloat16().float() if x.is_floating_point() else x
    with backpack(HesScale()):
        loss_fn(model(x), y).backward()
    expected = fields(model, "hesscale")
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16() if x.is_floating_point() else x
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with backpack(HesScale()), context:
        loss_fn(model(x), y).backward()
    found = fields(model, "hesscale")
    assert all(h.dtype == torch.float32 for h in found.values())
    close(found, expected, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_digits_of_a_low_precision(dtype: torch.dtype):
    """Kernels that take no float32 beside their own type, or round to it, lose none of h's digits."""
    moves = {
        "reflect": lambda x: F.pad(x, (1, 1), "reflect"),
        "replicate": lambda x: F.pad(x, (1, 1), "replicate"),
        "circular": lambda x: F.pad(x, (1, 1), "circular"),
        "largest": lambda x: x.max().reshape(1),
        "running sums": lambda x: torch.nansum(x, 1),
    }
    for name, move in moves.items():
        x = nn.Parameter(torch.arange(12.0).view(3, 4))
        expected = []
        for kind in (torch.float32, dtype):
            p = nn.Parameter(x.detach().to(kind))
            y = move(p)
            with backpack(HesScale()):  # most of 2 / n have no end in binary digits
                extend(nn.MSELoss())(y, torch.zeros_like(y)).backward()
            expected.append(p.hesscale)
        assert expected[1].dtype == torch.float32, name
        torch.testing.assert_close(expected[1], expected[0], rtol=1e-5, atol=0)


def work(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, x, y = problem("mlp")
    parallel = nn.parallel.DistributedDataParallel(model)
    rows = slice(3 * rank, 3 * rank + 3)
    for _ in range(2):
        model.zero_grad()
        with backpack(HesScale()):
            extend(CE())(parallel(x[rows]), y[rows]).backward()
    for p in model.parameters():
        dist.all_reduce(p.hesscale)
    torch.save([(p.grad, p.hesscale / 2) for p in model.parameters()], f"{out}/{rank}.pt")
    del parallel
    gc.collect()  # it is a cycle, whose threads must not outlive the process group
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path):
    mp.spawn(work, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    model, x, y = problem("mlp")
    with backpack(HesScale()):
        extend(CE())(model(x[:6]), y[:6]).backward()
    for rank in range(2):
        for p, (grad, h) in zip(model.parameters(), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(grad, p.grad)
            torch.testing.assert_close(h, p.hesscale)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_data_set(reduction: str, double):
    model, x, y = problem("mlp")
    loss_fn = extend(CE(reduction=reduction))
    with backpack(HesScale(), HesScale(batch=True)):
        loss_fn(extend(model)(x), y).backward()
    expected = fields(model, "hesscale", "hesscale_batch")
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = collect(model, loss_fn, batches, HesScale(), HesScale(batch=True), progress=False)
    flat = {(n, f): h for f, results in found.items() for n, h in results.items()}
    close(flat, expected, 1e-12)


def test_micro_batches_and_a_grad_scaler(double):
    model, x, y = problem("mlp")
    loss_fn, scaler = extend(CE()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with backpack(HesScale()):
        loss_fn(model(x), y).backward()
    expected = fields(model, "hesscale")
    with backpack(HesScale(), grad_scaler=scaler):
        scaler.scale(loss_fn(model(x), y)).backward()
    close(fields(model, "hesscale"), expected, 1e-10)
    total = {key: torch.zeros_like(h) for key, h in expected.items()}
    for rows in (slice(4), slice(4, 7)):
        with backpack(HesScale()):
            (loss_fn(model(x[rows]), y[rows]) * len(y[rows]) / 7).backward()
        total = {key: h + fields(model, "hesscale")[key] for key, h in total.items()}
    close(total, expected, 1e-12)


def test_gradients_of_some_inputs(double):
    model, x, y = problem("mlp")
    loss_fn = extend(CE())
    with backpack(HesScale()):
        loss_fn(model(x), y).backward()
    expected = fields(model, "hesscale")
    p = model[2].weight
    for run in (
        lambda loss: loss.backward(inputs=[p]),
        lambda loss: torch.autograd.grad(loss, [p]),
        lambda loss: loss.backward(create_graph=True),
    ):
        p.hesscale = None
        with backpack(HesScale()):
            run(loss_fn(model(x), y))
        torch.testing.assert_close(p.hesscale, expected["2.weight", "hesscale"])
        assert not p.hesscale.requires_grad


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_each_datum_with_a_token_twice(mode: str, double):
    """A token that a bag has k times counts k^2 times in it, as in a dense layer of counts."""
    model, loss_fn = extend(nn.EmbeddingBag(5, 3, mode=mode)), extend(nn.MSELoss(reduction="sum"))
    tokens = torch.tensor([[0, 1, 1, 4], [2, 2, 2, 2]])
    with backpack(HesScale(), HesScale(batch=True)):
        loss_fn(model(tokens), torch.randn(2, 3)).backward()
    counts = F.one_hot(tokens, 5).sum(1).double() / (1 if mode == "sum" else 4)
    expected = 2 * counts.square()[:, :, None].expand(2, 5, 3)
    torch.testing.assert_close(model.weight.hesscale_batch, expected)
    torch.testing.assert_close(model.weight.hesscale, expected.sum(0))


def test_the_graph_is_freed():
    model, x, y = problem("block")
    loss_fn, kept = extend(CE()), []

    def keep(module, args, output):
        kept.append(weakref.ref(output))

    handle = model.norm.register_forward_hook(keep)
    for exts in ((HesScale(),), (HesScale(batch=True),)):
        with backpack(*exts):
            loss_fn(extend(model)(x), y).backward()
        assert kept.pop()() is None
    # also after an error
    with pytest.raises(RuntimeError, match="stop"), backpack(HesScale()):
        loss = loss_fn(model(x), y)
        model.table.weight.register_hook(_stop)
        loss.backward()
    del loss
    assert kept.pop()() is None
    handle.remove()
    model.table.weight._backward_hooks.clear()
    with backpack(HesScale()):
        loss_fn(model(x), y).backward()
    assert model.table.weight.hesscale.shape == (9, 8)


def _stop(grad: Tensor) -> None:
    raise RuntimeError("stop")


class Shared(nn.Module):
    """A position embedding for all data, and two heads behind a trunk without curvature."""

    def __init__(self):
        super().__init__()
        self.table, self.positions = nn.Embedding(9, 4), nn.Embedding(5, 4)
        self.trunk, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at = self.positions(torch.arange(5))[None]
        x = self.trunk(torch.add(self.table(x), at, alpha=-3)).mean(1)
        return self.one(x), self.two(x)


def test_each_datum_of_two_losses(double):
    model, loss_fn, y = extend(Shared()), extend(CE(reduction="sum")), torch.randint(3, (7,))
    x, exts = torch.randint(9, (7, 5)), (HesScale(), HesScale(batch=True))
    names, rows = [ext.savefield for ext in exts], []
    for data in (*zip(x.split(1), y.split(1), strict=True), (x, y)):
        with backpack(*exts):
            sum(loss_fn(z, data[1]) for z in model(data[0])).backward()
        rows.append(fields(model, *names))
    together = rows.pop()
    for (name, field), h in together.items():
        alone = torch.stack([row[name, "hesscale"] for row in rows])
        expected = alone if field == "hesscale_batch" else alone.sum(0)
        torch.testing.assert_close(h, expected)


def test_results_share_no_memory():
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    with backpack(HesScale()):
        extend(nn.MSELoss())(a + b, torch.zeros(3)).backward()
    assert torch.equal(a.hesscale, b.hesscale)
    a.hesscale.zero_()
    assert b.hesscale.all()


def test_extension_hook():
    model, x, y = problem("mlp")
    seen = []
    with backpack(HesScale(), extension_hook=lambda m: seen.append((m, m.weight.hesscale.shape))):
        extend(CE())(extend(model)(x), y).backward()
    assert {m for m, _ in seen} == {model[0], model[2], model[4]}


def test_forgotten_losses():
    model, x, y = problem("mlp")
    with pytest.raises(RecordingError, match=r"needs the loss.*attach_diagonal"), backpack(HesScale()):
        CE()(extend(model)(x), y).backward()

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.trunk(x).tanh()
            return self.one(x), self.two(x)

    heads = extend(Heads())
    with pytest.raises(RecordingError, match="needs the loss"), backpack(HesScale()):
        one, two = heads(x)
        (extend(CE())(one, y) + nn.MSELoss()(two, torch.ones(7, 1))).backward()


def test_wrong_use():
    z = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="on_curved_glue"):
        HesScale(on_curved_glue="ignore")
    with pytest.raises(TypeError, match="register_diagonal_rule"):
        HesScale().set_module_extension(nn.Linear, None)
    with pytest.raises(ValueError, match="outputs of shapes"):
        attach_diagonal(z, torch.ones(2), (z * 2).sum())
    with pytest.raises(ValueError, match="scalar"):
        attach_diagonal(z, torch.ones(3), z * 2)
    with pytest.raises(RecordingError, match="must require a gradient"):
        attach_diagonal(z.detach(), torch.ones(3), (z * 2).sum())
    with pytest.raises(RecordingError, match="attach_loss"), backpack(KFAC()):
        w = nn.Parameter(torch.ones(3)) * 2
        attach_diagonal(w, torch.ones(3), w.sum()).backward()
    with pytest.raises(UnsupportedError, match="CrossEntropyLoss on the logits"), backpack(KFAC()):
        extend(nn.NLLLoss())(
            extend(mlp())(torch.randn(2, 6)).log_softmax(1), torch.tensor([0, 1])
        ).backward()
    with (
        pytest.raises(RecordingError, match="exact_penultimate"),
        backpack(HesScale(exact_penultimate=True)),
    ):
        extend(CE())(mlp()(torch.randn(2, 6)).tanh(), torch.tensor([0, 1])).backward()


def test_checkpoints_with_reentry_raise():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(UnsupportedError, match="use_reentrant=False"), backpack(HesScale()):
        z = checkpoint(layer, x, use_reentrant=True)
        extend(CE())(z, torch.tensor([0, 1])).backward()


@pytest.mark.parametrize("options", [{}, {"cross_terms": True}, {"gauss_newton": True}])
def test_residual_nets_in_linear_time(options: dict, monkeypatch):
    """The number of operations that are looked at and crossed grows by the same for each block."""
    count = [0]
    for cls, name in ((Recursion, "_cross"), (Recursion, "_operation"), (chain.Chain, "cross")):
        method = getattr(cls, name)

        def counted(self, *args, method=method):
            count[0] += 1
            return method(self, *args)

        monkeypatch.setattr(cls, name, counted)

    class Residual(nn.Module):
        def __init__(self, depth: int):
            super().__init__()
            self.blocks = nn.ModuleList(
                Chain(nn.LayerNorm(4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(depth)
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    counts = []
    for depth in (5, 10, 20):
        count[0] = 0
        with backpack(HesScale(**options)):
            extend(CE())(Residual(depth)(torch.randn(3, 4)), torch.tensor([0, 1, 2])).backward()
        counts.append(count[0])
    five, ten, twenty = counts
    assert twenty - ten == 2 * (ten - five)


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.fn, self.last = nn.Linear(6, 6), fn, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fn(self.first(x)))


def diagonals(fn: Callable[[Tensor], Tensor], *exts: HesScale) -> dict:
    """Those of a network with a function in between; the same numbers for each function."""
    torch.manual_seed(0)
    model, x, y = Between(fn), torch.randn(7, 6), torch.randint(3, (7,))
    exts = exts or (HesScale(),)
    with backpack(*exts):
        extend(CE())(extend(model)(x), y).backward()
    return fields(model, *(ext.savefield for ext in exts))


# -- operations that cannot be crossed -------------------------------------------------------------

COMPLEX = {
    "abs of rfft": lambda z: torch.fft.rfft(z).abs().sum(1, keepdim=True) * z,
    "real part of ifft": lambda z: torch.fft.ifft(torch.fft.fft(z)).real,
    "times a complex number": lambda z: (z * (1 + 2j)).abs(),
    "real part": lambda z: (z * torch.tensor(1 + 2j)).real,
    "angle": lambda z: torch.complex(z, z.sin()).angle(),
}


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", COMPLEX)
@pytest.mark.filterwarnings("ignore:HesScale:UserWarning")
def test_complex_numbers_are_refused(name: str, batch: bool):
    with pytest.raises(UnsupportedError, match="complex"):
        diagonals(COMPLEX[name], HesScale(batch=batch))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class OnceCube(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return Cube.backward(ctx, g)


class HiddenCube(Cube):
    """As of a kernel that autograd does not know."""

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return Cube.backward(ctx, g)


class Sign(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class TwoAndThree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx, g, h):
        return 2 * g + 3 * h


def cube(x: Tensor) -> Tensor:
    return x**3


@pytest.mark.filterwarnings("ignore:HesScale:UserWarning")
def test_functions_of_ones_own(double):
    close(diagonals(Cube.apply), diagonals(cube), 1e-12)
    plain = diagonals(lambda z: z.sign().detach() + z - z.detach())
    close(diagonals(Sign.apply), plain, 1e-12)
    for kind in (OnceCube, HiddenCube):
        with pytest.raises(UnsupportedError, match=f"{kind.__name__}Backward.*differentiated twice"):
            diagonals(kind.apply)
        gn = HesScale(gauss_newton=True)
        close(diagonals(kind.apply, gn), diagonals(cube, gn), 1e-12)
    close(diagonals(lambda z: TwoAndThree.apply(z)[1]), diagonals(lambda z: 3 * z), 1e-12)
    both = diagonals(lambda z: torch.cat(TwoAndThree.apply(z), 1)[:, 3:9])
    close(both, diagonals(lambda z: torch.cat((2 * z, 3 * z), 1)[:, 3:9]), 1e-12)


@contextmanager
def rules_restored():
    """Forget afterwards what was registered."""
    before = [(table, dict(table)) for table in (RULES, ACTIVATIONS)]
    try:
        yield
    finally:
        for table, content in before:
            table.clear()
            table.update(content)
        rules_found.clear()


def test_rules_of_ones_own(double):
    def derivatives(node):
        (x,) = node.saved_tensors
        return 3 * x**2, 6 * x

    with rules_restored(), warnings.catch_warnings():
        warnings.simplefilter("error")
        register_activation("OnceCubeBackward", derivatives)
        close(diagonals(OnceCube.apply), diagonals(cube), 1e-12)
        with pytest.raises(ValueError, match="overwrite=True"):
            register_activation("OnceCubeBackward", derivatives)
        with pytest.raises(ValueError, match="overwrite=True"):
            register_diagonal_rule("OnceCubeBackward")(lambda step: step.h)

        @register_diagonal_rule("OnceCubeBackward", curved=False, overwrite=True)
        def linear(step):
            assert step.g is None
            return [9 * step.node.saved_tensors[0] ** 4 * step.h[0]]

        gn = HesScale(gauss_newton=True)
        close(diagonals(OnceCube.apply, gn), diagonals(cube, gn), 1e-12)
    with (
        pytest.raises(UnsupportedError),
        pytest.warns(UserWarning, match="OnceCubeBackward has no rule"),
    ):
        diagonals(OnceCube.apply)


def test_a_rule_may_say_that_nothing_is_left(double):
    """What lies behind it has the curvature that its own gradient brings."""
    with rules_restored():
        register_diagonal_rule("CubeBackward")(lambda step: [None])
        for chain in (True, False):
            x = nn.Parameter(torch.randn(4))
            y = x.tanh()
            z = Cube.apply(y) if chain else torch.cat([Cube.apply(part) for part in y.split(2)])
            with backpack(HesScale()):
                extend(nn.MSELoss(reduction="sum"))(z, torch.zeros(4)).backward()
            y = x.detach().tanh()
            torch.testing.assert_close(x.hesscale, 6 * y**5 * -2 * y * (1 - y**2))


def test_compiled_models():
    """What is compiled is one operation, of which only the backend "eager" shows the parts."""
    model, x, y = problem("mlp")
    for of in (model, extend(deepcopy(model))):
        torch._dynamo.reset()
        with pytest.raises(UnsupportedError, match=r"torch\.compile"), backpack(HesScale()):
            extend(CE())(torch.compile(of, backend="aot_eager")(x), y).backward()
    torch._dynamo.reset()


# -- checkpoints, memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [torch.tanh, torch.atan, lambda z: z * z.sigmoid(), Cube.apply])
@pytest.mark.filterwarnings("ignore:HesScale:UserWarning")
def test_checkpoints(fn: Callable[[Tensor], Tensor], double):
    exts = HesScale(), HesScale(batch=True), HesScale(gauss_newton=True)
    again = diagonals(lambda z: checkpoint(fn, z, use_reentrant=False), *exts)
    close(again, diagonals(fn, *exts), 1e-12)


def test_checkpointed_layers(double):
    model, x, y = problem("block")
    model.scale = nn.Parameter(torch.randn(8))  # outside of layers, each datum reads what is saved

    def scaled(module, args, output):
        twice = 2 * model.scale
        return output * torch.cat([twice[4:], twice[:4]])

    model.norm.register_forward_hook(scaled)
    exts = HesScale(), HesScale(batch=True), BL89()
    names, found = [ext.savefield for ext in exts], []
    for forward in (extend(model), lambda x: checkpoint(model, x, use_reentrant=False)):
        with backpack(*exts):
            extend(CE())(forward(x), y).backward()
        found.append(fields(model, *names))
    close(found[1], found[0], 1e-12)
    for p in model.parameters():
        torch.testing.assert_close(p.hesscale_batch.sum(0), p.hesscale)


def test_checkpointed_product_with_a_constant(double):
    """It saves nothing in place of its input, and the constant by a hook."""
    C = torch.randn(6, 6), torch.randn(6)
    again = diagonals(lambda z: checkpoint(F.linear, z, *C, use_reentrant=False))
    close(again, diagonals(lambda z: F.linear(z, *C)), 1e-12)


@pytest.mark.parametrize("batch", [False, True])
def test_nothing_piles_up(batch: bool):
    """Over many passes with one extension: as many tensors as after the second."""
    model, x, y = problem("block")
    loss_fn, ext, counts = extend(CE()), HesScale(batch=batch), []
    extend(model)
    gc.collect()
    gc.disable()
    try:
        for _ in range(12):
            with backpack(ext):
                loss_fn(model(x), y).backward()
            counts.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert len(set(counts[2:])) == 1


# -- torch's own modules ---------------------------------------------------------------------------

PADDED = torch.arange(5) >= torch.tensor([5, 3, 4, 5])[:, None]
FUTURE = torch.ones(5, 5, dtype=torch.bool).triu(1)


class Reads(nn.Module):
    """Reads the last step of what a module makes of a sequence."""

    def __init__(self, body: nn.Module, how: Callable | None = None):
        super().__init__()
        self.body, self.how, self.head = body, how, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x) if self.how is None else self.how(self.body, x)
        return self.head((z[0] if isinstance(z, tuple) else z)[:, 2])


def attention(**options) -> nn.Module:
    return nn.MultiheadAttention(4, 2, batch_first=True, **options)


def block(kind: type[nn.Module], **options) -> nn.Module:
    return kind(4, 2, 5, 0.0, batch_first=True, **options)


ENCODER, DECODER = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
MASKS = {"src_key_padding_mask": PADDED, "src_mask": FUTURE}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Reads(nn.LSTM(4, 4, 2, batch_first=True)),
    "LSTM, projected": lambda: Reads(nn.LSTM(4, 6, proj_size=4, batch_first=True)),
    "GRU, both ways": lambda: Reads(nn.GRU(4, 2, batch_first=True, bidirectional=True)),
    "RNN": lambda: Reads(nn.RNN(4, 4, nonlinearity="relu", batch_first=True)),
    "encoder": lambda: Reads(block(ENCODER), lambda m, x: m(x, **MASKS)),
    "encoder, norms first": lambda: Reads(block(ENCODER, norm_first=True), lambda m, x: m(x, **MASKS)),
    "decoder": lambda: Reads(
        block(DECODER), lambda m, x: m(x, x.sin(), tgt_mask=FUTURE, memory_key_padding_mask=PADDED)
    ),
    "attention": lambda: Reads(attention(), lambda m, x: m(x, x, x, key_padding_mask=PADDED)),
    "attention, more keys": lambda: Reads(
        attention(add_bias_kv=True, add_zero_attn=True), lambda m, x: m(x, x, x, attn_mask=FUTURE)
    ),
    "attention, sizes": lambda: Reads(
        attention(kdim=3, vdim=2), lambda m, x: m(x, x[..., :3], x[..., :2])
    ),
    "weight norm": lambda: Reads(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch(name: str, double):
    """No operation is unknown; the last layer is exact; results are those of each datum alone."""
    torch.manual_seed(0)
    model, x, y = MODULES[name](), torch.randn(4, 5, 4), torch.tensor([0, 1, 2, 0])
    exts = (HesScale(on_curved_glue="raise"),)
    if name != "weight norm":  # whose weight is no parameter
        exts += (HesScale(batch=True),)
    loss = CE()(model(x), y)
    (g,) = torch.autograd.grad(loss, [model.head.bias], create_graph=True)
    exact = [torch.autograd.grad(g[k], [model.head.bias], retain_graph=True)[0][k] for k in range(3)]
    with warnings.catch_warnings(), backpack(*exts):
        warnings.simplefilter("error", UserWarning)
        extend(CE())(extend(model)(x), y).backward()
    torch.testing.assert_close(model.head.bias.hesscale, torch.stack(exact))
    for p in model.parameters():
        assert p.hesscale.isfinite().all() and p.hesscale.any()
        if len(exts) > 1:
            torch.testing.assert_close(p.hesscale_batch.sum(0), p.hesscale)
