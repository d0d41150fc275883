"""The largest of many eigenpairs: they are right, or there are none."""

import pytest
import torch
from torch import Tensor

from curvature import krylov


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def symmetric(values: Tensor) -> Tensor:
    Q = torch.linalg.qr(randn(len(values), len(values))).Q
    return Q * values @ Q.T


def spectra(q: int) -> dict[str, Tensor]:
    i = torch.arange(q, dtype=torch.float64)
    near = 0.9**i
    near[5:9] = near[5] * (1 + 1e-9 * torch.arange(4))
    return {
        "decay": 0.9**i,
        "harmonic": 1 / (1 + i) ** 2,
        "near": near,
        "multiple": 0.1 ** (i // 12),
        "rank 4": (i < 4) / (1 + i),
        "rank 40": (i < 40) / (1 + i),
        "flat": torch.ones(q, dtype=torch.float64),
        "flat, then zero": (i < q // 2).double(),
        "one and flat": 1 + 9 * (i == 0).double(),
        "linear": 1 - i / q,
        "zero": torch.zeros(q, dtype=torch.float64),
    }


FAST = (
    "decay",
    "harmonic",
    "near",
    "multiple",
    "rank 4",
    "rank 40",
    "flat",
    "flat, then zero",
    "one and flat",
)


@pytest.mark.parametrize("name", spectra(20))
def test_few_of_many(name: str):
    """What the Krylov method returns are the largest pairs; else it returns nothing."""
    torch.manual_seed(0)
    q, k = 1000, 10
    values = spectra(q)[name]
    M = symmetric(values)
    M = (M + M.T) / 2
    found = krylov.largest(M, k)
    assert (found is not None) == (name in FAST)
    if found is None:
        return
    expected = values.sort(descending=True).values[:k]
    close(found[0], expected, 1e-11, 1e-12)
    U = found[1]
    close(U.T @ U, torch.eye(k).double(), atol=1e-12)
    assert (M @ U - U * expected).norm(dim=0).max() < 3e-12


def test_a_missed_eigenvalue_is_noticed():
    """Exact eigenpairs that are not the largest fail the last check."""
    torch.manual_seed(0)
    values, vectors = torch.linalg.eigh(symmetric(torch.arange(50).double()))
    M = vectors * values @ vectors.T
    index = torch.arange(49, 39, -1)
    assert krylov._complete(M, values[index], vectors[:, index])
    index[4:] -= 1  # all but the fifth
    assert not krylov._complete(M, values[index], vectors[:, index])
