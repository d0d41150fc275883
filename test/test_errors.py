"""Wrong use gets a message that says what was expected, what came, and what to do."""

import pytest
import torch
from backpack.context import CTX
from torch import nn
from torch.nn import functional as F

from backpack_ext import (
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    HesScale,
    RecordingError,
    UnsupportedError,
    backpack,
    extend,
)
from backpack_ext.dataset import collect
from backpack_ext.rules import register_rule
from curvature import Kronecker


def parts(loss=None):
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    return model, extend(loss or nn.CrossEntropyLoss()), torch.randn(6, 4), torch.randint(0, 3, (6,))


def works(model):
    """The model is usable after an error."""
    loss_fn = extend(nn.CrossEntropyLoss())
    out = model(torch.randn(6, 4))
    with backpack(KFAC(), BatchGrad()):
        loss_fn(out, torch.randint(0, 3, (6,))).backward()
    return all(hasattr(p, "kfac") for p in model.parameters())


def test_class_instead_of_instance():
    with pytest.raises(TypeError, match="Instantiate it first"):
        extend(nn.Linear)
    with pytest.raises(ValueError, match="Instantiate it"):
        backpack(KFAC)
    with pytest.raises(ValueError, match="instances of BackpropExtension"):
        backpack("kfac")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KFAC("expnad"), r"approx='expnad'; expected one of \('expand', 'reduce'\)"),
        (lambda: KFAC(fisher="type2"), "fisher='type2'"),
        (lambda: KFAC(bias="both"), "bias='both'"),
        (lambda: KFAC(oversize="drop"), "oversize='drop'"),
        (lambda: KFAC(mc_samples=0), "expected a positive integer"),
        (lambda: DiagGGN("empirical"), "expected one of"),
        (lambda: DiagGGN(mc_samples=1.5), "expected a positive integer"),
        (lambda: BatchGrad(unsupported="ignore"), "expected one of"),
        (lambda: KFAC(savefield="expand"), "would hide an attribute"),
        (lambda: backpack(KFAC(), KFAC("reduce")), "Give one of them another `savefield`"),
        (lambda: extend(nn.Linear(2, 2), batch_axis={"nowhere": 1}), "no such modules"),
        (lambda: extend(nn.MSELoss(), batch_axis=2), "0 or 1"),
        (lambda: register_rule(nn.Linear)(nn.Linear), "subclass of Rule"),
    ],
)
def test_unknown_options(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("ext", [KFAC(), KFAC(fisher="empirical"), DiagGGN()])
def test_loss_not_extended(ext):
    model, _, x, y = parts()
    with pytest.raises(RecordingError, match="Extend the loss module"), backpack(ext):
        F.cross_entropy(model(x), y).backward()
    assert works(model)


def test_reduction_none():
    model, loss_fn, x, y = parts(nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"reduction"), backpack(KFAC()):
        loss_fn(model(x), y).mean().backward()
    assert works(model)


def test_non_scalar_backward():
    model, loss_fn, x, y = parts(nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="scalar total"), backpack(BatchGrad()):
        loss_fn(model(x), y).backward(torch.ones(6))
    assert works(model)


@pytest.mark.parametrize("ext", [BatchGrad(), BatchL2Grad(), DiagGGN(), KFAC(fisher="exact")])
def test_training_mode_batch_norm(ext):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
    extend(model)
    loss_fn, x, y = extend(nn.CrossEntropyLoss()), torch.randn(6, 4), torch.randint(0, 3, (6,))
    with pytest.raises(UnsupportedError, match=r"couples the data.*eval\(\)"), backpack(ext):
        loss_fn(model(x), y).backward()
    with backpack(KFAC(), KFAC(fisher="empirical", savefield="e")):  # defined
        loss_fn(model(x), y).backward()
    model.eval()
    with backpack(ext):
        loss_fn(model(x), y).backward()


def test_uncovered_parameters_are_named():
    """A model without any layer, called without a tensor: nothing says how many data there are."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.slope, self.unused = nn.Parameter(torch.ones(3)), nn.PReLU(), nn.PReLU(9)

        def forward(self, x):
            return self.slope(torch.from_numpy(x) * self.token)

    model, loss_fn = extend(Net()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 3).numpy(), torch.randint(0, 3, (6,))
    with pytest.raises(UnsupportedError) as error, backpack(KFAC()):
        loss_fn(model(x), y).backward()
    for part in ("token of Net", "slope.weight of PReLU", "register_rule"):
        assert part in str(error.value)
    assert "unused" not in str(error.value)
    warns = pytest.warns(UserWarning, match=r"slope\.weight of PReLU")
    with warns, backpack(KFAC(unsupported="warn")):
        loss_fn(model(x), y).backward()
    with backpack(KFAC(unsupported="skip")):
        loss_fn(model(x), y).backward()
    assert not hasattr(model.token, "kfac")


def test_empty_batch():
    model, loss_fn, _, _ = parts(nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="empty"), backpack(KFAC()):
        loss_fn(model(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long)).backward()
    assert works(model)


def test_graph_differentiated_twice():
    model, loss_fn, x, y = parts()
    loss = loss_fn(model(x), y)
    loss.backward()
    with pytest.raises(RuntimeError), backpack(KFAC()):
        loss.backward()
    assert works(model)


def test_input_modified_in_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            z = self.emb(x)
            x.mul_(2)  # the input requires no gradient; with a frozen weight torch does not notice
            return self.head(z)

    model, loss_fn = extend(Net()), extend(nn.CrossEntropyLoss())
    with pytest.raises(RuntimeError, match="modified"), backpack(KFAC(fisher="exact")):
        loss_fn(model(torch.randn(6, 4)), torch.randint(0, 3, (6,))).backward()


def test_logits_modified_in_place():
    model, loss_fn, x, y = parts()
    with pytest.raises(RuntimeError, match="modified in place"), backpack(KFAC(fisher="exact")):
        out = model(x)
        loss = extend(nn.MSELoss())(out, torch.zeros_like(out))
        with torch.no_grad():
            out.mul_(2)
        loss.backward()
    # of the cross-entropy, autograd's own logarithms of the softmax are read, as its gradient does
    found = []
    for factor in (1, 2):
        with backpack(KFAC(fisher="exact")):
            out = model(x)
            loss = loss_fn(out, y)
            with torch.no_grad():
                out.mul_(factor)
            loss.backward()
        found.append(next(model.parameters()).kfac.B)
    torch.testing.assert_close(*found)


def test_site_without_its_cotangent():
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(Drop.apply(self.lin(x)) + x)

    for ext in (KFAC(), KFAC(fisher="exact"), BatchGrad()):
        model, loss_fn = extend(Net()), extend(nn.CrossEntropyLoss())
        with pytest.raises(RuntimeError, match=r"No vector arrived at the output of lin"), backpack(ext):
            loss_fn(model(torch.randn(6, 4)), torch.randint(0, 3, (6,))).backward()


def test_parts_extended_instead_of_the_whole():
    a, b = extend(nn.Linear(4, 5)), extend(nn.Linear(5, 3))
    loss_fn = extend(nn.CrossEntropyLoss())
    with pytest.raises(RecordingError, match="disagree about the batch size"), backpack(KFAC()):
        z = a(torch.randn(3, 2, 4))
        loss_fn(b(z.flatten(0, 1)), torch.randint(0, 3, (6,))).backward()


def test_rows_that_are_no_multiple_of_the_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).transpose(0, 1))

    model, loss_fn = extend(Net()), extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match=r"batch_axis=\{'b': AXIS\}"), backpack(BatchGrad()):
        out = model(torch.randn(3, 2, 4))
        loss_fn(out.transpose(0, 1), torch.zeros(3, 2, 3)).backward()


def test_unbatched_input():
    model, loss_fn = extend(nn.Linear(4, 3)), extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match="no batch axis"), backpack(BatchGrad()):
        loss_fn(model(torch.randn(4)), torch.zeros(3)).backward()


def test_too_many_columns_and_too_large_factors():
    model, loss_fn, x, y = parts()
    with (
        pytest.raises(ValueError, match=r'Use fisher="mc"'),
        backpack(KFAC(fisher="exact", max_columns=1)),
    ):
        loss_fn(model(x), y).backward()
    with pytest.raises(ValueError, match=r'Use fisher="mc"'), backpack(DiagGGN(max_columns=1)):
        loss_fn(model(x), y).backward()
    with pytest.raises(UnsupportedError, match=r'oversize="diagonal"'), backpack(KFAC(max_dim=4)):
        loss_fn(model(x), y).backward()
    kfac = KFAC(fisher="exact")
    small = KFAC(fisher="exact", max_dim=4, oversize="diagonal", savefield="small")
    with backpack(kfac, small):
        loss_fn(model(x), y).backward()
    for p in (model[0].weight, model[2].weight):
        for dense, thin in zip(p.kfac, p.small, strict=True):
            torch.testing.assert_close(thin, dense.diagonal() if len(dense) > 4 else dense)


def test_generator_on_another_device():
    model, loss_fn, x, y = parts()
    kfac = KFAC()
    kfac._generator = type("G", (), {"device": torch.device("cuda")})()
    with pytest.raises(ValueError, match="generator lives on cuda"), backpack(kfac):
        loss_fn(model(x), y).backward()


def test_dataset_errors():
    model, loss_fn, x, y = parts()
    with pytest.raises(ValueError, match="empty"):
        collect(model, loss_fn, [], KFAC(), progress=False)
    with pytest.raises(ValueError, match="savefield"):
        collect(model, loss_fn, [(x, y)], KFAC(), KFAC(), progress=False)
    with pytest.raises(ValueError, match="subsampling"):
        collect(model, loss_fn, [(x, y)], BatchGrad([0]), progress=False)
    with pytest.raises(ValueError, match="subsampling"), backpack(BatchGrad([6])):
        loss_fn(model(x), y).backward()


def test_scale_grad_by_freq():
    model = extend(nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True)))
    loss_fn = extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match="scale_grad_by_freq"), backpack(BatchGrad()):
        loss_fn(model(torch.tensor([0, 1, 1])), torch.zeros(3, 3)).backward()


class Sliced(nn.Linear):
    """Returns a view of a part of what it computed."""

    def forward(self, x):
        return super().forward(x)[..., :-1]


@pytest.mark.parametrize("inplace", [True, False])
def test_output_that_is_a_view_of_a_part(inplace):
    model = extend(nn.Sequential(Sliced(4, 6), nn.ReLU(inplace=inplace), nn.Linear(5, 3)))
    loss_fn, x, y = extend(nn.CrossEntropyLoss()), torch.randn(6, 4), torch.randint(0, 3, (6,))
    with backpack(BatchGrad(), KFAC(fisher="exact")):
        loss_fn(model(x), y).backward()
    for p in model.parameters():
        rows = [
            torch.autograd.grad(loss_fn(model(x[n : n + 1]), y[n : n + 1]) / 6, p)[0] for n in range(6)
        ]
        torch.testing.assert_close(p.grad_batch, torch.stack(rows))
    assert isinstance(model[0].weight.kfac, Kronecker)  # as a matrix product


@pytest.mark.parametrize("ext", [DiagGGN, HesScale])
def test_layer_that_no_loss_is_behind(ext):
    """The gradient at its output is handed to it from another graph."""
    model, loss_fn, x, y = parts()
    with backpack(ext()):
        h = model[0](x)
        cut = h.detach().requires_grad_()
        loss_fn(model[1:](cut), y).backward()
        with pytest.raises(RecordingError, match="without passing an extended loss"):
            h.backward(cut.grad)


def test_a_block_within_itself():
    """What was active before it must be active again behind it."""
    model, loss_fn, x, y = parts()
    block = backpack(BatchGrad())
    with block, pytest.raises(RecordingError, match="open already"), block:
        pass
    assert backpack.current is None and not CTX.active_exts
    with block:  # one after the other
        loss_fn(model(x), y).backward()
    torch.testing.assert_close(model[0].weight.grad_batch.sum(0), model[0].weight.grad)


def test_an_extension_given_twice_counts_once():
    model, loss_fn, x, y = parts()
    one, twice = KFAC(fisher="exact"), KFAC(fisher="exact", savefield="twice")
    with backpack(twice, one, twice):
        loss_fn(model(x), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.twice.to_dense(), p.kfac.to_dense())
