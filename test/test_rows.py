"""KFAC-reduce alone in a pass: layers are reduced to a row per datum, and wait for others.

The factors of random nets on this way are compared with the definitions in ``test_fuzz.py``.
"""

import pytest
import torch
from oracle import close
from torch import nn

from backpack_ext import KFAC, BatchGrad, UnsupportedError, backpack, extend
from backpack_ext.pending import Pending
from backpack_ext.unit import Unit

N, T = 5, 7


class Net(nn.Module):
    """Convolutions of equal shape, layers on tokens, one of which trains its bias alone, and a norm."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1, groups=2) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers[1].weight.requires_grad_(False)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x).tanh()
        x = x.mT
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(self.norm(x.mean(1)))


def made(dtype=torch.float64):
    torch.manual_seed(0)
    model = extend(Net().to(dtype))
    x, y = torch.rand(N, 4, T, dtype=dtype), torch.randint(3, (N,))
    loss_fn = extend(nn.CrossEntropyLoss())
    return model, lambda: loss_fn(model(x), y)


def factors(model, ext):
    return {
        (name, f"{factor}"): getattr(getattr(p, ext.savefield), factor).clone()
        for name, p in model.named_parameters()
        if p.requires_grad and "norm" not in name
        for factor in "BA"
    }


@pytest.fixture
def handed_over(monkeypatch):
    """Names of the layers that KFAC was given at a time, and how many of them as rows."""
    found = []
    monkeypatch.setattr(KFAC, "absorb_all", counting(found))
    monkeypatch.setattr(Pending, "SMALL", 0)
    return found


def counting(found, absorb_all=KFAC.absorb_all):
    def counted(ext, store, units):
        found.append(([u.sites[0].name for u in units], sum(u.only_rows for u in units)))
        absorb_all(ext, store, units)

    return counted


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_layers_wait_for_those_of_equal_shape(fisher, handed_over, monkeypatch):
    _, loss = made()
    with backpack(KFAC("reduce", fisher)):
        loss().backward()
    convs = [f"convs.{k}" for k in (2, 1, 0)]
    # norms and layers of one position have no rows, and do not wait; a bias alone has no inputs
    expected = [(["head"], 0), (["norm"], 0), (["layers.2", "layers.0"], 2), (["layers.1"], 1)]
    assert handed_over == [*expected, (convs, 3)]
    # what waits is bounded, and layers with many rows are not joined
    for name, limit, number in (("LIMIT", 0, 8), ("LIMIT", 4 * N * 4, 6), ("ROWS", N * 8, 7)):
        monkeypatch.undo()
        monkeypatch.setattr(Pending, "SMALL", 0)
        monkeypatch.setattr(Pending, name, limit)
        monkeypatch.setattr(KFAC, "absorb_all", counting(handed_over))
        handed_over.clear()
        with backpack(KFAC("reduce", fisher)):
            loss().backward()
        assert len(handed_over) == number


@pytest.mark.parametrize(
    "ext, others",
    [
        (KFAC("reduce", "mc", mc_samples=2), ()),  # further columns bring the inputs again
        (KFAC("reduce", "exact"), ()),
        (KFAC("expand", "empirical"), ()),
        (KFAC("reduce", "forward"), ()),
        (KFAC("reduce", "empirical"), (BatchGrad(),)),  # which needs all of a layer
    ],
    ids=["two samples", "exact", "expand", "forward", "another extension"],
)
def test_all_of_a_layer_is_handed_over(ext, others, handed_over):
    _, loss = made()
    with backpack(ext, *others):
        loss().backward()
    assert handed_over and not any(rows for _, rows in handed_over)


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("keep", ["root", "factor"])
def test_same_as_with_another_extension(bias, keep, monkeypatch):
    """Where several extensions share a layer, it is not reduced to rows."""
    monkeypatch.setattr(Pending, "SMALL", 0)
    model, loss = made(torch.float32)
    ext = KFAC("reduce", "empirical", bias=bias, keep=keep, dtype=torch.float64)
    with backpack(ext):
        loss().backward()
    alone = factors(model, ext)
    with backpack(ext, BatchGrad()):
        loss().backward()
    for key, t in factors(model, ext).items():
        assert t.dtype == torch.float64
        close(alone[key], t, 1e-14)


def test_inputs_and_vectors_are_let_go(handed_over, monkeypatch):
    """What waits is rows: neither inputs nor vectors of all positions."""
    held, hand = [], KFAC.bring_to_rows

    def looked(ext, unit):
        found = hand(ext, unit)
        if found:
            held.append((unit.sites[0].name, sum(t.numel() for t in tensors(unit)), unit.positions))
        return found

    def tensors(unit):
        values = [getattr(unit, name) for name in Unit.__slots__]
        return [t for v in values for t in (v if isinstance(v, tuple) else (v,)) if torch.is_tensor(t)]

    monkeypatch.setattr(KFAC, "bring_to_rows", looked)
    _, loss = made()
    with backpack(KFAC("reduce", "empirical")):
        loss().backward()
    sizes = {name: size for name, size, _ in held}
    positions = {name: s for name, _, s in held}
    assert (
        sizes["convs.1"] == N * (4 + 4 * 3) and sizes["layers.0"] == N * 8 and sizes["layers.1"] == N * 4
    )
    assert positions == dict.fromkeys(sizes, T) and "head" not in sizes


def test_errors_name_the_layer(monkeypatch):
    """Those that are found once the rows are complete, too; and nothing is left behind."""
    monkeypatch.setattr(Pending, "SMALL", 0)
    model, loss = made()
    with (
        pytest.raises(UnsupportedError, match=r"factor A of convs.2 .* would be 6 x 6"),
        backpack(KFAC("reduce", "empirical", max_dim=5)),
    ):
        loss().backward()
    assert not any(hasattr(p, "kfac") for p in model.parameters())
    with backpack(KFAC("reduce", "empirical")):
        loss().backward()
    assert all(hasattr(p, "kfac") for p in model.parameters() if p.requires_grad)


def test_old_results_go_as_vectors_arrive(monkeypatch):
    """A pass that fails later leaves none of an earlier one where it has been."""
    monkeypatch.setattr(Pending, "SMALL", 0)
    model, loss = made()
    ext = KFAC("reduce", "empirical")
    with backpack(ext):
        loss().backward()

    def stop(grad):
        raise KeyboardInterrupt

    model.convs[0].weight.register_hook(stop)
    with pytest.raises(KeyboardInterrupt), backpack(ext):
        loss().backward()
    assert not any(hasattr(p, "kfac") for p in model.parameters())


def test_small_layers_and_rows_are_bounded_together(monkeypatch):
    monkeypatch.setattr(Pending, "SMALL", 2 * N * T * 4)
    monkeypatch.setattr(Pending, "LIMIT", N * 24)
    most, taken = [], Pending.take_small

    def take_small(pending):
        most.append(sum(map(len, pending.small.values())) + sum(map(len, pending.units.values())))
        return taken(pending)

    monkeypatch.setattr(Pending, "take_small", take_small)
    model = nn.Sequential(
        *(nn.Linear(4 + k % 2, 5 - k % 2) for k in range(9)), nn.Flatten(), nn.Linear(35, 3)
    )
    model, loss_fn = extend(model), extend(nn.CrossEntropyLoss())
    with backpack(KFAC("reduce", "empirical")):
        loss_fn(model(torch.rand(N, T, 4)), torch.randint(3, (N,))).backward()
    assert max(most) <= 3


def test_layers_on_several_devices_wait_apart():
    pending, units = Pending(), []
    for device in ("cpu", "meta", "cpu"):
        unit = object.__new__(Unit)
        unit.rule, unit.parameters, unit._positions = None, {"bias": None}, 2
        unit._mean_a, unit._a, unit._b = None, None, torch.zeros(1, 1, 2, 1, 3, device=device)
        units.append(unit)
        pending.add_rows(unit)
    assert pending.take_small() == ([], [[units[0], units[2]], [units[1]]])
