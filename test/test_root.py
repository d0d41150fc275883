"""Factors of low rank, kept as the rows that they are the second moment of."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from oracle import close
from torch import Tensor, nn
from torch import distributed as dist

from backpack_ext import KFAC, backpack, extend
from backpack_ext.dataset import collect
from curvature import Axes, Kronecker, KroneckerSum, Root, block_from_state_dict

DELTA = 0.3
GROUPS = pytest.mark.parametrize("groups", [1, 3])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def pair(groups: int, r: int = 2, joint: bool = False, rows: float = 1.0) -> tuple[Kronecker, Kronecker]:
    """Return a block with a root of r rows, and the same with A formed; i = 5, o = 4."""
    lead = (groups,) if groups > 1 else ()
    R, C = normal(*lead, r, 5), normal(*lead, 4, 6)
    axes = Axes("(g o) i -> g o i", (("g", groups),))
    options = {"axes": axes, "groups": groups, "joint": joint, "rows": rows}
    B = C @ C.mT
    return Kronecker(B, Root(R), **options), Kronecker(B, R.mT @ R, **options)


def pair_of_roots(groups: int, r: int = 2, joint: bool = False) -> tuple[Kronecker, Kronecker]:
    """Return a block with two roots, and the same with its factors formed; i = 5, o = 4."""
    K, L = pair(groups, r, joint)
    C = normal(*K.B.shape[:-2], 3, 4)
    return K.replaced(B_rows=C, A_rows=K.roots["A"].rows), L.replaced(B=C.mT @ C, A=L.A)


@GROUPS
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("make", [pair, pair_of_roots])
def test_algebra(groups: int, joint: bool, make: Callable):
    torch.manual_seed(0)
    K, L = make(groups, joint=joint)
    roots = set(K.roots)
    assert roots == ({"A"} if make is pair else {"A", "B"}) and not L.roots
    assert K.shapes == L.shapes and K.sizes == L.sizes and K.dtype == torch.float64
    vectors = [normal(2, *shape) for shape in K.shapes]
    flat = lambda parts: parts if isinstance(parts, tuple) else (parts,)  # noqa: E731
    for mine, theirs in (
        (K.matvec(*vectors), L.matvec(*vectors)),
        (K.diagonal(), L.diagonal()),
        ((2 * K).transpose().matvec(*vectors), (2 * L).matvec(*vectors)),
        (K.solve(*vectors, damping=DELTA), L.solve(*vectors, damping=DELTA)),
    ):
        for one, two in zip(flat(mine), flat(theirs), strict=True):
            close(one, two)
    for mine, theirs in (
        (K.to_dense(), L.to_dense()),
        (K.trace(), L.trace()),
        (K.norm(), L.norm()),
        (K.pi(), L.pi()),
        *((one.inner(two), L.inner(L)) for one, two in ((K, L), (L, K), (K, K))),
        (K.logdet(DELTA), L.logdet(DELTA)),
        (K.power(0.5, DELTA).to_dense(), L.power(0.5, DELTA).to_dense()),
        ((K * -2.0).to_dense(), (L * -2.0).to_dense()),
        ((K * torch.tensor(3.0)).to_dense(), (L * 3.0).to_dense()),
    ):
        close(mine, theirs)
    assert set(K.roots) == roots  # nothing of this has shown a factor
    for mine, theirs in zip(K, L, strict=True):
        close(mine, theirs)
    assert not K.roots
    assert float((K.eigenvalues() - L.eigenvalues()).abs().max()) < 1e-10


@GROUPS
@pytest.mark.parametrize("method", ["factored", "cholesky"])
@pytest.mark.parametrize("r", [2, 7])
def test_damped_inverse(groups: int, method: str, r: int):
    torch.manual_seed(0)
    K, L = pair(groups, r)
    inverse, expected = K.inverse(DELTA, method), L.inverse(DELTA, method)
    assert set(inverse.roots) == {"A"}
    close(inverse.to_dense(), expected.to_dense())
    v = normal(*K.shapes[0])
    close(inverse.matvec(v), expected.matvec(v))
    close(inverse.diagonal(), expected.diagonal())
    close(inverse.norm(), expected.norm())
    for one, two in ((inverse, inverse), (inverse, K), (K, inverse), (L, inverse)):
        close(one.inner(two), expected.inner(expected if one is two else L))
    close(inverse.eigenvalues(), expected.eigenvalues())
    # and back
    close(inverse.inverse().to_dense(), expected.inverse().to_dense())


def test_damped_inverse_in_float32():
    """Errors are relative to the inverse's norm."""
    torch.manual_seed(0)
    rows = torch.randn(20, 300)
    found = Root(rows).inverse(torch.tensor(0.1)).dense().double()
    expected = torch.linalg.inv(rows.double().T @ rows.double() + 0.1 * torch.eye(300))
    assert float((found - expected).abs().max()) < 1e-5 * float(torch.linalg.matrix_norm(expected, 2))


def test_a_singular_factor_needs_damping():
    K, _ = pair(1)
    for method in ("exact", "factored", "cholesky"):
        with pytest.raises(ValueError, match="factor A"):
            K.inverse(method=method)


@GROUPS
def test_sums_and_moving_averages(groups: int):
    torch.manual_seed(0)
    (K, k), (L, l) = pair(groups, rows=2), pair(groups, rows=5)
    both = K + L
    assert both.roots["A"].rows.shape[-2] == 4 and both.rows == 7
    close(both.to_dense(), (k + l).to_dense())
    more = both + K  # six rows of five entries: formed
    assert not more.roots
    close(more.to_dense(), (k + l + k).to_dense())
    close((K + l).to_dense(), (k + l).to_dense())
    close((k + L).to_dense(), (k + l).to_dense())
    for weight in (0.2, -0.5):
        close(K.lerp(L, weight).to_dense(), k.lerp(l, weight).to_dense())
    assert "A" in K.lerp(L, 0.2).roots
    close(KroneckerSum((K, L)).clone().to_dense(), k.to_dense() + l.to_dense())


@GROUPS
def test_storage(groups: int):
    torch.manual_seed(0)
    K, _ = pair(groups)
    for block in (K, K.inverse(DELTA, "cholesky")):
        file = io.BytesIO()
        torch.save(block.state_dict(), file)
        file.seek(0)
        again = block_from_state_dict(torch.load(file))
        assert set(again.roots) == {"A"}
        close(again.to_dense(), block.to_dense())
        assert again.to(dtype=torch.float32).A.dtype == torch.float32
        copied = block.clone()
        copied.roots["A"].rows.zero_()
        assert float(block.roots["A"].rows.abs().max()) > 0


def test_groups_are_joined():
    torch.manual_seed(0)
    blocks = [pair(1, r)[0] for r in (2, 2, 3)]
    axes = Axes("(g o) i -> g o i", (("g", 2),))
    for chosen, roots in ((blocks[:2], {"A"}), (blocks[1:], set())):
        joined = Kronecker.of_groups(chosen, axes)
        assert set(joined.roots) == roots
        close(joined.to_dense(), torch.block_diag(*(b.to_dense() for b in chosen)))


@pytest.mark.parametrize("rows, shift", [((5,), None), ((2, 5), (2,)), ((3, 2, 5), ())])
def test_wrong_shapes(rows: tuple, shift: tuple | None):
    with pytest.raises(ValueError, match=r"expected \[r, i\] or \[g, r, i\]"):
        Root(normal(*rows), None if shift is None else normal(*shift))


def test_rows_that_are_not_finite():
    rows = normal(2, 5)
    rows[0, 1] = float("nan")
    for method in ("exact", "cholesky"):
        with pytest.raises(ValueError, match="1 entries"):
            Kronecker(torch.eye(4).double(), Root(rows)).inverse(DELTA, method)


# -- KFAC ------------------------------------------------------------------------------------------


def network() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layers = (
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()),
        *(nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 7), nn.Linear(7, 3)),
    )
    return extend(nn.Sequential(*layers).double()), extend(nn.CrossEntropyLoss())


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_kfac_keeps_roots(approx: str, bias: str):
    """Layers of equal shape, in single products, included."""
    model, loss_fn = network()
    x, y = normal(4, 2, 5, 5), torch.randint(3, (4,))
    extensions = [KFAC(approx, "exact", bias=bias, keep=k, savefield=k) for k in ("factor", "root")]
    with backpack(*extensions):
        loss_fn(model(x), y).backward()
    roots = 0
    for p in model.parameters():
        close(p.root.to_dense(), p.factor.to_dense())
        assert not p.factor.roots
        few = p.dim() > 1 and (approx == "reduce" or p.dim() == 2) and p.factor.sizes[2] > 4
        if p.dim() > 1:
            assert ("A" in p.root.roots) == few
            roots += few
        B, A = p.root
        close(A, p.factor.A)
        close(B, p.factor.B)
    assert roots >= (6 if approx == "reduce" else 4)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_kfac_keeps_both_factors(approx: str, fisher: str):
    """Few vectors: B is their second moment, on the scale of B, in chunks of columns too."""
    model, loss_fn = network()
    x, y = normal(4, 2, 5, 5), torch.randint(3, (4,))
    extensions = [
        KFAC(approx, fisher, keep=k, savefield=k, generator=torch.Generator().manual_seed(1))
        for k in ("factor", "root")
    ]
    with backpack(*extensions):
        (0.5 * loss_fn(model(x), y)).backward()
    few = [p for k in (4, 6, 8) for p in model[k].parameters()]  # four data, seven outputs
    assert all("B" in p.root.roots for p in few)
    for p in model.parameters():
        close(p.root.to_dense(), p.factor.to_dense())
        close((3.0 * p.root + p.root).to_dense(), (3.0 * p.factor + p.factor).to_dense())
        for one, two in zip(p.root, p.factor, strict=True):
            close(one, two)


def test_what_is_done_to_a_factor_counts():
    """As for factors that are tensors: a root that has been seen is no longer used."""
    model, loss_fn = network()
    with backpack(KFAC("reduce", "empirical"), KFAC("reduce", "empirical", savefield="copy")):
        loss_fn(model(normal(4, 2, 5, 5)), torch.randint(3, (4,))).backward()
    weight, bias = model[4].weight, model[4].bias
    V, v = normal(7, 36), normal(7)
    assert set(weight.kfac.roots) == {"A", "B"} and "B" in bias.kfac.roots
    B, A = weight.kfac
    for factor in (B, A):
        factor.diagonal().add_(DELTA)
    close(weight.kfac.matvec(V), B @ V @ A)
    close(bias.kfac.matvec(v), B @ v)  # weight and bias have one B
    close(weight.kfac.trace(), B.trace() * A.trace())
    K = weight.kfac
    for block in (K.clone(), copy.deepcopy(K), pickle.loads(pickle.dumps(K))):
        close(block.matvec(V), B @ V @ A)
    assert weight.copy.roots  # another extension's result has memory of its own
    assert float((weight.copy.B - B).abs().max()) > DELTA / 2


def test_rows_are_copies():
    """What becomes of activations and gradients after the pass changes no factor."""
    model, loss_fn = nn.Linear(9, 7).double(), extend(nn.CrossEntropyLoss(reduction="sum"))
    extend(model)
    x, y = normal(3, 9), torch.randint(7, (3,))
    with backpack(KFAC(fisher="empirical")):
        logits = model(x)
        logits.retain_grad()
        loss_fn(logits, y).backward()
    G = logits.detach().softmax(1) - nn.functional.one_hot(y, 7)
    A, B = x.T @ x / 3, G.T @ G
    logits.grad.zero_()
    x.zero_()
    close(model.weight.kfac.B, B)
    close(model.weight.kfac.A, A)


def test_no_rows():
    K = Kronecker(Root(normal(0, 3)), Root(normal(0, 2)))
    assert torch.equal(K.eigenvalues(), torch.zeros(6).double()) and K.norm() == 0
    close(K.inverse(4.0, "cholesky").to_dense(), torch.eye(6).double() / 4)


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_batches_add_rows_until_the_factor_is_no_larger(bias: str):
    model, loss_fn = network()
    x, y = normal(9, 2, 5, 5), torch.randint(3, (9,))
    found = []
    for keep in ("factor", "root"):
        batches = [(x[:4], y[:4]), (x[4:6], y[4:6]), (x[6:], y[6:])]
        extension = KFAC("reduce", "exact", bias=bias, keep=keep)
        found.append(collect(model, loss_fn, batches, extension, progress=False)["kfac"])
    for one, two in zip(*(result.values() for result in found), strict=True):
        close(one.to_dense(), two.to_dense())
    assert "A" in found[1]["4.weight"].roots  # 9 rows of 36
    assert "A" not in found[1]["6.weight"].roots  # 9 rows of 7


def test_over_processes_the_factor_is_formed(tmp_path):
    model, loss_fn = network()
    x, y = normal(4, 2, 5, 5), torch.randint(3, (4,))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for bias in ("joint", "separate"):
            extensions = [
                KFAC("reduce", "exact", bias=bias, keep=k, savefield=k) for k in ("factor", "root")
            ]
            with backpack(*extensions, process_group=dist.group.WORLD):
                loss_fn(model(x), y).backward()
            for p in model.parameters():
                assert not p.root.roots
                close(p.root.to_dense(), p.factor.to_dense())
    finally:
        dist.destroy_process_group()


def test_autocast_does_not_round():
    torch.manual_seed(0)
    K = Kronecker(torch.eye(3), Root(torch.randn(4, 9)))
    results = lambda: (K.clone().A, K.inverse(DELTA, "cholesky").to_dense(), K.norm())  # noqa: E731
    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        for one, two in zip(results(), expected, strict=True):
            assert torch.equal(one, two)


def test_unknown_way_to_keep_a_factor():
    with pytest.raises(ValueError, match="keep='rows'; expected one of"):
        KFAC(keep="rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_data_type_of_factors(dtype: torch.dtype):
    """That which was asked for, whether they are kept as rows or not: batches are added."""
    model, loss_fn = network()
    with backpack(*(KFAC("reduce", "mc", dtype=dtype, keep=k, savefield=k) for k in ("root", "factor"))):
        loss_fn(model(normal(4, 2, 5, 5)), torch.randint(3, (4,))).backward()
    for p in model.parameters():
        assert {t.dtype for K in (p.root, p.factor, p.root + p.root) for t in K} == {dtype}
        p.root.A.mul_(0)
        assert p.root.A.norm() == p.root.trace() == 0  # what is done to a factor counts


def test_rows_count_until_a_factor_has_been_shown():
    """Nothing that was formed on the way is used in their place."""
    K, L = pair(1)
    K.inner(L), K.norm(), K.power(0.5, DELTA), K.numerators()
    K.roots["A"].rows.mul_(2)
    close(K.power(1.0, DELTA).to_dense(), (4 * L).power(1.0, DELTA).to_dense())
    close(K.A, 4 * L.A)


def test_norm_in_half_precision():
    rows = torch.tensor([[3.0, 4.0], [60.0, -45.0]], dtype=torch.float16)
    expected = (rows.double().T @ rows.double()).norm()
    assert abs(float(Root(64 * rows).norm()) / (64**2 * float(expected)) - 1) < 1e-6
