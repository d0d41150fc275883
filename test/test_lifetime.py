"""What stays alive when: Sites, inputs, graphs, after every way a pass can end."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from backpack_ext import KFAC, BatchGrad, BatchL2Grad, backpack, engine, extend, unextend
from backpack_ext import site as site_module


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


class Boom(nn.Module):
    def forward(self, x):
        raise RuntimeError("boom")


class BoomBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("boom")


class FailLate(nn.Module):
    def forward(self, x):
        return BoomBackward.apply(x)


@pytest.fixture
def sites(monkeypatch):
    """Weak references to all Sites made in a test."""
    made = []
    original = site_module.Site.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(site_module.Site, "__init__", spy)
    return made


def alive(sites):
    """Count without the garbage collector's help: nothing may hang in a cycle."""
    return sum(ref() is not None for ref in sites)


def holding(sites):
    return sum(ref() is not None and ref().x is not None for ref in sites)


@pytest.fixture(autouse=True)
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("context", [None, (), "kfac"])
def test_nothing_alive_after_backward(sites, context):
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    if context is None:
        loss = loss_fn(model(x), y)
        assert holding(sites) == 2
        loss.backward()
    elif context == ():
        with backpack():
            loss = loss_fn(model(x), y)
            loss.backward()
        assert not sites
    else:
        with backpack(KFAC(), KFAC(fisher="empirical", savefield="e"), BatchGrad()):
            loss = loss_fn(model(x), y)
            loss.backward()
    # the loss is still alive, hence the graph's nodes; but no inputs
    assert holding(sites) == 0
    del loss
    assert alive(sites) == 0
    assert not site_module._calls


def test_nothing_alive_after_forward_without_backward(sites):
    model = extend(network())
    out = model(torch.randn(6, 4))
    assert alive(sites) == 2
    del out
    assert alive(sites) == 0
    assert not site_module._calls


def test_nothing_recorded_without_need(sites):
    import backpack as theirs

    model = extend(network())
    x = torch.randn(6, 4)
    with torch.no_grad():
        model(x)
    with backpack():
        model(x)
    with theirs.disable():
        model(x)
    for p in model.parameters():
        p.requires_grad_(False)
    model(x.clone().requires_grad_())  # frozen layers hold nothing
    assert not sites


def test_exception_in_forward(sites):
    model = extend(nn.Sequential(network(), Boom()))
    with pytest.raises(RuntimeError, match="boom"), backpack(KFAC()):
        model(torch.randn(6, 4))
    assert alive(sites) == 0
    # the next forward starts clean, with its own batch size
    model[1] = nn.Identity()
    loss_fn = extend(nn.CrossEntropyLoss())
    with backpack(BatchL2Grad()):
        loss_fn(model(torch.randn(3, 4)), torch.tensor([0, 1, 2])).backward()
    assert model[0][0].weight.batch_l2.shape == (3,)


def test_exception_in_backward(sites):
    lower, upper = nn.Linear(4, 5), nn.Linear(5, 3)
    model, loss_fn = extend(nn.Sequential(lower, FailLate(), upper)), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    for ext in (KFAC(), KFAC(fisher="empirical")):
        with pytest.raises(RuntimeError, match="boom"), backpack(ext):
            loss_fn(model(x), y).backward()
        assert alive(sites) == 0
    model[1] = nn.Identity()
    with backpack(KFAC()):
        loss_fn(model(x), y).backward()
    assert alive(sites) == 0 and lower.weight.kfac.B.shape == (5, 5)


def test_exception_in_an_extension(sites):
    class Broken(BatchL2Grad):
        def of_weight(self, a, b):
            raise ArithmeticError("broken")

    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with pytest.raises(ArithmeticError), backpack(Broken()):
        loss_fn(model(x), y).backward()
    assert alive(sites) == 0


def test_retained_graph_keeps_its_sites(sites):
    model, loss_fn = extend(network().double()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    loss = loss_fn(model(x), y)
    results = []
    for retain in (True, True, False):
        with backpack(KFAC(fisher="exact"), BatchGrad()):
            loss.backward(retain_graph=retain)
        weight = model[0].weight
        results.append((*weight.kfac, weight.grad_batch))
        assert holding(sites) == (2 if retain else 0)
    for later in results[1:]:
        for one, other in zip(results[0], later, strict=True):
            torch.testing.assert_close(one, other)
    del loss
    assert alive(sites) == 0


def test_copies_and_pickles():
    model = extend(network())
    out = model(torch.randn(6, 4))
    loss_fn = extend(nn.CrossEntropyLoss())
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    out.sum().backward()
    for clone in (twin, again):
        with backpack(KFAC(fisher="empirical")):
            loss_fn(clone(torch.randn(6, 4)), torch.randint(0, 3, (6,))).backward()
        assert clone[0].weight.kfac.A.shape == (4, 4)
        assert not hasattr(model[0].weight, "kfac")
        unextend(clone)
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in clone.modules())
    assert model[0]._forward_hooks  # untouched by its clones


def test_nothing_is_written_onto_modules():
    model = network()
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    extend(model)
    loss_fn = extend(nn.CrossEntropyLoss())
    with backpack(KFAC(), BatchGrad()):
        loss_fn(model(torch.randn(6, 4)), torch.randint(0, 3, (6,))).backward()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before


def test_extend_is_idempotent_and_undoable():
    model = network()
    extend(extend(model))
    assert len(model[0]._forward_hooks) == 1
    unextend(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    extend(model[0])
    extend(model)
    assert len(model[0]._forward_hooks) <= 2
    unextend(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Interrupt(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


def test_interrupted_forward():
    """Torch runs no hooks after an interrupt; the next pass has its own batch size all the same."""
    model, loss_fn = extend(nn.Sequential(network(), Interrupt())), extend(nn.CrossEntropyLoss())
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(2, 4))
    other = extend(network())
    model[1] = nn.Identity()
    for net, weight in (
        (other, other[0].weight),
        (model, model[0][0].weight),
        (model[0], model[0][0].weight),
    ):
        with backpack(BatchL2Grad()):
            loss_fn(net(torch.randn(6, 4)), torch.randint(0, 3, (6,))).backward()
        assert weight.batch_l2.shape == (6,)


def test_old_results_make_room_for_new_ones():
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    seen = []

    class Looking(BatchGrad):
        def of_weight(self, a, b):
            seen.append(sum(hasattr(p, "grad_batch") for p in (model[0].weight, model[2].weight)))
            return super().of_weight(a, b)

    for _ in range(2):
        with backpack(Looking()):
            loss_fn(model(x), y).backward()
    assert seen[2:] == [1, 0] or seen[2:] == [0, 0]  # the second pass: old ones gone one by one
    held = model[0].weight.grad_batch
    with backpack(BatchGrad()):
        loss_fn(model(x), y).backward()
    assert held is not model[0].weight.grad_batch  # what a user holds stays
    assert held.shape == (6, 5, 4)


@pytest.mark.parametrize("how", ["parts called on their own", "several outputs"])
def test_a_plain_backward_visits_each_node_once(how: str, monkeypatch: pytest.MonkeyPatch):
    """However many outputs it meets; it used to walk from each of them: quadratic in depth."""
    visits, new_sites = [], engine.new_sites

    def counted(start, seen):
        before = len(seen)
        yield from new_sites(start, seen)
        visits.append(len(seen) - before)

    monkeypatch.setattr(engine, "new_sites", counted)

    def nodes(depth: int) -> int:
        class Parts(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(depth))

            def forward(self, x):
                outputs = []
                for part in self.parts:
                    x = part(x)
                    outputs.append(x.sin())
                return outputs

        model, x, visits[:] = extend(Parts()), torch.randn(4, 3), []
        if how == "several outputs":
            sum(z.sum() for z in model(x)).backward()
        else:
            for part in model.parts:
                x = part(x)
            x.sum().backward()
        assert len(visits) == depth and not engine._plain_passes
        return sum(visits)

    assert nodes(20) - nodes(10) == nodes(30) - nodes(20)
