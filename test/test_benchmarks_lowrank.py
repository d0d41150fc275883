"""The low-rank benchmark runs, its peers compute the same, and its floor is counted right."""

import copy
import json

import pytest
import torch
from torch import nn

from backpack_ext import NTK, layer_gram
from benchmarks.floor import shapes_of as shapes_of_model
from benchmarks.floor import total_flops
from benchmarks.lowrank import kernels, measuring, peers, routes, scaling, spectrum, tables
from benchmarks.lowrank.__main__ import main
from benchmarks.models import cnn, mlp
from benchmarks.timing import Variant


def test_all_parts_run(tmp_path, capsys):
    found = main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    stored = json.loads((tmp_path / "lowrank-cpu-quick.json").read_text())
    assert stored == json.loads(json.dumps(found))
    parts = [(p["part"], p["name"]) for p in stored["problems"]]
    routes_of = [("routes", name) for name in ("cnn", "cnn", "vit", "vit")]
    growth = [("scaling", axis) for axis in scaling.AXES]
    both = [(part, name) for part in ("spectrum", "ntk") for name in ("mlp", "cnn")]
    assert parts == [*both, *growth, *routes_of]
    for problem in stored["problems"][:2]:
        rows = {row["name"]: row for row in problem["rows"]}
        assert set(rows) == {row.name for row in spectrum.ROWS} | set(spectrum.SOLVERS)
        assert all(len(row["ours"]["time"]) == 3 and row["ours"]["mib"] > 0 for row in rows.values())
        assert rows["exact spectrum"]["floor"]["time"][1] > 1
        assert rows["exact spectrum"]["goal"] == {"mlp": 10, "cnn": 14}[problem["name"]]
        assert rows["the same, gamma and lambda"]["over"]["time"][1] > 0
        sides = {"vivit", "curvlinops"} & set(rows["the same, vectors formed"])
        assert sides == {name.split("-")[0] for name in stored["peers"]}
    ntk = stored["problems"][2]["rows"][0]
    assert ntk["products"]["speedup"][1] > 0 and ntk["contraction"]["mib"] > ntk["ours"]["mib"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("Growth with data N", "top 10 eigenpairs", "taken", "ENTRY"))
    assert ("Not installed" in printed) == (len(stored["peers"]) < len(peers.PACKAGES))

    readme = tmp_path / "README.rst"
    readme.write_text(f"before\n\n{tables.BEGIN}\n\nold\n\n{tables.END}\n\nafter\n")
    for _ in range(2):
        main(["--quick", "--out", str(tmp_path), "--readme", str(readme)])
        text = readme.read_text()
        assert text.count(tables.rst(stored)) == 1 and "old" not in text
        assert text.startswith("before\n") and text.endswith("\n\nafter\n")
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected the lines"):
        main(["--quick", "--out", str(tmp_path), "--readme", str(readme)])


def test_parts_keep_those_of_earlier_runs(tmp_path):
    path = tmp_path / "lowrank-cpu-quick.json"
    old = [
        {"part": "spectrum", "name": "kept", "rows": []},
        {"part": "routes", "name": "gone", "rows": []},
    ]
    path.write_text(json.dumps({"problems": old}))
    from benchmarks.lowrank import __main__ as command

    kept = command._with_others([{"part": "routes", "name": "new", "rows": []}], ["routes"], path)
    assert [p["name"] for p in kept] == ["kept", "new"]


def test_readme_has_the_markers():
    from pathlib import Path

    text = (Path(__file__).parents[1] / "README.rst").read_text()
    assert text.count(tables.BEGIN) == text.count(tables.END) == 1


@pytest.mark.parametrize("problem", [mlp(3, 8), cnn(2)], ids=lambda p: p.name)
def test_kernels_agree(problem):
    model, x = problem.model, problem.x
    full = kernels.contraction(model, x)
    torch.testing.assert_close(kernels.products(model, x, x), full, rtol=1e-4, atol=1e-5)
    trace = kernels.contraction(model, x, "trace")
    torch.testing.assert_close(trace, full.diagonal(dim1=2, dim2=3).sum(-1), rtol=1e-4, atol=1e-5)
    for outputs, expected in (("full", full), ("trace", trace)):
        ours = NTK(copy.deepcopy(model), outputs=outputs).gram(x)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_vivit_agrees():
    pytest.importorskip("vivit")
    problem, k = mlp(4, 8), 3
    theirs = {name: v.step() for name, v in peers.vivit_steps(problem, k).items()}
    ours = {
        "spectrum": spectrum.ggn_step(problem, lambda ggn: ggn.eigvalsh()).step(),
        "pairs": spectrum.ggn_step(problem, lambda ggn: ggn.eigh(k)).step(),
        "newton": spectrum.ggn_step(problem, lambda ggn: ggn.newton_step(1.0, k=k)).step(),
    }
    top = ours["spectrum"][:k].float()
    torch.testing.assert_close(theirs["spectrum"][-k:].flip(0), top, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(theirs["pairs"][0].flip(0), top, rtol=1e-3, atol=0.0)
    gamma, curvatures = theirs["directional"]
    pairs = ours["pairs"]
    expected = pairs.directional_gradients().float().abs()
    torch.testing.assert_close(gamma.flip(1).abs(), expected, rtol=1e-2, atol=1e-3)
    expected = pairs.directional_curvatures().float()
    torch.testing.assert_close(curvatures.flip(1), expected, rtol=1e-2, atol=1e-3)
    for one, two in zip(theirs["newton"], ours["newton"].values(), strict=True):
        torch.testing.assert_close(one, two.float(), rtol=1e-2, atol=1e-4)


def test_lanczos_agrees():
    pytest.importorskip("curvlinops")
    problem = mlp(4, 8)
    values, _ = peers.lanczos(problem, 3).step()
    ours = spectrum.ggn_step(problem, lambda ggn: ggn.eigvalsh()).step()[:3]
    torch.testing.assert_close(torch.tensor(values).flip(0).double(), ours, rtol=1e-3, atol=0.0)


def test_missing_peers_are_named(monkeypatch):
    monkeypatch.setattr(peers, "PACKAGES", {"nothing-for-pytorch": ("no_module_of_that_name",)})
    assert peers.installed() == {} and peers.steps(mlp(2, 4), 2, spectrum.PEER_ROWS) == {}
    assert "nothing-for-pytorch" in peers.missing_text({})


def test_floor_of_gram_matrices():
    """N = 7 data through layers 5-3-2, V = 1 column; then with S = 4 tokens each."""
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    floor = spectrum.ROWS[0].products
    shapes = shapes_of_model(model, torch.rand(7, 5))
    assert total_flops(floor(shapes)) == 2 * 7 * 2 * 3 + 2 * 7 * 7 * (5 + 3 + 3 + 2)
    # three columns: inputs meet inputs once, vectors nine times
    assert total_flops(shapes.layers[0].gram(3)) == 2 * 7 * 7 * (5 + 9 * 3)
    (layer, _) = shapes_of_model(model, torch.rand(7, 4, 5)).layers
    # 21 columns: their 15 entries are formed from 4 tokens, then multiplied
    assert total_flops(layer.gram(3)) == 2 * 21 * (4 * 15 + 21 * 15)


def test_steps_of_all_lengths_have_rounds():
    steps = {("plain",): Variant(lambda: None), ("ours", "a"): Variant(lambda: None)}
    steps |= {("peer", name): Variant(lambda: None) for name in "bcd"}
    for name, seconds in (("b", 0.0), ("c", 1.0), ("d", 10.0)):
        steps["peer", name].warm_up = lambda sync, v=steps["peer", name], s=seconds: setattr(
            v, "seconds", s
        )
    length = measuring.Length(0.0, (4, 4), 0.0, (2, 2))
    found = measuring.measure(steps, length, "cpu", memory=False)
    counts = {key[-1]: sum(key in times for times in found.rounds) for key in steps}
    assert counts == {"plain": 7, "a": 7, "b": 7, "c": 3, "d": 1}
    found.rounds = [{("plain",): 2.0, ("peer", "b"): 3.0}]
    assert found.ratio(("peer", "b"), count=4, offset=1.0) == [7, 7, 7]


def test_routes_agree_and_are_timed():
    problem = cnn(2)
    block = spectrum.ggn_step(problem, lambda ggn: ggn.block).step()
    found = list(routes.layers(block.factor))
    assert len(found) == 4
    layer = found[2]
    one, two = (routes.gram_by(r, layer.a, layer.b, True) for r in routes.ROUTES)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert "lambda" not in layer_gram._explicit_is_cheaper.__name__  # put back
    before = layer_gram.ENTRY
    assert routes.chosen(layer.a, layer.b, 0) in routes.ROUTES and before == layer_gram.ENTRY


def test_calibration_by_hand():
    def row(kernel, explicit, *taken):
        chosen = dict(zip(map(str, routes.ENTRIES), taken, strict=True))
        return {"count": 2, "kernel": kernel, "explicit": explicit, "chosen": chosen}

    half = len(routes.ENTRIES) // 2
    first = ["kernel"] * half + ["explicit"] * (len(routes.ENTRIES) - half)
    rows = [row([1, 2, 3], [3, 4, 5], *first), row(None, [1, 1, 1], *reversed(first))]
    one, *_, last = routes.calibration([{"rows": rows}])
    assert one == {"entry": 0, "worst": 1.0, "total": 1.0, "slower": 0}
    assert last["worst"] is None and last["total"] is None and last["slower"] == 2
    assert routes.loss(rows[0], "explicit") == 2
