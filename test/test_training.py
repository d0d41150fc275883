"""Every way of training is right, or refused by a message, for every quantity.

The table says what is refused; everything else has to agree with a plain step in float64, which a test
compares with autograd's own derivatives.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from re import search

import hesscale_oracle
import models
import oracle
import pytest
import torch
from torch import Tensor, nn

from backpack_ext import (
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    HesScale,
    LowRankGGN,
    RecordingError,
    SumGradSquared,
    Variance,
    backpack,
    extend,
    tables,
)
from backpack_ext.training import outcomes, table
from backpack_ext.training.outcomes import Outcome, compare, expected, operations, outcome
from backpack_ext.training.problems import NETWORKS, problem
from backpack_ext.training.quantities import QUANTITIES, step
from backpack_ext.training.ways import WAYS

README = Path(__file__).parent.parent / "README.rst"

ALL = tuple(QUANTITIES)
DIAGONALS = ("HesScale", "BL89")
LAYERS = tuple(q for q in ALL if q not in DIAGONALS)

COMPILED = "backend aot_eager"
DONATED = "``torch.compile``, backend aot_eager, dynamic shapes, donated buffers"

# Part of the way's name, the quantities, the networks, and what the message says.
REFUSED: list[tuple[str, tuple[str, ...], tuple[str, ...], str]] = [
    ("accumulation", ("EKFAC",), tuple(NETWORKS), "^ValueError: .*equal eigenbases.*argument `basis`"),
    ("collect", ("EKFAC",), tuple(NETWORKS), "^UnsupportedError: .*needs its bases first"),
    ("use_reentrant=True", LAYERS, tuple(NETWORKS), "^RuntimeError: .*set use_reentrant=False"),
    ("use_reentrant=True", DIAGONALS, tuple(NETWORKS), "^UnsupportedError: .*pass use_reentrant=False"),
    (
        COMPILED,
        DIAGONALS,
        tuple(NETWORKS),
        r"^UnsupportedError: .*torch\.compile: run the model as it is",
    ),
    (DONATED, LAYERS, ("ViT", "GPT", "CNN"), "^RuntimeError: .*donated_buffer=False"),
    ("with tensors", LAYERS, tuple(NETWORKS), r"^RecordingError: .*Pass nn\.Parameter"),
    ("with tensors", DIAGONALS, tuple(NETWORKS), r"^UserWarning: .*pass nn\.Parameter"),
    ("with computed tensors", LAYERS, tuple(NETWORKS), r"^RecordingError: .*Pass nn\.Parameter"),
    ("backward outside of", ALL, tuple(NETWORKS), r"^UserWarning: .*call backward\(\) inside the block"),
    ("step between forward", ALL, tuple(NETWORKS), "^RuntimeError: .*modified by an inplace operation"),
]
INSTEAD = {("accumulation", "BatchDotGrad"): "``collect``", ("accumulation", "Variance"): "``collect``"}


def refusal(way: str, quantity: str, network: str) -> str | None:
    """What the message should say; None if the cell should be right."""
    for part, quantities, networks, message in REFUSED:
        if part in way and quantity in quantities and network in networks:
            return message
    return None


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("way", WAYS)
def test_cell(way: str, quantity: str):
    for network in NETWORKS:
        found = outcome(way, quantity, network)
        if QUANTITIES[quantity].make is None and not WAYS[way].kernel:
            assert found.kind == "-"
            continue
        message = refusal(way, quantity, network)
        other = next((v for (w, q), v in INSTEAD.items() if w in way and q == quantity), None)
        if other is not None:
            assert found.kind == other
        elif message is None:
            assert found.kind == "right", (network, found)
        else:
            assert found.kind == "refused" and search(message, found.text), (network, found)


def test_readme_has_the_table():
    text = README.read_text()
    assert tables.insert(text, table.COMMAND, table.table()) == text, "run `make tables`"


# -- what a plain step finds -----------------------------------------------------------------------


def _oracle(network: str) -> models.Problem:
    plain = problem(network)
    loss_fn = nn.CrossEntropyLoss()
    return models.Problem(
        plain.model, (plain.x,), loss_fn, plain.y.flatten(), readout=lambda z: z.flatten(0, -2)
    )


def _moments(G: Tensor) -> dict[str, Tensor]:
    rows = G.flatten(1)
    return {
        "BatchGrad": G,
        "BatchL2Grad": rows.square().sum(1),
        "BatchDotGrad": rows @ rows.T,
        "SumGradSquared": G.square().sum(0),
        "Variance": G.var(0, correction=0),
    }


@pytest.mark.parametrize("network", NETWORKS)
def test_a_plain_step_is_right(network: str):
    """Against per-sample gradients, Jacobians and Hessians of autograd."""
    at = _oracle(network)
    for name, G in oracle.per_sample_grads(at).items():
        for quantity, value in _moments(G).items():
            oracle.close(expected(network, quantity)[name], value, 1e-9)
        oracle.close(expected(network, "BatchGrad")[f"grad {name}"], G.sum(0))
    for name, value in oracle.ggn_diag(at).items():
        oracle.close(expected(network, "DiagGGN exact")[name], value)
    names = [name for name, _ in at.model.named_parameters()]
    oracle.close(expected(network, "LowRankGGN")[""], oracle.ggn_block(at, names))
    J = torch.cat([J.flatten(2) for J in oracle.jacobian(at).values()], dim=2)
    oracle.close(expected(network, "NTK")[""], torch.einsum("ncp,mdp->nmcd", J, J))
    for name, (a, J) in oracle.normal_forms(at).items():
        B, A = oracle.factors_of(a, J, oracle.output_hessian(at), "expand")
        block = oracle.kronecker_block(at.model.get_submodule(name), B, A)
        oracle.close(expected(network, "KFAC expand exact")[f"{name}.weight"], block)


def test_hessian_diagonals_of_a_plain_step_are_right():
    """At a last layer HesScale's are those of the Hessian."""
    for network, last in (("MLP", "head"), ("CNN", "head.2"), ("ViT", "head.linear"), ("GPT", "head.1")):
        at = problem(network)
        layer = at.model.get_submodule(last)

        def loss(weight: Tensor, at=at, layer=layer) -> Tensor:
            handle = layer.register_forward_hook(
                lambda m, args, _: nn.functional.linear(*args, weight, m.bias)
            )
            try:
                return at.loss()
            finally:
                handle.remove()

        (exact,) = hesscale_oracle.exact_diagonal(loss, [layer.weight])
        oracle.close(expected(network, "HesScale")[f"{last}.weight"], exact)


# -- what the comparison is worth ------------------------------------------------------------------


def test_the_tolerance_is_small_enough_to_see_errors():
    """A tenth too much in one parameter is seen in bfloat16, a thousandth in float32."""
    for network in NETWORKS:
        wanted = expected(network, "KFAC expand exact")
        for dtype, error in ((torch.bfloat16, 0.2), (torch.float32, 1e-3), (torch.float64, 1e-11)):
            tolerated = outcomes.tolerance(network, QUANTITIES["KFAC expand exact"], dtype)
            assert operations(network) < 100 and tolerated < error
            for key in wanted:
                found = {**wanted, key: wanted[key] * (1 + error)}
                assert compare(found, wanted, tolerated, some=False).kind == "wrong"


def test_missing_results_are_seen():
    wanted = expected("MLP", "BatchGrad")
    fewer = dict(list(wanted.items())[1:])
    assert compare(fewer, wanted, 1e-3, some=False).kind == "wrong"
    assert compare(fewer, wanted, 1e-3, some=True).kind == "right"
    assert compare({}, wanted, 1e-3, some=True).kind == "wrong"
    wrong = {k: torch.full_like(v, torch.nan) for k, v in wanted.items()}
    assert compare(wrong, wanted, 1e-3, some=False).kind == "wrong"


def test_cells_of_the_table():
    notes = table.Notes()
    right, refused = (
        Outcome("right"),
        Outcome("refused", "ValueError: 1.weight (Linear): No. Do that. Or."),
    )
    assert table.cell({"A": right, "B": right}, notes) == "right"
    assert table.cell({"A": right, "B": refused, "C": right}, notes) == "right; B: [1]"
    assert table.cell({"A": refused, "B": Outcome("wrong", "x")}, notes) == "[1]; B: WRONG: x"
    assert notes.lines() == "[1] ``ValueError``: No. Do that.\n\n"


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", NETWORKS)
def test_results_are_in_float32(network: str, dtype: torch.dtype):
    for quantity in QUANTITIES.values():
        found = step(problem(network).to(dtype), quantity)
        kinds = {v.dtype for k, v in found.items() if not k.startswith("grad ")}
        assert kinds == {torch.float32}, quantity.name


SMALL = (
    *(BatchGrad, BatchL2Grad, SumGradSquared, Variance, HesScale, DiagGGN),
    *(lambda: KFAC(fisher="empirical"), lambda: KFAC(fisher="exact")),
)


@pytest.mark.parametrize("make", SMALL)
def test_what_float16_cannot_hold(make: Callable):
    """Squares of small gradients, and vectors without the scaler's factor, need float32."""
    size = 2.0**-40
    at = problem("MLP")
    exts = make(), make()
    with backpack(exts[0]):
        (at.loss() * size).backward()
    wanted = [getattr(p, exts[0].savefield) for p in at.model.parameters()]
    low = problem("MLP").to(torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with backpack(exts[1], grad_scaler=scaler):
        scaler.scale(low.loss().float() * size).backward()
    for p, w in zip(low.model.parameters(), wanted, strict=True):
        value = getattr(p, exts[1].savefield)
        if not isinstance(value, Tensor):
            value, w = value.to_dense(), w.to_dense()
        assert (value.double() - w).norm() < 0.03 * w.norm()


def test_a_forgotten_grad_scaler_multiplies():
    """Nothing tells its factor from one of the user's: results are those of the scaled loss."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for name, power in (
        ("BatchGrad", 1),
        ("SumGradSquared", 2),
        ("KFAC expand exact", 1),
        ("HesScale", 1),
    ):
        found = step(problem("MLP"), QUANTITIES[name], lambda z: scaler.scale(z).backward())
        for key, value in expected("MLP", name).items():
            if not key.startswith("grad "):
                torch.testing.assert_close(found[key], value * 8.0**power)


def test_overflow_shows_as_in_the_gradient():
    """The step that the scaler leaves out has results that are not finite."""
    at = problem("MLP").to(torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with backpack(BatchGrad(), grad_scaler=scaler):
        scaler.scale(at.loss().float()).backward()
    weight = at.model.stem[0].weight
    assert not weight.grad.isfinite().all() and not weight.grad_batch.isfinite().all()


# -- compilation -----------------------------------------------------------------------------------


def test_compilation_of_the_whole_graph_is_refused():
    """Layers are recorded by hooks, which are not compiled."""
    torch._dynamo.reset()
    at = problem("MLP")
    at.call = torch.compile(at.model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"hook|skip"):
        step(at, QUANTITIES["BatchGrad"])
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor():
    torch._dynamo.reset()
    model, loss_fn = extend(nn.Sequential(nn.Linear(3, 2), nn.Tanh())), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    with torch._functorch.config.patch(donated_buffer=False):
        found = []
        for call in (model, torch.compile(model)):
            with backpack(BatchGrad(), KFAC(fisher="exact")):
                loss_fn(call(x), y).backward()
            found.append([t for p in model.parameters() for t in (p.grad_batch, p.kfac.to_dense())])
    torch.testing.assert_close(*found)
    torch._dynamo.reset()


def test_a_compiled_model_follows_the_context():
    """What is recorded is decided in each pass, not when the model was compiled."""
    torch._dynamo.reset()
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    compiled, loss_fn = torch.compile(model, backend="eager"), extend(nn.CrossEntropyLoss())
    for n in (5, 5, 3, 4):
        x, y = torch.randn(n, 3), torch.randint(2, (n,))
        with backpack():
            loss_fn(compiled(x), y).backward()
        with backpack(BatchGrad()):
            loss_fn(compiled(x), y).backward()
        found = [p.grad_batch for p in model.parameters()]
        model.zero_grad()
        loss_fn(compiled(x), y).backward()
        for p, G in zip(model.parameters(), found, strict=True):
            assert len(G) == n
            torch.testing.assert_close(G.sum(0), p.grad)
    torch._dynamo.reset()


# -- what is trained -------------------------------------------------------------------------------


def test_order_of_parameters_does_not_depend_on_parts_called_on_their_own():
    """Checkpointing calls a part again on its own."""
    model, loss_fn = extend(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))), extend(nn.MSELoss())
    part = nn.Sequential(model[2], model[3])
    extend(part)
    x, seen = torch.randn(3, 2), []
    for calls in (0, 1):
        for _ in range(calls):
            part(x)
        ext = LowRankGGN()
        with backpack(ext):
            loss_fn(model(x), x).backward()
        seen.append(ext.block.to_dense())
    torch.testing.assert_close(*seen)


def test_plain_tensors_outside_of_layers_are_refused():
    """Given by `functional_call`; they used to be missing."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x * self.w)

    inner = Bare()
    model, loss_fn = extend(nn.Sequential(inner)), extend(nn.CrossEntropyLoss())
    given = {"0.w": torch.ones(3, requires_grad=True)}
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    for ext in (BatchGrad(), DiagGGN()):
        with pytest.raises(RecordingError, match=r"0 \(Bare\): its w is a plain tensor"), backpack(ext):
            loss_fn(torch.func.functional_call(model, given, (x,)), y).backward()
    loss_fn(torch.func.functional_call(model, given, (x,)), y).backward()  # nobody asks for anything
    assert given["0.w"].grad is not None


def test_nothing_found_is_said():
    z, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    with pytest.warns(UserWarning, match="HesScale found no parameter"), backpack(HesScale()):
        extend(nn.CrossEntropyLoss())(z.tanh(), y).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with backpack(HesScale()):
            extend(nn.CrossEntropyLoss())(nn.Linear(3, 3)(z), y).backward()


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU])
def test_diagonals_of_selected_gradients(act: type[nn.Module], gauss_newton: bool):
    """What was not asked for is right where it is there; it used to be zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 4), nn.AvgPool1d(2), nn.Linear(2, 2))
    loss_fn, ext = extend(nn.CrossEntropyLoss()), HesScale(gauss_newton=gauss_newton)
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    with backpack(ext):
        loss_fn(model(x), y).backward()
    wanted = [getattr(p, ext.savefield) for p in model.parameters()]
    for p in model.parameters():
        delattr(p, ext.savefield)
    with backpack(ext):
        loss_fn(model(x), y).backward(inputs=[model[4].weight])
    found = [getattr(p, ext.savefield, None) for p in model.parameters()]
    assert found[4] is not None
    for one, other in zip(found, wanted, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)
