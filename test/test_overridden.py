"""Subclasses with a forward of their own are seen through, however they are called first."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backpack_ext import (
    KFAC,
    BatchGrad,
    DiagGGN,
    HesScale,
    RecordingError,
    SumGradSquared,
    UnsupportedError,
    backpack,
    extend,
)
from backpack_ext.rules.affine import ConvRule
from curvature import DenseBlock


class Doubled(nn.Linear):
    def forward(self, x):
        return F.linear(2 * x, self.weight, self.bias)


class Normalised(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)


class Shifted(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(0.5 * x + 1, self.weight, self.bias)


class Dropped(nn.Linear):
    def forward(self, x):
        return F.linear(F.dropout(x, 0.5, self.training), self.weight, self.bias)


def refused(model: nn.Module, x: torch.Tensor, **autocast) -> bool:
    """Whether a pass raises, as it must."""
    loss_fn = extend(nn.CrossEntropyLoss())
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        z = model(x).flatten(1)
    try:
        with backpack(BatchGrad()):
            loss_fn(z.float(), torch.zeros(len(x), dtype=torch.long)).backward()
    except UnsupportedError:
        return True
    return False


@pytest.mark.parametrize("first", ["autocast", "plain", "not contiguous"])
@pytest.mark.parametrize("cls", [Doubled, Normalised, Shifted])
def test_input_that_is_changed_before_the_product(cls: type[nn.Module], first: str):
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 3) if cls is Shifted else torch.randn(6, 3, 4)
    model = extend(nn.Sequential(cls(4, 3, 3) if cls is Shifted else cls(4, 3)))
    calls = {
        "autocast": lambda: refused(model, x, enabled=True),
        "plain": lambda: refused(model, x, enabled=False),
        "not contiguous": lambda: refused(model, x.mT.contiguous().mT, enabled=False),
    }
    assert calls.pop(first)()
    assert all(call() for call in calls.values())


def test_forward_that_depends_on_the_mode():
    torch.manual_seed(0)
    model, x = extend(nn.Sequential(Dropped(4, 3))), torch.randn(6, 4)
    assert not refused(model.eval(), x, enabled=False)  # it is a linear layer then
    assert refused(model.train(), x, enabled=False)


class Tempered(nn.CrossEntropyLoss):
    def forward(self, z, y):
        return super().forward(z / 2, y)


@pytest.mark.parametrize("make", [lambda: KFAC(fisher="exact"), DiagGGN, lambda: KFAC(fisher="mc")])
def test_loss_with_a_forward_of_its_own(make):
    model, loss_fn = extend(nn.Linear(4, 3)), extend(Tempered())
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(UnsupportedError, match=r"Tempered has no rule.*same forward"), backpack(make()):
        loss_fn(model(x), y).backward()


def test_hessian_diagonal_of_a_loss_with_a_forward_of_its_own():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 3).double(), extend(Tempered())
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    H = torch.func.hessian(lambda b: F.cross_entropy((x @ model.weight.detach().T + b) / 2, y))(
        model.bias.detach()
    )
    try:
        with backpack(HesScale(savefield="h")):
            loss_fn(model(x), y).backward()
    except (UnsupportedError, RecordingError):
        return
    assert torch.allclose(model.bias.h, H.diagonal())


class Same(nn.Conv2d):
    """Pads by itself, as ports of networks from TensorFlow do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 2, 1, 2)), self.weight, self.bias, self.stride)


@pytest.mark.parametrize("check", [True, False])
def test_convolution_that_pads_by_itself(check: bool):
    torch.manual_seed(0)
    model, loss_fn = extend(Same(2, 3, 4).double(), check_layers=check), extend(nn.MSELoss())
    x = torch.randn(5, 2, 6, 6).double()
    with backpack(KFAC("expand", "empirical"), KFAC("reduce", "empirical", savefield="reduce")):
        z = model(x)
        loss_fn(z, torch.zeros_like(z)).backward()
    assert isinstance(model.weight.kfac, DenseBlock) and isinstance(model.weight.reduce, DenseBlock)


@pytest.mark.parametrize("padding", [(2, 2), 2, (0, 1), "valid"])
def test_attributes_that_changed_since_the_module_was_made(padding):
    """As the surgery of backbones for segmentation does."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    conv.padding, conv.dilation = padding, (2, 2)
    x, loss_fn = torch.randn(5, 2, 8, 8).double(), extend(nn.MSELoss())
    u = F.unfold(x, 3, dilation=2, padding=0 if padding == "valid" else padding).mT
    extend(conv)
    with backpack(
        KFAC("expand", "empirical"), KFAC("reduce", "empirical", savefield="reduce"), SumGradSquared()
    ):
        z = conv(x)
        loss_fn(z, torch.zeros_like(z)).backward()
    assert torch.allclose(conv.weight.kfac.A, u.flatten(0, 1).T @ u.flatten(0, 1) / u[..., 0].numel())
    assert torch.allclose(conv.weight.reduce.A, u.mean(1).T @ u.mean(1) / 5)
    b = 2 * z.detach().flatten(2) / z.numel()
    assert torch.allclose(conv.weight.sum_grad_squared.flatten(1), (b @ u).square().sum(0))


class Halved(KFAC):
    """Forms other factors, by an attribute that KFAC does not know."""

    def __init__(self, factor: float, **options):
        super().__init__(fisher="empirical", **options)
        self.factor = factor

    def _second_moment(self, *args):
        return self.factor * super()._second_moment(*args)


def test_subclasses_share_no_factors():
    torch.manual_seed(0)
    model, loss_fn = extend(nn.Linear(4, 3)), extend(nn.CrossEntropyLoss())
    exts = Halved(1.0, savefield="one"), Halved(0.5, savefield="halved"), KFAC(fisher="empirical")
    with backpack(*exts):
        loss_fn(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
    p = model.weight
    assert torch.allclose(p.halved.A, 0.5 * p.one.A) and torch.allclose(p.halved.B, 0.5 * p.one.B)
    assert torch.equal(p.kfac.A, p.one.A)


class DoubledPatches(ConvRule):
    def _patches(self, site, x):
        return 2 * super()._patches(site, x)


class DoubledInputs(ConvRule):
    def inputs(self, site):
        return 2 * super().inputs(site)


@pytest.mark.parametrize("rule", [DoubledPatches, DoubledInputs])
def test_shortcuts_are_those_of_patches_only(rule: type[ConvRule]):
    """All quantities follow a rule's inputs."""
    torch.manual_seed(0)
    model, x = extend(nn.Conv2d(2, 3, 3), check_layers=False), torch.randn(40, 2, 6, 6)
    loss_fn, found = extend(nn.MSELoss()), {}
    for factor in (1, 2):
        exts = [
            KFAC("expand", "empirical"),
            KFAC("reduce", "empirical", savefield="r"),
            SumGradSquared(),
        ]
        if factor == 2:
            for ext in exts:
                ext.set_module_extension(nn.Conv2d, rule(2))
        with backpack(*exts):
            z = model(x)
            loss_fn(z, torch.zeros_like(z)).backward()
        w = model.weight
        found[factor] = [w.kfac.A.clone(), w.r.A.clone(), w.sum_grad_squared.clone()]
    for one, two in zip(found[1], found[2], strict=True):
        assert torch.allclose(4 * one, two, rtol=1e-4, atol=1e-7)
