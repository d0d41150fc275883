"""Kronecker factors from curvlinops, where it is installed (the extra ``peers``)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

from torch import Tensor, nn

from benchmarks.timing import Variant

CURVLINOPS = "curvlinops-for-pytorch"
# Their names for our ``fisher``.
FISHERS = {"mc": "mc", "empirical": "empirical", "exact": "type-2"}


def installed() -> dict[str, str]:
    """Return the version of curvlinops by the package's name; empty where it cannot be imported."""
    try:
        import_module("curvlinops")
    except ImportError:
        return {}
    return {CURVLINOPS: version(CURVLINOPS)}


def kfac(model: nn.Module, x: Tensor, y: Tensor, approx: str, fisher: str) -> Variant:
    """Return the step that forms the factors of all linear layers and convolutions.

    Parameters of other layers have no factors there and are left out. The step leaves no gradient of
    the parameters, which the other sides' steps do: with sampled labels that takes a further backward
    pass. An operator is made in each step, as training would need it, and is what the step returns; it
    is told the number of data, which spares it passes over them to count.

    Args:
        model: The model, not extended.
        x: Inputs.
        y: Labels.
        approx: ``"expand"`` or ``"reduce"``.
        fisher: ``"mc"``, ``"empirical"`` or ``"exact"``.
    """
    from curvlinops import KFACLinearOperator

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    parameters = [p for layer in layers for p in layer.parameters()]

    def step() -> KFACLinearOperator:
        operator = KFACLinearOperator(
            *(model, nn.CrossEntropyLoss(), parameters, [(x, y)]),
            check_deterministic=False,
            fisher_type=FISHERS[fisher],
            kfac_approx=approx,
            num_per_example_loss_terms=1,
            num_data=len(x),
        )
        operator.compute_kronecker_factors()
        return operator

    return Variant(step)
