"""The oracle of Hessian diagonals against closed forms and against itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from hesscale_oracle import (
    Graph,
    Module,
    as_function,
    bl89_seed,
    exact_diagonal,
    forward,
    penultimate,
    recursion,
)
from oracle import close
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("double")


def quadratic(c: Tensor, b: Tensor) -> Module:
    return Module("loss", lambda y: (c / 2 * y.square() + b * y).sum(), ("output 0",))


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_exact_diagonal_of_a_quadratic(vectorize: bool):
    A, B = torch.randn(6, 6), torch.randn(4, 4)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return x.flatten() @ A @ x.flatten() + y @ B @ y + x.sum() * y.sum()

    x, y, linear = torch.randn(2, 3), torch.randn(4), torch.randn(2)
    found = exact_diagonal(lambda x, y, z: loss(x, y) + z.sum(), [x, y, linear], vectorize)
    close(found[0].flatten(), 2 * A.diagonal())
    close(found[1], 2 * B.diagonal())
    assert not found[2].any() and found[2].shape == (2,)
    nothing = exact_diagonal(lambda x: x.sum(), [x], vectorize)
    assert not nothing[0].any() and nothing[0].shape == x.shape


def test_the_exact_diagonal_of_a_network_is_that_of_its_hessian():
    x, W, V = torch.randn(5, 3), torch.randn(4, 3), torch.randn(2, 4)

    def loss(W: Tensor, V: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.linear(x, W).tanh(), V), torch.tensor([0, 1, 1, 0, 1]))

    found = exact_diagonal(loss, [W, V])
    for k, t in enumerate((W, V)):
        H = torch.func.hessian(loss, argnums=k)(W, V).reshape(t.numel(), t.numel())
        close(found[k].flatten(), H.diagonal())


MODULES = {
    "Linear": (as_function(nn.Linear(3, 4)), [(5, 3), (4, 3), (4,)]),
    "Conv2d": (as_function(nn.Conv2d(2, 3, 2, stride=2, padding=1)), [(2, 2, 3, 4), (3, 2, 2, 2), (3,)]),
    "Tanh": (torch.tanh, [(3, 4)]),
    "Softmax": (lambda x: x.softmax(-1), [(3, 4)]),
    "LayerNorm": (as_function(nn.LayerNorm(4)), [(3, 4), (4,), (4,)]),
    "product": (torch.mul, [(3, 4), (1, 4)]),
    "attention": (lambda S, V: S.softmax(-1) @ V, [(2, 3, 4), (2, 4, 2)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_one_module_is_exact(name: str):
    fn, shapes = MODULES[name]
    leaves = {f"leaf {k}": torch.randn(shape) for k, shape in enumerate(shapes)}
    args, graph = list(leaves.values()), Graph()
    y = graph(fn, *leaves)
    z = forward(graph.modules, leaves)[y]
    loss = quadratic(torch.randn_like(z), torch.randn_like(z))

    def agrees(found: dict[str, Tensor], expected: list[Tensor]) -> None:
        assert found.keys() == leaves.keys()
        for key, diagonal in zip(leaves, expected, strict=True):
            close(found[key], diagonal, 1e-13)

    exact = exact_diagonal(lambda *args: loss.fn(fn(*args)), args)
    agrees(recursion(graph.modules, leaves, loss), exact)

    # The GGN is the Hessian of the loss of the linearised module.
    def linearised(*at: Tensor) -> Tensor:
        steps = tuple(a - b for a, b in zip(at, args, strict=True))
        return loss.fn(sum(torch.func.jvp(fn, tuple(args), steps)))

    ggn = exact_diagonal(linearised, args)
    agrees(recursion(graph.modules, leaves, loss, gauss_newton=True), ggn)


def residual_network() -> tuple[dict[str, Tensor], Graph, Module]:
    """`V (x + tanh(W x + b))` with a cross-entropy."""
    torch.manual_seed(1)
    shapes = {"x": (4, 3), "W": (3, 3), "b": (3,), "V": (2, 3)}
    leaves, graph = {key: torch.randn(shape) for key, shape in shapes.items()}, Graph()
    z = graph(torch.add, "x", graph(torch.tanh, graph(F.linear, "x", "W", "b")))
    y = torch.tensor([0, 1, 1, 0])
    return leaves, graph, Module("loss", lambda f: F.cross_entropy(f, y), (graph(F.linear, z, "V"),))


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_a_network_against_formulas(gauss_newton: bool):
    leaves, graph, loss = residual_network()
    x, W, _, V = leaves.values()
    values = forward(graph.modules, leaves)
    t, z, f = values["output 1"], values["output 2"], values["output 3"]
    q, r = f.softmax(1), 1 / len(x)
    g, h = (q - F.one_hot(torch.tensor([0, 1, 1, 0]))) * r, (q - q.square()) * r
    h_V = h.T @ z.square()
    g, h = g @ V, h @ V.square()
    slope, bend = 1 - t.square(), 2 * t * (t.square() - 1)
    inner = slope.square() * h + (0 if gauss_newton else bend * g)
    h_W, h_b, h_x = inner.T @ x.square(), inner.sum(0), h + inner @ W.square()
    found = recursion(graph.modules, leaves, loss, gauss_newton)
    assert found.keys() == leaves.keys()
    for key, expected in zip(leaves, (h_x, h_W, h_b, h_V), strict=True):
        close(found[key], expected, 1e-13)


def test_what_is_exact_and_what_is_not():
    leaves, graph, loss = residual_network()

    def value(*args: Tensor) -> Tensor:
        x, W, b, V = args
        return loss.fn(F.linear(x + (F.linear(x, W, b)).tanh(), V))

    exact = dict(zip(leaves, exact_diagonal(value, list(leaves.values())), strict=True))
    found = recursion(graph.modules, leaves, loss)
    close(found["V"], exact["V"], 1e-13)
    for key in ("x", "W", "b"):
        assert (found[key] - exact[key]).abs().sum() > 1e-3 * exact[key].abs().sum()
    further = Graph(graph.modules[:-1])
    found = recursion(further.modules, leaves, penultimate(loss, graph.modules[-1]))
    for key in ("W", "b", "V"):  # one hidden layer, and elementwise functions keep the diagonal exact
        close(found[key], exact[key], 1e-13)


def test_the_penultimate_layer_in_closed_form():
    leaves, graph, loss = residual_network()
    last, V = graph.modules[-1], leaves["V"]
    values = forward(graph.modules, leaves)
    q = values[last.name].softmax(1)
    fused = penultimate(loss, last)
    z = values[fused.inputs[0]]
    found = exact_diagonal(fused.fn, [z, V])[0]
    close(found, (q @ V.square() - (q @ V).square()) / len(z), 1e-13)


CLASSES = torch.tensor([[0, 2], [1, -100], [2, 2], [0, 1]])
SPREAD = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 3, 2).sin().softmax(1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("target, smoothing", [(CLASSES, 0.0), (CLASSES, 0.3), (SPREAD, 0.0)])
def test_the_seed_of_bl89(target: Tensor, smoothing: float, reduction: str):
    """The loss is `-sum a log q`; q counts as an elementwise function, q' = q - q^2, of the logits."""
    loss_fn = nn.CrossEntropyLoss(torch.rand(3) + 0.5, label_smoothing=smoothing, reduction=reduction)
    f, zeros = torch.randn(4, 3, 2), torch.zeros(4, 3, 2)
    q = f.softmax(1)
    # where the logits are zero, a term is `log(3) sum_c a_c`; the gradient is `q_c sum a - a_c`
    unreduced = nn.CrossEntropyLoss(loss_fn.weight, label_smoothing=smoothing, reduction="none")
    terms = unreduced(zeros, target)
    total = terms / math.log(3) * loss_fn(zeros, target) / terms.sum()
    a = q * total.unsqueeze(1) - torch.func.grad(loss_fn)(f, target)
    slope, bend = q - q.square(), (q - q.square()) * (1 - 2 * q)
    elementwise = slope.square() * a / q.square() - bend * a / q
    close(bl89_seed(loss_fn, f, target), elementwise, 1e-13)


def test_seeds_replace_the_loss_hessian():
    leaves, graph, loss = residual_network()
    (f,) = loss.inputs
    values = forward(graph.modules, leaves)
    seed = {f: torch.randn_like(values[f])}
    found = recursion(graph.modules, leaves, loss, seeds=seed)
    close(found["V"], seed[f].T @ values["output 2"].square(), 1e-13)
