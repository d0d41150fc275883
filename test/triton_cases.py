"""What test_symmetric.py runs with a GPU, or in Triton's interpreter: the kernel against products."""

import pytest
import torch

from curvature import triton_gram, use_triton
from curvature.panels import symmetric_product
from curvature.triton_gram import gram

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (3, 5), (70, 64), (33, 65), (32, 130), (5, 200)]


def close(actual, x, scale, tolerance):
    x = x.double()
    wanted = scale * torch.einsum("...ri,...rj->...ij", x, x)
    torch.testing.assert_close(
        actual.double(), wanted, rtol=0, atol=tolerance * wanted.abs().max().item()
    )


@pytest.fixture(autouse=True)
def precise():
    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", triton_gram.DTYPES)
@pytest.mark.parametrize(("r", "d"), SHAPES)
def test_layouts(dtype, r, d):
    for x in (
        torch.randn(r, d),
        torch.randn(d, r).mT,
        torch.randn(2 * r, d + 3)[::2, 1:-2],
        torch.randn(r, 3 * d)[:, ::3],
        torch.randn(3, r, d),
        torch.randn(r, 2, d).transpose(0, 1),
        torch.randn(2, 2, d, r).mT,
        torch.randn(r, 1).expand(r, d),
    ):
        x = x.to(DEVICE, dtype)
        found = gram(x, 0.3)
        assert found.dtype == torch.float32
        assert torch.equal(found, found.mT)
        close(found, x, 0.3, 3e-6)


@pytest.mark.parametrize("d", [2048, 2100])
def test_large_tiles(d):
    x = torch.randn(3, d, device=DEVICE)
    found = gram(x)
    assert torch.equal(found, found.mT)
    close(found, x, 1.0, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_type_of_the_result(dtype):
    x = torch.randn(20, 70, device=DEVICE).to(dtype)
    found = gram(x, 2.0, dtype)
    assert found.dtype == dtype
    close(found, x, 2.0, 1e-2)


def test_sums_in_float32():
    """4096 ones: from 256 on (2048 in float16) a sum in half a type would not grow any more."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(4096, 2, dtype=dtype, device=DEVICE)
        assert torch.equal(gram(x), torch.full((2, 2), 4096.0, device=DEVICE))


def test_rounding_follows_torch():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert triton_gram._precision(torch.float32) == "tf32"
    assert triton_gram._precision(torch.bfloat16) == "ieee"
    x = torch.randn(40, 70, device=DEVICE)
    close(gram(x), x, 1.0, 2e-3)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert triton_gram._precision(torch.float32) == "ieee"


def test_empty():
    assert gram(torch.zeros(3, 0, device=DEVICE)).shape == (0, 0)
    assert gram(torch.zeros(0, 3, 2, device=DEVICE)).shape == (0, 2, 2)
    assert torch.equal(gram(torch.zeros(0, 3, device=DEVICE)), torch.zeros(3, 3, device=DEVICE))


def test_infinity_stays_in_its_rows():
    x = torch.randn(5, 70, device=DEVICE)
    x[2, 3] = torch.inf
    bad = ~gram(x).isfinite()
    assert bad.sum() == 2 * 70 - 1
    assert bad[3].all()


def test_wrong_type():
    with pytest.raises(TypeError, match="float64"):
        gram(torch.zeros(2, 2, dtype=torch.float64))


def test_where_it_pays():
    assert triton_gram.pays(torch.empty(4096, 512, device="meta"))
    assert triton_gram.pays(torch.empty(4, 1024, 512, device="meta"))
    assert not triton_gram.pays(torch.empty(1024, 512, device="meta"))  # 136 tiles
    assert not triton_gram.pays(torch.empty(4096, 512, device="meta", requires_grad=True))
    assert not triton_gram.pays(torch.empty(4096, 256, device="meta"))
    assert not triton_gram.pays(torch.empty(64, 512, 4096, device="meta"))
    assert not triton_gram.pays(torch.empty(4096, 512, device="meta", dtype=torch.float64))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_it_is_taken_on_gpu(monkeypatch):
    S = torch.randn(4096, 512, device=DEVICE)
    plain, calls = symmetric_product(S, 0.5), []
    monkeypatch.setattr(triton_gram, "gram", lambda *a: (calls.append(1), gram(*a))[1])
    with use_triton():
        torch.testing.assert_close(symmetric_product(S, 0.5), plain)
    assert calls
