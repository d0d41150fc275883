"""Patches averaged over pixels without forming them are the mean of the patches."""

import pytest
import torch
from torch import nn

from backpack_ext import KFAC, backpack, extend
from backpack_ext.rules.affine import ConvRule, ConvTransposeRule

DIMS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose2d: 2}
CASES = [
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 2}),
    (nn.Conv2d, {"kernel_size": (3, 2), "padding": (1, 0), "stride": (1, 2)}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": "same", "dilation": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 5}),
    (nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": "valid", "groups": 2}),
    (nn.Conv2d, {"kernel_size": 2, "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (nn.ConvTranspose2d, {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("cls, options", CASES, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("rows", [1, 3], ids=["plain", "several images per datum"])
def test_kfac_reduce(cls, options, rows, monkeypatch):
    torch.manual_seed(0)
    x = torch.rand(4, rows, 4, *(7, 6, 8)[: DIMS[cls]], dtype=torch.float64)
    model = nn.Sequential(
        nn.Flatten(0, 1), cls(4, 6, **options), nn.Flatten(), Mean(rows), nn.LazyLinear(3)
    )
    model = model.double()
    model(x)
    model, loss_fn = extend(model), extend(nn.CrossEntropyLoss())
    y = torch.randint(3, (4,))

    def factors():
        with backpack(KFAC("reduce", fisher="empirical")):
            loss_fn(model(x), y).backward()
        found = model[1].weight.kfac
        return found.A.clone(), found.B.clone()

    fast = factors()
    for rule in (ConvRule, ConvTransposeRule):
        monkeypatch.setattr(rule, "mean_inputs", lambda rule, site: None)
    for one, two in zip(fast, factors(), strict=True):
        torch.testing.assert_close(one, two)


class Mean(nn.Module):
    """Averages groups of rows."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x):
        return x.unflatten(0, (-1, self.rows)).mean(1)
