"""The same quantities from other packages, where these are installed (the extra ``peers``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any

import backpack as their
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.lowrank.measuring import Key, clear_of
from benchmarks.models import Problem
from benchmarks.timing import Variant

# What is imported, by the name of the package.
PACKAGES = {
    "curvlinops-for-pytorch": ("curvlinops", "scipy.sparse.linalg"),
    "vivit-for-pytorch": ("vivit",),
}


def installed() -> dict[str, str]:
    """Return the versions of the packages that are there."""
    return {name: version(name) for name, modules in PACKAGES.items() if _importable(modules)}


def _importable(modules: tuple[str, ...]) -> bool:
    try:
        for module in modules:
            import_module(module)
    except ImportError:
        return False
    return True


def missing_text(found: dict[str, str]) -> str:
    """Return a line about packages that are not there; empty if all are."""
    missing = ", ".join(name for name in PACKAGES if name not in found)
    return f"Not installed, so their cells are left out: {missing} (extra: peers)." if missing else ""


def steps(problem: Problem, k: int, rows: dict[str, str]) -> dict[Key, Variant]:
    """Return what the installed packages can do.

    Args:
        problem: The model and its data.
        k: Number of eigenpairs.
        rows: Names of rows for ``"spectrum"``, ``"mc"``, ``"pairs"``, ``"directional"``, ``"newton"``.
    """
    found: dict[Key, Variant] = {}
    there = installed()
    if "curvlinops-for-pytorch" in there:
        found["curvlinops", rows["pairs"]] = lanczos(problem, k)
    if "vivit-for-pytorch" in there:
        for what, variant in vivit_steps(problem, k).items():
            found["vivit", rows[what]] = variant
    return found


def lanczos(problem: Problem, k: int) -> Variant:
    """Return ARPACK's Lanczos method on GGN-vector products; float32, to machine precision."""
    from curvlinops import GGNLinearOperator
    from scipy.sparse.linalg import eigsh

    model, x, y = copy.deepcopy(problem.model), problem.x, problem.y
    parameters = list(model.parameters())
    start = np.random.default_rng(0).standard_normal(sum(p.numel() for p in parameters))

    def step() -> tuple:
        loss_fn = nn.CrossEntropyLoss()
        ggn = GGNLinearOperator(model, loss_fn, parameters, [(x, y)], check_deterministic=False)
        return eigsh(ggn.to_scipy(), k=k, v0=start.astype(np.float32))

    return Variant(step, clear_of(model))


def vivit_steps(problem: Problem, k: int) -> dict[str, Variant]:
    """Return vivit's computations, by what they compute."""
    import vivit

    def criterion(values: Tensor) -> list[int]:  # they are ascending
        return list(range(max(0, len(values) - k), len(values)))

    def damping(values: Tensor, *others: Tensor) -> Tensor:
        return torch.ones_like(values)

    model = their.extend(copy.deepcopy(problem.model))
    whole = {"params": list(model.parameters())}
    top = whole | {"criterion": criterion}
    makers: dict[str, tuple[Callable[[], Any], dict]] = {
        "spectrum": (vivit.EigvalshComputation, whole),
        "mc": (lambda: vivit.EigvalshComputation(mc_samples=1), whole),
        "pairs": (vivit.EighComputation, top),
        "directional": (vivit.DirectionalDerivativesComputation, top),
        "newton": (vivit.DirectionalDampedNewtonComputation, top | {"damping": damping}),
    }
    return {
        what: _vivit_step(problem, model, make, group, what in ("directional", "newton"))
        for what, (make, group) in makers.items()
    }


def _vivit_step(
    problem: Problem, model: nn.Module, make: Callable[[], Any], group: dict, several: bool
) -> Variant:
    loss_fn, x, y = their.extend(nn.CrossEntropyLoss()), problem.x, problem.y

    def step() -> Any:
        computation = make()
        extensions = computation.get_extensions() if several else [computation.get_extension()]
        hook = computation.get_extension_hook([group])
        with _symeig(), their.backpack(*extensions, extension_hook=hook):
            loss_fn(model(x), y).backward()
        return computation.get_result(group)

    return Variant(step, clear_of(model))


@contextmanager
def _symeig() -> Iterator[None]:
    """Have the successor stand in for an eigensolver that torch has removed and vivit calls."""
    before = torch.Tensor.symeig
    torch.Tensor.symeig = _successor
    try:
        yield
    finally:
        torch.Tensor.symeig = before


def _successor(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor | None]:
    return torch.linalg.eigh(matrix) if eigenvectors else (torch.linalg.eigvalsh(matrix), None)
