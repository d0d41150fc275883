"""Factors of low rank, kept as the rows that they are the second moment of."""

import io

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


@GROUPS
@pytest.mark.parametrize("joint", [False, True])
def test_algebra(groups: int, joint: bool):
    torch.manual_seed(0)
    K, L = pair(groups, joint=joint)
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
        (K.inner(L), L.inner(L)),
        (K.logdet(DELTA), L.logdet(DELTA)),
        (K.power(0.5, DELTA).to_dense(), L.power(0.5, DELTA).to_dense()),
        *zip(K, L, strict=True),
    ):
        close(mine, theirs)
    assert float((K.eigenvalues() - L.eigenvalues()).abs().max()) < 1e-10


@GROUPS
@pytest.mark.parametrize("method", ["factored", "cholesky"])
@pytest.mark.parametrize("r", [2, 7])
def test_damped_inverse(groups: int, method: str, r: int):
    torch.manual_seed(0)
    K, L = pair(groups, r)
    inverse, expected = K.inverse(DELTA, method), L.inverse(DELTA, method)
    assert isinstance(inverse.A, Root)
    close(inverse.to_dense(), expected.to_dense())
    v = normal(*K.shapes[0])
    close(inverse.matvec(v), expected.matvec(v))
    close(inverse.diagonal(), expected.diagonal())
    close(inverse.norm(), expected.norm())
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
    L, l = (Kronecker(b.B, b.A, K.axes, groups, rows=5) for b in (L, l))
    both = K + L
    assert isinstance(both.A, Root) and both.A.rows.shape[-2] == 4 and both.rows == 7
    close(both.to_dense(), (k + l).to_dense())
    more = both + K  # six rows of five entries: formed
    assert isinstance(more.A, Tensor)
    close(more.to_dense(), (k + l + k).to_dense())
    close((K + l).to_dense(), (k + l).to_dense())
    close((k + L).to_dense(), (k + l).to_dense())
    for weight in (0.2, -0.5):
        close(K.lerp(L, weight).to_dense(), k.lerp(l, weight).to_dense())
    assert isinstance(K.lerp(L, 0.2).A, Root)
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
        assert isinstance(again.A, Root)
        close(again.to_dense(), block.to_dense())
        assert again.to(dtype=torch.float32).A.dtype == torch.float32
        copied = block.clone()
        copied.A.rows.zero_()
        assert float(block.A.rows.abs().max()) > 0


def test_groups_are_joined():
    torch.manual_seed(0)
    blocks = [pair(1, r)[0] for r in (2, 2, 3)]
    axes = Axes("(g o) i -> g o i", (("g", 2),))
    for chosen, kind in ((blocks[:2], Root), (blocks[1:], Tensor)):
        joined = Kronecker.of_groups(chosen, axes)
        assert isinstance(joined.A, kind)
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
        assert isinstance(p.factor.A, Tensor)
        B, A = p.root
        close(A, p.factor.A)
        close(B, p.factor.B)
        few = p.dim() > 1 and (approx == "reduce" or p.dim() == 2) and p.factor.sizes[2] > 4
        if p.dim() > 1:
            assert isinstance(p.root.A, Root) == few
            roots += few
    assert roots >= (6 if approx == "reduce" else 4)


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
    kinds = {name: type(block.A) for name, block in found[1].items() if "weight" in name}
    assert kinds["4.weight"] is Root  # 9 rows of 36
    assert kinds["6.weight"] is Tensor  # 9 rows of 7


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
                assert isinstance(p.root.A, Tensor)
                close(p.root.to_dense(), p.factor.to_dense())
    finally:
        dist.destroy_process_group()


def test_autocast_does_not_round():
    torch.manual_seed(0)
    K = Kronecker(torch.eye(3), Root(torch.randn(4, 9)))
    results = lambda: (K.clone().A.dense(), K.inverse(DELTA, "cholesky").to_dense(), K.norm())  # noqa: E731
    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        for one, two in zip(results(), expected, strict=True):
            assert torch.equal(one, two)


def test_unknown_way_to_keep_a_factor():
    with pytest.raises(ValueError, match="keep='rows'; expected one of"):
        KFAC(keep="rows")
