"""The suite's parts beside the measuring: floors of any convolution, goals, peers, tables, exponents."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import by_hand, fit, goals, models, peers, report, scaling, suite, table
from benchmarks.__main__ import RESULTS, _path, _rows, main, parse
from benchmarks.floor import ConvInput, MatMul, operands, shapes_of, total_flops
from benchmarks.models import PROBLEMS, ResNet
from benchmarks.rows import ROWS
from benchmarks.suite import Settings, measure
from benchmarks.timing import Variant, interleave

README = Path(__file__).parents[1] / "README.rst"
ROW = {row.name: row for row in ROWS}


# --------------------------------------------------------------------------- ResNet and its floor


def test_resnet_is_a_resnet_18():
    model = ResNet()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 18 + 3  # three shortcuts beside the eighteen
    # the figure known for this network on CIFAR-10
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert not any(m.training for m in model.modules())
    assert [layer.S for layer in shapes_of(model, torch.rand(2, 3, 32, 32)).layers][-2:] == [16, 1]


def test_floor_of_a_resnet():
    """Operations per image, from the formula of each layer."""
    shapes = shapes_of(ResNet(4), torch.rand(2, 3, 8, 8))
    assert len(shapes.layers) == 21
    expected, S = [(27, 4, 64)], 64
    for stage in range(4):
        o = 4 * 2**stage
        i = o if stage == 0 else o // 2
        S = S if stage == 0 else S // 4
        expected += [(9 * i, o, S), (9 * o, o, S)] + ([(i, o, S)] if stage else [])
        expected += [(9 * o, o, S)] * 2
    expected += [(32, 10, 1)]
    assert sorted((y.i, y.o, y.S) for y in shapes.layers) == sorted(expected)
    forward = [2 * i * o * S for i, o, S in expected]
    assert total_flops(shapes.sweep(3)) == 3 * 2 * (sum(forward) - forward[0])
    assert total_flops(shapes.each("weight_product")) == 2 * sum(forward)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2, "padding": 1}])
def test_products_of_convolutions_are_what_autograd_needs(options):
    """Same values as autograd's gradients, from the same operands; same operations as unfolded."""
    layer = nn.Conv2d(4, 6, 3, **options).double()
    x = torch.rand(5, 4, 9, 8, dtype=torch.double, requires_grad=True)
    output = layer(x)
    (found,) = shapes_of(nn.Sequential(layer, nn.Flatten()), x).layers
    (first,), (second,) = found.vjp(1), found.weight_product()
    g = torch.rand_like(output)
    given = {tuple(t.shape): t for t in (x.detach(), layer.weight.detach(), g)}
    inputs = torch.autograd.grad(output, (x, layer.weight), g)
    for one, expected in zip((first, second), inputs, strict=True):
        torch.testing.assert_close(one.prepare(lambda *shape: given[shape])(), expected)
        assert one.flops == 2 * 5 * found.groups * found.S * found.i * found.o
    assert found.o * found.groups == 6 and found.i == layer.weight[0].numel()


def test_floor_of_groups():
    """Two groups cost two products of half the size each, and share no entries."""
    layer = nn.Conv2d(4, 6, 3, groups=2)
    (found,) = shapes_of(nn.Sequential(layer, nn.Flatten()), torch.rand(5, 4, 3, 4)).layers
    (N, S, i, o) = (5, 2, 18, 3)
    assert (found.N, found.S, found.i, found.o, found.groups) == (N, S, i, o, 2)
    assert found.factors("expand", 1) == [MatMul(2, i, N * S, i, "tn"), MatMul(2, o, N * S, o, "tn")]
    assert total_flops(found.factors("reduce", 3)) == 2 * 2 * N * (i * i + 3 * o * o)
    assert total_flops(found.square_sum(2)) == 2 * 2 * 2 * N * o * S * i
    assert total_flops(found.norms()) == 2 * 2 * N * S * S * (i + o)
    assert total_flops(found.combined(3)) == 3 * 2 * 2 * o * N * S * i


def test_floor_refuses_what_it_does_not_count():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten())
    with pytest.raises(ValueError, match="zero padding"):
        shapes_of(model, torch.rand(2, 1, 4, 4))
    product = ConvInput((4, 3, 3), (2, 3, 3), (2, 2, 1, 1), (1, 1), (0, 0), 6, groups=2)
    assert product.prepare(operands("cpu"))().shape == (6, 4, 3, 3)
    assert product.flops == 2 * 6 * 18 * 2


# --------------------------------------------------------------------------- goals


def _row(name, time, floor):
    return {
        "name": name,
        "ours": {"time": [0, time, 9], "memory": 1.5},
        "floor": {"time": [0, floor, 9]},
    }


def test_goals_are_met_or_not():
    assert all(name in ROW for name in goals.GOALS)
    for by_model in goals.GOALS.values():
        assert set(by_model) == {"mlp", "cnn", "resnet", "vit"} <= set(PROBLEMS)
    plain, of_floor = (goals.goal_of(model, "KFAC expand mc") for model in ("cnn", "vit"))
    assert plain.met(_row("", 2.004, 1)) and not plain.met(_row("", 2.01, 2.01))
    assert of_floor.met(_row("", 3.3, 3.0)) and not of_floor.met(_row("", 1.2, 1.0))
    assert goals.near_floor(_row("", 2.3, 2.0)) and not goals.near_floor(_row("", 2.4, 2.0))
    assert goals.goal_of("tiny", "KFAC expand mc") is goals.goal_of("mlp", "BatchGrad") is None
    rows = [_row("KFAC expand mc", 1.5, 1.4), _row("KFAC reduce mc", 2.0, 1.9), _row("BatchGrad", 1, 1)]
    rows += [_row("SumGradSquared", 1.4, 1.0)]
    problem = {"name": "mlp", "title": "MLP", "rows": rows}
    assert goals.summary([problem]) == "goals met: 2 of 3; within 1.15 of the counted floor: 2 of 3"
    assert goals.summary([{"name": "tiny", "rows": rows}]) == ""
    found = report.rst({"problems": [problem]}, "goals")
    assert "1.50 of 1.9: met" in found and "2.00 of 1.9: missed" in found and "BatchGrad" not in found
    assert "BatchGrad" in report.rst({"problems": [problem]}, "floor")


def test_results_have_goals_and_ratios_to_the_floor():
    small = models.mlp(4, 8)
    rows = [ROW["KFAC reduce mc"], ROW["BatchL2Grad"]]
    found = measure(small, rows, Settings(0.0, (1, 1)))
    first, second = found["rows"]
    assert first["goal"]["limit"] == 1.9 and first["goal"]["of"] == "plain step"
    assert first["goal"]["met"] == (round(first["ours"]["time"][1], 2) <= 1.9) and "goal" not in second
    ratio = first["ours"]["time"][1] / first["floor"]["time"][1]
    assert first["over_floor"] == pytest.approx(ratio, rel=1e-3)
    printed = report.text(found)
    assert ("1.9 met" if first["goal"]["met"] else "1.9 MISSED") in printed
    assert "backpack" not in measure(small, rows[1:], Settings(0.0, (1, 1), peers=False))["rows"][0]


@pytest.mark.filterwarnings("ignore:Extension saving to")
def test_resnet_is_measured_in_the_rows_of_its_goals():
    """Ours covers its batch norms too, so do BackPACK's extensions of first order."""
    full = PROBLEMS["resnet"]
    with torch.random.fork_rng():
        small = replace(full("cpu"), model=ResNet(4), x=torch.rand(2, 3, 16, 16), y=torch.tensor([1, 3]))
    found = measure(small, ROWS, Settings(0.0, (1, 1)))
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {*goals.GOALS, "extended, no context"}
    assert all("goal" in rows[name] for name in goals.GOALS)
    assert {name for name in rows if "backpack" in rows[name]} == {
        "SumGradSquared",
        "extended, no context",
    }
    kfac = {name for name in rows if "curvlinops" in rows[name]}
    assert kfac == (
        {name for name in rows if name.startswith("KFAC") and name.endswith("formed")}
        if peers.installed()
        else set()
    )


# --------------------------------------------------------------------------- peers


@pytest.mark.filterwarnings("ignore:Extension saving to")
def test_first_order_peers_run_on_any_graph():
    """On a graph with shortcuts BackPACK's extensions of first order do run, and no others are tried."""
    rows = [ROW["BatchL2Grad"], ROW["DiagGGN mc"]]
    problem = models.vit_of(2, 4, depth=1)
    first, second = measure(problem, rows, Settings(0.0, (1, 1)))["rows"]
    assert "backpack" in first and "backpack" not in second


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_curvlinops_factors_agree(approx):
    """Theirs are the same matrices up to a factor of our scaling: the same work is measured."""
    pytest.importorskip("curvlinops")
    import backpack_ext as our

    problem = models.cnn(3)
    operator = peers.kfac(problem.model, problem.x, problem.y, approx, "empirical").step()
    model, loss_fn = our.extend(problem.model), our.extend(nn.CrossEntropyLoss())
    with our.backpack(our.KFAC(approx, "empirical")):
        loss_fn(model(problem.x), problem.y).backward()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        B, A = module.weight.kfac
        theirs = operator._gradient_covariances[name], operator._input_covariances[name]
        for one, two in zip((B, A), theirs, strict=True):
            torch.testing.assert_close(one / one.trace(), two / two.trace(), rtol=1e-3, atol=1e-6)


def test_missing_peer_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "installed", dict)
    arguments = ["--models", "tiny", "--repetitions", "1", "--rows", "mc, formed"]
    arguments += ["--threads", "1", "--out", str(tmp_path)]
    rows = main(arguments)["problems"][0]["rows"]
    assert len(rows) == 2 and not any("curvlinops" in row for row in rows)
    assert "Not installed" in capsys.readouterr().out
    assert (tmp_path / "cpu-some.json").exists()  # some rows do not replace all


def test_steps_by_hand(tmp_path, capsys):
    """They leave what ours leave, or nothing is timed."""
    path = tmp_path / "by-hand.json"
    by_hand.main(["--seconds", "0", "--threads", "1", "--output", str(path)])
    found = json.loads(path.read_text())["problems"]
    assert {key: tuple(p["rows"]) for key, p in found.items()} == by_hand.NAMES
    for problem in found.values():
        assert all(set(row) == {"ours", "by hand", "floor"} for row in problem["rows"].values())
    assert by_hand.table(found) in capsys.readouterr().out
    stored = json.loads(by_hand.PATH.read_text())["problems"]
    assert by_hand.table(stored) in README.read_text()


# --------------------------------------------------------------------------- stored results


def test_default_and_all_models():
    """What runs in a minute: the rows with goals on small models; named models in every row."""
    short, named, full = parse([]), parse(["--models", "cnn"]), parse(["--full"])
    assert set(short.models) == {"mlp", "cnn", "vit"} and named.rows is full.rows is None
    chosen = {row.name for row in _rows(short.rows)}
    assert set(goals.GOALS) < chosen < set(ROW) and "DiagGGN exact" not in chosen
    assert full.models == parse(["--models", "all"]).models == list(PROBLEMS)
    assert parse(["--rows", "mc"]).rows == ["mc"]
    assert (_path(short).name, _path(named).name) == ("cpu-some.json", "cpu.json")
    assert _path(parse(["--readme", "x"])).name == "cpu.json"


def test_far_slower_steps_are_timed_once():
    """Their ratio is to the plain step of the same round, the first."""
    ran = []
    variants = {key: Variant(lambda key=key: ran.append(key)) for key in ("plain", "far", "near")}
    times = interleave(variants, "plain", lambda: None, 0.0, (3, 3), once=["far"])
    assert {key: len(found) for key, found in times.items()} == {"plain": 3, "far": 1, "near": 3}
    first = ran[: len(ran) // 3 + 1]
    assert "far" in first and "far" not in ran[len(first) :]
    cell = suite._cell("far", {"far": [6.0], suite.PLAIN: [2.0, 1.0, 1.0]}, {"far": 4, suite.PLAIN: 2})
    assert cell == {"time": [3.0, 3.0, 3.0], "memory": 2.0}


def test_other_problems_keep_their_results(tmp_path, capsys):
    from benchmarks.__main__ import _with_others

    machine = {"cpu": "x", "threads": 2, "torch": "2", "device": "cpu"}
    path = tmp_path / "cpu.json"
    old = [{"name": name, "rows": [], "old": True} for name in ("resnet", "mlp", "tiny")]
    path.write_text(json.dumps({"machine": machine, "problems": old}))
    found = {"machine": machine, "problems": [{"name": "tiny", "rows": []}]}
    assert [p["name"] for p in _with_others(found, path)] == ["mlp", "resnet", "tiny"]
    assert "old" not in _with_others(found, path)[-1]
    assert capsys.readouterr().out == ""
    found["machine"] = machine | {"threads": 1}
    assert _with_others(found, path) == found["problems"]
    assert "threads differ" in capsys.readouterr().out


def test_readme_tables_are_those_of_the_results():
    text = README.read_text()
    found = json.loads((RESULTS / "cpu.json").read_text())
    for (begin, end), body in report.blocks(found).items():
        assert text.count(begin) == text.count(end) == 1
        assert text.split(begin)[1].split(end)[0] == f"\n\n{body}\n\n"
    assert text.count(scaling.BEGIN) == text.count(scaling.END) == 1
    stored = RESULTS / "scaling-cpu.json"
    body = scaling.rst(json.loads(stored.read_text())) if stored.exists() else ""
    assert text.split(scaling.BEGIN)[1].split(scaling.END)[0].strip() == body


def test_readme_is_rewritten(tmp_path):
    readme = tmp_path / "README.rst"
    (costs, diagonals) = report.COSTS, report.DIAGONAL_COSTS
    readme.write_text("a\n{}\nold\n{}\nb\n{}\nold\n{}\nc\n".format(*costs, *diagonals))
    for _ in range(2):
        found = main(["--readme", str(readme)])
        text = readme.read_text()
        assert (
            "old" not in text and text.startswith("a\n") and text.endswith("\nc\n") and "\nb\n" in text
        )
        assert all(text.count(body) == 1 for body in report.blocks(found).values())
    assert "HesScale" not in report.blocks(found)[costs] and "BatchGrad" in report.blocks(found)[costs]
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected the lines"):
        table.insert(readme, *costs, "body")


# --------------------------------------------------------------------------- growth


def test_power_law_of_exact_data():
    xs = [1, 2, 5, 11]
    found = fit.power_law(xs, [0.5 * x**1.5 for x in xs])
    assert found.exponent == pytest.approx(1.5) and found.constant == pytest.approx(0.5)
    assert found.error == pytest.approx(0, abs=1e-8)
    assert fit.power_law([2, 4], [1.0, 8.0]) == fit.PowerLaw(
        pytest.approx(3), pytest.approx(1 / 8), None
    )
    assert fit.power_law([3, 3], [1, 2]) is None and fit.power_law(xs, [1, 1, 0, 1]) is None


def test_standard_error_covers_the_truth():
    """The error of the exponent over many draws of noise is the standard error on average."""
    rng, xs = random.Random(0), [2**k for k in range(8)]
    fits = [fit.power_law(xs, [x**0.7 * math.exp(rng.gauss(0, 0.2)) for x in xs]) for _ in range(3000)]
    scatter = math.sqrt(sum((f.exponent - 0.7) ** 2 for f in fits) / len(fits))
    typical = math.sqrt(sum(f.error**2 for f in fits) / len(fits))
    assert scatter == pytest.approx(typical, rel=0.05)


def _point(plain, ours, floor):
    row = {"name": "KFAC expand mc", "ours": {"time": [0, ours, 9], "memory": 3.0}}
    return {
        "plain_ms": [0, plain, 9],
        "plain_mib": plain,
        "rows": [row | {"floor": {"time": [0, floor, 9]}}],
    }


def test_growth_by_hand():
    """A plain step of 2 n, a row that takes n^2 beyond it, a floor of half of that."""
    values = [1, 2, 4]
    points = [_point(2.0 * n, 1 + n / 2, 1 + n / 4) for n in values]
    plain, ours, floor = scaling.growth(values, points)
    assert (plain["name"], plain["exponent"], plain["mib_exponent"]) == (scaling.PLAIN, 1.0, 1.0)
    assert ours["ms"] == [1, 4, 16] and (ours["exponent"], ours["last"], ours["error"]) == (2, 2, 0)
    assert ours["mib"] == [6, 12, 24]
    assert floor["ms"] == [0.5, 2, 8] and "mib" not in floor and floor["name"] == "KFAC expand mc: floor"


def test_scaling_runs(tmp_path, capsys):
    axes = ["width", "classes"]
    arguments = ["--quick", "--axes", *axes, "--threads", "1", "--out", str(tmp_path)]
    found = scaling.main(arguments)
    stored = json.loads((tmp_path / "scaling-cpu-quick.json").read_text())
    assert stored == json.loads(json.dumps(found)) and [p["name"] for p in stored["problems"]] == axes
    for problem in stored["problems"]:
        assert all(len(row["ms"]) == len(problem["values"]) == 2 for row in problem["rows"])
    printed = capsys.readouterr().out
    assert "ms, classes =" in printed and "last two" in printed
    drawn = (tmp_path / "scaling-cpu-quick.png").exists()
    assert drawn != ("Not drawn" in printed)
    readme = tmp_path / "README.rst"
    readme.write_text(f"{scaling.BEGIN}\n{scaling.END}\n")
    scaling.main([*arguments, "--readme", str(readme)])
    assert scaling.rst(stored) in readme.read_text()


def test_axes_vary_what_they_say():
    """Twice the samples are twice the floor of a sweep; token numbers must be square."""
    one, two = (scaling.sampled_rows(V) for V in (1, 2))
    shapes = shapes_of(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), torch.rand(7, 5))
    sweep, A, B = 2 * 7 * 6, 2 * 7 * (25 + 9), 2 * 7 * (9 + 4)
    assert [total_flops(rows[0].products(shapes)) for rows in (one, two)] == [
        sweep + A + B,
        2 * (sweep + B) + A,
    ]
    problem = scaling.AXES["tokens"].make(16, "cpu")
    assert shapes_of(problem.model, problem.x).attentions[0].T == 16
    with pytest.raises(ValueError, match="square number of tokens"):
        models.vit_of(2, 15)
    for name, axis in scaling.AXES.items():
        sizes = [len(axis.make(value, "cpu").x) for value in axis.values["quick"]]
        assert sizes == list(axis.values["quick"]) if name == "batch" else len(set(sizes)) == 1
