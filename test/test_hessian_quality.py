"""The benchmark of Hessian diagonals: its estimates, and the order of the methods. No times."""

import json
from statistics import fmean

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from benchmarks import hessian_quality, quality_tables
from benchmarks.equal_time import whole
from benchmarks.estimators import (
    BECKER,
    CROSS,
    EXTENSIONS,
    GAUSS_NEWTON,
    GGN,
    HESSCALE,
    HUTCHINSON,
    PENULTIMATE,
    SAMPLED_GGN,
    diagonal,
    error,
    exact_diagonal,
    extensions_for,
    hutchinson,
    sampled_ggn,
)
from benchmarks.models import Problem
from benchmarks.quality_problems import NETWORKS, Setting, settings


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def small() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))
    return Problem("small", "small", "MLP 3-4-3", model, x, y)


def dense(problem: Problem) -> torch.Tensor:
    """The Hessian `[P, P]`, forward over reverse."""
    params = {key: p.detach() for key, p in problem.model.named_parameters()}

    def loss(p: dict) -> torch.Tensor:
        return F.cross_entropy(functional_call(problem.model, p, problem.x), problem.y)

    blocks = hessian(loss)(params)
    sizes = {key: p.numel() for key, p in params.items()}
    rows = [[blocks[a][b].reshape(sizes[a], sizes[b]) for b in params] for a in params]
    return torch.cat([torch.cat(row, 1) for row in rows])


def test_exact_diagonal(small: Problem):
    H = dense(small).diagonal()
    torch.testing.assert_close(exact_diagonal(small, chunk=7), H, rtol=1e-12, atol=1e-14)
    entries = [30, 2, 5]
    torch.testing.assert_close(exact_diagonal(small, entries), H[entries], rtol=1e-12, atol=1e-14)


def test_hutchinson(small: Problem):
    H = dense(small)
    found = hutchinson(small, [3, 1], generator())
    draw, shapes = generator(), [p.shape for p in small.model.parameters()]
    products = []
    for _ in range(3):
        bits = [torch.randint(0, 2, s, generator=draw, dtype=H.dtype).flatten() for s in shapes]
        v = 2 * torch.cat(bits) - 1
        products.append(v * (H @ v))
    for count in (1, 3):
        expected = sum(products[:count]) / count
        torch.testing.assert_close(found[count], expected, rtol=1e-12, atol=1e-14)


def test_sampled_ggn_approaches_the_exact_one(small: Problem):
    exact = diagonal(small, EXTENSIONS[GGN]())
    found = sampled_ggn(small, [1, 20, 5000], generator())
    assert list(found) == [1, 20, 5000]
    assert error(found[5000], exact) < 0.05 < error(found[1], exact)


def test_exact_diagonal_of_every_network():
    """Against a second way, at a few parameters: attention and pools are differentiated twice, too."""
    for name in ("norm", "conv", "vit"):
        problem = Setting(name, 2).draw(0)
        entries = [3, 500, 1900]
        found = exact_diagonal(problem, entries)
        params = list(problem.model.parameters())
        place = [(k, i) for k, p in enumerate(params) for i in range(p.numel())]
        for value, entry in zip(found, entries, strict=True):
            k, i = place[entry]
            slope = []
            for step in (1e-5, -1e-5):
                params[k].data.view(-1)[i] += step
                loss = F.cross_entropy(problem.model(problem.x), problem.y)
                slope.append(torch.autograd.grad(loss, params[k])[0].flatten()[i])
                params[k].data.view(-1)[i] -= step
            numeric = (slope[0] - slope[1]) / 2e-5
            torch.testing.assert_close(value, numeric, rtol=1e-4, atol=1e-8)


def test_settings_share_networks_and_batches():
    one, other = Setting("tanh", 8).draw(3), Setting("tanh", 8, 5).draw(3)
    assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
    first, second = (next(p.model.parameters()) for p in (one, other))
    assert 0 < (first - second).abs().max() < 6 * 1e-3  # five steps of Adam
    assert len({setting.name for setting in settings()}) == len(settings())
    small = [s for s in settings() if s.entries is None]
    for name in {s.network for s in small}:
        assert sum(p.numel() for p in NETWORKS[name].make().parameters()) < 3200


@pytest.mark.parametrize("name", ["tanh", "relu", "norm"])
def test_the_order_of_the_methods(name: str):
    counts = {HUTCHINSON: [1, 50], SAMPLED_GGN: [1, 50]}
    result = hessian_quality.measure_setting(Setting(name, 32), 2, counts)
    mean = {(row["name"], row["samples"]): row["mean"] for row in result["rows"]}
    assert mean[PENULTIMATE, None] < mean[HESSCALE, None] < 0.15
    assert 3 * mean[HESSCALE, None] < mean[BECKER, None] < 1
    assert mean[HUTCHINSON, 1] > 3 * mean[HUTCHINSON, 50] > 3
    assert mean[SAMPLED_GGN, 1] > mean[SAMPLED_GGN, 50]
    if name == "relu":  # no curvature inside: the Hessian is the GGN
        assert mean[GGN, None] < 1e-12 and mean[SAMPLED_GGN, 50] < 0.1
        assert mean[HESSCALE, None] == mean[GAUSS_NEWTON, None]
    else:
        assert 3 * mean[HESSCALE, None] < min(mean[GGN, None], mean[GAUSS_NEWTON, None])
        assert mean[SAMPLED_GGN, 50] > mean[GGN, None]


def test_cross_terms_are_a_row_where_there_are_residual_branches():
    assert CROSS in extensions_for(Setting("vit", 2).draw(0))
    assert CROSS not in extensions_for(Setting("conv", 2).draw(0))


def test_command(tmp_path, capsys):
    names = ["tanh-32-init", "tanh-1-trained"]
    arguments = ["--quick", "--threads", "1", "--settings", *names, "--out", str(tmp_path)]
    found = hessian_quality.main(arguments)
    path = tmp_path / "hessian_quality-quick.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert [p["name"] for p in found["problems"]] == names and found["seeds"] == 1
    (times,) = found["times"]
    assert set(times["time"]) == set(EXTENSIONS) - {CROSS}
    for problem in found["problems"]:
        for name in (*times["time"], HUTCHINSON, SAMPLED_GGN):
            sampled = name in (HUTCHINSON, SAMPLED_GGN)
            row = quality_tables.find(problem, name, 1 if sampled else None)
            assert row["mean"] == fmean(row["values"]) and row["std"] is None
    for name in (HUTCHINSON, SAMPLED_GGN):
        assert min(times[name]["first"]) > 0 and whole(times[name]) >= 1
        assert quality_tables.find(found["problems"][0], name, whole(times[name]))
    printed = capsys.readouterr().out
    assert "tanh N=1 trained" in printed and f"stored in {path}" in printed
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    "value, shown",
    [(0.0, "0"), (1e-5, "0"), (0.0734, ".073"), (0.9996, "1.00"), (7.52, "7.52"), (31.24, "31.2")],
)
def test_numbers(value: float, shown: str):
    assert quality_tables.number(value) == shown


def test_samples_at_equal_time_are_rounded_up():
    fits = [whole({"fit": fit}) for fit in (0.3, 1.0, 1.2, 4.0)]
    assert fits == [1, 1, 2, 4]
