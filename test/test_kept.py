"""What a forward pass leaves alive: no more than torch itself keeps, byte by byte."""

import copy
import json
import weakref

import backpack as theirs
import pytest
import torch
from backpack.extensions import BatchGrad as TheirBatchGrad
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from backpack_ext import (
    EKFAC,
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    HesScale,
    LowRankGGN,
    RecordingError,
    SumGradSquared,
    backpack,
    extend,
    sweep,
)
from backpack_ext import site as site_module
from benchmarks import kept
from benchmarks.memory import kept_memory


def around(part, x):
    return checkpoint(part, x, use_reentrant=False, preserve_rng_state=False)


class Net(nn.Module):
    """Convolutions and linear layers with shared positions, norms of both kinds, an embedding."""

    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Embedding(11, 6)
        self.body = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.ReLU(inplace=True), nn.Linear(7, 6)),
                nn.Sequential(nn.Conv1d(9, 5, 3, padding=1), nn.Tanh(), nn.Conv1d(5, 9, 1, bias=False)),
            ]
        )
        self.norm, self.head = nn.BatchNorm1d(9), nn.Linear(6, 4)

    def forward(self, x):
        x = self.embed(x)
        for part in self.body:
            x = around(part, x) if self.checkpointed else part(x)
        return self.head(self.norm(x).mean(1))


TRAINED = {
    "everything": lambda name: True,
    "head": lambda name: name.startswith("head"),
    "biases": lambda name: name.endswith("bias"),
    "norms": lambda name: "norm" in name or name.startswith("body.0.1"),
    "all but the middle": lambda name: not name.startswith("body.1"),
    "the middle": lambda name: name.startswith("body.0.0"),
    "nothing": lambda name: False,
}

WAYS = {
    "outside": None,
    "nothing active": lambda: (),
    "KFAC": lambda: (KFAC(), KFAC("reduce", fisher="empirical", savefield="reduce")),
    "per datum": lambda: (BatchGrad(), LowRankGGN()),
    "diagonal": lambda: (HesScale(),),
}


def make(trained: str = "everything", training: bool = False, checkpointed: bool = False):
    torch.manual_seed(0)
    model = Net(checkpointed).train(training)
    for name, p in model.named_parameters():
        p.requires_grad_(TRAINED[trained](name))
    return model, nn.CrossEntropyLoss(), torch.randint(11, (8, 9)), torch.randint(4, (8,))


def after_forward(parts, way=None, hooked=True, autocast=False):
    """Return the bytes that are alive after a forward pass, and the loss."""
    model, loss_fn, x, y = parts
    if hooked:
        extend(model), extend(loss_fn)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, autocast):
            return loss_fn(model(x), y)

    if way is None:
        return kept_memory(forward, "cpu")
    with backpack(*way()) as context:
        forward()  # what stands for inputs that nobody reads is made once
        found = kept_memory(forward, "cpu")
        context.computed = True  # the block's warning is not what is tested
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trained", TRAINED)
def test_no_more_than_torch_keeps(trained: str, training: bool):
    parts = make(trained, training)
    plain = after_forward(parts, hooked=False)
    for way in ["outside"] if training else WAYS:
        assert after_forward(parts, WAYS[way]) == plain > 0, way
    if trained == "head":
        assert plain < after_forward(make(), hooked=False) / 5


@pytest.mark.parametrize("kind", ["checkpoint", "autocast", "checkpoint, autocast"])
def test_no_more_in_a_checkpoint_and_under_autocast(kind: str):
    parts, amp = make(checkpointed="checkpoint" in kind), "autocast" in kind
    plain = after_forward(parts, hooked=False, autocast=amp)
    for way in WAYS:
        assert after_forward(parts, WAYS[way], autocast=amp) == plain > 0, way
    if kind == "checkpoint":
        assert plain < 0.8 * after_forward(make(), hooked=False)


@pytest.mark.parametrize("way", ["outside", "KFAC"])
def test_inputs_of_linear_layers_whose_bias_alone_is_trained(way: str):
    """Torch drops them, also where it has just made them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(5)))
    for k in range(5):
        model[k].weight.requires_grad_(False)
    parts = model, nn.CrossEntropyLoss(), torch.randn(8, 30), torch.randint(30, (8,))
    plain = after_forward(parts, hooked=False)
    assert after_forward(parts, WAYS[way]) == plain
    assert plain < 3 * 8 * 30 * 4


def alive_after(model, x, part):
    """Return what the model gives, and whether the input of a part of it is alive then."""
    seen = []
    handle = part.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    out = model(x)
    handle.remove()
    storage = seen[0]
    return out, storage() is not None


def test_frozen_layers_hold_nothing_also_where_no_backward_comes():
    model, _, x, _ = make("head")
    extend(model)
    out, alive = alive_after(model, x, model.body[0][3])
    assert not alive and out.requires_grad
    # nor do frozen layers behind a trained one, whose outputs require a gradient
    model, _, x, _ = make("the middle")
    out, alive = alive_after(extend(model), x, model.head)
    assert not alive and out.requires_grad
    del out
    # nor anything without a graph
    model, _, x, _ = make()
    with torch.no_grad():
        _, alive = alive_after(extend(model), x, model.body[0][0])
    assert not alive


EXTENSIONS = {
    "none": None,
    "KFAC": lambda: (KFAC(), KFAC("reduce", savefield="reduce")),
    "exact": lambda: (KFAC(fisher="exact"), DiagGGN("exact"), BatchL2Grad()),
    "empirical": lambda: (KFAC(fisher="empirical"), SumGradSquared(), EKFAC()),
}


@pytest.mark.parametrize("ending", ["backward", "no backward", "retained"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("which", EXTENSIONS)
def test_no_leak(which: str, checkpointed: bool, ending: str):
    model, loss_fn, x, y = make(checkpointed=checkpointed)
    extend(model), extend(loss_fn)

    def step():
        with backpack(*EXTENSIONS[which]()) if EXTENSIONS[which] else backpack() as context:
            loss = loss_fn(model(x), y)
            if ending == "retained":
                loss.backward(retain_graph=True)
            if ending != "no backward":
                loss.backward()
            context.computed = True

    def steps(count):
        for _ in range(count):
            step()

    steps(2)
    # what replaces older gradients and results stays
    assert kept_memory(lambda: steps(4), "cpu") == kept_memory(lambda: steps(1), "cpu")
    assert not site_module._calls


def results(model, extensions):
    found = []
    for p in model.parameters():
        found.append(p.grad.clone())
        for ext in extensions:
            result = getattr(p, ext.savefield)
            found.append(result.to_dense() if hasattr(result, "to_dense") else result.clone())
            delattr(p, ext.savefield)
        p.grad = None
    return found


def seeded():
    return torch.Generator().manual_seed(3)


MIXES = {
    "mc": lambda: (KFAC(generator=seeded()), KFAC("reduce", generator=seeded(), savefield="r")),
    "mc, empirical": lambda: (KFAC(generator=seeded()), BatchGrad(), SumGradSquared()),
    "exact": lambda: (KFAC(fisher="exact"), DiagGGN("exact")),
    "exact alone": lambda: (KFAC(fisher="exact"),),
    "exact, empirical": lambda: (KFAC(fisher="exact"), KFAC(fisher="empirical", savefield="e")),
    "EKFAC": lambda: (EKFAC(generator=seeded()), BatchL2Grad()),
    "per datum": lambda: (HesScale(batch=True),),
}


@pytest.mark.parametrize("small", [sweep.SMALL, 0])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_checkpoints_bring_the_same(mix, inside, retain, early_stop, small, double, monkeypatch):
    if small == 0 and "exact" not in mix:
        pytest.skip("no columns that could be vectorised")
    monkeypatch.setattr(sweep, "SMALL", small)
    found = []
    for checkpointed in (False, True):
        model, loss_fn, x, y = make(checkpointed=checkpointed)
        extend(model.double()), extend(loss_fn)
        extensions = MIXES[mix]()
        with set_checkpoint_early_stop(early_stop):
            loss = None if inside else loss_fn(model(x), y)
            with backpack(*extensions):
                loss = loss_fn(model(x), y) if inside else loss
                for again in range(1 + retain):
                    model.zero_grad()
                    loss.backward(retain_graph=retain and not again)
        found.append(results(model, extensions))
    torch.testing.assert_close(*found)


def test_a_checkpoint_computes_no_more_often(double):
    """Once for each pass that crosses it: inputs come with what autograd asks for."""
    model, loss_fn, x, y = make(checkpointed=True)
    extend(model), extend(loss_fn)
    calls = []
    model.body[0][0].register_forward_hook(lambda *args: calls.append(1))
    for extensions, passes in (
        ((), 1),
        ((KFAC(),), 2),
        ((KFAC(fisher="empirical"), BatchGrad()), 1),
        ((KFAC(), DiagGGN("mc"), BatchGrad()), 3),
    ):
        for _ in range(2):  # the first time layers are checked
            calls.clear()
            with backpack(*extensions):
                loss_fn(model(x), y).backward()
        assert len(calls) == 1 + passes


@pytest.mark.parametrize(
    "forward", [None, backpack, theirs.disable, lambda: theirs.backpack(TheirBatchGrad())]
)
@pytest.mark.parametrize(
    "backward", [None, backpack, lambda: backpack(KFAC("reduce")), lambda: backpack(BatchL2Grad())]
)
def test_checkpoints_across_contexts(forward, backward, double):
    """A checkpoint saves as many tensors when it computes again, whoever asks then."""
    model, loss_fn, x, y = make(checkpointed=True)
    loss_fn(model(x), y).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    extend(model), extend(loss_fn)
    with forward() if forward is not None else torch.enable_grad():
        loss = loss_fn(model(x), y)
    try:
        with backward() if backward is not None else torch.enable_grad():
            loss.backward()
    except RecordingError as error:  # nothing was recorded
        assert forward is not None and "record" in str(error)
        return
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_checkpoints_within_checkpoints(double):
    class Nested(nn.Module):
        def __init__(self, around):
            super().__init__()
            self.around = around
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 4)

        def inner(self, x):
            return self.around(self.two, self.one(x).tanh())

        def forward(self, x):
            return self.around(self.inner, self.inner(x))

    found = []
    for around in (
        lambda f, x: f(x),
        lambda f, x: checkpoint(f, x, use_reentrant=False),
    ):
        torch.manual_seed(1)
        model, loss_fn = extend(Nested(around)), extend(nn.MSELoss())
        extensions = KFAC(fisher="empirical"), KFAC(fisher="exact", savefield="x"), BatchGrad()
        with backpack(*extensions):
            loss_fn(model(torch.randn(5, 4)), torch.zeros(5, 4)).backward()
        found.append(results(model, extensions))
    torch.testing.assert_close(*found)


def test_offloaded_inputs_come_back(double):
    found = []
    for offload in (False, True):
        model, loss_fn, x, y = make()
        extend(model), extend(loss_fn)
        extensions = MIXES["mc, empirical"]()
        with backpack(*extensions):
            if offload:
                with torch.autograd.graph.save_on_cpu():
                    loss = loss_fn(model(x), y)
            else:
                loss = loss_fn(model(x), y)
            loss.backward()
        found.append(results(model, extensions))
    torch.testing.assert_close(*found)


def test_an_input_that_is_not_kept_is_not_read():
    class Reading(BatchGrad):
        def absorb(self, store, unit):
            assert unit.a is not None

    model, loss_fn = nn.Linear(3, 2), extend(nn.MSELoss())
    model.weight.requires_grad_(False)
    with pytest.raises(RecordingError, match="only the bias is trained"), backpack(Reading()):
        loss_fn(extend(model)(torch.randn(4, 3)), torch.zeros(4, 2)).backward()


def test_a_bias_alone_has_all_quantities(double):
    """Also from its second pass on, over a graph that holds nothing that torch would miss."""
    extensions = (
        KFAC(fisher="exact"),
        EKFAC(fisher="exact"),
        KFAC(fisher="forward", savefield="f"),
        BatchGrad(),
        BatchL2Grad(),
        SumGradSquared(),
        DiagGGN("exact"),
        HesScale(batch=True),
    )
    found = []
    for frozen in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 2))
        loss_fn = extend(nn.CrossEntropyLoss())
        x, y = torch.randn(5, 3), torch.randint(2, (5,))
        for k in (0, 2, 3):
            model[k].weight.requires_grad_(not frozen)
        extend(model)
        for _ in range(2):
            model.zero_grad()
            with backpack(*extensions):
                loss_fn(model(x), y).backward()
        for k in (0, 2, 3):
            p = model[k].bias
            for ext in extensions:
                result = getattr(p, ext.savefield)
                found.append(result.to_dense() if hasattr(result, "to_dense") else result)
    half = len(found) // 2
    torch.testing.assert_close(found[:half], found[half:])


def test_logits_of_the_cross_entropy_are_those_of_the_loss(double):
    """Autograd's logarithms of the softmax serve, however the loss came about."""
    for options, shape in (
        ({}, (6, 4)),
        ({"label_smoothing": 0.2, "weight": torch.tensor([1.0, 2, 3, 4])}, (6, 4)),
        ({"reduction": "sum"}, (6, 4, 3)),
        ({"ignore_index": 2}, (6, 4, 3, 2)),
        ({}, (6, 4, 2, 1, 3)),
    ):
        loss_fn = extend(nn.CrossEntropyLoss(**options))
        torch.manual_seed(0)
        layer = extend(
            nn.Sequential(nn.Linear(3, torch.Size(shape[1:]).numel()), nn.Unflatten(1, shape[1:]))
        )
        x, y = torch.randn(6, 3), torch.randint(4, (shape[0], *shape[2:]))
        z = layer(x)
        with backpack(KFAC(fisher="exact")):
            loss_fn(z, y).backward()
        exact = layer[0].bias.kfac.B
        plain = nn.CrossEntropyLoss(**options)

        def total(bias, layer=layer, x=x, y=y, plain=plain, shape=shape):
            return plain((x @ layer[0].weight.T + bias).reshape(shape), y)

        hessian = torch.autograd.functional.hessian(total, layer[0].bias.detach())
        torch.testing.assert_close(exact, hessian)


def test_the_table_of_what_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kept, "CASES", {name: kept.CASES[name] for name in ("everything", "head")})
    kept.main(["--quick", "--output", str(tmp_path / "kept.json")])
    found = json.loads((tmp_path / "kept.json").read_text())["bytes"]
    for row in found.values():
        assert row["plain torch"] == row["ours"] == row["ours, in a block"] < row["BackPACK"]
    assert found["head"]["ours"] < found["everything"]["ours"] / 5
    assert capsys.readouterr().out.count("\n") == 6


class Turned(nn.Module):
    """Layers that read transposed inputs, behind a square layer whose own input has the same size."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)).mean(1)


def test_transposed_inputs(double):
    """A product reads a copy of them, which is all that autograd keeps: the copy serves."""
    torch.manual_seed(0)
    model, loss_fn = Turned(), nn.CrossEntropyLoss()
    parts = model, loss_fn, torch.randn(5, 6, 6), torch.randint(4, (5,))
    plain = after_forward(parts, hooked=False)
    assert after_forward(parts) == plain
    _, _, x, y = parts
    with backpack(BatchGrad()):
        loss_fn(model(x), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
    one = copy.deepcopy(model)
    for n in range(5):
        loss = loss_fn(one(x[n : n + 1]), y[n : n + 1]) / 5
        grads = torch.autograd.grad(loss, list(one.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad_batch[n], g)
