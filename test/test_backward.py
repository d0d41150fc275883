"""The events of a backward pass: scales, several losses, hooks, contexts, odd graphs."""

from copy import deepcopy

import backpack as theirs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
    attach_loss,
    backpack,
    extend,
)
from backpack_ext.rules import LinearRule

pytestmark = pytest.mark.usefixtures("double")


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def data():
    return torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def quantities():
    return (
        KFAC(fisher="exact"),
        KFAC("reduce", fisher="exact", savefield="reduce"),
        KFAC(fisher="empirical", savefield="empirical"),
        BatchGrad(),
        BatchL2Grad(),
        SumGradSquared(),
        Variance(),
        BatchDotGrad(),
        DiagGGN(),
    )


FIELDS = tuple(ext.savefield for ext in quantities())


def collected(model):
    found = {}
    for name, p in model.named_parameters():
        for field in FIELDS:
            value = getattr(p, field)
            if not torch.is_tensor(value):
                value = value.to_dense()
            found[name, field] = value.clone()
    return found


def run(model, loss_fn, x, y, c=1.0, context=backpack):
    extend(model), extend(loss_fn)
    with context(*quantities()):
        (c * loss_fn(model(x), y)).backward()
    return collected(model)


def same(one, other, factors=None):
    for key in one:
        factor = 1.0 if factors is None else factors[key[1]]
        torch.testing.assert_close(factor * one[key], other[key], msg=lambda m, k=key: f"{k}: {m}")


def test_scaled_loss_carries_its_factor(data):
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    c = 0.3
    power = dict.fromkeys(FIELDS, 2) | dict.fromkeys(
        ("kfac", "reduce", "empirical", "diag_ggn_exact", "grad_batch"), 1
    )
    one, other = run(model, loss_fn, *data), run(model, loss_fn, *data, c=c)
    same(one, other, {field: c**p for field, p in power.items()})


def test_grad_scaler_is_divided_out(data):
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    one = run(model, loss_fn, *data)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with backpack(*quantities(), grad_scaler=scaler):
        scaler.scale(loss_fn(model(data[0]), data[1])).backward()
    same(one, collected(model))


def test_accumulated_losses_add_up(data):
    """Two losses in one backward: curvatures add, per-sample gradients are those of the sum."""
    x, y = data
    model, ce, mse = extend(mlp()), extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    target = torch.randn(6, 3)
    with backpack(KFAC(fisher="exact"), DiagGGN(), BatchGrad()):
        out = model(x)
        (ce(out, y) + 2 * mse(out, target)).backward()
    both = {n: (p.kfac, p.diag_ggn_exact, p.grad_batch) for n, p in model.named_parameters()}
    parts = []
    for loss in (lambda out: ce(out, y), lambda out: 2 * mse(out, target)):
        with backpack(KFAC(fisher="exact"), DiagGGN(), BatchGrad()):
            loss(model(x)).backward()
        parts.append({n: (p.kfac, p.diag_ggn_exact, p.grad_batch) for n, p in model.named_parameters()})
    for n in both:
        (K, d, g), (K1, d1, g1), (K2, d2, g2) = both[n], parts[0][n], parts[1][n]
        torch.testing.assert_close(K.B, K1.B + K2.B)
        torch.testing.assert_close(K.A, K1.A)
        torch.testing.assert_close(d, d1 + d2)
        torch.testing.assert_close(g, g1 + g2)


def test_losses_of_different_scale_refuse_empirical(data):
    x, y = data
    model, ce = extend(mlp()), extend(nn.CrossEntropyLoss())
    with pytest.raises(UnsupportedError, match=r"losses of scale"), backpack(KFAC(fisher="empirical")):
        out = model(x)
        (ce(out, y) + 2 * ce(out, y)).backward()


def test_negative_factor_raises(data):
    model, ce = extend(mlp()), extend(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="negative factor"), backpack(KFAC()):
        (-ce(model(data[0]), data[1])).backward()


def test_zero_factor_gives_zero(data):
    model, ce = extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(KFAC(fisher="exact"), KFAC(fisher="empirical", savefield="e")):
        (0 * ce(model(data[0]), data[1])).backward()
    assert model[0].weight.kfac.B.abs().max() == 0 == model[0].weight.e.B.abs().max()


def test_attached_loss_equals_the_module(data):
    x, y = data
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    one = run(model, loss_fn, x, y)
    with backpack(*quantities()):
        out = model(x)
        attach_loss(nn.CrossEntropyLoss(), out, y, F.cross_entropy(out, y)).backward()
    same(one, collected(model))


def test_attached_loss_of_a_model_that_computes_it_inside(data):
    x, y = data

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, y):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, y), "logits": logits}

    model = extend(Inside())
    with backpack(*quantities()):
        out = model(x, y)
        attach_loss(nn.CrossEntropyLoss(), out["logits"], y, out["loss"])
        out["loss"].backward()
    inside = collected(model.net)
    same(run(model.net, nn.CrossEntropyLoss(), x, y), inside)


def test_attached_loss_is_checked(data):
    x, y = data
    out = extend(mlp())(x)
    value = F.cross_entropy(out, y, reduction="sum")
    with pytest.raises(ValueError, match="gives"):
        attach_loss(nn.CrossEntropyLoss(), out, y, value)
    attach_loss(nn.CrossEntropyLoss(), out, y, value, check=False)
    with pytest.raises(RecordingError, match="require a gradient"):
        attach_loss(nn.CrossEntropyLoss(), out.detach(), y, value)


def test_quantities_without_a_loss_module(data):
    """First-order quantities need no loss; the others name what is missing."""
    x, y = data
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    one = run(model, loss_fn, x, y)
    with backpack(BatchGrad(), KFAC(fisher="forward", savefield="forward")):
        F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, one[name, "grad_batch"])
    torch.testing.assert_close(model[0].weight.forward.A, x.T @ x / 6)
    for ext in (KFAC(), DiagGGN("mc"), KFAC(fisher="empirical")):
        with pytest.raises(RecordingError, match=r"needs the loss.*attach_loss"), backpack(ext):
            F.cross_entropy(model(x), y).backward()


def test_uncovered_parameters_without_a_loss_module(data):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return torch.from_numpy(x) * self.weight

    model = extend(Scaled())  # nothing says how many data there are
    with pytest.raises(UnsupportedError, match=r"weight of Scaled"), backpack(BatchGrad()):
        F.cross_entropy(model(data[0].numpy()), data[1]).backward()


def test_forward_outside_of_the_context(data):
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    one = run(model, loss_fn, *data)
    loss = loss_fn(model(data[0]), data[1])
    with backpack(*quantities()):
        loss.backward()
    same(one, collected(model))


def test_backpacks_own_context(data):
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    same(run(model, loss_fn, *data), run(model, loss_fn, *data, context=theirs.backpack))


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("context", [backpack, theirs.backpack])
def test_beside_backpacks_extensions(data, ours_first, context):
    x, y = data
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    for module in (model, loss_fn):
        for extender in (extend, theirs.extend) if ours_first else (theirs.extend, extend):
            extender(module)
    alone = run(model, loss_fn, x, y)
    called = []

    def hook(module):
        called.append(module)
        if isinstance(module, nn.Linear):
            assert module.weight.kfac is not None and module.weight.diag_h is not None
            module.weight.mine = module.weight.kfac.B.trace()

    their = theirs.extensions
    for p in model.parameters():
        for field in FIELDS:
            delattr(p, field)
    with context(
        *quantities(),
        their.DiagHessian(),
        their.KFLR(),
        their.BatchDiagGGNExact(),
        extension_hook=hook,
    ):
        loss_fn(model(x), y).backward()
    same(alone, collected(model))
    assert len(called) == len(set(called)) == 4  # two Linear, Tanh, the loss
    for layer in (model[0], model[2]):
        assert layer.weight.mine > 0
        B, A = layer.weight.kflr
        torch.testing.assert_close(layer.weight.kfac.B, B)
        torch.testing.assert_close(layer.weight.kfac.A, A)
        torch.testing.assert_close(layer.weight.diag_ggn_exact_batch.sum(0), layer.weight.diag_ggn_exact)


def test_model_extended_by_backpack_only(data):
    model, loss_fn = theirs.extend(mlp()), theirs.extend(nn.CrossEntropyLoss())
    with pytest.raises(RecordingError, match=r"backpack_ext\.extend"), theirs.backpack(BatchGrad()):
        loss_fn(model(data[0]), data[1]).backward()


def test_extension_hook_without_backpack(data):
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    called = []
    with backpack(KFAC(), extension_hook=lambda m: called.append((m, hasattr(m.weight, "kfac")))):
        loss_fn(model(data[0]), data[1]).backward()
    assert sorted(called, key=lambda c: c[0] is model[0]) == [(model[2], True), (model[0], True)]


def test_nested_contexts(data):
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad()):
        with backpack(BatchL2Grad()):
            loss_fn(model(data[0]), data[1]).backward()
        assert not hasattr(model[0].weight, "grad_batch")
        loss_fn(model(data[0]), data[1]).backward()
    assert model[0].weight.grad_batch.shape == (6, 5, 4)
    assert model[0].weight.batch_l2.shape == (6,)


def test_empty_context_costs_and_records_nothing(data):
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack():
        loss_fn(model(data[0]), data[1]).backward()
    assert model[0].weight.grad is not None and not hasattr(model[0].weight, "kfac")


def test_warning_when_nothing_was_computed(data):
    model = mlp()
    with pytest.warns(UserWarning, match="nothing was computed"), backpack(BatchGrad()):
        F.cross_entropy(model(data[0]), data[1]).backward()  # not extended


def test_gradients_are_untouched(data):
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    loss_fn(model(data[0]), data[1]).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with backpack(*quantities()):
        loss_fn(model(data[0]), data[1]).backward()
    for p, g in zip(model.parameters(), plain, strict=True):
        assert torch.equal(p.grad, g)


def test_module_called_several_times(data):
    """Calls of one layer share its weight: per-sample gradients are those of the sum."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.lin(torch.tanh(self.lin(x)))))

    model, loss_fn = extend(Twice()), extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = data
    with backpack(BatchGrad(), SumGradSquared(), BatchL2Grad(), BatchDotGrad()):
        loss_fn(model(x), y).backward()
    for p in model.parameters():
        rows = torch.stack(
            [torch.autograd.grad(F.cross_entropy(model(x[n]), y[n]), p)[0] for n in range(6)]
        )
        torch.testing.assert_close(p.grad_batch, rows)
        torch.testing.assert_close(p.sum_grad_squared, rows.square().sum(0))
        torch.testing.assert_close(p.batch_l2, rows.flatten(1).square().sum(1))
        torch.testing.assert_close(p.batch_dot, rows.flatten(1) @ rows.flatten(1).T)


def test_a_stale_graph_does_not_disturb(data):
    """An earlier graph that is still alive makes calls count as shared; results stay the same."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    one = run(model, loss_fn, *data)
    stale = loss_fn(model(data[0]), data[1])
    same(one, run(model, loss_fn, *data))
    del stale


def test_subclass_of_linear(data):
    class Loud(nn.Linear):
        pass

    model, loss_fn = nn.Sequential(Loud(4, 3)), nn.CrossEntropyLoss()
    plain = nn.Sequential(nn.Linear(4, 3))
    plain.load_state_dict(model.state_dict())
    same(run(plain, loss_fn, *data), run(model, loss_fn, *data))


class Own(nn.Module):
    """A layer that derives from none that is known: stored input-first."""

    def __init__(self, i, o):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x):
        return x @ self.kernel + self.shift


class OwnRule(LinearRule):
    weight, bias = "kernel", "shift"

    def weight_axes(self, module):
        from curvature import Axes

        return Axes("i o -> 1 o i")


def test_rule_of_a_single_extension(data):
    x, y = data
    model, loss_fn = extend(nn.Sequential(Own(4, 3))), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad()):  # as a matrix product
        loss_fn(model(x), y).backward()
    without = model[0].kernel.grad_batch
    model.zero_grad()
    grads, kfac = BatchGrad(), KFAC(fisher="exact", unsupported="skip")
    grads.set_module_extension(Own, OwnRule())
    with pytest.raises(ValueError, match="overwrite"):
        grads.set_module_extension(Own, OwnRule())
    with pytest.raises(TypeError, match=r"backpack_ext\.rules\.Rule"):
        kfac.set_module_extension(Own, theirs.extensions.module_extension.ModuleExtension())
    with backpack(grads, kfac):
        loss_fn(model(x), y).backward()
    assert not hasattr(model[0].kernel, "kfac")
    torch.testing.assert_close(model[0].kernel.grad_batch, without)
    torch.testing.assert_close(model[0].shift.grad_batch.sum(0), model[0].shift.grad)


def test_broadcast_positions_whose_length_is_a_multiple_of_the_batch():
    """``pos(arange(T))`` with T = 2 N must not be read as two positions per datum."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok, self.pos, self.head = nn.Embedding(7, 5), nn.Embedding(6, 5), nn.Linear(5, 3)

        def forward(self, ids):
            z = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
            return self.head(torch.tanh(z).mean(1))

    for N, T in ((3, 6), (6, 6), (4, 6), (1, 6)):
        model, loss_fn = extend(Tokens()), extend(nn.CrossEntropyLoss(reduction="sum"))
        ids, y = torch.randint(0, 7, (N, T)), torch.randint(0, 3, (N,))
        with backpack(BatchGrad(), KFAC(fisher="exact"), DiagGGN()):
            loss_fn(model(ids), y).backward()
        for p in model.parameters():
            rows = torch.stack(
                [
                    torch.autograd.grad(F.cross_entropy(model(ids[n : n + 1]), y[n : n + 1]), p)[0]
                    for n in range(N)
                ]
            )
            torch.testing.assert_close(p.grad_batch, rows)


def test_output_shared_by_all_data_behind_something_else():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.scale = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, x):
            return self.lin(x) * self.scale(torch.ones(1, 2))

    model, loss_fn = extend(Shared()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with backpack(BatchGrad()):
        loss_fn(model(x), y).backward()
    for p in model.parameters():
        rows = [
            torch.autograd.grad(loss_fn(model(x[n : n + 1]), y[n : n + 1]) / 6, p)[0] for n in range(6)
        ]
        torch.testing.assert_close(p.grad_batch, torch.stack(rows))


def test_create_graph_and_autograd_grad(data):
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    one = run(model, loss_fn, *data)
    with backpack(*quantities()):
        loss_fn(model(data[0]), data[1]).backward(create_graph=True)
    found = collected(model)
    assert not any(value.requires_grad for value in found.values())
    same(one, found)
    model.zero_grad()
    with backpack(*quantities()):
        torch.autograd.grad(loss_fn(model(data[0]), data[1]), list(model.parameters()))
    same(one, collected(model))


def test_backward_with_selected_inputs(data):
    """First-order quantities come for what is differentiated, sweeps for all of the graph."""
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), KFAC()):
        loss_fn(model(data[0]), data[1]).backward(inputs=list(model[2].parameters()))
    assert model[2].weight.grad_batch.shape == (6, 3, 5)
    assert not hasattr(model[0].weight, "grad_batch")
    assert model[0].weight.kfac.B.shape == (5, 5)


def test_autocast_forward_and_backward():
    """Extraction is not autocast: factors are float32, close to those of a float32 pass."""
    torch.set_default_dtype(torch.float32)
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with backpack(KFAC(fisher="exact"), BatchGrad()):
        loss_fn(model(x), y).backward()
    reference = {n: (p.kfac.to_dense(), p.grad_batch) for n, p in model.named_parameters()}
    for inside in (True, False):
        with backpack(KFAC(fisher="exact"), BatchGrad()):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(model(x), y)
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        for n, p in model.named_parameters():
            assert p.kfac.B.dtype == torch.float32 == p.kfac.A.dtype
            for value, expected in zip((p.kfac.to_dense(), p.grad_batch), reference[n], strict=True):
                assert (value - expected).norm() <= 0.03 * expected.norm() + 1e-4


class Mixed(nn.Module):
    """Layers on tokens, a convolution, a reused layer, a norm, a bare parameter."""

    def __init__(self):
        super().__init__()
        self.inner, self.conv = nn.Linear(4, 4), nn.Conv1d(4, 4, 2)
        self.norm, self.scale, self.head = nn.LayerNorm(4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.inner(x).tanh() + self.inner(0.5 * x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2) * self.scale
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("model", [Mixed, mlp])
def test_autocast_from_the_first_pass_on(model):
    """Inputs in float32 meet vectors in bfloat16, also where layers are checked the first time."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, loss_fn = extend(model()), extend(nn.CrossEntropyLoss())
    plain = extend(deepcopy(model))
    x = torch.randn(6, 5, 4) if isinstance(model, Mixed) else torch.randn(6, 4)
    y = torch.randint(0, 3, (6,))

    def exts():
        first = (BatchGrad, BatchL2Grad, BatchDotGrad, SumGradSquared, Variance, DiagGGN)
        return [ext() for ext in first] + [KFAC(fisher="exact"), EKFAC(fisher="exact", approx="reduce")]

    with backpack(*exts()), torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(model(x), y)
    for one in (loss, loss_fn(plain(x), y)):
        with backpack(*exts()):
            one.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        for field in ("grad_batch", "batch_l2", "batch_dot", "sum_grad_squared", "diag_ggn_exact"):
            error = (getattr(p, field).float() - getattr(q, field)).norm()
            assert error <= 0.05 * getattr(q, field).norm() + 1e-3, field
        for field in ("kfac", "ekfac"):
            value, expected = getattr(p, field).to_dense(), getattr(q, field).to_dense()
            assert (value - expected).norm() <= 0.05 * expected.norm() + 1e-3, field


def test_channels_last_and_half_batches():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3))
    loss_fn, x, y = nn.CrossEntropyLoss(), torch.randn(5, 3, 4, 4), torch.randint(0, 3, (5,))
    one = run(model, loss_fn, x, y)
    same(one, run(model.to(memory_format=torch.channels_last), loss_fn, x, y))


def test_sequence_first_model():
    """batch_axis=1: [T, N, d] inside, rows of the loss ordered [T, N]."""

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.lin(x)))

    model, x, y = Sequence(), torch.randn(6, 2, 4), torch.randint(0, 3, (6, 2))
    flat = nn.CrossEntropyLoss()
    extend(model), extend(flat)

    class Flat(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).flatten(0, 1)

    one = run(Flat(model), flat, x, y.flatten())
    wrapped = Flat(model)
    extend(wrapped, batch_axis=1), extend(flat, batch_axis=1)
    with backpack(*quantities()):
        flat(wrapped(x.transpose(0, 1)), y.T.flatten()).backward()
    same(one, collected(wrapped))


class SequenceInside(nn.Module):
    """Batch-first outside, sequence-first inside."""

    def __init__(self):
        super().__init__()
        self.lin, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        z = torch.tanh(self.lin(x.transpose(0, 1)))
        return self.head(z.mean(0))


@pytest.mark.parametrize("T", [3, 6])
def test_misread_layouts_are_found_where_sizes_hide_them(T):
    """[T, N, d] with T a multiple of N looks like [N, k, d]; numbers would be silently wrong."""
    x, y = torch.randn(3, T, 4), torch.randint(0, 3, (3,))
    loss_fn = extend(nn.CrossEntropyLoss())
    for use_loss in (True, False):
        model = extend(SequenceInside())
        with pytest.raises(UnsupportedError, match=r"batch_axis=\{'lin': AXIS\}"), backpack(BatchGrad()):
            out = model(x)
            (loss_fn(out, y) if use_loss else out.square().sum()).backward()
        extend(model, batch_axis={"lin": 1})
        with backpack(BatchGrad()):
            out = model(x)
            (loss_fn(out, y) if use_loss else out.square().sum()).backward()
        torch.testing.assert_close(model.lin.weight.grad_batch.sum(0), model.lin.weight.grad)


def test_mixed_data_are_found(data):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            z = self.lin(x)
            return self.head(z - z.mean(0))

    model, loss_fn = extend(Mixed()), extend(nn.CrossEntropyLoss())
    with pytest.raises(UnsupportedError, match="mixes data"), backpack(BatchGrad()):
        loss_fn(model(data[0]), data[1]).backward()
    extend(model, check_layers=False)
    with backpack(KFAC()):
        loss_fn(model(data[0]), data[1]).backward()


def test_the_layout_is_checked_once(data, check_passes):
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    for rows in (6, 6, 5):
        with backpack(KFAC()):
            loss_fn(model(data[0][:rows]), data[1][:rows]).backward()
    assert len(check_passes) == 2 * 3 + 1  # N = 6 has three bits


@pytest.mark.parametrize("columns", [1, 3, 7])
def test_columns_in_chunks(columns, monkeypatch):
    """Results do not depend on how many columns travel at once, tied parameters included."""
    from models import CASES

    from backpack_ext import sweep

    for name in ("char_gpt", "functional", "in_place_tokens", "cnn"):
        problem = CASES[name]()
        extend(problem.model), extend(problem.loss_fn)
        found = []
        for limit in (sweep.MAX_BYTES, None):
            if limit is None:
                with torch.no_grad():
                    calls = []
                    hooks = [
                        m.register_forward_hook(lambda m, a, out, c=calls: c.append(out.numel()))
                        for m in problem.model.modules()
                        if list(m.parameters(recurse=False))
                    ]
                    problem.forward()
                    for hook in hooks:
                        hook.remove()
                monkeypatch.setattr(sweep, "MAX_BYTES", 8 * sum(calls) * columns)
            with backpack(DiagGGN(), KFAC(fisher="exact"), KFAC("reduce", "exact", savefield="r")):
                problem.loss().backward()
            found.append(
                {
                    (n, f): v if torch.is_tensor(v) else v.to_dense()
                    for n, p in problem.model.named_parameters()
                    for f in ("diag_ggn_exact", "kfac", "r")
                    for v in [getattr(p, f)]
                }
            )
            monkeypatch.undo()
        same(*found)


@pytest.mark.parametrize("small", [0, 2**18])
def test_columns_vectorised_or_looped(small, monkeypatch, data, recwarn):
    from models import CASES

    from backpack_ext import sweep

    monkeypatch.setattr(sweep, "SMALL", small)
    problem = CASES["vit"]()
    extend(problem.model), extend(problem.loss_fn)
    with backpack(DiagGGN()):
        problem.loss().backward()
    monkeypatch.setattr(sweep, "SMALL", 2**18 - small)
    one = {n: p.diag_ggn_exact for n, p in problem.model.named_parameters()}
    with backpack(DiagGGN()):
        problem.loss().backward()
    for n, p in problem.model.named_parameters():
        torch.testing.assert_close(p.diag_ggn_exact, one[n])
    assert not recwarn.list


def test_custom_function_that_cannot_be_vectorised(data):
    class Numpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(2 * g.numpy())

    class Twice(nn.Module):
        def forward(self, x):
            return Numpy.apply(x)

    layers = mlp()
    model, loss_fn = extend(nn.Sequential(layers[0], Twice(), layers[2])), extend(nn.MSELoss())
    x, y = data[0], torch.randn(6, 3)
    with backpack(DiagGGN()):
        loss_fn(model(x), y).backward()
    J = layers[2].weight.detach() * 2
    expected = (2 / 18) * J.square().sum(0)[:, None] * x.square().sum(0)
    torch.testing.assert_close(layers[0].weight.diag_ggn_exact, expected)


def test_activation_checkpointing(data):
    """Without reentry the recomputed forward changes nothing; with reentry torch refuses sweeps."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.first, self.net, self.reentrant = nn.Linear(4, 4), mlp(), reentrant

        def forward(self, x):
            z = torch.tanh(self.first(x))
            if self.reentrant is None:
                return self.net(z)
            return checkpoint(self.net, z, use_reentrant=self.reentrant)

    plain, lean, old = Checkpointed(None), Checkpointed(False), Checkpointed(True)
    lean.load_state_dict(plain.state_dict())
    same(run(plain, nn.CrossEntropyLoss(), *data), run(lean, nn.CrossEntropyLoss(), *data))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(old, nn.CrossEntropyLoss(), *data)


def test_overflow_under_a_scaler_shows():
    """The scale of the loss is infinite then, and its inverse would be zero."""
    model, loss_fn = extend(nn.Linear(4, 3)).float(), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(2, 4).float(), torch.tensor([0, 2])
    for ext in (KFAC(fisher="empirical"), KFAC(fisher="empirical", bias="joint")):
        with backpack(ext):
            (loss_fn(model(x), y) * float("inf")).backward()
        assert model.weight.kfac.B.isnan().all()
