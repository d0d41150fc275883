"""The benchmarks run, store what they print, and count the floor right. No times are asserted."""

import json

import pytest
import torch
from torch import nn

from backpack_ext.rules import find_rule
from benchmarks import blocks, data_parallel, deep, peers
from benchmarks.__main__ import main
from benchmarks.floor import ConvInput, MatMul, operands, shapes_of, total_flops
from benchmarks.memory import peak_memory
from benchmarks.models import DEEP, PROBLEMS
from benchmarks.rows import ROWS

ROW = {row.name: row for row in ROWS}


def test_main_stores_every_row(tmp_path, capsys):
    threads = torch.get_num_threads()
    main(["--models", "tiny", "--repetitions", "1", "--out", str(tmp_path), "--name", "smoke"])
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "smoke.json").read_text())
    assert {"cpu", "cores", "threads", "torch", "backpack", "date", "device"} <= set(report["machine"])
    (problem,) = report["problems"]
    assert problem["name"] == "tiny" and problem["batch"] == 8 and problem["rounds"] == 1
    assert problem["parameters"] == 40 * 33 * 32 + 33 * 10
    assert [row["name"] for row in problem["rows"]] == list(ROW)
    for row in problem["rows"]:
        sides = {"ours"} | ({"backpack"} if ROW[row["name"]].theirs else set())
        sides |= {"curvlinops"} if ROW[row["name"]].curvlinops and peers.installed() else set()
        assert set(row) == {"name", "floor", "over_floor"} | sides
        for side in sides:
            assert len(row[side]["time"]) == 3 and min(row[side]["time"]) > 0
            assert row[side]["memory"] > 0.9
        assert row["floor"]["time"][1] >= 1
    printed = capsys.readouterr().out
    assert all(printed.count(name) >= 3 for name in ROW)  # the text and both rst tables


def test_rows_can_be_chosen(tmp_path):
    arguments = ["--models", "tiny", "--repetitions", "1", "--rows", "l2", "--out", str(tmp_path)]
    names = [row["name"] for row in main(arguments)["problems"][0]["rows"]]
    assert names == ["BatchL2Grad", "KFAC mc + BatchL2Grad + DiagGGN mc"]


# N = 7 data through layers 5-3-2, by hand: a product [m, k] @ [k, n] has 2 m k n operations, and
# only the second layer carries vectors on ([7, 2] @ [2, 3])
SWEEP = 2 * 7 * 2 * 3
A, B = 2 * 7 * (5 * 5 + 3 * 3), 2 * 7 * (3 * 3 + 2 * 2)
SQUARES = 2 * 7 * (3 * 5 + 2 * 3)


@pytest.mark.parametrize(
    "name, flops",
    [
        ("KFAC expand mc", SWEEP + A + B),
        ("KFAC reduce mc", SWEEP + A + B),
        ("KFAC expand empirical", A + B),
        ("KFAC reduce empirical", A + B),
        ("KFAC expand exact", 2 * SWEEP + A + 2 * B),
        ("BatchGrad", SQUARES),
        ("BatchL2Grad", 0),
        ("SumGradSquared", SQUARES),
        ("Variance", SQUARES),
        ("BatchDotGrad", 2 * 7 * 7 * (5 + 3 + 3 + 2)),
        ("DiagGGN mc", SWEEP + SQUARES),
        ("DiagGGN exact", 2 * SWEEP + SQUARES),
        ("KFAC mc + BatchL2Grad + DiagGGN mc", SWEEP + A + B + SQUARES),
        ("backpack() with nothing", 0),
        ("extended, no context", 0),
    ],
)
def test_floor_of_a_two_layer_mlp(name, flops):
    shapes = shapes_of(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(7, 5))
    assert total_flops(ROW[name].products(shapes)) == flops


def test_floor_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 5))
    first, second, head = shapes_of(model, torch.rand(6, 3, 5, 5)).layers
    assert (first.N, first.S, first.i, first.o, first.upstream) == (6, 9, 27, 4, False)
    assert (second.S, second.i, second.o, second.upstream) == (4, 16, 2, True)
    assert (head.S, head.i, head.o) == (1, 8, 5)
    assert first.vjp(1) == []
    (vjp,) = second.vjp(3)
    assert vjp == ConvInput((4, 3, 3), (2, 2, 2), (2, 4, 2, 2), (1, 1), (0, 0), 18)
    assert vjp.flops == 2 * 18 * 4 * 2 * 16
    assert first.factors("reduce", 2) == [MatMul(1, 27, 6, 27, "tn"), MatMul(1, 4, 12, 4, "tn")]
    assert second.square_sum(3) == [MatMul(18, 2, 4, 16, "tn")]
    # s (i + o) = 72 >= i o = 32: forming the gradients is cheaper than Gram matrices
    assert second.norms() == second.per_sample()


def test_floor_of_attention():
    problem = PROBLEMS["vit"]("cpu")
    shapes = shapes_of(problem.model, problem.x)
    assert len(shapes.layers) == 1 + 4 * 4 + 1 and len(shapes.attentions) == 4
    assert total_flops(shapes.attentions[0].vjp(1)) == 4 * 2 * (32 * 4) * 64 * 64 * 16
    assert not shapes.layers[0].upstream and all(layer.upstream for layer in shapes.layers[1:])


@pytest.mark.parametrize(
    "product, shape",
    [
        (MatMul(1, 3, 4, 5), (3, 5)),
        (MatMul(2, 3, 4, 5, "tn"), (2, 3, 5)),
        (MatMul(2, 3, 4, 5, "nt"), (2, 3, 5)),
        (MatMul(2, 3, 1, 5, "tn"), (2, 3, 5)),
        (ConvInput((4, 3, 3), (2, 2, 2), (2, 4, 2, 2), (1, 1), (0, 0), 6), (6, 4, 3, 3)),
    ],
)
def test_products_run(product, shape):
    assert product.prepare(operands("cpu"))().shape == shape


def test_peak_memory_of_known_allocations():
    def step():
        a = torch.empty(2**20)
        b = torch.empty(2**19)
        del a
        return b, torch.empty(2**18)

    assert peak_memory(step, "cpu") == 4 * (2**20 + 2**19)


def test_blocks(tmp_path, capsys):
    arguments = ["--dims", "6", "--models", "tiny", "--seconds", "0", "--out", str(tmp_path)]
    found = blocks.main(arguments)
    stored = json.loads((tmp_path / "blocks-cpu.json").read_text())
    assert stored["training"].keys() == found["training"].keys()
    assert found["block"]["matvec"][6][1] == 1 and set(found["training"]) > {"KFAC", "EKFAC"}
    assert "EKFAC, given bases" in capsys.readouterr().out


def test_deep(tmp_path, capsys):
    found = deep.main(["--quick", "--models", "gpt", "--depths", "2", "1", "--out", str(tmp_path)])
    stored = json.loads((tmp_path / "deep-cpu-quick.json").read_text())
    assert stored == json.loads(json.dumps(found)) and stored["depths"] == [1, 2]
    assert [p["name"] for p in stored["problems"]] == ["gpt-1", "gpt-2"]
    rows = {row["name"]: row for row in stored["growth"]["gpt"]}
    names = [row.name for row in deep.DEEP_ROWS]
    assert {"plain step", *names, f"{deep.ALL}: floor"} <= set(rows)
    for row in rows.values():
        assert len(row["ms"]) == 2
    all_of_it = rows[deep.ALL]
    plain = [p["plain_ms"][1] for p in stored["problems"]]
    ratios = [p["rows"][0]["ours"]["time"][1] for p in stored["problems"]]
    expected = [(r - 1) * ms for r, ms in zip(ratios, plain, strict=True)]
    assert all_of_it["ms"] == pytest.approx(expected, rel=1e-3)
    assert rows["plain step"]["relative"] == 0
    both = rows["plain step"]["exponent"] + all_of_it["relative"]
    assert all_of_it["exponent"] == pytest.approx(both, abs=0.01)
    printed = capsys.readouterr().out
    assert "GPT, 2 blocks: time" in printed and "gpt: extra ms at depth" in printed


def test_exponent_of_growth():
    depths = [3, 6, 12, 24]
    assert deep.exponent(depths, [0.5 * d**1.5 for d in depths]) == pytest.approx(1.5)
    assert deep.exponent([3, 3], [1.0, 2.0]) is None and deep.exponent(depths, [1, 1, 0, 1]) is None


def test_floor_of_all_quantities():
    """Layers 5-3-2 on N = 7 data, by hand; then on S = 4 tokens each."""
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    flops = total_flops(deep.everything_floor(shapes_of(model, torch.rand(7, 5))))
    dots = 2 * 7 * 7 * (5 + 3 + 3 + 2)
    assert flops == SWEEP + A + B + 2 * SQUARES + dots
    flops = total_flops(deep.everything_floor(shapes_of(model, torch.rand(7, 4, 5))))
    assert flops == 4 * (SWEEP + A + B + 2 * SQUARES) + 2 * 7 * 7 * (5 * 3 + 3 * 2)


@pytest.mark.parametrize("name", DEEP)
def test_deep_models_are_covered(name):
    """All their parameters have a rule: two per norm and linear layer, but for GPT's head."""
    problem = DEEP[name](2, quick=True)
    layers = [m for m in problem.model.modules() if any(True for _ in m.parameters(recurse=False))]
    assert all(find_rule(m) is not None for m in layers)
    shapes = shapes_of(problem.model, problem.x)
    assert len(shapes.attentions) == 2 and len(problem.model(problem.x)) == len(problem.y)
    assert len(shapes.layers) == 2 * 4 + (2 if name == "vit" else 1)


def test_data_parallel(tmp_path, capsys):
    """What is sent beside the gradients, counted by hand: 40 layers of width 32, and one of 10."""
    found = data_parallel.main(["--quick", "--out", str(tmp_path)])
    stored = json.loads((tmp_path / "data-parallel-cpu-quick.json").read_text())
    assert stored == json.loads(json.dumps(found))
    alone, pair = found["problems"]
    assert (alone["processes"], pair["processes"]) == (1, 2)
    assert [row["name"] for row in pair["rows"]] == list(data_parallel.ROWS)
    assert all(row["sent"] == 0 for row in alone["rows"])
    sent = {row["name"]: row["sent"] for row in pair["rows"]}
    parameters = 40 * 33 * 32 + 33 * 10
    assert sent["plain DDP"] == 4 * parameters
    # an agreement of 6 numbers per process; the number of data, or of rows, per result
    assert sent["DiagGGN mc"] == 2 * 4 * parameters + 8 * (2 * 6 + 82)
    assert sent["KFAC expand mc"] == 4 * (parameters + 81 * 32**2 + 10**2) + 8 * (2 * 6 + 41)
    assert "2 processes  KFAC reduce mc" in capsys.readouterr().out
