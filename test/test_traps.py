"""Uses in which a number could come out silently wrong: each is right, or raises."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backpack_ext import (
    KFAC,
    BatchGrad,
    DiagGGN,
    RecordingError,
    Rule,
    UnsupportedError,
    backpack,
    extend,
)
from backpack_ext.check import TRIES
from backpack_ext.dataset import collect
from backpack_ext.rules import LinearRule

pytestmark = pytest.mark.usefixtures("double")


def rows(model, x, target, loss=F.mse_loss):
    """Per-sample gradients of a mean loss, one datum at a time."""
    found = {}
    for n in range(len(x)):
        value = loss(model(x[n : n + 1]), target[n : n + 1]) / len(x)
        grads = torch.autograd.grad(value, list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), grads, strict=True):
            found.setdefault(name, []).append(g)
    return {name: torch.stack(gs) for name, gs in found.items()}


def agrees(model, x, target):
    expected = rows(model, x, target)
    loss_fn = extend(nn.MSELoss())
    with backpack(BatchGrad()):
        loss_fn(model(x), target).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, expected[name])


class Functional(nn.Module):
    """Uses weights outside of their layers, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.emb, self.lin, self.way = nn.Embedding(7, 5), nn.Linear(5, 5), way

    def forward(self, i):
        z = self.lin(self.emb(i)).mean(1)
        if self.way == "tied":
            return F.linear(z, self.emb.weight)
        if self.way == "transposed":
            return z @ self.lin.weight
        return z * self.lin.bias


@pytest.mark.parametrize("way", ["tied", "transposed"])
def test_weight_used_in_its_layer_and_in_a_product_elsewhere(way):
    for _ in range(2):
        agrees(
            extend(Functional(way)),
            torch.randint(0, 7, (3, 4)),
            torch.randn(3, 7 if way == "tied" else 5),
        )


def test_weight_used_in_its_layer_and_elsewhere():
    model, loss_fn = extend(Functional("bias")), extend(nn.MSELoss())
    for ext in (BatchGrad(), KFAC(), KFAC(fisher="empirical")):
        with pytest.raises(UnsupportedError, match="also used outside of recorded calls"), backpack(ext):
            out = model(torch.randint(0, 7, (3, 4)))
            loss_fn(out, torch.zeros_like(out)).backward()


def test_subclass_with_a_forward_of_its_own():
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, 3 * self.weight, self.bias)

    model, loss_fn = extend(nn.Sequential(Scaled(4, 3))), extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match="overridden forward"), backpack(BatchGrad()):
        loss_fn(model(torch.randn(5, 4)), torch.zeros(5, 3)).backward()


def test_wrong_rule_is_found():
    class Own(nn.Linear):
        pass

    class Wrong(LinearRule):
        def cotangents(self, site, g):
            return 2 * super().cotangents(site, g)

    from backpack_ext.rules import RULES, base, register_rule

    register_rule(Own)(Wrong)
    try:
        model, loss_fn = extend(nn.Sequential(Own(4, 3))), extend(nn.MSELoss())
        with pytest.raises(UnsupportedError, match="than its rule says"), backpack(BatchGrad()):
            loss_fn(model(torch.randn(5, 4)), torch.zeros(5, 3)).backward()
    finally:
        del RULES[Own]
        base._lookup.clear()


def test_rule_that_depends_on_the_module():
    """Layers of equal shape share products, but not what their rule reads off the module."""

    class Scaled(nn.Linear):
        def __init__(self, i, o, scale):
            super().__init__(i, o)
            self.scale = scale

        def forward(self, x):
            return self.scale * super().forward(x)

    class ScaledRule(LinearRule):
        def cotangents(self, site, g):
            return site.module.scale * super().cotangents(site, g)

    from backpack_ext.rules import RULES, base, register_rule

    register_rule(Scaled)(ScaledRule)
    try:
        agrees(
            extend(nn.Sequential(Scaled(4, 4, 1.0), nn.Tanh(), Scaled(4, 4, 3.0))),
            torch.randn(5, 4),
            torch.randn(5, 4),
        )
    finally:
        del RULES[Scaled]
        base._lookup.clear()
    assert issubclass(ScaledRule, Rule)


def test_equal_shapes_with_different_batch_axes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x).transpose(0, 1))).transpose(0, 1).mean(1)

    agrees(extend(Net(), batch_axis={"b": 1}), torch.randn(4, 4, 5), torch.randn(4, 5))


@pytest.mark.parametrize("inplace", [True, False])
def test_users_hooks_that_change_the_output(inplace):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].register_forward_hook(lambda m, a, out: out.mul_(2) if inplace else 2 * out)
    agrees(extend(model), torch.randn(6, 4), torch.randn(6, 3))


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h.cumsum(0),
        lambda h: h.flip(0).cumsum(0).flip(0),
        lambda h: h - torch.cat([torch.zeros_like(h[:1]), h[:-1]]),
        lambda h: torch.stack([h[0], h[1], h[3], h[2], h[4], h[5]]),
    ],
)
def test_mixed_data_are_found_for_every_pair(mix):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.o(torch.tanh(mix(self.i(x))))

    model, loss_fn = extend(Mixed()), extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match="rows of another"), backpack(DiagGGN()):
        loss_fn(model(torch.randn(6, 3)), torch.randn(6, 2)).backward()


def test_selected_rows_whose_number_is_a_multiple_of_the_batch():
    model, loss_fn = extend(nn.Linear(3, 4)), extend(nn.CrossEntropyLoss())
    x, mask = torch.randn(4, 2, 3), torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0]]).bool()
    with pytest.raises(UnsupportedError, match="rows are in another order"), backpack(DiagGGN()):
        loss_fn(model(x)[mask], torch.tensor([0, 1, 2, 3])).backward()


def test_batches_of_different_size_in_one_pass():
    model, loss_fn = extend(nn.Linear(3, 2)), extend(nn.MSELoss())
    for ext in (BatchGrad(), KFAC(), DiagGGN()):
        with pytest.raises(RecordingError, match="disagree about the batch size"), backpack(ext):
            one = loss_fn(model(torch.randn(4, 3)), torch.zeros(4, 2))
            (one + loss_fn(model(torch.randn(8, 3)), torch.zeros(8, 2))).backward()


def test_joint_bias_of_a_tied_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model, loss_fn = extend(Tied()), extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match='Use bias="separate"'), backpack(KFAC(bias="joint")):
        loss_fn(model(torch.randn(4, 3)), torch.zeros(4, 3)).backward()
    agrees(model, torch.randn(4, 3), torch.randn(4, 3))


def test_sequences_of_length_one():
    model, loss_fn = extend(nn.Linear(3, 4), batch_axis=1), nn.MSELoss()
    extend(loss_fn, batch_axis=1)
    x = torch.randn(1, 3, 3)
    with backpack(BatchGrad()):
        loss_fn(model(x).flatten(0, 1), torch.zeros(3, 4)).backward()
    torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad)
    assert model.weight.grad_batch.shape == (3, 4, 3)


def test_another_model_after_an_interrupt():
    class Interrupt(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    broken, single = extend(nn.Sequential(nn.Linear(3, 2), Interrupt())), extend(nn.Linear(3, 2))
    with pytest.raises(KeyboardInterrupt):
        broken(torch.randn(4, 3))
    agrees(single, torch.randn(8, 3), torch.randn(8, 2))
    broken[1] = nn.Identity()
    agrees(broken, torch.randn(8, 3), torch.randn(8, 2))


def test_a_data_set_with_a_factor_and_with_two_losses():
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    model = nn.Linear(3, 2)
    cuts = [(x[:5], y[:5]), (x[5:], y[5:])]
    for reduction in ("sum", "mean"):
        loss_fn = nn.MSELoss(reduction=reduction)

        def half(model, loss_fn, batch):
            return 0.5 * loss_fn(model(batch[0]), batch[1])

        found = collect(model, loss_fn, cuts, DiagGGN(), BatchGrad(), forward=half, progress=False)
        with backpack(DiagGGN(), BatchGrad()):
            half(extend(model), extend(loss_fn), (x, y)).backward()
        for field in ("diag_ggn_exact", "grad_batch"):
            torch.testing.assert_close(found[field]["weight"], getattr(model.weight, field))

    def two(model, loss_fn, batch):
        out = model(batch[0])
        return loss_fn(out, batch[1]) + 2 * loss_fn(out, batch[1])

    with pytest.raises(UnsupportedError, match="losses of scale"):
        collect(model, nn.MSELoss(), cuts, DiagGGN(), forward=two, progress=False)


@pytest.mark.parametrize("axis", [None, "1", -1])
def test_batch_axis_that_is_no_axis(axis):
    with pytest.raises(ValueError, match="expected axes"):
        extend(nn.Linear(2, 2), batch_axis=axis)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_that_cancel_pass_the_check(dtype):
    """A key's bias in attention has gradient zero up to rounding."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            weights = (self.q(x) @ self.k(x).mT).softmax(-1)
            return self.o(weights @ self.v(x)).mean(1)

    model, loss_fn = extend(Attention().to(dtype)), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), KFAC()):
        loss_fn(model(torch.randn(6, 5, 8, dtype=dtype)), torch.randint(0, 8, (6,))).backward()
    assert model.k.bias.grad_batch.shape == (6, 8)


def test_check_in_low_precision_still_finds_a_wrong_rule():
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, 3 * self.weight, self.bias)

    model, loss_fn = extend(nn.Sequential(Scaled(4, 3)).bfloat16()), extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match="overridden forward"), backpack(BatchGrad()):
        loss_fn(model(torch.randn(5, 4).bfloat16()), torch.zeros(5, 3).bfloat16()).backward()


def test_dead_layers_are_not_checked_for_ever(check_passes):
    model, loss_fn = extend(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), extend(nn.MSELoss())
    nn.init.zeros_(model[1].weight)  # nothing arrives at the first layer
    for _ in range(5):
        with backpack(KFAC()):
            loss_fn(model(torch.randn(4, 3)), torch.randn(4, 2)).backward()
    assert len(check_passes) == TRIES * 5


@pytest.mark.parametrize("ext", [BatchGrad(), KFAC(fisher="exact", savefield="grad_batch")])
def test_parameter_without_a_rule_inside_of_a_checkpoint(ext):
    """A checkpoint hands out what it recomputed once per pass; here it is wanted twice."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.p, self.checkpoint = nn.Linear(3, 3), nn.Parameter(torch.randn(3)), True

        def inner(self, x):
            return torch.tanh(self.lin(x) * self.p.exp()) * self.p

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if self.checkpoint else self.inner(x)

    model, loss_fn = extend(nn.Sequential(nn.Linear(3, 3), Scaled(), nn.Linear(3, 2))), nn.MSELoss()
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    found = []
    for model[1].checkpoint in (True, False):
        model.zero_grad()
        with backpack(ext):
            extend(loss_fn)(model(x), y).backward()
        result = model[1].p.grad_batch
        found.append(result if isinstance(result, torch.Tensor) else result.to_dense())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_each_datum_that_cancel_pass_the_check(dtype):
    """What scales the input of a norm has gradient zero up to rounding, for each datum."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.tensor(1.3))

        def forward(self, x):
            return x * self.p

    model = nn.Sequential(nn.Linear(3, 4), Scaled(), nn.RMSNorm(4, eps=0.0), nn.Linear(4, 2)).to(dtype)
    model, loss_fn = extend(model), extend(nn.MSELoss())
    for x in torch.randn(5, 6, 5, 3, dtype=dtype):
        with backpack(BatchGrad()):
            loss_fn(model(x), torch.zeros(6, 5, 2, dtype=dtype)).backward()
        bound = 1e3 * torch.finfo(dtype).eps * model[2].weight.grad_batch.abs().max()
        assert model[1].p.grad_batch.abs().max() < bound


def test_check_still_finds_a_scale_in_front_of_a_norm_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)

        def forward(self, x):
            return self.norm(self.linear(x) * self.norm.weight)

    model, loss_fn = extend(nn.Sequential(Twice(), nn.Linear(3, 2))), extend(nn.MSELoss())
    with pytest.raises(UnsupportedError, match="also used outside of recorded"), backpack(BatchGrad()):
        loss_fn(model(torch.randn(6, 3)), torch.zeros(6, 2)).backward()
