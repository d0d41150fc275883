"""Hessian diagonals beside other extensions, in low precision, over processes and data sets."""

import weakref
from contextlib import nullcontext
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
)
from backpack_ext.dataset import collect
from backpack_ext.diagonals.recursion import Recursion

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
    from torch.utils.checkpoint import checkpoint

    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(UnsupportedError, match="use_reentrant=False"), backpack(HesScale()):
        z = checkpoint(layer, x, use_reentrant=True)
        extend(CE())(z, torch.tensor([0, 1])).backward()


@pytest.mark.parametrize("options", [{}, {"cross_terms": True}, {"gauss_newton": True}])
def test_residual_nets_in_linear_time(options: dict, monkeypatch):
    """The number of operations that are looked at and crossed grows by the same for each block."""
    count = [0]
    for name in ("_cross", "_operation", "_beyond"):
        method = getattr(Recursion, name)

        def counted(self, *args, method=method):
            count[0] += 1
            return method(self, *args)

        monkeypatch.setattr(Recursion, name, counted)

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
