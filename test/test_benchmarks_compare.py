"""Comparing commits: the statistics by hand, the worktrees' life, wrong use."""

import json
import subprocess

import pytest

from benchmarks import compare, ours

KEY = ("mlp", "BatchGrad")


def test_chance_is_the_share_of_signs():
    assert compare.chance([0.1] * 6) == 2 / 64
    assert compare.chance([0.3, -0.3]) == 1
    # the sums of all signs are 5, 3, 3, 1 and their negatives
    assert compare.chance([1.0, 1.0, -3.0]) == 1
    assert compare.chance([1.0, 1.0, 3.0]) == 2 / 8
    assert compare.chance([-2.0, 1.0, 4.0]) == 6 / 8  # sums 7, 5, 3, 1: three are at least 3


def _figures(*values):
    return [{KEY: (value, 2.0)} for value in values]


def test_changes_are_marked():
    """Drift by pairs cancels: each pair's ratio is 0.9, whatever the pair's level."""
    levels = [1.0, 1.5, 1.1, 1.9, 1.2, 1.4]
    (row,) = compare.compared(_figures(*levels), _figures(*(0.9 * v for v in levels)))
    assert row["time"] == pytest.approx([0.9] * 3) and row["chance"] == 2 / 64 and row["changed"]
    assert (row["problem"], row["name"]) == KEY and row["memory"] == 1
    assert row["before"] == pytest.approx(1.3) and row["after"] == pytest.approx(1.17)
    # as sure, but too small to matter; and large, but as often up as down
    for factors in ([0.995] * 6, [0.8, 1.25] * 3):
        after = [f * v for f, v in zip(factors, levels, strict=True)]
        (row,) = compare.compared(_figures(*levels), _figures(*after))
        assert not row["changed"]
    # five pairs cannot be sure
    assert not compare.compared(_figures(*levels[:5]), _figures(*[0.5] * 5))[0]["changed"]
    assert compare.compared(_figures(1.0), [{}]) == []
    printed = compare.text(compare.compared(_figures(*levels), _figures(*[5.0] * 6)), ["old", "new"])
    assert "slower" in printed and "old" in printed and "BatchGrad" in printed


def _stored(quartiles, name="BatchGrad", memory=2.0):
    cell = {"time": quartiles, "memory": memory}
    return {"problems": [{"name": "mlp", "rows": [{"name": name, "ours": cell}]}]}


def test_stored_results_are_compared(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, report in zip(
        paths, (_stored([1.9, 2, 2.1]), _stored([1.4, 1.5, 1.6], memory=1.0)), strict=True
    ):
        path.write_text(json.dumps(report))
    (row,) = compare.main(["--files", *map(str, paths)])
    assert (
        row["changed"]
        and row["time"] == pytest.approx([1.4 / 2.1, 0.75, 1.6 / 1.9])
        and row["memory"] == 0.5
    )
    assert "faster" in capsys.readouterr().out
    (row,) = compare.compared_files(_stored([1.9, 2, 2.1]), _stored([2.0, 2.3, 2.4]))
    assert not row["changed"]
    assert compare.compared_files(_stored([1, 1, 1]), _stored([1, 1, 1], "Variance")) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "one commit or two"),
        (["a", "b", "c"], "one commit or two"),
        (["a", "--files", "b", "c"], "not both"),
        (["a", "--pairs", "17"], "expected 1 to 16"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err


def test_ours_measures_nothing_else(capsys):
    found = ours.main(["--models", "tiny", "--rows", "L2", "--repetitions", "1", "--threads", "1"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    figures = compare.figures_of(found)
    assert set(figures) == {("tiny", "BatchL2Grad"), ("tiny", "KFAC mc + BatchL2Grad + DiagGGN mc")}
    assert all(time > 0.5 and memory > 0.9 for time, memory in figures.values())


# --------------------------------------------------------------------------- repositories


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with two commits whose "benchmarks" print what the commit's library holds."""
    root = tmp_path / "repository"
    for folder in ("library", "benchmarks/results"):
        (root / folder).mkdir(parents=True)
    (root / "benchmarks" / "results" / "large.json").write_text("{}")
    (root / "benchmarks" / "__init__.py").write_text("")
    (root / "library" / "__init__.py").write_text("time = 2.0\n")
    monkeypatch.setattr(compare, "ROOT", root)
    _git(root, "init", "--quiet")
    _commit(root)
    (root / "library" / "__init__.py").write_text("time = 1.0\n")
    _commit(root)
    # this tree's benchmarks are newer than both commits'
    (root / "benchmarks" / "ours.py").write_text(
        "import json, library\n"
        "cell = {'time': [0, library.time, 9], 'memory': 1.0}\n"
        "rows = [{'name': 'BatchGrad', 'ours': cell}]\n"
        "print('warnings of others')\n"
        "print(json.dumps({'library': library.__file__, 'problems': [{'name': 'mlp', 'rows': rows}]}))\n"
    )
    return root


def _git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True
    )


def _commit(root):
    _git(root, "add", "-A")
    _git(root, "commit", "--quiet", "-m", "a commit")


def _worktrees(root):
    return _git(root, "worktree", "list").stdout.count("\n")


def test_two_commits_and_the_tree(repository, capsys):
    (row,) = compare.main(["HEAD~1", "HEAD", "--models", "mlp", "--pairs", "6"])
    assert (row["before"], row["after"]) == (2.0, 1.0) and row["changed"]
    assert row["time"] == [0.5, 0.5, 0.5]
    assert _worktrees(repository) == 1
    (repository / "library" / "__init__.py").write_text("time = 3.0\n")
    (row,) = compare.main(["HEAD", "--pairs", "1"])
    assert (row["before"], row["after"]) == (1.0, 3.0) and not row["changed"]
    assert "working tree" in capsys.readouterr().out and _worktrees(repository) == 1


def test_worktrees_are_removed_when_measuring_fails(repository):
    (repository / "benchmarks" / "ours.py").write_text("raise RuntimeError('no such extension')")
    with pytest.raises(SystemExit, match="no such extension"):
        compare.main(["HEAD~1", "HEAD"])
    assert _worktrees(repository) == 1
    with pytest.raises(KeyboardInterrupt), compare.checked_out("HEAD") as tree:
        assert (tree / "library").exists() and not (tree / "benchmarks" / "results").exists()
        assert _worktrees(repository) == 2
        raise KeyboardInterrupt
    assert _worktrees(repository) == 1 and not tree.exists()


def test_another_library_is_noticed(repository):
    """As when an installed one would be found first."""
    path = repository / "benchmarks" / "ours.py"
    path.write_text(path.read_text().replace("library.__file__", "json.__file__"))
    with pytest.raises(SystemExit, match="imported another library"):
        compare.main(["HEAD"])


def test_unknown_commits_and_no_repository(repository, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no commit 'nonsense'"):
        compare.main(["HEAD", "nonsense"])
    assert _worktrees(repository) == 1
    with pytest.raises(SystemExit, match="no commit '--all'"):
        compare.commit_of("--all")
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.setattr(compare, "ROOT", outside)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(SystemExit, match="not a git repository"):
        compare.main(["HEAD"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="needs git"):
        compare.main(["HEAD"])
