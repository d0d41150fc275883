"""The rows of the table: what is asked of the library, of BackPACK, and of the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from backpack import extensions as theirs

from backpack_ext import (
    BL89,
    KFAC,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    HesScale,
    SumGradSquared,
    Variance,
)
from benchmarks.floor import Product, Shapes


@dataclass(frozen=True)
class Row:
    """One quantity, or several at once.

    Args:
        name: Row head in tables.
        ours: ``ours(device)`` returns our extensions; None stands for no context at all.
        theirs: Returns BackPACK's extensions for the same quantity; None where it has none.
        products: The matrix products needed beyond a plain step.
        context: Whether the step runs inside a ``backpack(...)`` block.
        extended: Whether the model has to be extended, beside the loss.
        first_order: Whether BackPACK's extensions carry no vectors: they run on any graph.
        curvlinops: Approximation and Fisher of curvlinops' KFAC for the same factors (without the
            gradient); None where it has none.
    """

    name: str
    ours: Callable[[str], list]
    theirs: Callable[[], list] | None
    products: Callable[[Shapes], list[Product]]
    context: bool = True
    extended: bool = True
    first_order: bool = False
    curvlinops: tuple[str, str] | None = None


def _diagonals(shapes: Shapes) -> list[Product]:
    """Carry h to the first layer's output, and contract it with the squared inputs."""
    return shapes.sweep(1) + shapes.each("weight_product")


def _several(device: str) -> list:
    """Two of the three share one sweep, because they share a generator."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        KFAC(fisher="mc", generator=generator),
        BatchL2Grad(),
        DiagGGN(fisher="mc", generator=generator),
    ]


def _kfac(approx: str, fisher: str, backpacks: Callable[[], list] | None = None) -> tuple[Row, Row]:
    """Return the rows of KFAC as it comes, and with all factors formed, as others form them.

    BackPACK's KFAC of a convolution is neither flavour (its B is that of reduce, its A that of expand
    times S); it stands beside expand.
    """

    def products(shapes: Shapes, roots: bool) -> list[Product]:
        sweep = shapes.sweep(1) if fisher == "mc" else []
        return sweep + shapes.each("factors", approx, 1, roots)

    return (
        Row(
            f"KFAC {approx} {fisher}",
            lambda device: [KFAC(approx, fisher)],
            None,
            lambda s: products(s, True),
        ),
        Row(
            f"KFAC {approx} {fisher}, formed",
            lambda device: [KFAC(approx, fisher, keep="factor")],
            backpacks,
            lambda s: products(s, False),
            curvlinops=(approx, fisher),
        ),
    )


ROWS: tuple[Row, ...] = (
    *_kfac("expand", "mc", lambda: [theirs.KFAC(mc_samples=1)]),
    *_kfac("expand", "empirical"),
    *_kfac("reduce", "mc"),
    *_kfac("reduce", "empirical"),
    Row(
        "KFAC expand exact",
        lambda device: [KFAC("expand", "exact")],
        lambda: [theirs.KFLR()],
        lambda s: s.sweep(s.classes) + s.each("factors", "expand", s.classes),
        curvlinops=("expand", "exact"),
    ),
    Row(
        "BatchGrad",
        lambda device: [BatchGrad()],
        lambda: [theirs.BatchGrad()],
        lambda s: s.each("per_sample"),
        first_order=True,
    ),
    Row(
        "BatchL2Grad",
        lambda device: [BatchL2Grad()],
        lambda: [theirs.BatchL2Grad()],
        lambda s: s.each("norms"),
        first_order=True,
    ),
    Row(
        "SumGradSquared",
        lambda device: [SumGradSquared()],
        lambda: [theirs.SumGradSquared()],
        lambda s: s.each("square_sum"),
        first_order=True,
    ),
    # The mean that the variance needs is the gradient, which a plain step computes anyway.
    Row(
        "Variance",
        lambda device: [Variance()],
        lambda: [theirs.Variance()],
        lambda s: s.each("square_sum"),
        first_order=True,
    ),
    Row(
        "BatchDotGrad",
        lambda device: [BatchDotGrad()],
        None,
        lambda s: s.each("dots"),
    ),
    Row(
        "DiagGGN mc",
        lambda device: [DiagGGN("mc")],
        lambda: [theirs.DiagGGNMC(mc_samples=1)],
        lambda s: s.sweep(1) + s.each("square_sum"),
    ),
    Row(
        "DiagGGN exact",
        lambda device: [DiagGGN("exact")],
        lambda: [theirs.DiagGGNExact()],
        lambda s: s.sweep(s.classes) + s.each("square_sum", s.classes),
    ),
    Row(
        "KFAC mc + BatchL2Grad + DiagGGN mc",
        _several,
        lambda: [theirs.KFAC(mc_samples=1), theirs.BatchL2Grad(), theirs.DiagGGNMC(mc_samples=1)],
        lambda s: s.sweep(1) + s.each("factors", "expand", 1) + s.each("norms") + s.each("square_sum"),
    ),
    Row("HesScale", lambda device: [HesScale()], None, _diagonals, extended=False),
    Row("HesScale-GN", lambda device: [HesScale(True)], None, _diagonals, extended=False),
    Row("BL89", lambda device: [BL89()], None, _diagonals, extended=False),
    Row("backpack() with nothing", lambda device: [], lambda: [], lambda s: [], first_order=True),
    Row(
        *("extended, no context", lambda device: [], lambda: [], lambda s: []),
        context=False,
        first_order=True,
    ),
)

# What names of rows have in them that short runs measure: those with goals, three quantities at once,
# and no context.
HEADLINES = ("KFAC expand mc", "KFAC reduce", "SumGradSquared", "DiagGGN mc", "extended")
