"""The examples run as a user would run them, and print what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> str:
    """Run a script from the repository's root; return what it printed."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart():
    lines = run("examples/quickstart.py").splitlines()
    assert [line.split()[0] for line in lines[:4]] == [
        "qkv.weight",
        "qkv.bias",
        "head.weight",
        "head.bias",
    ]
    assert "Kronecker(B=(18, 18), A=(6, 6))  gradient norms 0.10 0.04 0.07 0.05" in lines[0]
    assert lines[4] == "head.weight: tr B = 0.659, tr A = 0.576"


def test_own_layer():
    out = run("examples/own_layer.py")
    assert "Without a rule: DenseBlock (20, 20)" in out
    assert "BatchGrad(8, 5, 4) agrees with autograd: True" in out
    assert "Kronecker(B=(4, 4), A=(5, 5)) agrees with autograd: True" in out


def test_digits(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    out = run("examples/digits.py", "--quick", "--out", str(tmp_path))

    lines = [line.split() for line in out.splitlines()]
    assert ["conv2", "16x8x3x3", "16x16", "72x72"] in [line[:4] for line in lines]
    assert ["blocks.1.qkv", "72x24", "72x72", "24x24"] in [line[:4] for line in lines]
    assert ["class_token", "24", "DenseBlock"] in [line[:3] for line in lines]
    assert "all five at once" in out

    images = sorted(tmp_path.glob("*.png"))
    names = ["blocks", "errors", "loudest_images", "spectra_convnet", "spectra_vit"]
    assert [image.stem for image in images] == names
    for image in images:
        assert image.stat().st_size > 10_000
        assert str(image) in out


def test_actor_critic(tmp_path: Path):
    pytest.importorskip("gymnasium")
    out = run("examples/actor_critic.py", "--quick", "--out", str(tmp_path))
    rows = [line.rsplit(maxsplit=5) for line in out.splitlines() if line.endswith(("-", "%"))]
    found = [(row[0].strip(), row[1]) for row in rows]
    names = ("Adam", "AdaHesScale", "AdaHesScale, scaled")
    assert found == [(name, lr) for name in names for lr in ("0.003", "0.03")]
    assert all(float(row[2]) > 5 for row in rows)
    assert (tmp_path / "actor_critic.png").stat().st_size > 5000


def test_digits_by_adahesscale(tmp_path: Path):
    lines = run("examples/digits_hesscale.py", "--quick", "--out", str(tmp_path)).splitlines()
    accuracy = {line.split()[0]: float(line.split(":")[1].split()[0]) for line in lines[1:4]}
    assert list(accuracy) == ["Adam", "AdaHesScale", "AdaHesScale-GN"]
    assert min(accuracy.values()) > 0.5
    assert (tmp_path / "digits_hesscale.png").stat().st_size > 5000


def test_digits_spectra(tmp_path: Path):
    lines = run("examples/digits_spectra.py", "--quick", "--out", str(tmp_path)).splitlines()
    losses = [float(line.split()[3]) for line in lines if line.startswith("epoch")]
    assert len(losses) == 3 and losses[-1] < losses[0]
    for name in ("digits_spectra", "digits_noise"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_kernel_regime(tmp_path: Path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    out = run("examples/kernel_regime.py", "--quick", "--out", str(tmp_path))
    rows = [line.split() for line in out.splitlines()]
    rows = [row for row in rows if row[1:2] in (["32"], ["128"])]
    assert [row[:2] for row in rows] == [[p, w] for p in ("standard", "ntk") for w in ("32", "128")]
    assert "none satisfies the condition C' <= 1" in out
    assert (tmp_path / "kernel_regime_mlp.png").stat().st_size > 10_000


def test_training_comparison(tmp_path: Path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    names = ["AdamW", "SINGD diagonal", "RF-AdamW"]
    what = ["--tasks", "graph", "--optimizers", *names, "--steps", "4", "--out", str(tmp_path)]
    search = ["search", *what, "--trials", "2", "--processes", "1"]
    compare = ["compare", *what, "--seeds", "2"]
    script = "from examples.training.__main__ import main"
    script += "".join(f"; print('---'); main({command})" for command in (search, compare, compare))
    searched, compared, again = run("-c", script).split("---\n")[1:]

    assert [line[7:25].strip() for line in searched.splitlines()[1:]] == names
    found = json.loads((tmp_path / "found.json").read_text())["graph"]
    for name in names:
        assert found[name]["trials"] == 2 and len(found[name]["config"]) == 5

    for dtype in ("float32", "bfloat16"):
        assert f"Graph network on molecules, {dtype}, 4 steps, 2 seeds" in compared
    rows = [line for line in compared.splitlines() if line.startswith(tuple(names))]
    assert len(rows) == 2 * len(names)
    assert (tmp_path / "tables.rst").read_text() in compared
    assert (tmp_path / "graph_4.png").stat().st_size > 10_000
    assert again.startswith("comparison: all runs are there")
    assert again.split("Smallest")[1] == compared.split("Smallest")[1]
