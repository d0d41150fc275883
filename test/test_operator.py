"""The whole-model operator, on what backward passes leave on parameters."""

import io

import pytest
import torch
from models import Problem
from oracle import ggn_block
from torch import Tensor, nn

from backpack_ext import EKFAC, KFAC, DiagGGN, backpack, extend
from curvature import BlockDiagonalOperator, DenseBlock, DiagonalBlock, Kronecker

DELTA = 0.2
EXTENSIONS = {
    "separate": KFAC(fisher="exact"),
    "joint": KFAC(fisher="exact", bias="joint", savefield="joint"),
    "ekfac": EKFAC(fisher="exact", bias="joint"),
    "diagonal": DiagGGN(),
}


def small_net() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 1))
    x = torch.randn(6, 2, 4, 4)
    return Problem(model, (x,), nn.MSELoss(), torch.randn(6, 1)).to(torch.float64)


@pytest.fixture(params=EXTENSIONS)
def operator(request: pytest.FixtureRequest) -> BlockDiagonalOperator:
    problem, ext = small_net(), EXTENSIONS[request.param]
    extend(problem.model), extend(problem.loss_fn)
    with backpack(ext):
        problem.loss().backward()
    return BlockDiagonalOperator.of_parameters(problem.model.named_parameters(), ext.savefield)


def by_hand(H: BlockDiagonalOperator) -> Tensor:
    """The dense matrix from the blocks' dense forms."""
    offset, shapes = 0, {}
    for name, shape in H.shapes.items():
        shapes[name] = torch.arange(offset, offset + shape.numel()).reshape(shape)
        offset += shape.numel()
    M = torch.zeros(offset, offset, dtype=torch.float64)
    for key, block in H.blocks.items():
        place = shapes[key[0]].flatten()
        if len(key) == 2:  # a joint block's dense form follows [W | bias]
            W, b = shapes[key[0]], shapes[key[1]]
            place = torch.cat([W.reshape(len(b), -1), b[:, None]], 1).flatten()
        M[place[:, None], place[None, :]] = block.to_dense()
    return M


def close(actual, expected, tol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def test_order_is_that_of_the_parameters(operator: BlockDiagonalOperator):
    assert list(operator.names) == [name for name, _ in small_net().model.named_parameters()]
    v = torch.arange(float(operator.dim))
    model = small_net().model
    nn.utils.vector_to_parameters(v, model.parameters())
    named = {k: p.detach() for k, p in model.named_parameters()}
    close(operator.flatten(named), v)
    for name, t in operator.unflatten(v).items():
        close(t, named[name])


def test_matrix(operator: BlockDiagonalOperator):
    M = by_hand(operator)
    close(operator.to_dense(), M)
    close(operator.trace(), M.trace())
    close(operator.norm(), M.norm())
    close(operator.eigenvalues(), torch.linalg.eigvalsh(M))
    close(operator.diagonal(flat=True), M.diagonal())
    close(operator.flatten(operator.diagonal()), M.diagonal())
    close(operator.logdet(DELTA), torch.logdet(M + DELTA * torch.eye(len(M)).double()))


def test_products(operator: BlockDiagonalOperator):
    M, v = by_hand(operator), torch.randn(2, 3, operator.dim).double()
    damped = M + DELTA * torch.eye(len(M)).double()
    cases = (
        (operator.matvec, M),
        (lambda v: operator.solve(v, DELTA), torch.linalg.inv(damped)),
        (operator.inverse(DELTA).matvec, torch.linalg.inv(damped)),
        (operator.eigh().inverse(DELTA).matvec, torch.linalg.inv(damped)),
        ((operator + 2 * operator).matvec, 3 * M),
        (operator.to(dtype=torch.float64).power(2.0).matvec, M @ M),
    )
    for function, dense in cases:
        close(function(v), v @ dense)
        named = function(operator.unflatten(v))
        assert list(named) == list(operator.names)
        close(operator.flatten(named), v @ dense)


def test_one_damping_per_parameter(operator: BlockDiagonalOperator):
    dampings = {name: 0.1 * (k + 1) for k, name in enumerate(operator.names)}
    for key in operator.blocks:  # joint blocks take that of their first name
        dampings.update(dict.fromkeys(key, dampings[key[0]]))
    diagonal = operator.flatten(
        {
            name: torch.full(shape, dampings[name], dtype=torch.float64)
            for name, shape in operator.shapes.items()
        }
    )
    v = torch.randn(operator.dim).double()
    expected = torch.linalg.solve(by_hand(operator) + diagonal.diag(), v)
    close(operator.solve(v, dampings), expected)
    del dampings[operator.names[0]]
    with pytest.raises(ValueError, match=r"no damping for 0\.weight"):
        operator.solve(v, dampings)


def test_samples(operator: BlockDiagonalOperator):
    named = operator.sample(DELTA, (5,), torch.Generator().manual_seed(0))
    flat = operator.sample(DELTA, (5,), torch.Generator().manual_seed(0), flat=True)
    close(operator.flatten(named), flat)
    whitened = operator.power(0.5, DELTA).matvec(flat)  # the noise
    assert whitened.shape == (5, operator.dim) and 0.8 < whitened.std() < 1.2


def test_storage(operator: BlockDiagonalOperator):
    file = io.BytesIO()
    torch.save(operator.state_dict(), file)
    file.seek(0)
    again = BlockDiagonalOperator.from_state_dict(torch.load(file))
    close(again.to_dense(), operator.to_dense())
    assert again.names == operator.names


def test_scipy(operator: BlockDiagonalOperator):
    scipy = pytest.importorskip("scipy.sparse.linalg")
    found, M = operator.to_scipy(), by_hand(operator).numpy()
    assert isinstance(found, scipy.LinearOperator) and found.shape == M.shape
    v = torch.randn(operator.dim, 2).double().numpy()
    for product in (found @ v, found.T @ v, (found @ v[:, 0])[:, None]):
        close(torch.tensor(product), torch.tensor(M @ v)[:, : product.shape[1]])
    top = scipy.eigsh(found, k=1, return_eigenvectors=False)
    close(torch.tensor(top[0]), operator.eigenvalues()[-1])


def test_linear_operator(operator: BlockDiagonalOperator):
    package = pytest.importorskip("linear_operator")
    found, M = operator.to_linear_operator(), by_hand(operator)
    assert isinstance(found, package.LinearOperator) and found.shape == M.shape
    close(found.to_dense(), M)
    close((found @ torch.randn(operator.dim, 2).double()).shape, torch.Size([operator.dim, 2]))
    v = torch.randn(operator.dim, 2).double()
    close(found @ v, M @ v)
    close(found.mT @ v, M @ v)


def test_the_exact_block_of_a_linear_network():
    """One layer, squared error: KFAC is exact, so the operator is the Hessian."""
    torch.manual_seed(0)
    problem = Problem(nn.Linear(3, 2), (torch.randn(5, 3),), nn.MSELoss(), torch.randn(5, 2))
    problem.to(torch.float64)
    exact = ggn_block(problem, ["weight", "bias"])
    extend(problem.model), extend(problem.loss_fn)
    with backpack(KFAC(fisher="exact", bias="joint")):
        problem.loss().backward()
    H = BlockDiagonalOperator.of_parameters(problem.model.named_parameters(), "kfac")
    close(H.to_dense(), exact)


def test_frozen_and_uncovered_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    model[1].weight.q, model[1].bias.q = torch.ones(1, 2), torch.ones(1)
    assert BlockDiagonalOperator.of_parameters(model.named_parameters(), "q").names == (
        "1.weight",
        "1.bias",
    )
    model[1].bias.q = torch.ones(3)
    with pytest.raises(ValueError, match=r"parameter 1\.bias has no block in \.q \(found Tensor\)"):
        BlockDiagonalOperator.of_parameters(model.named_parameters(), "q")
    del model[1].bias.q
    with pytest.raises(ValueError, match=r"1\.bias has no block in \.q \(found NoneType\)"):
        BlockDiagonalOperator.of_parameters(model.named_parameters(), "q")


def test_wrong_use():
    d = DiagonalBlock(torch.ones(2))
    H = BlockDiagonalOperator({"a": d, "b": d})
    assert H["a"] is d
    with pytest.raises(KeyError, match="no block for 'c'; there are blocks for a, b"):
        H["c"]
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \['c'\]"):
        H.matvec({"a": torch.ones(2), "c": torch.ones(2)})
    with pytest.raises(ValueError, match="expected flat vectors of 4 entries, got shape"):
        H.matvec(torch.ones(5))
    with pytest.raises(ValueError, match=r"block of b: .*DiagonalBlock\.power: the matrix is singular"):
        BlockDiagonalOperator({"a": d, "b": DiagonalBlock(torch.zeros(2))}).inverse()
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonalOperator({})
    with pytest.raises(ValueError, match="each parameter in one block"):
        BlockDiagonalOperator({"a": d, ("a",): d}, ["a", "b"])
    with pytest.raises(ValueError, match=r"acts on 2 parameter\(s\)"):
        BlockDiagonalOperator({"a": Kronecker(torch.eye(1), torch.eye(2), joint=True)})
    with pytest.raises(ValueError, match=r"\+ needs equal names"):
        H + BlockDiagonalOperator({"a": d})
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        H.inverse(-1.0)


def test_a_large_operator_has_no_dense_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("curvature.block.MAX_DENSE", 3)
    H = BlockDiagonalOperator({"a": DiagonalBlock(torch.ones(4))})
    with pytest.raises(ValueError, match=r"BlockDiagonalOperator\.to_dense needs the dense matrix"):
        H.to_dense()


def test_all_kinds_of_inverses(operator: BlockDiagonalOperator):
    for method in ("factored", "cholesky"):
        inverse = operator.inverse(DELTA, method=method)
        for key, block in operator.blocks.items():
            assert inverse.blocks[key].shapes == block.shapes
    with pytest.raises(ValueError, match=r"block of 0\.weight.*method='lu'"):
        operator.inverse(DELTA, method="lu")


def test_sums_keep_their_order():
    a, b = DiagonalBlock(torch.ones(2)), DiagonalBlock(torch.zeros(1))
    H = BlockDiagonalOperator({"a": a, "b": b}, ["b", "a"])
    for total in (H + H, 2 * H, H.inverse(1.0), H.to(dtype=torch.float64)):
        assert total.names == ("b", "a") and total.diagonal(flat=True)[0] in (0, 1)
    with pytest.raises(TypeError, match="block of a"):
        H + BlockDiagonalOperator({"a": DenseBlock(torch.eye(2)), "b": b}, ["b", "a"])


def test_dampings_of_unknown_names():
    joint = Kronecker(torch.eye(2), torch.eye(3), joint=True)
    H = BlockDiagonalOperator({("w", "b"): joint})
    with pytest.raises(ValueError, match="unknown names typo"):
        H.inverse({"w": 0.1, "typo": 1.0})
    with pytest.raises(ValueError, match="are one block and have one damping"):
        H.inverse({"w": 0.1, "b": 1.0})
    H.inverse({"w": 0.1, "b": 0.1})


def test_a_gradient_is_no_curvature():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"no block in \.grad"):
        BlockDiagonalOperator.of_parameters([("w", w)], "grad")


def test_unusual_numpy_arrays():
    pytest.importorskip("scipy")
    H = BlockDiagonalOperator({"a": DiagonalBlock(torch.tensor([1.0, 2.0]).requires_grad_())})
    v = torch.tensor([3.0, 4.0]).numpy()
    assert (H.to_scipy() @ v[::-1]).tolist() == [4.0, 6.0]
    with pytest.raises(TypeError, match="the operator is real"):
        H.to_scipy() @ (1j * v)


def test_models_with_norms():
    """EKFAC in the bases of KFAC, as the README says; norms have dense blocks."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double())
    loss_fn, x, y = extend(nn.CrossEntropyLoss()), torch.randn(5, 3).double(), torch.randint(2, (5,))
    with backpack(KFAC(fisher="exact")):
        loss_fn(model(x), y).backward()
    with backpack(EKFAC(fisher="exact", basis={p: p.kfac for p in model.parameters()})):
        loss_fn(model(x), y).backward()
    H = BlockDiagonalOperator.of_parameters(model.named_parameters(), "ekfac")
    close(
        H.solve(torch.ones(H.dim).double(), 0.1),
        torch.linalg.solve(by_hand(H) + 0.1 * torch.eye(H.dim).double(), torch.ones(H.dim).double()),
    )


def test_linear_operators_diagonal(operator: BlockDiagonalOperator):
    pytest.importorskip("linear_operator")
    close(operator.to_linear_operator().diagonal(), by_hand(operator).diagonal())
