"""Training that is saved, loaded elsewhere and continued gives the very same numbers."""

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from backpack_ext import EKFAC, KFAC, DiagGGN, HesScale, LowRankGGN, backpack, extend
from curvature import Kronecker
from curvature.block import Block
from optim import AdaHesScale, HesScaleStep

X, Y = torch.randn(12, 4), torch.randint(3, (12,))


def by_torch(state: dict, template: dict, folder: Path) -> dict:
    """`torch.save` and `torch.load` with its safe default."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def by_dcp(state: dict, template: dict, folder: Path) -> dict:
    """`torch.distributed.checkpoint`, into the state of a new object."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
        dcp.load(template, checkpoint_id=folder / "dcp", no_dist=True)
    return template


def by_dcp_file(state: dict, template: dict, folder: Path) -> dict:
    """`torch.distributed.checkpoint`, read as a whole: no new object has to know what there is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
        dcp_to_torch_save(folder / "dcp", folder / "file")
    return torch.load(folder / "file")


every_way = pytest.mark.parametrize("through", [by_torch, by_dcp, by_dcp_file])
in_memory = pytest.mark.parametrize("through", [by_torch, by_dcp])


def new_model() -> nn.Module:
    return extend(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def passes(model: nn.Module, ext, count: int) -> list[torch.Tensor]:
    """What some passes leave on the first weight."""
    found, loss_fn = [], extend(nn.CrossEntropyLoss())
    for k in range(count):
        with backpack(ext):
            loss_fn(model(X[k::3]), Y[k::3]).backward()
        value = getattr(model[0].weight, ext.savefield)
        found.append((value if isinstance(value, torch.Tensor) else value.to_dense()).clone())
    return found


SAMPLING: dict[str, Callable] = {
    "KFAC": lambda: KFAC(fisher="mc", mc_samples=2),
    "EKFAC": lambda: EKFAC(fisher="mc"),
    "DiagGGN": lambda: DiagGGN("mc"),
    "LowRankGGN": lambda: LowRankGGN(fisher="mc"),
}


@pytest.mark.parametrize("used", [True, False], ids=["used", "new"])
@pytest.mark.parametrize("make", SAMPLING.values(), ids=SAMPLING.keys())
@every_way
def test_samples_continue(through, make, used, tmp_path):
    """Also those of an extension that has drawn none yet."""
    model, ext = new_model(), make()
    if used:
        passes(model, ext, 2)
    state = {"ext": copy.deepcopy(ext.state_dict())}
    expected = passes(model, ext, 2)
    other = make()
    other.load_state_dict(through(state, {"ext": other.state_dict()}, tmp_path)["ext"])
    for one, two in zip(passes(model, other, 2), expected, strict=True):
        assert torch.equal(one, two)
    fresh = passes(model, make(), 2)  # it has to matter
    assert not all(map(torch.equal, fresh, expected))


@every_way
def test_signs_continue(through, tmp_path):
    """Those by which Hessian diagonals cross operations without a rule."""
    ext, other, like = HesScale(), HesScale(), torch.empty(99)
    ext.signs(like)
    state = {"ext": ext.state_dict()}
    expected = ext.signs(like)
    other.load_state_dict(through(state, {"ext": other.state_dict()}, tmp_path)["ext"])
    assert torch.equal(other.signs(like), expected)


def test_extensions_without_samples_have_no_state():
    assert KFAC(fisher="exact").state_dict() == {}


OPTIMIZERS: dict[str, Callable] = {
    "AdaHesScale": lambda m: AdaHesScale(m.parameters(), lr=0.01),
    "AdaHesScale-GN": lambda m: AdaHesScale(m.parameters(), lr=0.01, gauss_newton=True),
    "HesScaleStep": lambda m: HesScaleStep(torch.optim.Adam(m.parameters(), lr=0.1), delta=1e-3),
    "both": lambda m: HesScaleStep(AdaHesScale(m.parameters(), lr=0.1), delta=1e-3),
}


def train(model: nn.Module, opt, steps: range) -> None:
    loss_fn, x = extend(nn.CrossEntropyLoss()), X.to(next(model.parameters()).dtype)
    for k in steps:
        opt.zero_grad()
        with backpack(*opt.extensions()):
            loss_fn(model(x[k % 3 :: 3]), Y[k % 3 :: 3]).backward()
        opt.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@in_memory
def test_optimizers_continue(through, make, dtype, tmp_path):
    model = new_model().to(dtype)
    opt = make(model)
    train(model, opt, range(4))
    state = copy.deepcopy({"model": model.state_dict(), "opt": opt.state_dict()})
    train(model, opt, range(4, 9))
    other = new_model().to(dtype)
    again = make(other)
    train(other, again, range(1))  # an optimizer that has taken no step does not know what to load
    template = copy.deepcopy({"model": other.state_dict(), "opt": again.state_dict()})
    state = through(state, template, tmp_path)
    other.load_state_dict(state["model"])
    again.load_state_dict(state["opt"])
    train(other, again, range(4, 9))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_wrapper_cannot_be_saved_by_names():
    model = new_model()
    opt = OPTIMIZERS["HesScaleStep"](model)
    train(model, opt, range(1))
    with pytest.raises(ValueError, match="no entry 'hesscale_step'"):
        set_optimizer_state_dict(model, opt, get_optimizer_state_dict(model, opt))


@pytest.mark.parametrize("make", list(OPTIMIZERS.values())[:2], ids=list(OPTIMIZERS)[:2])
def test_optimizers_continue_by_names(make, tmp_path):
    """The way torch recommends, whose new optimizer takes a step of size zero for empty states."""
    model = new_model()
    opt = make(model)
    train(model, opt, range(4))
    state = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}
    state = copy.deepcopy(state)
    train(model, opt, range(4, 9))
    other = new_model()
    again = make(other)
    template = {"model": other.state_dict(), "opt": get_optimizer_state_dict(other, again)}
    state = by_dcp(state, template, tmp_path)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, again, state["opt"])
    train(other, again, range(4, 9))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_without_diagonal_has_to_be_of_size_zero():
    p = nn.Parameter(torch.ones(2))
    for lr, grad in ((0.1, 0.0), (0.0, 1.0)):
        p.grad = torch.full((2,), grad)
        with pytest.raises(RuntimeError, match="no `hesscale`"):
            AdaHesScale([p], lr=lr).step()


BLOCKS = {
    "kfac": lambda: KFAC(fisher="exact", bias="joint"),
    "diagonal": lambda: KFAC("reduce", fisher="exact", norm="diagonal"),
    "ekfac": lambda: EKFAC(fisher="exact"),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
@every_way
def test_blocks_continue(through, make, tmp_path):
    """A moving average of a block, saved in between."""
    model = extend(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    loss_fn = extend(nn.CrossEntropyLoss())

    def block(rows: slice, at: int) -> Block:
        ext = make()
        with backpack(ext):
            loss_fn(model(X[rows]), Y[rows]).backward()
        return getattr(model[at].weight, ext.savefield)

    for at in (0, 1):
        first, second = block(slice(0, 6), at), block(slice(6, 12), at)
        other = second.state_dict()
        template = {
            k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in other.items()
        }
        state = through({"block": first.state_dict()}, {"block": template}, tmp_path / str(at))
        loaded = type(first).from_state_dict(state["block"])
        for key, value in first.state_dict().items():
            other = loaded.state_dict()[key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        if through is not by_dcp_file:  # which loses the order of a matrix in memory, and products round
            assert torch.equal(loaded.to_dense(), first.to_dense())
        if isinstance(first, Kronecker):
            assert torch.equal(loaded.lerp(second, 0.1).to_dense(), first.lerp(second, 0.1).to_dense())
            assert torch.equal((loaded + second).to_dense(), (first + second).to_dense())
