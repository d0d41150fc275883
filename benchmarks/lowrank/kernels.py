"""The neural tangent kernel, against the two ways of torch's tutorial."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from backpack_ext import NTK
from benchmarks.lowrank.measuring import PLAIN, Length, backward_step, measure
from benchmarks.models import Problem
from benchmarks.timing import Variant

OUTPUTS = ("full", "trace")
SIDES = ("ours", "contraction", "products")
# How many times faster than the contraction is aimed at, by problem.
GOALS = {"mlp": 40.0, "cnn": 2.0}


def _function(model: nn.Module) -> tuple[Callable[[dict, Tensor], Tensor], dict[str, Tensor]]:
    """Return the model as a function of parameters and one datum, and the parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return lambda values, x: functional_call(model, values, (x[None],))[0], parameters


def contraction(model: nn.Module, x: Tensor, outputs: str = "full") -> Tensor:
    """Return the kernel ``[N, N, C, C]``, or its trace ``[N, N]``, by contracting the Jacobian."""
    function, parameters = _function(model)
    jacobians = vmap(jacrev(function), (None, 0))(parameters, x)
    formula = {"full": "Naf,Mbf->NMab", "trace": "Naf,Maf->NM"}[outputs]
    return sum(torch.einsum(formula, J.flatten(2), J.flatten(2)) for J in jacobians.values())


def products(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """Return the kernel ``[N, M, C, C]`` by products with vectors, a backward and a forward one each."""
    function, parameters = _function(model)

    def pair(one: Tensor, two: Tensor) -> Tensor:
        z, pull = vjp(lambda values: function(values, one), parameters)

        def column(vector: Tensor) -> Tensor:
            return jvp(lambda values: function(values, two), (parameters,), pull(vector))[1]

        return vmap(column)(torch.eye(z.numel(), dtype=z.dtype, device=z.device))

    return vmap(vmap(pair, (None, 0)), (0, None))(x1, x2)


def run(problem: Problem, length: Length, device: str) -> dict:
    """Measure one problem.

    Returns:
        A dictionary for JSON. ``speedup`` of a peer's cell: quartiles of its time over ours.
    """
    x, loss_fn = problem.x, nn.CrossEntropyLoss()
    model = copy.deepcopy(problem.model)
    steps = {PLAIN: backward_step(copy.deepcopy(model), loss_fn, x, problem.y)}
    for outputs in OUTPUTS:
        ntk = NTK(copy.deepcopy(model), outputs=outputs)
        steps["ours", outputs] = Variant(lambda ntk=ntk: ntk.gram(x))
        steps["contraction", outputs] = Variant(lambda o=outputs: contraction(model, x, o))
    # All pairs at once take N times the memory (more than 33 GB on the MLP) and longer: one datum after
    # the other is paired with all, and each of these takes the same time. The trace needs as much.
    steps["products", "full"] = Variant(lambda: products(model, x[:1], x))
    measured = measure(steps, length, device)
    rows = []
    for outputs in OUTPUTS:
        row: dict = {"name": outputs}
        for side in SIDES:
            if (side, outputs) in steps:
                count = len(x) if side == "products" else 1
                row[side] = measured.cell((side, outputs), count)
                if side != "ours":
                    base = ("ours", outputs)
                    row[side]["speedup"] = measured.ratio((side, outputs), base, count=count)
        row["goal"] = GOALS.get(problem.name)
        rows.append(row)
    return {
        "part": "ntk",
        "name": problem.name,
        "title": problem.title,
        "about": problem.about,
        **measured.head(),
        "rows": rows,
    }
