"""The ladder of overheads runs, and stores what it prints. No times are asserted."""

import json

import torch

from benchmarks import overhead


def test_overhead(tmp_path, capsys):
    threads = torch.get_num_threads()
    overhead.main(["--rounds", "2", "--seconds", "0", "--out", str(tmp_path)])
    assert torch.get_num_threads() == threads
    stored = json.loads((tmp_path / "overhead-cpu.json").read_text())
    assert [one["layers"] for one in stored["networks"]] == [41, 3]
    printed = capsys.readouterr().out
    for one in stored["networks"]:
        assert set(one["rungs"]) == set(overhead.RUNGS) and one["plain_us"] > 0
    assert all(rung in printed for rung in overhead.RUNGS)
