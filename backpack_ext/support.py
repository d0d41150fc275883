"""Which module gets which quantity, in which form: a table made by asking the library.

``python -m backpack_ext.support`` prints it. Each row is what one tiny pass leaves on a module's
parameters, or the error that it raises. ``python -m backpack_ext.support README.rst`` puts it
between the two markers in a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backpack_ext import EKFAC, KFAC, BatchGrad, DiagGGN, Extension, UnsupportedError, backpack, extend
from backpack_ext.rules import RULES
from backpack_ext.tables import list_table, main
from curvature import DenseBlock, DiagonalBlock, Kronecker, KroneckerEigen, KroneckerSum

COMMAND = "backpack_ext.support"

COLUMNS = ("KFAC", "EKFAC", "DiagGGN", "per-sample quantities")


class Example(NamedTuple):
    """A small module and what it is called with; data first."""

    module: nn.Module
    inputs: tuple[Tensor, ...]


class Scale(nn.Module):
    """A parameter outside of layers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with it."""
        return x * self.scale


class TiedHead(nn.Module):
    """An embedding and a layer with its weight."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """Look up and score."""
        return self.head(self.table(x).tanh())


class Loop(nn.Module):
    """A cell in a Python loop."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        """Read the tokens one by one."""
        state = None
        for row in x.unbind(1):
            state = self.cell(row, state)
        return state[0] if isinstance(state, tuple) else state


def _tokens(*modules: nn.Module) -> Example:
    return Example(modules[0], tuple(torch.randn(3, 2, 4) for _ in modules))


def _maps(module: nn.Module, dims: int) -> Example:
    return Example(module, (torch.randn(3, 4, *[3] * dims),))


def _index(module: nn.Module) -> Example:
    return Example(module, (torch.randint(5, (3, 2)),))


def _decoder() -> Example:
    layer = nn.TransformerDecoderLayer(4, 2, 3, 0.0, batch_first=True)
    return Example(layer, (torch.randn(3, 2, 4), torch.randn(3, 2, 4)))


def _attention() -> Example:
    x = torch.randn(3, 2, 4)
    return Example(nn.MultiheadAttention(4, 2, batch_first=True), (x, x, x))


def _bilinear() -> Example:
    return Example(nn.Bilinear(4, 4, 2), (torch.randn(3, 4), torch.randn(3, 4)))


# How to make a module of each class; its name in the table where that is not the class's.
EXAMPLES: dict[type[nn.Module] | str, Callable[[], Example]] = {
    nn.Linear: lambda: _tokens(nn.Linear(4, 3)),
    nn.Conv1d: lambda: _maps(nn.Conv1d(4, 2, 2), 1),
    nn.Conv2d: lambda: _maps(nn.Conv2d(4, 2, 2), 2),
    nn.Conv3d: lambda: _maps(nn.Conv3d(4, 2, 2), 3),
    nn.ConvTranspose1d: lambda: _maps(nn.ConvTranspose1d(4, 2, 2), 1),
    nn.ConvTranspose2d: lambda: _maps(nn.ConvTranspose2d(4, 2, 2), 2),
    nn.ConvTranspose3d: lambda: _maps(nn.ConvTranspose3d(4, 2, 2), 3),
    nn.Embedding: lambda: _index(nn.Embedding(5, 4)),
    nn.EmbeddingBag: lambda: _index(nn.EmbeddingBag(5, 4)),
    "Embedding tied to a Linear": lambda: _index(TiedHead()),
    nn.Bilinear: _bilinear,
    nn.LayerNorm: lambda: _tokens(nn.LayerNorm(4)),
    nn.RMSNorm: lambda: _tokens(nn.RMSNorm(4)),
    nn.GroupNorm: lambda: _maps(nn.GroupNorm(2, 4), 1),
    nn.InstanceNorm1d: lambda: _maps(nn.InstanceNorm1d(4, affine=True), 1),
    nn.InstanceNorm2d: lambda: _maps(nn.InstanceNorm2d(4, affine=True), 2),
    nn.InstanceNorm3d: lambda: _maps(nn.InstanceNorm3d(4, affine=True), 3),
    nn.BatchNorm1d: lambda: _maps(nn.BatchNorm1d(4).eval(), 1),
    nn.BatchNorm2d: lambda: _maps(nn.BatchNorm2d(4).eval(), 2),
    nn.BatchNorm3d: lambda: _maps(nn.BatchNorm3d(4).eval(), 3),
    "batch norm in training mode": lambda: _maps(nn.BatchNorm1d(4), 1),
    nn.MultiheadAttention: _attention,
    nn.RNN: lambda: _tokens(nn.RNN(4, 3, batch_first=True)),
    nn.LSTM: lambda: _tokens(nn.LSTM(4, 3, batch_first=True)),
    nn.GRU: lambda: _tokens(nn.GRU(4, 3, batch_first=True)),
    nn.RNNCell: lambda: _tokens(Loop(nn.RNNCell(4, 3))),
    nn.LSTMCell: lambda: _tokens(Loop(nn.LSTMCell(4, 3))),
    nn.GRUCell: lambda: _tokens(Loop(nn.GRUCell(4, 3))),
    nn.TransformerEncoderLayer: lambda: _tokens(
        nn.TransformerEncoderLayer(4, 2, 3, 0.0, batch_first=True)
    ),
    nn.TransformerDecoderLayer: _decoder,
    nn.PReLU: lambda: _tokens(nn.PReLU()),
    "``nn.Parameter`` outside of layers": lambda: _tokens(Scale()),
    "``weight_norm`` of a layer": lambda: _tokens(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    ),
}


class _Net(nn.Module):
    """A module and a layer that says how many data there are."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 2)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(_first(self.body(*inputs)).flatten(1))


def _first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _ask(example: Example, ext: Extension) -> dict[str, object] | None:
    """Return what one pass leaves on a module's parameters; None where it raises."""
    body, inputs = example
    with torch.no_grad():
        width = _first(body(*inputs)).flatten(1).shape[1]
    model, loss_fn = extend(_Net(body, width)), extend(nn.CrossEntropyLoss())
    try:
        with backpack(ext):
            loss_fn(model(*inputs), torch.tensor([0, 1, 1])).backward()
    except UnsupportedError:
        return None
    body = body.cell if isinstance(body, Loop) else body
    return {name: getattr(p, ext.savefield) for name, p in body.named_parameters()}


def kind(block: object) -> str:
    """Return what kind of block of KFAC something is."""
    if isinstance(block, KroneckerSum):
        return "sum of Kronecker products"
    if isinstance(block, Kronecker):
        group = block.groups > 1
        return "Kronecker, A diagonal" if block.A.dim() == 1 + group else "Kronecker"
    if isinstance(block, KroneckerEigen):
        return "corrected"
    return {DenseBlock: "dense", DiagonalBlock: "diagonal"}.get(type(block), type(block).__name__)


def _kinds(make: Callable[[], Example], *extensions: Extension) -> dict[str, str] | None:
    """Return the kind of each parameter's block; with several extensions, all of them."""
    found: dict[str, list[str]] = {}
    for ext in extensions:
        results = _ask(make(), ext)
        if results is None:
            return None
        for name, block in results.items():
            kinds = found.setdefault(name, [])
            if kind(block) not in kinds:
                kinds.append(kind(block))
    return {name: " or ".join(kinds) for name, kinds in found.items()}


def _cell(kinds: dict[str, str] | None) -> str:
    """Say of which kind the blocks are, with the parameters' names where kinds differ."""
    if kinds is None:
        return "raises"
    by_kind: dict[str, list[str]] = {}
    for name, k in kinds.items():
        by_kind.setdefault(k, []).append(name)
    if len(by_kind) == 1:
        return next(iter(by_kind))
    return "; ".join(f"{', '.join(f'``{n}``' for n in names)}: {k}" for k, names in by_kind.items())


def _kfac(fisher: str) -> tuple[KFAC, KFAC]:
    return KFAC(fisher=fisher), KFAC(fisher=fisher, norm="diagonal")


def _ekfac(fisher: str) -> tuple[EKFAC, EKFAC]:
    return EKFAC(fisher=fisher), EKFAC(fisher=fisher, norm="diagonal")


def _parts(body: nn.Module, kinds: dict[str, str], known: dict[type, dict[str, str] | None]) -> bool:
    """Whether each parameter of a composite module is treated like in its part's own row."""
    if type(body) in RULES or not any(True for _ in body.children()):
        return False
    for name, k in kinds.items():
        path = name
        while path:
            path = path.rpartition(".")[0]
            part = type(body.get_submodule(path))
            if part is not type(body) and part in known:
                break
        else:
            return False
        if (known[part] or {}).get(name[len(path) + 1 :]) != k:
            return False
    return True


def rows() -> list[tuple[str, tuple[str, ...]]]:
    """Return the table's rows, a name and a cell per column."""
    found = []
    known: tuple[dict, dict] = ({}, {})
    classes = [*EXAMPLES, *(cls for cls in RULES if cls not in EXAMPLES and _is_torch(cls))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for cls in classes:
            make = EXAMPLES.get(cls)
            if make is None:
                raise LookupError(f"{cls.__name__} has a rule, but no example in backpack_ext.support.")
            name = cls if isinstance(cls, str) else cls.__name__
            cells = []
            for k, extensions in enumerate((_kfac, _ekfac)):
                kinds, remark = _kinds(make, *extensions("exact")), ""
                if kinds is None:  # some vectors may do
                    kinds, remark = _kinds(make, *extensions("mc")), '; ``fisher="exact"`` raises'
                parts = kinds is not None and _parts(make().module, kinds, known[k])
                text = "that of its parts" if parts else _cell(kinds)
                cells.append(text if kinds is None else text + remark)
                if not isinstance(cls, str):
                    known[k][cls] = kinds
            for ext in (DiagGGN(), BatchGrad()):
                cells.append("raises" if _ask(make(), ext) is None else "yes")
            found.append((name, tuple(cells)))
    return found


def _is_torch(cls: type[nn.Module]) -> bool:
    return cls.__module__.startswith("torch.")


def _joined(names: list[str]) -> str:
    """Join names, ``Conv1d``, ``Conv2d`` and ``Conv3d`` to ``Conv1d-3d``."""
    text = ", ".join(names)
    return re.sub(r"(\w+)1d, \1(?:)2d, \1(?:)3d", r"\g<1>1d-3d", text)


def table() -> str:
    """Return the table in reStructuredText; modules that are treated alike share a row."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows():
        alike.setdefault(cells, []).append(name)
    return list_table(
        [("module", *COLUMNS), *((_joined(names), *cells) for cells, names in alike.items())]
    )


if __name__ == "__main__":
    main(COMMAND, table)
