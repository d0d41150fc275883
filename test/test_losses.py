"""Loss Hessians: roots and reduction scales against the Hessian of the loss module itself."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from backpack_ext import (
    KFAC,
    BatchGrad,
    DiagGGN,
    RecordingError,
    UnsupportedError,
    attach_loss,
    backpack,
    extend,
)
from backpack_ext.loss_call import LossCall

N, T, C = 3, 2, 4
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


def positive(*shape: int) -> Tensor:
    return 0.3 + torch.rand(shape)


def classes(*shape: int, ignored: int | None = None) -> Tensor:
    """Class indices, about a third of them ignored if `ignored` is given, never all."""
    y = torch.randint(C, shape)
    if ignored is not None:
        y.flatten()[1::3] = ignored
    return y


def distribution(*shape: int) -> Tensor:
    return torch.randn(shape).softmax(1)


def case(make_loss: Callable, z: tuple[int, ...], make_target: Callable, batch_axis: int = 0) -> tuple:
    return make_loss, z, make_target, batch_axis


CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
# loss(reduction), shape of the logits, target(): N data each
LOSSES = {
    "ce": case(CE, (N, C), lambda: classes(N)),
    "ce pixels": case(CE, (N, C, 2, 3), lambda: classes(N, 2, 3)),
    "ce ignore": case(CE, (N, C), lambda: classes(N, ignored=-100)),
    "ce ignore a class": case(partial(CE, ignore_index=2), (N, C, T), lambda: classes(N, T, ignored=2)),
    "ce weight": case(lambda **k: CE(positive(C), **k), (N, C), lambda: classes(N)),
    "ce smoothing": case(partial(CE, label_smoothing=0.3), (N, C), lambda: classes(N)),
    "ce weight smoothing": case(
        lambda **k: CE(positive(C), label_smoothing=0.3, **k), (N, C), lambda: classes(N)
    ),
    "ce everything": case(
        lambda **k: CE(positive(C), label_smoothing=0.3, ignore_index=1, **k),
        (N, C, 2, 2),
        lambda: classes(N, 2, 2, ignored=1),
    ),
    "ce probabilities": case(CE, (N, C), lambda: distribution(N, C)),
    "ce probabilities pixels": case(CE, (N, C, 2, 2), lambda: distribution(N, C, 2, 2)),
    "ce no distribution": case(CE, (N, C), lambda: positive(N, C)),
    "ce probabilities weight": case(
        lambda **k: CE(positive(C), **k), (N, C, T), lambda: distribution(N, C, T)
    ),
    "ce probabilities everything": case(
        lambda **k: CE(positive(C), label_smoothing=0.3, **k), (N, C, T), lambda: distribution(N, C, T)
    ),
    "ce rows": case(CE, (N * T, C), lambda: classes(N * T)),
    "ce rows everything": case(
        lambda **k: CE(positive(C), label_smoothing=0.3, ignore_index=1, **k),
        (N * T, C),
        lambda: classes(N * T, ignored=1),
    ),
    "ce rows probabilities": case(
        lambda **k: CE(positive(C), **k), (N * T, C), lambda: distribution(N * T, C)
    ),
    "ce rows with pixels": case(CE, (N * T, C, 2), lambda: classes(N * T, 2, ignored=-100)),
    "ce sequence-first rows": case(
        lambda **k: CE(positive(C), **k), (T * N, C), lambda: classes(T * N, ignored=-100), 1
    ),
    "mse": case(MSE, (N, C), lambda: torch.randn(N, C)),
    "mse one-dimensional": case(MSE, (N,), lambda: torch.randn(N)),
    "mse tokens": case(MSE, (N, T, C), lambda: torch.randn(N, T, C)),
    "mse rows": case(MSE, (N * T, C), lambda: torch.randn(N * T, C)),
    "mse sequence-first rows": case(MSE, (T * N, C), lambda: torch.randn(T * N, C), 1),
    "bce": case(BCE, (N, C), lambda: torch.rand(N, C)),
    "bce weight": case(lambda **k: BCE(positive(C), **k), (N, C), lambda: torch.rand(N, C)),
    "bce weight per datum": case(lambda **k: BCE(positive(N, 1), **k), (N, C), lambda: torch.rand(N, C)),
    "bce pos_weight": case(
        lambda **k: BCE(pos_weight=positive(C), **k), (N, C), lambda: torch.rand(N, C)
    ),
    "bce everything": case(
        lambda **k: BCE(positive(2, 1), pos_weight=positive(C, 1, 3), **k),
        (N, C, 2, 3),
        lambda: torch.rand(N, C, 2, 3),
    ),
    "bce rows": case(
        lambda **k: BCE(positive(C), pos_weight=positive(C), **k),
        (N * T, C),
        lambda: torch.rand(N * T, C),
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def build(name: str, reduction: str) -> tuple[nn.Module, Tensor, Tensor, int]:
    """Return loss module, logits, target and batch axis, in float64."""
    make_loss, shape, make_target, batch_axis = LOSSES[name]
    torch.manual_seed(0)
    loss_fn, z, y = make_loss(reduction=reduction).double(), torch.randn(shape).double(), make_target()
    return loss_fn, z.requires_grad_(), y.double() if y.is_floating_point() else y, batch_axis


def by_datum(t: Tensor, shape: torch.Size, batch_axis: int) -> Tensor:
    """Reorder the last `len(shape)` axes of `t` to `[..., N, entries]`."""
    lead = t.shape[: t.dim() - len(shape)]
    t = t.reshape(*lead, shape[0] // N, N, -1) if batch_axis else t.reshape(*lead, N, -1)
    return t.movedim(-2, len(lead)).flatten(len(lead) + 1)


def hessian(loss_fn: nn.Module, z: Tensor, y: Tensor, batch_axis: int = 0) -> Tensor:
    """The Hessian of the loss by autograd, `[N, entries, N, entries]`."""
    H = torch.autograd.functional.hessian(lambda z: loss_fn(z, y), z.detach())
    H = by_datum(H, z.shape, batch_axis).movedim((-2, -1), (0, 1))
    return by_datum(H, z.shape, batch_axis).movedim((0, 1), (2, 3))


@every_reduction
@every_loss
def test_columns_are_a_root_of_the_hessian(name: str, reduction: str):
    loss_fn, z, y, batch_axis = build(name, reduction)
    call = LossCall(loss_fn, z, y, batch_axis)
    call.check()
    S = call.exact(N, 0, call.columns(N)) * call.scale() ** 0.5
    assert S.shape == (call.columns(N), *z.shape)
    # a cross-entropy's Hessian has rank C - 1 per position
    classes = z.shape[1] if isinstance(loss_fn, nn.CrossEntropyLoss) else None
    outputs = z.numel() // N
    assert call.columns(N) == (outputs if classes is None else outputs // classes * (classes - 1))
    S = by_datum(S, z.shape, batch_axis)
    H = hessian(loss_fn, z, y, batch_axis)
    for n in range(N):
        torch.testing.assert_close(S[:, n].T @ S[:, n], H[n, :, n], rtol=1e-10, atol=1e-14)
        others = [m for m in range(N) if m != n]
        assert not H[n][:, others].any()
    assert H.abs().max() > 1e-3


@every_reduction
@every_loss
def test_columns_may_be_cut(name: str, reduction: str):
    """The root comes in chunks: those of any cut are slices of the whole."""
    loss_fn, z, y, batch_axis = build(name, reduction)
    call = LossCall(loss_fn, z, y, batch_axis)
    count = call.columns(N)
    whole = call.exact(N, 0, count)
    for cut in (0, 1, count // 2, count):
        parts = [call.exact(N, 0, cut), call.exact(N, cut, count)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


@every_loss
def test_scale_is_the_ratio_of_mean_and_sum(name: str):
    mean, total = (build(name, reduction) for reduction in ("mean", "sum"))
    values = [loss_fn(z, y) for loss_fn, z, y, _ in (mean, total)]
    scales = [LossCall(*problem).scale() for problem in (mean, total)]
    assert scales[1] == 1
    assert scales[0] == pytest.approx((values[0] / values[1]).item(), rel=1e-12)


@every_reduction
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mse one-dimensional"])
def test_curvature_of_the_whole_loss(name: str, reduction: str):
    """Through an extended loss, behind a layer whose bias `[o]` is added at all positions `[s]`."""
    loss_fn, z, y, batch_axis = build(name, reduction)
    H = hessian(loss_fn, z, y, batch_axis)
    o = z.shape[-1]
    layer = extend(nn.Linear(o, o).double(), batch_axis=batch_axis)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(o))
        layer.bias.zero_()
    x = z.detach().reshape(-1, N, o) if batch_axis else z.detach().reshape(N, -1, o)
    extend(loss_fn, batch_axis=batch_axis)
    with backpack(DiagGGN(), KFAC("expand", "exact", savefield="rows"), KFAC("reduce", "exact")):
        loss_fn(layer(x).reshape(z.shape), y).backward()
    H = torch.stack([H[n, :, n] for n in range(N)]).unflatten(2, (-1, o)).unflatten(1, (-1, o))
    reduced, expanded = torch.einsum("nsotp->op", H), torch.einsum("nsosp->op", H)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-14)
    close(layer.bias.diag_ggn_exact, reduced.diagonal())
    close(layer.bias.kfac.to_dense(), reduced)
    close(layer.bias.rows.to_dense(), expanded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_roots(dtype: torch.dtype):
    """Probabilities are taken in float32, the columns come in the logits' own type."""
    loss_fn, z, y, _ = build("ce", "mean")
    call = LossCall(loss_fn.to(dtype), z.detach().to(dtype).requires_grad_(), y)
    S = call.exact(N, 0, C - 1)
    assert S.dtype == dtype and call.sample(torch.Generator()).dtype == dtype
    exact = LossCall(loss_fn.double(), z, y).exact(N, 0, C - 1)
    torch.testing.assert_close(S.double(), exact, rtol=0, atol=2e-2)


# -- errors ----------------------------------------------------------------------------------------


def weight_of(index: int, value: float) -> Tensor:
    """Weights of C classes, all 1 but one."""
    return torch.ones(C).index_fill(0, torch.tensor(index), value)


def check(loss_fn: nn.Module, z: Tensor, y: Tensor) -> None:
    """Ask for exact curvature of a loss behind one layer; start backward() with ones."""
    layer = extend(nn.Linear(z.shape[-1], z.shape[-1]))
    out = layer(z[None]).squeeze(0) if z.dim() == 1 else layer(z)
    with backpack(KFAC(fisher="exact")):
        value = extend(loss_fn)(out, y)
        value.backward(torch.ones_like(value))


@pytest.mark.parametrize(
    "loss_fn, z, y, error, message",
    [
        (CE(reduction="none"), (1, C), torch.tensor([0]), ValueError, "reduction='none'"),
        (CE(reduction="none"), (N, C), torch.tensor([0, 1, 2]), ValueError, "scalar"),
        (MSE(reduction="none"), (N, C), torch.zeros(N, C), ValueError, "scalar"),
        (CE(), (C,), torch.tensor(0), UnsupportedError, "unbatched"),
        (CE(), (N, C), torch.full((N,), -100), ValueError, "all ignored"),
        (CE(weight_of(2, 0.0)), (N, C), torch.full((N,), 2), ValueError, "weight zero"),
        (CE(weight_of(1, -1.0)), (N, C), torch.tensor([0, 1, 2]), ValueError, "negative class weights"),
        (CE(weight_of(1, -1.0)), (N, C), torch.full((N, C), 0.25), ValueError, "negative class weights"),
        (BCE(weight_of(1, -1.0)), (N, C), torch.ones(N, C), ValueError, "negative weight"),
        (
            BCE(pos_weight=weight_of(1, -1.0)),
            (N, C),
            torch.ones(N, C),
            ValueError,
            "negative pos_weight",
        ),
        (MSE(), (N, C), torch.zeros(N, C).requires_grad_(), UnsupportedError, "Detach the target"),
        (nn.L1Loss(), (N, C), torch.zeros(N, C), UnsupportedError, "attach_loss"),
        (nn.L1Loss(reduction="sum"), (N, C), torch.zeros(N, C), UnsupportedError, "L1Loss"),
    ],
)
def test_errors(loss_fn: nn.Module, z: tuple[int, ...], y: Tensor, error: type, message: str):
    with pytest.raises(error, match=re.escape(message)):
        check(loss_fn, torch.randn(z), y)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("z, y", [((N, C), (1, C)), ((N, C), (C,)), ((N, 1), (N,)), ((N, 1), (N, C))])
def test_broadcast_targets(z: tuple[int, ...], y: tuple[int, ...]):
    with pytest.raises(UnsupportedError, match="Broadcast the target yourself"):
        check(MSE(), torch.randn(z), torch.randn(y))


def test_rows_that_belong_to_no_datum():
    layer, loss_fn = extend(nn.Linear(2, C)), extend(CE())
    out = layer(torch.randn(N, 2))
    with pytest.raises(UnsupportedError, match="multiple"), backpack(DiagGGN()):
        loss_fn(out[:2], torch.zeros(2, dtype=torch.long)).backward()


def test_logits_overwritten_after_the_loss():
    layer, loss_fn = extend(nn.Linear(2, 3)), extend(MSE())
    y = torch.zeros(N, 3)
    with pytest.raises(RecordingError, match="modified in place"), backpack(DiagGGN()):
        loss = loss_fn(layer(torch.randn(N, 2)), y)
        y += 1
        loss.backward()


@pytest.mark.parametrize("loss_fn", [nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(reduction="sum")])
def test_first_order_needs_no_rule_for_the_loss(loss_fn: nn.Module):
    torch.manual_seed(0)
    layer, x = extend(nn.Linear(2, 3)), torch.randn(N, 2)
    with backpack(BatchGrad()):
        extend(loss_fn)(layer(x), torch.zeros(N, 3)).backward()
    torch.testing.assert_close(layer.weight.grad_batch.sum(0), layer.weight.grad)
    torch.testing.assert_close(layer.bias.grad_batch.sum(0), layer.bias.grad)
    assert layer.weight.grad_batch.shape == (N, 3, 2) and layer.weight.grad.any()


def test_attach_loss_gives_a_rule_to_a_loss_without_one():
    """The Hessian is that of the loss module that it is tied to."""
    torch.manual_seed(0)
    layer, x = extend(nn.Linear(2, 3)), torch.randn(N, 2)
    out = layer(x)
    loss = nn.HuberLoss(delta=1e6, reduction="sum")(out, torch.zeros(N, 3))
    with backpack(DiagGGN()):
        attach_loss(MSE(reduction="sum"), out, torch.zeros(N, 3), loss, check=False).backward()
    expected = 2 * x.square().sum(0).expand(3, -1)
    torch.testing.assert_close(layer.weight.diag_ggn_exact, expected)
