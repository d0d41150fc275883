"""Symmetric products by halves, by NumPy and by Triton's kernel; Linear layers copy nothing."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from backpack_ext import KFAC, backpack, extend
from backpack_ext.pending import Pending
from benchmarks.symmetric import main as benchmark
from curvature import openblas, panels, use_triton
from curvature.panels import halves, symmetric_product
from curvature.switches import triton_enabled

SHAPES = [(1, 1), (16, 3), (17, 9), (33, 70), (64, 5), (130, 31)]


def expected(S, scale=1.0):
    """The product, entry by entry in float64."""
    return scale * torch.einsum("...ir,...jr->...ij", S.double(), S.double())


def close(actual, wanted, tolerance):
    scale = max(wanted.abs().max().item(), 1e-300)
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance * scale)


@pytest.fixture
def tiny(monkeypatch):
    """Small products take the routes of large ones."""
    routes = {"ROWS": 17, "COLUMNS": 1, "HALVED": 1, "LEAF": 16, "NUMPY": 0, "ASPECT": 10**9}
    for name, value in routes.items():
        monkeypatch.setattr(panels, name, value)


@pytest.fixture
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(openblas, "_get_threads", lambda: lambda: 1)
    yield
    torch.set_num_threads(before)


def layouts(d, r, dtype=torch.float64):
    """The same shape in all layouts of memory."""
    torch.manual_seed(0)
    yield torch.randn(d, r).to(dtype)
    yield torch.randn(r, d).to(dtype).mT
    yield torch.randn(d + 3, r + 2).to(dtype)[2:-1, 1:-1]
    yield torch.randn(r, 2 * d).to(dtype).mT[::2]
    yield torch.randn(2, 3, d, r).to(dtype)
    yield torch.randn(d, 1).to(dtype).expand(d, r)


@pytest.mark.parametrize(("d", "r"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_halves(tiny, monkeypatch, d, r, scale):
    monkeypatch.setattr(openblas, "can_take", lambda S: False)
    for S in layouts(d, r):
        found = symmetric_product(S, scale)
        close(found, expected(S, scale), 1e-14)
        # halves mirror one another; the blocks on the diagonal are torch's products
        close(found, found.mT.double(), 1e-14)


@pytest.mark.parametrize(("d", "r"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy(tiny, one_thread, monkeypatch, d, r, dtype):
    pytest.importorskip("numpy")
    taken, product = [], openblas.product
    monkeypatch.setattr(openblas, "product", lambda *a: (taken.append(len(a)), product(*a)))
    for S in layouts(d, r, dtype):
        found = symmetric_product(S, 0.3)
        close(found, expected(S, 0.3), 1e-14 if dtype == torch.float64 else 1e-5)
    assert len(taken) >= 3 if d >= 17 else not taken


def test_numpy_writes_into_a_larger_matrix():
    pytest.importorskip("numpy")
    S, room = torch.randn(9, 4).double(), torch.zeros(12, 12).double()
    openblas.product(S, room[1:10, 1:10], 2.0)
    close(room[1:10, 1:10], expected(S, 2.0), 1e-14)
    assert room.count_nonzero() == 81


def test_numpy_is_taken_on_one_thread_only(one_thread, monkeypatch):
    S = torch.randn(512, 512)
    assert panels.numpy_pays(S)
    assert panels.numpy_pays(S.mT)
    assert not panels.numpy_pays(S[:64])  # too small
    assert not panels.numpy_pays(torch.randn(64, 4000).mT)  # too many rows
    assert not panels.numpy_pays(S.bfloat16())
    assert not panels.numpy_pays(S[:, ::2])  # NumPy would copy it
    needs_grad = S.clone().requires_grad_()
    assert not panels.numpy_pays(needs_grad)
    with torch.no_grad():
        assert panels.numpy_pays(needs_grad)
    monkeypatch.setattr(openblas, "_get_threads", lambda: lambda: 2)
    assert not panels.numpy_pays(S)
    monkeypatch.setattr(openblas, "_get_threads", lambda: None)
    assert not panels.numpy_pays(S)
    monkeypatch.setattr(openblas, "_get_threads", lambda: lambda: 1)
    torch.set_num_threads(2)
    assert not panels.numpy_pays(S)


def test_openblas_tells_its_threads():
    """In a process of its own, in which both libraries are told to use one thread."""
    numpy = pytest.importorskip("numpy")
    if "openblas" not in str(numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]):
        pytest.skip("NumPy uses another library")
    code = "from curvature import openblas; print(openblas.single_threaded(), openblas._get_threads()())"
    for count in ("1", "2"):
        run = _python("-c", code, OMP_NUM_THREADS=count, OPENBLAS_NUM_THREADS=count)
        assert run.returncode == 0, run.stderr
        if count == "1" or (os.cpu_count() or 1) > 1:
            assert run.stdout.split() == [str(count == "1"), count]


def test_half_of_the_multiplications(monkeypatch):
    """Of 1024 x 512, in blocks down to 256, (1 + 1/4) / 2 remain."""
    counted, addmm = [], torch.addmm

    def counting(base, a, b, **options):
        counted.append(a.shape[0] * a.shape[1] * b.shape[1])
        return addmm(base, a, b, **options)

    monkeypatch.setattr(torch, "addmm", counting)
    S = torch.randn(1024, 512)
    halves(S, torch.empty(1024, 1024))
    assert sum(counted) == (1 + 1 / 4) / 2 * 1024 * 1024 * 512


def test_thresholds_count_threads(monkeypatch):
    """The work of a product that is halved grows with the threads that share it."""
    for threads, halved in ((1, True), (2, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert panels.is_halved(2048, 1024)
        assert panels.is_halved(512, 128) is halved
        assert not panels.is_halved(2048, 64)
        assert not panels.is_halved(128, 10**6)


def test_benchmark(tmp_path):
    found = benchmark(
        ["--quick", "--threads", "1", "--sizes", "40x30", "300x260", "--out", str(tmp_path)]
    )
    assert [p["size"] for p in found["problems"]] == [[40, 30], [300, 260]]
    for problem in found["problems"]:
        for row in problem["rows"]:
            assert row["fast"].keys() == {"plain", "chosen", "halves", "panels", "numpy"}
            assert row["fast"]["plain"] == 1
    assert (tmp_path / "symmetric-cpu-1-thread-quick.json").exists()


# --------------------------------------------------------------------------- Triton


def _python(*args, **environment):
    root = Path(__file__).parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton():
    """On GPU if there is one; else in Triton's interpreter, which a process has to begin with."""
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = _python("-m", "pytest", "-q", "test/triton_cases.py", **environment)
    assert run.returncode == 0, run.stdout + run.stderr


def test_use_triton(monkeypatch):
    assert not triton_enabled()
    monkeypatch.setattr("curvature.switches.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="not installed"):
        use_triton()
    assert not triton_enabled()
    monkeypatch.setattr("curvature.switches.find_spec", lambda name: object())
    with use_triton():
        assert triton_enabled()
        with use_triton(False):
            assert not triton_enabled()
        assert triton_enabled()
        # on CPU it changes nothing
        S = torch.randn(3, 2).double()
        close(symmetric_product(S), expected(S), 1e-14)
    assert not triton_enabled()
    try:
        use_triton(True)
        assert triton_enabled()
    finally:
        use_triton(False)


# --------------------------------------------------------------------------- Linear copies nothing

N, POSITIONS, IN, HIDDEN, OUT = 16, 40, 64, 64, 48


def _counted(found: Counter, name: str, function, *args, **options):
    out = function(*args, **options)
    found[name, out.numel()] += 1
    return out


def _copies(monkeypatch, step) -> Counter:
    """Count copies of tensors, by kind and size, in any thread."""
    found = Counter()
    with monkeypatch.context() as patched:
        for name in ("cat", "stack"):  # whose operands the profiler does not show
            patched.setattr(torch, name, partial(_counted, found, name, getattr(torch, name)))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            step()
    for event in recorded.events():
        if event.name in ("aten::copy_", "aten::clone"):
            found[event.name, torch.Size(event.input_shapes[0]).numel()] += 1
    return found


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("positions", [(), (POSITIONS,)])
def test_linear_expand_copies_neither_inputs_nor_vectors(monkeypatch, bias, fisher, positions):
    """Also of layers of equal shape, unless they are small."""
    torch.manual_seed(0)
    rows = N * POSITIONS
    x = torch.randn(N if positions else rows, *positions, IN)
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, OUT))
    assert rows * (IN + HIDDEN) > Pending.SMALL
    loss, y = extend(nn.MSELoss()), torch.randn(*x.shape[:-1], OUT)
    model = extend(model)

    def plain():
        loss(model(x), y).backward()

    def kfac():
        with backpack(KFAC(bias=bias, fisher=fisher)):
            plain()

    kfac()
    added = _copies(monkeypatch, kfac) - _copies(monkeypatch, plain)
    large = {copy: count for copy, count in added.items() if copy[1] >= rows * min(IN, HIDDEN, OUT)}
    assert not large
    B, A = model[0].weight.kfac
    a = x.reshape(rows, IN)
    a = torch.cat([a, torch.ones(rows, 1)], 1) if bias == "joint" else a
    torch.testing.assert_close(A, a.mT @ a / rows)
    assert B.shape == (HIDDEN, HIDDEN)


def test_copies_are_seen(monkeypatch):
    """What the test above counts."""
    x = torch.randn(3, 5)
    found = _copies(monkeypatch, lambda: (x.clone(), x.mT.contiguous(), torch.cat([x, x])))
    assert found["aten::copy_", 15] >= 2
    assert found["cat", 30] == 1


def test_derivatives_are_followed():
    """In either direction and under transforms, whatever the size."""
    from torch.autograd import forward_ad

    torch.manual_seed(0)
    S, T = torch.randn(2, 600, 200).double()
    expected = T @ S.T + S @ T.T
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            with forward_ad.dual_level():
                found = symmetric_product(forward_ad.make_dual(S, T))
                assert torch.allclose(forward_ad.unpack_dual(found).tangent, expected)
            assert torch.allclose(torch.func.jvp(symmetric_product, (S,), (T,))[1], expected)
            leaf = S.clone().requires_grad_()
            symmetric_product(leaf).sum().backward()
            assert torch.allclose(leaf.grad, 2 * S.sum(0).expand_as(S))
        finally:
            torch.set_num_threads(threads)
