"""What extensions of one pass have in common is computed once: counted products and passes."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backpack_ext import (
    EKFAC,
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    SumGradSquared,
    backpack,
    extend,
    sweep,
)
from backpack_ext import kfac as kfac_module
from benchmarks import columns
from curvature import Kronecker


class Tied(nn.Module):
    """A layer that is called twice, whose inputs are joined when all calls are known."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(30, 30), nn.Linear(30, 20)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).mean(1))


def wide():
    return nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 150)), (40, 300), 150


def small():
    layers = (m for _ in range(4) for m in (nn.Linear(20, 20), nn.Tanh()))
    return nn.Sequential(*layers, nn.Linear(20, 3)), (16, 20), 3


def convolutions():
    conv = nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular")
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 5)), (6, 8, 8, 8), 5


def tied():
    return Tied(), (12, 7, 30), 20


NETS = {"wide": wide, "small": small, "convolutions": convolutions, "tied": tied}


@pytest.fixture(autouse=True)
def counted_by_torch(monkeypatch):
    """Form second moments where torch sees it, whatever does so otherwise."""
    monkeypatch.setattr(kfac_module, "gram", lambda x, scale: scale * (x.mT @ x))


def generator():
    return torch.Generator().manual_seed(5)


def parts(net):
    torch.manual_seed(0)
    model, shape, classes = NETS[net]()
    model, loss_fn = extend(model.double()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(shape, dtype=torch.float64), torch.randint(classes, shape[:1])
    loss_fn(model(x), y).backward()
    with backpack(KFAC(fisher="empirical")):  # layers are checked once
        loss_fn(model(x), y).backward()
    return model, lambda: loss_fn(model(x), y)


def products(closure, *extensions):
    """Return the multiply-adds of a step, beyond those of a plain one."""
    with FlopCounterMode(display=False) as plain:
        closure().backward()
    with FlopCounterMode(display=False) as counted, backpack(*extensions):
        closure().backward()
    return counted.get_total_flops() - plain.get_total_flops()


@pytest.mark.parametrize("options", [{}, {"approx": "reduce"}, {"bias": "joint"}])
@pytest.mark.parametrize("fisher", ["mc", "empirical", "exact"])
@pytest.mark.parametrize("net", NETS)
def test_the_same_factors_twice(net: str, fisher: str, options: dict):
    """No product is formed for the second."""
    if net == "tied" and options.get("bias") == "joint":
        options = {}
    _, closure = parts(net)

    def kfac(name, draws=None):
        return KFAC(fisher=fisher, generator=draws, savefield=name, keep="factor", **options)

    once = products(closure, kfac("one", generator()))
    draws = generator()
    twice = products(closure, kfac("one", draws), kfac("two", draws))
    assert once == twice > 0


@pytest.mark.parametrize("net", NETS)
def test_the_same_inputs_under_other_vectors(net: str):
    """A is formed once for all sweeps: what is left of a second KFAC is its own pass and B."""
    model, closure = parts(net)

    def kfac(fisher):
        return KFAC(fisher=fisher, savefield=fisher, keep="factor")

    fishers = ("mc", "exact", "empirical", "forward")
    alone = {fisher: products(closure, kfac(fisher)) for fisher in fishers}
    together = products(closure, *map(kfac, fishers))
    of_A = alone["forward"]  # B is the identity
    assert of_A > 0
    assert together == sum(alone.values()) - 3 * of_A
    assert model is not None


@pytest.mark.parametrize("net", ["wide", "small", "convolutions"])
def test_eigenbases_of_factors_that_are_there(net: str):
    """EKFAC has the factors of a KFAC with the same vectors; its projections are its own."""
    _, closure = parts(net)
    draws = generator()
    kfac, ekfac = products(closure, KFAC(generator=draws)), products(closure, EKFAC(generator=draws))
    both = products(closure, KFAC(generator=draws), EKFAC(generator=draws))
    assert both == ekfac > kfac


def test_per_sample_vectors_of_several():
    """Formed once for all that need them."""
    _, closure = parts("convolutions")
    one = products(closure, SumGradSquared())
    assert products(closure, SumGradSquared(), BatchGrad(), BatchL2Grad()) == one > 0


def test_one_sweep_for_the_same_vectors():
    model, closure = parts("wide")
    passes = []
    for module in model:
        if isinstance(module, nn.Tanh):
            module.register_full_backward_hook(lambda *args: passes.append(1))
    draws = generator()
    for extensions, count in (
        ((KFAC(generator=draws), DiagGGN("mc", generator=draws), EKFAC(generator=draws)), 2),
        ((KFAC(fisher="empirical"), BatchGrad(), BatchL2Grad()), 1),
        ((KFAC(generator=draws), DiagGGN("mc")), 3),  # samples of their own
        ((KFAC(generator=draws), DiagGGN("mc", mc_samples=1, generator=draws), BatchGrad()), 2),
    ):
        passes.clear()
        with backpack(*extensions):
            closure().backward()
        assert len(passes) == count


@pytest.mark.parametrize("net", NETS)
def test_large_columns_stream_unless_someone_gathers(net: str, monkeypatch: pytest.MonkeyPatch):
    """The factors are the same; chunks are for those who square inputs once per chunk."""
    model, closure = parts(net)
    chunks, chunk = [], sweep._chunk
    monkeypatch.setattr(sweep, "_chunk", lambda *args: (chunks.append(1), chunk(*args))[1])
    found = []
    for small, others in ((2**30, ()), (0, ()), (0, (DiagGGN("exact"),))):
        monkeypatch.setattr(sweep, "SMALL", small)
        chunks.clear()
        with backpack(KFAC(fisher="exact"), KFAC("reduce", "exact", savefield="reduce"), *others):
            closure().backward()
        assert bool(chunks) == (small > 0 or others != ())
        found.append([tuple(b) for p in model.parameters() for b in (p.kfac, p.reduce)])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("net", NETS)
def test_results_are_those_of_each_alone_and_have_memory_of_their_own(net: str):
    def extensions():
        draws = generator()
        return (
            KFAC(generator=draws),
            KFAC(generator=draws, savefield="two"),
            KFAC(fisher="exact", savefield="exact"),
            KFAC("reduce", generator=draws, savefield="reduce"),
            KFAC(bias="joint", fisher="empirical", savefield="joint"),
            KFAC(fisher="empirical", savefield="empirical", dtype=torch.float32),
            KFAC(fisher="empirical", savefield="large", max_dim=10, oversize="diagonal"),
            EKFAC(generator=draws),
        )

    def found(exts):
        with backpack(*exts):
            closure().backward()
        return {e.savefield: [getattr(p, e.savefield) for p in model.parameters()] for e in exts}

    model, closure = parts(net)
    if net == "tied":
        all_extensions, one_each = extensions()[:4], [extensions()[k] for k in (0, 1, 2, 3)]
    else:
        all_extensions, one_each = extensions(), list(extensions())
    together = found(all_extensions)
    alone = {}
    for ext in one_each:
        ext._generator = generator() if ext._generator is not None else None
        alone |= found((ext,))
    tensors = {}
    for field, blocks in together.items():
        for block, other in zip(blocks, alone[field], strict=True):
            if not isinstance(block, Kronecker):
                torch.testing.assert_close(block.values, other.values)
            else:
                torch.testing.assert_close(tuple(block), tuple(other))
                for t in (block.A, block.B):
                    owner = tensors.setdefault(t.untyped_storage().data_ptr(), field)
                    assert owner == field, f"{owner} and {field} share memory"


def test_the_table_of_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(columns, "ROWS", {"KFAC reduce": columns.ROWS["KFAC reduce"]})
    before = sweep.MAX_BYTES, sweep.SMALL, KFAC.gathers
    path = tmp_path / "columns.json"
    columns.main(["--seconds", "0", "--problems", "tiny", "--output", str(path)])
    (found,) = json.loads(path.read_text())["columns"].values()
    assert len(found) == 11 and all(r["ms"] > 0 and r["MB"] > 0 for r in found.values())
    assert "tiny, KFAC reduce" in capsys.readouterr().out
    assert (sweep.MAX_BYTES, sweep.SMALL, KFAC.gathers) == before
