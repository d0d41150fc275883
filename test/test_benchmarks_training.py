"""The benchmark of whole training iterations runs, trains, and counts floors and bytes right."""

import json

import pytest
import torch
from torch import nn

from benchmarks.floor import shapes_of, total_flops
from benchmarks.lowrank.measuring import Length
from benchmarks.models import mlp
from benchmarks.training import contenders as who
from benchmarks.training import floors, tables
from benchmarks.training.__main__ import main
from benchmarks.training.contenders import ADAMW, INTERVAL, SGD, Contender, Training, contenders
from benchmarks.training.measuring import measure


def test_every_optimizer_runs(tmp_path, capsys):
    threads = torch.get_num_threads()
    main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    assert torch.get_num_threads() == threads
    stored = json.loads((tmp_path / "training-cpu-quick.json").read_text())
    (problem,) = stored["problems"]
    assert problem["interval"] == INTERVAL and problem["rounds"] == 1
    rows = {row["name"]: row for row in problem["rows"]}
    assert list(rows) == [c.name for c in (*who.TORCH, *who.OURS)]
    for name, row in rows.items():
        sides = {"torch", "ours", "singd"} & set(row)
        assert ("singd" in sides) == (bool(stored["peers"]) and name in who.PEERS)
        for side in sides:
            assert len(row[side]["time"]) == 3 and min(row[side]["time"]) > 0
            assert "sound" not in row[side]
    assert rows[ADAMW]["torch"]["time"] == [1, 1, 1] and rows[ADAMW]["torch"]["peak"] == 1
    # two moments, and one number per parameter tensor
    assert rows[ADAMW]["torch"]["state"] == pytest.approx(2, abs=1e-3)
    assert rows[SGD]["torch"]["state"] == 1
    printed = capsys.readouterr().out
    assert all(printed.count(name) >= 2 for name in rows)  # the text and the rst table
    assert ("Not installed" in printed) == (not stored["peers"])


def test_rows_can_be_chosen():
    names = [c.name for c in contenders(["kfac"]) if c.side == "ours"]
    assert names == ["IKFAC dense", "KFAC dense"]
    assert [c.name for c in contenders(["kfac"])][:2] == [ADAMW, SGD]


def test_a_period_has_one_refresh():
    (contender,) = (c for c in who.OURS if c.name == "SINGD diagonal")
    training = Training(contender, mlp(3, 4))
    before = [p.clone() for p in training.model.parameters()]
    for k in range(3):
        training.period()
        clock = training.optimizer.param_groups[0]
        assert clock["refreshes"] == k + 1 and clock["step"] == (k + 1) * INTERVAL
    assert len(training.laps) == 3 and min(min(training.laps)) > 0
    assert all((p != q).any() for p, q in zip(training.model.parameters(), before, strict=True))
    assert training.is_sound
    next(training.model.parameters()).data.fill_(float("nan"))
    assert not training.is_sound


def test_bytes_are_counted_once():
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    own = torch.zeros(10)

    class Thing:
        pass

    thing = Thing()
    thing.all = {"a": own[:4], own: [own[2:], (model.weight, model.weight.grad, model)]}
    thing.all["loop"] = thing
    thing.half = torch.zeros(3, dtype=torch.float16)
    assert floors.bytes_within(thing, model) == 40 + 6


# N = 7 data through layers 5-3-2, by hand: with the bias 6 inputs and 3 outputs, then 4 and 2
DIMENSIONS = [(6, 3), (4, 2)]


def test_floor_of_dense_factors():
    shapes = shapes_of(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(7, 5))
    step = sum(2 * (o * o * i + o * i * i) for i, o in DIMENSIONS)
    dims = [d for pair in DIMENSIONS for d in pair]
    work = floors.dense(shapes)
    assert total_flops(work.step) == step
    assert total_flops(work.refresh) == sum(2 * (2 * 7 * d * d + 3 * d**3) for d in dims)
    work = floors.kfac(shapes)
    assert total_flops(work.step) == step
    assert total_flops(work.refresh) == sum(2 * 7 * d * d + d**3 for d in dims)


def test_floor_of_structures():
    """With blocks or borders as large as the matrices, a floor is that of dense ones."""
    shapes = shapes_of(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(7, 5))
    full = floors.dense(shapes)
    work = floors.block_diagonal(9)(shapes)
    assert total_flops(work.step) == total_flops(full.step)
    assert total_flops(work.refresh) == total_flops(full.refresh)
    assert total_flops(floors.hierarchical(9, 9)(shapes).step) == 2 * total_flops(full.step)
    work = floors.hierarchical(1, 1)(shapes)
    assert total_flops(work.step) == sum(
        4 * (2 * d - 1) * n for i, o in DIMENSIONS for d, n in ((i, o), (o, i))
    )
    work = floors.block_diagonal(2)(shapes)
    # 6 = 3 blocks, 3 counts as 1, 4 = 2 blocks, 2 = 1 block
    assert total_flops(work.step) == 2 * 4 * (1 * 6 + 3 * 3 + 1 * 4 + 2 * 2)


def test_inverse():
    M = floors.Inverse(3)
    found = M.prepare(lambda *shape: torch.eye(*shape))()
    torch.testing.assert_close(found, torch.eye(3) / 4)
    assert M.flops == 27


def test_tables_name_what_is_unsound():
    cell = {"time": [1, 1, 1], "refresh": 1, "between": 1, "state": 2, "peak": 1, "total": 1}
    rows = [
        {"name": "AdamW", "torch": cell},
        {"name": "SINGD diagonal", "ours": cell, "singd": cell | {"sound": False}, "goal": 1.05},
    ]
    problem = {
        "name": "p",
        "title": "P",
        "about": "about",
        "plain_ms": [1, 1, 2],
        "plain_mib": 1,
        "rounds": 3,
        "interval": 10,
        "rows": rows,
    }
    text = tables.text(problem)
    assert "UNSOUND" in text and "SINGD diagonal (singd)" in text and "DISTURBED" in text
    assert "1.00 (1; -)" in tables.rst({"problems": [problem]})


def test_peers_are_optional(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(who, "import_module", missing)
    assert who.peers() == {} and {c.side for c in contenders()} == {"torch", "ours"}


def test_endless_peers_are_timed_once():
    """Two of its iterations stand for a period: one with a refresh, nine without."""
    slow = Contender("a", lambda m, *_: torch.optim.SGD(m.parameters(), lr=0.1), "singd", endless=True)
    found = measure(mlp(3, 4), [*who.TORCH, slow], Length(0.0, (2, 2)), "cpu")
    (cell,) = (row["singd"] for row in found["rows"] if row["name"] == "a")
    assert found["rounds"] == 2 and min(cell["time"]) > 0 and cell["state"] == 0


def test_endless_peers_have_short_periods():
    made = []

    def make(model, batch, interval):
        made.append((batch, interval))
        return torch.optim.SGD(model.parameters(), lr=0.1)

    Training(Contender("a", make, "singd", endless=True), mlp(3, 4)).period()
    Training(Contender("a", make, "singd"), mlp(5, 4)).period()
    assert made == [(3, 2), (5, INTERVAL)]
